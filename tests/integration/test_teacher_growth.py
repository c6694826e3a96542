"""Teachers that grow on a real Ray Serve: not for requests that wait, but for students that stand still."""

import threading
import time
from dataclasses import replace

import pytest

from cluster.connection import ClusterConfig, connect
from services.teacher.client import APP_NAME, TeacherClient, start_teacher
from services.teacher.schema import TeacherServiceConfig
from services.teacher.signals import SignalSpec
from tests import tiny
from tests.in_process_teacher import make_request

pytestmark = pytest.mark.integration


def test_second_replica_starts_only_once_students_stand_still(tmp_path):
    from ray import serve

    config = TeacherServiceConfig(model=str(tiny.save_model(tmp_path)), dtype="float32", max_replicas=2)
    asking, waited_s = threading.Event(), [0.0]

    def ask(client, number):
        while asking.is_set():
            request = make_request([128] * 16, SignalSpec("hidden", 320), number)
            client.submit(replace(request, waited_s=waited_s[0], elapsed_s=1.0)).result(60)

    def num_replicas():
        return sum(serve.status().applications[APP_NAME].deployments["Teacher"].replica_states.values())

    def second_after_s(limit_s):
        began = time.monotonic()
        while num_replicas() < 2 and time.monotonic() < began + limit_s:
            time.sleep(0.5)
        return time.monotonic() - began

    with connect(ClusterConfig(num_cpus=4, object_store_mb=100)):
        start_teacher(config)
        client = TeacherClient(attempt_timeout_s=20, deadline_s=90)
        asking.set()
        threads = [threading.Thread(target=ask, args=(client, number)) for number in range(8)]
        try:
            for thread in threads:
                thread.start()
            assert second_after_s(30) >= 30, "a replica was added though nobody stood still"
            waited_s[0] = 0.5
            assert second_after_s(90) < 90, "no replica was added though the students stood still"
        finally:
            asking.clear()
            for thread in threads:
                thread.join(90)
            client.close()
            serve.shutdown()
