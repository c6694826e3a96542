"""Weights in blocks: integers of 4 or 8 bits with one scale for every `block_size` weights of a row.

The layout is that of onnxruntime's MatMulNBits, whose CPU kernels multiply such weights with activations that are
rounded to 8 bits block by block, token by token: an answer does not depend on what else is in a batch. Rows of the same
bytes are read by GatherBlockQuantized, so that an embedding and a head that are tied are stored once.

Axes: N outputs, K inputs, G blocks in a row, Y bytes in a block.
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

EIGHT_BIT_BLOCK = 128
FOUR_BIT_BLOCK = 32
_INT8_ACTIVATIONS = 4
"""The `accuracy_level` of MatMulNBits at which products are formed in integers."""


@dataclass(frozen=True)
class Blocks:
    """A quantised matrix [N, K].

    Args:
        packed: uint8 [N, G, Y]; of 4 bits the earlier weight is the lower half of a byte. Half the range is added.
        scales: float32 [N, G].
        in_features: K; the last block may be longer than what is left.
    """

    packed: Tensor
    scales: Tensor
    in_features: int
    bits: int
    block_size: int


def round_to_blocks(weight_NK: Tensor, bits: int, block_size: int | None = None) -> Blocks:
    """The nearest blocks to float weights, by onnxruntime's own rounding: the weight of a block that is largest by
    magnitude is exact, zero is zero.

    Args:
        bits: 4 or 8.
        block_size: a power of two from 16 to 256; default: 32 for 4 bits, and for 8 bits the largest up to 128 that
            divides K, so that no row is filled up.
    """
    if block_size is None:
        block_size = FOUR_BIT_BLOCK if bits == 4 else _largest_divisor(weight_NK.shape[1])
    library = _rounding()
    rounding = library.DefaultWeightOnlyQuantizer(
        library.DefaultWeightOnlyQuantConfig(block_size, is_symmetric=True, bits=bits)
    )
    weight_KN = np.ascontiguousarray(weight_NK.detach().float().numpy().T)
    packed, scales, _ = rounding.qbits_block_quant(weight_KN)
    return Blocks(
        torch.from_numpy(packed),
        torch.from_numpy(scales.reshape(packed.shape[:2])),
        weight_NK.shape[1],
        bits,
        block_size,
    )


def pack_integers(integers_NK: Tensor, scales_NG: Tensor) -> Blocks:
    """Blocks of 4-bit integers that are there already, from -8 to 7, each times its block's scale."""
    (rows, columns), blocks = integers_NK.shape, scales_NG.shape[1]
    shifted = (integers_NK.to(torch.int16) + 8).to(torch.uint8).reshape(rows, blocks, -1)
    packed = shifted[..., 0::2] | (shifted[..., 1::2] << 4)
    return Blocks(packed.contiguous(), scales_NG.float().contiguous(), columns, 4, columns // blocks)


def dequantize(blocks: Blocks) -> Tensor:
    """The float weights [N, K] that the blocks stand for."""
    numbers = blocks.packed
    if blocks.bits == 4:
        numbers = torch.stack([numbers & 15, numbers >> 4], -1).flatten(-2)
    centred = numbers.float() - (1 << blocks.bits - 1)
    return (centred * blocks.scales[..., None]).flatten(1)[:, : blocks.in_features]


def _rounding() -> Any:
    """onnxruntime's module of block quantisers, without the log handler that it gives the root as it is imported."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    from onnxruntime.quantization import matmul_nbits_quantizer

    root.handlers[:] = handlers
    root.setLevel(level)
    return matmul_nbits_quantizer


def _largest_divisor(columns: int) -> int:
    return next((size for size in (EIGHT_BIT_BLOCK, 64, 32) if columns % size == 0), 16)


# --- what stands in a model while it is exported ----------------------------------------------------------------------


class BlockWeights(nn.Module):
    """The bytes of a matrix; of a tied one both users hold this same module."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self.blocks_NGY, self.scales_NG = nn.Buffer(blocks.packed), nn.Buffer(blocks.scales)
        self.in_features, self.bits, self.block_size = blocks.in_features, blocks.bits, blocks.block_size


class BlockLinear(nn.Module):
    """A linear layer that becomes MatMulNBits. It can be exported, not run."""

    weight = None
    """T5's layers ask whether it is a tensor."""

    def __init__(self, weights: BlockWeights, bias_N: Tensor | None) -> None:
        super().__init__()
        self.weights, self.bias_N = weights, None if bias_N is None else nn.Buffer(bias_N.detach())

    def forward(self, x: Tensor) -> Tensor:
        held = self.weights
        rows = held.blocks_NGY.shape[0]
        attributes: dict[str, Any] = {
            "K": held.in_features,
            "N": rows,
            "bits": held.bits,
            "block_size": held.block_size,
            "accuracy_level": _INT8_ACTIVATIONS,
        }
        product = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, held.blocks_NGY, held.scales_NG),
            attributes,
            dtype=torch.float32,
            shape=(*x.shape[:-1], rows),
            version=1,
        )
        return product if self.bias_N is None else product + self.bias_N


class BlockEmbedding(nn.Module):
    """An embedding that becomes GatherBlockQuantized; 8 bits only. It can be exported, not run."""

    def __init__(self, weights: BlockWeights) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, token_ids: Tensor) -> Tensor:
        held = self.weights
        _, blocks, size = held.blocks_NGY.shape
        rows = torch.onnx.ops.symbolic(
            "com.microsoft::GatherBlockQuantized",
            (held.blocks_NGY, token_ids, held.scales_NG[..., None]),
            {"gather_axis": 0, "quantize_axis": 2, "block_size": held.block_size, "bits": 8},
            dtype=torch.float32,
            shape=(*token_ids.shape, blocks, size),
            version=1,
        )
        return rows.flatten(-2)[..., : held.in_features]


def use_blocks(model: Any, body_bits: int, given: dict[str, Blocks] | None = None) -> Any:
    """Puts blocks in place of a model's linear layers and token embedding, which are then gone; returns the model.

    Layers of the body get `body_bits`; the token embedding and the head 8 bits, one set of bytes where they are tied.
    Embeddings of other kinds (positions, or scaled ones) and norms stay float.

    Args:
        given: blocks by the name of their layer, in place of rounding its weights.
    """
    from transformers.pytorch_utils import Conv1D

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    shared: BlockWeights | None = None
    if type(embedding) is nn.Embedding:
        shared = BlockWeights(round_to_blocks(embedding.weight, 8))
    tied = head is not None and head.weight is embedding.weight
    for name, module in list(model.named_modules()):
        replacement: nn.Module | None = None
        if module is embedding and shared is not None:
            replacement = BlockEmbedding(shared)
        elif type(module) in (nn.Linear, Conv1D):
            if given is not None and name in given:
                weights = BlockWeights(given[name])
            elif module is head and tied and shared is not None:
                weights = shared
            else:
                weight_NK = module.weight if type(module) is nn.Linear else module.weight.T
                weights = BlockWeights(round_to_blocks(weight_NK, 8 if module is head else body_bits))
            replacement = BlockLinear(weights, module.bias)
        if replacement is not None:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, replacement)
    return model
