"""More replicas while requests wait and students stand still for them; fewer when few are asked."""

import base64
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.serve.config import AutoscalingPolicy

from jobs.training.prefetch import Prefetch
from services.teacher.autoscaling import Standing, Waits, replicas_wanted
from services.teacher.client import ClientCounters
from services.teacher.schema import ScoreReply, ScoreRequest
from services.teacher.signals import HiddenSignal, SignalSpec
from tests.unit.test_prefetch import batch


def context(requests: float, replicas: int, metrics: dict[str, dict[str, float]] | None) -> Any:
    config = SimpleNamespace(get_target_ongoing_requests=lambda: 2)
    return SimpleNamespace(
        total_num_requests=requests, target_num_replicas=replicas, aggregated_metrics=metrics, config=config
    )


def said(*replicas: tuple[float, float]) -> dict[str, dict[str, float]]:
    named = {str(number): pair for number, pair in enumerate(replicas)}
    return {
        "waited_s": {name: pair[0] for name, pair in named.items()},
        "elapsed_s": {name: pair[1] for name, pair in named.items()},
    }


@pytest.mark.parametrize(
    ("requests", "replicas", "metrics", "wanted"),
    [
        (8, 2, said((0.5, 1.0)), 4),
        (8, 2, said((0.04, 1.0)), 2),
        (8, 2, said((0.0, 1.0), (0.5, 1.0)), 4),  # 25 % of two
        (8, 2, said((0.0, 9.0), (0.1, 1.0)), 2),  # 1 % of both: the busy one counts more
        (8, 2, said((0.0, 0.0)), 4),  # askers that do not say
        (8, 2, {}, 4),
        (8, 2, None, 4),
        (2, 2, said((0.5, 1.0)), 1),  # few requests: fewer replicas, whatever is waited for
        (0, 2, said((0.0, 1.0)), 0),
        (4, 2, said((0.5, 1.0)), 2),
    ],
)
def test_replicas_follow_requests_and_waiting(requests, replicas, metrics, wanted):
    assert replicas_wanted(context(requests, replicas, metrics)) == (wanted, {})


def test_waits_are_taken_once():
    waits = Waits()
    waits.add(0.25, 1.0)
    waits.add(0.5, 2.0)
    assert waits.take() == {"waited_s": 0.75, "elapsed_s": 3.0}
    assert waits.take() == {"waited_s": 0.0, "elapsed_s": 0.0}


def test_policy_runs_where_the_project_is_not_installed():
    pickled = AutoscalingPolicy(policy_function=replicas_wanted).get_serialized_policy_def()
    assert pickled is not None
    program = f"""
import base64, sys
from types import SimpleNamespace as N
sys.modules.update(services=None, cluster=None, jobs=None)
from ray import cloudpickle
policy = cloudpickle.loads(base64.b64decode({base64.b64encode(pickled)!r}))
config = N(get_target_ongoing_requests=lambda: 2)
print(policy(N(total_num_requests=8, target_num_replicas=1, aggregated_metrics=None, config=config)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "(4.0, {})", done.stderr


class Teacher:
    """Takes a while for an answer; a request is sent when the one before is answered, as with a single place."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.sent = seconds, list[ScoreRequest]()
        self.counters, self._standing = ClientCounters(), Standing()
        self._thread = ThreadPoolExecutor(1)

    def submit(self, request: ScoreRequest) -> Any:
        return self._thread.submit(self._answer, request)

    def _answer(self, request: ScoreRequest) -> ScoreReply:
        self.sent.append(self._standing.told(request, self.counters.waited_s))
        time.sleep(self.seconds)
        signal = HiddenSignal(np.zeros((len(request.positions), 4), np.uint16))
        return ScoreReply(request.request_id, "f", request.num_tokens, signal)


@pytest.mark.parametrize("window_bytes", [64, 1 << 20])  # a micro-batch, or all of them asked before the first answer
@pytest.mark.parametrize(("teacher_s", "student_s", "low", "high"), [(0.03, 0.0, 0.7, 1.01), (0.02, 0.06, 0.0, 0.5)])
def test_requests_say_how_long_their_student_stood_still(teacher_s, student_s, low, high, window_bytes):
    teacher = Teacher(teacher_s)
    pairs: Iterator[Any] = Prefetch(teacher, SignalSpec("hidden", 100), 8, window_bytes, "0").pairs(
        batch(number, 4) for number in range(12)
    )
    for _ in pairs:
        time.sleep(student_s)
    assert teacher.sent[0].elapsed_s == teacher.sent[0].waited_s == 0
    waited, elapsed = (sum(getattr(item, name) for item in teacher.sent) for name in ("waited_s", "elapsed_s"))
    assert low <= waited / elapsed <= high


def test_asker_that_does_not_say_is_not_told_of():
    request = ScoreRequest("a", *(np.zeros(1, np.int32) for _ in range(3)), SignalSpec("hidden", 100))
    assert Standing().told(request, None) is request
