"""Request bodies that the conformance tests start from."""

from typing import Any

from tests.conformance.points import CLIENTS
from tests.conformance.server import Endpoint

ALL = CLIENTS
SDK = ("raw", "openai", "openai_async")


def chat(running: Endpoint, **more: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": "the cat 猫"}]
    return {"model": running.name, "messages": said, "max_tokens": 24, "seed": 1, **more}


def text(running: Endpoint, **more: Any) -> dict[str, Any]:
    return {"model": running.name, "prompt": "the cat 猫", "max_tokens": 24, "seed": 1, **more}


def content(chunks: list[dict[str, Any]], index: int = 0) -> str:
    """The joined content of a choice of a chat stream."""
    own = [choice for chunk in chunks for choice in chunk["choices"] if choice.get("index", 0) == index]
    return "".join(choice["delta"].get("content") or "" for choice in own)
