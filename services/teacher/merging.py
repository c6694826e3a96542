"""Joining requests that wait into batches, on one event loop.

While a batch runs, later requests queue; the next batch takes as many of them as fit, in order. Nothing waits for
company. A batch that is full already is begun while the one before it runs, so that it is prepared when the model is
free, and answers are packed while the model works on.

(`serve.batch` forms its batches before the previous one has ended, so with no waiting time it never joins requests that
arrive one by one, and with a waiting time it delays those that are alone.)
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from services.teacher.schema import ScoreReply, ScoreRequest

_Asked = tuple[ScoreRequest, asyncio.Future[ScoreReply]]

_AT_ONCE = 2
"""One batch on the model; the other before it or behind it."""


class Observer(Protocol):
    """Is told what a merger does."""

    def in_flight(self, tokens: int) -> None:
        """Tokens of all requests that wait or are computed."""

    def batch(self, tokens: int, fill: float, age_s: float) -> None:
        """A batch begins: its tokens, their share of the budget, and how long its oldest request has waited."""


class Merger:
    """Runs a function of many requests for callers that have one each.

    Args:
        run: the function; it is called in a thread, at most `_AT_ONCE` calls at a time, and replies in the order of
            the requests. What must not run twice at once it guards itself.
        max_tokens: in a batch; a larger request runs alone.
        observer: is told what happens, for metrics.
    """

    def __init__(
        self,
        run: Callable[[list[ScoreRequest]], list[ScoreReply]],
        max_tokens: int,
        observer: Observer | None = None,
    ) -> None:
        self._run, self._max_tokens, self._observer = run, max_tokens, observer
        self._waiting: deque[_Asked] = deque()
        self._arrived: dict[int, float] = {}
        self._tokens_in_flight = 0
        self._running: set[asyncio.Task[None]] = set()

    async def reply(self, request: ScoreRequest) -> ScoreReply:
        """The reply to one request, or the exception that this request raises when it runs alone."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ScoreReply] = loop.create_future()
        self._waiting.append((request, future))
        self._arrived[id(future)] = time.monotonic()
        self._count(request.num_tokens)
        loop.call_soon(self._begin)  # after the others that have just arrived
        try:
            return await future
        finally:
            self._arrived.pop(id(future), None)
            self._count(-request.num_tokens)

    def _count(self, tokens: int) -> None:
        self._tokens_in_flight += tokens
        if self._observer is not None:
            self._observer.in_flight(self._tokens_in_flight)

    def _begin(self) -> None:
        while not self._running or (len(self._running) < _AT_ONCE and self._is_full()):
            batch = self._next_batch()
            if not batch:
                return
            task = asyncio.create_task(self._work(batch))
            self._running.add(task)
            task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._begin()

    def _is_full(self) -> bool:
        """Whether those who wait make a batch that would take nobody else."""
        tokens = 0
        for request, future in self._waiting:
            tokens += 0 if future.done() else request.num_tokens
            if tokens >= self._max_tokens:
                return True
        return False

    async def _work(self, batch: list[_Asked]) -> None:
        try:
            await self._answer(batch)
        except Exception as error:
            await self._answer_alone(batch, error)

    async def _answer_alone(self, batch: list[_Asked], error: Exception) -> None:
        """Each alone, so that a request that fails does not fail its neighbours; one that was alone has failed."""
        for item in batch:
            if item[1].done():  # its caller has gone
                continue
            if len(batch) == 1:
                item[1].set_exception(error)
                continue
            try:
                await self._answer([item])
            except Exception as its_own:
                if not item[1].done():
                    item[1].set_exception(its_own)

    async def _answer(self, batch: list[_Asked]) -> None:
        # In a thread, so that health checks and new requests are heard during the forward pass.
        replies = await asyncio.to_thread(self._run, [request for request, _ in batch])
        for (_, future), reply in zip(batch, replies, strict=True):
            if not future.done():
                future.set_result(reply)

    def _next_batch(self) -> list[_Asked]:
        batch: list[_Asked] = []
        tokens = 0
        while self._waiting:
            request, future = self._waiting[0]
            if batch and tokens + request.num_tokens > self._max_tokens:
                break
            self._waiting.popleft()
            if not future.done():  # else its caller has gone
                batch.append((request, future))
                tokens += request.num_tokens
        if batch and self._observer is not None:
            oldest = min(self._arrived[id(future)] for _, future in batch)
            self._observer.batch(tokens, tokens / self._max_tokens, time.monotonic() - oldest)
        return batch
