"""The canary's row: one at a time, each change by whoever saw the last one, and whole whenever a process dies."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import Engine

from cluster import canaries
from cluster.canaries import (
    Canary,
    begin,
    crown_canary,
    end_canary,
    latest_canary,
    mark_canary_announced,
    next_step,
    running_canary,
    taken_down_before,
)
from cluster.champions import current_champion, open_database
from cluster.errors import PromotionRefused
from cluster.promotions import advance, crown, find_promotion, history, propose
from tests.promotion_races import MODEL, artefact, crown_one

PLAN = {"steps": [0.05, 0.25, 0.5]}


@pytest.fixture
def engine(tmp_path: Path):
    crown_one(f"sqlite:///{tmp_path}/champions.db", 1)
    engine = open_database(f"sqlite:///{tmp_path}/champions.db")
    yield engine
    engine.dispose()


def started(engine: Engine, number: int = 2) -> Canary:
    proposed = propose(engine, MODEL, artefact(number), current_champion(engine, MODEL), "test")
    return begin(engine, advance(engine, proposed, "checked"), PLAN)


def states(engine: Engine) -> list[str]:
    return [item.state for item in history(engine, MODEL)]


def test_canary_goes_up_step_by_step_and_is_crowned(engine: Engine) -> None:
    canary = started(engine)
    assert (canary.share, running_canary(engine, MODEL)) == (0.05, canary)
    assert current_champion(engine, MODEL).version == "1"
    for share in (0.25, 0.5):
        canary = next_step(engine, canary, {"requests": 60})
        assert canary.share == share
    assert json.loads(canary.figures) == {"requests": 60}
    champion = crown_canary(engine, canary, {"requests": 99})
    assert (champion.version, champion.epoch) == ("2", 2)
    assert current_champion(engine, MODEL) == champion
    ended = latest_canary(engine, MODEL)
    assert (ended.state, ended.share, running_canary(engine, MODEL)) == ("passed", 0.0, None)
    assert states(engine) == ["crowned", "crowned"]


def test_canary_that_failed_leaves_the_champion_and_is_remembered(engine: Engine) -> None:
    canary = started(engine)
    ended = end_canary(engine, canary, "failed", "error rate: 3 of 3", {"errors": 3})
    assert (ended.state, ended.share) == ("failed", 0.0)
    assert current_champion(engine, MODEL).version == "1"
    assert states(engine) == ["crowned", "rolled_back"]
    before = taken_down_before(engine, MODEL, lambda item: item.manifest_sha256 == canary.manifest_sha256)
    assert before.reason == "error rate: 3 of 3"
    assert taken_down_before(engine, MODEL, lambda item: item.version == "3") is None
    crown_one(engine.url.render_as_string(hide_password=False), 2)  # forced, and it reigned
    assert taken_down_before(engine, MODEL, lambda item: item.manifest_sha256 == canary.manifest_sha256) is None


def test_second_canary_waits_for_the_end_of_the_first(engine: Engine) -> None:
    first = started(engine)
    with pytest.raises(PromotionRefused, match=r"version 2 \(5% of the traffic\) is a canary now"):
        started(engine, 3)
    assert running_canary(engine, MODEL) == first
    end_canary(engine, first, "ended", "by hand")
    assert states(engine)[1:] == ["abandoned", "checked"]
    assert started(engine, 3).version == "3"


def test_change_of_a_canary_that_was_changed_meanwhile_is_none(engine: Engine) -> None:
    seen = started(engine)
    moved = next_step(engine, seen, {})
    assert moved is not None
    assert next_step(engine, seen, {}) is None
    assert end_canary(engine, seen, "failed", "late") is None
    assert running_canary(engine, MODEL) == moved
    assert end_canary(engine, moved, "failed", "first") is not None
    assert end_canary(engine, moved, "failed", "second") is None
    assert crown_canary(engine, moved, {}) is None
    assert latest_canary(engine, MODEL).reason == "first"
    assert current_champion(engine, MODEL).version == "1"


def test_canary_is_overtaken_by_another_champion(engine: Engine) -> None:
    canary = started(engine)
    crown_one(engine.url.render_as_string(hide_password=False), 3)
    assert crown_canary(engine, canary, {}) is None
    assert running_canary(engine, MODEL) is None
    assert latest_canary(engine, MODEL).state == "overtaken"
    assert latest_canary(engine, MODEL).reason == "version 3 became champion meanwhile"
    assert states(engine) == ["crowned", "lost", "crowned"]
    assert current_champion(engine, MODEL).version == "3"


def test_crown_that_was_broken_off_is_settled_by_the_next_look(engine: Engine) -> None:
    canary = started(engine)
    crown(engine, find_promotion(engine, canary.promotion_id))  # and then its process died
    assert latest_canary(engine, MODEL).state == "running"
    assert running_canary(engine, MODEL) is None
    assert latest_canary(engine, MODEL).state == "passed"
    assert current_champion(engine, MODEL).version == "2"


def test_two_that_begin_or_decide_at_once_have_one_winner(engine: Engine) -> None:
    def both(*works: Callable[[], Any]) -> list[Any]:
        start = Barrier(2)

        def outcome(work: Callable[[], Any]) -> Any:
            start.wait(60)
            try:
                return work()
            except PromotionRefused:
                return None

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(outcome, works))

    for turn in range(5):
        begun = both(lambda: started(engine, 2), lambda: started(engine, 3))
        assert begun.count(None) == 1
        canary = running_canary(engine, MODEL)
        assert canary in begun
        crowned, ended = both(
            partial(crown_canary, engine, canary, {}), partial(end_canary, engine, canary, "failed", f"turn {turn}")
        )
        assert (crowned is None) != (ended is None)
        assert running_canary(engine, MODEL) is None
        decided = find_promotion(engine, canary.promotion_id)
        assert (decided.state, latest_canary(engine, MODEL).state) == (
            ("crowned", "passed") if ended is None else ("rolled_back", "failed")
        )
        assert (current_champion(engine, MODEL) == crowned) == (ended is None)


def test_canary_whose_promotion_was_taken_away_does_not_begin(engine: Engine) -> None:
    proposed = propose(engine, MODEL, artefact(2), current_champion(engine, MODEL), "test")
    checked = advance(engine, proposed, "checked")
    advance(engine, checked, "abandoned", reason="its process ended")
    with pytest.raises(PromotionRefused, match="abandoned meanwhile"):
        begin(engine, checked, PLAN)
    assert latest_canary(engine, MODEL) is None


def test_announced_is_of_one_state(engine: Engine) -> None:
    canary = started(engine)
    assert not canary.announced
    mark_canary_announced(engine, canary)
    assert latest_canary(engine, MODEL).announced
    moved = next_step(engine, canary, {})
    assert not latest_canary(engine, MODEL).announced
    mark_canary_announced(engine, canary)  # too late: of the state before
    assert not latest_canary(engine, MODEL).announced
    assert moved.artefact.epoch == 0
    assert canaries.Canary(**vars(moved)) == moved
