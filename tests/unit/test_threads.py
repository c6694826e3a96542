"""Threads follow the machines that compute, not the one that asks, and no more than a container is given."""

from dataclasses import replace

import pytest

from cluster.connection import Connection
from cluster.placement import NodeShape, _held_cpus, check_demands
from cluster.pools import PoolsConfig
from cluster.resources import cgroup_cpus, physical_cores
from jobs.config import RunConfig
from jobs.preflight import check_cluster, placed_together
from jobs.threads import Threads, _say_guess, threads_of, threads_on

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
    several = [
        NodeShape({"CPU": 4.0, "student_slot": 1.0}, host="10.0.0.1"),
        NodeShape({"CPU": 4.0, "teacher_slot": 1.0}, host="10.0.0.1"),
    ]
    assert threads_on(several, PoolsConfig(), made()) == here, "raylets of one machine"


def test_threads_of_pools_are_a_slots_share_of_a_node():
    found = threads_on([HEAD, TEACHERS, STUDENTS], PoolsConfig(), made())
    assert found == Threads(worker=24, replica=12, teacher_worker=24)
    small = NodeShape({"CPU": 8.0, "GPU": 2.0, "student_slot": 2.0}, {"market": "spot"}, host="10.0.0.4")
    assert threads_on([TEACHERS, STUDENTS, small], PoolsConfig(), made()).worker == 4, "every slot can be taken"
    spot = PoolsConfig(student_labels={"market": "spot"})
    assert threads_on([TEACHERS, STUDENTS, small], spot, made()).worker == 4


def test_threads_of_nodes_that_hold_both_pools_can_be_placed_together(monkeypatch):
    config = made(teacher={"model": "x/y", "replicas": 2}, train={"steps": 10, "num_workers": 2})
    both = NodeShape({"CPU": 16.0, "teacher_slot": 1.0, "student_slot": 1.0}, count=2)
    assert threads_on([HEAD, both], PoolsConfig(), config) == Threads(worker=8, replica=8, teacher_worker=8)
    monkeypatch.setattr("jobs.preflight.cluster_nodes", lambda: [HEAD, both])
    check_cluster(config, Connection(False, 32, None, PoolsConfig()), answers=False)
    answering = NodeShape({"CPU": 16.0, "student_slot": 3.0, "endpoint_slot": 1.0}, count=2)
    assert threads_on([HEAD, answering], PoolsConfig(), config).worker == 5, "a CPU is the endpoint's"
    crowded = NodeShape({"CPU": 2.0, "teacher_slot": 2.0, "student_slot": 2.0}, count=2)
    assert threads_on([HEAD, crowded], PoolsConfig(), config).worker == 1


@pytest.mark.parametrize(
    ("nodes", "pools"),
    [
        ([HEAD, STUDENTS], PoolsConfig()),
        ([HEAD, TEACHERS, STUDENTS], PoolsConfig(teacher_labels={"market": "other"})),
        ([HEAD], PoolsConfig()),
        ([NodeShape({"CPU": 64.0}, host="10.0.0.1")], PoolsConfig()),
        ([HEAD], None),
    ],
)
def test_threads_where_nodes_are_still_to_come_are_one_with_a_warning(nodes, pools, caplog):
    """The 64 cores of the machine that asks would be waited for without end."""
    _say_guess.cache_clear()
    found = threads_on(nodes, pools, made())
    assert found.replica == 1
    assert threads_on(nodes, pools, made()) == found
    said = [record.message for record in caplog.records if "teacher.threads_per_replica=1" in record.message]
    assert len(said) == 1
    assert ("train.threads_per_worker=1" in caplog.text) == (found.worker == 1)
    assert "teacher.train" not in caplog.text


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
    assert threads_on([HEAD, crowded], None, config).worker == 1


def test_threads_without_pools_leave_services_what_they_hold(monkeypatch):
    config = made(teacher={"model": "x/y", "replicas": 1}, train={"steps": 10, "num_workers": 3})
    nodes = [HEAD, *(NodeShape({"CPU": 8.0}, host=f"10.0.1.{number}") for number in range(2))]
    details = {
        "demo-v3-0a1b2c3d": served(2, "10.0.1.0", 1),
        "raystill": served(1, "10.0.1.1", 0),
        "teacher-small-0a1b2c3d": served(1, "10.0.1.1", 4),
        "without": served(1, "10.0.1.1", None),
        "starting": served(1, None, 1),
    }
    assert _held_cpus(details) == {"10.0.1.0": 2, "10.0.1.1": 1}
    assert threads_on(nodes, None, config).worker == 4
    held = [HEAD, *(replace(node, held_cpus=_held_cpus(details)[node.host]) for node in nodes[1:])]
    assert threads_on(held, None, config).worker == 3, "3 + 3 beside 2, 3 + 3 beside 1"
    gpus = NodeShape({"CPU": 16.0, "GPU": 2.0}, host="10.0.2.0", held_cpus=1.0)
    assert threads_on([HEAD, gpus], None, made()).worker == 7
    assert threads_on([gpus], None, made()).worker == 16, "one machine: its cores"


def served(replicas, address, num_cpus):
    options = {} if num_cpus is None else {"ray_actor_options": {"num_cpus": num_cpus}}
    replica = {"node_ip": address, "state": "RUNNING"}
    return {"deployments": {"Version": {"deployment_config": options, "replicas": [replica] * replicas}}}


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
