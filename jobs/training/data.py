"""The example store as the trainer reads it: rows, their order, and micro-batches.

The order of an epoch is a pure function of (seed, epoch, number of rows). Which worker trains a row, and in which
micro-batch, is decided afterwards, so the rows of optimiser step s are the same for any number of workers and for any
micro-batch. The cursor is the number of rows consumed; it is all that a resumed run needs.

Axes: S tokens of a micro-batch in flat order, N scored positions.
"""

import hashlib
import io
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import CorpusError, CorruptArtifact
from cluster.published import read_manifest
from cluster.row_groups import ByteCache, ParquetObject
from cluster.storage import Storage

_DECODED = 8
"""Times that a decoded shard is larger than its object, at most."""
_FOOTERS = 128 << 20
_READERS = 16
"""Threads that read rows ahead: of a store in the network each waits most of the time."""
_ROWS_AHEAD = 128


@dataclass(frozen=True)
class RowId:
    """Stable name of a row: its shard and its place there."""

    shard: int
    row: int

    def __str__(self) -> str:
        return f"{self.shard}:{self.row}"


@dataclass(frozen=True)
class Row:
    """Tokens of a row, the lengths of the documents' pieces in it, and which tokens count when they are predicted."""

    id: RowId
    token_ids: np.ndarray
    segment_lengths: np.ndarray
    loss_mask: np.ndarray
    num_bytes: int
    """UTF-8 bytes of the text that the row's targets stand for."""

    @property
    def nbytes(self) -> int:
        return self.token_ids.nbytes + self.segment_lengths.nbytes + self.loss_mask.nbytes + 256


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through a model together.

    Args:
        step: the optimiser step they belong to.
        last: whether this is the worker's last micro-batch of that step.
        token_ids: int32 [S], all pieces one behind the other.
        sequence_lengths: int32, lengths of the pieces.
        positions: int32 [N], indices into `token_ids` whose successor is a target.
        targets: int64 [N], those successors.
        row_ids: the rows.
        row_lengths: int32, tokens of each row; they add up to S.
        num_bytes: UTF-8 bytes that the targets stand for.
    """

    step: int
    last: bool
    token_ids: np.ndarray
    sequence_lengths: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    row_ids: tuple[RowId, ...]
    row_lengths: np.ndarray
    num_bytes: int


class ExampleStore:
    """One split of a prepared corpus.

    A store that fits into the cache is read shard by shard, each checked against its hash; of a larger one only the row
    groups that are wanted, each checked by its pages' checksums. Threads may share a store.

    Raises:
        CorpusError: there is no finished store at the prefix.
    """

    def __init__(self, storage: Storage, prefix: str, split: str, cache_bytes: int = 512 << 20) -> None:
        manifest = read_manifest(storage, prefix)
        if manifest is None:
            raise CorpusError(f"no example store at {storage.uri}/{prefix}: run prepare first")
        self._storage, self._prefix = storage, prefix
        self.manifest: dict[str, Any] = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.shards: list[dict[str, Any]] = [shard for shard in manifest["shards"] if shard["split"] == split]
        self._starts = np.cumsum([0, *(shard["rows"] for shard in self.shards)])
        self._fits = sum(shard["size_bytes"] for shard in self.shards) * _DECODED <= cache_bytes
        self._rows = ByteCache[list[Row]](cache_bytes, lambda rows: sum(row.nbytes for row in rows))
        self._objects = ByteCache[ParquetObject](_FOOTERS, lambda item: 4 * item.metadata.serialized_size)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def first_row(self, shard: int) -> int:
        """The position of the first row of a shard, given by its number."""
        numbers = [item["number"] for item in self.shards]
        return int(self._starts[numbers.index(shard)])

    def row_id(self, index: int) -> RowId:
        """The name of the row at a position, without reading it."""
        place, number = self._place(index)
        return RowId(self.shards[place]["number"], number)

    def _place(self, index: int) -> tuple[int, int]:
        """The shard (its place in `shards`) that holds a row, and the row's number in it."""
        place = int(np.searchsorted(self._starts, index, side="right")) - 1
        return place, index - int(self._starts[place])

    def row(self, index: int) -> Row:
        """The row at a position of the store's own order."""
        place, number = self._place(index)
        if self._fits:
            return self._rows.get(place, lambda: self._shard(place))[number]
        shard = self._objects.get(place, lambda: self._open(place))
        group, number_in_group = shard.place(number)
        first = number - number_in_group
        load = lambda: _rows(shard.read(group), self.shards[place]["number"], first)  # noqa: E731
        return self._rows.get((place, group), load)[number_in_group]

    def _key(self, place: int) -> str:
        return f"{self._prefix}/{self.shards[place]['key']}"

    def _open(self, place: int) -> ParquetObject:
        return ParquetObject(self._storage, self._key(place), self.shards[place]["size_bytes"])

    def _shard(self, place: int) -> list[Row]:
        shard = self.shards[place]
        data = self._storage.read(self._key(place))
        if hashlib.sha256(data).hexdigest() != shard["sha256"]:
            raise CorruptArtifact(
                f"{self._storage.uri}/{self._key(place)}: sha256 is not the manifest's; delete the store, prepare again"
            )
        return _rows(pq.read_table(io.BytesIO(data), page_checksum_verification=True), shard["number"], 0)


