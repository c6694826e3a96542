"""One interface over the clients that the checklist is run with: raw HTTP, openai (both), langchain_openai.

Bodies and answers are those of OpenAI's HTTP interface; a client that shows less gives the parts that it shows.
"""

import asyncio
import inspect
import json
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai

KEY = "unused"
_KEEP_ALL = httpx.Limits(max_keepalive_connections=None)
"""A pool that may keep fewer connections than threads closes one, now and then, that another thread was just given."""
_TLS = ssl.create_default_context()
"""Of a megabyte, and no address here wants one; httpx would make another for every client."""


@dataclass(frozen=True)
class Failure:
    """How a client showed an error."""

    status: int
    error: dict[str, Any]
    headers: dict[str, str]
    kind: str
    """OpenAI's class of the exception, of which langchain_openai's are children; empty for raw HTTP."""


def server_sent_events(text: str) -> Iterator[Any]:
    """The JSON of every event, `[DONE]` as text; comments are left out."""
    for block in text.split("\n\n"):
        if block.startswith("data: "):
            data = block.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


class Raw:
    """httpx, with nothing between."""

    name = "raw"

    def __init__(self, url: str, key: str = KEY) -> None:
        headers = {"authorization": f"Bearer {key}"}
        self.http = httpx.Client(base_url=url, timeout=60, limits=_KEEP_ALL, trust_env=False, headers=headers)

    def close(self) -> None:
        self.http.close()

    def chat(self, **body: Any) -> dict[str, Any]:
        return self._post("/v1/chat/completions", body).json()

    def complete(self, **body: Any) -> dict[str, Any]:
        return self._post("/v1/completions", body).json()

    def chat_stream(self, **body: Any) -> list[dict[str, Any]]:
        return self._stream("/v1/chat/completions", body)

    def complete_stream(self, **body: Any) -> list[dict[str, Any]]:
        return self._stream("/v1/completions", body)

    def embed(self, **body: Any) -> dict[str, Any]:
        return self._post("/v1/embeddings", body).json()

    def models(self) -> list[dict[str, Any]]:
        return self.http.get("/v1/models").raise_for_status().json()["data"]

    def model(self, name: str) -> dict[str, Any]:
        return self.http.get(f"/v1/models/{name}").raise_for_status().json()

    def request_id(self, **body: Any) -> str | None:
        return self._post("/v1/chat/completions", body).headers.get("x-request-id")

    def failure(self, call: Callable[[], Any]) -> Failure:
        try:
            found = call()
        except httpx.HTTPStatusError as refused:
            response = refused.response
            return Failure(response.status_code, response.json()["error"], dict(response.headers), "")
        raise AssertionError(f"no error, but {str(found)[:300]}")

    def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return self.http.post(path, json=body).raise_for_status()

    def _stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        found = list(server_sent_events(self._post(path, {**body, "stream": True}).text))
        assert found[-1] == "[DONE]"
        return found[:-1]


class OpenAI:
    """openai.OpenAI."""

    name = "openai"

    def __init__(self, url: str, key: str = KEY, **options: Any) -> None:
        http = httpx.Client(limits=_KEEP_ALL, trust_env=False)
        self.api = openai.OpenAI(base_url=f"{url}/v1", api_key=key, http_client=http, **{"max_retries": 0, **options})

    def close(self) -> None:
        self.api.close()

    def chat(self, **body: Any) -> dict[str, Any]:
        return _plain(self.api.chat.completions.create(**_arguments(self.api.chat.completions.create, body)))

    def complete(self, **body: Any) -> dict[str, Any]:
        return _plain(self.api.completions.create(**_arguments(self.api.completions.create, body)))

    def chat_stream(self, **body: Any) -> list[dict[str, Any]]:
        create = self.api.chat.completions.create
        return [_plain(chunk) for chunk in create(**_arguments(create, {**body, "stream": True}))]

    def complete_stream(self, **body: Any) -> list[dict[str, Any]]:
        create = self.api.completions.create
        return [_plain(chunk) for chunk in create(**_arguments(create, {**body, "stream": True}))]

    def embed(self, **body: Any) -> dict[str, Any]:
        return _plain(self.api.embeddings.create(**_arguments(self.api.embeddings.create, body)))

    def models(self) -> list[dict[str, Any]]:
        return [_plain(card) for card in self.api.models.list()]

    def model(self, name: str) -> dict[str, Any]:
        return _plain(self.api.models.retrieve(name))

    def request_id(self, **body: Any) -> str | None:
        return self.api.chat.completions.create(**_arguments(self.api.chat.completions.create, body))._request_id

    def failure(self, call: Callable[[], Any]) -> Failure:
        return _failure(call)


