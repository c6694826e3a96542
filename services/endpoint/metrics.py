"""What the endpoint tells Prometheus, through Ray's own exporter on every node; Serve adds application and replica.

Requests, tokens and times are counted by the router, which sees what a user sees; the queue by the version that has it.
A plain directory has no router: its replicas count all of it (`recording.py`).
"""

from collections.abc import Callable

from ray.serve import metrics

from cluster.gauges import LastingGauge
from services.endpoint.canary import Observation
from services.endpoint.traffic import TEACHER

BROKEN, LEFT_BEFORE, LEFT_WITHIN = "broken", "499", "left"
"""Beside the HTTP statuses: an answer that broke off, and one whose client left before or after it had begun."""

_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
_TOKEN_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0]


class RouterMetrics:
    """Counts the answers of every version. One for each router, or for each replica of a plain directory."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._requests = metrics.Counter(
            "raystill_endpoint_requests",
            description="Answers, by version, status, and traffic: user, shadow, or teacher.",
            tag_keys=("model", "version", "status", "traffic"),
        )
        keys = ("model", "version")
        self._tokens = metrics.Counter(
            "raystill_endpoint_tokens",
            description="Tokens read (kind prompt) and sampled (kind completion) for users.",
            tag_keys=(*keys, "kind"),
        )
        self._ttft = metrics.Histogram(
            "raystill_endpoint_time_to_first_token_seconds",
            description="From a request's arrival at the version to its first token.",
            boundaries=_SECONDS,
            tag_keys=keys,
        )
        self._token = metrics.Histogram(
            "raystill_endpoint_time_per_token_seconds",
            description="Time per token after the first, mean of an answer.",
            boundaries=_TOKEN_SECONDS,
            tag_keys=keys,
        )
        self._in_flight = LastingGauge(
            metrics.Gauge(
                "raystill_endpoint_requests_in_flight",
                description="Requests that the router, or the replica of a plain directory, has not yet answered.",
                tag_keys=keys,
            )
        )

    def in_flight(self, version: str, requests: int) -> None:
        self._in_flight.set(requests, tags=self._tags(version))

    def answered(self, version: str, status: str, seen: Observation) -> None:
        """Counts an answer; `status` is the HTTP status, `BROKEN`, `LEFT_BEFORE` or `LEFT_WITHIN`."""
        tags = self._tags(version)
        traffic = "shadow" if seen.shadow else TEACHER if version == TEACHER else "user"
        self._requests.inc(1, tags={**tags, "status": status, "traffic": traffic})
        if traffic != "user":  # alerts ask how users fare
            return
        for kind, count in (("prompt", seen.prompt_tokens), ("completion", seen.completion_tokens)):
            if count:
                self._tokens.inc(count, tags={**tags, "kind": kind})
        if seen.ttft_s is not None:
            self._ttft.observe(max(seen.ttft_s, 1e-6), tags=tags)
        if seen.token_s is not None:
            self._token.observe(max(seen.token_s, 1e-6), tags=tags)

    def _tags(self, version: str) -> dict[str, str]:
        return {"model": self._model_name, "version": version}


class VersionMetrics:
    """The queue of a version, or of a plain directory. One for each replica.

    Args:
        queue: how many requests run or wait now. It is asked every few seconds, too, since the work of a client that
            left ends by itself.
    """

    def __init__(self, model_name: str, version: str, queue: Callable[[], int]) -> None:
        self._tags, self._requests = {"model": model_name, "version": version}, queue
        self._queue = LastingGauge(
            metrics.Gauge(
                "raystill_endpoint_queue",
                description="Requests that run or wait in a replica of a version or of a plain directory.",
                tag_keys=("model", "version"),
            )
        )

    def tell_queue(self) -> None:
        self._queue.set(self._requests, tags=self._tags)
