"""Many replicas and many workers: `python -m tests.benchmarks.scale`.

The teacher's forward pass is a pause of 100 ms for each batch, so the cores are free for what is measured: calls,
routing, merging, the client's window and order. Real Serve, real client, real prefetch, real records (top-64 of 2,048
positions).

Efficiency: answers per second of workers that only take answers, over what the replicas could give at most. Waiting:
the share of time that workers wait whose own step is so long that the teacher has a fifth to spare.
"""

import threading
import time
from typing import Any

import numpy as np
import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from cluster.connection import ClusterConfig, connect
from jobs.training.data import MicroBatch
from jobs.training.prefetch import Prefetch
from services.teacher.client import TeacherClient
from services.teacher.merging import Merger
from services.teacher.schema import ScoreReply, ScoreRequest, TeacherDescription
from services.teacher.signals import SignalSpec, TopkSignal
from tests.benchmarks.sides import arguments, show

POSITIONS, BATCH_S = 2_048, 0.1
SPEC = SignalSpec("topk", 151_936, 64)
SPARE = 1.2


@serve.deployment(name="Teacher", max_ongoing_requests=32, logging_config=LoggingConfig(enable_access_log=False))
class PausingTeacher:
    """Answers as the real one does, after a pause in the place of a forward pass."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        ids = np.sort(rng.integers(0, SPEC.vocab_size, (POSITIONS, SPEC.top_k)), axis=1)
        logprobs = -rng.random((POSITIONS, SPEC.top_k), np.float32)
        self._signal = TopkSignal.of(ids, logprobs, -np.ones((POSITIONS, 1), np.float32), SPEC)
        self._model = threading.Lock()
        self._merger = Merger(self._score, POSITIONS)  # one request is a batch

    def _score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        with self._model:
            time.sleep(BATCH_S)
        return [ScoreReply(item.request_id, "pausing", item.num_tokens, self._signal, BATCH_S) for item in requests]

    async def describe(self) -> TeacherDescription:
        return TeacherDescription("pausing", "tokenizer", SPEC.vocab_size, 4096, 1 << 20, POSITIONS, "float32")

    async def score(self, request: ScoreRequest) -> ScoreReply:
        return await self._merger.reply(request)


@ray.remote(num_cpus=0)
class Worker:
    """A trainer without a student: takes answers in order, and pauses for its own step."""

    def __init__(self, rank: int) -> None:
        client = TeacherClient()
        client.describe()
        size = SPEC.bytes_per_position(4096)
        self._prefetch = Prefetch(client, SPEC, size, 64 << 20, f"worker{rank}")

    def run(self, step_s: float, warm_s: float, measured_s: float) -> tuple[int, float]:
        """Answers taken, and seconds waited for them, in the measured time."""
        tokens = np.zeros(POSITIONS, np.int32)
        places, lengths = np.arange(POSITIONS, dtype=np.int32), np.array([POSITIONS], np.int32)
        targets, none = np.zeros(POSITIONS, np.int64), np.zeros(0, np.int32)
        endless = (MicroBatch(n, True, tokens, lengths, places, targets, (), none, 0) for n in range(10**9))
        pairs = self._prefetch.pairs(endless)
        begin = time.monotonic() + warm_s
        taken, waited = 0, 0.0
        for _ in pairs:
            now = time.monotonic()
            if now < begin:
                taken, waited = 0, self._prefetch.waited_s
            elif now > begin + measured_s:
                break
            taken += 1
            if step_s:
                time.sleep(step_s)
        pairs.close()  # type: ignore[attr-defined]  # a generator
        return taken, self._prefetch.waited_s - waited


def measure(replicas: int, workers: int, measured_s: float) -> tuple[float, float]:
    """Efficiency, and the share of time that right-sized workers wait."""
    serve.start(proxy_location="Disabled")
    deployment: Any = PausingTeacher
    app = deployment.options(num_replicas=replicas, ray_actor_options={"num_cpus": 0}).bind()
    serve.run(app, name="teacher", route_prefix=None)
    limit = replicas / BATCH_S
    actors = [Worker.remote(rank) for rank in range(workers)]
    taken = ray.get([actor.run.remote(0.0, 6.0, measured_s) for actor in actors])
    efficiency = sum(count for count, _ in taken) / measured_s / limit
    step_s = SPARE * workers / limit
    waited = ray.get([actor.run.remote(step_s, 6.0, measured_s) for actor in actors])
    for actor in actors:
        ray.kill(actor)
    serve.delete("teacher")
    return efficiency, sum(seconds for _, seconds in waited) / (workers * measured_s)


def main() -> None:
    options = arguments(__doc__ or "")
    sizes = [(4, 2), (16, 8)] if options.quick else [(1, 1), (4, 2), (8, 4), (16, 8)]
    rows, result = [], {}
    with connect(ClusterConfig(num_cpus=8, object_store_mb=2000)):
        for replicas, workers in sizes:
            efficiency, wait_share = measure(replicas, workers, 15.0)
            rate = f"{efficiency * replicas / BATCH_S:,.1f}"
            rows.append([f"{replicas} x {workers}", rate, f"{efficiency:.1%}", f"{wait_share:.1%}"])
            result[f"efficiency_{replicas}x{workers}"] = efficiency
            result["wait_share"] = wait_share
        serve.shutdown()
    columns = ["replicas x workers", "answers/s", "of what is possible", "waiting, right-sized"]
    show("Batches of 100 ms, 2,048 positions each, top-64", columns, rows, result)


if __name__ == "__main__":
    main()
