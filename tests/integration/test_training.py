"""Training on real Ray Train workers against a real teacher service: any number of workers, and faults on the way."""

import threading
import time

import numpy as np
import psutil
import pytest

from cluster.connection import ClusterConfig, connect
from cluster.errors import NonFiniteLoss
from cluster.storage import open_storage
from jobs.config import DataConfig, RunConfig
from jobs.corpus import find_sources
from jobs.label import label_store
from jobs.prepare import prepare
from jobs.train import run_training, teacher_service
from jobs.training.data import ExampleStore, GlobalBatches, rows_checksum
from jobs.training.plan import LabelAccess, TrainPlan
from tests import tiny
from tests.unit.test_prepare import NoBar

pytestmark = pytest.mark.integration
STEPS, BATCH = 16, 12


@pytest.fixture(scope="module")
def connection():
    with connect(ClusterConfig()) as connected:
        yield connected


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    teacher = str(tiny.save_model(root / "teacher"))
    data = {"sources": [str(tiny.corpus(root / "in", 80))], "sequence_length": 48, "validation_fraction": 0.2}
    storage = open_storage(str(root))
    manifest = prepare(find_sources(data["sources"]), DataConfig(**data), teacher, 1, storage, "store/x", NoBar())
    config = RunConfig(
        name="test",
        storage=str(root),
        data=data,
        teacher={"model": teacher, "replicas": 2, "dtype": "float32", "threads_per_replica": 1},
        student={"shape": {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32}},
        distill={"alpha": 0.3, "temperature": 2.0},
        train={
            "steps": STEPS,
            "global_batch": BATCH,
            "micro_batch": 6,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "precision": "float32",
            "checkpoint_every": 4,
            "validate_every": 8,
        },
    )
    return config, teacher, manifest


@pytest.fixture(scope="module")
def access(connection, base):
    config, teacher, manifest = base
    with teacher_service(config.teacher, teacher, teacher, manifest, config, 1) as (reached, _):
        yield reached


def plan(base, access, name, **train_changes):
    config, teacher, _ = base
    return TrainPlan(
        storage=config.storage,
        prefix=f"student/{name}",
        store="store/x",
        tokenizer=teacher,
        student=config.student,
        teacher_model=teacher,
        teacher=access,
        distill=config.distill,
        train=config.train.replace(**train_changes),
        threads=1,
    )


def planned_checksum(base):
    config, _, _ = base
    batches = GlobalBatches(ExampleStore(open_storage(config.storage), "store/x", "train"), BATCH, 0)
    return sum(rows_checksum(tuple(batches.row_ids(step))) for step in range(STEPS))


@pytest.fixture(scope="module")
def one_worker(base, access, connection):
    return run_training(plan(base, access, "one"), connection, NoBar(), lambda step, metrics: None)


def test_training_two_workers_and_other_micro_batches_give_the_same_curve(base, access, connection, one_worker):
    seen = []
    two = run_training(
        plan(base, access, "two", num_workers=2, micro_batch=4),
        connection,
        NoBar(),
        lambda step, metrics: seen.append((step, metrics)),
    )
    np.testing.assert_allclose(two["losses"], one_worker["losses"], rtol=1e-4)
    assert two["rows_checksum"] == one_worker["rows_checksum"] == planned_checksum(base)
    assert two["rows"] == STEPS * BATCH
    assert [step for step, _ in seen] == list(range(1, STEPS + 1))
    assert {"train/loss", "train/divergence", "train/agreement", "train/grad_norm", "train/teacher_wait_s"} <= set(
        seen[0][1]
    )
    assert seen[-1][1]["validation/bits_per_byte"] > 0


def test_training_from_labels_asks_no_teacher_and_gives_the_same_curve(base, access, connection, one_worker, tmp_path):
    storage, root = open_storage(base[0].storage), str(tmp_path)
    rows = len(ExampleStore(storage, "store/x", "train"))

    def trained(name, reached, reads, writes, **changes):
        labels = LabelAccess(root=root, reads=reads, writes=writes)
        this = plan(base, reached, name, **changes).replace(labels=labels)
        return run_training(this, connection, NoBar(), lambda step, metrics: None)

    def labelled():
        return label_store(access, root, storage, "store/x", 6, 2, NoBar())["labelled"]

    kept = trained("keeps-labels", access, True, True, num_workers=2, steps=8)
    assert kept["teacher_calls"] > 0
    assert labelled() == rows - min(rows, 8 * BATCH)
    assert labelled() == 0
    alone = trained("from-labels", access.replace(app_name=None), True, False, num_workers=2)
    assert (alone["teacher_calls"], alone["labelled_rows"]) == (0, STEPS * BATCH)
    np.testing.assert_allclose(alone["losses"], one_worker["losses"], rtol=1e-4)


def processes(name):
    """Processes of this test's own Ray whose title holds a name."""
    me = psutil.Process()
    found = []
    for process in me.children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


class Killing:
    """Kills one of so many processes of a name when a step is reported. What is raised there nobody hears: `check`."""

    def __init__(self, name, count, step):
        self.name, self.count, self.step = name, count, step
        self.times, self.found, self.killed = [], None, float("inf")

    def __call__(self, step, metrics):
        self.times.append(time.monotonic())
        if step >= self.step and self.found is None:
            self.found = processes(self.name)
            self.found[0].kill()
            self.killed = time.monotonic()

    def check(self):
        assert self.found is not None, f"step {self.step} was not reported"
        assert len(self.found) == self.count
        # Steps come in heaps, those of half a second together.
        assert max(self.times) > self.killed + 0.2, "training was over before the kill: it needs more steps"


def test_training_goes_on_when_a_teacher_replica_is_killed(base, access, connection, one_worker):
    killing = Killing("ServeReplica:teacher", 2, 4)

    # Small micro-batches and a window of one answer: requests are in flight all the time.
    access = access.replace(window_bytes=1)
    outcome = run_training(plan(base, access, "killed-replica", micro_batch=1), connection, NoBar(), killing)
    killing.check()
    assert outcome["rows_checksum"] == planned_checksum(base)
    assert outcome["rows"] == STEPS * BATCH
    np.testing.assert_allclose(outcome["losses"], one_worker["losses"], rtol=1e-4)
    stalls = np.diff(killing.times)
    assert stalls.max() < 90, f"longest pause between two steps: {stalls.max():.1f} s"


def test_training_worker_killed_goes_back_to_its_checkpoint_and_loses_no_row(base, access, connection, one_worker):
    killing = Killing("RayTrainWorker", 1, 6)
    slow = access.replace(window_bytes=1)
    outcome = run_training(plan(base, slow, "killed-worker", micro_batch=1), connection, NoBar(), killing)
    killing.check()
    assert outcome["rows_checksum"] == planned_checksum(base)
    np.testing.assert_allclose(outcome["losses"], one_worker["losses"], rtol=1e-4)


def test_training_non_finite_loss_stops_at_once_with_row_ids(base, access, connection):
    started = time.monotonic()
    with pytest.raises(NonFiniteLoss, match=r"shard:row\): \d+:\d+"):
        run_training(
            plan(base, access, "explodes", learning_rate=1e12, clip_norm=1e30, weight_decay=0.0),
            connection,
            NoBar(),
            lambda step, metrics: None,
        )
    assert time.monotonic() - started < 240, "it must not be tried again"


def test_training_leaves_no_thread_behind(one_worker):
    assert not [thread.name for thread in threading.enumerate() if thread.name == "progress"]