def _rows(table: pa.Table, shard: int, first: int) -> list[Row]:
    columns = [table.column(name).combine_chunks() for name in ("token_ids", "segment_lengths", "loss_mask")]
    tokens, segments, masks = [_split_list(column) for column in columns]
    counts = table.column("num_bytes").to_pylist()
    return [Row(RowId(shard, first + n), tokens[n], segments[n], masks[n], counts[n]) for n in range(len(table))]


def _split_list(column: Any) -> list[np.ndarray]:
    values = column.values.to_numpy(zero_copy_only=False)
    offsets = column.offsets.to_numpy()
    return [values[start:stop] for start, stop in pairwise(offsets)]


def epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """The order in which an epoch visits rows 0..num_rows-1: int64, a function of its arguments alone."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_rows)


class GlobalBatches:
    """The rows of every optimiser step, for any number of workers.

    Args:
        store: training rows.
        global_batch: rows per step. A batch may span the border of two epochs.
        seed: of the order.
    """

    def __init__(self, store: ExampleStore, global_batch: int, seed: int) -> None:
        self._store, self._global_batch, self._seed = store, global_batch, seed
        self._orders: dict[int, np.ndarray] = {}
        self._waited_s = 0.0

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return len(self._store)

    def take_waited_s(self) -> float:
        """Time that `micro_batches` has waited for the store since the last call."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def indices(self, step: int) -> list[int]:
        """Row indices of a step, in order."""
        first = step * self._global_batch
        return [self._index(position) for position in range(first, first + self._global_batch)]

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self._store))
        if epoch not in self._orders:
            self._orders = {old: order for old, order in self._orders.items() if old == epoch - 1}
            self._orders[epoch] = epoch_order(self._seed, epoch, len(self._store))
        return int(self._orders[epoch][offset])

    def micro_batches(self, steps: range, rank: int, world_size: int, micro_batch: int) -> Iterator[MicroBatch]:
        """A worker's share of the given steps: every `world_size`-th row, `micro_batch` rows at a time. Rows are read
        some micro-batches ahead."""
        ahead = 1 + -(-_ROWS_AHEAD // micro_batch)
        with ThreadPoolExecutor(_READERS, thread_name_prefix="rows") as pool:
            waiting: deque[tuple[int, bool, list[Future[Row]]]] = deque()
            try:
                for step, last, mine in self._shares(steps, rank, world_size, micro_batch):
                    waiting.append((step, last, [pool.submit(self._store.row, index) for index in mine]))
                    if len(waiting) > ahead:
                        yield self._collated(*waiting.popleft())
                while waiting:
                    yield self._collated(*waiting.popleft())
            finally:
                for _, _, rows in waiting:
                    for row in rows:
                        row.cancel()

    def _shares(
        self, steps: range, rank: int, world_size: int, micro_batch: int
    ) -> Iterator[tuple[int, bool, list[int]]]:
        for step in steps:
            mine = self.indices(step)[rank::world_size]
            starts = range(0, len(mine), micro_batch)
            for start in starts:
                yield step, start == starts[-1], mine[start : start + micro_batch]

    def _collated(self, step: int, last: bool, rows: list[Future[Row]]) -> MicroBatch:
        started = time.perf_counter()
        read = [row.result() for row in rows]
        self._waited_s += time.perf_counter() - started
        return collate(read, step, last)

    def row_ids(self, step: int) -> list[RowId]:
        return [self._store.row_id(index) for index in self.indices(step)]


def collate(rows: list[Row], step: int = 0, last: bool = True) -> MicroBatch:
    """Joins rows into flat arrays and finds the scored positions.

    Position t is scored if t + 1 is in the same piece and counts; the mask is shifted with the prediction.
    """
    token_ids = np.concatenate([row.token_ids for row in rows]).astype(np.int32, copy=False)
    lengths = np.concatenate([row.segment_lengths for row in rows]).astype(np.int32, copy=False)
    counts = np.concatenate([row.loss_mask for row in rows]).astype(bool)
    starts_piece = np.zeros(len(token_ids), bool)
    starts_piece[np.cumsum(lengths) - lengths] = True
    is_target = counts & ~starts_piece
    target_index = np.flatnonzero(is_target)
    return MicroBatch(
        step=step,
        last=last,
        token_ids=token_ids,
        sequence_lengths=lengths,
        positions=(target_index - 1).astype(np.int32),
        targets=token_ids[target_index].astype(np.int64),
        row_ids=tuple(row.id for row in rows),
        row_lengths=np.array([len(row.token_ids) for row in rows], np.int32),
        num_bytes=sum(row.num_bytes for row in rows),
    )


def rows_checksum(row_ids: tuple[RowId, ...]) -> int:
    """A checksum of a set of rows that does not depend on their order and adds up: the sum of 32-bit hashes."""
    return sum(int.from_bytes(hashlib.blake2b(str(item).encode(), digest_size=4).digest()) for item in row_ids)
