"""What counting a key's limits costs, in memory and in SQL: `python -m tests.benchmarks.limits`.

In SQL, a request is one transaction that takes from the key's row what a token bucket allows (an UPDATE with the fill
computed in it). Two processes count at the same time, as two ingress replicas would, on a file of SQLite in WAL mode
and, where PostgreSQL is installed, on a server on this machine.
"""

import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import create_engine, text

from cluster.api_keys import ApiKey
from services.endpoint.limits import Limits
from tests import postgres_server
from tests.benchmarks.sides import arguments, show

TAKE = text(
    "UPDATE bucket SET level = least(60000.0, level + (:now - at) * 1000) - 1, at = :now "
    "WHERE id = 1 AND least(60000.0, level + (:now - at) * 1000) >= 1"
)


def seconds_each(take: Callable[[], Any], count: int) -> list[float]:
    found = []
    for _ in range(count):
        started = time.perf_counter()
        take()
        found.append(time.perf_counter() - started)
    return found


def in_memory(count: int) -> list[float]:
    key = ApiKey("a", "0" * 64, "a", (), 10**9, 10**9, 0.0, None, None)
    limits = Limits()
    return seconds_each(lambda: limits.of(key).take_request(), count)  # type: ignore[union-attr]


def _count_in_sql(url: str, count: int, start: Any, found: Any) -> None:
    engine = create_engine(url)
    take = TAKE if not url.startswith("sqlite") else text(TAKE.text.replace("least(", "min("))

    def once() -> None:
        with engine.begin() as connection:
            connection.execute(take, {"now": time.time()})

    once()
    start.wait(60)
    found.put(seconds_each(once, count))


def in_sql(url: str, count: int) -> list[float]:
    with create_engine(url).begin() as connection:
        if url.startswith("sqlite"):
            connection.execute(text("PRAGMA journal_mode=WAL"))
        connection.execute(text("CREATE TABLE bucket (id INTEGER PRIMARY KEY, level FLOAT, at FLOAT)"))
        connection.execute(text("INSERT INTO bucket VALUES (1, 60000, 0)"))
    context = multiprocessing.get_context("spawn")
    start, found = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_count_in_sql, args=(url, count, start, found)) for _ in range(2)]
    for process in processes:
        process.start()
    values = [value for _ in processes for value in found.get(timeout=300)]
    for process in processes:
        process.join()
    return values


def main() -> None:
    count = 300 if arguments(__doc__ or "").quick else 2000
    sides = {"memory": in_memory(100 * count)}
    with tempfile.TemporaryDirectory(prefix="raystill-bench-") as name, contextlib.ExitStack() as stack:
        sides["sqlite"] = in_sql(f"sqlite:///{name}/limits.db", count)
        if postgres_server.programs() is not None and postgres_server.may_run():
            server = stack.enter_context(postgres_server.running())
            sides["postgresql"] = in_sql(server.url(), count)
    result = {
        f"{side}_{what}_us": round(value * 1e6, 2)
        for side, values in sides.items()
        for what, value in (("median", statistics.median(values)), ("p99", statistics.quantiles(values, n=100)[98]))
    }
    rows = [[side, *(f"{result[f'{side}_{what}_us']:,.1f}" for what in ("median", "p99"))] for side in sides]
    show("Counting one request of a key, two processes at once", ["", "median µs", "p99 µs"], rows, result)


if __name__ == "__main__":
    main()
