"""The state machine: one winner of every race, and nothing half done whatever moment a process dies at."""

import json
import os
import sqlite3
import tempfile
from pathlib import Path

import pytest

from cluster import promotions
from cluster.champions import current_champion, find_champion, open_database
from cluster.crowning import settle
from cluster.errors import ConfigError, PromotionRefused
from cluster.processes import is_gone, this_process
from cluster.promotions import abandon_dead, advance, crown, history, kept_alive, propose, reign_before
from cluster.published import manifest_sha256, publish_directory
from cluster.registry import list_versions
from cluster.storage import open_storage
from cluster.tracking import register_version, set_alias
from jobs.config import PromoteConfig
from jobs.promote import promote
from jobs.rollback import rollback
from tests.promotion_races import (
    BOUNDARIES,
    GOOD,
    MODEL,
    artefact,
    crown_one,
    do_and_die,
    race_of_processes,
    race_of_threads,
)


@pytest.fixture
def database(tmp_path):
    return f"sqlite:///{tmp_path}/champions.db"


@pytest.fixture
def engine(database):
    engine = open_database(database)
    yield engine
    engine.dispose()


# --- races ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def database_in_memory(tmp_path):
    """A file, in memory where that is possible: who wins does not depend on how long a disk takes to write."""
    place = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=place, prefix="raystill-") as directory:
        yield f"sqlite:///{directory}/champions.db"


def test_race_of_eight_threads_has_one_winner_fifty_times(database_in_memory):
    race_of_threads(database_in_memory, rounds=50)


def test_race_of_eight_processes_has_one_winner_fifty_times(database_in_memory):
    race_of_processes(database_in_memory, rounds=50)


def test_crown_over_a_champion_that_is_not_the_one_seen_names_the_winner_and_changes_nothing(engine):
    late = advance(engine, propose(engine, MODEL, artefact(3), None, "late"), "checked")
    first = advance(engine, propose(engine, MODEL, artefact(1), None, "first"), "checked")
    champion = crown(engine, first)[1]
    me = this_process()
    with pytest.raises(PromotionRefused, match=f"version 1 was promoted meanwhile by {me.user}@{me.host}, run first"):
        crown(engine, late)
    assert current_champion(engine, MODEL) == champion
    assert [row.state for row in history(engine, MODEL)] == ["lost", "crowned"]


def test_crown_of_one_model_leaves_the_others(engine):
    for model in ("one", "two"):
        crown(engine, advance(engine, propose(engine, model, artefact(1), None, ""), "checked"))
    assert current_champion(engine, "one").epoch == current_champion(engine, "two").epoch == 1
    assert len(history(engine, "one")) == 1


def test_steps_out_of_order_are_refused(engine):
    proposed = propose(engine, MODEL, artefact(1), None, "")
    advance(engine, proposed, "checked")
    with pytest.raises(PromotionRefused, match=r"is checked .*, it was proposed"):
        advance(engine, proposed, "checked")
    assert current_champion(engine, MODEL) is None


@pytest.mark.parametrize("name", ["a/b", "..", "a..b", "", "A", "a\n", "x" * 64, "a b", "\u202ea"])
def test_model_name_that_is_no_name_is_refused(engine, tmp_path, name):
    with pytest.raises(ConfigError, match="model name"):
        propose(engine, name, artefact(1), None, "")
    with pytest.raises(ConfigError, match="model name"):
        register_version(f"sqlite:///{tmp_path}/mlflow.db", name, "file:///1", "1" * 64, None, {})
    assert not (tmp_path / "mlflow.db").exists()


# --- who died ---------------------------------------------------------------------------------------------------------


def test_process_that_runs_is_known_and_one_that_ended_too():
    mine = this_process().identity
    machine, pid, began = mine.split()
    assert is_gone(mine) is False
    assert is_gone(f"{machine} {pid} {int(began) + 1}") is True  # the number is another process's by now
    assert is_gone(f"{machine} 4194305 {began}") is True
    assert is_gone(f"elsewhere/pid:[1] {pid} {began}") is None
    assert is_gone("") is None
    assert is_gone(f" {pid} {began}") is None


