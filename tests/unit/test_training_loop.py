"""The training loop itself, in one process and without Ray: what must not depend on how the work was cut."""

import itertools
import math

import numpy as np
import pytest
import torch

from cluster.errors import StorageError
from cluster.storage import LocalStorage, open_storage
from jobs.config import DataConfig, DistillConfig, StudentConfig, TrainConfig
from jobs.corpus import find_sources
from jobs.prepare import prepare
from jobs.training.checkpoint import Checkpoints
from jobs.training.choice import choose_signal
from jobs.training.data import ExampleStore, GlobalBatches, rows_checksum
from jobs.training.loop import learning_rate, train
from jobs.training.plan import TeacherAccess, TrainPlan
from jobs.training.workers import Workers
from services.teacher.model import TeacherModel
from tests import tiny
from tests.in_process_teacher import InProcessTeacher
from tests.unit.test_prepare import NoBar

ALONE = Workers(0, 1, torch.device("cpu"))
STEPS = 6


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    teacher = tiny.save_model(root / "teacher")
    storage = open_storage(str(root))
    config = DataConfig(sources=[str(tiny.corpus(root / "in", 80))], sequence_length=48, validation_fraction=0.2)
    prepare(find_sources(config.sources), config, str(teacher), 1, storage, "store/x", NoBar())
    return root, str(teacher)


@pytest.fixture(scope="module")
def teacher(prepared):
    return TeacherModel(prepared[1], "float32")


def plan(prepared, name, distil=True, distill=None, student=None, **train_changes):
    root, teacher_directory = prepared
    defaults = {"steps": STEPS, "global_batch": 12, "micro_batch": 12, "learning_rate": 1e-2, "warmup_steps": 2}
    training = {**defaults, "precision": "float32", "validate_every": 3, "checkpoint_every": 2, **train_changes}
    distill = DistillConfig(**{"alpha": 0.3, "temperature": 2.0, **(distill or {})})
    access = TeacherAccess(
        app_name="x",
        fingerprint="",
        signal=choose_signal(distill, TeacherModel(teacher_directory, "float32").describe())[0],
        attempt_timeout_s=1,
        deadline_s=1,
        window_bytes=100_000,
    )
    return TrainPlan(
        storage=str(root),
        prefix=f"student/{name}",
        store="store/x",
        tokenizer=teacher_directory,
        student=StudentConfig(
            **(student or {"shape": {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32}})
        ),
        teacher_model=teacher_directory,
        teacher=access if distil else None,
        distill=distill,
        train=TrainConfig(**training),
        threads=1,
    )


def run(this, teacher=None, workers=ALONE):
    metrics = []
    asked = InProcessTeacher(teacher) if teacher is not None else None
    outcome = train(this, workers, asked, lambda step, values: metrics.append({"step": step, **values}))
    return outcome, metrics


@pytest.mark.parametrize("signal", ["hidden", "topk", "sampled", "dense"])
def test_loop_micro_batch_does_not_change_the_loss_curve(prepared, teacher, signal):
    distill = {"signal": signal, "top_k": 16}
    curves = [
        run(plan(prepared, f"micro-{signal}-{size}", distill=distill, micro_batch=size), teacher)[0]["losses"]
        for size in (12, 5, 1)
    ]
    assert len(curves[0]) == STEPS
    for curve in curves[1:]:
        np.testing.assert_allclose(curve, curves[0], rtol=1e-4)


def test_loop_learns_to_agree_with_the_teacher(prepared, teacher):
    outcome, metrics = run(plan(prepared, "learns", steps=40, distill={"alpha": 0.0}), teacher)
    assert outcome["status"] == "done"
    assert metrics[-1]["train/divergence"] < 0.5 * metrics[0]["train/divergence"]
    assert metrics[-1]["train/agreement"] > metrics[0]["train/agreement"]
    assert all(math.isfinite(value) for item in metrics for value in item.values())


