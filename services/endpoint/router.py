"""In front of the versions: picks who answers a request, forwards it, passes the answer on, and keeps the score.

It is the innermost layer of the HTTP interface: keys and limits are checked before it, and what is no question to a
model (health, the list of models, the page) never comes to it. A request that the challenger fails, refuses, or leaves
waiting before a first text was sent is answered by the champion instead, and counted against the challenger (a refusal
if the champion did answer; having no room is no fault); one whose replica died before that is asked once more. After
the first text the answer belongs to the version that began it: if that breaks off, the stream ends with an error event.
One that names the teacher goes there and nowhere else (`teacher.py`).
"""

import asyncio
import contextlib
import json
import logging
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.champions import Champion
from services.endpoint.admission import Counting
from services.endpoint.canary import Observation
from services.endpoint.engines.requests import Load
from services.endpoint.envelope import BodyReader, account_of
from services.endpoint.errors import ApiError, internal, unavailable
from services.endpoint.following import Served
from services.endpoint.metrics import BROKEN, LEFT_BEFORE, LEFT_WITHIN, RouterMetrics
from services.endpoint.outline import outline
from services.endpoint.schema import EndpointArguments
from services.endpoint.teacher import ROUTE as TEACHER_ROUTE
from services.endpoint.teacher import Teacher
from services.endpoint.traffic import TEACHER, Route, RoutingTable, addressed, is_shadowed, pick, subject_of

logger = logging.getLogger(__name__)

_BODIES = 64
"""Request bodies of the largest size that may be on their way at once."""
_KEPT_OBSERVATIONS = 10_000
"""While the supervisor is away; then the oldest are forgotten."""
_LOOK_S = 2.0
"""How often a request that waits looks whether there is anything to wait for."""
_PATIENCE_S = 60.0
"""A challenger may take so long to begin an answer, and three times as long as the champion lately took at most."""
_MOST_COMPARISONS = 4
"""At one time; while so many run, no other request is compared."""
_COMPARED_PATHS = ("/v1/completions", "/v1/chat/completions")

_KEPT_BACK = (b"authorization", b"cookie")
"""Headers that a version has no use for."""

Headers = list[tuple[bytes, bytes]]
Part = tuple[int, Headers, bytes, dict[str, Any] | None]


class Asked(Protocol):
    """A version as the router asks it (`services.endpoint.versions.Version`)."""

    def answer(self, path: str, query: bytes, headers: Headers, body: bytes) -> AsyncGenerator[Part]:
        """The parts of the answer; `aclose` ends the work."""

    async def begin_answer(self, path: str, body: bytes) -> dict[str, Any]: ...

    async def compare(self, path: str, body: bytes, other: dict[str, Any]) -> dict[str, Any]: ...


@dataclass(frozen=True)
class _Scheme:
    """What the HTTP interface says of a model that is elsewhere."""

    scheme: str
    max_context_tokens: int
    max_new_tokens: int
    load: Load