def test_promotion_that_works_is_left_alone(engine):
    propose(engine, MODEL, artefact(1), None, "")
    assert abandon_dead(engine, MODEL) == []


def test_promotion_of_another_machine_is_abandoned_after_its_lease(engine, monkeypatch):
    monkeypatch.setattr(promotions, "LEASE_S", 1.0)
    proposed = propose(engine, MODEL, artefact(1), None, "")
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE raystill_promotions SET process = 'elsewhere 1 1'")
    assert [row.id for row in abandon_dead(engine, MODEL)] == [proposed.id]
    with pytest.raises(PromotionRefused, match=r"is abandoned .*no sign of life"):
        advance(engine, proposed, "checked")  # if it was only slow, it finds out


def test_promotion_of_another_machine_that_gives_signs_of_life_is_left_alone(engine, monkeypatch):
    monkeypatch.setattr(promotions, "LEASE_S", 3.5)
    monkeypatch.setattr(promotions, "BEAT_S", 1.1)  # SQLite's clock has whole seconds
    proposed = propose(engine, MODEL, artefact(1), None, "")
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE raystill_promotions SET process = 'elsewhere 1 1'")
    with kept_alive(engine, proposed):
        assert abandon_dead(engine, MODEL) == []
    assert advance(engine, proposed, "checked").state == "checked"


def test_promotion_that_raises_is_abandoned_with_the_reason(engine):
    proposed = propose(engine, MODEL, artefact(1), None, "")
    with pytest.raises(KeyboardInterrupt), kept_alive(engine, proposed):
        raise KeyboardInterrupt
    assert (history(engine, MODEL)[0].state, history(engine, MODEL)[0].reason) == ("abandoned", "KeyboardInterrupt ()")


# --- an older database ------------------------------------------------------------------------------------------------

OLD_TABLE = """CREATE TABLE raystill_champions (model_name VARCHAR(63) NOT NULL, epoch INTEGER NOT NULL,
version VARCHAR(32) NOT NULL, uri VARCHAR(1024) NOT NULL, manifest_sha256 VARCHAR(64) NOT NULL,
promoted_at VARCHAR(40) NOT NULL, PRIMARY KEY (model_name))"""


def test_older_database_is_taken_over_with_its_champions(database, tmp_path):
    with sqlite3.connect(tmp_path / "champions.db") as connection:
        connection.execute(OLD_TABLE)
        for model, epoch in (("m", 4), ("n", 1)):
            row = (model, epoch, "7", "file:///7", "7" * 64, "2026-01-02T03:04:05+00:00")
            connection.execute("INSERT INTO raystill_champions VALUES (?, ?, ?, ?, ?, ?)", row)
    connection.close()
    for _ in range(2):  # once is enough
        champion = find_champion(database, "m")
        assert (champion.epoch, champion.version, champion.promoted_at) == (4, "7", "2026-01-02T03:04:05+00:00")
    assert find_champion(database, "n").epoch == 1
    crown_one(database, 8)
    engine = open_database(database)
    assert [(row.kind, row.epoch, row.version) for row in history(engine, "m")] == [
        ("found", 4, "7"),
        ("promote", 5, "8"),
    ]
    assert reign_before(engine, current_champion(engine, "m")).version == "7"
    engine.dispose()


# --- killed on the way ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A registry with two whole versions; returns its URI and the two artefacts."""
    directory = tmp_path_factory.mktemp("registry")
    tracking = f"sqlite:///{directory}/mlflow.db"
    storage, out = open_storage(str(directory / "storage")), []
    for number in "12":
        (directory / number).mkdir()
        (directory / number / "model.safetensors").write_text(number)
        manifest = publish_directory(directory / number, storage, number)
        digest, uri = manifest_sha256(manifest), f"{storage.uri}/{number}"
        assert register_version(tracking, MODEL, uri, digest, None, {}) == number
        out.append({"version": number, "uri": uri, "manifest_sha256": digest})
    return tracking, out


