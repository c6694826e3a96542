"""torchao int8 weight-only: weights of linear layers in int8 with one scale per output channel, activations float.

Saved by transformers as safetensors and reloaded by `from_pretrained`; a head that is tied to the embedding stays
float. The torchao version is part of the artefact's identity: others may not read it.
"""

import warnings
from pathlib import Path

from cluster.language_model import load_causal_lm


def quantize(student: str, directory: Path) -> dict[str, str]:
    """Writes the quantised student to a directory; returns the versions that made it."""
    import torchao
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    tied = bool(load_causal_lm(student).config.tie_word_embeddings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            student,
            dtype="float32",
            use_safetensors=True,
            quantization_config=TorchAoConfig(
                Int8WeightOnlyConfig(), modules_to_not_convert=["lm_head"] if tied else None
            ),
        )
        model.save_pretrained(directory)
    return {"torchao": torchao.__version__}
