"""A Ray cluster from outside, through its dashboard: whether it answers, to whom, and whether it is the same Ray.

Its nodes from inside: a job that has every node look at itself, with the rights that jobs have there.
"""

import functools
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlparse

from cluster.api_keys import is_loopback
from cluster.errors import ClusterUnreachable
from cluster.submissions import Submissions, check_dashboard_address
from jobs.examining.check import Check
from jobs.examining.clock import ahead_s, check_skew, server_ahead_s

_TIMEOUT_S = 10.0


def check_dashboard(address: str) -> Iterator[Check]:
    """Reachability and authentication of a dashboard: who reaches an open one runs what he likes on the cluster.

    On loopback it may be the end of a tunnel: then it is the nodes' own addresses that say whether others reach them.
    """
    url = check_dashboard_address(address)
    where, host = f"cluster {url}", urlparse(url).hostname or "localhost"
    reached: list[str] = []
    try:
        status = _status_without_token(f"{url}/api/jobs/")
    except OSError as error:
        reason = getattr(error, "reason", error)
        yield Check(where, "dashboard", "failure", f"no answer ({reason})", "check the address, or open a tunnel to it")
        return
    if status in (401, 403):
        yield Check(where, "authentication", "ok", "asks for a token")
    elif is_loopback(host) and not (reached := [ip for ip in _node_addresses(url) if not is_loopback(ip)]):
        fix = "on a machine that others use start Ray with RAY_AUTH_MODE=token"
        yield Check(where, "authentication", "warning", f"asks nobody who they are (HTTP {status}), on loopback", fix)
    else:
        fix = (
            "start every node with RAY_AUTH_MODE=token and one RAY_AUTH_TOKEN_PATH, and bind the dashboard to 127.0.0.1"
        )
        who = f"it, or its nodes at {', '.join(reached[:3])}" if is_loopback(host) else "it"
        yield Check(where, "authentication", "failure", f"open to whoever reaches {who} (HTTP {status})", fix)
    if url.startswith("http://") and not is_loopback(host):
        fix = "go through an SSH tunnel or a TLS proxy"
        yield Check(where, "encryption", "warning", "the token travels over plain HTTP", fix)


def check_same_ray(address: str, here: dict[str, str]) -> Iterator[Check]:
    """Raises `ClusterUnreachable` if the token is refused."""
    cluster = Submissions(address)
    where = f"cluster {cluster.address}"
    there = cluster.ray_version
    if there != here.get("ray"):
        fix = f"pip install ray=={there} here, or another image there"
        yield Check(where, "ray", "failure", f"{there}, here {here.get('ray')}", fix)
    else:
        yield Check(where, "ray", "ok", there)


def check_dashboard_clock(address: str) -> Iterator[Check]:
    """The head's clock beside this machine's, whose records will stand beside each other."""
    url = check_dashboard_address(address)
    head_ahead_s = server_ahead_s(f"{url}/api/version", _opener(url).open)
    if head_ahead_s is not None:
        yield check_skew(f"cluster {url}", head_ahead_s, "this machine's")


def nodes_report() -> dict[str, Any]:
    """What every living node of the connected Ray says about itself.

    Returns:
        By node: `versions`, and `checks` as JSON.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look, now = ray.remote(num_cpus=0)(_look_at_this_node), ray.remote(num_cpus=0)(_now)
    asked = {}
    for node in ray.nodes():
        if node["Alive"]:
            store = node["Resources"].get("object_store_memory", 0.0)
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            name = f"node {node['NodeManagerAddress']} {node['NodeID'][:8]}"
            answer = look.options(scheduling_strategy=there).remote(name, store, node["Resources"].get("GPU", 0))
            asked[name] = answer, now.options(scheduling_strategy=there)
    report = {}
    for name, (answer, clock) in asked.items():
        try:
            report[name] = ray.get(answer, timeout=120)
            node_ahead_s = ahead_s(functools.partial(_answer, clock))
            report[name]["checks"].append(check_skew(name, node_ahead_s, "the head's").as_json())
        except Exception as error:  # a node that cannot say how it is
            reason = " ".join(str(error).split())[:200]
            missing = Check(name, "answers", "failure", f"{type(error).__name__}: {reason}", "see its logs")
            report[name] = {"versions": {}, "checks": [missing.as_json()]}
    return report


def _look_at_this_node(where: str, object_store_bytes: float, gpus: float) -> dict[str, Any]:
    from jobs.examining.machine import check_gpus, check_room, check_versions, versions, wanted_versions

    found = versions()
    checks = [
        *check_versions(where, found, wanted_versions()),
        *check_room(where, object_store_bytes),
        *check_gpus(where, gpus),
    ]
    return {"versions": found, "checks": [check.as_json() for check in checks]}


def _answer(clock: Any) -> float:
    import ray

    return float(ray.get(clock.remote(), timeout=60))


def _now() -> float:
    return time.time()


def from_inside(report: str, address: str) -> dict[str, Any]:
    """The JSON that a doctor wrote as the last line of its job's log.

    Raises:
        ClusterUnreachable: there is none.
    """
    lines = [line for line in report.splitlines() if line.startswith('{"checks"')]
    if not lines:
        last = next((line for line in reversed(report.splitlines()) if line.strip()), "nothing")
        raise ClusterUnreachable(f"cluster {address}: its nodes could not be looked at: {last.strip()[:300]}")
    return dict(json.loads(lines[-1]))


def _node_addresses(url: str) -> list[str]:
    """Of the living nodes, as an open dashboard tells them to anybody; none if it does not."""
    try:
        with _opener(url).open(f"{url}/api/v0/nodes", timeout=_TIMEOUT_S) as answer:
            nodes = json.loads(answer.read())["data"]["result"]["result"]
        return sorted({str(node["node_ip"]) for node in nodes if node["state"] == "ALIVE"})
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _status_without_token(url: str) -> int:
    try:
        with _opener(url).open(url, timeout=_TIMEOUT_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return int(error.code)


def _opener(url: str) -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(
        urllib.request.ProxyHandler({} if is_loopback(urlparse(url).hostname or "localhost") else None)
    )
