"""Files of questions: what is read, and what is refused before anything is measured."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import ConfigError, CorpusError
from jobs.config import EvaluateConfig
from jobs.evaluating.questions import questions_fingerprint, read_questions
from tests.questions import MMLU, hellaswag, mmlu


def config(source, format="mmlu", **more):
    return EvaluateConfig(tasks=[{"name": "t", "format": format, "source": str(source), **more}])


def written(tmp_path, records, name="q.jsonl"):
    path = tmp_path / name
    lines = "".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records)
    path.write_bytes(gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode())
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("format", ["mmlu", "hellaswag"])
def test_questions_are_read_as_they_were_published(tmp_path, ending, format):
    records = mmlu() if format == "mmlu" else hellaswag()
    path = tmp_path / f"q{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        written(tmp_path, records, path.name)
    (found,) = read_questions(config(path, format))
    answer = "answer" if format == "mmlu" else "label"
    assert [document[answer] for document in found.documents] == [int(record[answer]) for record in records]
    assert found.documents[0].keys() <= records[0].keys()
    assert found.subjects == (["world_history", "algebra"] if format == "mmlu" else [""])


def test_questions_may_be_cut_for_each_subject_and_letters_are_answers(tmp_path):
    path = written(tmp_path, [{**record, "answer": "ABCD"[record["answer"]]} for record in mmlu()])
    (whole,), (cut,) = read_questions(config(path)), read_questions(config(path, max_questions=1))
    assert [document["answer"] for document in whole.documents] == [record["answer"] for record in mmlu()]
    assert [document["subject"] for document in cut.documents] == ["world_history", "algebra"]


def test_fingerprint_changes_with_the_content_alone(tmp_path):
    first, second = written(tmp_path, mmlu()), written(tmp_path, mmlu(), "other.jsonl")
    changed = written(tmp_path, mmlu()[1:], "changed.jsonl")
    prints = [questions_fingerprint(read_questions(config(path))) for path in (first, second, changed)]
    assert prints[0] == prints[1] != prints[2]
    shots = config(first, shots=1, shots_source=str(second))
    assert questions_fingerprint(read_questions(shots)) != prints[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 4}, "line 2 has 4 as 'answer'; expected the place of the right one of its 4 choices, 0 to 3"),
        ({"answer": -1}, "has -1 as 'answer'"),
        ({"answer": "E"}, "has 'E' as 'answer'"),
        ({"answer": ""}, "has '' as 'answer'"),
        ({"answer": True}, "has True as 'answer'"),
        ({"answer": 1.0}, "has 1.0 as 'answer'"),
        (
            {"answer": None},
            "has no 'answer' .found: question, subject, choices, answer.; a question of format mmlu has",
        ),
        ({"choices": ["a", "b", "c"]}, "as 'choices'; expected a list of four texts"),
        ({"choices": "abcd"}, "has 'abcd' as 'choices'"),
        ({"choices": ["a", "", "c", "d"]}, "has '' in 'choices'; expected a text"),
        ({"choices": ["a", 2, "c", "d"]}, "has 2 in 'choices'"),
        ({"question": ["x"]}, "in 'question'; expected a text"),
    ],
)
def test_record_that_is_no_question_is_named(tmp_path, changes, message):
    path = written(tmp_path, [MMLU, {**MMLU, **changes}])
    with pytest.raises(CorpusError, match=message) as caught:
        read_questions(config(path))
    assert str(caught.value).startswith(f"evaluate.tasks t: {path}: line 2 ")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_used_are_named(tmp_path):
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"PAR1 and no more")
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"question": ["x"]}), other)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b"x" * 1000)[:-20])
    for path, message in (
        (tmp_path / "none.jsonl", "no such file"),
        (written(tmp_path, [], "empty.jsonl"), "no questions in it"),
        (written(tmp_path, [MMLU, '{"question": '], "broken.jsonl"), "line 2 is not JSON"),
        (written(tmp_path, ["[1]"], "list.jsonl"), r"line 1 has no 'question' \(found: list\)"),
        (written(tmp_path, [MMLU], "q.csv"), "unknown ending; use .parquet, .jsonl"),
        (damaged, "cannot be read to its end"),
        (other, r"row 1 has no 'subject' \(found: question\)"),
        (cut, "cannot be read to its end"),
    ):
        with pytest.raises(CorpusError, match=message) as caught:
            read_questions(config(path))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_shots_must_be_enough_for_every_subject(tmp_path):
    path = written(tmp_path, mmlu())
    few = written(tmp_path, mmlu()[:1], "few.jsonl")
    with pytest.raises(CorpusError, match=r"shots=1, .*few.jsonl has 0 questions of subject 'algebra'"):
        read_questions(config(path, shots=1, shots_source=str(few)))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([{"name": "t", "format": "mmlu", "source": "x.jsonl", "shots": 1}], "shots=1 and shots_source=None"),
        ([{"name": "t", "format": "mmlu", "source": "x.jsonl", "shots_source": "y"}], "go together"),
        ([{"name": "t", "format": "mmlu", "source": "x.jsonl"}] * 2, "tasks has 't' 2 times"),
        ([{"name": "t", "format": "arc", "source": "x.jsonl"}], "mmlu"),
    ],
)
def test_config_of_tasks_is_checked(tasks, message):
    from cluster.config import validate

    with pytest.raises(ConfigError, match=message):
        validate(EvaluateConfig, {"tasks": tasks}, "x.yaml")
