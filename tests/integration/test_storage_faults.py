"""Storage on a real S3 server, then with a proxy before it that does harm: the right bytes, or one line."""

import dataclasses
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest

from cluster import multipart
from cluster.attempts import Limits
from cluster.errors import StorageError
from cluster.published import fetch_directory, publish_directory
from cluster.s3 import S3Storage
from cluster.storage import open_storage
from jobs.training.checkpoint import Checkpoints
from tests.fault_proxy import Fault, FaultProxy
from tests.unit.test_checkpoint import trained
from tests.unit.test_storage import (  # noqa: F401 - what every storage does, here on the real server
    on_a_small_disk,
    test_localize_s3_directory_is_copied_once_and_verified,
    test_publish_manifest_with_a_hostile_name_is_refused,
    test_publish_without_manifest_does_not_exist_and_damage_is_named,
    test_s3_wrong_bucket_is_one_line,
    test_storage_counts_its_traffic,
    test_storage_delete_of_more_than_one_batch,
    test_storage_delete_removes_what_a_killed_upload_left,
    test_storage_delete_takes_a_directory_and_not_what_only_begins_like_it,
    test_storage_download_to_where_it_cannot_be_leaves_nothing,
    test_storage_keys_cannot_leave_the_root,
    test_storage_objects_of_several_parts,
    test_storage_open_never_mixes_two_objects,
    test_storage_open_reads_anywhere,
    test_storage_read_range_ends_with_the_object,
    test_storage_round_trip_list_and_delete,
    test_storage_writable_check_leaves_nothing,
    test_storage_writer_shows_the_whole_object_or_none,
)

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
MIB = 1 << 20
CONTENT = os.urandom(4 * MIB)
QUICK = Limits(first_pause_s=0.02, longest_pause_s=0.5)
"""Short pauses, and all the time that a busy machine may need: a fault that passes ends by itself."""
IMPATIENT = dataclasses.replace(QUICK, patience_s=4)
"""For a fault that lasts."""
HASTY = dataclasses.replace(IMPATIENT, answer_s=3, min_bytes_per_s=500_000, window_s=1)
"""For a server that is slow, or never answers."""
SLOW_DOWN = {"status": 503, "code": "SlowDown"}
CANARY = "canary-9f31c7"


@pytest.fixture
def aws(s3_server, monkeypatch):
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)  # it keeps the credentials it found first
    return s3_server


@pytest.fixture
def storage(aws, request):
    """A prefix of its own on the real server."""
    return open_storage(f"s3://bucket/{request.node.name[:40].strip('[]')}-{os.urandom(4).hex()}")


@pytest.fixture(scope="module")
def shared_proxy(s3_server):
    with FaultProxy(s3_server.port) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy):
    shared_proxy.clear()
    return shared_proxy


