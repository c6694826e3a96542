"""SIGKILL at random moments of prepare, label and train, each begun again until it ends: nothing lost, nothing twice.

    python -m tests.endurance.kills [prepare label train] [--times 20]

For each stage one unbroken run says what must come out and how long it takes. Then the command is started, killed at a
moment drawn from that time, and started again on what it left, until it ends by itself; then on a fresh copy, until it
was killed as often as asked. Every result that ends must be that of the unbroken run. At last two labellers work on one
label store at the same time. Ends with exit code 1 at the first difference.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas
import typer
import yaml
from rich.console import Console
from rich.table import Table

from tests import tiny
from tests.command_line import COMMAND, COMPUTES, environment, rays_below, raystill

BEFORE = {"prepare": (), "label": ("prepare",), "train": ("prepare",)}
PART = ["data.sources=[in/00.jsonl]"]
OVERRIDES = {"prepare": [], "label": PART, "train": PART}
_IMPORTS_S = 2.0
"""Nothing is done before; kills there would show nothing."""


def main(
    stages: Annotated[list[str] | None, typer.Argument(help="Of prepare, label, train; all without any.")] = None,
    times: Annotated[int, typer.Option(help="Kills of each stage.")] = 20,
    seed: int = 0,
) -> None:
    chance = random.Random(seed)
    table = Table("stage", "kills", "runs that ended", "unbroken run, s", "kills at, s")
    with tempfile.TemporaryDirectory(prefix="raystill-kills-") as name:
        directory = Path(name)
        _write_config(directory)
        for stage in stages or BEFORE:
            table.add_row(stage, *_kill_often(directory, stage, times, chance))
            if stage == "label":
                _two_labellers(directory)
    Console().print(table)


def _kill_often(directory: Path, stage: str, times: int, chance: random.Random) -> tuple[str, ...]:
    start = directory / f"{stage}-start"
    for before in BEFORE[stage]:
        _finish(directory, before, start, OVERRIDES[stage])
    whole = _copy(start, directory / f"{stage}-whole")
    began = time.monotonic()
    _finish(directory, stage, whole, OVERRIDES[stage])
    whole_s = time.monotonic() - began
    wanted = _result(stage, whole)
    kills: list[float] = []
    ended = 0
    while len(kills) < times:
        broken = _copy(start, directory / f"{stage}-broken")
        while True:
            at_s = chance.uniform(_IMPORTS_S, whole_s)
            if len(kills) == times or not _kill(directory, stage, broken, at_s):
                break
            kills.append(at_s)
            print(f"{stage}: killed after {at_s:.1f} s ({len(kills)} of {times})", file=sys.stderr)
        _finish(directory, stage, broken, OVERRIDES[stage])
        _compare(stage, wanted, _result(stage, broken))
        ended += 1
        shutil.rmtree(broken)
    moments = ", ".join(f"{at_s:.0f}" for at_s in sorted(kills))
    return str(len(kills)), str(ended), f"{whole_s:.1f}", moments


def _two_labellers(directory: Path) -> None:
    """Both see every row labelled once, as one alone does."""
    shared = f"distill.label_store={directory / 'shared-labels'}"
    both = [_copy(directory / "label-start", directory / f"label-{name}") for name in ("one", "other")]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda storage: _finish(directory, "label", storage, [*PART, shared]), both))
    wanted = _result("label", directory / "label-whole")
    for storage in both:
        _compare("label", wanted, _result("label", storage))


def _kill(directory: Path, stage: str, storage: Path, at_s: float) -> bool:
    """Starts a stage and kills it after some seconds; whether it lived that long. Waits until its workers are gone."""
    process = subprocess.Popen(
        [*COMMAND, *_arguments(stage, storage, OVERRIDES[stage])],
        cwd=directory,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, said = process.communicate(timeout=at_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        end = time.monotonic() + 60
        while rays_below(directory, COMPUTES):
            if time.monotonic() > end:
                raise SystemExit(f"{stage}: workers outlived the killed run by a minute") from None
            time.sleep(0.1)
        return True
    if process.returncode != 0:
        raise SystemExit(f"{stage} failed after kills: {said[-2000:]}")
    return False


def _finish(directory: Path, stage: str, storage: Path, overrides: list[str]) -> None:
    done = raystill(*_arguments(stage, storage, overrides), cwd=directory, timeout=900)
    if done.returncode != 0:
        raise SystemExit(f"{stage} failed: {done.stderr[-2000:]}")


def _arguments(stage: str, storage: Path, overrides: list[str]) -> list[str]:
    return [stage, "kills.yaml", f"storage={storage}", *overrides]


def _copy(start: Path, to: Path) -> Path:
    if start.exists():
        shutil.copytree(start, to)
    return to


def _result(stage: str, storage: Path) -> Any:
    output = json.loads((storage / "summary.json").read_text())["stages"][stage]
    if stage == "train":
        return {name: output[name] for name in ("rows", "tokens", "rows_checksum", "losses")}
    if stage == "label":
        return _labels(Path(output["root"].removeprefix("file://")) / output["prefix"]) | {"rows": output["rows"]}
    store = storage / output["store"]
    files = sorted(path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file())
    manifest = json.loads((store / "manifest.json").read_text())
    of_the_place = ("tokenizer", "sha256")  # where the tokenizer lies, and the manifest's own hash
    return {"files": files} | {name: manifest[name] for name in manifest if name not in of_the_place}


def _labels(directory: Path) -> dict[str, Any]:
    """What a reader of a label store sees: of each row the first label."""
    files = sorted(directory.glob("*.parquet"))
    table = pandas.concat([pandas.read_parquet(path) for path in files])
    first = table.drop_duplicates(["shard", "row"]).sort_values(["shard", "row"])
    return {"labels": len(first), **{name: first[name].tolist() for name in ("shard", "row", "positions")}}


def _compare(stage: str, wanted: Any, found: Any) -> None:
    """Rows, tokens, files, hashes are equal; what was computed is within the noise of another order of sums."""
    differing = [name for name in wanted if name not in ("losses", "positions") and wanted[name] != found[name]]
    if stage == "train" and not np.allclose(wanted["losses"], found["losses"], rtol=1e-4):
        differing.append("losses")
    if stage == "label" and not all(map(np.array_equal, wanted["positions"], found["positions"])):
        differing.append("positions")
    for name in differing:
        print(
            f"{name}: {str(found[name])[:2000]}\nwhere the unbroken run has\n{str(wanted[name])[:2000]}",
            file=sys.stderr,
        )
    if differing:
        raise SystemExit(f"{stage}: {', '.join(differing)} of the killed run differ from those of the unbroken one")


def _write_config(directory: Path) -> None:
    text = " ".join(tiny.sentences(200_000))
    size = len(text) // 24
    for number in range(24):
        lines = [json.dumps({"text": text[at : at + 700]}) for at in range(number * size, (number + 1) * size, 700)]
        (directory / "in").mkdir(exist_ok=True)
        (directory / "in" / f"{number:02}.jsonl").write_text("\n".join(lines) + "\n")
    teacher = tiny.save_model(directory / "teacher", num_hidden_layers=4, hidden_size=128, intermediate_size=256)
    config = {
        "name": "kills",
        "data": {"sources": [str(directory / "in")], "sequence_length": 64},
        "teacher": {"model": str(teacher), "replicas": 1, "dtype": "float32"},
        "student": {"from_teacher": {"layers": [0, 3]}},
        "train": {
            "steps": 300,
            "global_batch": 8,
            "micro_batch": 4,
            "num_workers": 2,
            "precision": "float32",
            "checkpoint_every": 10,
            "validate_every": 1000,
        },
    }
    (directory / "kills.yaml").write_text(yaml.safe_dump(config))


if __name__ == "__main__":
    typer.run(main)
