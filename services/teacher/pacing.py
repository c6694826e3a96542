"""How many requests one client may have under way, found from how long they take.

Requests beyond what the replicas can take up soon only wait there; with enough of them every request outlives its
attempt, is given up and asked again, and nothing is answered any more. (Measured: 16 requests of 4 s each against one
replica and an attempt of 60 s never ended.) So the number grows while answers come quickly and shrinks when they do
not: additive increase, multiplicative decrease, as congestion control does it. Knows neither torch nor Ray.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator


class Pacing:
    """Places for requests, given in the order in which they are asked for.

    Args:
        most: never more places than this.
        slow_s: an answer that takes longer halves the places; one that takes less than half of it adds one.
        clock: seconds, for tests.
    """

    def __init__(self, most: int, slow_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.places = min(2, most)
        self._most, self._slow_s, self._clock = most, slow_s, clock
        self._under_way = 0
        self._next_ticket = self._next_served = 0
        self._shrunk_at = clock()
        self._closed = False
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Holds a place for the length of the block; waits until there is one, or until `close`."""
        with self._changed:
            ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
            self._changed.wait_for(lambda: self._closed or (ticket == self._next_served and self._is_free()))
            self._next_served += 1
            self._under_way += 1
            self._changed.notify_all()
        started, answered = self._clock(), False
        try:
            yield
            answered = True
        finally:
            with self._changed:
                self._under_way -= 1
                self._learn(started, answered)
                self._changed.notify_all()

    def close(self) -> None:
        """Lets everybody through: nothing is asked any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _is_free(self) -> bool:
        return self._under_way < self.places

    def _learn(self, started: float, answered: bool) -> None:
        now = self._clock()
        if now - started > self._slow_s:
            if started >= self._shrunk_at:  # those that began before the last decrease say nothing new
                self.places, self._shrunk_at = max(1, self.places // 2), now
        elif answered and now - started < self._slow_s / 2:  # a quick failure says nothing of a teacher's speed
            self.places = min(self._most, self.places + 1)
