"""The same canaries on a real PostgreSQL."""

import pytest

from cluster.champions import open_database
from tests.promotion_races import crown_one
from tests.unit.test_canaries import (  # noqa: F401 - they run here with this module's `engine`
    test_announced_is_of_one_state,
    test_canary_goes_up_step_by_step_and_is_crowned,
    test_canary_is_overtaken_by_another_champion,
    test_canary_that_failed_leaves_the_champion_and_is_remembered,
    test_canary_whose_promotion_was_taken_away_does_not_begin,
    test_change_of_a_canary_that_was_changed_meanwhile_is_none,
    test_crown_that_was_broken_off_is_settled_by_the_next_look,
    test_second_canary_waits_for_the_end_of_the_first,
    test_two_that_begin_or_decide_at_once_have_one_winner,
)
from tests.unit.test_canary_killed import (  # noqa: F401 - and with its `database`
    registry,
    reigning,
    test_decision_killed_at_a_step_in_sql_is_settled_by_the_next_start,
    test_start_killed_at_a_step_is_abandoned_or_settled_by_the_next_start,
)

pytestmark = pytest.mark.integration


@pytest.fixture
def database(postgresql, request):
    return postgresql.make_database(f"test_{abs(hash(request.node.name))}")


@pytest.fixture
def engine(database):
    crown_one(database, 1)
    engine = open_database(database)
    yield engine
    engine.dispose()