class Router:
    """The state of a router: its table, its requests in flight, and what it saw since it last said so.

    Args:
        reach: how to ask the version of a route.
    """

    def __init__(
        self,
        arguments: EndpointArguments,
        reach: Callable[[Route], Asked],
        metrics: RouterMetrics,
        teacher: Teacher | None = None,
    ) -> None:
        self.name = uuid.uuid4().hex
        self.table = RoutingTable()
        self.traffic: dict[str, Any] = {"model": arguments.model_name, "canary": None, "versions": []}
        """What the supervisor said last of all versions."""
        self.in_flight: Counter[str] = Counter()
        """Requests by application."""
        self.urgent = threading.Event()
        """Set when something was seen that the supervisor should know at once."""
        self._arguments, self._reach, self._metrics, self._teacher = arguments, reach, metrics, teacher
        self._seen: deque[Observation] = deque(maxlen=_KEPT_OBSERVATIONS)
        self._champion_took_s: deque[float] = deque(maxlen=256)
        self._comparisons: set[asyncio.Task[None]] = set()
        self._bodies = BodyReader(arguments.max_body_bytes, _BODIES * arguments.max_body_bytes)

    # --- what the HTTP interface asks ---

    @property
    def served(self) -> Served[Any] | None:
        table = self.table
        if table.champion is None or table.reign is None:
            return None
        route = table.champion
        champion = Champion(
            self._arguments.model_name,
            table.reign.epoch,
            route.version,
            route.uri,
            route.manifest_sha256,
            table.reign.promoted_at,
        )
        load = Load(self.in_flight.total(), 0, 0)
        return Served(champion, _Scheme(route.scheme, route.max_context_tokens, route.max_new_tokens, load))

    @property
    def problem(self) -> str | None:
        return self.table.problem

    def take_observations(self) -> list[Observation]:
        """What was seen since the last call, the oldest first."""
        taken = []
        with contextlib.suppress(IndexError):
            while True:
                taken.append(self._seen.popleft())
        return taken

    # --- one request ---

    async def forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request through a version.

        Raises:
            ApiError: nothing is served, the body is refused, or the versions that could answer are gone.
            ClientDisconnect: nobody waits any more; the work was cancelled.
        """
        request = Request(scope, receive)
        body = await self._bodies.read(request)
        asked = outline(scope["path"], body)
        account = account_of(request)
        account.admit(self._arguments.model_name, len(body), asked.longest_answer(self._arguments))
        if self._teacher is not None and asked.model == f"{self._arguments.model_name}@{TEACHER}":
            # An empty table: what the teacher does is held against no version.
            if not await _Attempt(self, RoutingTable(), TEACHER_ROUTE, account).run(request, body, send):
                raise unavailable("The teacher broke off its answer", "teacher_unavailable", retry_after_s=5)
            return
        table = self.table
        if table.stalled:
            raise _no_replica()
        request_id = request.headers.get("x-request-id") or uuid.uuid4().hex
        first = addressed(table, asked.model) or pick(table, subject_of(scope["headers"], asked.user, request_id))
        if first is None or table.champion is None:
            raise unavailable(f"No model is served: {table.problem}", "model_not_ready", retry_after_s=5)
        route = first
        by_name = "@" in asked.model
        attempt = _Attempt(self, table, route, account, replaceable=not by_name and route == table.challenger)
        answered = await attempt.run(request, body, send)
        if not answered and not self.table.stalled and not by_name:
            first_attempt, table = attempt, self.table
            route = table.champion or route
            attempt = _Attempt(self, table, route, account)
            answered = await attempt.run(request, body, send)
            first_attempt.count_refusal(attempt.ok)
        if not answered:
            raise _no_replica()
        if route == table.champion and attempt.ok and scope["path"] in _COMPARED_PATHS:
            self._shadow(table, request_id, scope["path"], body)

    def version(self, route: Route) -> Asked:
        return self._teacher if self._teacher is not None and route is TEACHER_ROUTE else self._reach(route)

    async def said(self) -> dict[str, Any]:
        """What the supervisor said last of the traffic; among the versions the teacher, if there is one to ask."""
        figures = self.traffic.get("teacher") or {}
        teacher = [{**await self._teacher.row(), **figures}] if self._teacher is not None else []
        rest = {key: value for key, value in self.traffic.items() if key != "teacher"}
        return {**rest, "versions": [*self.traffic["versions"], *teacher]}

    def patience_s(self) -> float:
        """How long a challenger may take to begin an answer."""
        return max(_PATIENCE_S, 3 * max(self._champion_took_s, default=0.0))

    def began(self, table: RoutingTable, route: Route, took_s: float) -> None:
        if route == table.champion:
            self._champion_took_s.append(took_s)

    def count(self, route: Route, change: int) -> None:
        self.in_flight[route.app] += change
        self._metrics.in_flight(route.version, self.in_flight[route.app])

    def observe(self, table: RoutingTable, route: Route, status: str, seen: Observation) -> None:
        self._metrics.answered(route.version, status, seen)
        self._seen.append(seen)
        if not seen.ok and table.challenger == route:
            self.urgent.set()

    def count_left(self, route: Route) -> None:
        self._metrics.answered(route.version, LEFT_WITHIN, Observation(route.manifest_sha256, True))

    # --- shadow traffic ---

    def _shadow(self, table: RoutingTable, request_id: str, path: str, body: bytes) -> None:
        if len(self._comparisons) < _MOST_COMPARISONS and is_shadowed(table, request_id):
            task = asyncio.ensure_future(self._compare(table, path, body))
            self._comparisons.add(task)
            task.add_done_callback(self._comparisons.discard)

    async def _compare(self, table: RoutingTable, path: str, body: bytes) -> None:
        """Asks both versions for the greedy beginning of an answer, and the challenger about the champion's."""
        champion, challenger = table.champion, table.challenger
        assert champion is not None
        assert challenger is not None
        try:
            self.count(champion, 1)
            try:
                begun = await self.version(champion).begin_answer(path, body)
            finally:
                self.count(champion, -1)
        except Exception as error:  # the champion's answer to the user is what counts for it
            logger.info("A request was not compared: %s", type(error).__name__)
            return
        self._observe_copy(table, champion, begun)
        found: dict[str, Any] = {"ok": False}
        try:
            self.count(challenger, 1)
            found = await self.version(challenger).compare(path, body, begun)
        except Exception as error:
            if _has_no_room(error):
                return
            logger.warning("Version %s failed on a copy: %s", challenger.version, first_line(error))
        finally:
            self.count(challenger, -1)
        self._observe_copy(table, challenger, found)

    def _observe_copy(self, table: RoutingTable, route: Route, found: dict[str, Any]) -> None:
        seen = Observation(
            route.manifest_sha256,
            bool(found["ok"]),
            ttft_s=found.get("ttft_s"),
            token_s=found.get("token_s"),
            trial=table.trial,
            shadow=True,
            disagreement=found.get("disagreement"),
            agreement=found.get("agreement"),
        )
        self.observe(table, route, "200" if seen.ok else "500", seen)


