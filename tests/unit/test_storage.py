"""Storage on disk and on an S3 API: the same answers, nothing half-written, nothing outside the root."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import CorruptArtifact, StorageError
from cluster.published import fetch_directory, localize, publish_directory
from cluster.storage import LocalStorage, open_storage, split_uri

FILL_THE_DISK = """
import os, sys
from cluster.errors import StorageError
from cluster.storage import open_storage
storage, source = open_storage(sys.argv[1]), open_storage(sys.argv[2])
storage.write("k", b"old")
source.write("big", bytes(1 << 20))
def stream():
    with storage.writer("k") as file:
        file.write(bytes(1 << 20))
for work in (
    stream,
    lambda: storage.write("k", bytes(1 << 20)),
    lambda: storage.upload(source.root / "big", "k"),
    lambda: source.download("big", storage.root / "k"),
):
    try:
        work()
    except StorageError as error:
        print(error)
    assert storage.read("k") == b"old"
    assert os.listdir(storage.root) == ["k"]
"""


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
    with pytest.raises(CorruptArtifact, match="leave its root"):
        fetch_directory(storage, "m", tmp_path / "copy")
    assert not (tmp_path / "evil").exists()


def test_localize_s3_directory_is_copied_once_and_verified(storage, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "f").write_bytes(b"x")
    publish_directory(tmp_path / "made", storage, "d")
    found = localize(f"{storage.uri}/d", tmp_path / "cache")
    assert (found / "f").read_bytes() == b"x"
    assert localize(f"{storage.uri}/d", tmp_path / "cache") == found


def test_storage_delete_takes_a_directory_and_not_what_only_begins_like_it(storage):
    for key in ("a/x", "a/b/y", "ab/x", "abc", "b", "b.txt"):
        storage.write(key, b"1")
    storage.delete("a")
    assert [item.key for item in storage.list()] == ["ab/x", "abc", "b", "b.txt"]
    storage.delete("b/")
    assert [item.key for item in storage.list()] == ["ab/x", "abc", "b.txt"]
    storage.delete("ab")
    storage.delete("not there")
    assert [item.key for item in storage.list()] == ["abc", "b.txt"]
    with pytest.raises(ValueError, match="prefix"):
        storage.delete("/")


def test_storage_delete_of_more_than_one_batch(storage, monkeypatch):
    monkeypatch.setattr("cluster.s3._DELETED_AT_ONCE", 3)
    for number in range(7):
        storage.write(f"many/{number}", b"1")
    storage.delete("many")
    assert storage.list() == []


def test_storage_read_range_ends_with_the_object(storage):
    storage.write("k", b"0123456789")
    assert storage.read_range("k", 2, 3) == b"234"
    assert storage.read_range("k", 8, 10) == b"89"
    assert storage.read_range("k", 10, 1) == storage.read_range("k", 99, 1) == storage.read_range("k", 3, 0) == b""
    storage.write("empty", b"")
    assert storage.read_range("empty", 0, 5) == storage.read("empty") == b""
    with pytest.raises(FileNotFoundError):
        storage.read_range("none", 0, 1)
    with pytest.raises(ValueError, match="starts at 0"):
        storage.read_range("k", -1, 1)
    with pytest.raises(StorageError, match="was replaced"):
        storage.read_range("k", 0, 1, etag="another")


def test_storage_open_reads_anywhere(storage):
    content = bytes(range(256)) * 100
    storage.write("k", content)
    with storage.open("k") as file:
        assert file.read(3) == content[:3]
        file.seek(-4, os.SEEK_END)
        assert file.read() == content[-4:]
        file.seek(1000)
        file.seek(24, os.SEEK_CUR)
        assert (file.tell(), file.read(8)) == (1024, content[1024:1032])
        file.seek(len(content) + 5)
        assert file.read() == b""
        with pytest.raises(OSError, match=r"Invalid argument|before the beginning"):
            file.seek(-1)
    with pytest.raises(FileNotFoundError):
        storage.open("none")


def test_storage_open_never_mixes_two_objects(storage, monkeypatch):
    monkeypatch.setattr("cluster.storage._READ_AHEAD", 1000)
    storage.write("k", b"a" * 10_000)
    for other in (b"b" * 10_000, b"b"):
        storage.write("k", b"a" * 10_000)
        with storage.open("k") as file:
            file.read(10)
            storage.write("k", other)
            file.seek(5000)
            if isinstance(storage, LocalStorage):
                assert file.read() == b"a" * 5000
            else:
                with pytest.raises(StorageError, match="was replaced while it was read"):
                    file.read()


def write_and_fail(storage, key, content):
    with storage.writer(key) as file:
        file.write(content)
        raise KeyError


def test_storage_writer_shows_the_whole_object_or_none(storage):
    with storage.writer("k") as file:
        file.write(b"one ")
        file.write(memoryview(b"two"))
        assert not storage.exists("k")
    assert storage.read("k") == b"one two"
    with pytest.raises(KeyError):
        write_and_fail(storage, "k", b"half")
    assert storage.read("k") == b"one two"
    with storage.writer("empty"):
        pass
    assert storage.read("empty") == b""
    assert [item.key for item in storage.list()] == ["empty", "k"]


def test_storage_objects_of_several_parts(storage, tmp_path, monkeypatch):
    from cluster import multipart

    content = os.urandom(3 * multipart.PART_BYTES + 5)
    (tmp_path / "local").write_bytes(content)
    storage.upload(tmp_path / "local", "uploaded")
    storage.write("written", content)
    with storage.writer("streamed") as file:
        for start in range(0, len(content), 1_000_003):
            file.write(content[start : start + 1_000_003])
    for key in ("uploaded", "written", "streamed"):
        storage.download(key, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == content
        assert storage.read(key) == content
    with pytest.raises(KeyError):
        write_and_fail(storage, "broken", content)
    assert not storage.exists("broken")
    if not isinstance(storage, LocalStorage):
        left = storage.client.list_multipart_uploads(Bucket=storage.bucket, Prefix=storage.prefix)
        assert not left.get("Uploads")


@pytest.mark.parametrize("storage", ["s3"], indirect=True)
def test_storage_delete_removes_what_a_killed_upload_left(storage):
    for key in ("d/x", "dd/x"):
        storage.client.create_multipart_upload(Bucket=storage.bucket, Key=f"{storage.prefix}/{key}")
    storage.delete("d")
    left = storage.client.list_multipart_uploads(Bucket=storage.bucket, Prefix=storage.prefix)["Uploads"]
    assert [item["Key"] for item in left] == [f"{storage.prefix}/dd/x"]


def test_storage_download_to_where_it_cannot_be_leaves_nothing(storage, tmp_path):
    storage.write("k", b"new")
    (tmp_path / "local").write_bytes(b"old")
    with pytest.raises(FileNotFoundError):
        storage.download("none", tmp_path / "local")
    assert (tmp_path / "local").read_bytes() == b"old"
    storage.download("k", tmp_path / "new" / "deep" / "local")
    assert [path.name for path in (tmp_path / "new" / "deep").iterdir()] == ["local"]


def test_storage_counts_its_traffic(storage, tmp_path):
    storage.write("k", b"12345")
    storage.read("k")
    storage.read_range("k", 1, 2)
    storage.download("k", tmp_path / "local")
    storage.upload(tmp_path / "local", "l")
    counted = storage.traffic
    assert (counted.written_bytes, counted.read_bytes, counted.retries) == (10, 12, 0)
    assert counted.seconds > 0


def on_a_small_disk(directory, code, *arguments, **environment):
    """Runs Python with a real disk of 256 kB at `directory`, which only that process sees."""
    directory.mkdir()
    mount = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=256k none "$0" && exec "$@"', str(directory)]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk is not allowed here")
    return subprocess.run(
        [*mount, sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
    )


def test_local_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    done = on_a_small_disk(tmp_path / "small", FILL_THE_DISK, tmp_path / "small", tmp_path / "large")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4
    assert all("No space left" in line and "free some space" in line for line in done.stdout.splitlines())


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


@pytest.mark.parametrize("storage", ["s3"], indirect=True)
def test_s3_wrong_bucket_is_one_line(storage):
    with pytest.raises(StorageError, match="NoSuchBucket"):
        open_storage("s3://missing/x").check_writable()


@pytest.mark.parametrize(
    ("variable", "value", "uri"),
    [
        ("AWS_ENDPOINT_URL", "user:canary@no-scheme", "s3://bucket/x"),
        ("AWS_PROFILE", "canary", "s3://bucket/x"),
        ("AWS_REGION", "us-east-1", "s3://A bucket!/x"),
    ],
)
def test_s3_settings_that_cannot_be_used_are_one_line(monkeypatch, variable, value, uri):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    with pytest.raises(StorageError, match=r"no client|does not take") as error:
        open_storage(uri).read("k")
    assert "canary" not in str(error.value)
    assert "\n" not in str(error.value)


WRITE_AND_WAIT = """
import sys
from cluster.storage import open_storage
with open_storage(sys.argv[1]).writer("a/b") as file:
    file.write(b"half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_storage_sweeps_what_a_killed_writer_left_and_nothing_else(tmp_path):
    storage = open_storage(str(tmp_path / "root"))
    command = [sys.executable, "-c", WRITE_AND_WAIT, str(tmp_path / "root")]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"writing\n"
    [partial] = (tmp_path / "root/a").iterdir()
    elsewhere = partial.with_name(partial.name.replace("-", "-other-", 1))
    elsewhere.write_bytes(b"of another machine")
    storage.sweep()
    assert partial.exists()
    writer.kill()
    writer.communicate()
    storage.sweep()
    assert list((tmp_path / "root/a").iterdir()) == [elsewhere]
    assert storage.list() == []
