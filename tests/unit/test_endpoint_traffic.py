"""Who answers: stable for a subject, fair over subjects, and never taken back when the share rises."""

import itertools
import json

import pytest

from services.endpoint.outline import outline
from services.endpoint.schema import ChatRequest, CompletionRequest, EndpointConfig
from services.endpoint.traffic import Route, RoutingTable, is_shadowed, pick, place, subject_of

OLD = Route("old", "1", "a" * 64, "file:///1", "float", 200, 64)
NEW = Route("new", "2", "b" * 64, "file:///2", "float", 200, 64)
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
SUBJECTS = [f"user {number}" for number in range(10_000)]


def on_challenger(share: float, challenger: Route = NEW) -> set[str]:
    table = RoutingTable(champion=OLD, challenger=challenger, share=share)
    return {subject for subject in SUBJECTS if pick(table, subject) == challenger}


def test_pick_gives_the_challenger_its_share() -> None:
    for share in (0.0, 0.05, 0.25, 0.5):
        assert abs(len(on_challenger(share)) / len(SUBJECTS) - share) < 0.015
    assert on_challenger(0.0) == set()


def test_pick_keeps_who_is_on_the_challenger_when_the_share_rises() -> None:
    assert on_challenger(0.05) < on_challenger(0.25) < on_challenger(0.5)


def test_pick_is_the_same_each_time_and_other_subjects_try_the_next_challenger() -> None:
    assert on_challenger(0.25) == on_challenger(0.25)
    other = Route("other", "3", "c" * 64, "file:///3", "float", 200, 64)
    both = on_challenger(0.25) & on_challenger(0.25, other)
    assert abs(len(both) / len(SUBJECTS) - 0.0625) < 0.015


def test_pick_without_challenger_or_champion() -> None:
    assert pick(RoutingTable(champion=OLD, share=0.5), "user") == OLD
    assert pick(RoutingTable(), "user") is None


def test_place_lies_in_the_unit_interval() -> None:
    places = [place("salt", subject) for subject in SUBJECTS]
    assert 0 <= min(places) < 0.001
    assert 0.999 < max(places) < 1
    assert place("salt", "\udce9") == place("salt", "\udce9")


def test_place_is_found_for_what_is_no_unicode() -> None:
    assert 0 <= place("salt", "user \ud800") < 1


def test_shadow_takes_its_share_of_requests() -> None:
    table = RoutingTable(champion=OLD, challenger=NEW, share=0.5, shadow=0.3)
    taken = [number for number in range(5000) if is_shadowed(table, f"request {number}")]
    assert abs(len(taken) / 5000 - 0.3) < 0.03
    assert not is_shadowed(RoutingTable(champion=OLD, shadow=1.0), "request")


def test_subject_is_the_key_with_the_user_and_else_the_request() -> None:
    def subject(key: bytes | None, body: object, request: str = "r") -> str:
        headers = [(b"host", b"x")] + ([(b"authorization", key)] if key else [])
        return subject_of(headers, outline(TEXT, json.dumps(body).encode()).user, request)

    assert subject(b"Bearer a", {"user": "u"}, "1") == subject(b"Bearer a", {"prompt": "hi", "user": "u"}, "2")
    assert subject(b"Bearer a", {"user": "u"}) != subject(b"Bearer b", {"user": "u"})
    assert subject(b"Bearer a", {"user": "u"}) != subject(b"Bearer a", {"user": "v"})
    assert subject(b"Bearer a", {}, "1") == subject(b"Bearer a", {}, "2")
    assert subject(None, {"user": "u"}, "1") == subject(None, {"safety_identifier": "u"}, "2")
    assert subject(None, {}, "1") != subject(None, {}, "2")
    assert b"secret" not in subject(b"Bearer secret", {}).encode()


def test_subject_of_a_body_that_cannot_be_read_has_no_user() -> None:
    bodies = (b'{"user": ', b'["user"]', b'{"user": 7}', b'{"user":' + b"[" * 100_000, b'\xff"user"', b'{"user": ""}')
    assert {subject_of([], outline(TEXT, body).user, "r") for body in bodies} == {"request r"}


@pytest.mark.parametrize(
    ("path", "body", "longest"),
    [
        (TEXT, {"prompt": "a"}, 64),
        (TEXT, {"prompt": "a", "max_tokens": 7, "n": 3}, 21),
        (TEXT, {"prompt": ["a", "b"], "max_tokens": 7}, 14),
        (TEXT, {"prompt": [5, 6, 7], "max_tokens": 7}, 7),
        (TEXT, {"prompt": [[5], [6, 7]], "max_tokens": 10**9}, 128),
        (CHAT, {"messages": [], "max_tokens": 9, "max_completion_tokens": 5}, 5),
        (TEXT, {"prompt": "a", "max_tokens": 9, "max_completion_tokens": 5}, 9),
        (TEXT, {"prompt": "a", "max_completion_tokens": 5}, 64),
        (CHAT, {"messages": [], "n": 10**12}, 64 * 8),
        (CHAT, {"messages": [], "n": True, "max_tokens": -4}, 64),
        ("/v1/embeddings", {"input": ["a", "b"]}, 0),
        (TEXT, [1], 0),
    ],
)
def test_longest_answer_is_what_the_body_asks_for_within_bounds(path: str, body: object, longest: int) -> None:
    config = EndpointConfig(max_new_tokens=64, max_choices=8)
    assert outline(path, json.dumps(body).encode()).longest_answer(config) == longest


@pytest.mark.parametrize(("path", "kind"), [(TEXT, CompletionRequest), (CHAT, ChatRequest)])
def test_longest_answer_is_what_the_version_writes_at_most(
    path: str, kind: type[CompletionRequest] | type[ChatRequest]
) -> None:
    asked = {"model": "m", "prompt": "a", "messages": [{"role": "user", "content": "a"}]}
    config = EndpointConfig(max_new_tokens=64, max_choices=8)
    for limits in itertools.product((None, 1, 9, 100), repeat=2):
        body = {**asked, "n": 2, **dict(zip(("max_tokens", "max_completion_tokens"), limits, strict=True))}
        written = kind.model_validate(body).longest_answer(config.max_new_tokens)
        assert outline(path, json.dumps(body).encode()).longest_answer(config) == written
