"""The HTTP interface: routes, limits, keys, and one error envelope for everything that goes wrong.

An ordinary ASGI application around whatever follows the champion; Ray Serve runs it in production, a test client in
tests. The Serve proxy gives every answer its `x-request-id`.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import ConfigError
from services.endpoint.answers import Answer, ChatAnswer, CompletionAnswer
from services.endpoint.errors import ApiError, internal, invalid, unavailable
from services.endpoint.following import Served, Serving
from services.endpoint.model import Piece, ServedModel
from services.endpoint.parsing import parse_request
from services.endpoint.pool import DecodingPool, Running
from services.endpoint.schema import (
    ChatRequest,
    CompletionRequest,
    EndpointArguments,
    ModelCard,
    ModelList,
    Sampling,
    Usage,
)

logger = logging.getLogger(__name__)

API_KEYS_VARIABLE = "RAYSTILL_API_KEYS_FILE"
"""Environment variable with the path of a file that holds one key per line; unset, the interface is open."""

R = TypeVar("R", CompletionRequest, ChatRequest)
Encode = Callable[[ServedModel], list[list[int]]]


def build_api(
    arguments: EndpointArguments, follower: Serving[ServedModel], pool: DecodingPool, *, behind_router: bool = False
) -> FastAPI:
    """The application. `follower` and `pool` stay the caller's to stop.

    Args:
        behind_router: a router has checked the key; whoever calls is let in.
    """
    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    keys = frozenset[bytes]() if behind_router else read_api_keys(os.environ.get(API_KEYS_VARIABLE))
    api.add_middleware(Envelope, keys=keys)
    api.add_exception_handler(ApiError, _answer_error)
    api.add_exception_handler(HTTPException, _answer_error)

    @api.get("/healthz")
    async def healthz() -> Response:
        served = follower.served
        state: dict[str, Any] = {"status": "ok" if served else "unavailable", "model": arguments.model_name}
        if served is not None:
            state |= {"version": served.champion.version, "epoch": served.champion.epoch}
            state |= {"scheme": served.model.scheme, "promoted_at": served.champion.promoted_at}
        state |= {"problem": follower.problem, "requests": pool.num_admitted}
        return JSONResponse(state, status_code=200 if served else 503)

    @api.get("/v1/models")
    async def list_models() -> Response:
        return JSONResponse(ModelList(data=[_card(current())]).model_dump())

    @api.get("/v1/models/{model:path}")
    async def get_model(model: str) -> Response:
        served = current()
        check_model(model)
        return JSONResponse(_card(served).model_dump())

    @api.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = await read(request, CompletionRequest)
        served = current()
        prompts = asked.prompts()
        sampling = asked.sampling()
        if len(prompts) * sampling.num_choices > arguments.max_choices:
            param = "n" if len(prompts) <= arguments.max_choices else "prompt"
            raise invalid(f"At most {arguments.max_choices} choices (prompts times n) in one request", param)
        answer = CompletionAnswer(asked.model, served.model.vocabulary, asked.logprobs is not None, asked.include_usage)
        work = _work(served.model, lambda model: [model.encode(prompt) for prompt in prompts], sampling, "prompt")
        return await respond(request, pool.start(work), answer, bool(asked.stream), asked.include_usage)

    @api.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        asked = await read(request, ChatRequest)
        served = current()
        sampling = asked.sampling()
        if sampling.num_choices > arguments.max_choices:
            raise invalid(f"At most {arguments.max_choices} choices in one request", "n")
        template_arguments = asked.template_arguments()
        answer = ChatAnswer(asked.model, served.model.vocabulary, bool(asked.logprobs), asked.include_usage)
        work = _work(
            served.model,
            lambda model: [model.encode_chat(asked.messages, template_arguments)],
            sampling,
            "messages",
        )
        return await respond(request, pool.start(work), answer, bool(asked.stream), asked.include_usage)

    def current() -> Served[ServedModel]:
        served = follower.served
        if served is None:
            raise unavailable(f"No model is served: {follower.problem}", "model_not_ready", retry_after_s=5)
        return served

    def check_model(model: str) -> None:
        if model != arguments.model_name:
            message = f"The model {model[:128]!r} does not exist; this endpoint serves {arguments.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def read(request: Request, kind: type[R]) -> R:
        asked = parse_request(kind, await read_body(request, arguments.max_body_bytes))
        check_model(asked.model)
        if unknown := asked.unknown_keys():
            logger.info("Ignored unknown keys of a request: %.200r", unknown)
        return asked

    return api


# --- one request ------------------------------------------------------------------------------------------------------


def _work(
    model: ServedModel, encode: Encode, sampling: Sampling, param: str
) -> Callable[[Callable[[], bool]], Iterator[int | Piece]]:
    """What the pool runs: first the number of prompt tokens, then the pieces of all choices."""

    def run(cancelled: Callable[[], bool]) -> Iterator[int | Piece]:
        prompts = encode(model)
        for prompt_ids in prompts:
            model.check_length(prompt_ids, sampling, param)
        yield sum(len(prompt_ids) for prompt_ids in prompts)
        for number, prompt_ids in enumerate(prompts):
            yield from model.generate(prompt_ids, sampling, cancelled, first_index=number * sampling.num_choices)

    return run


async def respond(
    request: Request, running: Running[int | Piece], answer: Answer, stream: bool, include_usage: bool
) -> Response:
    """The answer to a request that is running: whole, or as a stream that begins once the prompt was accepted."""
    try:
        num_prompt_tokens = await anext(running)
        assert isinstance(num_prompt_tokens, int)
        if stream:
            return EventStream(_events(running, answer, num_prompt_tokens, include_usage), running)
        pieces = await _unless_disconnected(request, _collect(running))
        return Response(answer.whole(pieces, _usage(num_prompt_tokens, pieces)), media_type="application/json")
    except BaseException:
        running.cancel()
        raise


async def _collect(running: Running[int | Piece]) -> list[Piece]:
    return [piece async for piece in running if isinstance(piece, Piece)]


async def _unless_disconnected(request: Request, collecting: Any) -> list[Piece]:
    """The result of `collecting`, or `ClientDisconnect` as soon as nobody waits for it."""

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    collector, watcher = asyncio.ensure_future(collecting), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({collector, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not collector.done():
            raise ClientDisconnect
        return collector.result()
    finally:
        collector.cancel()
        watcher.cancel()


async def _events(
    running: Running[int | Piece], answer: Answer, num_prompt_tokens: int, include_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events; an error after the first one becomes an event and ends the stream."""
    num_sampled = 0
    try:
        async for piece in running:
            assert isinstance(piece, Piece)
            num_sampled += piece.num_sampled
            for chunk in answer.chunks(piece):
                yield f"data: {chunk}\n\n"
        if include_usage:
            yield f"data: {answer.usage_chunk(_usage(num_prompt_tokens, [], num_sampled))}\n\n"
        yield "data: [DONE]\n\n"
    except Exception:
        logger.exception("A streamed answer failed")
        yield f"data: {json.dumps(internal().envelope())}\n\n"


class EventStream(StreamingResponse):
    """A stream of events whose work is cancelled when the client leaves, also before the first event."""

    def __init__(self, events: AsyncIterator[str], running: Running[Any]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.cancel()


def _usage(num_prompt_tokens: int, pieces: list[Piece], num_sampled: int = 0) -> Usage:
    num_sampled += sum(piece.num_sampled for piece in pieces)
    return Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_sampled,
        total_tokens=num_prompt_tokens + num_sampled,
    )


def _card(served: Served[Any]) -> ModelCard:
    created = int(datetime.fromisoformat(served.champion.promoted_at).timestamp())
    return ModelCard(id=served.champion.model_name, created=created)


# --- around every request ---------------------------------------------------------------------------------------------


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The body of a request. Raises `ApiError` if it is not said to be JSON, or is too large."""
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(415, f"Expected content-type application/json, found {media_type[:64]}")
    too_large = ApiError(413, f"The request body is larger than {limit_bytes} bytes", code="request_too_large")
    with contextlib.suppress(ValueError):
        if int(request.headers.get("content-length", "0")) > limit_bytes:
            raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            raise too_large
    return bytes(body)


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
