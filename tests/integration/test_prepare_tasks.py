"""Preparing as Ray tasks: the result of one process, whatever their number, and nothing lost when one or all die."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from cluster.connection import ClusterConfig, connect
from cluster.errors import CorpusError
from cluster.storage import open_storage
from jobs import prepare as prepare_module
from jobs.config import DataConfig
from jobs.corpus import find_sources
from jobs.prepare import prepare
from tests import tiny
from tests.unit.test_prepare import NoBar
from tests.unit.test_prepare_again import files, rows_of

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def connection():
    with connect(ClusterConfig()) as connected:
        yield connected


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Seven objects of different sizes with copies among them, and a tokenizer."""
    root = tmp_path_factory.mktemp("inputs")
    for number, documents in enumerate((40, 300, 10, 90, 40, 200, 25)):
        tiny.corpus(root / "in", documents, seed=number % 5).rename(root / "in" / f"{number}.jsonl")
    return root / "in", str(tiny.tokenizer(root / "tokenizer"))


class Following(NoBar):
    def __init__(self):
        self.total, self.done, self.notes = None, [], []

    def start(self, total, note=""):
        self.total = total

    def update(self, done=None, note=None):
        self.done.append(done)
        self.notes.append(note)


def build(root, inputs, at_once, bar=None, **data):
    config = DataConfig(
        sources=[str(inputs[0])], **{"sequence_length": 32, "validation_fraction": 0.2, "rows_per_shard": 32, **data}
    )
    found = find_sources(config.sources)
    return prepare(found, config, inputs[1], 1, open_storage(str(root)), "store/x", bar or NoBar(), at_once)


def test_prepare_result_does_not_depend_on_the_number_of_tasks(tmp_path, connection, inputs, monkeypatch):
    bar = Following()
    manifests = {0: build(tmp_path / "0", inputs, 0)}
    manifests[1] = build(tmp_path / "1", inputs, 1)
    manifests[3] = build(tmp_path / "3", inputs, 3, bar)
    monkeypatch.setattr(prepare_module, "_GROUP_OBJECTS", 1)
    manifests[8] = build(tmp_path / "8", inputs, 8)
    assert manifests[0]["duplicates"] > 0
    assert all(manifest == manifests[0] for manifest in manifests.values())
    assert all(files(tmp_path / str(number)).keys() == files(tmp_path / "0").keys() for number in manifests)
    assert rows_of(tmp_path / "8") == rows_of(tmp_path / "0")
    assert bar.done[-1] == bar.total
    assert "tokenising" in bar.notes[-1]
    assert "rows/s" in bar.notes[-1]


def test_prepare_broken_object_in_a_task_is_named_and_nothing_is_left(tmp_path, connection, inputs):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": ')
    config = DataConfig(sources=[str(inputs[0]), str(broken)], sequence_length=32)
    storage = open_storage(str(tmp_path / "root"))
    with pytest.raises(CorpusError, match=r"broken\.jsonl: line 2 is not JSON"):
        prepare(find_sources(config.sources), config, inputs[1], 1, storage, "store/x", NoBar(), 2)
    assert not files(tmp_path / "root")
    skipping = config.replace(on_error="skip")
    manifest = prepare(find_sources(config.sources), skipping, inputs[1], 1, storage, "store/x", NoBar(), 2)
    assert len(manifest["skipped"]) == 1


