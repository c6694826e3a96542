"""The supervisor and a canary: its steps, what takes it down, and what is written when."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.canaries import end_canary, latest_canary, mark_canary_announced, running_canary
from cluster.champions import current_champion
from cluster.errors import CorruptArtifact
from cluster.promotions import crown, find_promotion, history
from jobs.rollback import end_running_canary
from services.endpoint.canary import Observation
from services.endpoint.schema import EndpointArguments
from services.endpoint.supervisor import Supervisor
from tests.promotion_races import MODEL, artefact, crown_one
from tests.unit.test_endpoint_supervisor import Endpoint, challenge, database, endpoint, engine, shown

__all__ = ["database", "endpoint", "engine"]  # fixtures


def test_challenger_is_not_crowned_on_the_evidence_of_the_one_before(endpoint: Endpoint, engine: Any) -> None:
    challenge(engine)
    endpoint.turn()
    endpoint.tell(*endpoint.answers(2, 25), *endpoint.answers(1, 25))
    endpoint.now += 11
    endpoint.tell()  # decided: a step up; not yet written
    end_canary(engine, running_canary(engine, MODEL), "ended", "by hand")
    challenge(engine, 3)
    endpoint.supervisor.poll()
    found = latest_canary(engine, MODEL)
    assert (found.version, found.state, found.step) == ("3", "running", 0)
    assert current_champion(engine, MODEL).version == "1"


def test_message_that_is_repeated_counts_once(endpoint: Endpoint, engine: Any) -> None:
    challenge(engine)
    endpoint.turn()
    seen = endpoint.answers(2, 1, ok=False)
    for _ in range(3):
        endpoint.supervisor.exchange("other", 1, seen, {}, endpoint.table.number)
    endpoint.tell()
    assert endpoint.traffic["versions"][1]["errors"] == 1
    assert shown(endpoint.table)[1] == "2"


def test_clients_that_leave_count_by_their_time_alone(endpoint: Endpoint, engine: Any) -> None:
    challenge(engine)
    endpoint.turn()
    digest = artefact(2)["manifest_sha256"]
    left = [Observation(digest, True, ttft_s=30.0, trial=endpoint.table.trial, departed=True) for _ in range(12)]
    endpoint.tell(*endpoint.answers(1, 25), *left)
    endpoint.turn()
    ended = latest_canary(engine, MODEL)
    assert ended.state == "failed"
    assert "time to first token" in ended.reason
    assert json.loads(ended.figures)["requests"] == 0


def test_what_judges_is_there_before_a_challenger_has_traffic(
    endpoint: Endpoint, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "scipy.stats", raising=False)
    challenge(engine)
    endpoint.turn()
    assert shown(endpoint.table) == ("1", "2", 0.1)
    assert "scipy.stats" in sys.modules


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


class Guarded(Supervisor):
    """Notes what is set without the lock that guards it while routers ask."""

    unguarded: tuple[str, ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_starting", "_trial", "_table") and hasattr(self, "urgent") and not self._lock.locked():
            self.unguarded += (name,)
        super().__setattr__(name, value)


def test_what_routers_are_told_is_set_with_the_lock_held(endpoint: Endpoint, engine: Any, database: str) -> None:
    arguments = EndpointArguments(model_name=MODEL, database=database)
    endpoint.supervisor = supervisor = Guarded(arguments, endpoint.applications, lambda: endpoint.now)
    endpoint.turn()
    endpoint.applications.failing["v2"] = RuntimeError("no connection")
    for number in (2, 3):
        challenge(engine, number)
        look(endpoint)
        for _ in range(8):
            endpoint.turn(2)
            endpoint.now += 20
    assert shown(endpoint.table) == ("1", "3", 0.1)
    assert supervisor.unguarded == ()


def test_challenger_that_finds_no_room_says_so_and_is_ended_after_a_while(endpoint: Endpoint, engine: Any) -> None:
    challenge(engine)
    look(endpoint)
    assert endpoint.traffic["canary"]["state"] == "it is starting"
    endpoint.now += 61
    look(endpoint)
    said = endpoint.traffic["canary"]
    assert (said["version"], said["step"], said["steps"]) == ("2", 0, [0.1, 0.5])
    assert said["state"] == "it has been starting for 61 s: is there a free CPU for it?"
    assert endpoint.table.problem is None, "the champion is well"
    endpoint.now += 530
    look(endpoint)
    assert running_canary(engine, MODEL) is not None
    endpoint.now += 10
    look(endpoint)
    ended = latest_canary(engine, MODEL)
    assert (ended.state, ended.reason) == ("ended", "it had been starting for over 600 s: is there a free CPU for it?")
    assert [item.state for item in history(engine, MODEL)] == ["crowned", "abandoned"]
    assert (endpoint.traffic["canary"], endpoint.table.problem) == (None, None)
    look(endpoint)
    assert endpoint.applications.removed == ["v2"]
    challenge(engine, 3)
    endpoint.turn()
    assert shown(endpoint.table) == ("1", "3", 0.1)
    assert endpoint.traffic["canary"]["state"] != "it is starting"


def test_each_challenger_and_each_attempt_has_its_own_time_to_start(endpoint: Endpoint, engine: Any) -> None:
    challenge(engine)
    look(endpoint)
    endpoint.now += 599
    look(endpoint)
    end_canary(engine, running_canary(engine, MODEL), "ended", "by hand")
    look(endpoint)
    assert endpoint.traffic["canary"] is None
    challenge(engine, 3)
    look(endpoint)
    endpoint.now += 599
    look(endpoint)
    endpoint.applications.fail("v3", RuntimeError("no connection"))
    look(endpoint)
    assert endpoint.traffic["canary"] is None
    endpoint.applications.failing.clear()
    endpoint.now += 20
    look(endpoint)
    assert endpoint.traffic["canary"]["state"] == "it is starting"
    assert running_canary(engine, MODEL) is not None


def test_mlflow_is_told_of_a_challenger_that_found_no_room(
    endpoint: Endpoint, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(
        endpoint.supervisor, "_announce_later", lambda engine: told.append(latest_canary(engine, MODEL))
    )
    challenge(engine)
    look(endpoint)
    endpoint.now += 601
    look(endpoint)
    assert [canary.state for canary in told] == ["running", "ended"]


def test_challenger_that_lost_its_last_replica_is_ended_after_a_while(endpoint: Endpoint, engine: Any) -> None:
    challenge(engine)
    endpoint.turn()
    for lost_s in (599, 599):  # each time it comes back at last
        endpoint.applications.words["v2"] = "UNHEALTHY"
        look(endpoint)
        endpoint.now += lost_s
        look(endpoint)
        assert endpoint.traffic["canary"]["state"] == "no replica of it runs, for 599 s: is there a free CPU for it?"
        endpoint.applications.words["v2"] = "RUNNING"
        look(endpoint)
        assert endpoint.traffic["canary"]["state"] == "too little traffic: 0 of 20 answers"
    endpoint.applications.words["v2"] = "UNHEALTHY"
    look(endpoint)
    endpoint.now += 600
    look(endpoint)
    ended = latest_canary(engine, MODEL)
    assert (ended.state, ended.reason) == ("ended", "no replica of it ran for over 600 s: is there a free CPU for it?")
    assert shown(endpoint.table) == ("1", None, 0.0)
    look(endpoint)
    assert endpoint.applications.removed == ["v2"]
    challenge(engine, 3)
    endpoint.turn()
    assert shown(endpoint.table) == ("1", "3", 0.1)


def test_endpoint_that_is_started_again_tells_mlflow_once_what_was_not_said(
    endpoint: Endpoint, engine: Any, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(Supervisor, "_announce_later", lambda self, engine: told.append(latest_canary(engine, MODEL)))
    challenge(engine)
    crown(engine, find_promotion(engine, running_canary(engine, MODEL).promotion_id))  # and then its process died
    restarted = Endpoint(database)
    restarted.turn()
    assert [canary.state for canary in told] == ["passed"]
    mark_canary_announced(engine, told[0])
    Endpoint(database).turn()
    assert len(told) == 1


def look(endpoint: Endpoint) -> None:
    """A poll, after which nothing becomes ready."""
    endpoint.supervisor.poll()
    endpoint.tell()


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
    endpoint.tell(Observation("teacher", True, 0.2, 0.001, 5, 7), Observation("teacher", False))
    teacher = endpoint.traffic["teacher"]
    assert (teacher["requests"], teacher["errors"], teacher["ttft_p50_s"]) == (2, 1, 0.2)
    first, second = endpoint.traffic["versions"]
    assert (first["errors"], second["errors"]) == (1, 0), "what the teacher does is held against no version"
    assert (first["ttft_p50_s"], first["ttft_p99_s"]) == (0.01, 0.01)
    assert second["tokens_per_s"] == pytest.approx(4 * 7 / 5)
    assert endpoint.traffic["canary"]["steps"] == [0.1, 0.5]
    assert json.loads(json.dumps(endpoint.traffic)) == endpoint.traffic
    endpoint.now += 61
    endpoint.tell()
    assert endpoint.traffic["versions"][0]["ttft_p50_s"] is None
    assert endpoint.traffic["versions"][0]["requests"] == 11
