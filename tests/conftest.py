"""Fixtures shared by all tests. Nothing here starts a process that a test did not ask for."""

# ruff: noqa: E402 - the environment comes before the imports that read it
import os
import sys

# A local Ray asks for a token; set before anything imports ray, so that every machine tests the same.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
for _name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "RAYSTILL_DATABASE_URL", "AWS_ENDPOINT_URL"):
    os.environ.pop(_name, None)

import pytest
import torch

from cluster.resources import process_environment

pytest_plugins = ["tests.conformance.points"]

os.environ.update({key: os.environ.get(key, value) for key, value in process_environment().items()})


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A real S3 server with a bucket named `bucket`."""
    from tests import s3_server

    if s3_server.programs() is None:
        pytest.skip("OpenStack Swift is not installed beside this Python, and RAYSTILL_SWIFT names no other place")
    with s3_server.running(tmp_path_factory.mktemp("s3")) as server:
        server.make_bucket("bucket")
        yield server


@pytest.fixture(scope="session")
def postgresql():
    """A real PostgreSQL server, which makes databases."""
    from tests import postgres_server

    if postgres_server.programs() is None:
        pytest.skip("PostgreSQL or psycopg is not installed, and RAYSTILL_POSTGRES names no directory with initdb")
    if not postgres_server.may_run():
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    with postgres_server.running() as server:
        yield server


@pytest.fixture(scope="session")
def forked_raystill():
    """Runs commands one after the other, each forked off a process that did the imports."""
    from tests.forked_commands import forked_commands

    with forked_commands() as raystill:
        yield raystill


@pytest.fixture(scope="module")
def one_thread():
    """Torch computes on one thread: tiny products are fastest so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def command() -> list[str]:
    """How to call raystill as a user would, in a process of its own."""
    return [sys.executable, "-m", "jobs"]
