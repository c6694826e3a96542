"""The same promotions on a real PostgreSQL, and the whole registry on servers: PostgreSQL, MLflow, S3."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import sqlalchemy
import yaml

from cluster.champions import current_champion, find_champion, open_database
from cluster.crowning import settle
from cluster.errors import StorageError
from cluster.promotions import history, reign_before
from cluster.published import publish_directory
from cluster.registry import list_versions
from cluster.storage import open_storage
from jobs.config import PromoteConfig
from jobs.promote import promote
from jobs.register import register
from tests import postgres_server, promotion_races
from tests.command_line import environment, last_json
from tests.promotion_races import GOOD, MODEL, artefact, crown_one, do_and_die
from tests.unit.test_promotions import OLD_TABLE

pytestmark = pytest.mark.integration
NOWHERE = "sqlite:////nowhere/mlflow.db"


@pytest.fixture
def database(postgresql, request):
    return postgresql.make_database(f"test_{abs(hash(request.node.name))}")


# --- races ------------------------------------------------------------------------------------------------------------


def test_race_of_eight_threads_has_one_winner_fifty_times(database):
    promotion_races.race_of_threads(database, rounds=50)


def test_race_of_eight_processes_has_one_winner_fifty_times(database):
    promotion_races.race_of_processes(database, rounds=50)


def test_tables_made_by_many_at_once_are_there(postgresql):
    for turn in range(10):
        start, url = Barrier(8), postgresql.make_database(f"tables_{turn}")

        def look(_, start=start, url=url):
            start.wait()
            engine = open_database(url)
            try:
                return current_champion(engine, MODEL), history(engine, MODEL)
            finally:
                engine.dispose()

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(look, range(8))) == [(None, [])] * 8


def test_older_database_is_taken_over_by_many_at_once(postgresql):
    for turn in range(5):
        url, start = postgresql.make_database(f"older_{turn}"), Barrier(8)
        engine = sqlalchemy.create_engine(url)
        with engine.begin() as connection:
            connection.exec_driver_sql(OLD_TABLE)
            connection.exec_driver_sql(
                "INSERT INTO raystill_champions VALUES ('m', 4, '7', 'file:///7', '7', '2026-01-02T03:04:05+00:00')"
            )
        engine.dispose()

        def look(_, start=start, url=url):
            start.wait()
            return find_champion(url, "m").epoch

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(look, range(8))) == [4] * 8
        crown_one(url, 8)
        engine = open_database(url)
        assert [(row.kind, row.epoch) for row in history(engine, "m")] == [("found", 4), ("promote", 5)]
        assert reign_before(engine, current_champion(engine, "m")).version == "7"
        engine.dispose()


# --- killed, and away -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", ["propose", "files", "check", "crown", "seat"])
def test_promotion_killed_at_a_step_is_settled_by_the_next_start(database, tmp_path, step, after):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "model.safetensors").write_text("weights")
    storage = open_storage(str(tmp_path / "storage"))
    versions = []
    for number in "12":
        manifest = publish_directory(tmp_path / "made", storage, number, number=number)
        version = {"version": number, "uri": f"{storage.uri}/{number}", "manifest_sha256": manifest["sha256"]}
        versions.append((PromoteConfig(), MODEL, version, GOOD, GOOD, database, NOWHERE))
    promote(*versions[0])
    do_and_die(step, after, promote, *versions[1])
    crowned = (step, after) == ("crown", True)
    started = time.monotonic()
    settle(database, MODEL, NOWHERE)
    assert time.monotonic() - started < 30
    assert find_champion(database, MODEL).version == ("2" if crowned else "1")
    engine = open_database(database)
    states = [row.state for row in history(engine, MODEL)][1:]
    engine.dispose()
    assert states == ([] if (step, after) == ("propose", False) else ["crowned" if crowned else "abandoned"])
    assert promote(*versions[1])[0].version == "2"


def test_database_that_is_away_is_one_line_without_the_password():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(StorageError, match=r"raystill:\*\*\*@127.0.0.1") as caught:
        find_champion(postgres_server.PostgresServer(port, None).url(), MODEL)
    assert postgres_server.SECRET not in str(caught.value)


# --- everything on servers --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mlflow_server(postgresql, s3_server, tmp_path_factory):
    """An MLflow server on PostgreSQL with its artefacts on S3; returns its address."""
    from tests import mlflow_server

    with mlflow_server.running(postgresql, s3_server, tmp_path_factory.mktemp("mlflow")) as address:
        yield address


def test_register_promote_rollback_and_versions_on_servers(
    database, mlflow_server, s3_server, tmp_path, monkeypatch, forked_raystill
):
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    storage = open_storage("s3://bucket/r")
    for number in (1, 2):
        source = tmp_path / f"source-{number}"
        source.mkdir()
        (source / "model.safetensors").write_text(f"weights {number}")
        publish_directory(source, storage, f"quantized/{number}", scheme="int8_weight_only")
        figures = {"bits_per_byte": 2.1 - number / 100, "bytes": number * 1_000_000, "tokens_per_s": 200.0}
        made = {"int8_weight_only": {"uri": f"{storage.uri}/quantized/{number}", "measured": figures}}
        facts = {"run": "r", "float_student": {"bits_per_byte": 2.09}, "teacher": {"bits_per_byte": 2.0}}
        for _ in range(2):  # repeating it changes nothing
            found = register(made, "r-student", storage, mlflow_server, None, facts)
            assert found["int8_weight_only"]["version"] == str(number)
    config = {
        **{"name": "r", "storage": storage.uri, "data": {"sources": ["x"]}, "train": {"steps": 1}},
        **{"teacher": {"model": "x"}, "student": {"model": "x"}, "promote": {"min_retention": 0.9}},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(config))
    variables = {
        **environment(),
        **s3_server.environment(),
        "MLFLOW_TRACKING_URI": mlflow_server,
        "RAYSTILL_DATABASE_URL": database,
    }

    def call(*arguments, code=0):
        done = forked_raystill(*arguments, "--json", cwd=tmp_path, env=variables)
        assert done.returncode == code, done.stderr[-3000:]
        return last_json(done.stdout)

    for number in "12":
        assert call("promote", "r.yaml", "--version", number)["champion"]["version"] == number
    assert call("rollback", "r.yaml")["champion"]["version"] == "1"
    found = call("versions", "r.yaml")
    assert [row["aliases"] for row in found["versions"]] == [["champion"], []]
    assert [row["verdict"] for row in found["versions"]] == ["passed", "passed"]
    assert [row["state"] for row in found["history"]] == ["announced"] * 3
    assert call("versions", "r-student")["champion"] == found["champion"]
    refused = call("promote", "r.yaml", "promote.min_retention=0.99", "promote.max_size_mb=1", "--version", "2", code=1)
    assert "promote.min_retention: " in refused["error"]
    assert "promote.max_size_mb: " in refused["error"]
    tags = list_versions(mlflow_server, "r-student")[1].tags
    assert tags["verdict"] == "refused"
    assert [rule["passed"] for rule in json.loads(tags["verdict_rules"])] == [True, False, False]

    weights = storage.list(f"{found['versions'][1]['uri'].removeprefix('s3://bucket/r/')}/")
    key = next(item.key for item in weights if item.key.endswith(".safetensors"))
    storage.write(key, b"weights X")
    assert "has sha256" in call("promote", "r.yaml", "--version", "2", "--force", code=1)["error"]
    storage.write(key, b"weights 2")
    storage.write(f"{Path(key).parent}/evil.pkl", b"\x80\x02.")
    assert "evil.pkl is there" in call("promote", "r.yaml", "--version", "2", "--force", code=1)["error"]
    assert call("versions", "r.yaml")["champion"]["version"] == "1"


def test_promotion_with_the_database_gone_in_the_middle_changes_nothing(postgresql, tmp_path, monkeypatch):
    database = postgresql.make_database("away")

    def cut(uri, expected_sha256):
        engine = sqlalchemy.create_engine(postgresql.url())
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ALTER DATABASE away ALLOW_CONNECTIONS false")
            connection.exec_driver_sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'away'")
        engine.dispose()

    monkeypatch.setattr("jobs.promote.check_version", cut)
    arguments = (PromoteConfig(), MODEL, artefact(1), GOOD, GOOD, database, NOWHERE)
    with pytest.raises(StorageError, match=r"away: does not answer \(") as caught:
        promote(*arguments)
    assert "\n" not in str(caught.value)
    engine = sqlalchemy.create_engine(postgresql.url())
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ALTER DATABASE away ALLOW_CONNECTIONS true")
    engine.dispose()
    assert find_champion(database, MODEL) is None
    monkeypatch.setattr("jobs.promote.check_version", lambda uri, expected_sha256: None)
    assert promote(*arguments)[0].epoch == 1
