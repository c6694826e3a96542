"""The teacher that a router asks beside its versions: over real HTTP, of raystill's own endpoint and of one that is
scripted to fail in every way."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route as Path_
from starlette.testclient import TestClient

from cluster.api_keys import create_key, opened_keys
from cluster.config import validate
from cluster.errors import ConfigError
from services.endpoint import answering
from services.endpoint import teacher as teachers
from services.endpoint.api import build_api
from services.endpoint.fixed import FixedModel
from services.endpoint.limits import BYTES_PER_TOKEN
from services.endpoint.metrics import RouterMetrics
from services.endpoint.router import Router, put_router_into
from services.endpoint.schema import DirectoryArguments, EndpointArguments
from services.endpoint.teacher import Teacher
from tests.endpoint_models import save_version
from tests.local_http import call, served

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = "tiny-student"
TEXT = {"model": f"{MODEL}@teacher", "prompt": "the cat 猫", "max_tokens": 24, "temperature": 0}
CHAT = {**TEXT, "messages": [{"role": "user", "content": "the cat"}]}
CHAT.pop("prompt")
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
FIRST = b'data: {"choices": [{"index": 0, "text": "a"}]}\n\n'


@dataclass
class Scripted:
    """An endpoint that answers as it is told, and remembers what it was asked."""

    how: Callable[[], Response] = Response
    models: tuple[str, ...] = ("scripted",)
    listed: bytes | None = None
    """What it lists, if that is no list of models."""
    asked: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)

    def app(self) -> Starlette:
        async def models(request: Request) -> Response:
            if request.headers.get("authorization") != "Bearer the-teacher-s":
                return JSONResponse({"error": {"message": "wrong key sk-secret"}}, 401)
            if self.listed is not None:
                return Response(self.listed, media_type="application/json")
            return JSONResponse({"data": [{"id": name} for name in self.models]})

        async def answer(request: Request) -> Response:
            self.asked.append((str(request.url), dict(request.headers), await request.json()))
            return self.how()

        return Starlette(routes=[Path_("/v1/models", models), Path_("/{path:path}", answer, methods=["GET", "POST"])])


def events(*parts: bytes) -> Callable[[], Response]:
    async def written() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    return lambda: StreamingResponse(written(), media_type="text/event-stream")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSTILL_TEACHER_KEY", "the-teacher-s\n")


@pytest.fixture
def arguments(tmp_path: Path) -> EndpointArguments:
    database = f"sqlite:///{tmp_path}/champions.db"
    return EndpointArguments(model_name=MODEL, database=database, max_new_tokens=64, max_body_bytes=8192, max_choices=4)


class Front:
    """A router whose versions must not be asked, with a teacher behind it."""

    def __init__(self, arguments: EndpointArguments, **fields: Any) -> None:
        def reach(_: Any) -> Any:
            raise AssertionError("a version was asked")

        arguments = arguments.replace(**fields)
        self.router = Router(arguments, reach, RouterMetrics(MODEL), Teacher(arguments))
        self.client = TestClient(put_router_into(build_api(arguments, self.router, place="front"), self.router))

    def row(self) -> dict[str, Any]:
        """What the page is told of the teacher."""
        [row] = self.client.get("/v1/raystill/traffic").json()["versions"]
        return row

    def ask(self, path: str = "/v1/completions", **body: Any) -> Any:
        return self.client.post(path, json={**(CHAT if "chat" in path else TEXT), **body})


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Scripted, str]]:
    endpoint = Scripted()
    with served(endpoint.app()) as url:
        yield endpoint, url


@pytest.fixture
def scripted(arguments: EndpointArguments, running: tuple[Scripted, str]) -> tuple[Scripted, Front]:
    endpoint, url = running
    endpoint.how, endpoint.models, endpoint.asked = events(FIRST, b"data: [DONE]\n\n"), ("scripted",), []
    endpoint.listed = None
    return endpoint, Front(arguments, teacher_url=url)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A directory served as `raystill serve --model` does."""
    directory = tmp_path_factory.mktemp("teacher")
    save_version(directory, seed=5)
    fields = {"model_name": "big", "directory": str(directory), "max_new_tokens": 64, "max_context_tokens": 400}
    arguments = DirectoryArguments(**fields)
    with served(build_api(arguments, FixedModel(arguments))) as url:
        yield url


def error_of(response: Any) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"] or response.json()["error"]["message"]


