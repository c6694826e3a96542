"""The same keys on a real PostgreSQL."""

import pytest

from tests.unit.test_api_keys import (  # noqa: F401 - they run here with this module's `database`
    test_key_of_more_than_200_bytes_is_not_read_further,
    test_numbers_are_not_used_again,
    test_processes_that_start_at_once_make_one_table,
    test_revoke_takes_id_name_or_key_and_refuses_what_is_not_one_key,
    test_states_follow_revocation_and_expiry,
    test_temporary_key_works_in_the_block_only_and_only_if_keys_are_asked_for,
    test_ten_thousand_guesses_find_no_key,
)

pytestmark = pytest.mark.integration


@pytest.fixture
def database(postgresql, request):
    return postgresql.make_database(f"test_{abs(hash(request.node.name))}")
