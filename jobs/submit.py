"""`raystill submit`: a run as a job on a cluster's head, under an id that follows from the run itself.

Saying it again is safe. A job of the id that waits or runs is followed; one that has ended is begun anew under the next
number. After a failure or a stop that one goes on from the run's checkpoints; after a success it passes over what is
finished, and does what sources that have changed since ask for. Under an id of the caller's own a success is only
reported: that id stands for this one piece of work. Of two that submit at once one wins and the other follows.

What travels is the resolved config and, unless the image holds raystill, its three packages. Nothing of the caller's
environment does: credentials come from the nodes' role, or from files and variables on the nodes.
"""

import re
import shlex
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.config import fingerprint
from cluster.errors import ConfigError, RunInProgress
from cluster.names import NAME
from cluster.submissions import Job, Submissions
from jobs.config import RunConfig

COMMANDS = ("run", "prepare", "label", "train", "evaluate", "quantize", "register", "promote", "doctor")
PACKAGES = ("cluster", "services", "jobs")
_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
_STOP_WAIT_S = 60
"""Seconds that a job has after SIGTERM to remove its teachers and close its records; Ray's own default is 3."""
_FAMILY, _ATTEMPT = "raystill.id", "raystill.attempt"
_RUN, _COMMAND, _STORAGE = "raystill.run", "raystill.command", "raystill.storage"


@dataclass(frozen=True)
class Submitted:
    """What came of a submission."""

    job: Job
    is_new: bool
    """Whether this call started it."""


def submit(
    config: RunConfig,
    command: str,
    cluster: Submissions,
    say: Callable[[str], object],
    job_id: str | None = None,
    image_has_raystill: bool = False,
    pip: Path | None = None,
) -> Submitted:
    """Has the cluster do `raystill COMMAND` with this config, unless it does so already.

    Args:
        say: is given lines for people.
        job_id: instead of the id that follows from run, config and command; once it has succeeded nothing is started.
        image_has_raystill: send the config alone.
        pip: a requirements file that every node installs first.

    Raises:
        ConfigError: the config names what only this machine has, or the id or the requirements cannot be used.
        RunInProgress: another job works on the same storage.
        ClusterUnreachable: the cluster does not take it.
    """
    if command not in COMMANDS:
        raise ConfigError(f"command {command!r}: expected one of {', '.join(COMMANDS)}")
    check_paths(config)
    there = for_the_cluster(config)
    family = check_id(job_id) if job_id is not None else default_id(there, command)
    runtime_env: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S)}}
    if pip is not None:
        runtime_env["pip"] = {"packages": read_requirements(pip), "pip_check": False}
    with tempfile.TemporaryDirectory(prefix="raystill-submit-") as name:
        files, size_bytes = write_working_directory(Path(name), there, not image_has_raystill)
        runtime_env["working_dir"] = name
        while True:
            known = [job for job in cluster.all() if job.metadata.get(_FAMILY) == family]
            latest = max(known, key=_attempt, default=None)
            if latest is not None and (not latest.has_ended or (latest.status == "SUCCEEDED" and job_id is not None)):
                return Submitted(latest, False)
            if command != "doctor":
                _check_storage_is_free(there, family, cluster)
            attempt = 1 if latest is None else _attempt(latest) + 1
            next_id = family if attempt == 1 else f"{family}-{attempt}"
            metadata = {
                _FAMILY: family,
                _ATTEMPT: str(attempt),
                _RUN: there.name,
                _COMMAND: command,
                _STORAGE: there.storage,
            }
            entrypoint = shlex.join(["python", "-m", "jobs", command, f"{there.name}.yaml"])
            if cluster.submit(next_id, entrypoint, runtime_env, metadata):
                what = "config" if image_has_raystill else "config and code"
                say(f"job {next_id}: {what}, {files} files, {size_bytes / 1000:,.0f} kB")
                started = cluster.find(next_id)
                assert started is not None, "the cluster has just taken it"
                return Submitted(started, True)
            taken = cluster.find(next_id)
            if taken is not None and taken.metadata.get(_FAMILY) != family:
                raise ConfigError(f"job {next_id}: the cluster has had another job of this id; choose one with --id")
            if taken is not None and taken.status == "SUCCEEDED":  # somebody else's, begun after this call and quick
                return Submitted(taken, False)


def submit_doctor(cluster: Submissions, job_id: str) -> None:
    """Has the head look at the nodes, with nothing but code: what no run is needed for."""
    with tempfile.TemporaryDirectory(prefix="raystill-submit-") as name:
        write_working_directory(Path(name), None, True)
        cluster.submit(job_id, "python -m jobs doctor", {"working_dir": name}, {_COMMAND: "doctor"})


def default_id(config: RunConfig, command: str) -> str:
    """The id of a run's first job, whose later ones have a number behind it: the same for the same config and command,
    whoever submits it from wherever."""
    return f"raystill-{config.name}-{fingerprint([command, config.model_dump(mode='json')])[:8]}"


def check_id(job_id: str) -> str:
    """The id itself.

    Raises:
        ConfigError: it is not a name.
    """
    if not re.fullmatch(NAME, job_id) or ".." in job_id:
        raise ConfigError(f"--id {job_id!r}: use up to 63 small letters, digits, '.', '_' and '-'")
    return job_id


def for_the_cluster(config: RunConfig) -> RunConfig:
    """The config as the job is given it: the job finds its own Ray."""
    return config.replace(cluster=config.cluster.replace(address=None).model_dump())


