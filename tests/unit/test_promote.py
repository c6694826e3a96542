"""The gate and the crown: what is worse than allowed never reigns, and repeating a promotion changes nothing."""

import hashlib
import json
import logging
import math

import pytest

from cluster.champions import current_champion, open_database
from cluster.errors import PromotionRefused
from cluster.promotions import history
from cluster.published import manifest_sha256, publish_directory, write_manifest
from cluster.registry import find_version
from cluster.storage import open_storage
from cluster.tracking import register_version, version_uri
from jobs.config import PromoteConfig
from jobs.promote import promote

STUDENT = {"bits_per_byte": 2.0}


@pytest.fixture(scope="module")
def tracking(tmp_path_factory):
    """A registry with versions 1, 2 and 3 of model `m`."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"
    for number in "123":
        assert register_version(uri, "m", f"file:///{number}", number * 64, None, {}) == number
    return uri


@pytest.fixture
def database(tmp_path, whole):
    return f"sqlite:///{tmp_path}/champions.db"


@pytest.fixture
def whole(monkeypatch):
    """As if every version's files were there."""
    monkeypatch.setattr("jobs.promote.check_version", lambda uri, expected_sha256: None)


def champion_in(database):
    engine = open_database(database)
    try:
        return current_champion(engine, "m")
    finally:
        engine.dispose()


def promoted(database, tracking, number, bits_per_byte=2.0, **config):
    version = {"version": number, "uri": f"file:///{number}", "manifest_sha256": number * 64}
    candidate = {"bits_per_byte": bits_per_byte}
    force = config.pop("force", False)
    return promote(PromoteConfig(**config), "m", version, STUDENT, candidate, database, tracking, force=force)[0]


# --- the files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("byte", "model.safetensors has sha256"),
        ("missing", "model.safetensors is in the manifest but not in storage"),
        ("manifest", "not its own sha256"),
        ("all", "nothing whole is there"),
        ("evil.pkl", "evil.pkl is there, but not in the manifest"),
        ("deep/evil.pt", "deep/evil.pt is there, but not in the manifest"),
        ("evil.bin", "evil.bin is there, but not in the manifest"),
        ("evil.py", "evil.py is there, but not in the manifest"),
    ],
)
def test_promotion_of_files_that_are_not_those_that_were_registered_is_refused(tmp_path, tracking, damage, reason):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "model.safetensors").write_bytes(b"weights")
    storage = open_storage(str(tmp_path / "registry"))
    manifest = publish_directory(tmp_path / "made", storage, "m/1")
    version = {"version": "1", "uri": f"{storage.uri}/m/1", "manifest_sha256": manifest_sha256(manifest)}
    database = f"sqlite:///{tmp_path}/champions.db"
    arguments = ("m", version, STUDENT, STUDENT, database, tracking)
    if damage == "byte":
        storage.write("m/1/model.safetensors", b"weightz")
    elif damage == "missing":
        storage.delete("m/1/model.safetensors")
    elif damage == "manifest":
        storage.write_json("m/1/manifest.json", {**manifest, "scheme": "other"})
    elif damage == "all":
        storage.delete("m/1")
    else:
        storage.write(f"m/1/{damage}", b"\x80\x02cposix\nsystem\n.")
    for force in (False, True):
        with pytest.raises(PromotionRefused, match=r"version 1: .*the champion stays") as caught:
            promote(PromoteConfig(), *arguments, force=force)
        assert reason in str(caught.value)
    assert champion_in(database) is None
    storage.delete("m/1")
    publish_directory(tmp_path / "made", storage, "m/1")
    assert promote(PromoteConfig(), *arguments)[0].version == "1"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../outside.json", r"names '../outside.json' .*would leave its root"),
        ("a/../../outside.json", "would leave its root"),
        ("/outside.json", "would leave its root"),
        ("pytorch_model.bin", r"pytorch_model.bin is no file of a registered version"),
        ("model.pkl", "model.pkl is no file"),
        ("training.pt", "training.pt is no file"),
        ("modeling_evil.py", "modeling_evil.py is no file"),
        ("model.safetensors.PKL", "model.safetensors.PKL is no file"),
    ],
)
def test_promotion_of_a_manifest_that_names_what_it_must_not_is_refused(tmp_path, tracking, name, reason):
    storage = open_storage(str(tmp_path / "registry"))
    (tmp_path / "registry" / "m" / "1").mkdir(parents=True)
    target = (tmp_path / "registry" / "m" / "1" / name) if not name.startswith("/") else tmp_path / "x"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(b"{}")
    files = {name: {"sha256": hashlib.sha256(b"{}").hexdigest(), "size_bytes": 2}}
    manifest = write_manifest(storage, "m/1", {"files": files})
    version = {"version": "1", "uri": f"{storage.uri}/m/1", "manifest_sha256": manifest_sha256(manifest)}
    with pytest.raises(PromotionRefused, match=reason):
        promote(PromoteConfig(), "m", version, STUDENT, STUDENT, f"sqlite:///{tmp_path}/champions.db", tracking)


