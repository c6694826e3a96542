"""What a replica tells Prometheus, through Ray's own exporter on every node; Serve adds deployment and replica."""

from ray.serve import metrics

from cluster.gauges import LastingGauge


class TeacherMetrics:
    """Counts what a `Merger` does. One for each replica."""

    def __init__(self) -> None:
        self._in_flight = LastingGauge(
            metrics.Gauge(
                "raystill_teacher_tokens_in_flight", description="Tokens of requests that wait or are computed."
            )
        )
        self._tokens = metrics.Counter("raystill_teacher_tokens", description="Tokens scored.")
        self._fill = metrics.Histogram(
            "raystill_teacher_batch_fill",
            description="Tokens of a batch over the budget.",
            boundaries=[0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0],
        )
        self._age = metrics.Histogram(
            "raystill_teacher_queue_age_seconds",
            description="How long the oldest request of a batch has waited when it begins.",
            boundaries=[0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0],
        )

    def in_flight(self, tokens: int) -> None:
        self._in_flight.set(tokens)

    def batch(self, tokens: int, fill: float, age_s: float) -> None:
        self._tokens.inc(tokens)
        self._fill.observe(fill)
        self._age.observe(age_s)