def test_loop_interrupted_and_resumed_equals_unbroken(prepared, teacher):
    whole, _ = run(plan(prepared, "unbroken"), teacher)
    broken = plan(prepared, "broken")

    class Killed(Exception):
        pass

    def kill(step, values):
        if step == 5:  # after the checkpoint of step 4, in the middle of the next interval
            raise Killed

    with pytest.raises(Killed):
        train(broken, ALONE, InProcessTeacher(teacher), kill)
    resumed, metrics = run(broken, teacher)
    assert [item["step"] for item in metrics] == [5, 6]
    for key in ("losses", "rows", "tokens", "rows_checksum", "cursor", "validation"):
        assert resumed[key] == whole[key], key
    storage = open_storage(broken.storage)
    weights = [storage.read(f"student/{name}/model/model.safetensors") for name in ("unbroken", "broken")]
    assert weights[0] == weights[1]


def test_loop_leaves_on_notice_with_its_step_stored_and_goes_on_elsewhere(prepared, teacher):
    whole, _ = run(plan(prepared, "unannounced"), teacher)
    this = plan(prepared, "announced", checkpoint_every=100, notice_every=3)
    asked = []

    def notice():
        asked.append(1)
        return True

    first = train(this, ALONE, InProcessTeacher(teacher), lambda step, values: None, notice)
    assert (first["status"], first["step"], len(asked)) == ("preempted", 3, 1)
    second = train(this, ALONE, InProcessTeacher(teacher), lambda step, values: None, notice)
    assert (second["status"], len(asked)) == ("done", 2), "after the last step nothing is left to leave"
    np.testing.assert_allclose(second["losses"], whole["losses"], rtol=1e-6)
    assert (second["rows"], second["rows_checksum"]) == (whole["rows"], whole["rows_checksum"])


def test_loop_rows_are_those_of_the_cursor_each_once(prepared, teacher):
    this = plan(prepared, "rows")
    outcome, _ = run(this, teacher)
    batches = GlobalBatches(ExampleStore(open_storage(this.storage), "store/x", "train"), 12, 0)
    expected = sum(rows_checksum(tuple(batches.row_ids(step))) for step in range(STEPS))
    assert (outcome["rows"], outcome["rows_checksum"]) == (12 * STEPS, expected)


