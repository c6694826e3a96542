"""Quantises an encoder or a classifier of BERT's family by itself, without a run:

    python -m jobs.quantize_encoder MODEL INTO --scheme onnx_int8 --rows validation.parquet --text-column sentence

Each artefact is published below INTO, reloaded in a process that did not make it, compared with what its maker saw, and
measured there: bytes, time for a batch and, where rows have labels, accuracy and macro-F1, the float model beside it.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.config import validate
from cluster.encoder_texts import TextReader
from cluster.errors import ConfigError, CorpusError, EvaluationFailed, ModelError
from cluster.published import publish_directory
from cluster.storage import LocalStorage
from jobs.quantization.config import QuantizeConfig
from jobs.quantization.pairings import check_pairings, model_kind

_BATCH_ROWS = 16
_REPEATS = 5


def quantize_encoder(
    model: str,
    into: Path,
    schemes: list[str],
    texts: list[str],
    labels: list[int] | None = None,
    threads: int = 1,
) -> dict[str, dict[str, float]]:
    """Quantises an encoder in every scheme and measures each, and the float model, in fresh processes.

    Args:
        texts: at least one; they are read as the endpoint reads them.
        labels: of a classifier's texts, from 0.

    Returns:
        By scheme, and for `float`: `bytes`, `batch_s` (median seconds of the first 16 texts), with labels `accuracy`
        and `macro_f1`; of schemes `reload_error` too, the largest difference of an output relative to the largest.

    Raises:
        ConfigError: a scheme that no encoder has, or a model that is none.
        QuantizationFailed: an artefact that a fresh process reads otherwise.
    """
    from jobs.quantization.encoder_scorer import EncoderScorer
    from jobs.quantization.loading import read_config
    from jobs.quantize import check_reload

    config, asked = read_config(model), validate(QuantizeConfig, {"schemes": schemes}, "--scheme")
    if model_kind(config) != "encoder":
        raise ConfigError(
            f"model {model} is a {config.model_type} that generates: quantise it with `raystill quantize`"
        )
    check_pairings(asked, config)
    directory = Path(_located(model))
    rows = read_texts(directory, texts)
    measured = {"float": _measure_elsewhere(directory, "float", rows, labels, threads)[0]}
    for scheme in asked.schemes:
        with tempfile.TemporaryDirectory(prefix="raystill-quantize-") as name:
            path = Path(name)
            versions = _maker(scheme)(str(directory), path)
            _tokenizer(model).save_pretrained(path)
            found = EncoderScorer(path, scheme, threads).outputs(rows[:_BATCH_ROWS])
            publish_directory(path, LocalStorage(into), scheme, scheme=scheme, versions=versions)
        figures, outputs = _measure_elsewhere(into / scheme, scheme, rows, labels, threads)
        largest = float(found.abs().max())
        figures["reload_error"] = float((found.double() - outputs).abs().max()) / largest
        check_reload(scheme, figures)
        measured[scheme] = figures
    return measured


def _maker(scheme: str) -> Any:
    from jobs.quantization import int8_dynamic, int8_weight_only, onnx_int4, onnx_int8

    modules = {
        item.__name__.rpartition(".")[2]: item for item in (int8_dynamic, int8_weight_only, onnx_int4, onnx_int8)
    }
    return modules[scheme].quantize


def _located(model: str) -> str:
    from cluster.pretrained import check_model

    found = check_model(model)
    if not Path(found).is_dir():
        raise ModelError(f"model {model}: no such directory; an encoder is quantised from a directory")
    return found


def _tokenizer(model: str) -> Any:
    from cluster.pretrained import load_tokenizer

    return load_tokenizer(model)


def read_texts(directory: Path, texts: list[str]) -> list[list[int]]:
    """Token ids of texts as the endpoint would read them with `truncate`.

    Raises:
        CorpusError: a text has no tokens.
    """
    from services.endpoint.schema import EndpointConfig

    reader = TextReader(directory, EndpointConfig().max_context_tokens)
    rows = [reader.token_ids(text, truncate=True) for text in texts]
    if (empty := next((place for place, ids in enumerate(rows) if not ids), None)) is not None:
        raise CorpusError(f"row {empty}: its text {texts[empty]!r} has no tokens; leave it out")
    return rows


def _measure_elsewhere(
    directory: Path, scheme: str, rows: list[list[int]], labels: list[int] | None, threads: int
) -> tuple[dict[str, float], Any]:
    """Figures of a model, and its outputs for the first batch in float64, from a process of their own."""
    import torch

    asked = {"directory": str(directory), "scheme": scheme, "rows": rows, "labels": labels, "threads": threads}
    with tempfile.TemporaryDirectory(prefix="raystill-measure-") as name:
        done = subprocess.run(
            [sys.executable, "-c", f"from jobs.quantize_encoder import measure_here; measure_here({name!r})"],
            input=json.dumps(asked),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or ["no reason"]
            raise EvaluationFailed(f"model {directory} ({scheme}): measuring it failed ({said[-1][:300]})")
        figures = json.loads((Path(name) / "figures.json").read_text())
        import numpy as np

        return figures, torch.from_numpy(np.load(Path(name) / "outputs.npy", allow_pickle=False)).double()


def measure_here(into: str) -> None:
    """Loads and measures what standard input asks for, in this process; writes `figures.json` and `outputs.npy`."""
    import numpy as np

    from jobs.evaluating.classification import classification_figures
    from jobs.evaluating.scorers import model_bytes
    from jobs.quantization.encoder_scorer import EncoderScorer

    asked = json.load(sys.stdin)
    scorer = EncoderScorer(Path(asked["directory"]), asked["scheme"], asked["threads"])
    rows, labels = asked["rows"], asked["labels"]
    outputs = scorer.outputs(rows[:_BATCH_ROWS])
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        scorer.outputs(rows[:_BATCH_ROWS])
        seconds.append(time.perf_counter() - started)
    figures: dict[str, float] = {"bytes": model_bytes(asked["directory"]), "batch_s": statistics.median(seconds)}
    if labels is not None:
        starts = range(0, len(rows), _BATCH_ROWS)
        logits = np.concatenate([scorer.outputs(rows[start : start + _BATCH_ROWS]).numpy() for start in starts])
        figures |= classification_figures(logits, np.array(labels)).as_dict()
    np.save(Path(into) / "outputs.npy", outputs.numpy(), allow_pickle=False)
    (Path(into) / "figures.json").write_text(json.dumps(figures))


def read_rows(
    path: Path, text_column: str, label_column: str | None, max_rows: int
) -> tuple[list[str], list[int] | None]:
    """Texts and labels of a .parquet or .jsonl file; the labels are whole numbers from 0.

    Raises:
        CorpusError: the file or a column is not there, or a label is no such number.
    """
    import pyarrow
    import pyarrow.json
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path) if path.suffix == ".parquet" else pyarrow.json.read_json(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise CorpusError(f"rows {path}: cannot be read ({str(error).splitlines()[0]})") from error
    for name in (text_column, label_column):
        if name is not None and name not in table.column_names:
            raise CorpusError(f"rows {path}: no column {name!r}; found {', '.join(table.column_names)}")
    table = table.slice(0, max_rows)
    texts = [str(text) for text in table[text_column].to_pylist()]
    if not texts:
        raise CorpusError(f"rows {path}: no rows in it")
    if label_column is None:
        return texts, None
    labels = table[label_column].to_pylist()
    wrong = next((label for label in labels if not isinstance(label, int) or label < 0), None)
    if wrong is not None:
        raise CorpusError(f"rows {path}: {label_column} holds {wrong!r}; expected whole numbers from 0")
    return texts, labels


def main(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory of an encoder or classifier.")],
    into: Annotated[Path, typer.Argument(metavar="INTO", help="Directory for the artefacts, one folder each.")],
    rows: Annotated[Path, typer.Option(help="Texts to measure with, .parquet or .jsonl.")],
    scheme: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
    text_column: Annotated[str, typer.Option()] = "text",
    label_column: Annotated[str, typer.Option(help="Whole numbers from 0; empty: none.")] = "label",
    max_rows: Annotated[int, typer.Option(min=1)] = 2000,
) -> None:
    """Quantise an encoder or a classifier, reload each artefact in a fresh process, compare and measure it."""
    from cluster.resources import physical_cores

    schemes = scheme or ["int8_weight_only", "int8_dynamic", "onnx_int8"]
    texts, labels = read_rows(rows, text_column, label_column or None, max_rows)
    found = quantize_encoder(model, into, schemes, texts, labels, physical_cores())
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "on disk", "of float", "ms/batch", "accuracy", "macro-F1")
    exact = found["float"]["bytes"]
    for name, figures in found.items():
        quality = [f"{figures[key]:.4f}" if key in figures else "" for key in ("accuracy", "macro_f1")]
        size, share = f"{figures['bytes'] / 1e6:,.1f} MB", f"{figures['bytes'] / exact:.3f}"
        table.add_row(name, size, share, f"{1000 * figures['batch_s']:.1f}", *quality)
    Console().print(table)
    typer.echo(json.dumps(found, sort_keys=True))


if __name__ == "__main__":
    from jobs.__main__ import _guard

    _guard(lambda: typer.run(main), as_json=False)
