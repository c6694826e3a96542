"""The spot watcher against a local server that answers as EC2's metadata service does."""

import time

import pytest

from cluster.errors import ClusterUnreachable
from cluster.spot import InstanceMetadata, drain_node, watch
from tests.command_line import free_port
from tests.instance_metadata import REBALANCE, Service


@pytest.fixture
def service():
    started = Service()
    yield started
    started.close()


def test_notice_is_none_until_there_is_one(service):
    metadata = InstanceMetadata(service.endpoint)
    assert metadata.notice() is None
    service.says[REBALANCE] = '{"noticeTime": "2026-11-21T08:22:00Z"}'
    assert metadata.notice().kind == "rebalance"
    service.announces(120)
    notice = metadata.notice()
    assert notice.kind == "termination"
    assert 115 < notice.remaining_s(time.time()) <= 120
    assert len(service.tokens) == 1, "one token serves many questions"


def test_notice_token_that_ran_out_is_renewed(service):
    metadata = InstanceMetadata(service.endpoint)
    metadata.notice()
    service.tokens.clear()
    service.announces(60)
    assert metadata.notice().kind == "termination"


def test_metadata_without_a_server_says_what_it_may_be():
    with pytest.raises(ClusterUnreachable, match="no EC2 instance, or a container"):
        watch(InstanceMetadata(f"http://127.0.0.1:{free_port()}"), lambda reason, left: None)


def test_watch_drains_on_termination_and_ends(service):
    drained, waits = [], []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            service.announces(90)

    notice = watch(InstanceMetadata(service.endpoint), lambda reason, left: drained.append(left), wait=wait)
    assert notice.kind == "termination"
    assert len(drained) == 1
    assert 85 <= drained[0] <= 90
    assert waits == [5.0] * 3


@pytest.mark.parametrize(("rebalance_s", "expected"), [(600, [600, 30]), (0, [30])])
def test_watch_recommendation_drains_once_and_ends_with_the_termination(service, rebalance_s, expected):
    drained, waits = [], []
    service.says[REBALANCE] = "{}"

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 4:
            service.announces(30)

    watch(
        InstanceMetadata(service.endpoint),
        lambda reason, left: drained.append(left),
        rebalance_s=rebalance_s,
        wait=wait,
    )
    assert [round(left, -1) for left in drained] == expected


def test_watch_asks_again_where_head_or_metadata_fail_for_a_moment(service):
    drained, waits = [], []
    service.announces(100)

    def drain(reason, left):
        drained.append(left)
        if len(drained) < 3:
            raise ClusterUnreachable("the head is away")

    watch(InstanceMetadata(service.endpoint), drain, wait=waits.append)
    assert len(drained) == 3
    assert len(waits) == 2


@pytest.mark.parametrize("status", [429, 503])
def test_watch_goes_on_where_a_token_is_refused_for_a_moment(service, status):
    """The first token of all, and each renewal."""
    drained, waits = [], []
    service.refusals = [status, status]

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            service.tokens.clear()
            service.refusals = [status]
            service.announces(90)

    watch(InstanceMetadata(service.endpoint), lambda reason, left: drained.append(left), wait=wait)
    assert len(drained) == 1
    assert not service.refusals


def test_watch_where_no_token_is_given_says_so(service):
    service.refusals = [403]
    with pytest.raises(ClusterUnreachable, match="HTTP 403 for /latest/api/token"):
        watch(InstanceMetadata(service.endpoint), lambda reason, left: None)


def test_drain_that_no_cluster_takes_is_an_error():
    with pytest.raises(ClusterUnreachable, match=r"was not drained|no answer"):
        drain_node(f"127.0.0.1:{free_port()}", "zz", "test", 5)
