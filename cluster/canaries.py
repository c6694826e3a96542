"""A canary in SQL: the version that serves a growing share of the traffic before it is champion, one for each model.

    running ──► passed     its promotion was crowned
       ├──────► failed     it went beyond a limit and was taken down; its promotion is `rolled_back`
       ├──────► ended      somebody ended it
       └──────► overtaken  another version became champion meanwhile

The row says which version is challenger, at which step of its plan, and since when; every endpoint that follows the
model reads it, so that a restarted one goes on where it was and two of them agree. Each change is a compare-and-set on
the row's revision. The end of a canary and that of its promotion are one transaction. MLflow's alias `challenger` and
the tags are copies, written afterwards (`cluster.crowning`).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Engine, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from cluster.champions import CANARIES, Champion, current_champion, now_text
from cluster.errors import PromotionRefused
from cluster.promotions import Promotion, crown, find_promotion, history, move
from cluster.promotions import State as PromotionState

End = Literal["failed", "ended", "overtaken"]
State = Literal["running", "passed", End]
_OF_THE_PROMOTION: dict[End, PromotionState] = {"failed": "rolled_back", "ended": "abandoned", "overtaken": "lost"}
_OF_THE_CANARY: dict[PromotionState, State] = {
    **{promotion: end for end, promotion in _OF_THE_PROMOTION.items()},
    **dict.fromkeys(("crowned", "announced"), "passed"),
}


@dataclass(frozen=True)
class Canary:
    """The latest canary of a model."""

    model_name: str
    promotion_id: int
    version: str
    uri: str
    manifest_sha256: str
    seen_epoch: int
    """Epoch of the champion it stands beside."""
    state: State
    step: int
    """Index into the steps of its plan."""
    plan: str
    """JSON: `services.endpoint.schema.CanaryConfig` as it was when the canary began."""
    figures: str
    """JSON: what the last decision was made on; empty before one."""
    reason: str
    revision: int
    announced: bool
    """Whether MLflow says the same."""
    began_at: str
    changed_at: str

    @property
    def steps(self) -> list[float]:
        return json.loads(self.plan)["steps"]

    @property
    def share(self) -> float:
        """Share of the traffic that it is to answer."""
        return self.steps[self.step] if self.state == "running" else 0.0

    def is_same_state(self, other: "Canary") -> bool:
        """Whether nothing was decided between the two. Revisions begin anew with every canary."""
        return (self.promotion_id, self.revision) == (other.promotion_id, other.revision)

    @property
    def artefact(self) -> Champion:
        """The version as an endpoint loads it; it is nobody's champion, so the epoch is 0."""
        return Champion(self.model_name, 0, self.version, self.uri, self.manifest_sha256, self.began_at)


def begin(engine: Engine, promotion: Promotion, plan: dict[str, Any]) -> Canary:
    """Makes a checked promotion's version challenger, at the first step of `plan`.

    Raises:
        PromotionRefused: a canary of the model is running, or the promotion was abandoned meanwhile.
    """
    now = now_text()
    values: dict[str, Any] = {
        **{name: getattr(promotion, name) for name in ("model_name", "version", "uri", "manifest_sha256")},
        **{"promotion_id": promotion.id, "seen_epoch": promotion.seen_epoch, "state": "running", "step": 0},
        **{"plan": json.dumps(plan), "figures": "", "reason": "", "revision": 0, "announced": False},
        **{"began_at": now, "changed_at": now},
    }
    finished = (CANARIES.c.model_name == promotion.model_name, CANARIES.c.state != "running")
    try:
        with engine.begin() as connection:
            if not move(connection, promotion, "canary"):
                raise PromotionRefused(
                    f"model {promotion.model_name}: promotion {promotion.id} of version {promotion.version} was "
                    "abandoned meanwhile; ask again"
                )
            connection.execute(delete(CANARIES).where(*finished))
            connection.execute(insert(CANARIES).values(**values))
    except IntegrityError:
        raise PromotionRefused(_busy(engine, promotion)) from None
    return Canary(**values)


def _busy(engine: Engine, promotion: Promotion) -> str:
    other = latest_canary(engine, promotion.model_name)
    which = f"version {other.version} ({other.share:.0%} of the traffic)" if other is not None else "another version"
    return (
        f"version {promotion.version} of {promotion.model_name}: {which} is a canary now; wait for its end, or end it "
        "with `raystill rollback`, then ask again"
    )