@pytest.fixture
def harmed(storage, proxy, monkeypatch):
    """The same prefix through the proxy, with short pauses and small parts."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setattr(multipart, "PART_BYTES", 5 * MIB)
    return S3Storage(storage.bucket, storage.prefix, QUICK)


def limited(storage, limits):
    return S3Storage(storage.bucket, storage.prefix, limits)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def directory_of(path, content):
    (path / "sub").mkdir(parents=True)
    (path / "weights").write_bytes(content)
    (path / "sub" / "config").write_bytes(b"{}")
    return path


FAULTS = {
    "500": Fault("error", times=3),
    "503": Fault("error", times=3, **SLOW_DOWN),
    "429": Fault("error", times=2, status=429, code="TooManyRequests"),
    "latency": Fault("latency", times=2, seconds=1.0),
    "reset": Fault("reset", times=3),
    "lose": Fault("lose", times=2),
}
OPERATIONS = {
    "read": lambda storage, path: storage.read("there") == CONTENT,
    "range": lambda storage, path: storage.read_range("there", 1000, MIB) == CONTENT[1000 : 1000 + MIB],
    "open": lambda storage, path: storage.open("there").read() == CONTENT,
    "read ahead": lambda storage, path: [storage.open("there").read(n) for n in (9, -1)] == [CONTENT[:9], CONTENT],
    "list": lambda storage, path: [item.key for item in storage.list()] == ["there"],
    "write": lambda storage, path: storage.write("new", CONTENT) is None and storage.read("new") == CONTENT,
    "delete": lambda storage, path: storage.delete("there") is None and not storage.exists("there"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("fault", FAULTS)
def test_s3_passing_fault_does_not_change_the_result(storage, harmed, proxy, tmp_path, fault, operation):
    storage.write("there", CONTENT)
    proxy.add(dataclasses.replace(FAULTS[fault]))
    assert OPERATIONS[operation](harmed, tmp_path)
    assert proxy.fired[FAULTS[fault].mode] == FAULTS[fault].times or FAULTS[fault].mode == "latency"
    assert proxy.fired[FAULTS[fault].mode] > 0
    expected = 0 if fault == "latency" else FAULTS[fault].times
    assert harmed.traffic.retries == expected


def test_s3_cut_body_goes_on_where_it_broke(storage, harmed, proxy, tmp_path):
    storage.write("there", CONTENT)
    proxy.add(Fault("cut", times=3, method="GET", after_bytes=MIB))
    assert harmed.read("there") == CONTENT
    assert proxy.fired["cut"] == 3
    assert harmed.traffic.retries == 3
    assert harmed.traffic.read_bytes == len(CONTENT)  # no byte was kept twice
    proxy.add(Fault("cut", times=2, method="GET", after_bytes=100))
    assert harmed.read_range("there", 5, 1000) == CONTENT[5:1005]
    proxy.add(Fault("cut", times=1, method="GET", after_bytes=0))
    harmed.download("there", tmp_path / "local")
    assert (tmp_path / "local").read_bytes() == CONTENT
    assert proxy.fired["cut"] == 6


def test_s3_cut_body_of_an_object_replaced_meanwhile_is_an_error(storage, harmed, proxy):
    storage.write("there", CONTENT)
    first = []

    class Replacing(S3Storage):
        def _why_again(self, error):
            if not first:
                first.append(error)
                storage.write("there", CONTENT[::-1])
            return super()._why_again(error)

    proxy.add(Fault("cut", method="GET", after_bytes=MIB))
    with pytest.raises(StorageError, match="was replaced while it was read") as error:
        Replacing(storage.bucket, storage.prefix, QUICK).read("there")
    one_line(error)
    assert proxy.fired["cut"] == len(first) == 1


@pytest.mark.parametrize("after_bytes", [0, 1, 300])
def test_s3_cut_listing_is_never_taken_for_a_short_one(storage, harmed, proxy, after_bytes):
    for number in range(5):
        storage.write(f"k{number}", b"1")
    proxy.add(Fault("cut", times=2, method="GET", path="list-type", after_bytes=after_bytes))
    assert len(harmed.list()) == 5
    assert proxy.fired["cut"] == 2


def test_s3_empty_answer_is_never_taken_for_an_empty_listing(storage, harmed, proxy):
    storage.write("k", b"1")
    proxy.add(Fault("empty", times=2, method="GET", path="list-type"))
    assert len(harmed.list()) == 1
    assert proxy.fired["empty"] == 2


@pytest.mark.parametrize("operation", ["read", "download", "write"])
def test_s3_slow_trickle_is_ended(storage, harmed, proxy, tmp_path, operation):
    """4 MiB at 100 kB/s take 42 s; a read timeout, however short, never fires."""
    harmed = limited(harmed, HASTY)
    storage.write("there", CONTENT)
    proxy.add(Fault("trickle", times=9, method="PUT" if operation == "write" else "GET", bytes_per_s=100_000))
    work = {
        "read": lambda: harmed.read("there"),
        "download": lambda: harmed.download("there", tmp_path / "local"),
        "write": lambda: harmed.write("new", CONTENT),
    }[operation]
    started = time.monotonic()
    with pytest.raises(StorageError, match="gave up after 2 attempts") as error:
        work()
    assert time.monotonic() - started < 40
    assert "kB/s" in one_line(error) or "no answer in" in one_line(error)
    assert proxy.fired["trickle"] == 2
    assert not list(tmp_path.iterdir())


def test_s3_slow_trickle_that_passes_is_survived(storage, harmed, proxy):
    harmed = limited(harmed, dataclasses.replace(HASTY, patience_s=60, min_bytes_per_s=200_000, slow_attempts=9))
    storage.write("there", CONTENT)
    proxy.add(Fault("trickle", times=1, method="GET", bytes_per_s=100_000))
    assert harmed.read("there") == CONTENT
    assert (proxy.fired["trickle"], harmed.traffic.retries) == (1, 1)


def test_s3_server_that_never_answers_is_ended(storage, harmed, proxy):
    storage.write("there", CONTENT)
    proxy.add(Fault("latency", times=9, seconds=30))
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"no answer in \d+ s; gave up after 2 attempts"):
        limited(harmed, dataclasses.replace(HASTY, patience_s=20)).read("there")
    assert time.monotonic() - started < 25
    assert proxy.fired["latency"] == 2


@pytest.mark.parametrize("mode", ["error", "reset"])
def test_s3_lasting_fault_is_one_line_when_patience_ends(storage, harmed, proxy, mode):
    harmed = limited(harmed, IMPATIENT)
    storage.write("there", CONTENT)
    proxy.add(Fault(mode, times=10_000, **SLOW_DOWN))
    started = time.monotonic()
    with pytest.raises(StorageError, match="gave up after") as error:
        harmed.read("there")
    assert 2 < time.monotonic() - started < 60
    assert ("SlowDown (HTTP 503)" if mode == "error" else "connection") in one_line(error)
    assert proxy.fired[mode] == harmed.traffic.retries > 5


def test_s3_refusal_is_not_repeated(storage, harmed, proxy):
    proxy.add(Fault("error", times=9, status=403, code="AccessDenied"))
    with pytest.raises(StorageError, match=r"AccessDenied .HTTP 403. for 'there'") as error:
        harmed.read("there")
    one_line(error)
    assert proxy.fired["error"] == 1


@pytest.mark.parametrize("mode", ["error", "reset", "lose"])
def test_s3_upload_in_parts_survives_faults_at_every_request(storage, harmed, proxy, tmp_path, mode):
    content = os.urandom(12 * MIB)
    (tmp_path / "local").write_bytes(content)
    proxy.add(Fault(mode, times=1, method="POST", path="uploadId", **SLOW_DOWN))  # the last: joins the parts
    proxy.add(Fault(mode, times=3, method="PUT", path="partNumber", **SLOW_DOWN))
    harmed.upload(tmp_path / "local", "big")
    assert proxy.fired[mode] == 4
    assert storage.read("big") == content
    assert not uploads(storage)


def test_s3_upload_that_fails_leaves_neither_object_nor_parts(storage, harmed, proxy, tmp_path):
    content = os.urandom(12 * MIB)
    (tmp_path / "local").write_bytes(content)
    proxy.add(Fault("error", times=10_000, method="PUT", path="partNumber=2", **SLOW_DOWN))
    with pytest.raises(StorageError, match="put part 2 of 'big': SlowDown") as error:
        limited(harmed, IMPATIENT).upload(tmp_path / "local", "big")
    one_line(error)
    assert proxy.fired["error"] > 3
    assert storage.list() == []
    assert not uploads(storage)


def test_s3_write_that_fails_leaves_the_old_object(storage, harmed, proxy):
    storage.write("k", b"old")
    proxy.add(Fault("reset", times=10_000, method="PUT"))
    with pytest.raises(StorageError, match="gave up"):
        limited(harmed, IMPATIENT).write("k", CONTENT)
    assert storage.read("k") == b"old"
    assert proxy.fired["reset"] > 3


def uploads(storage):
    return storage.client.list_multipart_uploads(Bucket=storage.bucket, Prefix=storage.prefix).get("Uploads")


def test_s3_directory_is_published_and_fetched_through_everything(storage, harmed, proxy, tmp_path):
    made = directory_of(tmp_path / "made", os.urandom(12 * MIB))
    for mode, method in (("error", ""), ("reset", "PUT"), ("lose", "PUT"), ("lose", "POST")):
        proxy.add(Fault(mode, times=2, method=method, **SLOW_DOWN))
    manifest = publish_directory(made, harmed, "d")
    for mode in ("cut", "reset", "error"):
        proxy.add(Fault(mode, times=3, method="GET", after_bytes=MIB, **SLOW_DOWN))
    assert fetch_directory(harmed, "d", tmp_path / "copy") == manifest
    assert (tmp_path / "copy" / "weights").read_bytes() == (made / "weights").read_bytes()
    assert proxy.fired == {"error": 5, "reset": 5, "lose": 4, "cut": 3}


def test_s3_publication_that_fails_does_not_exist(storage, harmed, proxy, tmp_path):
    proxy.add(Fault("error", times=10_000, method="PUT", path="weights", **SLOW_DOWN))
    with pytest.raises(StorageError, match="weights"):
        publish_directory(directory_of(tmp_path / "made", CONTENT), limited(harmed, IMPATIENT), "d")
    with pytest.raises(FileNotFoundError):
        fetch_directory(storage, "d", tmp_path / "copy")
    assert proxy.fired["error"] > 3


def test_s3_checkpoint_is_stored_and_resumed_through_faults(storage, harmed, proxy):
    with Checkpoints(harmed, "c", 1, {}) as checkpoints:
        for step in range(4):
            for mode, method in (("error", ""), ("lose", "PUT"), ("reset", "GET")):
                proxy.add(Fault(mode, times=1, method=method, **SLOW_DOWN))
            checkpoints.save(*trained(step))
        checkpoints.wait()
        proxy.add(Fault("cut", times=2, method="GET", after_bytes=50))
        found = checkpoints.fetch()
    assert found.state.step == 3
    found.discard()
    assert Checkpoints(storage, "c", 1, {}).steps() == [2, 3]
    assert proxy.fired["cut"] == 2
    assert proxy.fired["lose"] == proxy.fired["error"] == 4
    assert not uploads(storage)


SAVE = """
import sys
from cluster.storage import open_storage
from jobs.training.checkpoint import Checkpoints
from tests.unit.test_checkpoint import trained
from tests.unit.test_storage import on_a_small_disk
with Checkpoints(open_storage(sys.argv[1]), "c", 5, {}) as checkpoints:
    print("saving", flush=True)
    checkpoints.save(*trained(2))
