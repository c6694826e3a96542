"""Packing: every token once, no sequence beside itself, little computed for nothing."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.grid import pack


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=40),
    dtype=st.sampled_from([np.int32, np.int64, np.uint16]),
)
def test_pack_places_every_token_once_with_positions_that_restart(lengths, dtype):
    total = sum(lengths)
    tokens = np.arange(1, total + 1, dtype=np.int32)
    grid = pack(tokens, np.array(lengths, dtype))
    rows, columns = grid.token_ids_BT.shape
    assert columns % 64 == 0
    assert columns >= max(lengths)
    assert grid.position_ids_BT.shape == (rows, columns)
    # Every token once, in its place; all else is filling with id 0.
    assert len(set(grid.index_S.tolist())) == total
    assert np.array_equal(grid.token_ids_BT.ravel()[grid.index_S], tokens)
    filling = np.setdiff1d(np.arange(rows * columns), grid.index_S)
    assert (grid.token_ids_BT.ravel()[filling] == 0).all()
    # A sequence stays in one row, one token behind the other, and its positions count from 0.
    for piece in np.split(grid.index_S, np.cumsum(lengths)[:-1]):
        assert piece[0] // columns == piece[-1] // columns
        assert (np.diff(piece) == 1).all()
        assert np.array_equal(grid.position_ids_BT.ravel()[piece], np.arange(len(piece)))
    # Borders as transformers finds them: each sequence and each filling token is a group of its own.
    positions = grid.position_ids_BT
    groups = (np.diff(positions, prepend=positions[:, :1] - 1) != 1).cumsum(-1) + np.arange(rows)[:, None] * columns
    owners = [set(groups.ravel()[piece].tolist()) for piece in np.split(grid.index_S, np.cumsum(lengths)[:-1])]
    owners += [{group} for group in groups.ravel()[filling].tolist()]
    assert all(len(owner) == 1 for owner in owners)
    assert len(set.union(*owners)) == len(owners)
    # Never more work than rows of the least width, filled in order.
    least = -(-max(lengths) // 64) * 64
    in_order, free = 0, 0
    for length in lengths:
        in_order, free = (in_order + 1, least - length) if length > free else (in_order, free - length)
    assert rows * columns * (1 + columns / 4096) <= in_order * least * (1 + least / 4096)


def test_pack_fills_rows_that_were_cut_to_one_length_again():
    rng = np.random.default_rng(0)
    pieces = []
    for _ in range(40):
        borders = np.sort(rng.choice(np.arange(1, 256), 3, replace=False))
        pieces += np.diff([0, *borders, 256]).tolist()
    assert pack(np.zeros(40 * 256, np.int32), np.array(pieces)).token_ids_BT.shape == (40, 256)


def test_pack_leaves_little_to_fill_of_documents_in_any_order():
    rng = np.random.default_rng(1)
    waste = []
    for _ in range(20):
        lengths = np.clip(rng.lognormal(4.5, 0.8, 60).astype(int), 1, 1000)
        waste.append(pack(np.zeros(lengths.sum(), np.int32), lengths).token_ids_BT.size / lengths.sum())
    assert np.mean(waste) < 1.05
