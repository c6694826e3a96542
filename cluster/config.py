"""Strict, frozen configuration: a pydantic base, a YAML file, and `key.path=value` overrides.

Three layers and no more: defaults in the models, the file, the command line. A mistake is one line that names the key,
what was found and the nearest key that exists. Imports neither torch nor ray, so that `--help` answers at once.
"""

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import ConfigError


class Config(BaseModel):
    """Base of every config model. Derive a changed one with `replace`, which validates again."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True)

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some fields changed."""
        return type(self).model_validate({**self.model_dump(), **changes})

    def identity(self) -> dict[str, Any]:
        """The fields that decide the result, as JSON values: all but those marked with `execution()`.

        Where and how fast a stage runs (workers, replicas, ports, micro-batches) does not change what it produces,
        so a run may be continued with other values of these.
        """
        out: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            if (field.json_schema_extra or {}) == _EXECUTION:
                continue
            value = getattr(self, name)
            out[name] = value.identity() if isinstance(value, Config) else _plain(value)
        return out


C = TypeVar("C", bound=Config)

_EXECUTION = {"execution": True}


def execution(default: Any = ..., **constraints: Any) -> Any:
    """A field that says where or how fast, not what: left out of `Config.identity`."""
    return Field(default, json_schema_extra=dict(_EXECUTION), **constraints)


def fingerprint(value: Any) -> str:
    """A short, stable hash of a JSON-like value; used to name what was made from it."""
    text = json.dumps(_plain(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load(model: type[C], path: str | Path, overrides: list[str] | None = None) -> C:
    """Reads a YAML file, applies `key.path=value` overrides, validates.

    Raises:
        ConfigError: with one line per mistake.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config {path}: no such file; shipped ones are in jobs/configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path}: not valid YAML ({' '.join(str(error).split())})") from error
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"config {path}: expected keys and values at the top, found {type(raw).__name__}")
    for override in overrides or []:
        apply_override(raw, override)
    return validate(model, raw, str(path))


def validate(model: type[C], raw: dict[str, Any], source: str) -> C:
    """Validates a mapping into `model`, turning pydantic's report into one line per mistake."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(model, raw, item) for item in error.errors()]
        raise ConfigError(f"config {source}: " + "; ".join(lines)) from None


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Sets `a.b.c` in nested mappings from `a.b.c=value`; the value is read as YAML.

    Raises:
        ConfigError: when there is no `=`, or when the path runs through something that is not a mapping.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key.path=value, for example train.steps=20")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML; quote it") from None
    *parents, last = key.split(".")
    node = raw
    for depth, part in enumerate(parents):
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise ConfigError(
                f"override {override!r}: {'.'.join(parents[: depth + 1])} is {child!r}, which has no keys of its own"
            )
        node = child
    node[last] = value


def _explain(model: type[BaseModel], raw: dict[str, Any], item: Any) -> str:
    location = [part for part in item["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    where = ".".join(str(part) for part in location) or "(top)"
    if item["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = (
            f"did you mean {'.'.join([*map(str, location[:-1]), near[0]])}?" if near else f"known: {', '.join(known)}"
        )
        return f"unknown key {where}: {hint}"
    if item["type"] == "missing":
        return f"{where} is missing; set it"
    message = item["msg"].removeprefix("Value error, ")
    found = item.get("input")
    if item["type"] == "value_error" or isinstance(found, dict):
        return message if where == "(top)" else f"{where}: {message}"
    return f"{where}: found {found!r}; {message[0].lower()}{message[1:]}"


def _fields_at(model: type[BaseModel], location: list[Any]) -> list[str]:
    """Names of the fields of the model at a location, following nested and optional models."""
    current: Any = model
    for part in location:
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            continue
        current = _model_in(field.annotation)
        if current is None:
            return []
    return sorted(current.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