def latest_canary(engine: Engine, model_name: str) -> Canary | None:
    """The canary that runs, or the last one that did."""
    with engine.connect() as connection:
        row = connection.execute(select(CANARIES).where(CANARIES.c.model_name == model_name)).one_or_none()
    return Canary(**row._mapping) if row is not None else None


def running_canary(engine: Engine, model_name: str) -> Canary | None:
    """The canary that runs. One that was overtaken, or whose end was broken off half-way, is settled here."""
    canary = latest_canary(engine, model_name)
    if canary is None or canary.state != "running":
        return None
    promotion = find_promotion(engine, canary.promotion_id)
    if promotion.state in ("crowned", "announced"):
        _change(engine, canary, state="passed")
        return None
    champion = current_champion(engine, model_name)
    if promotion.state == "canary" and champion is not None and champion.epoch == canary.seen_epoch:
        return canary
    reigns = f"version {champion.version}" if champion is not None else "another version"
    end_canary(engine, canary, "overtaken", f"{reigns} became champion meanwhile")
    return None


def next_step(engine: Engine, canary: Canary, figures: dict[str, Any]) -> Canary | None:
    """The canary one step on; None if it was changed by another process, which is then to be looked at."""
    assert canary.step + 1 < len(canary.steps), "after the last step comes the crown"
    return _change(engine, canary, step=canary.step + 1, figures=json.dumps(figures))


def crown_canary(engine: Engine, canary: Canary, figures: dict[str, Any]) -> Champion | None:
    """Makes the challenger champion; None if another version became champion, or the canary was ended, meanwhile."""
    promotion = find_promotion(engine, canary.promotion_id)
    if promotion.state != "canary":
        return None
    try:
        _, champion = crown(engine, promotion)
    except PromotionRefused:
        running_canary(engine, canary.model_name)
        return None
    _change(engine, canary, state="passed", figures=json.dumps(figures))
    return champion


def end_canary(
    engine: Engine, canary: Canary, end: End, reason: str, figures: dict[str, Any] | None = None
) -> Canary | None:
    """Ends a canary and its promotion; None if another process ended it first, or crowned it."""
    promotion = find_promotion(engine, canary.promotion_id)
    written = json.dumps(figures) if figures is not None else canary.figures
    try:
        with engine.begin() as connection:
            ended = _changed(connection, canary, state=end, reason=reason, figures=written)
            if ended is None or promotion.state in ("crowned", "announced"):
                raise _NotEnded
            if promotion.state == "canary" and not move(connection, promotion, _OF_THE_PROMOTION[end], reason=reason):
                raise _NotEnded
    except _NotEnded:
        return None
    return ended


class _NotEnded(Exception):
    """Takes the transaction back."""


def end_of(promotion: Promotion) -> State | None:
    """How the canary of a promotion that had one ended, also when its row is gone; None: it did not."""
    return _OF_THE_CANARY.get(promotion.state)


def mark_canary_announced(engine: Engine, canary: Canary) -> None:
    """MLflow says what this state of the canary is."""
    this = (CANARIES.c.model_name == canary.model_name, CANARIES.c.revision == canary.revision)
    mine = (*this, CANARIES.c.promotion_id == canary.promotion_id)
    with engine.begin() as connection:
        connection.execute(update(CANARIES).where(*mine).values(announced=True))


def taken_down_before(engine: Engine, model_name: str, is_same: Callable[[Promotion], bool]) -> Promotion | None:
    """The promotion in which a canary of the same bytes failed, if they never reigned after it."""
    decided = [
        item
        for item in history(engine, model_name)
        if item.state in ("rolled_back", "crowned", "announced") and is_same(item)
    ]
    return decided[-1] if decided and decided[-1].state == "rolled_back" else None


def _change(engine: Engine, canary: Canary, **values: Any) -> Canary | None:
    with engine.begin() as connection:
        return _changed(connection, canary, **values)


def _changed(connection: Connection, canary: Canary, **values: Any) -> Canary | None:
    """The canary with its new values, if nobody changed it in between."""
    this = (
        CANARIES.c.model_name == canary.model_name,
        CANARIES.c.promotion_id == canary.promotion_id,
        CANARIES.c.revision == canary.revision,
        CANARIES.c.state == "running",
    )
    values = {**values, "revision": canary.revision + 1, "announced": False, "changed_at": now_text()}
    if connection.execute(update(CANARIES).where(*this).values(**values)).rowcount != 1:
        return None
    return Canary(**{**vars(canary), **values})
