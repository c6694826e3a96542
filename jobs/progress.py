"""What a person sees while a stage works: one bar with steps, rate, time left, and a few live values.

The bars are drawn by the driver on standard error. Train workers are other processes, perhaps on other machines: rank 0
sends its steps to a `Board`, a small actor, and the driver reads it. The same stream feeds tracking, so metrics are
written from one place, and a slow reader never slows training.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

T = TypeVar("T")


class Bar(Protocol):
    """One stage's bar."""

    def start(self, total: int | None, note: str = "") -> None: ...

    def update(self, done: int | None = None, note: str | None = None) -> None: ...

    def over(self, items: list[T]) -> Iterable[T]: ...

    def say(self, text: str) -> None: ...


class ConsoleProgress:
    """Bars on a terminal; on anything else a line every few seconds, so that logs show life too."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(file=sys.stderr, quiet=quiet)
        self._live = self.console.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description:<10}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
        )

    def __enter__(self) -> "ConsoleProgress":
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._progress.stop()

    def stage(self, name: str) -> "ConsoleBar":
        return ConsoleBar(self, name)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)


class ConsoleBar:
    _LINE_EVERY_S = 10.0

    def __init__(self, owner: ConsoleProgress, name: str) -> None:
        self._owner, self._name = owner, name
        self._task = owner._progress.add_task(name, total=None, note="")
        self._total: int | None = None
        self._done = 0
        self._note = ""
        self._counted_from: tuple[int, float] | None = None
        self._said = 0.0

    def start(self, total: int | None, note: str = "") -> None:
        self._total, self._done, self._counted_from = total, 0, None
        self._owner._progress.reset(self._task, total=total, note=note)
        self.update(0, note)

    def update(self, done: int | None = None, note: str | None = None) -> None:
        self._done = self._done if done is None else done
        self._note = self._note if note is None else note
        self._owner._progress.update(self._task, completed=self._done, note=self._note)
        now = time.monotonic()
        if self._done and self._counted_from is None:
            self._counted_from = (self._done, now)  # what came before the first step is no measure of a step
        if not self._owner._live and now - self._said >= self._LINE_EVERY_S:
            self._said = now
            self._owner.say(self._line())

    def over(self, items: list[T]) -> Iterator[T]:
        self.start(len(items))
        for number, item in enumerate(items, 1):
            yield item
            self.update(number)

    def say(self, text: str) -> None:
        """A line that stays, above the bars."""
        self._owner.say(f"{self._name:<10} {text}")

    def finish(self, note: str) -> None:
        total = self._total if self._total is not None else max(self._done, 1)
        self._owner._progress.update(self._task, total=total, completed=total, note=note)
        if not self._owner._live:
            self._owner.say(f"{self._name:<10} {note}")

    def fail(self, note: str) -> None:
        self._owner._progress.update(self._task, note=f"[red]{note}")
        self._owner._progress.stop_task(self._task)

    def _line(self) -> str:
        of = f"/{self._total}" if self._total else ""
        left = ""
        if self._total and self._counted_from and self._done > self._counted_from[0]:
            first, since = self._counted_from
            left = f"  {(time.monotonic() - since) / (self._done - first) * (self._total - self._done):.0f} s left"
        return f"{self._name:<10} {self._done}{of}{left}  {self._note}"


class Board:
    """A Ray actor that holds what rank 0 reported until the driver fetches it."""

    def __init__(self) -> None:
        self._reports: list[dict[str, Any]] = []
        self._stopped = False

    def report(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether the work is still wanted."""
        self._reports.append({"step": step, **metrics})
        return not self._stopped

    def stop(self) -> None:
        """From now on the work is not wanted."""
        self._stopped = True

    def take(self) -> list[dict[str, Any]]:
        reports, self._reports = self._reports, []
        return reports


def start_board() -> Any:
    """The board as a Ray actor that needs no CPU slot, on the driver's own node: others may be taken away."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
