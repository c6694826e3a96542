"""Counts for Prometheus what a replica of a plain directory answers, as a router counts what its versions answer.

The innermost layer of the HTTP interface: behind keys and limits, in front of the routes. A stream whose client leaves
just ends without its last message, which is how it is known.
"""

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.endpoint.canary import Observation
from services.endpoint.envelope import ACCOUNT
from services.endpoint.metering import Meter
from services.endpoint.metrics import BROKEN, LEFT_BEFORE, LEFT_WITHIN, RouterMetrics, VersionMetrics


class Recording:
    """Innermost layer: measures every question to the model and tells the metrics how it ended.

    Args:
        version: what stands for the version in the metrics.
    """

    def __init__(self, app: ASGIApp, version: str, answers: RouterMetrics, queue: VersionMetrics) -> None:
        self._app, self._version, self._answers, self._queue = app, version, answers, queue
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].startswith("/v1/"):
            await self._record(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _record(self, scope: Scope, receive: Receive, send: Send) -> None:
        meter = Meter(account=scope[ACCOUNT])
        status, ended, failed = 0, False, False

        async def watched(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                ended = not message.get("more_body", False)
                self._queue.tell_queue()
            await send(message)

        self._count(1)
        try:
            await self._app({**scope, ACCOUNT: meter}, receive, watched)
        except ClientDisconnect:
            raise
        except Exception:
            failed = True
            raise
        finally:
            self._count(-1)
            self._tell(_how_it_ended(status, ended, failed or meter.failed), meter)

    def _tell(self, status: str, meter: Meter) -> None:
        figures = meter.figures()
        answered = status.startswith(("2", "3"))
        seen = Observation(
            self._version,
            answered,
            ttft_s=figures["ttft_s"] if answered else None,
            token_s=figures["token_s"] if answered else None,
            prompt_tokens=meter.prompt_tokens,
            completion_tokens=meter.completion_tokens,
        )
        self._answers.answered(self._version, status, seen)

    def _count(self, change: int) -> None:
        self._in_flight += change
        self._answers.in_flight(self._version, self._in_flight)
        self._queue.tell_queue()


def _how_it_ended(status: int, ended: bool, failed: bool) -> str:
    """`status` is 0 before an answer has begun; one that has begun and not ended was left, unless it failed."""
    if failed:
        return BROKEN if 0 < status < 500 else str(status or 500)
    if not status:
        return LEFT_BEFORE
    return str(status) if ended else LEFT_WITHIN


def put_recording_into(api: FastAPI, version: str, answers: RouterMetrics, queue: VersionMetrics) -> FastAPI:
    """Puts the counting behind the keys and limits of an HTTP interface."""
    api.user_middleware.append(Middleware(Recording, version=version, answers=answers, queue=queue))
    return api
