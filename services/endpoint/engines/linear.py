"""Linear layers in the layout in which oneDNN multiplies few rows fastest; the result does not depend on how many.

A decoding step multiplies every weight with one row for each sequence. On an AMD EPYC with AVX-512 BF16, one thread, a
Llama of 8 x 512 with 32,000 tokens, milliseconds of all linear layers of a step, for 1 row and for 16 rows: plain
float32 16 and 37, packed 15 and 22; plain bfloat16 13 and 18, packed 9 and 12. The plain product takes another kernel
for a single row than for several, and gives other last bits; the packed one does not, save for float32 and a large K:
there a single row is multiplied as two.

torchao multiplies int8 weights of linear layers by unpacking them for every step (55 and 118). In float32 they are
unpacked once, into the memory of a float model; in bfloat16 one row is multiplied with the int8 weights as they are
(5), more with weights that were unpacked to bfloat16, which holds every int8 exactly.

Axes: N outputs, K inputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 16
"""The number of rows that the layout is chosen for; it works with any."""


class PackedLinear(nn.Module):
    """`x @ weight.T + bias` with a packed weight."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight_NK.shape[1], weight_NK.shape[0]
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach().contiguous(), _ROWS)
        self._bias = None if bias_N is None else bias_N.detach()
        probe = torch.sin(torch.arange(2 * self.in_features, dtype=torch.float32)).view(2, -1).to(weight_NK.dtype)
        self._one_differs = not torch.equal(self._multiply(probe[:1]), self._multiply(probe)[:1])

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        doubled = self._one_differs and len(rows) == 1
        found = self._multiply(rows.repeat(2, 1))[:1] if doubled else self._multiply(rows)
        return found.view(*x.shape[:-1], self.out_features)

    def _multiply(self, rows: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")


class Int8Linear(nn.Module):
    """The same of an int8 weight with a scale for each output, in bfloat16."""

    def __init__(self, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight_NK.shape[1], weight_NK.shape[0]
        self._weight, self._scale = weight_NK.contiguous(), scale_N.to(torch.bfloat16)
        self._exact = PackedLinear(weight_NK.to(torch.bfloat16), None)
        self._bias = None if bias_N is None else bias_N.detach().to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if len(rows) == 1:
            found = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self._weight, self._scale)
        else:
            found = self._exact(rows) * self._scale
        if self._bias is not None:
            found = found + self._bias
        return found.view(*x.shape[:-1], self.out_features)


def pack(model: Any) -> Callable[[], None]:
    """Replaces a model's linear layers where oneDNN is there; returns what puts them back."""
    dtype = model.dtype
    if not _can_pack(dtype):
        return lambda: None
    replaced: list[tuple[Any, str, nn.Module]] = []
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            # Subclasses do something of their own.
            if type(module) is nn.Linear and module.weight.device.type == "cpu":
                setattr(parent, name, _packed(module, dtype))
                replaced.append((parent, name, module))

    def restore() -> None:
        for parent, name, module in replaced:
            setattr(parent, name, module)

    return restore


def _can_pack(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _packed(module: nn.Linear, dtype: torch.dtype) -> nn.Module:
    weight: Any = module.weight
    if type(weight.data) is Tensor or type(weight) is nn.Parameter:
        return PackedLinear(weight, module.bias)
    integers, scale = getattr(weight, "qdata", None), getattr(weight, "scale", None)
    plain = getattr(weight, "act_quant_kwargs", None) is None and getattr(weight, "zero_point", None) is None
    if integers is None or scale is None or scale.numel() != module.out_features or not plain:
        return module  # of another layout, or one that rounds activations too
    if dtype == torch.bfloat16:
        return Int8Linear(integers, scale.flatten(), module.bias)
    return PackedLinear(weight.dequantize().to(dtype), module.bias)
