"""Asking ahead: order, the bound in bytes, borders of steps, a teacher that fails, a reader that leaves."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import TeacherFailed
from jobs.training.data import MicroBatch
from jobs.training.prefetch import Prefetch
from services.teacher.client import ClientCounters, TeacherAnswers
from services.teacher.model import TeacherModel
from services.teacher.schema import ScoreReply, ScoreRequest, TeacherDescription
from services.teacher.signals import HeadRecord, HiddenSignal, SignalSpec
from tests import tiny
from tests.in_process_teacher import InProcessTeacher, reference_logits

D = 4
SPEC = SignalSpec("hidden", 100)


def batch(number: int, positions: int, step: int | None = None) -> MicroBatch:
    """A micro-batch of `positions` scored tokens, all equal to its number."""
    return MicroBatch(
        step=number // 2 if step is None else step,
        last=bool(number % 2),
        token_ids=np.full(positions + 1, number, np.int32),
        sequence_lengths=np.array([positions + 1], np.int32),
        positions=np.arange(positions, dtype=np.int32),
        targets=np.full(positions, number, np.int64),
        row_ids=(),
        row_lengths=np.zeros(0, np.int32),
        num_bytes=0,
    )


class _Answer(Future[ScoreReply]):
    """Lets the teacher answer only when somebody waits."""

    def __init__(self, teacher: "LateTeacher") -> None:
        super().__init__()
        self._teacher = teacher

    def result(self, timeout: float | None = None) -> ScoreReply:
        self._teacher.answer_newest_first()
        return super().result(timeout)


class LateTeacher:
    """Answers everything that is asked, the newest first, and only when somebody waits for an answer."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.counters = ClientCounters()
        self.requests: list[ScoreRequest] = []
        self.open: list[tuple[ScoreRequest, _Answer]] = []
        self.answered: list[int] = []
        self._fails_at = fails_at

    def submit(self, request: ScoreRequest) -> Future[ScoreReply]:
        answer = _Answer(self)
        self.requests.append(request)
        self.open.append((request, answer))
        return answer

    def answer_newest_first(self) -> None:
        while self.open:
            request, answer = self.open.pop()
            number = int(request.token_ids[0])
            self.answered.append(number)
            if number == self._fails_at:
                answer.set_exception(TeacherFailed(f"batch {number}"))
            else:
                signal = HiddenSignal(np.full((len(request.positions), D), number, np.uint16))
                answer.set_result(ScoreReply(request.request_id, "late", request.num_tokens, signal))

    def describe(self) -> TeacherDescription:
        raise NotImplementedError

    def head(self) -> HeadRecord:
        raise NotImplementedError


def prefetch(teacher: TeacherAnswers, window_bytes: int) -> Prefetch:
    return Prefetch(teacher, SPEC, SPEC.bytes_per_position(D), window_bytes, "worker0")


def numbers(pairs: Iterator[tuple[MicroBatch, object]]) -> list[tuple[int, int]]:
    return [(int(item.token_ids[0]), int(signal.hidden_ND[0, 0])) for item, signal in pairs]  # type: ignore[attr-defined]


def test_pairs_come_in_order_although_answers_do_not():
    teacher = LateTeacher()
    found = numbers(prefetch(teacher, 10**6).pairs(batch(i, 3) for i in range(8)))
    assert found == [(i, i) for i in range(8)]
    assert teacher.answered == list(range(7, -1, -1))
    assert len({request.request_id for request in teacher.requests}) == 8


def test_pairs_of_nothing_is_nothing():
    assert list(prefetch(LateTeacher(), 100).pairs(iter([]))) == []


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=20), window=st.integers(0, 60))
def test_window_is_never_exceeded_but_one_request_is_always_in_flight(sizes, window):
    teacher = LateTeacher()
    window_bytes = window * SPEC.bytes_per_position(D)
    handed_out = 0
    for number, (item, signal) in enumerate(
        prefetch(teacher, window_bytes).pairs(batch(i, size) for i, size in enumerate(sizes))
    ):
        handed_out += 1
        assert (int(item.token_ids[0]), len(signal)) == (number, sizes[number])
        # Asked for and not handed out yet, at the moment when most are.
        ahead = sizes[handed_out : len(teacher.requests)]
        assert sum(ahead) <= window or len(ahead) == 1
        assert ahead or handed_out == len(sizes)
        if len(teacher.requests) < len(sizes):
            assert sum(ahead) + sizes[len(teacher.requests)] > window, "there was room for another"
    assert handed_out == len(sizes)


