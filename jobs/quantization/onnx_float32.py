"""The float student as an ONNX graph, run by onnxruntime: nothing is rounded. On a CPU it decodes faster than torch.

A decoder's graph keeps a cache, so that it can generate (`jobs.quantization.onnx_decoder` says what goes in and out).
That of a family with recurrent states has none: it generates more slowly than torch.
"""

from pathlib import Path

from jobs.quantization.onnx_export import export, exportable


def quantize(student: str, directory: Path) -> dict[str, str]:
    """Writes `model.onnx` and the model's config to a directory; returns the versions that made it.

    Raises:
        QuantizationFailed: a family whose cache is not what it seems.
    """
    return export(*exportable(student), directory)
