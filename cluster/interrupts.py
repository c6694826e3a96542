"""Ctrl-C and SIGTERM as `KeyboardInterrupt`, so that whatever was started is stopped on the way out.

Libraries put their own handlers in place when they start (Ray's for SIGTERM prints a native trace and aborts): call
`raise_on_signals` again after them.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

_received = signal.SIGINT
_leave_group = False


def raise_on_signals() -> None:
    """From now on SIGINT and SIGTERM raise `KeyboardInterrupt` in the main thread. Does nothing in another thread."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _raise)


def exit_code() -> int:
    """What a process that was interrupted ends with, as shells have it: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + _received


@contextlib.contextmanager
def daemons_in_own_groups() -> Iterator[None]:
    """What Ray starts in this block is spared a signal to our process group; it ends with this process all the same.

    A terminal, `timeout` and a supervisor signal the whole group. Were Ray's daemons to die of it, Ray's native code
    would end this process too, at any moment and with a code of its own. On Linux only: elsewhere Ray finds what a
    killed driver left by its group.
    """
    global _leave_group
    _leave_group = sys.platform == "linux"
    try:
        yield
    finally:
        _leave_group = False


def _after_fork() -> None:
    if _leave_group:
        os.setpgrp()


os.register_at_fork(after_in_child=_after_fork)  # called between fork and exec, since Ray gives a preexec_fn


def _raise(number: int, frame: Any) -> NoReturn:
    global _received
    _received = signal.Signals(number)  # kept here, since Ray raises a KeyboardInterrupt of its own in its place
    raise KeyboardInterrupt(f"interrupted by {_received.name}")
