"""Promotes and rolls back again and again under steady streams from another process: nothing fails, nothing is cut.

    python -m tests.endurance.swaps [--times 10] [--streams 20] [--scheme onnx_float32]

An endpoint serves version 1; a second process (`streams.py`) keeps a number of streams open at any time. Every other
turn promotes version 2, the others roll back. A stream must end with a finish reason and `[DONE]`, and its text must be
one of those that the versions give when nothing changes. Ends with exit code 1 if a stream failed or was truncated.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from jobs.rollback import rollback
from tests.running_endpoint import MODEL, RunningEndpoint, running_endpoint, wait_until

PROMPTS = [f"the cat sat on the mat {number} 猫" for number in range(5)]
TOKENS = 120
SETTLED_S = 2.0
"""Load between two swaps."""


def main(
    times: Annotated[int, typer.Option(help="Promotions, and as many rollbacks.")] = 10,
    streams: Annotated[int, typer.Option(help="Streams open at any time.")] = 20,
    scheme: Annotated[str, typer.Option(help="Of both versions, as in quantize.schemes.")] = "float",
) -> None:
    with tempfile.TemporaryDirectory(prefix="raystill-swaps-") as name:
        directory = Path(name)
        with running_endpoint(directory, scheme=scheme, max_running=4, max_waiting=4 * streams) as endpoint:
            published = endpoint.publish("2", seed=2)
            texts = {"1": texts_of(endpoint)}
            (directory / "asked.json").write_text(json.dumps([request(prompt) for prompt in PROMPTS]))
            module = "tests.endurance.streams"
            load = subprocess.Popen([sys.executable, "-m", module, endpoint.url, str(streams), str(directory)])
            try:
                wait_until(lambda: (directory / "begun").exists())
                seconds = [swap(endpoint, turn, published) for turn in range(2 * times)]
            finally:
                (directory / "stop").touch()
                load.wait(600)
            if endpoint.health()["version"] != "2":
                endpoint.crown("2", *published)
                wait_until(lambda: endpoint.health()["version"] == "2")
            texts["2"] = texts_of(endpoint)
            answers = json.loads((directory / "answers.json").read_text())
    report(answers, texts, seconds)


def swap(endpoint: RunningEndpoint, turn: int, published: tuple[str, str]) -> float:
    """One promotion or rollback under load; how long until the endpoint serves it."""
    wanted = "2" if turn % 2 == 0 else "1"
    began = time.monotonic()
    if wanted == "2":
        endpoint.crown("2", *published)
    else:
        rollback(MODEL, endpoint.database, f"sqlite:///{endpoint.directory}/nowhere.db")
    wait_until(lambda: endpoint.health()["version"] == wanted)
    took_s = time.monotonic() - began
    print(f"{turn + 1}: version {wanted} after {took_s:.1f} s", file=sys.stderr)
    time.sleep(SETTLED_S)
    return took_s


def texts_of(endpoint: RunningEndpoint) -> dict[str, str]:
    """What the version that serves says to each prompt."""
    client = endpoint.client()
    return {prompt: client.completions.create(**request(prompt)).choices[0].text for prompt in PROMPTS}


def request(prompt: str) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}


def report(answers: list[dict[str, Any]], texts: dict[str, dict[str, str]], seconds: list[float]) -> None:
    outcomes = Counter(outcome(answer, texts) for answer in answers)
    waits = sorted(answer["first_s"] for answer in answers if answer["first_s"] is not None)
    table = Table("figure", "value", title="swaps under load", title_justify="left")
    table.add_row("promotions and rollbacks", str(len(seconds)))
    table.add_row("until the new one serves, s", f"{min(seconds):.1f} to {max(seconds):.1f}")
    table.add_row("streams", str(len(answers)))
    for name in ("version 1", "version 2", "failed", "truncated", "other text"):
        table.add_row(name, str(outcomes.pop(name, 0)))
    table.add_row(
        "first text, median and 99 %, s", f"{waits[len(waits) // 2]:.2f}, {waits[int(0.99 * len(waits))]:.2f}"
    )
    Console().print(table)
    bad = [answer for answer in answers if not outcome(answer, texts).startswith("version")]
    for answer in bad[:5]:
        print(json.dumps(answer)[:500], file=sys.stderr)
    served = {outcome(answer, texts) for answer in answers}
    if bad or served != {"version 1", "version 2"}:
        raise SystemExit(1)


def outcome(answer: dict[str, Any], texts: dict[str, dict[str, str]]) -> str:
    if answer["problem"]:
        return "failed"
    if not answer["done"] or answer["finish_reason"] is None:
        return "truncated"
    version = next((name for name in texts if texts[name][answer["prompt"]] == answer["text"]), None)
    return f"version {version}" if version else "other text"


if __name__ == "__main__":
    typer.run(main)
