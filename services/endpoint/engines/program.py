"""A program of another environment that is asked and answers in JSON lines, and that does not outlive who started it.

Its standard input is the life line: it closes when this process ends, however that happens, and the program ends with
it. What it writes to standard error is logged; the first error among it is kept, since that is mostly the cause and
what follows its consequences.
"""

import contextlib
import json
import logging
import queue
import re
import subprocess
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

logger = logging.getLogger(__name__)

_ERROR = re.compile(r"(?:^|\] )((?:\w+\.)*\w*(?:Error|Exception|Interrupt)(?:: .*)?)$")
"""An exception as a traceback ends with it, by itself or behind the head of a log line."""
_PATIENCE_S = 10.0
"""Time to end by itself once nothing more is asked."""


class Program:
    """A running program; it is ended when nobody refers to this object any more."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        # In a session of its own: Ctrl-C in a terminal is for us, who let it finish what it has begun.
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._said = _Said()
        stdin, stderr = self._process.stdin, self._process.stderr
        assert stdin is not None
        assert stderr is not None
        threading.Thread(target=_write, args=(stdin, self._outbox), name="engine-asks", daemon=True).start()
        self._listener = threading.Thread(target=_listen, args=(stderr, self._said), name="engine-log", daemon=True)
        self._listener.start()
        self.end = weakref.finalize(self, _end, self._process, self._outbox)
        """Ends it soon; may be called more than once."""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def answers(self) -> Iterator[dict[str, Any]]:
        """What it answers, until it ends. Does not keep the program alive."""
        stdout = self._process.stdout
        assert stdout is not None
        return _messages(stdout)

    def ask(self, message: dict[str, Any]) -> None:
        """Sends a message; never waits. One that has ended hears nothing."""
        self._outbox.put(json.dumps(message).encode() + b"\n")

    def kill(self) -> None:
        self._process.kill()

    def forget_errors(self) -> None:
        """Takes what it said so far as nothing that it could end from."""
        self._said.error = ""

    def last_words(self) -> str:
        """Why it has ended, on one line, as far as it said so."""
        code = self._process.wait()
        self._listener.join(_PATIENCE_S)
        said = (self._said.error or self._said.line)[:300]
        if code < 0:
            return f"{said} (killed by signal {-code})".strip()
        return said or f"code {code}"


@dataclass
class _Said:
    """Of what a program writes to standard error."""

    error: str = ""
    """The first."""
    line: str = ""
    """The last one that is not empty."""


def _messages(stdout: IO[bytes]) -> Iterator[dict[str, Any]]:
    with contextlib.suppress(ValueError):  # half a line: it ended while it wrote
        for line in stdout:
            yield json.loads(line)


def _write(stdin: IO[bytes], outbox: "queue.SimpleQueue[bytes | None]") -> None:
    with contextlib.suppress(OSError):  # it has ended
        while (data := outbox.get()) is not None:
            stdin.write(data)
            stdin.flush()
    with contextlib.suppress(OSError):
        stdin.close()


def _listen(stderr: IO[bytes], said: _Said) -> None:
    for data in stderr:
        if line := data.decode("utf-8", "replace").strip():
            logger.info("%s", line)
            said.line = line
            if not said.error and (found := _ERROR.search(line)):
                said.error = found[1]


def _end(process: "subprocess.Popen[bytes]", outbox: "queue.SimpleQueue[bytes | None]") -> None:
    outbox.put(None)

    def bury() -> None:
        try:
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    with contextlib.suppress(RuntimeError):  # this process is ending, and the life line with it
        threading.Thread(target=bury, name="engine-end", daemon=True).start()