def aliases(tracking):
    return {alias: item.version for item in list_versions(tracking, MODEL) for alias in item.aliases}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", BOUNDARIES)
def test_promotion_killed_at_a_step_is_settled_by_the_next_start(database, registry, step, after):
    tracking, (first, second) = registry
    promote(PromoteConfig(), MODEL, first, GOOD, GOOD, database, tracking)
    set_alias(tracking, MODEL, "champion", "1")
    do_and_die(step, after, promote, PromoteConfig(), MODEL, second, GOOD, GOOD, database, tracking)
    reached = list(BOUNDARIES).index(step) + after
    crowned = reached > list(BOUNDARIES).index("crown") and step != "seat"
    assert find_champion(database, MODEL).version == ("2" if crowned else "1")  # whole before anything is settled

    settle(database, MODEL, tracking)
    champion = find_champion(database, MODEL)
    assert (champion.version, champion.epoch) == (("2", 2) if crowned else ("1", 1))
    assert aliases(tracking) == {"champion": champion.version}
    engine = open_database(database)
    states = [row.state for row in history(engine, MODEL)]
    engine.dispose()
    assert states == ["announced"] + ([] if reached == 0 else ["announced" if crowned else "abandoned"])

    again, verdict = promote(PromoteConfig(), MODEL, second, GOOD, GOOD, database, tracking)
    assert (again.version, again.epoch) == ("2", 2)
    assert verdict["passed"]
    assert aliases(tracking) == {"champion": "2"}
    assert json.loads(list_versions(tracking, MODEL)[1].tags["verdict_rules"])[0]["passed"] is True


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", ["check", "crown", "seat", "alias", "announce"])
def test_rollback_killed_at_a_step_is_settled_by_the_next_start(database, registry, step, after):
    tracking, versions = registry
    for version in versions:
        promote(PromoteConfig(), MODEL, version, GOOD, GOOD, database, tracking)
    do_and_die(step, after, rollback, MODEL, database, tracking)
    crowned = (step, after) == ("crown", True) or step in ("alias", "announce")
    settle(database, MODEL, tracking)
    champion = find_champion(database, MODEL)
    assert (champion.version, champion.epoch) == (("1", 3) if crowned else ("2", 2))
    assert aliases(tracking) == {"champion": champion.version}
    if crowned:
        with pytest.raises(PromotionRefused, match="no champion before version 1"):
            rollback(MODEL, database, tracking)
    else:
        assert rollback(MODEL, database, tracking)[0].version == "1"


def test_alias_is_not_set_to_another_version_of_the_same_number(database, registry, tmp_path, caplog):
    tracking, (first, _) = registry
    promote(PromoteConfig(), MODEL, first, GOOD, GOOD, database, tracking)
    made_anew = f"sqlite:///{tmp_path}/mlflow.db"
    register_version(made_anew, MODEL, "file:///other", "9" * 64, None, {})
    settle(database, MODEL, made_anew)
    assert "version 1 has manifest 999999999999… there" in caplog.text
    assert aliases(made_anew) == {}


def test_promotion_refused_and_killed_leaves_the_champion_and_settles(database, registry):
    tracking, (first, second) = registry
    promote(PromoteConfig(), MODEL, first, GOOD, GOOD, database, tracking)
    bad = {**GOOD, "bits_per_byte": 3.0}
    do_and_die("tags", False, promote, PromoteConfig(), MODEL, second, GOOD, bad, database, tracking)
    settle(database, MODEL, tracking)
    engine = open_database(database)
    row = history(engine, MODEL)[-1]
    engine.dispose()
    assert row.state == "refused"
    assert "promote.max_quality_drop" in row.reason
    assert json.loads(row.verdict)["passed"] is False
    assert aliases(tracking) == {"champion": "1"}
