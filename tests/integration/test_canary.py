"""Canaries on a real endpoint: a healthy one reigns, a spoilt one is gone before a user sees it, and all is counted."""

import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cluster.champions import find_champion
from cluster.errors import PromotionRefused
from cluster.registry import find_version, list_versions
from cluster.tracking import register_version
from jobs.config import PromoteConfig
from jobs.promote import promote
from services.endpoint.schema import CanaryConfig
from tests.endpoint_models import be_no_numbers, fail_on_text, publish_version
from tests.running_endpoint import MODEL, RunningEndpoint, running_endpoint, wait_until

pytestmark = pytest.mark.integration

PLAN = CanaryConfig(steps=[0.2, 0.5], hold_s=1, min_requests=8, max_error_rate=0.01, max_latency_ratio=None)


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory, tracking: str) -> Iterator[RunningEndpoint]:
    with running_endpoint(tmp_path_factory.mktemp("canary"), tracking) as running:
        yield running


@pytest.fixture
def add(endpoint: RunningEndpoint, tracking: str) -> Callable[..., Any]:
    """Publishes and registers a version, and returns what `challenge` and `crown` are given."""

    def added(seed: int, spoil: Any = None) -> tuple[str, str, str]:
        count = len(list_versions(tracking, MODEL))
        local = endpoint.directory / f"added-{count}"
        uri, digest = publish_version(local, endpoint.directory / "storage", f"added-{count}", seed, spoil)
        return register_version(tracking, MODEL, uri, digest, None, {}), uri, digest

    if not list_versions(tracking, MODEL):  # version 1, which reigns
        champion = find_champion(endpoint.database, MODEL)
        assert champion is not None
        register_version(tracking, MODEL, champion.uri, champion.manifest_sha256, None, {})
    return added


class Users:
    """Twenty users who keep asking, streams and whole answers, until the block ends."""

    def __init__(self, endpoint: RunningEndpoint) -> None:
        self.problems: list[str] = []
        self.answered = 0
        self._endpoint, self._stop = endpoint, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(4)]

    def __enter__(self) -> "Users":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        client, turn = self._endpoint.client(), 0
        while not self._stop.is_set():
            turn += 1
            user = f"user {number} {turn % 5}"
            fields: dict[str, Any] = {"model": MODEL, "prompt": f"the cat {turn}", "max_tokens": 12, "user": user}
            try:
                if turn % 2:
                    chunks = list(client.completions.create(**fields, stream=True))
                    whole = chunks[-1].choices[0].finish_reason is not None
                else:
                    whole = client.completions.create(**fields).choices[0].finish_reason is not None
                if not whole:
                    self.problems.append("an answer without an end")
                self.answered += 1
            except Exception as error:
                self.problems.append(repr(error))


def test_spoilt_version_is_refused_by_the_gate_and_forced_is_taken_down_without_a_failed_request(
    endpoint: RunningEndpoint, tracking: str, add: Callable[..., Any]
) -> None:
    version = dict(zip(("version", "uri", "manifest_sha256"), add(seed=5, spoil=fail_on_text), strict=True))

    def ask_for(bits_per_byte: float, force: bool = False) -> dict[str, Any]:
        figures = {"bits_per_byte": 2.0}, {"bits_per_byte": bits_per_byte}
        places = endpoint.database, tracking
        return promote(PromoteConfig(), MODEL, version, *figures, *places, force=force, canary=PLAN)[1]

    with pytest.raises(PromotionRefused, match=r"promote\.max_quality_drop"):
        ask_for(9.0)
    with Users(endpoint) as users:
        wait_until(lambda: users.answered > 5)
        assert ask_for(9.0, force=True)["canary"]["share"] == 0.2
        wait_until(lambda: endpoint.canary().state == "failed")
        answered = users.answered
        wait_until(lambda: users.answered > answered + 10)
    assert users.problems == []
    ended = endpoint.canary()
    assert ended.reason.startswith("error rate: ")
    assert 2 <= json.loads(ended.figures)["errors"] <= 40, "it was taken down late"
    assert endpoint.health()["version"] == "1"
    assert set(endpoint.traffic()) == {"1"}
    wait_until(lambda: find_version(tracking, MODEL, version["version"]).tags.get("canary") == "failed")
    assert find_version(tracking, MODEL, version["version"]).aliases == []
    with pytest.raises(PromotionRefused, match="its canary was taken down"):
        ask_for(2.0)


def test_challenger_that_cannot_be_loaded_is_taken_down(endpoint: RunningEndpoint, add: Callable[..., Any]) -> None:
    endpoint.challenge(*add(seed=6, spoil=be_no_numbers), PLAN)
    wait_until(lambda: endpoint.canary().state == "failed")
    assert endpoint.canary().reason == "it cannot be loaded (ModelError)"
    assert endpoint.health()["version"] == "1"


def test_noise_is_taken_down_by_copies_alone(endpoint: RunningEndpoint, add: Callable[..., Any]) -> None:
    plan = PLAN.replace(steps=[0.0, 0.5], shadow=1.0, max_disagreement=0.3)
    version = add(seed=7)  # another random model: to the champion's users, noise
    with Users(endpoint) as users:
        endpoint.challenge(*version, plan)
        wait_until(lambda: endpoint.canary().state != "running")
    assert users.problems == []
    ended = endpoint.canary()
    assert (ended.state, ended.step) == ("failed", 0)
    assert ended.reason.startswith("disagreement: ")
    figures = json.loads(ended.figures)
    assert figures["requests"] == 0, "no user saw it"
    assert figures["disagreement"] > 0.3


def test_healthy_challenger_reigns_and_no_request_fails(
    endpoint: RunningEndpoint, tracking: str, add: Callable[..., Any]
) -> None:
    version = add(seed=1, spoil=nudge)
    with Users(endpoint) as users:
        endpoint.challenge(*version, PLAN.replace(steps=[0.0, 0.5], shadow=1.0, max_disagreement=0.3))
        wait_until(lambda: version[0] in endpoint.traffic())
        row = endpoint.traffic()[version[0]]
        assert (row["alias"], row["share"]) == ("challenger", 0.0)
        wait_until(lambda: endpoint.health()["version"] == version[0])
        answered = users.answered
        wait_until(lambda: users.answered > answered + 10)
    assert users.problems == []
    assert endpoint.canary().state == "passed"
    assert endpoint.health()["epoch"] == 2


def nudge(model: Any) -> None:
    """The champion's weights, but other bytes."""
    model.get_output_embeddings().weight[0, 0] += 1e-4


def test_endpoint_tells_prometheus_what_it_does_per_version(endpoint: RunningEndpoint) -> None:
    import ray

    endpoint.client().completions.create(model=MODEL, prompt="the cat", max_tokens=12)
    version = endpoint.health()["version"]
    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    what = ("requests_total", "tokens_total", "time_to_first_token_seconds_bucket", "queue", "requests_in_flight")
    names = [f"ray_raystill_endpoint_{name}" for name in what]
    deadline = time.monotonic() + 60
    while True:  # Ray exports every few seconds
        with urllib.request.urlopen(url, timeout=30) as answer:
            lines = [line for line in answer.read().decode().splitlines() if f'version="{version}"' in line]
        missing = [name for name in names if not any(line.startswith(f"{name}{{") for line in lines)]
        if not missing:
            break
        assert time.monotonic() < deadline, missing
        time.sleep(1)
    [counted] = [
        line for line in lines if line.startswith("ray_raystill_endpoint_requests_total{") and 'traffic="user"' in line
    ][:1]
    assert 'status="200"' in counted
    assert float(counted.rsplit(" ", 1)[1]) >= 1
