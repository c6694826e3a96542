"""Object storage behind one small interface: `file://` for one machine, `s3://` (`s3.py`) for a cluster.

Three rules keep readers safe from half-written data. An object appears whole or not at all (temporary file and rename,
or one PUT). A directory is published with its `manifest.json` last (`published.py`); without one it does not exist. Two
writers never share a key unless they write the same bytes: S3 servers do not agree on conditional writes.
"""

import contextlib
import errno
import glob
import io
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlparse

from cluster.errors import CorruptArtifact, StorageError
from cluster.unfinished import PARTIAL, new_file, sweep

logger = logging.getLogger(__name__)

_READ_AHEAD = 4 << 20
"""Bytes of an open object that are fetched at a time."""


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object: its key below the storage root, its size in bytes, and what changes when its content does."""

    key: str
    size_bytes: int
    etag: str


@dataclass
class Traffic:
    """What went through one storage object so far, or all of this process (`of_process`). Ranged reads of an open local
    file are not counted."""

    read_bytes: int = 0
    written_bytes: int = 0
    seconds: float = 0.0
    """Added up over operations, also where they overlapped."""
    retries: int = 0

    def count(self, read_bytes: int = 0, written_bytes: int = 0, seconds: float = 0.0, retries: int = 0) -> None:
        with _counting:
            for traffic in (self, of_process):
                traffic.read_bytes += read_bytes
                traffic.written_bytes += written_bytes
                traffic.seconds += seconds
                traffic.retries += retries


_counting = threading.Lock()
of_process = Traffic()


class Storage(ABC):
    """Keys below one root URI. Keys use `/`; none is absolute and none contains `..`."""

    uri: str

    def __init__(self) -> None:
        self.traffic = Traffic()

    @abstractmethod
    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Objects whose key starts with `prefix`, sorted by key."""

    @abstractmethod
    def info(self, key: str) -> ObjectInfo:
        """Size and ETag of one object. Raises `FileNotFoundError` if there is none."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object. Raises `FileNotFoundError` if there is none."""

    @abstractmethod
    def read_range(self, key: str, start: int, length: int, etag: str | None = None) -> bytes:
        """Bytes `start` to `start + length` of an object, fewer where it ends, none after its end.

        Raises:
            FileNotFoundError: there is no such object.
            StorageError: its ETag is not `etag`, where one is given.
        """

    def open(self, key: str) -> IO[bytes]:
        """The object as a seekable file that is read ahead, 4 MiB at a time. Raises `FileNotFoundError`.

        What is read is one object from beginning to end: if it is replaced meanwhile, a local file stays the old one,
        elsewhere the next read raises `StorageError`.
        """
        return io.BufferedReader(_Ranges(self, self.info(key)), _READ_AHEAD)

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Stores an object; it appears whole or not at all."""

    @abstractmethod
    def writer(self, key: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """A file to write an object to. It appears whole when the block ends well; if the block raises, not at all."""

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Copies an object to a local file, which appears whole or not at all. Raises `FileNotFoundError`."""

    @abstractmethod
    def upload(self, path: Path, key: str) -> None:
        """Copies a local file to an object; it appears whole or not at all."""

    @abstractmethod
    def delete(self, prefix: str) -> None:
        """Removes the object `prefix`, and every object below it as a directory: "a" is "a" and "a/b", but not "ab"."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is an object of this key."""

    def child(self, prefix: str) -> "Storage":
        """The same storage rooted deeper."""
        return open_storage(f"{self.uri.rstrip('/')}/{check_key(prefix)}")

    @abstractmethod
    def sweep(self) -> None:
        """Removes what writers that were killed left unfinished."""

    def read_json(self, key: str) -> Any:
        try:
            return json.loads(self.read(key))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CorruptArtifact(f"{self.uri}/{key} is not valid JSON ({error}); delete it and run again") from error

    def write_json(self, key: str, value: Any) -> None:
        self.write(key, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())

    def check_writable(self) -> None:
        """Raises `StorageError` unless an object can be written and removed here; leaves nothing behind."""
        raise NotImplementedError


