"""A promotion, from the asking to the alias: a state machine in SQL, each step a compare-and-set.

    proposed ──► checked ──────────────► crowned ──► announced
        │           ├──► canary ────────────┤
        │           │       ├──► rolled_back      it served a share of the traffic and was taken down
        │           └───────┴──► lost             another promotion was crowned in between
        ├───────────┴──► abandoned                its process ended, or stopped giving signs of life
        └──► refused                              the gate or the files said no

The step to `crowned` is one transaction with the champion's row: the epoch that the promotion saw must still be the
champion's. Up to there a promotion has changed nothing, so one whose process died is abandoned; from there on the
version reigns, and whoever comes next announces it, which may be done any number of times. A promotion that was
abandoned while its process still worked finds that out at its next step. A canary outlives the process that asked for
it: the endpoint watches it (`cluster.canaries`).

Rows stay: they are the history that a rollback reads. A reign's `restores` is the epoch of the reign it brings back;
going back from there looks below that epoch, so that two rollbacks lead two champions back and not forth again.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import Connection, Engine, func, insert, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from cluster.champions import CHAMPIONS, PROMOTIONS, Champion, champion_row, now_text
from cluster.errors import PromotionRefused
from cluster.names import check_model_name
from cluster.processes import is_gone, this_process

State = Literal["proposed", "checked", "canary", "crowned", "announced", "refused", "lost", "abandoned", "rolled_back"]
Kind = Literal["promote", "rollback", "found"]
BEAT_S = 3.0
"""How often a promotion that is being checked says that it lives."""
LEASE_S = 15.0
"""A promotion from another machine that has been silent for so long is abandoned. By the database's clock."""


@dataclass(frozen=True)
class Promotion:
    """One row of the history."""

    id: int
    model_name: str
    kind: Kind
    state: State
    version: str
    uri: str
    manifest_sha256: str
    seen_epoch: int
    """Epoch of the champion when it was proposed; 0: there was none."""
    epoch: int | None
    """Of its own reign; None: it never came to one."""
    restores: int | None
    """Epoch of the reign that a rollback brings back."""
    forced: bool
    run: str
    by_user: str
    host: str
    process: str
    alive_at: float
    verdict: str
    """JSON: the gate's rules with their values; empty where none was spoken."""
    reason: str
    """Why it ended as it did, where it is not champion."""
    proposed_at: str
    changed_at: str

    @property
    def by(self) -> str:
        """Who asked for it, for people."""
        if not self.host:
            return "an older raystill"
        return f"{self.by_user}@{self.host}" + (f", run {self.run}" if self.run else "")


def propose(
    engine: Engine,
    model_name: str,
    version: dict[str, str],
    seen: Champion | None,
    run: str,
    kind: Kind = "promote",
    restores: int | None = None,
    forced: bool = False,
) -> Promotion:
    """Opens a promotion of `{"version", "uri", "manifest_sha256"}` over the champion that was seen (None: none)."""
    process, now = this_process(), now_text()
    values: dict[str, Any] = {
        "model_name": check_model_name(model_name),
        "kind": kind,
        "state": "proposed",
        **{name: str(version[name]) for name in ("version", "uri", "manifest_sha256")},
        "seen_epoch": seen.epoch if seen is not None else 0,
        "epoch": None,
        "restores": restores,
        "forced": forced,
        "run": run,
        "by_user": process.user,
        "host": process.host,
        "process": process.identity,
        **{"verdict": "", "reason": "", "proposed_at": now, "changed_at": now},
    }
    with engine.begin() as connection:
        values["alive_at"] = _clock_s(connection)
        inserted = connection.execute(insert(PROMOTIONS).values(**values)).inserted_primary_key
    assert inserted is not None
    return Promotion(id=inserted[0], **values)


def advance(engine: Engine, promotion: Promotion, to: State, **values: Any) -> Promotion:
    """The promotion in its next state, `values` (verdict, reason) written with it.

    Raises:
        PromotionRefused: it is no longer in the state it was in; the message says what became of it.
    """
    with engine.begin() as connection:
        moved = move(connection, promotion, to, **values)
    if not moved:
        raise _overtaken(engine, promotion)
    return find_promotion(engine, promotion.id)


