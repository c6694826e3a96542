"""The transformers class of a model directory: a decoder's, or whatever an encoder's config names."""

from typing import Any

from cluster.errors import ModelError
from cluster.pretrained import locate
from jobs.quantization.pairings import model_kind


def read_config(model: str) -> Any:
    """The Hugging Face config of a directory."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(locate(model))
    except (OSError, ValueError) as error:
        raise ModelError(f"model {model}: its config cannot be read ({str(error).strip().splitlines()[0]})") from error


def model_class(model: str) -> Any:
    """`AutoModelForCausalLM`, or the class that an encoder's config names.

    Raises:
        ModelError: an encoder whose class transformers does not have.
    """
    import transformers

    config = read_config(model)
    if model_kind(config) != "encoder":
        return transformers.AutoModelForCausalLM
    [name] = getattr(config, "architectures", None) or ["AutoModel"]
    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise ModelError(f"model {model}: its config names the class {name!r}, which transformers does not have")
    return found
