"""One process at a time works on a run: two would train the same student twice, over each other."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import RunInProgress
from jobs.config import RunConfig


@contextlib.contextmanager
def only_one(config: RunConfig) -> Iterator[None]:
    """Holds the run for the length of the block. The system lets go of it when the process dies, however it does.

    It holds on this machine (or where the state directory is shared with locks), not against another machine that
    works on the same object-store root.

    Raises:
        RunInProgress: another process has it.
    """
    path = config.state_directory / "run.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _taken(path)
    while handle is None:  # whoever had it removed the file in the meantime: the next one is another file
        handle = _taken(path)
    try:
        if handle < 0:
            owner = path.read_text().strip() or "another"
            raise RunInProgress(
                f"run {config.name}: process {owner} works on it already; wait for that one "
                f"(`raystill status {config.name}`), or give this one another name="
            )
        os.truncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        if handle >= 0:
            path.unlink(missing_ok=True)
            os.close(handle)
            with contextlib.suppress(OSError):  # still holds what the run made
                path.parent.rmdir()


def _taken(path: Path) -> int | None:
    """An open, locked file; -1 if another process has it; None if it was removed before it was locked."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.stat().st_ino == os.fstat(handle).st_ino:
            return handle
    except BlockingIOError:
        os.close(handle)
        return -1
    except FileNotFoundError:
        pass
    os.close(handle)
    return None
