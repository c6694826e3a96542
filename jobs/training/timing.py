"""Where the time of a step goes."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

PARTS = ("data", "wait", "forward", "loss", "backward", "optimizer")
"""Reading and collating rows; waiting for the teacher; the student's body; both heads and the loss with its gradients;
the body's backward pass; gradients added up over workers, clipped and applied."""


class StepClock:
    """Seconds of each part, since the last `take`. On a GPU a part ends when the host gets there, not the device."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    def take(self, total_s: float, wait_s: float) -> dict[str, float]:
        """The parts of a step that took `total_s`, of which the teacher made it wait `wait_s`; what nothing else
        claims went into its data. Starts anew."""
        parts, self._seconds = {**self._seconds, "wait": wait_s}, defaultdict(float)
        parts["data"] = max(0.0, total_s - sum(parts.values()))
        return {name: parts.get(name, 0.0) for name in PARTS}
