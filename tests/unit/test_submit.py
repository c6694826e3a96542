"""What a submission is called, what travels with it, and what becomes of one that is said again."""

import os
import subprocess
import sys

import pytest

from cluster.config import load
from cluster.errors import ClusterUnreachable, ConfigError, RunInProgress
from cluster.submissions import Job, Submissions, check_dashboard_address
from jobs.config import RunConfig
from jobs.submit import (
    check_id,
    check_paths,
    default_id,
    exit_code,
    for_the_cluster,
    how_it_ended,
    read_requirements,
    submit,
    write_working_directory,
)

CANARY = "canary-5f0c2b"


def made(**changes):
    return RunConfig.model_validate(
        {
            "name": "small",
            "storage": "s3://bucket/small",
            "data": {"sources": ["s3://bucket/corpus/"]},
            "teacher": {"model": "s3://bucket/teacher"},
            "student": {"from_teacher": {"layers": [0]}},
            "train": {"steps": 10},
            **changes,
        }
    )


class Cluster:
    """The Jobs API as a dictionary: an id is taken once."""

    def __init__(self):
        self.jobs, self.directories = {}, []

    def all(self):
        return list(self.jobs.values())

    def find(self, job_id):
        return self.jobs.get(job_id)

    def submit(self, job_id, entrypoint, runtime_env, metadata=None):
        if job_id in self.jobs:
            return False
        self.runtime_env = runtime_env
        files = sorted(os.listdir(runtime_env["working_dir"]))
        self.directories.append(files)
        self.jobs[job_id] = Job(job_id, "RUNNING", entrypoint, "", metadata or {}, 1.0, None, None)
        return True

    def ends(self, job_id, status, code=None):
        job = self.jobs[job_id]
        self.jobs[job_id] = Job(**{**vars(job), "status": status, "ended": 5.0, "exit_code": code})


def test_id_is_that_of_run_config_and_command():
    config = made()
    assert default_id(config, "run") == default_id(made(), "run")
    assert default_id(config, "run").startswith("raystill-small-")
    others = {default_id(made(train={"steps": 11}), "run"), default_id(config, "train"), default_id(config, "run")}
    assert len(others) == 3


def test_id_does_not_depend_on_where_the_submitter_finds_ray():
    there = made(cluster={"address": "head:6379"})
    assert default_id(for_the_cluster(there), "run") == default_id(for_the_cluster(made()), "run")
    assert for_the_cluster(there).cluster.address is None


@pytest.mark.parametrize("name", ["Big", "a/b", "../x", "a..b", "", "a" * 64, "a b"])
def test_id_that_is_no_name_is_refused(name):
    with pytest.raises(ConfigError, match="--id"):
        check_id(name)


def test_submit_again_follows_or_begins_anew():
    cluster, said = Cluster(), []
    first = submit(made(), "run", cluster, said.append)
    assert first.is_new
    assert first.job.entrypoint == "python -m jobs run small.yaml"
    again = submit(made(), "run", cluster, said.append)
    assert (again.is_new, again.job.id) == (False, first.job.id)
    cluster.ends(first.job.id, "FAILED", 1)
    second = submit(made(), "run", cluster, said.append)
    assert (second.is_new, second.job.id) == (True, f"{first.job.id}-2")
    cluster.ends(second.job.id, "STOPPED")
    third = submit(made(), "run", cluster, said.append)
    assert third.job.id == f"{first.job.id}-3"
    cluster.ends(third.job.id, "SUCCEEDED", 0)
    fourth = submit(made(), "run", cluster, said.append)
    assert (fourth.is_new, fourth.job.id) == (True, f"{first.job.id}-4"), "its sources may have changed since"
    followed = submit(made(), "run", cluster, said.append)
    assert (followed.is_new, followed.job.id) == (False, fourth.job.id)
    assert len(said) == 4
    assert "files" in said[0]


def test_submit_again_under_an_id_of_ones_own_reports_a_success():
    cluster = Cluster()
    first = submit(made(), "run", cluster, lambda line: None, "nightly")
    cluster.ends("nightly", "FAILED", 1)
    assert submit(made(), "run", cluster, lambda line: None, "nightly").job.id == "nightly-2"
    cluster.ends("nightly-2", "SUCCEEDED", 0)
    reported = submit(made(), "run", cluster, lambda line: None, "nightly")
    assert (first.is_new, reported.is_new, reported.job.id) == (True, False, "nightly-2")
    assert len(cluster.jobs) == 2


