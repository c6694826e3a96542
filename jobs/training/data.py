"""The example store as the trainer reads it: rows, their order, and micro-batches.

The order of an epoch is a pure function of (seed, epoch, number of rows). Which worker trains a row, and in which
micro-batch, is decided afterwards, so the rows of optimiser step s are the same for any number of workers and for any
micro-batch. The cursor is the number of rows consumed; it is all that a resumed run needs.

Axes: S tokens of a micro-batch in flat order, N scored positions.
"""

import hashlib
import io
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from cluster.errors import CorpusError, CorruptArtifact
from cluster.published import read_manifest
from cluster.storage import Storage

_CACHE_BYTES = 1 << 30


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
        num_bytes: UTF-8 bytes that the targets stand for.
    """

    step: int
    last: bool
    token_ids: np.ndarray
    sequence_lengths: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    row_ids: tuple[RowId, ...]
    num_bytes: int


class ExampleStore:
    """One split of a prepared corpus. Shards are decoded when first needed and kept up to a bound.

    Raises:
        CorpusError: there is no finished store at the prefix.
    """

    def __init__(self, storage: Storage, prefix: str, split: str) -> None:
        manifest = read_manifest(storage, prefix)
        if manifest is None:
            raise CorpusError(f"no example store at {storage.uri}/{prefix}: run prepare first")
        self._storage, self._prefix = storage, prefix
        self.manifest: dict[str, Any] = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self._shards = [shard for shard in manifest["shards"] if shard["split"] == split]
        self._starts = np.cumsum([0, *(shard["rows"] for shard in self._shards)])
        self._cache: OrderedDict[int, list[Row]] = OrderedDict()
        self._cached_bytes = 0

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, index: int) -> Row:
        """The row at a position of the store's own order."""
        place = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._shard(place)[index - int(self._starts[place])]

    def _shard(self, place: int) -> list[Row]:
        if place in self._cache:
            self._cache.move_to_end(place)
            return self._cache[place]
        rows = self._load(place)
        self._cache[place] = rows
        self._cached_bytes += self._shards[place]["size_bytes"] * 8
        while self._cached_bytes > _CACHE_BYTES and len(self._cache) > 1:
            evicted, _ = self._cache.popitem(last=False)
            self._cached_bytes -= self._shards[evicted]["size_bytes"] * 8
        return rows

    def _load(self, place: int) -> list[Row]:
        shard = self._shards[place]
        key = f"{self._prefix}/{shard['key']}"
        data = self._storage.read(key)
        found = hashlib.sha256(data).hexdigest()
        if found != shard["sha256"]:
            raise CorruptArtifact(
                f"{self._storage.uri}/{key}: sha256 is not the manifest's; delete the store, prepare again"
            )
        table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
        columns = [table.column(name).combine_chunks() for name in ("token_ids", "segment_lengths", "loss_mask")]
        tokens, segments, masks = [_split_list(column) for column in columns]
        counts = table.column("num_bytes").to_pylist()
        return [
            Row(RowId(shard["number"], row), tokens[row], segments[row], masks[row], counts[row])
            for row in range(len(table))
        ]


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
        """A worker's share of the given steps: every `world_size`-th row, `micro_batch` rows at a time."""
        for step in steps:
            mine = self.indices(step)[rank::world_size]
            starts = range(0, len(mine), micro_batch)
            for start in starts:
                rows = [self._store.row(index) for index in mine[start : start + micro_batch]]
                yield collate(rows, step, last=start == starts[-1])

    def row_ids(self, step: int) -> list[RowId]:
        return [self._store.row(index).id for index in self.indices(step)]


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
        num_bytes=sum(row.num_bytes for row in rows),
    )


def rows_checksum(row_ids: tuple[RowId, ...]) -> int:
    """A checksum of a set of rows that does not depend on their order and adds up: the sum of 32-bit hashes."""
    return sum(int.from_bytes(hashlib.blake2b(str(item).encode(), digest_size=4).digest()) for item in row_ids)
