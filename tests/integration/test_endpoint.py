"""The endpoint as users meet it: a real Serve application, the official client, and versions that change under load."""

import json
import shutil
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from cluster.connection import ClusterConfig, connect
from cluster.errors import PortInUse
from jobs.rollback import rollback
from services.endpoint.client import ask, check_port_free, start_endpoint, stop_endpoint
from services.endpoint.errors import EndpointUnavailable
from services.endpoint.schema import EndpointConfig
from tests.endpoint_models import crown_version, publish_version

pytestmark = pytest.mark.integration

MODEL = "tiny-student"
PROMPT = "the cat sat on 猫🐈"


@dataclass
class Running:
    url: str
    port: int
    database: str
    directory: Path

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def health(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/healthz", timeout=10) as response:
            return json.load(response)

    def publish(self, version: str, seed: int) -> tuple[str, str]:
        return publish_version(self.directory / f"local-{version}", self.directory / "storage", version, seed)

    def crown(self, version: str, uri: str, manifest_hash: str) -> None:
        crown_version(self.database, MODEL, version, uri, manifest_hash)


def wait_until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("endpoint")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = EndpointConfig(port=port, poll_s=0.3, max_context_tokens=400, max_new_tokens=380, threads_per_replica=1)
    running = Running(f"http://127.0.0.1:{port}", port, f"sqlite:///{directory}/champions.db", directory)
    running.crown("1", *running.publish("1", seed=1))
    with connect(ClusterConfig(num_cpus=4, object_store_mb=80)):
        from ray import serve

        # As a teacher leaves it: Serve runs without an HTTP address, and without an application.
        serve.start(proxy_location="Disabled")
        assert start_endpoint(config, MODEL, running.database, timeout_s=90) == running.url
        try:
            yield running
        finally:
            stop_endpoint()
            serve.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


def test_client_completion_streamed_and_whole_are_equal(endpoint: Running) -> None:
    client = endpoint.client()
    fields: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 40, "seed": 7, "temperature": 1.5}
    whole = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert whole.choices[0].text
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert whole._request_id


def test_client_chat_streamed_and_whole_are_equal(endpoint: Running) -> None:
    client = endpoint.client()
    fields: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": PROMPT}],
        "max_completion_tokens": 30,
        "seed": 3,
        "n": 2,
    }
    whole = client.chat.completions.create(**fields)
    texts = {0: "", 1: ""}
    finished = []
    for chunk in client.chat.completions.create(**fields, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        finished += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
    assert [texts[0], texts[1]] == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    assert finished == [choice.finish_reason for choice in whole.choices]


def test_client_models_and_errors_have_openai_types(endpoint: Running) -> None:
    client = endpoint.client()
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("other/model")
    assert missing.value.code == "model_not_found"
    assert missing.value.request_id
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="the " * 1000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(model=MODEL, prompt="x" * (2 << 20))
    assert large.value.status_code == 413
    assert large.value.type == "invalid_request_error"


def test_plain_client_asks_and_port_is_taken(endpoint: Running) -> None:
    assert ask(endpoint.url, MODEL, PROMPT, 8) == ask(endpoint.url, MODEL, PROMPT, 8)
    with pytest.raises(EndpointUnavailable, match="does not exist"):
        ask(endpoint.url, "other", PROMPT, 8)
    with pytest.raises(PortInUse, match=str(endpoint.port)):
        check_port_free("127.0.0.1", endpoint.port)


def test_endpoint_that_runs_is_not_replaced_by_another(endpoint: Running) -> None:
    with pytest.raises(PortInUse, match="an endpoint runs on this Ray already"):
        start_endpoint(EndpointConfig(port=endpoint.port), "other", endpoint.database)
    assert endpoint.client().models.list().data[0].id == MODEL


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_stops_the_decoding(endpoint: Running, stream: bool) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 370, "n": 60, "stream": stream, "stop": ["\0never\0"]}
    data = json.dumps(body).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""])
    with socket.create_connection(("127.0.0.1", endpoint.port)) as connection:
        connection.sendall(head.encode() + data)
        wait_until(lambda: endpoint.health()["requests"] == 1)
        time.sleep(0.2)
        assert endpoint.health()["requests"] == 1, "the answer is done before the client could leave"
    # All 60 choices of 370 tokens would take over 10 s.
    wait_until(lambda: endpoint.health()["requests"] == 0, timeout_s=5)


def test_new_champion_is_picked_up_without_a_failed_request(endpoint: Running) -> None:
    before = ask(endpoint.url, MODEL, PROMPT, 12)
    problems: list[BaseException] = []
    answers: list[str] = []
    stop = threading.Event()

    def keep_asking(stream: bool) -> None:
        client = endpoint.client()
        while not stop.is_set():
            try:
                fields: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
                if stream:
                    chunks = client.completions.create(**fields, stream=True)
                    answers.append("".join(chunk.choices[0].text for chunk in chunks))
                else:
                    answers.append(client.completions.create(**fields).choices[0].text)
            except Exception as error:
                problems.append(error)

    threads = [threading.Thread(target=keep_asking, args=(stream,)) for stream in (False, True)]
    published = endpoint.publish("2", seed=2)
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(answers) >= 4)
        endpoint.crown("2", *published)
        wait_until(lambda: endpoint.health()["version"] == "2")
        count = len(answers)
        wait_until(lambda: len(answers) >= count + 6)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    after = ask(endpoint.url, MODEL, PROMPT, 12)
    assert problems == []
    assert before != after
    assert set(answers) == {before, after}
    assert endpoint.health()["epoch"] == 2


def test_tampered_version_is_refused_and_the_old_one_stays(endpoint: Running) -> None:
    serving = endpoint.health()
    before = ask(endpoint.url, MODEL, PROMPT, 12)
    uri, manifest_hash = endpoint.publish("3", seed=3)
    weights = endpoint.directory / "storage" / "versions" / "3" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    endpoint.crown("3", uri, manifest_hash)
    wait_until(lambda: endpoint.health()["problem"] is not None)
    state = endpoint.health()
    assert state["version"] == serving["version"]
    assert "version 3 is refused: its files do not match its manifest" in state["problem"]
    assert ask(endpoint.url, MODEL, PROMPT, 12) == before
    # A repaired file is served at the next look.
    weights.write_bytes(whole)
    wait_until(lambda: endpoint.health()["version"] == "3")
    assert endpoint.health()["problem"] is None
    assert ask(endpoint.url, MODEL, PROMPT, 12) != before


def test_rollback_is_followed(endpoint: Running) -> None:
    assert endpoint.health()["version"] == "3"
    epoch, answer = endpoint.health()["epoch"], ask(endpoint.url, MODEL, PROMPT, 12)
    rollback(MODEL, endpoint.database, f"sqlite:///{endpoint.directory}/nowhere.db")
    wait_until(lambda: endpoint.health()["version"] == "2")
    assert endpoint.health()["epoch"] == epoch + 1
    assert ask(endpoint.url, MODEL, PROMPT, 12) != answer
    rollback(MODEL, endpoint.database, f"sqlite:///{endpoint.directory}/nowhere.db", to="3")
    wait_until(lambda: endpoint.health()["version"] == "3")
    assert ask(endpoint.url, MODEL, PROMPT, 12) == answer
