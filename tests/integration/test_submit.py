"""Jobs on a real head that asks for a token: submitted, followed, listed, stopped, continued; and what may be read."""

import itertools
import json
import re
import sqlite3
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests import tiny
from tests.command_line import COMMAND, environment, raystill
from tests.planted_secrets import Planted
from tests.ray_cluster import running, wait_until

pytestmark = pytest.mark.integration
TOKEN = "token-" + "4c1d" * 12
CANARY = "canary-9a77e3"


@pytest.fixture(scope="module")
def cluster():
    with running({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}, num_cpus=4) as started:
        yield started


def variables(**more):
    found = {
        **environment(),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "AWS_SECRET_ACCESS_KEY": CANARY,
        "RAYSTILL_DATABASE_URL": f"postgresql://user:{CANARY}@nowhere/db",
    }
    return {**found, **more}


@pytest.fixture
def config(tmp_path):
    return tiny.run_config("small", tmp_path, documents=60, storage=str(tmp_path / "storage"))


@pytest.fixture
def call(cluster, tmp_path, forked_raystill):
    """Runs a command for the cluster, or for another."""

    def call(*arguments, raystill=forked_raystill, env=None, at=cluster):
        return raystill(*arguments, "--address", at.dashboard, cwd=tmp_path, env=env or variables())

    return call


def job_id_of(done):
    return re.search(r"job (\S+): config and code, (\d+) files", done.stderr)[1]


def test_submit_follows_to_the_end_and_is_safe_to_repeat(call, config):
    first = call("submit", config, "--command", "prepare")
    assert first.returncode == 0, first.stdout + first.stderr
    assert re.search(r"prepare +\d+ s", first.stdout)
    job_id = job_id_of(first)
    assert f"job {job_id} succeeded" in first.stderr
    again = call("submit", config, "--command", "prepare")
    assert again.returncode == 0, again.stdout + again.stderr
    assert job_id_of(again) == f"{job_id}-2"
    assert "nothing to do" in again.stdout
    own = [call("submit", config, "--command", "prepare", "--id", "own", "--detach").stdout.strip()]
    call("logs", "own", "--follow")
    own += [call("submit", config, "--command", "prepare", "--id", "own", "--detach").stdout.strip()]
    assert own == ["own", "own"], "under an id of one's own a success is reported"
    listed = json.loads(call("jobs", "--json").stdout)
    assert [job["exit_code"] for job in listed if job["id"].startswith((job_id, "own"))] == [0, 0, 0]
    table = call("jobs")
    assert job_id in table.stdout
    assert call("logs", job_id).stdout.count("Running entrypoint") == 1


def test_submit_ends_with_the_exit_code_of_the_command(call, config):
    done = call("submit", config, "train.global_batch=4000", "--command", "prepare")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "raystill:" in done.stdout
    again = call("submit", config, "train.global_batch=4000", "--command", "prepare")
    assert job_id_of(again) == f"{job_id_of(done)}-2"


