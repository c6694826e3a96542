"""From tokens to rows of a fixed length, and from rows to parquet shards.

Packed rows hold several documents; the lengths of the pieces are stored with them, and no model lets one see another. A
document that does not fit goes on in the next row, which repeats one token so that every token but the first is
predicted once. Without packing a row is one document, cut at the row's length. A row in which nothing is learnt is left
out.

A shard is written a row group at a time, so what is held in memory is a row group and the compressed shard. Its key is
made of its hash, and so is its number: the name of a row changes only with the shard's content.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.config import DataConfig
from jobs.preparing.encoding import Example

ROW_GROUP = 64
"""Rows that are read together."""
SCHEMA = pa.schema(
    [
        ("token_ids", pa.list_(pa.int32())),
        ("segment_lengths", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.int8())),
        ("num_bytes", pa.int64()),
    ]
)
_SHORTEST_PIECE = 16
"""A document is not begun in the last few tokens of a row: a piece so short teaches little."""


class RowWriter:
    """Lays the documents of one object and one split into rows, and rows into shards.

    Args:
        write: stores a shard under a key.
    """

    def __init__(self, split: str, config: DataConfig, write: Callable[[str, bytes], None]) -> None:
        self._split, self._config, self._write = split, config, write
        self.counts: Counter[str] = Counter()
        """rows, tokens, bytes; documents that were cut; rows without_target that were left out."""
        self.shards: list[dict[str, Any]] = []
        self._row = _Row()
        self._waiting: list[_Row] = []
        self._file: _Shard | None = None

    def add(self, example: Example) -> None:
        """One document."""
        if not self._config.packing:
            length = self._config.sequence_length
            self.counts["cut"] += len(example.token_ids) > length
            self._row.add(example, 0, min(length, len(example.token_ids)))
            self._finish_row()
            return
        length, position, total = self._config.sequence_length, 0, len(example.token_ids)
        while position < total - 1:
            room = length - self._row.num_tokens
            if room < min(_SHORTEST_PIECE, length, total - position):
                self._finish_row()
                room = length
            stop = min(position + room, total)
            self._row.add(example, position, stop)
            # The last token of a cut piece begins the next one: as context there, as a target here.
            position = stop - 1
            if self._row.num_tokens >= length:
                self._finish_row()

    def close(self) -> None:
        self._finish_row()
        self._finish_group()
        self._finish_shard()

    def _finish_row(self) -> None:
        row, self._row = self._row, _Row()
        if not row.pieces:
            return
        if not row.num_targets:
            self.counts["without_target"] += 1
            return
        self._waiting.append(row)
        self.counts.update(rows=1, tokens=row.num_tokens, bytes=row.num_bytes)
        in_shard = len(self._waiting) + (self._file.rows if self._file else 0)
        if len(self._waiting) == ROW_GROUP or in_shard == self._config.rows_per_shard:
            self._finish_group()
        if in_shard == self._config.rows_per_shard:
            self._finish_shard()

    def _finish_group(self) -> None:
        if self._waiting:
            self._file = self._file or _Shard()
            self._file.add(self._waiting)
            self._waiting = []

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        data, rows = self._file.close(), self._file.rows
        self._file = None
        digest = hashlib.sha256(data).hexdigest()
        key = f"{self._split}-{digest[:32]}.parquet"
        self._write(key, data)
        self.shards.append(
            {
                "key": key,
                "number": int(digest[:13], 16),  # 52 bits: exact in every reader of JSON
                "split": self._split,
                "rows": rows,
                "size_bytes": len(data),
                "sha256": digest,
            }
        )


class _Row:
    """A row in the making."""

    __slots__ = ("lengths", "masks", "num_bytes", "num_targets", "num_tokens", "pieces")

    def __init__(self) -> None:
        self.pieces: list[np.ndarray] = []
        self.masks: list[np.ndarray | None] = []
        self.lengths: list[int] = []
        self.num_tokens = self.num_targets = self.num_bytes = 0

    def add(self, example: Example, start: int, stop: int) -> None:
        """The first token of a piece is context, and no target."""
        self.pieces.append(example.token_ids[start:stop])
        self.lengths.append(stop - start)
        self.num_tokens += stop - start
        mask = None if example.loss_mask is None else example.loss_mask[start:stop]
        self.masks.append(mask)
        self.num_targets += stop - start - 1 if mask is None else int(np.count_nonzero(mask[1:]))
        self.num_bytes += int(example.byte_ends[stop - 1] - example.byte_ends[start])


class _Shard:
    """A parquet file in memory, to which row groups are added."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._writer = pq.ParquetWriter(
            self._buffer,
            SCHEMA,
            compression="zstd",
            use_dictionary=["loss_mask.list.element"],  # token ids are a sixth larger with one
            write_page_checksum=True,
            write_statistics=False,
        )
        self.rows = 0

    def add(self, rows: list[_Row]) -> None:
        ends = np.cumsum([0, *(row.num_tokens for row in rows)], dtype=np.int32)
        pieces = [piece for row in rows for piece in row.pieces]
        mask = np.ones(ends[-1], np.int8)
        position = 0
        for row in rows:
            for part, length in zip(row.masks, row.lengths, strict=True):
                if part is not None:
                    mask[position : position + length] = part
                position += length
        lengths = np.array([length for row in rows for length in row.lengths], np.int32)
        segment_ends = np.cumsum([0, *(len(row.lengths) for row in rows)], dtype=np.int32)
        columns = [
            pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(pieces))),
            pa.ListArray.from_arrays(pa.array(segment_ends), pa.array(lengths)),
            pa.ListArray.from_arrays(pa.array(ends), pa.array(mask)),
            pa.array([row.num_bytes for row in rows], pa.int64()),
        ]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), row_group_size=ROW_GROUP)
        self.rows += len(rows)

    def close(self) -> bytes:
        self._writer.close()
        return self._buffer.getvalue()
