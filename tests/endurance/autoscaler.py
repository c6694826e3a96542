"""A run on a cluster that starts machines when they are asked for: `python -m tests.endurance.autoscaler`.

Ray's own autoscaler with its provider of pretended machines (each is a raylet): a head, none to three teacher nodes,
none to one student node. A training that asks for three teachers gets three nodes and a fourth for its student; when it
has ended they go, down to the head alone. Needs root: it happens in namespaces of its own. The last line is JSON.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests import namespaces, tiny
from tests.command_line import COMMAND, environment, raystill
from tests.ray_cluster import wait_until

TEACHERS, STEPS = 3, 300
IDLE_MINUTES = 0.2


@contextlib.contextmanager
def autoscaling_cluster(directory: Path) -> Iterator[None]:
    """A head whose autoscaler may start nodes of two types; `ray.cluster_utils` has one whose file wheels leave out."""

    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    def kind(slot: str, most: int) -> dict[str, Any]:
        return {"resources": {"CPU": 1, slot: 1}, "node_config": {}, "min_workers": 0, "max_workers": most}

    head = {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0}
    nothing = ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands")
    nothing += ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude")
    config = {
        **{name: [] for name in (*nothing, "rsync_filter")},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        "file_mounts_sync_continuously": False,
        "cluster_name": "pretended",
        "max_workers": TEACHERS + 1,
        "upscaling_speed": 20.0,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {"type": "fake_multinode", "use_node_id_as_ip": True},
        "available_node_types": {
            "ray.head.default": head,
            "teacher": kind("teacher_slot", TEACHERS),
            "student": kind("student_slot", 1),
        },
        "head_node_type": "ray.head.default",
    }
    file = directory / "cluster.json"
    file.write_text(json.dumps(config))
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--node-ip-address", "127.0.0.1"]
    command += ["--num-cpus", "2", "--object-store-memory", str(100 << 20), "--include-dashboard", "false", "--block"]
    variables = {**environment(), "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    variables["RAY_OVERRIDE_NODE_ID_FOR_TESTING"] = FAKE_HEAD_NODE_ID
    with (directory / "cluster.log").open("w+") as log:
        head_process = subprocess.Popen(
            [*command, "--autoscaling-config", str(file)], env=variables, stdout=log, stderr=log
        )
        try:
            address = Path("/tmp/ray/ray_current_cluster")
            wait_until(lambda: address.exists() or head_process.poll() is not None, 60, "the head")
            yield
        except BaseException:
            log.seek(0)
            print(log.read()[-2000:], file=sys.stderr)
            raise
        finally:
            head_process.terminate()
            head_process.wait(60)


def write_config(directory: Path) -> Path:
    return tiny.run_config(
        "grows",
        directory,
        storage=str(directory / "storage"),
        cluster={"address": "auto", "num_cpus": 2 + TEACHERS + 1, "pools": {}},
        teacher={"replicas": TEACHERS, "threads_per_replica": 1},
        train={
            "steps": STEPS,
            "threads_per_worker": 1,
            "precision": "float32",
            "checkpoint_every": 50,
            "validate_every": STEPS,
        },
    )


def count_nodes() -> dict[str, int]:
    """Living nodes by the slot that they have, beside the head."""
    import ray

    living = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return {slot: sum(slot in resources for resources in living) for slot in ("teacher_slot", "student_slot")}


def run(directory: Path, watch: Callable[[], dict[str, int]]) -> dict[str, float]:
    config = write_config(directory)
    prepared = raystill("prepare", config, cwd=directory)
    if prepared.returncode != 0:
        raise SystemExit(prepared.stderr)
    began = time.monotonic()
    with (directory / "log").open("w+") as log:
        process = subprocess.Popen([*COMMAND, "train", str(config)], env=environment(), stdout=log, stderr=log)
        try:
            wait_until(lambda: process.poll() is not None or watch()["teacher_slot"] == TEACHERS, 150, "three nodes")
            scale_up_s, most = time.monotonic() - began, watch()["teacher_slot"]
            process.wait(900)
        finally:
            process.terminate()
            log.seek(0)
            print(log.read()[-3000:], file=sys.stderr)
        if process.returncode != 0:
            raise SystemExit(f"raystill train ended with {process.returncode}")
    ended = time.monotonic()
    wait_until(lambda: not any(watch().values()), 300, "the nodes are gone")
    stage = json.loads((directory / "storage/summary.json").read_text())["stages"]["train"]
    if stage["rows"] != STEPS * 8:
        raise SystemExit(f"{stage['rows']} rows seen, {STEPS * 8} planned")
    return {"teacher_nodes": most, "scale_up_s": scale_up_s, "scale_to_zero_s": time.monotonic() - ended}


def main() -> None:
    namespaces.enter("tests.endurance.autoscaler")
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "grows-" + "5e" * 24}
    import ray

    with tempfile.TemporaryDirectory(prefix="raystill-grows-") as name, autoscaling_cluster(Path(name)):
        ray.init("auto", log_to_driver=False)
        figures = run(Path(name), count_nodes)
        ray.shutdown()
    table = Table("what", "measured", title="A run that needs three teacher nodes, on a cluster that has none")
    table.add_row("teacher nodes that came", f"{figures['teacher_nodes']:.0f}")
    table.add_row("from the command to the third", f"{figures['scale_up_s']:.0f} s")
    table.add_row("from its end to the head alone", f"{figures['scale_to_zero_s']:.0f} s")
    Console().print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
