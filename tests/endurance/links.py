"""One training on three hosts, then with a bad wire to the teacher, then with none for a while.

    python -m tests.endurance.links [--steps 300]

The hosts are namespaces with addresses of their own (`tests.hosts`): the head with one student, the teacher, the other
student. First the wires are good; then each packet from and to the teacher's host takes 50 ms and one in a hundred is
lost; then that wire is cut for 20 s. Each must see the same rows and end at the same validation loss. Needs root. The
last line is JSON.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from tests import tiny
from tests.benchmarks.elastic import Steps
from tests.command_line import environment, raystill
from tests.hosts import Lan, hosts
from tests.ray_cluster import wait_until

TEACHER, LATENCY_S, LOSS, CUT_S = 1, 0.05, 0.01, 20.0
_RESOURCES: list[dict[str, float]] = [{"student_slot": 1}, {"teacher_slot": 1}, {"student_slot": 1}]


def main(steps: Annotated[int, typer.Option(help="Of each training.")] = 300) -> None:
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "links-" + "7a" * 24}
    with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp") as name, hosts(3, Path(name)) as lan:
        directory = Path(name)
        config = write_config(directory, lan, steps)
        prepared = raystill("prepare", config, f"storage={directory / 'good'}", "cluster.address=", cwd=directory)
        if prepared.returncode != 0:
            raise SystemExit(prepared.stderr)
        for case in ("bad", "cut"):
            shutil.copytree(directory / "good", directory / case)
        start_ray(lan, directory)
        found = {}
        for case in ("good", "bad", "cut"):
            lan.set_wire(TEACHER, *((LATENCY_S, LOSS) if case == "bad" else ()))
            found[case] = trained(lan, config, directory, case, steps)
            Console(stderr=True).print(f"{case}: {found[case]['seconds']:.0f} s")
    report(found)


def write_config(directory: Path, lan: Lan, steps: int) -> Path:
    return tiny.run_config(
        "links",
        directory,
        cluster={"address": f"{lan.address(0)}:6379", "pools": {}},
        # Asked so little ahead that students stand still soon after the wire is cut.
        teacher={"replicas": 1, "threads_per_replica": 1, "attempt_timeout_s": 10, "window_mb": 0.05},
        train={
            "steps": steps,
            "num_workers": 2,
            "threads_per_worker": 1,
            "precision": "float32",
            "checkpoint_every": 50,
            "validate_every": steps,
        },
    )


def start_ray(lan: Lan, directory: Path) -> None:
    """A Ray node on every host."""
    for number, resources in enumerate(_RESOURCES):
        joins = ["--head", "--port", "6379", "--include-dashboard", "false"]
        if number:
            joins = ["--address", f"{lan.address(0)}:6379"]
        command = [str(Path(sys.executable).parent / "ray"), "start", *joins, "--node-ip-address", lan.address(number)]
        command += ["--num-cpus", "2", "--resources", json.dumps(resources), "--object-store-memory", str(100 << 20)]
        log = directory / f"ray-{number}.log"
        with log.open("w") as out:
            node = lan.start(number, [*command, "--disable-usage-stats", "--block"], out, environment())
        wait_until(
            lambda log=log, node=node: "Ray runtime started" in log.read_text() or node.poll() is not None, 120, "Ray"
        )
        if node.poll() is not None:
            raise SystemExit(f"Ray did not start: {log.read_text()[-2000:]}")


def trained(lan: Lan, config: Path, directory: Path, case: str, steps: int) -> dict[str, Any]:
    """What a training gave, with `seconds` it took and `pause_s`, the longest time between two of its steps."""
    seen = Steps(directory / case / "mlflow.db")
    command = [sys.executable, "-m", "jobs", "train", str(config), f"storage={directory / case}"]
    began, when, lost_before = time.time(), None, lan.wires[TEACHER].lost
    with (directory / f"{case}.log").open("w+") as log:
        process = lan.start(0, command, log, environment())
        while process.poll() is None and time.time() < began + 900:
            if case == "cut" and when is None and seen.reached() > steps / 4:
                when = time.time()
                lan.set_wire(TEACHER, cut=True)
            if when is not None and time.time() > when + CUT_S:
                lan.set_wire(TEACHER)
            time.sleep(0.2)
        if process.poll() != 0:
            log.seek(0)
            raise SystemExit(f"{case}: raystill train ended with {process.returncode}:\n{log.read()[-3000:]}")
    if case == "cut" and when is None:
        raise SystemExit("the training ended before its wire could be cut")
    stage = json.loads((directory / case / "summary.json").read_text())["stages"]["train"]
    pauses = np.diff([at for at, _ in seen.all()])
    lost = lan.wires[TEACHER].lost - lost_before
    return {**stage, "seconds": time.time() - began, "pause_s": float(pauses.max()), "lost": lost}


def report(found: dict[str, dict[str, Any]]) -> None:
    good = found["good"]
    titles = {"good": "good wires", "bad": "50 ms each way, 1 % lost", "cut": "cut for 20 s"}
    table = Table("teacher's wire", "training", "longest pause", "asked again", "packets lost", "rows", "loss apart")
    result: dict[str, Any] = {}
    for case, title in titles.items():
        figures = found[case]
        gap = abs(figures["losses"][-1] - good["losses"][-1]) / good["losses"][-1]
        same = all(figures[key] == good[key] for key in ("rows", "tokens", "rows_checksum"))
        times = [f"{figures['seconds']:.0f} s", f"{figures['pause_s']:.1f} s"]
        counts = [str(figures["retries"]), str(figures["lost"])]
        table.add_row(title, *times, *counts, "the same" if same else "OTHERS", f"{gap:.1e}")
        result |= {f"{case}_s": figures["seconds"], f"{case}_pause_s": figures["pause_s"]}
        result |= {f"{case}_same_rows": same, f"{case}_loss_gap": gap}
    Console().print(table)
    print(json.dumps(result))
    if not all(result[f"{case}_same_rows"] and result[f"{case}_loss_gap"] < 1e-3 for case in titles):
        raise SystemExit("a bad wire changed what was learned")
    if not found["bad"]["lost"] or found["cut"]["pause_s"] < CUT_S / 2:
        raise SystemExit("the wires were not felt: nothing is shown")


if __name__ == "__main__":
    typer.run(main)
