"""A training on three Rays of one machine: `python -m tests.labelled_nodes DIRECTORY`. A head that computes nothing, a
node for teachers and one for students; prints on which of them the replicas and the workers ran, as JSON."""

import json
import os
import secrets
import sys
import tempfile
from pathlib import Path

# Read when a Ray starts; three of them at once take their time on a machine that is busy.
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_raylet_start_wait_time_s="240")

import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster

from cluster.connection import ClusterConfig, connect
from cluster.resources import process_environment
from jobs.config import DataConfig, RunConfig
from jobs.corpus import find_sources
from jobs.prepare import prepare
from jobs.train import run_training, teacher_service
from jobs.training.plan import TrainPlan
from tests import tiny
from tests.unit.test_prepare import NoBar

POOLS = ("head", "teacher", "student")


def main(root: Path) -> dict[str, list[str]]:
    from cluster.storage import open_storage

    teacher = str(tiny.save_model(root / "teacher"))
    data = {"sources": [str(tiny.corpus(root / "in", 30))], "sequence_length": 48, "validation_fraction": 0.3}
    storage = open_storage(str(root))
    manifest = prepare(find_sources(data["sources"]), DataConfig(**data), teacher, 1, storage, "store/x", NoBar())
    config = RunConfig(
        name="labelled",
        storage=str(root),
        data=data,
        teacher={"model": teacher, "replicas": 2, "threads_per_replica": 1, "node_labels": {"pool": "teacher"}},
        student={"shape": {"num_hidden_layers": 1}},
        train={
            "steps": 2,
            "global_batch": 4,
            "micro_batch": 2,
            "num_workers": 2,
            "compile": False,
            "node_labels": {"pool": "student"},
        },
    )
    with connect(ClusterConfig()) as connection:
        with teacher_service(config.teacher, teacher, teacher, manifest, config) as (access, _):
            plan = TrainPlan(
                storage=config.storage,
                prefix="student/x",
                store="store/x",
                tokenizer=teacher,
                student=config.student,
                teacher_model=teacher,
                teacher=access,
                distill=config.distill,
                train=config.train,
                threads=1,
            )
            run_training(plan, connection, NoBar(), lambda step, metrics: None)
        pools = {node["NodeID"]: node["Labels"].get("pool", "?") for node in ray.nodes()}
        found: dict[str, list[str]] = {"teachers": [], "students": []}
        for actor in actors().values():
            name = actor["ActorClassName"]
            kind = "teachers" if "Teacher" in name else "students" if "RayTrainWorker" in name else None
            if kind:
                found[kind].append(pools[actor["Address"]["NodeID"]])
    return found


if __name__ == "__main__":
    os.environ.update(process_environment())
    with tempfile.TemporaryDirectory(prefix="raystill-labelled-") as scratch:
        cluster = Cluster()
        try:
            for pool in POOLS:
                cluster.add_node(
                    num_cpus=0 if pool == "head" else 4,
                    labels={"pool": pool},
                    object_store_memory=100 << 20,
                    temp_dir=scratch if pool == "head" else None,
                    include_dashboard=False,
                )
            ray.init(cluster.address, log_to_driver=False)
            result = main(Path(sys.argv[1]))
        finally:
            ray.shutdown()
            cluster.shutdown()
    print(json.dumps(result))
