"""A Serve application for each version: it loads one registered version and answers for it, and nothing else.

What answers is the same HTTP interface as ever (`api.py`), called through a streaming handle method in place of a
socket. So a request is parsed, checked and answered beside the model and its tokenizer, and the router needs to know of
neither. A message through the handle costs about as much as a small model's token; what is ready is therefore sent
together, at most one message every `_FLUSH_S` after the first.

A version that cannot be loaded fails in its constructor: Serve then never routes to the replica, neither at first nor
when a replica is started again on another machine. What needs torch is imported there too, since the supervisor, which
starts versions, does without.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve import Application

from cluster import errors
from cluster.champions import Champion
from cluster.errors import ModelError
from cluster.logs import setup_logging
from cluster.resources import process_environment, threads_beside_serve
from services.endpoint.applications import ApplicationState
from services.endpoint.envelope import ACCOUNT
from services.endpoint.following import Served, verified
from services.endpoint.metrics import VersionMetrics
from services.endpoint.parsing import parse_request
from services.endpoint.schema import ChatRequest, CompletionRequest, EndpointArguments, Sampling
from services.endpoint.traffic import Route

if TYPE_CHECKING:
    from services.endpoint.metering import Meter

DEPLOYMENT = "Version"
"""Name of the deployment in every version's application: by this the applications are known."""

HEALTH_CHECK_S = 2.0
"""Between two questions whether a model still answers; Serve replaces a replica after three that failed."""
_FLUSH_S = 0.02
"""Text of a stream that is ready within this time travels in one message. The first text is sent at once."""
_COMPARED_TOKENS = 16
"""Length of the greedy answers that champion and challenger are compared by."""
_UNCOUNTED_REQUESTS = 64
"""Room above the decoding queue for comparisons, and for requests on their way to a refusal."""

Headers = list[tuple[bytes, bytes]]
Part = tuple[int, Headers, bytes, dict[str, Any] | None]
"""Of an answer: status and headers (the same in every part), bytes of the body, and at the end the figures."""


@dataclass(frozen=True)
class OneVersion:
    """What the HTTP interface of a version serves: always the same."""

    served: Served[Any]
    problem: str | None = None