def test_loop_torn_checkpoint_is_skipped_for_the_one_before(prepared, teacher, caplog):
    this = plan(prepared, "torn")
    whole, _ = run(this, teacher)
    storage = open_storage(this.storage)
    key = f"{this.prefix}/checkpoints/step-{STEPS:08d}/optimizer.safetensors"
    damaged = bytearray(storage.read(key))
    damaged[len(damaged) // 2] ^= 1
    storage.write(key, bytes(damaged))
    checkpoints = Checkpoints(storage, f"{this.prefix}/checkpoints", 2)
    found = checkpoints.fetch()
    assert found is not None
    assert found.state.step < STEPS
    found.discard()
    again, _ = run(this, teacher)
    assert again["losses"] == whole["losses"]


def test_loop_checkpoints_are_kept_as_asked(prepared, teacher):
    this = plan(prepared, "kept", checkpoint_every=1, validate_every=1, keep_checkpoints=2)
    outcome, _ = run(this, teacher)
    best = int(min(outcome["validation"], key=lambda pair: pair[1])[0])
    checkpoints = Checkpoints(open_storage(this.storage), f"{this.prefix}/checkpoints", 2)
    assert checkpoints.steps() == sorted({best, STEPS - 2, STEPS - 1, STEPS})


def test_loop_dropout_repeats_after_a_resume(prepared):
    options = {"distil": False, "student": {"shape": {"num_hidden_layers": 1, "attention_dropout": 0.5}}}
    whole, _ = run(plan(prepared, "dropout", **options))
    broken = plan(prepared, "dropout-broken", **options)

    def stop(step, values):
        if step == 5:
            raise KeyError

    with pytest.raises(KeyError):
        train(broken, ALONE, None, stop)
    resumed, metrics = run(broken)
    assert [item["step"] for item in metrics] == [5, 6]
    assert resumed["losses"] == whole["losses"]
    still, _ = run(plan(prepared, "no-dropout", distil=False, student={"shape": {"num_hidden_layers": 1}}))
    assert still["losses"] != whole["losses"]


def test_loop_model_is_not_published_when_its_last_checkpoint_is_lost(prepared, teacher, monkeypatch):
    this = plan(prepared, "lost")
    upload = LocalStorage.upload

    def failing(self, path, key):
        if f"step-{STEPS:08d}" in key:
            raise StorageError("the server is gone")
        upload(self, path, key)

    monkeypatch.setattr(LocalStorage, "upload", failing)
    with pytest.raises(StorageError, match="the server is gone"):
        run(this, teacher)
    storage = open_storage(this.storage)
    assert not storage.exists(f"{this.prefix}/model/manifest.json")
    monkeypatch.undo()
    _, metrics = run(this, teacher)
    assert [item["step"] for item in metrics] == [5, 6]
    assert storage.exists(f"{this.prefix}/model/manifest.json")


def test_loop_without_a_teacher_trains_on_the_text(prepared):
    outcome, metrics = run(plan(prepared, "alone", distil=False, steps=30))
    assert outcome["teacher_calls"] == 0
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"]
    assert metrics[-1]["train/loss"] == pytest.approx(metrics[-1]["train/cross_entropy"])
    assert "train/divergence" not in metrics[-1]


def test_loop_non_finite_loss_stops_and_names_the_rows(prepared, teacher):
    this = plan(prepared, "explodes", learning_rate=1e12, clip_norm=1e30, steps=20, weight_decay=0.0)
    outcome, metrics = run(this, teacher)
    assert outcome["status"] == "non_finite"
    step = outcome["step"]
    assert f"step {step}" in outcome["message"]
    batches = GlobalBatches(ExampleStore(open_storage(this.storage), "store/x", "train"), 12, 0)
    assert all(str(row) in outcome["message"] for row in batches.row_ids(step))
    assert len(metrics) == step < 20


def test_loop_kept_layers_start_closer_to_the_teacher_than_fresh_weights(prepared, teacher):
    kept = run(plan(prepared, "keeps", student={"from_teacher": {"layers": [0, 1]}}, distill={"alpha": 0.0}), teacher)[
        1
    ]
    fresh = run(plan(prepared, "fresh", distill={"alpha": 0.0}), teacher)[1]
    assert kept[0]["train/divergence"] < 0.01 < fresh[0]["train/divergence"]


def test_loop_gradient_checkpointing_and_bfloat16_train_to_nearly_the_same(prepared, teacher):
    plain = run(plan(prepared, "plain"), teacher)[0]["losses"]
    checkpointed = run(plan(prepared, "gc", gradient_checkpointing=True), teacher)[0]["losses"]
    np.testing.assert_allclose(checkpointed, plain, rtol=1e-4)
    reduced = run(plan(prepared, "bf16", precision="bfloat16"), teacher)[0]["losses"]
    np.testing.assert_allclose(reduced, plain, rtol=0.05)


def test_learning_rate_warms_up_then_falls_to_the_final_rate():
    config = TrainConfig(steps=100, learning_rate=1.0, warmup_steps=10, final_rate=0.1)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.1)
    assert all(late < early for early, late in itertools.pairwise(rates[9:]))


def test_training_counts_what_goes_over_storage(prepared):
    outcome, metrics = run(plan(prepared, "traffic", distil=False))
    for what in ("read_bytes", "written_bytes", "retries"):
        assert sum(item[f"train/store_{what}"] for item in metrics) == outcome[f"store_{what}"]
    first = prepared[0] / "student/traffic/checkpoints/step-00000002"
    size = sum(path.stat().st_size for path in first.rglob("*"))
    model = (first / "model/model.safetensors").stat().st_size
    assert outcome["store_written_bytes"] >= size + model  # of steps 2 and 0; the later ones may still be on their way
    assert outcome["store_read_bytes"] > model
    assert outcome["store_retries"] == 0
