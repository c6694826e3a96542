"""Strict, frozen configuration: a pydantic base, a YAML file, and `key.path=value` overrides.

Three layers and no more: defaults in the models, the file, the command line. A mistake is one line that names the key,
what was found and the nearest key that exists. Imports neither torch nor ray, so that `--help` answers at once.
"""

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from cluster.errors import ConfigError


class Config(BaseModel):
    """Base of every config model. Derive a changed one with `replace`, which validates again."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and not _mentions(cls.model_fields[str(info.field_name)].annotation, bool):
            raise ValueError(f"found {_shown(value)}, which is neither a number nor a text; write the value itself")
        return value

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
        raw = _read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"config {path}: no such file ({path.absolute()}); raystill's own are in jobs/configs/ of its source"
        ) from None
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
    """Validates a mapping into `model`, turning pydantic's report into one line that lists the mistakes."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        places: dict[str, list[Any]] = {}
        for item in error.errors():
            location = _location(raw, item)
            places.setdefault(".".join(map(str, location)), []).append({**item, "loc": location})
        lines = [_explain(model, where, items) for where, items in places.items()]
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
        value = _read_yaml(text)
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


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `3e-3` is a number, and a key that is given twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:str" and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else "")
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot and a sign: without this, a value that may also be a text would stay the text "3e-3".
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)  # a SafeLoader


def _location(raw: Any, item: Any) -> list[Any]:
    """Where a mistake is in `raw`, without what pydantic adds: names of validators and of a union's alternatives."""
    location: list[Any] = []
    here = raw
    for part in item["loc"]:
        try:
            here = here[part]
        except (KeyError, IndexError, TypeError):
            break
        location.append(part)
    return [*location, item["loc"][-1]] if item["type"] == "missing" else location


def _explain(model: type[BaseModel], where: str, items: list[Any]) -> str:
    """One mistake as a line; several items are the alternatives of a union, none of which fits."""
    item = items[0]
    location, found = item["loc"], item.get("input")
    if item["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = (
            f"did you mean {'.'.join([*map(str, location[:-1]), near[0]])}?" if near else f"known: {', '.join(known)}"
        )
        return f"unknown key {where}: {hint}"
    if item["type"] == "missing":
        return f"{where} is missing; set it"
    message = " or ".join(dict.fromkeys(item["msg"].removeprefix("Value error, ") for item in items))
    if item["type"] == "value_error":
        return f"{where}: {message}" if where else message
    message = re.sub("valid dictionary( or instance of [A-Za-z]+)?", "mapping of keys to values", message)
    message = message.replace(" or Input should be ", " or ")
    return f"{where or '(top)'}: found {_shown(found)}; {message[0].lower()}{message[1:]}"


def _shown(value: Any) -> str:
    """A value as YAML would have it, cut to what fits in a message."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _fields_at(model: type[BaseModel], location: list[Any]) -> list[str]:
    """Keys of the model at a location, following nested and optional models."""
    current: Any = model
    for part in location:
        fields = {field.alias or name: field for name, field in current.model_fields.items()}
        field = fields.get(part) or current.model_fields.get(part)
        current = _model_in(field.annotation) if field is not None else current  # else an index into a list
        if current is None:
            return []
    return sorted(field.alias or name for name, field in current.model_fields.items())


def _mentions(annotation: Any, wanted: type) -> bool:
    """Whether a type, or a part of a union, is `wanted` or anything at all."""
    return annotation in (wanted, Any) or any(_mentions(part, wanted) for part in getattr(annotation, "__args__", ()))


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
