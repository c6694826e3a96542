"""Who may ask: the replica's view of the API keys in the database, and the check of a request's `Authorization`.

A thread reads the keys every `POLL_S`, so that a request costs one hash and no SQL, and a wrong key costs the database
nothing. A revoked key is refused after at most that long. When the database stops answering, the keys known last are
good for `STALE_S` more, since they cannot be revoked where they are stored either; after that every request gets 503.

Without any key in the database the endpoint is open, to this machine: a request that came in over an address that
other machines reach is refused. Once a key was seen, one is asked for until the process ends.
"""

import ipaddress
import logging
import threading
import time

from sqlalchemy import Engine
from starlette.types import Scope

from cluster.api_keys import ApiKey, find_key, keys_state, list_keys, open_keys
from services.endpoint.errors import ApiError, unavailable

logger = logging.getLogger(__name__)

POLL_S = 1.0
STALE_S = 300.0


class KeyRing:
    """The keys of one database. One thread polls; `authenticate` is called by any."""

    def __init__(self, database: str, *, required: bool = False) -> None:
        """`required`: ask for a key even if the database has none."""
        self._database = database
        self.required = required
        """Whether a request needs a key."""
        self._engine: Engine | None = None
        self._keys: dict[str, ApiKey] = {}
        self._state: tuple[int, ...] | None = None
        self._read_at = -float("inf")
        self._failed = False
        self._stopping = threading.Event()

    def start(self) -> None:
        """Looks once, then every `POLL_S` seconds in a thread until `stop`."""
        self.poll()

        def follow() -> None:
            while not self._stopping.wait(POLL_S):
                self.poll()

        threading.Thread(target=follow, name="api-keys", daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()

    def poll(self) -> None:
        """Reads the keys if they have changed. Never raises: a database that does not answer is logged, once."""
        try:
            if self._engine is None:
                self._engine = open_keys(self._database)
            state = keys_state(self._engine)
            if state != self._state:
                self._keys = {key.id: key for key in list_keys(self._engine)}
                self._state = state
                self.required = self.required or bool(self._keys)
        except Exception as error:
            if not self._failed:
                logger.warning("The API keys cannot be read; those known stay good for %g s: %s", STALE_S, error)
            self._failed = True
            return
        self._read_at, self._failed = time.monotonic(), False

    def authenticate(self, scope: Scope) -> ApiKey | None:
        """The key of a request, or None where none is asked for.

        Raises:
            ApiError: 401, for whatever is not a good key: absent, wrong, expired and revoked ones look alike; 503,
                while the keys cannot be read.
        """
        if time.monotonic() - self._read_at > STALE_S:
            raise unavailable("The API keys cannot be read.", "keys_unavailable", retry_after_s=5)
        headers = [value for name, value in scope["headers"] if name == b"authorization"]
        if not self.required:
            if _from_elsewhere(scope):
                raise _unauthorized("This address asks for an API key, and none was made yet")
            return None
        if not headers:
            raise _unauthorized("You did not provide an API key; send Authorization: Bearer KEY")
        method, _, presented = headers[0].partition(b" ")
        key = find_key(self._keys, presented.strip(b" \t"))
        good = key is not None and key.state(time.time()) == "active"
        if not good or len(headers) != 1 or method.lower() != b"bearer":
            raise _unauthorized("Incorrect API key provided")
        return key


def check_model_allowed(key: ApiKey | None, model: str) -> None:
    """Raises `ApiError` 403 if the key is for other models."""
    if key is not None and not key.may_ask(model):
        raise ApiError(
            403,
            f"This API key has no access to model {model[:128]!r}",
            kind="permission_error",
            param="model",
            code="model_not_allowed",
        )


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def _from_elsewhere(scope: Scope) -> bool:
    """Whether the connection came in over an address that is not loopback. An address that is no number is a test's."""
    server = scope.get("server")
    try:
        return server is not None and not ipaddress.ip_address(server[0]).is_loopback
    except ValueError:
        return False
