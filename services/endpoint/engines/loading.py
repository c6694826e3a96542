"""Which engine a version gets, from its scheme and its files."""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from cluster.errors import ModelError
from cluster.onnx_graph import has_cache, open_session
from services.endpoint.engines import ragged
from services.endpoint.engines.base import Engine
from services.endpoint.engines.linear import pack
from services.endpoint.engines.onnx import CachedEngine, WholeTextEngine
from services.endpoint.engines.ragged import RaggedEngine
from services.endpoint.engines.separate import SeparateEngine

logger = logging.getLogger(__name__)

_TORCH_SCHEMES = ("float", "int8_weight_only", "int8_dynamic", "compressed_tensors_w4a16")
_PROOF_LENGTHS = (9, 6, 2)
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Of `ragged.prove`; what is wrong is off by more than a standard deviation."""


def load_engine(
    directory: Path, scheme: str, dtype: str, max_cached_tokens: int, graph_threads: int | None = None
) -> Engine:
    """Loads the weights of a verified directory.

    Args:
        dtype: `auto`, `float32` or `bfloat16`.
        max_cached_tokens: bound of the memory of keys and values.
        graph_threads: of an ONNX graph; by default torch's number.

    Raises:
        ModelError: the directory cannot be served; the message says why.
    """
    if scheme.startswith("onnx") or (directory / "model.onnx").is_file():
        session = open_session(directory / "model.onnx", graph_threads or torch.get_num_threads(), spinning=False)
        kind = CachedEngine if has_cache(session) else WholeTextEngine
        return kind(session, max_cached_tokens)
    if scheme not in _TORCH_SCHEMES:
        raise ModelError(f"scheme {scheme!r} is not known here; known: {', '.join(_TORCH_SCHEMES)}, and ONNX graphs")
    if scheme.startswith("int8"):
        import torchao  # noqa: F401  # registers the tensor types that the file names

    from cluster.language_model import load_causal_lm

    return torch_engine(load_causal_lm(str(directory), choose_dtype(directory, dtype)), max_cached_tokens)


def choose_dtype(directory: Path, dtype: str) -> torch.dtype:
    """For `auto` that of the weights where the processor multiplies it natively; float32 else."""
    from cluster.language_model import choose_dtype as of_processor

    if dtype != "auto":
        return of_processor(dtype, torch.device("cpu"))
    path = directory / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    stored = config.get("dtype") or config.get("torch_dtype")
    return of_processor("auto", torch.device("cpu")) if stored == "bfloat16" else torch.float32


@torch.inference_mode()
def torch_engine(model: Any, max_cached_tokens: int) -> Engine:
    """An engine around a loaded model: one that reads sequences together if this is shown to give the same logits."""
    if not ragged.suits(model.config) or not model._can_set_attn_implementation():
        logger.info("%s decodes one sequence at a time: its attention cannot be shared", type(model).__name__)
        return SeparateEngine(model, max_cached_tokens)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    token_ids = [[(7 * number + 3 * t) % vocabulary for t in range(n)] for number, n in enumerate(_PROOF_LENGTHS)]
    expected = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float() for ids in token_ids]
    before = model.config._attn_implementation
    trial = RaggedEngine(model, len(token_ids) * ragged.UNIT)
    asked = (token_ids, _TOLERANCES[model.dtype], model.dtype == torch.float32)
    if ragged.prove(trial, expected, *asked):
        restore = pack(model)
        if not ragged.prove(trial, expected, *asked):
            restore()
        return RaggedEngine(model, max_cached_tokens)
    logger.warning("%s decodes one sequence at a time: together they would get other logits", type(model).__name__)
    model.set_attn_implementation(before)
    return SeparateEngine(model, max_cached_tokens)
