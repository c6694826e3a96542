"""Who does something, and whether that process still runs: what is written beside a record that others may find open.

A process is known by its machine (and the namespace its numbers are counted in), its number and the moment it began,
so that neither a number used again nor a container of the same name is taken for it.
"""

import contextlib
import getpass
import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process of a person on a machine."""

    user: str
    host: str
    identity: str
    """Machine, number and beginning in one text; compare it, do not read it."""


def this_process() -> Process:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container may know no name for its user
        user = str(os.getuid())
    pid = os.getpid()
    return Process(user[:64], socket.gethostname()[:64], f"{_machine()} {pid} {_began(pid)}")


def is_gone(identity: str) -> bool | None:
    """Whether the process has ended; None if it cannot be known from here, because it is another machine's."""
    machine, _, rest = identity.partition(" ")
    pid, _, began = rest.partition(" ")
    if not machine or machine != _machine() or not pid.isdecimal() or not began.isdecimal():
        return None
    return _began(int(pid)) != began


def _machine() -> str:
    """Boot and process namespace. Empty where the system does not say, and then nothing is known of any process."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    return ""


def _began(pid: int) -> str:
    """When a process began, in ticks since the machine did; empty if it does not run any more."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""
