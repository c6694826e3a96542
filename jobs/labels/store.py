"""The label store: what a teacher said about the rows of example stores, kept in object storage and read again.

    <root>/<teacher>/<signal>/_teacher.json            what the teacher is, and what it was asked for
    <root>/<teacher>/<signal>/_head-<hash>.safetensors its output head, for `hidden`
    <root>/<teacher>/<signal>/<hash>.parquet           labels of some rows

A parquet file has a row for each row of an example store, named by its shard's hash and its place there: the scored
positions and the fields of the signal (`columns`). Its key is the hash of its content, it appears whole or not at all,
and nothing is overwritten; so any number of writers may label the same rows, and of two labels of a row every reader
takes the one whose key is first. Labels belong to shards, not to stores: a store that grew keeps those it had. Readers
of parquet pass over names that begin with `_`: to them the directory is one table.
"""

import hashlib
import io
import json
import logging
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config import fingerprint
from cluster.errors import CorruptArtifact
from cluster.row_groups import ByteCache, ParquetObject
from cluster.storage import Storage
from jobs.labels.columns import columns_of, from_arrow, signal_of, to_arrow
from jobs.training.data import ExampleStore, MicroBatch, RowId
from services.teacher.signals import Signal, SignalSpec, cut, num_bytes

logger = logging.getLogger(__name__)

_GROUP_BYTES = 128 << 10
"""Of a row group: rows are read one by one, in any order."""
_ROWS_KEY = b"raystill.rows"
_FOOTERS = 64 << 20
_NONE = -1


@dataclass(frozen=True)
class Label:
    """What the teacher said about one row."""

    row: RowId
    positions: np.ndarray
    """int32 [n]: the scored tokens' places in the row."""
    signal: Signal
    """Of n positions."""


def labels_of(batch: MicroBatch, signal: Signal) -> list[Label]:
    """The signal of a micro-batch, row by row."""
    starts = np.cumsum([0, *batch.row_lengths])
    borders = np.searchsorted(batch.positions, starts)
    return [
        Label(row, batch.positions[first:last] - start, cut(signal, int(first), int(last)))
        for row, start, first, last in zip(batch.row_ids, starts[:-1], borders[:-1], borders[1:], strict=True)
    ]


def canonical(spec: SignalSpec) -> SignalSpec:
    """The spec without what its kind does not depend on: labels that agree in it are the same."""
    kept = {
        "hidden": ("kind",),
        "dense": ("kind", "vocab_size"),
        "topk": ("kind", "vocab_size", "top_k", "temperatures", "logprob_bits"),
        "sampled": ("kind", "vocab_size", "draws", "temperatures", "proposal"),
    }[spec.kind]
    plain = SignalSpec(spec.kind, 0)
    return replace(plain, **{name: getattr(spec, name) for name in kept})


