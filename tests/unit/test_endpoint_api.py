"""The HTTP interface without Ray: a real tiny model behind a test client."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from services.endpoint.api import build_api
from services.endpoint.engines.requests import Load
from services.endpoint.errors import ApiError
from services.endpoint.following import ChampionFollower, verified
from services.endpoint.model import Piece, ServedModel
from services.endpoint.pool import WorkPool
from services.endpoint.schema import EndpointArguments
from tests.endpoint_models import crown_version, publish_version

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = "tiny-student"
TEXT = {"model": MODEL, "prompt": "the cat 猫", "max_tokens": 24, "seed": 1, "temperature": 1.5}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "the cat 猫"}], "max_tokens": 24, "seed": 1}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> EndpointArguments:
    directory = tmp_path_factory.mktemp("api")
    database = f"sqlite:///{directory}/champions.db"
    uri, manifest_hash = publish_version(directory / "local", directory / "storage", "1", seed=0)
    crown_version(database, MODEL, "1", uri, manifest_hash)
    return EndpointArguments(
        model_name=MODEL,
        database=database,
        max_context_tokens=200,
        max_new_tokens=64,
        max_choices=6,
        max_body_bytes=4096,
    )


@pytest.fixture(scope="module")
def follower(arguments: EndpointArguments) -> ChampionFollower:
    def load(directory: Path) -> ServedModel:
        return ServedModel(directory, arguments.max_context_tokens, arguments.max_new_tokens)

    follower = ChampionFollower(MODEL, arguments.database, verified(load))
    follower.poll()
    assert follower.problem is None
    return follower


@pytest.fixture
def client(arguments: EndpointArguments, follower: ChampionFollower) -> Iterator[TestClient]:
    with TestClient(build_api(arguments, follower)) as client:
        yield client
    assert follower.served is not None
    assert follower.served.model.load == Load(running=0, waiting=0, admitted_tokens=0)


def events(response: Any) -> list[Any]:
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_completion_stream_joins_to_the_whole_answer(client: TestClient) -> None:
    fields = {**TEXT, "prompt": ["the cat 猫", "a hat"], "n": 2, "logprobs": 2}
    whole = client.post("/v1/completions", json=fields).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] + whole["usage"]["completion_tokens"]
    chunks = events(client.post("/v1/completions", json={**fields, "stream": True}))
    assert all("usage" not in chunk for chunk in chunks)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    for choice in whole["choices"]:
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        for name, values in choice["logprobs"].items():
            assert [value for part in own for value in part["logprobs"][name]] == values


def test_chat_stream_joins_to_the_whole_answer_with_usage_and_logprobs(client: TestClient) -> None:
    fields = {**CHAT, "n": 2, "logprobs": True, "top_logprobs": 3, "temperature": 1.5}
    whole = client.post("/v1/chat/completions", json=fields).json()
    assert whole["object"] == "chat.completion"
    chunks = events(
        client.post("/v1/chat/completions", json={**fields, "stream": True, "stream_options": {"include_usage": True}})
    )
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    for choice in whole["choices"]:
        own = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["delta"].get("content", "") for part in own) == choice["message"]["content"]
        assert [part["finish_reason"] for part in own if part["finish_reason"]] == [choice["finish_reason"]]
        streamed = [entry for part in own if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert streamed == choice["logprobs"]["content"]
        whole_bytes = bytes(byte for entry in streamed for byte in entry["bytes"])
        assert whole_bytes.decode("utf-8", "replace") == choice["message"]["content"]
        assert all(len(entry["top_logprobs"]) == 3 and entry["logprob"] <= 0 for entry in streamed)


def test_usage_counts_are_those_of_the_tokenizer(client: TestClient, follower: ChampionFollower) -> None:
    assert follower.served is not None
    tokenizer = follower.served.model.tokenizer
    usage = client.post("/v1/completions", json=TEXT).json()["usage"]
    assert usage["prompt_tokens"] == len(tokenizer.encode(TEXT["prompt"]))
    usage = client.post("/v1/chat/completions", json=CHAT).json()["usage"]
    assert usage["prompt_tokens"] == len(tokenizer.encode("user: the cat 猫\nassistant:"))


def test_echo_with_no_new_tokens_scores_the_prompt(client: TestClient) -> None:
    fields = {"model": MODEL, "prompt": "the cat 猫", "max_tokens": 0, "echo": True, "logprobs": 1}
    choice = client.post("/v1/completions", json=fields).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == "the cat 猫"
    assert choice["finish_reason"] == "length"
    assert logprobs["token_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    assert [
        max(top.values()) >= value
        for top, value in zip(logprobs["top_logprobs"][1:], logprobs["token_logprobs"][1:], strict=True)
    ].count(False) == 0
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    by_ids = client.post("/v1/completions", json={**fields, "prompt": [5, 6, 7]}).json()
    assert by_ids["usage"]["prompt_tokens"] == len(by_ids["choices"][0]["logprobs"]["tokens"]) == 3


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code"),
    [
        ("GET", "/nothing", None, 404, None),
        ("GET", "/v1/models/other", None, 404, "model_not_found"),
        ("GET", "/v1/completions", None, 405, None),
        ("POST", "/v1/models", None, 405, None),
        ("POST", "/v1/completions", b"", 400, "invalid_json"),
        ("POST", "/v1/completions", b'{"model": "x"}', 400, "missing_required_parameter"),
        ("POST", "/v1/completions", b'{"model": "x", "prompt": "a"}', 404, "model_not_found"),
        ("POST", "/v1/completions", b'{"model": "tiny-student@champion", "prompt": "a"}', 404, "model_not_found"),
        ("POST", "/v1/completions", b'{"model": "\\ud800", "prompt": "a"}', 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b'{"n": NaN}', 400, "invalid_json"),
        ("POST", "/v1/completions", b" " * 5000, 413, "request_too_large"),
    ],
)
def test_errors_have_one_shape(
    client: TestClient, method: str, path: str, content: bytes | None, status: int, code: str | None
) -> None:
    response = client.request(method, path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"max_tokens": 65}, "max_tokens", None),
        ({"prompt": "x " * 190}, "prompt", "context_length_exceeded"),
        ({"prompt": [10**6]}, "prompt", "invalid_value"),
        ({"n": 7}, "n", None),
        ({"n": 4, "prompt": ["a", "b"]}, "n", None),
    ],
)
def test_refusals_come_before_the_first_byte(
    client: TestClient, change: dict, param: str, code: str | None, stream: bool
) -> None:
    response = client.post("/v1/completions", json={**TEXT, **change, "stream": stream})
    assert response.status_code == 400
    assert (response.json()["error"]["param"], response.json()["error"]["code"]) == (param, code)


def test_body_of_unknown_length_and_wrong_type_are_refused(client: TestClient) -> None:
    chunked = client.post(
        "/v1/completions", content=iter([b" " * 3000] * 2), headers={"content-type": "application/json"}
    )
    assert chunked.status_code == 413
    assert client.post("/v1/completions", content=b"a=1", headers={"content-type": "text/plain"}).status_code == 415


def test_models_and_health_describe_the_champion(client: TestClient) -> None:
    models = client.get("/v1/models").json()
    assert models["object"] == "list"
    assert client.get(f"/v1/models/{MODEL}").json() == models["data"][0]
    assert set(models["data"][0]) == {"id", "object", "created", "owned_by"}
    health = client.get("/healthz").json()
    assert (health["model"], health["version"], health["epoch"], health["problem"]) == (MODEL, "1", 1, None)


def test_without_champion_everything_but_the_paths_is_503(arguments: EndpointArguments) -> None:
    follower = ChampionFollower("nobody", arguments.database, lambda directory: None)  # type: ignore[arg-type,return-value]
    follower.poll()
    with TestClient(build_api(arguments, follower)) as client:
        health = client.get("/healthz")
        assert health.status_code == 503
        assert "no champion yet" in health.json()["problem"]
        for response in (client.get("/v1/models"), client.post("/v1/completions", json=TEXT)):
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "model_not_ready"
            assert int(response.headers["retry-after"]) <= 120


def test_unexpected_errors_are_500_before_and_an_event_after_the_first_byte(
    client: TestClient, follower: ChampionFollower, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FailsLate:
        """Answers a piece, and then an error."""

        def __init__(self, *_: Any) -> None:
            self._items = iter([3, Piece(0, "some"), RuntimeError("secret path")])

        def __aiter__(self) -> "FailsLate":
            return self

        async def __anext__(self) -> Any:
            item = next(self._items)
            if isinstance(item, Exception):
                raise item
            return item

        def cancel(self) -> None:
            pass

    assert follower.served is not None
    monkeypatch.setattr(follower.served.model, "submit", FailsLate)
    whole = client.post("/v1/completions", json=TEXT)
    assert whole.status_code == 500
    assert whole.json()["error"]["type"] == "server_error"
    streamed = client.post("/v1/completions", json={**TEXT, "stream": True})
    assert streamed.status_code == 200
    first, second = [line for line in streamed.text.split("\n\n") if line]
    assert "some" in first
    assert json.loads(second.removeprefix("data: "))["error"]["type"] == "server_error"
    assert "secret" not in whole.text + streamed.text
    monkeypatch.undo()
    assert client.post("/v1/completions", json=TEXT).status_code == 200


def test_pool_refuses_when_full_and_frees_what_is_cancelled() -> None:
    async def scenario() -> None:
        pool = WorkPool(max_running=1, max_waiting=1)
        gate = threading.Event()

        def work(cancelled: Callable[[], bool]) -> Iterator[int]:
            yield 1
            while not cancelled():
                gate.wait(0.01)
            yield 2

        running = pool.start(work)
        assert await anext(running) == 1
        waiting = pool.start(work)
        with pytest.raises(ApiError) as refused:
            pool.start(work)
        assert refused.value.status == 503
        assert refused.value.headers == {"retry-after": "1"}
        waiting.cancel()
        assert [item async for item in waiting] == []
        running.cancel()
        assert [item async for item in running] in ([], [2])
        assert pool.num_admitted == 0
        pool.close()
        with pytest.raises(ApiError, match="shutting down"):
            pool.start(work)
        assert pool.num_admitted == 0

    asyncio.run(scenario())
