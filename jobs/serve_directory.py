"""`raystill serve --model DIR`: a plain model directory behind the endpoint, without a registry.

Made for trying a teacher the way its student will be asked. The directory is looked at before anything is started.
"""

import json
import re
import shlex
import signal
import threading
from collections.abc import Callable
from typing import Any

from cluster.config import apply_override, validate
from cluster.connection import ClusterConfig, connect
from cluster.errors import ConfigError
from cluster.model_directory import Kind, ModelDirectory, read_model_directory
from jobs.serve import check_engine, patience
from services.endpoint.client import check_port_free, start_directory, stop_endpoint
from services.endpoint.schema import DirectoryArguments, EndpointConfig

_TRIES: dict[Kind, tuple[str, dict[str, Any]]] = {
    "language_model": ("/v1/completions", {"prompt": "Return a list of", "max_tokens": 40, "temperature": 0}),
    "embeddings": ("/v1/embeddings", {"input": ["one text", "another"]}),
    "classifications": ("/v1/classifications", {"input": ["one text", "another"]}),
}
"""A request to try, for each kind of model."""


def directory_arguments(
    model: str, name: str | None, overrides: list[str], host: str | None, port: int | None
) -> tuple[DirectoryArguments, ModelDirectory]:
    """What the endpoint is started with, and what was found in the directory.

    Args:
        overrides: `key=value`, fields of `EndpointConfig`.

    Raises:
        ConfigError: an unknown key or a value out of range.
        ModelError: the directory cannot be served.
        CorruptArtifact: it has a manifest of ours and differs from it.
    """
    raw: dict[str, Any] = {}
    for override in overrides:
        apply_override(raw, override)
    given = {"host": host, "port": port}
    config = validate(
        EndpointConfig, {**raw, **{key: value for key, value in given.items() if value is not None}}, "of the endpoint"
    )
    found = read_model_directory(model)
    fields = {**config.model_dump(), "model_name": name or name_of(model), "directory": str(found.path)}
    return validate(DirectoryArguments, fields, "of the endpoint"), found


def name_of(model: str) -> str:
    """What clients call a model that was given no name: the last part of where it lies.

    Raises:
        ConfigError: nothing is left of it.
    """
    last = model.rstrip("/").rpartition("/")[2].partition("@")[0]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.")
    if not name:
        raise ConfigError(f"--model {model}: no name can be made of it; give one with --name")
    return name


def serve_directory(arguments: DirectoryArguments, found: ModelDirectory, say: Callable[[str], Any]) -> None:
    """Keeps the endpoint up until SIGINT or SIGTERM."""
    cluster = ClusterConfig()
    check_engine(arguments, cluster)
    if not cluster.resolved_address():  # a cluster may have a Serve there, for us to use
        check_port_free(arguments.host, arguments.port)
    say(
        f"{arguments.directory}: {found.kind.replace('_', ' ')}, version {found.version}, "
        + ("every file as its manifest says" if found.verified else "no manifest of raystill's to compare it with")
    )
    if found.left_alone:
        say(f"  not opened, since they may hold code: {', '.join(found.left_alone[:8])}")
    say(f"starting the endpoint and loading the model{patience(arguments)}")
    with connect(cluster):
        stop = threading.Event()
        url = start_directory(arguments)
        say(f"{arguments.model_name} answers at {url}/v1 (Ctrl-C stops it). Try:")
        path, body = _TRIES[found.kind]
        text = shlex.quote(json.dumps({"model": arguments.model_name, **body}))
        say(f"  curl -s {url}{path} -H 'Content-Type: application/json' -d {text}")
        if found.kind == "language_model":
            say(f"Beside a student, on its page: raystill serve CONFIG serve.teacher_url={url}")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        stop.wait()
        say("stopping: answers that are being written are finished first")
        stop_endpoint()
