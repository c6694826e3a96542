"""torchao int8 dynamic (W8A8): weights of linear layers in int8 with one scale per output channel, activations rounded
to int8 as they come, with one scale per token; products are formed in integers.

Embeddings stay float, and so does a head that is tied to them. A processor whose 8-bit products can overflow (x86
without VNNI) gets 7 bits of range, as torchao advises.
"""

from pathlib import Path

from jobs.quantization.torchao_int8 import save_quantised


def quantize(student: str, directory: Path) -> dict[str, str]:
    """Writes the quantised student to a directory; returns the versions that made it.

    Raises:
        QuantizationFailed: a family without linear layers (GPT-2 has others), of which nothing would be quantised.
    """
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from torchao.utils import should_reduce_range

    config = Int8DynamicActivationInt8WeightConfig(
        reduce_range=should_reduce_range(torch.device("cpu")), set_inductor_config=False
    )
    return save_quantised(student, directory, "int8_dynamic", config)
