"""What can be placed passes; what cannot is refused with the resource that is missing."""

import pytest
import yaml

from cluster.connection import ClusterConfig, Connection
from cluster.errors import ConfigError, PlacementError
from cluster.placement import Demand, NodeShape, check_demands, growth
from cluster.pools import PoolsConfig, actor_options
from jobs.config import RunConfig
from jobs.preflight import check_cluster, check_elastic, check_records, gpus_at_once, placed_together
from jobs.threads import Threads

TEACHERS = NodeShape({"CPU": 8, "GPU": 1, "teacher_slot": 1}, {"pool": "teacher"}, 3)
STUDENTS = NodeShape({"CPU": 16, "student_slot": 2}, {}, 2)
THREADS = Threads(worker=2, replica=3, teacher_worker=1)


def teacher(count, **more):
    return Demand(f"teacher.replicas={count}", count, {"CPU": 4, "GPU": 1, "teacher_slot": 1, **more})


def student(count, cpus=4):
    return Demand(f"train.num_workers={count}", count, {"CPU": cpus, "student_slot": 1})


@pytest.mark.parametrize("demands", [[teacher(3), student(4)], [student(4, 8)], [teacher(0), student(1, 16)], []])
def test_demands_that_fit_pass(demands):
    check_demands(demands, [TEACHERS, STUDENTS])


@pytest.mark.parametrize(
    ("demands", "said"),
    [
        ([teacher(4)], r"teacher\.replicas=4: 4 with .* has room for 3"),
        ([student(5)], "has room for 4"),
        ([student(1, 17)], r"no node has enough CPU \(the most is 16\)"),
        ([student(3, 16)], "has room for 2"),
        ([teacher(1, GPU=2)], r"GPU \(the most is 1\)"),
        ([Demand("serve.replicas=1", 1, {"endpoint_slot": 1})], r"endpoint_slot \(the most is 0\)"),
        ([Demand("x", 1, {"GPU": 1, "CPU": 16})], "no node has all of it at once"),
        ([Demand("x", 1, {"CPU": 1}, {"pool": "other"})], "labelled {'pool': 'other'}"),
        ([Demand("a", 2, {"GPU": 1}), Demand("b", 2, {"GPU": 1})], r"2 \(a\) \+ 2 \(b\) = 4 GPU, the cluster has 3"),
    ],
)
def test_demands_that_can_never_fit_are_refused_with_what_is_missing(demands, said):
    with pytest.raises(PlacementError, match=said):
        check_demands(demands, [TEACHERS, STUDENTS])


@pytest.mark.parametrize("share", [1, 0.5, 0.25, 0.2, 0.1, 0.05, 0.04, 0.02, 0.01])
def test_parts_of_a_gpu_fill_it(share):
    parts = round(1 / share)
    for gpus in (1.0, 2.0, 8.0):
        node = NodeShape({"GPU": gpus, "CPU": 64.0})
        assert node.places({"GPU": share}, {}) == gpus * parts
        check_demands([Demand("teacher.replicas", int(gpus) * parts, {"GPU": share})], [node])
    assert NodeShape({"GPU": 1.0}).places({"GPU": 0.3}, {}) == 3
    assert NodeShape({"GPU": 0.999}).places({"GPU": 0.5}, {}) == 1


def test_labels_select_nodes_and_operators_are_left_to_ray():
    check_demands([Demand("x", 3, {"CPU": 8}, {"pool": "teacher"})], [TEACHERS, STUDENTS])
    check_demands([Demand("x", 2, {"CPU": 16}, {"pool": "!teacher"})], [TEACHERS, STUDENTS])


def test_growth_is_read_from_the_config_of_ray_up(tmp_path):
    path = tmp_path / "bootstrap.yaml"
    assert growth(path) == []
    path.write_text(
        yaml.safe_dump(
            {
                "head_node_type": "head",
                "available_node_types": {
                    "head": {"resources": {"CPU": 4}, "max_workers": 0},
                    "teacher": {"resources": {"CPU": 8, "teacher_slot": 1}, "max_workers": 5, "labels": {"a": "b"}},
                    "unused": {"resources": {"CPU": 8}},
                },
            }
        )
    )
    assert growth(path) == [NodeShape({"CPU": 8, "teacher_slot": 1}, {"a": "b"}, 5)]


def made(**changes):
    return RunConfig.model_validate(
        {
            "name": "small",
            "data": {"gather": "python_docs"},
            "teacher": {"model": "organisation/model", "replicas": 2, "threads_per_replica": 3},
            "student": {"from_teacher": {"layers": [0]}},
            "train": {"steps": 10, "num_workers": 4, "threads_per_worker": 2},
            **changes,
        }
    )


def test_run_asks_for_its_slots():
    pools = PoolsConfig(teacher_labels={"pool": "teacher"})
    [students, teachers], [endpoint] = placed_together(made(), pools, THREADS)
    assert (students.count, students.resources) == (4, {"CPU": 2, "student_slot": 1})
    assert (teachers.count, teachers.resources) == (2, {"CPU": 3, "teacher_slot": 1})
    assert teachers.labels == {"pool": "teacher"}
    assert endpoint.resources == {"CPU": 1, "endpoint_slot": 1}
    with_gpus = made(serve={"vllm_python": "vllm", "gpus_per_replica": 0.5})
    assert placed_together(with_gpus, pools, THREADS)[1][0].resources == {"CPU": 1, "GPU": 0.5, "endpoint_slot": 1}
    assert placed_together(made(), pools, THREADS, answers=False) == [[students, teachers]], (
        "training alone needs no endpoint"
    )


