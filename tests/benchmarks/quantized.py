"""Quantised students in the endpoint's engines, beside the float student: `python -m tests.benchmarks.quantized`.

The student is SmolLM2-135M-Instruct in float32 (with `--quick` a Llama of 8 x 512 with random weights, whose quality
says nothing). Each scheme that needs nothing but the student makes its artefact, and is measured as the endpoint would
decode it: tokens/s of 1 and of 16 sequences, prompts of 32 tokens and 64 written; bytes of the weights; nats per token
of text from the Python documentation.
"""

import importlib
import inspect
import pkgutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.engines import NEW_TOKENS, PROMPT_TOKENS, save_random, save_smollm2, scheduled
from tests.benchmarks.sides import OUR_SETTINGS, Side, arguments, show, take_turns

FLOAT = "float"
TEXT_ROWS, TEXT_LENGTH = 8, 384


def schemes() -> dict[str, Callable[[str, Path], Any]]:
    """The schemes of `jobs.quantization` that are made from a student's directory alone."""
    import jobs.quantization

    found = {}
    for module in pkgutil.iter_modules(jobs.quantization.__path__):
        quantize = getattr(importlib.import_module(f"jobs.quantization.{module.name}"), "quantize", None)
        if quantize is not None and list(inspect.signature(quantize).parameters) == ["student", "directory"]:
            found[module.name] = quantize
    return found


def side(name: str, options: dict[str, Any]) -> Callable[[], dict[str, float]]:
    from services.endpoint.engines.loading import load_engine

    artefact = Path(options["artefact"])
    engine = load_engine(artefact, options["scheme"], "float32", 16_384)
    nats = nats_per_token(engine, Path(options["student"])) if options["rows"] == 1 else 0.0
    prompts = [torch.randint(5, 300, (PROMPT_TOKENS,)).tolist() for _ in range(options["rows"])]
    write = scheduled(engine, Path(options["student"]), prompts)

    def measure() -> dict[str, float]:
        write()
        return {"nats": nats}

    return measure


def nats_per_token(engine: Any, student: Path) -> float:
    """Mean negative log-likelihood of the documentation's tokens, each row read from its beginning."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    from services.endpoint.engines.base import Read

    tokenizer = AutoTokenizer.from_pretrained(student)
    longest = sorted(topics.values(), key=len)[-TEXT_ROWS:]
    losses = []
    for text in longest:
        token_ids = tokenizer.encode(text[: TEXT_LENGTH * 8])[:TEXT_LENGTH]
        place = engine.reserve(len(token_ids))
        logits_TV = engine.forward([Read(place, token_ids, all_logits=True)])[:-1]
        engine.release(place)
        losses.append(torch.nn.functional.cross_entropy(logits_TV, torch.tensor(token_ids[1:])).item())
    return statistics.mean(losses)


def weight_bytes(directory: Path) -> int:
    return sum(
        path.stat().st_size for path in directory.iterdir() if ".safetensors" in path.name or ".onnx" in path.name
    )


def main() -> None:
    options = arguments(__doc__ or "")
    with tempfile.TemporaryDirectory(prefix="raystill-bench-") as name:
        student = (save_random if options.quick else save_smollm2)(Path(name) / FLOAT)
        artefacts = {FLOAT: student}
        for scheme, quantize in schemes().items():
            artefacts[scheme] = Path(name) / scheme
            quantize(str(student), artefacts[scheme])
        seconds, nats = {}, {}
        for rows in (1, 16):
            sides = []
            for scheme, artefact in artefacts.items():
                values = {"artefact": str(artefact), "scheme": scheme, "student": str(student), "rows": rows}
                sides.append(Side("tests.benchmarks.quantized", scheme, values, OUR_SETTINGS))
            take_turns(sides, options.repeats or 5)
            for item in sides:
                seconds[item.name, rows] = item.median_s
                nats.setdefault(item.name, item.facts["nats"])
                item.close()
        sizes = {scheme: weight_bytes(artefact) for scheme, artefact in artefacts.items()}
    table, result = [], {}
    for scheme in artefacts:
        result[scheme] = {
            "speedup": seconds[FLOAT, 1] / seconds[scheme, 1],
            "speedup_16": seconds[FLOAT, 16] / seconds[scheme, 16],
            "bytes_ratio": sizes[scheme] / sizes[FLOAT],
            "quality_drop": nats[scheme] / nats[FLOAT] - 1,
        }
        figures = result[scheme]
        table.append(
            [
                scheme,
                f"{NEW_TOKENS / seconds[scheme, 1]:,.0f}",
                f"{figures['speedup']:.2f}",
                f"{16 * NEW_TOKENS / seconds[scheme, 16]:,.0f}",
                f"{figures['speedup_16']:.2f}",
                f"{sizes[scheme] / 1e6:,.1f}",
                f"{figures['quality_drop']:+.2%}",
            ]
        )
    del result[FLOAT]
    columns = ["scheme", "tokens/s, 1 sequence", "times float", "tokens/s, 16", "times float", "MB", "quality drop"]
    show("Quantised students in the endpoint's engines (medians)", columns, table, result)


if __name__ == "__main__":
    main()
