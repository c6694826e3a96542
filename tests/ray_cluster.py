"""A Ray cluster of several raylets on this machine, in a process of its own: nodes are added, and lost like machines.

    with running(num_cpus=2) as cluster:
        node = cluster.add(num_cpus=1, resources={"teacher_slot": 1})
        cluster.kill(node)

Each node is a raylet with its own worker processes; killing one ends all of them at once, as losing a machine would.
The process ends with its standard input, and every Ray process that it started with it. `ray stop` is never called: it
would end every Ray of the host.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_TRIES = 5
"""Times that a node is started: a raylet gives up whose agents take longer than fifteen seconds to begin, as they do on
a machine with much other work."""


class RayCluster:
    """The cluster as its owner sees it.

    Attributes:
        address: of the cluster, `host:port`.
        dashboard: URL of its dashboard.
        directory: Ray's own, with the logs of every process.
    """

    def __init__(self, process: "subprocess.Popen[str]", directory: str) -> None:
        self._process, self.directory = process, directory
        head = self._read()
        self.address, self.dashboard, self.head = head["address"], head["dashboard"], head["node"]

    def add(self, **arguments: Any) -> str:
        """Starts a node with `num_cpus`, `resources`, `labels`; its id."""
        return str(self._do({"add": arguments})["node"])

    def kill(self, node: str) -> None:
        """SIGKILL to every process of a node, as if its machine had gone."""
        self._do({"kill": node})

    def _do(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        said = Path(self.directory, "cluster.err").read_text()[-2000:]
        raise RuntimeError(f"the cluster ended: {said}")


@contextlib.contextmanager
def running(variables: dict[str, str] | None = None, **head: Any) -> Iterator[RayCluster]:
    """A cluster with its head for the length of the block.

    Args:
        variables: environment of every process of it, beside this one's.
        head: `num_cpus`, `resources`, `labels` of the head.
    """
    with _directory() as directory:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **(variables or {})}
        environment.pop("RAY_ADDRESS", None)
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
        with Path(directory, "cluster.err").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.ray_cluster", directory, json.dumps(head)],
                cwd=directory,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            yield RayCluster(process, directory)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def _directory() -> Iterator[str]:
    """A temporary directory; what Ray's last process writes while it is being removed is removed too."""
    directory = tempfile.mkdtemp(prefix="rc-", dir="/tmp")  # sockets below it: their paths are short
    try:
        yield directory
    finally:
        wait_until(lambda: shutil.rmtree(directory, ignore_errors=True) or not Path(directory).exists(), 30, directory)


def main() -> None:
    """Runs the cluster and does what standard input says, a line of JSON at a time, until it ends."""
    import ray
    from ray.cluster_utils import Cluster

    directory, head = sys.argv[1], json.loads(sys.argv[2])
    # Below the cluster's own directory: there its jobs look, which else take any Ray of the host for theirs, and others
    # of the host do not.
    write = ray._private.utils.write_ray_address
    ray._private.utils.write_ray_address = lambda address, _=None: write(address, directory)
    common = {"temp_dir": directory, "object_store_memory": 100 << 20}
    cluster = Cluster()
    dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1"}
    first = _added(cluster, **dashboard, **common, **head)
    nodes, num_lost = {first.node_id: first}, 0
    _answer({"address": cluster.address, "dashboard": f"http://{first.webui_url}", "node": first.node_id})
    for line in sys.stdin:
        order = json.loads(line)
        if "add" in order:
            # Nodes of one directory take the working directories of each other's jobs away.
            own = {**common, "temp_dir": f"{directory}/{len(nodes) + num_lost}"}
            node = _added(cluster, **own, **order["add"])
            nodes[node.node_id] = node
            _answer({"node": node.node_id})
        else:
            cluster.remove_node(nodes.pop(order["kill"]), allow_graceful=False)
            num_lost += 1
            _answer({"node": order["kill"]})
    cluster.shutdown()


def _agent_ports() -> dict[str, int]:
    """Ports of a node's dashboard and agents. Left to Ray, one is the same for every cluster of the host, and a head
    without its agent takes no jobs."""
    agents = ("dashboard_agent_listen", "metrics_agent", "metrics_export", "runtime_env_agent")
    return {f"{name}_port": _free_port() for name in ("dashboard", *agents)}


def _added(cluster: Any, **arguments: Any) -> Any:
    """A node that is there; of one that was not there in time nothing is left, or it would come late and unknown."""
    for left in reversed(range(_TRIES)):
        with _begun() as nodes:
            try:
                return cluster.add_node(**_agent_ports(), **arguments)
            except Exception:  # Ray raises that very class
                for node in nodes:
                    _end(cluster, node)
                if not left:
                    raise
    raise AssertionError("not reached")


@contextlib.contextmanager
def _begun() -> Iterator[list[Any]]:
    """Ray's nodes that are made in the block, also those whose making fails half way: their processes run."""
    from ray._private.node import Node

    made: list[Any] = []
    start = Node.__init__

    def remembered(node: Any, *arguments: Any, **options: Any) -> None:
        made.append(node)
        start(node, *arguments, **options)

    Node.__init__ = remembered
    try:
        yield made
    finally:
        Node.__init__ = start


def _end(cluster: Any, node: Any) -> None:
    with contextlib.suppress(Exception):  # of one that did not get far there is not everything to end
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
    cluster.worker_nodes.discard(node)
    if cluster.head_node is node:
        cluster.head_node = None


def _answer(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


def _free_port() -> int:
    from tests.command_line import free_port

    return free_port()


def wait_until(condition: Any, timeout_s: float, what: str, every_s: float = 0.5) -> Any:
    """The first true value of a condition; raises `AssertionError` where there is none in time."""
    end = time.monotonic() + timeout_s
    while True:
        if value := condition():
            return value
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {timeout_s:g} s")
        time.sleep(every_s)


if __name__ == "__main__":
    main()
