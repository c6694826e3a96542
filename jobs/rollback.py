"""Back to the champion before: a promotion without a gate, of a version that reigned already.

It goes through the same steps as every promotion (`cluster.promotions`), so it can lose a race and can be broken off
like one. Its files are read through first: what is damaged does not come back. While a canary runs, ending it is what
going back means.
"""

from sqlalchemy import Engine

from cluster.canaries import Canary, end_canary, running_canary
from cluster.champions import Champion, current_champion, has_database, opened
from cluster.crowning import announce, refuse, settle_in, take_the_crown
from cluster.errors import CorruptArtifact, PromotionRefused
from cluster.processes import this_process
from cluster.promotions import Promotion, kept_alive, last_reign_of_version, propose, reign_before
from cluster.published import check_version


def end_running_canary(model_name: str, database: str, tracking: str) -> Canary | None:
    """Ends the canary that runs, and returns it; the champion stays. None if there is none."""
    if not has_database(database):
        return None
    with opened(database) as engine:
        settle_in(engine, model_name, tracking)
        process, ended = this_process(), None
        while ended is None:  # the endpoint may take it a step up in between
            canary = running_canary(engine, model_name)
            if canary is None:
                return None
            said = f"ended by {process.user}@{process.host} with `raystill rollback`"
            ended = end_canary(engine, canary, "ended", said)
        announce(engine, model_name, tracking)
        return ended


def rollback(
    model_name: str, database: str, tracking: str, *, to: str | None = None, run: str = ""
) -> tuple[Champion, Champion]:
    """Crowns the champion before, or the version `to` if it ever was champion. Asking for who reigns changes nothing.

    Two rollbacks lead two champions back, not forth again.

    Returns:
        The champion now, and the one that was.

    Raises:
        PromotionRefused: there is no champion, none before, its files are not those that reigned, or a promotion won.
    """
    if not has_database(database):
        raise _nobody(model_name)
    with opened(database) as engine:
        seen = current_champion(engine, model_name)
        if seen is None:
            raise _nobody(model_name)
        settle_in(engine, model_name, tracking)
        if to == seen.version:
            announce(engine, model_name, tracking)
            return seen, seen
        reign = _wanted(engine, seen, to)
        version = {"version": reign.version, "uri": reign.uri, "manifest_sha256": reign.manifest_sha256}
        origin = reign.restores or reign.epoch
        promotion = propose(engine, model_name, version, seen, run, kind="rollback", restores=origin)
        with kept_alive(engine, promotion):
            try:
                check_version(reign.uri, reign.manifest_sha256)
            except CorruptArtifact as error:
                reason = (
                    f"rollback of {model_name} to version {reign.version}: {error}; version {seen.version} stays. "
                    "Repair its files, or go further back with --to"
                )
                raise refuse(engine, promotion, tracking, reason) from error
            return take_the_crown(engine, promotion, tracking), seen


def _wanted(engine: Engine, champion: Champion, to: str | None) -> Promotion:
    name = champion.model_name
    found = last_reign_of_version(engine, name, to) if to is not None else reign_before(engine, champion)
    if found is not None:
        return found
    if to is not None:
        raise PromotionRefused(f"rollback of {name}: version {to} never was champion; promote it with --version {to}")
    raise PromotionRefused(
        f"rollback of {name}: there was no champion before version {champion.version}; `raystill versions` shows what "
        "can be promoted"
    )


def _nobody(model_name: str) -> PromotionRefused:
    return PromotionRefused(
        f"rollback of {model_name}: it has no champion, so there is nothing to go back from; `raystill promote` "
        "makes one"
    )
