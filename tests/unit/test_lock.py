"""A run belongs to one process at a time, until that process ends, however it does."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.errors import RunInProgress
from jobs.lock import only_one
from tests.command_line import free_port

HOLD = """
import sys
from pathlib import Path
from types import SimpleNamespace
from jobs.lock import only_one
with only_one(SimpleNamespace(name="mine", state_directory=Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


def config(tmp_path):
    return SimpleNamespace(name="mine", state_directory=tmp_path / "state")


def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "state")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_run_is_held_by_one_process_and_named_to_the_other(tmp_path):
    process = holder(tmp_path)
    with pytest.raises(RunInProgress, match=f"run mine: process {process.pid} works on it already.*name="):
        only_one(config(tmp_path)).__enter__()
    process.stdin.close()
    assert process.wait(30) == 0
    with only_one(config(tmp_path)):
        pass


def test_run_of_a_process_that_was_killed_is_free(tmp_path):
    process = holder(tmp_path)
    process.kill()
    process.wait(30)
    with only_one(config(tmp_path)):
        assert (tmp_path / "state" / "run.lock").is_file()


def test_lock_leaves_nothing_behind_and_keeps_what_the_run_made(tmp_path):
    with only_one(config(tmp_path)):
        pass
    assert not (tmp_path / "state").exists()
    with only_one(config(tmp_path)):
        (tmp_path / "state" / "summary.json").touch()
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["summary.json"]


def test_run_given_twice_names_the_first_and_not_the_port_at_which_it_answers(tmp_path, forked_raystill):
    demo, port = Path(__file__).parents[2] / "jobs" / "configs" / "demo.yaml", free_port()
    overrides = [f"storage={tmp_path / 'run'}", f"serve.port={port}"]
    first = SimpleNamespace(name="demo", state_directory=tmp_path / "run")
    with socket.create_server(("127.0.0.1", port)), only_one(first):
        second = forked_raystill("run", demo, *overrides, cwd=tmp_path)
    assert second.returncode == 2, second.stderr
    assert f"process {os.getpid()} works on it already" in second.stderr
