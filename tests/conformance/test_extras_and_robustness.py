"""Points 39 to 47 of the checklist: extra fields, hostile bodies, connections, and the OpenAPI document."""

import gc
import json
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from services.endpoint.openapi import ERRORS
from tests.conformance.bodies import ALL, SDK, chat, content, text
from tests.conformance.clients import CLIENTS
from tests.conformance.server import Endpoint

each_client = pytest.mark.parametrize("client", ALL)
each_sdk = pytest.mark.parametrize("client", SDK)
SWITCHES = pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, True),
        ({"enable_thinking": True}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"enable_thinking": False}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
    ],
    ids=["default", "on", "on by template", "off", "off by template"],
)


def reasoning(chunks: list[dict[str, Any]]) -> str:
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(delta.get("reasoning_content") or "" for delta in deltas)


@SWITCHES
@each_client
def test_39_thinking_is_switched(
    client: str, thinker: Endpoint, connect: Any, fields: dict[str, Any], thinks: bool
) -> None:
    api = connect(client, thinker)
    found = api.chat(**chat(thinker, temperature=0, **fields))
    message = found["choices"][0]["message"]
    chunks = api.chat_stream(**chat(thinker, temperature=0, **fields))
    assert message["content"] == content(chunks) == "So yes"
    assert (found["usage"]["completion_tokens"] > 4) == thinks
    if client != "langchain":  # drops what is not OpenAI's
        assert message.get("reasoning_content") == ("why not" if thinks else None)
        assert reasoning(chunks) == ("why not" if thinks else "")


@each_client
def test_40_content_is_whole_without_the_reasoning(client: str, opened: Endpoint, connect: Any) -> None:
    """The template opens the block, and its end tag comes letter by letter."""
    api = connect(client, opened)
    for fields, thought in (({}, "ab"), ({"return_reasoning": True}, "ab"), ({"return_reasoning": False}, None)):
        message = api.chat(**chat(opened, temperature=0, **fields))["choices"][0]["message"]
        chunks = api.chat_stream(**chat(opened, temperature=0, **fields))
        assert message["content"] == content(chunks) == "Yo"
        if client != "langchain":
            assert message.get("reasoning_content") == thought
            assert reasoning(chunks) == (thought or "")


