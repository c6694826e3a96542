"""Stored answers of the teacher: `python -m tests.benchmarks.labels`.

One training goes through its corpus twice with `labels: read_write`: the first time it asks the teacher and keeps what
it says, the second time it reads that. Beside it another one reads the same labels from its first step. Top-64, in
local files.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.teacher.signals import SignalSpec
from tests.benchmarks import end_to_end
from tests.benchmarks.paced import PacedTraining
from tests.benchmarks.service_tax import DirectTeacher
from tests.benchmarks.sides import OUR_SETTINGS, Side, arguments, show, take_turns

VOCABULARY = 8_192
COUNTED = 4


def side(name: str, options: dict[str, Any]) -> Callable[[], dict[str, float]]:
    """A training whose first epoch is over."""
    from cluster.storage import open_storage
    from jobs.training.data import ExampleStore

    directory, root = Path(options["directory"]), options[name]
    teacher = DirectTeacher(str(directory / "teacher"))
    epoch = -(-len(ExampleStore(open_storage(str(directory)), "store", "train")) // end_to_end.BATCH)
    distil = {"signal": "topk", "top_k": 64}
    training = PacedTraining(
        lambda step: end_to_end.train_with(teacher, directory, step, root, **distil), options["uncounted"], COUNTED
    )
    training.steps(epoch + 1)  # one more, since a batch may lie over the border
    calls = teacher.counters.calls
    return lambda: {"seconds": training.turn(), "teacher_calls": teacher.counters.calls - calls}


def main() -> None:
    options = arguments(__doc__ or "")
    with tempfile.TemporaryDirectory(prefix="raystill-bench-") as name:
        directory = Path(name)
        end_to_end.make_inputs(directory, VOCABULARY, documents=300)
        roots = {"second epoch": f"{name}/labels", "local labels": f"{name}/labels"}
        values = {"directory": name, "uncounted": 1, **roots}
        sides = [Side("tests.benchmarks.labels", "second epoch", values, OUR_SETTINGS)]
        sides[0].wait_until_ready()
        sides.append(Side("tests.benchmarks.labels", "local labels", values, OUR_SETTINGS))
        take_turns(sides, options.repeats or (5 if options.quick else 9))
        for item in sides:
            item.close()
        size_bytes, positions = _size(directory / "labels")
    second, local = sides
    ratio, wire = second.median_s / local.median_s, SignalSpec("topk", VOCABULARY, 64).bytes_per_position(0)
    rows = [[item.name, f"{item.median_s * 1000:,.0f}", f"{item.facts['teacher_calls']:,.0f}"] for item in sides]
    rows.append([f"labels: {size_bytes / positions:.1f} bytes per position, wire {wire}", "", ""])
    result = {
        "second_epoch_teacher_calls": int(second.facts["teacher_calls"]),
        "step_ratio": ratio,
        "bytes_per_position": size_bytes / positions,
        "wire_bytes_per_position": wire,
    }
    show("Training from stored labels, V=8,192, top-64 (medians)", ["", "ms per step", "teacher calls"], rows, result)


def _size(root: Path) -> tuple[int, int]:
    import pyarrow.parquet as pq

    paths = list(root.rglob("*.parquet"))
    lists = [pq.read_table(path, columns=["positions"]).column("positions") for path in paths]
    return sum(path.stat().st_size for path in paths), sum(len(row) for column in lists for row in column)


if __name__ == "__main__":
    main()