def test_teacher_s_answer_is_its_own(arguments: EndpointArguments, plain: str) -> None:
    front, direct = Front(arguments, teacher_url=f"{plain}/v1/"), {**TEXT, "model": "big"}
    row = front.row()
    assert (row["version"], row["alias"], row["problem"]) == ("big", "teacher", None)
    with TestClient(front.client.app) as client:
        front.client = client
        whole = front.ask()
        streamed = front.ask(**STREAM)
        chat = front.ask("/v1/chat/completions", stream=True)
    assert whole.json()["usage"]["completion_tokens"] == 24
    chunks = [json.loads(line.removeprefix("data: ")) for line in streamed.text.split("\n\n")[:-2]]
    assert streamed.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == whole.json()["choices"][0]["text"]
    assert chunks[-1]["usage"] == whole.json()["usage"]
    assert direct["model"] == chunks[0]["model"]
    assert '"usage":{' not in chat.text, "it was not asked for"
    one, two, three = front.router.take_observations()
    assert all(seen.ok and seen.trial is None and seen.completion_tokens == 24 for seen in (one, two, three))
    assert (one.ttft_s, one.token_s) == (None, None), "of an answer that came whole"
    assert 0 < two.ttft_s < 5
    assert front.router.in_flight.total() == 0


def test_teacher_gets_the_checked_request_and_nothing_else(scripted: tuple[Scripted, Front]) -> None:
    endpoint, front = scripted
    extra = {"user": "alice", "evil": 1, "tools": [], "stream": True, "n": 2}
    headers = {"authorization": "Bearer client", "cookie": "a=b", "x-forwarded-host": "h", "x-request-id": "r"}
    response = front.client.post("/v1/completions?to=elsewhere", json={**TEXT, **extra}, headers=headers)
    assert response.content == FIRST + b"data: [DONE]\n\n"
    [(url, sent, body)] = endpoint.asked
    assert url.endswith("/v1/completions")
    assert sent["authorization"] == "Bearer the-teacher-s"
    assert not {"cookie", "x-forwarded-host", "x-request-id"} & sent.keys()
    wanted = {"prompt": TEXT["prompt"], "max_tokens": 24, "temperature": 0, "n": 2, **STREAM}
    assert body == {**wanted, "model": "scripted"}
    front.ask(max_tokens=None)
    assert endpoint.asked[-1][2]["max_tokens"] == 64, "no longer than this endpoint's answers"


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/v1/completions", {"max_tokens": 65}, (400, "At most 64 tokens can be generated, asked for 65")),
        ("/v1/completions", {"n": 5}, (400, "At most 4 choices (prompts times n) in one request")),
        ("/v1/completions", {"prompt": 1.5}, (400, "invalid_value")),
        ("/v1/completions", {"prompt": "x" * 9000}, (413, "request_too_large")),
        ("/v1/embeddings", {"input": "a"}, (404, "operation_not_supported")),
        ("/v1/x%2F..%2F..%2Fadmin", {}, (404, "operation_not_supported")),
        ("/v1/completions/", {}, (404, "operation_not_supported")),
    ],
)
def test_teacher_is_not_asked_what_a_version_would_refuse(
    scripted: tuple[Scripted, Front], path: str, body: dict[str, Any], expected: tuple[int, str]
) -> None:
    endpoint, front = scripted
    assert error_of(front.ask(path, **body)) == expected
    assert endpoint.asked == []


def test_teacher_is_behind_the_keys_and_places_of_every_request(
    arguments: EndpointArguments, scripted: tuple[Scripted, Front]
) -> None:
    endpoint, front = scripted
    with opened_keys(arguments.database) as engine:
        _, good = create_key(engine, "alice", tokens_per_minute=1000)
        _, other = create_key(engine, "bob", models=("another",))
    url = front.router._arguments.teacher_url
    front = Front(arguments, teacher_url=url)
    assert front.ask().status_code == 401
    assert front.client.get("/v1/raystill/traffic").status_code == 401
    front.client.headers["authorization"] = f"Bearer {other}"
    assert error_of(front.ask()) == (403, "model_not_allowed")
    assert endpoint.asked == []
    front.client.headers["authorization"] = f"Bearer {good}"
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 500, "completion_tokens": 200}}\n\n'
    endpoint.how = events(FIRST, usage, b"data: [DONE]\n\n")
    assert front.ask(stream=True).content == FIRST + b"data: [DONE]\n\n"
    left = int(front.ask(max_tokens=1).headers["x-ratelimit-remaining-tokens"])
    assert 200 < left < 300, "what the teacher counted is the key's to pay"
    front.ask(stream=True)
    assert front.ask(stream=True).status_code == 429


