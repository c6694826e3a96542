"""Hostile input: any body is answered, or refused with a 4xx, within a second, and others are not kept waiting."""

import asyncio
import gzip
import json
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import psutil
import pytest
from fastapi import FastAPI
from tokenizers import Regex, normalizers, pre_tokenizers

from services.endpoint.api import build_api
from services.endpoint.reading import longest_token_bytes
from tests.conformance.server import Endpoint, endpoint
from tests.encoder_models import save_encoder, word_piece_tokenizer
from tests.endpoint_models import byte_level_tokenizer, save_version

pytestmark = pytest.mark.usefixtures("one_thread")
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT: dict[str, Any] = {"model": "m", "prompt": "hi", "max_tokens": 2}
INPUT: dict[str, Any] = {"model": "m", "input": "hi"}
MEGABYTE = 1_000_000
CLIENT = httpx.Client(trust_env=False, timeout=60)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    directory = tmp_path_factory.mktemp("language")
    save_version(directory)
    with endpoint("m", directory, max_context_tokens=256, max_new_tokens=64, max_choices=8) as running:
        yield running


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    directory = tmp_path_factory.mktemp("encoder")
    save_encoder(directory)
    with endpoint("m", directory) as running:
        yield running


def post(running: Endpoint, path: str, body: Any, **headers: str) -> tuple[httpx.Response, float]:
    """The answer, and the processor seconds that it cost."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    started = time.process_time()
    answer = CLIENT.post(
        f"{running.url}{path}", content=content, headers={"content-type": "application/json", **headers}
    )
    return answer, time.process_time() - started


def check(answer: httpx.Response, cpu_s: float, statuses: tuple[int, ...] = (400,)) -> None:
    assert answer.status_code in statuses, answer.text[:300]
    assert cpu_s < 2  # half of it where nobody shares the core's caches
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert len(answer.content) < 2000


BODIES = {
    "nothing": b"",
    "spaces": b" " * 10_000,
    "null": b"null",
    "text": b'"text"',
    "list": b"[{}]",
    "open": b"{",
    "trailing comma": b'{"a": 1,}',
    "two objects": b"{}{}",
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(TEXT).encode(),
    "UTF-16": json.dumps(TEXT).encode("utf-16"),
    "UTF-32": json.dumps(TEXT).encode("utf-32"),
    "NUL": json.dumps(TEXT).encode() + b"\0",
    "half a character": b'{"model": "\xe7\x8c"}',
    "overlong": b'{"model": "\xc0\xaf"}',
    "lone surrogate": b'{"model": "m", "prompt": "\\udc00"}',
    "surrogate as key": b'{"\\ud800": 1}',
    "NaN": b'{"model": "m", "prompt": "a", "temperature": NaN}',
    "minus Infinity": b'{"model": "m", "prompt": "a", "top_p": -Infinity}',
    "1e400": b'{"model": "m", "prompt": "a", "temperature": 1e400}',
    "10,000 digits": b'{"model": "m", "prompt": "a", "n": ' + b"1" * 10_000 + b"}",
    "900,000 digits": b'{"model": "m", "prompt": "a", "n": ' + b"1" * 900_000 + b"}",
    "key twice": b'{"model": "m", "model": "m", "prompt": "a"}',
    "key twice inside": b'{"model": "m", "prompt": "a", "metadata": {"a": 1, "a": 2}}',
    "depth 101": b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}",
    "depth 500,000": b'{"a": ' + b"[" * 500_000 + b"]" * 500_000 + b"}",
    "depth of objects": b'{"a":' * 150_000 + b"1" + b"}" * 150_000,
    "gzip bomb": gzip.compress(b" " * 50 * MEGABYTE),
    "100,000 keys twice": b"{" + b",".join(b'"%d":1' % (number % 50_000) for number in range(100_000)) + b"}",
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_hostile_json_is_refused(language_model: Endpoint, body: bytes, path: str) -> None:
    answer, cpu_s = post(language_model, path, body)
    check(answer, cpu_s)


def test_compressed_body_is_not_unpacked(language_model: Endpoint) -> None:
    answer, cpu_s = post(language_model, "/v1/completions", BODIES["gzip bomb"], **{"content-encoding": "gzip"})
    check(answer, cpu_s)


WRONG: tuple[Any, ...] = (None, True, -1, 1.5, 10**30, "x", "", [], {}, [None], [[]], {"a": {}})


@pytest.mark.parametrize(
    ("path", "base"),
    [("/v1/completions", TEXT), ("/v1/chat/completions", CHAT), ("/v1/embeddings", INPUT)],
    ids=["completions", "chat", "embeddings"],
)
def test_wrong_types_of_every_parameter_never_break_it(
    language_model: Endpoint, encoder: Endpoint, path: str, base: dict[str, Any]
) -> None:
    running = encoder if path == "/v1/embeddings" else language_model
    names = (
        "model", "prompt", "messages", "input", "n", "temperature", "top_p", "seed", "stop", "stream", "logprobs",
        "echo", "stream_options", "max_tokens", "max_completion_tokens", "top_logprobs", "chat_template_kwargs",
        "best_of", "enable_thinking", "return_reasoning", "encoding_format", "dimensions", "truncate", "tools",
        "response_format", "logit_bias", "suffix", "user", "metadata",
    )  # fmt: skip
    with httpx.Client(base_url=running.url, trust_env=False) as client:
        for name in names:
            for value in WRONG:
                answer = client.post(path, json={**base, name: value})
                assert answer.status_code in (200, 400, 404), (name, value, answer.text[:300])


TEXTS = {
    "bidi and zero width": "\u202e\u2066evil\u2069\u200b\u200d\ufeff" * 10,
    "combining marks": "e" + "\u0301" * 40,
    "NUL and controls": "".join(map(chr, range(32))) + "\x7f\x80\x9f",
    "special tokens": "<s></s><|endoftext|><|im_start|>system\n[INST]<<SYS>>" * 3,
    "template": "{{ 7 * 7 }}{% for x in range(10**9) %}{% endfor %}",
    "not characters": "\ufdd0\ufffe\U0010ffff",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈" * 3,
    "line ends": "\r\n\u2028\u2029\x85\x0b\x0c" * 4,
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_strange_text_is_answered(language_model: Endpoint, encoder: Endpoint, text: str, stream: bool) -> None:
    said = {"messages": [{"role": role, "content": text} for role in ("system", "user")]}
    for path, body in (("/v1/chat/completions", {**CHAT, **said}), ("/v1/completions", {**TEXT, "prompt": text})):
        answer, cpu_s = post(language_model, path, {**body, "stream": stream, "stop": [text[:200]], "user": text})
        check(answer, cpu_s, (200, 400))
        if answer.status_code == 400:
            assert answer.json()["error"]["code"] == "context_length_exceeded"
    answer, cpu_s = post(encoder, "/v1/embeddings", {**INPUT, "input": text, "truncate": True})
    check(answer, cpu_s, (200,))


@pytest.mark.parametrize("name", ["\0", "\u202em", "../../m", "m' OR 1=1 --", "x" * 100_000, "m\r\nx-evil: 1", "{{m}}"])
def test_strange_model_names_are_unknown_models(language_model: Endpoint, name: str) -> None:
    answer, cpu_s = post(language_model, "/v1/completions", {**TEXT, "model": name})
    check(answer, cpu_s, (404,))
    assert "x-evil" not in answer.headers
    assert CLIENT.get(f"{language_model.url}/v1/models/{quote(name[:1000], safe='')}").status_code == 404


TOO_MUCH: dict[str, tuple[str, dict[str, Any], str]] = {
    "n": ("/v1/chat/completions", {**CHAT, "n": 9}, "n"),
    "n of 10**9": ("/v1/chat/completions", {**CHAT, "n": 10**9}, "n"),
    "n below 1": ("/v1/chat/completions", {**CHAT, "n": -1}, "n"),
    "n true": ("/v1/chat/completions", {**CHAT, "n": True}, "n"),
    "max_tokens": ("/v1/completions", {**TEXT, "max_tokens": 65}, "max_tokens"),
    "max_completion_tokens": ("/v1/chat/completions", {**CHAT, "max_completion_tokens": 65}, "max_tokens"),
    "top_logprobs": ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "logprobs": ("/v1/completions", {**TEXT, "logprobs": 21}, "logprobs"),
    "stop": ("/v1/completions", {**TEXT, "stop": ["a"] * 5}, "stop"),
    "long stop": ("/v1/completions", {**TEXT, "stop": "a" * 257}, "stop"),
    "logit_bias": ("/v1/chat/completions", {**CHAT, "logit_bias": {"1": 1}}, "logit_bias"),
    "messages": ("/v1/chat/completions", {**CHAT, "messages": CHAT["messages"] * 1025}, "messages"),
    "prompts": ("/v1/completions", {**TEXT, "prompt": ["a"] * 9}, "prompt"),
    "prompts times n": ("/v1/completions", {**TEXT, "prompt": ["a"] * 3, "n": 3}, "n"),
    "temperature": ("/v1/completions", {**TEXT, "temperature": 2.01}, "temperature"),
    "seed": ("/v1/completions", {**TEXT, "seed": 2**63}, "seed"),
}


@pytest.mark.parametrize(("path", "body", "param"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_expensive_parameters_are_bounded(language_model: Endpoint, path: str, body: dict, param: str) -> None:
    post(language_model, path, body)
    answers = [post(language_model, path, body) for _ in range(5)]
    for answer, _ in answers:
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
    assert min(cpu_s for _, cpu_s in answers) < 0.02


LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "one word": ("/v1/completions", {**TEXT, "prompt": "a" * MEGABYTE}),
    "words": ("/v1/completions", {**TEXT, "prompt": "the cat " * (MEGABYTE // 8)}),
    "combining marks": ("/v1/completions", {**TEXT, "prompt": "e" + "\u0301" * (MEGABYTE // 6)}),
    "chat": ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "<s>" * (MEGABYTE // 3)}]}),
    "system": ("/v1/chat/completions", {**CHAT, "messages": [{"role": "system", "content": "<s> " * 250_000}]}),
    "assistant": ("/v1/chat/completions", {**CHAT, "messages": [{"role": "assistant", "content": "<s> " * 250_000}]}),
    "many messages": ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "x" * 900}] * 1024}),
    "many parts": (
        "/v1/chat/completions",
        {**CHAT, "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 32_000}]},
    ),
    "wrong parts": ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": [{}] * 200_000}]}),
    "wrong messages": ("/v1/chat/completions", {**CHAT, "messages": [{}] * 200_000}),
    "token ids": ("/v1/completions", {**TEXT, "prompt": [1] * 300_000}),
    "wrong token ids": ("/v1/completions", {**TEXT, "prompt": [*[1] * 300_000, -1]}),
    "wrong texts": ("/v1/completions", {**TEXT, "prompt": [*["a"] * 150_000, 1]}),
    "wrong kwargs": (
        "/v1/chat/completions",
        {**CHAT, "chat_template_kwargs": {str(key): [1] for key in range(50_000)}},
    ),
    "long kwargs": ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"a": "<s>" * 300_000}, "max_tokens": 1}),
}


@pytest.mark.parametrize(("path", "body"), LARGE.values(), ids=LARGE)
def test_large_bodies_cost_less_than_a_second(language_model: Endpoint, path: str, body: dict) -> None:
    content = json.dumps(body, ensure_ascii=False).encode()
    answer, cpu_s = post(language_model, path, content)
    check(answer, cpu_s)


def test_large_inputs_of_an_encoder_cost_less_than_a_second(encoder: Endpoint) -> None:
    for given in ("e" + "\u0301" * 300_000, "the cat " * 60_000, ["a"] * 2049, [1] * 200_000):
        content = json.dumps({**INPUT, "input": given}, ensure_ascii=False).encode()
        answer, cpu_s = post(encoder, "/v1/embeddings", content)
        check(answer, cpu_s, (200, 400))


# --- the event loop ---------------------------------------------------------------------------------------------------


async def longest_turn(api: FastAPI, path: str, content: bytes) -> tuple[float, float, int]:
    """While a request is answered: the longest that the event loop is busy with one thing, in processor time; the
    longest that other work on it waits, as a share of the whole; and the request's status."""
    transport, done = httpx.ASGITransport(app=api), asyncio.Event()
    busy, gaps = [0.0], [0.0]

    async def beat() -> None:
        while not done.is_set():
            started, cpu = time.perf_counter(), time.thread_time()
            await asyncio.sleep(0.002)
            gaps.append(time.perf_counter() - started)
            busy.append(time.thread_time() - cpu)

    async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client:
        beating = asyncio.ensure_future(beat())
        started = time.perf_counter()
        answer = await client.post(path, content=content, headers={"content-type": "application/json"})
        took = time.perf_counter() - started
        done.set()
        await beating
    return max(busy), max(gaps) / took, answer.status_code


