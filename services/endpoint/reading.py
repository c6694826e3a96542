"""From a request to token ids, without holding the event loop: large bodies and long texts are read in a thread.

A megabyte takes a tenth of a second to parse and up to a second to tokenise; other requests go on meanwhile. A text
that cannot fit the context whatever its tokens are is refused before it is tokenised.
"""

import asyncio
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from fastapi import Request

from services.endpoint.envelope import BodyReader
from services.endpoint.errors import invalid
from services.endpoint.parsing import parse_request
from services.endpoint.schema import ChatMessage, RequestBody

R = TypeVar("R", bound=RequestBody)
T = TypeVar("T")

_BODIES = 64
"""Request bodies of the largest size that may be on their way at once."""

AT_ONCE = 4096
"""Bytes of a body, or characters of texts, that take no longer than a thread takes to start on them."""


class Reader:
    """Reads requests. Call `close` when no more come."""

    def __init__(self, max_body_bytes: int) -> None:
        self._bodies = BodyReader(max_body_bytes, _BODIES * max_body_bytes)
        self._executor = ThreadPoolExecutor(2, thread_name_prefix="read")
        self._longest: WeakKeyDictionary[Any, int | None] = WeakKeyDictionary()

    async def parse(self, request: Request, kind: type[R]) -> tuple[R, int]:
        """The checked body of a request, and its bytes.

        Raises:
            ApiError: 400 with the parameter that is wrong, 408, 413, 415 or 503 (`BodyReader.read`).
        """
        body = await self._bodies.read(request)
        return await self._away(len(body), lambda: parse_request(kind, body)), len(body)

    async def tokenise(self, num_characters: int, encode: Callable[[], T]) -> T:
        """What `encode` makes of texts with so many characters."""
        return await self._away(num_characters, encode)

    def check_may_fit(self, model: Any, prompt: str | list[int], param: str) -> None:
        """Raises `ApiError` for a prompt that is longer than a whole context of the longest tokens."""
        if isinstance(prompt, list):
            self._check_least(model, len(prompt), param)
        elif (longest := self._longest_token(model)) is not None:
            self._check_least(model, -(-len(prompt) // longest), param)  # a character is a byte or more

    def check_chat_may_fit(self, model: Any, messages: list[ChatMessage]) -> None:
        """The same for a conversation: what the template certainly keeps, and control tokens, each at least a token."""
        # A template may leave out reasoning in front of an answer, and white space around any text.
        kept = "".join(message.text().strip() for message in messages if message.role != "assistant")
        self.check_may_fit(model, kept, "messages")
        texts = [message.text() for message in messages]
        if sum(map(len, texts)) > AT_ONCE:
            # Reading control tokens as plain text costs a thousand times what reading plain text does.
            pattern = control_tokens(model.tokenizer)
            found = sum(1 for text in texts for _ in pattern.finditer(text)) if pattern else 0
            self._check_least(model, found, "messages")

    def _check_least(self, model: Any, least: int, param: str) -> None:
        if least > model.max_context_tokens:
            raise invalid(
                f"This model's context is {model.max_context_tokens} tokens; the prompt has at least {least}",
                param,
                "context_length_exceeded",
            )

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _away(self, size: int, work: Callable[[], T]) -> T:
        if size <= AT_ONCE:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def _longest_token(self, model: Any) -> int | None:
        if model not in self._longest:
            self._longest[model] = longest_token_bytes(model.tokenizer)
        return self._longest[model]


def control_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Finds a tokenizer's special tokens, and those that its chat template names, in a text."""
    template = str(tokenizer.chat_template or "")
    added = (str(token) for token in tokenizer.get_added_vocab())
    found = {*map(str, tokenizer.all_special_tokens), *(token for token in added if token in template)}
    return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True)))) if found else None


def longest_token_bytes(tokenizer: Any) -> int | None:
    """A bound of the bytes of text that one token stands for; None if there is none.

    There is one where every byte has a token of its own and nothing is taken from the text before: a tokenizer with an
    unknown token, or one that strips or folds characters, makes a single token, or none, of any number of bytes.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend.get("model") or {}
    normalizer, pieces = json.dumps(backend.get("normalizer")), json.dumps(backend.get("pre_tokenizer"))
    if model.get("type") != "BPE" or not ('"ByteLevel"' in pieces or model.get("byte_fallback")):
        return None
    if any(f'"{kind}"' in normalizer + pieces for kind in _SHORTENING):
        return None
    if any(token["lstrip"] or token["rstrip"] for token in backend.get("added_tokens", [])):
        return None
    # Composing characters shortens a text at most to a third; a byte-level token has a character, of up to two bytes,
    # for every byte.
    composed = 3 if any(f'"{kind}"' in normalizer for kind in ("NFC", "NFKC")) else 1
    return composed * max(len(token.encode()) for token in tokenizer.get_vocab())


_SHORTENING = (
    "Strip", "StripAccents", "BertNormalizer", "Precompiled", "Lowercase", "Regex", "Removed", "Whitespace",
    "WhitespaceSplit", "BertPreTokenizer",
)  # fmt: skip
"""Names in a tokenizer's description of what may drop or fold characters. A pattern may only where it replaces, but is
not read so closely."""