class _Attempt:
    """One request at one version.

    Args:
        replaceable: whether the champion answers if this version does not.
    """

    def __init__(
        self, router: Router, table: RoutingTable, route: Route, account: Counting, replaceable: bool = False
    ) -> None:
        self._router, self._table, self._route, self._account = router, table, route, account
        self._replaceable = replaceable
        self._began_at = time.monotonic()
        self._refusal: int | None = None
        self._begun = False
        self.ok = False

    def count_refusal(self, champion_answered: bool) -> None:
        """Counts a 4xx that was kept back: the client's mistake, unless the champion answered the same request."""
        if self._refusal is not None:
            self._observe("refused" if champion_answered else str(self._refusal), None, ok=not champion_answered)

    async def run(self, request: Request, body: bytes, send: Send) -> bool:
        """Whether the request was answered; false only if nothing was sent, so that another version may answer."""
        self._router.count(self._route, 1)
        scope = request.scope
        version = self._router.version(self._route)
        headers = [item for item in scope["headers"] if item[0] not in _KEPT_BACK]
        parts = version.answer(scope["path"], scope["query_string"], headers, body)
        gone = asyncio.ensure_future(_until_gone(request))
        try:
            return await self._pass_on(parts, gone, send)
        finally:
            gone.cancel()
            self._router.count(self._route, -1)
            with contextlib.suppress(Exception):
                await parts.aclose()  # ends what is still being decoded

    async def _pass_on(self, parts: AsyncGenerator[Part], gone: "asyncio.Future[None]", send: Send) -> bool:
        while True:
            try:
                status, headers, content, figures = await _first_of(parts, gone, self._is_hopeless)
            except (ClientDisconnect, asyncio.CancelledError):
                self._account.use_reserved()  # what it did cost is known only when it ends by itself
                self._observe_departure()
                raise
            except Exception as error:  # the replica died, or raised what its interface did not catch
                logger.warning("Version %s broke off an answer: %s", self._route.version, first_line(error))
                self._observe(BROKEN, None)
                if self._begun:
                    await _end_with_error(send)
                return self._begun
            failed = status >= 500 or (figures is not None and not figures["ok"])
            if failed and not self._begun and self._replaceable:
                self._observe(str(status) if status >= 500 else BROKEN, None, ok=False)
                return False
            if not self._begun and self._replaceable and 400 <= status < 500:
                self._refusal = status
                return False
            if not self._begun:
                self._router.began(self._table, self._route, time.monotonic() - self._began_at)
                await send({"type": "http.response.start", "status": status, "headers": headers})
                self._begun = True
            await send({"type": "http.response.body", "body": content, "more_body": figures is None})
            if figures is not None:
                self.ok = not failed and status < 400
                self._observe(BROKEN if failed and status < 500 else str(status), figures, ok=not failed)
                return True

    def _is_hopeless(self) -> bool:
        """Whether nothing more is to be waited for."""
        if self._replaceable and not self._begun and time.monotonic() - self._began_at > self._router.patience_s():
            return True
        table = self._router.table
        return table.stalled and table.champion == self._route

    def _observe_departure(self) -> None:
        """The client left: before an answer began it would have taken at least so long, after that nothing is said of
        the version."""
        if self._begun:
            self._router.count_left(self._route)
            return
        waited_s = time.monotonic() - self._began_at
        seen = Observation(self._route.manifest_sha256, True, ttft_s=waited_s, trial=self._table.trial, departed=True)
        self._router.observe(self._table, self._route, LEFT_BEFORE, seen)

    def _observe(self, status: str, figures: dict[str, Any] | None, ok: bool = False) -> None:
        """An answer of status 4xx is the client's mistake, and one of 503 lacks room: they are counted, and say nothing
        about the version."""
        found = figures or {}
        self._account.use(found.get("prompt_tokens", 0) + found.get("completion_tokens", 0))
        answered = ok and not status.startswith("4")
        seen = Observation(
            self._route.manifest_sha256,
            ok,
            ttft_s=found.get("ttft_s") if answered else None,
            token_s=found.get("token_s") if answered else None,
            prompt_tokens=found.get("prompt_tokens", 0),
            completion_tokens=found.get("completion_tokens", 0),
            trial=None if status.startswith("4") or status == "503" else self._table.trial,
        )
        self._router.observe(self._table, self._route, status, seen)


