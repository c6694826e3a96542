"""What a router reads of a request: which model, whose it is, and how long its answer may be.

The version checks the request; here whatever cannot be read counts as not said. Imports neither torch nor ray.
"""

import json
from dataclasses import dataclass
from typing import Any

from services.endpoint.schema import EndpointConfig


@dataclass(frozen=True)
class Outline:
    """The parts of a body that decide where it goes and what it may cost."""

    model: str = ""
    user: str = ""
    """The body's `user` or `safety_identifier`."""
    num_prompts: int = 1
    num_choices: int = 1
    max_tokens: int | None = None
    """None: as many as the endpoint gives. 0 for what writes nothing."""

    def longest_answer(self, config: EndpointConfig) -> int:
        """Tokens that may be written, all choices together; what is more than the endpoint gives is not written."""
        longest = config.max_new_tokens if self.max_tokens is None else min(self.max_tokens, config.max_new_tokens)
        return longest * min(self.num_choices * self.num_prompts, config.max_choices)


def outline(path: str, body: bytes) -> Outline:
    """Reads the JSON of a request to `path`; of what is no object, nothing."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return Outline(max_tokens=0)
    if not isinstance(fields, dict):
        return Outline(max_tokens=0)
    prompt = fields.get("prompt")
    # One list of token ids is one prompt.
    several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], (str, list))
    limit = next((found for name in _LIMITS.get(path, ()) if (found := _number(fields.get(name))) is not None), None)
    return Outline(
        model=_text(fields.get("model")),
        user=_text(fields.get("user")) or _text(fields.get("safety_identifier")),
        num_prompts=len(prompt) if several and isinstance(prompt, list) else 1,
        num_choices=max(1, _number(fields.get("n")) or 1),
        max_tokens=limit if "prompt" in fields or "messages" in fields else 0,
    )


_LIMITS = {
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/completions": ("max_tokens",),
}
"""What bounds an answer, the first that is there; a key that a path does not know is ignored there, and so here."""


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
