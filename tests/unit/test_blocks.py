"""Blocks of weights: their bytes stand for what onnxruntime computes with them, and rounding is to the nearest."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from jobs.quantization.blocks import Blocks, dequantize, pack_integers, round_to_blocks


def weights(rows=48, columns=96, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def run(node, blocks: Blocks, name, values, kind, scales, result):
    """What onnxruntime makes of one node with these blocks."""
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(name, kind, values.shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, result)],
        [numpy_helper.from_array(blocks.packed.numpy(), "packed"), numpy_helper.from_array(scales, "scales")],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {name: values})[0]


@pytest.mark.parametrize("columns", [96, 128, 80, 40])
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_stand_for_what_matmulnbits_multiplies_with(bits, columns):
    blocks = round_to_blocks(weights(columns=columns), bits)
    values = np.random.default_rng(0).normal(size=(5, columns)).astype(np.float32)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "packed", "scales"],
        ["out"],
        domain="com.microsoft",
        K=columns,
        N=48,
        bits=bits,
        block_size=blocks.block_size,
    )
    found = run(node, blocks, "x", values, TensorProto.FLOAT, blocks.scales.numpy(), (5, 48))
    np.testing.assert_allclose(found, values @ dequantize(blocks).numpy().T, atol=1e-4)


@pytest.mark.parametrize("columns", [96, 128, 40])
def test_blocks_stand_for_what_gatherblockquantized_reads(columns):
    blocks = round_to_blocks(weights(columns=columns), 8)
    node = helper.make_node(
        "GatherBlockQuantized",
        ["packed", "ids", "scales"],
        ["out"],
        domain="com.microsoft",
        gather_axis=0,
        quantize_axis=2,
        block_size=blocks.block_size,
        bits=8,
    )
    ids = np.array([[3, 0], [47, 3]], np.int64)
    scales = blocks.scales[..., None].numpy()
    found = run(node, blocks, "ids", ids, TensorProto.INT64, scales, (2, 2, *blocks.packed.shape[1:]))
    read = found.reshape(2, 2, -1)[..., :columns]
    np.testing.assert_allclose(read, dequantize(blocks).numpy()[ids], atol=1e-6)


@pytest.mark.parametrize(("bits", "levels"), [(4, 8), (8, 128)])
def test_rounding_is_to_the_nearest_level_of_the_block(bits, levels):
    exact = weights()
    exact[0] = 0
    blocks = round_to_blocks(exact, bits)
    error = (dequantize(blocks) - exact).abs().reshape(48, blocks.scales.shape[1], -1)
    step = exact.abs().reshape(error.shape).amax(-1, keepdim=True) / levels
    # The level at the far end of the range does not exist, so what lies there is up to a whole step off.
    assert (error <= 1.01 * step).all()
    assert (error <= 0.51 * step).float().mean() > 0.95
    assert torch.equal(dequantize(blocks)[0], exact[0])


@pytest.mark.parametrize(("columns", "size"), [(128, 128), (256, 128), (192, 64), (96, 32), (80, 16), (40, 16)])
def test_eight_bit_blocks_are_as_long_as_rows_allow(columns, size):
    blocks = round_to_blocks(weights(columns=columns), 8)
    assert blocks.block_size == size
    assert blocks.packed.shape == (48, -(-columns // size), size)


def test_integers_that_are_there_already_are_packed_as_they_are():
    integers = torch.randint(-8, 8, (6, 64), generator=torch.Generator().manual_seed(0))
    scales = torch.rand(6, 2) + 0.1
    blocks = pack_integers(integers.to(torch.int8), scales)
    assert (blocks.bits, blocks.block_size, blocks.packed.shape) == (4, 32, (6, 2, 16))
    torch.testing.assert_close(dequantize(blocks), integers * scales.repeat_interleave(32, 1))
