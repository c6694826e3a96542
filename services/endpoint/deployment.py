"""The Ray Serve application: one class around the HTTP interface, one builder.

    serve run services.endpoint.deployment:app model_name=NAME database=sqlite:////dir/champions.db

Every replica follows the champion by itself, so promoting needs no redeployment. Requests are refused in the replica
when its queue is full; Serve's own limit is set above that, because its rejections are slow.
"""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from cluster.api_keys import check_address
from cluster.config import validate
from cluster.logs import setup_logging
from cluster.resources import process_environment, threads_each
from services.endpoint.api import build_api
from services.endpoint.following import ChampionFollower
from services.endpoint.loading import AnyModel, load_model
from services.endpoint.schema import EndpointArguments

_UNCOUNTED_REQUESTS = 1024
"""Room above the decoding queue for health checks, lists, bodies that come slowly, and requests on their way to a
refusal."""


@serve.deployment(graceful_shutdown_timeout_s=60)
@serve.ingress()
class Endpoint:
    """A replica: the champion's model with its engine, and the HTTP interface."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        import torch

        setup_logging("INFO")
        self._arguments = EndpointArguments.model_validate(arguments)
        torch.set_num_threads(self._arguments.threads_per_replica or threads_each(self._arguments.replicas))
        self._follower = ChampionFollower(self._arguments.model_name, self._arguments.database, self._load)
        self._follower.start(self._arguments.poll_s)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the constructor is done."""
        return build_api(self._arguments, self._follower)

    def _load(self, directory: Path) -> AnyModel:
        return load_model(directory, self._arguments)


def app(args: dict[str, Any]) -> Application:
    """Builds the application from `model_name`, `database` and the fields of `EndpointConfig`.

    Raises:
        ConfigError: an argument is missing, unknown or out of range, or `host` is public and there is no API key.
    """
    arguments = validate(EndpointArguments, args, "of the endpoint")
    check_address(arguments.host, arguments.database)
    deployment = Endpoint.options(  # type: ignore[attr-defined]  # the decorator makes it a Deployment
        num_replicas=arguments.replicas,
        max_ongoing_requests=arguments.max_running + arguments.max_waiting + _UNCOUNTED_REQUESTS,
        ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": process_environment()}},
    )
    return deployment.bind(arguments.model_dump())
