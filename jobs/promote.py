"""Promotion: a version passes the gate, its files are read through, and it takes the crown.

The figures that the gate looks at were measured on the artefact after a reload in a fresh process; the champion's are
those of its manifest. Who wins a race is decided by a compare-and-set in SQL (`cluster.promotions`). Every verdict, a
refusal too, is kept in the history and as tags of the version.
"""

import json
from typing import Any

from sqlalchemy import Engine

from cluster.canaries import Canary, begin, running_canary, taken_down_before
from cluster.champions import Champion, current_champion, database_url, opened
from cluster.crowning import announce, has_registry, refuse, settle_in, take_the_crown
from cluster.errors import ConfigError, CorruptArtifact, PromotionRefused
from cluster.promotions import Promotion, advance, kept_alive, propose
from cluster.published import check_version, manifest_sha256, read_manifest
from cluster.registry import find_version
from cluster.storage import split_uri
from cluster.tracking import tracking_uri
from jobs.config import PromoteConfig, RunConfig
from jobs.gate import Figures, Reigning, Verdict, judge
from services.endpoint.schema import CanaryConfig

Outcome = tuple[Champion, dict[str, Any]]
"""Who is champion now, and the gate's verdict; with `canary` in it if the version is challenger for the time being."""


def promote(
    config: PromoteConfig,
    model_name: str,
    version: dict[str, str],
    student: Figures,
    candidate: Figures,
    database: str,
    tracking: str,
    *,
    teacher: Figures | None = None,
    run: str = "",
    force: bool = False,
    canary: CanaryConfig | None = None,
) -> Outcome:
    """Makes a version champion if it passes the gate; repeating it changes nothing. Returns champion and verdict.

    With `canary` a version that passes becomes challenger of the champion that there is, and the endpoint makes it
    champion or takes it down.

    Args:
        version: `{"version", "uri", "manifest_sha256"}` of the candidate.
        student, candidate, teacher: figures of the float student, of the candidate and of the teacher, by name, each
            with the `machine` that took its times.
        run: on whose behalf, for the history.
        force: let pass whatever the gate says, and what was taken down before. Files that are not those that were
            registered never pass.
        canary: how it is to get there; None: at once.

    Raises:
        PromotionRefused: the gate said no, the files are not those that were registered, a canary of the same bytes was
            taken down, or another promotion won.
    """
    with opened(database) as engine:
        seen = current_champion(engine, model_name)  # before all else: who comes in between has come first
        settle_in(engine, model_name, tracking)
        again = seen is not None and seen.is_version(version)

        def look() -> tuple[dict[str, Any], str]:
            reigning = Reigning(absent="this version is champion already")
            if not again:
                reigning = _reigning(config, seen, version)
            verdict = judge(config, candidate, student, teacher, reigning)
            reason = _damage(version)
            if not force:
                reason = reason or _refusal(model_name, version, verdict) or _taken_down(engine, model_name, version)
            return {**verdict.as_json(), "forced": force and not verdict.passed, "refused": reason}, reason

        if again:
            verdict, reason = look()
            if not reason:
                assert seen is not None
                announce(engine, model_name, tracking)
                return seen, verdict
        trial = running_canary(engine, model_name)
        if trial is not None and trial.artefact.is_version(version) and canary is not None and seen is not None:
            verdict, _ = look()
            return seen, {**verdict, "canary": _challenger(trial)}
        promotion = propose(engine, model_name, version, seen, run, forced=force)
        with kept_alive(engine, promotion):
            verdict, reason = look()
            if reason:
                raise refuse(engine, promotion, tracking, reason, verdict)
            if canary is not None and seen is not None and seen.manifest_sha256 != version["manifest_sha256"]:
                checked = advance(engine, promotion, "checked", verdict=json.dumps(verdict))
                begun = begin(engine, checked, canary.model_dump(mode="json"))
                announce(engine, model_name, tracking)
                return seen, {**verdict, "canary": _challenger(begun)}
            try:
                return take_the_crown(engine, promotion, tracking, verdict), verdict
            except PromotionRefused:
                winner = current_champion(engine, model_name)
                if winner is None or not winner.is_version(version):
                    raise
                return winner, verdict  # another process asked for the same version, and it reigns


