"""The HTTP interface: routes, limits, keys, and one error envelope for everything that goes wrong.

An ordinary ASGI application around whatever follows the champion; Ray Serve runs it in production, a test client in
tests. The Serve proxy gives every answer its `x-request-id`.
"""

import contextlib
import hashlib
import hmac
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import ConfigError
from services.endpoint.answering import respond, respond_at_once
from services.endpoint.answers import ChatAnswer, CompletionAnswer, classifications_body, embeddings_body
from services.endpoint.encoder_schema import ClassificationRequest, EmbeddingRequest
from services.endpoint.encoders import EncoderModel
from services.endpoint.errors import ApiError, internal, invalid, not_supported, unavailable
from services.endpoint.following import Served
from services.endpoint.model import ServedModel
from services.endpoint.openapi import document
from services.endpoint.reading import Reader
from services.endpoint.reasoning import Reasoning, reasoning_for
from services.endpoint.schema import (
    ChatRequest,
    CompletionRequest,
    ModelCard,
    ModelList,
    RequestBody,
    ServedArguments,
)

logger = logging.getLogger(__name__)

API_KEYS_VARIABLE = "RAYSTILL_API_KEYS_FILE"
"""Environment variable with the path of a file that holds one key per line; unset, the interface is open."""

R = TypeVar("R", bound=RequestBody)

_READ = ["GET", "HEAD"]
_DOES = {
    "language_model": "continues texts; ask /v1/completions or /v1/chat/completions",
    "embeddings": "is an encoder; ask /v1/embeddings",
    "classifications": "is a classifier; ask /v1/classifications",
}


class Follower(Protocol):
    """Where the model comes from."""

    @property
    def served(self) -> Served | None: ...

    @property
    def problem(self) -> str | None: ...


def build_api(arguments: ServedArguments, follower: Follower) -> FastAPI:
    """The application. `follower` stays the caller's to stop."""
    keys = read_api_keys(os.environ.get(API_KEYS_VARIABLE))
    reader = Reader(arguments.max_body_bytes)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        reader.close()

    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, lifespan=lifespan)
    api.add_middleware(Envelope, keys=keys)
    api.add_exception_handler(ApiError, _answer_error)
    api.add_exception_handler(HTTPException, _answer_error)

    @api.api_route("/healthz", methods=_READ)
    async def healthz() -> Response:
        served = follower.served
        state: dict[str, Any] = {"status": "ok" if served else "unavailable", "model": arguments.model_name}
        if served is not None:
            state |= {"version": served.champion.version, "epoch": served.champion.epoch}
            state |= {"scheme": served.model.scheme, "promoted_at": served.champion.promoted_at}
            load = served.model.load
            state |= {"requests": load.running + load.waiting, "load": asdict(load)}
        state |= {"problem": follower.problem}
        return JSONResponse(state, status_code=200 if served else 503)

    @api.api_route("/openapi.json", methods=_READ)
    async def openapi() -> Response:
        return JSONResponse(document(arguments, with_keys=bool(keys)))

    @api.api_route("/v1/models", methods=_READ)
    async def list_models() -> Response:
        return JSONResponse(ModelList(data=[_card(current())]).model_dump())

    @api.api_route("/v1/models/{model:path}", methods=_READ)
    async def get_model(model: str) -> Response:
        served = current()
        check_model(model)
        return JSONResponse(_card(served).model_dump())

    @api.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = await read(request, CompletionRequest)
        model = language_model(request)
        prompts, sampling = asked.prompts(), asked.sampling()
        if len(prompts) * sampling.num_choices > arguments.max_choices:
            param = "n" if len(prompts) <= arguments.max_choices else "prompt"
            raise invalid(f"At most {arguments.max_choices} choices (prompts times n) in one request", param)

        def encode() -> list[list[int]]:
            encoded = [model.encode(prompt) for prompt in prompts]
            for prompt_ids in encoded:
                model.check_length(prompt_ids, sampling, "prompt")
            return encoded

        model.check_room()
        for prompt in prompts:
            reader.check_may_fit(model, prompt, "prompt")
        encoded = await reader.tokenise(sum(map(len, prompts)), encode)
        running = model.submit(encoded, sampling)
        answer = CompletionAnswer(asked.model, model.vocabulary, asked.logprobs is not None, asked.include_usage)
        return await respond(request, running, answer, bool(asked.stream), asked.include_usage)

    @api.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        asked = await read(request, ChatRequest)
        model = language_model(request)
        sampling = asked.sampling()
        if sampling.num_choices > arguments.max_choices:
            raise invalid(f"At most {arguments.max_choices} choices in one request", "n")
        template_arguments = asked.template_arguments()

        def encode() -> tuple[list[int], Reasoning | None]:
            prompt_ids = model.encode_chat(asked.messages, template_arguments)
            model.check_length(prompt_ids, sampling, "messages")
            return prompt_ids, reasoning_for(model.tokenizer, template_arguments, asked.wants_reasoning())

        model.check_room()
        reader.check_chat_may_fit(model, asked.messages)
        num_characters = sum(len(message.text()) for message in asked.messages)
        prompt_ids, reasoning = await reader.tokenise(num_characters, encode)
        running = model.submit([prompt_ids], sampling)
        answer = ChatAnswer(asked.model, model.vocabulary, bool(asked.logprobs), asked.include_usage, reasoning)
        return await respond(request, running, answer, bool(asked.stream), asked.include_usage)

    @api.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        asked = await read(request, EmbeddingRequest)
        model = encoder("embeddings", request)
        model.check_dimensions(asked.dimensions)
        texts = await encode_inputs(model, asked)

        def work(cancelled: Callable[[], bool]) -> Iterator[str]:
            vectors = model.embed(texts, cancelled, asked.dimensions)
            yield embeddings_body(asked.model, vectors, asked.encoding_format == "base64", sum(map(len, texts)))

        return await respond_at_once(request, model.start(work))

    @api.post("/v1/classifications")
    async def classifications(request: Request) -> Response:
        asked = await read(request, ClassificationRequest)
        model = encoder("classifications", request)
        texts = await encode_inputs(model, asked)

        def work(cancelled: Callable[[], bool]) -> Iterator[str]:
            probabilities = model.classify(texts, cancelled)
            yield classifications_body(asked.model, model.labels, probabilities, asked.top_k, sum(map(len, texts)))

        return await respond_at_once(request, model.start(work))

    def current() -> Served:
        served = follower.served
        if served is None:
            raise unavailable(f"No model is served: {follower.problem}", "model_not_ready", retry_after_s=5)
        return served

    def language_model(request: Request) -> ServedModel:
        served = current().model
        if isinstance(served, EncoderModel):
            raise not_supported(request.url.path, arguments.model_name, _DOES[served.kind])
        return served

    def encoder(kind: str, request: Request) -> EncoderModel:
        served = current().model
        if not isinstance(served, EncoderModel) or served.kind != kind:
            does = _DOES[served.kind if isinstance(served, EncoderModel) else "language_model"]
            raise not_supported(request.url.path, arguments.model_name, does)
        return served

    async def encode_inputs(model: EncoderModel, asked: EmbeddingRequest | ClassificationRequest) -> list[list[int]]:
        inputs = asked.inputs()
        if len(inputs) > arguments.max_inputs:
            raise invalid(f"At most {arguments.max_inputs} inputs in one request, found {len(inputs)}", "input")
        size = sum(map(len, inputs))
        return await reader.tokenise(size, lambda: [model.encode(text, bool(asked.truncate)) for text in inputs])

    def check_model(model: str) -> None:
        if model != arguments.model_name:
            message = f"The model {model[:128]!r} does not exist; this endpoint serves {arguments.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def read(request: Request, kind: type[R]) -> R:
        asked = await reader.parse(request, kind)
        check_model(asked.model)
        if unknown := asked.unknown_keys():
            logger.info("Ignored unknown keys of a request: %.200r", unknown)
        return asked

    return api


