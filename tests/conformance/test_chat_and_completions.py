"""Points 17 to 26 of the checklist: what an answer holds, and what the parameters do."""

from typing import Any

import pytest

from tests.conformance.bodies import ALL, SDK, chat, text
from tests.conformance.server import Endpoint

each_client = pytest.mark.parametrize("client", ALL)
each_sdk = pytest.mark.parametrize("client", SDK)


@each_sdk
def test_17_chat_completion_has_its_fields(client: str, tiny: Endpoint, connect: Any) -> None:
    found = connect(client, tiny).chat(**chat(tiny, n=2))
    assert found["id"].startswith("chatcmpl-")
    assert (found["object"], found["model"]) == ("chat.completion", "tiny")
    assert isinstance(found["created"], int)
    assert [choice["index"] for choice in found["choices"]] == [0, 1]
    assert all(choice["message"] and choice["finish_reason"] for choice in found["choices"])
    usage = found["usage"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]
    assert usage["prompt_tokens"] > 0
    assert usage["completion_tokens"] > 0


def test_17_text_completion_has_its_fields(tiny: Endpoint, connect: Any) -> None:
    found = connect("raw", tiny).complete(**text(tiny))
    assert found["id"].startswith("cmpl-")
    assert found["object"] == "text_completion"
    assert set(found["choices"][0]) == {"index", "text", "logprobs", "finish_reason"}


@each_client
def test_18_message_is_the_assistants(client: str, tiny: Endpoint, connect: Any) -> None:
    message = connect(client, tiny).chat(**chat(tiny))["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert isinstance(message["content"], str)


def test_18_nothing_confuses_langchain(tiny: Endpoint, connect: Any) -> None:
    raw = connect("raw", tiny)
    assert "error" not in raw.chat(**chat(tiny))
    for chunk in raw.chat_stream(**chat(tiny, stream_options={"include_usage": True})):
        assert isinstance(chunk["choices"], list)
        assert "error" not in chunk


@each_client
def test_19_finish_reason_is_stop_or_length(client: str, tiny: Endpoint, thinker: Endpoint, connect: Any) -> None:
    cut = connect(client, tiny).chat(**chat(tiny, max_tokens=1, temperature=0))
    assert cut["choices"][0]["finish_reason"] == "length"
    ended = connect(client, thinker).chat(**chat(thinker, temperature=0))
    assert ended["choices"][0]["finish_reason"] == "stop"


@each_client
def test_20_max_completion_tokens_wins(client: str, tiny: Endpoint, connect: Any) -> None:
    api = connect(client, tiny)
    fields = chat(tiny, temperature=0)
    del fields["max_tokens"]
    found = {}
    for limits in ({"max_tokens": 3}, {"max_completion_tokens": 4}, {"max_tokens": 9, "max_completion_tokens": 5}):
        if client == "langchain" and len(limits) == 2:  # one parameter under two names there
            continue
        found[len(found)] = api.chat(**fields, **limits)["usage"]["completion_tokens"]
    assert list(found.values()) == [3, 4, 5][: len(found)]


@each_client
def test_21_stop_text_ends_the_answer_and_is_left_out(client: str, polyglot: Endpoint, connect: Any) -> None:
    api = connect(client, polyglot)
    for stop, expected in (("猫", "é"), (["zz", "🐈", "!"], "é猫"), (["!", "é"], "")):
        found = api.chat(**chat(polyglot, temperature=0, stop=stop))["choices"][0]
        assert (found["message"]["content"], found["finish_reason"]) == (expected, "stop")


def test_21_more_than_four_stop_texts_are_refused(tiny: Endpoint, connect: Any) -> None:
    raw = connect("raw", tiny)
    assert raw.failure(lambda: raw.chat(**chat(tiny, stop=list("abcde")))).error["param"] == "stop"


@each_client
def test_22_answers_are_repeatable(client: str, tiny: Endpoint, connect: Any) -> None:
    api = connect(client, tiny)

    def say(**more: Any) -> str:
        return api.chat(**chat(tiny, **more))["choices"][0]["message"]["content"]

    assert say(temperature=0, seed=1) == say(temperature=0, seed=2)
    assert say(temperature=1.5, seed=1) == say(temperature=1.5, seed=1)
    assert len({say(temperature=1.5, seed=seed) for seed in range(4)}) > 1


@each_sdk
def test_23_n_gives_so_many_choices(client: str, tiny: Endpoint, connect: Any) -> None:
    api = connect(client, tiny)
    found = api.chat(**chat(tiny, n=4, temperature=1.5))
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert len({choice["message"]["content"] for choice in found["choices"]}) > 1
    bound = tiny.arguments.max_choices
    assert api.failure(lambda: api.chat(**chat(tiny, n=bound + 1))).error["param"] == "n"
    texts = api.complete(**text(tiny, prompt=["a", "b"], n=2))
    assert [choice["index"] for choice in texts["choices"]] == [0, 1, 2, 3]


@each_client
def test_24_content_is_text_or_parts_of_every_role(client: str, tiny: Endpoint, connect: Any) -> None:
    api = connect(client, tiny)

    def used(messages: list[dict[str, Any]]) -> tuple[str, int]:
        found = api.chat(**chat(tiny, messages=messages, temperature=0))
        return found["choices"][0]["message"]["content"], found["usage"]["prompt_tokens"]

    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    assert used([{"role": "user", "content": parts}]) == used([{"role": "user", "content": "the cat"}])
    every = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "tool", "content": "42", "tool_call_id": "a"},
        {"role": "user", "content": "so"},
    ]
    assert used(every)[1] > used(every[:2])[1]
    if client != "langchain":  # has no class for it, other than of its own making
        developer = [{"role": "developer", "content": "be kind"}, *every[1:]]
        assert used(developer) == used(every)


@each_sdk
def test_24_no_messages_are_refused(client: str, tiny: Endpoint, connect: Any) -> None:
    api = connect(client, tiny)
    found = api.failure(lambda: api.chat(**chat(tiny, messages=[])))
    assert (found.status, found.error["param"]) == (400, "messages")


@each_client
@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("response_format", {"type": "json_object"}),
        ("tools", [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]),
        ("logit_bias", {"5": 10}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -0.5),
        ("modalities", ["audio"]),
    ],
)
def test_25_what_is_not_supported_is_refused(client: str, tiny: Endpoint, connect: Any, param: str, value: Any) -> None:
    api = connect(client, tiny)
    found = api.failure(lambda: api.chat(**chat(tiny, **{param: value})))
    assert (found.status, found.error["param"]) == (400, param)


def test_25_image_parts_are_refused(tiny: Endpoint, connect: Any) -> None:
    raw = connect("raw", tiny)
    parts = [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]
    found = raw.failure(lambda: raw.chat(**chat(tiny, messages=[{"role": "user", "content": parts}])))
    assert (found.status, found.error["param"]) == (400, "messages.0.content.0.type")


@each_client
def test_26_usage_counts_the_tokens_of_the_template(client: str, tiny: Endpoint, connect: Any) -> None:
    api = connect(client, tiny)
    whole = api.chat(**chat(tiny))["usage"]
    read = len(tiny.model.tokenizer.encode("user: the cat 猫\nassistant:"))
    assert whole["prompt_tokens"] == read
    chunks = api.chat_stream(**chat(tiny, stream_options={"include_usage": True}))
    streamed = [chunk["usage"] for chunk in chunks if chunk["usage"]]
    assert {key: streamed[-1][key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")} == {
        key: whole[key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")
    }
