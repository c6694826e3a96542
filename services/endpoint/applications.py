"""What the supervisor asks of a Serve about its version applications; `versions.py` does it."""

from typing import NamedTuple, Protocol

from cluster.champions import Champion
from services.endpoint.traffic import Route


class ApplicationState(NamedTuple):
    """What Serve says of an application: its word, why, and how many replicas run. Without a word there is none."""

    word: str = ""
    message: str = ""
    running: int = 0


class Applications(Protocol):
    """The version applications of a Serve (`services.endpoint.versions.VersionApplications`)."""

    def name_of(self, version: Champion) -> str: ...

    def states(self) -> dict[str, ApplicationState]:
        """What Serve says of each, by name."""

    def start(self, version: Champion) -> None: ...

    def route(self, version: Champion) -> Route: ...

    def queue(self, name: str) -> int:
        """Requests that run or wait there."""

    def remove(self, name: str) -> None: ...

    def failure(self, message: str) -> Exception:
        """What a replica's constructor raised."""
