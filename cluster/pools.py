"""Who may run where on a cluster: a pool of nodes for teachers, one for students, one for the endpoint.

A pool is a custom resource. Nodes are started with so many slots (`--resources '{"teacher_slot": 1}'`), each replica or
worker takes one, and so nobody takes another's place. An elastic trainer needs that: it counts what nodes hold in all,
not what is free, and would otherwise ask for more workers than can be placed beside the teachers. Labels narrow a pool.

An embedded Ray has no pools.
"""

from typing import Literal

from cluster.config import Config, execution

Pool = Literal["teacher", "student", "endpoint"]


class PoolsConfig(Config):
    """Node labels, beside the slot, that a pool's nodes must have, for example `{ray.io/market-type: spot}`."""

    teacher_labels: dict[str, str] = execution({})
    student_labels: dict[str, str] = execution({})
    endpoint_labels: dict[str, str] = execution({})

    def labels(self, pool: Pool) -> dict[str, str]:
        return dict(getattr(self, f"{pool}_labels"))


def slot(pool: Pool) -> str:
    """The custom resource of a pool."""
    return f"{pool}_slot"


def actor_options(pools: PoolsConfig | None, pool: Pool) -> dict[str, dict[str, float] | dict[str, str]]:
    """Options that place one replica: `resources` and `label_selector`; none without pools."""
    if pools is None:
        return {}
    labels = pools.labels(pool)
    return {"resources": {slot(pool): 1.0}, **({"label_selector": labels} if labels else {})}