@serve.deployment(
    name=DEPLOYMENT, graceful_shutdown_timeout_s=60, max_constructor_retry_count=1, health_check_period_s=HEALTH_CHECK_S
)
class Version:
    """A replica of a version: its model with its engine, and the interface that answers."""

    def __init__(self, arguments: dict[str, Any], artefact: dict[str, Any]) -> None:
        import torch

        from services.endpoint.api import build_api
        from services.endpoint.loading import AnyModel, load_model

        setup_logging("INFO")
        asked = EndpointArguments.model_validate(arguments)
        torch.set_num_threads(asked.threads_per_replica or threads_beside_serve(asked.replicas))

        def load(directory: Path) -> AnyModel:
            return load_model(directory, asked)

        version = Champion(**artefact)
        self._model: Any = verified(load)(version)
        self._api = build_api(asked, OneVersion(Served(version, self._model)), place="behind")
        self._metrics = VersionMetrics(asked.model_name, version.version, self._queue)

    def describe(self) -> dict[str, Any]:
        """What a router says about the version, and the requests in this replica's queue."""
        facts = {name: getattr(self._model, name, 0) for name in ("scheme", "max_context_tokens", "max_new_tokens")}
        return {**facts, "queue": self._queue()}

    def check_health(self) -> None:
        """Asked by Serve, which replaces a replica whose model will never answer again."""
        self._model.check()

    def _queue(self) -> int:
        load = self._model.load
        return load.running + load.waiting

    async def answer(self, path: str, query: bytes, headers: Headers, body: bytes) -> AsyncIterator[Part]:
        """Answers a POST. The first part comes with the first text, so that a failure before it has its own status."""
        from services.endpoint.metering import Meter

        meter = Meter()
        messages: asyncio.Queue[Any] = asyncio.Queue()
        received = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not received.is_set():
                received.set()
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.Event().wait()  # who leaves is told by the cancellation
            raise AssertionError("unreachable")

        task = asyncio.ensure_future(self._api(_scope(path, query, headers, meter), receive, messages.put))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        status, answer_headers, done = 0, Headers(), False
        try:
            while not done:
                content = bytearray()
                while not done and not (content and messages.empty()):
                    message = await messages.get()
                    if message is None:
                        done = True
                    elif message["type"] == "http.response.start":
                        status, answer_headers = message["status"], list(message["headers"])
                    else:
                        content += message.get("body", b"")
                        done = not message.get("more_body", False)
                self._metrics.tell_queue()
                yield status, answer_headers, bytes(content), meter.figures() if done else None
                if not done:
                    await asyncio.wait({task}, timeout=_FLUSH_S)
        finally:
            task.cancel()
            self._metrics.tell_queue()

    # --- comparing ---

    async def begin_answer(self, path: str, body: bytes) -> dict[str, Any]:
        """The greedy beginning of an answer, whatever sampling the request asks for: token ids, log-probabilities."""
        prompt_ids = self._prompt(path, body)
        greedy = Sampling(max_new_tokens=self._compared_tokens(prompt_ids), temperature=0.0, top_logprobs=0)
        meter, tokens = await self._run(prompt_ids, greedy)
        token_ids, logprobs = [token.token_id for token in tokens], [token.logprob for token in tokens]
        return {**meter.figures(), "prompt_ids": prompt_ids, "token_ids": token_ids, "logprobs": logprobs}

    async def compare(self, path: str, body: bytes, other: dict[str, Any]) -> dict[str, Any]:
        """This version's own beginning beside another's: `disagreement` is the mean absolute difference of the
        log-probabilities of the other's tokens (nats per token), `agreement` the share of its tokens up to the first
        that differs. Both are None where the prompt has other tokens here, or the other had nothing to say."""
        own = await self.begin_answer(path, body)
        found: dict[str, Any] = {**own, "disagreement": None, "agreement": None}
        if own["prompt_ids"] != other["prompt_ids"] or not other["token_ids"]:
            return found
        theirs = other["token_ids"]
        score = Sampling(max_new_tokens=0, temperature=0.0, top_logprobs=0, echo=True)
        _, tokens = await self._run(own["prompt_ids"] + theirs, score)
        differences = [
            abs((token.logprob or 0.0) - (logprob or 0.0))
            for token, logprob in zip(tokens[-len(theirs) :], other["logprobs"], strict=True)
        ]
        same = next(
            (at for at, pair in enumerate(zip(theirs, own["token_ids"], strict=False)) if pair[0] != pair[1]), None
        )
        same = min(len(theirs), len(own["token_ids"])) if same is None else same
        return {**found, "disagreement": sum(differences) / len(differences), "agreement": same / len(theirs)}

    def _prompt(self, path: str, body: bytes) -> list[int]:
        if path.endswith("/chat/completions"):
            chat = parse_request(ChatRequest, body)
            return self._model.encode_chat(chat.messages, chat.template_arguments())
        return self._model.encode(parse_request(CompletionRequest, body).prompts()[0])

    def _compared_tokens(self, prompt_ids: list[int]) -> int:
        room = self._model.max_context_tokens - len(prompt_ids)
        return max(0, min(_COMPARED_TOKENS, self._model.max_new_tokens, room))

    async def _run(self, prompt_ids: list[int], sampling: Sampling) -> "tuple[Meter, list[Any]]":
        from services.endpoint.decoding import Piece
        from services.endpoint.metering import Meter

        self._model.check_length(prompt_ids, sampling, "prompt")
        meter = Meter()
        running = meter.counted(self._model.submit([prompt_ids], sampling))
        try:
            return meter, [token async for piece in running if isinstance(piece, Piece) for token in piece.tokens]
        finally:
            running.cancel()


def _scope(path: str, query: bytes, headers: Headers, meter: "Meter") -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": None,
        ACCOUNT: meter,
    }


class RemoteVersion:
    """A version of the connected Serve, as a router asks it."""

    def __init__(self, route: Route) -> None:
        self._handle = serve.get_deployment_handle(DEPLOYMENT, app_name=route.app)

    async def answer(self, path: str, query: bytes, headers: Headers, body: bytes) -> AsyncGenerator[Part]:
        """As `Version.answer`; closing the generator ends the work in the replica."""
        parts = self._handle.options(method_name="answer", stream=True).remote(path, query, headers, body)
        whole = False
        try:
            async for part in parts:
                whole = part[3] is not None
                yield part
        finally:
            if not whole:
                parts.cancel()

    async def begin_answer(self, path: str, body: bytes) -> dict[str, Any]:
        return await self._handle.begin_answer.remote(path, body)

    async def compare(self, path: str, body: bytes, other: dict[str, Any]) -> dict[str, Any]:
        return await self._handle.compare.remote(path, body, other)


