"""Counts what answering one request takes, where the model is: tokens, and the times of the first and the last.

To the HTTP interface a meter is the account of a request (`admission.Counting`): behind a router, which has let the
request in, one that lets everything in; else one in front of the account, which is told all that the meter is told.
"""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Generic, Self, TypeVar

from services.endpoint.admission import Counting, Work
from services.endpoint.decoding import Piece
from services.endpoint.errors import ApiError

T = TypeVar("T")


@dataclass
class Meter:
    """What answering one request took."""

    started: float = field(default_factory=time.perf_counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_s: float | None = None
    last_s: float | None = None
    failed: bool = False
    """Decoding raised; a stream that had begun says so in an event."""
    account: Counting | None = None
    """Told of everything as well, and asked whether the request may come in; None behind a router."""

    def add(self, item: int | Piece) -> None:
        if isinstance(item, int):
            self.prompt_tokens += item
            return
        self.completion_tokens += item.num_sampled
        self.last_s = time.perf_counter() - self.started
        self.first_s = self.last_s if self.first_s is None else self.first_s

    def admit(self, model: str, body_bytes: int, max_new_tokens: int) -> None:
        """Asks the account, if there is one; the time runs from here, since a client may be slow to send its body."""
        if self.account is not None:
            self.account.admit(model, body_bytes, max_new_tokens)
            self.started = time.perf_counter()

    def use(self, num_tokens: int) -> None:
        """Counts tokens of a prompt."""
        self.prompt_tokens += num_tokens
        if self.account is not None:
            self.account.use(num_tokens)

    def use_reserved(self) -> None:
        """Nothing is reserved but by an account."""
        if self.account is not None:
            self.account.use_reserved()

    def counted(self, work: Work[T]) -> Work[T]:
        """The same work; its tokens and their times are counted."""
        return Metered(work if self.account is None else self.account.counted(work), self)

    def figures(self) -> dict[str, Any]:
        """`ttft_s` of an answer without tokens is the time that it took."""
        tokens_s = None
        if self.first_s is not None and self.last_s is not None and self.completion_tokens > 1:
            tokens_s = (self.last_s - self.first_s) / (self.completion_tokens - 1)
        return {
            "ok": not self.failed,
            "ttft_s": time.perf_counter() - self.started if self.first_s is None else self.first_s,
            "token_s": tokens_s,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
        }


class Metered(Generic[T]):
    """Work that is counted by the meter of the request that it belongs to."""

    def __init__(self, work: Work[T], meter: Meter) -> None:
        self._work, self._meter = work, meter

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        try:
            item: Any = await self._work.__anext__()
        except (StopAsyncIteration, ApiError, asyncio.CancelledError):
            raise
        except Exception:
            self._meter.failed = True
            raise
        self._meter.add(item)
        return item

    def cancel(self) -> None:
        self._work.cancel()
