"""A request that is being answered, as an asynchronous iterator on the event loop.

The scheduler's thread hands over what a pass added; the loop gets it in pieces that are merged while nobody looks, and
not too often: every event of a stream passes the replica, Serve's proxy and the client, which on two cores takes
milliseconds from the model. A stream that is alone gets each token as it comes, of many streams each gets its tokens
in groups. The first piece and the last never wait.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Self

from cluster.resources import physical_cores
from services.endpoint.decoding import Piece, joined
from services.endpoint.engines.requests import END

SECONDS_PER_STREAM = 0.034 / physical_cores()
"""Pause between two events of a stream for each request that runs. An event costs about 4 ms of processor time on its
way through version, router and Serve's proxy (AMD EPYC, Ray 2.60, 2026-11-22); so all of them take an eighth of the
machine."""
LONGEST_PAUSE_S = 0.5


class Running:
    """Iterate over the answer, first the number of prompt tokens and then its pieces, or cancel it.

    An error of the model is raised where it is awaited. Made on the event loop; `deliver` may be called anywhere.
    """

    def __init__(self, num_prompt_tokens: int, num_running: Callable[[], int]) -> None:
        self._loop = asyncio.get_running_loop()
        self._num_running = num_running
        self._cancel: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self._arrived: list[Any] = []
        self._ready: deque[Any] = deque([num_prompt_tokens])
        self._wakeup = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._not_before = 0.0
        self._ended = False

    def on_cancel(self, cancel: Callable[[], None]) -> None:
        """Sets what `cancel` calls."""
        self._cancel = cancel

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int | Piece:
        while not self._ready:
            await self._wakeup.wait()
            self._wakeup.clear()
            self._take()
        item = self._ready.popleft()
        if item is END:
            self._ready.append(END)
            raise StopAsyncIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def cancel(self) -> None:
        """Stops the work before the next pass, or takes it out of the queue. Harmless when it is done."""
        if self._cancel is not None:
            self._cancel()

    def deliver(self, items: list[Any]) -> None:
        """Takes what was added to the answer; the last item is `END`."""
        with self._lock:
            idle = not self._arrived
            self._arrived += items
        if idle or items[-1] is END:
            with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._arrival)

    # --- on the loop ---

    def _arrival(self) -> None:
        with self._lock:
            ended = bool(self._arrived) and self._arrived[-1] is END
        if ended or self._loop.time() >= self._not_before:
            self._wakeup.set()
        elif self._timer is None:
            self._timer = self._loop.call_at(self._not_before, self._wakeup.set)

    def _take(self) -> None:
        """Moves what has arrived to what is ready, as one piece for each choice."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        with self._lock:
            arrived, self._arrived = self._arrived, []
        self._ready += joined(item for item in arrived if isinstance(item, Piece))
        self._ready += (item for item in arrived if not isinstance(item, Piece))
        if arrived:
            self._not_before = self._loop.time() + min(LONGEST_PAUSE_S, SECONDS_PER_STREAM * self._num_running())
