"""Starting, watching, asking and stopping the endpoint. Imports neither torch nor, until something is started, ray."""

import asyncio
import json
import logging
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from cluster.connection import while_ray_lives
from cluster.errors import PortInUse
from services.endpoint.errors import EndpointUnavailable
from services.endpoint.schema import DirectoryArguments, EndpointArguments, EndpointConfig

APP_NAME = "endpoint"

# Environment proxies are for the internet, not for a service of one's own.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def start_endpoint(
    config: EndpointConfig,
    model_name: str,
    database: str,
    *,
    tracking: str = "",
    placement: Mapping[str, Any] | None = None,
    timeout_s: float | None = None,
    blocking: bool = False,
) -> str:
    """Runs the endpoint on the connected Ray and waits until it serves; returns its base URL.

    Args:
        database: SQLAlchemy URL of the champions database, reachable from every node.
        tracking: MLflow's URI, likewise, where the end of a canary is written down; empty: only in the database.
        placement: `resources` and `label_selector` of each replica of a version.
        timeout_s: how long to wait for the first champion to be loaded; by default what its config
            says (`loading_s`).
        blocking: return only when interrupted, and stop the endpoint then.

    Raises:
        PortInUse: something else listens at the address, or Serve of this Ray has an endpoint or answers elsewhere.
        EndpointUnavailable: not healthy in time; the message has the reason that the endpoint gives.
    """
    from ray import serve

    from services.endpoint.deployment import app

    named = {"model_name": model_name, "database": database, "tracking": tracking}
    application = app({**config.model_dump(), **named, **(placement or {})})
    start_serve(config.host, config.port)
    if APP_NAME in serve.status().applications:  # running it again would replace it, and stopping it end the other
        raise PortInUse(
            f"endpoint: asked to serve {model_name} on {config.host}:{config.port}, but an endpoint runs on this Ray "
            "already: stop that one, or use another cluster"
        )
    serve.run(application, name=APP_NAME, route_prefix="/", blocking=False)
    url = base_url(config)
    wait_healthy(url, timeout_s or config.loading_s)
    if blocking:
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            stop_endpoint()
    return url


def start_directory(arguments: DirectoryArguments, timeout_s: float = 600.0) -> str:
    """Runs the endpoint around a plain model directory, as `start_endpoint` does around a champion.

    Raises:
        PortInUse: as `start_endpoint`.
        EndpointUnavailable: the model could not be loaded, or not in time.
    """
    from ray import serve

    from services.endpoint.fixed_deployment import app
    from services.endpoint.versions import application_failure

    application = app(arguments.model_dump())
    start_serve(arguments.host, arguments.port)
    if APP_NAME in serve.status().applications:
        raise PortInUse(
            f"endpoint: asked to serve {arguments.directory} on {arguments.host}:{arguments.port}, but an endpoint "
            "runs on this Ray already: stop that one, or use another cluster"
        )
    try:
        serve.run(application, name=APP_NAME, route_prefix="/", blocking=False)
    except RuntimeError as error:  # the replica's constructor failed, or it could not be started
        said = str(application_failure(APP_NAME) or error).strip() or type(error).__name__
        reason = said.splitlines()[-1]
        raise EndpointUnavailable(f"endpoint: {arguments.directory} could not be loaded ({reason})") from error
    url = base_url(arguments)
    wait_healthy(url, timeout_s)
    return url


def stop_endpoint() -> None:
    """Removes the application, then those of its versions; answers that are being written are finished first."""
    from ray import serve

    from services.endpoint.versions import version_applications

    def remove() -> None:
        serve.delete(APP_NAME)
        for name in version_applications():
            serve.delete(name)

    while_ray_lives(remove)


def ask_traffic(url: str, api_key: str | None = None) -> dict[str, Any]:
    """What `GET /v1/raystill/traffic` says: shares and recent figures of each version, and the canary.

    Raises:
        EndpointUnavailable: no answer, or an error.
    """
    headers = {"authorization": f"Bearer {api_key}"} if api_key is not None else {}
    try:
        with _opener.open(urllib.request.Request(f"{url}/v1/raystill/traffic", headers=headers), timeout=10) as reply:
            return json.load(reply)
    except (OSError, ValueError) as error:
        raise EndpointUnavailable(f"endpoint {url}: it does not say its traffic ({error})") from error


