"""What a stage of a run is, and what it is given."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cluster.connection import Connection
from cluster.storage import Storage
from cluster.tracking import Tracker
from jobs.config import RunConfig
from jobs.progress import Bar

Output = dict[str, Any]


@dataclass
class Run:
    """A run in progress: its config, where it writes, what its stages gave so far."""

    config: RunConfig
    storage: Storage
    asked: tuple[str, ...] = ()
    """Stages that were asked for by name."""
    force: bool = False
    """Promote whatever the gate says."""
    outputs: dict[str, Output] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    connection: Connection | None = None
    tracker: Tracker | None = None

    @property
    def cluster(self) -> Connection:
        assert self.connection is not None, "this stage needs a connected cluster"
        return self.connection

    @property
    def store_prefix(self) -> str:
        return str(self.outputs["prepare"]["store"])

    @property
    def tokenizer(self) -> str:
        return str(self.outputs["prepare"]["tokenizer"])

    @property
    def teacher_model(self) -> str | None:
        return self.outputs["teacher"].get("model")

    def track(self, prefix: str) -> Callable[[int, dict[str, float]], None]:
        """A sink for a training's metrics."""
        return lambda step, metrics: (
            self.tracker.metrics({f"{prefix}{name}": value for name, value in metrics.items()}, step)
            if self.tracker is not None
            else None
        )


@dataclass(frozen=True)
class Stage:
    name: str
    key: Callable[[Run], str]
    work: Callable[[Run, Bar], Output]
    is_there: Callable[[Run, Output], bool] = lambda run, output: True
    """Whether what the stage made still exists. Only looked for, not read: who uses it checks its hashes."""
    needs_cluster: Callable[[Run], bool] = lambda run: True
    applies: Callable[[Run], bool] = lambda run: True
    """Whether there is something to do for this config."""
    decides: bool = True
    """Whether later stages must be done again after it; one that only helps is left out where it does not apply."""
