"""Model shapes from a config's keys: which values a family takes, checked by transformers itself. Torch is not used."""

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
        unknown = [key for key in changes if key not in known.to_dict() and key not in known.attribute_map]
        if unknown:
            keys = ", ".join(sorted(known.to_dict()))
            raise ConfigError(f"shape: {model_type} has no key {', '.join(unknown)}; known: {keys}")
        return AutoConfig.for_model(model_type, **{**base, **changes})
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
