"""The teacher's side of a batch: asked ahead or looked up, and turned into something to compare the student with."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from cluster.language_model import OutputHead
from cluster.storage import open_storage
from jobs.labels.store import LabelStore
from jobs.training.data import ExampleStore, MicroBatch
from jobs.training.labelled import Labels
from jobs.training.plan import TrainPlan
from jobs.training.prefetch import Prefetch
from jobs.training.targets import teacher_target
from jobs.training.targets.full import teacher_head
from jobs.training.workers import StepSums, Workers
from services.teacher.client import TeacherAnswers
from services.teacher.signals import Signal


class Signals:
    """One worker's signals. Does nothing without a teacher."""

    def __init__(
        self,
        plan: TrainPlan,
        workers: Workers,
        teacher: TeacherAnswers | None,
        student_head: OutputHead,
        dtype: torch.dtype,
        store: ExampleStore,
    ) -> None:
        self._teacher, self._workers, self._head, self._labels = teacher, workers, None, None
        self._counted = (0, 0, 0.0, 0, 0.0, 0)
        if teacher is None or plan.teacher is None:
            return
        description = teacher.describe()
        self._columns = min(description.vocab_size, student_head.vocab_size)
        spec = replace(plan.teacher.signal, vocab_size=self._columns)
        if spec.kind == "hidden":
            self._head = teacher_head(teacher.head(), workers.device, dtype)
        size = spec.bytes_per_position(description.hidden_size)
        if plan.labels is not None:
            labels = LabelStore(open_storage(plan.labels.root), description.fingerprint, spec, store)
            epoch_steps = -(-len(store) // plan.train.global_batch)
            self._labels = Labels(labels, plan.labels.reads, plan.labels.writes, epoch_steps)
        window, asker = plan.teacher.window_bytes, f"worker{workers.rank}"
        self._prefetch = Prefetch(teacher, spec, size, window, asker, plan.train.seed, self._labels)

    def with_signals(self, batches: Iterator[MicroBatch]) -> Iterator[tuple[MicroBatch, Signal | None]]:
        if self._teacher is None:
            return ((batch, None) for batch in batches)
        return self._prefetch.pairs(batches)

    def target(self, signal: Signal | None) -> Any:
        return None if signal is None else teacher_target(signal, self._columns, self._head, self._workers.device)

    def count_into(self, sums: StepSums) -> StepSums:
        """Adds what happened since the last call."""
        if self._teacher is not None:
            counters = self._teacher.counters
            asked = self._prefetch
            asked_s = (asked.waited_s, asked.received_bytes, asked.teacher_s, asked.labelled_rows)
            now = (counters.calls, counters.retries, *asked_s)
            new = [after - before for after, before in zip(now, self._counted, strict=True)]
            sums.teacher_calls, sums.retries = new[:2]
            sums.teacher_wait_s, sums.signal_bytes, sums.teacher_s, sums.labelled_rows = new[2:]
            self._counted = now
        return sums

    def close(self) -> None:
        """Keeps what has not been written yet."""
        if self._labels is not None:
            self._labels.close()
