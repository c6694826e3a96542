"""Labels: the same records as the wire, read again row by row; no row without one, none twice, nothing half-written."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from cluster.errors import ConfigError, CorruptArtifact
from cluster.storage import open_storage
from jobs.config import DataConfig, RunConfig, StudentConfig
from jobs.corpus import find_sources
from jobs.labels.access import access_without_teacher, signal_for
from jobs.labels.columns import columns_of, from_arrow, signal_of, to_arrow
from jobs.labels.store import Label, LabelStore, labels_of
from jobs.labels.teacher import StoredTeacher, store_teacher
from jobs.prepare import prepare
from jobs.training.data import ExampleStore, GlobalBatches, RowId
from jobs.training.labelled import Labels
from jobs.training.prefetch import Prefetch
from services.teacher.model import TeacherModel
from services.teacher.signals import SignalSpec, TopkSignal, cut, joined
from tests import tiny
from tests.in_process_teacher import InProcessTeacher, contract_specs, make_request
from tests.unit.test_prepare import NoBar

SPECS = {
    **contract_specs(317),
    "sampled with weights": SignalSpec("sampled", 317, draws=9, proposal=0.5),
    "topk of all": SignalSpec("topk", 320, 320),
}
TOPK = SignalSpec("topk", 320, 16, (1.0, 2.0))


def arrays(signal):
    return [value for value in vars(signal).values() if isinstance(value, np.ndarray)]


def same(found, expected):
    pairs = list(zip(arrays(found), arrays(expected), strict=True))
    return all(one.dtype == other.dtype and np.array_equal(one, other, equal_nan=True) for one, other in pairs)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    model = tiny.save_model(root / "teacher")
    storage = open_storage(str(root))
    data = {"sources": [str(tiny.corpus(root / "in", 80))], "sequence_length": 48, "rows_per_shard": 20}
    config = DataConfig(**data, validation_fraction=0.2)
    prepare(find_sources(config.sources), config, str(model), 1, storage, "store/x", NoBar())
    return storage, TeacherModel(str(model), "float32"), ExampleStore(storage, "store/x", "train")


@pytest.fixture
def labels(base, tmp_path):
    """An empty label store."""
    return LabelStore(open_storage(str(tmp_path)), base[1].describe().fingerprint, TOPK, base[2])


def answered(base, spec, steps=range(4), global_batch=7):
    """Micro-batches with the teacher's signals."""
    _, model, examples = base
    teacher = InProcessTeacher(model)
    batches = GlobalBatches(examples, global_batch, 0).micro_batches(steps, 0, 1, global_batch)
    asking = Prefetch(teacher, spec, spec.bytes_per_position(32), 1 << 20, "w")
    return list(asking.pairs(batches))


@pytest.mark.parametrize("name", SPECS)
def test_columns_give_the_signal_back(base, name):
    spec = SPECS[name]
    signal = base[1].score([make_request([9, 4], spec)])[0].signal
    for part in (signal, cut(signal, 3, 7)):
        cells = {column: to_arrow([values, values])[1] for column, values in columns_of(part).items()}
        flat = {column: from_arrow(cell, column) for column, cell in cells.items()}
        assert same(signal_of(flat, spec, len(part)), part)
    cells = {column: to_arrow([values[:0]])[0] for column, values in columns_of(signal).items()}
    nothing = signal_of({column: from_arrow(cell, column) for column, cell in cells.items()}, spec, 0)
    assert same(joined([nothing, cut(signal, 0, 5), cut(signal, 5, 6), cut(signal, 6, 13)]), signal)


