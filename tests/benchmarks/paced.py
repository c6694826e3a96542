"""A training that runs by itself in a thread and is stopped after every turn, so that sides can alternate.

The first steps of a turn do not count: they use up what was asked of the teacher ahead while the others had their turn.
"""

import threading
import time
from collections.abc import Callable


class PacedTraining:
    """Args:
    start: runs a training to its end; calls the function that it is given at the end of every step.
    uncounted: steps at the beginning of a turn that are not measured.
    counted: steps that are.
    """

    def __init__(self, start: Callable[[Callable[[], None]], None], uncounted: int, counted: int) -> None:
        self._uncounted, self._counted = uncounted, counted
        self._ends: list[float] = []
        self._until = 0
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._run, args=(start,), name="training", daemon=True).start()

    def turn(self) -> float:
        """Lets the training go on for a turn; returns the mean seconds of its counted steps."""
        begun = time.perf_counter()
        self.steps(self._uncounted + self._counted)
        begin = self._ends[-1 - self._counted] if self._uncounted else begun
        return (self._ends[-1] - begin) / self._counted

    def steps(self, number: int) -> None:
        """Lets the training go on for so many steps."""
        with self._changed:
            self._until = len(self._ends) + number
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._ends) >= self._until or self._failure is not None)
            if self._failure is not None:
                raise self._failure

    def _run(self, start: Callable[[Callable[[], None]], None]) -> None:
        try:
            start(self._step)
            raise RuntimeError("the training ended before its last turn")
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _step(self) -> None:
        with self._changed:
            self._ends.append(time.perf_counter())
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._ends) < self._until)
