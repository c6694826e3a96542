"""Checkpoints: everything a run needs to go on as if it had never stopped, without a pickle anywhere.

A checkpoint is a published directory (manifest last, sha256 of every file): the student as a Hugging Face directory,
the optimiser's moments as safetensors, and `state.json` with the cursor and what was counted so far. Step 0 is the
initial student, so that starting and resuming are the same thing. There is no random state to keep: the order of rows
and the dropout of a step are functions of the seed and the step. One that does not match its manifest is skipped with a
warning, for the one before it; one of another config is refused.

Training waits while a checkpoint is written to a local directory, and goes on while one thread uploads it.
"""

import json
import logging
import re
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cluster.config import fingerprint
from cluster.errors import ConfigError, CorruptArtifact, StorageError
from cluster.published import MANIFEST, delete_directory, fetch_directory, publish_directory, read_manifest
from cluster.storage import Storage

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """What is counted over a run, from its first step, whatever interrupted it."""

    step: int = 0
    """Optimiser steps done; the cursor is `step * global_batch` rows."""
    cursor: dict[str, int] = field(default_factory=lambda: {"epoch": 0, "position": 0})
    losses: list[float] = field(default_factory=list)
    cross_entropies: list[float] = field(default_factory=list)
    """The parts of the losses, step by step; divergences stay empty while there is no teacher."""
    divergences: list[float] = field(default_factory=list)
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
    asked_tokens: int = 0
    asked_positions: int = 0
    """Of micro-batches that the teacher answered."""
    labelled_rows: int = 0
    """Rows whose signal was a stored label."""
    store_read_bytes: int = 0
    store_written_bytes: int = 0
    store_retries: int = 0
    """Of rows, labels and checkpoints, over all workers."""
    train_s: float = 0.0
    parts_s: dict[str, float] = field(default_factory=dict)
    """What `train_s` went into, on the leading worker (`timing.PARTS`)."""
    validation: list[list[float]] = field(default_factory=list)
    """Pairs of step and held-out bits per byte."""


class Checkpoints:
    """The checkpoints of one training, below a prefix of the run's storage. Use it as a context: the end waits.

    Args:
        keep: how many to keep besides the newest and the best; others are removed once a newer one is whole.
        config: what decides the result of the training, as JSON; None reads checkpoints of any config.
    """

    def __init__(self, storage: Storage, prefix: str, keep: int, config: dict[str, Any] | None = None) -> None:
        self._storage, self._prefix, self._keep, self._config = storage, prefix, keep, config
        self._uploader = ThreadPoolExecutor(1, "checkpoint")
        self._upload: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.wait()
        except Exception as lost:
            if error is None:
                raise
            logger.warning("the last checkpoint was not stored: %s", lost)
        finally:
            self._uploader.shutdown()

    def save(self, model: Any, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
        """Writes a checkpoint of this step to a local directory and begins its upload. Call on one worker only.

        Waits for the upload before it, and raises what that one failed with.
        """
        self.wait()
        directory = Path(tempfile.mkdtemp(prefix="raystill-checkpoint-"))
        try:
            model.save_pretrained(directory / "model")
            save_file(_moments(model, optimizer), directory / "optimizer.safetensors")
            (directory / "state.json").write_text(json.dumps(asdict(state)))
        except (OSError, SafetensorError) as error:
            shutil.rmtree(directory, ignore_errors=True)
            raise StorageError(
                f"checkpoint of step {state.step}: {directory} cannot be written ({error}); free some space there, or "
                "set TMPDIR to another disk"
            ) from error
        scores = {int(step): score for step, score in state.validation}
        self._upload = self._uploader.submit(self._store, directory, state.step, scores)

    def wait(self) -> None:
        """Returns when the checkpoint saved last is stored; raises what its upload failed with, once."""
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.result()

    def steps(self) -> list[int]:
        """Steps that have a manifest, ascending."""
        return sorted(step for step, names in self._stored().items() if MANIFEST in names)

    def fetch(self, step: int | None = None) -> "Fetched | None":
        """The newest checkpoint that is whole (or exactly `step`), copied to a local directory; None if there is none.

        Raises:
            CorruptArtifact: `step` was given and does not match its manifest.
            ConfigError: it was made by a training of another config.
        """
        self.wait()
        for candidate in [step] if step is not None else reversed(self.steps()):
            directory = Path(tempfile.mkdtemp(prefix="raystill-resume-"))
            try:
                self._check_config(candidate)
                fetch_directory(self._storage, self._key(candidate), directory)
                state = TrainState(**json.loads((directory / "state.json").read_text()))
                return Fetched(directory, state)
            except (CorruptArtifact, FileNotFoundError, json.JSONDecodeError, TypeError) as error:
                shutil.rmtree(directory, ignore_errors=True)
                if step is not None:
                    raise
                logger.warning("checkpoint of step %d is skipped: %s", candidate, error)
            except BaseException:
                shutil.rmtree(directory, ignore_errors=True)
                raise
        return None

    def _store(self, directory: Path, step: int, scores: dict[int, float]) -> None:
        try:
            facts = {"config": self._config, "config_fingerprint": fingerprint(self._config)}
            publish_directory(directory, self._storage, self._key(step), **facts)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        stored = self._stored()
        whole = sorted(step for step, names in stored.items() if MANIFEST in names)
        scored = [step for step in whole if step in scores]
        best = min(scored, key=lambda step: (scores[step], step), default=None)
        for other in sorted(stored):
            if other < step and other != best and other not in whole[-1 - self._keep :]:
                delete_directory(self._storage, self._key(other))

    def _check_config(self, step: int) -> None:
        manifest = read_manifest(self._storage, self._key(step))
        if self._config is None or manifest is None:
            return
        found, wanted = manifest.get("config_fingerprint"), fingerprint(self._config)
        if found != wanted:
            differing = _differences(manifest.get("config"), json.loads(json.dumps(self._config)))
            raise ConfigError(
                f"checkpoint of step {step} in {self._storage.uri}/{self._prefix} was made with config {found}, this "
                f"training has {wanted} ({differing}): use that config again, or another storage"
            )

    def _stored(self) -> dict[int, set[str]]:
        """The files of every checkpoint, whole or not, by step."""
        pattern = re.compile(rf"{re.escape(self._prefix)}/step-(\d+)/(.+)")
        stored: dict[int, set[str]] = {}
        for item in self._storage.list(f"{self._prefix}/step-"):
            if match := pattern.fullmatch(item.key):
                stored.setdefault(int(match[1]), set()).add(match[2])
        return stored

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


def _differences(found: Any, wanted: Any, at: str = "") -> str:
    """The values in which two configs differ, as `key: found, now wanted`."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        names = sorted({*found, *wanted})
        parts = [_differences(found.get(name), wanted.get(name), f"{at}.{name}".lstrip(".")) for name in names]
        return "; ".join(part for part in parts if part)
    return "" if found == wanted else f"{at or 'config'}: {json.dumps(found)}, now {json.dumps(wanted)}"
