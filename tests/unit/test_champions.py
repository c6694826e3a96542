"""The champions database, and errors that survive the way between processes."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from cluster import errors
from cluster.champions import current_champion, database_url, find_champion, open_database
from cluster.errors import RaystillError, StorageError, UserError
from cluster.promotions import history
from tests.promotion_races import crown_one

CLAIMANTS = 8


@pytest.fixture
def database(tmp_path):
    return f"sqlite:///{tmp_path}/deep/down/champions.db"


def leaves(kind):
    below = [item for item in kind.__subclasses__() if item.__module__ == errors.__name__]
    return [leaf for item in below for leaf in leaves(item)] if below else [kind]


# --- the database -----------------------------------------------------------------------------------------------------


def test_database_opened_by_many_at_once_has_its_tables(tmp_path):
    for turn in range(10):
        start = Barrier(CLAIMANTS)
        url = f"sqlite:///{tmp_path}/{turn}.db"

        def look(_, start=start, url=url):
            start.wait()
            engine = open_database(url)
            try:
                assert history(engine, "m") == []
                return current_champion(engine, "m")
            finally:
                engine.dispose()

        with ThreadPoolExecutor(CLAIMANTS) as pool:
            assert list(pool.map(look, range(CLAIMANTS))) == [None] * CLAIMANTS


def test_database_is_kept_when_it_is_opened_again(database):
    champion = crown_one(database, 1)
    assert find_champion(database, "m") == champion


def test_database_that_is_not_there_is_not_made_by_looking(database, tmp_path):
    assert find_champion(database, "m") is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("not a url", ["not an SQLAlchemy URL"]),
        ("sqlite:////proc/nowhere/x.db", ["/proc/nowhere/x.db", "cannot be opened"]),
        ("nosuchdatabase://me:hunter2@host/x", ["nosuchdatabase://me:***@host/x", "cannot be opened"]),
    ],
)
def test_database_that_cannot_be_opened_is_one_line_without_the_password(url, words):
    with pytest.raises(StorageError, match="check RAYSTILL_DATABASE_URL") as caught:
        open_database(url)
    message = str(caught.value)
    assert all(word in message for word in words)
    assert "\n" not in message
    assert "hunter2" not in message


def test_database_that_is_damaged_is_one_line(tmp_path):
    (tmp_path / "x.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(StorageError, match=r"x\.db: cannot be opened \(file is not a database\)"):
        open_database(f"sqlite:///{tmp_path}/x.db")


def test_database_url_comes_from_the_environment_first(tmp_path, monkeypatch):
    assert database_url(tmp_path) == f"sqlite:///{tmp_path}/champions.db"
    monkeypatch.setenv("RAYSTILL_DATABASE_URL", "postgresql://host/x")
    assert database_url(tmp_path) == "postgresql://host/x"


# --- errors -----------------------------------------------------------------------------------------------------------

STANDARD = {
    "ConfigError": ValueError,
    "CorpusError": ValueError,
    "ModelError": ValueError,
    "TokenizerMismatch": ValueError,
    "StorageError": OSError,
    "PlacementError": RuntimeError,
    "ClusterUnreachable": ConnectionError,
    "RunInProgress": RuntimeError,
    "PortInUse": OSError,
    "TeacherUnavailable": ConnectionError,
    "TeacherFailed": RuntimeError,
    "NonFiniteLoss": ArithmeticError,
    "CorruptArtifact": ValueError,
    "TrainingFailed": RuntimeError,
    "EvaluationFailed": RuntimeError,
    "QuantizationFailed": RuntimeError,
    "RegistryFailed": RuntimeError,
    "PromotionRefused": RuntimeError,
}
LEAVES = {kind.__name__: kind for kind in leaves(RaystillError)}


def test_errors_tree_is_the_one_that_its_docstring_draws():
    assert LEAVES.keys() == STANDARD.keys()
    for name, kind in LEAVES.items():
        drawn = f"{name}({STANDARD[name].__name__})"
        line = next(line for line in errors.__doc__.splitlines() if f" {name}" in line)
        assert drawn in line or name == "PortInUse"
        assert issubclass(kind, UserError) == line.startswith("    │   ")


@pytest.mark.parametrize("name", STANDARD)
def test_error_crosses_processes_with_type_and_message(name):
    kind, message = LEAVES[name], "teacher vocab 32000, student vocab 32064: use one tokenizer"
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        error = pickle.loads(pickle.dumps(kind(message), protocol))
        assert type(error) is kind
        assert str(error) == message
        assert error.args == (message,)
        assert isinstance(error, RaystillError)
        assert isinstance(error, STANDARD[name])
