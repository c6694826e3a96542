"""Keys, limits, overload and body limits over HTTP: a real tiny model behind a test client."""

import asyncio
import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from cluster.api_keys import create_key, opened_keys, revoke_key
from cluster.errors import ConfigError
from services.endpoint import envelope, keys
from services.endpoint.api import build_api
from services.endpoint.deployment import app
from services.endpoint.following import ChampionFollower, verified
from services.endpoint.model import ServedModel
from services.endpoint.page import page
from services.endpoint.schema import EndpointArguments
from tests.endpoint_models import crown_version, publish_version

MODEL = "tiny-student"
BODY = {"model": MODEL, "prompt": "the cat", "max_tokens": 8, "temperature": 0}
PATHS = (
    "/v1/models",
    f"/v1/models/{MODEL}",
    "/v1/completions",
    "/v1/chat/completions",
    "/nothing",
    "/docs",
    "//healthz",
)
LIMIT_BYTES = 4096


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    directory = tmp_path_factory.mktemp("gates")
    return publish_version(directory / "local", directory / "storage", "1", seed=0)


@dataclass
class Gated:
    """An application with a database of its own."""

    arguments: EndpointArguments
    follower: ChampionFollower
    api: Any

    def key(self, name: str = "alice", **fields: Any) -> str:
        with opened_keys(self.arguments.database) as engine:
            return create_key(engine, name, **fields)[1]

    def client(self) -> TestClient:
        return TestClient(self.api)


@pytest.fixture
def gated(version: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gated:
    torch.set_num_threads(1)
    monkeypatch.setattr(keys, "POLL_S", 0.05)
    database = f"sqlite:///{tmp_path}/champions.db"
    crown_version(database, MODEL, "1", *version)
    arguments = EndpointArguments(
        model_name=MODEL, database=database, max_new_tokens=64, max_body_bytes=LIMIT_BYTES, max_running=1, max_waiting=1
    )
    follower = ChampionFollower(MODEL, database, verified(lambda directory: ServedModel(directory, 200, 64)))
    follower.poll()
    return Gated(arguments, follower, build_api(arguments, follower))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def wait_until(condition: Any, timeout_s: float = 5) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.01)


# --- keys -------------------------------------------------------------------------------------------------------------


def test_everything_but_health_wants_a_key_once_there_is_one(gated: Gated) -> None:
    with gated.client() as client:
        assert client.get("/v1/models").status_code == 200
        key = gated.key()
        wait_until(lambda: client.get("/v1/models").status_code == 401)
        assert client.get("/healthz").status_code == 200
        for path in PATHS:
            for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE"):
                refused = client.request(method, path)
                assert refused.status_code == 401, (method, path)
                assert refused.headers["www-authenticate"] == "Bearer"
        error = client.get("/v1/models").json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == "invalid_api_key"
        assert client.get("/v1/models", headers=bearer(key)).status_code == 200
        assert client.post("/v1/completions", json=BODY, headers=bearer(key)).status_code == 200
        assert client.get("/nothing", headers=bearer(key)).status_code == 404


def test_websocket_is_closed(gated: Gated) -> None:
    with gated.client() as client, pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/models"):
        pass


def test_wrong_revoked_and_expired_keys_get_the_same_answer(gated: Gated) -> None:
    good, gone, short = gated.key(), gated.key("gone"), gated.key("short", lifetime_s=0.01)
    with opened_keys(gated.arguments.database) as engine:
        revoke_key(engine, "gone")
    wrong = good[:-1] + ("A" if good[-1] != "A" else "B")
    with gated.client() as client:
        headers: list[Any] = [bearer(text) for text in (wrong, gone, short, "", "x" * 5000, good + " x")]
        headers += [{"authorization": f"Basic {good}"}, {"authorization": good}]
        headers += [[("authorization", f"Bearer {good}"), ("authorization", f"Bearer {good}")]]
        answers = [client.get("/v1/models", headers=header) for header in headers]
        assert [answer.status_code for answer in answers] == [401] * len(headers)
        assert len({answer.content for answer in answers}) == 1
        for form in ("Bearer", "bearer", "BEARER "):
            assert client.get("/v1/models", headers={"authorization": f"{form} {good}"}).status_code == 200


@pytest.mark.parametrize(
    "value",
    [
        b"\x00",
        b"Bearer \x00",
        b"Bearer ' OR '1'='1' --",
        b"Bearer x'; DROP TABLE raystill_api_keys; --",
        b"Bearer %0d%0aset-cookie: a=b",
        b"Bearer \r\nx-admin: yes",
        b"Bearer \xff\xfe\xfd",
        "Bearer ｋｅｙ".encode(),
        b"Bearer " + b"A" * 100_000,
        b"Bearer\tkey",
        b"Bearer  ",
        b" ",
    ],
)
def test_hostile_headers_are_401_and_harm_nothing(gated: Gated, value: bytes) -> None:
    key = gated.key()
    with gated.client():
        scope = {
            **{"type": "http", "method": "GET", "path": "/v1/models", "raw_path": b"/v1/models", "query_string": b""},
            **{"http_version": "1.1", "scheme": "http", "root_path": "", "client": None, "server": ("127.0.0.1", 80)},
        }

        def ask(authorization: bytes) -> list[Any]:
            sent: list[Any] = []

            async def call() -> None:
                async def receive() -> Any:
                    return {"type": "http.disconnect"}

                async def send(message: Any) -> None:
                    sent.append(message)

                await gated.api({**scope, "headers": [(b"authorization", authorization)]}, receive, send)

            asyncio.run(call())
            return sent

        assert ask(value)[0]["status"] == 401
        assert value not in ask(value)[1]["body"] or not value.strip()
        assert ask(b"Bearer " + key.encode())[0]["status"] == 200


