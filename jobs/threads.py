"""How many threads train workers and teacher replicas compute with where the config does not say.

On one machine they share its cores. On a cluster the driver's machine says nothing about those that compute: with pools
the slots of a node share its CPUs; without, all that compute at the same time must find theirs at once.
"""

from dataclasses import dataclass

from cluster.connection import Connection
from cluster.placement import NodeShape, cluster_nodes
from cluster.pools import Pool, PoolsConfig, most, slot
from cluster.resources import threads_each
from jobs.config import RunConfig


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
    if len({node.host for node in nodes}) == 1 and nodes[0].host is not None:
        nodes = []
    train, teacher = config.train, config.teacher
    of_teacher = teacher.train if teacher is not None else None
    replicas = teacher.replicas if teacher is not None and config.distils else 0
    of_worker, of_replica = float(train.use_gpu), teacher.num_gpus if teacher is not None else 0.0
    together, alone = most(train.num_workers) + replicas, most(of_teacher.num_workers) if of_teacher is not None else 1

    def default(pool: Pool, gpus: float, processes: int) -> int:
        found = _of_slots(nodes, pools, pool, gpus) if pools is not None else _of_shares(nodes, gpus, processes)
        return found or threads_each(processes)  # where such nodes are still to come, a guess

    return Threads(
        worker=train.threads_per_worker or default("student", of_worker, together),
        replica=(teacher.threads_per_replica if teacher is not None else None)
        or default("teacher", of_replica, together),
        teacher_worker=(of_teacher.threads_per_worker if of_teacher is not None else None)
        or default("student", float(of_teacher is not None and of_teacher.use_gpu), alone),
    )


def _of_slots(nodes: list[NodeShape], pools: PoolsConfig, pool: Pool, gpus: float) -> int:
    """A slot's share of the CPUs, on the node of the pool where it is least; 0 if the pool has no node."""
    return _least_share(nodes, {slot(pool): 1.0, "GPU": gpus}, pools.labels(pool))


def _of_shares(nodes: list[NodeShape], gpus: float, processes: int) -> int:
    """What each of so many processes can have at the same time: a GPU's share of the CPUs, or, where they use none, as
    many CPUs as leave room for all, if possible on nodes without GPUs; 0 if there is none."""
    if gpus:
        return _least_share(nodes, {"GPU": gpus}, {})
    for able in ([node for node in nodes if not node.resources.get("GPU")], nodes):
        for threads in range(int(max((node.resources.get("CPU", 0.0) for node in able), default=0)), 0, -1):
            if sum(node.count * node.places({"CPU": float(threads)}, {}) for node in able) >= processes:
                return threads
    return 0


def _least_share(nodes: list[NodeShape], wanted: dict[str, float], labels: dict[str, str]) -> int:
    places = [(node, node.places({**wanted, "CPU": 1.0}, labels)) for node in nodes]
    return min((int(node.resources["CPU"] // count) for node, count in places if count), default=0)
