"""What a run has done: a stage is done for one key only, and the summary is what people and programs read."""

import io
import json

import pytest
from rich.console import Console

from cluster.errors import CorruptArtifact, StorageError
from cluster.storage import open_storage
from jobs.ledger import STAGES, Ledger, StageRecord, stage_key
from jobs.run import status
from jobs.stages import ALL_STAGES
from jobs.tables import show, size

MEASURED = {"parameters": 1234567, "bytes": 2_500_000, "bits_per_byte": 1.23456, "tokens_per_s": 9876.5}


@pytest.fixture
def ledger(tmp_path):
    return Ledger(open_storage(str(tmp_path)), "mine")


def shown(summary):
    console = Console(file=io.StringIO(), width=200)
    show(summary, console)
    return console.file.getvalue()


# --- done or not ------------------------------------------------------------------------------------------------------


def test_stage_without_a_record_is_not_done(ledger):
    assert ledger.record("train") is None
    assert ledger.done("train", "k") is None


def test_stage_is_done_for_an_equal_key_only(ledger):
    written = StageRecord("k", "done", 1.5, {"model": "file:///m"})
    ledger.write("train", written)
    assert ledger.done("train", "k") == written
    assert ledger.done("train", "other") is None
    assert ledger.done("evaluate", "k") is None
    ledger.write("train", StageRecord("new", "done", 2.0, {}))
    assert ledger.done("train", "k") is None


@pytest.mark.parametrize(("state", "is_done"), [("done", True), ("skipped", True), ("failed", False)])
def test_stage_that_failed_is_not_done(ledger, state, is_done):
    ledger.write("train", StageRecord("k", state, 1.0, {}, "why"))
    assert (ledger.done("train", "k") is not None) == is_done
    assert ledger.record("train").status == state


def test_stage_done_is_seen_by_the_next_process_of_the_same_root(ledger, tmp_path):
    ledger.write("prepare", StageRecord("k", "done", 1.0, {"rows": {"train": 3}}))
    assert Ledger(open_storage(str(tmp_path)), "mine").done("prepare", "k").output == {"rows": {"train": 3}}


def test_records_of_a_run_that_was_moved_point_at_its_new_place(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    storage = open_storage(str(old))
    output = {"model": f"{storage.uri}/student/model", "other": "s3://elsewhere/model", "list": [f"{storage.uri}/x"]}
    Ledger(storage, "mine").write("train", StageRecord("k", "done", 1.0, output))
    assert Ledger(storage, "mine").record("train").output == output
    old.rename(new)
    moved = open_storage(str(new))
    assert Ledger(moved, "mine").record("train").output == {
        "model": f"{moved.uri}/student/model",
        "other": "s3://elsewhere/model",
        "list": [f"{moved.uri}/x"],
    }


def test_records_of_later_stages_are_dropped_when_one_is_made_anew(ledger, tmp_path):
    for stage in ("prepare", "train", "evaluate", "serve"):
        ledger.write(stage, StageRecord("k", "done", 1.0, {"models": {stage: {}}}))
    ledger.forget_after("train")
    assert [stage for stage in STAGES if ledger.record(stage) is not None] == ["prepare", "train"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["stages"]) == list(summary["models"]) == ["prepare", "train"]


def test_record_of_another_version_of_raystill_counts_as_none(ledger, tmp_path):
    (tmp_path / "stages").mkdir()
    for content in ({"key": "k", "status": "done"}, {**vars(StageRecord("k", "done", 1.0, {})), "more": 1}, [1, 2]):
        (tmp_path / "stages/train.json").write_text(json.dumps(content))
        assert ledger.done("train", "k") is None
        assert ledger.summary()["stages"] == {}


def test_record_that_is_cut_off_is_an_error_that_names_it(ledger, tmp_path):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/train.json").write_text('{"key": "k", ')
    with pytest.raises(CorruptArtifact, match=r"stages/train\.json is not valid JSON .* delete it and run again"):
        ledger.done("train", "k")


def test_stage_key_depends_on_every_part_and_on_nothing_else():
    assert stage_key({"a": 1, "b": 2}, "x") == stage_key({"b": 2, "a": 1}, "x")
    parts = [({"a": 1, "b": 2}, "x"), ({"a": 1}, "x"), ("x", {"a": 1, "b": 2}), ({"a": 1, "b": 2}, None), ()]
    assert len({stage_key(*item) for item in parts}) == 5


def test_stages_of_the_ledger_are_those_that_run():
    assert tuple(stage.name for stage in ALL_STAGES) == STAGES


# --- the summary ------------------------------------------------------------------------------------------------------


def test_summary_has_stages_in_order_and_one_table_of_models(ledger, tmp_path):
    ledger.write("evaluate", StageRecord("e", "done", 2.0, {"models": {"teacher": MEASURED, "student": MEASURED}}))
    ledger.write("quantize", StageRecord("q", "failed", 0.123456, {}, "torchao: no"))
    ledger.write("train", StageRecord("t", "done", 61.0, {"model": "file:///m", "losses": [3.0, 2.0]}))
    ledger.write("teacher", StageRecord("x", "skipped", 0.0, {}))
    summary = ledger.summary()
    assert summary == {
        "name": "mine",
        "storage": tmp_path.as_uri(),
        "stages": {
            "teacher": {"status": "skipped", "seconds": 0.0},
            "train": {"status": "done", "seconds": 61.0, "model": "file:///m", "losses": [3.0, 2.0]},
            "evaluate": {"status": "done", "seconds": 2.0},
            "quantize": {"status": "failed", "seconds": 0.12, "message": "torchao: no"},
        },
        "models": {"teacher": MEASURED, "student": MEASURED},
    }
    assert list(summary["stages"]) == ["teacher", "train", "evaluate", "quantize"]


def test_summary_lies_at_the_root_after_every_record(ledger, tmp_path):
    for stage in ("prepare", "teacher"):
        ledger.write(stage, StageRecord("k", "done", 1.0, {}))
        assert json.loads((tmp_path / "summary.json").read_text()) == ledger.summary() == status(str(tmp_path))
    assert not [path.name for path in tmp_path.rglob("*") if path.name.endswith(".partial")]


def test_status_of_an_empty_root_is_none_and_makes_nothing(tmp_path):
    assert status(str(tmp_path / "none")) is None
    assert not list(tmp_path.iterdir())


# --- whose root it is -------------------------------------------------------------------------------------------------


def test_owner_of_a_root_is_the_run_that_wrote_first(ledger, tmp_path):
    ledger.check_owner()
    ledger.write("prepare", StageRecord("k", "done", 1.0, {}))
    ledger.check_owner()
    with pytest.raises(StorageError, match="holds run 'mine', the config says name='other': choose another storage"):
        Ledger(open_storage(str(tmp_path)), "other").check_owner()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '"mine"'])