class LateLabels:
    """Has a stored label of every second micro-batch, each 0.1 s late."""

    def find(self, batch: MicroBatch) -> Future[object] | None:
        if batch.last:
            return None
        label: Future[object] = Future()
        signal = HiddenSignal(np.full((len(batch.positions), D), int(batch.token_ids[0]), np.uint16))
        threading.Timer(0.1, label.set_result, [signal]).start()
        return label

    def expects(self, batch: MicroBatch) -> bool:
        return False

    def keep(self, batch: MicroBatch, signal: object) -> None: ...


def test_waiting_for_stored_labels_is_no_waiting_for_the_teacher():
    teacher = LateTeacher()
    asking = prefetch(teacher, 0)
    asking.labels = LateLabels()  # type: ignore[assignment]
    assert numbers(asking.pairs(batch(i, 3) for i in range(4))) == [(i, i) for i in range(4)]
    assert teacher.answered == [1, 3]
    assert asking.waited_s > 0.1
    assert teacher.counters.waited_s is not None
    assert 0 < teacher.counters.waited_s < 0.05


def test_window_runs_across_the_borders_of_steps():
    teacher = LateTeacher()
    pairs = prefetch(teacher, 10**6).pairs(batch(i, 2, step=i) for i in range(6))
    first, _ = next(pairs)
    assert first.step == 0
    assert [request.request_id for request in teacher.requests] == [f"worker0-{i}-{i}" for i in range(6)]


def test_request_is_the_micro_batch():
    teacher = LateTeacher()
    item = batch(5, 7)
    next(prefetch(teacher, 0).pairs(iter([item])))
    [request] = teacher.requests
    assert request.spec == SPEC
    assert request.token_ids is item.token_ids
    assert request.sequence_lengths is item.sequence_lengths
    assert request.positions is item.positions


def test_failure_of_the_teacher_surfaces_at_its_batch_and_not_before():
    teacher = LateTeacher(fails_at=3)
    pairs = prefetch(teacher, 10**6).pairs(batch(i, 2) for i in range(6))
    assert [int(next(pairs)[0].token_ids[0]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(TeacherFailed, match="batch 3"):
        next(pairs)


def test_what_is_still_asked_is_cancelled_when_nobody_reads_on():
    teacher = LateTeacher()
    pairs = prefetch(teacher, 4 * SPEC.bytes_per_position(D)).pairs(batch(i, 2) for i in range(9))
    next(pairs)
    assert teacher.open
    waiting = [answer for _, answer in teacher.open]
    pairs.close()  # type: ignore[attr-defined]
    assert all(answer.cancelled() for answer in waiting)


def test_pairs_of_an_in_process_teacher_are_its_signals(tmp_path: Path):
    tiny.save_model(tmp_path)
    teacher = InProcessTeacher(TeacherModel(str(tmp_path), "float32"))
    spec = SignalSpec("dense", 320)
    asking = Prefetch(teacher, spec, spec.bytes_per_position(32), 40 * spec.bytes_per_position(32), "w")
    rng = np.random.default_rng(0)
    batches = [
        MicroBatch(
            i,
            True,
            rng.integers(0, 320, 20).astype(np.int32),
            np.array([12, 8], np.int32),
            np.array([0, 3, 13], np.int32),
            np.zeros(3, np.int64),
            (),
            np.zeros(0, np.int32),
            0,
        )
        for i in range(10)
    ]
    for count, (item, signal) in enumerate(asking.pairs(iter(batches))):
        assert item is batches[count]
        request = ScoreRequest("", item.token_ids, item.sequence_lengths, item.positions, spec)
        expected = torch.log_softmax(reference_logits(tiny.model(), request), -1)
        torch.testing.assert_close(torch.from_numpy(signal.logprobs_NC).double(), expected, atol=8e-3, rtol=0)
    assert (teacher.counters.calls, teacher.counters.retries) == (10, 0)
    assert asking.waited_s > 0
    teacher.close()


def test_failure_of_an_in_process_teacher_is_its_own_error(tmp_path: Path):
    tiny.save_model(tmp_path)
    teacher = InProcessTeacher(TeacherModel(str(tmp_path), "float32"))
    asking = Prefetch(teacher, SignalSpec("hidden", 320), 64, 10**6, "w")
    bad = batch(400, 3)  # not in the vocabulary
    with pytest.raises(TeacherFailed, match=r"request w-9-1 was refused: token ids outside 0\.\.319"):
        list(asking.pairs(iter([batch(1, 3), MicroBatch(**{**vars(bad), "step": 9})])))
    teacher.close()
