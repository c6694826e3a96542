"""Points 1 to 16 of the checklist: models, keys, request ids, and the one shape of every error."""

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.api_keys import create_key, opened_keys
from services.endpoint.api import build_api
from tests.conformance.bodies import ALL, SDK, chat, text
from tests.conformance.clients import CLIENTS
from tests.conformance.server import Endpoint
from tests.local_http import served

SHAPE = {"message", "type", "param", "code"}
each_client = pytest.mark.parametrize("client", ALL)
each_sdk = pytest.mark.parametrize("client", SDK)


KEYS: dict[str, dict[str, Any]] = {
    "right": {},
    "other": {"models": ("other",)},
    "few": {"requests_per_minute": 1, "tokens_per_minute": 6000},
    "short": {"requests_per_minute": 6000, "tokens_per_minute": 100},
    "counted": {"tokens_per_minute": 600},
}


@dataclass
class Locked:
    url: str
    keys: dict[str, str]
    """By the names above."""

    @property
    def right(self) -> str:
        return self.keys["right"]


@pytest.fixture
def locked(tiny: Endpoint, tmp_path: Path) -> Iterator[Locked]:
    """The same endpoint behind keys, of which nobody has used anything yet."""
    database = f"sqlite:///{tmp_path}/champions.db"
    with opened_keys(database) as engine:
        made = {name: create_key(engine, name, **fields)[1] for name, fields in KEYS.items()}
    with served(build_api(tiny.arguments.replace(database=database), tiny.fixed)) as url:
        yield Locked(url, made)


def ask(url: str, method: str = "GET", path: str = "/v1/models", **options: Any) -> httpx.Response:
    return httpx.request(method, f"{url}{path}", trust_env=False, timeout=60, **options)


@each_sdk
def test_01_models_are_listed_and_found(client: str, tiny: Endpoint, connect: Any) -> None:
    api = connect(client, tiny)
    [card] = api.models()
    assert (card["id"], card["object"]) == ("tiny", "model")
    assert isinstance(card["created"], int)
    assert card["owned_by"]
    assert api.model("tiny") == card
    missing = api.failure(lambda: api.model("other"))
    assert (missing.status, missing.error["code"]) == (404, "model_not_found")


def test_01_models_list_has_its_object(tiny: Endpoint) -> None:
    assert ask(tiny.url).json()["object"] == "list"


def test_02_keys_are_asked_for(locked: Locked) -> None:
    for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {locked.right}"}):
        refused = ask(locked.url, headers=header)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert refused.headers["www-authenticate"].startswith("Bearer")
    assert ask(locked.url, headers={"authorization": f"Bearer {locked.right}"}).status_code == 200


def test_02_openai_client_shows_a_wrong_key_as_authentication_error(locked: Locked, tiny: Endpoint) -> None:
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", max_retries=0) as api:
        with pytest.raises(openai.AuthenticationError):
            api.models.list()
        assert api.with_options(api_key=locked.right).models.list().data[0].id == "tiny"


@each_client
def test_02_key_without_right_on_the_model_is_403(client: str, tiny: Endpoint, locked: Locked, connect: Any) -> None:
    api = connect(client, locked, key=locked.keys["other"])
    found = api.failure(lambda: api.chat(**chat(tiny)))
    assert (found.status, found.error["code"], found.error["param"]) == (403, "model_not_allowed", "model")
    assert found.kind in ("", "PermissionDeniedError")
    assert connect(client, locked, key=locked.right).chat(**chat(tiny))["choices"]


@each_client
def test_03_unknown_model_is_404(client: str, tiny: Endpoint, connect: Any) -> None:
    api = connect(client, tiny)
    found = api.failure(lambda: api.chat(**{**chat(tiny), "model": "other"}))
    assert (found.status, found.error["code"], found.error["param"]) == (404, "model_not_found", "model")
    assert found.kind in ("", "NotFoundError")


@each_sdk
def test_04_every_answer_has_a_request_id(client: str, tiny: Endpoint, connect: Any) -> None:
    api = connect(client, tiny)
    ids = {api.request_id(**chat(tiny)) for _ in range(2)}
    assert len(ids) == 2
    assert all(ids)
    assert api.failure(lambda: api.chat(**chat(tiny, n=-1))).headers["x-request-id"]


