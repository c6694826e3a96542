"""Ten times more requests than can be answered: `python -m tests.benchmarks.overload`.

A real endpoint on Ray Serve with API keys, a random model of 8 x 384 and answers of a fixed length. Two loads take
turns, so that other work on the machine meets both. A full house: as many clients as there are places ask one request
after the other (closed loop), which gives the capacity in answers per second, and the latency. Then requests come at
random at ten times that rate whether or not they are answered (open loop, Poisson), as from many clients that know
nothing of each other. The load comes from one process on the same machine, whose own work counts against the result.

goodput_ratio_10x: answers per second under overload, over the capacity.
refusal_p99_ms: from a connection's first byte to the end of the refusal; each has Retry-After.
accepted_p99_ratio: latency of the accepted at the 99th percentile, over the same of the full house.
server_errors: everything that is neither an answer nor a refusal (503 or 429 with Retry-After).
load_average: of the machine at the end, other work included; on a busy one the times say little.
"""

import asyncio
import itertools
import os
import random
import socket
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from cluster.api_keys import create_key, opened_keys
from cluster.connection import ClusterConfig, connect
from cluster.published import manifest_sha256, publish_directory
from cluster.storage import open_storage
from services.endpoint.client import start_endpoint, stop_endpoint
from services.endpoint.schema import EndpointConfig
from tests import tiny
from tests.benchmarks.sides import arguments, show
from tests.endpoint_models import crown_version

MODEL = "overload-student"
SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6}
NEW_TOKENS = 48
NUM_KEYS = 16
TIMES = 10
BODY = {"model": MODEL, "prompt": "the cat sees the river", "max_tokens": NEW_TOKENS, "temperature": 0}


class Load:
    """What came of the requests of one phase."""

    def __init__(self, url: str, keys: list[str]) -> None:
        self._url, self._keys = f"{url}/v1/completions", itertools.cycle(keys)
        self.answered_s: list[float] = []
        self.answered_at: list[float] = []
        self.refused_s: list[float] = []
        self.errors: Counter[str] = Counter()
        self._counted, self._counted_s = 0, 0.0

    def count(self, started: float, ended: float) -> None:
        """Counts the answers of a turn but for its first quarter, in which the house fills."""
        started += (ended - started) / 4
        self._counted += sum(started < at <= ended for at in self.answered_at)
        self._counted_s += ended - started

    @property
    def answers_per_s(self) -> float:
        return self._counted / self._counted_s

    async def ask(self, session: aiohttp.ClientSession) -> None:
        headers = {"authorization": f"Bearer {next(self._keys)}"}
        started = time.perf_counter()
        try:
            async with session.post(self._url, json=BODY, headers=headers) as response:
                body = await response.json(content_type=None)
                ended = time.perf_counter()
                if response.status == 200 and body["usage"]["completion_tokens"] == NEW_TOKENS:
                    self.answered_s.append(ended - started)
                    self.answered_at.append(ended)
                elif response.status in (429, 503) and "retry-after" in response.headers:
                    self.refused_s.append(ended - started)
                else:
                    self.errors[f"{response.status} {str(body)[:200]}"] += 1
        except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
            self.errors[type(error).__name__] += 1


async def closed_loop(load: Load, num_clients: int, seconds: float) -> None:
    """All clients ask, one request after the other."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        started = time.perf_counter()

        async def client() -> None:
            while time.perf_counter() < started + seconds:
                await load.ask(session)

        await asyncio.gather(*(client() for _ in range(num_clients)))
    load.count(started, started + seconds)


async def open_loop(load: Load, rate: float, seconds: float) -> None:
    """Requests come at random; those that are not answered when the last has come are waited for and not counted."""
    chance = random.Random(0)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        started = at = time.perf_counter()
        tasks = []
        while (at := at + chance.expovariate(rate)) < started + seconds:
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            tasks.append(asyncio.create_task(load.ask(session)))
        ended = time.perf_counter()
        await asyncio.gather(*tasks)
    load.count(started, ended)


def serve_bytes() -> int:
    """Resident memory of the processes of Serve below this one."""
    found = 0
    for process in psutil.Process().children(recursive=True):
        try:
            if "ServeReplica" in process.name() or "ProxyActor" in " ".join(process.cmdline()):
                found += process.memory_info().rss
        except psutil.Error:
            continue
    return found


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98] if len(values) > 1 else float("nan")


def make_version(directory: Path) -> str:
    """A crowned version and its database."""
    heads = {"num_key_value_heads": SHAPE["num_attention_heads"], "max_position_embeddings": 512}
    tiny.save_model(directory / "local", **SHAPE, **heads)
    storage = open_storage(str(directory / "storage"))
    manifest = publish_directory(directory / "local", storage, "versions/1", scheme="float")
    database = f"sqlite:///{directory}/champions.db"
    crown_version(database, MODEL, "1", f"{storage.uri}/versions/1", manifest_sha256(manifest))
    return database


def measure(quick: bool) -> tuple[list[list[str]], dict[str, Any]]:
    turns, turn_s = (3, 12) if quick else (6, 30)
    with tempfile.TemporaryDirectory(prefix="raystill-bench-") as name, socket.socket() as probe:
        database = make_version(Path(name))
        with opened_keys(database) as engine:
            keys = [create_key(engine, f"load {number}")[1] for number in range(NUM_KEYS)]
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        config = EndpointConfig(port=port, max_running=1, max_waiting=7, threads_per_replica=1)
        places = config.max_running + config.max_waiting
        with connect(ClusterConfig(num_cpus=4, object_store_mb=80)):
            url = start_endpoint(config, MODEL, database)
            try:
                asyncio.run(closed_loop(Load(url, keys), places, turn_s))
                full, over, before = Load(url, keys), Load(url, keys), serve_bytes()
                for _ in range(turns):
                    asyncio.run(closed_loop(full, places, turn_s))
                    asyncio.run(open_loop(over, TIMES * full.answers_per_s, turn_s))
                grown = serve_bytes() - before
            finally:
                stop_endpoint()
    errors = full.errors + over.errors
    rows = [
        ["full house", f"{full.answers_per_s:.2f}", f"{len(full.answered_s)}", f"{p99(full.answered_s):.2f}", "", ""],
        [
            f"{TIMES} times that",
            f"{over.answers_per_s:.2f}",
            f"{len(over.answered_s)}",
            f"{p99(over.answered_s):.2f}",
            f"{len(over.refused_s)}",
            f"{statistics.median(over.refused_s) * 1000:.1f} / {p99(over.refused_s) * 1000:.1f}",
        ],
        *[[f"error: {what}", "", str(count), "", "", ""] for what, count in errors.most_common(5)],
    ]
    result = {
        "goodput_ratio_10x": round(over.answers_per_s / full.answers_per_s, 4),
        "refusal_p99_ms": round(p99(over.refused_s) * 1000, 2),
        "accepted_p99_ratio": round(p99(over.answered_s) / p99(full.answered_s), 4),
        "server_errors": sum(errors.values()),
        "memory_growth_mb": round(grown / 1e6, 1),
        "capacity_per_s": round(full.answers_per_s, 2),
        "load_average": round(os.getloadavg()[0], 1),
    }
    return rows, result


def main() -> None:
    options = arguments(__doc__ or "")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows, result = measure(options.quick)
    columns = ["load", "answers/s", "answers", "p99 s", "refusals", "median / p99 ms"]
    show("An endpoint with more requests than it can answer", columns, rows, result)


if __name__ == "__main__":
    main()