async def _first_of(parts: AsyncGenerator[Part], gone: "asyncio.Future[None]", give_up: Callable[[], bool]) -> Part:
    """The next part, or `ClientDisconnect` as soon as nobody waits for it.

    Raises:
        ConnectionError: `give_up`, asked now and then, says that none is to be waited for.
    """
    following = asyncio.ensure_future(anext(parts))
    both: set[asyncio.Future[Any]] = {following, gone}
    try:
        while not (await asyncio.wait(both, timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED))[0]:
            if give_up():
                raise ConnectionError("no replica runs, or none answers")
        if not following.done():
            raise ClientDisconnect
        return following.result()
    finally:
        if not following.done():
            following.cancel()
            with contextlib.suppress(BaseException):
                await following


def _no_replica() -> ApiError:
    return unavailable("No replica of the model runs now; try again.", "replica_ended", retry_after_s=1)


def _has_no_room(error: Exception) -> bool:
    cause = getattr(error, "cause", error)  # Ray wraps what a replica raised
    return isinstance(cause, ApiError) and cause.status == 503


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _end_with_error(send: Send) -> None:
    content = f"data: {json.dumps(internal().envelope())}\n\n".encode()
    await send({"type": "http.response.body", "body": content, "more_body": False})


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__} ({(str(error).strip().splitlines() or [''])[0][:200]})"


# --- in the HTTP interface --------------------------------------------------------------------------------------------


class Forward:
    """Innermost layer: questions to a model go to the router, all else to the routes behind."""

    def __init__(self, app: ASGIApp, router: Router) -> None:
        self._app, self._router = app, router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].startswith("/v1/"):
            await self._router.forward(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def put_router_into(api: FastAPI, router: Router) -> FastAPI:
    """Puts a router behind the keys and limits of an HTTP interface, and adds `GET /v1/raystill/traffic`."""
    api.user_middleware.append(Middleware(Forward, router=router))

    @api.get("/v1/raystill/traffic")
    async def traffic() -> Response:
        return JSONResponse(await router.said())

    return api