def test_revocation_is_effective_while_the_endpoint_runs(gated: Gated) -> None:
    key = gated.key()
    with gated.client() as client:
        assert client.get("/v1/models", headers=bearer(key)).status_code == 200
        with opened_keys(gated.arguments.database) as engine:
            revoke_key(engine, "alice")
        wait_until(lambda: client.get("/v1/models", headers=bearer(key)).status_code == 401)
        assert client.get("/v1/models").status_code == 401  # no key is left, and one is still asked for


def test_key_for_other_models_is_403(gated: Gated) -> None:
    mine, other = gated.key("mine", models=(MODEL,)), gated.key("other", models=("other",))
    with gated.client() as client:
        assert client.post("/v1/completions", json=BODY, headers=bearer(mine)).status_code == 200
        refused = client.post("/v1/completions", json=BODY, headers=bearer(other))
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "model_not_allowed"
        unknown = client.post("/v1/completions", json={**BODY, "model": "no"}, headers=bearer(mine))
        assert unknown.status_code == 404


def test_ten_thousand_guesses_at_the_door_and_none_gets_in(gated: Gated) -> None:
    key = gated.key()
    ring = keys.KeyRing(gated.arguments.database)
    ring.poll()

    def status(text: str) -> int:
        try:
            ring.authenticate({"headers": [(b"authorization", b"Bearer " + text.encode())], "server": None})
        except Exception as error:
            return error.status  # type: ignore[attr-defined,no-any-return]
        return 200

    assert status(key) == 200
    guesses = [f"{key[:14]}{number:043d}" for number in range(10_000)]
    started = time.process_time()
    assert {status(guess) for guess in guesses} == {401}
    assert (time.process_time() - started) / len(guesses) < 1e-3  # a wrong key costs no SQL