# --- the crown --------------------------------------------------------------------------------------------------------


def test_promote_makes_the_champion_and_its_alias(database, tracking):
    champion = promoted(database, tracking, "1")
    assert champion == champion_in(database)
    assert (champion.version, champion.epoch, champion.manifest_sha256) == ("1", 1, "1" * 64)
    assert version_uri("models:/m@champion", tracking) == "file:///1"


def test_promote_again_changes_nothing_and_repairs_the_alias(database, tracking):
    from cluster.tracking import set_alias

    first = promoted(database, tracking, "1")
    set_alias(tracking, "m", "champion", "3")
    assert promoted(database, tracking, "1") == first == champion_in(database)
    assert version_uri("models:/m@champion", tracking) == "file:///1"


def test_promote_a_better_one_follows_with_the_next_epoch(database, tracking):
    promoted(database, tracking, "1")
    champion = promoted(database, tracking, "2")
    assert (champion.version, champion.epoch) == ("2", 2)
    assert promoted(database, tracking, "1").epoch == 3
    assert version_uri("models:/m@champion", tracking) == "file:///1"


def test_promote_the_same_bytes_at_another_place_moves_the_champion_there(database, tracking):
    promoted(database, tracking, "1")
    moved = {"version": "2", "uri": "file:///moved", "manifest_sha256": "1" * 64}
    champion, _ = promote(PromoteConfig(), "m", moved, STUDENT, STUDENT, database, tracking)
    assert (champion.uri, champion.epoch) == ("file:///moved", 2)


@pytest.mark.parametrize("bits_per_byte", [2.2, math.nan])
def test_promote_refused_candidate_leaves_the_champion(database, tracking, bits_per_byte):
    first = promoted(database, tracking, "1")
    with pytest.raises(PromotionRefused):
        promoted(database, tracking, "2", bits_per_byte)
    assert champion_in(database) == first
    assert version_uri("models:/m@champion", tracking) == "file:///1"


def test_promote_refused_without_a_champion_makes_none(database, tracking):
    with pytest.raises(PromotionRefused):
        promoted(database, tracking, "2", 2.2)
    assert champion_in(database) is None


def test_promote_stands_when_the_registry_does_not_answer(database, tracking, caplog):
    with caplog.at_level(logging.WARNING):
        champion = promoted(database, "http://127.0.0.1:9", "9")  # where nobody answers
    assert champion == champion_in(database)
    assert "alias champion of m was not set" in caplog.text


# --- the verdict ------------------------------------------------------------------------------------------------------


def rows_in(database):
    engine = open_database(database)
    try:
        return history(engine, "m")
    finally:
        engine.dispose()


def test_verdict_is_kept_in_the_history_and_as_tags_of_the_version(database, tracking):
    promoted(database, tracking, "1", 2.01)
    with pytest.raises(PromotionRefused):
        promoted(database, tracking, "2", 2.2, max_size_mb=1)
    assert [(row.state, row.version, row.epoch) for row in rows_in(database)] == [
        ("announced", "1", 1),
        ("refused", "2", None),
    ]
    for number, said, passed in (("1", "passed", [True]), ("2", "refused", [False, False])):
        tags = find_version(tracking, "m", number).tags
        assert tags["verdict"] == said
        rules = json.loads(tags["verdict_rules"])
        assert [rule["passed"] for rule in rules] == passed
        stored = json.loads(rows_in(database)[int(number) - 1].verdict)
        assert stored["rules"] == rules
        assert stored["passed"] is all(passed)
    assert (rules[0]["candidate"], rules[0]["other"], rules[0]["limit"]) == (2.2, 2.0, 0.02)


def test_force_lets_pass_and_is_written_down(database, tracking):
    champion = promoted(database, tracking, "3", 3.0, force=True)
    assert champion_in(database) == champion
    assert find_version(tracking, "m", "3").tags["verdict"] == "forced"
    (row,) = rows_in(database)
    assert row.forced
    assert json.loads(row.verdict)["forced"] is True
    promoted(database, tracking, "2", force=True)
    assert find_version(tracking, "m", "2").tags["verdict"] == "passed"  # there was nothing to force


def test_promote_of_the_version_that_another_process_crowns_meanwhile_is_no_loss(database, tracking, monkeypatch):
    def look(uri, expected_sha256):
        monkeypatch.setattr("jobs.promote.check_version", lambda uri, expected_sha256: None)
        promoted(database, tracking, "1")

    monkeypatch.setattr("jobs.promote.check_version", look)
    assert promoted(database, tracking, "1").epoch == 1
    assert sorted(row.state for row in rows_in(database)) == ["announced", "lost"]