def test_04_streams_and_unknown_paths_have_a_request_id(tiny: Endpoint) -> None:
    for answer in (
        ask(tiny.url, path="/nothing"),
        ask(tiny.url, "POST", "/v1/chat/completions", json=chat(tiny, stream=True)),
    ):
        assert len(answer.headers.get_list("x-request-id")) == 1


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("POST", "/v1", 404), ("GET", "/v1/chat/completions", 405), ("PUT", "/v1/models", 405)],
)
def test_05_unknown_path_and_wrong_method_are_in_the_envelope(
    tiny: Endpoint, method: str, path: str, status: int
) -> None:
    answer = ask(tiny.url, method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == SHAPE
    assert (status == 405) == ("allow" in answer.headers)


@pytest.mark.parametrize("host", ["healthz", "127.0.0.1/healthz", "127.0.0.1:80/healthz?", "x#/healthz"])
def test_06_keys_are_decided_on_the_routed_path(locked: Locked, host: str) -> None:
    for target in ("/v1/models", "/v1/models?/healthz", "/v1/models#/healthz", "//healthz", "/healthz/../v1/models"):
        port = int(locked.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            status = int(connection.makefile("rb").readline().split()[1])
        assert status in (400, 401), (target, host)


def test_07_health_needs_no_key_and_says_no_secret(locked: Locked) -> None:
    health = ask(locked.url, path="/healthz")
    assert health.status_code == 200
    assert locked.right not in health.text
    assert "/" not in json.dumps({key: value for key, value in health.json().items() if key != "model"})
    for path in ("/v1/models", "/openapi.json", "/v1/models/tiny", "/nothing", "/docs", "/"):
        assert ask(locked.url, path=path).status_code == 401, path


def error_answers(tiny: Endpoint) -> dict[str, httpx.Response]:
    completions = "/v1/completions"
    return {
        "400": ask(tiny.url, "POST", completions, json=text(tiny, n="1")),
        "404": ask(tiny.url, path="/nothing"),
        "405": ask(tiny.url, "DELETE", completions),
        "413": ask(tiny.url, "POST", completions, json=text(tiny, prompt="x" * 70_000)),
        "415": ask(tiny.url, "POST", completions, content=b"{}", headers={"content-type": "text/plain"}),
    }


def test_08_every_error_has_one_shape(tiny: Endpoint) -> None:
    for status, answer in error_answers(tiny).items():
        assert answer.status_code == int(status)
        assert answer.headers["content-type"] == "application/json"
        assert set(answer.json()) == {"error"}
        assert set(answer.json()["error"]) == SHAPE


def test_08_failure_of_the_model_is_500_in_the_envelope(breaking: Endpoint) -> None:
    answer = ask(breaking.url, "POST", "/v1/chat/completions", json=chat(breaking, temperature=0))
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert set(answer.json()["error"]) == SHAPE


@each_client
def test_09_mistakes_are_400_with_their_parameter(client: str, tiny: Endpoint, connect: Any) -> None:
    api = connect(client, tiny)
    for change, param in (
        ({"temperature": 3.5}, "temperature"),
        ({"max_tokens": 65}, "max_tokens"),
        ({"top_p": 2.0}, "top_p"),
    ):
        found = api.failure(lambda change=change: api.chat(**chat(tiny, **change)))
        assert (found.status, found.error["type"], found.error["param"]) == (400, "invalid_request_error", param)
        assert found.kind in ("", "BadRequestError")


@each_client
def test_10_context_overflow_has_its_code(client: str, tiny: Endpoint, connect: Any) -> None:
    api = connect(client, tiny)
    for words in (200, 10_000):
        long = [{"role": "user", "content": "x " * words}]
        found = api.failure(lambda long=long: api.chat(**chat(tiny, messages=long)))
        assert found.status == 400
        assert found.error["code"] == "context_length_exceeded"


def test_11_large_bodies_are_413(tiny: Endpoint) -> None:
    limit = tiny.arguments.max_body_bytes
    body = json.dumps(text(tiny)).encode()
    head = {"content-type": "application/json"}
    exact = ask(tiny.url, "POST", "/v1/completions", content=body + b" " * (limit - len(body)), headers=head)
    assert exact.status_code == 200
    for content in (body + b" " * (limit + 1 - len(body)), iter([body, b" " * limit])):
        over = ask(tiny.url, "POST", "/v1/completions", content=content, headers=head)
        assert over.status_code == 413
        assert over.json()["error"]["code"] == "request_too_large"


def test_11_promised_length_is_refused_before_it_comes(tiny: Endpoint) -> None:
    with socket.create_connection(("127.0.0.1", tiny.port), timeout=10) as connection:
        lines = [
            "POST /v1/completions HTTP/1.1",
            "Host: x",
            "Content-Type: application/json",
            "Content-Length: 1073741824",
        ]
        connection.sendall("\r\n".join([*lines, "", "{"]).encode())
        assert connection.makefile("rb").readline().split()[1] == b"413"


@pytest.fixture
def full(tiny: Endpoint) -> Iterator[None]:
    """The endpoint with every place taken, until the test ends."""
    tiny.set_full(True)
    yield
    tiny.set_full(False)


@each_client
def test_12_rate_limits_reach_the_client_as_429(client: str, tiny: Endpoint, locked: Locked, connect: Any) -> None:
    for name, what in (("few", "requests"), ("short", "tokens")):
        api = connect(client, locked, key=locked.keys[name])
        assert api.chat(**chat(tiny))["choices"]
        found = api.failure(lambda api=api: [api.chat(**chat(tiny)) for _ in range(20)])
        assert (found.status, found.error["code"], found.error["type"]) == (429, "rate_limit_exceeded", what)
        assert found.kind in ("", "RateLimitError")
        assert 1 <= int(found.headers["retry-after"]) <= 60
        for kind in ("requests", "tokens"):
            limit, left, reset = (found.headers[f"x-ratelimit-{of}-{kind}"] for of in ("limit", "remaining", "reset"))
            assert int(limit) == KEYS[name][f"{kind}_per_minute"]
            assert 0 <= int(left) <= int(limit)
            assert reset.endswith("s")


@each_client
def test_12_what_no_minute_holds_is_not_to_be_tried_again(
    client: str, tiny: Endpoint, locked: Locked, connect: Any
) -> None:
    api = connect(client, locked, key=locked.keys["short"])
    found = api.failure(lambda: api.chat(**chat(tiny, n=8)))
    assert (found.status, found.error["code"]) == (429, "rate_limit_exceeded")
    assert found.headers["x-should-retry"] == "false"
    assert "retry-after" not in found.headers


@each_client
def test_13_overload_is_503_with_retry_after(client: str, tiny: Endpoint, full: None, connect: Any) -> None:
    api = connect(client, tiny)
    found = api.failure(lambda: api.chat(**chat(tiny)))
    assert found.status == 503
    assert found.error["type"] == "server_error"
    assert 1 <= int(found.headers["retry-after"]) <= 120
    assert found.kind in ("", "InternalServerError")


class Counting:
    """An application, and how many requests it was asked."""

    def __init__(self, app: Any, on_request: Any = None) -> None:
        self._app, self._on_request = app, on_request
        self.num_requests = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self.num_requests += 1
            if self._on_request is not None:
                self._on_request(self.num_requests)
        await self._app(scope, receive, send)


@pytest.mark.parametrize("client", ["openai", "openai_async", "langchain"])
def test_14_clients_try_again_as_they_are_told(client: str, tiny: Endpoint) -> None:
    def full_for_the_first(number: int) -> None:
        tiny.set_full(number == 1)

    app = Counting(build_api(tiny.arguments, tiny.fixed), full_for_the_first)
    with served(app) as url:
        api = CLIENTS[client](url, max_retries=2)
        started = time.monotonic()
        assert api.chat(**chat(tiny))["choices"][0]["message"]["role"] == "assistant"
        api.close()
    assert app.num_requests == 2
    assert time.monotonic() - started >= 0.9  # Retry-After: 1, by the client's own clock


@pytest.mark.parametrize("client", ["openai", "openai_async", "langchain"])
def test_14_clients_do_not_try_a_mistake_again(client: str, tiny: Endpoint) -> None:
    app = Counting(build_api(tiny.arguments, tiny.fixed))
    with served(app) as url:
        api = CLIENTS[client](url, max_retries=2)
        assert api.failure(lambda: api.chat(**chat(tiny, n=99))).status == 400
        api.close()
    assert app.num_requests == 1


def test_15_messages_name_no_insides(tiny: Endpoint, breaking: Endpoint) -> None:
    answers = list(error_answers(tiny).values())
    answers.append(ask(breaking.url, "POST", "/v1/chat/completions", json=chat(breaking, temperature=0)))
    for answer in answers:
        message = answer.json()["error"]["message"]
        for word in ("Traceback", "File ", ".py", "pydantic", "site-packages", "/tmp", "SELECT", "ModelError", "logit"):
            assert word not in message


def test_16_rejections_cost_nothing(tiny: Endpoint, locked: Locked) -> None:
    most = KEYS["counted"]["tokens_per_minute"]
    as_counted = {"authorization": f"Bearer {locked.keys['counted']}"}

    def post(body: Any, path: str = "/v1/completions") -> httpx.Response:
        return ask(
            locked.url,
            "POST",
            path,
            content=body if isinstance(body, bytes) else json.dumps(body).encode(),
            headers={"content-type": "application/json", **as_counted},
        )

    def left() -> int:
        """Tokens of this minute; what asks has no cost itself."""
        return int(post(b"", "/nothing").headers["x-ratelimit-remaining-tokens"])

    rejected: list[tuple[int, Any]] = [
        (400, b"{"),
        (400, text(tiny, n="1")),
        (400, text(tiny, prompt="x " * 400)),
        (404, text(tiny, model="other")),
        (413, text(tiny, prompt="x" * 70_000)),
        (429, text(tiny, prompt="x" * 3_000)),
    ]
    for status, body in [*rejected, *((status, {**body, "stream": True}) for status, body in rejected[1:])]:
        assert left() == most
        refused = post(body)
        assert refused.status_code == status
        assert "usage" not in refused.json()
        assert left() == most, (status, body)
    tiny.set_full(True)
    try:
        assert post(text(tiny)).status_code == 503
    finally:
        tiny.set_full(False)
    assert left() == most
    used = post(text(tiny, n=8)).json()["usage"]["total_tokens"]
    assert used > most / 6, "so much that it is not made up for while the test asks what is left"
    assert most - used <= left() < most
