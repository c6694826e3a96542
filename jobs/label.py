"""Labelling: what the teacher says about a whole example store, written ahead of training.

A Ray task for each shard reads its rows, asks the teacher service and stores the answers. Rows that have a label are
not asked again, so a job that was stopped goes on, also in the middle of a shard; two jobs at once only repeat each
other's work.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cluster.storage import Storage, open_storage
from jobs.labels.estimate import cost, cost_line
from jobs.labels.store import Label, LabelStore, labels_of
from jobs.labels.teacher import store_teacher
from jobs.progress import Bar
from jobs.tasks import run_tasks
from jobs.training.data import ExampleStore, MicroBatch, collate
from jobs.training.plan import TeacherAccess
from jobs.training.prefetch import Prefetch
from services.teacher.client import TeacherClient
from services.teacher.signals import num_bytes

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
        Counts: `rows`, `labelled` (of them by this call), `positions`, `bytes` and `objects` of all labels.
    """
    examples = ExampleStore(storage, store, "train")
    labels = _open(access, root, examples)
    client = _client(access)
    head = client.head() if access.signal.kind == "hidden" else None
    description = client.describe()
    store_teacher(open_storage(root), description, access.signal, head)
    client.close()
    wanting = [shard for shard in examples.shards if len(labels.missing(shard["number"]))]
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
        (number, access, root, storage.uri, store, shard["number"], rows_at_once)
        for number, shard in enumerate(wanting)
    ]
    written = run_tasks(label_shard, calls, tasks_at_once, 1, follow)
    labels.refresh()
    return {
        "root": root,
        "prefix": labels.prefix,
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
    rows_at_once: int,
    report: Report,
) -> dict[str, int]:
    """Labels the rows of one shard that have none; a Ray task. Labels are kept every `_PIECE_BYTES`."""
    examples = ExampleStore(open_storage(storage_uri), store, "train")
    labels = _open(access, root, examples)
    client = _client(access)
    size = access.signal.bytes_per_position(client.describe().hidden_size)
    asked = Prefetch(client, access.signal, size, access.window_bytes, f"label{shard}")
    counts = {"rows": 0, "positions": 0, "signal_bytes": 0}
    waiting: list[Label] = []
    waiting_bytes = 0
    try:
        for batch, signal in asked.pairs(_batches(examples, shard, labels.missing(shard), rows_at_once)):
            waiting += labels_of(batch, signal)
            waiting_bytes += num_bytes(signal)
            counts["rows"] += len(batch.row_ids)
            counts["positions"] += len(batch.positions)
            counts["signal_bytes"] += num_bytes(signal)
            if waiting_bytes >= _PIECE_BYTES:
                labels.write(waiting)
                waiting, waiting_bytes = [], 0
            report(counts["rows"], {"task": number})
        if waiting:
            labels.write(waiting)
    finally:
        client.close()
    return counts


def _batches(examples: ExampleStore, shard: int, rows: np.ndarray, rows_at_once: int) -> Iterator[MicroBatch]:
    first = examples.first_row(shard)
    for start in range(0, len(rows), rows_at_once):
        yield collate([examples.row(first + int(row)) for row in rows[start : start + rows_at_once]], step=start)


def _open(access: TeacherAccess, root: str, examples: ExampleStore) -> LabelStore:
    return LabelStore(open_storage(root), access.fingerprint, access.signal, examples)


def _client(access: TeacherAccess) -> TeacherClient:
    assert access.app_name is not None
    return TeacherClient(access.app_name, access.attempt_timeout_s, access.deadline_s, access.fingerprint)
