"""How many threads train workers and teacher replicas compute with where the config does not say.

On one machine they share its cores. On a cluster the driver's machine says nothing about those that compute: with pools
the slots of a node share its CPUs; without, all that compute at the same time must find theirs at once, beside the
services that are there. While the nodes are still to come it is one, with a warning: more might be waited for for ever.
"""

import logging
from dataclasses import dataclass
from functools import cache

from cluster.connection import Connection
from cluster.placement import NodeShape, cluster_nodes
from cluster.pools import Pool, PoolsConfig, most, slot
from cluster.resources import threads_each
from jobs.config import RunConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Threads:
    """Of each process, which are also the CPUs that Ray keeps for it."""

    worker: int
    replica: int
    teacher_worker: int
    """Of a training of the teacher itself."""


def threads_of(config: RunConfig, connection: Connection | None = None) -> Threads:
    """As the config says, and by default after the nodes that hold the processes.

    Args:
        connection: without one, and on an embedded Ray, it is this machine that computes.
    """
    if connection is None or connection.embedded:
        return threads_on([], None, config)
    return threads_on(cluster_nodes(), connection.pools, config)


def threads_on(nodes: list[NodeShape], pools: PoolsConfig | None, config: RunConfig) -> Threads:
    """The same for nodes that are known. None at all, or those of one machine, which then is this: its cores decide."""
    train, teacher = config.train, config.teacher
    of_teacher = teacher.train if teacher is not None else None
    replicas = teacher.replicas if teacher is not None and config.distils else 0
    of_worker, of_replica = float(train.use_gpu), teacher.num_gpus if teacher is not None else 0.0
    together, alone = most(train.num_workers) + replicas, most(of_teacher.num_workers) if of_teacher is not None else 1

    def default(pool: Pool, gpus: float, processes: int, key: str | None) -> int:
        if _is_this_machine(nodes, pools, pool):
            return threads_each(processes)
        found = _of_slots(nodes, pools, pool, gpus) if pools is not None else _of_shares(nodes, gpus, processes)
        if not found and key is not None:
            _say_guess(key, f"a node with {slot(pool)}" if pools is not None else f"CPUs for {processes} at once")
        return found or 1

    return Threads(
        worker=train.threads_per_worker or default("student", of_worker, together, "train.threads_per_worker"),
        replica=(teacher.threads_per_replica if teacher is not None else None)
        or default("teacher", of_replica, together, "teacher.threads_per_replica" if replicas else None),
        teacher_worker=(of_teacher.threads_per_worker if of_teacher is not None else None)
        or default(
            "student",
            float(of_teacher is not None and of_teacher.use_gpu),
            alone,
            "teacher.train.threads_per_worker" if of_teacher is not None else None,
        ),
    )


def _is_this_machine(nodes: list[NodeShape], pools: PoolsConfig | None, pool: Pool) -> bool:
    """Whether the only machine there is computes. A head that has no CPUs, or no slot, waits for nodes that do."""
    if not nodes:
        return True
    needed = "CPU" if pools is None else slot(pool)
    one = len({node.host for node in nodes}) == 1 and nodes[0].host is not None
    return one and any(node.resources.get(needed) for node in nodes)


@cache
def _say_guess(key: str, missing: str) -> None:
    logger.warning("%s=1, since the cluster does not have %s yet: set it to what a node can give each", key, missing)


def _of_slots(nodes: list[NodeShape], pools: PoolsConfig, pool: Pool, gpus: float) -> int:
    """A slot's share of the CPUs, on the node of the pool where it is least; 0 if the pool has no node.

    The slots of teachers and students on a node share what a CPU for each of the endpoint's leaves.
    """
    other, shares = slot("student" if pool == "teacher" else "teacher"), []
    for node in nodes:
        if own := node.places({slot(pool): 1.0, "GPU": gpus, "CPU": 1.0}, pools.labels(pool)):
            left = node.resources["CPU"] - node.resources.get(slot("endpoint"), 0.0)
            shares.append(max(1, int(left / (own + node.resources.get(other, 0.0)))))
    return min(shares, default=0)


def _of_shares(nodes: list[NodeShape], gpus: float, processes: int) -> int:
    """What each of so many processes can have at the same time, beside the services that are there: a GPU's share of
    the CPUs, or, where they use none, as many CPUs as leave room for all, if possible on nodes without GPUs; 0 if there
    is none."""
    nodes = [node.beside_services() for node in nodes]
    if gpus:
        places = [(node, node.places({"GPU": gpus, "CPU": 1.0}, {})) for node in nodes]
        return min((int(node.resources["CPU"] / count) for node, count in places if count), default=0)
    for able in ([node for node in nodes if not node.resources.get("GPU")], nodes):
        for threads in range(int(max((node.resources.get("CPU", 0.0) for node in able), default=0)), 0, -1):
            if sum(node.count * node.places({"CPU": float(threads)}, {}) for node in able) >= processes:
                return threads
    return 0
