"""A worker group that grows when a node comes and shrinks when one dies: the same rows, the same curve."""

import contextlib
import json
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator

import numpy as np
import psutil
import pytest

from tests import tiny
from tests.command_line import COMMAND, environment
from tests.in_process_training import trained_here
from tests.ray_cluster import running, wait_until

pytestmark = pytest.mark.integration
TOKEN = "token-" + "7b2e" * 12
STEPS = 1500


@contextlib.contextmanager
def held_workers() -> Iterator[None]:
    """Training stands still in the block, so that what happens there happens within the run."""
    held = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "RayTrainWorker" in " ".join(process.cmdline()):
                process.suspend()
                held.append(process)
    assert held
    try:
        yield
    finally:
        for process in held:
            process.resume()


@pytest.mark.timeout(1800)  # the limits below, and what is around them
def test_training_grows_and_shrinks_with_the_cluster_and_learns_the_same(tmp_path, forked_raystill):
    variables = {**environment(), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAYSTILL_LOG": "INFO"}
    config = tiny.run_config(
        "grows",
        tmp_path,
        documents=60,
        teacher=None,
        student={"model": str(tiny.save_model(tmp_path / "model"))},
        distill={"alpha": 1},
        train={
            "steps": STEPS,
            "threads_per_worker": 1,
            "precision": "float32",
            "checkpoint_every": 100,
            "validate_every": STEPS,
        },
    )
    alone, grown = tmp_path / "alone", tmp_path / "grown"
    done = forked_raystill("prepare", config, f"storage={alone}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shutil.copytree(alone, grown)

    def reported():
        if not (grown / "mlflow.db").is_file():
            return []
        with (
            contextlib.suppress(sqlite3.OperationalError),  # locked, or its tables are being made
            contextlib.closing(sqlite3.connect(f"file:{grown}/mlflow.db?mode=ro", uri=True, timeout=30)) as database,
        ):
            return database.execute("select step, value from metrics where key = 'train/workers'").fetchall()
        return []

    with running({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}, num_cpus=1) as cluster:
        first = cluster.add(num_cpus=1, resources={"student_slot": 1})
        elastic = [f"storage={grown}", "train.num_workers=[1,2]", "cluster.pools.resize_every_s=5"]
        process = subprocess.Popen(
            [*COMMAND, "train", str(config), *elastic, f"cluster.address={cluster.address}"],
            cwd=tmp_path,
            env=variables,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            wait_until(lambda: process.poll() is not None or reported(), 500, "the first step")
            with held_workers():  # a node may be late
                cluster.add(num_cpus=1, resources={"student_slot": 1})
            wait_until(lambda: process.poll() is not None or 2 in dict(reported()).values(), 300, "two workers")
            cluster.kill(first)  # for good, and without a word
            _, said = process.communicate(timeout=600)
        finally:
            process.kill()
    assert process.returncode == 0, said[-3000:]
    workers = reported()
    assert {value for _, value in workers} == {1.0, 2.0}
    assert max(workers) == (STEPS, 1.0)
    summary = json.loads((grown / "summary.json").read_text())["stages"]["train"]
    fixed = trained_here(config, f"storage={alone}")
    assert (summary["rows"], summary["rows_checksum"]) == (fixed["rows"], fixed["rows_checksum"])
    np.testing.assert_allclose(summary["losses"], fixed["losses"], rtol=1e-4)
