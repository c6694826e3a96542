"""Who may run where on a cluster: a pool of nodes for teachers, one for students, one for the endpoint.

A pool is a custom resource. Nodes are started with so many slots (`--resources '{"teacher_slot": 1}'`), each replica or
worker takes one, and so nobody takes another's place. An elastic trainer needs that: it counts what nodes hold in all,
not what is free, and would otherwise ask for more workers than can be placed beside the teachers. Labels narrow a pool.

An embedded Ray has no pools.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from cluster.config import Config, execution

Count = Annotated[int, Field(ge=1)]
WorkerCount = Count | Annotated[tuple[Count, Count], AfterValidator(lambda pair: _ordered(pair))]
"""So many workers, or as many between two numbers as there is room for at the time."""
Pool = Literal["teacher", "student", "endpoint"]


class PoolsConfig(Config):
    """Node labels, beside the slot, that a pool's nodes must have, for example `teacher_labels: {market: spot}`.

    They are those that nodes were given. Ray's own are few: `ray.io/market-type` is on no node that `ray up` made.
    """

    teacher_labels: dict[str, str] = execution({})
    student_labels: dict[str, str] = execution({})
    endpoint_labels: dict[str, str] = execution({})
    resize_every_s: float = execution(60, gt=0)
    """How often an elastic worker group looks whether it may grow; growing goes back to the last checkpoint."""

    def labels(self, pool: Pool) -> dict[str, str]:
        return dict(getattr(self, f"{pool}_labels"))


def least(count: int | tuple[int, int]) -> int:
    """How many workers there must be."""
    return count if isinstance(count, int) else count[0]


def most(count: int | tuple[int, int]) -> int:
    """How many there may be."""
    return count if isinstance(count, int) else count[1]


@contextlib.contextmanager
def waiting_for_places(count: int | tuple[int, int]) -> Iterator[None]:
    """How long Ray Train, which is run in the block, waits for the places of a worker group before it counts anew.

    A cluster that grows takes minutes to make room for a fixed number. An elastic group was counted from nodes that are
    there; one that died a moment ago still counted, and its place will never come. A time that the environment names
    stays.
    """
    if _START_TIMEOUT in os.environ:
        yield
        return
    os.environ[_START_TIMEOUT] = "600" if least(count) == most(count) else "20"
    try:
        yield
    finally:
        del os.environ[_START_TIMEOUT]


_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


def _ordered(pair: tuple[int, int]) -> tuple[int, int]:
    if pair[0] >= pair[1]:
        raise ValueError(f"found {list(pair)}; give the smaller number first, or one number")
    return pair


def slot(pool: Pool) -> str:
    """The custom resource of a pool."""
    return f"{pool}_slot"


def actor_options(pools: PoolsConfig | None, pool: Pool) -> dict[str, dict[str, float] | dict[str, str]]:
    """Options that place one replica: `resources` and `label_selector`; none without pools."""
    if pools is None:
        return {}
    labels = pools.labels(pool)
    return {"resources": {slot(pool): 1.0}, **({"label_selector": labels} if labels else {})}