def crown(engine: Engine, promotion: Promotion) -> tuple[Promotion, Champion]:
    """Makes a checked promotion's version champion, if the champion is still the one that it saw.

    Raises:
        PromotionRefused: another promotion came first (it is `lost` then; the message names the winner), or this one
            was abandoned meanwhile.
    """
    champion = Champion(
        model_name=promotion.model_name,
        epoch=promotion.seen_epoch + 1,
        version=promotion.version,
        uri=promotion.uri,
        manifest_sha256=promotion.manifest_sha256,
        promoted_at=now_text(),
    )
    try:
        with engine.begin() as connection:  # begins with a write: two readers that both want to write would deadlock
            if not move(connection, promotion, "crowned", epoch=champion.epoch) or not _seat(connection, champion):
                raise _NotCrowned
    except (_NotCrowned, IntegrityError):
        raise _lost(engine, promotion) from None
    return find_promotion(engine, promotion.id), champion


class _NotCrowned(Exception):
    """Takes the transaction back."""


def _seat(connection: Connection, champion: Champion) -> bool:
    """Whether the champion's row could be moved one epoch on."""
    if champion.epoch == 1:
        connection.execute(insert(CHAMPIONS).values(**vars(champion)))  # IntegrityError if there is one
        return True
    this = (CHAMPIONS.c.model_name == champion.model_name, CHAMPIONS.c.epoch == champion.epoch - 1)
    return connection.execute(update(CHAMPIONS).where(*this).values(**vars(champion))).rowcount == 1


def move(connection: Connection, promotion: Promotion, to: State, **values: Any) -> bool:
    """Whether the promotion was still in the state it was in, and so is in its next one now."""
    this = (PROMOTIONS.c.id == promotion.id, PROMOTIONS.c.state == promotion.state)
    values = {"state": to, "changed_at": now_text(), **values}
    return connection.execute(update(PROMOTIONS).where(*this).values(**values)).rowcount == 1


def _lost(engine: Engine, promotion: Promotion) -> PromotionRefused:
    with engine.connect() as connection:
        winner = champion_row(connection, promotion.model_name)
    if winner is None or winner.epoch == promotion.seen_epoch:  # nobody came first: its own state was changed
        return _overtaken(engine, promotion)
    before = f"the champion of epoch {promotion.seen_epoch}" if promotion.seen_epoch else "none"
    reign = reign_of(engine, promotion.model_name, winner.epoch)
    refused = PromotionRefused(
        f"model {promotion.model_name}: asked to make version {promotion.version} champion over {before}, but version "
        f"{winner.version} was promoted meanwhile by {reign.by if reign else 'somebody'} at {winner.promoted_at}; look "
        "at it, then ask again"
    )
    with engine.begin() as connection:
        move(connection, promotion, "lost", reason=str(refused))
    return refused


def _overtaken(engine: Engine, promotion: Promotion) -> PromotionRefused:
    found = find_promotion(engine, promotion.id)
    return PromotionRefused(
        f"model {promotion.model_name}: promotion {promotion.id} of version {promotion.version} is {found.state} "
        f"({found.reason or 'by another process'}), it was {promotion.state}; ask again"
    )


# --- the history ------------------------------------------------------------------------------------------------------


def history(engine: Engine, model_name: str) -> list[Promotion]:
    """Every promotion of a model, the latest last."""
    this = select(PROMOTIONS).where(PROMOTIONS.c.model_name == model_name).order_by(PROMOTIONS.c.id)
    with engine.connect() as connection:
        return [Promotion(**row._mapping) for row in connection.execute(this)]


def reign_of(engine: Engine, model_name: str, epoch: int) -> Promotion | None:
    """How the champion of an epoch came to be."""
    return next((item for item in history(engine, model_name) if item.epoch == epoch), None)


def reign_before(engine: Engine, champion: Champion) -> Promotion | None:
    """The reign that a rollback of `champion` brings back, or None if there is none."""
    reigns = _reigns(engine, champion.model_name)
    mine = next((item for item in reigns if item.epoch == champion.epoch), None)
    ceiling = _origin(mine) if mine is not None else champion.epoch
    return next(
        (item for item in reigns if _origin(item) < ceiling and item.manifest_sha256 != champion.manifest_sha256), None
    )