def prepare_processes(parent=None):
    """Workers of our own Ray, or of another process's, that run our tasks now."""
    found = []
    for item in psutil.Process(parent).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "_reporting" in " ".join(item.cmdline()):
                found.append(item)
    return found


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Four objects that take some seconds each."""
    root = tmp_path_factory.mktemp("large")
    (root / "in").mkdir()
    text = " ".join(tiny.sentences(400))
    for number in range(4):
        lines = [json.dumps({"text": f"{number} {line} {text}"}) for line in range(150)]
        (root / "in" / f"{number}.jsonl").write_text("\n".join(lines))
    return root / "in", str(tiny.tokenizer(root / "tokenizer"))


def test_prepare_task_that_is_killed_is_done_again(tmp_path, connection, large):
    killed = []

    def kill():
        end = time.monotonic() + 60
        while not killed and time.monotonic() < end:
            if list((tmp_path / "root").rglob("*.hashes.parquet")) and (found := prepare_processes()):
                found[0].kill()
                killed.append(found[0].pid)
            time.sleep(0.05)

    thread = threading.Thread(target=kill)
    thread.start()
    manifest = build(tmp_path / "root", large, 2)
    thread.join()
    assert killed
    assert manifest == build(tmp_path / "whole", large, 0)


def test_prepare_killed_with_its_ray_goes_on_with_what_is_finished(tmp_path, large):
    code = (
        "from cluster.connection import ClusterConfig, connect\n"
        "from pathlib import Path\n"
        "from tests.integration.test_prepare_tasks import build\n"
        "with connect(ClusterConfig()):\n"
        f"    build(Path({str(tmp_path / 'root')!r}), {tuple(map(str, large))!r}, 1)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True
    )
    try:
        end = time.monotonic() + 120
        while not list((tmp_path / "root").rglob("*-*.json")):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        workers = prepare_processes(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    _, left = psutil.wait_procs(workers, timeout=60)  # they end with it
    assert not left
    assert not (tmp_path / "root/store/x/manifest.json").exists()
    done = {name: inode for name, inode in files(tmp_path / "root").items() if not name.endswith(".partial")}
    manifest = build(tmp_path / "root", large, 0)
    after = files(tmp_path / "root")
    records = {name: inode for name, inode in done.items() if name.endswith(".json")}
    assert 1 <= len(records) < 4
    assert records.items() <= after.items()
    assert manifest == build(tmp_path / "whole", large, 0)


def test_prepare_command_starts_its_own_ray_for_a_corpus_that_is_not_small(tmp_path, inputs):
    config = {
        "name": "mine",
        "data": {"sources": [str(inputs[0])], "sequence_length": 32, "validation_fraction": 0.2},
        "student": {"shape": {"model_type": "llama"}, "tokenizer": inputs[1]},
        "distill": {"alpha": 1},
        "train": {"steps": 1, "global_batch": 1},
    }
    code = (
        "import sys\n"
        "import jobs.prepare as module\n"
        "from jobs.__main__ import main\n"
        "module.SMALL_BYTES = 1000\n"
        "run_tasks = module.run_tasks\n"
        "def said(function, calls, at_once, *others):\n"
        "    print('tasks', at_once, function.__name__, file=sys.stderr)\n"
        "    return run_tasks(function, calls, at_once, *others)\n"
        "module.run_tasks = said\n"
        "main()\n"
    )
    (tmp_path / "mine.yaml").write_text(json.dumps(config))

    def command(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        whole = [sys.executable, "-c", code, "prepare", "mine.yaml", "--json", *arguments]
        return subprocess.run(whole, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)

    done = command()
    assert done.returncode == 0, done.stderr
    cores = len(os.sched_getaffinity(0))
    assert f"tasks {cores} scan_objects" in done.stderr
    assert f"tasks {cores} tokenise_objects" in done.stderr
    first = json.loads(done.stdout.splitlines()[-1])["stages"]["prepare"]
    (inputs[0] / "added.jsonl").write_text(
        "".join(json.dumps({"text": f"new {number}"}) + "\n" for number in range(20))
    )
    try:
        again = command()
        assert again.returncode == 0, again.stderr
        assert "7 of 8 objects are done already" in again.stderr
        second = json.loads(again.stdout.splitlines()[-1])["stages"]["prepare"]
        assert (second["store"], second["documents"]) == (first["store"], first["documents"] + 20)
        assert second["fingerprint"] != first["fingerprint"]
        other = command("data.sequence_length=48")
        assert json.loads(other.stdout.splitlines()[-1])["stages"]["prepare"]["store"] != first["store"]
    finally:
        (inputs[0] / "added.jsonl").unlink()