class LabelStore:
    """Labels of one teacher and one signal.

    Args:
        storage: the root of all label stores.
        teacher: fingerprint.
        spec: the signal.
        examples: whose rows are looked up.
        looks: whether to look at once what is there; who only writes need not.
    """

    def __init__(
        self, storage: Storage, teacher: str, spec: SignalSpec, examples: ExampleStore, looks: bool = True
    ) -> None:
        self._storage, self._teacher, self.spec = storage, teacher, spec
        self.prefix = prefix_of(teacher, spec)
        self._names = {shard["number"]: shard["sha256"] for shard in examples.shards}
        self._numbers: dict[str, list[int]] = {}  # shards of the same content have the same labels
        for number, name in self._names.items():
            self._numbers.setdefault(name, []).append(number)
        self._places = {shard["number"]: np.full(shard["rows"], _NONE, np.int64) for shard in examples.shards}
        self._sizes: dict[str, int] = {}
        self._looked_at: set[str] = set()
        self._keys: list[str] = []
        self._objects = ByteCache[ParquetObject](_FOOTERS, lambda item: 4 * item.metadata.serialized_size)
        self._lock = threading.Lock()
        if looks:
            self.refresh()

    def __contains__(self, row: RowId) -> bool:
        return bool(self._places[row.shard][row.row] != _NONE)

    def missing(self, shard: int) -> np.ndarray:
        """Rows of a shard (by its number) that have no label."""
        return np.flatnonzero(self._places[shard] == _NONE)

    @property
    def size_bytes(self) -> int:
        return sum(self._sizes.values())

    def refresh(self) -> None:
        """Takes in what has been written since. What is no file of labels is left out, with a warning."""
        with self._lock:
            listed = self._storage.list(f"{self.prefix}/")
            for item in listed:
                if item.key.endswith(".parquet") and item.key not in self._looked_at:
                    try:
                        self._take_in(item.key, item.size_bytes)
                    except CorruptArtifact as error:  # its rows have no label
                        logger.warning("labels are left out: %s", error)
                    self._looked_at.add(item.key)

    def _take_in(self, key: str, size_bytes: int) -> None:
        file = ParquetObject(self._storage, key, size_bytes)
        try:
            runs = json.loads((file.metadata.metadata or {})[_ROWS_KEY])
        except (KeyError, ValueError) as error:
            raise CorruptArtifact(f"{self._storage.uri}/{key}: not a file of labels; remove it") from error
        self._sizes[key] = size_bytes
        self._keys.append(key)
        number, row_in_file = len(self._keys) - 1, 0
        comes_first = np.array([key < other for other in self._keys])
        for shard, first, last in runs:
            mine = (number << 32) + row_in_file + np.arange(last - first)
            for places in (self._places[other] for other in self._numbers.get(shard, [])):
                there = places[first:last]
                replaces = (there == _NONE) | comes_first[np.maximum(there, 0) >> 32]
                places[first:last] = np.where(replaces, mine, there)
            row_in_file += last - first

    def _object(self, key: str) -> ParquetObject:
        return self._objects.get(key, lambda: ParquetObject(self._storage, key, self._sizes[key]))

    def read(self, row: RowId) -> Label:
        """The label of a row that has one.

        Raises:
            KeyError: it has none.
            CorruptArtifact: the file is damaged, or is of another row.
        """
        place = int(self._places[row.shard][row.row])
        if place == _NONE:
            raise KeyError(row)
        key = self._keys[place >> 32]
        shard = self._object(key)
        group, number = shard.place(place & 0xFFFFFFFF)
        table = shard.read(group)
        cells = {name: table.column(name)[number] for name in table.column_names}
        if (cells.pop("shard").as_py(), cells.pop("row").as_py()) != (self._names[row.shard], row.row):
            raise CorruptArtifact(f"{self._storage.uri}/{key}: does not hold the label of row {row} where it says")
        columns = {name: from_arrow(cell, name) for name, cell in cells.items()}
        positions = columns.pop("positions")
        try:
            return Label(row, positions, signal_of(columns, self.spec, len(positions)))
        except (KeyError, ValueError) as error:
            raise CorruptArtifact(
                f"{self._storage.uri}/{key}: not labels of {self.spec} ({error}); remove it"
            ) from error

    def write(self, labels: Sequence[Label]) -> str:
        """Stores labels as one object; returns its key. Call `refresh` to see them."""
        labels = sorted(labels, key=lambda label: (label.row.shard, label.row.row))
        data = self._encoded(labels)
        key = f"{self.prefix}/{hashlib.sha256(data).hexdigest()[:32]}.parquet"
        self._storage.write(key, data)
        return key

    def _encoded(self, labels: Sequence[Label]) -> bytes:
        columns = [columns_of(label.signal) for label in labels]
        table = pa.table(
            {
                "shard": pa.array([self._names[label.row.shard] for label in labels]),
                "row": pa.array([label.row.row for label in labels], pa.int32()),
                "positions": to_arrow([label.positions.astype(np.int32) for label in labels]),
                **{name: to_arrow([fields[name] for fields in columns]) for name in columns[0]},
            }
        )
        rows = json.dumps(_runs([(self._names[label.row.shard], label.row.row) for label in labels]))
        facts = {"teacher": self._teacher, "signal": asdict(self.spec)}
        table = table.replace_schema_metadata({_ROWS_KEY: rows, b"raystill.labels": json.dumps(facts)})
        row_bytes = sum(num_bytes(label.signal) for label in labels) / len(labels)
        lists = [name for name in table.column_names if pa.types.is_list(table.schema.field(name).type)]
        buffer = io.BytesIO()
        pq.write_table(
            table,
            buffer,
            row_group_size=max(1, round(_GROUP_BYTES / max(row_bytes, 1))),
            compression="zstd",
            use_dictionary=["shard"],
            # High and low bytes apart: zstd then makes the ids smaller than the wire's code does.
            column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in lists}
            | {"positions.list.element": "DELTA_BINARY_PACKED"},
            write_page_checksum=True,
            write_statistics=False,
        )
        return buffer.getvalue()


def prefix_of(teacher: str, spec: SignalSpec) -> str:
    return f"{teacher}/{spec.kind}-{fingerprint(asdict(canonical(spec)))[:12]}"


def _runs(rows: list[tuple[str, int]]) -> list[tuple[str, int, int]]:
    """Neighbouring rows of a shard as (shard, first, last + 1)."""
    runs: list[tuple[str, int, int]] = []
    for shard, row in rows:
        if runs and runs[-1][0] == shard and runs[-1][2] == row:
            runs[-1] = (shard, runs[-1][1], row + 1)
        else:
            runs.append((shard, row, row + 1))
    return runs
