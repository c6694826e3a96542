"""How a router and the supervisor keep each other informed: what was seen one way, who is to answer the other."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from services.endpoint.canary import Observation
from services.endpoint.metrics import BROKEN
from services.endpoint.router import Router, first_line
from services.endpoint.traffic import Route, RoutingTable

logger = logging.getLogger(__name__)

_UNREACHABLE_S = 20.0
"""For so long a challenger that does not answer the router's first call may be about to."""


class Exchange:
    """A thread that tells the supervisor what the router saw, and brings back who is to answer.

    Args:
        ask: sends `(router's name, number of the message, observations, requests in flight, number of the table in
            use)` to the supervisor, returns the table and what is said of the traffic. A message whose answer did not
            come is sent again under its number.
        warm: called with a route before the first request goes there.
    """

    def __init__(
        self,
        router: Router,
        ask: Callable[[str, int, list[Observation], dict[str, int], int], tuple[RoutingTable, dict[str, Any]]],
        warm: Callable[[Route], None],
        poll_s: float,
    ) -> None:
        self._router, self._ask, self._warm, self._poll_s = router, ask, warm, poll_s
        self._message: list[Observation] = []
        self._message_number = 0
        self._known: set[str] = set()
        self._unreachable_since: dict[str, float] = {}
        self._stopping = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="router-exchange", daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()
        self._router.urgent.set()

    def once(self) -> None:
        """One exchange. A table is used only when its champion has answered this router; without its challenger while
        that has not."""
        router = self._router
        if not self._message:
            self._message, self._message_number = router.take_observations(), self._message_number + 1
        in_flight = {app: count for app, count in list(router.in_flight.items()) if count}
        said = (self._message_number, self._message, in_flight, router.table.number)
        table, router.traffic = self._ask(router.name, *said)
        self._message = []
        if table.champion is None and (served := router.table).champion is not None:
            # A supervisor that was started anew has no champion yet: the one that answers goes on answering.
            router.table = replace(served, challenger=None, trial=None, share=0.0, shadow=0.0, problem=table.problem)
            return
        for route in table.routes():
            if route.app in self._known:
                continue
            try:
                self._warm(route)
                self._known.add(route.app)
            except Exception as error:
                if route != table.challenger:
                    raise
                self._count_unreachable(table, route, error)
                table = replace(table, challenger=None, trial=None, share=0.0, shadow=0.0)
        self._known &= {route.app for route in table.routes()}
        self._unreachable_since = {app: at for app, at in self._unreachable_since.items() if app not in self._known}
        router.table = table

    def _count_unreachable(self, table: RoutingTable, route: Route, error: Exception) -> None:
        """A challenger that keeps not answering the router is at fault like one that fails requests."""
        now = time.monotonic()
        if now - self._unreachable_since.setdefault(route.app, now) < _UNREACHABLE_S:
            return
        logger.warning("Version %s cannot be reached: %s", route.version, first_line(error))
        self._router.observe(table, route, BROKEN, Observation(route.manifest_sha256, False, trial=table.trial))

    def _run(self) -> None:
        failing = False
        while not self._stopping.is_set():
            try:
                self.once()
                failing = False
            except Exception as error:  # requests go on with the table at hand
                if not failing:
                    logger.warning("The supervisor cannot be asked (%s); the table stays", first_line(error))
                failing = True
            began = time.monotonic()
            self._router.urgent.wait(self._poll_s)
            self._router.urgent.clear()
            time.sleep(max(0.0, min(0.05, self._poll_s) - (time.monotonic() - began)))
