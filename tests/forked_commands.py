"""raystill as a user calls it, many times over: each command a process, forked off one that has done the imports.

    with forked_commands() as raystill:
        done = raystill("run", "mine.yaml", cwd=directory)

A command has its own arguments, directory, environment and standard streams. What it is spared is seconds of imports at
its beginning and taking all modules apart at its end; what was registered with `atexit` is done. Only what Ray reads
of the environment while it is imported is that of all commands. A command that is not awaited to its end, because it
hangs or the test is broken off, is ended with that process: the next has a new one.
"""

import atexit
import contextlib
import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.command_line import environment

Call = Callable[..., "subprocess.CompletedProcess[str]"]
_FORKING = (sys.executable, "-m", "tests.forked_commands")


class _Forking:
    """A process that forks commands, begun with the first and again after one that was given up."""

    def __init__(self, program: Sequence[str]) -> None:
        self._program = program
        self._process: subprocess.Popen[str] | None = None

    def code(self, asked: dict[str, Any], timeout_s: float) -> int:
        """The exit code of a command.

        Raises:
            subprocess.TimeoutExpired: it did not end.
        """
        if self._process is None:  # in a group of its own, so that all of it can be ended
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._process = subprocess.Popen(
                self._program, env=environment(), text=True, start_new_session=True, **pipes
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            if not select.select([process.stdout], [], [], timeout_s)[0]:
                raise subprocess.TimeoutExpired(asked["arguments"], timeout_s)
            return int(json.loads(process.stdout.readline()))
        except BaseException:  # its answer would be taken for the next command's
            self._kill(process)
            raise

    def close(self) -> None:
        if (process := self._process) is not None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                self._kill(process)

    def _kill(self, process: "subprocess.Popen[str]") -> None:
        self._process = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@contextlib.contextmanager
def forked_commands(program: Sequence[str] = _FORKING) -> Iterator[Call]:
    """`tests.command_line.raystill`: a function of arguments, `cwd` and `env` that runs a command and waits for it.

    Args:
        program: does what `main` does.
    """
    forking = _Forking(program)

    def raystill(
        *arguments: Any, cwd: Path, env: dict[str, str] | None = None, timeout_s: float = 500
    ) -> "subprocess.CompletedProcess[str]":
        words = [str(argument) for argument in arguments]
        with tempfile.TemporaryDirectory() as directory:
            streams = [str(Path(directory, name)) for name in ("stdout", "stderr")]
            asked = {"arguments": words, "cwd": str(cwd), "environment": env or environment(), "streams": streams}
            code = forking.code(asked, timeout_s)
            said = [Path(name).read_text() for name in streams]
        return subprocess.CompletedProcess(words, code, *said)

    try:
        yield raystill
    finally:
        forking.close()


def main() -> None:
    import mlflow  # noqa: F401
    import pandas  # noqa: F401 - by pyarrow, which asks for it in its first array
    from transformers import AutoConfig, AutoTokenizer

    import jobs.run  # noqa: F401
    from jobs.__main__ import main as command_line

    AutoConfig.for_model("llama")  # imports most of transformers, and torch
    assert AutoTokenizer
    gc.collect()
    gc.freeze()  # else the first collection of every child copies all that was imported
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _take_place(json.loads(line))
            code: Any = 0
            try:
                command_line()
            except SystemExit as end:
                code = end.code
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 0 if code is None else 1)
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


def _take_place(asked: dict[str, Any]) -> None:
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    for number, name in enumerate(asked["streams"], start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv[1:] = asked["arguments"]


if __name__ == "__main__":
    main()