@pytest.mark.parametrize("name", SPECS)
def test_store_gives_every_row_its_label_back(base, tmp_path, name):
    spec = SPECS[name]
    store = LabelStore(open_storage(str(tmp_path)), "teacher", spec, base[2])
    pairs = answered(base, spec)
    written = {label.row: label for batch, signal in pairs for label in labels_of(batch, signal)}
    assert sum(len(label.positions) for label in written.values()) == sum(len(batch.positions) for batch, _ in pairs)
    store.write(list(written.values())[:10])
    store.write(list(written.values())[10:])
    assert next(iter(written)) not in store  # until it looks
    store.refresh()
    again = LabelStore(open_storage(str(tmp_path)), "teacher", spec, base[2])
    for row, label in written.items():
        assert row in store
        for found in (store.read(row), again.read(row)):
            assert found.row == row
            assert np.array_equal(found.positions, label.positions)
            assert same(found.signal, label.signal)
    assert sum(len(store.missing(shard["number"])) for shard in base[2].shards) == len(base[2]) - len(written)


def test_two_writers_of_one_shard_leave_one_label_for_each_row(base, labels, tmp_path):
    pairs = answered(base, TOPK)
    ours = [label for batch, signal in pairs for label in labels_of(batch, signal)]
    theirs = [
        replace(label, signal=replace(label.signal, tail_logmass_NM=label.signal.tail_logmass_NM - 1)) for label in ours
    ]
    with ThreadPoolExecutor(2) as pool:
        keys = list(pool.map(labels.write, (ours, theirs[::-1])))
    assert keys[0] != keys[1]
    first = ours if keys[0] < keys[1] else theirs
    seen_one_first = LabelStore(open_storage(str(tmp_path)), labels.prefix.split("/")[0], TOPK, base[2])
    for store in (labels, seen_one_first):
        store.refresh()
        for label in first:
            assert same(store.read(label.row).signal, label.signal)


def test_labels_written_again_are_the_same_object(base, labels):
    written = labels_of(*answered(base, TOPK)[0])
    assert labels.write(written) == labels.write(written[::-1])


def test_labels_are_plain_parquet_for_anyone(base, labels, tmp_path):
    pairs = answered(base, TOPK, range(8))
    labels.write([label for batch, signal in pairs for label in labels_of(batch, signal)])
    store_teacher(open_storage(str(tmp_path)), base[1].describe(), TOPK, None)
    [path] = tmp_path.rglob("*.parquet")
    frame = pd.read_parquet(path.parent)
    batch, signal = pairs[0]
    ids, logprobs = signal.entries()
    row = batch.row_ids[0]
    [shard] = [shard["sha256"] for shard in base[2].shards if shard["number"] == row.shard]
    found = frame[(frame["row"] == row.row) & (frame["shard"] == shard)]
    number = len(found["positions"].iloc[0])
    assert np.array_equal(np.cumsum(np.reshape(found["gaps"].iloc[0], (number, 16)), axis=1), ids[:number])
    assert np.array_equal(np.reshape(found["logprobs"].iloc[0], (number, 16)), logprobs[:number])
    assert np.reshape(found["tail_logmass"].iloc[0], (number, 2)).shape == (number, 2)


@pytest.mark.parametrize("vocab_size", [8_192, 49_152, 151_936])
def test_labels_of_64_entries_take_no_more_than_on_the_wire(base, tmp_path, vocab_size):
    """Ids without any pattern, the hardest to compress; those of a real teacher take less."""
    spec, rng, length = SignalSpec("topk", vocab_size, 64), np.random.default_rng(0), 128
    labels = []
    for row in range(16):
        ids_NK = np.sort(np.stack([rng.choice(vocab_size, 64, replace=False) for _ in range(length)]), axis=1)
        logprobs_NK = np.log(rng.dirichlet(np.ones(64), length)).astype(np.float32)
        signal = TopkSignal.of(ids_NK, logprobs_NK, -rng.random((length, 1), np.float32), spec)
        labels.append(Label(RowId(base[2].shards[0]["number"], row), np.arange(length, dtype=np.int32), signal))
    LabelStore(open_storage(str(tmp_path)), "teacher", spec, base[2]).write(labels)
    [path] = tmp_path.rglob("*.parquet")
    assert path.stat().st_size <= 16 * length * spec.bytes_per_position(0)


