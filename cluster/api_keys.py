"""API keys of the endpoint, in the champion's database: made, listed and revoked in SQL.

A key is `rs-ID-SECRET`. The secret is 256 bits from the operating system, so there is nothing to guess and no
dictionary to try: what a slow hash does for passwords that people choose, the length does here. SHA-256 of the whole
key is all that is kept, and costs a microsecond a request; the key itself is shown once. The id is public and finds
the row, so that a check compares one hash, in constant time.

A revoked key keeps its row. Once a database has a key, the endpoints on it ask for one, also when all are revoked.
The one key that is not ours, for the endpoint of a teacher elsewhere, is in the environment (`teacher_key`).
"""

import hashlib
import hmac
import ipaddress
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import (
    Column,
    Engine,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)

from cluster.champions import has_database, make_tables, open_database, opened
from cluster.errors import ConfigError
from cluster.names import check_model_name

_METADATA = MetaData()
API_KEYS = Table(
    "raystill_api_keys",
    _METADATA,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("id", String(10), nullable=False, unique=True),
    Column("sha256", String(64), nullable=False),
    Column("name", String(100), nullable=False),
    Column("models", Text, nullable=False),
    Column("requests_per_minute", Integer),
    Column("tokens_per_minute", Integer),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
    sqlite_autoincrement=True,  # a number is never used twice, so that `keys_state` tells all states apart
)
MAX_KEY_BYTES = 200
"""What is longer is no key, and is not hashed."""

_FORM = re.compile(rb"rs-([a-z0-9]{10})-[A-Za-z0-9_-]{43}")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


@dataclass(frozen=True)
class ApiKey:
    """A key as it is stored. Times are seconds since 1970 by the clock of the machine that wrote them."""

    id: str
    sha256: str
    name: str
    models: tuple[str, ...]
    """Registered models that it may ask; none named: all."""
    requests_per_minute: int | None
    tokens_per_minute: int | None
    """Of prompts and answers together."""
    created_at: float
    expires_at: float | None
    revoked_at: float | None

    def state(self, now: float) -> Literal["active", "expired", "revoked"]:
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and now >= self.expires_at else "active"

    def may_ask(self, model: str) -> bool:
        """Whether it may ask this model, or one version of it (`NAME@champion`)."""
        return not self.models or model.partition("@")[0] in self.models


def key_id(key: bytes) -> str | None:
    """The public part of something that has a key's form; None for anything else."""
    found = _FORM.fullmatch(key) if len(key) <= MAX_KEY_BYTES else None
    return found.group(1).decode("ascii") if found is not None else None


def find_key(keys: dict[str, ApiKey], presented: bytes) -> ApiKey | None:
    """The stored key that `presented` is, in a time that does not depend on how much of a secret was right."""
    stored = keys.get(key_id(presented) or "")
    digest = hashlib.sha256(presented[:MAX_KEY_BYTES]).hexdigest()
    same = hmac.compare_digest(digest, stored.sha256 if stored is not None else _NO_KEY)
    return stored if same else None


_NO_KEY = "0" * 64
"""Compared with when there is no such id, so that it takes as long."""


def open_keys(url: str) -> Engine:
    """An engine of the champion's database with the table of keys in place.

    Raises:
        StorageError: the database cannot be opened.
    """
    engine = open_database(url)
    make_tables(engine, _METADATA)
    return engine


@contextmanager
def opened_keys(url: str) -> Iterator[Engine]:
    """The same for the length of a block.

    Raises:
        StorageError: the database cannot be opened, or stops answering in the block.
    """
    with opened(url) as engine:
        make_tables(engine, _METADATA)
        yield engine


def create_key(
    engine: Engine,
    name: str,
    *,
    models: tuple[str, ...] = (),
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    lifetime_s: float | None = None,
) -> tuple[ApiKey, str]:
    """Makes a key; returns its row, and the key itself, which is not stored anywhere.

    Args:
        name: for people; up to 100 printable characters.
        models: registered models that it may ask; none: all.
        lifetime_s: seconds from now after which it is refused; None: never.

    Raises:
        ConfigError: a name or a number cannot be used.
    """
    if not name.strip() or len(name) > 100 or not name.isprintable():
        raise ConfigError(f"key name {name[:120]!r}: use 1 to 100 printable characters")
    for what, value in {"requests per minute": requests_per_minute, "tokens per minute": tokens_per_minute}.items():
        if value is not None and not 1 <= value < 2**31:
            raise ConfigError(f"{what} {value}: use a number from 1 on, or leave it out for no limit")
    if lifetime_s is not None and not 0 < lifetime_s < 1e10:
        raise ConfigError(f"lifetime of {lifetime_s:g} s: use a time above 0, or leave it out for a key that stays")
    identifier = "".join(secrets.choice(_LETTERS) for _ in range(10))
    text = f"rs-{identifier}-{secrets.token_urlsafe(32)}"
    now = time.time()
    key = ApiKey(
        id=identifier,
        sha256=hashlib.sha256(text.encode("ascii")).hexdigest(),
        name=name,
        models=tuple(check_model_name(model) for model in models),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        created_at=now,
        expires_at=now + lifetime_s if lifetime_s is not None else None,
        revoked_at=None,
    )
    with engine.begin() as connection:
        connection.execute(insert(API_KEYS).values(**{**vars(key), "models": json.dumps(key.models)}))
    return key, text


