"""Local files that are not whole yet. Their names say which process writes them, so that what one left that was killed
can be told from what another still writes."""

import hashlib
import os
import re
import tempfile
from pathlib import Path

from cluster.processes import is_gone, this_process

PARTIAL = ".partial"
"""Ending of local files that are not whole yet."""


def new_file(directory: Path) -> Path:
    """An empty file of this process, unlike any other."""
    machine, pid, began = this_process().identity.split(" ")
    handle, name = tempfile.mkstemp(dir=directory, prefix=f"{_short(machine)}-{pid}-{began}-", suffix=PARTIAL)
    os.close(handle)
    return Path(name)


def sweep(root: Path) -> int:
    """Removes what processes of this machine left below a directory when they were killed; returns how many files."""
    machine = this_process().identity.split(" ")[0]
    ours = re.compile(rf"{_short(machine)}-(\d+)-(\d+)-\w+{re.escape(PARTIAL)}")
    swept = 0
    for parent, _, files in os.walk(root):
        for name in files:
            match = ours.fullmatch(name)
            if match and is_gone(f"{machine} {match[1]} {match[2]}"):
                Path(parent, name).unlink(missing_ok=True)
                swept += 1
    return swept


def _short(machine: str) -> str:
    return hashlib.sha256(machine.encode()).hexdigest()[:12]