def look_at_teacher(config: EndpointConfig, model_name: str) -> dict[str, Any]:
    """What an endpoint with this config would say of its teacher (`teacher_url`): `version`, the teacher's name there,
    and `problem`, why it is not up or None."""
    from services.endpoint.teacher import Teacher

    asked = {name: getattr(config, name) for name in EndpointConfig.model_fields}
    return asyncio.run(Teacher(EndpointArguments(**asked, model_name=model_name, database="none:")).row())


def base_url(config: EndpointConfig) -> str:
    """Where this machine reaches the endpoint."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


def check_port_free(host: str, port: int) -> None:
    """Raises `PortInUse` unless a server could listen at this address now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: an address whose last connections are still winding down counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortInUse(
                f"endpoint: asked to listen on {host}:{port}, found {error.strerror or error}: "
                "choose another port with serve.port=..., or stop what listens there"
            ) from None


def wait_healthy(url: str, timeout_s: float) -> dict[str, Any]:
    """Waits until the endpoint serves a version; returns what /healthz says.

    Raises:
        EndpointUnavailable: after `timeout_s` seconds, with the last reason.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            status, state = _get_json(f"{url}/healthz", timeout_s=5)
            if status == 200:
                return state
            reason = state.get("problem") or f"status {status}"
        except (OSError, ValueError) as error:
            reason = str(error)
        if time.monotonic() > deadline:
            raise EndpointUnavailable(f"endpoint {url}: not healthy within {timeout_s:g} s ({reason}); see its log")
        time.sleep(0.2)


def ask(
    url: str, model: str, prompt: str, max_tokens: int, *, temperature: float = 0.0, api_key: str | None = None
) -> str:
    """One completion over HTTP: the text that follows the prompt.

    Raises:
        EndpointUnavailable: no answer, or an error; the message is the endpoint's.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": temperature}
    headers = {"content-type": "application/json"}
    if api_key is not None:
        headers["authorization"] = f"Bearer {api_key}"
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with _opener.open(request, timeout=600) as response:
            return json.load(response)["choices"][0]["text"]
    except urllib.error.HTTPError as error:
        with error:
            text = error.read(4096).decode("utf-8", "replace")
        raise EndpointUnavailable(f"endpoint {url}: status {error.code} for model {model}: {_message(text)}") from None
    except (OSError, ValueError) as error:
        raise EndpointUnavailable(f"endpoint {url}: no answer ({error})") from error


def _message(text: str) -> str:
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return text


def _get_json(url: str, timeout_s: float) -> tuple[int, dict[str, Any]]:
    try:
        with _opener.open(url, timeout=timeout_s) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def start_serve(host: str, port: int) -> None:
    """Serve with an HTTP proxy at this address.

    Serve has one address for all its applications, fixed when it starts; later options are ignored with a warning. One
    that runs elsewhere and has no application left is therefore replaced.
    """
    from ray import serve
    from ray.serve.config import HTTPOptions, ProxyLocation

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    from ray.serve.context import _get_global_client

    running = _get_global_client(raise_if_no_controller_running=False)
    if running is not None:
        options = running.http_config
        if (options.host, options.port) == (host, port) and options.location != "NoServer":
            return
        if applications := sorted(serve.status().applications):
            where = "nowhere" if options.location == "NoServer" else f"on {options.host}:{options.port}"
            raise PortInUse(
                f"endpoint: asked to listen on {host}:{port}, but Serve of this Ray already listens {where} "
                f"for {', '.join(applications)}: stop these first, or start Serve with this address"
            )
        serve.shutdown()
    check_port_free(host, port)
    serve.start(http_options=HTTPOptions(host=host, port=port), proxy_location=ProxyLocation.HeadOnly)
