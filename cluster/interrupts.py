"""Ctrl-C and SIGTERM as `KeyboardInterrupt`, so that whatever was started is stopped on the way out.

Libraries put their own handlers in place when they start (Ray's for SIGTERM prints a native trace and aborts): call
`raise_on_signals` again after them.
"""

import signal
import threading
from typing import Any, NoReturn

_received = signal.SIGINT


def raise_on_signals() -> None:
    """From now on SIGINT and SIGTERM raise `KeyboardInterrupt` in the main thread. Does nothing in another thread."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _raise)


def exit_code() -> int:
    """What a process that was interrupted ends with, as shells have it: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + _received


def _raise(number: int, frame: Any) -> NoReturn:
    global _received
    _received = signal.Signals(number)  # kept here, since Ray raises a KeyboardInterrupt of its own in its place
    raise KeyboardInterrupt(f"interrupted by {_received.name}")
