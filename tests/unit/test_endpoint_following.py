"""What a replica serves when champions come, go wrong, and are repaired. Models are stand-ins: their files matter."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ModelError
from cluster.published import manifest_sha256, publish_directory
from cluster.storage import open_storage
from jobs.rollback import rollback
from services.endpoint import following
from services.endpoint.following import ChampionFollower, verified
from tests.endpoint_models import crown_version

MODEL = "student"


class Loader:
    """Reads one file, as a model would; remembers the directories it was given."""

    def __init__(self) -> None:
        self.directories: list[Path] = []

    def __call__(self, directory: Path) -> Any:
        self.directories.append(directory)
        text = (directory / "weights.txt").read_text()
        if text == "unusable":
            raise ModelError("cannot be used")
        return text


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/champions.db"


def publish(tmp_path: Path, database: str, version: str, weights: str) -> Path:
    source = tmp_path / f"local-{version}"
    source.mkdir()
    (source / "weights.txt").write_text(weights)
    storage = open_storage(str(tmp_path / "storage"))
    manifest = publish_directory(source, storage, version, scheme="float")
    crown_version(database, MODEL, version, f"{storage.uri}/{version}", manifest_sha256(manifest))
    return tmp_path / "storage" / version


def test_poll_without_champion_says_so_and_loads_the_first_one(tmp_path: Path, database: str) -> None:
    load = Loader()
    follower = ChampionFollower(MODEL, database, verified(load))
    follower.poll()
    assert follower.served is None
    assert "no champion yet" in (follower.problem or "")
    publish(tmp_path, database, "1", "one")
    follower.poll()
    assert follower.served is not None
    assert (follower.served.model, follower.served.champion.version, follower.problem) == ("one", "1", None)
    follower.poll()
    assert len(load.directories) == 1
    assert not load.directories[0].exists(), "the private copy is removed once it is loaded"


@pytest.mark.parametrize("damage", ["file", "manifest", "file and manifest", "missing", "unusable"])
def test_poll_refuses_a_bad_version_and_keeps_the_old_one(tmp_path: Path, database: str, damage: str) -> None:
    follower = ChampionFollower(MODEL, database, verified(Loader()))
    publish(tmp_path, database, "1", "one")
    follower.poll()
    stored = publish(tmp_path, database, "2", "unusable" if damage == "unusable" else "two")
    manifest = json.loads((stored / "manifest.json").read_text())
    if "file" in damage:
        (stored / "weights.txt").write_text("evil")
    if damage == "manifest":
        manifest["scheme"] = "other"
    if damage == "file and manifest":
        other = tmp_path / "other"
        other.mkdir()
        (other / "weights.txt").write_text("evil")
        manifest = publish_directory(other, open_storage(str(tmp_path / "storage")), "2", scheme="float")
    (stored / "manifest.json").write_text(json.dumps(manifest))
    if damage == "missing":
        (stored / "weights.txt").unlink()
    follower.poll()
    assert follower.served is not None
    assert follower.served.model == "one"
    expected = "cannot be loaded (ModelError)" if damage == "unusable" else "files do not match its manifest"
    assert expected in (follower.problem or "")
    assert "version 1 stays" in (follower.problem or "")
    assert str(tmp_path) not in (follower.problem or "")


def test_poll_refuses_a_version_with_a_pickle_even_if_the_manifest_names_it(tmp_path: Path, database: str) -> None:
    load = Loader()
    follower = ChampionFollower(MODEL, database, verified(load))
    source = tmp_path / "source"
    source.mkdir()
    (source / "weights.txt").write_text("one")
    (source / "pytorch_model.bin").write_bytes(b"\x80\x02cposix\nsystem\n.")
    storage = open_storage(str(tmp_path / "storage"))
    manifest = publish_directory(source, storage, "1")
    crown_version(database, MODEL, "1", f"{storage.uri}/1", manifest_sha256(manifest))
    follower.poll()
    assert (follower.served, load.directories) == (None, [])
    assert "files do not match" in (follower.problem or "")


def test_poll_follows_a_rollback(tmp_path: Path, database: str) -> None:
    follower = ChampionFollower(MODEL, database, verified(Loader()))
    for version in ("1", "2"):
        publish(tmp_path, database, version, f"weights {version}")
    nowhere = f"sqlite:///{tmp_path}/nowhere.db"
    for turn in range(10):
        follower.poll()
        assert follower.served is not None
        assert (follower.served.model, follower.served.champion.epoch) == ("weights 2", 2 + 2 * turn)
        rollback(MODEL, database, nowhere)
        follower.poll()
        assert (follower.served.model, follower.served.champion.epoch) == ("weights 1", 3 + 2 * turn)
        rollback(MODEL, database, nowhere, to="2")
    assert follower.problem is None


def test_poll_tries_a_refused_version_again_later_and_a_new_one_at_once(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(following.time, "monotonic", lambda: now[0])
    load = Loader()
    follower = ChampionFollower(MODEL, database, verified(load))
    stored = publish(tmp_path, database, "1", "unusable")
    for _ in range(5):
        follower.poll(poll_s=2)
    assert len(load.directories) == 1
    now[0] += 4.1
    follower.poll(poll_s=2)
    assert len(load.directories) == 2
    now[0] += 4.1
    follower.poll(poll_s=2)
    assert len(load.directories) == 2, "the second pause is longer"
    publish(tmp_path, database, "2", "two")
    follower.poll(poll_s=2)
    assert follower.served is not None
    assert follower.served.model == "two"
    assert stored.exists()


def test_poll_survives_a_database_that_is_away(tmp_path: Path, database: str) -> None:
    publish(tmp_path, database, "1", "one")
    follower = ChampionFollower(MODEL, database, verified(Loader()))
    follower.poll()
    path = Path(database.removeprefix("sqlite:///"))
    content = path.read_bytes()
    path.write_bytes(b"not a database")
    follower.poll()
    assert follower.served is not None
    assert "database cannot be read" in (follower.problem or "")
    path.write_bytes(content)
    follower.poll()
    assert follower.problem is None
