"""Labels in the place of the teacher's answers, and answers kept as labels."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from jobs.labels.store import Label, LabelStore, labels_of
from jobs.training.data import MicroBatch, RowId
from services.teacher.signals import Signal, joined, num_bytes

_READERS = 8
_PIECE_BYTES = 32 << 20
"""Of answers that are written together."""
_PATIENCE_S = 60.0
"""How long another worker may take to write what it was told in an earlier epoch."""


class NotLabelled(LookupError):
    """A row has no label after all."""


class Labels:
    """What one worker reads from a label store and writes to it.

    Args:
        reads: whether labels are looked for.
        writes: whether answers of the teacher are kept.
        epoch_steps: optimiser steps after which every row has been seen by some worker.
    """

    def __init__(self, store: LabelStore, reads: bool, writes: bool, epoch_steps: int) -> None:
        self._store, self._reads, self._writes, self._epoch_steps = store, reads, writes, epoch_steps
        self._kept: dict[RowId, Label] = {}
        self._kept_bytes = 0
        self._unwritten: list[dict[RowId, Label]] = []
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="labels")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="label-writer")
        self._pieces: list[Future[None]] = []

    def find(self, batch: MicroBatch) -> Future[Signal] | None:
        """The signal of a micro-batch all of whose rows have a label, or will have; None if the teacher must be asked.

        The future may raise `NotLabelled`.
        """
        if not self._reads:
            return None
        if all(self._has(row) for row in batch.row_ids):
            return self._readers.submit(self._read, batch)
        if self._writes and batch.step >= self._epoch_steps:
            return self._readers.submit(self._wait_and_read, batch)
        return None

    def keep(self, batch: MicroBatch, signal: Signal) -> None:
        """Takes in what the teacher said; written when enough has come together, and when an epoch ends."""
        if not self._writes:
            return
        for label in labels_of(batch, signal):
            if not self._has(label.row):
                self._kept[label.row] = label
                self._kept_bytes += num_bytes(label.signal)
        if self._kept_bytes >= _PIECE_BYTES or (batch.step + 1) % self._epoch_steps == 0:
            self.flush()

    def flush(self) -> None:
        """Begins to write what has been kept.

        Raises:
            StorageError: an earlier piece could not be written.
        """
        for piece in [piece for piece in self._pieces if piece.done()]:
            piece.result()
            self._pieces.remove(piece)
        if self._kept:
            labels, self._kept, self._kept_bytes = self._kept, {}, 0
            self._unwritten.append(labels)
            self._pieces.append(self._writer.submit(self._write, labels))

    def close(self) -> None:
        """Writes what is left and waits for it."""
        self.flush()
        self._writer.shutdown()
        self._readers.shutdown(cancel_futures=True)
        for piece in self._pieces:
            piece.result()

    def _has(self, row: RowId) -> bool:
        return self._in_memory(row) is not None or row in self._store

    def _in_memory(self, row: RowId) -> Label | None:
        return next((labels[row] for labels in (self._kept, *self._unwritten) if row in labels), None)

    def _write(self, labels: dict[RowId, Label]) -> None:
        self._store.write(list(labels.values()))
        self._store.refresh()
        self._unwritten.remove(labels)

    def _wait_and_read(self, batch: MicroBatch) -> Signal:
        """For rows that another worker has been told about, and is writing."""
        deadline = time.monotonic() + _PATIENCE_S
        while not all(self._has(row) for row in batch.row_ids):
            if time.monotonic() > deadline:
                raise NotLabelled(f"rows of step {batch.step} have no label")
            time.sleep(0.2)
            self._store.refresh()
        return self._read(batch)

    def _read(self, batch: MicroBatch) -> Signal:
        labels = [self._label(row) for row in batch.row_ids]
        positions = _positions(batch, labels)
        if not np.array_equal(positions, batch.positions):
            raise NotLabelled(f"labels of step {batch.step} are of other positions than the rows have now")
        return joined([label.signal for label in labels])

    def _label(self, row: RowId) -> Label:
        return self._in_memory(row) or self._store.read(row)


def _positions(batch: MicroBatch, labels: Sequence[Label]) -> np.ndarray:
    starts = np.cumsum(batch.row_lengths) - batch.row_lengths
    return np.concatenate([start + label.positions for start, label in zip(starts, labels, strict=True)])
