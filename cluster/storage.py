"""Object storage behind one small interface: `file://` for one machine, `s3://` (`s3.py`) for a cluster.

Three rules keep readers safe from half-written data. An object appears whole or not at all (temporary file and rename,
or one PUT). A directory is published with its `manifest.json` last (`published.py`); without one it does not exist. Two
writers never share a key unless they write the same bytes: S3 servers do not agree on conditional writes.
"""

import contextlib
import glob
import io
import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlparse

from cluster.errors import CorruptArtifact, StorageError

PARTIAL = ".partial"
"""Ending of local files that are not whole yet."""
_READ_AHEAD = 4 << 20
"""Bytes of an open object that are fetched at a time."""


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object: its key below the storage root, its size in bytes, and what changes when its content does."""

    key: str
    size_bytes: int
    etag: str


class Storage(ABC):
    """Keys below one root URI. Keys use `/`; none is absolute and none contains `..`."""

    uri: str

    @abstractmethod
    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Objects whose key starts with `prefix`, sorted by key."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object. Raises `FileNotFoundError` if there is none."""

    @abstractmethod
    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Bytes `start` to `start + length` of an object, fewer where it ends. Raises `FileNotFoundError`."""

    def open(self, key: str) -> IO[bytes]:
        """The object as a seekable file that is read piece by piece. Raises `FileNotFoundError`."""
        info = next((item for item in self.list(key) if item.key == key), None)
        if info is None:
            raise FileNotFoundError(f"{self.uri}/{key}")
        return io.BufferedReader(_Ranges(self, info), _READ_AHEAD)

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Stores an object; it appears whole or not at all."""

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Copies an object to a local file. Raises `FileNotFoundError` if there is none."""

    @abstractmethod
    def upload(self, path: Path, key: str) -> None:
        """Copies a local file to an object; it appears whole or not at all."""

    @abstractmethod
    def delete(self, prefix: str) -> None:
        """Removes every object below `prefix`, which must not be empty."""

    def exists(self, key: str) -> bool:
        return any(item.key == key for item in self.list(key))

    def child(self, prefix: str) -> "Storage":
        """The same storage rooted deeper."""
        return open_storage(f"{self.uri.rstrip('/')}/{check_key(prefix)}")

    def read_json(self, key: str) -> Any:
        try:
            return json.loads(self.read(key))
        except json.JSONDecodeError as error:
            raise CorruptArtifact(f"{self.uri}/{key} is not valid JSON ({error}); delete it and run again") from error

    def write_json(self, key: str, value: Any) -> None:
        self.write(key, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())

    def check_writable(self) -> None:
        """Raises `StorageError` unless an object can be written and removed here; leaves nothing behind."""
        raise NotImplementedError


class LocalStorage(Storage):
    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.uri = self.root.as_uri()

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        found = []
        if not self.root.is_dir():
            return []
        base = self.root / prefix
        starts = [base] if base.is_dir() else base.parent.glob(f"{glob.escape(base.name)}*")
        for path in (item for start in starts for item in ([start] if start.is_file() else _files(start))):
            key = path.relative_to(self.root).as_posix()
            if not key.startswith(prefix) or path.name.endswith(PARTIAL):
                continue
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    stat = path.stat()
                    found.append(ObjectInfo(key, stat.st_size, f"{stat.st_mtime_ns:x}-{stat.st_size:x}"))
        return sorted(found, key=lambda item: item.key)

    def read(self, key: str) -> bytes:
        return self._path(key).read_bytes()

    def read_range(self, key: str, start: int, length: int) -> bytes:
        with self._path(key).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def open(self, key: str) -> IO[bytes]:
        return self._path(key).open("rb")

    def write(self, key: str, data: bytes) -> None:
        with self._appearing(key) as partial:
            partial.write_bytes(data)

    def download(self, key: str, path: Path) -> None:
        shutil.copyfile(self._path(key), path)

    def upload(self, path: Path, key: str) -> None:
        with self._appearing(key) as partial:
            shutil.copyfile(path, partial)

    def delete(self, prefix: str) -> None:
        if not prefix.strip("/"):
            raise ValueError("delete needs a prefix; it never empties a whole root")
        path = self._path(prefix)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            for item in self.list(prefix):
                self._path(item.key).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # ends at the first directory that still holds something
            for parent in (path.parent, *path.parent.parents):
                if parent.is_relative_to(self.root):
                    parent.rmdir()

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

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

    @contextlib.contextmanager
    def _appearing(self, key: str) -> Iterator[Path]:
        """A temporary path that becomes `key` when the block ends well."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=PARTIAL)
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.chmod(0o644)
            partial.replace(path)
        finally:
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
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._info.size_bytes}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._info.size_bytes - self._place))
        data = self._storage.read_range(self._info.key, self._place, length) if length else b""
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


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