def test_two_that_submit_at_once_have_one_job_at_a_time(call, cluster, config, tmp_path):
    arguments = ["submit", config, "train.steps=1", "--command", "prepare", "--detach", "--address", cluster.dashboard]
    both = [
        subprocess.Popen(
            [*COMMAND, *map(str, arguments)], cwd=tmp_path, env=variables(), text=True, stdout=-1, stderr=-1
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    ids = sorted({out.strip() for out, _ in said if out.strip()})
    assert sum("config and code" in err for _, err in said) == len(ids)
    jobs = {job["id"]: job for job in json.loads(call("jobs", "--json").stdout)}
    for before, after in itertools.pairwise(ids):  # one of the two came late: then the other's job was over
        assert jobs[before]["ended"] <= jobs[after]["started"]


def test_stop_waits_and_the_next_submission_to_another_cluster_goes_on_from_the_checkpoint(
    call, config, tmp_path, forked_raystill
):
    """The other cluster has another head: of the first one nothing is left but what is in storage."""
    long = [config, "train.steps=200", "--command", "train", "--id", "long"]
    assert forked_raystill("prepare", config, cwd=tmp_path).returncode == 0

    def reached():
        found = (tmp_path / "storage" / "student").glob("*/checkpoints/step-*/manifest.json")
        return max((int(path.parent.name[5:]) for path in found), default=0)

    with running({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}, num_cpus=4) as lost:
        started = call("submit", *long, "--detach", at=lost)
        assert started.stdout.strip() == "long"
        wait_until(reached, 500, "a checkpoint")
        stopped = call("stop", "long", at=lost)
        assert stopped.returncode == 0, stopped.stderr
        assert "job long stopped" in stopped.stderr
        listed = json.loads(call("jobs", "--json", at=lost).stdout)
        assert [(job["id"], job["status"]) for job in listed] == [("long", "STOPPED")]
        lost.kill(lost.head)
    kept = reached()
    assert kept < 200
    again = call("submit", *long)
    assert again.returncode == 0, again.stdout + again.stderr
    assert job_id_of(again) == "long", "this cluster knows of no such job"
    summary = json.loads((tmp_path / "storage" / "summary.json").read_text())
    assert summary["stages"]["train"]["status"] == "done"
    assert summary["stages"]["train"]["rows"] == 200 * 8
    with sqlite3.connect(tmp_path / "storage" / "mlflow.db") as database:
        steps = Counter(step for (step,) in database.execute("select step from metrics where key = 'train/loss'"))
    assert max(steps[step] for step in range(1, kept + 1)) == 1, "what the checkpoint had was not trained again"


def test_wrong_and_missing_tokens_are_refused_in_one_line(call, config):
    for command in (["submit", config], ["jobs"], ["logs", "x"], ["stop", "x"]):
        wrong = call(*command, env=variables(RAY_AUTH_TOKEN="wrong" * 10))
        assert wrong.returncode == 2
        assert wrong.stderr.count("\n") == 1
        assert "does not take the token" in wrong.stderr
    missing = call("jobs", raystill=raystill, env=variables(RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN=""))
    assert missing.returncode == 2
    assert "asks for a token" in missing.stderr
    unknown = call("logs", "none")
    assert unknown.returncode == 2
    assert "none of this id" in unknown.stderr


def test_secrets_of_the_submitter_are_found_nowhere_in_the_cluster(call, cluster, config):
    done = call("submit", config, "--command", "prepare", "--id", "secrets")
    assert done.returncode == 0, done.stdout + done.stderr
    listing = call("jobs", "--json").stdout + call("logs", "secrets").stdout
    assert "secrets" in listing
    assert CANARY not in listing
    assert list(Path(cluster.directory).rglob("runtime_env_agent*"))
    for secret, pattern in ((CANARY, "*"), (TOKEN, "*.log")):
        planted = Planted({"secret": secret})
        planted.in_files(Path(cluster.directory), pattern)
        assert planted.searched["files"] > 10
        assert not planted.found


def test_doctor_looks_at_the_nodes_and_at_the_storage_from_there(call, cluster, config):
    done = call("doctor", config, "--json")
    report = json.loads(done.stdout.strip().splitlines()[-1])
    found = {(check["where"].split()[0], check["what"]): check for check in report["checks"]}
    assert found["cluster", "authentication"]["status"] == "ok"
    assert found["cluster", "ray"]["status"] == "ok"
    assert found["node", "same versions"]["status"] == "ok", report
    assert {("node", "disk"), ("node", "GPUs"), ("head", "storage"), ("head", "champions")} <= found.keys()
    assert found["node", "clock"]["status"] == found["cluster", "clock"]["status"] == "ok"
    assert found["head", "storage"]["status"] == "ok"
    assert done.returncode == (1 if report["failures"] else 0)
    alone = json.loads(call("doctor", "--json").stdout.strip().splitlines()[-1])["checks"]
    assert {(where, what) for where, what in found if where in ("cluster", "node")} == {
        (check["where"].split()[0], check["what"]) for check in alone if check["where"] != "this machine"
    }, "without a config the nodes are looked at too"
    refused = call("doctor", "--json", env=variables(RAY_AUTH_TOKEN="wrong" * 10))
    assert refused.returncode == 1
    assert "does not take the token" in refused.stdout
