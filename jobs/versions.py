"""`raystill versions`: what the registry holds of a model, who reigns, and how it came to that."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.canaries import Canary, latest_canary
from cluster.champions import current_champion, database_url, has_database, opened
from cluster.crowning import has_registry, settle
from cluster.errors import ConfigError
from cluster.names import check_model_name
from cluster.promotions import Promotion, history
from cluster.registry import CHALLENGER, CHAMPION, RegisteredVersion, list_versions
from cluster.storage import LocalStorage, open_storage
from cluster.tracking import tracking_uri
from jobs.config import RunConfig
from jobs.ledger import SUMMARY


@dataclass(frozen=True)
class Model:
    """A registered model, and where its registry and its champion's row are."""

    name: str
    tracking: str
    database: str


def model_of(config: RunConfig) -> Model:
    place = config.state_directory
    return Model(config.model_name, tracking_uri(place), database_url(place))


def find_model(name: str) -> Model:
    """The model of a run, by the run's name (in runs/) or storage root URI; on a server also by its own name.

    Raises:
        ConfigError: there is no such run, and no server to ask.
    """
    root = name if "/" in name else f"runs/{name}"
    storage = open_storage(root)
    try:
        summary = storage.read_json(SUMMARY)
    except FileNotFoundError:
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            where = root if "://" in root else Path(root).absolute()
            raise ConfigError(
                f"versions {name}: no run in {where}; give a run's name, config or storage root, or set "
                "MLFLOW_TRACKING_URI and give a registered model"
            ) from None
        place = Path("runs", check_model_name(name)).absolute()
        return Model(name, tracking_uri(place), database_url(place))
    run = str(summary["name"])
    stages = summary["stages"]
    registered = stages.get("register", {}).get("model_name") or (
        stages.get("promote", {}).get("champion", {}).get("model_name")
    )
    place = storage.root if isinstance(storage, LocalStorage) else Path("runs", run).absolute()
    return Model(registered or f"{run}-student"[:63], tracking_uri(place), database_url(place))


def versions(model: Model) -> dict[str, Any]:
    """Settles what was broken off, then reads versions, champion and history; plain JSON.

    Raises:
        ConfigError: nothing is registered.
        RegistryFailed: the registry does not answer.
    """
    settle(model.database, model.name, model.tracking)
    registered = list_versions(model.tracking, model.name) if has_registry(model.tracking) else []
    if not registered:
        raise ConfigError(f"model {model.name}: no version is registered; `raystill register CONFIG` does it")
    champion, past, canary = None, [], None
    if has_database(model.database):
        with opened(model.database) as engine:
            champion, past = current_champion(engine, model.name), history(engine, model.name)
            canary = latest_canary(engine, model.name)
    reigns = champion.version if champion is not None else None
    return {
        "model_name": model.name,
        "champion": vars(champion) if champion is not None else None,
        "canary": _canary(canary) if canary is not None else None,
        "versions": [_row(item, reigns, canary) for item in registered],
        "history": [_entry(item) for item in past],
    }


def _canary(canary: Canary) -> dict[str, Any]:
    names = ("version", "state", "step", "steps", "share", "reason", "began_at", "changed_at")
    found = {name: getattr(canary, name) for name in names}
    return {**found, "figures": json.loads(canary.figures) if canary.figures else None}


def _row(item: RegisteredVersion, reigns: str | None, canary: Canary | None) -> dict[str, Any]:
    """Aliases and shares are as the rows have them; those of the registry are a copy."""
    tags = item.tags
    challenges = canary is not None and canary.state == "running" and canary.version == item.version
    others = [alias for alias in item.aliases if alias not in (CHAMPION, CHALLENGER)] + [CHALLENGER] * challenges
    taken = canary.share if canary is not None else 0.0
    share = 1.0 - taken if item.version == reigns else taken if challenges else 0.0
    return {
        "version": item.version,
        "scheme": tags.get("scheme", ""),
        "run": tags.get("run") or (item.run_id or ""),
        "bits_per_byte": _number(tags.get("bits_per_byte")),
        "bytes": int(size) if (size := _number(tags.get("bytes"))) is not None else None,
        "aliases": [CHAMPION, *others] if item.version == reigns else others,
        "share": share,
        "canary": canary.state if canary is not None and canary.version == item.version else None,
        "registered_at": item.registered_at,
        "verdict": tags.get("verdict"),
        "verdict_rules": json.loads(tags.get("verdict_rules", "[]")),
        "uri": item.source,
        "manifest_sha256": tags.get("manifest_sha256"),
    }


def _entry(item: Promotion) -> dict[str, Any]:
    names = ("id", "kind", "state", "version", "epoch", "restores", "forced", "run", "by_user", "host", "reason")
    entry = {name: getattr(item, name) for name in (*names, "proposed_at", "changed_at")}
    return {**entry, "verdict": json.loads(item.verdict) if item.verdict else None}


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None
