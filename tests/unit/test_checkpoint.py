"""Checkpoints: what is kept, what is refused, and that an upload beside the training loses nothing."""

import random
import threading

import pytest
import torch
from torch import nn

from cluster.errors import ConfigError, StorageError
from cluster.storage import LocalStorage, open_storage
from jobs.config import DistillConfig, StudentConfig, TrainConfig
from jobs.training.checkpoint import Checkpoints, TrainState
from jobs.training.plan import TrainPlan
from tests.unit.test_storage import on_a_small_disk

CONFIG = {"train": {"learning_rate": 0.001, "steps": 10}, "store": "abc"}


class Model(nn.Linear):
    """As much of a Hugging Face model as a checkpoint needs."""

    def save_pretrained(self, directory):
        directory.mkdir()
        torch.save(self.weight.detach().clone(), directory / "weights.pt")


class Gated(LocalStorage):
    """Uploads wait for a gate, or fail."""

    def __init__(self, root):
        super().__init__(root)
        self.gate = threading.Event()
        self.gate.set()
        self.failure = None
        self.uploading = threading.Event()

    def upload(self, path, key):
        self.uploading.set()
        assert self.gate.wait(30)
        if self.failure is not None:
            raise self.failure
        super().upload(path, key)


@pytest.fixture
def storage(tmp_path):
    return Gated(tmp_path / "root")


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where local copies go; every test must leave it empty."""
    path = tmp_path / "scratch"
    path.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(path))
    yield path
    assert not list(path.glob("raystill-*"))


def trained(step, validation=()):
    model = Model(2, 2, bias=False)
    nn.init.constant_(model.weight, float(step))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    return model, optimizer, TrainState(step=step, validation=[list(pair) for pair in validation])


def weights_of(found):
    weights = torch.load(found.model / "weights.pt")
    found.discard()
    return weights


def test_checkpoint_holds_what_was_there_when_it_was_saved(storage, scratch):
    with Checkpoints(storage, "c", 2, CONFIG) as checkpoints:
        storage.gate.clear()
        model, optimizer, state = trained(1)
        checkpoints.save(model, optimizer, state)
        assert storage.uploading.wait(10)
        with torch.no_grad():
            model.weight.add_(100)  # training goes on
        state.step = 2
        assert checkpoints.steps() == []
        storage.gate.set()
        checkpoints.wait()
        assert checkpoints.steps() == [1]
        found = checkpoints.fetch()
        assert found.state.step == 1
        assert torch.equal(weights_of(found), torch.full((2, 2), 1.0))


def test_checkpoint_uploads_are_one_at_a_time(storage, scratch):
    with Checkpoints(storage, "c", 2, CONFIG) as checkpoints:
        storage.gate.clear()
        checkpoints.save(*trained(1))
        second = threading.Thread(target=checkpoints.save, args=trained(2))
        second.start()
        assert storage.uploading.wait(10)
        second.join(0.3)
        assert second.is_alive()
        assert len(list(scratch.glob("raystill-*"))) == 1  # the second is not even written while the first is under way
        storage.gate.set()
        second.join(30)
    assert Checkpoints(storage, "c", 2, CONFIG).steps() == [1, 2]


def test_checkpoint_upload_that_fails_is_raised_at_the_next_save_and_once(storage, scratch):
    with Checkpoints(storage, "c", 2, CONFIG) as checkpoints:
        storage.failure = StorageError("the bucket is gone")
        checkpoints.save(*trained(1))
        with pytest.raises(StorageError, match="the bucket is gone"):
            checkpoints.save(*trained(2))
        storage.failure = None
        checkpoints.save(*trained(2))
    assert checkpoints.steps() == [2]


def test_checkpoint_upload_that_fails_is_raised_at_the_end(storage, scratch):
    def run():
        with Checkpoints(storage, "c", 2, CONFIG) as checkpoints:
            storage.failure = StorageError("the bucket is gone")
            checkpoints.save(*trained(1))

    with pytest.raises(StorageError, match="the bucket is gone"):
        run()


def test_checkpoint_upload_that_fails_does_not_hide_why_training_stopped(storage, scratch, caplog):
    def run():
        with Checkpoints(storage, "c", 2, CONFIG) as checkpoints:
            storage.failure = StorageError("the bucket is gone")
            checkpoints.save(*trained(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert "the last checkpoint was not stored: the bucket is gone" in caplog.text


def test_checkpoint_of_an_interrupted_training_is_stored_before_its_end(storage, scratch):
    def run():
        with Checkpoints(storage, "c", 2, CONFIG) as checkpoints:
            storage.gate.clear()
            checkpoints.save(*trained(1))
            threading.Timer(0.3, storage.gate.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert Checkpoints(storage, "c", 2, CONFIG).steps() == [1]


def test_checkpoint_best_is_kept_besides_the_newest(storage, scratch):
    scores = {2: 3.0, 4: 1.5, 6: 2.0, 8: 2.5, 10: 1.5}
    with Checkpoints(storage, "c", 1, CONFIG) as checkpoints:
        for step in range(11):
            checkpoints.save(*trained(step, [pair for pair in scores.items() if pair[0] <= step]))
            checkpoints.wait()
            if step == 3:
                assert checkpoints.steps() == [2, 3]
    assert checkpoints.steps() == [4, 9, 10]  # of two equals the first


def test_checkpoint_without_validation_keeps_the_newest(storage, scratch):
    with Checkpoints(storage, "c", 2, CONFIG) as checkpoints:
        for step in range(6):
            checkpoints.save(*trained(step))
    assert checkpoints.steps() == [3, 4, 5]


def test_checkpoint_that_was_half_removed_or_half_stored_goes_with_the_next(storage, scratch):
    storage.write("c/step-00000001/optimizer.safetensors", b"a killed upload")
    with Checkpoints(storage, "c", 2, CONFIG) as checkpoints:
        assert checkpoints.fetch() is None
        checkpoints.save(*trained(2))
    assert not storage.list("c/step-00000001/")
    assert checkpoints.steps() == [2]


def test_checkpoint_damaged_in_any_way_is_skipped_for_the_one_before(storage, scratch, caplog):
    with Checkpoints(storage, "c", 2, CONFIG) as checkpoints:
        for step in (1, 2):
            checkpoints.save(*trained(step))
    newest = storage.root / "c/step-00000002"
    paths = sorted(path for path in newest.rglob("*") if path.is_file())
    assert [path.name for path in paths] == ["manifest.json", "weights.pt", "optimizer.safetensors", "state.json"]
    chance = random.Random(0)
    for number in range(200):
        path = paths[number % len(paths)]
        good = path.read_bytes()
        kind = ("flip", "flip", "cut", "empty", "zeroes", "other", "gone")[number // len(paths) % 7]
        if kind == "gone":
            path.unlink()
        elif kind == "flip":
            bad = bytearray(good)
            bad[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
            path.write_bytes(bad)
        elif kind == "zeroes":
            start = chance.randrange(len(good))
            length = chance.randrange(1, len(good) - start + 1)
            path.write_bytes(good[:start] + bytes(length) + good[start + length :])
        else:
            other = newest.parent / "step-00000001" / path.relative_to(newest)
            cut = chance.randrange(len(good))
            path.write_bytes({"cut": good[:cut], "empty": b"", "other": other.read_bytes()}[kind])
        damaged = not path.exists() or path.read_bytes() != good
        caplog.clear()
        found = checkpoints.fetch()
        assert found.state.step == (1 if damaged else 2), (kind, path.name)
        assert torch.equal(weights_of(found), torch.full((2, 2), float(found.state.step)))
        assert ("step 2 is skipped" in caplog.text) == (damaged and paths[0].exists())
        path.write_bytes(good)


def test_checkpoint_of_another_config_is_refused_with_both_values(storage, scratch):
    with Checkpoints(storage, "c", 2, CONFIG) as checkpoints:
        checkpoints.save(*trained(1))
    other = {**CONFIG, "train": {"learning_rate": 0.002, "steps": 10}}
    for asked in (None, 1):
        with pytest.raises(ConfigError, match=r"[(]train.learning_rate: 0.001, now 0.002[)]") as error:
            Checkpoints(storage, "c", 2, other).fetch(asked)
        assert "\n" not in str(error.value)
    found = Checkpoints(storage, "c", 2, {"store": "abc", "train": {"steps": 10, "learning_rate": 0.001}}).fetch()
    assert found.state.step == 1
    found.discard()


def test_checkpoint_config_leaves_out_where_and_how_fast():
    def decided(**train):
        plan = TrainPlan(
            storage=train.pop("storage", "here"),
            prefix="p",
            store="store/x",
            tokenizer="t",
            student=StudentConfig(shape={"num_hidden_layers": 1}),
            teacher_model=None,
            teacher=None,
            distill=DistillConfig(alpha=1.0),
            train=TrainConfig(steps=10, **train),
            threads=1,
        )
        return plan.decides("fingerprint")

    assert decided() == decided(num_workers=2, checkpoint_every=3, micro_batch=4, storage="there")
    assert decided() != decided(learning_rate=0.5)
    assert decided() != decided(seed=1)


FILL_THE_DISK = """
import os, sys, tempfile
import torch
from cluster.errors import StorageError
from cluster.language_model import load_causal_lm
from cluster.storage import open_storage
from jobs.training.checkpoint import Checkpoints, TrainState
model = load_causal_lm(sys.argv[2], torch.float32)
tempfile.tempdir = sys.argv[1]
with Checkpoints(open_storage(sys.argv[3]), "c", 2, None) as checkpoints:
    try:
        checkpoints.save(model, torch.optim.AdamW(model.parameters()), TrainState(step=1))
    except StorageError as error:
        print(error)
assert os.listdir(sys.argv[1]) == []
assert checkpoints.steps() == []
"""


def test_checkpoint_on_a_full_disk_is_one_line(tmp_path):
    from tests import tiny

    model = tiny.save_model(tmp_path / "model", hidden_size=128)
    assert (model / "model.safetensors").stat().st_size > 300_000
    done = on_a_small_disk(tmp_path / "small", FILL_THE_DISK, tmp_path / "small", model, tmp_path / "root")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "cannot be written" in done.stdout
    assert "set TMPDIR" in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_checkpoint_moments_come_back_by_name(tmp_path, scratch):
    with Checkpoints(open_storage(str(tmp_path / "plain")), "c", 2, CONFIG) as checkpoints:
        checkpoints.save(*trained(7))
    model, optimizer, _ = trained(0)
    fresh = torch.optim.AdamW(model.parameters())
    found = checkpoints.fetch(7)
    found.restore_moments(model, fresh)
    found.discard()
    assert torch.equal(fresh.state[model.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
