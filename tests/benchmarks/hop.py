"""What the router costs: the same version behind it, and in the process that parses HTTP.

    python -m tests.benchmarks.hop [--repeats 5]

Both applications run on one local Serve, with the same tiny model (2 layers x 32) and one thread; each takes its turn.
Whole answers of one token show the fixed cost of a request; a stream of many tokens, and twenty of them at once, show
what the way back costs per token. The model is far smaller than a real one, so the shares are upper bounds.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from cluster.champions import find_champion
from tests.running_endpoint import MODEL, RunningEndpoint, running_endpoint

TOKENS = 200
ONE = {"model": MODEL, "prompt": "the cat", "max_tokens": 1, "temperature": 0}
MANY = {**ONE, "max_tokens": TOKENS, "seed": 1, "temperature": 1.5, "stream": True}


def main(repeats: Annotated[int, typer.Option(help="Of which the median counts.")] = 5) -> None:
    with tempfile.TemporaryDirectory(prefix="raystill-hop-") as name, running_endpoint(Path(name)) as endpoint:
        put_beside(endpoint)
        urls = {"in the process": f"{endpoint.url}/direct", "behind the router": endpoint.url}
        try:
            found = asyncio.run(measure(urls, repeats))
        finally:
            from ray import serve

            serve.delete("direct")
    table = Table("what", *urls, "difference", title="cost of the hop", title_justify="left")
    for what, unit, scale in WHAT:
        first, second = (statistics.median(found[side][what]) * scale for side in urls)
        table.add_row(f"{what}, {unit}", f"{first:.2f}", f"{second:.2f}", f"{second - first:+.2f}")
    Console().print(table)


WHAT = (
    ("one token, whole answer", "ms", 1e3),
    ("first text of a stream", "ms", 1e3),
    ("a token of one stream", "ms", 1e3),
    ("a token of twenty streams at once", "ms", 1e3),
)


async def measure(urls: dict[str, str], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by side and by what was measured."""
    found: dict[str, dict[str, list[float]]] = {side: {what: [] for what, _, _ in WHAT} for side in urls}
    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None), trust_env=False) as client:
        for turn in range(repeats + 1):  # the first one warms up
            for side, url in urls.items():
                one = await timed(lambda url=url: ask(client, url, ONE), 20)
                first_s, token_s, _ = await stream(client, url)
                began = time.perf_counter()
                counts = await asyncio.gather(*(stream(client, url) for _ in range(20)))
                many = (time.perf_counter() - began) / sum(count for *_, count in counts)
                if turn:
                    for (what, _, _), value in zip(WHAT, (one, first_s, token_s, many), strict=True):
                        found[side][what].append(value)
    return found


async def timed(work: Callable[[], Awaitable[Any]], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        await work()
    return (time.perf_counter() - began) / times


async def ask(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> None:
    (await client.post(f"{url}/v1/completions", json=body)).raise_for_status()


async def stream(client: httpx.AsyncClient, url: str) -> tuple[float, float, int]:
    """Seconds until the first text, seconds per event after it, number of events."""
    began, first_s, count = time.perf_counter(), 0.0, 0
    async with client.stream("POST", f"{url}/v1/completions", json=MANY) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                count += 1
                first_s = first_s or time.perf_counter() - began
    return first_s, (time.perf_counter() - began - first_s) / max(1, count - 1), count


def put_beside(endpoint: RunningEndpoint) -> None:
    """The champion in one process with its HTTP interface, at /direct of the same Serve."""
    from ray import serve

    champion = find_champion(endpoint.database, MODEL)
    assert champion is not None
    serve.run(direct_deployment().bind(vars(champion)), name="direct", route_prefix="/direct", blocking=False)


def direct_deployment() -> Any:
    from ray import serve

    from cluster.champions import Champion
    from services.endpoint.schema import ServedArguments

    @serve.deployment(max_ongoing_requests=100, ray_actor_options={"num_cpus": 0})
    @serve.ingress()
    class Direct:
        def __init__(self, champion: dict[str, Any]) -> None:
            import torch

            torch.set_num_threads(1)
            self._champion = Champion(**champion)

        def __serve_build_asgi_app__(self) -> Any:
            from services.endpoint.api import build_api
            from services.endpoint.following import Served, verified
            from services.endpoint.model import ServedModel
            from services.endpoint.versions import OneVersion

            model = verified(lambda directory: ServedModel(directory, 400, 380))(self._champion)
            return build_api(ServedArguments(model_name=MODEL), OneVersion(Served(self._champion, model)))

    return Direct


if __name__ == "__main__":
    typer.run(main)