@pytest.mark.parametrize(
    ("how", "status", "said"),
    [
        (lambda: JSONResponse({"error": {"message": "prompt too long"}}, 400), 400, "The teacher: prompt too long"),
        (lambda: Response("no", 422), 400, "it answers with status 422"),
        (lambda: JSONResponse({"error": {"message": "key sk-secret"}}, 401), 503, "refuses this endpoint's key"),
        (lambda: Response("", 404), 503, "status 404"),
        (lambda: Response("", 429, {"retry-after": "17"}), 503, "status 429"),
        (lambda: RedirectResponse("http://127.0.0.1:9/v1/completions"), 503, "status 307"),
        (lambda: Response("<html>"), 503, "did not answer with a stream"),
        (events(), 503, "broke off"),
        (events(b"data: {\n\n"), 503, "broke off"),
        (events(b'data: {"error": {"message": "sk-secret"}}\n\n'), 503, "broke off"),
    ],
)
def test_teacher_that_does_not_answer_is_an_error_in_our_words(
    scripted: tuple[Scripted, Front], how: Callable[[], Response], status: int, said: str
) -> None:
    endpoint, front = scripted
    endpoint.how = how
    response = front.ask(stream=True)
    assert response.status_code == status
    assert said in response.json()["error"]["message"]
    assert "secret" not in response.text
    if status == 503:
        assert response.headers["retry-after"] == ("17" if "429" in said else "5")
    [seen] = front.router.take_observations()
    assert (seen.ok, seen.trial) == (status < 500, None)
    endpoint.how = lambda: Response("[1]", media_type="application/json")
    assert front.ask().status_code == 503


