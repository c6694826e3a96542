"""Follows the champion of a registered model: looks, brings up, swaps. And loads a version that is what it should be.

A version serves only if the manifest in storage is the one that was promoted and every file matches it; it is loaded
from a private copy that was verified, which is removed afterwards. A version that cannot be served changes nothing: the
one before it stays, and `problem` says so. The swap is one assignment; a request keeps the version it started with.
"""

import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from sqlalchemy import Engine

from cluster.champions import Champion, current_champion, open_database
from cluster.errors import CorruptArtifact
from cluster.published import check_version_files, fetch_directory, manifest_sha256
from cluster.storage import split_uri

logger = logging.getLogger(__name__)

M = TypeVar("M")

_LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True)
class Served(Generic[M]):
    """The champion and what answers for it: a loaded model, or the way to one."""

    champion: Champion
    model: M


class Serving(Protocol[M]):
    """What the HTTP interface asks: who answers, and what is wrong if that is not the champion."""

    @property
    def served(self) -> Served[M] | None: ...

    @property
    def problem(self) -> str | None: ...


def verified(load: Callable[[Path], M]) -> Callable[[Champion], M]:
    """Fetches and checks a version, then gives its directory to `load`.

    Raises (the function that is returned):
        CorruptArtifact: the manifest is not the one that was promoted, or a file is not in it, differs from it, or is
            of a kind that no version has.
        FileNotFoundError: there is no manifest.
    """

    def fetch(champion: Champion) -> M:
        storage, name = split_uri(champion.uri)
        with tempfile.TemporaryDirectory(prefix="raystill-endpoint-") as directory:
            manifest = fetch_directory(storage, name, Path(directory))
            found = manifest_sha256(manifest)
            if found != champion.manifest_sha256:
                raise CorruptArtifact(
                    f"{champion.uri}: the manifest has sha256 {found[:12]}…, the promoted one had "
                    f"{champion.manifest_sha256[:12]}…; promote the version again if the change was meant"
                )
            check_version_files(manifest["files"], champion.uri)
            return load(Path(directory))

    return fetch


def why_refused(error: Exception) -> str:
    """Why a version cannot be served, fit for the public: no paths, no addresses."""
    if isinstance(error, (CorruptArtifact, FileNotFoundError)):
        return "its files do not match its manifest"
    return f"it cannot be loaded ({type(error).__name__})"


class ChampionFollower(Generic[M]):
    """Follows one row of the champions table; `served` and `problem` are read by any thread.

    Args:
        bring_up: makes a version ready to answer; None if that is still under way, and is to be asked again.
    """

    def __init__(self, model_name: str, database: str, bring_up: Callable[[Champion], M | None]) -> None:
        self.served: Served[M] | None = None
        self.problem: str | None = "the endpoint is starting"
        """Why the champion is not what serves; None when all is well. Fit for the public."""
        self.wanted: Champion | None = None
        """The champion of the database, served or not."""
        self._model_name, self._database, self._bring_up = model_name, database, bring_up
        self._engine: Engine | None = None
        self._refused: Champion | None = None
        self._num_failures = 0
        self._retry_at = 0.0

    @property
    def engine(self) -> Engine:
        """The champions database; raises `StorageError` while it cannot be opened."""
        if self._engine is None:
            self._engine = open_database(self._database)
        return self._engine

    def poll(self, poll_s: float = 0.0) -> None:
        """Looks who is champion and brings it up if it is new. Never raises: what goes wrong is in `problem` and the
        log.

        A version that failed is tried again after twice the pause each time (starting with `poll_s`), up to a minute:
        storage may come back, and files may be repaired.
        """
        try:
            champion = current_champion(self.engine, self._model_name)
        except Exception as error:
            self._report(f"the champions database cannot be read ({type(error).__name__})", error)
            return
        self.wanted = champion
        if champion is None:
            self._report(f"model {self._model_name} has no champion yet; promote a version", None)
            return
        if self.served is not None and champion == self.served.champion:
            self.problem, self._refused, self._num_failures = None, None, 0
            return
        if champion == self._refused and time.monotonic() < self._retry_at:
            return
        if champion != self._refused:
            self._num_failures = 0
        try:
            model = self._bring_up(champion)
        except Exception as error:
            self._refused = champion
            self._num_failures += 1
            self._retry_at = time.monotonic() + min(_LONGEST_PAUSE_S, poll_s * 2**self._num_failures)
            kept = f"version {self.served.champion.version} stays" if self.served else "nothing is served"
            self._report(f"version {champion.version} is refused: {why_refused(error)}; {kept}", error)
            return
        if model is None:
            return
        self.served, self.problem = Served(champion, model), None
        self._refused, self._num_failures = None, 0
        logger.info("Serving %s version %s (epoch %d)", champion.model_name, champion.version, champion.epoch)

    def _report(self, problem: str, error: Exception | None) -> None:
        if problem != self.problem:
            logger.warning("%s", f"{problem}: {error}" if error is not None else problem)
        self.problem = problem
