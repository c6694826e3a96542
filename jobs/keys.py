"""`raystill keys`: makes, lists and revokes the API keys of the endpoints on a database."""

import re
import time
from datetime import UTC, datetime
from typing import Any

from rich.markup import escape
from rich.table import Table

from cluster.api_keys import ApiKey, create_key, has_keys, list_keys, opened_keys, revoke_key
from cluster.errors import ConfigError

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def create(
    database: str,
    name: str,
    models: tuple[str, ...] = (),
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    expires_in: str | None = None,
) -> dict[str, Any]:
    """Makes a key; the row for people, with the key itself, which is shown this once.

    Args:
        expires_in: a number and a unit, `s`, `m`, `h` or `d`; None: it stays until it is revoked.

    Raises:
        ConfigError: a value cannot be used.
    """
    lifetime_s = _seconds(expires_in) if expires_in is not None else None
    with opened_keys(database) as engine:
        key, text = create_key(
            engine,
            name,
            models=models,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            lifetime_s=lifetime_s,
        )
    return {**_row(key), "key": text}


def listed(database: str) -> list[dict[str, Any]]:
    """The rows of all keys, the oldest first; none where there is no database yet."""
    if not has_keys(database):
        return []
    with opened_keys(database) as engine:
        return [_row(key) for key in list_keys(engine)]


def revoke(database: str, which: str) -> dict[str, Any]:
    """Revokes a key by its id or name; its row.

    Raises:
        ConfigError: there is no such key, or several have the name.
    """
    if not has_keys(database):
        raise ConfigError("there is no API key to revoke; `raystill keys create CONFIG` makes one")
    with opened_keys(database) as engine:
        return _row(revoke_key(engine, which))


def keys_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="API keys", title_justify="left")
    table.add_column("id", no_wrap=True)
    for column in ("name", "state", "models", "requests/min", "tokens/min", "created", "expires", "revoked"):
        table.add_column(column, justify="right" if column.endswith("/min") else "left")
    for row in rows:
        colour = {"active": "green", "expired": "yellow", "revoked": "red"}[row["state"]]
        table.add_row(
            f"rs-{row['id']}",
            escape(row["name"]),
            f"[{colour}]{row['state']}[/]",
            escape(", ".join(row["models"])) or "all",
            *("" if row[name] is None else f"{row[name]:,}" for name in ("requests_per_minute", "tokens_per_minute")),
            *((row[name] or "").removesuffix("+00:00").replace("T", " ") for name in _TIMES),
        )
    return table


_TIMES = ("created_at", "expires_at", "revoked_at")


def _row(key: ApiKey) -> dict[str, Any]:
    """A key as plain JSON, without its hash; times in UTC."""
    times = {name: getattr(key, name) for name in _TIMES}
    return {
        "id": key.id,
        "name": key.name,
        "state": key.state(time.time()),
        "models": list(key.models),
        "requests_per_minute": key.requests_per_minute,
        "tokens_per_minute": key.tokens_per_minute,
        **{name: None if at is None else _text(at) for name, at in times.items()},
    }


def _text(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d{1,9})([smhd])", text)
    if found is None:
        raise ConfigError(f"--expires-in {text[:40]!r}: use a number and a unit, for example 12h or 90d")
    return int(found.group(1)) * _UNITS_S[found.group(2)]