class LocalStorage(Storage):
    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root.absolute()
        self.uri = self.root.as_uri()

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _file(self, key: str) -> Path:
        """The path of an object that is there."""
        path = self._path(key)
        if not path.is_file():
            raise FileNotFoundError(f"{self.uri}/{key}")
        return path

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        found = []
        base = self._path(prefix)
        if not self.root.is_dir():
            return []
        starts = [base] if base.is_dir() else base.parent.glob(f"{glob.escape(base.name)}*")
        for path in (item for start in starts for item in ([start] if start.is_file() else _files(start))):
            key = path.relative_to(self.root).as_posix()
            if not key.startswith(prefix) or path.name.endswith(PARTIAL):
                continue
            with contextlib.suppress(FileNotFoundError):
                found.append(self.info(key))
        return sorted(found, key=lambda item: item.key)

    def info(self, key: str) -> ObjectInfo:
        stat = self._file(key).stat()
        return ObjectInfo(key, stat.st_size, f"{stat.st_mtime_ns:x}-{stat.st_size:x}")

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def read(self, key: str) -> bytes:
        with self._timed():
            data = self._file(key).read_bytes()
        self.traffic.count(read_bytes=len(data))
        return data

    def read_range(self, key: str, start: int, length: int, etag: str | None = None) -> bytes:
        if start < 0:
            raise ValueError(f"a range starts at 0 or later, not at {start}")
        with self._timed(), self._file(key).open("rb") as file:
            if etag is not None and (found := self.info(key).etag) != etag:
                raise replaced(self.uri, key, etag, found)
            file.seek(start)
            data = file.read(max(0, length))
        self.traffic.count(read_bytes=len(data))
        return data

    def open(self, key: str) -> IO[bytes]:
        return self._file(key).open("rb")

    def write(self, key: str, data: bytes) -> None:
        with self._timed(), self.writer(key) as file:
            file.write(data)

    @contextlib.contextmanager
    def writer(self, key: str) -> Iterator[IO[bytes]]:
        with whole_file(self._path(key), self.uri, durable=True) as partial:
            with partial.open("wb") as file:
                yield file
            self.traffic.count(written_bytes=partial.stat().st_size)

    def download(self, key: str, path: Path) -> None:
        with self._timed(), whole_file(path, self.uri) as partial:
            shutil.copyfile(self._file(key), partial)
            self.traffic.count(read_bytes=partial.stat().st_size)

    def upload(self, path: Path, key: str) -> None:
        with self._timed(), path.open("rb") as source, self.writer(key) as file:
            shutil.copyfileobj(source, file, _READ_AHEAD)

    def delete(self, prefix: str) -> None:
        name = prefix.rstrip("/")
        if not name:
            raise ValueError("delete needs a prefix; it never empties a whole root")
        path = self._path(name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # ends at the first directory that still holds something
            for parent in (path.parent, *path.parent.parents):
                if parent.is_relative_to(self.root):
                    parent.rmdir()

    def check_writable(self) -> None:
        missing = [path for path in (self.root, *self.root.parents) if not path.exists()]
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.root, suffix=PARTIAL) as probe:
                probe.write(b"raystill")
                probe.flush()
        except OSError as error:
            raise StorageError(
                f"storage {self.uri}: not writable ({error.strerror}); choose another root with storage=..."
            ) from error
        finally:
            for path in missing:
                with contextlib.suppress(OSError):
                    path.rmdir()

    def sweep(self) -> None:
        if swept := sweep(self.root):
            logger.info("removed %d unfinished files and directories of killed processes below %s", swept, self.root)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.traffic.count(seconds=time.perf_counter() - started)


@contextlib.contextmanager
def whole_file(path: Path, uri: str, durable: bool = False) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well, and vanishes when it does not.

    Args:
        uri: the storage that is written or read, for messages.
        durable: whether the content must be on the disk before the file appears.

    Raises:
        StorageError: the disk is full.
    """
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = new_file(path.parent)
        yield partial
        if durable:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        partial.chmod(0o644)
        partial.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or isinstance(error, StorageError):
            raise
        raise StorageError(
            f"storage {uri}: {error.strerror} for {path}; free some space there, or use another disk"
        ) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


class _Ranges(io.RawIOBase):
    """An object as a file, by ranged reads."""

    def __init__(self, storage: Storage, info: ObjectInfo) -> None:
        self._storage, self._info, self._place = storage, info, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._info.size_bytes}[whence]
        if place < 0:
            raise OSError(errno.EINVAL, f"seek to {place}, before the beginning")
        self._place = place
        return place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._next(self._info.size_bytes)

    def _next(self, most: int) -> bytes:
        length = max(0, min(most, self._info.size_bytes - self._place))
        if length == 0:
            return b""
        key, etag = self._info.key, self._info.etag
        data = self._storage.read_range(key, self._place, length, etag)
        if len(data) != length:
            raise replaced(self._storage.uri, key, etag, "it is shorter")
        self._place += length
        return data


def replaced(uri: str, key: str, before: str | None, now: str) -> StorageError:
    """The error for an object that is not the same as when its reading began."""
    return StorageError(
        f"storage {uri}: {key!r} was replaced while it was read (ETag {before}, now {now}): read it from its start"
    )


def _files(directory: Path) -> Iterator[Path]:
    """All files below a directory, through links too; a directory that holds itself is entered once."""
    seen = set()

    def refuse(error: OSError) -> None:
        raise error

    for parent, names, files in os.walk(directory, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(parent))
        names[:] = [name for name in names if os.path.realpath(os.path.join(parent, name)) not in seen]
        yield from (Path(parent, name) for name in files)


def open_storage(uri: str) -> Storage:
    """Storage rooted at `file:///dir`, `s3://bucket/prefix`, or a plain local path."""
    parsed = urlparse(uri)
    if parsed.scheme == "s3":
        if not parsed.netloc:
            raise StorageError(f"storage {uri!r}: no bucket; expected s3://bucket/prefix")
        from cluster.s3 import S3Storage

        return S3Storage(parsed.netloc, parsed.path)
    if parsed.scheme == "file":
        return LocalStorage(Path(unquote(parsed.path)))
    if parsed.scheme:
        raise StorageError(f"storage {uri!r}: unknown scheme {parsed.scheme}://; use file:// or s3://")
    return LocalStorage(Path(uri).expanduser())


def split_uri(uri: str) -> tuple[Storage, str]:
    """The storage of an object's parent and the object's name: `s3://b/a/x.json` gives (`s3://b/a`, `x.json`)."""
    parent, _, name = uri.rstrip("/").rpartition("/")
    return open_storage(parent or "."), name


def check_key(key: str) -> str:
    """Refuses keys that could leave the root."""
    parts = key.split("/")
    if key.startswith("/") or ".." in parts or "\x00" in key or "\\" in key:
        raise StorageError(f"storage key {key!r} would leave its root; use a relative key without '..'")
    return key
