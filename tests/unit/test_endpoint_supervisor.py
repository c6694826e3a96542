"""Who is brought up, swapped in, given a share, taken down and ended: the supervisor without Ray.

The versions' applications are stand-ins that start, fail and end as a test says; the rows are real.
"""

from pathlib import Path
from typing import Any

import pytest

from cluster.canaries import begin
from cluster.champions import Champion, current_champion, open_database
from cluster.errors import CorruptArtifact
from cluster.promotions import advance, propose
from jobs.rollback import rollback
from services.endpoint import following
from services.endpoint.applications import ApplicationState
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

    def states(self) -> dict[str, ApplicationState]:
        return {name: ApplicationState(word, "", int(word == "RUNNING")) for name, word in self.words.items()}

    def start(self, version: Champion) -> None:
        name = self.name_of(version)
        self.started.append(name)
        self.words[name] = "DEPLOY_FAILED" if name in self.failing else "DEPLOYING"
        self._last = name

    def ready(self) -> None:
        self.words = {name: "RUNNING" if word == "DEPLOYING" else word for name, word in self.words.items()}

    def fail(self, name: str, error: Exception) -> None:
        """One that was started fails."""
        self.words[name], self.failing[name], self._last = "DEPLOY_FAILED", error, name

    def route(self, version: Champion) -> Route:
        return Route(self.name_of(version), version.version, version.manifest_sha256, version.uri, "float", 200, 64)

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
        self.messages = 0

    def tell(self, *observations: Observation, in_flight: dict[str, int] | None = None, router: str = "r") -> None:
        seen = list(observations)
        self.messages += 1
        said = (self.messages, seen, in_flight or {}, self.table.number)
        self.table, self.traffic = self.supervisor.exchange(router, *said)

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
    endpoint.supervisor.exchange("slow", 1, [], {}, endpoint.table.number)
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
    table, _ = again.exchange("r", 1, [], {"v1": 1}, endpoint.table.number)
    again.poll()
    assert endpoint.applications.removed == []
    again.exchange("r", 2, [], {}, endpoint.table.number)
    again.poll()
    assert endpoint.applications.removed == [], "it still uses a table of the supervisor before"
    again.exchange("r", 3, [], {}, table.number)
    again.poll()
    assert endpoint.applications.removed == ["v1"]
    assert endpoint.applications.started == ["v1", "v2"], "what runs already is not started again"


def test_supervisor_started_anew_ends_nothing_before_the_champion_runs(endpoint: Endpoint, database: str) -> None:
    crown_one(database, 2)
    arguments = EndpointArguments(model_name=MODEL, database=database)
    endpoint.supervisor = Supervisor(arguments, endpoint.applications, lambda: endpoint.now)
    endpoint.applications.failing["v2"] = CorruptArtifact("model.safetensors has another sha256")
    before = endpoint.table.number
    for _ in range(3):
        endpoint.turn()
        endpoint.now += 40
    assert endpoint.table.champion is None, "a router goes on with the table that it has"
    assert "v1" not in endpoint.applications.removed
    assert endpoint.table.number > before


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
