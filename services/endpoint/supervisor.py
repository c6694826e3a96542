"""Decides who answers: follows the champion and the canary in SQL, starts and ends versions, and judges the canary.

One for an endpoint; routers ask it for their table, and tell it what they saw, in one exchange every moment. Versions
are started beside those that serve, and a table names one only when it runs. One that no table names any more is ended
when no router has a request there.

What takes a challenger down happens in this order: the exchange that saw the breach already answers with a table
without it (weights first), then the row in SQL ends, so that every other endpoint drops it too, then MLflow's alias and
tags follow. A step up and the crown go the other way: first the row, then the table.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from cluster.canaries import Canary, crown_canary, end_canary, latest_canary, next_step, running_canary
from cluster.champions import Champion
from cluster.crowning import announce
from cluster.errors import CorruptArtifact, ModelError
from services.endpoint.applications import Applications, ApplicationState
from services.endpoint.canary import Decision, Evidence, Observation, judge, prepare
from services.endpoint.following import ChampionFollower, why_refused
from services.endpoint.schema import CanaryConfig, EndpointArguments
from services.endpoint.traffic import TEACHER, Reign, Route, RoutingTable

logger = logging.getLogger(__name__)

_RECENT_S = 60.0
"""What the figures of the traffic are about."""
_ROUTER_SILENT_S = 30.0
"""A router that was not heard for so long is gone, and so are its requests."""
_SLOW_START_S = 60.0
_LONGEST_START_S = 600.0
"""For a challenger, also one whose replicas are gone. A cluster that adds a node for it does so in less; one that has
no room would keep every other canary out for as long as this one waits. It is ended, not failed: nothing was learned
about the version."""
_STALLED_S = 20.0
_MOST_ATTEMPTS = 3
"""To start a challenger, before it is taken down; one that is damaged has one."""


@dataclass
class _Trial:
    """The canary at its present step, as this endpoint has seen it."""

    canary: Canary
    plan: CanaryConfig
    route: Route
    began: float
    evidence: Evidence
    decision: Decision


@dataclass
class _Heard:
    """A router's last word."""

    at: float
    message: int
    table: int
    in_flight: dict[str, int]


@dataclass
class _Seen:
    """All traffic of a version since it is known, and the recent."""

    requests: int = 0
    errors: int = 0
    recent: deque[tuple[float, Observation]] = field(default_factory=lambda: deque(maxlen=10_000))


