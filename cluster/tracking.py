"""MLflow: runs, metrics, and the model registry.

Metrics are written by one thread from a bounded queue, so tracking never delays training and never stops it: failures
become one warning, and what does not fit the queue is counted. The registry calls are direct and do raise, since a
registration that did not happen must not look like one. Default store: SQLite below the run's local state directory.
"""

import contextlib
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cluster.errors import ModelError, RegistryFailed
from cluster.names import check_model_name

logger = logging.getLogger(__name__)

_QUEUE = 10_000
_BATCH = 500


def tracking_uri(state_directory: Path) -> str:
    """`MLFLOW_TRACKING_URI`, else an SQLite file below the state directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{state_directory}/mlflow.db"


def _client(uri: str) -> Any:
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return _mlflow().MlflowClient(tracking_uri=uri, registry_uri=uri)


_importing = threading.Lock()


def _mlflow() -> Any:
    """The package, imported by one thread at a time: its modules import each other in circles, and two threads in them
    deadlock."""
    # With its defaults the client hangs for minutes on a server that is down.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with _importing:
        import mlflow
        import mlflow.entities
        import mlflow.exceptions

        return mlflow


class Tracker:
    """One MLflow run. Calls only enqueue; nothing here raises.

    Args:
        uri: tracking URI.
        experiment: created if missing, with `artifact_location`.
        run_id: continue this run; a new one is started without, and if the store does not know it.
    """

    def __init__(
        self, uri: str, experiment: str, run_name: str, artifact_location: str, run_id: str | None = None
    ) -> None:
        self._uri, self._experiment, self._run_name = uri, experiment, run_name
        self._artifact_location = artifact_location
        self.run_id = run_id
        self.dropped = 0
        self._warned = False
        self._started = threading.Event()
        self._is_new = run_id is None
        self._queue: queue.Queue[tuple[str, Any, int] | None] = queue.Queue(_QUEUE)
        self._thread = threading.Thread(target=self._write, name="tracking", daemon=True)
        self._thread.start()

    def params(self, values: dict[str, Any]) -> None:
        """Taken for a new run only: MLflow lets nobody change a parameter."""
        self._put("params", values, 0)

    def tags(self, values: dict[str, str]) -> None:
        self._put("tags", values, 0)

    def metrics(self, values: dict[str, float], step: int) -> None:
        self._put("metrics", values, step)

    def text(self, content: str, name: str) -> None:
        """Stores a text as an artifact of the run."""
        self._put("text", (content, name), 0)

    def close(self, status: str = "FINISHED", timeout_s: float = 30.0) -> None:
        """Writes what is queued, as far as the time allows, and ends the run with a status."""
        self._put("end", status, 0)
        self._put_end()
        self._thread.join(timeout_s)
        if self.dropped or self._thread.is_alive():
            missing = self.dropped + self._queue.qsize()
            logger.warning("tracking at %s: %d records were not written", _without_password(self._uri), missing)

    def wait_started(self, timeout_s: float = 60.0) -> str | None:
        """The run's id once the run exists, or None if tracking does not come up in time."""
        end = time.monotonic() + timeout_s
        while not self._started.wait(0.05) and self._thread.is_alive() and time.monotonic() < end:
            pass
        return self.run_id if self._started.is_set() else None

    def _put(self, kind: str, value: Any, step: int) -> None:
        try:
            self._queue.put_nowait((kind, value, step))
        except queue.Full:
            self.dropped += 1

    def _put_end(self) -> None:
        try:
            self._queue.put(None, timeout=1.0)
        except queue.Full:
            self.dropped += 1

    def _write(self) -> None:
        try:
            client = _client(self._uri)
            self._is_new = self.run_id is None or not self._continues(client)
            if self._is_new:
                experiment = client.get_experiment_by_name(self._experiment)
                experiment_id = (
                    experiment.experiment_id
                    if experiment is not None
                    else client.create_experiment(self._experiment, artifact_location=self._artifact_location)
                )
                self.run_id = client.create_run(experiment_id, run_name=self._run_name).info.run_id
            self._started.set()
        except Exception as error:  # tracking must never stop a run
            logger.warning("tracking at %s is off for this run: %s", _without_password(self._uri), _first_line(error))
            return
        while (item := self._queue.get()) is not None:
            batch = [item]
            while len(batch) < _BATCH:
                try:
                    following = self._queue.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    self._send(client, batch)
                    return
                batch.append(following)
            self._send(client, batch)

    def _continues(self, client: Any) -> bool:
        """Sets the run to running again; False if the store does not know it (any more)."""
        try:
            client.update_run(self.run_id, status="RUNNING")
            return True
        except _mlflow().exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def _send(self, client: Any, batch: list[tuple[str, Any, int]]) -> None:
        entities = _mlflow().entities
        now = int(time.time() * 1000)
        items = [(kind, k, v, step) for kind, vs, step in batch if isinstance(vs, dict) for k, v in vs.items()]
        metrics = [entities.Metric(k, float(v), now, step) for kind, k, v, step in items if kind == "metrics"]
        params = [entities.Param(k, str(v)[:500]) for kind, k, v, _ in items if kind == "params" and self._is_new]
        tags = [entities.RunTag(k, str(v)) for kind, k, v, _ in items if kind == "tags"]
        # MLflow's limits for one call. Each goes by itself, so that one bad record costs no other.
        for what, records, limit in (("metrics", metrics, 1000), ("params", params, 100), ("tags", tags, 100)):
            for start in range(0, len(records), limit):
                self._try(client.log_batch, self.run_id, **{what: records[start : start + limit]})
        for kind, value, _ in batch:
            if kind == "text":
                self._try(client.log_text, self.run_id, *value)
            elif kind == "end":
                self._try(client.set_terminated, self.run_id, status=value)

    def _try(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        try:
            call(*arguments, **named)
        except Exception as error:  # as above
            self.dropped += 1
            if not self._warned:
                self._warned = True
                logger.warning(
                    "tracking at %s: a record was not written: %s", _without_password(self._uri), _first_line(error)
                )


@contextlib.contextmanager
def registry_client(uri: str, what: str) -> Iterator[Any]:
    """MLflow's client for the registry; what it raises in the block becomes `RegistryFailed`, `what` being undone."""
    try:
        yield _client(uri)
    except _mlflow().exceptions.MlflowException as error:
        raise RegistryFailed(
            f"registry {_without_password(uri)}: {what} ({_first_line(error)}); run it again"
        ) from error


def register_version(
    uri: str, model_name: str, source: str, manifest_sha256: str, run_id: str | None, tags: dict[str, str]
) -> str:
    """Registers a published directory as a version; returns its number. The same directory gives the same version.

    Raises:
        ConfigError: a model cannot be called so.
        RegistryFailed: the registry cannot be reached, or refuses.
    """
    check_model_name(model_name)
    with registry_client(uri, f"{model_name} was not registered") as client:
        try:
            client.create_registered_model(model_name)
        except _mlflow().exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return _version(client, model_name, source, manifest_sha256, run_id, tags)


def _version(
    client: Any, model_name: str, source: str, manifest_sha256: str, run_id: str | None, tags: dict[str, str]
) -> str:
    for version in client.search_model_versions(f"name='{model_name}'"):
        if version.tags.get("manifest_sha256") == manifest_sha256 and version.source == source:
            return str(version.version)
    created = client.create_model_version(
        model_name, source, run_id=run_id, tags={**tags, "manifest_sha256": manifest_sha256}
    )
    return str(created.version)


def set_alias(uri: str, model_name: str, alias: str, version: str) -> None:
    """Points an alias at a version. Last writer wins: this is a copy for people, `cluster.champions` decides."""
    _client(uri).set_registered_model_alias(model_name, alias, version)


def refused_write(uri: str) -> str | None:
    """Which step of making, tagging and deleting a model is refused there, and why; None if all may be done.

    The model has a name of its own, and nothing of it stays: what MLflow hides when it is asked to delete it are
    experiments and runs, and none is made.
    """
    name, made = f"raystill-probe-{os.urandom(4).hex()}", False
    client = _client(uri)
    step = "made"
    try:
        client.create_registered_model(name)
        made, step = True, "tagged"
        client.set_registered_model_tag(name, "raystill.probe", "true")
        made, step = False, "deleted"
        client.delete_registered_model(name)
    except Exception as error:  # of MLflow's server, of a proxy before it, of the wire
        return f"a model cannot be {step}: {_first_line(error)}"
    finally:
        if made:
            with contextlib.suppress(Exception):
                client.delete_registered_model(name)
    return None


def version_uri(model: str, uri: str | None = None) -> str:
    """Where the files of `models:/NAME@ALIAS` or `models:/NAME/VERSION` lie.

    Raises:
        ModelError: there is no such version, or the registry does not answer.
    """
    tracking = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not tracking:
        raise ModelError(f"model {model}: set MLFLOW_TRACKING_URI to the registry that holds it")
    rest = model.removeprefix("models:/")
    client = _client(tracking)
    try:
        if "@" in rest:
            name, _, alias = rest.partition("@")
            return str(client.get_model_version_by_alias(name, alias).source)
        name, _, version = rest.partition("/")
        return str(client.get_model_version(name, version).source)
    except Exception as error:
        raise ModelError(
            f"model {model}: not found in the registry at {_without_password(tracking)} ({_first_line(error)})"
        ) from error


def _without_password(uri: str) -> str:
    return re.sub(r"//([^:/@]*):[^@]*@", r"//\1:***@", uri)


def _first_line(error: BaseException) -> str:
    return _without_password((str(error).strip() or type(error).__name__).splitlines()[0])[:300]
