"""Whether what a run asks for can ever be placed on the nodes that a cluster has or may grow to.

Everything here is necessary for placing, so nothing that could be placed is refused. What other applications hold is
not looked at: they may end.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import PlacementError

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""On the head of a cluster that `ray up` made: its config, with the node types that it may start."""


@dataclass(frozen=True)
class NodeShape:
    """So many nodes, each with these resources and labels."""

    resources: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)
    count: int = 1
    host: str | None = None
    """Address of a living node; one that may be started has none yet."""

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

    living = [
        NodeShape(node["Resources"], node.get("Labels") or {}, host=node["NodeManagerAddress"])
        for node in ray.nodes()
        if node["Alive"]
    ]
    return [*living, *growth(BOOTSTRAP.expanduser())]


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
