import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from services.endpoint.decoding import LOGPROB_FLOOR, TextStream, TokenLogprob, Vocabulary, choose_token, token_logprobs
from tests.endpoint_models import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER)
TEXTS = ["the cat sat", "naïve 猫が好き 🐈‍⬛ done", "\u0000\ufffd\u2028 end", "🇩🇪🇫🇷"]


def stream_text(token_ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(VOCABULARY, stop, [])
    parts = []
    for token_id in token_ids:
        parts.append(stream.push(token_id, None)[0])
        if stream.stopped:
            break
    parts.append(stream.finish()[0])
    return parts, stream


@pytest.mark.parametrize("text", TEXTS)
def test_text_stream_gives_back_any_text_without_cut_characters(text: str) -> None:
    parts, _ = stream_text(TOKENIZER.encode(text))
    assert "".join(parts) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)
        assert any(part == "" for part in parts[:-1]) == any(ord(character) > 127 for character in text)


def test_text_stream_equals_the_tokenizer_on_random_tokens() -> None:
    draw = random.Random(0)
    for _ in range(300):
        token_ids = [draw.randrange(VOCABULARY.size) for _ in range(draw.randrange(1, 30))]
        parts, _ = stream_text(token_ids)
        assert "".join(parts) == TOKENIZER.decode(token_ids, skip_special_tokens=True)


def test_text_stream_stops_at_the_earliest_stop_text_that_spans_tokens() -> None:
    token_ids = TOKENIZER.encode("the cat. END of. EN the hat")
    assert len(TOKENIZER.encode("END")) > 1
    parts, stream = stream_text(token_ids, ("hat", "END"))
    assert stream.stopped
    assert "".join(parts) == "the cat. "


def test_text_stream_hands_out_what_only_looked_like_a_stop_text() -> None:
    parts, stream = stream_text(TOKENIZER.encode("aab EN aaaab EN"), ("aaab!", "END"))
    assert not stream.stopped
    assert "".join(parts) == "aab EN aaaab EN"
    # Nothing that could still become a stop text was handed out before the end.
    assert "".join(parts[:-1]) == "aab EN aaaab "


def test_text_stream_cuts_at_the_stop_text_that_is_complete_first() -> None:
    draw = random.Random(1)
    text = "".join(draw.choice("ab猫") for _ in range(60))
    for _ in range(200):
        stop = tuple("".join(draw.choice("ab猫") for _ in range(draw.randrange(1, 6))) for _ in range(2))
        ends = [(text.find(one) + len(one), text.find(one)) for one in stop if one in text]
        cut = min(ends)[1] if ends else len(text)
        parts, _ = stream_text(TOKENIZER.encode(text), stop)
        assert "".join(parts) == text[:cut]


def test_text_stream_continues_a_character_that_the_context_began() -> None:
    token_ids = TOKENIZER.encode("猫")
    stream = TextStream(VOCABULARY, (), token_ids[:1])
    assert "".join(stream.push(token_id, None)[0] for token_id in token_ids[1:]) == "猫"


def test_text_stream_drops_tokens_inside_the_stop_text() -> None:
    token_ids = TOKENIZER.encode("cat.END")
    stream = TextStream(VOCABULARY, ("END",), [], offset=10)
    tokens = []
    for token_id in token_ids:
        tokens += stream.push(token_id, TokenLogprob(token_id, -1.0, ()))[1]
    assert b"".join(VOCABULARY.bytes_of(token.token_id) for token in tokens) == b"cat."
    assert tokens[0].text_offset == 10
    assert tokens[-1].text_offset == 13


def test_vocabulary_names_special_and_partial_tokens() -> None:
    assert VOCABULARY.bytes_of(TOKENIZER.eos_token_id) == b""
    assert VOCABULARY.name_of(TOKENIZER.eos_token_id) == "</s>"
    partial = TOKENIZER.encode("猫")[0]
    assert VOCABULARY.name_of(partial) == "bytes:" + "".join(f"\\x{byte:02x}" for byte in VOCABULARY.bytes_of(partial))


def test_vocabulary_of_a_metaspace_tokenizer_keeps_spaces_and_bytes() -> None:
    pieces = ["<unk>", "</s>", "▁the", "▁cat", "s", "<0xE7>", "<0x8C>", "<0xAB>"]
    backend = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    vocabulary = Vocabulary(tokenizer)
    assert [vocabulary.bytes_of(index) for index in range(1, 8)] == [
        b"", b" the", b" cat", b"s", b"\xe7", b"\x8c", b"\xab",
    ]  # fmt: skip


def test_choose_token_is_greedy_at_zero_and_repeatable_with_a_seed() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0])
    assert choose_token(logits, 0.0, 1.0, torch.Generator()) == 1
    draws = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(5)
        draws.append([choose_token(logits, 1.0, 0.99, generator) for _ in range(50)])
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 1


def test_choose_token_draws_with_the_probabilities_of_the_temperature() -> None:
    logits, temperature = torch.tensor([0.0, 1.0, 2.0, -30.0]), 0.7
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[choose_token(logits, temperature, 1.0, generator)] += 1
    assert torch.allclose(counts / 4000, torch.softmax(logits / temperature, -1), atol=0.03)


def test_choose_token_top_p_keeps_the_smallest_set() -> None:
    logits = torch.log(torch.tensor([0.1, 0.5, 0.15, 0.25]))
    generator = torch.Generator().manual_seed(0)
    drawn = {top_p: {choose_token(logits, 1.0, top_p, generator) for _ in range(300)} for top_p in (0.0, 0.4, 0.7, 0.8)}
    assert drawn == {0.0: {1}, 0.4: {1}, 0.7: {1, 3}, 0.8: {1, 2, 3}}


@pytest.mark.parametrize("temperature", [1e-300, 1e-46, 1e-44, 1e-30, 1e-6])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_choose_token_survives_tiny_temperatures(temperature: float, top_p: float) -> None:
    logits = torch.tensor([1.0, -3.0, 2.0, 0.5])
    assert {choose_token(logits, temperature, top_p, torch.Generator().manual_seed(n)) for n in range(20)} == {2}


def test_token_logprobs_equal_log_softmax_and_have_a_floor() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [5.0, -float("inf"), 0.0]])
    first, second = token_logprobs(logits, [0, 1], 2)
    expected = torch.log_softmax(logits, -1)
    assert first.logprob == pytest.approx(float(expected[0, 0]))
    assert [index for index, _ in first.top] == [2, 1]
    assert second.logprob == LOGPROB_FLOOR
    assert token_logprobs(logits[:0], [], 2) == []
