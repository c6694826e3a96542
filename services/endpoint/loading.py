"""From a directory that was checked to the model in it, of whatever kind."""

from pathlib import Path

from cluster.model_directory import model_kind
from services.endpoint.encoders import EncoderModel
from services.endpoint.model import Capacity, ServedModel
from services.endpoint.schema import EndpointConfig

AnyModel = ServedModel | EncoderModel


def load_model(directory: Path, config: EndpointConfig) -> AnyModel:
    """Loads a language model, or an encoder if the directory's config names one.

    Raises:
        ModelError: the directory cannot be served; the message says why.
    """
    kind = model_kind(directory)
    if kind == "language_model":
        capacity = Capacity(
            config.max_running, config.max_waiting, config.max_cached_tokens, config.max_admitted_tokens
        )
        return ServedModel(directory, config.max_context_tokens, config.max_new_tokens, capacity, config.dtype)
    return EncoderModel(directory, kind, config.max_context_tokens, config.max_running + config.max_waiting)
