"""Counts what answering one request takes, where the model is: tokens, and the times of the first and the last.

A meter belongs to the task that answers a request and to those that it starts. Whatever of these puts work into the
pool is counted by it, so that nothing in between needs to know of meters.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Self, cast

from services.endpoint.errors import ApiError
from services.endpoint.model import Piece
from services.endpoint.pool import DecodingPool, Running


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

    def add(self, item: int | Piece) -> None:
        if isinstance(item, int):
            self.prompt_tokens += item
            return
        self.completion_tokens += item.num_sampled
        self.last_s = time.perf_counter() - self.started
        self.first_s = self.last_s if self.first_s is None else self.first_s

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


_METER: ContextVar[Meter | None] = ContextVar("meter", default=None)


def begin_meter() -> Meter:
    """A meter for all that this task starts from now on."""
    meter = Meter()
    _METER.set(meter)
    return meter


class Metered:
    """Running work that is counted by the meter of the request that started it."""

    def __init__(self, running: Running[int | Piece], meter: Meter) -> None:
        self._running, self._meter = running, meter

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int | Piece:
        try:
            item = await anext(self._running)
        except (StopAsyncIteration, ApiError, asyncio.CancelledError):
            raise
        except Exception:
            self._meter.failed = True
            raise
        self._meter.add(item)
        return item

    def cancel(self) -> None:
        self._running.cancel()


class MeteredPool(DecodingPool):
    """A pool whose work is counted, where a request has a meter."""

    def start(self, work: Callable[[Callable[[], bool]], Iterator[Any]]) -> Running[Any]:
        running, meter = super().start(work), _METER.get()
        return running if meter is None else cast("Running[Any]", Metered(running, meter))
