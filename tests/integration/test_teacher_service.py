"""The teacher on Ray Serve: the same contract as in process, and what callers see when replicas die.

The tests build on each other's service and run in this order: the last ones take it apart.
"""

import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from cluster.connection import ClusterConfig, connect
from cluster.errors import TeacherFailed, TeacherUnavailable
from services.teacher.client import ClientCounters, TeacherClient, start_teacher, stop_teacher
from services.teacher.model import TeacherModel
from services.teacher.schema import TeacherServiceConfig
from services.teacher.signals import SignalSpec
from tests import tiny
from tests.in_process_teacher import TEMPERATURES, assert_contract, make_request

pytestmark = pytest.mark.integration

LIMIT = 2048
DENSE = SignalSpec("dense", 320)


@dataclass
class Service:
    client: TeacherClient
    local: TeacherModel
    directory: Path


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tiny.save_model(tmp_path_factory.mktemp("teacher"))
    config = TeacherServiceConfig(model=str(directory), dtype="float32", replicas=2, max_batch_tokens=LIMIT)
    with connect(ClusterConfig(num_cpus=4, object_store_mb=100)):
        from ray import serve

        start_teacher(config)
        client = TeacherClient(attempt_timeout_s=20, deadline_s=90)
        try:
            yield Service(client, TeacherModel(str(directory), "float32", max_request_tokens=LIMIT), directory)
        finally:
            client.close()
            serve.shutdown()