@pytest.mark.parametrize("kind", ["text", "ids", "assistant message"])
def test_event_loop_goes_on_while_a_megabyte_is_read(language_model: Endpoint, kind: str) -> None:
    arguments = language_model.arguments
    api = build_api(arguments, language_model.fixed)
    long = "the cat sat " * 80_000
    path, body = {
        "text": ("/v1/completions", {**TEXT, "prompt": [long[:500_000], long[:500_000]]}),
        "ids": ("/v1/completions", {**TEXT, "prompt": [5] * 300_000}),
        "assistant message": ("/v1/chat/completions", {**CHAT, "messages": [{"role": "assistant", "content": long}]}),
    }[kind]
    content = json.dumps(body).encode()
    found = [asyncio.run(longest_turn(api, path, content)) for _ in range(3)]
    assert {status for *_, status in found} == {400}
    assert min(busy for busy, *_ in found) < 0.05
    if kind == "assistant message":  # the only one that is tokenised: the others are seen to be too long
        assert min(share for _, share, _ in found) < 0.5


def test_text_that_cannot_fit_is_refused_without_tokenising(language_model: Endpoint) -> None:
    longest = longest_token_bytes(byte_level_tokenizer())
    assert longest is not None
    limit = language_model.model.max_context_tokens
    over, _ = post(language_model, "/v1/completions", {**TEXT, "prompt": "x" * (limit * longest + 1)})
    assert over.json()["error"]["message"].endswith(f"at least {limit + 1}")
    within, _ = post(language_model, "/v1/completions", {**TEXT, "prompt": "x" * (limit * longest)})
    assert within.json()["error"]["code"] == "context_length_exceeded"
    assert "at least" not in within.json()["error"]["message"]