class AsyncOpenAI:
    """openai.AsyncOpenAI; a client for each call, since each call has an event loop of its own."""

    name = "openai_async"

    def __init__(self, url: str, key: str = KEY, **options: Any) -> None:
        self._url, self._options = url, {"api_key": key, "max_retries": 0, **options}

    def close(self) -> None:
        pass

    def chat(self, **body: Any) -> dict[str, Any]:
        return self._call(lambda api: api.chat.completions.create, body)

    def complete(self, **body: Any) -> dict[str, Any]:
        return self._call(lambda api: api.completions.create, body)

    def chat_stream(self, **body: Any) -> list[dict[str, Any]]:
        return self._call(lambda api: api.chat.completions.create, {**body, "stream": True})

    def complete_stream(self, **body: Any) -> list[dict[str, Any]]:
        return self._call(lambda api: api.completions.create, {**body, "stream": True})

    def embed(self, **body: Any) -> dict[str, Any]:
        return self._call(lambda api: api.embeddings.create, body)

    def models(self) -> list[dict[str, Any]]:
        return self._call(lambda api: api.models.list, {})

    def model(self, name: str) -> dict[str, Any]:
        return self._call(lambda api: api.models.retrieve, {"model": name})

    def request_id(self, **body: Any) -> str | None:
        return self._call(lambda api: api.chat.completions.create, body, lambda found: found._request_id)

    def failure(self, call: Callable[[], Any]) -> Failure:
        return _failure(call)

    def _call(
        self, method: Callable[[Any], Any], body: dict[str, Any], read: Callable[[Any], Any] | None = None
    ) -> Any:
        async def asked() -> Any:
            http = httpx.AsyncClient(trust_env=False, verify=_TLS)
            options = {"http_client": http, **self._options}
            async with openai.AsyncOpenAI(base_url=f"{self._url}/v1", **options) as api:
                found = method(api)(**_arguments(method(api), body))
                if inspect.isawaitable(found) and not hasattr(found, "__aiter__"):
                    found = await found
                if hasattr(found, "__aiter__"):
                    return [_plain(item) async for item in found]
                return read(found) if read else _plain(found)

        return asyncio.run(asked())


class LangChain:
    """langchain_openai.ChatOpenAI, as a user of LangChain would call it."""

    name = "langchain"

    def __init__(self, url: str, key: str = KEY, **options: Any) -> None:
        self._options = {"base_url": f"{url}/v1", "api_key": key, "max_retries": 0, **options}

    def close(self) -> None:
        pass

    def chat(self, **body: Any) -> dict[str, Any]:
        model, messages = self._model(body)
        return self._answer(model.invoke(messages))

    def chat_stream(self, **body: Any) -> list[dict[str, Any]]:
        usage = bool((body.pop("stream_options", None) or {}).get("include_usage"))
        model, messages = self._model({**body, "stream_usage": usage})
        return [self._chunk(chunk) for chunk in model.stream(messages)]

    def failure(self, call: Callable[[], Any]) -> Failure:
        return _failure(call)

    def _model(self, body: dict[str, Any]) -> tuple[Any, list[Any]]:
        from langchain_openai import ChatOpenAI

        fields = dict(body)
        messages = fields.pop("messages")
        known = ChatOpenAI.model_fields
        names = {*known, *(field.alias for field in known.values() if field.alias)}
        direct = {key: fields.pop(key) for key in list(fields) if key in names}
        extra = {"extra_body": fields} if fields else {}
        return ChatOpenAI(**self._options, **direct, **extra), messages

    def _answer(self, message: Any) -> dict[str, Any]:
        found = message.response_metadata
        choice = {
            "message": {"role": "assistant", "content": message.content},
            "finish_reason": found["finish_reason"],
            "logprobs": found.get("logprobs"),
        }
        return {"model": found["model_name"], "choices": [choice], "usage": found.get("token_usage"), "id": message.id}

    def _chunk(self, chunk: Any) -> dict[str, Any]:
        choice = {
            "delta": {"content": chunk.content},
            "finish_reason": chunk.response_metadata.get("finish_reason"),
            "logprobs": chunk.response_metadata.get("logprobs"),
        }
        used = chunk.usage_metadata
        usage = None if used is None else {
            "prompt_tokens": used["input_tokens"],
            "completion_tokens": used["output_tokens"],
            "total_tokens": used["total_tokens"],
        }  # fmt: skip
        return {"choices": [choice], "usage": usage, "id": chunk.id}


CLIENTS: dict[str, Callable[..., Any]] = {kind.name: kind for kind in (Raw, OpenAI, AsyncOpenAI, LangChain)}


def _arguments(method: Callable[..., Any], body: dict[str, Any]) -> dict[str, Any]:
    """A body as the arguments of a method: what it does not know goes through `extra_body`."""
    known = inspect.signature(method).parameters
    extra = {key: value for key, value in body.items() if key not in known}
    direct = {key: value for key, value in body.items() if key in known}
    return {**direct, **({"extra_body": extra} if extra else {})}


def _plain(record: Any) -> dict[str, Any]:
    return json.loads(record.model_dump_json())


def _failure(call: Callable[[], Any]) -> Failure:
    try:
        found = call()
    except openai.APIStatusError as refused:
        error = refused.body if isinstance(refused.body, dict) else {}
        kind = next(base.__name__ for base in type(refused).__mro__ if base.__module__.startswith("openai"))
        return Failure(refused.status_code, error, dict(refused.response.headers), kind)
    raise AssertionError(f"no error, but {str(found)[:300]}")