def _card(served: Served) -> ModelCard:
    created = int(datetime.fromisoformat(served.champion.promoted_at).timestamp())
    return ModelCard(id=served.champion.model_name, created=created)


# --- around every request ---------------------------------------------------------------------------------------------


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        unknown = error.status_code == 404
        message = f"Unknown path {request.url.path[:128]}" if unknown else f"{request.method}: {error.detail}"
        error = ApiError(error.status_code, message, headers=dict(error.headers or {}))
    assert isinstance(error, ApiError)
    return JSONResponse(error.envelope(), status_code=error.status, headers=error.headers)


class Envelope:
    """Outermost layer: checks the key, and turns an unexpected error into a 500 in the envelope."""

    def __init__(self, app: ASGIApp, keys: frozenset[bytes]) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        request = Request(scope, receive)
        try:
            if self._keys and scope["path"] != "/healthz":
                self._authorize(request.headers.get("authorization", ""))
            await self._app(scope, receive, watched)
        except ApiError as error:
            await (await _answer_error(request, error))(scope, receive, send)
        except ClientDisconnect:
            logger.info("A client left before its answer")
        except Exception:
            logger.exception("Request %s failed", request.headers.get("x-request-id", "-"))
            if not started:
                await (await _answer_error(request, internal()))(scope, receive, send)

    def _authorize(self, header: str) -> None:
        scheme, _, key = header.partition(" ")
        digest = _digest(key.strip()) if scheme.lower() == "bearer" else b""
        # Every key is compared, so that the time taken does not say which one was close.
        if sum(hmac.compare_digest(digest, known) for known in self._keys) == 0:
            headers = {"www-authenticate": "Bearer"}
            raise ApiError(401, "Incorrect API key provided", code="invalid_api_key", headers=headers)


def read_api_keys(path: str | None) -> frozenset[bytes]:
    """Digests of the keys in a file, one key per line; none if there is no file to read.

    Raises:
        ConfigError: the file cannot be read or holds no key.
    """
    if not path:
        return frozenset()
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{API_KEYS_VARIABLE}={path}: cannot be read ({error}); give a file with one key per line"
        ) from error
    keys = frozenset(_digest(line.strip()) for line in lines if line.strip())
    if not keys:
        raise ConfigError(f"{API_KEYS_VARIABLE}={path}: holds no key; write one per line, or unset the variable")
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
