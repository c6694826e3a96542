"""From the bytes of a request body to a checked request. Whatever a client sends, the answer is a request or a 4xx.

JSON is read strictly: no NaN, Infinity or number beyond a float, no key twice, no lone surrogate, no deep nesting.
"""

import json
import math
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from services.endpoint.errors import ApiError, invalid

R = TypeVar("R", bound=BaseModel)

MAX_DEPTH = 100
"""Levels of objects and arrays in a body."""


def parse_request(model: type[R], body: bytes) -> R:
    """Reads a body into a request.

    Raises:
        ApiError: status 400, with the parameter that is wrong.
    """
    raw = read_json(body)
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise _explain(error, raw) from None


def read_json(body: bytes) -> dict[str, Any]:
    """Parses a body that must be one JSON object.

    Raises:
        ApiError: status 400.
    """
    if not body.strip():
        raise invalid("The request body is empty; expected a JSON object", code="invalid_json")
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
        _check_values(value)
    except RecursionError:
        raise invalid(f"The JSON is nested deeper than {MAX_DEPTH} levels", code="invalid_json") from None
    except ValueError as error:
        # Covers bad UTF-8, bad JSON, integers of thousands of digits, and the refusals below.
        raise invalid(f"The request body is not valid JSON: {error}"[:300], code="invalid_json") from None
    if not isinstance(value, dict):
        raise invalid(f"Expected a JSON object, found {type(value).__name__}", code="invalid_json")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice[:64]!r} appears twice")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text[:32]} is out of range")
    return value


def _check_values(value: Any) -> None:
    """Refuses deep nesting, and strings that have no UTF-8 form."""
    waiting: list[tuple[Any, int]] = [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, str):
            try:
                item.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError("a string holds a lone surrogate, which is not text") from None
        elif isinstance(item, (dict, list)):
            if depth > MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
            children = [*item.keys(), *item.values()] if isinstance(item, dict) else item
            waiting.extend((child, depth + 1) for child in children)


def _explain(error: ValidationError, raw: dict[str, Any]) -> ApiError:
    """One message for the first mistake, with the path of the parameter as the client wrote it."""
    # A union reports one mistake per alternative; the deepest one is about the form that was meant.
    mistake = max(error.errors(include_url=False, include_context=False), key=lambda item: len(item["loc"]))
    path: list[str] = []
    node: Any = raw
    for part in mistake["loc"]:
        if isinstance(node, dict) and isinstance(part, str) and (part in node or mistake["type"] == "missing"):
            path.append(part)
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            path.append(str(part))
            node = node[part]
    param = ".".join(path) or None
    message = mistake["msg"].removeprefix("Value error, ")
    code = "missing_required_parameter" if mistake["type"] == "missing" else "invalid_value"
    return invalid(f"{param or 'request'}: {message}", param, code)
