"""Work that needs torch or a GPU runs as a Ray task, so that the driver stays light and can live on any node.

Every call gets a process of its own: speed is measured on a clean one, and an artefact is reloaded in one that did not
make it.
"""

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

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
    from ray.exceptions import RayTaskError

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
    try:
        return ray.get(pending)
    except RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from error
        raise