def check_paths(config: RunConfig) -> None:
    """Raises `ConfigError` if the config names files by paths that mean something else, or nothing, on another machine.

    An absolute path passes: it is for the user to mount it on every node.
    """
    places: dict[str, str | None] = {
        "storage": config.storage,
        "distill.label_store": config.distill.label_store,
        **{f"data.sources[{number}]": source for number, source in enumerate(config.data.sources)},
    }
    for task in config.evaluate.tasks:
        places |= {f"evaluate.tasks.{task.name}.source": task.source, f"evaluate.tasks.{task.name}.shots_source": None}
        if task.shots_source is not None:
            places[f"evaluate.tasks.{task.name}.shots_source"] = task.shots_source
    models = {
        "teacher.model": config.teacher.model if config.teacher is not None else None,
        "student.model": config.student.model,
        "student.tokenizer": config.student.tokenizer,
    }
    local = [f"{place}={value}" for place, value in places.items() if value is not None and _is_local(value)]
    local += [f"{place}={value}" for place, value in models.items() if value is not None and _is_local_model(value)]
    if local:
        raise ConfigError(
            f"{', '.join(local)}: a path from here, which other machines do not have; a cluster needs "
            "s3://bucket/prefix, or an absolute path that every node mounts"
        )


def _is_local(value: str) -> bool:
    return "://" not in value and not value.startswith("/")


def _is_local_model(value: str) -> bool:
    """Hub ids look like relative paths: one counts as a path if it says so, or if there is a directory of that name."""
    if "://" in value or value.startswith(("models:/", "/")):
        return False
    return value.startswith((".", "~")) or Path(value).is_dir()


def write_working_directory(directory: Path, config: RunConfig | None, with_code: bool) -> tuple[int, int]:
    """Fills a directory with what the job works from.

    Returns:
        The number of files, and their bytes.
    """
    if config is not None:
        text = yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)
        (directory / f"{config.name}.yaml").write_text(text, encoding="utf-8")
    if with_code:
        root = Path(__file__).parents[1]
        for package in PACKAGES:
            shutil.copytree(root / package, directory / package, ignore=_IGNORED)
    files = [path for path in directory.rglob("*") if path.is_file()]
    return len(files), sum(path.stat().st_size for path in files)


def read_requirements(path: Path) -> list[str]:
    """Requirements, one a line; comments are left out.

    Raises:
        ConfigError: there is no such file, or it holds an option or a URL with a password.
    """
    try:
        lines = [line.partition(" #")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ConfigError(f"--pip {path}: cannot be read ({error.strerror})") from error
    wanted = [line for line in lines if line and not line.startswith("#")]
    for line in wanted:
        if line.startswith("-") or "@" in line.partition("://")[2].partition("/")[0]:
            raise ConfigError(
                f"--pip {path}: {line.split()[0]!r} is not a requirement that may be shown: whoever lists the jobs "
                "of a cluster reads these lines. Put indexes and credentials into pip.conf on the nodes"
            )
    return wanted


def _attempt(job: Job) -> int:
    found = job.metadata.get(_ATTEMPT, "1")
    return int(found) if found.isdecimal() else 1


def _check_storage_is_free(config: RunConfig, family: str, cluster: Submissions) -> None:
    for job in cluster.all():
        works = job.metadata.get(_COMMAND) != "doctor" and job.metadata.get(_FAMILY) != family
        same = works and job.metadata.get(_STORAGE) == config.storage
        if same and not job.has_ended:
            raise RunInProgress(
                f"run {config.name}: job {job.id} works on {config.storage} already, with another config or command; "
                f"wait for it (`raystill logs {job.id} --follow`), stop it (`raystill stop {job.id}`), or give "
                "this one another name= and storage="
            )


def jobs_table(jobs: list[Job]) -> Any:
    """What `raystill jobs` shows."""
    import time
    from datetime import datetime

    from rich.table import Table

    table = Table("job", "status", "run", "command", "started", "took", "exit code", box=None, pad_edge=False)
    for job in jobs:
        began = datetime.fromtimestamp(job.started).strftime("%Y-%m-%d %H:%M:%S") if job.started else ""
        took = f"{(job.ended or time.time()) - job.started:,.0f} s" if job.started else ""
        code = "" if job.exit_code is None else str(job.exit_code)
        run, command = job.metadata.get(_RUN, ""), job.metadata.get(_COMMAND, "")
        table.add_row(job.id, job.status.lower(), run, command or job.entrypoint[:40], began, took, code)
    return table


def exit_code(job: Job) -> int:
    """What a command that followed the job ends with: the job's own exit code where it has one."""
    if job.status == "SUCCEEDED":
        return 0
    return job.exit_code if job.exit_code is not None and 0 < job.exit_code < 126 else 1


def how_it_ended(job: Job) -> str:
    """One line for people."""
    took = f" after {job.ended - job.started:,.0f} s" if job.started and job.ended else ""
    if job.status == "SUCCEEDED":
        return f"job {job.id} succeeded{took}"
    if job.exit_code is not None:
        return f"job {job.id} failed{took} with exit code {job.exit_code}"
    reason = next((line for line in reversed(job.message.splitlines()) if line.strip()), "")
    return f"job {job.id} {job.status.lower()}{took}" + (f": {reason.strip()[:300]}" if reason else "")