class Supervisor:
    """Give it `poll` from one thread and `exchange` from any.

    Args:
        clock: seconds that only ever grow.
    """

    def __init__(
        self,
        arguments: EndpointArguments,
        applications: Applications,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._arguments, self._applications, self._clock = arguments, applications, clock
        self._follower: ChampionFollower[Route] = ChampionFollower(
            arguments.model_name, arguments.database, self._bring_up
        )
        self._lock = threading.Lock()
        # Numbers grow over a restart too: routers tell by them that they use what this supervisor said.
        self._table = RoutingTable(number=time.time_ns() // 1_000_000)
        self._trial: _Trial | None = None
        self._taken_down: dict[int, Decision] = {}
        """Promotions whose challenger must not serve, whatever the row still says."""
        self._attempts: Counter[int] = Counter()
        self._retry_at = 0.0
        self._routers: dict[str, _Heard] = {}
        self._dropped: dict[str, int] = {}
        """Applications that no table since this number names."""
        self._seen: dict[str, _Seen] = {}
        self._queues: dict[str, int] = {}
        self._started = clock()
        self._waiting: tuple[Champion, float] | None = None
        """A champion that is not served yet, and since when."""
        self._starting: tuple[Canary, float] | None = None
        """A challenger that was asked for and does not run yet, and since when."""
        self._alone_since: dict[str, float] = {}
        """Applications in the table that have no replica, and since when."""
        self._said: dict[str, ApplicationState] | None = None
        """What Serve answered in this poll; None before it was asked, and after it was told to change something."""
        self._told: tuple[int, int] | None = None
        """Promotion and revision of the canary that MLflow was last told of."""
        self._previous: Route | None = None
        """The champion before, as far as it reigned while this supervisor looked."""
        self.urgent = threading.Event()
        """Set when `poll` has something to write down."""

    # --- what routers ask ---

    def exchange(
        self, router: str, message: int, observations: list[Observation], in_flight: dict[str, int], table: int
    ) -> tuple[RoutingTable, dict[str, Any]]:
        """Takes in what a router saw; returns the table to use from now on, and what is to be said of the traffic.

        Args:
            message: its number; the observations of one that was heard before are not counted again.
        """
        with self._lock:
            now = self._clock()
            before = self._routers.get(router)
            self._routers[router] = _Heard(now, message, table, in_flight)
            if before is None or before.message != message:
                for seen in observations:
                    self._count(now, seen)
            if self._trial is not None:
                self._judge(self._trial, now)
            return self._table, self._traffic(now)

    def _count(self, now: float, seen: Observation) -> None:
        trial = self._trial
        if trial is not None and seen.trial == (trial.canary.promotion_id, trial.canary.step):
            trial.evidence.add(seen)
        if not seen.shadow:
            known = self._seen.setdefault(seen.manifest_sha256, _Seen())
            known.requests += not seen.departed
            known.errors += not seen.ok
            known.recent.append((now, seen))

    def _judge(self, trial: _Trial, now: float) -> None:
        """Looks at the evidence. A take-down works at once; everything else waits for `poll` to write it down."""
        if trial.decision.action != "hold":
            return
        trial.decision = judge(trial.plan, trial.canary.step, now - trial.began, trial.evidence)
        if trial.decision.action == "take_down":
            self._taken_down[trial.canary.promotion_id] = trial.decision
            self._trial = None
            self._set_table(challenger=None, trial=None, share=0.0, shadow=0.0)
        if trial.decision.action != "hold":
            self.urgent.set()

    # --- what happens by itself ---

    def poll(self) -> None:
        """Looks at the rows, starts and ends what they ask for, and writes decisions down. Never raises."""
        self.urgent.clear()
        self._said = None
        follow = (self._follow_champion, self._follow_canary)
        for work in (self._write_decision, *follow, self._tell_registry, self._sweep, self._read_queues):
            try:
                work()
            except Exception as error:  # a database or a controller that is away comes back; the table stays
                logger.warning("The supervisor could not %s: %s", work.__name__.strip("_").replace("_", " "), error)

    def _states(self) -> dict[str, ApplicationState]:
        if self._said is None:
            self._said = self._applications.states()
        return self._said

    def _remove(self, name: str) -> None:
        self._said = None
        self._applications.remove(name)

    def _bring_up(self, version: Champion) -> Route | None:
        """The way to a version that runs; None while it starts.

        Raises:
            CorruptArtifact, FileNotFoundError, ModelError: its replica refused the files.
        """
        name = self._applications.name_of(version)
        state = self._states().get(name, ApplicationState())
        if state.word == "":
            self._said = None
            self._applications.start(version)
        elif state.word == "DEPLOY_FAILED":
            self._remove(name)
            raise self._applications.failure(state.message)
        elif state.word == "RUNNING":
            return self._applications.route(version)
        return None  # being deployed, or deleted and then to be started again, or its replica died and is replaced

    def _follow_champion(self) -> None:
        self._follower.poll(self._arguments.poll_s)
        served = self._follower.served
        stalled = served is not None and self._alone_s(served.model) >= _STALLED_S
        problem = self._follower.problem or self._slow_start()
        if stalled and served is not None:
            problem = f"version {served.champion.version} has no replica that runs; Serve tries to start one"
        with self._lock:
            if served is None:
                self._set_table(problem=problem)
                return
            reign = Reign(served.champion.epoch, served.champion.promoted_at)
            if (before := self._table.champion) is not None and before.app != served.model.app:
                self._previous = before
            self._set_table(champion=served.model, reign=reign, stalled=stalled, problem=problem)

    def _alone_s(self, route: Route) -> float:
        """How long a version has had no replica that runs; one that died is usually replaced in a few seconds."""
        if self._states().get(route.app, ApplicationState()).running:
            self._alone_since.pop(route.app, None)
            return 0.0
        return self._clock() - self._alone_since.setdefault(route.app, self._clock())

    def _slow_start(self) -> str | None:
        """What is wrong if a champion takes long to start; where a cluster has no room for it, it never does."""
        wanted, served = self._follower.wanted, self._follower.served
        if wanted is None or (served is not None and served.champion == wanted):
            self._waiting = None
            return None
        if self._waiting is None or self._waiting[0] != wanted:
            self._waiting = (wanted, self._clock())
        waited_s = self._clock() - self._waiting[1]
        if waited_s < _SLOW_START_S:
            return None
        return f"version {wanted.version} has been starting for over {_SLOW_START_S:g} s: is there a free CPU for it?"

    def _follow_canary(self) -> None:
        canary = running_canary(self._follower.engine, self._arguments.model_name)
        served = self._follower.served
        if canary is not None and (canary.promotion_id in self._taken_down or served is None):
            canary = None
        if canary is None or served is None or canary.seen_epoch != served.champion.epoch:
            self._drop_challenger()
            return
        key = (canary.promotion_id, canary.step)
        trial = self._trial
        if trial is not None and (trial.canary.promotion_id, trial.canary.step) == key:
            if self._alone_s(trial.route) >= _LONGEST_START_S:  # without traffic nothing else would take it down
                self._end(canary, f"no replica of it ran for over {_LONGEST_START_S:g} s: is there a free CPU for it?")
            return
        if self._clock() < self._retry_at:
            return
        try:
            route = self._bring_up(canary.artefact)
        except Exception as error:
            self._could_not_start(canary, error)
            return
        prepare()  # while its version starts; later, all routers would wait for it
        if route is None:
            self._wait_for_start(canary)
            return
        plan = CanaryConfig.model_validate_json(canary.plan)
        with self._lock:
            waiting = Decision("hold", "it has just begun", {})
            evidence = Evidence(canary.manifest_sha256)
            self._trial, self._starting = _Trial(canary, plan, route, self._clock(), evidence, waiting), None
            self._set_table(challenger=route, trial=key, share=canary.share, shadow=plan.shadow)
        logger.info("Version %s answers %.0f %% of the traffic", canary.version, 100 * canary.share)

    def _wait_for_start(self, canary: Canary) -> None:
        """Ends the canary if its version takes too long to start; where a cluster has no room for it, it never does."""
        with self._lock:
            before, since = self._starting or (canary, self._clock())
            since = since if before.promotion_id == canary.promotion_id else self._clock()
            self._starting = (canary, since)
            if self._clock() - since < _LONGEST_START_S:
                return
        self._end(canary, f"it had been starting for over {_LONGEST_START_S:g} s: is there a free CPU for it?")

    def _end(self, canary: Canary, reason: str) -> None:
        if end_canary(self._follower.engine, canary, "ended", reason) is not None:
            logger.warning("The canary of version %s is ended: %s", canary.version, reason)
        self._drop_challenger()

    def _could_not_start(self, canary: Canary, error: Exception) -> None:
        """What is damaged stays damaged; anything else may be better in a while."""
        with self._lock:
            self._starting = None
        self._attempts[canary.promotion_id] += 1
        attempts = self._attempts[canary.promotion_id]
        logger.warning("Version %s, challenger: %s", canary.version, error)
        if isinstance(error, (CorruptArtifact, FileNotFoundError, ModelError)) or attempts >= _MOST_ATTEMPTS:
            self._taken_down[canary.promotion_id] = Decision("take_down", why_refused(error), {"share": 0.0})
            self._write_decision()
        else:
            self._retry_at = self._clock() + self._arguments.poll_s * 2**attempts

    def _drop_challenger(self) -> None:
        with self._lock:
            self._trial = self._starting = None
            self._set_table(challenger=None, trial=None, share=0.0, shadow=0.0)

    def _write_decision(self) -> None:
        """Puts into SQL what was decided in the meantime."""
        engine, trial = self._follower.engine, self._trial
        canary = running_canary(engine, self._arguments.model_name)
        if canary is not None and (taken := self._taken_down.get(canary.promotion_id)) is not None:
            logger.warning("Version %s is taken down: %s", canary.version, taken.reason)
            end_canary(engine, canary, "failed", taken.reason, taken.figures)
        elif canary is not None and trial is not None and canary.is_same_state(trial.canary):
            if trial.decision.action == "advance":
                next_step(engine, canary, trial.decision.figures)
            elif trial.decision.action == "promote":
                crown_canary(engine, canary, trial.decision.figures)

    def _tell_registry(self) -> None:
        """Tells MLflow once of each state of the canary, whoever wrote it: its process may have died before it did."""
        canary = latest_canary(self._follower.engine, self._arguments.model_name)
        if canary is None or canary.announced or self._told == (canary.promotion_id, canary.revision):
            return
        self._told = (canary.promotion_id, canary.revision)
        self._announce_later(self._follower.engine)

    def _announce_later(self, engine: Any) -> None:
        """MLflow may be slow or away; nothing waits for it, and the next start repairs what it missed."""

        def tell() -> None:
            try:
                announce(engine, self._arguments.model_name, self._arguments.tracking)
            except Exception as error:
                logger.warning("MLflow was not told: %s", error)

        if self._arguments.tracking:
            threading.Thread(target=tell, name="announce", daemon=True).start()

    # --- the table ---

    def _set_table(self, **changes: Any) -> None:
        """A new table if anything differs. The lock is held."""
        changed = replace(self._table, **changes)
        if changed == self._table:
            return
        before = {route.app for route in self._table.routes()}
        self._table = replace(changed, number=self._table.number + 1)
        now = {route.app for route in self._table.routes()}
        for app in before - now:
            self._dropped[app] = self._table.number
        for app in now:
            self._dropped.pop(app, None)

    def _sweep(self) -> None:
        """Ends applications that nobody needs: in no table, not starting, and without requests in any router."""
        if self._table.champion is None:
            return  # started anew: what is there may still serve
        needed = {route.app for route in self._table.routes()}
        if self._arguments.keep_previous and self._previous is not None:
            needed.add(self._previous.app)
        for version in (self._follower.wanted, self._canary_wanted()):
            if version is not None:
                needed.add(self._applications.name_of(version))
        now = self._clock()
        with self._lock:
            self._routers = {name: heard for name, heard in self._routers.items() if now - heard.at < _ROUTER_SILENT_S}
            heard = list(self._routers.values())
        if not heard and now - self._started < _ROUTER_SILENT_S:
            return  # started anew: routers that were there before have not said yet what they have
        for name, state in self._states().items():
            if name in needed or state.word == "DELETING":
                continue
            number = self._dropped.setdefault(name, self._table.number)
            if all(router.table >= number and not router.in_flight.get(name) for router in heard):
                self._remove(name)
                self._alone_since.pop(name, None)

    def _canary_wanted(self) -> Champion | None:
        canary = running_canary(self._follower.engine, self._arguments.model_name)
        return canary.artefact if canary is not None and canary.promotion_id not in self._taken_down else None

    # --- what is said of it ---

    def _read_queues(self) -> None:
        self._queues = {route.app: self._applications.queue(route.app) for route in self._table.routes()}

    def _traffic(self, now: float) -> dict[str, Any]:
        """Figures for people: shares, and of each version the last minute. The lock is held."""
        table, rows = self._table, []
        for alias, route in (("champion", table.champion), ("challenger", table.challenger)):
            if route is None:
                continue
            share = table.share if alias == "challenger" else 1.0 - table.share
            rows.append({"version": route.version, "alias": alias, "share": share, "scheme": route.scheme})
            figures = _figures(self._seen.setdefault(route.manifest_sha256, _Seen()), now)
            rows[-1] |= {"queue": self._queues.get(route.app, 0), **figures}
        said = {"model": self._arguments.model_name, "canary": self._canary_state(now), "versions": rows}
        return {**said, "teacher": _figures(self._seen.setdefault(TEACHER, _Seen()), now)}

    def _canary_state(self, now: float) -> dict[str, Any] | None:
        trial, starting = self._trial, self._starting
        if starting is not None:
            canary, began = starting
            waited_s = now - began
            slow = f"it has been starting for {waited_s:.0f} s: is there a free CPU for it?"
            said = {"version": canary.version, "step": canary.step, "steps": canary.steps, "held_s": 0.0}
            return {**said, "state": slow if waited_s >= _SLOW_START_S else "it is starting", "figures": {}}
        if trial is None:
            return None
        alone_s = now - self._alone_since.get(trial.route.app, now)
        alone = f"no replica of it runs, for {alone_s:.0f} s: is there a free CPU for it?"
        return {
            "version": trial.canary.version,
            "step": trial.canary.step,
            "steps": trial.plan.steps,
            "held_s": round(now - trial.began, 1),
            "state": alone if alone_s >= _STALLED_S else trial.decision.reason,
            "figures": trial.decision.figures,
        }


def _figures(known: _Seen, now: float) -> dict[str, Any]:
    """Requests and errors since the version is known here; times and tokens of the last minute."""
    while known.recent and now - known.recent[0][0] > _RECENT_S:
        known.recent.popleft()
    recent = [seen for _, seen in known.recent]
    first_s = sorted(seen.ttft_s for seen in recent if seen.ttft_s is not None)
    span_s = max(1.0, now - known.recent[0][0]) if known.recent else 1.0
    return {
        "requests": known.requests,
        "errors": known.errors,
        "ttft_p50_s": median(first_s) if first_s else None,
        "ttft_p99_s": first_s[min(len(first_s) - 1, int(0.99 * len(first_s)))] if first_s else None,
        "tokens_per_s": sum(seen.completion_tokens for seen in recent) / span_s,
    }
