"""The Ray Serve application around one plain directory; `deployment.py` is the one that follows a champion.

serve run services.endpoint.fixed_deployment:app model_name=NAME directory=/absolute/directory
"""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from cluster.api_keys import is_loopback
from cluster.config import validate
from cluster.errors import ConfigError
from cluster.logs import setup_logging
from cluster.resources import process_environment, threads_beside_serve
from services.endpoint.api import build_api
from services.endpoint.fixed import FixedModel
from services.endpoint.metrics import RouterMetrics, VersionMetrics
from services.endpoint.recording import put_recording_into
from services.endpoint.schema import DirectoryArguments
from services.endpoint.versions import HEALTH_CHECK_S

_UNCOUNTED_REQUESTS = 64
"""Room above the decoding queue for health checks, lists, and requests on their way to a refusal."""


@serve.deployment(graceful_shutdown_timeout_s=60, max_constructor_retry_count=1, health_check_period_s=HEALTH_CHECK_S)
@serve.ingress()
class DirectoryEndpoint:
    """A replica: the directory's model, threads that compute, the HTTP interface, and what Prometheus is told of it."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        import torch

        setup_logging("INFO")
        self._arguments = DirectoryArguments.model_validate(arguments)
        torch.set_num_threads(self._arguments.threads_per_replica or threads_beside_serve(self._arguments.replicas))
        self._model = FixedModel(self._arguments)

    def check_health(self) -> None:
        """Asked by Serve, which replaces a replica whose model will never answer again."""
        assert self._model.served is not None
        self._model.served.model.check()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the constructor is done."""
        served, name = self._model.served, self._arguments.model_name
        assert served is not None
        version, model = served.champion.version, served.model
        queue = VersionMetrics(name, version, lambda: model.load.running + model.load.waiting)
        return put_recording_into(build_api(self._arguments, self._model), version, RouterMetrics(name), queue)


def app(args: dict[str, Any]) -> Application:
    """Builds the application from `model_name`, `directory` and the fields of `EndpointConfig`.

    Raises:
        ConfigError: an argument is missing, unknown or out of range, or the address is public.
    """
    arguments = validate(DirectoryArguments, args, "of the endpoint")
    if not is_loopback(arguments.host):
        raise ConfigError(
            f"host {arguments.host}: other machines reach this address, and a plain directory has no API keys: listen "
            "on 127.0.0.1, or register the model and serve it with a config"
        )
    deployment = DirectoryEndpoint.options(  # type: ignore[attr-defined]  # the decorator makes it a Deployment
        num_replicas=arguments.replicas,
        max_ongoing_requests=arguments.max_running + arguments.max_waiting + _UNCOUNTED_REQUESTS,
        ray_actor_options={
            "num_cpus": 1,
            "num_gpus": arguments.gpus_per_replica,
            "runtime_env": {"env_vars": process_environment()},
        },
    )
    return deployment.bind(arguments.model_dump())
