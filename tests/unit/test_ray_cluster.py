"""Nodes that the tests' cluster adds: one that is late is ended before another is begun. No Ray is started."""

import pytest

from tests import ray_cluster


class Cluster:
    """Fails the first times, either while a node is made or while it is waited for, as Ray's own does."""

    def __init__(self, failures, as_head):
        self.failures, self.as_head = list(failures), as_head
        self.worker_nodes, self.head_node = set(), None

    def add_node(self, **arguments):
        from ray._private.node import Node

        fails = self.failures.pop(0) if self.failures else None
        node = Node(fails == "made")
        if self.as_head:
            assert self.head_node is None, "a second node would be taken for a worker"
            self.head_node = node
        else:
            self.worker_nodes.add(node)
        if fails == "awaited":
            raise TimeoutError("not in the table")
        return node


@pytest.fixture
def nodes(monkeypatch):
    """Those that were made, and those that were ended."""
    from ray._private.node import Node

    made, ended = [], []

    def start(node, fails):
        made.append(node)
        if fails:
            raise Exception("The current node timed out during startup")

    monkeypatch.setattr(Node, "__init__", start)
    monkeypatch.setattr(Node, "kill_all_processes", lambda node, **options: ended.append(node))
    return made, ended


@pytest.mark.parametrize("as_head", [True, False])
@pytest.mark.parametrize("failures", [["made"], ["awaited"], ["awaited", "made"]])
def test_node_that_is_late_is_ended_before_another_is_begun(nodes, failures, as_head):
    made, ended = nodes
    cluster = Cluster(failures, as_head)
    node = ray_cluster._added(cluster)
    assert made == [*ended, node]
    assert len(ended) == len(failures)
    assert cluster.worker_nodes | {cluster.head_node} == ({node} if as_head else {node, None})


def test_node_that_never_comes_is_an_error_and_leaves_none(nodes):
    made, ended = nodes
    cluster = Cluster(["awaited"] * ray_cluster._TRIES, False)
    with pytest.raises(TimeoutError):
        ray_cluster._added(cluster)
    assert made == ended
    assert not cluster.worker_nodes
