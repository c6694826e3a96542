"""The endpoint's own Serve application: routers that take requests, and the supervisor that tells them who answers.

    serve run services.endpoint.deployment:app model_name=NAME database=sqlite:////dir/champions.db

The versions are applications of their own (`versions.py`), which the supervisor starts and ends, so promoting needs no
redeployment. Requests are refused in the version when its queue is full; Serve's own limits are set above that, because
its rejections are slow.
"""

import threading
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from cluster.api_keys import check_address
from cluster.config import validate
from cluster.logs import setup_logging
from cluster.resources import process_environment
from services.endpoint.api import build_api
from services.endpoint.canary import Observation
from services.endpoint.exchange import Exchange
from services.endpoint.metrics import RouterMetrics
from services.endpoint.router import Router, put_router_into
from services.endpoint.schema import EndpointArguments
from services.endpoint.supervisor import Supervisor
from services.endpoint.teacher import Teacher
from services.endpoint.traffic import Route, RoutingTable
from services.endpoint.versions import DEPLOYMENT, RemoteVersion, VersionApplications

_UNCOUNTED_REQUESTS = 1024
"""Room above the versions' queues for health checks, lists, bodies that come slowly, and requests on their way to a
refusal."""


@serve.deployment(name="Supervisor", num_replicas=1, max_ongoing_requests=1000)
class SupervisorReplica:
    """The one supervisor of an endpoint, and the thread in which it works."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        setup_logging("INFO")
        asked = EndpointArguments.model_validate(arguments)
        self._supervisor = Supervisor(asked, VersionApplications(asked))

        def work() -> None:
            while True:
                self._supervisor.poll()
                self._supervisor.urgent.wait(asked.poll_s)

        threading.Thread(target=work, name="supervisor", daemon=True).start()

    async def exchange(
        self, router: str, message: int, observations: list[Observation], in_flight: dict[str, int], table: int
    ) -> tuple[RoutingTable, dict[str, Any]]:
        """See `Supervisor.exchange`."""
        return self._supervisor.exchange(router, message, observations, in_flight, table)


@serve.deployment(graceful_shutdown_timeout_s=60)
@serve.ingress()
class Endpoint:
    """A router: the HTTP interface, whose questions to a model go to the versions."""

    def __init__(self, arguments: dict[str, Any], supervisor: Any) -> None:
        setup_logging("INFO")
        self._arguments = EndpointArguments.model_validate(arguments)
        versions: dict[str, RemoteVersion] = {}

        def reach(route: Route) -> RemoteVersion:
            if route.app not in versions:
                versions[route.app] = RemoteVersion(route)
            return versions[route.app]

        def ask(*said: Any) -> tuple[RoutingTable, dict[str, Any]]:
            return supervisor.exchange.remote(*said).result(timeout_s=30)

        def warm(route: Route) -> None:
            serve.get_deployment_handle(DEPLOYMENT, app_name=route.app).describe.remote().result(timeout_s=10)
            versions[route.app] = RemoteVersion(route)

        metrics = RouterMetrics(self._arguments.model_name)
        teacher = Teacher(self._arguments) if self._arguments.teacher_url is not None else None
        self._router = Router(self._arguments, reach, metrics, teacher)
        self._exchange = Exchange(self._router, ask, warm, self._arguments.poll_s)
        self._exchange.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the constructor is done."""
        return put_router_into(build_api(self._arguments, self._router, place="front"), self._router)


def app(args: dict[str, Any]) -> Application:
    """Builds the application from `model_name`, `database`, `tracking` and the fields of `EndpointConfig`.

    Raises:
        ConfigError: an argument is missing, unknown or out of range, or `host` is public and there is no API key.
    """
    arguments = validate(EndpointArguments, args, "of the endpoint")
    check_address(arguments.host, arguments.database)
    environment = process_environment()
    supervisor = SupervisorReplica.options(  # type: ignore[attr-defined]  # the decorator makes it a Deployment
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": dict(environment)}}
    )
    capacity = arguments.replicas * (arguments.max_running + arguments.max_waiting)
    deployment = Endpoint.options(  # type: ignore[attr-defined]  # the same
        num_replicas=arguments.routers,
        max_ongoing_requests=2 * capacity + _UNCOUNTED_REQUESTS,  # of champion and challenger
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": environment}},
    )
    plain = arguments.model_dump()
    return deployment.bind(plain, supervisor.bind(plain))
