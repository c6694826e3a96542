"""Which documents were there before: exact duplicates in the whole corpus, the first in source order stays.

Before an object is tokenised its documents are hashed, and the hashes are kept beside its record: sorted, 16 bytes and
a number for each. So every object is read twice, and only once tokenised; reading is a few percent of tokenising. What
is a duplicate follows from all hashes in source order and from nothing else, not from who finished first. An object
added behind the others changes nothing for them; one added before them changes those that hold copies of its documents.

Memory is bounded by working through the hashes in ranges of about eight million at a time. Each range reads its part of
every object's hashes, so a corpus of n documents in m objects costs m * n / 8e6 small reads, sixteen at a time: some
minutes (estimated) for a hundred million documents in a thousand objects on object storage.
"""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.storage import Storage

_AT_ONCE = 1 << 23
_ROW_GROUP = 1 << 12
"""Hashes that are read together: a range is a few of these of each object."""
_READERS = 16


def write_hashes(storage: Storage, key: str, hashes: bytes | bytearray) -> None:
    """Stores the 16-byte hashes of an object's documents, given one behind the other, sorted."""
    pairs = np.frombuffer(hashes, ">u8").astype(np.uint64).reshape(-1, 2)
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    table = pa.table(
        {"high": pairs[order, 0], "low": pairs[order, 1], "document": order.astype(np.uint32)},
    )
    buffer = io.BytesIO()
    # Hashes do not compress; the numbers of the documents do a little.
    pq.write_table(table, buffer, row_group_size=_ROW_GROUP, use_dictionary=False, write_page_checksum=True)
    storage.write(key, buffer.getvalue())


def count_hashes(storage: Storage, key: str) -> int:
    """How many documents were hashed."""
    with storage.open(key) as file:
        return pq.ParquetFile(file).metadata.num_rows


def find_duplicates(storage: Storage, keys: list[str], at_once: int = _AT_ONCE) -> list[np.ndarray]:
    """For each object, in source order, the numbers of the documents that were there before: uint32, sorted.

    Args:
        keys: of the objects' hashes.
        at_once: hashes held in memory.
    """
    if not keys:
        return []
    found: list[list[np.ndarray]] = [[] for _ in keys]
    pool = ThreadPoolExecutor(_READERS)
    total = sum(pool.map(partial(count_hashes, storage), keys))
    ranges = max(1, -(-total // at_once))
    for number in range(ranges):
        parts = list(pool.map(partial(_read, storage, number, ranges), keys))
        places = np.cumsum([0, *(len(part) for part in parts)])
        high, low, documents = (
            np.concatenate([part.column(name).to_numpy() for part in parts]) for name in ("high", "low", "document")
        )
        # Stable, and documents of an object come in order: of equal hashes the first in source order leads.
        order = np.lexsort((documents, np.repeat(np.arange(len(parts), dtype=np.int32), np.diff(places)), low, high))
        is_copy = (high[order[1:]] == high[order[:-1]]) & (low[order[1:]] == low[order[:-1]])
        copies = np.sort(order[1:][is_copy])
        borders = np.searchsorted(copies, places)
        for place, (first, last) in enumerate(pairwise(borders)):
            if last > first:
                found[place].append(documents[copies[first:last]])
    pool.shutdown()
    return [np.sort(np.concatenate([np.zeros(0, np.uint32), *parts])) for parts in found]


def _read(storage: Storage, number: int, ranges: int, key: str) -> pa.Table:
    """The hashes of an object of which the highest bits fall into one of equal ranges."""
    low, high = (part * 2**64 // ranges for part in (number, number + 1))
    with storage.open(key) as file:
        tables = list(_row_groups(pq.ParquetFile(file, page_checksum_verification=True), low, high))
    return pa.concat_tables(tables) if tables else pa.table({"high": [], "low": [], "document": []}, _SCHEMA)


_SCHEMA = pa.schema([("high", pa.uint64()), ("low", pa.uint64()), ("document", pa.uint32())])


def _row_groups(file: pq.ParquetFile, low: int, high: int) -> Iterator[pa.Table]:
    for group in range(file.metadata.num_row_groups):
        if file.metadata.row_group(group).num_rows == 0:
            continue
        statistics = file.metadata.row_group(group).column(0).statistics
        if statistics.max < low or statistics.min >= high:
            continue
        table = file.read_row_group(group)
        inside = pc.and_(
            pc.greater_equal(table["high"], pa.scalar(low, pa.uint64())),
            pc.less_equal(table["high"], pa.scalar(high - 1, pa.uint64())),
        )
        yield table.filter(inside)