def test_a_damaged_object_is_named_and_its_rows_are_asked_again(base, labels, tmp_path, caplog):
    written = labels_of(*answered(base, TOPK)[0])
    labels.write(written)
    labels.refresh()
    [path] = tmp_path.rglob("*.parquet")
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptArtifact, match=path.name):
        [labels.read(label.row) for label in written]
    batch, signal = answered(base, TOPK)[0]
    teacher = InProcessTeacher(base[1])
    kept = Labels(labels, reads=True, writes=True, epoch_steps=9)
    asking = Prefetch(teacher, TOPK, 100, 1 << 20, "w", labels=kept)
    [(_, again)] = asking.pairs(iter([batch]))
    assert same(again, signal)
    assert (teacher.counters.calls, asking.labelled_rows) == (1, 0)
    kept.close()
    path.write_bytes(data[:100])
    again = LabelStore(open_storage(str(tmp_path)), base[1].describe().fingerprint, TOPK, base[2])
    assert "not a whole parquet" in caplog.text
    assert written[0].row not in again


@pytest.mark.parametrize("global_batch", [8, 7])
def test_a_second_epoch_asks_nothing_and_hears_the_same(base, labels, global_batch):
    _, model, examples = base
    teacher = InProcessTeacher(model)
    epoch = -(-len(examples) // global_batch)
    kept = Labels(labels, reads=True, writes=True, epoch_steps=epoch)
    asking = Prefetch(teacher, TOPK, TOPK.bytes_per_position(32), 1 << 16, "w", labels=kept)
    heard, calls = {}, []
    for batch, signal in asking.pairs(
        GlobalBatches(examples, global_batch, 0).micro_batches(range(3 * epoch), 0, 1, 4)
    ):
        for label in labels_of(batch, signal):
            first = heard.setdefault(label.row, label)
            assert np.array_equal(first.positions, label.positions)
            assert np.allclose(*(item.signal.logprobs_NK for item in (first, label)), atol=2e-3)
        if batch.last:
            calls.append(teacher.counters.calls)
    assert calls[-1] == calls[epoch] or global_batch == 7  # a batch over the border of two epochs may ask again
    assert calls[-1] <= calls[epoch - 1] + 2
    assert asking.labelled_rows >= 3 * epoch * global_batch - len(examples) - 8
    kept.close()
    again = LabelStore(open_storage(labels._storage.uri), model.describe().fingerprint, TOPK, examples)
    assert sum(len(again.missing(shard["number"])) for shard in examples.shards) == 0
    rows = [
        row
        for batch in GlobalBatches(examples, len(examples), 5).micro_batches(range(1), 0, 1, 4)
        for row in batch.row_ids
    ]
    assert all(same(again.read(row).signal, heard[row].signal) for row in rows)


def test_an_answer_that_another_worker_writes_is_waited_for(base, labels, tmp_path):
    batch, signal = answered(base, TOPK)[0]
    other = LabelStore(open_storage(str(tmp_path)), base[1].describe().fingerprint, TOPK, base[2])
    mine = Labels(labels, reads=True, writes=True, epoch_steps=1)
    theirs = Labels(other, reads=True, writes=True, epoch_steps=1)
    assert not mine.expects(batch)  # the first epoch: nobody has asked yet
    assert not Labels(labels, reads=True, writes=True, epoch_steps=1, first_step=1).expects(replace(batch, step=1))
    later = replace(batch, step=1)
    assert mine.expects(later)
    assert mine.find(later) is None
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(mine.wait_for, later)
        theirs.keep(batch, signal)
        assert same(waiting.result(30).result(30), signal)
    mine.close()
    theirs.close()


def test_an_answer_that_nobody_writes_is_asked_for_after_one_wait(base, labels, monkeypatch):
    monkeypatch.setattr("jobs.training.labelled._PATIENCE_S", 0.5)
    first, second = [replace(batch, step=step) for step, (batch, _) in enumerate(answered(base, TOPK)[:2], 5)]
    teacher = InProcessTeacher(base[1])
    kept = Labels(labels, reads=True, writes=True, epoch_steps=1)
    asking = Prefetch(teacher, TOPK, 100, 1 << 20, "w", labels=kept)
    assert len(list(asking.pairs(iter([first, second])))) == 2
    assert teacher.counters.calls == 2
    assert asking.waited_s < 30
    kept.close()


def test_labels_are_over_the_columns_that_both_models_have(base):
    config, described = run_config(base), base[1].describe()

    def columns(**student):
        return signal_for(config.replace(student=StudentConfig(**student)), described, base[2])[0].vocab_size

    assert columns(shape={"num_hidden_layers": 1}) == columns(from_teacher={"layers": [0]}) == 320
    assert columns(shape={"vocab_size": 300}) == 300
    assert columns(shape={"vocab_size": 999}) == 320
    assert columns(model=config.teacher.model) == 320
    assert columns(shape={"model_type": "llama"}) == base[2].manifest["vocab_size"]


def test_stored_teacher_is_the_one_that_answered(base, tmp_path):
    storage, model = open_storage(str(tmp_path)), base[1]
    spec = SignalSpec("hidden", 320)
    store_teacher(storage, model.describe(), spec, model.head())
    stored = StoredTeacher(storage, model.describe().fingerprint, spec)
    assert stored.describe() == model.describe()
    assert np.array_equal(stored.head().weight_VD, model.head().weight_VD)
    assert replace(stored.head(), weight_VD=None) == replace(model.head(), weight_VD=None)
    [path] = tmp_path.rglob("_head-*")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptArtifact, match="sha256"):
        stored.head()


