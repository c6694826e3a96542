"""Whether what a run asks for can ever be placed on the nodes that a cluster has or may grow to.

Everything here is necessary for placing, so nothing that could be placed is refused. What others hold is not looked at
then: they may end. Who chooses how much to ask for leaves a service what it holds, since it stays.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import PlacementError

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""On the head of a cluster that `ray up` made: its config, with the node types that it may start."""
TEACHER_OF_A_RUN = "teacher-"
"""Beginning of the names of Serve applications that end with the run that started them."""


@dataclass(frozen=True)
class NodeShape:
    """So many nodes, each with these resources and labels."""

    resources: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)
    count: int = 1
    host: str | None = None
    """Address of a living node; one that may be started has none yet."""
    held_cpus: float = 0.0
    """By replicas of services that stay, such as the versions of an endpoint."""

    def beside_services(self) -> "NodeShape":
        """The node without the CPUs that such services hold."""
        left = max(0.0, self.resources.get("CPU", 0.0) - self.held_cpus)
        return replace(self, resources={**self.resources, "CPU": left}, held_cpus=0.0) if self.held_cpus else self

    def places(self, resources: dict[str, float], labels: dict[str, str]) -> int:
        """How many that take so much of each resource one node holds; 0 if its labels are others."""
        if not _has_labels(labels, self):
            return 0
        has = self.resources
        # Ray counts in ten-thousandths; 1.0 // 0.2 is 4.0, since 0.2 as a float is a little more.
        return min((int(has.get(name, 0.0) / a + 1e-9) for name, a in resources.items() if a > 0), default=10**9)


@dataclass(frozen=True)
class Demand:
    """So many replicas or workers, each of which must lie on one node.

    Args:
        role: the keys of the config that ask for them.
        resources: of each, without those of which it takes none.
    """

    role: str
    count: int
    resources: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)


def check_demands(demands: list[Demand], nodes: list[NodeShape]) -> None:
    """Raises `PlacementError` that names the resource which is missing, if the demands can never be placed together."""
    for demand in demands:
        _check_alone(demand, nodes)
    for name in sorted({name for demand in demands for name in demand.resources}):
        has = sum(node.resources.get(name, 0.0) * node.count for node in nodes)
        asked = {demand.role: demand.count * demand.resources.get(name, 0.0) for demand in demands}
        if sum(asked.values()) > has:
            parts = " + ".join(f"{amount:g} ({role})" for role, amount in asked.items() if amount)
            raise PlacementError(
                f"asked for {parts} = {sum(asked.values()):g} {name}, the cluster has {has:g}: lower the counts, or "
                "add nodes (if it grows by itself, say how far with cluster.num_cpus)"
            )


def _check_alone(demand: Demand, nodes: list[NodeShape]) -> None:
    labelled = [node for node in nodes if _has_labels(demand.labels, node)]
    wanted = ", ".join(f"{name} {amount:g}" for name, amount in demand.resources.items())
    if demand.count and not labelled:
        raise PlacementError(
            f"{demand.role}: asks for nodes labelled {demand.labels}, the cluster has none: start them with --labels, "
            "or change cluster.pools"
        )
    fits = [node for node in labelled if all(node.resources.get(n, 0.0) >= a for n, a in demand.resources.items())]
    if demand.count and not fits:
        most = {name: max(node.resources.get(name, 0.0) for node in labelled) for name in demand.resources}
        missing = [name for name, amount in demand.resources.items() if most[name] < amount]
        lacking = ", ".join(f"{name} (the most is {most[name]:g})" for name in missing)
        reason = f"no node has enough {lacking}" if missing else "no node has all of it at once"
        raise PlacementError(
            f"{demand.role}: each needs {wanted} on one node, {reason}: ask for less, or add such nodes "
            "(`ray start --resources ...`; if the cluster grows by itself, say how far with cluster.num_cpus)"
        )
    room = sum(node.count * node.places(demand.resources, demand.labels) for node in fits)
    if room < demand.count:
        raise PlacementError(
            f"{demand.role}: {demand.count} with {wanted} each, the cluster has room for {room}: lower the count, or "
            "add nodes (if it grows by itself, say how far with cluster.num_cpus)"
        )


def _has_labels(labels: dict[str, str], node: NodeShape) -> bool:
    """Plain values are compared; Ray's operators (`!x`, `in(a,b)`) are left to Ray."""
    plain = {name: value for name, value in labels.items() if not value.startswith(("!", "in("))}
    return all(node.labels.get(name) == value for name, value in plain.items())


def cluster_nodes() -> list[NodeShape]:
    """The living nodes of the connected Ray, and those that its autoscaler may start as far as this node knows."""
    import ray

    held = _held_cpus(_services())
    living = [
        NodeShape(
            node["Resources"],
            node.get("Labels") or {},
            host=node["NodeManagerAddress"],
            held_cpus=held[node["NodeManagerAddress"]],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return [*living, *growth(BOOTSTRAP.expanduser())]


def _services() -> dict[str, Any]:
    """Serve's details of each application, by name; none where Serve does not run."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    return client.get_serve_details()["applications"] if client is not None else {}


def _held_cpus(applications: dict[str, Any]) -> Counter[str]:
    """CPUs of the replicas of all applications but the teachers of runs, by address of their node."""
    held: Counter[str] = Counter()
    for name, application in applications.items():
        if name.startswith(TEACHER_OF_A_RUN):
            continue
        for deployment in application["deployments"].values():
            each = (deployment["deployment_config"].get("ray_actor_options") or {}).get("num_cpus", 1)
            for replica in deployment["replicas"]:
                if replica["node_ip"]:  # one that starts has no node yet
                    held[replica["node_ip"]] += each
    return held


def growth(path: Path) -> list[NodeShape]:
    """The node types of a cluster config of `ray up`, each as often as it may be started; none without the file."""
    if not path.is_file():
        return []
    config: Any = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    head = config.get("head_node_type")
    return [
        NodeShape(kind.get("resources") or {}, kind.get("labels") or {}, int(kind.get("max_workers", 0)))
        for name, kind in (config.get("available_node_types") or {}).items()
        if name != head and int(kind.get("max_workers", 0)) > 0
    ]
