"""The process that forks the tests' commands: one that is not awaited to its end does not spoil the next."""

import os
import select
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.forked_commands import forked_commands
from tests.ray_cluster import wait_until

PROGRAM = """
import json, os, subprocess, sys
from pathlib import Path
for line in sys.stdin:
    asked = json.loads(line)
    for name in asked["streams"]:
        Path(name).write_text(f"{os.getpid()}")
    code, *seconds = asked["arguments"]
    if seconds:
        child = subprocess.Popen(["sleep", *seconds])
        Path(asked["cwd"], "child").write_text(f"{child.pid}")
        child.wait()
    print(code, flush=True)
"""


@pytest.fixture
def raystill():
    with forked_commands([sys.executable, "-c", PROGRAM]) as call:
        yield call


def begun_in(directory: Path) -> int:
    """What the command began."""
    wait_until(lambda: (directory / "child").is_file() and (directory / "child").read_text(), 60, "a process", 0.01)
    return int((directory / "child").read_text())


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_commands_one_after_the_other_have_one_process(raystill, tmp_path):
    first, second = raystill("7", cwd=tmp_path), raystill("0", cwd=tmp_path)
    assert (first.returncode, second.returncode) == (7, 0)
    assert first.stdout == second.stdout


def test_command_that_hangs_is_ended_and_the_next_has_its_own_answer(raystill, tmp_path):
    before = raystill("0", cwd=tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        raystill("3", "600", cwd=tmp_path, timeout_s=0.3)
    assert not psutil.pid_exists(int(before.stdout))
    assert raystill("7", cwd=tmp_path).returncode == 7


def test_command_of_a_test_that_is_broken_off_is_ended_with_what_it_began(raystill, tmp_path, monkeypatch):
    running = []

    def broken_off(*_):
        running.append(begun_in(tmp_path))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(select, "select", broken_off)
        with pytest.raises(KeyboardInterrupt):
            raystill("3", "600", cwd=tmp_path)
    wait_until(lambda: not runs(running[0]), 60, "it ended", 0.01)
    assert raystill("7", cwd=tmp_path).returncode == 7


def test_commands_are_ended_where_their_process_does_not_end(tmp_path, monkeypatch):
    wait, waited = subprocess.Popen.wait, []

    def in_time(process, timeout=None):
        if timeout == 10:
            waited.append(process)
            raise subprocess.TimeoutExpired("it", timeout)
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", in_time)
    with forked_commands([sys.executable, "-c", PROGRAM]) as raystill:
        made = int(raystill("0", cwd=tmp_path).stdout)
        assert os.getpgid(made) == made
    assert [process.returncode is not None for process in waited] == [True]
