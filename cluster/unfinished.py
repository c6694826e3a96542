"""Local files that are not whole yet. Their names say who writes them, so that those of a process that was killed can
be told from those of one that still writes."""

import os
import re
import socket
import tempfile
from pathlib import Path

PARTIAL = ".partial"
"""Ending of local files that are not whole yet."""


def new_file(directory: Path) -> Path:
    """An empty file of this process, unlike any other."""
    handle, name = tempfile.mkstemp(dir=directory, prefix=f"{_place()}-{os.getpid()}-", suffix=PARTIAL)
    os.close(handle)
    return Path(name)


def sweep(root: Path) -> int:
    """Removes what processes of this machine left below a directory when they were killed; returns how many files."""
    ours = re.compile(rf"{re.escape(_place())}-(\d+)-\w+{re.escape(PARTIAL)}")
    swept = 0
    for parent, _, files in os.walk(root):
        for name in files:
            match = ours.fullmatch(name)
            if match and not _lives(int(match[1])):
                Path(parent, name).unlink(missing_ok=True)
                swept += 1
    return swept


def _place() -> str:
    """The host and its space of process ids: containers may share a directory, and the name of their host."""
    space = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}-{os.readlink(space)[5:-1] if space.exists() else 'pids'}"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
