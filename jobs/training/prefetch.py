"""Asking the teacher ahead of the student: requests in flight and answers waiting are bounded in bytes.

Off-policy data do not go stale, so any depth is allowed; the bound is memory. The window runs across the borders of
optimiser steps, and answers come out in the order of the micro-batches whatever order they arrive in.
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from jobs.training.data import MicroBatch
from jobs.training.labelled import Labels, NotLabelled
from services.teacher.client import TeacherAnswers
from services.teacher.schema import ScoreReply, ScoreRequest
from services.teacher.signals import Signal, SignalSpec, num_bytes


@dataclass(frozen=True)
class _Asked:
    """A micro-batch whose signal is on its way: as a stored label, or as an answer of the teacher; with neither, a
    label of it is expected."""

    batch: MicroBatch
    number: int
    size: int
    label: Future[Signal] | None
    answer: Future[ScoreReply] | None

    def cancel(self) -> None:
        for future in (self.label, self.answer):
            if future is not None:
                future.cancel()


@dataclass
class Prefetch:
    """Pairs micro-batches with the teacher's signals.

    Args:
        teacher: who is asked.
        spec: the signal wanted.
        bytes_per_position: of an answer.
        window_bytes: bound on answers asked for and not yet taken up, besides the one that is handed out next; one
            request is always allowed, so that the teacher works while the student trains whatever the bound.
        asker: a name that makes request ids unique, for example the worker's rank.
        seed: what is drawn from the teacher follows from it, the step and the tokens.
    """

    teacher: TeacherAnswers
    spec: SignalSpec
    bytes_per_position: int
    window_bytes: int
    asker: str
    seed: int = 0
    labels: Labels | None = None
    """Looked up before the teacher is asked, and told what it says."""
    waited_s: float = 0.0
    """Time the student spent waiting for answers and stored labels."""
    received_bytes: int = 0
    teacher_s: float = 0.0
    """Time that replicas spent on the answers."""
    asked_tokens: int = 0
    asked_positions: int = 0
    """Of micro-batches that the teacher answered."""
    labelled_rows: int = 0
    """Rows whose signal was a stored label."""

    def pairs(self, batches: Iterator[MicroBatch]) -> Iterator[tuple[MicroBatch, Signal]]:
        """Every micro-batch with its signal, in order. What is still asked when the caller stops is cancelled."""
        waiting: deque[_Asked] = deque()
        in_flight_bytes, number = 0, 0
        upcoming = next(batches, None)
        ready: tuple[MicroBatch, Signal] | None = None
        self.teacher.counters.waited_s = self.teacher.counters.waited_s or 0.0
        try:
            while waiting or upcoming is not None or ready is not None:
                while upcoming is not None:
                    size = len(upcoming.positions) * self.bytes_per_position
                    if waiting and in_flight_bytes + size > self.window_bytes:
                        break
                    waiting.append(self._ask(upcoming, number, size))
                    in_flight_bytes += size
                    number += 1
                    upcoming = next(batches, None)
                if ready is not None:
                    yield ready
                    ready = None
                if waiting:
                    asked = waiting.popleft()
                    started = time.perf_counter()
                    signal = self._answer(asked)
                    self.waited_s += time.perf_counter() - started
                    ready = asked.batch, signal
                    in_flight_bytes -= asked.size
        finally:
            for asked in waiting:
                asked.cancel()

    def _ask(self, batch: MicroBatch, number: int, size: int) -> "_Asked":
        label = self.labels.find(batch) if self.labels is not None else None
        expected = label is not None or (self.labels is not None and self.labels.expects(batch))
        answer = None if expected else self.teacher.submit(self._request(batch, number))
        return _Asked(batch, number, size, label, answer)

    def _answer(self, asked: "_Asked") -> Signal:
        label = asked.label
        if self.labels is not None and label is None and asked.answer is None:
            label = self.labels.wait_for(asked.batch)
        if label is not None:
            with contextlib.suppress(NotLabelled):  # asked of the teacher after all
                signal = label.result()
                self.labelled_rows += len(asked.batch.row_ids)
                return signal
        answer = asked.answer or self.teacher.submit(self._request(asked.batch, asked.number))
        started = time.perf_counter()
        reply = answer.result()
        # From this teachers grow in number; a stored label that is late is no reason for another.
        self.teacher.counters.waited_s = (self.teacher.counters.waited_s or 0.0) + time.perf_counter() - started
        self.received_bytes += num_bytes(reply.signal)
        self.teacher_s += reply.seconds
        self.asked_tokens += len(asked.batch.token_ids)
        self.asked_positions += len(asked.batch.positions)
        if self.labels is not None:
            self.labels.keep(asked.batch, reply.signal)
        return reply.signal

    def _request(self, batch: MicroBatch, number: int) -> ScoreRequest:
        return ScoreRequest(
            request_id=f"{self.asker}-{batch.step}-{number}",
            token_ids=batch.token_ids,
            sequence_lengths=batch.sequence_lengths,
            positions=batch.positions,
            spec=self.spec,
            seed=(self.seed + batch.step) % 2**32,  # no sequence is drawn for twice alike
        )