@pytest.mark.parametrize("job_id", [None, "nightly"])
def test_submit_detached_prints_the_id_whatever_the_job_is(monkeypatch, tmp_path, job_id):
    from typer.testing import CliRunner

    from jobs.__main__ import app

    cluster, config = Cluster(), tmp_path / "small.yaml"
    config.write_text(made().model_dump_json(by_alias=True))
    monkeypatch.setattr("cluster.submissions.Submissions", lambda address: cluster)
    asked = ["submit", str(config), "--detach", *(["--id", job_id] if job_id else [])]

    def said():
        done = CliRunner().invoke(app, asked)
        assert done.exit_code == 0, done.output
        return done.stdout.split()

    [first] = said()
    assert said() == [first]
    cluster.ends(first, "SUCCEEDED", 0)
    assert said() == ([first] if job_id else [f"{first}-2"])


def test_submit_at_once_after_a_success_is_one_job():
    """Both look before either submits; the winner's job has even ended when the loser is told."""

    class Racing(Cluster):
        def submit(self, job_id, entrypoint, runtime_env, metadata=None):
            taken = super().submit(job_id, entrypoint, runtime_env, metadata)
            if self.winner_ends:
                self.ends(job_id, "SUCCEEDED", 0)
                return False
            return taken

    cluster = Racing()
    cluster.winner_ends = False
    first = submit(made(), "run", cluster, lambda line: None)
    cluster.ends(first.job.id, "SUCCEEDED", 0)
    cluster.winner_ends = True
    second = submit(made(), "run", cluster, lambda line: None)
    assert (second.is_new, second.job.id, second.job.status) == (False, f"{first.job.id}-2", "SUCCEEDED")
    assert len(cluster.jobs) == 2


def test_submit_that_loses_a_race_follows_the_winner():
    class Racing(Cluster):
        """Somebody else is between the look and the submission."""

        def submit(self, job_id, entrypoint, runtime_env, metadata=None):
            super().submit(job_id, entrypoint, runtime_env, metadata)
            return False

    done = submit(made(), "run", Racing(), lambda line: None)
    assert not done.is_new
    assert done.job.status == "RUNNING"


def test_submit_id_that_another_job_had_is_refused():
    cluster = Cluster()
    cluster.jobs["nightly"] = Job("nightly", "SUCCEEDED", "echo", "", {}, 1.0, 2.0, 0)
    with pytest.raises(ConfigError, match="another job of this id"):
        submit(made(), "run", cluster, lambda line: None, "nightly")


def test_submit_another_config_on_the_same_storage_waits_for_the_first():
    cluster = Cluster()
    first = submit(made(), "run", cluster, lambda line: None)
    with pytest.raises(RunInProgress, match=first.job.id):
        submit(made(train={"steps": 11}), "run", cluster, lambda line: None)
    cluster.ends(first.job.id, "STOPPED")
    assert submit(made(train={"steps": 11}), "run", cluster, lambda line: None).is_new


def test_submit_unknown_command_is_refused():
    with pytest.raises(ConfigError, match="expected one of run"):
        submit(made(), "serve", Cluster(), lambda line: None)


