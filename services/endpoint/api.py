"""The HTTP interface: routes, limits, keys, and one error envelope for everything that goes wrong.

An ordinary ASGI application around whatever follows the champion; Ray Serve runs it in production, a test client in
tests. The Serve proxy gives every answer its `x-request-id`.
"""

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict
from datetime import datetime
from typing import Any, Literal, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from cluster.api_keys import is_loopback
from services.endpoint.admission import Admission, Gate
from services.endpoint.answering import respond, respond_at_once
from services.endpoint.answers import ChatAnswer, CompletionAnswer, classifications_body, embeddings_body
from services.endpoint.encoder_schema import ClassificationRequest, EmbeddingRequest
from services.endpoint.encoders import EncoderModel
from services.endpoint.envelope import Envelope, account_of, error_response
from services.endpoint.errors import ApiError, not_supported, unavailable
from services.endpoint.following import Served, Serving
from services.endpoint.keys import KeyRing
from services.endpoint.limits import Limits
from services.endpoint.model import ServedModel
from services.endpoint.openapi import document
from services.endpoint.page import page
from services.endpoint.reading import Reader
from services.endpoint.reasoning import Reasoning, reasoning_for
from services.endpoint.records import ModelCard, ModelList
from services.endpoint.schema import ChatRequest, CompletionRequest, RequestBody, ServedArguments

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=RequestBody)

_READ = ["GET", "HEAD"]
_DOES = {
    "language_model": "continues texts; ask /v1/completions or /v1/chat/completions",
    "embeddings": "is an encoder; ask /v1/embeddings",
    "classifications": "is a classifier; ask /v1/classifications",
}


def build_api(
    arguments: ServedArguments, follower: Serving[Any], *, place: Literal["alone", "front", "behind"] = "alone"
) -> FastAPI:
    """The application. `follower` stays the caller's to stop; the keys are followed while it runs.

    Args:
        place: `behind` a router whoever calls is let in, for the router has asked for the key and counted the request.
            At the `front` of several versions what all their replicas take together is shared by the routers.
    """
    keys, gate = (None, None) if place == "behind" else (_keys(arguments), _gate(arguments, place == "front"))
    reader = Reader(arguments.max_body_bytes)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if keys is not None:
            keys.start()
        yield
        reader.close()
        if keys is not None:
            keys.stop()

    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, lifespan=lifespan)
    api.add_middleware(Envelope, keys=keys, gate=gate)
    api.add_exception_handler(ApiError, _answer_error)
    api.add_exception_handler(HTTPException, _answer_error)

    @api.api_route("/", methods=_READ)
    async def root() -> Response:
        return page()

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
        return JSONResponse(document(arguments, with_keys=keys is not None and keys.required))

    @api.api_route("/v1/models", methods=_READ)
    async def list_models() -> Response:
        return JSONResponse(ModelList(data=[_card(current())]).model_dump())

    @api.api_route("/v1/models/{model:path}", methods=_READ)
    async def get_model(model: str) -> Response:
        served = current()
        check_model(model, exactly=True)
        return JSONResponse(_card(served).model_dump())

    @api.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = await read(request, CompletionRequest)
        model = language_model(request)
        prompts, sampling = asked.prompts(), asked.sampling()

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
        texts = await encode_inputs(request, model, asked)

        def work(cancelled: Callable[[], bool]) -> Iterator[str]:
            vectors = model.embed(texts, cancelled, asked.dimensions)
            yield embeddings_body(asked.model, vectors, asked.encoding_format == "base64", sum(map(len, texts)))

        return await respond_at_once(request, model.start(work))

    @api.post("/v1/classifications")
    async def classifications(request: Request) -> Response:
        asked = await read(request, ClassificationRequest)
        model = encoder("classifications", request)
        texts = await encode_inputs(request, model, asked)

        def work(cancelled: Callable[[], bool]) -> Iterator[str]:
            probabilities = model.classify(texts, cancelled)
            yield classifications_body(asked.model, model.labels, probabilities, asked.top_k, sum(map(len, texts)))

        return await respond_at_once(request, model.start(work))

    def current() -> Served[ServedModel]:
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

    async def encode_inputs(
        request: Request, model: EncoderModel, asked: EmbeddingRequest | ClassificationRequest
    ) -> list[list[int]]:
        inputs = asked.inputs()
        size = sum(map(len, inputs))
        texts = await reader.tokenise(size, lambda: [model.encode(text, bool(asked.truncate)) for text in inputs])
        account_of(request).use(sum(map(len, texts)))
        return texts

    def check_model(model: str, exactly: bool = place == "alone") -> None:
        named = model if exactly else model.partition("@")[0]  # NAME@champion and the like are for the router
        if named != arguments.model_name:
            message = f"The model {model[:128]!r} does not exist; this endpoint serves {arguments.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def read(request: Request, kind: type[R]) -> R:
        asked, num_bytes = await reader.parse(request, kind)
        check_model(asked.model)
        asked.check_size(arguments)
        account_of(request).admit(arguments.model_name, num_bytes, asked.longest_answer(arguments.max_new_tokens))
        if unknown := asked.unknown_keys():
            logger.info("Ignored unknown keys of a request: %.200r", unknown)
        return asked

    return api


def _keys(arguments: ServedArguments) -> KeyRing | None:
    """The keys of the database, read once; None where there is no database."""
    if not arguments.database:
        return None
    keys = KeyRing(arguments.database, required=not is_loopback(arguments.host))
    keys.poll()
    return keys


def _gate(arguments: ServedArguments, is_router: bool) -> Gate:
    """What this process lets in: its share of what the replicas behind it take."""
    replicas, processes = (arguments.replicas, arguments.routers) if is_router else (1, arguments.replicas)
    requests = replicas * (arguments.max_running + arguments.max_waiting)
    share = arguments.routers if is_router else 1
    admission = Admission(-(-requests // share), -(-replicas * arguments.max_admitted_tokens // share))
    return Gate(admission, Limits(processes))


def _card(served: Served[Any]) -> ModelCard:
    created = int(datetime.fromisoformat(served.champion.promoted_at).timestamp())
    return ModelCard(id=served.champion.model_name, created=created)


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        unknown = error.status_code == 404
        message = f"Unknown path {request.url.path[:128]}" if unknown else f"{request.method}: {error.detail}"
        error = ApiError(error.status_code, message, headers=dict(error.headers or {}))
    assert isinstance(error, ApiError)
    return error_response(error)
