"""ONNX with 4-bit weights in blocks of 32, two to a byte, run by onnxruntime: linear layers of the body. The token
embedding and the head have 8 bits, which cost the least quality there, and one set of bytes where they are tied.

Rounded to the nearest (RTN) from the student's float weights; `int4_qat` trains them for it first.
"""

from pathlib import Path

from jobs.quantization.onnx_export import export_blocks


def quantize(student: str, directory: Path) -> dict[str, str]:
    """Writes `model.onnx` and the model's config to a directory; returns the versions that made it.

    Raises:
        QuantizationFailed: a family whose cache is not what it seems.
    """
    return export_blocks(student, directory, body_bits=4)
