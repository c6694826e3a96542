"""The teacher beside the versions: an OpenAI-style endpoint elsewhere, which a request names as `NAME@teacher`.

For the page at `/`, which asks it what it asks champion and challenger. To the router it is one more that answers
(`router.Asked`), so keys, places, limits and errors are those of every request; but no request goes there that does not
name it, and what comes back says nothing about a version.

It is no open proxy. There is one URL, the config's, and two paths; redirects are not followed. What goes there is
written anew from the checked request, with the fields of `schema.py` and an answer no longer than this endpoint gives;
of the client's headers nothing goes along. The teacher's key is sent there, and its refusals, which may name the key,
stay here.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import aiohttp

from cluster.api_keys import teacher_key
from services.endpoint.answering import KEEP_ALIVE, with_silences
from services.endpoint.errors import ApiError, invalid, not_supported, unavailable
from services.endpoint.limits import BYTES_PER_TOKEN
from services.endpoint.parsing import parse_request
from services.endpoint.reading import AT_ONCE
from services.endpoint.schema import ChatRequest, CompletionRequest, EndpointArguments
from services.endpoint.traffic import TEACHER, Route

logger = logging.getLogger(__name__)

ROUTE = Route(TEACHER, TEACHER, TEACHER, "", "", 0, 0)
"""What the router counts the teacher's answers by."""

_LOOK_S = 2.0
"""A teacher that has not said its models after so long is not up."""
_FRESH_S = 5.0
"""For so long what was found holds."""
_CONNECT_S = 5.0
_SILENCE_S = 300.0
"""A teacher that sends nothing for so long is given up; a large one may read a long prompt for minutes."""
_LIST_BYTES = 1 << 18
_NAME_LENGTH = 256
_ANSWER_BYTES = 16 << 20
_TEMPLATE_TOKENS = 1000
"""A chat template adds fewer."""
_BUFFER_BYTES = 1 << 20
"""An event is half of this, at most: log-probabilities of many tokens may travel in one."""
_REQUESTS: dict[str, type[CompletionRequest] | type[ChatRequest]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
}

Headers = list[tuple[bytes, bytes]]
Part = tuple[int, Headers, bytes, dict[str, Any] | None]

