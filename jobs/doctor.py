"""`raystill doctor`: everything that a run leans on, looked at before it is paid for; one line each, with the fix.

Without a cluster it is about this machine. With one it is about the dashboard as it is seen from here, and about every
node as it sees itself: a small job looks from the head, with the rights that runs have there.
"""

import time
from typing import Any

from cluster.config import fingerprint
from cluster.connection import in_a_job
from cluster.storage import LocalStorage, open_storage
from cluster.submissions import Submissions
from jobs.config import RunConfig
from jobs.examining.check import Check, guarded
from jobs.examining.clock import check_clock
from jobs.examining.machine import (
    check_gpus,
    check_room,
    check_same_versions,
    check_versions,
    versions,
    wanted_versions,
)
from jobs.examining.ray_cluster import check_dashboard, check_dashboard_clock, check_same_ray, from_inside, nodes_report
from jobs.examining.services import (
    check_database,
    check_endpoint,
    check_sources,
    check_storage,
    check_teacher,
    check_tracking,
    check_vllm,
)
from jobs.preflight import gpus_at_once
from jobs.submit import submit, submit_doctor

_HERE = "this machine"


def examine(config: RunConfig | None, address: str | None) -> list[Check]:
    """All checks that this process can make.

    Args:
        config: whose storage, sources, records and GPUs are looked at too.
        address: dashboard of a cluster; its nodes are looked at instead of what only they need, also without a config.
    """
    here = versions()
    checks = guarded(_HERE, "versions", lambda: check_versions(_HERE, here, wanted_versions()))
    if address is None:
        store = config.cluster.object_store_mb * 2**20 if config is not None else 0
        checks += guarded(_HERE, "room", lambda: check_room(_HERE, store))
        gpus = gpus_at_once(config) if config is not None else 0
        checks += guarded(_HERE, "GPUs", lambda: check_gpus(_HERE, gpus))
        return checks + (_examine_services(_HERE, config) if config is not None else [])
    checks += guarded(f"cluster {address}", "dashboard", lambda: check_dashboard(address))
    checks += guarded(f"cluster {address}", "token", lambda: check_same_ray(address, here))
    if not any(check.status == "failure" and check.what in ("dashboard", "token", "ray") for check in checks):
        checks += guarded(f"cluster {address}", "clock", lambda: check_dashboard_clock(address))
        checks += guarded(f"cluster {address}", "nodes", lambda: _examine_nodes(config, address, here))
    return checks


def examine_from_inside(config: RunConfig | None) -> dict[str, Any]:
    """What the job of a doctor reports: every node's checks and versions, and a run's services as its head reaches
    them."""
    report = nodes_report()
    checks = [item for node in report.values() for item in node["checks"]]
    if config is not None:
        checks += [check.as_json() for check in _examine_services("head", config)]
    return {"checks": checks, "versions": {name: node["versions"] for name, node in report.items()}}


def _examine_services(where: str, config: RunConfig) -> list[Check]:
    lost = in_a_job() and not isinstance(open_storage(config.storage), LocalStorage)
    state = config.state_directory
    return [
        *guarded(where, "storage", lambda: check_storage(where, config.storage)),
        *guarded(where, "clock", lambda: check_clock(where, config.storage)),
        *guarded(where, "sources", lambda: check_sources(where, config)),
        *guarded(where, "MLflow", lambda: check_tracking(where, state, lost)),
        *guarded(where, "champions", lambda: check_database(where, state, lost)),
        *guarded(where, "endpoint keys", lambda: check_endpoint(where, config)),
        *guarded(where, "endpoint's vLLM", lambda: check_vllm(where, config)),
        *guarded(where, "endpoint's teacher", lambda: check_teacher(where, config)),
    ]


def _examine_nodes(config: RunConfig | None, address: str, here: dict[str, str]) -> list[Check]:
    """Has a job look at the nodes, and compares what they have with this machine."""
    cluster = Submissions(address)
    job_id = f"raystill-doctor-{fingerprint([config and config.name, time.time_ns()])}"
    if config is None:
        submit_doctor(cluster, job_id)
    else:
        submit(config, "doctor", cluster, lambda line: None, job_id)
    log: list[str] = []
    cluster.follow(job_id, log.append, lambda line: None)
    report = from_inside("".join(log), cluster.address)
    checks = [Check(**item) for item in report["checks"]]
    for name, found in report["versions"].items():
        if found:
            checks += check_same_versions(here, name, found)
    return checks


def line_of(check: Check) -> Any:
    """A check for people, on one line."""
    from rich.text import Text

    colour = {"ok": "green", "warning": "yellow", "failure": "red"}[check.status]
    to_do = f": {check.fix}" if check.fix else ""
    return Text.assemble((f"{check.status:<8}", colour), f"{check.where}: {check.what}: {check.found}{to_do}")