def test_teacher_whose_stream_breaks_off_ends_with_an_error_event(scripted: tuple[Scripted, Front]) -> None:
    endpoint, front = scripted
    endpoint.how = events(b": quiet\n\n", FIRST)
    response = front.ask(stream=True)
    said = response.text.split("\n\n")
    assert (response.status_code, said[0]) == (200, FIRST.decode().strip())
    assert json.loads(said[1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert "[DONE]" not in response.text
    assert [seen.ok for seen in front.router.take_observations()] == [False]


def test_teacher_whose_stream_is_silent_for_a_while_keeps_the_connection(
    scripted: tuple[Scripted, Front], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "KEEP_ALIVE_S", 0.05)
    endpoint, front = scripted

    async def slow() -> AsyncIterator[bytes]:
        yield FIRST
        await asyncio.sleep(0.5)
        yield FIRST + b"data: [DONE]\n\n"

    endpoint.how = lambda: StreamingResponse(slow(), media_type="text/event-stream")
    said = front.ask(stream=True).text.strip().split("\n\n")
    assert said.count(": keep-alive") >= 3
    assert [item for item in said if item != ": keep-alive"] == [*2 * [FIRST.decode().strip()], "data: [DONE]"]
    assert [seen.ok for seen in front.router.take_observations()] == [True]


@pytest.mark.parametrize(
    ("prompt", "completion", "counted"),
    [
        ("7", "9", (7, 9)),
        ("-1000000", "-1000000", (None, 0)),
        ("1" + 400 * "0",) * 2 + ((..., 256),),
        ("true", '"3"', (None, 0)),
    ],
)
def test_teacher_s_word_for_what_it_used_is_taken_as_far_as_it_can_be(
    scripted: tuple[Scripted, Front], prompt: str, completion: str, counted: tuple[Any, int]
) -> None:
    endpoint, front = scripted
    usage = f'{{"prompt_tokens": {prompt}, "completion_tokens": {completion}}}'
    endpoint.how = lambda: Response(f'{{"choices": [], "usage": {usage}}}', media_type="application/json")
    body = json.dumps(TEXT)
    assert front.client.post("/v1/completions", content=body).status_code == 200
    [seen] = front.router.take_observations()
    named = {None: len(body) // BYTES_PER_TOKEN, ...: len(body) + 1000}
    assert (seen.prompt_tokens, seen.completion_tokens) == (named.get(counted[0], counted[0]), counted[1])


def test_teacher_s_answer_has_a_bound_and_is_json(
    scripted: tuple[Scripted, Front], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "_ANSWER_BYTES", 1000)
    endpoint, front = scripted
    for content in (b'{"choices": [], "x": "%s"}' % (2000 * b"x"), b'{"choices": [], "usage": {"prompt_tokens": NaN}}'):
        endpoint.how = lambda content=content: Response(content, media_type="application/json")  # type: ignore[misc]
        assert error_of(front.ask()) == (503, "teacher_unavailable")


@pytest.mark.parametrize(
    "listed",
    [
        b'{"data": [{"id": "\\ud800"}]}',
        b'{"data": [{"id": "' + 1000 * b"n" + b'"}]}',
        b'{"data": [{"id": ""}]}',
        200_000 * b"[",
        b'{"data": [], "more": "' + (1 << 20) * b"x" + b'"}',
    ],
)
def test_teacher_that_lists_nonsense_is_not_up_and_the_page_is(scripted: tuple[Scripted, Front], listed: bytes) -> None:
    endpoint, front = scripted
    endpoint.listed = listed
    assert "model" in front.row()["problem"]
    assert error_of(front.ask()) == (503, "teacher_unavailable")


def test_teacher_stops_when_the_client_leaves(scripted: tuple[Scripted, Front]) -> None:
    endpoint, front = scripted
    stopped = threading.Event()

    async def without_end() -> AsyncIterator[bytes]:
        try:
            while True:
                yield FIRST
                await asyncio.sleep(0.01)
        finally:
            stopped.set()

    endpoint.how = lambda: StreamingResponse(without_end(), media_type="text/event-stream")
    sent = asyncio.run(call(front.client.app, {**TEXT, "stream": True}, leave_after=5))
    assert sent[0]["status"] == 200
    assert stopped.wait(10)
    assert front.router.in_flight.total() == 0


def test_teacher_that_is_not_up_says_so_until_it_is(
    arguments: EndpointArguments, monkeypatch: pytest.MonkeyPatch, scripted: tuple[Scripted, Front]
) -> None:
    monkeypatch.setattr(teachers, "_FRESH_S", 0.0)
    endpoint, front = scripted
    down = Front(arguments, teacher_url="http://127.0.0.1:9")
    assert down.row()["problem"] == "nothing answers at serve.teacher_url"
    assert down.row()["version"] == "teacher"
    assert error_of(down.ask()) == (503, "teacher_unavailable")
    endpoint.models = ("one", "other")
    assert front.row()["problem"] == "it lists 2 models; say which with serve.teacher_name"
    url = front.router._arguments.teacher_url
    named = Front(arguments, teacher_url=url, teacher_name="other")
    assert (named.row()["problem"], named.row()["version"]) == (None, "other")
    monkeypatch.setenv("RAYSTILL_TEACHER_KEY", "wrong")
    assert front.row()["problem"] == "it refuses this endpoint's key (RAYSTILL_TEACHER_KEY)"
    monkeypatch.setenv("RAYSTILL_TEACHER_KEY", "the-teacher-s")
    endpoint.models = ("one",)
    assert front.row()["problem"] is None
    assert front.ask(stream=True).status_code == 200


def test_teacher_that_takes_no_connection_keeps_nobody_waiting(
    arguments: EndpointArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "_LOOK_S", 0.1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        front = Front(arguments, teacher_url=f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert front.row()["problem"] == "nothing answers at serve.teacher_url"


def test_no_teacher_is_asked_where_none_is_named(arguments: EndpointArguments) -> None:
    router = Router(arguments, lambda _: None, RouterMetrics(MODEL))  # type: ignore[arg-type,return-value]
    client = TestClient(put_router_into(build_api(arguments, router, place="front"), router))
    assert client.get("/v1/raystill/traffic").json()["versions"] == []
    assert client.post("/v1/completions", json=TEXT).status_code == 404


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8001", "ftp://h", "http://", "http://h:99999", "http://h?key=1", "http://h#x"]
)
def test_teacher_url_that_is_no_base_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"teacher_url.*base URL"):
        validate(EndpointArguments, {"model_name": "m", "database": "d", "teacher_url": url}, "x")


def test_teacher_url_has_no_key_and_none_is_shown() -> None:
    with pytest.raises(ConfigError, match="RAYSTILL_TEACHER_KEY") as refused:
        validate(EndpointArguments, {"model_name": "m", "database": "d", "teacher_url": "http://u:pw@h"}, "x")
    assert "pw" not in str(refused.value)


def test_plain_directory_asks_no_teacher() -> None:
    with pytest.raises(ConfigError, match="drop it"):
        validate(DirectoryArguments, {"model_name": "m", "directory": "d", "teacher_url": "http://h"}, "x")
