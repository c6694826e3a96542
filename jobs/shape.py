"""Model shapes from a config's keys: which values a family takes, checked by transformers itself. Torch is not used."""

import difflib
from typing import Any

from cluster.errors import ConfigError
from cluster.pretrained import locate


def shape_config(
    shape: dict[str, Any], teacher: str | None, vocab_size: int, special_ids: dict[str, int | None] | None = None
) -> Any:
    """A Hugging Face config: the teacher's with changed keys, or a family's own with this vocabulary.

    Args:
        shape: Hugging Face config keys; with `model_type` the family is named and the teacher's config is not used.
        teacher: directory or hub id.
        special_ids: begin- and end-of-text ids of the tokenizer, for a family's own config.

    Raises:
        ConfigError: a key that the family does not have, or values that it refuses.
    """
    from transformers import AutoConfig

    changes = dict(shape)
    model_type = changes.pop("model_type", None)
    if teacher is None and model_type is None:
        raise ConfigError(f"shape {shape}: without a teacher set model_type, for example model_type: llama")
    try:
        if teacher is not None and model_type is None:
            base = AutoConfig.from_pretrained(locate(teacher)).to_dict()
            model_type = base.pop("model_type")
            for derived, sources in _DERIVED.items():
                if sources & changes.keys():
                    base.pop(derived, None)
        else:
            base = {"vocab_size": vocab_size, **(special_ids or {})}
        known = AutoConfig.for_model(model_type)
        keys = sorted({*known.to_dict(), *known.attribute_map})
        for key in changes:
            if key not in keys:
                near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(keys)}"
                raise ConfigError(f"shape: {model_type} has no key {key}: {hint}")
        config = AutoConfig.for_model(model_type, **{**base, **changes})
        if (layers := getattr(config, "num_hidden_layers", 1)) < 1:
            raise ConfigError(f"shape {shape}: num_hidden_layers={layers}; at least 1")
        heads, pairs = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
        if heads and pairs and heads % pairs:
            raise ConfigError(
                f"shape {shape}: num_attention_heads={heads} is not a multiple of num_key_value_heads={pairs}; set both"
            )
        return config
    except ConfigError:
        raise
    except Exception as error:  # every family checks its config in its own way
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"shape {shape}: refused by transformers ({reason})") from error


_DERIVED = {
    "layer_types": {"num_hidden_layers"},
    "head_dim": {"hidden_size", "num_attention_heads"},
}
"""Keys that follow from others: dropped from the teacher's config when one of those is changed."""