_JSON: Headers = [(b"content-type", b"application/json")]
_EVENTS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Teacher:
    """Asks the teacher of `teacher_url`. Used on one event loop at a time."""

    def __init__(self, arguments: EndpointArguments) -> None:
        self._arguments = arguments
        self._name = arguments.teacher_name
        self._problem: str | None = None
        self._looked_at = -float("inf")

    async def row(self) -> dict[str, Any]:
        """What is said of it beside the versions; `problem` is None while it is up."""
        await self._look()
        said = {"version": self._name or TEACHER, "alias": TEACHER, "share": None, "scheme": None}
        return {**said, "problem": self._problem}

    async def answer(self, path: str, query: bytes, headers: Headers, body: bytes) -> AsyncGenerator[Part]:
        """The parts of the answer (see `router.Asked`); what is refused, here or there, is answered with an error.

        Raises:
            Exception: of whatever kind, an answer that had begun broke off.
        """
        try:
            async with contextlib.aclosing(self._parts(path, body)) as parts:
                async for part in parts:
                    yield part
        except ApiError as error:
            extra = [(name.encode(), value.encode()) for name, value in error.headers.items()]
            yield error.status, _JSON + extra, json.dumps(error.envelope()).encode(), {"ok": error.status < 500}

    async def begin_answer(self, path: str, body: bytes) -> dict[str, Any]:
        raise NotImplementedError("nothing is asked of the teacher only to compare")

    async def compare(self, path: str, body: bytes, other: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError("nothing is asked of the teacher only to compare")

    # --- one request ---

    async def _parts(self, path: str, body: bytes) -> AsyncGenerator[Part]:
        if len(body) <= AT_ONCE:
            fields, wants_usage = self._rewritten(path, body)
        else:
            fields, wants_usage = await asyncio.to_thread(self._rewritten, path, body)
        await self._look()
        if self._problem is not None:
            raise _unavailable(f"The teacher is not up: {self._problem}")
        count, begun = _Count(len(body), self._arguments.max_new_tokens * self._arguments.max_choices), False
        try:
            async with self._asked("POST", path, {**fields, "model": self._name}) as reply:
                if reply.status != 200:
                    raise await _refusal(reply)
                if not fields.get("stream"):
                    content = await _read(reply, _ANSWER_BYTES)
                    count.add_usage(_record(content))
                    yield 200, _JSON, content, count.figures()
                    return
                if reply.content_type != "text/event-stream":
                    raise _unavailable("The teacher did not answer with a stream")
                async with contextlib.aclosing(with_silences(_events(reply))) as events:
                    async for item in events:
                        event, content = item or (None, KEEP_ALIVE.encode())
                        if event is not None:
                            count.add(event)
                        if event is None or event.get("choices") or wants_usage:
                            begun = True
                            yield 200, _EVENTS, content, None
                yield 200, _EVENTS, b"data: [DONE]\n\n", count.figures()
        except (aiohttp.ClientError, TimeoutError) as error:
            if begun:
                raise
            logger.info("The teacher does not answer: %s", type(error).__name__)
            raise _unavailable("The teacher does not answer") from None

    @contextlib.asynccontextmanager
    async def _asked(
        self, method: str, path: str, content: dict[str, Any] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        key = teacher_key()
        headers = {"authorization": f"Bearer {key}"} if key is not None else {}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S)
        async with (
            # A session of its own for each: they are few, and none is left open when the endpoint goes.
            aiohttp.ClientSession(
                headers=headers, timeout=timeout, read_bufsize=_BUFFER_BYTES, cookie_jar=aiohttp.DummyCookieJar()
            ) as session,
            session.request(
                method, f"{self._arguments.teacher_url}{path}", json=content, allow_redirects=False
            ) as reply,
        ):
            yield reply

    def _rewritten(self, path: str, body: bytes) -> tuple[dict[str, Any], bool]:
        """What is sent to the teacher, but for the model's name; and whether the client wants a stream's usage.

        Raises:
            ApiError: 400 or 404, as a version here would have refused it.
        """
        kind = _REQUESTS.get(path)
        if kind is None:
            does = f"continues texts; ask {' or '.join(_REQUESTS)}"
            raise not_supported(path, f"{self._arguments.model_name}@{TEACHER}", does)
        asked = parse_request(kind, body)
        asked.check_size(self._arguments)
        fields = asked.model_dump(exclude_unset=True, include=set(kind.model_fields) - {"model"})
        most, longest = self._arguments.max_new_tokens, asked.sampling().max_new_tokens
        if longest is None:
            fields["max_tokens"] = most
        elif longest > most:
            raise invalid(f"At most {most} tokens can be generated, asked for {longest}", "max_tokens")
        if asked.stream:
            fields["stream_options"] = {"include_usage": True}
        return fields, asked.include_usage

    # --- is it up? ---

    async def _look(self) -> None:
        """Looks whether it is up and what it calls its model, unless that was found out a moment ago."""
        if time.monotonic() - self._looked_at < _FRESH_S:
            return
        cause = ""
        try:
            async with asyncio.timeout(_LOOK_S), self._asked("GET", "/v1/models") as reply:
                if reply.status == 200:
                    problem = self._take_name(_record(await _read(reply, _LIST_BYTES)))
                else:
                    problem = _why(reply.status)
        except ApiError:
            problem = "what it answers at /v1/models is no list of models"
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            problem, cause = "nothing answers at serve.teacher_url", f" ({type(error).__name__})"
        if problem != self._problem:
            logger.info("The teacher: %s%s", problem or "it is up", cause)
        self._problem, self._looked_at = problem, time.monotonic()

    def _take_name(self, models: dict[str, Any]) -> str | None:
        """Takes the name of the one model that is listed, if the config gives none; returns what is wrong."""
        if self._arguments.teacher_name is not None:
            return None
        cards = models.get("data")
        names = [card.get("id") for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []
        if len(names) != 1 or not isinstance(names[0], str):
            return f"it lists {len(names)} models; say which with serve.teacher_name"
        if not names[0].isprintable() or not 0 < len(names[0]) <= _NAME_LENGTH:
            return "it lists a model whose name is none; say which with serve.teacher_name"
        self._name = names[0]
        return None


async def _refusal(reply: aiohttp.ClientResponse) -> ApiError:
    """What the client is told of an answer that is none: of its own mistake in the teacher's words, else in ours."""
    if reply.status in (400, 413, 422):
        try:
            said = str(json.loads(await reply.content.read(4096))["error"]["message"])
        except (ValueError, KeyError, TypeError):
            said = _why(reply.status)
        return invalid(f"The teacher: {said[:1000]}")
    wait = reply.headers.get("retry-after", "")
    return _unavailable(f"The teacher: {_why(reply.status)}", int(wait) if wait.isdecimal() and len(wait) < 6 else 5)


def _why(status: int) -> str:
    if status in (401, 403):
        return "it refuses this endpoint's key (RAYSTILL_TEACHER_KEY)"
    return f"it answers with status {status}"


def _unavailable(message: str, retry_after_s: int = 5) -> ApiError:
    return unavailable(message, "teacher_unavailable", retry_after_s)


async def _read(reply: aiohttp.ClientResponse, most: int) -> bytes:
    """The whole of a body. Raises `ApiError` 503 for one of more bytes than `most`, and reads no further."""
    content = bytearray()
    async for piece in reply.content.iter_any():
        content += piece
        if len(content) > most:
            raise _unavailable(f"The teacher's answer is longer than {most} bytes")
    return bytes(content)


def _record(data: bytes) -> dict[str, Any]:
    """Raises `ApiError` 503 for what is no JSON object, as one with NaN in it is not."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(found := json.loads(data, parse_constant=_no_number), dict):
            return found
    raise _unavailable("The teacher's answer is none of OpenAI's records")


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


async def _events(reply: aiohttp.ClientResponse) -> AsyncIterator[tuple[dict[str, Any], bytes]]:
    """The events of a stream up to the last, each as a record and as bytes.

    Raises:
        ConnectionError: an event says that there was an error, or the stream ends without having come to its end.
    """
    async for line in reply.content:
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        event = json.loads(data, parse_constant=_no_number)
        if not isinstance(event, dict) or event.get("error"):
            raise ConnectionError("the teacher sent an error in place of an event")
        yield event, b"data: " + data + b"\n\n"
    raise ConnectionError("the teacher's stream has no end")


class _Count:
    """Counts what an answer takes: tokens as the teacher says, or as many as there were texts; times as seen here.

    Args:
        body_bytes: of the request; its prompt and a template have no more tokens, whatever the teacher says.
        most: tokens that the answer can have.
    """

    def __init__(self, body_bytes: int, most: int) -> None:
        self._began = time.perf_counter()
        self._usage: dict[str, Any] = {}
        self._body_bytes, self._most, self._num_texts = body_bytes, most, 0
        self._first_s: float | None = None
        self._last_s = 0.0

    def add_usage(self, record: dict[str, Any]) -> None:
        if isinstance(record.get("usage"), dict):
            self._usage = record["usage"]

    def add(self, event: dict[str, Any]) -> None:
        """Counts an event of a stream."""
        self.add_usage(event)
        if any(_has_text(choice) for choice in event.get("choices") or ()):
            self._num_texts += 1
            self._last_s = time.perf_counter() - self._began
            self._first_s = self._last_s if self._first_s is None else self._first_s

    def figures(self) -> dict[str, Any]:
        """As `metering.Meter.figures`; an answer that came whole says nothing of its first token."""
        guess, longest = self._body_bytes // BYTES_PER_TOKEN, self._body_bytes + _TEMPLATE_TOKENS
        prompt = _counted(self._usage.get("prompt_tokens"), longest, guess)
        completion = _counted(self._usage.get("completion_tokens"), self._most, min(self._num_texts, self._most))
        token_s = None
        if self._first_s is not None and self._num_texts > 1 and completion > 1:
            token_s = (self._last_s - self._first_s) / (completion - 1)
        return {
            "ok": True,
            "ttft_s": self._first_s,
            "token_s": token_s,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
        }


def _counted(said: Any, most: int, otherwise: int) -> int:
    """A number of tokens as the teacher says it, if it can be one."""
    return min(said, most) if type(said) is int and said >= 0 else otherwise


def _has_text(choice: Any) -> bool:
    """Of a completion's event or a chat's."""
    if not isinstance(choice, dict):
        return False
    delta = choice.get("delta")
    said = delta if isinstance(delta, dict) else choice
    return any(said.get(name) for name in ("text", "content", "reasoning_content"))
