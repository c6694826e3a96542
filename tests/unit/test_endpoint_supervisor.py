"""Who is brought up, swapped in, given a share, taken down and ended: the supervisor without Ray.

The versions' applications are stand-ins that start, fail and end as a test says; the rows are real.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.canaries import begin, end_canary, latest_canary, running_canary
from cluster.champions import Champion, current_champion, open_database
from cluster.errors import CorruptArtifact
from cluster.promotions import advance, history, propose
from jobs.rollback import end_running_canary, rollback
from services.endpoint import following
from services.endpoint.canary import Observation
from services.endpoint.schema import EndpointArguments
from services.endpoint.supervisor import Supervisor
from services.endpoint.traffic import Route, RoutingTable
from tests.promotion_races import MODEL, artefact, crown_one

PLAN = {"steps": [0.1, 0.5], "hold_s": 10, "min_requests": 20, "max_error_rate": 0.05, "max_latency_ratio": 2.0}


class Applications:
    """Applications that are ready one look after they were started, unless they are told to fail."""

    def __init__(self) -> None:
        self.words: dict[str, str] = {}
        self.started: list[str] = []
        self.removed: list[str] = []
        self.failing: dict[str, Exception] = {}

    def name_of(self, version: Champion) -> str:
        return f"v{version.version}"

    def states(self) -> dict[str, tuple[str, str]]:
        return {name: (word, "") for name, word in self.words.items()}

    def start(self, version: Champion) -> None:
        name = self.name_of(version)
        self.started.append(name)
        self.words[name] = "DEPLOY_FAILED" if name in self.failing else "DEPLOYING"
        self._last = name

    def ready(self) -> None:
        self.words = {name: "RUNNING" if word == "DEPLOYING" else word for name, word in self.words.items()}

    def route(self, version: Champion) -> Route:
        return Route(self.name_of(version), version.version, version.manifest_sha256, version.uri, "float", 200, 64)

    def running(self, name: str) -> int:
        return self.words.get(name) == "RUNNING"

    def queue(self, name: str) -> int:
        return 0

    def remove(self, name: str) -> None:
        self.removed.append(name)
        del self.words[name]

    def failure(self, message: str) -> Exception:
        return self.failing[self._last]


class Endpoint:
    """A supervisor with its clock, and one router that asks it."""

    def __init__(self, database: str, **config: Any) -> None:
        self.now = 100.0
        self.applications = Applications()
        arguments = EndpointArguments(model_name=MODEL, database=database, **config)
        self.supervisor = Supervisor(arguments, self.applications, lambda: self.now)
        self.table = RoutingTable()
        self.traffic: dict[str, Any] = {}

    def tell(self, *observations: Observation, in_flight: dict[str, int] | None = None, router: str = "r") -> None:
        seen = list(observations)
        self.table, self.traffic = self.supervisor.exchange(router, seen, in_flight or {}, self.table.number)

    def turn(self, times: int = 3) -> None:
        """Some polls, with what was started becoming ready in between."""
        for _ in range(times):
            self.supervisor.poll()
            self.applications.ready()
            self.tell()

    def answers(self, number: int, count: int, ok: bool = True, ttft_s: float = 0.01) -> list[Observation]:
        digest = artefact(number)["manifest_sha256"]
        return [Observation(digest, ok, ttft_s, 0.001, 5, 7, self.table.trial) for _ in range(count)]


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/champions.db"


@pytest.fixture
def engine(database: str):
    engine = open_database(database)
    yield engine
    engine.dispose()


@pytest.fixture
def endpoint(database: str) -> Endpoint:
    crown_one(database, 1)
    endpoint = Endpoint(database)
    endpoint.turn()
    return endpoint


def challenge(engine: Any, number: int = 2) -> None:
    proposed = propose(engine, MODEL, artefact(number), current_champion(engine, MODEL), "test")
    begin(engine, advance(engine, proposed, "checked"), PLAN)


def shown(table: RoutingTable) -> tuple[str | None, str | None, float]:
    champion, challenger = (route.version if route else None for route in (table.champion, table.challenger))
    return champion, challenger, table.share


# --- the champion -----------------------------------------------------------------------------------------------------


def test_champion_is_served_when_it_runs_and_not_before(database: str) -> None:
    endpoint = Endpoint(database)
    endpoint.turn(1)
    assert endpoint.table.champion is None
    assert "no champion yet" in endpoint.table.problem
    crown_one(database, 1)
    endpoint.supervisor.poll()
    endpoint.tell()
    assert endpoint.applications.words == {"v1": "DEPLOYING"}
    assert endpoint.table.champion is None
    endpoint.applications.ready()
    endpoint.turn(1)
    assert shown(endpoint.table) == ("1", None, 0.0)
    assert (endpoint.table.problem, endpoint.table.reign.epoch) == (None, 1)


def test_new_champion_is_swapped_in_and_the_old_one_ended_when_its_requests_are_done(
    endpoint: Endpoint, database: str
) -> None:
    crown_one(database, 2)
    endpoint.supervisor.poll()
    endpoint.tell(in_flight={"v1": 3})
    assert shown(endpoint.table)[0] == "1"
    endpoint.applications.ready()
    endpoint.supervisor.poll()
    endpoint.tell(in_flight={"v1": 3})  # it learns of the new table, three streams are still with the old version
    assert shown(endpoint.table)[0] == "2"
    endpoint.tell(in_flight={"v1": 1})
    endpoint.supervisor.poll()
    assert endpoint.applications.removed == []
    endpoint.tell()
    endpoint.supervisor.poll()
    assert endpoint.applications.removed == ["v1"]


def test_old_version_is_kept_for_a_router_that_does_not_know_the_new_table(endpoint: Endpoint, database: str) -> None:
    endpoint.supervisor.exchange("slow", [], {}, endpoint.table.number)
    crown_one(database, 2)
    endpoint.turn()
    assert endpoint.applications.removed == []
    endpoint.now += 31  # and that was not heard of since
    endpoint.turn()
    assert endpoint.applications.removed == ["v1"]


def test_supervisor_started_anew_hears_the_routers_before_it_ends_anything(endpoint: Endpoint, database: str) -> None:
    crown_one(database, 2)
    endpoint.turn(2)
    again = Supervisor(EndpointArguments(model_name=MODEL, database=database), endpoint.applications, lambda: 0.0)
    again.poll()
    assert endpoint.applications.removed == []
    again.exchange("r", [], {"v1": 1}, endpoint.table.number)
    again.poll()
    assert endpoint.applications.removed == []
    again.exchange("r", [], {}, endpoint.table.number)
    again.poll()
    assert endpoint.applications.removed == ["v1"]
    assert endpoint.applications.started == ["v1", "v2"], "what runs already is not started again"


def test_previous_champion_is_kept_for_a_rollback_if_asked(database: str) -> None:
    endpoint = Endpoint(database, keep_previous=True)
    for number in (1, 2, 3):
        crown_one(database, number)
        endpoint.turn(4)
        assert shown(endpoint.table)[0] == str(number)
    assert endpoint.applications.removed == ["v1"]
    rollback_without_files(database, "sqlite:////nowhere/mlflow.db")
    endpoint.supervisor.poll()
    endpoint.tell()
    assert shown(endpoint.table)[0] == "2", "at the first look"
    endpoint.turn()
    assert endpoint.applications.started == ["v1", "v2", "v3"]


def test_damaged_champion_leaves_the_old_one_and_is_tried_again_later(
    endpoint: Endpoint, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(following.time, "monotonic", lambda: now[0])
    endpoint.applications.failing["v2"] = CorruptArtifact("model.safetensors has another sha256")
    crown_one(database, 2)
    endpoint.turn(4)
    assert shown(endpoint.table)[0] == "1"
    assert endpoint.table.problem == "version 2 is refused: its files do not match its manifest; version 1 stays"
    assert endpoint.applications.started == ["v1", "v2"]
    endpoint.applications.failing.clear()
    now[0] += 5
    endpoint.turn()
    assert shown(endpoint.table)[0] == "2"
    assert endpoint.table.problem is None


def test_champion_that_finds_no_room_says_so(endpoint: Endpoint, database: str) -> None:
    crown_one(database, 2)
    endpoint.supervisor.poll()
    endpoint.now += 61
    endpoint.supervisor.poll()
    endpoint.tell()
    assert shown(endpoint.table)[0] == "1"
    assert "version 2 has been starting for over 60 s" in endpoint.table.problem


def test_champion_without_a_replica_is_said_after_a_while_and_served_when_it_is_back(endpoint: Endpoint) -> None:
    endpoint.applications.words["v1"] = "UNHEALTHY"
    endpoint.turn(1)
    assert (endpoint.table.stalled, endpoint.table.problem) == (False, None), "it is being replaced"
    endpoint.now += 21
    endpoint.turn(1)
    assert endpoint.table.stalled
    assert endpoint.table.problem == "version 1 has no replica that runs; Serve tries to start one"
    endpoint.applications.words["v1"] = "RUNNING"
    endpoint.turn(1)
    assert (endpoint.table.stalled, endpoint.table.problem) == (False, None)


def test_poll_survives_a_database_that_is_away(endpoint: Endpoint, database: str) -> None:
    path = Path(database.removeprefix("sqlite:///"))
    content = path.read_bytes()
    path.write_bytes(b"not a database")
    endpoint.turn(1)
    assert shown(endpoint.table)[0] == "1"
    assert "database cannot be read" in endpoint.table.problem
    path.write_bytes(content)
    endpoint.turn(1)
    assert endpoint.table.problem is None


def test_rollbacks_and_promotions_ten_times_are_followed(endpoint: Endpoint, database: str) -> None:
    nowhere = "sqlite:////nowhere/mlflow.db"
    crown_one(database, 2)
    for turn in range(10):
        endpoint.turn()
        assert (shown(endpoint.table)[0], endpoint.table.reign.epoch) == ("2", 2 + 2 * turn)
        rollback_without_files(database, nowhere)
        endpoint.turn()
        assert (shown(endpoint.table)[0], endpoint.table.reign.epoch) == ("1", 3 + 2 * turn)
        crown_one(database, 2)


def rollback_without_files(database: str, tracking: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.rollback.check_version", lambda uri, digest: None)
        rollback(MODEL, database, tracking)


# --- the canary -------------------------------------------------------------------------------------------------------


def test_healthy_challenger_rises_and_reigns(endpoint: Endpoint, engine: Any) -> None:
    challenge(engine)
    endpoint.turn()
    shares = []
    for _ in range(2):
        shares.append(endpoint.table.share)
        endpoint.tell(*endpoint.answers(2, 25), *endpoint.answers(1, 75))
        assert endpoint.supervisor.urgent.is_set() is False, "its time is not over"
        endpoint.now += 11
        endpoint.tell()
        assert endpoint.supervisor.urgent.is_set()
        endpoint.turn()
    assert shares == [0.1, 0.5]
    assert shown(endpoint.table) == ("2", None, 0.0)
    assert endpoint.applications.started == ["v1", "v2"]
    assert endpoint.applications.removed == ["v1"]
    assert latest_canary(engine, MODEL).state == "passed"
    assert [item.state for item in history(engine, MODEL)] == ["crowned", "crowned"]


def test_failing_challenger_is_out_of_the_table_with_the_exchange_that_saw_it(endpoint: Endpoint, engine: Any) -> None:
    challenge(engine)
    endpoint.turn()
    assert shown(endpoint.table) == ("1", "2", 0.1)
    endpoint.tell(*endpoint.answers(2, 3, ok=False))
    assert shown(endpoint.table) == ("1", None, 0.0)
    assert running_canary(engine, MODEL) is not None, "the weights come first, the row second"
    endpoint.turn()
    ended = latest_canary(engine, MODEL)
    assert (ended.state, ended.reason) == ("failed", "error rate: 3 of 3 answers failed, at most 5.0% may")
    assert json.loads(ended.figures)["errors"] == 3
    assert [item.state for item in history(engine, MODEL)] == ["crowned", "rolled_back"]
    assert endpoint.applications.removed == ["v2"]
    assert shown(endpoint.table) == ("1", None, 0.0)


def test_challenger_stays_out_while_the_database_is_away(endpoint: Endpoint, engine: Any, database: str) -> None:
    challenge(engine)
    endpoint.turn()
    path = Path(database.removeprefix("sqlite:///"))
    content = path.read_bytes()
    path.write_bytes(b"not a database")
    endpoint.tell(*endpoint.answers(2, 3, ok=False))
    endpoint.turn()
    assert shown(endpoint.table) == ("1", None, 0.0)
    path.write_bytes(content)
    endpoint.turn()
    assert shown(endpoint.table) == ("1", None, 0.0)
    assert latest_canary(engine, MODEL).state == "failed"


def test_too_little_traffic_moves_nothing(endpoint: Endpoint, engine: Any) -> None:
    challenge(engine)
    endpoint.turn()
    endpoint.tell(*endpoint.answers(2, 19), *endpoint.answers(1, 100))
    endpoint.now += 10_000
    endpoint.turn(5)
    assert shown(endpoint.table) == ("1", "2", 0.1)
    assert endpoint.traffic["canary"]["state"] == "too little traffic: 19 of 20 answers"


def test_answers_of_another_step_do_not_count(endpoint: Endpoint, engine: Any) -> None:
    challenge(engine)
    endpoint.turn()
    first = endpoint.answers(2, 3, ok=False)
    endpoint.tell(*endpoint.answers(2, 25), *endpoint.answers(1, 75))
    endpoint.now += 11
    endpoint.tell()
    endpoint.turn()
    assert endpoint.table.share == 0.5
    endpoint.tell(*first)
    assert endpoint.table.share == 0.5


@pytest.mark.parametrize("error", [CorruptArtifact("x"), RuntimeError("no connection")])
def test_challenger_that_cannot_be_started_is_taken_down(endpoint: Endpoint, engine: Any, error: Exception) -> None:
    endpoint.applications.failing["v2"] = error
    challenge(engine)
    for _ in range(8):
        endpoint.turn(2)
        endpoint.now += 20
    ended = latest_canary(engine, MODEL)
    damaged = isinstance(error, CorruptArtifact)
    assert ended.state == "failed"
    assert ended.reason == ("its files do not match its manifest" if damaged else "it cannot be loaded (RuntimeError)")
    assert endpoint.applications.started.count("v2") == (1 if damaged else 3)
    assert shown(endpoint.table) == ("1", None, 0.0)


def test_second_endpoint_agrees_and_a_restarted_one_goes_on_where_it_was(
    endpoint: Endpoint, engine: Any, database: str
) -> None:
    challenge(engine)
    other = Endpoint(database)
    for one in (endpoint, other):
        one.turn()
        assert shown(one.table) == ("1", "2", 0.1)
    endpoint.tell(*endpoint.answers(2, 25), *endpoint.answers(1, 75))
    endpoint.now += 11
    endpoint.tell()
    endpoint.turn()
    other.turn()
    assert (endpoint.table.share, other.table.share) == (0.5, 0.5)
    restarted = Endpoint(database)
    restarted.turn()
    assert shown(restarted.table) == ("1", "2", 0.5)
    other.tell(*other.answers(2, 3, ok=False))
    other.turn()
    endpoint.turn()
    assert shown(endpoint.table) == shown(other.table) == ("1", None, 0.0)


def test_canary_that_is_ended_by_hand_is_dropped(endpoint: Endpoint, engine: Any, database: str) -> None:
    challenge(engine)
    endpoint.turn()
    ended = end_running_canary(MODEL, database, "sqlite:////nowhere/mlflow.db")
    assert ended is not None
    assert "with `raystill rollback`" in ended.reason
    endpoint.turn()
    assert shown(endpoint.table) == ("1", None, 0.0)
    assert end_running_canary(MODEL, database, "sqlite:////nowhere/mlflow.db") is None


def test_canary_ends_when_another_version_becomes_champion(endpoint: Endpoint, engine: Any, database: str) -> None:
    challenge(engine)
    endpoint.turn()
    crown_one(database, 3)
    endpoint.turn(4)
    assert shown(endpoint.table) == ("3", None, 0.0)
    assert latest_canary(engine, MODEL).state == "overtaken"
    assert sorted(endpoint.applications.removed) == ["v1", "v2"]
    assert end_canary(engine, latest_canary(engine, MODEL), "failed", "late") is None


def test_traffic_says_shares_and_figures_of_each_version(endpoint: Endpoint, engine: Any) -> None:
    challenge(engine)
    endpoint.turn()
    endpoint.tell(*endpoint.answers(2, 4), *endpoint.answers(1, 10), *endpoint.answers(1, 1, ok=False))
    endpoint.now += 5
    endpoint.tell()
    first, second = endpoint.traffic["versions"]
    assert (first["version"], first["alias"], first["share"], first["scheme"]) == ("1", "champion", 0.9, "float")
    assert (second["version"], second["alias"], second["share"]) == ("2", "challenger", 0.1)
    assert (first["requests"], first["errors"], second["requests"], second["errors"]) == (11, 1, 4, 0)
    assert (first["ttft_p50_s"], first["ttft_p99_s"]) == (0.01, 0.01)
    assert second["tokens_per_s"] == pytest.approx(4 * 7 / 5)
    assert endpoint.traffic["canary"]["steps"] == [0.1, 0.5]
    assert json.loads(json.dumps(endpoint.traffic)) == endpoint.traffic
    endpoint.now += 61
    endpoint.tell()
    assert endpoint.traffic["versions"][0]["ttft_p50_s"] is None
    assert endpoint.traffic["versions"][0]["requests"] == 11
