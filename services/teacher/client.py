"""How a trainer asks a teacher: bounded, with deadlines, and every answer checked.

Scoring is a pure function, so a request may always be asked again. The client does that for a listed set of failures
(a replica died, none is there, none answered in time) until a deadline; the teacher's own errors are final. Who asks
ahead is bounded by the bytes of the answers (`jobs.training.prefetch`), and takes them in the order of the questions;
how many of the questions are with the teacher at once follows from how fast it answers (`services.teacher.pacing`).
"""

import contextlib
import logging
import os
import random
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

from cluster.connection import while_ray_lives
from cluster.errors import TeacherFailed, TeacherUnavailable
from services.teacher.autoscaling import Standing
from services.teacher.pacing import Pacing
from services.teacher.schema import ScoreReply, ScoreRequest, TeacherDescription, TeacherServiceConfig, check_reply
from services.teacher.signals import HeadRecord, copied

logger = logging.getLogger(__name__)

APP_NAME = "teacher"
_MAX_CALLS_AT_ONCE = 16


@dataclass
class ClientCounters:
    """What happened so far. Read by the training loop once per step."""

    calls: int = 0
    retries: int = 0
    waited_s: float | None = None
    """Seconds that the asker stood still for answers, added up by itself; None where it does not say."""


class TeacherAnswers(Protocol):
    """What the training loop needs of a teacher, wherever it runs."""

    counters: ClientCounters

    def describe(self) -> TeacherDescription: ...

    def head(self) -> HeadRecord: ...

    def submit(self, request: ScoreRequest) -> "Future[ScoreReply]": ...


