"""The teacher's side of a batch: asked ahead or looked up, and turned into something to compare the student with."""

import logging
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

logger = logging.getLogger(__name__)


class Signals:
    """One worker's signals, from a first step on. Does nothing without a teacher. Use it as a context: the end keeps
    the labels that have not been written."""

    def __init__(
        self,
        plan: TrainPlan,
        workers: Workers,
        teacher: TeacherAnswers | None,
        student_head: OutputHead,
        dtype: torch.dtype,
        store: ExampleStore,
        first_step: int,
    ) -> None:
        self._teacher, self._workers, self._head, self._labels = teacher, workers, None, None
        self._counted = (0, 0, 0.0, 0, 0.0, 0, 0, 0)
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
            self._labels = Labels(labels, plan.labels.reads, plan.labels.writes, epoch_steps, first_step)
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
            answers = (asked.received_bytes, asked.teacher_s, asked.asked_tokens, asked.asked_positions)
            now = (counters.calls, counters.retries, asked.waited_s, *answers, asked.labelled_rows)
            new = [after - before for after, before in zip(now, self._counted, strict=True)]
            sums.teacher_calls, sums.retries, sums.teacher_wait_s = new[:3]
            sums.signal_bytes, sums.teacher_s, sums.asked_tokens, sums.asked_positions, sums.labelled_rows = new[3:]
            self._counted = now
        return sums

    def __enter__(self) -> "Signals":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._labels is None:
            return
        try:
            self._labels.close()
        except Exception as lost:
            if error is None:
                raise
            logger.warning("some labels were not stored: %s", lost)
