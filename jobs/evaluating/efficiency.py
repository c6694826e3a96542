"""Speed, memory, energy and arithmetic of one model, measured in a process of its own.

`measure_efficiency` starts `python -m jobs.evaluating.efficiency`, which loads the model, does nothing else, and prints
its figures as JSON. A Ray worker would not do: it has done other things before, and its peak memory is theirs too.
"""

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.errors import EvaluationFailed
from cluster.pretrained import locate
from jobs.config import EvaluateConfig
from jobs.quantization.config import ON_ONNXRUNTIME

_LEAST_S = 0.1
"""A timed repetition goes over its rows as often as it takes to last this long."""

_PACKAGES = ("torch", "transformers", "torchao", "onnxruntime", "lm_eval")
"""Whose versions decide figures."""


@dataclass(frozen=True)
class Efficiency:
    """What was measured, and what could not be.

    Args:
        figures: for the table; see `measure_here`.
        absent: by name, why a figure is missing.
        machine: where it was measured, for people.
    """

    figures: dict[str, float]
    absent: dict[str, str]
    machine: dict[str, str]


def measure_efficiency(model: str, scheme: str, rows: list[Any], config: EvaluateConfig, threads: int) -> Efficiency:
    """Figures of a model from a fresh process.

    Args:
        rows: held-out `jobs.training.data.Row`s, at least as many as the largest of `speed_batches` if there are.

    Raises:
        EvaluationFailed: the process ended without figures; the message has its last words.
    """
    asked = {
        "parent": os.getpid(),
        "model": str(locate(model)),
        "scheme": scheme,
        "threads": threads,
        "rows": [[part.tolist() for part in (row.token_ids, row.segment_lengths, row.loss_mask)] for row in rows],
        "config": config.model_dump(mode="json", include={"speed_batches", "prompt_tokens", "new_tokens", "repeats"}),
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(asked),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        reason = said[-1] if said else f"killed by signal {-done.returncode}" if done.returncode < 0 else "no reason"
        raise EvaluationFailed(
            f"model {model} ({scheme}): the process that measures its speed and memory ended with code "
            f"{done.returncode} ({reason[:300]}); give the machine more memory, or look at the model"
        )
    return Efficiency(**json.loads(done.stdout.splitlines()[-1]))


def measure_here(asked: dict[str, Any]) -> Efficiency:
    """Loads and measures in this process, which should have done nothing else.

    `tokens_per_s_batch_B`: tokens of B held-out rows through the model and its loss, a second; `tokens_per_s` is that
    of the largest B. `first_token_s`: from a prompt to its first new token; `token_s`: from one new token to the next,
    one sequence, greedy. These are medians of `timings` (= `repeats`), each with its 95 % interval (`_low`, `_high`) as
    `median_with_interval` has it. `peak_memory_bytes`: the most that the process has held, of which
    `base_memory_bytes` before the model was loaded (Python, torch); on a GPU, memory that torch held there.
    `joules_per_token`: while the largest B was timed. `flops_per_token`: of one row read as one sequence, head at every
    position, a multiplication and an addition being two, attention counted as if it were not causal; float models.
    """
    import torch

    from jobs.evaluating.energy import EnergyMeter
    from jobs.evaluating.intervals import median_with_interval
    from jobs.evaluating.scorers import load_scorer
    from jobs.training.data import collate

    rows, config = _rows(asked["rows"]), asked["config"]
    base_bytes = _peak_bytes()
    scorer = load_scorer(asked["model"], asked["scheme"], asked["threads"])
    on_gpu = asked["scheme"] not in ON_ONNXRUNTIME and torch.cuda.is_available()
    finish = torch.cuda.synchronize if on_gpu else lambda: None
    scorer.score(collate(rows[:1]))  # first calls allocate and choose kernels
    figures: dict[str, float] = {"parameters": scorer.parameters, "timings": config["repeats"]}
    absent: dict[str, str] = {}
    meter = EnergyMeter(on_gpu)
    for size in sorted(set(config["speed_batches"])):
        batch = collate([rows[number % len(rows)] for number in range(size)])
        tokens = len(batch.token_ids)
        before = meter.read_j()
        seconds, times = _timed(lambda batch=batch: scorer.score(batch), config["repeats"], finish)  # type: ignore[misc]
        joules = meter.used_j(before, meter.read_j())
        found = median_with_interval("s", seconds)
        figures[f"tokens_per_s_batch_{size}"] = figures["tokens_per_s"] = tokens / found["s"]
        for end, opposite in (("low", "high"), ("high", "low")):
            if f"s_{opposite}" in found:
                figures[f"tokens_per_s_batch_{size}_{end}"] = tokens / found[f"s_{opposite}"]
        if not meter.absent and joules > 0:
            figures["joules_per_token"] = joules / (tokens * times)
        else:
            absent["joules_per_token"] = meter.absent or "the counter did not move"
    prompt = rows[0].token_ids[: config["prompt_tokens"]].tolist()
    if scorer.max_tokens is not None:
        prompt = prompt[: max(1, scorer.max_tokens - config["new_tokens"])]
    list(scorer.greedy(prompt, 2))
    first, following = zip(
        *(_timed_tokens(scorer, prompt, config["new_tokens"], finish) for _ in range(config["repeats"])), strict=True
    )
    figures |= {**median_with_interval("first_token_s", first), **median_with_interval("token_s", following)}
    figures |= {"peak_memory_bytes": _peak_bytes(), "base_memory_bytes": base_bytes, "prompt_tokens": len(prompt)}
    if on_gpu:
        figures |= {"peak_memory_bytes": torch.cuda.max_memory_allocated(), "base_memory_bytes": 0}
    if asked["scheme"] == "float":
        figures["flops_per_token"] = count_flops(scorer, rows[0])
    else:
        absent["flops_per_token"] = "counted of float models in torch alone"
    return Efficiency(figures, absent, machine(asked["threads"], on_gpu))


def count_flops(scorer: Any, row: Any) -> float:
    """Floating-point operations of one row through the model, head at every position, for each of its tokens.

    Attention is computed by its plain formula while it is counted: torch's counter does not know the fused one of CPUs.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    token_ids_BT = torch.tensor(row.token_ids[None].astype("int64"), device=scorer.device)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        scorer.model(input_ids=token_ids_BT, use_cache=False)
    return counter.get_total_flops() / len(row.token_ids)


def machine(threads: int, on_gpu: bool) -> dict[str, str]:
    """What computed, and with which versions."""
    import torch

    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    found = {"processor": model, "threads": str(threads), "system": f"{platform.system()} {platform.machine()}"}
    if on_gpu:
        found["gpu"] = torch.cuda.get_device_name()
    return {**found, "python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def _timed(work: Callable[[], Any], repeats: int, finish: Callable[[], None]) -> tuple[list[float], int]:
    """The seconds that `work` takes, in each repetition, and how often it was done in all."""
    work()
    started, once = time.perf_counter(), 0
    while once == 0 or time.perf_counter() - started < _LEAST_S:
        work()
        finish()
        once += 1
    found = [(time.perf_counter() - started) / once]
    for _ in range(repeats - 1):
        started = time.perf_counter()
        for _ in range(once):
            work()
        finish()
        found.append((time.perf_counter() - started) / once)
    return found, 1 + once * repeats


def _timed_tokens(scorer: Any, prompt: list[int], count: int, finish: Callable[[], None]) -> tuple[float, float]:
    """Seconds to the first new token, and from each to the next."""
    started = time.perf_counter()
    stamps = []
    for _ in scorer.greedy(prompt, count):
        finish()
        stamps.append(time.perf_counter() - started)
    return stamps[0], (stamps[-1] - stamps[0]) / (len(stamps) - 1)


def _peak_bytes() -> int:
    """The most memory that this process has held: VmHWM, because `ru_maxrss` begins with that of the parent."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _rows(parts: list[list[list[int]]]) -> list[Any]:
    import numpy as np

    from jobs.training.data import Row, RowId

    return [
        Row(RowId(0, number), np.array(tokens, np.int32), np.array(lengths, np.int32), np.array(mask, bool), 0)
        for number, (tokens, lengths, mask) in enumerate(parts)
    ]


def end_with(parent: int) -> None:
    """Ends this process when the one that started it is gone: nobody would read its figures."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


if __name__ == "__main__":
    request = json.load(sys.stdin)
    end_with(request["parent"])
    print(json.dumps(vars(measure_here(request))))
