"""Published directories: files in object storage with a manifest that is written last and names each by its hash.

What has no manifest does not exist; what differs from it is refused. The hash of the manifest is the identity of all;
it stands in the manifest too, so that damage to the manifest itself is found.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cluster.errors import CorruptArtifact, StorageError
from cluster.storage import LocalStorage, Storage, check_key, open_storage, split_uri
from cluster.unfinished import PARTIAL

MANIFEST = "manifest.json"
VERSION_ENDINGS = (".safetensors", ".onnx", ".onnx.data", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".md")
"""Files of a registered version: weights and graphs that are data alone, and what a tokenizer is made of."""


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
    return write_manifest(storage, prefix, {**facts, "files": files})


def write_manifest(storage: Storage, prefix: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """Stores a manifest with its own hash, as `sha256`, and returns it so; what lies below `prefix` exists then."""
    sealed = {**manifest, "sha256": manifest_sha256(manifest)}
    storage.write_json(f"{prefix}/{MANIFEST}", sealed)
    return sealed


def read_manifest(storage: Storage, prefix: str) -> dict[str, Any] | None:
    """The manifest of a published directory, or None if nothing whole is there.

    Raises:
        CorruptArtifact: it is not what was written.
    """
    try:
        manifest = storage.read_json(f"{prefix}/{MANIFEST}")
    except FileNotFoundError:
        return None
    if not isinstance(manifest, dict) or manifest.get("sha256") not in (None, manifest_sha256(manifest)):
        raise CorruptArtifact(f"{storage.uri}/{prefix}/{MANIFEST} is damaged (not its own sha256)")
    return manifest


def manifest_sha256(manifest: dict[str, Any]) -> str:
    """The identity of a published directory: the hash of its manifest, and so of all its bytes."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fetch_directory(storage: Storage, prefix: str, into: Path) -> dict[str, Any]:
    """Copies a published directory to `into` and checks every file against the manifest.

    Raises:
        FileNotFoundError: there is no manifest.
        CorruptArtifact: the manifest is damaged; a file is missing, has another hash, or has a name that leaves the
            directory.
    """
    manifest, uri = _whole_manifest(storage, prefix), f"{storage.uri}/{prefix}"
    into.mkdir(parents=True, exist_ok=True)
    for name, expected in manifest["files"].items():
        path = into / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            storage.download(f"{prefix}/{name}", path)
        except FileNotFoundError:
            raise _missing(uri, name) from None
        _check_sha256(uri, name, file_sha256(path), expected["sha256"])
    (into / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True))
    return manifest


def _whole_manifest(storage: Storage, prefix: str) -> dict[str, Any]:
    """A manifest whose files may be read: it names some, and none outside its directory."""
    manifest = read_manifest(storage, prefix)
    if manifest is None:
        raise FileNotFoundError(f"{storage.uri}/{prefix}: no {MANIFEST}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(item, dict) and "sha256" in item for item in files.values()):
        raise CorruptArtifact(f"{storage.uri}/{prefix}: its {MANIFEST} names no files")
    for name in files:
        try:
            check_key(name)
        except StorageError as error:
            raise CorruptArtifact(f"{storage.uri}/{prefix}: its {MANIFEST} names {name!r} ({error})") from error
    return manifest


def _missing(uri: str, name: str) -> CorruptArtifact:
    return CorruptArtifact(f"{uri}: {name} is in the manifest but not in storage")


def _check_sha256(uri: str, name: str, found: str, expected: str) -> None:
    if found != expected:
        raise CorruptArtifact(f"{uri}: {name} has sha256 {found[:12]}…, the manifest says {expected[:12]}…")


def delete_directory(storage: Storage, prefix: str) -> None:
    """Removes a published directory, its manifest first, so that no half of it is ever taken for whole."""
    storage.delete(f"{prefix}/{MANIFEST}")
    storage.delete(prefix)


def read_through(uri: str, expected_sha256: str) -> dict[str, Any]:
    """Reads a published directory where it lies, to its last byte, and returns its manifest.

    Raises:
        CorruptArtifact: it is not there, is not the one with this manifest, or a file differs from the manifest.
    """
    storage, name = split_uri(uri)
    try:
        manifest = _whole_manifest(storage, name)
    except FileNotFoundError as error:
        raise CorruptArtifact(f"{uri}: nothing whole is there ({error})") from error
    if manifest_sha256(manifest) != expected_sha256:
        raise CorruptArtifact(f"{uri}: its manifest is not the one that was registered")
    for file, expected in manifest["files"].items():
        try:
            with storage.open(f"{name}/{file}") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]  # it has readinto
        except FileNotFoundError:
            raise _missing(uri, file) from None
        _check_sha256(uri, file, found, expected["sha256"])
    return manifest


def check_version(uri: str, expected_sha256: str) -> None:
    """Reads a registered version through, and looks for what must not be there.

    Raises:
        CorruptArtifact: as `read_through`; or a file is not in the manifest, or is of a kind that no version has.
    """
    manifest = read_through(uri, expected_sha256)
    check_version_files(manifest["files"], uri)
    storage, name = split_uri(uri)
    found = {item.key.removeprefix(f"{name}/") for item in storage.list(f"{name}/")}
    if unnamed := sorted(found - {MANIFEST, *manifest["files"]}):
        raise CorruptArtifact(f"{uri}: {', '.join(unnamed[:5])} is there, but not in the manifest")


def check_version_files(names: Iterable[str], where: str) -> None:
    """Raises `CorruptArtifact` for a file that could run code when it is loaded, or of a kind that no version has."""
    for name in names:
        if not name.lower().endswith(VERSION_ENDINGS):
            raise CorruptArtifact(
                f"{where}: {name} is no file of a registered version; only {', '.join(VERSION_ENDINGS)} are, since "
                "others may run code"
            )


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
    partial = Path(tempfile.mkdtemp(dir=target.parent, suffix=PARTIAL))
    try:
        if manifest is not None:
            fetch_directory(parent, name, partial)
        else:
            for item in listing:
                (partial / item.key).parent.mkdir(parents=True, exist_ok=True)
                storage.download(item.key, partial / check_key(item.key))
        with contextlib.suppress(OSError):  # another process was first; its copy is the same
            partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
