"""Threads for an encoder, a bounded queue in front of them, and the way back to the event loop.

A forward pass must not hold the event loop, and a queue without a bound only turns overload into time-outs. A request
that finds the queue full is refused at once, before it costs anything.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Self, TypeVar

from services.endpoint.errors import unavailable

T = TypeVar("T")

_END = object()


class WorkPool:
    """Runs at most `max_running` pieces of work at a time; at most `max_waiting` more may wait."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self._executor = ThreadPoolExecutor(max_running, thread_name_prefix="encode")
        self._limit = max_running + max_waiting
        self.num_admitted = 0
        """Requests that run or wait now."""

    def start(self, work: Callable[[Callable[[], bool]], Iterator[T]]) -> "Working[T]":
        """Queues work and returns its results as an asynchronous iterator. Call it on the event loop.

        Args:
            work: gets a function that says whether it was cancelled; it should look at it often.

        Raises:
            ApiError: status 503, when the queue is full.
        """
        if self.num_admitted >= self._limit:
            raise unavailable("The server is overloaded; try again later.", "server_overloaded", retry_after_s=1)
        self.num_admitted += 1
        try:
            return Working(self, self._executor, work)
        except RuntimeError:
            self.num_admitted -= 1
            raise unavailable("The server is shutting down.", "server_stopping", retry_after_s=5) from None

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


class Working(Generic[T]):
    """Work in the pool: iterate over its results, or cancel it. An error in the work is raised where it is awaited."""

    def __init__(
        self, pool: WorkPool, executor: ThreadPoolExecutor, work: Callable[[Callable[[], bool]], Iterator[T]]
    ) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._cancelled = threading.Event()
        self._results: asyncio.Queue[Any] = asyncio.Queue()
        self._future: Future[None] = executor.submit(self._run, work)
        self._future.add_done_callback(lambda _: self._post(self._finish))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        item = await self._results.get()
        if item is _END:
            raise StopAsyncIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def cancel(self) -> None:
        """Stops the work at its next look, or takes it out of the queue. Harmless when it is done."""
        self._cancelled.set()
        self._future.cancel()

    def _run(self, work: Callable[[Callable[[], bool]], Iterator[T]]) -> None:
        try:
            for item in work(self._cancelled.is_set):
                self._post(self._results.put_nowait, item)
                if self._cancelled.is_set():
                    break
        except Exception as error:  # raised again in __anext__
            self._post(self._results.put_nowait, error)

    def _finish(self) -> None:
        self._pool.num_admitted -= 1
        self._results.put_nowait(_END)

    def _post(self, call: Callable[..., Any], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(call, *arguments)
