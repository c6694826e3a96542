"""GPTQ by llm-compressor, in the environment that RAYSTILL_LLMCOMPRESSOR_PYTHON names; without one, its refusal."""

import os
import sys

import numpy as np
import pytest
import torch

from cluster.errors import QuantizationFailed
from jobs.evaluating.scorers import load_scorer, model_bytes
from jobs.quantization.compressed_tensors import quantize
from tests import tiny
from tests.unit.test_quantization import batch
from tests.unit.test_training_loop import prepared

__all__ = ["prepared"]
PYTHON = os.environ.get("RAYSTILL_LLMCOMPRESSOR_PYTHON")
SIZE = {"hidden_size": 128, "intermediate_size": 256}


def test_gptq_that_fails_says_why(prepared, tmp_path):
    root, teacher = prepared
    with pytest.raises(QuantizationFailed, match=r"llm-compressor failed \(ModuleNotFoundError: .*llmcompressor"):
        quantize(teacher, tmp_path, sys.executable, str(root), "store/x", 4)


@pytest.mark.skipif(PYTHON is None, reason="RAYSTILL_LLMCOMPRESSOR_PYTHON names no environment with llm-compressor")
def test_gptq_artefact_is_four_bits_and_reads_back_the_same(prepared, tmp_path):
    root, _ = prepared
    student, made = tiny.save_model(tmp_path / "student", "llama", **SIZE), tmp_path / "made"
    versions = quantize(str(student), made, str(PYTHON), str(root), "store/x", 16)
    assert set(versions) == {"llmcompressor", "compressed-tensors"}
    exact, first, second = (
        load_scorer(str(path), scheme, 1)
        for path, scheme in ((student, "float"), (made, "compressed_tensors_w4a16"), (made, "compressed_tensors_w4a16"))
    )
    wanted, found = exact.logits(batch()).numpy(), first.logits(batch()).numpy()
    assert np.array_equal(found, second.logits(batch()).numpy())
    assert 0 < np.abs(found - wanted).max() < 0.5 * np.abs(wanted).max()
    assert first.parameters == exact.parameters
    layers = sum(
        module.weight.numel()
        for name, module in exact.model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )
    float_bytes = 4 * (exact.parameters - layers)
    assert model_bytes(str(made)) < float_bytes + 0.6 * layers + 20_000
