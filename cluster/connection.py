"""The only `ray.init` of the project: an embedded local Ray, or the cluster at an address.

An embedded Ray belongs to this process: it gets its own temporary directory and ports, other Rays on the host are left
alone, and it ends with the process, also when the process is killed (the daemons share its fate).
"""

import contextlib
import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.config import Config, execution
from cluster.errors import ClusterUnreachable, PromotionRefused
from cluster.interrupts import daemons_in_own_groups, raise_on_signals
from cluster.pools import PoolsConfig
from cluster.resources import logical_cpus, process_environment

logger = logging.getLogger(__name__)


class ClusterConfig(Config):
    address: str | None = execution(None)
    """Ray address (`auto`, `host:port`); empty takes `RAY_ADDRESS`, else an embedded Ray is started."""
    num_cpus: int | None = execution(None, ge=1)
    """CPU slots of an embedded Ray (default: 4 per core, since stages and replicas take turns); on a cluster at an
    address, how far it may grow (default: what it has now)."""
    object_store_mb: int = execution(512, ge=80)
    """Shared memory of an embedded Ray, in MiB."""
    pools: PoolsConfig | None = execution(None)
    """On a cluster at an address: `{}` places teachers, students and endpoint on nodes with `teacher_slot`,
    `student_slot` and `endpoint_slot`, one for each replica or worker."""

    @property
    def active_pools(self) -> PoolsConfig | None:
        """The pools, unless the Ray is embedded."""
        return self.pools if self.resolved_address() else None

    def resolved_address(self) -> str | None:
        return self.address or os.environ.get("RAY_ADDRESS") or None


@dataclass(frozen=True)
class Connection:
    """What `connect` gives: whether the Ray is ours, and how many CPUs it can hold."""

    embedded: bool
    num_cpus: float
    logs: str | None
    """Directory with the logs of all processes of an embedded Ray."""
    pools: PoolsConfig | None = None
    """Where replicas and workers go; None leaves it to Ray."""


def in_a_job() -> bool:
    """Whether this process was started by Ray's Jobs API: then its directory goes with the head's machine."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def check_address(address: str) -> None:
    """Raises `ClusterUnreachable` if nothing listens at `host:port`; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():  # `auto`, `local`: for Ray to find
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ClusterUnreachable(
            f"cluster.address (or RAY_ADDRESS) {address}: no connection ({error.strerror or error}); check the "
            "address, or leave it out for a Ray on this machine"
        ) from None


def while_ray_lives(work: Callable[[], None]) -> None:
    """Does something with Ray; gives up if the embedded Ray's own processes have ended, for which Ray waits a minute.

    On Linux they outlive a signal to the process group, not one to everything in a control group, as systemd sends it.
    """
    import ray

    thread = threading.Thread(target=work, name="while-ray-lives", daemon=True)
    thread.start()
    node = ray._private.worker._global_node
    while thread.is_alive() and not (node is not None and node.dead_processes()):
        thread.join(0.2)


@contextlib.contextmanager
def connect(config: ClusterConfig) -> Iterator[Connection]:
    """Connects to Ray for the length of the block; an embedded Ray ends with it.

    Raises:
        ClusterUnreachable: no Ray answers at the address.
    """
    address = config.resolved_address()
    os.environ.update({key: os.environ.get(key, value) for key, value in process_environment().items()})
    if address is None and "ray" not in sys.modules:
        # Read once, when ray is imported. A local Ray asks for a token by default; said here so that it stays so.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    for name in ("ray", "ray.serve", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if ray.is_initialized():
        # Somebody else's connection (a notebook, a test session, an outer job): use it, leave it.
        yield Connection(False, ray.cluster_resources().get("CPU", 0), None)
        return
    if address is not None:
        environment = process_environment()
        check_address(address)
        try:
            ray.init(address, runtime_env={"env_vars": environment}, log_to_driver=False, logging_level=logging.WARNING)
        except ConnectionError as error:
            raise ClusterUnreachable(
                f"cluster.address (or RAY_ADDRESS) {address}: Ray does not let us in ({error}); if the cluster asks "
                "for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
            ) from error
        raise_on_signals()
        try:
            num_cpus = max(ray.cluster_resources().get("CPU", 0), config.num_cpus or 0)
            yield Connection(False, num_cpus, None, config.pools)
        finally:
            ray.shutdown()
        return
    # Workers import this project the way the driver does, also when it is not installed.
    root = str(Path(__file__).parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    directory = tempfile.mkdtemp(prefix="raystill-")
    num_cpus = logical_cpus(config.num_cpus)
    done = False
    try:
        try:
            with daemons_in_own_groups():
                ray.init(
                    num_cpus=num_cpus,
                    object_store_memory=config.object_store_mb << 20,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    _temp_dir=directory,
                )
        except Exception as error:  # of many classes, a bare Exception among them
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ClusterUnreachable(
                f"Ray did not start on this machine ({reason}): if it is busy or short of memory, try again when it is "
                "less so, or lower cluster.object_store_mb"
            ) from error
        raise_on_signals()
        yield Connection(True, num_cpus, f"{directory}/session_latest/logs")
        done = True
    except (KeyboardInterrupt, PromotionRefused):
        done = True  # nothing in the logs that somebody would look for
        raise
    finally:
        ray.shutdown()
        if done:
            shutil.rmtree(directory, ignore_errors=True)
        else:
            logger.warning("Logs of all processes: %s/session_latest/logs", directory)
