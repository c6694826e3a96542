"""The last steps of every promotion, and what a start does for those that were broken off.

The row decides who reigns; MLflow's alias is a copy. It is written after the row, and then the row is looked at again:
who writes it late finds a newer champion there, and writes that one instead.
"""

import json
import logging
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from cluster.canaries import Canary, end_of, latest_canary, mark_canary_announced, running_canary
from cluster.champions import Champion, current_champion, has_database, now_text, opened
from cluster.errors import PromotionRefused
from cluster.promotions import Promotion, abandon_dead, advance, crown, history, mark_announced, reign_of
from cluster.registry import list_versions, point_challenger, point_champion, tag_version

logger = logging.getLogger(__name__)


def settle(database: str, model_name: str, tracking: str) -> None:
    """Finishes or abandons what dead processes left, and repairs the alias. Where there is no database it makes none.

    Takes no longer than `cluster.promotions.LEASE_S` and the registry's answer. A registry that does not answer is a
    warning.
    """
    if has_database(database):
        with opened(database) as engine:
            settle_in(engine, model_name, tracking)


def settle_in(engine: Engine, model_name: str, tracking: str) -> None:
    """The same in a database that is open."""
    for promotion in abandon_dead(engine, model_name):
        logger.warning("promotion %d of %s was abandoned: %s", promotion.id, model_name, promotion.reason)
    running_canary(engine, model_name)
    announce(engine, model_name, tracking)


def take_the_crown(
    engine: Engine, promotion: Promotion, tracking: str, verdict: dict[str, Any] | None = None
) -> Champion:
    """From `proposed` to `announced`: the gate and the files have said yes.

    Raises:
        PromotionRefused: another promotion won.
    """
    checked = advance(engine, promotion, "checked", verdict=json.dumps(verdict) if verdict else "")
    _, champion = crown(engine, checked)
    announce(engine, promotion.model_name, tracking)
    return champion


def refuse(
    engine: Engine, promotion: Promotion, tracking: str, reason: str, verdict: dict[str, Any] | None = None
) -> PromotionRefused:
    """Writes a refusal down, with the gate's verdict where there is one, and returns the error to raise."""
    advance(engine, promotion, "refused", reason=reason, verdict=json.dumps(verdict) if verdict else "")
    if verdict and has_registry(tracking):
        _tag_verdict(tracking, promotion.model_name, promotion.version, verdict)
    return PromotionRefused(reason)


def announce(engine: Engine, model_name: str, tracking: str) -> None:
    """Makes MLflow say who reigns, who is challenger, and why. May be done any number of times, by anyone."""
    if has_registry(tracking):
        _announce_champion(engine, model_name, tracking)
        _announce_canary(engine, model_name, tracking)


def _announce_champion(engine: Engine, model_name: str, tracking: str) -> None:
    champion = current_champion(engine, model_name)
    while champion is not None:
        reign = reign_of(engine, model_name, champion.epoch)
        try:
            point_champion(tracking, model_name, champion.version, champion.manifest_sha256)
        except Exception as error:  # the row decides; the next start repairs the copy
            reason = " ".join(str(error).split())
            logger.warning("alias champion of %s was not set (%s); the version serves all the same", model_name, reason)
            return
        if reign is not None and reign.state == "crowned" and reign.verdict:
            _tag_verdict(tracking, model_name, champion.version, json.loads(reign.verdict))
        found = current_champion(engine, model_name)
        if found == champion:
            mark_announced(engine, champion)
            return
        champion = found


def _announce_canary(engine: Engine, model_name: str, tracking: str) -> None:
    canary = latest_canary(engine, model_name)
    if canary is not None and canary.announced:
        return
    while canary is not None:
        tags = {
            "canary": f"{canary.state}, {canary.share:.0%} of the traffic" if canary.share else canary.state,
            "canary_promotion": str(canary.promotion_id),
            "canary_reason": canary.reason,
            "canary_figures": canary.figures,
            "canary_at": canary.changed_at,
        }
        try:
            point_challenger(tracking, model_name, canary.version if canary.state == "running" else None)
            tag_version(tracking, model_name, canary.version, tags)
            _announce_ends_before(engine, canary, tracking)
        except Exception as error:  # the row decides; the next start repairs the copy
            reason = " ".join(str(error).split())
            logger.warning(
                "the canary of %s version %s is in the history only (%s)", model_name, canary.version, reason
            )
            return
        mark_canary_announced(engine, canary)
        found = latest_canary(engine, model_name)
        if found is not None and found.is_same_state(canary):
            return
        canary = found  # also one that was announced meanwhile: what was just written was written over it


def _announce_ends_before(engine: Engine, canary: Canary, tracking: str) -> None:
    """Tags other versions whose canary MLflow takes for running: it missed the end, and the row has made room since."""
    running = [
        item
        for item in list_versions(tracking, canary.model_name)
        if item.version != canary.version and item.tags.get("canary", "").startswith("running")
    ]
    past = history(engine, canary.model_name) if running else []
    for item in running:
        promotion = item.tags.get("canary_promotion")  # without it, the version's latest
        ended = [
            (end, one)
            for one in past
            if one.version == item.version and promotion in (None, str(one.id)) and (end := end_of(one)) is not None
        ]
        if ended:
            end, one = ended[-1]
            tags = {"canary": end, "canary_reason": one.reason, "canary_at": one.changed_at}
            tag_version(tracking, canary.model_name, item.version, tags)


def _tag_verdict(tracking: str, model_name: str, version: str, verdict: dict[str, Any]) -> None:
    """Writes a verdict to the version; a registry that does not take it is a warning, since the history has it too."""
    said = "refused" if verdict["refused"] else "forced" if verdict["forced"] else "passed"
    tags = {"verdict": said, "verdict_at": now_text(), "verdict_rules": json.dumps(verdict["rules"])}
    try:
        tag_version(tracking, model_name, version, tags)
    except Exception as error:
        reason = " ".join(str(error).split())
        logger.warning("the verdict on %s version %s is in the history only (%s)", model_name, version, reason)


def has_registry(tracking: str) -> bool:
    """False where the registry is a file that is not there: asking would make an empty one."""
    return not tracking.startswith("sqlite:///") or Path(tracking.removeprefix("sqlite:///")).is_file()
