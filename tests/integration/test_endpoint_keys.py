"""Keys and bad clients at a real Serve endpoint: what holds behind Serve's HTTP proxy, not only in the application."""

import contextlib
import json
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from cluster.api_keys import create_key, list_keys, opened_keys, revoke_key
from cluster.champions import database_url
from cluster.config import load
from cluster.connection import ClusterConfig, connect
from cluster.errors import ConfigError
from jobs.config import RunConfig
from jobs.serve import ask_once
from services.endpoint.client import ask, start_endpoint, stop_endpoint
from services.endpoint.errors import EndpointUnavailable
from services.endpoint.schema import EndpointConfig
from tests.command_line import free_port
from tests.endpoint_models import crown_version, publish_version
from tests.running_endpoint import START_S, wait_until

pytestmark = pytest.mark.integration

MODEL = "tiny-student"
REVOKED_WITHIN_S = 5.0


@dataclass
class Guarded:
    url: str
    port: int
    database: str
    key: str

    def connection(self, head: str) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(head.replace("\n", "\r\n").encode())
        return connection

    def head(self, length: str) -> str:
        return (
            f"POST /v1/completions HTTP/1.1\nHost: x\nContent-Type: application/json\n"
            f"Authorization: Bearer {self.key}\n{length}\n\n"
        )


@pytest.fixture(scope="module", autouse=True)
def _connected() -> Iterator[None]:
    with connect(ClusterConfig(num_cpus=4, object_store_mb=80)):
        yield


def test_run_asks_its_question_with_a_key_of_its_own(tmp_path: Path) -> None:
    values = ["name=keyed", f"storage={tmp_path}/run", f"serve.port={free_port()}", "serve.question=the cat"]
    config = load(RunConfig, Path(__file__).parents[2] / "jobs/configs/demo.yaml", values)
    database = database_url(config.state_directory)
    version = publish_version(tmp_path / "local", tmp_path / "storage", "1", seed=1)
    crown_version(database, config.model_name, "1", *version)
    with opened_keys(database) as engine:
        create_key(engine, "alice")
        assert ask_once(config)["answer"]
        assert [key.name for key in list_keys(engine)] == ["alice"]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    from ray import serve

    directory = tmp_path_factory.mktemp("guarded")
    database = f"sqlite:///{directory}/champions.db"
    crown_version(database, MODEL, "1", *publish_version(directory / "local", directory / "storage", "1", seed=1))
    config = EndpointConfig(port=free_port(), max_new_tokens=64, threads_per_replica=1)
    with pytest.raises(ConfigError, match="no API key"):
        start_endpoint(config.replace(host="0.0.0.0"), MODEL, database)
    with opened_keys(database) as engine:
        _, key = create_key(engine, "alice")
    url = start_endpoint(config, MODEL, database, timeout_s=START_S)
    try:
        yield Guarded(url, config.port, database, key)
    finally:
        stop_endpoint()
        serve.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


def test_key_opens_the_endpoint_until_it_is_revoked(guarded: Guarded) -> None:
    with opened_keys(guarded.database) as engine:
        _, key = create_key(engine, "bob", requests_per_minute=50)

    def opens() -> bool:
        try:
            return bool(ask(guarded.url, MODEL, "the cat", 4, api_key=key))
        except EndpointUnavailable as refused:
            if "401" in str(refused):  # not read yet
                return False
            raise

    wait_until(opens)
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key, max_retries=0)
    answer = client.completions.with_raw_response.create(model=MODEL, prompt="the cat", max_tokens=4)
    assert answer.headers["x-ratelimit-remaining-requests"] in ("48", "49")  # 1.2 s give one back
    with pytest.raises(EndpointUnavailable, match="401"):
        ask(guarded.url, MODEL, "the cat", 4)
    with opened_keys(guarded.database) as engine:
        revoke_key(engine, "bob")
    revoked = time.monotonic()
    while accepted(client):
        assert time.monotonic() < revoked + REVOKED_WITHIN_S
        time.sleep(0.1)
    with pytest.raises(openai.AuthenticationError) as refused:
        client.models.list()
    assert refused.value.code == "invalid_api_key"


def accepted(client: openai.OpenAI) -> bool:
    try:
        client.models.list()
    except openai.AuthenticationError:
        return False
    return True


@pytest.mark.parametrize("path", ["/", "/v1/models", "/v1/completions", "//healthz", "/-/routes/../v1/models"])
def test_paths_are_closed_without_a_key(guarded: Guarded, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(guarded.url + path, timeout=30)
    with refused.value as error:
        assert error.code == 401
    with urllib.request.urlopen(f"{guarded.url}/healthz", timeout=30) as health:
        assert health.status == 200


def test_slow_clients_do_not_hold_up_others(guarded: Guarded) -> None:
    half_headers = [guarded.connection("GET /v1/models HTTP/1.1\nHost: x\nX-Slow: ") for _ in range(100)]
    slow_bodies = [guarded.connection(guarded.head("Content-Length: 1000")) for _ in range(100)]
    try:
        for _ in range(3):
            for connection in (*half_headers, *slow_bodies):
                with contextlib.suppress(ConnectionError):  # it has had its 408 already
                    connection.sendall(b" ")
            assert ask(guarded.url, MODEL, "the cat", 4, api_key=guarded.key)
            time.sleep(1)
        statuses = {connection.recv(12) for connection in slow_bodies}
        assert statuses == {b"HTTP/1.1 408"}
        assert ask(guarded.url, MODEL, "the cat", 4, api_key=guarded.key)
    finally:
        for connection in (*half_headers, *slow_bodies):
            connection.close()


@pytest.mark.parametrize("length", ["Content-Length: 1073741824", "Transfer-Encoding: chunked"])
def test_body_beyond_the_limit_is_refused_while_it_comes(guarded: Guarded, length: str) -> None:
    data = b"x" * 65536
    chunk = data if "Length" in length else b"10000\r\n" + data + b"\r\n"
    with guarded.connection(guarded.head(length)) as connection:
        connection.settimeout(0.05)
        answer, rest, num_sent = b"", b"", 0
        while b"\r\n\r\n" not in answer and num_sent < 256 << 20:
            rest = rest or chunk
            try:
                sent = connection.send(rest)
                rest, num_sent = rest[sent:], num_sent + sent
                answer += connection.recv(65536)
            except TimeoutError:
                continue
            except ConnectionError:  # closed with what was not read
                break
    assert answer.startswith(b"HTTP/1.1 413")
    assert num_sent < 32 << 20
    assert ask(guarded.url, MODEL, "the cat", 4, api_key=guarded.key)


def test_answers_of_the_proxy_itself_say_nothing_of_the_model(guarded: Guarded) -> None:
    """Serve's own paths are answered before the application: they hold no secrets."""
    found: dict[str, Any] = {}
    for path in ("/-/routes", "/-/healthz"):
        with urllib.request.urlopen(guarded.url + path, timeout=30) as answer:
            found[path] = answer.read().decode()
    assert found["/-/healthz"] == "success"
    assert json.loads(found["/-/routes"]) == {"/": "endpoint"}
