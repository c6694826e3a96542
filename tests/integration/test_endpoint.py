"""The endpoint as users meet it: a real Serve application, the official client, and versions that change under load."""

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from cluster.errors import PortInUse
from jobs.rollback import rollback
from services.endpoint.api import build_api
from services.endpoint.client import ask, check_port_free, start_endpoint
from services.endpoint.errors import EndpointUnavailable
from services.endpoint.fixed import FixedModel
from services.endpoint.schema import DirectoryArguments, EndpointConfig
from tests.endpoint_models import save_version
from tests.local_http import served
from tests.running_endpoint import MODEL, RunningEndpoint, running_endpoint, wait_until

pytestmark = pytest.mark.integration

PROMPT = "the cat sat on 猫🐈"


@pytest.fixture(scope="module")
def teacher_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A plain directory with its interface, outside of Ray."""
    directory = tmp_path_factory.mktemp("teacher")
    save_version(directory, seed=5)
    arguments = DirectoryArguments(model_name="big", directory=str(directory))
    with served(build_api(arguments, FixedModel(arguments))) as url:
        yield url


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory, teacher_url: str) -> Iterator[RunningEndpoint]:
    directory = tmp_path_factory.mktemp("endpoint")
    with running_endpoint(directory, teacher_url=teacher_url) as running:
        yield running
    shutil.rmtree(directory, ignore_errors=True)


def test_client_completion_streamed_and_whole_are_equal(endpoint: RunningEndpoint) -> None:
    client = endpoint.client()
    fields: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 40, "seed": 7, "temperature": 1.5}
    whole = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert whole.choices[0].text
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert whole._request_id


def test_client_chat_streamed_and_whole_are_equal(endpoint: RunningEndpoint) -> None:
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
    finished = {}
    for chunk in client.chat.completions.create(**fields, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            finished[choice.index] = choice.finish_reason
    assert [texts[0], texts[1]] == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    assert finished == {choice.index: choice.finish_reason for choice in whole.choices}


def test_client_models_and_errors_have_openai_types(endpoint: RunningEndpoint) -> None:
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


def test_plain_client_asks_and_port_is_taken(endpoint: RunningEndpoint) -> None:
    assert ask(endpoint.url, MODEL, PROMPT, 8) == ask(endpoint.url, MODEL, PROMPT, 8)
    with pytest.raises(EndpointUnavailable, match="does not exist"):
        ask(endpoint.url, "other", PROMPT, 8)
    with pytest.raises(PortInUse, match=str(endpoint.port)):
        check_port_free("127.0.0.1", endpoint.port)


def test_client_asks_the_teacher_through_the_endpoint(endpoint: RunningEndpoint, teacher_url: str) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0, "stream": True}
    chunks = endpoint.client().completions.create(model=f"{MODEL}@teacher", **fields)
    assert "".join(chunk.choices[0].text for chunk in chunks) == ask(teacher_url, "big", PROMPT, 40)
    wait_until(lambda: endpoint.traffic()["big"].get("requests") == 1)
    seen = endpoint.traffic()["big"]
    assert (seen["alias"], seen["errors"], seen["problem"]) == ("teacher", 0, None)
    assert seen["tokens_per_s"] > 0


def test_endpoint_that_runs_is_not_replaced_by_another(endpoint: RunningEndpoint) -> None:
    with pytest.raises(PortInUse, match="an endpoint runs on this Ray already"):
        start_endpoint(EndpointConfig(port=endpoint.port), "other", endpoint.database)
    assert endpoint.client().models.list().data[0].id == MODEL


@pytest.fixture(scope="module")
def some_tokens_s(endpoint: RunningEndpoint) -> float:
    """How long 60 choices of 37 tokens take on this machine."""
    began = time.monotonic()
    endpoint.client().completions.create(model=MODEL, prompt=PROMPT, max_tokens=37, n=60, stop=["\0never\0"])
    return time.monotonic() - began


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_stops_the_decoding(endpoint: RunningEndpoint, some_tokens_s: float, stream: bool) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 370, "n": 60, "stream": stream, "stop": ["\0never\0"]}
    data = json.dumps(body).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""])
    with socket.create_connection(("127.0.0.1", endpoint.port)) as connection:
        connection.sendall(head.encode() + data)
        wait_until(lambda: endpoint.health()["requests"] == 1)
        wait_until(lambda: endpoint.traffic()["1"]["queue"] == 1)
        assert endpoint.health()["requests"] == 1, "the answer is done before the client could leave"
    # All 60 choices of 370 tokens would take over 10 s, and more than ten times as long as a tenth of them.
    wait_until(lambda: endpoint.health()["requests"] == 0, timeout_s=max(5, 5 * some_tokens_s))
    wait_until(lambda: endpoint.traffic()["1"]["queue"] == 0, timeout_s=max(8, 3 * some_tokens_s))


def test_new_champion_is_picked_up_without_a_failed_request(endpoint: RunningEndpoint) -> None:
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


def test_tampered_version_is_refused_and_the_old_one_stays(endpoint: RunningEndpoint) -> None:
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


def test_rollback_is_followed(endpoint: RunningEndpoint) -> None:
    assert endpoint.health()["version"] == "3"
    epoch, answer = endpoint.health()["epoch"], ask(endpoint.url, MODEL, PROMPT, 12)
    rollback(MODEL, endpoint.database, f"sqlite:///{endpoint.directory}/nowhere.db")
    wait_until(lambda: endpoint.health()["version"] == "2")
    assert endpoint.health()["epoch"] == epoch + 1
    assert ask(endpoint.url, MODEL, PROMPT, 12) != answer
    rollback(MODEL, endpoint.database, f"sqlite:///{endpoint.directory}/nowhere.db", to="3")
    wait_until(lambda: endpoint.health()["version"] == "3")
    assert ask(endpoint.url, MODEL, PROMPT, 12) == answer
