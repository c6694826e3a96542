"""A thousand calls one after the other and 64 at a time, by each client: no connection stays, memory does not grow.

    python -m tests.endurance.clients [raw openai openai_async langchain] [--calls 1000] [--parallel 64]

Endpoint and client share this process, so what either keeps is seen. Memory is compared between the end of the first
half, when caches are full, and the end. Exit code 1 if anything stayed.
"""

import ctypes
import gc
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table

from tests.conformance.bodies import ALL, chat
from tests.conformance.clients import CLIENTS
from tests.conformance.server import Endpoint, endpoint
from tests.endpoint_models import save_version

_MAX_GROWTH_MB = 8.0
_PROCESS = psutil.Process()
_LIBC = ctypes.CDLL(None)


def main(
    clients: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(ALL)}; all without any.")] = None,
    calls: Annotated[int, typer.Option(help="Calls one after the other.")] = 1000,
    parallel: Annotated[int, typer.Option(help="Calls at a time, as many again in all as one after the other.")] = 64,
) -> None:
    torch.set_num_threads(1)
    table = Table("client", "calls", "failed", "calls/s", "MB grown", "connections left", "requests left")
    good = True
    with tempfile.TemporaryDirectory(prefix="raystill-clients-") as name:
        save_version(Path(name))
        with endpoint("tiny", Path(name), max_waiting=parallel) as running:
            _run(running, "raw", calls // 2, parallel)  # else what is kept once would be the first client's
            for client in clients or ALL:
                row, kept = _run(running, client, calls, parallel)
                table.add_row(client, *row)
                good = good and not kept
    Console().print(table)
    if not good:
        raise typer.Exit(1)


def _run(running: Endpoint, name: str, calls: int, parallel: int) -> tuple[tuple[str, ...], bool]:
    """A row of the table, and whether anything stayed."""
    before, started = _connections(), time.monotonic()
    api = CLIENTS[name](running.url)
    failed = 0

    def ask(number: int) -> int:
        try:
            fields: dict[str, Any] = chat(running, max_tokens=2)
            found = api.chat_stream(**fields) if number % 2 else api.chat(**fields)
            return int(not found)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            return 1

    half = max(1, calls // 2)
    failed += sum(ask(number) for number in range(half))
    with ThreadPoolExecutor(parallel) as executor:
        failed += sum(executor.map(ask, range(half)))
        settled = _rss_mb()
        failed += sum(executor.map(ask, range(calls - half)))
    failed += sum(ask(number) for number in range(calls - half))
    took = time.monotonic() - started
    grown = _rss_mb() - settled
    api.close()
    deadline = time.monotonic() + 10
    while (_connections() > before or running.num_admitted) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.1)
    left, admitted = _connections() - before, running.num_admitted
    # LangChain's models share HTTP clients that live as long as the process; their pools are bounded.
    allowed = 2 * parallel if name == "langchain" else 0
    row = (f"{2 * calls:,}", str(failed), f"{2 * calls / took:.0f}", f"{grown:.1f}", str(left), str(admitted))
    return row, bool(failed or admitted or grown > _MAX_GROWTH_MB or left > allowed)


def _rss_mb() -> float:
    """What is in use: memory that 64 threads freed, which the allocator keeps for the next, is given back first."""
    gc.collect()
    _LIBC.malloc_trim(0)
    return _PROCESS.memory_info().rss / 1e6


def _connections() -> int:
    return sum(item.status == "ESTABLISHED" for item in _PROCESS.net_connections("tcp"))


if __name__ == "__main__":
    typer.run(main)
