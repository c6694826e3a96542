"""ONNX graphs: with inputs and outputs for keys and values, several sequences at once; without, the whole text again.

Each sequence has a row of its own in the arrays of keys and values [R, H, L, D], from the first column on, and the
graph writes new ones behind the old in place. Sequences that each read one token share a run, of whatever lengths they
are: for that they stand in the first rows, and one that stands elsewhere changes places. A row has room for the longest
sequence there may be, but memory only for the columns that were written: what a long one had goes back to the system.

A graph without a cache reads each whole sequence anew for every token, which suits short answers only.

Axes: B sequences of a run, R rows, H heads of keys and values, L columns, D width of a head, T new tokens, S tokens of
a row with the new ones, V vocabulary.
"""

import logging
import mmap
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.errors import ModelError
from cluster.onnx_graph import CachedGraph
from services.endpoint.engines.base import Place, Read, TokenBudget

_ROWS = 16
"""Of the first arrays; each time that they do not suffice there are twice as many."""
_KEPT_COLUMNS = 1024
"""A row that was shorter keeps its memory for the next sequence."""
_FLOAT_BYTES = 4
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
"""Most of what is mapped is never written, so it need not be there; Python names the flag from 3.13 on."""

logger = logging.getLogger(__name__)


class _OnnxEngine:
    """What both kinds of graphs share: places are counted in tokens."""

    def __init__(self, max_cached_tokens: int) -> None:
        self._budget = TokenBudget(max_cached_tokens)
        self.max_cached_tokens = max_cached_tokens

    def reserve(self, num_tokens: int) -> Place | None:
        return Place(num_tokens) if self._budget.take(num_tokens) else None

    def release(self, place: Place) -> None:
        self._budget.give_back(place.capacity)
        place.state = None


class WholeTextEngine(_OnnxEngine):
    """An engine around a graph without a cache: the state of a place is its token ids."""

    def __init__(self, session: Any, max_cached_tokens: int) -> None:
        super().__init__(max_cached_tokens)
        self._session = session
        self._inputs = {item.name for item in session.get_inputs()}

    def fork(self, place: Place, source: Place, num_tokens: int) -> bool:
        place.state, place.length = source.state[:num_tokens], num_tokens
        return True

    def forward(self, reads: list[Read]) -> Tensor:
        rows = []
        for read in reads:
            token_ids = read.place.state = (read.place.state or []) + read.token_ids
            read.place.length = len(token_ids)
            feed = {
                "input_ids": np.asarray([token_ids], np.int64),
                "position_ids": np.arange(len(token_ids), dtype=np.int64)[None],
                "attention_mask": np.ones((1, len(token_ids)), np.int64),
            }
            feed = {name: value for name, value in feed.items() if name in self._inputs}
            logits_TV = torch.from_numpy(self._session.run(["logits"], feed)[0][0]).float()
            rows.append(logits_TV[-len(read.token_ids) :] if read.all_logits else logits_TV[-1:])
        return torch.cat(rows)


