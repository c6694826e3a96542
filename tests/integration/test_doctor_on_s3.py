"""The doctor's questions to a real S3 server: who may write, who may only read, and what time it is there."""

import pytest

from cluster.storage import open_storage
from jobs.examining.clock import check_clock
from jobs.examining.services import check_storage
from tests.s3_server import READER, READER_SECRET

pytestmark = pytest.mark.integration


def test_doctor_on_s3_says_which_right_is_missing(s3_server, monkeypatch):
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    [found] = check_storage("here", "s3://bucket/doctor")
    assert found.status == "ok", found
    assert not open_storage("s3://bucket/doctor").list()
    [clock] = check_clock("here", "s3://bucket/doctor")
    assert clock.status == "ok"
    assert "storage server" in clock.found

    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)
    [refused] = check_storage("here", "s3://bucket/doctor")
    assert (refused.what, refused.status) == ("storage, write", "failure")
    assert READER_SECRET not in refused.found
