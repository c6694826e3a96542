"""Asking the teacher ahead of the student: requests in flight and answers waiting are bounded in bytes.

Off-policy data do not go stale, so any depth is allowed; the bound is memory. The window runs across the borders of
optimiser steps, and answers come out in the order of the micro-batches whatever order they arrive in.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from jobs.training.data import MicroBatch
from services.teacher.client import TeacherAnswers
from services.teacher.schema import ScoreReply, ScoreRequest
from services.teacher.signals import Signal, SignalSpec, num_bytes


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
    waited_s: float = 0.0
    """Time the student spent waiting for answers."""
    received_bytes: int = 0
    teacher_s: float = 0.0
    """Time that replicas spent on the answers."""

    def pairs(self, batches: Iterator[MicroBatch]) -> Iterator[tuple[MicroBatch, Signal]]:
        """Every micro-batch with its signal, in order. What is still asked when the caller stops is cancelled."""
        waiting: deque[tuple[MicroBatch, Future[ScoreReply], int]] = deque()
        in_flight_bytes, number = 0, 0
        upcoming = next(batches, None)
        ready: tuple[MicroBatch, Signal] | None = None
        try:
            while waiting or upcoming is not None or ready is not None:
                while upcoming is not None:
                    size = len(upcoming.positions) * self.bytes_per_position
                    if waiting and in_flight_bytes + size > self.window_bytes:
                        break
                    waiting.append((upcoming, self.teacher.submit(self._request(upcoming, number)), size))
                    in_flight_bytes += size
                    number += 1
                    upcoming = next(batches, None)
                if ready is not None:
                    yield ready
                    ready = None
                if waiting:
                    batch, answer, size = waiting.popleft()
                    started = time.perf_counter()
                    reply = answer.result()
                    self.waited_s += time.perf_counter() - started
                    self.received_bytes += num_bytes(reply.signal)
                    self.teacher_s += reply.seconds
                    ready = batch, reply.signal
                    in_flight_bytes -= size
        finally:
            for _, answer, _ in waiting:
                answer.cancel()

    def _request(self, batch: MicroBatch, number: int) -> ScoreRequest:
        return ScoreRequest(
            request_id=f"{self.asker}-{batch.step}-{number}",
            token_ids=batch.token_ids,
            sequence_lengths=batch.sequence_lengths,
            positions=batch.positions,
            spec=self.spec,
            seed=(self.seed + batch.step) % 2**32,  # no sequence is drawn for twice alike
        )
