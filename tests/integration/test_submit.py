"""Jobs on a real head that asks for a token: submitted, followed, listed, stopped, continued; and what may be read."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests import tiny
from tests.command_line import COMMAND, environment, raystill
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
    path = tmp_path / "small.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "small",
                "storage": str(tmp_path / "storage"),
                "data": {
                    "sources": [str(tiny.corpus(tmp_path / "in", 60))],
                    "sequence_length": 48,
                    "validation_fraction": 0.2,
                },
                "teacher": {"model": str(tiny.save_model(tmp_path / "teacher")), "dtype": "float32"},
                "student": {"from_teacher": {"layers": [0]}},
                "train": {"steps": 12, "global_batch": 8, "micro_batch": 4, "checkpoint_every": 4, "validate_every": 4},
            }
        )
    )
    return path


def call(cluster, *arguments, cwd, **options):
    address = ["--address", cluster.dashboard]
    return raystill(*arguments, *address, cwd=cwd, env=options.pop("env", variables()), timeout=500, **options)


def job_id_of(done):
    return re.search(r"job (\S+): config and code, (\d+) files", done.stderr)[1]


def test_submit_follows_to_the_end_and_is_safe_to_repeat(cluster, config, tmp_path):
    first = call(cluster, "submit", config, "--command", "prepare", cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert re.search(r"prepare +\d+ s", first.stdout)
    job_id = job_id_of(first)
    assert f"job {job_id} succeeded" in first.stderr
    again = call(cluster, "submit", config, "--command", "prepare", cwd=tmp_path)
    assert again.returncode == 0
    assert f"job {job_id} succeeded" in again.stderr
    assert "files" not in again.stderr
    listed = json.loads(call(cluster, "jobs", "--json", cwd=tmp_path).stdout)
    assert [job["exit_code"] for job in listed if job["id"] == job_id] == [0]
    table = call(cluster, "jobs", cwd=tmp_path)
    assert job_id in table.stdout
    assert call(cluster, "logs", job_id, cwd=tmp_path).stdout.count("Running entrypoint") == 1


def test_submit_ends_with_the_exit_code_of_the_command(cluster, config, tmp_path):
    done = call(cluster, "submit", config, "train.global_batch=4000", "--command", "prepare", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "raystill:" in done.stdout
    again = call(cluster, "submit", config, "train.global_batch=4000", "--command", "prepare", cwd=tmp_path)
    assert job_id_of(again) == f"{job_id_of(done)}-2"


def test_two_that_submit_at_once_have_one_job(cluster, config, tmp_path):
    arguments = ["submit", config, "train.steps=1", "--command", "prepare", "--detach", "--address", cluster.dashboard]
    both = [
        subprocess.Popen(
            [*COMMAND, *map(str, arguments)], cwd=tmp_path, env=variables(), text=True, stdout=-1, stderr=-1
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len({out.strip() for out, _ in said if out.strip()}) == 1
    assert sum("config and code" in err for _, err in said) == 1


def test_stop_waits_and_the_next_submission_goes_on_from_the_checkpoint(cluster, config, tmp_path):
    long = [config, "train.steps=200", "--command", "train", "--id", "long"]
    assert call(cluster, "submit", config, "train.steps=200", "--command", "prepare", cwd=tmp_path).returncode == 0
    started = call(cluster, "submit", *long, "--detach", cwd=tmp_path)
    assert started.stdout.strip() == "long"
    checkpoints = tmp_path / "storage" / "student"
    wait_until(lambda: list(checkpoints.glob("*/checkpoints/step-*/manifest.json")), 500, "a checkpoint")
    stopped = call(cluster, "stop", "long", cwd=tmp_path)
    assert stopped.returncode == 0, stopped.stderr
    assert "job long stopped" in stopped.stderr
    listed = json.loads(call(cluster, "jobs", "--json", cwd=tmp_path).stdout)
    assert [job["status"] for job in listed if job["id"] == "long"] == ["STOPPED"]
    reached = max(int(path.parent.name[5:]) for path in checkpoints.glob("*/checkpoints/step-*/manifest.json"))
    assert reached < 200
    again = call(cluster, "submit", *long, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert job_id_of(again) == "long-2"
    summary = json.loads((tmp_path / "storage" / "summary.json").read_text())
    assert summary["stages"]["train"]["status"] == "done"
    assert summary["stages"]["train"]["rows"] == 200 * 8


def test_wrong_and_missing_tokens_are_refused_in_one_line(cluster, config, tmp_path):
    for command in (["submit", config], ["jobs"], ["logs", "x"], ["stop", "x"]):
        wrong = call(cluster, *command, cwd=tmp_path, env=variables(RAY_AUTH_TOKEN="wrong" * 10))
        assert wrong.returncode == 2
        assert wrong.stderr.count("\n") == 1
        assert "does not take the token" in wrong.stderr
    missing = call(cluster, "jobs", cwd=tmp_path, env=variables(RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN=""))
    assert missing.returncode == 2
    assert "asks for a token" in missing.stderr
    unknown = call(cluster, "logs", "none", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "none of this id" in unknown.stderr


def test_secrets_of_the_submitter_are_found_nowhere_in_the_cluster(cluster, config, tmp_path):
    done = call(cluster, "submit", config, "--command", "prepare", "--id", "secrets", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    listing = (
        call(cluster, "jobs", "--json", cwd=tmp_path).stdout + call(cluster, "logs", "secrets", cwd=tmp_path).stdout
    )
    assert "secrets" in listing
    assert CANARY not in listing
    files = [path for path in Path(cluster.directory).rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.name.startswith("runtime_env_agent") for path in files)
    holding = [str(path) for path in files if CANARY.encode() in path.read_bytes()]
    assert not holding
    assert not [str(path) for path in files if path.suffix == ".log" and TOKEN.encode() in path.read_bytes()]


def test_doctor_looks_at_the_nodes_and_at_the_storage_from_there(cluster, config, tmp_path):
    done = call(cluster, "doctor", config, "--json", cwd=tmp_path)
    report = json.loads(done.stdout.strip().splitlines()[-1])
    found = {(check["where"].split()[0], check["what"]): check for check in report["checks"]}
    assert found["cluster", "authentication"]["status"] == "ok"
    assert found["cluster", "ray"]["status"] == "ok"
    assert found["node", "same versions"]["status"] == "ok", report
    assert {("node", "disk"), ("node", "GPUs"), ("head", "storage"), ("head", "champions")} <= found.keys()
    assert found["head", "storage"]["status"] == "ok"
    assert done.returncode == (1 if report["failures"] else 0)
    refused = call(cluster, "doctor", "--json", cwd=tmp_path, env=variables(RAY_AUTH_TOKEN="wrong" * 10))
    assert refused.returncode == 1
    assert "does not take the token" in refused.stdout