def test_submit_sends_no_variable_of_the_caller(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    cluster = Cluster()
    submit(made(), "run", cluster, lambda line: None)
    assert set(cluster.runtime_env) == {"env_vars", "working_dir"}
    assert set(cluster.runtime_env["env_vars"]) == {"RAY_JOB_STOP_WAIT_TIME_S"}
    assert CANARY not in str(vars(cluster))


def test_submit_to_an_image_with_raystill_sends_the_config_alone(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from jobs.__main__ import app

    cluster, config, pip = Cluster(), tmp_path / "small.yaml", tmp_path / "requirements.txt"
    config.write_text(made().model_dump_json(by_alias=True))
    pip.write_text("gguf>=0.19\n")
    monkeypatch.setattr("cluster.submissions.Submissions", lambda address: cluster)
    asked = ["submit", str(config), "--detach", "--image-has-raystill", "--pip", str(pip)]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert "config, 1 files" in done.stderr
    assert cluster.directories == [["small.yaml"]]
    assert [job.entrypoint for job in cluster.all()] == ["python -m jobs run small.yaml"]
    assert set(cluster.runtime_env) == {"env_vars", "pip", "working_dir"}
    assert set(cluster.runtime_env["env_vars"]) == {"RAY_JOB_STOP_WAIT_TIME_S"}
    assert cluster.runtime_env["pip"] == {"packages": ["gguf>=0.19"], "pip_check": False}


def test_working_directory_holds_config_and_code_alone(tmp_path):
    files, size_bytes = write_working_directory(tmp_path, made(), True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cluster", "jobs", "services", "small.yaml"]
    assert files == sum(path.is_file() for path in tmp_path.rglob("*"))
    assert 100_000 < size_bytes < 5_000_000
    assert not [path for path in tmp_path.rglob("*") if path.name == "__pycache__" or path.suffix == ".pyc"]
    assert (tmp_path / "jobs" / "configs" / "demo.yaml").is_file()
    assert (tmp_path / "jobs" / "evaluating" / "report.html.j2").is_file()


def test_working_directory_of_an_image_with_raystill_is_the_config(tmp_path):
    assert write_working_directory(tmp_path, made(), False)[0] == 1
    assert load(RunConfig, tmp_path / "small.yaml") == made()


def test_working_directory_runs_without_an_installed_raystill(tmp_path):
    write_working_directory(tmp_path, made(), True)
    code = "import jobs.__main__, cluster, services; print(jobs.__main__.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "jobs" / "__main__.py"), done.stderr


@pytest.mark.parametrize(
    "changes",
    [
        {"storage": "runs/small"},
        {"storage": "~/small"},
        {"data": {"sources": ["corpus.jsonl"]}},
        {"teacher": {"model": "./teacher"}},
        {"distill": {"label_store": "labels"}},
        {"evaluate": {"tasks": [{"name": "mmlu", "format": "mmlu", "source": "mmlu.parquet"}]}},
    ],
    ids=str,
)
def test_paths_of_this_machine_are_refused_with_the_reason(changes):
    with pytest.raises(ConfigError, match=r"other machines do not have.*s3://bucket/prefix"):
        check_paths(made(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"storage": "/mnt/shared/small"},
        {"storage": "file:///mnt/shared/small"},
        {"teacher": {"model": "organisation/model"}},
        {"teacher": {"model": "models:/name@champion"}},
    ],
    ids=str,
)
def test_paths_that_other_machines_may_have_pass(changes):
    check_paths(made(**changes))


def test_paths_model_directory_that_is_here_is_refused(tmp_path, monkeypatch):
    (tmp_path / "organisation" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"teacher\.model=organisation/model"):
        check_paths(made(teacher={"model": "organisation/model"}))


def test_requirements_are_read_and_secrets_refused(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text("# of the nodes\ntorchao==0.18.0  # pinned\n\ngguf>=0.19\n")
    assert read_requirements(path) == ["torchao==0.18.0", "gguf>=0.19"]
    for line in ("--index-url https://x", "pkg @ https://user:word@host/pkg.whl"):
        path.write_text(line)
        with pytest.raises(ConfigError, match=r"pip\.conf"):
            read_requirements(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_requirements(tmp_path / "none.txt")


def test_exit_code_is_that_of_the_command():
    def ended(status, code=None):
        return Job("x", status, "", "first\nlast reason", {}, 1.0, 5.0, code)

    assert [exit_code(ended("SUCCEEDED", 0)), exit_code(ended("FAILED", 2)), exit_code(ended("FAILED"))] == [0, 2, 1]
    assert exit_code(ended("STOPPED")) == 1
    assert how_it_ended(ended("FAILED", 2)) == "job x failed after 4 s with exit code 2"
    assert how_it_ended(ended("FAILED")).endswith("last reason")


class Breaking:
    """The SDK's own way to follow a log, over a connection that breaks after every piece."""

    def __init__(self, text):
        self.text, self.breaks = text, 0

    async def tail_job_logs(self, job_id):
        for start in range(0, len(self.text), 5):
            yield self.text[start : start + 5]
            if start // 5 >= self.breaks and self.breaks < 3:
                self.breaks += 1
                raise ConnectionResetError("cut")


def followed(monkeypatch, client, find, patience_s=60.0):
    async def at_once(seconds):
        pass

    monkeypatch.setattr("cluster.submissions.asyncio.sleep", at_once)
    jobs = Submissions.__new__(Submissions)
    jobs.address, jobs._patience_s, jobs._client, jobs.find = "http://head:8265", patience_s, client, find
    written, said = [], []
    return jobs.follow("x", written.append, said.append), "".join(written), said


def test_follow_shows_each_line_once_however_often_the_connection_breaks(monkeypatch):
    client = Breaking("one\ntwo\nthree\nfour\n")
    states = iter(["RUNNING"] * 4 + ["SUCCEEDED"] * 9)
    job, written, said = followed(monkeypatch, client, lambda job_id: Job("x", next(states), "", "", {}, 1.0, None, 0))
    assert (job.status, written, client.breaks) == ("SUCCEEDED", client.text, 3)
    assert sum("lost" in line for line in said) == 3


def test_follow_of_a_head_that_was_replaced_or_is_gone_ends_and_says_how_to_go_on(monkeypatch):
    with pytest.raises(ClusterUnreachable, match="has no job x: if its head was replaced, submit again"):
        followed(monkeypatch, Breaking(""), lambda job_id: None)

    def gone(job_id):
        raise ClusterUnreachable("no dashboard answers")

    with pytest.raises(ClusterUnreachable, match=r"has not answered.*submit again to a new one"):
        followed(monkeypatch, Breaking(""), gone, patience_s=0.0)


def test_address_is_completed_or_refused():
    assert check_dashboard_address("head:8265/") == "http://head:8265"
    assert check_dashboard_address("https://head") == "https://head"
    for wrong in ("ray://head:10001", "http://user:word@head:8265"):
        with pytest.raises(ClusterUnreachable, match="expected the dashboard's"):
            check_dashboard_address(wrong)