def test_40_answer_cut_within_the_reasoning_has_no_content(opened: Endpoint, connect: Any) -> None:
    raw = connect("raw", opened)
    choice = raw.chat(**chat(opened, temperature=0, max_tokens=5))["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "", "reasoning_content": "ab</t"}
    assert choice["finish_reason"] == "length"


def test_40_logprobs_are_those_of_the_answer(opened: Endpoint, connect: Any) -> None:
    raw = connect("raw", opened)
    fields = chat(opened, temperature=0, logprobs=True)
    entries = raw.chat(**fields)["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == ["Y", "o"]
    streamed = [choice["logprobs"] for chunk in raw.chat_stream(**fields) for choice in chunk["choices"]]
    assert [entry for found in streamed if found for entry in found["content"]] == entries


@each_client
def test_41_unknown_keys_are_ignored_and_named_in_the_log(
    client: str, tiny: Endpoint, connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="services.endpoint.api")
    plain = connect(client, tiny).chat(**chat(tiny))["choices"][0]["message"]["content"]
    with_more = connect(client, tiny).chat(**chat(tiny, mystery={"a": [1]}))["choices"][0]["message"]["content"]
    assert plain == with_more
    assert "mystery" in caplog.text


@pytest.mark.parametrize(
    ("param", "value"),
    [("n", True), ("n", "1"), ("stream", 1), ("seed", 1.5), ("logprobs", 2), ("temperature", "hot"), ("messages", {}),
     ("stop", 7), ("enable_thinking", "no"), ("return_reasoning", 1), ("frequency_penalty", False)],
)  # fmt: skip
def test_41_known_keys_are_type_checked(tiny: Endpoint, connect: Any, param: str, value: Any) -> None:
    raw = connect("raw", tiny)
    found = raw.failure(lambda: raw.chat(**chat(tiny, **{param: value})))
    assert (found.status, found.error["param"]) == (400, param)


@each_sdk
def test_42_what_clients_send_besides_is_tolerated(client: str, tiny: Endpoint, connect: Any) -> None:
    more: dict[str, Any] = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    if client != "raw":
        more["extra_headers"] = {"x-mine": "1"}
    assert connect(client, tiny).chat(**chat(tiny, **more))["choices"]


HOSTILE = {
    "duplicate key": b'{"model": "tiny", "model": "tiny"}',
    "NaN": b'{"temperature": NaN}',
    "Infinity": b'{"temperature": -Infinity}',
    "number out of range": b'{"temperature": 1e400}',
    "deep": b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}",
    "deep and open": b'{"a":' * 10_000,
    "lone surrogate": b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "not UTF-8": b'{"model": "\xff"}',
    "UTF-16": '{"model": "tiny"}'.encode("utf-16"),
    "empty": b"",
    "not an object": b"[]",
    "long number": b'{"n": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_43_hostile_json_is_400(tiny: Endpoint, body: bytes, stream: bool) -> None:
    if stream:
        body = body.replace(b"{", b'{"stream": true, ', 1)
    answer = httpx.post(
        f"{tiny.url}/v1/chat/completions",
        content=body,
        headers={"content-type": "application/json"},
        trust_env=False,
        timeout=60,
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"


def test_43_other_content_type_is_415(tiny: Endpoint) -> None:
    for kind in ("text/plain", "multipart/form-data", "application/x-www-form-urlencoded"):
        headers = {"content-type": kind}
        answer = httpx.post(f"{tiny.url}/v1/completions", content=b"{}", headers=headers, trust_env=False, timeout=60)
        assert answer.status_code == 415


def test_44_idempotency_is_not_advertised(tiny: Endpoint, connect: Any) -> None:
    """A key has no effect: the same request twice is two answers."""
    raw = connect("raw", tiny)
    raw.http.headers["idempotency-key"] = "one"
    first, second = (raw.http.post("/v1/chat/completions", json=chat(tiny)) for _ in range(2))
    assert first.json()["id"] != second.json()["id"]
    assert not [name for name in first.headers if "idempot" in name]


def test_45_connection_is_good_after_an_error(tiny: Endpoint, connect: Any) -> None:
    raw = connect("raw", tiny)
    used = set()
    for body, status in ((text(tiny, n=-1), 400), (text(tiny), 200), (text(tiny, model="x"), 404), (text(tiny), 200)):
        answer = raw.http.post("/v1/completions", json=body)
        assert answer.status_code == status
        used.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
    assert len(used) == 1


def test_45_head_and_options_are_sane(tiny: Endpoint) -> None:
    for path in ("/healthz", "/v1/models", "/v1/models/tiny"):
        head = httpx.head(f"{tiny.url}{path}", trust_env=False, timeout=60)
        assert (head.status_code, head.content) == (200, b"")
    for method in ("OPTIONS", "HEAD"):
        refused = httpx.request(method, f"{tiny.url}/v1/chat/completions", trust_env=False, timeout=60)
        assert refused.status_code == 405


def test_45_pipelined_pair_is_answered_in_order(tiny: Endpoint) -> None:
    body = json.dumps(text(tiny, n=-1)).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
    last = "GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", tiny.port), timeout=60) as connection:
        connection.sendall(head.encode() + body + last.encode())
        answer = connection.makefile("rb").read().decode()
    assert answer.index("HTTP/1.1 400") < answer.index("HTTP/1.1 200")


@pytest.mark.parametrize("client", ["openai", "openai_async", "langchain"])
def test_46_many_calls_leak_nothing(client: str, tiny: Endpoint) -> None:
    """A small form of `python -m tests.endurance.clients`, which makes a thousand calls."""
    process = psutil.Process()

    def connections() -> int:
        return sum(item.status == "ESTABLISHED" for item in process.net_connections("tcp"))

    before, threads = connections(), threading.active_count()
    api = CLIENTS[client](tiny.url)
    for _ in range(10):
        api.chat(**chat(tiny, max_tokens=2))
    with ThreadPoolExecutor(8) as executor:
        found = list(executor.map(lambda _: api.chat(**chat(tiny, max_tokens=2)), range(16)))
    assert len(found) == 16
    api.close()
    gc.collect()
    tiny.wait_idle()
    assert threading.active_count() <= threads + 8  # executors of the server stay
    if client != "langchain":  # shares a client of its own between its models
        assert connections() <= before


def test_47_document_names_every_status(tiny: Endpoint) -> None:
    found = httpx.get(f"{tiny.url}/openapi.json", trust_env=False, timeout=60).json()
    assert found["openapi"].startswith("3.1")
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/classifications"):
        operation = found["paths"][path]["post"]
        assert set(operation["responses"]) == {"200", *map(str, ERRORS)}
        assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    for path in ("/v1/models", "/v1/models/{model}", "/healthz"):
        assert {"200", "401", "404", "405", "503"} <= set(found["paths"][path]["get"]["responses"])
    references = {part["$ref"].rpartition("/")[2] for part in parts_of(found) if "$ref" in part}
    assert references <= set(found["components"]["schemas"])


def parts_of(value: Any) -> list[dict[str, Any]]:
    found = [value] if isinstance(value, dict) else []
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return found + [part for child in children for part in parts_of(child)]


@pytest.mark.parametrize("kind", ["tiny", "encoder", "classifier"])
def test_47_generated_requests_find_nothing(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A small form of `schemathesis run URL/openapi.json --mode all -n 200`, with requests right and wrong.

    That what the schema allows is always accepted is not asked for: it cannot say how many tokens a text has.
    """
    running: Endpoint = request.getfixturevalue(kind)
    paths = {"tiny": ["/v1/completions", "/v1/chat/completions"], "encoder": ["/v1/embeddings"]}
    included = [part for path in paths.get(kind, ["/v1/classifications"]) for part in ("--include-path", path)]
    options = ["--mode", "all", "-n", "10", "--phases", "fuzzing", "--seed", "1", "--generation-database", "none"]
    checks = ["--exclude-checks", "positive_data_acceptance", "--suppress-health-check", "all", "--no-color"]
    program = str(Path(sys.executable).parent / "schemathesis")
    done = subprocess.run(
        [program, "run", f"{running.url}/openapi.json", *included, *options, *checks],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    running.wait_idle()
