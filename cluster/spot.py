"""A spot machine's notice of its end, handed on to Ray before it comes.

EC2 tells an instance by its metadata service (IMDSv2), two minutes ahead at best, and hints at it earlier with a
rebalance recommendation. Ray does not ask. A node that is drained takes nothing new; Serve moves its replicas, and Ray
Train tells its workers, who store their step and go on elsewhere.
"""

import contextlib
import json
import logging
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from cluster.errors import ClusterUnreachable

logger = logging.getLogger(__name__)

METADATA = "http://169.254.169.254"
_TOKEN_S = 21_600
_TIMEOUT_S = 2.0
_DRAIN_S = 60.0


class _Busy(ClusterUnreachable):
    """The metadata service is there and asks for patience (HTTP 429, 5xx)."""


@dataclass(frozen=True)
class Notice:
    """What an instance is told about its end."""

    kind: Literal["termination", "rebalance"]
    at: float | None
    """Seconds since 1970; a recommendation names no time."""

    def remaining_s(self, now: float) -> float | None:
        return None if self.at is None else max(0.0, self.at - now)


class InstanceMetadata:
    """EC2's instance metadata service, in its second version: every question carries a token.

    Args:
        endpoint: where it is; only tests have it elsewhere.
    """

    def __init__(self, endpoint: str = METADATA) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._token: str | None = None
        # Never through a proxy: it would be asked about its own instance.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def notice(self) -> Notice | None:
        """The notice that holds now, a termination before a recommendation.

        Raises:
            ClusterUnreachable: there is no metadata service here.
        """
        action = self._get("/latest/meta-data/spot/instance-action")
        if action is not None:
            found = json.loads(action)
            if found.get("action") in ("terminate", "stop", "hibernate"):
                return Notice("termination", _seconds(found["time"]))
        if self._get("/latest/meta-data/events/recommendations/rebalance") is not None:
            return Notice("rebalance", None)
        return None

    def _get(self, path: str) -> str | None:
        """The text at a path; None where there is none."""
        for attempt in range(2):
            if self._token is None:
                self._token = self._new_token()
            try:
                header = {"X-aws-ec2-metadata-token": self._token}
                return self._ask(urllib.request.Request(f"{self._endpoint}{path}", None, header))
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return None
                if error.code != 401 or attempt:
                    raise self._refused(path, error) from error
                self._token = None  # it was used up
        return None

    def _new_token(self) -> str:
        path, header = "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_S)}
        try:
            return self._ask(urllib.request.Request(f"{self._endpoint}{path}", None, header, method="PUT"))
        except urllib.error.HTTPError as error:  # the service throttles, as it does for every other question
            raise self._refused(path, error) from error

    def _refused(self, path: str, error: urllib.error.HTTPError) -> ClusterUnreachable:
        kind = _Busy if error.code == 429 or error.code >= 500 else ClusterUnreachable
        return kind(f"instance metadata at {self._endpoint}: HTTP {error.code} for {path}")

    def _ask(self, request: urllib.request.Request) -> str:
        try:
            with self._opener.open(request, timeout=_TIMEOUT_S) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError:
            raise
        except OSError as error:
            raise ClusterUnreachable(
                f"no instance metadata at {self._endpoint} ({getattr(error, 'reason', error)}): this is no EC2 "
                "instance, or a container whose metadata hop limit is 1 (set it to 2)"
            ) from error


def _seconds(stamp: str) -> float:
    return datetime.strptime(stamp, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()


def watch(
    metadata: InstanceMetadata,
    drain: Callable[[str, int], None],
    every_s: float = 5.0,
    rebalance_s: int = 600,
    wait: Callable[[float], object] = time.sleep,
) -> Notice:
    """Asks until the instance is told that it ends, drains its node, and returns that notice.

    Args:
        drain: is given the reason and the seconds that are left; what it raises as `ClusterUnreachable` is tried again.
        every_s: between two questions; AWS advises 5.
        rebalance_s: deadline of the drain that a recommendation causes, once; 0 passes recommendations over.
        wait: sleeps; for tests.

    Raises:
        ClusterUnreachable: no metadata service answers the first question; one that asks for patience is asked again.
    """
    recommended = False
    notice: Notice | None = None
    with contextlib.suppress(_Busy):
        notice = metadata.notice()
    while True:
        try:
            if notice is not None and notice.kind == "termination":
                left_s = notice.remaining_s(time.time())
                drain("EC2 takes the instance back", int(left_s or 0))
                return notice
            if notice is not None and not recommended and rebalance_s:
                drain("EC2 recommends to leave the instance", rebalance_s)
                recommended = True
            wait(every_s)
            notice = metadata.notice()
        except ClusterUnreachable as error:  # metadata or head, for a moment: asked again
            logger.warning("%s", error)
            wait(every_s)


def drain_node(address: str, node_id: str, reason: str, remaining_s: int) -> None:
    """Tells a cluster that a node goes: `ray drain-node`.

    Raises:
        ClusterUnreachable: it was not accepted.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address, "--node-id", node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", reason]
    command += ["--deadline-remaining-seconds", str(remaining_s)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DRAIN_S)
    except subprocess.TimeoutExpired as error:
        raise ClusterUnreachable(
            f"cluster {address}: no answer to draining node {node_id} in {_DRAIN_S:g} s"
        ) from error
    if done.returncode != 0:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason given")
        raise ClusterUnreachable(f"cluster {address}: node {node_id} was not drained: {last.strip()[:300]}")


def this_node(address: str | None = None) -> tuple[str, str]:
    """The cluster that this machine is a node of, and the node's id.

    Raises:
        ClusterUnreachable: no living node of the cluster has this machine's address.
    """
    import ray
    from ray._private import services

    found = services.canonicalize_bootstrap_address_or_die(address or "auto")
    here = services.get_node_ip_address()
    nodes: dict[Any, Any] = ray._raylet.GcsClient(address=found).get_all_node_info()
    mine = [node_id.hex() for node_id, node in nodes.items() if node.node_manager_address == here and node.state == 0]
    if len(mine) != 1:
        raise ClusterUnreachable(f"cluster {found} has {len(mine)} living nodes at {here}: name one with --node-id")
    return found, mine[0]
