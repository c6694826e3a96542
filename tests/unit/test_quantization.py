"""Quantised students: what is quantised and what is not, how far it is from float, and that a reload is the same."""

import numpy as np
import pytest
import torch

from cluster.errors import QuantizationFailed
from cluster.language_model import load_causal_lm
from jobs.evaluating.scorers import load_scorer, model_bytes
from jobs.quantization import int8_weight_only, onnx_int8
from jobs.quantize import check_reload
from jobs.training.data import Row, RowId, collate
from tests import tiny

MAKERS = {"int8_weight_only": int8_weight_only.quantize, "onnx_int8": onnx_int8.quantize}


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, tiny.VOCABULARY, 40).astype(np.int32)
    return collate([Row(RowId(0, 0), tokens, np.array([25, 15], np.int32), np.ones(40, bool), 40)])


def artefact(tmp_path, family, scheme):
    student = tiny.save_model(tmp_path / "student", family, hidden_size=128, intermediate_size=512)
    MAKERS[scheme](str(student), tmp_path / "made")
    return student, tmp_path / "made"


@pytest.mark.parametrize("scheme", MAKERS)
@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen"])
def test_artefact_is_smaller_near_the_float_model_and_the_same_after_every_load(tmp_path, family, scheme):
    student, made = artefact(tmp_path, family, scheme)
    exact = load_scorer(str(student), "float", 1).logits(batch()).numpy()
    first, second = (load_scorer(str(made), scheme, 1) for _ in range(2))
    found = first.logits(batch()).numpy()
    assert found.shape == exact.shape == (38, tiny.VOCABULARY)
    assert np.array_equal(found, second.logits(batch()).numpy())
    error = np.abs(found - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.1
    assert model_bytes(str(made)) < model_bytes(str(student))
    assert first.parameters == load_causal_lm(str(student)).num_parameters()
    assert (first.vocab_size, first.max_tokens) == (tiny.VOCABULARY, 256)
    for size in (7, 38, 100):
        chunks = [part.numpy() for part in first.logit_chunks(batch(), size)]
        assert {len(part) for part in chunks[:-1]} <= {size}
        np.testing.assert_allclose(np.concatenate(chunks), found, atol=1e-5)
    assert first.score(batch()).nats == pytest.approx(
        load_scorer(str(student), "float", 1).score(batch()).nats, rel=0.05
    )


@pytest.mark.parametrize("scheme", MAKERS)
def test_greedy_continuation_is_that_of_the_logits(tmp_path, scheme):
    _, made = artefact(tmp_path, "llama", scheme)
    scorer = load_scorer(str(made), scheme, 1)
    token_ids = batch().token_ids[:12].tolist()
    for token in scorer.greedy(token_ids[:], 3):
        tokens = np.array([*token_ids, 0], np.int32)  # the last token is only a target
        row = Row(RowId(0, 0), tokens, np.array([len(tokens)], np.int32), np.ones(len(tokens), bool), 1)
        assert token == int(scorer.logits(collate([row]))[-1].argmax())
        token_ids.append(token)


@pytest.mark.parametrize(("family", "head_is_quantised"), [("llama", True), ("llama_tied", False)])
def test_int8_weights_are_rounded_per_channel_and_a_tied_head_stays_float(tmp_path, family, head_is_quantised):
    student, made = artefact(tmp_path, family, "int8_weight_only")
    exact, rounded = (dict(load_causal_lm(str(path)).named_parameters()) for path in (student, made))
    quantised = set()
    for name, weight in exact.items():
        found = rounded[name]
        if type(found) is torch.nn.Parameter:
            assert torch.equal(found, weight)
            continue
        quantised.add(name)
        step = weight.abs().amax(-1, keepdim=True) / 127
        assert ((found.dequantize() - weight).abs() <= 0.51 * step).all()
    assert ("lm_head.weight" in quantised) == head_is_quantised
    assert {f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(2)} <= quantised
    assert "model.embed_tokens.weight" not in quantised


def test_int8_of_a_family_without_linear_layers_is_refused(tmp_path):
    student = tiny.save_model(tmp_path / "student", "gpt2")
    with pytest.raises(QuantizationFailed, match=r"GPT2LMHeadModel has no linear layers.*promote.scheme=onnx_int8"):
        int8_weight_only.quantize(str(student), tmp_path / "made")


def test_reload_that_differs_is_refused():
    check_reload("onnx_int8", {"reload_error": 0.0})
    for error in (1e-3, float("inf"), float("nan")):
        with pytest.raises(QuantizationFailed, match="a logit differs"):
            check_reload("onnx_int8", {"reload_error": error})