def test_owner_of_a_root_with_a_foreign_summary_is_nobody(ledger, tmp_path, content):
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(StorageError, match=r"summary\.json") as caught:
        ledger.check_owner()
    assert "\n" not in str(caught.value)


# --- what a person sees -----------------------------------------------------------------------------------------------


def test_tables_show_stages_and_models(ledger):
    rows = {"train": 1000, "validation": 20}
    ledger.write("prepare", StageRecord("p", "done", 1.0, {"documents": 12345, "rows": rows}))
    trained = {"rows": 8000, "tokens_per_s": 4321.0, "losses": [3.0, 2.25], "teacher_calls": 500, "teacher_wait_s": 1.5}
    ledger.write("train", StageRecord("t", "done", 61.04, trained))
    ledger.write("evaluate", StageRecord("e", "done", 2.0, {"models": {"student": MEASURED, "teacher": MEASURED}}))
    champion = {"champion": {"version": "3", "model_name": "mine-student"}}
    ledger.write("promote", StageRecord("c", "done", 0.1, champion))
    text = shown(ledger.summary())
    for part in ("12,345 documents, 1,000 + 20 rows", "8,000 rows, 4,321 tokens/s, loss 2.250", "waited 1.5 s"):
        assert part in text
    for part in ("61.0", "version 3 was made champion of mine-student", "1,234,567", "2.5 MB", "1.2346", "9,876"):
        assert part in text
    assert text.index("│ teacher ") < text.index("│ student ")
    parts_s = {"data": 1.0, "wait": 2.0, "forward": 3.0, "loss": 4.0}
    measured = {"teacher_tokens_per_s": 12345.6, "signal_bytes_per_position": 384.0, "parts_s": parts_s}
    ledger.write("train", StageRecord("t", "done", 61.04, {**trained, **measured}))
    text = shown(ledger.summary())
    assert "a replica scored 12,346 tokens/s, 384 bytes per position" in text
    assert "time: data 10%, wait 20%, forward 30%, loss 40%, backward 0%, optimizer 0%" in text


def test_tables_show_what_a_model_says_as_it_is(ledger):
    answer = {"question": "[/INST] [red]?", "answer": "[/] [bold]x[/bold] []", "url": "http://x"}
    ledger.write("serve", StageRecord("s", "done", 1.0, answer))
    ledger.write("train", StageRecord("t", "failed", 1.0, {}, "found sources=[], layers=[/2]"))
    text = shown(ledger.summary())
    assert "'[/INST] [red]?' → '[/] [bold]x[/bold] []'" in text
    assert "found sources=[], layers=[/2]" in text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_700_000, "1.7 MB"), (2_500_000_000_000, "2500.0 GB")],
)
def test_size_is_for_people(num_bytes, text):
    assert size(num_bytes) == text