def test_gpus_at_once_are_those_of_the_stage_that_holds_most():
    student = {"steps": 10, "num_workers": 2, "use_gpu": True}
    teacher = {"model": "organisation/model", "replicas": 3, "num_gpus": 0.5}
    made_first = {"shape": {"model_type": "llama"}, "train": {"steps": 10, "num_workers": 4, "use_gpu": True}}
    own = {"gather": "python_docs", "train_tokenizer": {"vocab_size": 512}}
    endpoint = {"vllm_python": "vllm", "gpus_per_replica": 5}
    assert gpus_at_once(made()) == 0
    assert gpus_at_once(made(train=student, teacher=teacher)) == 3.5
    assert gpus_at_once(made(train=student, teacher={**teacher, "model": None, **made_first}, data=own)) == 4
    assert gpus_at_once(made(train=student, teacher=teacher, serve=endpoint)) == 5


def test_pools_are_of_clusters_alone(monkeypatch):
    pools = PoolsConfig()
    assert ClusterConfig(pools=pools).active_pools is None
    assert ClusterConfig(pools=pools, address="head:6379").active_pools == pools
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert ClusterConfig(pools=pools).active_pools == pools


def test_actor_options_take_one_slot():
    assert actor_options(None, "teacher") == {}
    assert actor_options(PoolsConfig(), "teacher") == {"resources": {"teacher_slot": 1.0}}
    labelled = actor_options(PoolsConfig(endpoint_labels={"a": "b"}), "endpoint")
    assert labelled == {"resources": {"endpoint_slot": 1.0}, "label_selector": {"a": "b"}}


def test_cluster_without_slots_is_refused_before_anything_starts(monkeypatch):
    bare = [NodeShape({"CPU": 64, "GPU": 8})]
    monkeypatch.setattr("jobs.preflight.cluster_nodes", lambda: bare)
    with pytest.raises(PlacementError, match="student_slot"):
        check_cluster(made(), Connection(False, 64, None, PoolsConfig()))
    check_cluster(made(), Connection(False, 64, None, None))
    check_cluster(made(), Connection(False, 640, None, PoolsConfig()))  # cluster.num_cpus says that it grows


def test_gpus_that_are_not_there_are_refused_unless_the_cluster_grows_further_than_is_known(monkeypatch):
    """On Kubernetes nobody tells how far: node groups at zero are known by `cluster.num_cpus` alone."""
    config = made(train={"steps": 10, "threads_per_worker": 2, "use_gpu": True})
    monkeypatch.setattr("jobs.preflight.cluster_nodes", lambda: [NodeShape({"CPU": 16.0})])
    for pools in (PoolsConfig(), None):
        with pytest.raises(PlacementError, match=r"asked for 1 \(train\.use_gpu.* GPUs, the cluster has 0"):
            check_cluster(config, Connection(False, 16, None, pools))
        check_cluster(config, Connection(False, 136, None, pools))
        with pytest.raises(PlacementError, match="CPUs, the cluster has 17"):
            check_cluster(made(train={"steps": 10, "threads_per_worker": 12}), Connection(False, 17, None, pools))


def test_elastic_workers_need_pools_on_a_cluster():
    elastic = {"steps": 10, "num_workers": [2, 6], "threads_per_worker": 1}
    with pytest.raises(ConfigError, match=r"num_workers=\[2, 6\].*cluster\.pools=\{\}"):
        check_elastic(made(train=elastic, cluster={"address": "head:6379"}))
    with pytest.raises(ConfigError, match="does not grow"):
        check_elastic(made(train=elastic, cluster={"pools": {}}))
    config = made(train=elastic, cluster={"address": "head:6379", "pools": {}})
    check_elastic(config)
    check_elastic(made())
    [students, _], _ = placed_together(config, config.cluster.pools, THREADS)
    assert students.count == 2, "the least must fit; more is for later"


@pytest.mark.parametrize("count", [[4, 2], [3, 3], [0, 2], 0, [1, 2, 3], "many"])
def test_elastic_worker_counts_that_mean_nothing_are_refused(count):
    with pytest.raises(ValueError, match="num_workers"):
        made(train={"steps": 10, "num_workers": count})


def test_elastic_workers_change_nothing_that_decides_the_result():
    assert made(train={"steps": 10, "num_workers": [1, 4]}).identity() == made(train={"steps": 10}).identity()


def test_records_of_a_job_must_not_lie_on_its_head(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "RAYSTILL_DATABASE_URL", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    config = made(storage="s3://bucket/small")
    check_records(config)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI and RAYSTILL_DATABASE_URL: not set on the head"):
        check_records(config)
    check_records(made(storage="/mnt/shared/small"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("RAYSTILL_DATABASE_URL", "postgresql://db/x")
    check_records(config)