"""


@pytest.mark.parametrize("killed_at", ["weights", "optimizer", "manifest"])
def test_s3_checkpoint_killed_in_its_upload_leaves_the_one_before(storage, proxy, monkeypatch, killed_at):
    """SIGKILL while a file of the second checkpoint is held back by the server."""
    with Checkpoints(storage, "c", 5, {}) as checkpoints:
        checkpoints.save(*trained(1))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    proxy.add(Fault("latency", method="PUT", path=killed_at, seconds=30))
    child = subprocess.Popen([sys.executable, "-c", SAVE, storage.uri], stdout=subprocess.DEVNULL, cwd=ROOT)
    try:
        until(lambda: proxy.fired["latency"] == 1 or child.poll() is not None)
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()
    found = Checkpoints(storage, "c", 5, {}).fetch()
    assert found.state.step == 1
    found.discard()


def until(condition, timeout_s=60):
    ends = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


DOWNLOAD = """
import os, sys
from pathlib import Path
from cluster.errors import StorageError
from cluster.storage import open_storage
try:
    open_storage(sys.argv[1]).download("there", Path(sys.argv[2], "local"))
except StorageError as error:
    print(error)
assert os.listdir(sys.argv[2]) == []
"""


def test_s3_download_to_a_full_disk_is_one_line(storage, tmp_path):
    storage.write("there", CONTENT)
    done = on_a_small_disk(tmp_path / "small", DOWNLOAD, storage.uri, tmp_path / "small")
    assert done.returncode == 0, done.stderr
    assert "No space left" in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_s3_object_server_stopped_for_a_while_is_waited_for(storage, aws):
    # the SDK itself waits a second for leave to send: a window of as long ends attempts that only wait for that
    patient = limited(storage, dataclasses.replace(HASTY, patience_s=60, window_s=3, slow_attempts=5))
    patient.write("k", b"1")
    stopped = aws.processes["object"].pid
    os.kill(stopped, signal.SIGSTOP)
    try:
        started = time.monotonic()
        threading.Timer(5, os.kill, (stopped, signal.SIGCONT)).start()
        patient.write("k", CONTENT)
        assert time.monotonic() - started > 4
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert patient.read("k") == CONTENT


def test_s3_wrong_credentials_and_no_server_are_one_line_without_secrets(storage, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    monkeypatch.setenv("AWS_SESSION_TOKEN", CANARY)
    shown = []

    def fail(uri_environment):
        for name, value in uri_environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
        storage = S3Storage("bucket", "p", dataclasses.replace(QUICK, patience_s=1))
        for work in (
            lambda: storage.read("k"),
            storage.list,
            lambda: storage.write("k", CONTENT),
            storage.check_writable,
        ):
            with pytest.raises(StorageError) as error:
                work()
            shown.append(one_line(error))
            shown.extend(traceback.format_exception(error.value))

    fail({})
    assert "HTTP 403" in shown[0]
    fail({"AWS_ACCESS_KEY_ID": CANARY})
    with FaultProxy(9) as dead:  # nothing listens behind it
        fail({"AWS_ENDPOINT_URL": dead.endpoint.replace("//", f"//user:{CANARY}@")})
    fail({"AWS_ENDPOINT_URL": f"http://user:{CANARY}@127.0.0.1:9"})
    assert "no server answers at 127.0.0.1:9" in shown[-1]
    assert CANARY not in "".join(shown)
    assert CANARY not in caplog.text
