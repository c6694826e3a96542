"""Requests through a router to two real versions, in one process: who answers, what is seen, and what breaks."""

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayTaskError
from starlette.testclient import TestClient

from cluster.api_keys import create_key, opened_keys
from services.endpoint import router
from services.endpoint.api import build_api
from services.endpoint.canary import Observation
from services.endpoint.errors import unavailable
from services.endpoint.metrics import RouterMetrics
from services.endpoint.router import Part, Router, put_router_into
from services.endpoint.schema import EndpointArguments
from services.endpoint.traffic import Reign, Route, RoutingTable, place
from services.endpoint.versions import Version
from tests.endpoint_models import publish_version
from tests.local_http import call

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = "tiny-student"
TEXT = {"model": MODEL, "prompt": "the cat 猫", "max_tokens": 24, "temperature": 0}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 24, "temperature": 0}
REIGN = Reign(1, "2026-01-02T03:04:05+00:00")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> EndpointArguments:
    return EndpointArguments(
        model_name=MODEL,
        database=f"sqlite:///{tmp_path_factory.mktemp('state')}/champions.db",
        threads_per_replica=1,
        max_context_tokens=200,
        max_new_tokens=64,
        max_body_bytes=4096,
    )


@pytest.fixture(scope="module")
def versions(arguments: EndpointArguments, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two replicas as Serve makes them, and the routes that lead to them."""
    directory: Path = tmp_path_factory.mktemp("versions")
    made: dict[str, Any] = {}
    for number in "12":
        uri, digest = publish_version(directory / f"local-{number}", directory / "storage", number, seed=int(number))
        artefact = {"model_name": MODEL, "epoch": 0, "version": number, "uri": uri, "manifest_sha256": digest}
        replica = Version.func_or_class(arguments.model_dump(), {**artefact, "promoted_at": REIGN.promoted_at})
        route = Route(f"v{number}", number, digest, uri, "float", 200, 64)
        made[number] = (replica, route)
    return made


class Broken:
    """A version that fails as it is told, and else answers as the real one."""

    def __init__(self, real: Any, how: str) -> None:
        self._real, self._how = real, how

    async def answer(self, *asked: Any) -> AsyncGenerator[Part]:
        if self._how == "dies":
            raise RuntimeError("the actor died")
        if self._how == "hangs":
            await asyncio.Event().wait()
        if self._how.isdigit():
            figures = {"ok": True, "prompt_tokens": 50_000, "completion_tokens": 20_000}
            yield int(self._how), [(b"content-type", b"application/json")], b"{}", figures
            return
        async for part in self._real.answer(*asked):
            if self._how == "decoding raises":
                yield part[0], part[1], b"data: broken\n\n", {"ok": False}
                return
            yield part
            if self._how == "dies in the middle" and part[3] is None:
                raise RuntimeError("the actor died")

    async def begin_answer(self, path: str, body: bytes) -> dict[str, Any]:
        return await self._real.begin_answer(path, body)

    async def compare(self, *asked: Any) -> dict[str, Any]:
        if self._how == "503":
            raise RayTaskError("compare", "", unavailable("full", "server_overloaded", 1)).as_instanceof_cause()
        raise RuntimeError("the actor died")


class Bench:
    """A router with both versions behind it."""

    def __init__(self, arguments: EndpointArguments, versions: dict[str, Any]) -> None:
        self.versions = {route.app: replica for replica, route in versions.values()}
        self.old, self.new = versions["1"][1], versions["2"][1]
        self.router = Router(arguments, lambda route: self.versions[route.app], RouterMetrics(MODEL))
        self.api = put_router_into(build_api(arguments, self.router, place="front"), self.router)
        self.set(share=0.0)

    def set(self, **fields: Any) -> None:
        challenger = {"challenger": self.new, "trial": (7, 0)} if fields.get("share") or fields.get("shadow") else {}
        self.router.table = RoutingTable(1, champion=self.old, reign=REIGN, problem=None, **challenger, **fields)

    def break_version(self, route: Route, how: str) -> None:
        self.versions[route.app] = Broken(self.versions[route.app], how)

    def seen(self) -> list[Observation]:
        return self.router.take_observations()

    def user_of(self, challenger: bool) -> str:
        """One whose requests the challenger answers at a share of a half, or does not."""
        salt = self.new.manifest_sha256
        anonymous = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # of no key
        users = (f"user {number}" for number in range(1000))
        return next(user for user in users if (place(salt, f"{anonymous} {user}") < 0.5) == challenger)


@pytest.fixture
def bench(arguments: EndpointArguments, versions: dict[str, Any]) -> Bench:
    return Bench(arguments, versions)


@pytest.fixture
def client(bench: Bench) -> Iterator[TestClient]:
    with TestClient(bench.api) as client:
        yield client
    assert bench.router.in_flight.total() == 0


def text_of(response: Any) -> str:
    """Of a whole completion or a streamed one."""
    assert response.status_code == 200
    if "event-stream" not in response.headers["content-type"]:
        return response.json()["choices"][0]["text"]
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


def test_answer_through_the_router_is_the_version_s_own_byte_for_byte(bench: Bench, client: TestClient) -> None:
    whole = text_of(client.post("/v1/completions", json=TEXT))
    assert text_of(client.post("/v1/completions", json={**TEXT, "stream": True})) == whole
    assert len(whole) > 10
    one, two = bench.seen()
    assert (one.ok, one.completion_tokens, two.completion_tokens) == (True, 24, 24)
    assert one.prompt_tokens == two.prompt_tokens > 0
    assert 0 < two.ttft_s < 5
    assert two.token_s > 0
    bench.set(share=1.0)
    assert text_of(client.post("/v1/completions", json=TEXT)) != whole
    assert bench.seen()[0].manifest_sha256 == bench.new.manifest_sha256


def test_answer_is_of_the_version_that_the_user_has(bench: Bench, client: TestClient) -> None:
    bench.set(share=0.5)
    for challenger in (False, True):
        user = bench.user_of(challenger)
        for _ in range(3):
            client.post("/v1/completions", json={**TEXT, "user": user})
        digests = {seen.manifest_sha256 for seen in bench.seen()}
        assert digests == {(bench.new if challenger else bench.old).manifest_sha256}


def test_errors_are_those_of_the_interface(bench: Bench, client: TestClient) -> None:
    def error(path: str, **request: Any) -> tuple[int, str]:
        response = client.post(path, **request)
        return response.status_code, response.json()["error"]["code"] or response.json()["error"]["param"]

    assert error("/v1/completions", json={**TEXT, "model": "other"}) == (404, "model_not_found")
    assert error("/v1/completions", json={**TEXT, "n": -1}) == (400, "invalid_value")
    assert error("/v1/completions", content=b"{", headers={"content-type": "application/json"}) == (400, "invalid_json")
    assert error("/v1/completions", content=b"x" * 5000, headers={"content-type": "application/json"})[0] == 413
    assert client.post("/v1/completions", content=b"x", headers={"content-type": "text/plain"}).status_code == 415
    assert client.post("/v1/nothing", json={}).status_code == 404
    assert client.get("/v1/completions").status_code == 405
    assert all(seen.ok and seen.trial is None for seen in bench.seen())


def test_key_is_asked_for_once_and_not_passed_on(
    arguments: EndpointArguments, versions: dict[str, Any], tmp_path: Path
) -> None:
    database = f"sqlite:///{tmp_path}/champions.db"
    with opened_keys(database) as engine:
        _, key = create_key(engine, "test")
    bench = Bench(arguments.replace(database=database), versions)
    asked: list[Any] = []

    class Spy(Broken):
        def answer(self, *arguments: Any) -> AsyncGenerator[Part]:
            asked.append(arguments)
            return super().answer(*arguments)

    bench.versions["v1"] = Spy(bench.versions["v1"], "")
    client = TestClient(bench.api)
    assert client.post("/v1/completions", json=TEXT).status_code == 401
    assert client.get("/v1/raystill/traffic").status_code == 401
    assert asked == []
    assert client.post("/v1/completions", json=TEXT, headers={"authorization": f"Bearer {key}"}).status_code == 200
    assert key.encode() not in b"".join(value for _, value in asked[0][2])


def test_request_may_name_the_version_that_answers(bench: Bench, client: TestClient) -> None:
    def answered_by(model: str) -> set[str]:
        response = client.post("/v1/completions", json={**TEXT, "model": model})
        assert response.status_code == 200, response.text
        assert response.json()["model"] == model
        return {seen.manifest_sha256 for seen in bench.seen()}

    bench.set(share=0.01)
    for model, route in (("champion", bench.old), ("challenger", bench.new), ("1", bench.old), ("2", bench.new)):
        assert answered_by(f"{MODEL}@{model}") == {route.manifest_sha256}
    bench.break_version(bench.new, "500")
    assert client.post("/v1/completions", json={**TEXT, "model": f"{MODEL}@challenger"}).status_code == 500
    bench.set(share=0.0)
    for model in (f"{MODEL}@challenger", f"{MODEL}@3", f"{MODEL}@", "other@champion"):
        found = client.post("/v1/completions", json={**TEXT, "model": model})
        assert (found.status_code, found.json()["error"]["code"]) == (404, "model_not_found")


def test_tokens_of_a_key_are_what_the_version_counted(
    arguments: EndpointArguments, versions: dict[str, Any], tmp_path: Path
) -> None:
    database = f"sqlite:///{tmp_path}/champions.db"
    with opened_keys(database) as engine:
        _, key = create_key(engine, "test", tokens_per_minute=100_000)
    client = TestClient(Bench(arguments.replace(database=database), versions).api)
    headers = {"authorization": f"Bearer {key}"}
    used = client.post("/v1/completions", json=TEXT, headers=headers).json()["usage"]["total_tokens"]
    again = client.post("/v1/completions", json={**TEXT, "max_tokens": 0}, headers=headers)
    left = int(again.headers["x-ratelimit-remaining-tokens"])
    assert abs(100_000 - used - left) < 100  # the second request's own reservation, and what a second fills


def test_key_does_not_pay_for_a_challenger_that_failed(
    arguments: EndpointArguments, versions: dict[str, Any], tmp_path: Path
) -> None:
    database = f"sqlite:///{tmp_path}/champions.db"
    with opened_keys(database) as engine:
        _, key = create_key(engine, "test", tokens_per_minute=100_000)
    bench = Bench(arguments.replace(database=database), versions)
    bench.set(share=1.0)
    bench.break_version(bench.new, "500")
    client = TestClient(bench.api)
    headers = {"authorization": f"Bearer {key}"}
    assert client.post("/v1/completions", json=TEXT, headers=headers).status_code == 200
    again = client.post("/v1/completions", json={**TEXT, "max_tokens": 0}, headers=headers)
    assert int(again.headers["x-ratelimit-remaining-tokens"]) > 99_000


def test_health_and_models_are_the_router_s(bench: Bench, client: TestClient) -> None:
    health = client.get("/healthz").json()
    assert (health["version"], health["scheme"], health["requests"], health["problem"]) == ("1", "float", 0, None)
    assert client.get("/v1/models").json()["data"][0]["id"] == MODEL
    assert client.get(f"/v1/models/{MODEL}").status_code == 200
    for unlisted in (f"{MODEL}@anything", f"{MODEL}@"):
        assert client.get(f"/v1/models/{unlisted}").status_code == 404
    assert client.get("/v1/raystill/traffic").json()["model"] == MODEL
    bench.router.table = RoutingTable()
    assert client.get("/healthz").status_code == 503
    response = client.post("/v1/completions", json=TEXT)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "model_not_ready")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["500", "dies", "decoding raises"])
def test_challenger_that_fails_costs_no_user_an_answer(
    bench: Bench, client: TestClient, how: str, stream: bool
) -> None:
    expected = text_of(client.post("/v1/completions", json=TEXT))
    bench.seen()
    bench.set(share=1.0)
    bench.break_version(bench.new, how)
    assert text_of(client.post("/v1/completions", json={**TEXT, "stream": stream})) == expected
    failed, answered = bench.seen()
    assert (failed.ok, failed.manifest_sha256, failed.trial) == (False, bench.new.manifest_sha256, (7, 0))
    assert (answered.ok, answered.manifest_sha256) == (True, bench.old.manifest_sha256)
    assert bench.router.urgent.is_set(), "the supervisor is told at once"


@pytest.mark.parametrize("mistake", [False, True])
def test_refusal_of_the_challenger_is_its_fault_if_the_champion_answers(
    bench: Bench, client: TestClient, mistake: bool
) -> None:
    bench.set(share=1.0)
    bench.break_version(bench.new, "400")
    body = {**TEXT, "n": -1} if mistake else TEXT
    response = client.post("/v1/completions", json=body)
    assert response.status_code == (400 if mistake else 200)
    assert ("error" in response.json()) == mistake, "the champion's answer"
    champion, challenger = bench.seen()
    assert challenger.manifest_sha256 == bench.new.manifest_sha256
    assert (challenger.ok, challenger.trial) == ((True, None) if mistake else (False, (7, 0)))
    assert champion.ok


def test_challenger_without_room_is_not_at_fault(bench: Bench, client: TestClient) -> None:
    bench.set(share=1.0)
    bench.break_version(bench.new, "503")
    assert text_of(client.post("/v1/completions", json=TEXT))
    full, answered = bench.seen()
    assert (full.manifest_sha256, full.trial) == (bench.new.manifest_sha256, None)
    assert answered.ok


def test_challenger_that_hangs_is_left_and_counted(
    bench: Bench, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "_LOOK_S", 0.01)
    monkeypatch.setattr(router, "_PATIENCE_S", 0.05)
    bench.set(share=1.0)
    bench.break_version(bench.new, "hangs")
    assert text_of(client.post("/v1/completions", json=TEXT))
    failed, answered = bench.seen()
    assert (failed.ok, failed.manifest_sha256, failed.trial) == (False, bench.new.manifest_sha256, (7, 0))
    assert answered.ok


def test_slow_champion_gives_its_challenger_time(bench: Bench) -> None:
    assert bench.router.patience_s() == router._PATIENCE_S
    bench.router.began(bench.router.table, bench.old, 50.0)
    bench.router.began(bench.router.table, bench.new, 500.0)
    assert bench.router.patience_s() == 150


def test_client_that_leaves_before_an_answer_says_how_long_it_waited(bench: Bench) -> None:
    bench.set(share=1.0)
    bench.break_version(bench.new, "hangs")
    asyncio.run(call(bench.api, TEXT, leave_after=0))
    [seen] = bench.seen()
    assert (seen.departed, seen.trial, seen.manifest_sha256) == (True, (7, 0), bench.new.manifest_sha256)
    assert seen.ttft_s >= 0.15
    assert bench.router.in_flight.total() == 0


def test_stream_that_breaks_off_ends_with_an_error_event(bench: Bench, client: TestClient) -> None:
    bench.set(share=1.0)
    bench.break_version(bench.new, "dies in the middle")
    response = client.post("/v1/completions", json={**TEXT, "max_tokens": 64, "n": 8, "stream": True})
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert json.loads(events[-1])["error"]["type"] == "server_error"
    assert "[DONE]" not in events
    [seen] = bench.seen()
    assert not seen.ok


def test_champion_whose_replica_dies_before_an_answer_is_asked_once_more(bench: Bench, client: TestClient) -> None:
    real, calls = bench.versions["v1"], []

    class Once(Broken):
        def answer(self, *asked: Any) -> AsyncGenerator[Part]:
            calls.append(1)
            return Broken(real, "dies" if len(calls) == 1 else "").answer(*asked)

    bench.versions["v1"] = Once(real, "")
    assert text_of(client.post("/v1/completions", json=TEXT))
    assert [seen.ok for seen in bench.seen()] == [False, True]
    bench.versions["v1"] = Broken(real, "dies")
    response = client.post("/v1/completions", json=TEXT)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "replica_ended")
    assert response.headers["retry-after"] == "1"


def test_request_for_a_champion_without_a_replica_is_refused_also_while_it_waits(
    bench: Bench, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "_LOOK_S", 0.01)

    class Waits(Broken):
        async def answer(self, *asked: Any) -> AsyncGenerator[Part]:
            bench.set(stalled=True)  # as the supervisor finds out while the request waits for a replica
            await asyncio.Event().wait()
            yield 200, [], b"", None

    bench.versions["v1"] = Waits(bench.versions["v1"], "")
    for _ in range(2):  # one that waits, one that comes then
        response = client.post("/v1/completions", json=TEXT)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "replica_ended")
    assert len(bench.seen()) == 1


def test_shadow_compares_both_versions_and_nobody_waits(bench: Bench, client: TestClient) -> None:
    bench.set(share=0.0, shadow=1.0)
    for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
        bench.seen()
        assert client.post(path, json=body).status_code == 200
        user, old, new = wait_for(bench, 3)
        assert (user.shadow, old.shadow, new.shadow) == (False, True, True)
        assert (old.manifest_sha256, new.manifest_sha256) == (bench.old.manifest_sha256, bench.new.manifest_sha256)
        assert new.disagreement > 0.1, "two random models"
        assert 0 <= new.agreement < 1
    bench.versions["v2"] = bench.versions["v1"]
    client.post("/v1/completions", json=TEXT)
    same = wait_for(bench, 3)[-1]
    assert same.disagreement == pytest.approx(0, abs=1e-5)
    assert same.agreement == 1
    bench.break_version(bench.new, "dies")
    client.post("/v1/completions", json=TEXT)
    assert [seen.ok for seen in wait_for(bench, 3)] == [True, True, False]


def test_copy_for_which_the_challenger_has_no_room_is_no_fault_of_it(bench: Bench, client: TestClient) -> None:
    bench.set(share=0.0, shadow=1.0)
    bench.break_version(bench.new, "503")
    client.post("/v1/completions", json=TEXT)
    user, old = wait_for(bench, 2)
    assert (user.shadow, old.shadow) == (False, True)
    while bench.router._comparisons:
        threading.Event().wait(0.02)
    assert bench.seen() == []


def wait_for(bench: Bench, count: int) -> list[Observation]:
    seen: list[Observation] = []
    for _ in range(200):
        seen += bench.seen()
        if len(seen) >= count:
            break
        threading.Event().wait(0.02)
    assert len(seen) == count
    return seen
