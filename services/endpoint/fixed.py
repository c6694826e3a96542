"""One model that never changes, from a plain directory: a teacher, or any checkpoint that is to be tried.

Offers what `following.ChampionFollower` offers, so that the HTTP interface is the same. There is no registry behind it:
what stands for the version is the fingerprint of the files.
"""

import logging
from datetime import UTC, datetime

from cluster.champions import Champion
from cluster.model_directory import read_model_directory
from services.endpoint.following import Served
from services.endpoint.loading import AnyModel, load_model
from services.endpoint.schema import DirectoryArguments

logger = logging.getLogger(__name__)


class FixedModel:
    """Serves one directory for as long as it lives."""

    problem: str | None = None

    def __init__(self, arguments: DirectoryArguments) -> None:
        """Checks and loads the directory.

        Raises:
            ModelError: it cannot be served; the message says why.
            CorruptArtifact: it has a manifest of ours and differs from it.
        """
        found = read_model_directory(arguments.directory)
        if found.left_alone:
            logger.info("Not opened, since they may hold code: %s", ", ".join(found.left_alone[:8]))
        as_of = datetime.fromtimestamp((found.path / "config.json").stat().st_mtime, UTC)
        entry = Champion(arguments.model_name, 0, found.version, found.path.as_uri(), "", as_of.isoformat())
        self.served: Served[AnyModel] | None = Served(entry, load_model(found.path, arguments))

    def stop(self) -> None:
        """Nothing to stop: nothing is watched."""
