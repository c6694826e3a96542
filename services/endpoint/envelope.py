"""Around every request: the key, the account, the body's limits, and one shape for whatever goes wrong."""

import asyncio
import contextlib
import logging

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.api_keys import ApiKey
from services.endpoint.admission import Account, Counting, Gate
from services.endpoint.errors import ApiError, internal, unavailable
from services.endpoint.keys import KeyRing
from services.endpoint.page import page

logger = logging.getLogger(__name__)

OPEN_PATH = "/healthz"
"""The one path that needs no key."""

ACCOUNT = "raystill.account"
"""Key in the scope."""
_REFUSALS = (429, 503)
"""Answers that do not count as one of a key's requests."""
_GRACE_S = 10.0
_MIN_BYTES_PER_S = 16_384
"""A body has `_GRACE_S` and its length at this rate to arrive."""


class Envelope:
    """Outermost layer: checks the key, opens and closes the account of what is asked of a model, and turns an
    unexpected error into a 500 in the envelope. Without keys or without a gate nothing is asked or counted."""

    def __init__(self, app: ASGIApp, keys: KeyRing | None, gate: Gate | None) -> None:
        self._app, self._keys, self._gate = app, keys, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # a WebSocket: nothing here speaks it, and nothing passes without a key
            await send({"type": "websocket.close", "code": 1008})
            return
        started = False
        account: Account | None = None

        async def watched(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if account is not None:
                    if message["status"] in _REFUSALS:
                        account.give_back_request()
                    message["headers"] = [*message.get("headers", []), *_encoded(account.headers())]
            await send(message)

        try:
            if scope["path"] != OPEN_PATH:
                key = self._keys.authenticate(scope) if self._keys is not None else None
                if scope["method"] == "POST" and self._gate is not None:
                    account = _open_account(self._gate, key)
                    scope[ACCOUNT] = account
            await self._app(scope, receive, watched)
        except ApiError as error:
            # The page itself holds no figures; it is what asks a person for the key.
            asks = error.status == 401 and scope["path"] == "/" and scope["method"] == "GET"
            await (page(401) if asks else error_response(error))(scope, receive, watched)
        except ClientDisconnect:
            logger.info("A client left before its answer")
        except Exception:
            logger.exception("Request %s failed", Request(scope).headers.get("x-request-id", "-")[:64])
            if not started:
                await error_response(internal())(scope, receive, watched)
        finally:
            if account is not None:
                account.close()


def _open_account(gate: Gate, key: ApiKey | None) -> Account:
    try:
        return gate.open_account(key)
    except ApiError as error:
        error.headers |= gate.headers(key)
        raise


def account_of(request: Request) -> Counting:
    """The account of a POST request: `Envelope` opened it, or whoever called the application put its own there."""
    return request.scope[ACCOUNT]


def error_response(error: ApiError) -> Response:
    return JSONResponse(error.envelope(), status_code=error.status, headers=error.headers)


class BodyReader:
    """Reads request bodies of at most `limit_bytes`, all of those that are on their way together bounded as well."""

    def __init__(self, limit_bytes: int, max_bytes: int, grace_s: float = _GRACE_S) -> None:
        self._limit_bytes, self._max_bytes, self._grace_s = limit_bytes, max_bytes, grace_s
        self.num_bytes = 0
        """Of the bodies that are on their way now."""

    async def read(self, request: Request) -> bytes:
        """The body of a request for JSON.

        Raises:
            ApiError: 415, it is said to be something else; 413, it is too large, whatever its header says; 408, it
                comes too slowly; 503, too much is on its way already.
        """
        media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise ApiError(415, f"Expected content-type application/json, found {media_type[:64]}")
        with contextlib.suppress(ValueError):
            if int(request.headers.get("content-length", "0")) > self._limit_bytes:
                raise self._too_large()
        body = bytearray()
        loop = asyncio.get_running_loop()
        until = loop.time() + self._grace_s
        try:
            async with asyncio.timeout_at(until) as timeout:
                async for chunk in request.stream():
                    body += chunk
                    self.num_bytes += len(chunk)
                    if len(body) > self._limit_bytes:
                        raise self._too_large()
                    if self.num_bytes > self._max_bytes:
                        message = "Too many large requests are on their way; try again later."
                        raise unavailable(message, "server_overloaded", retry_after_s=2)
                    timeout.reschedule(until + len(body) / _MIN_BYTES_PER_S)
        except TimeoutError:
            raise ApiError(408, "The request body came too slowly", code="request_timeout") from None
        finally:
            self.num_bytes -= len(body)
        return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The request body is larger than {self._limit_bytes} bytes", code="request_too_large")


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
