"""What a run leans on: object storage, the corpus, MLflow, the champions' database, the endpoint's door and teacher."""

import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from sqlalchemy import make_url

from cluster.api_keys import has_keys, is_loopback
from cluster.champions import database_url, open_database
from cluster.environments import vllm_problem
from cluster.errors import StorageError
from cluster.storage import LocalStorage, open_storage
from cluster.tracking import refused_write, tracking_uri
from jobs.config import RunConfig
from jobs.corpus import find_sources
from jobs.examining.check import Check
from services.endpoint.client import look_at_teacher

_TIMEOUT_S = 10.0


def check_storage(where: str, uri: str) -> Iterator[Check]:
    """Writes, reads, lists and deletes a probe of a few bytes; nothing of it stays."""
    storage = open_storage(uri)
    key, data = f".probe-{os.getpid()}-{os.urandom(4).hex()}", os.urandom(64)
    steps: dict[str, Any] = {
        "write": lambda: storage.write(key, data),
        "read": lambda: storage.read(key) == data,
        "list": lambda: key in [item.key for item in storage.list(key)],
        "delete": lambda: storage.delete(key),
    }
    if isinstance(storage, LocalStorage):  # a root that is not there yet is not made for a question
        storage.check_writable()
        if not storage.root.is_dir():
            yield Check(where, "storage", "ok", f"{storage.uri} can be made and written")
            return
    started = time.perf_counter()
    for what, step in steps.items():
        try:
            worked = step()
        except (OSError, FileNotFoundError) as error:
            reason = " ".join(str(error).split())[:300]
            yield Check(where, f"storage, {what}", "failure", reason, f"give this machine's role the right to {what}")
            if what == "write":
                return
            continue
        if worked is False:
            yield Check(where, f"storage, {what}", "failure", f"{storage.uri}: not what was written", "see the server")
    seconds = (time.perf_counter() - started) / len(steps)
    if isinstance(storage, LocalStorage):
        storage.root.mkdir(exist_ok=True)  # an empty root goes with its last object
    yield Check(where, "storage", "ok", f"{storage.uri}: write, read, list and delete, {seconds * 1000:.0f} ms each")


def check_sources(where: str, config: RunConfig) -> Iterator[Check]:
    """Whether the corpus can be listed."""
    if not config.data.sources:
        return
    found = find_sources(config.data.sources)
    size = sum(source.info.size_bytes for source in found)
    yield Check(where, "sources", "ok", f"{len(found):,} objects, {size / 1e6:,.1f} MB")


def check_tracking(where: str, state_directory: Path, needs_server: bool) -> Iterator[Check]:
    """A real query to MLflow, whether it may be written from here, and whether it asks who is there."""
    uri = tracking_uri(state_directory)
    host = urlparse(uri)
    if not uri.startswith(("http://", "https://")):
        status = "failure" if needs_server else "ok"
        fix = "set MLFLOW_TRACKING_URI on every node: this file goes with the job's working directory"
        if not needs_server:
            _check_file(uri, "MLFLOW_TRACKING_URI")
        yield Check(where, "MLflow", status, f"a file, {uri}", fix if needs_server else "")  # type: ignore[arg-type]
        return
    from mlflow import MlflowClient

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    shown = f"{host.scheme}://{host.hostname}:{host.port}" if host.port else f"{host.scheme}://{host.hostname}"
    started = time.perf_counter()
    try:
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except Exception as error:
        fix = "start it, or correct MLFLOW_TRACKING_URI and MLFLOW_TRACKING_USERNAME"
        yield Check(where, "MLflow", "failure", f"{shown}: {type(error).__name__}", fix)
        return
    yield Check(where, "MLflow", "ok", f"{shown} answers in {(time.perf_counter() - started) * 1000:.0f} ms")
    if refused := refused_write(uri):
        fix = "give this MLFLOW_TRACKING_USERNAME the right to create models and experiments; see the server's log"
        yield Check(where, "MLflow, write", "failure", refused, fix)
    else:
        yield Check(where, "MLflow, write", "ok", "a model was made, tagged and deleted")
    if not is_loopback(host.hostname or "localhost") and _answers_anybody(f"{shown}{host.path}"):
        fix = "start it with --app-name basic-auth, or put an authenticating proxy before it"
        yield Check(where, "MLflow, authentication", "failure", f"{shown} answers anybody", fix)


def _answers_anybody(url: str) -> bool:
    query = f"{url.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1"
    try:
        with urllib.request.urlopen(query, timeout=_TIMEOUT_S) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def check_database(where: str, state_directory: Path, needs_server: bool) -> Iterator[Check]:
    """The database that says who is champion."""
    url = database_url(state_directory)
    if url.startswith("sqlite:///"):
        status = "failure" if needs_server else "ok"
        fix = (
            "set RAYSTILL_DATABASE_URL=postgresql://... on every node: this file goes with the job's working directory"
        )
        if not needs_server:
            _check_file(url, "RAYSTILL_DATABASE_URL")
        yield Check(where, "champions", status, f"a file, {url}", fix if needs_server else "")  # type: ignore[arg-type]
        return
    open_database(url).dispose()
    yield Check(where, "champions", "ok", f"{url.partition(':')[0]} answers")


def _check_file(url: str, variable: str) -> None:
    """Raises `StorageError` if records cannot be written to the SQLite file of a URL, which `variable` may have set."""
    if not url.startswith("sqlite:///"):
        return
    try:
        LocalStorage(Path(make_url(url).database or "").parent).check_writable()
    except StorageError as error:
        raise StorageError(
            f"{url}: not writable ({error.__cause__}); choose another root with storage=..., or set {variable}"
        ) from error


def check_endpoint(where: str, config: RunConfig) -> Iterator[Check]:
    """Whether whoever reaches the endpoint must show a key."""
    host = config.serve.host
    if is_loopback(host):
        yield Check(where, "endpoint keys", "ok", f"{host} alone reaches it")
    elif has_keys(database_url(config.state_directory)):
        yield Check(where, "endpoint keys", "ok", "there are keys")
    else:
        fix = "make one with `raystill keys create CONFIG`, or set serve.host=127.0.0.1"
        yield Check(where, "endpoint keys", "failure", f"serve.host={host} and no keys", fix)


def check_vllm(where: str, config: RunConfig) -> Iterator[Check]:
    """Whether vLLM is where the config says. A run itself needs it only to ask the endpoint its question."""
    if config.serve.vllm_python is None:
        return
    problem = vllm_problem(config.serve.vllm_python)
    if problem is None:
        yield Check(where, "endpoint's vLLM", "ok", f"{config.serve.vllm_python} has it")
    else:
        found, _, install = problem.partition(": ")
        yield Check(where, "endpoint's vLLM", "failure", f"serve.{found}", f"{install}, or leave it out")


def check_teacher(where: str, config: RunConfig) -> Iterator[Check]:
    """Whether the teacher that the endpoint's page asks beside the versions is up. A run itself does not need it."""
    if config.serve.teacher_url is None:
        return
    said = look_at_teacher(config.serve, config.model_name)
    if said["problem"] is None:
        yield Check(where, "endpoint's teacher", "ok", f"{config.serve.teacher_url} answers as {said['version']}")
    else:
        fix = "start it (`raystill serve --model DIR`), correct serve.teacher_url, serve.teacher_name or "
        fix += "RAYSTILL_TEACHER_KEY, or leave serve.teacher_url out"
        yield Check(where, "endpoint's teacher", "warning", f"{config.serve.teacher_url}: {said['problem']}", fix)
