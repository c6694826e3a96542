"""raystill as a user calls it, many times over: each command a process, forked off one that has done the imports.

    with forked_commands() as raystill:
        done = raystill("run", "mine.yaml", cwd=directory)

A command has its own arguments, directory, environment and standard streams. What it is spared is seconds of imports at
its beginning and taking all modules apart at its end; what was registered with `atexit` is done. Only what Ray reads
of the environment while it is imported is that of all commands.
"""

import atexit
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.command_line import environment

Call = Callable[..., "subprocess.CompletedProcess[str]"]


@contextlib.contextmanager
def forked_commands() -> Iterator[Call]:
    """`tests.command_line.raystill`: a function of arguments, `cwd` and `env` that runs a command and waits for it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.forked_commands"],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def raystill(*arguments: Any, cwd: Path, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
        assert process.stdin is not None
        assert process.stdout is not None
        words = [str(argument) for argument in arguments]
        with tempfile.TemporaryDirectory() as directory:
            streams = [str(Path(directory, name)) for name in ("stdout", "stderr")]
            asked = {"arguments": words, "cwd": str(cwd), "environment": env or environment(), "streams": streams}
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            code = json.loads(process.stdout.readline())
            said = [Path(name).read_text() for name in streams]
        return subprocess.CompletedProcess(words, code, *said)

    try:
        yield raystill
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


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
