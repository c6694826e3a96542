"""The search for planted secrets finds one wherever it lies, and says which without its value."""

import os
import shutil

import boto3
import moto
import sqlalchemy

from tests.planted_secrets import Planted, kept_logs
from tests.ray_cluster import wait_until

SECRETS = {"of S3": "planted-3f9a17", "of PostgreSQL": "planted-77c0de"}


def test_search_of_files_goes_to_any_depth_and_follows_no_link(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.log").write_bytes(b"\0\xff key=planted-3f9a17;")
    (tmp_path / "a" / "y.json").write_text("planted-77c0de planted-77c0de")
    (tmp_path / "a" / "clean.log").write_text("planted-3f9a1")
    (tmp_path / "link.log").symlink_to(tmp_path / "a" / "b" / "x.log")
    os.mkfifo(tmp_path / "a" / "pipe.log")
    planted = Planted(SECRETS)
    planted.in_files(tmp_path)
    assert planted.found == [f"{tmp_path}/a/b/x.log: of S3", f"{tmp_path}/a/y.json: of PostgreSQL"]
    assert planted.searched == {"files": 3}
    assert "planted-" not in "".join(planted.found).replace(str(tmp_path), "")
    logs = Planted(SECRETS)
    logs.in_files(tmp_path, "*.log")
    assert logs.found == [f"{tmp_path}/a/b/x.log: of S3"]


def test_search_of_objects_reads_keys_bytes_and_what_is_said_about_them(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    with moto.mock_aws():
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="bucket")
        client.put_object(Bucket="bucket", Key="a/bytes", Body=b"..planted-3f9a17..")
        client.put_object(Bucket="bucket", Key="b", Body=b"", Metadata={"by": "planted-77c0de"})
        client.put_object(Bucket="bucket", Key="clean", Body=b"nothing")
        planted = Planted(SECRETS)
        planted.in_objects(client, "bucket")
    assert planted.found == ["s3://bucket/a/bytes: of S3", "s3://bucket/b: of PostgreSQL"]
    assert planted.searched == {"objects": 3}


def test_search_of_a_database_reads_every_column(tmp_path):
    url = f"sqlite:///{tmp_path}/x.db"
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE params (run TEXT, value TEXT, raw BLOB, number INTEGER)"))
        insert = sqlalchemy.text("INSERT INTO params VALUES ('r', :value, :raw, 7)")
        connection.execute(insert, [{"value": "clean", "raw": None}, {"value": "url planted-77c0de@", "raw": None}])
        connection.execute(insert, {"value": None, "raw": b"\0planted-3f9a17"})
    engine.dispose()
    planted = Planted(SECRETS)
    planted.in_database(url)
    assert planted.found == ["params.value: of PostgreSQL", "params.raw: of S3"]
    assert planted.searched["rows"] == 3


def test_logs_of_a_ray_that_removes_its_directory_are_kept_whole(tmp_path):
    own, kept = tmp_path / "rays", tmp_path / "kept"
    logs = own / "raystill-x" / "session_2026-01-01" / "logs"
    (logs / "events").mkdir(parents=True)
    with kept_logs(own, kept):
        (logs / "events" / "e.log").write_text("one")
        with (logs / "raylet.out").open("w") as out:
            out.write("start ")
            out.flush()
            wait_until(lambda: list(kept.rglob("raylet.out")), 10, "a second name", 0.05)
            out.write("and later")
        wait_until(lambda: list(kept.rglob("e.log")), 10, "a second name", 0.05)
        shutil.rmtree(own)
    assert [path.read_text() for path in kept.rglob("raylet.out")] == ["start and later"]
    planted = Planted({"later": "start and later"})
    planted.in_files(kept)
    assert len(planted.found) == 1
