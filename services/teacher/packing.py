"""Token ids in few bits. Pure numpy; knows neither torch nor Ray.

The K ids of a position are a set, so they are sorted and written in the Elias-Fano code (Elias, JACM 1974; Fano 1971):
the low bits of each as they are, the high bits as a row of unary steps. With C vocabulary columns that takes
`K * (2 + log2(C / K))` bits, near the least a set can take, and the same for every position, so that a signal is a
plain array [N, W]. For K = 64 and C = 262,144 it is 112 bytes where one id behind the other takes 144.
"""

import numpy as np


def packed_width(num_ids: int, vocab_size: int) -> int:
    """W: bytes for `num_ids` ids below `vocab_size`."""
    low_bits, high_bits = _layout(num_ids, vocab_size)
    return -(-num_ids * low_bits // 8) - (-high_bits // 8)


def pack_ids(ids_NK: np.ndarray, vocab_size: int) -> np.ndarray:
    """Sorted ids as bits, uint8 [N, W].

    Args:
        ids_NK: integers in 0..vocab_size - 1, not falling along a row; an id may come more than once.

    Raises:
        ValueError: ids that fall along a row, or outside the vocabulary.
    """
    num_rows, num_ids = ids_NK.shape
    ids_NK = ids_NK.astype(np.int32)
    if num_rows and (ids_NK[:, 0].min() < 0 or ids_NK[:, -1].max() >= vocab_size or (np.diff(ids_NK) < 0).any()):
        raise ValueError(f"ids to pack must not fall along a row and lie in 0..{vocab_size - 1}")
    low_bits, high_bits = _layout(num_ids, vocab_size)
    low_NKb = (ids_NK[:, :, None] >> np.arange(low_bits, dtype=np.int32)).astype(np.uint8) & 1
    high_NH = np.zeros((num_rows, high_bits), np.uint8)
    np.put_along_axis(high_NH, (ids_NK >> low_bits) + np.arange(num_ids), 1, axis=1)
    return np.concatenate(
        [np.packbits(low_NKb.reshape(num_rows, num_ids * low_bits), axis=1), np.packbits(high_NH, axis=1)], axis=1
    )


def unpack_ids(packed_NW: np.ndarray, num_ids: int, vocab_size: int) -> np.ndarray:
    """The ids, int32 [N, K], rising along each row.

    Raises:
        ValueError: bytes that are no K ids below `vocab_size`.
    """
    low_bits, high_bits = _layout(num_ids, vocab_size)
    num_rows, border = len(packed_NW), -(-num_ids * low_bits // 8)
    if packed_NW.shape[1] != packed_width(num_ids, vocab_size):
        raise ValueError(f"{packed_NW.shape[1]} bytes are not {num_ids} ids below {vocab_size}")
    low_NKb = np.unpackbits(packed_NW[:, :border], axis=1, count=num_ids * low_bits).reshape(
        num_rows, num_ids, low_bits
    )
    steps = np.flatnonzero(np.unpackbits(packed_NW[:, border:], axis=1, count=high_bits))
    if len(steps) != num_rows * num_ids:
        raise ValueError(f"{len(steps)} ids in {num_rows} rows of {num_ids}")
    row_starts = np.arange(num_rows)[:, None] * high_bits
    high_NK = (steps.reshape(num_rows, num_ids) - row_starts - np.arange(num_ids)).astype(np.int32)
    ids_NK = high_NK << low_bits
    for bit in range(low_bits):
        ids_NK |= low_NKb[:, :, bit].astype(np.int32) << bit
    if num_rows and (ids_NK[:, 0].min() < 0 or ids_NK[:, -1].max() >= vocab_size or (np.diff(ids_NK) < 0).any()):
        raise ValueError(f"unpacked ids lie outside 0..{vocab_size - 1}")
    return ids_NK


def _layout(num_ids: int, vocab_size: int) -> tuple[int, int]:
    """Low bits of each id, and the length of the row of unary steps."""
    low_bits = max(0, (vocab_size // num_ids).bit_length() - 1)
    return low_bits, num_ids + ((vocab_size - 1) >> low_bits)
