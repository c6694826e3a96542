"""How many replicas there are: as many as requests ask for, but more only while students stand still for their answers.

A student asks ahead, so requests wait at the teacher also when their answers will be early enough; what another replica
is worth is known by the students alone. Each request says how long its asker stood still since the one before was sent.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from services.teacher.schema import ScoreRequest

ENOUGH = 0.05
"""Share of their time that students may stand still for the teacher without another replica being started."""


class Standing:
    """The asker's side: how long it stood still between a request that is sent and the one before."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._before: tuple[float, float] | None = None

    def told(self, request: ScoreRequest, waited_s: float | None) -> ScoreRequest:
        """The request as it is to be sent now.

        Args:
            waited_s: what the asker has waited in all so far; None where it does not say.
        """
        if waited_s is None:
            return request
        with self._lock:
            now = (self._clock(), waited_s)
            before, self._before = self._before or now, now
        return replace(request, elapsed_s=now[0] - before[0], waited_s=max(0.0, now[1] - before[1]))


class Waits:
    """What the requests of one replica say, gathered between two looks of Serve."""

    def __init__(self) -> None:
        self._waited_s = self._elapsed_s = 0.0

    def add(self, waited_s: float, elapsed_s: float) -> None:
        self._waited_s += waited_s
        self._elapsed_s += elapsed_s

    def take(self) -> dict[str, float]:
        """For `record_autoscaling_stats`: seconds that askers stood still, of how many."""
        taken = {"waited_s": self._waited_s, "elapsed_s": self._elapsed_s}
        self._waited_s = self._elapsed_s = 0.0
        return taken


def replicas_wanted(context: Any) -> tuple[float, dict[str, Any]]:
    """Serve's policy: replicas for the requests under way; none is added while students hardly wait.

    Serve applies the bounds and delays of the configuration to what this gives, and runs it in its controller, where
    this project need not be installed: it imports nothing.

    Args:
        context: Ray Serve's `AutoscalingContext`.
    """
    wanted = context.total_num_requests / context.config.get_target_ongoing_requests()
    if wanted <= context.target_num_replicas:
        return wanted, {}
    said = context.aggregated_metrics or {}
    waited_s, elapsed_s = (sum(said.get(name, {}).values()) for name in ("waited_s", "elapsed_s"))
    hardly_waiting = elapsed_s > 0 and waited_s <= ENOUGH * elapsed_s  # who does not say, such as labelling, waits
    return (context.target_num_replicas if hardly_waiting else wanted), {}
