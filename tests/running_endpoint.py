"""A real endpoint for tests: Serve on a local Ray, a free port, tiny versions in a directory, rows in SQLite."""

import json
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from cluster.canaries import Canary, begin, latest_canary
from cluster.champions import current_champion, opened
from cluster.connection import ClusterConfig, connect
from cluster.promotions import advance, propose
from services.endpoint.client import ask_traffic, start_endpoint, stop_endpoint
from services.endpoint.schema import CanaryConfig, EndpointConfig
from tests.endpoint_models import crown_version, publish_version

MODEL = "tiny-student"
START_S = 180.0
"""A version is a process of its own, which imports torch; on a machine that is busy that takes its time."""


@dataclass
class RunningEndpoint:
    """Where it answers, and where its versions and rows are."""

    url: str
    port: int
    database: str
    directory: Path
    scheme: str = "float"

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def health(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/healthz", timeout=30) as response:
            return json.load(response)

    def traffic(self) -> dict[str, dict[str, Any]]:
        """What is said of each version, by version."""
        return {row["version"]: row for row in ask_traffic(self.url)["versions"]}

    def publish(self, version: str, seed: int) -> tuple[str, str]:
        local, root = self.directory / f"local-{version}", self.directory / "storage"
        return publish_version(local, root, version, seed, scheme=self.scheme)

    def crown(self, version: str, uri: str, manifest_hash: str) -> None:
        crown_version(self.database, MODEL, version, uri, manifest_hash)

    def challenge(self, version: str, uri: str, manifest_hash: str, plan: CanaryConfig) -> None:
        """Makes a version challenger, as if the gate had let it pass."""
        artefact = {"version": version, "uri": uri, "manifest_sha256": manifest_hash}
        with opened(self.database) as engine:
            proposed = propose(engine, MODEL, artefact, current_champion(engine, MODEL), run="test")
            begin(engine, advance(engine, proposed, "checked"), plan.model_dump(mode="json"))

    def canary(self) -> Canary:
        with opened(self.database) as engine:
            found = latest_canary(engine, MODEL)
        assert found is not None
        return found


def wait_until(condition: Callable[[], bool], timeout_s: float = START_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.1)


@contextmanager
def running_endpoint(
    directory: Path, tracking: str = "", scheme: str = "float", **config: Any
) -> Iterator[RunningEndpoint]:
    """An endpoint that serves version 1, in the length of the block; all versions are of `scheme`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fields = {"poll_s": 0.3, "max_context_tokens": 400, "max_new_tokens": 380, "threads_per_replica": 1, **config}
    database = f"sqlite:///{directory}/champions.db"
    running = RunningEndpoint(f"http://127.0.0.1:{port}", port, database, directory, scheme)
    running.crown("1", *running.publish("1", seed=1))
    with connect(ClusterConfig(num_cpus=4, object_store_mb=80)):
        from ray import serve

        # As a teacher leaves it: Serve runs without an HTTP address, and without an application.
        serve.start(proxy_location="Disabled")
        config_of_endpoint = EndpointConfig(port=port, **fields)
        url = start_endpoint(config_of_endpoint, MODEL, running.database, tracking=tracking, timeout_s=START_S)
        assert url == running.url
        try:
            yield running
        finally:
            stop_endpoint()
            assert not serve.status().applications
            serve.shutdown()