class CachedEngine(_OnnxEngine):
    """An engine around a graph with a cache: the state of a place is its row.

    Raises:
        ModelError: the graph does not keep its keys and values in place.
    """

    def __init__(self, session: Any, max_cached_tokens: int) -> None:
        super().__init__(max_cached_tokens)
        self._graph = CachedGraph(session)
        self._places: list[Place | None] = [None] * _ROWS
        self._caches = self._new_caches(_ROWS)

    def reserve(self, num_tokens: int) -> Place | None:
        place = super().reserve(num_tokens)
        if place is not None:
            if None not in self._places and not self._grow():
                super().release(place)
                return None
            place.state = self._places.index(None)
            self._places[place.state] = place
        return place

    def release(self, place: Place) -> None:
        if place.length > _KEPT_COLUMNS:
            for cache in self._caches:
                cache.forget(place.state)
        self._places[place.state] = None
        super().release(place)

    def fork(self, place: Place, source: Place, num_tokens: int) -> bool:
        for cache in self._caches:
            cache.rows[place.state, :, :num_tokens] = cache.rows[source.state, :, :num_tokens]
        place.length = num_tokens
        return True

    def forward(self, reads: list[Read]) -> Tensor:
        counts = [len(read.token_ids) if read.all_logits else 1 for read in reads]
        logits_NV = np.empty((sum(counts), self._graph.vocab_size), np.float32)
        shared = [number for number, read in enumerate(reads) if len(read.token_ids) == 1]
        self._move_to_front([reads[number].place for number in shared])
        shared.sort(key=lambda number: reads[number].place.state)
        ends = np.cumsum(counts)
        for number, read in enumerate(reads):
            if len(read.token_ids) > 1:
                self._read_alone(read, logits_NV[ends[number] - counts[number] : ends[number]])
        if shared:
            into = ends[shared] - 1
            if (np.diff(into) == 1).all():
                self._read_together([reads[number] for number in shared], logits_NV[into[0] : into[-1] + 1])
            else:
                found = np.empty((len(shared), self._graph.vocab_size), np.float32)
                self._read_together([reads[number] for number in shared], found)
                logits_NV[into] = found
        return torch.from_numpy(logits_NV)

    def _read_alone(self, read: Read, out_NV: np.ndarray) -> None:
        place, new = read.place, len(read.token_ids)
        total = place.length + new
        self._check_room(place, total)
        self._graph.run(
            np.array([read.token_ids], np.int64),
            np.arange(place.length, total, dtype=np.int64)[None],
            np.ones((1, total), np.int64),
            [cache.rows[place.state : place.state + 1] for cache in self._caches],
            logits_from=new - len(out_NV),
            out=out_NV[None],
        )
        place.length = total

    def _read_together(self, reads: list[Read], out_BV: np.ndarray) -> None:
        """Reads of one token each, by the places in the first rows, in their order."""
        for read in reads:
            self._check_room(read.place, read.place.length + 1)
        lengths_B = np.array([read.place.length for read in reads])
        self._graph.run(
            np.array([read.token_ids for read in reads], np.int64),
            lengths_B[:, None],
            (np.arange(lengths_B.max() + 1) <= lengths_B[:, None]).astype(np.int64),
            [cache.rows[: len(reads)] for cache in self._caches],
            out=out_BV[:, None],
        )
        for read in reads:
            read.place.length += 1

    def _check_room(self, place: Place, num_tokens: int) -> None:
        if num_tokens > place.capacity:
            raise ValueError(f"a sequence of {num_tokens} tokens in a place for {place.capacity}")

    # --- rows ---

    def _move_to_front(self, places: list[Place]) -> None:
        """Lets so many places have the first rows, in any order."""
        outside = [place for place in places if place.state >= len(places)]
        wrong = [row for row in range(len(places)) if self._places[row] not in places] if outside else []
        for place, row in zip(outside, wrong, strict=True):
            other, old = self._places[row], place.state
            for cache in self._caches:
                cache.exchange(old, place.length, row, other.length if other is not None else 0)
            place.state, self._places[row], self._places[old] = row, place, other
            if other is not None:
                other.state = old

    def _new_caches(self, rows: int) -> list["_Cache"]:
        shape = (rows, self._graph.heads, self.max_cached_tokens, self._graph.width)
        return [_Cache(*shape) for _ in range(self._graph.num_caches)]

    def _grow(self) -> bool:
        """Makes room for twice as many sequences; False if the system has no address space for them."""
        old, rows = self._caches, len(self._places)
        try:
            self._caches = self._new_caches(2 * rows)
        except ModelError as error:
            logger.warning("%s: no more than %d sequences at once", error, rows)
            return False
        for source, cache in zip(old, self._caches, strict=True):
            for place in filter(None, self._places):
                cache.rows[place.state, :, : place.length] = source.rows[place.state, :, : place.length]
        self._places += [None] * rows
        return True


class _Cache:
    """The keys, or the values, of a layer: float32 [R, H, L, D], in memory that the system gives as it is written."""

    def __init__(self, rows: int, heads: int, columns: int, width: int) -> None:
        # Rows end where pages do.
        unit = mmap.PAGESIZE // _FLOAT_BYTES
        columns = -(-columns // unit) * unit
        self._row_bytes = heads * columns * width * _FLOAT_BYTES
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            self._memory = mmap.mmap(-1, rows * self._row_bytes, flags=flags)
        except OSError as error:
            raise ModelError(
                f"keys and values of {rows} sequences of up to {columns:,} tokens have no room ({error.strerror}): "
                "lower max_cached_tokens"
            ) from error
        self.rows = np.frombuffer(self._memory, np.float32).reshape(rows, heads, columns, width)

    def forget(self, row: int) -> None:
        """Gives a row's memory back."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED, row * self._row_bytes, self._row_bytes)

    def exchange(self, row: int, length: int, other: int, other_length: int) -> None:
        """Lets two rows change places, of which so many columns are in use. What a long one had goes back."""
        lengths = {row: length, other: other_length}
        kept = {number: self.rows[number, :, :columns].copy() for number, columns in lengths.items()}
        for number, columns in lengths.items():
            if columns > _KEPT_COLUMNS:
                self.forget(number)
        self.rows[row, :, :other_length] = kept[other]
        self.rows[other, :, :length] = kept[row]
