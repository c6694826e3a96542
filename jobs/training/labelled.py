"""Labels in the place of the teacher's answers, and answers kept as labels."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from cluster.errors import CorruptArtifact
from jobs.labels.store import Label, LabelStore, labels_of
from jobs.training.data import MicroBatch, RowId
from services.teacher.signals import Signal, joined, num_bytes

logger = logging.getLogger(__name__)

_READERS = 8
_PIECE_BYTES = 32 << 20
"""Of answers that are written together."""
_PIECES_AT_ONCE = 2
"""Pieces that wait to be written; then training waits for the storage."""
_PATIENCE_S = 60.0
"""How long another worker may take to write what it was told in an earlier epoch."""


class NotLabelled(LookupError):
    """A row has no label after all."""


class Labels:
    """What one worker reads from a label store and writes to it; `close` writes what is left.

    Args:
        reads: whether labels are looked for.
        writes: whether answers of the teacher are kept.
        epoch_steps: optimiser steps after which every row has been seen by some worker.
        first_step: of this training, since it was started or taken up.
    """

    def __init__(self, store: LabelStore, reads: bool, writes: bool, epoch_steps: int, first_step: int = 0) -> None:
        self._store, self._reads, self._writes = store, reads, writes
        self._epoch_steps, self._first_step, self._patience_s = epoch_steps, first_step, _PATIENCE_S
        self._kept: dict[RowId, Label] = {}
        self._kept_bytes = 0
        self._unwritten: list[dict[RowId, Label]] = []
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="labels")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="label-writer")
        self._pieces: list[Future[None]] = []

    def find(self, batch: MicroBatch) -> Future[Signal] | None:
        """The signal of a micro-batch all of whose rows have a label; None if one has none.

        The future may raise `NotLabelled`: labels of other positions, or damaged ones while there is a teacher to ask.
        """
        if self._reads and all(self._has(row) for row in batch.row_ids):
            return self._readers.submit(self._read, batch)
        return None

    def expects(self, batch: MicroBatch) -> bool:
        """Whether some worker was told about these rows an epoch ago, so that they will have a label."""
        return self._reads and self._writes and batch.step - self._epoch_steps >= self._first_step

    def wait_for(self, batch: MicroBatch) -> Future[Signal] | None:
        """As `find`, for a batch that is expected: gives who writes it some time."""
        deadline = time.monotonic() + self._patience_s
        while (found := self.find(batch)) is None:
            if time.monotonic() >= deadline:
                self._patience_s = 0.0  # once is enough
                return None
            time.sleep(0.2)
            self._store.refresh()
        return found

    def keep(self, batch: MicroBatch, signal: Signal) -> None:
        """Takes in what the teacher said; written when enough has come together, and when an epoch ends.

        Raises:
            StorageError: an earlier piece could not be written.
        """
        if not self._writes:
            return
        for label in labels_of(batch, signal):
            if not self._has(label.row):
                self._kept[label.row] = label
                self._kept_bytes += num_bytes(label.signal)
        if self._kept_bytes >= _PIECE_BYTES or (batch.step + 1) % self._epoch_steps == 0:
            self._flush()

    def close(self) -> None:
        """Writes what is left and waits for it."""
        self._flush()
        self._readers.shutdown(cancel_futures=True)
        self._writer.shutdown()
        for piece in self._pieces:
            piece.result()

    def _flush(self) -> None:
        if self._kept:
            labels = self._kept
            self._unwritten.append(labels)  # first, so that a reader finds them at any time
            self._kept, self._kept_bytes = {}, 0
            self._pieces.append(self._writer.submit(self._write, labels))
        while len(self._pieces) > _PIECES_AT_ONCE or (self._pieces and self._pieces[0].done()):
            self._pieces.pop(0).result()

    def _has(self, row: RowId) -> bool:
        return self._in_memory(row) is not None or row in self._store

    def _in_memory(self, row: RowId) -> Label | None:
        return next((labels[row] for labels in (self._kept, *self._unwritten) if row in labels), None)

    def _write(self, labels: dict[RowId, Label]) -> None:
        self._store.write(list(labels.values()))
        self._store.refresh()
        self._unwritten.remove(labels)

    def _read(self, batch: MicroBatch) -> Signal:
        try:
            labels = [self._in_memory(row) or self._store.read(row) for row in batch.row_ids]
        except CorruptArtifact as error:
            if not self._writes:  # nobody to ask
                raise
            logger.warning("asking the teacher again: %s", error)
            raise NotLabelled(str(error)) from error
        if not np.array_equal(_positions(batch, labels), batch.positions):
            raise NotLabelled(f"labels of step {batch.step} are of other positions than the rows have now")
        return joined([label.signal for label in labels])


def _positions(batch: MicroBatch, labels: Sequence[Label]) -> np.ndarray:
    starts = np.cumsum(batch.row_lengths) - batch.row_lengths
    return np.concatenate([start + label.positions for start, label in zip(starts, labels, strict=True)])