# --- the applications -------------------------------------------------------------------------------------------------


class VersionFailed(ModelError):
    """A version's replica could not be started for a reason that is not known better."""


class VersionApplications:
    """The version applications of the connected Serve: what `services.endpoint.supervisor` starts and ends."""

    def __init__(self, arguments: EndpointArguments) -> None:
        self._arguments = arguments

    def name_of(self, version: Champion) -> str:
        """Model and version, with the beginning of the digest, since a number can be given to other files."""
        return f"{version.model_name}-v{version.version}-{version.manifest_sha256[:8]}"

    def states(self) -> dict[str, ApplicationState]:
        """What Serve says of each of this model's applications, by name."""
        mine = re.compile(re.escape(self._arguments.model_name) + r"-v[^-]+-[0-9a-f]{8}")
        return {
            name: ApplicationState(application.status.value, _message(application), _running(application))
            for name, application in serve.status().applications.items()
            if mine.fullmatch(name)
        }

    def start(self, version: Champion) -> None:
        """Begins to start an application; `states` says what becomes of it."""
        arguments = self._arguments.replace(database="none:", tracking="")  # a version asks no database
        deployment = Version.options(  # type: ignore[attr-defined]  # the decorator makes it a Deployment
            num_replicas=arguments.replicas,
            max_ongoing_requests=arguments.max_running + arguments.max_waiting + _UNCOUNTED_REQUESTS,
            ray_actor_options={
                "num_cpus": 1,
                "num_gpus": arguments.gpus_per_replica,
                "runtime_env": {"env_vars": process_environment()},
                **({"resources": arguments.resources} if arguments.resources else {}),
                **({"label_selector": arguments.label_selector} if arguments.label_selector else {}),
            },
        )
        application: Application = deployment.bind(arguments.model_dump(), vars(version))
        target = serve.RunTarget(target=application, name=self.name_of(version), route_prefix=None)
        serve.run_many([target], wait_for_applications_running=False)

    def route(self, version: Champion) -> Route:
        """How to reach a version that runs, after it has answered once."""
        name = self.name_of(version)
        handle = serve.get_deployment_handle(DEPLOYMENT, app_name=name)
        facts = handle.describe.remote().result(timeout_s=30)
        return Route(
            name,
            version.version,
            version.manifest_sha256,
            version.uri,
            **{key: facts[key] for key in ("scheme", "max_context_tokens", "max_new_tokens")},
        )

    def queue(self, name: str) -> int:
        """Requests that run or wait in all replicas of an application."""
        replies = serve.get_deployment_handle(DEPLOYMENT, app_name=name).broadcast("describe").results(timeout_s=5)
        return sum(reply["queue"] for reply in replies)

    def remove(self, name: str) -> None:
        """Begins to end an application; requests that it has are finished first."""
        serve.delete(name, _blocking=False)

    def failure(self, message: str) -> Exception:
        """The error that a replica's constructor raised, as far as Serve's message names it."""
        return failure_of(message)


def failure_of(message: str) -> Exception:
    """The error that Serve's message about a replica that did not start names last."""
    for found in reversed(re.findall(r"\b(?:cluster\.errors\.)?(\w+)\b: ", message)):
        kind = getattr(errors, found, None) or {"FileNotFoundError": FileNotFoundError}.get(found)
        if isinstance(kind, type) and issubclass(kind, Exception):
            return kind(message.strip().splitlines()[-1][:500])
    return VersionFailed(message[-500:])


def application_failure(name: str) -> Exception | None:
    """Why an application of the connected Serve could not be started, as its replica's constructor said."""
    found = serve.status().applications.get(name)
    return failure_of(_message(found)) if found is not None else None


def _message(application: Any) -> str:
    return "\n".join([application.message, *(item.message for item in application.deployments.values())])


def _running(application: Any) -> int:
    return sum(item.replica_states.get("RUNNING", 0) for item in application.deployments.values())


def version_applications() -> list[str]:
    """Names of all version applications of the connected Serve, of whatever model."""
    return [name for name, found in serve.status().applications.items() if set(found.deployments) == {DEPLOYMENT}]
