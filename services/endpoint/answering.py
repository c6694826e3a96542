"""From work that is running to the HTTP response: whole, or as server-sent events.

A client that leaves ends its work. An error before the first event has an HTTP status; a later one becomes an event and
ends the stream. While nothing comes, a comment line is sent now and then, so that nothing on the way takes the silence
for a dead connection.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from services.endpoint.admission import Work
from services.endpoint.answers import Answer
from services.endpoint.decoding import Piece
from services.endpoint.envelope import account_of
from services.endpoint.errors import internal
from services.endpoint.pool import Working
from services.endpoint.records import Usage

logger = logging.getLogger(__name__)

T = TypeVar("T")

KEEP_ALIVE_S = 15.0
"""Silence after which a stream sends a comment line."""
KEEP_ALIVE = ": keep-alive\n\n"


async def respond(
    request: Request, running: Work[int | Piece], answer: Answer, stream: bool, include_usage: bool
) -> Response:
    """The answer to a request that is running: whole, or as a stream that begins once the prompt was accepted."""
    running = account_of(request).counted(running)
    try:
        num_prompt_tokens = await anext(running)
        assert isinstance(num_prompt_tokens, int)
        if stream:
            return EventStream(_events(running, answer, num_prompt_tokens, include_usage), running)
        pieces = await unless_disconnected(request, _collect(running))
        return Response(answer.whole(pieces, _usage(num_prompt_tokens, pieces)), media_type="application/json")
    except BaseException:
        running.cancel()
        raise


async def respond_at_once(request: Request, working: Working[str]) -> Response:
    """The answer to a request whose work gives one thing, the body."""
    try:
        return Response(await unless_disconnected(request, _only(working)), media_type="application/json")
    except BaseException:
        working.cancel()
        raise


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, or `ClientDisconnect` as soon as nobody waits for it."""

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    worker, watcher = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientDisconnect
        return worker.result()
    finally:
        worker.cancel()
        watcher.cancel()


async def _collect(running: Work[int | Piece]) -> list[Piece]:
    return [piece async for piece in running if isinstance(piece, Piece)]


async def _only(working: Working[str]) -> str:
    return await anext(working)


async def _events(
    running: Work[int | Piece], answer: Answer, num_prompt_tokens: int, include_usage: bool
) -> AsyncIterator[str]:
    num_sampled = 0
    try:
        async for piece in with_silences(running):
            if piece is None:
                yield KEEP_ALIVE
                continue
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


async def with_silences(running: AsyncIterator[T]) -> AsyncGenerator[T | None]:
    """The items of an iterator, and None for every `KEEP_ALIVE_S` seconds without one."""

    async def following() -> T | None:
        return await anext(running, None)

    waiting = asyncio.ensure_future(following())
    try:
        while True:
            done, _ = await asyncio.wait({waiting}, timeout=KEEP_ALIVE_S)
            if not done:
                yield None
                continue
            item = waiting.result()
            if item is None:
                return
            waiting = asyncio.ensure_future(following())
            yield item
    finally:
        waiting.cancel()


class EventStream(StreamingResponse):
    """A stream of events whose work is cancelled when the client leaves, also before the first event."""

    def __init__(self, events: AsyncIterator[str], running: Work[int | Piece]) -> None:
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
