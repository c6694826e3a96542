"""Checkpoints: everything a run needs to go on as if it had never stopped, without a pickle anywhere.

A checkpoint is a published directory (manifest last, sha256 of every file): the student as a Hugging Face directory,
the optimiser's moments as safetensors, and `state.json` with the cursor and what was counted so far. Step 0 is the
initial student, so that starting and resuming are the same thing. One that does not match its manifest is skipped with
a warning, for the one before it.
"""

import json
import logging
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cluster.errors import CorruptArtifact
from cluster.published import MANIFEST, fetch_directory, publish_directory
from cluster.storage import Storage

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """What is counted over a run, from its first step, whatever interrupted it."""

    step: int = 0
    """Optimiser steps done; the cursor is `step * global_batch` rows."""
    cursor: dict[str, int] = field(default_factory=lambda: {"epoch": 0, "position": 0})
    losses: list[float] = field(default_factory=list)
    rows: int = 0
    tokens: int = 0
    positions: int = 0
    """Tokens that the loss was taken of."""
    rows_checksum: int = 0
    """Sum of 32-bit hashes of the ids of all rows trained on: equal sums, equal rows, in any order."""
    teacher_calls: int = 0
    retries: int = 0
    teacher_wait_s: float = 0.0
    signal_bytes: int = 0
    teacher_s: float = 0.0
    """Time that replicas spent on the answers, added up."""
    labelled_rows: int = 0
    """Rows whose signal was a stored label."""
    train_s: float = 0.0
    parts_s: dict[str, float] = field(default_factory=dict)
    """What `train_s` went into, on the leading worker (`timing.PARTS`)."""
    validation: list[list[float]] = field(default_factory=list)
    """Pairs of step and held-out bits per byte."""


class Checkpoints:
    """The checkpoints of one training, below a prefix of the run's storage.

    Args:
        keep: how many to keep besides the newest; older ones are removed once a newer one is whole.
    """

    def __init__(self, storage: Storage, prefix: str, keep: int) -> None:
        self._storage, self._prefix, self._keep = storage, prefix, keep

    def save(self, model: Any, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
        """Publishes a checkpoint of this step. Call on one worker only."""
        with tempfile.TemporaryDirectory(prefix="raystill-checkpoint-") as name:
            directory = Path(name)
            model.save_pretrained(directory / "model")
            save_file(_moments(model, optimizer), directory / "optimizer.safetensors")
            (directory / "state.json").write_text(json.dumps(asdict(state)))
            publish_directory(directory, self._storage, self._key(state.step))
        for step in self.steps()[: -1 - self._keep]:
            self._storage.delete(self._key(step))

    def steps(self) -> list[int]:
        """Steps that have a manifest, ascending."""
        pattern = re.compile(rf"{re.escape(self._prefix)}/step-(\d+)/{re.escape(MANIFEST)}")
        found = (pattern.fullmatch(item.key) for item in self._storage.list(f"{self._prefix}/step-"))
        return sorted(int(match[1]) for match in found if match)

    def fetch(self, step: int | None = None) -> "Fetched | None":
        """The newest checkpoint that is whole (or exactly `step`), copied to a local directory; None if there is none.

        Raises:
            CorruptArtifact: `step` was given and does not match its manifest.
        """
        for candidate in [step] if step is not None else reversed(self.steps()):
            directory = Path(tempfile.mkdtemp(prefix="raystill-resume-"))
            try:
                fetch_directory(self._storage, self._key(candidate), directory)
                state = TrainState(**json.loads((directory / "state.json").read_text()))
                return Fetched(directory, state)
            except (CorruptArtifact, FileNotFoundError, json.JSONDecodeError, TypeError) as error:
                shutil.rmtree(directory, ignore_errors=True)
                if step is not None:
                    raise
                logger.warning("checkpoint of step %d is skipped: %s", candidate, error)
        return None

    def _key(self, step: int) -> str:
        return f"{self._prefix}/step-{step:08d}"


@dataclass(frozen=True)
class Fetched:
    """A verified local copy of a checkpoint; `discard` it when loaded."""

    directory: Path
    state: TrainState

    @property
    def model(self) -> Path:
        return self.directory / "model"

    def restore_moments(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        """Puts the optimiser's moments back, by parameter name."""
        moments = load_file(self.directory / "optimizer.safetensors")
        for name, parameter in model.named_parameters():
            found = {
                key.removeprefix(f"{name}:"): value.to(parameter.device)  # a fused optimiser counts its steps there too
                for key, value in moments.items()
                if key.startswith(f"{name}:")
            }
            if found:
                optimizer.state[parameter].update(found)

    def discard(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


def _moments(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}:{key}": value.detach().contiguous().cpu()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
