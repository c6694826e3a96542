"""Local files and directories that are not whole yet. Their names say which process writes them, so that what one left
that was killed can be told from what another still writes."""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cluster.processes import is_gone, this_process

PARTIAL = ".partial"
"""Ending of local files and directories that are not whole yet."""


def new_file(directory: Path) -> Path:
    """An empty file of this process, unlike any other."""
    handle, name = tempfile.mkstemp(dir=directory, prefix=_own_prefix(), suffix=PARTIAL)
    os.close(handle)
    return Path(name)


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """An empty directory that takes the place of `path` when the block ends well, and vanishes when it does not. What
    was at `path` before stays until then; only a process killed between two renames leaves neither."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, before = (Path(tempfile.mkdtemp(dir=path.parent, prefix=_own_prefix(), suffix=PARTIAL)) for _ in range(2))
    try:
        yield partial
        partial.chmod(0o755)
        if path.exists():
            path.replace(before)
        partial.replace(path)
    finally:
        if not path.exists() and any(before.iterdir()):
            before.replace(path)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)


def sweep(root: Path) -> int:
    """Removes what processes of this machine left below a directory when they were killed; returns how many files and
    directories."""
    machine = this_process().identity.split(" ")[0]
    ours = re.compile(rf"{_short(machine)}-(\d+)-(\d+)-\w+{re.escape(PARTIAL)}")
    swept = 0
    for parent, directories, files in os.walk(root):
        for name in [*directories, *files]:
            match = ours.fullmatch(name)
            if not match or not is_gone(f"{machine} {match[1]} {match[2]}"):
                continue
            if name in directories:
                shutil.rmtree(Path(parent, name), ignore_errors=True)
            else:
                Path(parent, name).unlink(missing_ok=True)
            swept += 1
    return swept


def _own_prefix() -> str:
    machine, pid, began = this_process().identity.split(" ")
    return f"{_short(machine)}-{pid}-{began}-"


def _short(machine: str) -> str:
    return hashlib.sha256(machine.encode()).hexdigest()[:12]
