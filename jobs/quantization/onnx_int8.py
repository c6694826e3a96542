"""ONNX with 8-bit weights in blocks, run by onnxruntime: linear layers, token embedding and head, activations rounded
to 8 bits as they come. A head that is tied to the embedding shares its bytes; every token's row has its own scales.

A decoder's graph keeps a cache, so that it can generate (`jobs.quantization.onnx_decoder` says what goes in and out).
"""

from pathlib import Path

from jobs.quantization.onnx_export import export_blocks


def quantize(student: str, directory: Path) -> dict[str, str]:
    """Writes `model.onnx` and the model's config to a directory; returns the versions that made it.

    Raises:
        QuantizationFailed: a family whose cache is not what it seems.
    """
    return export_blocks(student, directory, body_bits=8)
