"""What each process may use, and how it should wait and allocate. No Ray import, no side effects.

Measured on two cores with a Llama of 8 x 512 as teacher: with OpenMP's spinning waits the training step through the
service takes 1.2-1.3 times the one-process step, with passive waits 1.04. Large CPU temporaries that are mapped and
unmapped at every chunk cost more in page faults than the arithmetic on them; keeping freed memory in the heap halves
the elementwise part of the loss at a vocabulary of 32,000.
"""

import contextlib
import os
from pathlib import Path

from cluster.errors import PlacementError

LOGICAL_CPUS_PER_CORE = 4
"""Teachers, workers and evaluation take turns on the same cores, so a small machine offers more slots than cores."""


def process_environment() -> dict[str, str]:
    """Environment for every worker and replica; it must be set before the process starts."""
    return {
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "KMP_BLOCKTIME": "0",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
        "MALLOC_TOP_PAD_": str(64 << 20),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "ORT_DISABLE_TELEMETRY": "1",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }


def physical_cores() -> int:
    """Cores that this process may run on, or fewer where its cgroup has less of their time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, int(min(cores, cgroup_cpus(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))))


def cgroup_cpus(membership: Path, root: Path) -> float:
    """CPUs' worth of time that a control group and those above it leave a process, as in a container with a limit;
    infinite without one. What cannot be read counts as no limit.

    Args:
        membership: `/proc/self/cgroup`.
        root: where the groups are mounted; inside a container its own group is that directory.
    """
    least = float("inf")
    with contextlib.suppress(OSError, ValueError):
        for line in membership.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = root / controllers if controllers else root  # version 1 has a tree for each, version 2 one for all
            below = top / group.strip("/")
            for directory in (below, *below.parents):
                if directory.is_relative_to(top):
                    least = min(least, _quota(directory))
    return least


def _quota(directory: Path) -> float:
    with contextlib.suppress(OSError, ValueError):
        quota, period = (directory / "cpu.max").read_text().split()
        return int(quota) / int(period)  # "max" is no number
    with contextlib.suppress(OSError, ValueError):
        quota, period = ((directory / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if int(quota) > 0:
            return int(quota) / int(period)
    return float("inf")


def logical_cpus(configured: int | None) -> int:
    """CPU slots of an embedded cluster."""
    return configured or LOGICAL_CPUS_PER_CORE * physical_cores()


def threads_each(processes: int) -> int:
    """Threads for each of `processes` that compute at the same time on this machine's cores."""
    return max(1, physical_cores() // max(1, processes))


def threads_beside_serve(replicas: int) -> int:
    """Threads for each of so many replicas in which torch decodes. A core is left to Serve's proxy and the router,
    through which every event of a stream goes; on two cores one thread answered 1 stream and 16 faster than two did."""
    return max(1, (physical_cores() - 1) // max(1, replicas))


def check_placement(wanted: dict[str, float], available: float, where: str) -> None:
    """Raises `PlacementError` if the named CPU demands can never fit together.

    Args:
        wanted: CPUs by role, for example `{"train.num_workers=64": 64}`.
        available: CPUs that the cluster has, or can grow to.
        where: how to name the cluster in the message.
    """
    total = sum(wanted.values())
    if total > available:
        parts = " + ".join(f"{cpus:g} ({role})" for role, cpus in wanted.items())
        raise PlacementError(
            f"asked for {parts} = {total:g} CPUs, {where} has {available:g} (an embedded Ray counts "
            f"{LOGICAL_CPUS_PER_CORE} to a core): lower the counts, or set cluster.num_cpus or cluster.address"
        )
