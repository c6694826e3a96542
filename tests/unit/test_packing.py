"""Packed ids: every set of ids comes back, in no more bytes than promised, and damage is noticed."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.teacher.packing import pack_ids, packed_width, unpack_ids


def sorted_ids(seed: int, rows: int, count: int, vocab_size: int, repeats: bool) -> np.ndarray:
    rng = np.random.default_rng(seed)
    draws = [rng.choice(vocab_size, count, replace=repeats) for _ in range(rows)]
    return np.sort(np.array(draws, np.int32).reshape(rows, count), axis=1)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 5), st.integers(1, 70), st.integers(1, 300_000), st.booleans())
def test_ids_come_back(seed, rows, count, vocab_size, repeats):
    ids_NK = sorted_ids(seed, rows, min(count, vocab_size), vocab_size, repeats)
    count = ids_NK.shape[1]
    packed_NW = pack_ids(ids_NK, vocab_size)
    assert (packed_NW.dtype, packed_NW.shape) == (np.uint8, (rows, packed_width(count, vocab_size)))
    found = unpack_ids(packed_NW, count, vocab_size)
    assert found.dtype == np.int32
    assert np.array_equal(found, ids_NK)


@pytest.mark.parametrize("vocab_size", [1, 2, 63, 64, 65, 2048, 65_535, 65_536, 65_537, 262_144, 1 << 20])
@pytest.mark.parametrize("count", [1, 32, 64])
def test_first_last_and_all_columns_come_back(vocab_size, count):
    for ids in (np.zeros(count), np.full(count, vocab_size - 1), np.linspace(0, vocab_size - 1, count)):
        ids_NK = np.sort(ids.astype(np.int32))[None]
        assert np.array_equal(unpack_ids(pack_ids(ids_NK, vocab_size), count, vocab_size), ids_NK)


@pytest.mark.parametrize("vocab_size", [32_000, 49_152, 65_537, 151_936, 262_144])
def test_width_is_near_the_least_possible(vocab_size):
    least_bits = (math.lgamma(vocab_size + 1) - math.lgamma(65) - math.lgamma(vocab_size - 63)) / math.log(2)
    assert packed_width(64, vocab_size) <= least_bits / 8 * 1.08 + 2
    assert packed_width(64, vocab_size) < 64 * 18 / 8


@pytest.mark.parametrize("ids", [[[2, 1]], [[-1, 2]], [[3, 10]]])
def test_ids_that_fall_or_lie_outside_are_refused(ids):
    with pytest.raises(ValueError, match=r"must not fall along a row and lie in 0\.\.9"):
        pack_ids(np.array(ids), 10)


def test_damaged_bytes_are_refused():
    packed_NW = pack_ids(sorted_ids(0, 3, 8, 1000, False), 1000)
    with pytest.raises(ValueError, match="bytes are not 8 ids below 1000"):
        unpack_ids(packed_NW[:, :-1], 8, 1000)
    low_bytes = packed_width(8, 1000) - 2
    for damaged in (np.zeros_like(packed_NW), np.full_like(packed_NW, 255)):
        with pytest.raises(ValueError, match="ids in 3 rows of 8"):
            unpack_ids(damaged, 8, 1000)
    shifted = packed_NW.copy()
    shifted[0, low_bytes:], shifted[1, low_bytes:] = 0xFF, 0x00  # sixteen ids in one row, none in the next
    with pytest.raises(ValueError, match="ids"):
        unpack_ids(shifted, 8, 1000)
