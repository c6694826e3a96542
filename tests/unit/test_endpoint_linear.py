"""Packed linear layers against the plain product, and the dtype that a version gets."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from services.endpoint.engines.linear import Int8Linear, PackedLinear, pack
from services.endpoint.engines.loading import choose_dtype
from services.endpoint.model import ServedModel
from services.endpoint.schema import Sampling
from tests.endpoint_models import answer, save_version

PROMPT = "the cat sat on 猫 mat"
needs_packing = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@needs_packing
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_packed_product_is_the_plain_one_and_does_not_depend_on_the_rows(bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(1536, 96, bias=bias)
    packed = PackedLinear(plain.weight, plain.bias)
    x = torch.randn(1, 40, 1536)
    assert torch.allclose(packed(x), plain(x), atol=1e-5)
    together = packed(x)
    for count in (1, 2, 7, 16):
        assert torch.equal(packed(x[:, :count]), together[:, :count])


@needs_packing
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bfloat16")
@torch.inference_mode()
def test_int8_weights_are_multiplied_as_they_are() -> None:
    torch.manual_seed(0)
    weight, scale = torch.randint(-127, 128, (48, 64), dtype=torch.int8), torch.rand(48) / 100
    bias = torch.randn(48)
    layer = Int8Linear(weight, scale, bias)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    exact = x.float() @ (weight.float() * scale[:, None]).t() + bias
    for rows in (1, 5):
        found = layer(x[:rows])
        assert found.dtype == torch.bfloat16
        assert torch.allclose(found.float(), exact[:rows], atol=0.05, rtol=0.02)


@needs_packing
def test_packing_leaves_out_what_is_not_a_plain_linear_layer_and_is_undone() -> None:
    class Own(nn.Linear):
        """A layer that does something of its own."""

    class Model(nn.Module):
        dtype = torch.float32

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8), Own(8, 8))

    model = Model()
    before = list(model.inner)
    restore = pack(model)
    assert isinstance(model.inner[0], PackedLinear)
    assert model.inner[1] is before[1]
    restore()
    assert list(model.inner) == before


def test_bfloat16_is_close_and_only_where_the_files_or_the_setting_say_so(tmp_path: Path) -> None:
    plain = save_version(tmp_path)
    assert choose_dtype(tmp_path, "auto") is torch.float32
    assert choose_dtype(tmp_path, "bfloat16") is torch.bfloat16
    (tmp_path / "manifest.json").write_text('{"scheme": "float"}')
    half = ServedModel(tmp_path, 480, 300, dtype="bfloat16")
    token_ids = half.encode(PROMPT)
    found = [token.logprob for token in answer(half, token_ids, Sampling(0, top_logprobs=0, echo=True))[0].tokens[1:]]
    with torch.inference_mode():
        logits_TV = plain(torch.tensor([token_ids]), use_cache=False).logits[0, :-1, : half.vocabulary.size]
    expected = torch.log_softmax(logits_TV, -1)[range(len(found)), token_ids[1:]].numpy()
    error = np.abs(np.array(found, float) - expected).max()
    assert 1e-4 < error < 0.5