def test_tokenizers_that_drop_characters_have_no_longest_token() -> None:
    assert longest_token_bytes(word_piece_tokenizer()) is None
    for change in (
        {"normalizer": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])},
        {"normalizer": normalizers.Replace(Regex(" +"), " ")},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()])},
    ):
        made = byte_level_tokenizer()
        for name, value in change.items():
            setattr(made.backend_tokenizer, name, value)
        assert longest_token_bytes(made) is None


# --- the wire ---------------------------------------------------------------------------------------------------------


def raw(running: Endpoint, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return connection.makefile("rb").read()


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1, 2\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX\r\n : y\r\n\r\n",
        b"\r\n" * 1000,
        bytes(range(256)) * 10,
    ],
    ids=lambda data: repr(data[:40]),
)
def test_broken_http_is_never_a_server_error(language_model: Endpoint, data: bytes) -> None:
    answer = raw(language_model, data)
    assert answer == b"" or 400 <= int(answer.split()[1]) < 500 or b"HTTP/1.1 200" in answer[:20]
    assert httpx.get(f"{language_model.url}/v1/models", trust_env=False).status_code == 200


def test_refusals_keep_no_memory(language_model: Endpoint) -> None:
    process = psutil.Process()
    body = json.dumps({**TEXT, "n": -1, "prompt": "x" * 100_000}).encode()
    for _ in range(100):
        post(language_model, "/v1/completions", body)
    before = process.memory_info().rss
    for _ in range(100):
        post(language_model, "/v1/completions", body)
    assert process.memory_info().rss - before <= 1 << 20
