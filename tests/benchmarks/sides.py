"""Sides of a comparison: each a process of its own, with its own environment, of which one computes at a time.

A benchmark is a module with a function `side(name, options)` that prepares a side and returns what is measured. The
parent starts all sides, lets them take turns, and takes medians: a machine that is slow for a while is slow for all.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.resources import physical_cores, process_environment

AS_IT_COMES: dict[str, str] = {}
"""The environment of somebody who installed torch and set nothing."""
OUR_SETTINGS = process_environment()
"""Allocator, wait policy and the rest, as raystill gives them to every process it starts."""

Measure = Callable[[], dict[str, float] | None]


class Side:
    """A process that measures when it is told to.

    Args:
        module: with the function `side`.
        name: of the side.
        options: JSON, given to the function.
        settings: environment variables on top of a clean environment.
    """

    def __init__(self, module: str, name: str, options: dict[str, Any], settings: dict[str, str]) -> None:
        ours = set(OUR_SETTINGS)
        environment = {key: value for key, value in os.environ.items() if key not in ours} | settings
        environment["OMP_NUM_THREADS"] = str(physical_cores())
        self.name, self.seconds, self.facts, self._ready = name, [], {}, False  # type: ignore[var-annotated]
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.sides", module, name, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=environment,
        )

    def wait_until_ready(self) -> None:
        """Returns when the side has prepared what it measures; sides prepare at the same time."""
        if not self._ready:
            self._answer()
        self._ready = True

    def measure(self) -> None:
        """One turn."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.seconds.append(answer.pop("seconds"))
        self.facts = answer

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        code = self._process.wait()
        self._said.seek(0)
        raise RuntimeError(f"side {self.name} ended with {code}: {self._said.read()[-2000:]}")


def take_turns(sides: list[Side], repeats: int) -> None:
    """When all are ready: one turn that does not count, then `repeats` of each, in an order that is turned round every
    time."""
    for side in sides:
        side.wait_until_ready()
    for number in range(repeats + 1):
        for side in sides if number % 2 else reversed(sides):
            side.measure()
    for side in sides:
        del side.seconds[0]


def arguments(
    description: str, add: Callable[[argparse.ArgumentParser], object] = lambda parser: None
) -> argparse.Namespace:
    """The options that every benchmark has, and those that `add` adds to the parser."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and turns")
    parser.add_argument("--repeats", type=int, default=None, help="turns of each side; the median counts")
    add(parser)
    return parser.parse_args()


def machine() -> str:
    """The machine in a line: processor, the matrix instructions that matter, cores, torch."""
    import torch

    model, flags = platform.processor() or platform.machine(), ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            lines = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
        lines = {key.strip(): value.strip() for key, value in lines.items()}
        model = lines.get("model name", model)
        known = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx512f": "AVX512", "avx2": "AVX2"}
        flags = next((name for flag, name in known.items() if flag in lines.get("flags", "").split()), "")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{model} {flags}, {physical_cores()} cores{gpu}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def show(title: str, columns: list[str], rows: list[list[str]], result: dict[str, Any]) -> None:
    """The table, the machine, and the result as one JSON object on the last line."""
    table = Table(title=title, title_justify="left", caption=machine(), caption_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
    print(json.dumps(result))


def _serve(module: str, name: str, options: str) -> None:
    """A side's process: prepares, then measures a turn for every line that it reads."""
    import torch

    torch.set_num_threads(physical_cores())
    measure: Measure = importlib.import_module(module).side(name, json.loads(options))
    before = _memory("VmRSS")
    _forget_peak()
    print("{}", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        facts = measure() or {}
        facts = {"seconds": time.perf_counter() - started, **facts}
        print(json.dumps({**facts, "peak_bytes": _memory("VmHWM") - before}), flush=True)
    getattr(measure, "close", lambda: None)()  # what has a thread that would keep the process


def _forget_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _memory(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


if __name__ == "__main__":
    _serve(*sys.argv[1:])
