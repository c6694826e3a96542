"""From a directory that was checked to the model in it, of whatever kind."""

from pathlib import Path

from cluster.model_directory import model_kind
from cluster.resources import threads_beside_serve, threads_each
from services.endpoint.encoders import EncoderModel
from services.endpoint.engines.vllm import VllmSettings
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
        lengths = (config.max_context_tokens, config.max_new_tokens)
        # onnxruntime hands work out in small pieces: it gains by a core of which Serve takes a part, where torch waits.
        threads = config.threads_per_replica or threads_each(config.replicas)
        return ServedModel(directory, *lengths, capacity, config.dtype, graph_threads=threads, vllm=_vllm(config))
    return EncoderModel(directory, kind, config.max_context_tokens, config.max_running + config.max_waiting)


def _vllm(config: EndpointConfig) -> VllmSettings | None:
    if config.vllm_python is None:
        return None
    threads = config.threads_per_replica or threads_beside_serve(config.replicas)
    return VllmSettings(config.vllm_python, config.gpus_per_replica, threads)