def promote_version(config: RunConfig, number: str, force: bool) -> Outcome:
    """Promotes a version by its number, whichever run registered it, with the figures of its manifest.

    Raises:
        ConfigError, ModelError: there is no registry, or no such version in it.
        PromotionRefused: as `promote`.
    """
    tracking = tracking_uri(config.state_directory)
    if not has_registry(tracking):
        raise ConfigError(f"model {config.model_name}: no registry in {config.storage}: `raystill register` makes one")
    version = find_version(tracking, config.model_name, number).artefact
    manifest = _manifest(version["uri"])
    return promote(
        config.promote,
        config.model_name,
        version,
        _figures(manifest, "float_student"),
        _figures(manifest, "measured"),
        database_url(config.state_directory),
        tracking,
        teacher=_figures(manifest, "teacher"),
        run=config.name,
        force=force,
        canary=config.serve.canary,
    )


def _challenger(canary: Canary) -> dict[str, Any]:
    """What is said of a version that is challenger."""
    return {"version": canary.version, "share": canary.share, "step": canary.step, "steps": canary.steps}


def _taken_down(engine: Engine, model_name: str, version: dict[str, str]) -> str:
    """Why a version must not be canary again; empty if it may."""
    files = _manifest(version["uri"]).get("files")

    def is_same(promotion: Promotion) -> bool:
        """Manifests also hold what was measured, so that those of the same files may differ."""
        same_manifest = promotion.manifest_sha256 == version["manifest_sha256"]
        return same_manifest or (bool(files) and _manifest(promotion.uri).get("files") == files)

    before = taken_down_before(engine, model_name, is_same)
    if before is None:
        return ""
    return (
        f"version {version['version']} of {model_name} is refused: its canary was taken down at {before.changed_at} "
        f"({before.reason}); the champion stays: promote another version, or use --force"
    )


def _manifest(uri: str) -> dict[str, Any]:
    """A version's manifest, empty if it cannot be read: whether it may be believed is asked together with its files."""
    storage, name = split_uri(uri)
    try:
        return read_manifest(storage, name) or {}
    except CorruptArtifact:
        return {}


def _figures(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    """What a manifest says was measured; nothing, which no rule lets pass, where that is no record."""
    found = manifest.get(name)
    return found if isinstance(found, dict) else {}


def _reigning(config: PromoteConfig, champion: Champion | None, candidate: dict[str, str]) -> Reigning:
    """The champion's recorded figures, for rules that ask for them: those of the manifest that was registered, whatever
    became of its weights. None if that is gone, and none of quality if it was measured on other text than the
    candidate; the rules then refuse."""
    rules = config.champion
    if champion is None or not rules.model_dump(exclude_none=True):
        return Reigning()
    name, manifest = f"champion, version {champion.version}", _manifest(champion.uri)
    if manifest_sha256(manifest) != champion.manifest_sha256:
        return Reigning(f"{name}, whose manifest is gone or damaged,", {})
    measured = _figures(manifest, "measured")
    if manifest.get("data_fingerprint") != _manifest(candidate["uri"]).get("data_fingerprint"):
        timed = {key: value for key, value in measured.items() if not key.startswith("bits_per_byte")}
        return Reigning(f"{name}, on the candidate's held-out text,", timed)
    return Reigning(name, measured)


def _damage(version: dict[str, str]) -> str:
    """Why a version's files must not serve; empty if they may."""
    try:
        check_version(version["uri"], version["manifest_sha256"])
    except CorruptArtifact as error:
        return f"version {version['version']}: {error}; the champion stays. Repair its files, or register it again"
    return ""


def _refusal(model_name: str, version: dict[str, str], verdict: Verdict) -> str:
    """Every rule that failed, in one line; empty if none did."""
    if verdict.passed:
        return ""
    return (
        f"version {version['version']} of {model_name} is refused: {'; '.join(verdict.failures)}; the champion stays: "
        "choose another version or promote.scheme, change the limits, or use --force"
    )
