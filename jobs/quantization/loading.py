"""The transformers class of a model directory: a decoder's, or whatever an encoder's config names."""

from pathlib import Path
from typing import Any

from cluster.errors import ModelError
from cluster.pretrained import locate
from jobs.quantization.pairings import model_kind

_HEADLESS = "AutoModel"


def read_config(model: str) -> Any:
    """The Hugging Face config of a directory. What embeds is read without a head, as by the endpoint: a masked language
    model, and what sentence-transformers saved, whatever class its config names."""
    from transformers import AutoConfig

    from cluster.model_directory import model_kind as use_of

    located = locate(model)
    try:
        config = AutoConfig.from_pretrained(located)
    except (OSError, ValueError) as error:
        raise ModelError(f"model {model}: its config cannot be read ({str(error).strip().splitlines()[0]})") from error
    named = str(next(iter(config.architectures or []), ""))
    has_modules = (Path(located) / "modules.json").is_file()
    # AutoModel would add the other half to the one that T5's EncoderModel is.
    other = named.endswith("ForMaskedLM") or (has_modules and not named.endswith("EncoderModel"))
    if other and Path(located).is_dir() and use_of(Path(located)) == "embeddings":
        config.architectures = [_HEADLESS]
    return config


def model_class(model: str) -> Any:
    """`AutoModelForCausalLM`, or the class that an encoder's config names.

    Raises:
        ModelError: an encoder whose class transformers does not have.
    """
    import transformers

    config = read_config(model)
    if model_kind(config) != "encoder":
        return transformers.AutoModelForCausalLM
    name = config.architectures[0]
    if name == _HEADLESS:
        return transformers.AutoModel
    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise ModelError(f"model {model}: its config names the class {name!r}, which transformers does not have")
    return found
