"""Two demos at once on servers: `python -m tests.endurance.servers [--share 0.1]`.

Everything that raystill keeps is on a server of its kind: corpora, checkpoints and students on S3 (OpenStack Swift),
runs and versions on MLflow, whose records are on PostgreSQL and whose artefacts are on S3, champions on PostgreSQL. Two
runs of the shipped demo under two names share all of them and the machine. They have the same seed, so each must see
the same rows and come to the same losses (as far as bfloat16 does: teachers merge the requests that are there), and
MLflow must have every step of each, once. The secrets that the runs were given must be in no log of their Rays, in
nothing that MLflow, S3 or the champions' database keeps, and in none of their directories. The last line is JSON.
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests import mlflow_server, postgres_server, s3_server
from tests.command_line import COMMAND, end, environment, free_port, last_json
from tests.planted_secrets import Planted, kept_logs

NAMES = ("first", "second")
TEACHER_STEPS, STEPS = 1050, 450
LARGEST_GAP = 0.01
BUCKETS = ("bucket", "mlflow")
DEMO = Path(__file__).parents[2] / "jobs" / "configs" / "demo.yaml"


def run_both(directory: Path, variables: dict[str, str], share: float) -> dict[str, dict[str, Any]]:
    """The summaries of two runs that began together, by name.

    Raises:
        SystemExit: one of them failed.
    """
    steps = [f"teacher.train.steps={round(share * TEACHER_STEPS)}", f"train.steps={round(share * STEPS)}"]
    processes: dict[str, subprocess.Popen[str]] = {}
    try:
        for name in NAMES:
            (directory / name).mkdir()
            own = [f"name={name}", f"storage=s3://bucket/{name}", f"serve.port={free_port()}"]
            if share < 1:
                own.append("promote.max_quality_drop=0.05")
            processes[name] = subprocess.Popen(
                [*COMMAND, "run", str(DEMO), *own, *steps, "--json"],
                cwd=directory / name,
                env={**environment(), **variables},
                stdout=subprocess.PIPE,
                stderr=(directory / name / "stderr").open("w"),
                text=True,
            )
        said = {name: process.communicate()[0] for name, process in processes.items()}
    finally:
        end(*processes.values())
    for name, process in processes.items():
        if process.returncode != 0:
            raise SystemExit(f"{name}: {said[name][-1000:]}{(directory / name / 'stderr').read_text()[-3000:]}")
    return {name: last_json(text) for name, text in said.items()}


def recorded(address: str, name: str) -> dict[str, Any]:
    """What MLflow has of a run: its state, the steps of which it has a loss, its artefacts, its champion."""
    from mlflow import MlflowClient

    client = MlflowClient(address)
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return {
        "status": run.info.status,
        "steps": sorted(item.step for item in client.get_metric_history(run.info.run_id, "train/loss")),
        "artefacts": sorted(item.path for item in client.list_artifacts(run.info.run_id)),
        "champion": client.get_model_version_by_alias(f"{name}-student", "champion").version,
    }


def planted_secrets(password: str) -> Planted:
    """A search for what the runs are given.

    Args:
        password: in `RAYSTILL_DATABASE_URL`.
    """
    given = {"S3's key": s3_server.SECRET, "PostgreSQL's password": postgres_server.SECRET}
    return Planted({**given, "RAYSTILL_DATABASE_URL's password": password})


def search(
    planted: Planted, s3: s3_server.S3Server, databases: list[str], directories: list[Path], logs: Path
) -> list[str]:
    """Where a secret was written, and what could not be searched; the environment has the key to S3.

    Args:
        databases: URLs of MLflow's and of the champions'.
        directories: of the runs.
        logs: of their Rays.
    """
    import boto3
    from botocore.config import Config

    client = boto3.client("s3", endpoint_url=s3.endpoint, config=Config(s3={"addressing_style": "path"}))
    planted.in_files(logs)
    unseen = [] if list(logs.rglob("raylet.out")) and list(logs.rglob("worker-*")) else ["no log of a Ray was kept"]
    for directory in directories:
        planted.in_files(directory)
    for database in databases:
        planted.in_database(database)
    for bucket in BUCKETS:
        planted.in_objects(client, bucket)
    unseen += [f"no {kind} were searched" for kind in ("files", "rows", "objects") if not planted.searched[kind]]
    return [f"a secret is in {place}" for place in planted.found] + unseen


def reigning(database: str, name: str) -> str | None:
    from cluster.champions import current_champion, open_database

    found = current_champion(open_database(database), f"{name}-student")
    return found.version if found is not None else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the demo's steps")
    share = parser.parse_args().share
    problems, rows = [], []
    password = f"planted-{secrets.token_hex(12)}"
    planted = planted_secrets(password)
    with (
        tempfile.TemporaryDirectory(prefix="raystill-servers-") as name,
        # Sockets are below it: their paths are short. Ray's agents outlive their Ray by seconds.
        tempfile.TemporaryDirectory(prefix="rs-", dir="/tmp", ignore_cleanup_errors=True) as rays,
        postgres_server.running() as postgresql,
        s3_server.running(Path(name)) as s3,
        mlflow_server.running(postgresql, s3, Path(name)) as address,
    ):
        s3.make_bucket("bucket")
        database = postgresql.make_database("champions", password)
        variables = {**s3.environment(), "MLFLOW_TRACKING_URI": address, "RAYSTILL_DATABASE_URL": database}
        os.environ.update(s3.environment())
        logs = Path(rays, "logs-of-rays")
        with kept_logs(Path(rays), logs):
            summaries = run_both(Path(name), {**variables, "TMPDIR": rays}, share)
        directories = [Path(name, run) for run in NAMES]
        problems += search(planted, s3, [postgresql.url("mlflow"), database], directories, logs)
        trainings = {name: summary["stages"]["train"] for name, summary in summaries.items()}
        for name, training in trainings.items():
            found = recorded(address, name)
            champion = summaries[name]["stages"]["promote"]["champion"]["version"]
            if found["steps"] != list(range(1, len(training["losses"]) + 1)):
                problems.append(f"{name}: MLflow has {len(found['steps'])} of {len(training['losses'])} steps")
            if found["status"] != "FINISHED" or "report.html" not in found["artefacts"]:
                problems.append(f"{name}: MLflow has {found}")
            if not champion == found["champion"] == reigning(database, name):
                problems.append(f"{name}: version {champion} was promoted, {found['champion']} is the alias")
            seconds = sum(stage["seconds"] for stage in summaries[name]["stages"].values())
            rows.append([name, f"{seconds:.0f}", f"{training['rows']:,}", f"{training['losses'][-1]:.6f}", champion])
        first, second = (trainings[name] for name in NAMES)
        problems += [f"the two differ in {key}" for key in ("rows", "rows_checksum") if first[key] != second[key]]
        gap = max(abs(a - b) / a for a, b in zip(first["losses"], second["losses"], strict=True))
        if gap > LARGEST_GAP:
            problems.append(f"a loss of the two differs by {gap:.1e} of itself")
    table = Table(
        "run", "seconds", "rows", "last loss", "champion", title="Two runs at once on PostgreSQL, MLflow and S3"
    )
    for row in rows:
        table.add_row(*row)
    Console(stderr=True).print(table)
    print(json.dumps({"runs": len(rows), "largest_loss_gap": gap, "searched": planted.searched, "problems": problems}))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