def run_config(base, **distill):
    storage, _, examples = base
    root = storage.uri.removeprefix("file://")
    return RunConfig(
        name="test",
        storage=root,
        data={"sources": [f"{root}/in"], "sequence_length": 48},
        teacher={"model": f"{root}/teacher"},
        student={"shape": {"num_hidden_layers": 1}},
        distill={"signal": "topk", "top_k": 16, "temperature": 2.0, **distill},
        train={"steps": -(-len(examples) // 8), "global_batch": 8},
    )


def test_training_does_without_a_teacher_only_when_labels_cover_what_it_reads(base, tmp_path):
    storage, model, examples = base
    spec, root = SignalSpec("topk", 320, 16, (2.0,)), open_storage(str(tmp_path))

    def access(**distill):
        config = run_config(base, label_store=str(tmp_path), **distill)
        return access_without_teacher(config, config.teacher.model, storage, "store/x")

    assert access(labels="write") is None
    assert access(labels="read_write") is None
    with pytest.raises(ConfigError, match=r"no such labels .* none\): run `raystill label`"):
        access(labels="read")
    store_teacher(root, model.describe(), spec, None)
    store = LabelStore(root, model.describe().fingerprint, spec, examples)
    written = [
        label for batch, signal in answered(base, spec, range(len(examples)), 1) for label in labels_of(batch, signal)
    ]
    store.write(written[1:])
    assert access(labels="read_write") is None
    with pytest.raises(ConfigError, match=f"topk at T=2.0: {len(examples) - 1} of {len(examples)} rows"):
        access(labels="read")
    store.write(written[:1])
    for mode in ("read", "read_write"):
        found, reason = access(labels=mode)
        assert (found.app_name, found.fingerprint, found.signal) == (None, model.describe().fingerprint, spec)
        assert f"all {len(examples)} rows" in reason
    with pytest.raises(ConfigError, match=r"topk at T=2.0: 0 of"):
        access(labels="read", temperature=1.5)  # the tail's mass at 1.5 is not known


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_label_without_a_teacher_to_ask_is_refused(base, tmp_path, command, options):
    root = base[0].uri.removeprefix("file://")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"name: none\ndata: {{sources: [{root}/in]}}\nteacher: {{model: {root}/teacher}}\n"
        "student: {shape: {num_hidden_layers: 1}}\ndistill: {alpha: 1}\ntrain: {steps: 1, global_batch: 4}\n"
    )
    done = subprocess.run([*command, "label", str(config), *options], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "this config asks no teacher" in done.stderr
    assert not (tmp_path / "runs").exists()
