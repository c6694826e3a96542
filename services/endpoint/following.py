"""Keeps the champion of a registered model in memory: looks, fetches, verifies, loads, swaps.

A version serves only if the manifest in storage is the one that was promoted and every file matches it; it is loaded
from a private copy that was verified, which is removed afterwards. A version that cannot be served changes nothing: the
one before it stays, and `problem` says so. The swap is one assignment; a request keeps the model it started with.
"""

import logging
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine

from cluster.champions import Champion, current_champion, open_database
from cluster.errors import CorruptArtifact
from cluster.published import check_version_files, fetch_directory, manifest_sha256
from cluster.storage import split_uri
from services.endpoint.loading import AnyModel

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True)
class Served:
    """The champion and its model."""

    champion: Champion
    model: AnyModel


class ChampionFollower:
    """Follows one row of the champions table. One thread polls; `served` and `problem` are read by any."""

    def __init__(self, model_name: str, database: str, load: Callable[[Path], AnyModel]) -> None:
        self.served: Served | None = None
        self.problem: str | None = "the endpoint is starting"
        """Why the champion is not what serves; None when all is well. Fit for the public: no paths, no addresses."""
        self._model_name, self._database, self._load = model_name, database, load
        self._engine: Engine | None = None
        self._refused: Champion | None = None
        self._num_failures = 0
        self._retry_at = 0.0
        self._stopping = threading.Event()

    def start(self, poll_s: float) -> None:
        """Looks once, then every `poll_s` seconds in a thread until `stop`."""
        self.poll(poll_s)

        def follow() -> None:
            while not self._stopping.wait(poll_s):
                self.poll(poll_s)

        threading.Thread(target=follow, name="champion-follower", daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()

    def poll(self, poll_s: float = 0.0) -> None:
        """Looks who is champion and loads it if it is new. Never raises: what goes wrong is in `problem` and the log.

        A version that failed is tried again after twice the pause each time (starting with `poll_s`), up to a minute:
        storage may come back, and files may be repaired.
        """
        try:
            if self._engine is None:
                self._engine = open_database(self._database)
            champion = current_champion(self._engine, self._model_name)
        except Exception as error:
            self._report(f"the champions database cannot be read ({type(error).__name__})", error)
            return
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
            served = self._fetch(champion)
        except Exception as error:
            self._refused = champion
            self._num_failures += 1
            self._retry_at = time.monotonic() + min(_LONGEST_PAUSE_S, poll_s * 2**self._num_failures)
            damaged = isinstance(error, (CorruptArtifact, FileNotFoundError))
            reason = (
                "its files do not match its manifest" if damaged else f"it cannot be loaded ({type(error).__name__})"
            )
            kept = f"version {self.served.champion.version} stays" if self.served else "nothing is served"
            self._report(f"version {champion.version} is refused: {reason}; {kept}", error)
            return
        self.served, self.problem, self._refused, self._num_failures = served, None, None, 0
        logger.info("Serving %s version %s (epoch %d)", champion.model_name, champion.version, champion.epoch)

    def _fetch(self, champion: Champion) -> Served:
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
            return Served(champion, self._load(Path(directory)))

    def _report(self, problem: str, error: Exception | None) -> None:
        if problem != self.problem:
            logger.warning("%s", f"{problem}: {error}" if error is not None else problem)
        self.problem = problem
