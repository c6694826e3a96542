"""Parquet in object storage, a row group at a time: one ranged read for the footer, one for each group.

What has been decoded is kept up to a bound of bytes. Threads may share a cache; two that want the same group wait for
one read.
"""

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import CorruptArtifact
from cluster.storage import Storage

T = TypeVar("T")
_TAIL = 64 << 10
"""Bytes read for a footer at first; what pyarrow asks for too."""


class ParquetObject:
    """One parquet object, of which only the footer has been read.

    Args:
        size_bytes: as its manifest or listing says.

    Raises:
        CorruptArtifact: the object has no footer, or a group in it is damaged.
        FileNotFoundError: there is no such object.
    """

    def __init__(self, storage: Storage, key: str, size_bytes: int) -> None:
        self._storage, self._key, self._size = storage, key, size_bytes
        start = max(0, size_bytes - _TAIL)
        tail = storage.read_range(key, start, size_bytes - start)
        if tail[-4:] != b"PAR1" or len(tail) != size_bytes - start:
            raise CorruptArtifact(f"{storage.uri}/{key}: not a whole parquet file of {size_bytes} bytes")
        needed = int.from_bytes(tail[-8:-4], "little") + 8
        if needed > len(tail):
            start = max(0, size_bytes - needed)
            tail = storage.read_range(key, start, size_bytes - start)
        self.metadata = self._decoded(lambda: pq.read_metadata(_Window(tail, start, size_bytes)))
        counts = [self.metadata.row_group(group).num_rows for group in range(self.metadata.num_row_groups)]
        self._ends = np.cumsum(counts)

    @property
    def num_groups(self) -> int:
        return len(self._ends)

    def place(self, row: int) -> tuple[int, int]:
        """The group that holds a row, and the row's index in it."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        return group, row - (int(self._ends[group - 1]) if group else 0)

    def read(self, group: int) -> pa.Table:
        """All columns of a group, their page checksums verified."""
        columns = self.metadata.row_group(group)
        chunks = [columns.column(number) for number in range(columns.num_columns)]
        starts = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
        start = min(starts)
        end = max(first + chunk.total_compressed_size for first, chunk in zip(starts, chunks, strict=True))
        window = _Window(self._storage.read_range(self._key, start, end - start), start, self._size)

        def decode() -> pa.Table:
            file = pq.ParquetFile(window, metadata=self.metadata, page_checksum_verification=True)
            return file.read_row_group(group, use_threads=False)

        return self._decoded(decode)

    def _decoded(self, decode: Callable[[], T]) -> T:
        try:
            return decode()
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CorruptArtifact(f"{self._storage.uri}/{self._key}: damaged ({reason})") from error


class _Window(io.RawIOBase):
    """A file of which some bytes are at hand; reading others is an error."""

    def __init__(self, data: bytes, start: int, size: int) -> None:
        self._data, self._start, self._size, self._place = memoryview(data), start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        first = self._place - self._start
        length = min(len(buffer), self._size - self._place)
        if first < 0 or first + length > len(self._data):
            raise ValueError(f"bytes {self._place} to {self._place + length} are not at hand")
        buffer[:length] = self._data[first : first + length]
        self._place += length
        return length


class ByteCache(Generic[T]):
    """Values that are loaded when first wanted and kept, the most recently used ones, up to a bound of bytes.

    Args:
        max_bytes: of all values together; one value is always kept.
        size_of: bytes of a value.
    """

    def __init__(self, max_bytes: int, size_of: Callable[[T], int]) -> None:
        self._max_bytes, self._size_of = max_bytes, size_of
        self._values: OrderedDict[Hashable, Future[T]] = OrderedDict()
        self._sizes: dict[Hashable, int] = {}
        self._total = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, load: Callable[[], T]) -> T:
        """The value of a key. What `load` raises is raised for all who wait, and nothing is kept."""
        with self._lock:
            found = self._values.get(key)
            mine = found is None
            if found is None:
                found = self._values[key] = Future()
            self._values.move_to_end(key)
        if not mine:
            return found.result()
        try:
            value = load()
        except BaseException as error:
            with self._lock:
                del self._values[key]
            found.set_exception(error)
            raise
        found.set_result(value)
        with self._lock:
            self._sizes[key] = self._size_of(value)
            self._total += self._sizes[key]
            self._evict()
        return value

    def _evict(self) -> None:
        while self._total > self._max_bytes and len(self._sizes) > 1:
            key = next(key for key in self._values if key in self._sizes)  # loaded, and unused for longest
            self._total -= self._sizes.pop(key)
            del self._values[key]
