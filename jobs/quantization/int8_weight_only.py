"""torchao int8 weight-only: weights of linear layers in int8 with one scale per output channel, activations float.

Embeddings stay float, and so does a head that is tied to them.
"""

from pathlib import Path

from jobs.quantization.torchao_int8 import save_quantised


def quantize(student: str, directory: Path) -> dict[str, str]:
    """Writes the quantised student to a directory; returns the versions that made it.

    Raises:
        QuantizationFailed: a family without linear layers (GPT-2 has others), of which nothing would be quantised.
    """
    from torchao.quantization import Int8WeightOnlyConfig

    return save_quantised(student, directory, "int8_weight_only", Int8WeightOnlyConfig())
