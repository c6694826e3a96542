"""Object storage behind one small interface: `file://` for one machine, `s3://` for a cluster.

Three rules keep readers safe from half-written data. An object appears whole or not at all (temporary file and rename,
or one PUT). A directory is published with its `manifest.json` last, and a directory without one does not exist. Two
writers never share a key unless they write the same bytes: S3 servers do not agree on conditional writes.

Credentials and endpoint come from the usual AWS variables, read by boto3 itself; none is stored or logged.
"""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from cluster.errors import CorruptArtifact, StorageError

MANIFEST = "manifest.json"


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
        return open_storage(f"{self.uri.rstrip('/')}/{_checked(prefix)}")

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
        return self.root / _checked(key)

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        found = []
        if not self.root.is_dir():
            return []
        base = self.root / prefix
        starts = [base] if base.is_dir() else base.parent.glob(f"{glob.escape(base.name)}*")
        for path in (item for start in starts for item in ([start] if start.is_file() else _files(start))):
            key = path.relative_to(self.root).as_posix()
            if not key.startswith(prefix) or path.name.endswith(_PARTIAL):
                continue
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    stat = path.stat()
                    found.append(ObjectInfo(key, stat.st_size, f"{stat.st_mtime_ns:x}-{stat.st_size:x}"))
        return sorted(found, key=lambda item: item.key)

    def read(self, key: str) -> bytes:
        return self._path(key).read_bytes()

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
            with tempfile.NamedTemporaryFile(dir=self.root, suffix=_PARTIAL) as probe:
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
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=_PARTIAL)
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


class S3Storage(Storage):
    def __init__(self, bucket: str, prefix: str) -> None:
        import boto3
        from botocore.config import Config as BotoConfig

        self.bucket, self.prefix = bucket, prefix.strip("/")
        self.uri = f"s3://{bucket}/{self.prefix}".rstrip("/")
        self._client = boto3.client(
            "s3",
            config=BotoConfig(
                retries={"mode": "standard", "max_attempts": 8},
                connect_timeout=10,
                read_timeout=60,
                s3={"addressing_style": "path"} if _custom_endpoint() else {},
            ),
        )

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{_checked(key)}".lstrip("/")

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        start = f"{self.prefix}/" if self.prefix else ""
        with self._errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=start + prefix)
            found = [
                ObjectInfo(item["Key"].removeprefix(start), item["Size"], item["ETag"].strip('"'))
                for page in pages
                for item in page.get("Contents", [])
            ]
        return sorted(found, key=lambda item: item.key)

    def read(self, key: str) -> bytes:
        with self._errors(key):
            return self._client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()

    def write(self, key: str, data: bytes) -> None:
        with self._errors(key):
            self._client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data)

    def download(self, key: str, path: Path) -> None:
        with self._errors(key):
            self._client.download_file(self.bucket, self._key(key), str(path))

    def upload(self, path: Path, key: str) -> None:
        with self._errors(key):
            self._client.upload_file(str(path), self.bucket, self._key(key))

    def delete(self, prefix: str) -> None:
        if not prefix.strip("/"):
            raise ValueError("delete needs a prefix; it never empties a whole root")
        for item in self.list(prefix):
            with self._errors(item.key):
                self._client.delete_object(Bucket=self.bucket, Key=self._key(item.key))

    def check_writable(self) -> None:
        probe = f".probe-{os.getpid()}-{os.urandom(4).hex()}"
        self.write(probe, b"raystill")
        self.delete(probe)

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Turns the SDK's errors into ours: a missing key, or one line that says what failed."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in ("NoSuchKey", "404"):
                raise FileNotFoundError(f"{self.uri}/{key}") from error
            raise StorageError(
                f"storage {self.uri}: {code or error} for {key!r}; check bucket, keys, rights"
            ) from error
        except (BotoCoreError, Boto3Error) as error:
            raise StorageError(
                f"storage {self.uri}: {error}; check AWS_ENDPOINT_URL and the AWS credentials in the environment"
            ) from error


_PARTIAL = ".partial"


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


