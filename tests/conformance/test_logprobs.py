"""Points 34 to 38 of the checklist: log-probabilities, and `echo` as the way to score a prompt."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conformance.bodies import ALL, SDK, chat, text
from tests.conformance.server import Endpoint

each_client = pytest.mark.parametrize("client", ALL)
each_sdk = pytest.mark.parametrize("client", SDK)


@each_client
def test_34_chat_logprobs_have_their_form(client: str, tiny: Endpoint, connect: Any) -> None:
    found = connect(client, tiny).chat(**chat(tiny, logprobs=True, top_logprobs=3, temperature=0))
    entries = found["choices"][0]["logprobs"]["content"]
    assert entries
    for entry in entries:
        assert {"token", "logprob", "bytes", "top_logprobs"} <= set(entry)
        assert len(entry["top_logprobs"]) == 3
        assert all({"token", "logprob", "bytes"} <= set(top) for top in entry["top_logprobs"])


@each_client
def test_34_top_logprobs_are_bounded(client: str, tiny: Endpoint, connect: Any) -> None:
    api = connect(client, tiny)
    most = api.chat(**chat(tiny, logprobs=True, top_logprobs=20, temperature=0))["choices"][0]["logprobs"]["content"]
    assert len(most[0]["top_logprobs"]) == 20
    for change in ({"logprobs": True, "top_logprobs": 21}, {"top_logprobs": 2, "logprobs": False}):
        found = api.failure(lambda change=change: api.chat(**chat(tiny, **change)))
        assert (found.status, found.error["param"]) == (400, "top_logprobs")


@each_client
def test_35_values_are_finite_and_in_order(client: str, tiny: Endpoint, connect: Any) -> None:
    choice = connect(client, tiny).chat(**chat(tiny, logprobs=True, top_logprobs=5, temperature=0))["choices"][0]
    entries = choice["logprobs"]["content"]
    for entry in entries:
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert values == sorted(values, reverse=True)
        assert all(-10_000 < value <= 0 for value in [*values, entry["logprob"]])
        assert entry["logprob"] == values[0]  # the most likely token was taken
        assert entry["token"] == entry["top_logprobs"][0]["token"]
    whole = bytes(byte for entry in entries for byte in entry["bytes"])
    assert whole.decode("utf-8", "replace") == choice["message"]["content"]


@each_client
def test_36_logprobs_travel_with_their_token(client: str, polyglot: Endpoint, connect: Any) -> None:
    fields = chat(polyglot, logprobs=True, top_logprobs=1, temperature=0)
    api = connect(client, polyglot)
    whole = api.chat(**fields)["choices"][0]["logprobs"]["content"]
    choices = [choice for chunk in api.chat_stream(**fields) for choice in chunk["choices"] if choice.get("logprobs")]
    assert [entry for choice in choices for entry in choice["logprobs"]["content"]] == whole
    for choice in choices:
        given = bytes(byte for entry in choice["logprobs"]["content"] for byte in entry["bytes"])
        assert given.decode() == choice["delta"]["content"]


@each_sdk
def test_37_completions_score_a_prompt(client: str, tiny: Endpoint, connect: Any) -> None:
    api = connect(client, tiny)
    scoring: dict[str, Any] = {"max_tokens": 0, "echo": True, "logprobs": 2}
    prompt = "the cat 猫"
    ids = tiny.model.tokenizer.encode(prompt)
    for form in (prompt, ids):
        [choice] = api.complete(**text(tiny, prompt=form, **scoring))["choices"]
        found = choice["logprobs"]
        assert choice["text"] == prompt
        assert len(found["tokens"]) == len(ids)
        assert found["token_logprobs"][0] is None
        assert all(value < 0 for value in found["token_logprobs"][1:])
        assert all(2 <= len(top) <= 3 for top in found["top_logprobs"][1:])
    many = api.complete(**text(tiny, prompt=[ids, ids[:2]], **scoring))["choices"]
    assert [len(choice["logprobs"]["tokens"]) for choice in many] == [len(ids), 2]
    several = api.complete(**text(tiny, prompt=[prompt, "a"], **scoring))["choices"]
    assert [choice["text"] for choice in several] == [prompt, "a"]


@each_sdk
def test_37_text_offsets_are_right(client: str, polyglot: Endpoint, connect: Any) -> None:
    fields = text(polyglot, prompt="the cat:", echo=True, logprobs=0, temperature=0)
    [choice] = connect(client, polyglot).complete(**fields)["choices"]
    found = choice["logprobs"]
    assert choice["text"] == "the cat:é猫🐈!"
    data = choice["text"].encode()
    place = 0
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        size = token.count("\\x") if token.startswith("bytes:") else len(token.encode())
        assert offset == len(data[:place].decode("utf-8", "ignore"))  # a part of a character is where that begins
        place += size


def reference_logprobs(directory: Path, token_ids: list[int], vocabulary_size: int) -> torch.Tensor:
    """Log-probabilities [T - 1] of the tokens behind the first one, by a plain forward pass of transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32).eval()
    with torch.no_grad():
        logits_TV = model(torch.tensor([token_ids])).logits[0, :-1, :vocabulary_size]
    return torch.log_softmax(logits_TV.double(), -1).gather(-1, torch.tensor(token_ids[1:])[:, None])[:, 0]


def test_38_logprobs_are_those_of_a_reference(tiny: Endpoint, connect: Any) -> None:
    directory = Path(tiny.arguments.directory)
    fields = text(tiny, echo=True, logprobs=0, temperature=1.2, max_tokens=40)
    [choice] = connect("raw", tiny).complete(**fields)["choices"]
    found = choice["logprobs"]["token_logprobs"]
    names = choice["logprobs"]["tokens"]
    ids = tiny.model.tokenizer.encode("the cat 猫")
    by_name = {tiny.model.vocabulary.name_of(token_id): token_id for token_id in range(tiny.model.vocabulary.size)}
    ids += [by_name[name] for name in names[len(ids) :]]
    expected = reference_logprobs(directory, ids, tiny.model.vocabulary.size)
    assert len(found) > 20
    assert (torch.tensor(found[1:], dtype=torch.double) - expected).abs().max() <= 1e-4
