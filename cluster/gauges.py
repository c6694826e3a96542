"""Gauges that stay visible. Ray forgets a gauge that was not set for two export intervals (20 s), so one that is set
when something changes is gone just when nothing moves any more: in a replica that hangs, or one that rests. A value
that also changes when nobody sets it is given as a function, which is asked again each time.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any

EVERY_S = 5.0


class LastingGauge:
    """A gauge of `ray.serve.metrics` or `ray.util.metrics` whose last values are set again every few seconds, by a
    daemon thread that ends with the object.

    Args:
        gauge: has `set(value, tags=...)`.
    """

    def __init__(self, gauge: Any, every_s: float = EVERY_S) -> None:
        self._gauge = gauge
        self._last: dict[tuple[tuple[str, str], ...], float | Callable[[], float]] = {}
        self._lock = threading.Lock()
        threading.Thread(target=_repeat, args=(weakref.ref(self), every_s), name="gauge", daemon=True).start()

    def set(self, value: float | Callable[[], float], tags: dict[str, str] | None = None) -> None:
        with self._lock:
            self._last[tuple(sorted((tags or {}).items()))] = value
            self._gauge.set(_now(value), tags=tags)

    def _again(self) -> None:
        with self._lock:
            for tags, value in self._last.items():
                self._gauge.set(_now(value), tags=dict(tags) or None)


def _now(value: float | Callable[[], float]) -> float:
    return value() if callable(value) else value


def _repeat(reference: "weakref.ref[LastingGauge]", every_s: float) -> None:
    pause = threading.Event()
    while not pause.wait(every_s):
        gauge = reference()
        if gauge is None:
            return
        gauge._again()
        del gauge
