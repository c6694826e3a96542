"""What the int8 schemes of torchao share: quantised as transformers loads them, saved as safetensors that
`from_pretrained` reads back. The torchao version is part of an artefact's identity: others may not read it."""

import warnings
from pathlib import Path
from typing import Any

from cluster.errors import QuantizationFailed
from jobs.quantization.loading import model_class


def save_quantised(student: str, directory: Path, scheme: str, config: Any) -> dict[str, str]:
    """Writes a student, quantised by a torchao config, to a directory; returns the versions that made it.

    Raises:
        QuantizationFailed: a family without linear layers (GPT-2 has others), of which nothing would be quantised.
    """
    import torchao
    from torchao.utils import TorchAOBaseTensor
    from transformers import TorchAoConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_class(student).from_pretrained(
            student,
            dtype="float32",
            use_safetensors=True,
            quantization_config=TorchAoConfig(config, modules_to_not_convert=[]),
        )
        if not any(isinstance(parameter, TorchAOBaseTensor) for parameter in model.parameters()):
            raise QuantizationFailed(
                f"scheme {scheme}: {type(model).__name__} has no linear layers that torchao could quantise; "
                "take onnx_int8 instead (in a run, quantize.schemes=[onnx_int8] with promote.scheme=onnx_int8)"
            )
        model.save_pretrained(directory)
    return {"torchao": torchao.__version__}
