"""torchao int8 weight-only: weights of linear layers in int8 with one scale per output channel, activations float.

Saved by transformers as safetensors and reloaded by `from_pretrained`. Embeddings stay float, and so does a head that
is tied to them. The torchao version is part of the artefact's identity: others may not read it.
"""

import warnings
from pathlib import Path

from cluster.errors import QuantizationFailed


def quantize(student: str, directory: Path) -> dict[str, str]:
    """Writes the quantised student to a directory; returns the versions that made it.

    Raises:
        QuantizationFailed: a family without linear layers (GPT-2 has others), of which nothing would be quantised.
    """
    import torchao
    from torchao.quantization import Int8WeightOnlyConfig
    from torchao.utils import TorchAOBaseTensor
    from transformers import AutoModelForCausalLM, TorchAoConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            student,
            dtype="float32",
            use_safetensors=True,
            quantization_config=TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=[]),
        )
        if not any(isinstance(parameter, TorchAOBaseTensor) for parameter in model.parameters()):
            raise QuantizationFailed(
                f"scheme int8_weight_only: {type(model).__name__} has no linear layers that torchao could quantise; "
                "leave the scheme out of quantize.schemes, for example quantize.schemes=[onnx_int8] with "
                "promote.scheme=onnx_int8"
            )
        model.save_pretrained(directory)
    return {"torchao": torchao.__version__}