def list_keys(engine: Engine) -> list[ApiKey]:
    """All keys, the oldest first, with those that are revoked or expired."""
    with engine.connect() as connection:
        rows = connection.execute(select(API_KEYS).order_by(API_KEYS.c.number)).mappings().all()
    return [_key(dict(row)) for row in rows]


def keys_state(engine: Engine) -> tuple[int, ...]:
    """Changes whenever a key was made, revoked or removed; cheaper to ask for than all keys."""
    counted = select(func.count(), func.coalesce(func.max(API_KEYS.c.number), 0), func.count(API_KEYS.c.revoked_at))
    with engine.connect() as connection:
        return tuple(connection.execute(counted.select_from(API_KEYS)).one())


def revoke_key(engine: Engine, which: str) -> ApiKey:
    """Revokes the key with this id (with or without `rs-`; a whole key will do), or else with this name.

    Revoking a revoked key changes nothing.

    Raises:
        ConfigError: there is no such key, or several have the name.
    """
    identifier = key_id(which.encode("utf-8", "replace")) or which.removeprefix("rs-")
    matching = or_(API_KEYS.c.id == identifier, API_KEYS.c.name == which)
    with engine.begin() as connection:
        rows = [_key(dict(row)) for row in connection.execute(select(API_KEYS).where(matching)).mappings()]
        found = [row for row in rows if row.id == identifier] or rows
        if len(found) != 1:
            shown = which if key_id(which.encode("utf-8", "replace")) is None else f"rs-{identifier}"
            several = f"{len(found)} keys have this name: give an id" if found else "no such id or name"
            raise ConfigError(f"key {shown[:120]!r}: {several}; `raystill keys list CONFIG` shows them")
        this = API_KEYS.c.id == found[0].id
        connection.execute(update(API_KEYS).where(this, API_KEYS.c.revoked_at.is_(None)).values(revoked_at=time.time()))
        return _key(dict(connection.execute(select(API_KEYS).where(this)).mappings().one()))


@contextmanager
def temporary_key(url: str, name: str, model: str, lifetime_s: float) -> Iterator[str | None]:
    """A key for the length of a block, for one model; None where no keys are asked for. Its row is removed at the end.

    Raises:
        StorageError: the database does not answer.
    """
    if not has_keys(url):
        yield None
        return
    with opened_keys(url) as engine:
        key, text = create_key(engine, name, models=(model,), lifetime_s=lifetime_s)
    try:
        yield text
    finally:
        with opened_keys(url) as engine, engine.begin() as connection:
            connection.execute(delete(API_KEYS).where(API_KEYS.c.id == key.id))


def has_keys(url: str) -> bool:
    """Whether the database has, or ever had, a key. A database file that is not there is not made.

    Raises:
        StorageError: the database does not answer.
    """
    if not has_database(url):
        return False
    with opened_keys(url) as engine:
        return keys_state(engine)[0] > 0


def teacher_key() -> str | None:
    """The key that the teacher's endpoint (`serve.teacher_url`) asks for: `RAYSTILL_TEACHER_KEY` of this process."""
    return os.environ.get("RAYSTILL_TEACHER_KEY", "").strip() or None


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_address(host: str, url: str) -> None:
    """Refuses to listen for other machines while no key exists.

    Raises:
        ConfigError: the address is not loopback, and the database has no key.
    """
    if not is_loopback(host) and not has_keys(url):
        raise ConfigError(
            f"serve.host {host}: other machines reach this address, and there is no API key: make one with "
            "`raystill keys create CONFIG`, or listen on 127.0.0.1"
        )


def _key(row: dict[str, Any]) -> ApiKey:
    models = tuple(json.loads(row["models"]))
    return ApiKey(**{**{name: value for name, value in row.items() if name != "number"}, "models": models})
