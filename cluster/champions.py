"""Who reigns: one row per registered model, moved by compare-and-set in SQL.

MLflow's alias is last-writer-wins and S3's conditional writes are not a portable lock, so neither can decide. A row
holds an epoch; a promotion names the epoch it saw, and exactly one of several racing promotions finds it unchanged.
The endpoint follows this row; the alias `champion` is a copy for people. How a version came to reign is in the second
table, one row per promotion, which `cluster.promotions` writes; the third has the canary of a model, the latest one,
which `cluster.canaries` writes.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    insert,
    inspect,
    literal,
    make_url,
    select,
)
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from cluster.errors import StorageError

_METADATA = MetaData()
CHAMPIONS = Table(
    "raystill_champions",
    _METADATA,
    Column("model_name", String(63), primary_key=True),
    Column("epoch", Integer, nullable=False),
    Column("version", String(32), nullable=False),
    Column("uri", String(1024), nullable=False),
    Column("manifest_sha256", String(64), nullable=False),
    Column("promoted_at", String(40), nullable=False),
)
PROMOTIONS = Table(
    "raystill_promotions",
    _METADATA,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("model_name", String(63), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("version", String(32), nullable=False),
    Column("uri", String(1024), nullable=False),
    Column("manifest_sha256", String(64), nullable=False),
    Column("seen_epoch", Integer, nullable=False),
    Column("epoch", Integer),
    Column("restores", Integer),
    Column("forced", Boolean, nullable=False),
    Column("run", String(63), nullable=False),
    Column("by_user", String(64), nullable=False),
    Column("host", String(64), nullable=False),
    Column("process", String(200), nullable=False),
    Column("alive_at", Float, nullable=False),
    Column("verdict", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("proposed_at", String(40), nullable=False),
    Column("changed_at", String(40), nullable=False),
    UniqueConstraint("model_name", "epoch"),  # no two reigns are one epoch; what never reigned has none
)
CANARIES = Table(
    "raystill_canaries",
    _METADATA,
    Column("model_name", String(63), primary_key=True),
    Column("promotion_id", Integer, nullable=False),
    Column("version", String(32), nullable=False),
    Column("uri", String(1024), nullable=False),
    Column("manifest_sha256", String(64), nullable=False),
    Column("seen_epoch", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("step", Integer, nullable=False),
    Column("plan", Text, nullable=False),
    Column("figures", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("announced", Boolean, nullable=False),
    Column("began_at", String(40), nullable=False),
    Column("changed_at", String(40), nullable=False),
)
_BUSY_TIMEOUT_S = 30.0
"""How long a writer waits for another one where the database is a file."""


@dataclass(frozen=True)
class Champion:
    """A version that serves: where its published directory lies, and the hash that its manifest must have."""

    model_name: str
    epoch: int
    version: str
    uri: str
    manifest_sha256: str
    promoted_at: str

    def is_version(self, version: Mapping[str, str]) -> bool:
        """Whether it is the published directory of `{"uri", "manifest_sha256"}`: the same bytes at the same place."""
        return (self.uri, self.manifest_sha256) == (version["uri"], version["manifest_sha256"])


def database_url(state_directory: Path) -> str:
    """`RAYSTILL_DATABASE_URL` (PostgreSQL in production), else SQLite below the state directory."""
    return os.environ.get("RAYSTILL_DATABASE_URL") or f"sqlite:///{state_directory}/champions.db"


def open_database(url: str) -> Engine:
    """An engine with all tables in place; an SQLite directory is made.

    A champion of a database that had no history yet becomes its first entry. Any number of processes may do this at
    once.

    Raises:
        StorageError: the URL is not one, its driver is missing, or the database does not answer.
    """
    try:
        make_url(url)
    except ArgumentError:
        raise StorageError("champions database: not an SQLAlchemy URL; check RAYSTILL_DATABASE_URL") from None
    try:
        if url.startswith("sqlite:///"):
            Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            engine = create_engine(url, pool_pre_ping=True, connect_args={"timeout": _BUSY_TIMEOUT_S})
        else:
            engine = create_engine(url, pool_pre_ping=True)
        make_tables(engine, _METADATA)
        _take_over(engine)
    except (SQLAlchemyError, ImportError, OSError) as error:
        raise _failure(url, "cannot be opened", error) from error
    return engine


@contextmanager
def opened(url: str) -> Iterator[Engine]:
    """The same for the length of a block.

    Raises:
        StorageError: the database cannot be opened, or stops answering in the block.
    """
    engine = open_database(url)
    try:
        yield engine
    except SQLAlchemyError as error:
        raise _failure(url, "does not answer", error) from error
    finally:
        engine.dispose()


def _failure(url: str, what: str, error: Exception) -> StorageError:
    """One line, without the password."""
    shown = make_url(url).render_as_string(hide_password=True)
    reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
    return StorageError(f"champions database {shown}: {what} ({reason}); check RAYSTILL_DATABASE_URL")


def make_tables(engine: Engine, metadata: MetaData) -> None:
    """Makes the tables that are not there. Any number of processes may do this at once."""
    for attempt in range(10):
        try:
            metadata.create_all(engine)
            return
        except SQLAlchemyError:  # another process makes the same tables at the same moment
            if attempt == 9 or not any(inspect(engine).has_table(name) for name in metadata.tables):
                raise
            time.sleep(0.05 * attempt)


def _take_over(engine: Engine) -> None:
    """Champions that are not in the history (an older raystill crowned them) become part of it."""
    known = select(PROMOTIONS.c.id).where(
        PROMOTIONS.c.model_name == CHAMPIONS.c.model_name, PROMOTIONS.c.epoch == CHAMPIONS.c.epoch
    )
    missing = select(CHAMPIONS).where(~known.exists())
    with engine.connect() as connection:
        if connection.execute(missing).first() is None:
            return
    same = ("model_name", "epoch", "version", "uri", "manifest_sha256")
    values: dict[str, Any] = {
        **{name: CHAMPIONS.c[name] for name in same},
        "seen_epoch": CHAMPIONS.c.epoch - 1,
        "proposed_at": CHAMPIONS.c.promoted_at,
        "changed_at": CHAMPIONS.c.promoted_at,
        **{name: literal("") for name in ("run", "by_user", "host", "process", "verdict")},
        **{"kind": literal("found"), "state": literal("crowned"), "forced": literal(False), "alive_at": literal(0.0)},
        "reason": literal("crowned before there was a history"),
    }
    try:
        with engine.begin() as connection:
            connection.execute(
                insert(PROMOTIONS).from_select(list(values), select(*values.values()).where(~known.exists()))
            )
    except IntegrityError:  # another process was first; what it left out, the next start takes over
        return


def current_champion(engine: Engine, model_name: str) -> Champion | None:
    with engine.connect() as connection:
        return champion_row(connection, model_name)


def champion_row(connection: Connection, model_name: str) -> Champion | None:
    row = connection.execute(select(CHAMPIONS).where(CHAMPIONS.c.model_name == model_name)).one_or_none()
    return Champion(**row._mapping) if row is not None else None


def find_champion(url: str, model_name: str) -> Champion | None:
    """The champion, read without making a database where there is none."""
    if not has_database(url):
        return None
    with opened(url) as engine:
        return current_champion(engine, model_name)


def has_database(url: str) -> bool:
    """False where the database is a file that is not there; a server is not asked."""
    return not url.startswith("sqlite:///") or Path(url.removeprefix("sqlite:///")).is_file()


def now_text() -> str:
    """This machine's time in UTC, for people: nothing is decided by it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
