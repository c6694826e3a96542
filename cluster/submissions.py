"""Ray's Jobs API: a command that runs on the cluster's head, and what became of it.

A job's id is chosen by the caller and never used twice by a cluster, so of two submissions of one id one wins. Logs are
followed over a connection that may break: it is made again, and what was seen already is not shown twice.

Nothing of the caller's environment goes along but the token of the connection itself: whoever may list a cluster's jobs
reads their variables.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.errors import ClusterUnreachable

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_LOOK_EVERY_S = 20.0
_SILENCE_S = 300.0
"""A connection that said nothing for so long is made again: what lies between may have forgotten it."""
_TIMEOUT_S = (10, 120)
"""For a connection, and for the answer to one request."""
_HIDDEN = ("RAY_ADDRESS", ADDRESS_VARIABLE)
"""Ray puts these above the address that it is given."""


@dataclass(frozen=True)
class Job:
    """A job as the cluster knows it."""

    id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    entrypoint: str
    message: str
    metadata: dict[str, str]
    started: float | None
    """Seconds since 1970; so is `ended`."""
    ended: float | None
    exit_code: int | None
    """Of the command, once it has ended by itself."""

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED


class Submissions:
    """The jobs of one cluster.

    Args:
        address: of the dashboard, `http://HEAD:8265`.
        patience_s: how long a cluster that does not answer is asked again while a job is followed.

    Raises:
        ClusterUnreachable: nobody answers there, or not to this token.
    """

    def __init__(self, address: str, patience_s: float = 300.0) -> None:
        self.address = check_dashboard_address(address)
        self._patience_s = patience_s
        _use_token()
        from ray.job_submission import JobSubmissionClient

        class _Patient(JobSubmissionClient):
            """Gives up a server that says nothing, for which Ray's own would wait for ever."""

            def _do_request(self, *arguments: Any, **options: Any) -> Any:
                return super()._do_request(*arguments, timeout=_TIMEOUT_S, **options)

        for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private"):
            logging.getLogger(name).setLevel(logging.WARNING)
        hidden = {name: os.environ.pop(name) for name in _HIDDEN if name in os.environ}
        try:
            self._client = self._asked(lambda: _Patient(self.address))
        finally:
            os.environ.update(hidden)

    @property
    def ray_version(self) -> str:
        """Of the cluster."""
        return str(self._client._server_ray_version)

    def submit(
        self, job_id: str, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str] | None = None
    ) -> bool:
        """Hands a job in. False if the cluster has had a job of this id; it is left as it is."""
        end = time.monotonic() + self._patience_s
        while True:
            try:
                self._asked(
                    lambda: self._client.submit_job(
                        entrypoint=entrypoint, submission_id=job_id, runtime_env=runtime_env, metadata=metadata or {}
                    )
                )
            except ClusterUnreachable as error:
                if "already exists" in str(error.__cause__):
                    return False
                # A head that has just begun shows its dashboard before it takes jobs.
                if "No available agent" not in str(error.__cause__) or time.monotonic() > end:
                    raise
                time.sleep(1.0)
            else:
                return True

    def find(self, job_id: str) -> Job | None:
        """The job, or None if the cluster knows none of this id."""
        try:
            return _job(self._asked(lambda: self._client.get_job_info(job_id)))
        except ClusterUnreachable as error:
            if "status code 404" in str(error.__cause__):
                return None
            raise

    def all(self) -> list[Job]:
        """Every job that was ever submitted to this cluster, oldest first."""
        found = self._asked(self._client.list_jobs)
        return sorted((_job(item) for item in found if item.submission_id), key=lambda job: job.started or 0)

    def logs(self, job_id: str) -> str:
        """All that the job wrote so far."""
        return str(self._asked(lambda: self._client.get_job_logs(job_id)))

    def stop(self, job_id: str, timeout_s: float = 120.0) -> Job:
        """Asks a job to end (SIGTERM, then SIGKILL) and waits until it has; one that has ended is left as it is.

        Raises:
            ClusterUnreachable: it is still there after `timeout_s`, or there is no such job.
        """
        self._asked(lambda: self._client.stop_job(job_id))
        end = time.monotonic() + timeout_s
        while True:
            job = self.find(job_id)
            if job is None:
                raise ClusterUnreachable(f"cluster {self.address} has no job {job_id}: see `raystill jobs`")
            if job.has_ended:
                return job
            if time.monotonic() > end:
                raise ClusterUnreachable(
                    f"job {job_id} is still {job.status} {timeout_s:g} s after it was asked to stop; see its log with "
                    f"`raystill logs {job_id}`, or ask again"
                )
            time.sleep(0.5)

    def follow(self, job_id: str, write: Callable[[str], object], say: Callable[[str], object]) -> Job:
        """Passes on what the job writes until it has ended, and returns how.

        Args:
            write: is given the log, piece by piece, each once.
            say: is given a line when the connection breaks.

        Raises:
            ClusterUnreachable: the cluster does not answer any more, or has forgotten the job.
        """
        return asyncio.run(self._follow(job_id, write, say))

    async def _follow(self, job_id: str, write: Callable[[str], object], say: Callable[[str], object]) -> Job:
        seen, lost_since = _Seen(), None
        while True:
            try:
                job = self.find(job_id)
                if job is None:
                    raise _Forgotten(
                        f"cluster {self.address} has no job {job_id}: if its head was replaced, submit again, and the "
                        "run goes on from its checkpoints"
                    )
                if lost_since is not None:
                    say("connected again")
                    lost_since = None
                if job.has_ended and job.message and not seen.characters and job.exit_code is None:
                    return job  # it never began
                await self._tail(job_id, seen, write)
                job = self.find(job_id)
                if job is not None and job.has_ended:
                    return job
            except _Forgotten:
                raise
            except _NobodyReads as error:
                raise error.reason from None
            except Exception as error:  # aiohttp, asyncio and Ray each have their own
                now = time.monotonic()
                if lost_since is None:
                    lost_since = now
                    say(f"connection to {self.address} lost ({type(error).__name__}), trying again")
                if now - lost_since > self._patience_s:
                    raise ClusterUnreachable(
                        f"cluster {self.address} has not answered for {now - lost_since:.0f} s; the job may go on: "
                        f"`raystill logs {job_id} --follow`; if the head is gone, submit again to a new one, and the "
                        "run goes on from its checkpoints"
                    ) from error
            await asyncio.sleep(1.0)

    async def _tail(self, job_id: str, seen: "_Seen", write: Callable[[str], object]) -> None:
        """Follows the log from its beginning, passing over what was seen."""
        stream = self._client.tail_job_logs(job_id)
        at, quiet_since = 0, time.monotonic()
        piece: asyncio.Future[str] | None = None
        try:
            while True:
                piece = piece or asyncio.ensure_future(anext(stream))
                await asyncio.wait({piece}, timeout=_LOOK_EVERY_S)
                if not piece.done():
                    self.find(job_id)  # raises if nobody is there any more
                    if time.monotonic() - quiet_since > _SILENCE_S:
                        return
                    continue
                text = piece.result()
                piece, quiet_since = None, time.monotonic()
                fresh = text[max(0, seen.characters - at) :]
                at += len(text)
                if fresh:
                    try:
                        write(fresh)
                    except OSError as error:
                        raise _NobodyReads(error) from error
                    seen.characters = at
        except StopAsyncIteration:
            return
        finally:
            if piece is not None and not piece.done():
                piece.cancel()

    def _asked(self, question: Callable[[], T]) -> T:
        """An answer, or one line that says why there is none; the cause is kept."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            return question()
        except AuthenticationError as error:
            found = "does not take the token that was shown" if "invalid" in str(error).lower() else "asks for a token"
            raise ClusterUnreachable(
                f"cluster {self.address} {found}: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH (a file) or "
                "RAY_AUTH_TOKEN to the cluster's own"
            ) from error
        except (ConnectionError, requests.RequestException) as error:
            raise ClusterUnreachable(
                f"cluster {self.address}: no dashboard answers ({type(error).__name__}); check --address, or open a "
                "tunnel to the head's port 8265"
            ) from error
        except RuntimeError as error:  # the SDK's own, for every other status
            first = next((line for line in reversed(str(error).strip().splitlines()) if line.strip()), "no reason")
            raise ClusterUnreachable(f"cluster {self.address} refused: {first.strip()[:400]}") from error


@dataclass
class _Seen:
    """How much of a log was passed on, over all connections."""

    characters: int = 0


class _NobodyReads(Exception):
    """The log cannot be passed on: what reads it has gone."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(reason)
        self.reason = reason


class _Forgotten(ClusterUnreachable):
    """The cluster answers, and knows no such job."""


def check_dashboard_address(address: str) -> str:
    """The address with its scheme and without a slash at the end.

    Raises:
        ClusterUnreachable: it is not an address of a dashboard.
    """
    found = address.rstrip("/")
    if "://" not in found:
        found = f"http://{found}"
    if not found.startswith(("http://", "https://")) or "@" in found:
        raise ClusterUnreachable(f"address {address!r}: expected the dashboard's, such as {DEFAULT_ADDRESS}")
    return found


def _use_token() -> None:
    """Ray looks at a token only in token mode, and reads the mode once, when it is imported."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _job(details: Any) -> Job:
    def seconds(stamp: int | None) -> float | None:
        return None if not stamp else stamp / 1000

    return Job(
        id=str(details.submission_id),
        status=str(details.status.value if hasattr(details.status, "value") else details.status),
        entrypoint=details.entrypoint,
        message=(details.message or "").strip(),
        metadata=dict(details.metadata or {}),
        started=seconds(details.start_time),
        ended=seconds(details.end_time),
        exit_code=details.driver_exit_code,
    )
