"""Who answers a request: the champion, or the challenger with its share. Pure, and the same in every router.

A subject (a user, or an API key) is hashed to a place in [0, 1), and the challenger answers the places below its share.
A share that rises therefore only adds subjects: who is on the challenger at 5 % stays there at 25 %. The challenger's
digest salts the hash, so that it is not always the same users who try what is new.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from services.endpoint.errors import ApiError

TEACHER = "teacher"
"""Stands for the teacher, which is no version, where versions are told apart: by alias, number or digest."""


@dataclass(frozen=True)
class Route:
    """A version that runs, and the Serve application that it is."""

    app: str
    version: str
    manifest_sha256: str
    uri: str
    scheme: str
    max_context_tokens: int
    max_new_tokens: int


@dataclass(frozen=True)
class Reign:
    """Since when the champion reigns."""

    epoch: int
    promoted_at: str


@dataclass(frozen=True)
class RoutingTable:
    """What a router needs to know; a new one for every change."""

    number: int = 0
    champion: Route | None = None
    reign: Reign | None = None
    challenger: Route | None = None
    trial: tuple[int, int] | None = None
    """The canary's promotion and step; observations carry it, so that those of another step do not count."""
    share: float = 0.0
    """Of the subjects, answered by the challenger."""
    shadow: float = 0.0
    """Of the champion's requests, asked again to compare."""
    stalled: bool = False
    """No replica of the champion runs, and none has for a while: a request would only wait."""
    problem: str | None = "the endpoint is starting"
    """Why the champion of the database is not what serves; None when all is well."""

    def routes(self) -> list[Route]:
        return [route for route in (self.champion, self.challenger) if route is not None]


def place(salt: str, subject: str) -> float:
    """Where a subject lies in [0, 1): evenly spread over subjects, and always the same for one."""
    digest = hashlib.sha256(f"{salt}\0{subject}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def pick(table: RoutingTable, subject: str) -> Route | None:
    """The version that answers a subject; None while nothing is served."""
    challenger = table.challenger
    if challenger is not None and place(challenger.manifest_sha256, subject) < table.share:
        return challenger
    return table.champion


def is_shadowed(table: RoutingTable, request_id: str) -> bool:
    """Whether a request that the champion answered is asked again to compare."""
    challenger = table.challenger
    return challenger is not None and place(f"shadow {challenger.manifest_sha256}", request_id) < table.shadow


def subject_of(headers: Iterable[tuple[bytes, bytes]], user: str, request_id: str) -> str:
    """Whose request it is: the API key with the body's user, as far as there are any; else the request is its own.

    Args:
        headers: names in lower case, as ASGI gives them.
        user: the body's `user` or `safety_identifier`; empty if it has none.
    """
    key = next((value for name, value in headers if name == b"authorization"), b"")
    if not key and not user:
        return f"request {request_id}"
    return f"{hashlib.sha256(key).hexdigest()} {user}"


def addressed(table: RoutingTable, model: str) -> Route | None:
    """The version that a request names: `NAME@champion`, `NAME@challenger`, or `NAME@` and a number.

    Returns:
        None if it names none, or another model.

    Raises:
        ApiError: 404, nothing of that kind answers now.
    """
    name, at, which = model.partition("@")
    if not at:
        return None
    found = {"champion": table.champion, "challenger": table.challenger}
    found |= {route.version: route for route in table.routes()}
    if found.get(which) is None:
        message = f"The model {model[:128]!r} does not exist now; {name[:64]!r} alone is answered by who reigns"
        raise ApiError(404, message, param="model", code="model_not_found")
    return found[which]
