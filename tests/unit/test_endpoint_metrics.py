"""What Prometheus is told of every answer: by the router of several versions, and by a plain directory."""

import asyncio
import functools
import time
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from cluster.gauges import LastingGauge
from services.endpoint import metrics
from services.endpoint.api import build_api
from services.endpoint.errors import unavailable
from services.endpoint.fixed_deployment import DirectoryEndpoint
from services.endpoint.metrics import RouterMetrics
from services.endpoint.router import Part, Router, put_router_into
from services.endpoint.schema import DirectoryArguments, EndpointArguments
from services.endpoint.traffic import Reign, Route, RoutingTable
from tests.endpoint_models import save_version
from tests.local_http import call

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = "tiny-student"
TEXT = {"model": MODEL, "prompt": "the cat", "max_tokens": 24, "temperature": 0}


class Exported:
    """In place of `ray.serve.metrics`: what would be exported, by name and tags in their order."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, ...]] = Counter()
        self.seen: dict[tuple[str, ...], list[float]] = {}

    def made(self, name: str, description: str, tag_keys: tuple[str, ...], boundaries: Any = None) -> Any:
        exported = self

        class Metric:
            def _key(self, tags: dict[str, str]) -> tuple[str, ...]:
                assert set(tags) == set(tag_keys)
                return name.removeprefix("raystill_endpoint_"), *(tags[key] for key in tag_keys)

            def inc(self, value: float, tags: dict[str, str]) -> None:
                exported.counts[self._key(tags)] += value

            def observe(self, value: float, tags: dict[str, str]) -> None:
                exported.seen.setdefault(self._key(tags), []).append(value)

            set = observe

        assert description
        return Metric()

    def requests(self) -> dict[tuple[str, str], float]:
        """Of users, by version and status."""
        return {key[2:4]: count for key, count in self.counts.items() if key[0] == "requests" and key[4] == "user"}


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Exported:
    exported = Exported()
    monkeypatch.setattr(metrics, "LastingGauge", functools.partial(LastingGauge, every_s=0.05))
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics.metrics, kind, exported.made)
    return exported


class Told:
    """A version that answers as it is told."""

    def __init__(self, how: str) -> None:
        self._how = how

    async def answer(self, *_: Any) -> AsyncGenerator[Part]:
        if self._how == "hangs":
            await asyncio.Event().wait()
        yield 200, [], b"data: a\n\n", None
        if self._how == "hangs in the middle":
            await asyncio.Event().wait()
        if self._how == "dies":
            raise RuntimeError("the actor died")
        figures = {"ok": True, "ttft_s": 0.1, "token_s": 0.01, "prompt_tokens": 5, "completion_tokens": 7}
        yield 200, [], b"data: [DONE]\n\n", {**figures, "ok": self._how != "decoding raises"}


def routed(how: str, directory: Path) -> Any:
    arguments = EndpointArguments(model_name=MODEL, database=f"sqlite:///{directory}/champions.db")
    router = Router(arguments, lambda _: Told(how), RouterMetrics(MODEL))  # type: ignore[arg-type,return-value]
    champion = Route("v1", "1", "digest", "", "float", 200, 64)
    router.table = RoutingTable(1, champion=champion, reign=Reign(1, "2026-01-02T03:04:05+00:00"), problem=None)
    return put_router_into(build_api(arguments, router, place="front"), router)


@pytest.mark.parametrize(
    ("how", "leave_after", "status"),
    [
        ("answers", None, "200"),
        ("dies", None, "broken"),
        ("decoding raises", None, "broken"),
        ("hangs", 0, "499"),
        ("hangs in the middle", 2, "left"),
    ],
)
def test_router_counts_how_every_answer_ended(
    exported: Exported, tmp_path: Path, how: str, leave_after: int | None, status: str
) -> None:
    asyncio.run(call(routed(how, tmp_path), {**TEXT, "stream": True}, leave_after))
    assert exported.requests() == {("1", status): 1}
    [in_flight] = (values for key, values in exported.seen.items() if key[0] == "requests_in_flight")
    assert in_flight[-1] == 0


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_version(directory)
    return directory


@pytest.fixture
def plain(exported: Exported, directory: Path) -> Any:
    """A replica of a plain directory as Serve makes it."""
    fields = {"model_name": "big", "directory": str(directory), "threads_per_replica": 1, "max_new_tokens": 400}
    return DirectoryEndpoint.func_or_class.__mro__[1](DirectoryArguments(**fields).model_dump())


def test_plain_directory_counts_what_a_router_counts(exported: Exported, plain: Any) -> None:
    with TestClient(plain.__serve_build_asgi_app__()) as client:
        body = {**TEXT, "model": "big"}
        usage = client.post("/v1/completions", json=body).json()["usage"]
        assert client.post("/v1/completions", json={**body, "stream": True}).text.endswith("[DONE]\n\n")
        assert client.post("/v1/completions", json={**body, "n": -1}).status_code == 400
        assert client.post("/v1/embeddings", json={"model": "big", "input": "a"}).status_code == 404
        assert client.get("/v1/models").status_code == 200
    version = plain._model.served.champion.version
    assert exported.requests() == {(version, "200"): 2, (version, "400"): 1, (version, "404"): 1}
    tokens = {key[3]: count for key, count in exported.counts.items() if key[0] == "tokens"}
    assert tokens == {kind: 2 * usage[f"{kind}_tokens"] for kind in ("prompt", "completion")}
    of_directory = ("big", version)
    first_s, token_s = (exported.seen[name, *of_directory] for name in (f"time_{x}_seconds" for x in TIMES))
    assert len(first_s) == len(token_s) == 2
    assert all(0 < value < 5 for value in first_s + token_s)
    for gauge in ("requests_in_flight", "queue"):
        values = exported.seen[gauge, *of_directory]
        assert (max(values), values[-1]) == (1, 0)


TIMES = ("to_first_token", "per_token")


@pytest.mark.parametrize(
    ("how", "leave_after", "stream", "status"),
    [
        ("goes on", 0, False, "499"),
        ("goes on", 3, True, "left"),
        ("decoding raises", None, True, "broken"),
        ("decoding raises", None, False, "500"),
        ("queue is full", None, True, "503"),
    ],
)
def test_plain_directory_counts_how_every_answer_ended(
    exported: Exported, plain: Any, how: str, leave_after: int | None, stream: bool, status: str
) -> None:
    model, real = plain._model.served.model, plain._model.served.model.submit

    def submit(prompts: Any, sampling: Any) -> Any:
        if how == "queue is full":
            raise unavailable("full", "server_overloaded", retry_after_s=1)
        return Slow(real(prompts, sampling), how)

    model.submit = submit
    app = plain.__serve_build_asgi_app__()
    asyncio.run(call(app, {**TEXT, "model": "big", "stream": stream, "max_tokens": 400}, leave_after))
    assert exported.requests() == {(plain._model.served.champion.version, status): 1}
    assert exported.seen["requests_in_flight", "big", plain._model.served.champion.version][-1] == 0
    queue = exported.seen["queue", "big", plain._model.served.champion.version]
    deadline = time.monotonic() + 20
    while queue[-1]:  # the work of a client that left is ended a little later
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Slow:
    """Work that comes slowly, or breaks off."""

    def __init__(self, work: Any, how: str) -> None:
        self._work, self._how, self._came = work, how, 0

    def __aiter__(self) -> "Slow":
        return self

    async def __anext__(self) -> Any:
        self._came += 1
        if self._came > 2:
            if self._how == "decoding raises":
                raise ValueError("no numbers")
            await asyncio.sleep(0.1)
        return await self._work.__anext__()

    def cancel(self) -> None:
        self._work.cancel()
