"""Work that needs torch or a GPU runs as a Ray task, so that the driver stays light and can live on any node.

A single call gets a process of its own: speed is measured on a clean one, and an artefact is reloaded in one that did
not make it. Many calls of one kind share processes, a few at once.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any, TypeVar

from cluster.connection import while_ray_lives
from jobs.progress import Bar, start_board

T = TypeVar("T")


def run_task(function: Callable[..., T], *arguments: Any, bar: Bar | None = None, total: int | None = None) -> T:
    """Runs a function in a fresh process of the cluster and returns its result.

    Args:
        bar: if given, the function gets a `jobs.progress.Board` as its last argument, and the bar follows it.
        total: what the bar counts up to.

    Raises:
        Whatever the function raised.
    """
    import ray

    remote = ray.remote(num_cpus=1, max_calls=1, max_retries=2)(function)
    board = None
    if bar is not None:
        board = start_board()
        bar.start(total, "starting")
        arguments = (*arguments, board)
    pending = remote.remote(*arguments)
    while not ray.wait([pending], timeout=0.5)[0]:
        if board is not None and bar is not None:
            with contextlib.suppress(Exception):  # a late report is drawn next time
                for report in ray.get(board.take.remote(), timeout=5):
                    bar.update(report["step"], str(report.get("model", "")))
    return _result(pending)


def run_tasks(
    function: Callable[..., T],
    calls: list[tuple[Any, ...]],
    at_once: int,
    num_cpus: int,
    follow: Callable[[int, dict[str, float]], None],
) -> list[T]:
    """Runs a function for every tuple of arguments, as Ray tasks or here; results come in the order of the calls.

    Args:
        function: gets a call's arguments and, last, a function to report a step and its figures with.
        at_once: tasks that run at the same time; 0 runs the calls in this process, one after the other.
        num_cpus: of each task.
        follow: is given what is reported; of figures that name a place, the last of each place.

    Raises:
        Whatever the first call that failed raised, once the calls that were running have stopped.
    """
    if at_once == 0:
        return [function(*call, follow) for call in calls]
    import ray

    board = start_board()
    remote = ray.remote(num_cpus=num_cpus, max_retries=2)(_reporting)
    waiting = list(enumerate(calls))[::-1]
    running: dict[Any, int] = {}
    results: dict[int, T] = {}

    def take_reports() -> None:
        with contextlib.suppress(Exception):  # a late report is shown next time
            for report in ray.get(board.take.remote(), timeout=5):
                follow(int(report.pop("step")), report)

    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                number, call = waiting.pop()
                running[remote.remote(function, call, board)] = number
            for done in ray.wait(list(running), timeout=0.5)[0]:
                results[running.pop(done)] = _result(done)
            take_reports()
        take_reports()
    finally:
        # Not ray.cancel: with force it can abort the driver (2.60: "Tried to complete task that was not pending").
        while_ray_lives(lambda: _stop(board, list(running)))
    return [results[number] for number in range(len(calls))]


def _stop(board: Any, running: list[Any]) -> None:
    """Ends tasks at their next report and waits for that, so that whoever tidies up after them is alone."""
    import ray

    with contextlib.suppress(Exception):
        ray.get(board.stop.remote(), timeout=5)
        if running:
            ray.wait(running, num_returns=len(running), timeout=60)
        ray.kill(board)


def _reporting(function: Callable[..., T], call: tuple[Any, ...], board: Any) -> T:
    """In a task: reports go to the board, of each place twice a second at most, and the last one in any case. The board
    may answer that the work is no longer wanted."""
    import ray

    held: tuple[int, dict[str, float]] | None = None
    sent = 0.0

    def report(step: int, figures: dict[str, float]) -> None:
        nonlocal held, sent
        if held is not None and held[1].get("place") != figures.get("place"):
            board.report.remote(*held)
        held = (step, figures)
        if time.monotonic() - sent >= 0.5:
            if not ray.get(board.report.remote(*held)):
                raise InterruptedError("another task has failed, or the job was interrupted")
            held, sent = None, time.monotonic()

    result = function(*call, report)
    if held is not None:
        board.report.remote(*held)
    return result


def _result(task: Any) -> Any:
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(task)
    except RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from error
        raise