def replica_pids() -> list[int]:
    """Of this test's own Ray: it is a child of this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ServeReplica:teacher:Teacher" in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:  # it ended meanwhile
            continue
    return found


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.02)


def assert_same_signal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    for name, value in vars(expected).items():
        mine = getattr(found, name)
        if not isinstance(value, np.ndarray):
            assert mine == value
            continue
        assert (mine.dtype, mine.shape) == (value.dtype, value.shape)
        if value.dtype == np.uint16:  # bfloat16: the shapes of the products may differ, and so may the last bit
            mine, value = ((x.astype(np.uint32) << 16).view(np.float32) for x in (mine, value))
        np.testing.assert_allclose(mine.astype(np.float64), value.astype(np.float64), rtol=8e-3, atol=1e-4)


def test_service_keeps_the_contract(service: Service) -> None:
    assert_contract(service.client, tiny.model())


def test_service_describes_itself_and_its_head_like_the_model(service: Service) -> None:
    assert service.client.describe() == service.local.describe()
    head, expected = service.client.head(), service.local.head()
    assert np.array_equal(head.weight_VD, expected.weight_VD)
    assert head.weight_VD.flags.writeable
    assert (head.fingerprint, head.bias_V, head.scale, head.soft_cap) == (expected.fingerprint, None, 1.0, None)


@pytest.mark.parametrize("kind", ["hidden", "topk", "sampled", "dense"])
def test_service_requests_asked_at_once_get_their_own_answers(service: Service, kind: Any) -> None:
    spec = SignalSpec(kind, 320, 9, (2.0,) if kind == "sampled" else TEMPERATURES)
    requests = [make_request([5 + i, 1, 40 - i], spec, i, name=f"{kind}-{i}") for i in range(30)]
    answers = [service.client.submit(request) for request in requests]
    for request, answer in zip(requests, answers, strict=True):
        reply = answer.result(60)
        assert reply.request_id == request.request_id
        [expected] = service.local.score([request])
        assert_same_signal(reply.signal, expected.signal)
        assert all(x.flags.writeable for x in vars(reply.signal).values() if isinstance(x, np.ndarray))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (make_request([300], DENSE), "a sequence of 300 tokens, this teacher takes at most 256"),
        (make_request([200] * 11, DENSE), "2200 tokens, at most 2048"),
        (make_request([9], DENSE, vocab_size=10_000), "token ids outside"),
        ("not a request", "AttributeError"),
    ],
)
def test_service_refusal_is_final_and_not_retried(service: Service, request_: Any, message: str) -> None:
    before = ClientCounters(**vars(service.client.counters))
    with pytest.raises(TeacherFailed, match=message):
        service.client.score(request_)
    after = service.client.counters
    assert (after.calls - before.calls, after.retries - before.retries) == (1, 0)


def test_service_tells_prometheus_what_it_does(service: Service) -> None:
    import ray

    service.client.score(make_request([40, 9], DENSE))
    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    page, scored, end = "", 0.0, time.monotonic() + 60
    while scored < 49:  # Ray exports every few seconds: the page may know this teacher and not yet the request
        assert time.monotonic() < end, page[:2000]
        time.sleep(1)
        with urllib.request.urlopen(url) as answer:
            page = answer.read().decode()
        lines = [line for line in page.splitlines() if line.startswith("ray_raystill_teacher_tokens_total{")]
        scored = float(lines[0].rsplit(" ", 1)[1]) if lines else 0.0
    assert 'deployment="Teacher"' in lines[0]
    for name in ("tokens_in_flight{", "batch_fill_bucket{", "queue_age_seconds_bucket{"):
        assert f"ray_raystill_teacher_{name}" in page, name


def test_service_of_another_teacher_is_refused(service: Service) -> None:
    other = TeacherClient(attempt_timeout_s=20, deadline_s=60, fingerprint="another")
    with pytest.raises(TeacherFailed, match=r"comes from teacher .*-float32, expected another"):
        other.score(make_request([4], DENSE))
    for ask in (other.describe, other.head):
        with pytest.raises(TeacherFailed, match=r"is .*-float32, expected another"):
            ask()
    other.close()


def test_service_slower_than_an_attempt_answers_in_the_end(service: Service) -> None:
    hasty = TeacherClient(attempt_timeout_s=0.001, deadline_s=60)
    request = make_request([4, 9], DENSE)
    assert_same_signal(service.client.score(request).signal, hasty.submit(request).result(60).signal)
    assert hasty.counters.retries > 0
    hasty.close()


def test_service_replica_killed_under_load_loses_and_doubles_nothing(service: Service) -> None:
    client = service.client
    victims = replica_pids()
    assert len(victims) == 2
    before = ClientCounters(**vars(client.counters))
    requests = [make_request([250] * 8, DENSE, i, list(range(i, 2000, 40)), f"load-{i}") for i in range(100)]
    done: list[float] = [time.monotonic()]
    lock = threading.Lock()

    def note(_: Any) -> None:
        with lock:
            done.append(time.monotonic())

    answers = [client.submit(request) for request in requests]
    for answer in answers:
        answer.add_done_callback(note)
    wait_until(lambda: len(done) > 10)
    assert not answers[-1].done()
    os.kill(victims[0], signal.SIGKILL)
    replies = [answer.result(120) for answer in answers]
    assert [reply.request_id for reply in replies] == [request.request_id for request in requests]
    for reply, request in zip(replies, requests, strict=True):
        [expected] = service.local.score([request])
        assert_same_signal(reply.signal, expected.signal)
    calls, retries = client.counters.calls - before.calls, client.counters.retries - before.retries
    assert retries >= 1
    assert calls == 100 + retries
    assert len(done) == 101
    assert max(np.diff(sorted(done))) < 30
    wait_until(lambda: len(set(replica_pids()) - {victims[0]}) == 2, timeout_s=180)  # Serve replaces it


def test_service_that_is_gone_is_unavailable_within_the_deadline(service: Service) -> None:
    hurried = TeacherClient(attempt_timeout_s=1, deadline_s=4)
    service.client.describe()
    for pid in replica_pids():
        os.kill(pid, signal.SIGKILL)
    stop_teacher()
    started = time.monotonic()
    with pytest.raises(TeacherUnavailable, match=r"teacher 'teacher': score unanswered after 4 s and \d+ attempts"):
        hurried.score(make_request([4], DENSE))
    assert time.monotonic() - started < 20
    assert hurried.counters.retries >= 1
    hurried.close()
    with pytest.raises(TeacherUnavailable, match="teacher 'unheard-of': no such application"):
        TeacherClient("unheard-of")


def test_client_that_is_closed_stops_asking(service: Service) -> None:
    # Its application is gone, so it would go on for the 90 s of its deadline.
    client = TeacherClient(attempt_timeout_s=20, deadline_s=90)
    answers = [client.submit(make_request([4], DENSE, name=str(i))) for i in range(20)]
    wait_until(lambda: client.counters.retries >= 1)
    client.close()
    assert answers[-1].cancelled()
    with pytest.raises(TeacherUnavailable, match="given up, the client was closed"):
        answers[0].result(10)


def test_service_started_again_answers_clients_old_and_new(service: Service) -> None:
    start_teacher(TeacherServiceConfig(model=str(service.directory), dtype="float32", max_batch_tokens=LIMIT))
    new = TeacherClient(attempt_timeout_s=20, deadline_s=60)
    for client in (service.client, new):
        assert client.describe() == service.local.describe()
    new.close()


def test_start_of_a_model_without_weights_says_why_and_leaves_nothing(service: Service) -> None:
    from ray import serve

    empty = service.directory.parent / "empty"
    empty.mkdir(exist_ok=True)
    (empty / "config.json").write_text((service.directory / "config.json").read_text())
    started = time.monotonic()
    with pytest.raises(TeacherUnavailable, match=r"empty did not start: .*no .*safetensors weights"):
        start_teacher(TeacherServiceConfig(model=str(empty)), "broken")
    assert time.monotonic() - started < 180
    assert "broken" not in serve.status().applications
