"""Labelling: what the teacher says about a whole example store, written ahead of training.

A Ray task for each shard reads its rows, asks the teacher service and stores the answers. Rows that have a label are
not asked again, so a job that was stopped goes on, also in the middle of a shard; a task whose process dies begins its
shard anew, and two jobs at once only repeat each other's work.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from cluster.errors import StorageError
from cluster.storage import Storage, open_storage
from jobs.config import RunConfig
from jobs.labels.access import signal_for
from jobs.labels.estimate import cost, cost_line
from jobs.labels.store import Label, LabelStore, labels_of
from jobs.labels.teacher import store_teacher
from jobs.progress import Bar
from jobs.tasks import run_tasks
from jobs.training.data import ExampleStore, MicroBatch, collate
from jobs.training.plan import TeacherAccess
from jobs.training.prefetch import Prefetch
from services.teacher.client import TeacherClient
from services.teacher.schema import TeacherDescription
from services.teacher.signals import SignalSpec, num_bytes

_PIECE_BYTES = 64 << 20
"""Of labels that are written as one object."""

Report = Callable[[int, dict[str, float]], None]


def label_store(
    access: TeacherAccess, root: str, storage: Storage, store: str, rows_at_once: int, tasks_at_once: int, bar: Bar
) -> dict[str, Any]:
    """Labels every training row of a store that has no label yet.

    Args:
        access: the teacher service, and the signal to ask for.
        root: URI of the label stores.
        rows_at_once: rows in a request.

    Returns:
        `root` and `prefix` of the labels, their `teacher` and `signal`, `rows` of the store, `labelled` of them by this
        call with their `positions` and `signal_bytes` on the wire, and `size_bytes` of all labels.

    Raises:
        StorageError: what the tasks have written is not to be seen here.
    """
    examples = ExampleStore(storage, store, "train")
    labels = LabelStore(open_storage(root), access.fingerprint, access.signal, examples)
    description = introduce_teacher(access, root)
    by_content = {shard["sha256"]: shard for shard in examples.shards}  # shards that are the same share their labels
    wanting = [shard for shard in by_content.values() if len(labels.missing(shard["number"]))]
    missing = sum(len(labels.missing(shard["number"])) for shard in wanting)
    width = access.signal.bytes_per_position(description.hidden_size)
    bar.say(cost_line(missing, cost(examples, missing, width)))
    bar.start(missing)
    done = dict.fromkeys(range(len(wanting)), 0)
    started = time.monotonic()

    def follow(step: int, figures: dict[str, float]) -> None:
        number = int(figures["task"])
        done[number] = max(done[number], step)
        rate = sum(done.values()) / max(time.monotonic() - started, 1e-9)
        bar.update(sum(done.values()), f"{rate:,.0f} rows/s")

    calls = [
        (number, access, root, storage.uri, store, shard["number"], labels.missing(shard["number"]), rows_at_once)
        for number, shard in enumerate(wanting)
    ]
    written = run_tasks(label_shard, calls, tasks_at_once, 1, follow)
    labels.refresh()
    if still := sum(len(labels.missing(shard["number"])) for shard in examples.shards):
        raise StorageError(
            f"labels of {still:,} rows are not in {root} although they were written: every machine must see the same "
            "storage there; set distill.label_store to one that they share"
        )
    return {
        "root": root,
        "prefix": labels.prefix,
        "teacher": access.fingerprint,
        "signal": asdict(access.signal),
        "rows": len(examples),
        "labelled": sum(item["rows"] for item in written),
        "positions": sum(item["positions"] for item in written),
        "signal_bytes": sum(item["signal_bytes"] for item in written),
        "size_bytes": labels.size_bytes,
    }


def label_shard(
    number: int,
    access: TeacherAccess,
    root: str,
    storage_uri: str,
    store: str,
    shard: int,
    rows: np.ndarray,
    rows_at_once: int,
    report: Report,
) -> dict[str, int]:
    """Labels rows of one shard; a Ray task. Labels are stored every `_PIECE_BYTES`."""
    examples = ExampleStore(open_storage(storage_uri), store, "train")
    labels = LabelStore(open_storage(root), access.fingerprint, access.signal, examples, looks=False)
    client = _client(access)
    size = access.signal.bytes_per_position(client.describe().hidden_size)
    asked = Prefetch(client, access.signal, size, access.window_bytes, f"label{shard}")
    counts = {"rows": 0, "positions": 0, "signal_bytes": 0}
    waiting: list[Label] = []
    waiting_bytes = 0
    try:
        for batch, signal in asked.pairs(_batches(examples, shard, rows, rows_at_once)):
            waiting += labels_of(batch, signal)
            waiting_bytes += num_bytes(signal)
            counts["rows"] += len(batch.row_ids)
            counts["positions"] += len(batch.positions)
            counts["signal_bytes"] += num_bytes(signal)
            if waiting_bytes >= _PIECE_BYTES:
                labels.write(waiting)
                waiting, waiting_bytes = [], 0
            report(counts["rows"], {"task": number})
    finally:  # what was answered is kept, however it ends
        if waiting:
            labels.write(waiting)
        client.close()
    return counts


def all_there(output: dict[str, Any], examples: ExampleStore) -> bool:
    """Whether every row still has its label, by what `label_store` returned."""
    signal = {**output["signal"], "temperatures": tuple(output["signal"]["temperatures"])}
    labels = LabelStore(open_storage(output["root"]), output["teacher"], SignalSpec(**signal), examples)
    return not any(len(labels.missing(shard["number"])) for shard in examples.shards)


def over_common_columns(access: TeacherAccess, config: RunConfig, storage: Storage, store: str) -> TeacherAccess:
    """The same access for the columns that the student has too: labels over others would be another signal."""
    client = _client(access)
    try:
        spec, _ = signal_for(config, client.describe(), ExampleStore(storage, store, "train"))
    finally:
        client.close()
    return access.replace(signal=spec)


def introduce_teacher(access: TeacherAccess, root: str) -> TeacherDescription:
    """Stores what the teacher is beside its labels, so that they can be read without it; returns it."""
    client = _client(access)
    try:
        head = client.head() if access.signal.kind == "hidden" else None
        description = client.describe()
    finally:
        client.close()
    store_teacher(open_storage(root), description, access.signal, head)
    return description


def _batches(examples: ExampleStore, shard: int, rows: np.ndarray, rows_at_once: int) -> Iterator[MicroBatch]:
    first = examples.first_row(shard)
    for start in range(0, len(rows), rows_at_once):
        yield collate([examples.row(first + int(row)) for row in rows[start : start + rows_at_once]], step=start)


def _client(access: TeacherAccess) -> TeacherClient:
    assert access.app_name is not None
    return TeacherClient(access.app_name, access.attempt_timeout_s, access.deadline_s, access.fingerprint)
