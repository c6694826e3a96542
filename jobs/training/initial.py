"""The student before its first step: a given model, kept layers of the teacher, or fresh weights of a shape."""

import re
from typing import Any

import torch
from torch import nn

from cluster.errors import ConfigError, ModelError
from cluster.language_model import load_causal_lm
from jobs.config import StudentConfig
from jobs.shape import shape_config


def build_student(config: StudentConfig, teacher: str | None, tokenizer: Any, seed: int) -> Any:
    """The initial model, float32, the same for the same arguments.

    Args:
        teacher: the teacher's directory or hub id, for `shape` (its family) and `from_teacher`.
        tokenizer: sets the vocabulary of fresh weights without a teacher.

    Raises:
        ModelError, ConfigError: a shape or layers that the family does not have.
    """
    if config.model is not None:
        return load_causal_lm(config.model, torch.float32)
    if config.from_teacher is not None:
        if teacher is None:
            raise ConfigError("student.from_teacher needs a teacher: set teacher.model")
        return keep_layers(load_causal_lm(teacher, torch.float32), config.from_teacher.layers)
    from transformers import AutoModelForCausalLM

    specials = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = shape_config(config.shape or {}, teacher, len(tokenizer), specials)
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        return AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    except (ValueError, TypeError, KeyError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        raise ConfigError(
            f"student.shape: {type(shape).__name__} cannot be built: {type(error).__name__}: {error}"
        ) from error
    finally:
        torch.random.set_rng_state(generator_state)


def keep_layers(teacher: Any, layers: list[int]) -> Any:
    """A model of the teacher's family with some of its layers, and its embeddings, norms and head.

    Raises:
        ModelError: an index out of range or given twice, or a family whose layers are not one list of equals.
    """
    name, total = _layer_list(teacher)
    if not layers or len(set(layers)) != len(layers) or not all(0 <= index < total for index in layers):
        raise ModelError(
            f"student.from_teacher.layers={layers}: keep at least one of the teacher's layers 0..{total - 1}, each once"
        )
    if getattr(teacher.config, "scale_attn_by_inverse_layer_idx", False):
        raise ModelError(
            f"student.from_teacher.layers={layers}: attention of this {type(teacher).__name__} is scaled by a layer's "
            "place, which kept layers lose: start from student.shape"
        )
    config = type(teacher.config)(**_kept(teacher.config.to_dict(), layers, total))
    student = type(teacher)(config).float()
    place = {str(old): str(new) for new, old in enumerate(layers)}
    pattern = re.compile(rf"(^|.*\.){re.escape(name)}\.(\d+)\.(.*)")
    kept = {}
    for key, value in teacher.state_dict().items():
        match = pattern.fullmatch(key)
        if match is None:
            kept[key] = value
        elif match[2] in place:
            kept[f"{match[1]}{name}.{place[match[2]]}.{match[3]}"] = value
    try:
        student.load_state_dict(kept, strict=True)
    except RuntimeError as error:
        raise ModelError(
            f"student.from_teacher.layers={layers}: the layers of {type(teacher).__name__} differ by their place: "
            "keep others, or start from student.shape"
        ) from error
    student.tie_weights()
    student.generation_config = teacher.generation_config
    return student.eval()


def _layer_list(model: Any) -> tuple[str, int]:
    total = getattr(model.config, "num_hidden_layers", None)
    for name, module in model.base_model.named_children():
        if isinstance(module, nn.ModuleList) and len(module) == total:
            return name, total
    raise ModelError(f"model family {type(model).__name__} has no single list of layers to keep from")


def _kept(config: dict[str, Any], layers: list[int], total: int) -> dict[str, Any]:
    """The config with fewer layers; lists about layers with one entry for each keep the same entries."""
    out = {
        # Only keys about layers: with two layers, `eos_token_id: [1, 2]` is as long and means something else.
        key: [value[index] for index in layers]
        if "layer" in key and isinstance(value, list) and len(value) == total
        else value
        for key, value in config.items()
    }
    depth = next(key for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if key in config)
    out[depth] = len(layers)
    return out
