"""Quantised students: what is quantised and what is not, how far it is from float, and that a reload is the same."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from cluster.errors import QuantizationFailed
from cluster.language_model import load_causal_lm
from cluster.published import check_version_files
from jobs.evaluating.scorers import load_scorer, model_bytes
from jobs.quantization import int8_dynamic, int8_weight_only, onnx_float32, onnx_int4, onnx_int8
from jobs.quantize import check_reload
from jobs.training.data import Row, RowId, collate
from tests import tiny

MAKERS = {
    "int8_weight_only": int8_weight_only.quantize,
    "int8_dynamic": int8_dynamic.quantize,
    "onnx_float32": onnx_float32.quantize,
    "onnx_int8": onnx_int8.quantize,
    "onnx_int4": onnx_int4.quantize,
}
SIZE = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
LARGEST_ERROR = {
    "int8_weight_only": 0.05,
    "int8_dynamic": 0.1,
    "onnx_float32": 1e-5,
    "onnx_int8": 0.05,
    "onnx_int4": 0.5,
}
"""Of a logit, relative to the largest, with random weights: an order of magnitude."""
LARGEST_SIZE = {
    ("onnx_float32", "qwen"): 1.1,
    ("onnx_int8", "llama_tied"): 0.32,
    ("onnx_int8", "qwen"): 0.32,
    ("onnx_int4", "llama"): 0.24,
}
"""Of the float bytes; the graph itself, 60 kB and more, weighs as much here as a twentieth of the weights."""
FAMILIES = ("llama", "llama_tied", "qwen")
CASES = [(scheme, family) for scheme in ("int8_weight_only", "int8_dynamic") for family in FAMILIES]
CASES += list(LARGEST_SIZE)
FAMILY_OF = {
    "int8_weight_only": "llama",
    "int8_dynamic": "llama",
    "onnx_float32": "qwen",
    "onnx_int8": "llama_tied",
    "onnx_int4": "llama",
}


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, tiny.VOCABULARY, 40).astype(np.int32)
    return collate([Row(RowId(0, 0), tokens, np.array([25, 15], np.int32), np.ones(40, bool), 40)])


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    """Makes each pair of student and artefact once."""
    made = {}

    def find(family, scheme):
        if (family, scheme) not in made:
            directory = tmp_path_factory.mktemp(scheme)
            student = tiny.save_model(directory / "student", family, **SIZE)
            MAKERS[scheme](str(student), directory / "made")
            made[family, scheme] = student, directory / "made"
        return made[family, scheme]

    return find


@pytest.mark.parametrize(("scheme", "family"), CASES)
def test_artefact_has_its_size_is_near_the_float_model_and_the_same_after_every_load(artefact, scheme, family):
    student, made = artefact(family, scheme)
    exact = load_scorer(str(student), "float", 1).logits(batch()).numpy()
    first, second = (load_scorer(str(made), scheme, 1) for _ in range(2))
    found = first.logits(batch()).numpy()
    assert found.shape == exact.shape == (38, tiny.VOCABULARY)
    assert np.array_equal(found, second.logits(batch()).numpy())
    error = np.abs(found - exact).max() / np.abs(exact).max()
    assert 0 < error < LARGEST_ERROR[scheme]
    assert model_bytes(str(made)) < LARGEST_SIZE.get((scheme, family), 1) * model_bytes(str(student))
    check_version_files((path.name for path in made.iterdir()), str(made))
    assert first.parameters == load_causal_lm(str(student)).num_parameters()
    assert (first.vocab_size, first.max_tokens) == (tiny.VOCABULARY, 256)
    for size in (7, 38, 100):
        chunks = [part.numpy() for part in first.logit_chunks(batch(), size)]
        assert {len(part) for part in chunks[:-1]} <= {size}
        np.testing.assert_allclose(np.concatenate(chunks), found, atol=1e-5)
    exact_nats = load_scorer(str(student), "float", 1).score(batch()).nats
    assert first.score(batch()).nats == pytest.approx(exact_nats, rel=2 * LARGEST_ERROR[scheme])


def test_fresh_process_computes_the_same_bits(artefact, tmp_path):
    places = {scheme: str(artefact(FAMILY_OF[scheme], scheme)[1]) for scheme in MAKERS}
    code = (
        "import json, sys, numpy as np\n"
        "from jobs.evaluating.scorers import load_scorer\n"
        "from tests.unit.test_quantization import batch\n"
        "for scheme, place in json.load(sys.stdin).items():\n"
        "    np.save(f'{sys.argv[1]}/{scheme}.npy', load_scorer(place, scheme, 1).logits(batch()).numpy())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], input=json.dumps(places), text=True, env=environment, check=True
    )
    for scheme, place in places.items():
        here = load_scorer(place, scheme, 1).logits(batch()).numpy()
        assert np.array_equal(np.load(tmp_path / f"{scheme}.npy"), here), scheme


@pytest.mark.parametrize("scheme", MAKERS)
def test_greedy_continuation_is_that_of_the_logits(artefact, scheme):
    _, made = artefact(FAMILY_OF[scheme], scheme)
    scorer = load_scorer(str(made), scheme, 1)
    token_ids = batch().token_ids[:12].tolist()
    for token in scorer.greedy(token_ids[:], 3):
        tokens = np.array([*token_ids, 0], np.int32)  # the last token is only a target
        row = Row(RowId(0, 0), tokens, np.array([len(tokens)], np.int32), np.ones(len(tokens), bool), 1)
        assert token == int(scorer.logits(collate([row]))[-1].argmax())
        token_ids.append(token)


@pytest.mark.parametrize("scheme", ["onnx_float32", "onnx_int8", "onnx_int4"])
def test_answer_of_an_onnx_artefact_does_not_depend_on_what_is_in_the_batch(artefact, scheme):
    _, made = artefact(FAMILY_OF[scheme], scheme)
    scorer = load_scorer(str(made), scheme, 1)
    rng = np.random.default_rng(4)
    rows = [
        Row(RowId(0, n), rng.integers(0, tiny.VOCABULARY, 70).astype(np.int32), np.array([70]), np.ones(70, bool), 1)
        for n in range(3)
    ]
    alone = np.concatenate([scorer.logits(collate([row])).numpy() for row in rows])
    together = scorer.logits(collate(rows)).numpy()
    assert np.abs(alone - together).max() < 1e-5 * np.abs(alone).max()


@pytest.mark.parametrize(("family", "head_is_quantised"), [("llama", True), ("llama_tied", False)])
@pytest.mark.parametrize("scheme", ["int8_weight_only", "int8_dynamic"])
def test_torchao_rounds_weights_per_channel_and_leaves_a_tied_head_float(artefact, scheme, family, head_is_quantised):
    student, made = artefact(family, scheme)
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


def test_int8_dynamic_rounds_activations_and_weight_only_does_not(artefact):
    row = batch()
    of_float, weights, both = (
        load_scorer(str(artefact("llama", scheme)[place]), kind, 1).logits(row).numpy()
        for scheme, place, kind in (
            ("int8_weight_only", 0, "float"),
            ("int8_weight_only", 1, "int8_weight_only"),
            ("int8_dynamic", 1, "int8_dynamic"),
        )
    )
    assert np.abs(both - of_float).mean() > np.abs(weights - of_float).mean()


@pytest.mark.parametrize("scheme", ["int8_weight_only", "int8_dynamic"])
def test_int8_of_a_family_without_linear_layers_is_refused(tmp_path, scheme):
    student = tiny.save_model(tmp_path / "student", "gpt2")
    with pytest.raises(QuantizationFailed, match=r"GPT2LMHeadModel has no linear layers.*promote.scheme=onnx_int8"):
        MAKERS[scheme](str(student), tmp_path / "made")


def test_reload_that_differs_is_refused():
    check_reload("onnx_int8", {"reload_error": 0.0})
    check_reload("onnx_int8", {"reload_error": 1e-6}, same_processor=False)
    for error in (1e-3, float("inf"), float("nan")):
        for same in (True, False):
            with pytest.raises(QuantizationFailed, match="a logit differs"):
                check_reload("onnx_int8", {"reload_error": error}, same)
    with pytest.raises(QuantizationFailed, match=r"a logit differs by 1e-06 \(allowed 0\)"):
        check_reload("onnx_int8", {"reload_error": 1e-6})
