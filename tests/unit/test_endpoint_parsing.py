import json

import pytest
from pydantic import BaseModel

from services.endpoint.errors import ApiError
from services.endpoint.parsing import MAX_DEPTH, parse_request, read_json
from services.endpoint.schema import ChatRequest, CompletionRequest

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"  ",
        b"[]",
        b"nonsense",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e400}',
        b'{"a": 1, "a": 1}',
        b'{"a": {"b": 1, "b": 2}}',
        b'{"a": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"a": "\xff"}',
        b'{"a": ' + b"9" * 10_000 + b"}",
        b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
        b'{"a": ' * 100_000,
    ],
)
def test_read_json_refuses_hostile_bodies(body: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        read_json(body)
    assert refused.value.status == 400
    json.dumps(refused.value.envelope()).encode()


def test_read_json_accepts_depth_at_the_limit_and_paired_surrogates() -> None:
    deep = b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1)
    assert read_json(b'{"a": ' + deep + b', "b": "\\ud83d\\udc08"}')["b"] == "🐈"


@pytest.mark.parametrize(
    ("base", "change", "param"),
    [
        (CHAT, {"n": True}, "n"),
        (CHAT, {"n": -1}, "n"),
        (CHAT, {"n": 10**9}, "n"),
        (CHAT, {"n": "1"}, "n"),
        (CHAT, {"n": 1.5}, "n"),
        (CHAT, {"temperature": 2.5}, "temperature"),
        (CHAT, {"temperature": True}, "temperature"),
        (CHAT, {"top_p": -0.1}, "top_p"),
        (CHAT, {"seed": 2**63}, "seed"),
        (CHAT, {"stream": 1}, "stream"),
        (CHAT, {"stop": ["a"] * 5}, "stop"),
        (CHAT, {"stop": ""}, "stop"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "hi"}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
        (CHAT, {"tools": [{"type": "function"}]}, "tools"),
        (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"max_completion_tokens": 10**30}, "max_completion_tokens"),
        (CHAT, {"chat_template_kwargs": {"a": [1]}}, "chat_template_kwargs.a"),
        (TEXT, {"prompt": [[1], "x"]}, "prompt"),
        (TEXT, {"prompt": []}, "prompt"),
        (TEXT, {"prompt": [-1]}, "prompt.0"),
        (TEXT, {"logprobs": True}, "logprobs"),
        (TEXT, {"best_of": 3}, "best_of"),
        (TEXT, {"suffix": "x"}, "suffix"),
        (TEXT, {"logit_bias": {"5": 1}}, "logit_bias"),
        (TEXT, {"presence_penalty": 0.5}, "presence_penalty"),
    ],
)
def test_parse_request_names_the_wrong_parameter(base: dict, change: dict, param: str) -> None:
    kind: type[BaseModel] = ChatRequest if base is CHAT else CompletionRequest
    parse_request(kind, json.dumps(base).encode())
    with pytest.raises(ApiError) as refused:
        parse_request(kind, json.dumps({**base, **change}).encode())
    assert refused.value.status == 400
    assert refused.value.kind == "invalid_request_error"
    found = refused.value.param
    assert found is not None
    assert found == param or (param == "prompt" and found.startswith("prompt"))


def test_parse_request_names_a_missing_parameter() -> None:
    with pytest.raises(ApiError) as refused:
        parse_request(CompletionRequest, b'{"model": "m"}')
    assert (refused.value.param, refused.value.code) == ("prompt", "missing_required_parameter")


def test_parse_request_accepts_neutral_and_tolerated_values_and_lists_unknown_keys() -> None:
    extra = {
        "tools": [], "response_format": {"type": "text"}, "presence_penalty": 0.0, "logit_bias": None,
        "user": "u", "metadata": {"a": "b"}, "store": False, "n": None, "temperature": None, "mystery": 1,
    }  # fmt: skip
    request = parse_request(ChatRequest, json.dumps({**CHAT, **extra}).encode())
    assert request.unknown_keys() == ["mystery"]
    assert request.sampling().temperature == 1.0


def test_chat_request_prefers_max_completion_tokens_and_joins_text_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"model": "m", "messages": [{"role": "user", "content": parts}], "max_tokens": 5, "max_completion_tokens": 7}
    request = parse_request(ChatRequest, json.dumps({**body, "enable_thinking": False}).encode())
    assert request.sampling().max_new_tokens == 7
    assert request.messages[0].text() == "ab"
    assert request.template_arguments() == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_completion_request_reads_every_form_of_prompt(prompt: object, expected: list) -> None:
    request = parse_request(CompletionRequest, json.dumps({"model": "m", "prompt": prompt}).encode())
    assert request.prompts() == expected
