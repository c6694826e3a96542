"""Sequences of any length as rows of equal width, for models without variable-length kernels.

Several sequences share a row; `hidden_states` keeps them apart. What is filled up is computed for nothing, so the width
and the placing are chosen to leave little: sequences that were cut from full rows fill those rows again, and others
are placed largest first.

Axes: B rows, T positions in a row, S tokens in flat order.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

_STEP = 64
"""Widths are multiples of it, to keep the number of shapes small."""
_WIDTHS = 6
_ATTENTION = 4096
"""The width at which attention, quadratic in it, takes about as long as all the rest of a small model."""


@dataclass(frozen=True)
class Grid:
    """Token ids and positions [B, T]. Positions restart at 0 with each sequence; a filling token has id 0 and is a
    sequence of its own, so that no other sees it."""

    token_ids_BT: np.ndarray
    position_ids_BT: np.ndarray
    index_S: np.ndarray
    """Where each token of the flat order lies in the flattened grid."""


def pack(token_ids_S: np.ndarray, sequence_lengths: np.ndarray) -> Grid:
    """Packs sequences into the grid that is least work.

    Args:
        token_ids_S: all sequences one behind the other.
        sequence_lengths: their lengths, each at least 1, which add up to S.
    """
    lengths = sequence_lengths.astype(np.int64)
    width, starts = _least_work(lengths)
    firsts = np.cumsum(lengths) - lengths
    index_S = np.repeat(starts - firsts, lengths) + np.arange(len(token_ids_S))
    size = (int(starts.max()) // width + 1) * width
    token_ids, position_ids = np.zeros(size, np.int64), np.zeros(size, np.int64)
    token_ids[index_S] = token_ids_S
    position_ids[index_S] = np.arange(len(token_ids_S)) - np.repeat(firsts, lengths)
    return Grid(token_ids.reshape(-1, width), position_ids.reshape(-1, width), index_S)


def _least_work(lengths: np.ndarray) -> tuple[int, np.ndarray]:
    """A width, and where in the flattened grid each sequence starts."""
    narrowest = -(-int(lengths.max()) // _STEP) * _STEP
    best, least = None, float("inf")
    for width in range(narrowest, narrowest + _WIDTHS * _STEP, _STEP):
        for place in (_in_order, _largest_first):
            starts = place(lengths.tolist(), width)
            tokens = (max(starts) // width + 1) * width
            work = tokens * (1 + width / _ATTENTION)
            if work < least:
                best, least = (width, np.asarray(starts)), work
            if tokens == lengths.sum():  # full; wider rows can only cost more
                return width, np.asarray(starts)
    assert best is not None
    return best


def _in_order(lengths: list[int], width: int) -> list[int]:
    """Next-fit: a row is left when the next sequence does not fit."""
    starts, row, column = [], 0, 0
    for length in lengths:
        if column + length > width:
            row, column = row + 1, 0
        starts.append(row * width + column)
        column += length
    return starts


def _largest_first(lengths: list[int], width: int) -> list[int]:
    """Best-fit decreasing: each sequence where the least space remains, by falling length."""
    starts, rows = [0] * len(lengths), 0
    spaces: list[tuple[int, int]] = []  # free tokens of a row, and the row; in rising order
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        place = bisect_left(spaces, (lengths[number], 0))
        if place == len(spaces):
            free, row, rows = width, rows, rows + 1
        else:
            free, row = spaces.pop(place)
        starts[number] = row * width + width - free
        insort(spaces, (free - lengths[number], row))
    return starts
