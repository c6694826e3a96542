"""Threads follow the machines that compute, not the one that asks, and no more than a container is given."""

import pytest

from cluster.connection import Connection
from cluster.placement import NodeShape, check_demands
from cluster.pools import PoolsConfig
from cluster.resources import cgroup_cpus, physical_cores
from jobs.config import RunConfig
from jobs.preflight import check_cluster, placed_together
from jobs.threads import Threads, threads_of, threads_on

HEAD = NodeShape({"CPU": 0.0}, host="10.0.0.1")
TEACHERS = NodeShape({"CPU": 12.0, "GPU": 1.0, "teacher_slot": 1.0}, count=2, host="10.0.0.2")
STUDENTS = NodeShape({"CPU": 192.0, "GPU": 8.0, "student_slot": 8.0}, count=2, host="10.0.0.3")


@pytest.fixture(autouse=True)
def cores(monkeypatch):
    monkeypatch.setattr("cluster.resources.physical_cores", lambda: 64)


def made(**changes):
    return RunConfig.model_validate(
        {
            "name": "small",
            "data": {"gather": "python_docs"},
            "teacher": {"model": "organisation/model", "replicas": 2, "num_gpus": 1},
            "student": {"from_teacher": {"layers": [0]}},
            "train": {"steps": 10, "num_workers": 2, "use_gpu": True},
            **changes,
        }
    )


def test_threads_of_one_machine_share_its_cores():
    here = Threads(worker=16, replica=16, teacher_worker=64)
    assert threads_of(made()) == here
    assert threads_of(made(), Connection(True, 256, None)) == here
    several = [NodeShape({"CPU": 4.0, "student_slot": 1.0}, host="10.0.0.1"), NodeShape({"CPU": 4.0}, host="10.0.0.1")]
    assert threads_on(several, PoolsConfig(), made()) == here, "raylets of one machine"


def test_threads_of_pools_are_a_slots_share_of_a_node():
    found = threads_on([HEAD, TEACHERS, STUDENTS], PoolsConfig(), made())
    assert found == Threads(worker=24, replica=12, teacher_worker=24)
    small = NodeShape({"CPU": 8.0, "GPU": 2.0, "student_slot": 2.0}, {"market": "spot"}, host="10.0.0.4")
    assert threads_on([TEACHERS, STUDENTS, small], PoolsConfig(), made()).worker == 4, "every slot can be taken"
    spot = PoolsConfig(student_labels={"market": "spot"})
    assert threads_on([TEACHERS, STUDENTS, small], spot, made()).worker == 4
    assert threads_on([TEACHERS, small], PoolsConfig(student_labels={"market": "other"}), made()).worker == 16


def test_threads_of_pools_can_be_placed_where_the_machine_that_asks_has_many_cores(monkeypatch):
    monkeypatch.setattr("jobs.preflight.cluster_nodes", lambda: [HEAD, TEACHERS, STUDENTS])
    config = made(train={"steps": 10, "num_workers": [2, 16], "use_gpu": True})
    check_cluster(config, Connection(False, 408, None, PoolsConfig()), answers=False)
    for demands in placed_together(config, PoolsConfig(), threads_on([TEACHERS, STUDENTS], PoolsConfig(), config)):
        if "serve" not in demands[0].role:
            check_demands(demands, [TEACHERS, STUDENTS])


def test_threads_without_pools_leave_room_for_all():
    config = made(teacher={"model": "x/y", "replicas": 1}, train={"steps": 10, "num_workers": 2})
    two = NodeShape({"CPU": 8.0}, count=2, host=None)
    assert threads_on([HEAD, two], None, config) == Threads(worker=4, replica=4, teacher_worker=8)
    assert threads_on([HEAD, two, STUDENTS], None, config).worker == 4, "no node with GPUs is taken for it"
    assert threads_on([HEAD, STUDENTS], None, config).worker == 96
    assert threads_on([HEAD, STUDENTS], None, made()).worker == 24, "a GPU's share"
    crowded = NodeShape({"CPU": 1.0}, count=2)
    assert threads_on([HEAD, crowded], None, config).worker == 64 // 3


def test_threads_that_the_config_names_are_taken():
    config = made(
        teacher={"model": "x/y", "threads_per_replica": 3},
        train={"steps": 10, "num_workers": 1, "threads_per_worker": 5},
    )
    for nodes in ([], [HEAD, TEACHERS, STUDENTS]):
        found = threads_on(nodes, PoolsConfig(), config)
        assert (found.worker, found.replica) == (5, 3)


@pytest.mark.parametrize(
    ("files", "membership", "expected"),
    [
        ({}, "0::/", float("inf")),
        ({"cpu.max": "max 100000"}, "0::/", float("inf")),
        ({"cpu.max": "400000 100000"}, "0::/", 4.0),
        ({"a/cpu.max": "250000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 2.5),
        ({"cpu.max": "150000 100000"}, "0::/of/the/host", 1.5),
        ({"cpu,cpuacct/cpu.cfs_quota_us": "300000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/", 3.0),
        ({"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, "9:memory:/y\n1:cpu:/x", float("inf")),
        ({"cpu.max": "what"}, "nonsense", float("inf")),
    ],
)
def test_cgroup_limit_is_the_least_on_the_way_up(tmp_path, files, membership, expected):
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    (tmp_path / "cgroup").write_text(f"{membership}\n")
    assert cgroup_cpus(tmp_path / "cgroup", tmp_path / "groups") == expected


@pytest.mark.parametrize(("limit", "expected"), [(4.0, 4), (1.5, 1), (0.5, 1), (float("inf"), 64)])
def test_cores_are_no_more_than_a_container_is_given(monkeypatch, limit, expected):
    monkeypatch.setattr("cluster.resources.cgroup_cpus", lambda membership, root: limit)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert physical_cores() == expected
