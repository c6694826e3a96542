"""The endpoint as a job: a check that the champion answers, or the endpoint kept up until it is interrupted."""

import json
import shlex
import signal
import threading
from typing import Any

from cluster.api_keys import has_keys, temporary_key
from cluster.champions import database_url, find_champion
from cluster.connection import ClusterConfig
from cluster.crowning import settle
from cluster.environments import vllm_problem
from cluster.errors import ConfigError, CorruptArtifact, PlacementError
from cluster.pools import actor_options
from cluster.published import check_version_files, read_through
from cluster.tracking import tracking_uri
from jobs.config import RunConfig
from services.endpoint.client import ask, start_endpoint, stop_endpoint
from services.endpoint.schema import EndpointConfig

_ONE_QUESTION_S = 900.0


def endpoint_config(config: RunConfig) -> EndpointConfig:
    """The endpoint's own part of `serve`."""
    return EndpointConfig(**{name: getattr(config.serve, name) for name in EndpointConfig.model_fields})


def ask_once(config: RunConfig) -> dict[str, Any]:
    """Starts the endpoint, asks `serve.question`, stops it. Needs a connected Ray."""
    database = database_url(config.state_directory)
    tracking = tracking_uri(config.state_directory)
    placement = actor_options(config.cluster.active_pools, "endpoint")
    with temporary_key(database, f"run {config.name}", config.model_name, lifetime_s=_ONE_QUESTION_S) as key:
        url = start_endpoint(
            endpoint_config(config), config.model_name, database, tracking=tracking, placement=placement
        )
        try:
            answer = ask(url, config.model_name, config.serve.question, max_tokens=48, api_key=key)
        finally:
            stop_endpoint()
    return {"url": url, "model": config.model_name, "question": config.serve.question, "answer": answer}


def check_champion(config: RunConfig) -> None:
    """Settles promotions that were broken off, and looks whether there is something that may be served.

    Raises:
        ConfigError: there is no champion yet.
        CorruptArtifact: its files are damaged or gone.
    """
    database = database_url(config.state_directory)
    settle(database, config.model_name, tracking_uri(config.state_directory))
    champion = find_champion(database, config.model_name)
    if champion is None:
        raise ConfigError(f"model {config.model_name} has no champion in {config.storage}: `raystill run` makes one")
    try:
        check_version_files(read_through(champion.uri, champion.manifest_sha256)["files"], champion.uri)
    except CorruptArtifact as error:
        raise CorruptArtifact(
            f"model {config.model_name}: its champion, version {champion.version}, cannot be served ({error}); repair "
            "its files, go back with `raystill rollback`, or put another in its place with `raystill promote`"
        ) from error


def check_engine(config: EndpointConfig, cluster: ClusterConfig) -> None:
    """Looks for vLLM and its GPUs if the config names it; only where the replicas run on this machine.

    Raises:
        ConfigError: it is not there; the message has the line that installs it.
        PlacementError: there are fewer GPUs, for which the replicas would wait without end.
    """
    if config.vllm_python is None or cluster.resolved_address():
        return
    if (problem := vllm_problem(config.vllm_python)) is not None:
        raise ConfigError(problem)
    import torch

    if (wanted := config.replicas * config.gpus_per_replica) > (available := torch.cuda.device_count()):
        raise PlacementError(
            f"asked for {wanted:g} GPUs (gpus_per_replica, for each replica of the endpoint), this machine has "
            f"{available}: lower gpus_per_replica, or set cluster.address"
        )


def patience(config: EndpointConfig) -> str:
    """What somebody who waits for a model to be loaded should know."""
    return "" if config.vllm_python is None else "; vLLM takes some minutes"


def serve_until_interrupted(config: RunConfig, say: Any) -> None:
    """Keeps the endpoint up until SIGINT or SIGTERM. Needs a connected Ray."""
    stop = threading.Event()
    database, tracking = database_url(config.state_directory), tracking_uri(config.state_directory)
    placement = actor_options(config.cluster.active_pools, "endpoint")
    say(f"{config.model_name}: starting the endpoint and loading the champion{patience(config.serve)}")
    url = start_endpoint(endpoint_config(config), config.model_name, database, tracking=tracking, placement=placement)
    say(f"{config.model_name} answers at {url}/v1 (Ctrl-C stops it); a page to look at and try it: {url}/")
    say("Try:")
    key = ' -H "Authorization: Bearer $RAYSTILL_KEY"' if has_keys(database) else ""
    body = {"model": config.model_name, "prompt": config.serve.question, "max_tokens": 40, "temperature": 0}
    say(f"  curl -s {url}/v1/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(json.dumps(body))}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    say("stopping: answers that are being written are finished first")
    stop_endpoint()
