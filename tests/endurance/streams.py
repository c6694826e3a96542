"""Keeps a number of streams open on an endpoint until it is told to stop, and writes down what became of each.

    python -m tests.endurance.streams URL STREAMS DIRECTORY

In the directory are `asked.json`, the requests that are asked in turn, and, when it is over, `answers.json`; it touches
`begun` with the first answer and ends its streams when `stop` is there. A process of its own, so that it measures the
endpoint and not who operates it.
"""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import typer


def main(url: str, streams: int, directory: Path) -> None:
    asked = json.loads((directory / "asked.json").read_text())
    answers: list[dict[str, Any]] = []

    async def keep_open(client: httpx.AsyncClient, number: int) -> None:
        turn = number
        while not (directory / "stop").exists():
            answers.append(await one_stream(client, f"{url}/v1/completions", asked[turn % len(asked)]))
            turn += 1
            (directory / "begun").touch()

    async def all_streams() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=300, limits=limits, trust_env=False) as client:
            await asyncio.gather(*(keep_open(client, number) for number in range(streams)))

    asyncio.run(all_streams())
    (directory / "answers.json").write_text(json.dumps(answers))


async def one_stream(client: httpx.AsyncClient, url: str, asked: dict[str, Any]) -> dict[str, Any]:
    """One request as a stream: its text, whether it came to its end, and the seconds until the first text."""
    found: dict[str, Any] = {"prompt": asked["prompt"], "text": "", "done": False, "finish_reason": None}
    found |= {"problem": None, "first_s": None}
    began = time.monotonic()
    try:
        async with client.stream("POST", url, json={**asked, "stream": True}) as response:
            if response.status_code != 200:
                found["problem"] = f"status {response.status_code}: {(await response.aread())[:200]!r}"
                return found
            async for line in response.aiter_lines():
                if not line:
                    continue
                found["first_s"] = found["first_s"] or time.monotonic() - began
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    found["done"] = True
                    continue
                event = json.loads(data)
                if "error" in event:
                    found["problem"] = event["error"]["message"]
                    return found
                choice = event["choices"][0]
                found["text"] += choice["text"]
                found["finish_reason"] = choice["finish_reason"] or found["finish_reason"]
    except (httpx.HTTPError, ValueError, LookupError) as error:
        found["problem"] = repr(error)
    return found


if __name__ == "__main__":
    typer.run(main)
