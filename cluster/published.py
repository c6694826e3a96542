"""Published directories: files in object storage with a manifest that is written last and names each by its hash.

What has no manifest does not exist; what differs from it is refused. The hash of the manifest is the identity of all;
it stands in the manifest too, so that damage to the manifest itself is found.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from cluster.errors import CorruptArtifact
from cluster.storage import LocalStorage, Storage, check_key, open_storage, split_uri
from cluster.unfinished import PARTIAL

MANIFEST = "manifest.json"


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
    manifest = read_manifest(storage, prefix)
    if manifest is None:
        raise FileNotFoundError(f"{storage.uri}/{prefix}: no {MANIFEST}")
    if not isinstance(manifest.get("files"), dict):
        raise CorruptArtifact(f"{storage.uri}/{prefix}: its {MANIFEST} names no files")
    into.mkdir(parents=True, exist_ok=True)
    for name, expected in manifest["files"].items():
        path = into / check_key(name)
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


def delete_directory(storage: Storage, prefix: str) -> None:
    """Removes a published directory, its manifest first, so that no half of it is ever taken for whole."""
    storage.delete(f"{prefix}/{MANIFEST}")
    storage.delete(prefix)


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
