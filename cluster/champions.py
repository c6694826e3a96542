"""Who reigns: one row per registered model, moved by compare-and-set in SQL.

MLflow's alias is last-writer-wins and S3's conditional writes are not a portable lock, so neither can decide. A row
holds an epoch; a promotion names the epoch it saw, and exactly one of several racing promotions finds it unchanged.
The endpoint follows this row; the alias `champion` is a copy for people.
"""

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import (
    Column,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    insert,
    inspect,
    make_url,
    select,
    update,
)
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from cluster.errors import PromotionRefused, StorageError

_METADATA = MetaData()
_CHAMPIONS = Table(
    "raystill_champions",
    _METADATA,
    Column("model_name", String(63), primary_key=True),
    Column("epoch", Integer, nullable=False),
    Column("version", String(32), nullable=False),
    Column("uri", String(1024), nullable=False),
    Column("manifest_sha256", String(64), nullable=False),
    Column("promoted_at", String(40), nullable=False),
)


@dataclass(frozen=True)
class Champion:
    """A version that serves: where its published directory lies, and the hash that its manifest must have."""

    model_name: str
    epoch: int
    version: str
    uri: str
    manifest_sha256: str
    promoted_at: str


def database_url(state_directory: Path) -> str:
    """`RAYSTILL_DATABASE_URL` (PostgreSQL in production), else SQLite below the state directory."""
    return os.environ.get("RAYSTILL_DATABASE_URL") or f"sqlite:///{state_directory}/champions.db"


def open_database(url: str) -> Engine:
    """An engine with the table in place; an SQLite directory is made.

    Raises:
        StorageError: the URL is not one, its driver is missing, or the database does not answer.
    """
    try:
        shown = make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        raise StorageError("champions database: not an SQLAlchemy URL; check RAYSTILL_DATABASE_URL") from None
    try:
        if url.startswith("sqlite:///"):
            Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(url, pool_pre_ping=True)
        try:
            _METADATA.create_all(engine)
        except SQLAlchemyError:  # another process made the table at the same moment
            if not inspect(engine).has_table(_CHAMPIONS.name):
                raise
    except (SQLAlchemyError, ImportError, OSError) as error:
        reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        raise StorageError(
            f"champions database {shown}: cannot be opened ({reason}); check RAYSTILL_DATABASE_URL"
        ) from error
    return engine


def current_champion(engine: Engine, model_name: str) -> Champion | None:
    with engine.connect() as connection:
        row = connection.execute(select(_CHAMPIONS).where(_CHAMPIONS.c.model_name == model_name)).one_or_none()
    return Champion(**row._mapping) if row is not None else None


def find_champion(url: str, model_name: str) -> Champion | None:
    """The champion, read without making a database where there is none."""
    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).is_file():
        return None
    engine = open_database(url)
    try:
        return current_champion(engine, model_name)
    finally:
        engine.dispose()


def crown(
    engine: Engine, model_name: str, version: str, uri: str, manifest_sha256: str, seen: Champion | None
) -> Champion:
    """Makes a version champion if the champion is still the one that was `seen` (None: there was none).

    Raises:
        PromotionRefused: another promotion came first; the message names its winner.
    """
    champion = Champion(
        model_name=model_name,
        epoch=seen.epoch + 1 if seen else 1,
        version=version,
        uri=uri,
        manifest_sha256=manifest_sha256,
        promoted_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    with engine.begin() as connection:
        if seen is None:
            try:
                connection.execute(insert(_CHAMPIONS).values(**vars(champion)))
                return champion
            except IntegrityError:
                connection.rollback()
        else:
            changed = connection.execute(
                update(_CHAMPIONS)
                .where(_CHAMPIONS.c.model_name == model_name, _CHAMPIONS.c.epoch == seen.epoch)
                .values(**vars(champion))
            ).rowcount
            if changed == 1:
                return champion
    winner = current_champion(engine, model_name)
    raise PromotionRefused(
        f"model {model_name}: asked to promote version {version} over {seen.version if seen else 'none'}, "
        f"but version {winner.version if winner else '?'} was promoted meanwhile; look at it, then promote again"
    )