# --- directories ------------------------------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish_directory(directory: Path, storage: Storage, prefix: str, **facts: Any) -> dict[str, Any]:
    """Stores every file of a local directory below `prefix`, then a manifest with sizes, sha256 and `facts`.

    Returns:
        The manifest: `{"files": {name: {"sha256", "size_bytes"}}, **facts}`.
    """
    files = {}
    for path in sorted(item for item in directory.rglob("*") if item.is_file() and item.name != MANIFEST):
        name = path.relative_to(directory).as_posix()
        files[name] = {"sha256": file_sha256(path), "size_bytes": path.stat().st_size}
        storage.upload(path, f"{prefix}/{name}")
    manifest = {**facts, "files": files}
    storage.write_json(f"{prefix}/{MANIFEST}", manifest)
    return manifest


def read_manifest(storage: Storage, prefix: str) -> dict[str, Any] | None:
    """The manifest of a published directory, or None if nothing whole is there."""
    try:
        return storage.read_json(f"{prefix}/{MANIFEST}")
    except FileNotFoundError:
        return None


def manifest_sha256(manifest: dict[str, Any]) -> str:
    """The identity of a published directory: the hash of its manifest, and so of all its bytes."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def fetch_directory(storage: Storage, prefix: str, into: Path) -> dict[str, Any]:
    """Copies a published directory to `into` and checks every file against the manifest.

    Raises:
        FileNotFoundError: there is no manifest.
        CorruptArtifact: a file is missing, has another hash, or has a name that leaves the directory.
    """
    manifest = read_manifest(storage, prefix)
    if manifest is None:
        raise FileNotFoundError(f"{storage.uri}/{prefix}: no {MANIFEST}")
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CorruptArtifact(f"{storage.uri}/{prefix}: its {MANIFEST} names no files")
    into.mkdir(parents=True, exist_ok=True)
    for name, expected in manifest["files"].items():
        path = into / _checked(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            storage.download(f"{prefix}/{name}", path)
        except FileNotFoundError:
            raise CorruptArtifact(f"{storage.uri}/{prefix}: {name} is in the manifest but not in storage") from None
        found = file_sha256(path)
        if found != expected["sha256"]:
            raise CorruptArtifact(
                f"{storage.uri}/{prefix}: {name} has sha256 {found[:12]}…, the manifest says {expected['sha256'][:12]}…"
            )
    (into / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True))
    return manifest


def check_directory(uri: str, expected_sha256: str) -> None:
    """Reads a published directory through.

    Raises:
        CorruptArtifact: it is not there, is not the one with this manifest, or a file differs from the manifest.
    """
    storage, name = split_uri(uri)
    with tempfile.TemporaryDirectory(prefix="raystill-check-") as into:
        try:
            manifest = fetch_directory(storage, name, Path(into))
        except FileNotFoundError as error:
            raise CorruptArtifact(f"{uri}: nothing whole is there ({error})") from error
    if manifest_sha256(manifest) != expected_sha256:
        raise CorruptArtifact(f"{uri}: its manifest is not the one that was registered")


def localize(uri: str, cache: Path | None = None) -> Path:
    """A local directory with the content of `uri`: itself if local, else a verified copy.

    A published directory (with a manifest) is cached by the manifest's hash; other object-store directories are copied
    file by file, cached by the ETags.
    """
    storage = open_storage(uri)
    if isinstance(storage, LocalStorage):
        return storage.root
    parent, name = split_uri(uri)
    manifest = read_manifest(parent, name)
    listing = storage.list()
    if not listing:
        raise FileNotFoundError(f"{uri}: no objects below it")
    identity = manifest or {"etags": [[item.key, item.etag] for item in listing]}
    target = (cache or Path(tempfile.gettempdir()) / "raystill-cache") / manifest_sha256(identity)[:32]
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, suffix=_PARTIAL))
    try:
        if manifest is not None:
            fetch_directory(parent, name, partial)
        else:
            for item in listing:
                (partial / item.key).parent.mkdir(parents=True, exist_ok=True)
                storage.download(item.key, partial / _checked(item.key))
        with contextlib.suppress(OSError):  # another process was first; its copy is the same
            partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _checked(key: str) -> str:
    """Refuses keys that could leave the root."""
    parts = key.split("/")
    if key.startswith("/") or ".." in parts or "\x00" in key or "\\" in key:
        raise StorageError(f"storage key {key!r} would leave its root; use a relative key without '..'")
    return key


def _custom_endpoint() -> bool:
    return bool(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))
