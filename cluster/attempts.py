"""Attempts at a transfer: watched while they run, repeated where that may help, ended in time.

A read timeout does not catch a server that sends a little now and then: 4 MiB at 100 kB/s pass a timeout of two seconds
and take 42. So an attempt runs in a thread of its own while its caller watches what it moves. It ends when it is slower
than a minimum rate, when no answer comes, or when the time for the whole is over, whatever the socket does.
"""

import contextlib
import io
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from cluster.errors import StorageError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TICK_S = 0.1
_SMALL = 64 << 10
"""Bodies up to this are sent at once, without asking the server first whether it wants them."""
_LINGER_S = 1.0
"""How long an attempt that was given up is waited for, so that it does not overlap with the next."""


@dataclass(frozen=True)
class Limits:
    """When a transfer is given up."""

    patience_s: float = 90.0
    """Failures are repeated for this long; then the last one is the error."""
    answer_s: float = 30.0
    """Longest wait for an answer once everything is sent."""
    min_bytes_per_s: float = 200_000.0
    """Slowest rate while bytes move, over `window_s`."""
    window_s: float = 10.0
    slow_attempts: int = 2
    """Attempts that may be too slow: a new connection may take another way, a slow server stays slow."""
    first_pause_s: float = 0.1
    longest_pause_s: float = 8.0

    @classmethod
    def of_environment(cls) -> "Limits":
        """The defaults, or what the variables in `_VARIABLES` say of this machine.

        Raises:
            StorageError: a value is no positive number.
        """
        limits = cls()
        for name, variable in _VARIABLES.items():
            if given := os.environ.get(variable):
                value = math.nan
                with contextlib.suppress(ValueError):
                    value = float(given)
                if not 0 < value < math.inf:
                    default = getattr(limits, name)
                    raise StorageError(f"{variable}={given!r}: expected a positive number, for example {default:g}")
                limits = replace(limits, **{name: value})  # type: ignore[arg-type]  # both are floats
        return limits

    def deadline_s(self, size_bytes: int) -> float:
        """The time for the whole of a transfer, with all its attempts."""
        return self.patience_s + self.answer_s + size_bytes / self.min_bytes_per_s


_VARIABLES = {"min_bytes_per_s": "RAYSTILL_STORAGE_MIN_BYTES_PER_S", "patience_s": "RAYSTILL_STORAGE_PATIENCE_S"}


class TooSlow(Exception):
    """An attempt that was ended because of what it did not do in time."""


class CutAnswer(Exception):
    """An answer that lacks what every whole one has."""

    def __str__(self) -> str:
        return "the answer was cut short"


class Progress:
    """What one attempt has moved and has still to move; the attempt writes it, its caller watches it."""

    def __init__(self) -> None:
        self._cancelled = False
        self._on_cancel: Callable[[], Any] | None = None
        self.begin(0)

    def begin(self, size_bytes: int, kept: bool = False) -> None:
        """From now on `size_bytes` are to move; 0 while only an answer is waited for.

        Args:
            kept: whether the next attempt goes on after what this one moved.
        """
        self.moved_bytes, self.left_bytes, self.kept = 0, size_bytes, kept
        self.window = (time.monotonic(), 0)
        """When the window of the rate began, and what had moved by then."""

    def move(self, size_bytes: int) -> None:
        """Says that bytes have moved. Raises `TooSlow` in an attempt that was given up."""
        self.check()
        self.moved_bytes += size_bytes
        self.left_bytes = max(0, self.left_bytes - size_bytes)
        if self.left_bytes == 0:
            self.window = (time.monotonic(), self.moved_bytes)

    def check(self) -> None:
        if self._cancelled:
            raise TooSlow("given up")

    def on_cancel(self, stop: Callable[[], Any]) -> None:
        """What unblocks the attempt's thread when it is given up."""
        self._on_cancel = stop

    def cancel(self) -> None:
        self._cancelled = True
        if self._on_cancel is not None:
            with contextlib.suppress(Exception):  # it may have ended by itself
                self._on_cancel()


class _Body(io.BytesIO):
    """Bytes to send, which says what was taken of them. The SDK reads them more than once: for hashes, then to send."""

    def __init__(self, data: bytes, progress: Progress) -> None:
        super().__init__(data)
        self._size, self._progress = len(data), progress

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if (offset, whence) == (0, io.SEEK_SET):
            self._progress.begin(self._size)
        return super().seek(offset, whence)

    def read(self, size: int | None = -1) -> bytes:
        piece = super().read(size)
        self._progress.move(len(piece))
        return piece


