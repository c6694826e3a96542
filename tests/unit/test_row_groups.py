"""Parquet by ranges: only what is wanted is read, damage is found, and a cache keeps its bound."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import CorruptArtifact
from cluster.row_groups import ByteCache, ParquetObject
from cluster.storage import open_storage

ROWS, GROUP = 1000, 64


@pytest.fixture
def written(tmp_path):
    """A storage with an object of several row groups, and its size."""
    rng = np.random.default_rng(0)
    lists = [rng.integers(0, 50_000, rng.integers(1, 300)).astype(np.int32) for _ in range(ROWS)]
    table = pa.table({"ids": pa.array(lists, pa.list_(pa.int32())), "number": np.arange(ROWS)})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=GROUP, compression="zstd", write_page_checksum=True)
    return open_storage(str(tmp_path)), path, table


def opened(storage, path):
    return ParquetObject(storage, path.name, path.stat().st_size)


def test_groups_hold_the_rows_and_little_else_is_read(written, monkeypatch):
    storage, path, table = written
    asked = []
    read_range = storage.read_range
    monkeypatch.setattr(
        storage, "read_range", lambda key, start, length: asked.append(length) or read_range(key, start, length)
    )
    shard = opened(storage, path)
    assert shard.num_groups == -(-ROWS // GROUP)
    for row in (0, 63, 64, 700, 999):
        group, number = shard.place(row)
        found = shard.read(group)
        assert found.slice(number, 1).to_pylist() == table.slice(row, 1).to_pylist()
    assert len(asked) == 1 + 5
    assert sum(asked[1:]) < path.stat().st_size / 2


def test_a_footer_longer_than_the_first_read_is_read_again(tmp_path):
    table = pa.table({f"column_{number}": np.arange(500) for number in range(60)})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=5)
    shard = opened(open_storage(str(tmp_path)), path)
    assert shard.metadata.serialized_size > 64 << 10
    assert shard.read(shard.place(250)[0]).num_rows == 5


def test_a_flipped_bit_is_found_in_every_group(written):
    storage, path, _ = written
    data, shard = path.read_bytes(), opened(storage, path)
    for group in range(shard.num_groups):
        page = shard.metadata.row_group(group).column(0)
        place = page.dictionary_page_offset + page.total_compressed_size - 9
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(CorruptArtifact, match=r"a\.parquet: damaged"):
            shard.read(group)


@pytest.mark.parametrize("cut", [0, 3, 200, -1])
def test_an_object_that_is_not_whole_is_refused(written, cut):
    storage, path, _ = written
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CorruptArtifact, match="not a whole parquet"):
        ParquetObject(storage, path.name, size)


def test_cache_keeps_the_most_recent_values_within_its_bound():
    cache, loaded = ByteCache[bytes](100, len), []

    def get(key, size=40):
        return cache.get(key, lambda: loaded.append(key) or bytes(size))

    get("a"), get("b"), get("a"), get("c"), get("a"), get("b")
    assert loaded == ["a", "b", "c", "b"]
    get("large", 1000)
    get("large", 1000)
    assert loaded[4:] == ["large"]
    get("a")
    assert loaded[5:] == ["a"]


def test_cache_loads_once_for_all_who_wait_and_forgets_a_failure():
    cache, loads, barrier = ByteCache[bytes](100, len), [], threading.Barrier(4)

    def load():
        loads.append(1)
        time.sleep(0.05)
        if len(loads) == 1:
            raise OSError("away")
        return b"here"

    def get(_):
        barrier.wait()
        return cache.get("key", load)

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(get, number) for number in range(4)]
        assert [type(answer.exception()) for answer in answers] == [OSError] * 4
    assert cache.get("key", load) == cache.get("key", load) == b"here"
    assert len(loads) == 2