def last_reign_of_version(engine: Engine, model_name: str, version: str) -> Promotion | None:
    return next((item for item in _reigns(engine, model_name) if item.version == version), None)


def _reigns(engine: Engine, model_name: str) -> list[Promotion]:
    """The latest first."""
    reigns = [item for item in history(engine, model_name) if item.epoch is not None]
    return sorted(reigns, key=lambda item: item.epoch or 0, reverse=True)


def _origin(reign: Promotion) -> int:
    return reign.restores or reign.epoch or 0


def find_promotion(engine: Engine, number: int) -> Promotion:
    """A promotion as it is now."""
    with engine.connect() as connection:
        return Promotion(**connection.execute(select(PROMOTIONS).where(PROMOTIONS.c.id == number)).one()._mapping)


# --- who died, and who only works -------------------------------------------------------------------------------------


@contextmanager
def kept_alive(engine: Engine, promotion: Promotion) -> Iterator[None]:
    """Says every few seconds that the promotion's process lives; an exception that leaves the block abandons it."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_S):
            try:
                with engine.begin() as connection:
                    clock_s = _clock_s(connection)
                    connection.execute(
                        update(PROMOTIONS).where(PROMOTIONS.c.id == promotion.id).values(alive_at=clock_s)
                    )
            except SQLAlchemyError:  # the next beat may come through; if none does, others may give it up
                continue

    thread = threading.Thread(target=beat, name="promotion", daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        reason = f"{type(error).__name__} ({' '.join(str(error).split())[:500]})"
        _abandon(engine, promotion.id, reason, suppress=True)
        raise
    finally:
        ended.set()
        thread.join(BEAT_S)


def abandon_dead(engine: Engine, model_name: str) -> list[Promotion]:
    """Abandons promotions of processes that ended, and returns them.

    Of a process on this machine that is known at once; of another machine's after `LEASE_S` of silence, which is waited
    for, but no longer than to its next sign of life.
    """
    abandoned = []
    for promotion in history(engine, model_name):
        if promotion.state in _OPEN and _is_dead(engine, promotion):
            reason = f"its process ended: {promotion.by} gave no sign of life"
            if _abandon(engine, promotion.id, reason):
                abandoned.append(find_promotion(engine, promotion.id))
    return abandoned


_OPEN = ("proposed", "checked")


def _is_dead(engine: Engine, promotion: Promotion) -> bool:
    gone = is_gone(promotion.process)
    while not gone:
        with engine.connect() as connection:
            silent_s = _clock_s(connection) - promotion.alive_at
        found = find_promotion(engine, promotion.id)
        if found.state not in _OPEN or found.alive_at != promotion.alive_at:
            return False
        if silent_s >= LEASE_S or gone is False:
            return silent_s >= LEASE_S
        time.sleep(0.25)
    return True


def _abandon(engine: Engine, number: int, reason: str, suppress: bool = False) -> bool:
    this = (PROMOTIONS.c.id == number, PROMOTIONS.c.state.in_(_OPEN))
    values = {"state": "abandoned", "reason": reason, "changed_at": now_text()}
    try:
        with engine.begin() as connection:
            return connection.execute(update(PROMOTIONS).where(*this).values(**values)).rowcount == 1
    except SQLAlchemyError:
        if not suppress:
            raise
        return False


def mark_announced(engine: Engine, champion: Champion) -> None:
    """The alias leads to the champion: its promotion, and those it followed, have nothing left to do."""
    this = (
        PROMOTIONS.c.model_name == champion.model_name,
        PROMOTIONS.c.state == "crowned",
        PROMOTIONS.c.epoch <= champion.epoch,
    )
    with engine.begin() as connection:
        connection.execute(update(PROMOTIONS).where(*this).values(state="announced", changed_at=now_text()))


def _clock_s(connection: Connection) -> float:
    """The database's time: machines need not agree on theirs."""
    now = connection.scalar(select(func.current_timestamp()))
    if not isinstance(now, datetime):
        now = datetime.fromisoformat(str(now))
    return (now if now.tzinfo is not None else now.replace(tzinfo=UTC)).timestamp()