def body_of(data: bytes, progress: Progress) -> Any:
    """What to give to the SDK as the body of a request."""
    return data if len(data) <= _SMALL else _Body(data, progress)


class Attempts:
    """Repeats one operation until it succeeds, fails for good, or its time is over.

    Args:
        title: what is done to what, for messages: `storage s3://b/p: get 'key'`.
        why_again: why an error may pass when the operation is repeated; None if it will not.
        size_bytes: what is to move, where that is known before.
        shares: how many transfers use the same connection at once; each may have its share of the minimum rate.
        answer_s: longer than the limits' for requests that take a server long.
    """

    def __init__(
        self,
        title: str,
        limits: Limits,
        why_again: Callable[[BaseException], str | None],
        size_bytes: int = 0,
        shares: int = 1,
        answer_s: float | None = None,
    ) -> None:
        self._title, self._limits, self._why_again = title, limits, why_again
        self._size, self._rate = size_bytes, limits.min_bytes_per_s / shares
        self._answer_s = limits.answer_s if answer_s is None else answer_s
        self._shares = shares
        self.failures = 0
        """Attempts that failed so far; 0 in the first."""

    def run(self, attempt: Callable[[Progress], T]) -> T:
        """What the first attempt that succeeds returns.

        Raises:
            StorageError: the time, or the number of slow attempts, is used up.
        """
        started = time.monotonic()
        patient_since = started
        slow = 0
        while True:
            progress = Progress()
            try:
                return self._watch(attempt, progress, started)
            except Exception as error:
                slow += isinstance(error, TooSlow)
                reason = str(error) if isinstance(error, (TooSlow, CutAnswer)) else self._why_again(error)
                if reason is None:
                    raise
            now = time.monotonic()
            if progress.kept and progress.moved_bytes >= self._rate * self._limits.window_s:
                patient_since = now  # it went on for a while: a new fault, not the same one
                self._size = max(self._size, progress.moved_bytes + progress.left_bytes)
            self.failures += 1
            pause = min(self._limits.longest_pause_s, self._limits.first_pause_s * 2 ** min(self.failures, 20))
            pause *= random.uniform(0.5, 1.0)
            over = now + pause > min(patient_since + self._limits.patience_s, self._end(started, progress))
            if over or slow >= self._limits.slow_attempts:
                raise StorageError(
                    f"{self._title}: {reason}; gave up after {self.failures} attempts in {now - started:.0f} s: "
                    "look at the server and the network, then run again"
                )
            logger.info("%s: %s; attempt %d in %.1f s", self._title, reason, self.failures + 1, pause)
            time.sleep(pause)

    def _end(self, started: float, progress: Progress) -> float:
        size = max(self._size, progress.moved_bytes + progress.left_bytes)
        return started + self._limits.deadline_s(size * self._shares)

    def _watch(self, attempt: Callable[[Progress], T], progress: Progress, started: float) -> T:
        result: list[T] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                result.append(attempt(progress))
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=work, name="transfer", daemon=True)
        thread.start()
        try:
            self._wait(thread, progress, started)
        finally:
            if thread.is_alive():  # too slow, or the caller was interrupted
                progress.cancel()
                thread.join(_LINGER_S)
        if failure:
            raise failure[0]
        return result[0]

    def _wait(self, thread: threading.Thread, progress: Progress, started: float) -> None:
        """Until the thread ends. Raises `TooSlow`."""
        while True:
            thread.join(_TICK_S)
            if not thread.is_alive():
                return
            now = time.monotonic()
            if now > self._end(started, progress):
                raise TooSlow(f"not done in {now - started:.0f} s")
            since, moved_before = progress.window
            elapsed = now - since
            if progress.left_bytes == 0:
                if elapsed > self._answer_s:
                    raise TooSlow(f"no answer in {elapsed:.0f} s")
            elif elapsed >= self._limits.window_s:
                moved = progress.moved_bytes - moved_before
                if moved < self._rate * elapsed:
                    raise TooSlow(
                        f"{max(0, moved) / elapsed / 1000:.0f} kB/s over {elapsed:.0f} s, "
                        f"the least is {self._rate / 1000:.0f} kB/s ({_VARIABLES['min_bytes_per_s']})"
                    )
                progress.window = (now, moved_before + moved)
