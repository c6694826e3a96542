"""A canary whose process is killed on the way: the next start finds it whole, finishes it or leaves it where it was.

Death between two writes is an exception that nothing catches; where the code would notice that one, a real SIGKILL.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from cluster import canaries, crowning, promotions
from cluster.canaries import crown_canary, end_canary, latest_canary, next_step, running_canary
from cluster.champions import current_champion, find_champion, opened
from cluster.crowning import announce, settle
from cluster.promotions import history
from cluster.registry import find_version, list_versions, point_challenger, tag_version
from jobs.config import PromoteConfig
from jobs.promote import promote
from services.endpoint.schema import CanaryConfig
from tests.promotion_races import GOOD, MODEL, do_and_die
from tests.unit.test_promotions import registry

__all__ = ["registry"]  # a fixture
PLAN = CanaryConfig(steps=[0.2, 0.5], max_latency_ratio=None)
STATES = {"up": ("running", "canary"), "crown": ("passed", "announced"), "down": ("failed", "rolled_back")}


class Killed(BaseException):
    pass


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/champions.db"


def die_at(monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str], after: bool, work: Callable[[], Any]) -> None:
    """Calls `work`, which comes no further than to just before or after `place`."""
    whole = getattr(*place)

    def dying(*arguments: Any, **named: Any) -> Any:
        if after:
            whole(*arguments, **named)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(*place, dying)
        with pytest.raises(Killed):
            work()


def begin(database: str, tracking: str, version: dict[str, str]) -> None:
    promote(PromoteConfig(), MODEL, version, GOOD, GOOD, database, tracking, canary=PLAN)


def decide(what: str, database: str, tracking: str) -> None:
    """As the endpoint does it: the row, then what MLflow has of it."""
    with opened(database) as engine:
        canary = running_canary(engine, MODEL)
        assert canary is not None
        if what == "up":
            next_step(engine, canary, {"requests": 60})
        elif what == "crown":
            crown_canary(engine, canary, {"requests": 60})
        else:
            end_canary(engine, canary, "failed", "slow", {"requests": 60})
        announce(engine, MODEL, tracking)


@pytest.fixture
def reigning(database: str, registry: Any) -> tuple[str, dict[str, str]]:
    """Version 1 is champion and nothing is said of a canary; returns the registry and version 2."""
    tracking, (first, second) = registry
    point_challenger(tracking, MODEL, None)
    tag_version(tracking, MODEL, "2", {"canary": "", "canary_reason": ""})
    promote(PromoteConfig(), MODEL, first, GOOD, GOOD, database, tracking)
    return tracking, second


def check(engine: Engine, tracking: str, what: str, step: int, champion: str) -> None:
    """Rows and MLflow say the same, and it is this."""
    canary, aliases = latest_canary(engine, MODEL), {"champion": champion}
    assert canary is not None
    promotion = history(engine, MODEL)[-1]
    assert (canary.state, promotion.state, canary.step) == (*STATES[what], step)
    assert current_champion(engine, MODEL).version == champion
    if canary.state == "running":
        aliases["challenger"] = "2"
    assert {alias: item.version for item in list_versions(tracking, MODEL) for alias in item.aliases} == aliases
    tags = find_version(tracking, MODEL, "2").tags
    said = f"running, {PLAN.steps[step]:.0%} of the traffic" if canary.state == "running" else canary.state
    assert (tags["canary"], tags["canary_reason"]) == (said, canary.reason)
    assert canary.announced


def test_state_that_is_written_late_gives_way_to_the_newer_one(
    database: str, reigning: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking, second = reigning
    whole = crowning.point_challenger

    def late(*arguments: Any) -> None:
        monkeypatch.undo()
        decide("down", database, tracking)  # the endpoint takes it down and says so before the promotion has spoken
        whole(*arguments)

    monkeypatch.setattr(crowning, "point_challenger", late)
    begin(database, tracking, second)
    with opened(database) as engine:
        check(engine, tracking, "down", 0, "1")


IN_MLFLOW = [(crowning, "point_challenger"), (crowning, "tag_version"), (crowning, "mark_canary_announced")]
IN_SQL = {
    "up": [(canaries, "_changed")],
    "crown": [(canaries, "crown"), (promotions, "move"), (promotions, "_seat"), (canaries, "_changed")],
    "down": [(canaries, "_changed"), (canaries, "move")],
}
OF_THE_CHAMPION = [(crowning, "point_champion"), (crowning, "mark_announced")]
DECIDING_IN_SQL = [
    (what, place, after) for what, places in IN_SQL.items() for place in places for after in (False, True)
]
DECIDED = [  # after one is before the next
    (what, place) for what in IN_SQL for place in (*(OF_THE_CHAMPION if what == "crown" else []), *IN_MLFLOW)
]


def is_written(what: str, place: tuple[Any, str], after: bool) -> bool:
    """Whether the rows decide for it. The last write to the row of one that is crowned only repeats it."""
    return what == "crown" and (place == (canaries, "_changed") or (place == (canaries, "crown") and after))


@pytest.mark.parametrize(
    ("what", "place", "after"),
    DECIDING_IN_SQL,
    ids=[f"{what}-{place[1]}-{'after' if after else 'before'}" for what, place, after in DECIDING_IN_SQL],
)
def test_decision_killed_at_a_step_in_sql_is_settled_by_the_next_start(
    database: str, reigning: Any, monkeypatch: pytest.MonkeyPatch, what: str, place: tuple[Any, str], after: bool
) -> None:
    tracking, second = reigning
    begin(database, tracking, second)
    die_at(monkeypatch, place, after, partial(decide, what, database, tracking))
    settle(database, MODEL, tracking)
    with opened(database) as engine:
        if not is_written(what, place, after):
            check(engine, tracking, "up", 0, "1")
            decide(what, database, tracking)
        check(engine, tracking, what, 1 if what == "up" else 0, "2" if what == "crown" else "1")


@pytest.mark.parametrize(("what", "place"), DECIDED, ids=[f"{what}-{place[1]}" for what, place in DECIDED])
def test_decision_killed_before_mlflow_has_it_is_settled_by_the_next_start(
    database: str, reigning: Any, monkeypatch: pytest.MonkeyPatch, what: str, place: tuple[Any, str]
) -> None:
    tracking, second = reigning
    begin(database, tracking, second)
    die_at(monkeypatch, place, False, partial(decide, what, database, tracking))
    settle(database, MODEL, tracking)
    with opened(database) as engine:
        check(engine, tracking, what, 1 if what == "up" else 0, "2" if what == "crown" else "1")


@pytest.mark.parametrize("place", IN_MLFLOW, ids=[name for _, name in IN_MLFLOW])
def test_start_killed_when_its_row_is_written_is_settled_by_the_next_start(
    database: str, reigning: Any, monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str]
) -> None:
    tracking, second = reigning
    die_at(monkeypatch, place, False, partial(begin, database, tracking, second))
    settle(database, MODEL, tracking)
    with opened(database) as engine:
        check(engine, tracking, "up", 0, "1")


@pytest.mark.parametrize(("step", "after"), [("canary", False), ("canary_move", True), ("canary", True)])
def test_start_killed_at_a_step_is_abandoned_or_settled_by_the_next_start(
    database: str, reigning: Any, step: str, after: bool
) -> None:
    tracking, second = reigning
    do_and_die(step, after, begin, database, tracking, second)
    settle(database, MODEL, tracking)
    with opened(database) as engine:
        if (step, after) != ("canary", True):
            assert [item.state for item in history(engine, MODEL)] == ["announced", "abandoned"]
            assert latest_canary(engine, MODEL) is None
            assert find_champion(database, MODEL).version == "1"
            begin(database, tracking, second)
        check(engine, tracking, "up", 0, "1")