class TeacherClient:
    """A teacher application on Ray Serve.

    Args:
        app_name: the Serve application.
        attempt_timeout_s: a request unanswered for so long is asked again, and then has twice the time.
        deadline_s: after so long without an answer `TeacherUnavailable` is raised.
        fingerprint: of the teacher that is expected; answers of any other are refused. None takes the one found.
    """

    def __init__(
        self,
        app_name: str = APP_NAME,
        attempt_timeout_s: float = 60.0,
        deadline_s: float = 600.0,
        fingerprint: str | None = None,
    ) -> None:
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        for variable in ("RAY_SERVE_THROUGHPUT_OPTIMIZED", "RAY_SERVE_USE_GRPC_BY_DEFAULT"):
            if os.environ.get(variable, "0") not in ("", "0"):
                # These move large answers from shared memory to gRPC with a 4 MiB limit.
                raise TeacherUnavailable(f"{variable} is set in a process that asks a teacher: unset it there")
        try:
            handle = serve.get_deployment_handle("Teacher", app_name=app_name)
        except (RayError, RayServeException, KeyError) as error:
            raise TeacherUnavailable(
                f"teacher {app_name!r}: no such application on this Ray: start it first"
            ) from error
        self._handle = handle.options(_by_reference=True)
        self._app_name = app_name
        self._attempt_timeout_s, self._deadline_s = attempt_timeout_s, deadline_s
        self._threads = ThreadPoolExecutor(_MAX_CALLS_AT_ONCE, thread_name_prefix="teacher-call")
        self._pacing = Pacing(_MAX_CALLS_AT_ONCE, attempt_timeout_s / 4)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._fingerprint = fingerprint
        self._standing = Standing()
        self.counters = ClientCounters()

    def describe(self) -> TeacherDescription:
        """What the teacher is. From here on answers of any other teacher are refused."""
        description = self._call("describe")
        self._expect(description.fingerprint)
        return description

    def head(self) -> HeadRecord:
        """The teacher's output head."""
        record = self._call("head")
        self._expect(record.fingerprint)
        return copied(record)

    def score(self, request: ScoreRequest) -> ScoreReply:
        """The answer to one request, checked.

        Raises:
            TeacherUnavailable: no answer before the deadline.
            TeacherFailed: the teacher answered with an error, or with something that was not asked.
        """
        reply = self._call("score", request)
        problem = check_reply(request, reply, self._fingerprint)
        if problem is not None:
            raise TeacherFailed(f"the answer to request {request.request_id} {problem}")
        return replace(reply, signal=copied(reply.signal))

    def submit(self, request: ScoreRequest) -> "Future[ScoreReply]":
        """`score` in the background, as soon as the teacher keeps up. Retries are made there, so a lost replica delays
        only what it held."""
        return self._threads.submit(self._score_in_turn, request)

    def _score_in_turn(self, request: ScoreRequest) -> ScoreReply:
        with self._pacing.place():
            if self._closed.is_set():
                raise TeacherUnavailable(f"teacher {self._app_name!r}: not asked any more, the client was closed")
            return self.score(self._standing.told(request, self.counters.waited_s))

    def close(self) -> None:
        """Gives up what is still asked: no further attempts are made."""
        self._closed.set()
        self._pacing.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _expect(self, fingerprint: str) -> None:
        """Raises `TeacherFailed` if this is another teacher than the one expected."""
        if self._fingerprint not in (None, fingerprint):
            raise TeacherFailed(
                f"teacher {self._app_name!r} is {fingerprint}, expected {self._fingerprint}: another one was started "
                "under this name; run the same command again"
            )
        self._fingerprint = fingerprint

    def _call(self, method: str, *arguments: Any) -> Any:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        end = time.monotonic() + self._deadline_s
        attempt, patience_s = 0, self._attempt_timeout_s
        while True:
            with self._lock:
                self.counters.calls += 1
                self.counters.retries += attempt > 0
            response = None
            try:
                response = getattr(self._handle, method).remote(*arguments)
                return response.result(timeout_s=max(0.001, min(patience_s, end - time.monotonic())))
            except (RayError, RayServeException, TimeoutError) as error:
                self._check_worth_retrying(method, error)
                if response is not None and isinstance(error, TimeoutError):
                    patience_s *= 2  # a teacher that is slow, and not dead, must be able to answer in the end
                    with contextlib.suppress(Exception):  # it may have failed in the meantime
                        response.cancel()
                attempt += 1
                pause = min(2.0, 0.05 * 2**attempt) * random.uniform(0.5, 1.0)
                if time.monotonic() + pause >= end or self._closed.wait(pause):
                    reason = "given up, the client was closed" if self._closed.is_set() else "unanswered"
                    raise TeacherUnavailable(
                        f"teacher {self._app_name!r}: {method} {reason} after {self._deadline_s:g} s and {attempt} "
                        f"attempts (last: {type(error).__name__}); see the replicas' logs, or raise teacher.deadline_s"
                    ) from error
                logger.warning(
                    "teacher %s: attempt %d failed (%s), asking again", method, attempt, type(error).__name__
                )

    def _check_worth_retrying(self, method: str, error: Exception) -> None:
        """Returns if another attempt may help; raises the final error if not."""
        from ray.exceptions import (
            NodeDiedError,
            ObjectLostError,
            OutOfMemoryError,
            RayActorError,
            RayTaskError,
            WorkerCrashedError,
        )
        from ray.serve.exceptions import (
            BackPressureError,
            DeploymentUnavailableError,
            ReplicaUnavailableError,
            RequestCancelledError,
        )

        # First, since Ray makes an error that a replica raised an instance of its own class too, TimeoutError included.
        if isinstance(error, RayTaskError):
            cause = error.cause if isinstance(error.cause, Exception) else error
            raise TeacherFailed(f"teacher {self._app_name!r}: {type(cause).__name__}: {cause}") from error
        retried = (
            RayActorError,  # the replica died or cannot be reached
            NodeDiedError,
            WorkerCrashedError,
            OutOfMemoryError,  # Ray ended the replica because its node ran out of memory
            ObjectLostError,  # the answer was lost with its node
            ReplicaUnavailableError,
            DeploymentUnavailableError,
            BackPressureError,
            RequestCancelledError,
            TimeoutError,
        )
        if not isinstance(error, retried):
            first = (str(error).strip().splitlines() or [""])[0]
            raise TeacherUnavailable(
                f"teacher {self._app_name!r}: {method} could not be asked: {type(error).__name__}: {first}"
            ) from error


def start_teacher(config: TeacherServiceConfig, app_name: str = APP_NAME) -> None:
    """Deploys a teacher and waits until its replicas answer. Needs a connected Ray.

    Raises:
        TeacherUnavailable: it did not come up; the message holds the replica's reason.
    """
    from ray import serve

    from services.teacher.deployment import app

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled")
    try:
        serve.run(app(config), name=app_name, route_prefix=None)
    except RuntimeError as error:
        application = serve.status().applications.get(app_name)
        details = [item.message for item in application.deployments.values()] if application is not None else []
        reason = (" ".join(details) or str(error)).strip().splitlines()
        stop_teacher(app_name)
        raise TeacherUnavailable(f"teacher {config.model} did not start: {' '.join(reason[-3:])[-600:]}") from error


def stop_teacher(app_name: str = APP_NAME) -> None:
    """Removes the teacher's replicas."""
    from ray import serve

    while_ray_lives(lambda: serve.delete(app_name))
