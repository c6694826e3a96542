"""Storage on disk and on an S3 API: the same answers, nothing half-written, nothing outside the root."""

import os
from pathlib import Path

import pytest

from cluster.errors import CorruptArtifact, StorageError
from cluster.published import fetch_directory, localize, publish_directory
from cluster.storage import LocalStorage, open_storage, split_uri


@pytest.fixture(params=["file", "s3"])
def storage(request, tmp_path, monkeypatch):
    if request.param == "file":
        yield open_storage((tmp_path / "root").as_uri())
        return
    from moto import mock_aws

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        import boto3

        boto3.client("s3").create_bucket(Bucket="bucket")
        yield open_storage("s3://bucket/some/prefix")


def test_storage_round_trip_list_and_delete(storage, tmp_path):
    storage.write("a/one", b"1")
    storage.write("a/two words ü", b"22")
    storage.write("b", b"333")
    assert [(item.key, item.size_bytes) for item in storage.list("a/")] == [("a/one", 1), ("a/two words ü", 2)]
    assert storage.read("b") == b"333"
    assert storage.exists("b")
    assert not storage.exists("c")
    before = {item.key: item.etag for item in storage.list()}
    storage.write("b", b"4444")
    assert {item.key for item in storage.list() if before[item.key] != item.etag} == {"b"}
    storage.download("b", tmp_path / "local")
    assert (tmp_path / "local").read_bytes() == b"4444"
    storage.delete("a")
    assert [item.key for item in storage.list()] == ["b"]
    with pytest.raises(FileNotFoundError):
        storage.read("a/one")
    with pytest.raises(ValueError, match="prefix"):
        storage.delete("")


def test_storage_writable_check_leaves_nothing(storage):
    storage.check_writable()
    assert storage.list() == []


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd", "a\x00b", "a\\..\\b"])
def test_storage_keys_cannot_leave_the_root(storage, key):
    with pytest.raises(StorageError, match="leave its root"):
        storage.write(key, b"")


def test_publish_without_manifest_does_not_exist_and_damage_is_named(storage, tmp_path):
    made = tmp_path / "made"
    (made / "sub").mkdir(parents=True)
    (made / "weights").write_bytes(b"w" * 1000)
    (made / "sub" / "config").write_bytes(b"{}")
    manifest = publish_directory(made, storage, "models/x", scheme="float")
    assert fetch_directory(storage, "models/x", tmp_path / "copy") == manifest
    assert (tmp_path / "copy/sub/config").read_bytes() == b"{}"
    storage.write("models/x/weights", b"w" * 999 + b"v")
    with pytest.raises(CorruptArtifact, match="weights"):
        fetch_directory(storage, "models/x", tmp_path / "bad")
    storage.delete("models/x/weights")
    with pytest.raises(CorruptArtifact, match="weights"):
        fetch_directory(storage, "models/x", tmp_path / "worse")
    storage.delete("models/x/manifest.json")
    with pytest.raises(FileNotFoundError):
        fetch_directory(storage, "models/x", tmp_path / "none")


def test_publish_manifest_with_a_hostile_name_is_refused(storage, tmp_path):
    storage.write_json("m/manifest.json", {"files": {"../../evil": {"sha256": "0", "size_bytes": 1}}})
    with pytest.raises(StorageError, match="leave its root"):
        fetch_directory(storage, "m", tmp_path / "copy")
    assert not (tmp_path / "evil").exists()


def test_localize_s3_directory_is_copied_once_and_verified(storage, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "f").write_bytes(b"x")
    publish_directory(tmp_path / "made", storage, "d")
    found = localize(f"{storage.uri}/d", tmp_path / "cache")
    assert (found / "f").read_bytes() == b"x"
    assert localize(f"{storage.uri}/d", tmp_path / "cache") == found


def test_local_list_follows_links_and_ends_with_one_that_leads_back(tmp_path):
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "far" / "deep").mkdir(parents=True)
    for path in ("root/a/1", "far/2", "far/deep/3"):
        (tmp_path / path).write_text("x")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "root")
    listed = [item.key for item in open_storage(str(tmp_path / "root")).list()]
    assert {"a/1", "linked/2", "linked/deep/3"} <= set(listed)
    assert len(listed) < 10


def test_local_write_interrupted_leaves_the_old_object(tmp_path, monkeypatch):
    storage = open_storage(str(tmp_path))
    storage.write("k", b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        storage.write("k", b"new")
    assert storage.read("k") == b"old"
    assert [item.key for item in storage.list()] == ["k"]
    assert len(list(tmp_path.iterdir())) == 1


def test_local_root_that_cannot_be_written_is_refused_and_nothing_is_made(tmp_path):
    (tmp_path / "file").touch()
    storage = open_storage(str(tmp_path / "file" / "root"))
    with pytest.raises(StorageError, match="not writable"):
        storage.check_writable()
    fine = open_storage(str(tmp_path / "new" / "root"))
    fine.check_writable()
    assert not (tmp_path / "new").exists()


def test_open_storage_unknown_scheme_and_missing_bucket_are_refused():
    for uri in ("gs://bucket/x", "s3:///x"):
        with pytest.raises(StorageError):
            open_storage(uri)


def test_split_uri_gives_parent_and_name(tmp_path):
    parent, name = split_uri(f"{Path(tmp_path).as_uri()}/a/b.json")
    assert isinstance(parent, LocalStorage)
    assert (parent.root, name) == (tmp_path / "a", "b.json")


def test_s3_wrong_bucket_is_one_line(storage, tmp_path):
    if isinstance(storage, LocalStorage):
        pytest.skip("a question to S3 only")
    with pytest.raises(StorageError, match="NoSuchBucket"):
        open_storage("s3://missing/x").check_writable()
