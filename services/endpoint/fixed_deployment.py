"""The Ray Serve application around one plain directory; `deployment.py` is the one that follows a champion.

serve run services.endpoint.fixed_deployment:app model_name=NAME directory=/absolute/directory
"""

import os
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from cluster.config import validate
from cluster.logs import setup_logging
from cluster.resources import process_environment, threads_each
from services.endpoint.api import API_KEYS_VARIABLE, build_api, read_api_keys
from services.endpoint.fixed import FixedModel
from services.endpoint.schema import DirectoryArguments

_UNCOUNTED_REQUESTS = 64
"""Room above the decoding queue for health checks, lists, and requests on their way to a refusal."""


@serve.deployment(graceful_shutdown_timeout_s=60)
@serve.ingress()
class DirectoryEndpoint:
    """A replica: the directory's model, threads that compute, and the HTTP interface."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        import torch

        setup_logging("INFO")
        self._arguments = DirectoryArguments.model_validate(arguments)
        torch.set_num_threads(self._arguments.threads_per_replica or threads_each(self._arguments.replicas))
        self._model = FixedModel(self._arguments)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the constructor is done."""
        return build_api(self._arguments, self._model)


def app(args: dict[str, Any]) -> Application:
    """Builds the application from `model_name`, `directory` and the fields of `EndpointConfig`.

    Raises:
        ConfigError: an argument is missing, unknown or out of range, or the file of API keys cannot be used.
    """
    arguments = validate(DirectoryArguments, args, "of the endpoint")
    environment = process_environment()
    if keys_file := os.environ.get(API_KEYS_VARIABLE):
        read_api_keys(keys_file)
        environment[API_KEYS_VARIABLE] = keys_file
    deployment = DirectoryEndpoint.options(  # type: ignore[attr-defined]  # the decorator makes it a Deployment
        num_replicas=arguments.replicas,
        max_ongoing_requests=arguments.max_running + arguments.max_waiting + _UNCOUNTED_REQUESTS,
        ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": environment}},
    )
    return deployment.bind(arguments.model_dump())