def test_keys_that_cannot_be_read_close_the_endpoint(gated: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    key = gated.key()
    ring = keys.KeyRing(gated.arguments.database)
    scope = {"headers": [(b"authorization", b"Bearer " + key.encode())], "server": None}
    with pytest.raises(envelope.ApiError) as unread:
        ring.authenticate(scope)
    assert unread.value.status == 503
    ring.poll()
    assert ring.authenticate(scope)
    monkeypatch.setattr(keys, "keys_state", lambda engine: 1 / 0)
    ring.poll()
    assert ring.authenticate(scope)  # for a while the keys known last are good
    monkeypatch.setattr(keys, "STALE_S", -1.0)
    with pytest.raises(envelope.ApiError):
        ring.authenticate(scope)


def test_public_address_without_a_key_is_refused_at_start_and_at_the_door(gated: Gated) -> None:
    arguments = {"model_name": MODEL, "database": gated.arguments.database, "host": "0.0.0.0"}
    with pytest.raises(ConfigError, match="raystill keys create"):
        app(arguments)
    ring = keys.KeyRing(gated.arguments.database)
    ring.poll()
    assert ring.authenticate({"headers": [], "server": ("127.0.0.1", 8000)}) is None
    assert ring.authenticate({"headers": [], "server": ("::1", 8000)}) is None
    with pytest.raises(envelope.ApiError, match="none was made yet"):
        ring.authenticate({"headers": [], "server": ("192.0.2.7", 8000)})
    gated.key()
    assert app(arguments)


# --- limits -----------------------------------------------------------------------------------------------------------


def test_limits_reach_the_official_client(gated: Gated) -> None:
    key = gated.key(requests_per_minute=3, tokens_per_minute=500)
    with gated.client() as http:
        client = openai.OpenAI(api_key=key, base_url="http://testserver/v1", http_client=http, max_retries=0)
        answer = client.completions.with_raw_response.create(**BODY)
        usage = answer.parse().usage
        assert answer.headers["x-ratelimit-limit-requests"] == "3"
        assert answer.headers["x-ratelimit-remaining-requests"] == "2"
        assert answer.headers["x-ratelimit-limit-tokens"] == "500"
        assert answer.headers["x-ratelimit-reset-requests"].endswith("s")
        second = client.completions.with_raw_response.create(**BODY, stream=True)
        list(second.parse())
        reserved = len(json.dumps({**BODY, "stream": True}, separators=(",", ":"))) // 4 + BODY["max_tokens"]
        expected = 500 - usage.total_tokens - reserved  # what was used by the first, what may be used by this one
        assert abs(int(second.headers["x-ratelimit-remaining-tokens"]) - expected) <= 8  # a second fills in 8
        client.completions.create(**BODY)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(**BODY)
        assert refused.value.code == "rate_limit_exceeded"
        assert 15 <= int(refused.value.response.headers["retry-after"]) <= 20
        assert refused.value.response.headers["x-ratelimit-remaining-requests"] == "0"


def test_retry_after_is_what_the_official_client_waits(gated: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    key = gated.key(requests_per_minute=1)
    waits: list[float] = []
    monkeypatch.setattr(openai.OpenAI, "_sleep_for_retry", _record(waits))
    with gated.client() as http:
        client = openai.OpenAI(api_key=key, base_url="http://testserver/v1", http_client=http, max_retries=1)
        client.completions.create(**BODY)
        with pytest.raises(openai.RateLimitError):
            client.completions.create(**BODY)
    assert waits == [60.0]


def _record(waits: list[float]) -> Any:
    def sleep(self: Any, *, retries_taken: int, max_retries: int, options: Any, response: Any) -> None:
        waits.append(self._calculate_retry_timeout(max_retries - retries_taken, options, response.headers))

    return sleep


def test_tokens_of_a_minute_are_bounded(gated: Gated) -> None:
    key = gated.key(tokens_per_minute=100)
    with gated.client() as client:
        large = client.post("/v1/completions", json={**BODY, "max_tokens": 64, "n": 4}, headers=bearer(key))
        assert large.status_code == 429
        assert large.headers["x-should-retry"] == "false"
        statuses = [client.post("/v1/completions", json=BODY, headers=bearer(key)).status_code for _ in range(12)]
        assert statuses[:3] == [200] * 3
        assert statuses[-1] == 429


def test_refusals_cost_no_request_and_mistakes_do(gated: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    headers = bearer(gated.key(requests_per_minute=10, tokens_per_minute=60))
    name = "x-ratelimit-remaining-requests"
    with gated.client() as client:
        assert client.post("/v1/completions", json={**BODY, "n": -1}, headers=headers).headers[name] == "9"
        large = client.post("/v1/completions", json={**BODY, "max_tokens": 64}, headers=headers)
        assert (large.status_code, large.headers[name]) == (429, "9")
        monkeypatch.setattr(gated.follower, "served", None)
        unready = client.post("/v1/completions", json=BODY, headers=headers)
        assert (unready.status_code, unready.headers[name]) == (503, "9")


# --- overload and bodies ----------------------------------------------------------------------------------------------


def test_overload_is_refused_before_the_body_and_places_come_back(
    gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    assert gated.follower.served is not None
    engine = gated.follower.served.model._scheduler._engine
    forward = engine.forward

    def held(reads: list[Any]) -> Any:
        gate.wait(30)
        return forward(reads)

    monkeypatch.setattr(engine, "forward", held)
    answers: list[int] = []
    with gated.client() as client:
        threads = [
            threading.Thread(target=lambda: answers.append(client.post("/v1/completions", json=BODY).status_code))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: client.get("/healthz").json()["requests"] == 2)

        refused = client.post("/v1/completions", content=b"not looked at")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "server_overloaded"
        assert 1 <= int(refused.headers["retry-after"]) <= 120
        assert client.get("/v1/models").status_code == 200
        gate.set()
        for thread in threads:
            thread.join()
        assert answers == [200, 200]
        assert client.post("/v1/completions", json=BODY).status_code == 200


@pytest.mark.parametrize("status", [400, 404, 413, 415])
def test_refused_requests_give_their_place_back(gated: Gated, status: int) -> None:
    wrong: dict[int, dict[str, Any]] = {
        400: {"json": {**BODY, "n": -1}},
        404: {"json": {**BODY, "model": "no"}},
        413: {"content": b" " * (LIMIT_BYTES + 1), "headers": {"content-type": "application/json"}},
        415: {"content": b"x", "headers": {"content-type": "text/plain"}},
    }
    with gated.client() as client:
        for _ in range(5):
            assert client.post("/v1/completions", **wrong[status]).status_code == status
        assert client.post("/v1/completions", json=BODY).status_code == 200


# --- the page ---------------------------------------------------------------------------------------------------------


def test_page_is_one_file_without_outside_hosts() -> None:
    response = page()
    text = bytes(response.body).decode()
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    assert "innerHTML" not in text
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 2


def test_page_is_there_without_a_key_but_says_that_one_is_wanted(gated: Gated) -> None:
    with gated.client() as client:
        assert client.get("/").status_code == 200
        key = gated.key()
        wait_until(lambda: client.get("/v1/models").status_code == 401)
        refused = client.get("/")
        assert refused.status_code == 401
        assert refused.text == page().body.decode()  # type: ignore[union-attr]
        assert MODEL not in refused.text
        assert client.post("/").json()["error"]["code"] == "invalid_api_key"
        assert client.get("/", headers=bearer(key)).status_code == 200
