"""Multiple-choice questions from files: read and checked whole before anything is measured.

The columns are those of MMLU and HellaSwag as they are published, so that their parquet files can be named as they are.
The driver reads the questions and hands them on, so a file on its disk serves a cluster too.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import pyarrow
import pyarrow.parquet as pq

from cluster.config import fingerprint
from cluster.errors import CorpusError, RaystillError
from cluster.storage import open_storage, split_uri
from jobs.config import EvaluateConfig, MultipleChoiceTask

COLUMNS = {
    "mmlu": ("question", "subject", "choices", "answer"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
}
_MAY_BE_EMPTY = ("ctx_b",)
_LETTERS = "ABCD"
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class Questions:
    """The questions of one task and the answered ones in front of them, as records with the columns of its format."""

    task: MultipleChoiceTask
    documents: list[dict[str, Any]]
    shots: list[dict[str, Any]]

    @property
    def subjects(self) -> list[str]:
        """Names of its parts, in the order of the file; one without a name where the format has no subjects."""
        return list(dict.fromkeys(subject_of(document) for document in self.documents))


def subject_of(document: dict[str, Any]) -> str:
    return str(document.get("subject", ""))


def read_questions(config: EvaluateConfig) -> list[Questions]:
    """The questions of every task.

    Raises:
        CorpusError: a file that is missing, empty or damaged, or a record that is no question of the task's format;
            names the file and the record.
    """
    return [_questions(task) for task in config.tasks]


def questions_fingerprint(questions: list[Questions]) -> list[str]:
    """What decides the answers: a hash for each task."""
    return [fingerprint([item.task.format, item.task.shots, item.documents, item.shots]) for item in questions]


def _questions(task: MultipleChoiceTask) -> Questions:
    every, asked = list(_records(task, task.source)), Counter[str]()
    documents = []
    for document in every:
        asked[subject_of(document)] += 1
        if task.max_questions is None or asked[subject_of(document)] <= task.max_questions:
            documents.append(document)
    shots = list(_records(task, task.shots_source)) if task.shots_source is not None else []
    found = Counter(subject_of(document) for document in shots)
    for subject in asked:
        if found[subject] < task.shots:
            of = f" of subject {subject!r}" if subject else ""
            raise CorpusError(
                f"evaluate.tasks {task.name}: shots={task.shots}, {task.shots_source} has {found[subject]} questions"
                f"{of}: lower shots, or add some"
            )
    return Questions(task, documents, shots)


def _records(task: MultipleChoiceTask, uri: str) -> Iterator[dict[str, Any]]:
    place = f"evaluate.tasks {task.name}: {uri}"
    if not uri.endswith((".parquet", ".jsonl", *(f".jsonl{ending}" for ending in _COMPRESSED))):
        raise CorpusError(f"{place} has an unknown ending; use .parquet, .jsonl, .jsonl.gz or .jsonl.zst")
    storage, name = split_uri(uri if "://" in uri else open_storage(uri).uri)
    count = 0
    try:
        with storage.open(name) as raw:
            for where, record in _parquet(raw) if uri.endswith(".parquet") else _jsonl(raw, Path(uri).suffix):
                try:
                    yield _checked(record, task.format)
                except CorpusError as error:
                    raise CorpusError(f"{place}: {where} {error}") from None
                count += 1
    except FileNotFoundError:
        raise CorpusError(f"{place}: no such file; check the path") from None
    except (OSError, EOFError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        if isinstance(error, RaystillError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CorpusError(f"{place}: cannot be read to its end ({reason}); replace it") from error
    except json.JSONDecodeError as error:
        raise CorpusError(
            f"{place}: {error.doc} is not JSON ({error.msg}); repair it, the file may be cut off"
        ) from None
    if not count:
        raise CorpusError(f"{place}: no questions in it; fill the file or leave the task out")


def _jsonl(raw: IO[bytes], ending: str) -> Iterator[tuple[str, Any]]:
    stream = cast(IO[bytes], pyarrow.CompressedInputStream(raw, _COMPRESSED[ending])) if ending in _COMPRESSED else raw
    for number, line in enumerate(stream.read().decode("utf-8-sig").splitlines(), 1):
        if line and not line.isspace():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise json.JSONDecodeError(error.msg, f"line {number}", 0) from None


def _parquet(raw: IO[bytes]) -> Iterator[tuple[str, Any]]:
    table = pq.ParquetFile(raw, page_checksum_verification=True).read()
    for number, record in enumerate(table.to_pylist(), 1):
        yield f"row {number}", record


def _checked(record: Any, format: str) -> dict[str, Any]:
    """The columns of a record that make the question. Raises `CorpusError`, to which the caller adds the place."""
    names = COLUMNS[format]
    missing = [name for name in names if not isinstance(record, dict) or record.get(name) is None]
    if missing:
        found = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise CorpusError(
            f"has no {missing[0]!r} (found: {found}); a question of format {format} has {', '.join(names)}"
        )
    *texts, choices_name, answer_name = names
    for name in texts:
        _check_text(record[name], name, may_be_empty=name in _MAY_BE_EMPTY)
    choices = record[choices_name]
    if not isinstance(choices, list) or len(choices) < 2 or (format == "mmlu" and len(choices) != len(_LETTERS)):
        wanted = "four" if format == "mmlu" else "at least two"
        raise CorpusError(f"has {choices!r:.80} as {choices_name!r}; expected a list of {wanted} texts")
    for choice in choices:
        _check_text(choice, choices_name)
    answer = _answer(record[answer_name], len(choices))
    if answer is None:
        raise CorpusError(
            f"has {record[answer_name]!r:.80} as {answer_name!r}; expected the place of the right one of its "
            f"{len(choices)} {choices_name}, 0 to {len(choices) - 1}"
        )
    return {**{name: record[name] for name in (*texts, choices_name)}, answer_name: answer}


def _check_text(value: Any, name: str, may_be_empty: bool = False) -> None:
    if not isinstance(value, str) or not (value.strip() or may_be_empty):
        raise CorpusError(f"has {value!r:.80} in {name!r}; expected a text")


def _answer(value: Any, count: int) -> int | None:
    """The place of the right answer from a number, a number as text, or a letter."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str) and value in _LETTERS and len(value) == 1:
        value = _LETTERS.index(value)
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    return value if isinstance(value, int) and 0 <= value < count else None
