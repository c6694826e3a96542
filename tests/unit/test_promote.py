"""The gate and the crown: what is worse than allowed never reigns, and repeating a promotion changes nothing."""

import logging
import math

import pytest

from cluster.champions import current_champion, open_database
from cluster.errors import PromotionRefused
from cluster.published import manifest_sha256, publish_directory
from cluster.storage import open_storage
from cluster.tracking import register_version, version_uri
from jobs.config import PromoteConfig
from jobs.promote import check_gate, promote

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
    monkeypatch.setattr("jobs.promote.check_directory", lambda uri, expected_sha256: None)


def champion_in(database):
    engine = open_database(database)
    try:
        return current_champion(engine, "m")
    finally:
        engine.dispose()


def promoted(database, tracking, number, bits_per_byte=2.0, **config):
    version = {"version": number, "uri": f"file:///{number}", "manifest_sha256": number * 64}
    candidate = {"bits_per_byte": bits_per_byte}
    return promote(PromoteConfig(**config), "m", version, STUDENT, candidate, database, tracking)


# --- the files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["byte", "missing", "manifest", "all"])
def test_promotion_of_files_that_are_not_those_that_were_registered_is_refused(tmp_path, tracking, damage):
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
    else:
        storage.delete("m/1")
    with pytest.raises(PromotionRefused, match=r"version 1: .*the champion stays"):
        promote(PromoteConfig(), *arguments)
    assert champion_in(database) is None
    publish_directory(tmp_path / "made", storage, "m/1")
    assert promote(PromoteConfig(), *arguments).version == "1"


# --- the gate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits_per_byte", "loss"), [(2.0, 0.0), (2.02, 0.01), (2.0399, 0.01995), (1.5, -0.25)])
def test_gate_lets_pass_what_is_good_enough_and_says_the_loss(bits_per_byte, loss):
    assert check_gate(PromoteConfig(), STUDENT, {"bits_per_byte": bits_per_byte}) == pytest.approx(loss)


def test_gate_refuses_with_both_figures_and_the_limit():
    with pytest.raises(PromotionRefused) as caught:
        check_gate(PromoteConfig(max_quality_loss=0.05), {"bits_per_byte": 2.0}, {"bits_per_byte": 2.2})
    message = str(caught.value)
    for part in ("int8_weight_only", "2.2000", "2.0000", "10.00%", "max_quality_loss allows 5.00%", "champion stays"):
        assert part in message
    assert "\n" not in message


def test_gate_limit_of_zero_takes_equal_and_nothing_worse():
    config = PromoteConfig(max_quality_loss=0)
    check_gate(config, STUDENT, {"bits_per_byte": 2.0})
    with pytest.raises(PromotionRefused):
        check_gate(config, STUDENT, {"bits_per_byte": 2.0000001})


@pytest.mark.parametrize(("student", "candidate"), [(2.0, math.nan), (math.nan, 2.0), (2.0, math.inf), (math.inf,) * 2])
def test_gate_refuses_what_is_no_number(student, candidate):
    with pytest.raises(PromotionRefused, match="loss of"):
        check_gate(PromoteConfig(), {"bits_per_byte": student}, {"bits_per_byte": candidate})


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
        champion = promoted(database, tracking.replace("mlflow.db", "other.db"), "9")
    assert champion == champion_in(database)
    assert "alias champion of m was not set" in caplog.text
