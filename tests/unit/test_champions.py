"""One crown for many claimants, and errors that survive the way between processes."""

import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from cluster import errors
from cluster.champions import crown, current_champion, database_url, find_champion, open_database
from cluster.errors import PromotionRefused, RaystillError, StorageError, UserError

CLAIMANTS = 8
ROUNDS = 30


@pytest.fixture
def database(tmp_path):
    return f"sqlite:///{tmp_path}/deep/down/champions.db"


def leaves(kind):
    below = [item for item in kind.__subclasses__() if item.__module__ == errors.__name__]
    return [leaf for item in below for leaf in leaves(item)] if below else [kind]


# --- the crown --------------------------------------------------------------------------------------------------------


def test_crown_of_racing_threads_exactly_one_wins_every_round(database):
    start = Barrier(CLAIMANTS)
    watcher = open_database(database)
    engines = [open_database(database) for _ in range(CLAIMANTS)]

    def claim(number, turn, seen):
        version = f"{turn}.{number}"
        start.wait()
        try:
            return "won", crown(engines[number], "m", version, f"file:///{version}", "0" * 64, seen)
        except PromotionRefused as refused:
            return "lost", str(refused)

    with ThreadPoolExecutor(CLAIMANTS) as pool:
        for turn in range(1, ROUNDS + 1):
            seen = current_champion(watcher, "m")
            outcomes = list(pool.map(claim, range(CLAIMANTS), [turn] * CLAIMANTS, [seen] * CLAIMANTS))
            winners = [outcome for kind, outcome in outcomes if kind == "won"]
            losers = [outcome for kind, outcome in outcomes if kind == "lost"]
            assert len(winners) == 1
            assert current_champion(watcher, "m") == winners[0]
            assert winners[0].epoch == turn
            assert len(losers) == CLAIMANTS - 1
            for message in losers:
                assert f"but version {winners[0].version} was promoted meanwhile" in message
                assert f"over {seen.version if seen else 'none'}" in message
    for engine in (watcher, *engines):
        engine.dispose()


def _claim_all(number, database, start, outcomes):
    engine = open_database(database)
    for _ in range(ROUNDS):
        start.wait(60)
        seen = current_champion(engine, "m")
        start.wait(60)  # all have seen the same champion
        try:
            crown(engine, "m", str(number), "file:///x", "0" * 64, seen)
            outcomes.put(seen.epoch + 1 if seen else 1)
        except PromotionRefused:
            outcomes.put(None)
        start.wait(60)


def test_crown_of_racing_processes_exactly_one_wins_every_round(database):
    context = multiprocessing.get_context("spawn")
    start, outcomes = context.Barrier(4), context.Queue()
    claimants = [context.Process(target=_claim_all, args=(n, database, start, outcomes)) for n in range(4)]
    for process in claimants:
        process.start()
    found = [outcomes.get(timeout=120) for _ in range(4 * ROUNDS)]
    for process in claimants:
        process.join(60)
    assert [process.exitcode for process in claimants] == [0] * 4
    assert sorted(epoch for epoch in found if epoch) == list(range(1, ROUNDS + 1))


def test_crown_with_an_old_sight_is_refused_and_changes_nothing(database):
    engine = open_database(database)
    first = crown(engine, "m", "1", "file:///1", "a" * 64, None)
    second = crown(engine, "m", "2", "file:///2", "b" * 64, first)
    for seen in (None, first):
        with pytest.raises(PromotionRefused, match="version 2 was promoted meanwhile; look at it, then promote again"):
            crown(engine, "m", "3", "file:///3", "c" * 64, seen)
    assert current_champion(engine, "m") == second
    assert (second.epoch, second.version, second.uri, second.manifest_sha256) == (2, "2", "file:///2", "b" * 64)
    engine.dispose()


def test_crown_of_one_model_leaves_the_others(database):
    engine = open_database(database)
    one = crown(engine, "one", "1", "file:///1", "a" * 64, None)
    assert crown(engine, "two", "7", "file:///7", "b" * 64, None).epoch == 1
    assert current_champion(engine, "one") == one
    assert current_champion(engine, "three") is None
    engine.dispose()


# --- the database -----------------------------------------------------------------------------------------------------


def test_database_opened_by_many_at_once_has_its_table(tmp_path):
    for turn in range(10):
        start = Barrier(CLAIMANTS)
        url = f"sqlite:///{tmp_path}/{turn}.db"

        def look(_, start=start, url=url):
            start.wait()
            engine = open_database(url)
            try:
                return current_champion(engine, "m")
            finally:
                engine.dispose()

        with ThreadPoolExecutor(CLAIMANTS) as pool:
            assert list(pool.map(look, range(CLAIMANTS))) == [None] * CLAIMANTS


def test_database_is_kept_when_it_is_opened_again(database):
    engine = open_database(database)
    champion = crown(engine, "m", "1", "file:///1", "a" * 64, None)
    engine.dispose()
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
