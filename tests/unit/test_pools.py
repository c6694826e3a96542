"""Pools, and how long a worker group is waited for."""

import os

import pytest

from cluster.pools import waiting_for_places

NAME = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


@pytest.mark.parametrize(("count", "seconds"), [(4, 600), ((1, 4), 20)])
def test_elastic_group_is_counted_anew_soon(count, seconds, monkeypatch):
    monkeypatch.delenv(NAME, raising=False)
    with waiting_for_places(count):
        assert float(os.environ[NAME]) == seconds
    assert NAME not in os.environ  # the next training in this process may be of the other kind


def test_time_of_the_environment_stays(monkeypatch):
    monkeypatch.setenv(NAME, "75")
    with waiting_for_places((1, 4)):
        assert os.environ[NAME] == "75"
    assert os.environ[NAME] == "75"


def test_ray_train_reads_it_where_training_starts():
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE, WORKER_GROUP_START_TIMEOUT_S_ENV_VAR

    assert WORKER_GROUP_START_TIMEOUT_S_ENV_VAR == NAME
    assert NAME in ENV_VARS_TO_PROPAGATE
