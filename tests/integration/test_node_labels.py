"""Teachers run on the nodes for teachers and students on those for students, and not the other way round."""

import subprocess
import sys

import pytest

from tests.command_line import environment, last_json

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


def test_replicas_and_workers_run_on_the_nodes_with_their_labels(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.labelled_nodes", str(tmp_path / "run")],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = last_json(done.stdout)
    assert set(found["teachers"]) == {"teacher"}
    assert set(found["students"]) == {"student"}
    assert (len(found["teachers"]), len(found["students"])) == (2, 2)
