"""The OpenAPI 3.1 document: every path, every status that it may answer with, and the records of `schema.py`.

Written from the records that are validated and sent, so that the two agree. What a schema cannot say (prompts times
`n`, the context's length, `top_logprobs` without `logprobs`) is answered 400 all the same.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from services.endpoint.encoder_schema import (
    ClassificationList,
    ClassificationRequest,
    EmbeddingList,
    EmbeddingRequest,
)
from services.endpoint.records import ChatChunk, ChatCompletion, Completion, ModelCard, ModelList
from services.endpoint.schema import UNSUPPORTED, ChatRequest, CompletionRequest, ServedArguments

ERRORS = {
    400: "The request is wrong; `param` names the parameter",
    401: "The API key is missing or unknown",
    403: "The API key has no right to this model",
    404: "Unknown path or model, or the model does not do this",
    405: "Another method is wanted; `Allow` names it",
    408: "The request did not arrive, or was not answered, in time",
    413: "The body is larger than the endpoint takes",
    415: "The body is not application/json",
    429: "The key's limit is reached; `Retry-After` says when to come back",
    500: "The server failed; its log says why under the answer's `x-request-id`",
    503: "Nothing is served, or too much is asked; `Retry-After` says when to come back",
}
"""Statuses with the error record as their body."""

_EVENTS = "Server-sent events: a chunk each, or an error, which ends the stream; at last `[DONE]`"


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """Every answer that is not 2xx."""

    error: ErrorDetail


class Health(BaseModel):
    status: str
    model: str
    problem: str | None
    requests: int
    version: str | None = None
    epoch: int | None = None
    scheme: str | None = None
    promoted_at: str | None = None


_REQUESTS: dict[str, tuple[type[BaseModel], type[BaseModel], type[BaseModel] | None, str]] = {
    "/v1/completions": (CompletionRequest, Completion, Completion, "Continues texts"),
    "/v1/chat/completions": (ChatRequest, ChatCompletion, ChatChunk, "Answers a conversation"),
    "/v1/embeddings": (EmbeddingRequest, EmbeddingList, None, "Turns texts into vectors"),
    "/v1/classifications": (ClassificationRequest, ClassificationList, None, "Gives texts probabilities of labels"),
}
_READS: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/models": (ModelList, "The model that is served"),
    "/v1/models/{model}": (ModelCard, "One model"),
    "/healthz": (Health, "Whether something is served, and what"),
}


def document(arguments: ServedArguments, with_keys: bool) -> dict[str, Any]:
    """The document of an endpoint with these limits; `with_keys`: requests need `Authorization: Bearer KEY`."""
    requests = [(model, "validation") for model, *_ in _REQUESTS.values()]
    sent = [ErrorEnvelope, *(model for model, _ in _READS.values())]
    sent += [model for _, whole, chunk, _ in _REQUESTS.values() for model in (whole, chunk) if model is not None]
    found = [*requests, *((model, "serialization") for model in dict.fromkeys(sent))]
    _, definitions = models_json_schema(found, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas = definitions["$defs"]
    for model, *_ in _REQUESTS.values():
        _complete(schemas[model.__name__], arguments)
    paths: dict[str, Any] = {
        path: {"post": _operation(path, summary, whole, chunk, request)}
        for path, (request, whole, chunk, summary) in _REQUESTS.items()
    }
    paths |= {path: {"get": _operation(path, summary, model)} for path, (model, summary) in _READS.items()}
    paths["/v1/models/{model}"]["get"]["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    ]
    paths["/healthz"]["get"]["security"] = []
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "raystill endpoint", "version": _version()},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if with_keys:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
    return made


def _operation(
    path: str,
    summary: str,
    whole: type[BaseModel],
    chunk: type[BaseModel] | None = None,
    request: type[BaseModel] | None = None,
) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _reference(whole)}}
    if chunk is not None:
        json = {"type": "string", "contentMediaType": "application/json"}
        forms = [{**json, "contentSchema": _reference(model)} for model in (chunk, ErrorEnvelope)]
        event = {"data": {"anyOf": [*forms, {"const": "[DONE]"}]}}
        schema = {"type": "object", "description": _EVENTS, "required": ["data"], "properties": event}
        content["text/event-stream"] = {"schema": schema}
    responses: dict[str, Any] = {"200": {"description": summary, "content": content}}
    for status, description in ERRORS.items():
        if request is not None or status not in (400, 408, 413, 415):
            responses[str(status)] = _error(status, description)
    if path == "/healthz":
        responses["503"] = {
            "description": "Nothing is served; `problem` says why",
            "content": {"application/json": {"schema": _reference(whole)}},
        }
    operation: dict[str, Any] = {
        "summary": summary,
        "operationId": path.strip("/").translate(str.maketrans("/{", "__", "}")),
        "responses": responses,
    }
    if request is not None:
        body = {"required": True, "content": {"application/json": {"schema": _reference(request)}}}
        operation["requestBody"] = body
    for response in responses.values():
        response.setdefault("headers", {})["x-request-id"] = {"schema": {"type": "string"}}
    return operation


def _error(status: int, description: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "description": description,
        "content": {"application/json": {"schema": _reference(ErrorEnvelope)}},
    }
    named = {401: "WWW-Authenticate", 405: "Allow", 429: "Retry-After", 503: "Retry-After"}.get(status)
    if named:
        found["headers"] = {named: {"schema": {"type": "string"}}}
    return found


def _complete(schema: dict[str, Any], arguments: ServedArguments) -> None:
    """Adds to a request's schema what its validators refuse, and the limits of this endpoint."""
    properties = schema["properties"]
    properties["model"]["enum"] = [arguments.model_name]
    if "n" not in properties:  # of an encoder, which has no use for them and ignores them
        return
    for name, neutral in UNSUPPORTED.items():
        properties[name] = {"enum": [None, *neutral], "description": "Not supported; refused with any other value"}
    properties["n"]["anyOf"][0]["maximum"] = min(128, arguments.max_choices)
    for name in ("max_tokens", "max_completion_tokens"):
        if name in properties:
            properties[name]["anyOf"][0]["maximum"] = arguments.max_new_tokens


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _version() -> str:
    try:
        return version("raystill")
    except PackageNotFoundError:
        return "0"
