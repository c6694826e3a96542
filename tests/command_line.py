"""raystill as a user calls it: in a process of its own, from a directory of its own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

COMMAND = [sys.executable, "-m", "jobs"]
COMPUTES = ("RayTrainWorker", "TrainController", "ServeReplica", "_reporting")
"""Ray processes that compute or write; Ray's own agents take a minute to go after a driver was killed."""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "COLUMNS": "120"}


def raystill(*arguments: Any, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"env": environment(), "capture_output": True, "text": True, **options}
    return subprocess.run([*COMMAND, *map(str, arguments)], cwd=cwd, **options)


def end(*processes: "subprocess.Popen[str]") -> None:
    """Asks those that still run to end, as they end their Ray then; a minute later they are killed."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def last_json(text: str) -> Any:
    return json.loads(text.strip().splitlines()[-1])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rays_below(directory: Path, names: tuple[str, ...] = ("ray",)) -> list[int]:
    """Ray processes of these names that still run and were started from a working directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(name in process.name() for name in names) and process.cwd() == str(directory):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found
