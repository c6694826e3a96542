"""Points 27 to 33 of the checklist: server-sent events as OpenAI's clients read them."""

import json
import socket
import time
from typing import Any

import httpx
import openai
import pytest

from services.endpoint import answering
from tests.conformance.bodies import ALL, SDK, chat, content, text
from tests.conformance.clients import server_sent_events
from tests.conformance.server import Endpoint

each_client = pytest.mark.parametrize("client", ALL)
each_sdk = pytest.mark.parametrize("client", SDK)


def test_27_events_have_their_form(tiny: Endpoint) -> None:
    body = chat(tiny, stream=True)
    with httpx.stream("POST", f"{tiny.url}/v1/chat/completions", json=body, trust_env=False, timeout=60) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-cache"
        body = b"".join(answer.iter_raw())
    *blocks, rest = body.decode().split("\n\n")
    assert rest == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks[-1] == "data: [DONE]"


def test_27_first_event_comes_while_the_rest_is_made(patient: Endpoint) -> None:
    body = chat(patient, n=8, max_tokens=400, temperature=1.5, stream=True)
    with httpx.stream("POST", f"{patient.url}/v1/chat/completions", json=body, trust_env=False, timeout=60) as answer:
        next(answer.iter_raw())
        assert patient.num_admitted == 1
    patient.wait_idle()


@each_sdk
def test_28_chunks_have_their_fields(client: str, tiny: Endpoint, connect: Any) -> None:
    chunks = connect(client, tiny).chat_stream(**chat(tiny, n=2))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    for index in (0, 1):
        own = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert all("delta" in choice for choice in own)
        assert [choice["delta"].get("role") for choice in own] == ["assistant"] + [None] * (len(own) - 1)
        reasons = [choice["finish_reason"] for choice in own]
        assert reasons[-1] in ("stop", "length")
        assert set(reasons[:-1]) <= {None}


@each_client
def test_29_usage_comes_only_if_asked_for(client: str, tiny: Endpoint, connect: Any) -> None:
    api = connect(client, tiny)
    assert not any(chunk.get("usage") for chunk in api.chat_stream(**chat(tiny)))
    with_usage = api.chat_stream(**chat(tiny, stream_options={"include_usage": True}))
    assert len([chunk for chunk in with_usage if chunk["usage"]]) == 1


def test_29_usage_is_a_chunk_of_its_own(tiny: Endpoint, connect: Any) -> None:
    raw = connect("raw", tiny)
    assert all("usage" not in chunk for chunk in raw.chat_stream(**chat(tiny)))
    *chunks, last = raw.chat_stream(**chat(tiny, stream_options={"include_usage": True}))
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    found = raw.failure(lambda: raw.chat(**chat(tiny, stream_options={"include_usage": True})))
    assert (found.status, found.error["param"]) == (400, "stream_options")


@each_client
def test_30_joined_deltas_are_the_whole_text(client: str, tiny: Endpoint, polyglot: Endpoint, connect: Any) -> None:
    for running, more in ((tiny, {"temperature": 1.5}), (polyglot, {"temperature": 0})):
        api = connect(client, running)
        whole = api.chat(**chat(running, **more))["choices"][0]["message"]["content"]
        assert content(api.chat_stream(**chat(running, **more))) == whole
    assert whole == "é猫🐈!"


def test_30_no_piece_holds_a_part_of_a_character(polyglot: Endpoint, connect: Any) -> None:
    raw = connect("raw", polyglot)
    parts = [
        chunk["choices"][0]["delta"].get("content", "") for chunk in raw.chat_stream(**chat(polyglot, temperature=0))
    ]
    assert "".join(parts) == "é猫🐈!"
    texts = raw.complete_stream(**text(polyglot, prompt="猫🐈", echo=True, max_tokens=1))
    assert "".join(chunk["choices"][0]["text"] for chunk in texts).startswith("猫🐈")
    assert not [part for part in parts if "\ufffd" in part]


@each_client
def test_31_errors_before_the_first_byte_have_a_status(client: str, tiny: Endpoint, connect: Any) -> None:
    api = connect(client, tiny)
    found = api.failure(lambda: api.chat_stream(**chat(tiny, max_tokens=65)))
    assert (found.status, found.error["param"]) == (400, "max_tokens")


@pytest.mark.parametrize("client", ["openai", "openai_async", "langchain"])
def test_31_later_errors_are_raised_by_the_clients(client: str, breaking: Endpoint, connect: Any) -> None:
    with pytest.raises(openai.APIError):
        connect(client, breaking).chat_stream(**chat(breaking, temperature=0))
    breaking.wait_idle()


def test_31_later_errors_are_events_that_end_the_stream(breaking: Endpoint) -> None:
    body = chat(breaking, temperature=0, stream=True)
    answer = httpx.post(f"{breaking.url}/v1/chat/completions", json=body, trust_env=False, timeout=60)
    assert answer.status_code == 200
    *chunks, last = server_sent_events(answer.text)
    assert content(chunks).startswith("a")
    assert set(last) == {"error"}
    assert set(last["error"]) == {"message", "type", "param", "code"}


@each_client
def test_32_comments_keep_a_silent_stream_alive(
    client: str, tiny: Endpoint, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny.model._scheduler._engine
    forward = engine.forward

    def slow(reads: list[Any]) -> Any:
        time.sleep(0.03)
        return forward(reads)

    monkeypatch.setattr(engine, "forward", slow)
    monkeypatch.setattr(answering, "KEEP_ALIVE_S", 0.005)
    api = connect(client, tiny)
    expected = api.chat(**chat(tiny))["choices"][0]["message"]["content"]
    if client == "raw":
        answer = api.http.post("/v1/chat/completions", json=chat(tiny, stream=True))
        assert answer.text.split("\n\n").count(": keep-alive") >= 3
    assert content(api.chat_stream(**chat(tiny))) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_33_disconnect_cancels(patient: Endpoint, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    engine = patient.model._scheduler._engine
    forward, num_steps = engine.forward, 0

    def counted(reads: list[Any]) -> Any:
        nonlocal num_steps
        num_steps += 1
        return forward(reads)

    monkeypatch.setattr(engine, "forward", counted)
    fields = text(patient, max_tokens=400, n=60, stream=stream, temperature=1.5)
    body = json.dumps(fields).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
    with socket.create_connection(("127.0.0.1", patient.port)) as connection:
        connection.sendall(head.encode() + body)
        deadline = time.monotonic() + 60
        while not num_steps:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert patient.num_admitted == 1, "the answer is done before the client could leave"
    patient.wait_idle(timeout_s=120)
    assert num_steps < 200, "all 60 choices of up to 400 tokens take 400"
