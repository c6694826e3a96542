"""Quantises an encoder or a classifier by itself, without a run.

Each artefact is published below a directory, reloaded in a process that did not make it, compared with what its maker
saw, and measured there: bytes, time for a batch and, of a classifier whose rows have labels, accuracy and macro-F1, the
float model beside it. An artefact is served as it lies there: it says as much of texts as the directory it was made of,
and what the endpoint would not serve is refused. A masked language model embeds, so its head is left out.
"""

import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cluster.config import validate
from cluster.encoder_texts import TextReader, read_pooling, text_files
from cluster.errors import ConfigError, CorpusError, EvaluationFailed, ModelError
from cluster.model_directory import model_kind as use_of
from cluster.published import MANIFEST, publish_directory
from cluster.storage import LocalStorage
from cluster.unfinished import whole_directory
from jobs.quantization.config import QuantizationScheme, QuantizeConfig
from jobs.quantization.pairings import check_pairings, model_kind

logger = logging.getLogger(__name__)

SCHEMES: list[QuantizationScheme] = ["int8_weight_only", "int8_dynamic", "onnx_int8"]
"""What is made unless others are named."""
_BATCH_ROWS = 16
_REPEATS = 6
_READ_ROWS = 1024
"""Rows of a .parquet file that are read together."""
REPORT = "report.html"
"""Name of the page beside the artefacts."""


def quantize_encoder(
    model: str,
    into: Path,
    schemes: list[str],
    texts: list[str],
    labels: list[int] | None = None,
    threads: int = 1,
    report: Callable[[int, str], None] = lambda done, note: None,
) -> dict[str, dict[str, float]]:
    """Quantises an encoder in every scheme and measures each, and the float model, in fresh processes.

    Args:
        into: gets a directory for each scheme, once that was measured; one that is there from before is replaced then.
        texts: at least one; they are read as the endpoint reads them.
        labels: of a classifier's texts, from 0.
        report: is told how many models are done, and what is being worked on.

    Returns:
        By scheme, and for `float`: `bytes`, `batch_s` (median seconds of the first 16 texts, of `timings`; `_low` and
        `_high` are its 95 % interval), with labels those of `jobs.evaluating.classification`; of schemes those of
        `jobs.evaluating.similarity` for these texts too, and `reload_error`, the largest difference of an output
        relative to the largest. `report.html` in `into` has them for people.

    Raises:
        ConfigError: a scheme that no encoder has, a model that the endpoint would not embed or classify with, or a
            directory that is somebody else's.
        CorpusError: a text without tokens, or a label that the classifier does not have.
        ModelError: a directory that says of texts what is not supported, or too little.
        QuantizationFailed: an artefact that a fresh process reads otherwise.
        EvaluationFailed: a fresh process could not measure a model.
            After either, and after an interruption, nothing is left of that artefact, and what `into` had from before
            is there still.
    """
    from jobs.evaluating.similarity import similarity_figures
    from jobs.quantization.loading import read_config
    from jobs.quantize import check_reload

    config, asked = read_config(model), validate(QuantizeConfig, {"schemes": schemes}, "--scheme")
    directory, storage = Path(_located(model)), LocalStorage(into)
    _check_use(model, directory, config)
    check_pairings(asked, config, "--scheme")
    _check_labels(model, directory, config, labels)
    for scheme in asked.schemes:
        if (into / scheme).resolve() == directory.resolve():
            raise ConfigError(f"model {model} lies where its {scheme} would go: name another INTO")
        if storage.list(f"{scheme}/") and not storage.exists(f"{scheme}/{MANIFEST}"):
            raise ConfigError(
                f"{into / scheme} is there already and has no {MANIFEST}: remove it, or name another INTO"
            )
    rows = read_texts(directory, texts)
    try:
        into.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{into}: cannot be a directory ({error.strerror}): name another INTO") from error
    storage.sweep()
    report(0, "float: measuring")
    exact_figures, exact = _measure_elsewhere(directory, "float", rows, labels, threads)
    exact, measured = exact.float(), {"float": exact_figures}
    for done, scheme in enumerate(asked.schemes, start=1):
        report(done, f"{scheme}: quantising")
        with whole_directory(into / scheme) as artefact:
            found = make_artefact(directory, artefact, scheme, rows[:_BATCH_ROWS], threads)
            report(done, f"{scheme}: measuring")
            figures, outputs = _measure_elsewhere(artefact, scheme, rows, labels, threads)
            largest = float(found.abs().max())
            figures["reload_error"] = float((found.double() - outputs).abs().max()) / largest
            check_reload(scheme, figures, option="--scheme")
        lengths = [len(ids) for ids in rows[:_BATCH_ROWS]]
        measured[scheme] = {**figures, **similarity_figures(outputs.numpy(), exact.numpy(), lengths)}
    report(len(measured), "")
    _write_report(model, storage, measured, len(texts), threads)
    return measured


def _check_use(model: str, directory: Path, config: Any) -> None:
    """Raises `ConfigError` if what is made of a model would not be served as an encoder or a classifier, `ModelError`
    if the directory's pooling would not."""
    kind, use = model_kind(config), use_of(directory)
    if kind == "encoder_decoder":
        return  # `check_pairings` says why
    if use == "language_model" and kind != "encoder":
        raise ConfigError(
            f"model {model} is a {config.model_type} that generates: quantise it with `raystill quantize`"
        )
    if use == "language_model":
        raise ConfigError(
            f"model {model} is a {config.architectures[0]}, whose head the endpoint does not serve: give a classifier "
            "(…ForSequenceClassification), a …ForMaskedLM or an encoder without a head"
        )
    if kind == "conv1d_decoder":
        raise ConfigError(
            f"model {model} is a {config.model_type}, whose layers are Conv1D: of such models, only those that "
            "generate are quantised"
        )
    if use == "embeddings":
        read_pooling(directory)
    elif config.problem_type == "regression":
        raise ConfigError(
            f"model {model} has problem_type=regression: it has no labels to choose among, and is not served"
        )


def _check_labels(model: str, directory: Path, config: Any, labels: list[int] | None) -> None:
    if labels is None:
        return
    if use_of(directory) != "classifications":
        raise ConfigError(f"model {model} is no classifier, so labels say nothing of it: leave --label-column out")
    if (wrong := next((row for row, label in enumerate(labels) if label >= config.num_labels), None)) is not None:
        raise CorpusError(
            f"row {wrong}: its label is {labels[wrong]}, model {model} has the labels 0 to {config.num_labels - 1}; "
            "leave it out, or name another --label-column"
        )


def _write_report(
    model: str, storage: LocalStorage, measured: dict[str, dict[str, float]], num_texts: int, threads: int
) -> None:
    """A report that cannot be drawn is no reason to lose what was measured: it becomes a warning."""
    from jobs.evaluating.efficiency import machine
    from jobs.evaluating.encoder_report import render_encoder_report

    try:
        html = render_encoder_report(model, measured, num_texts, machine(threads, False))
    except Exception as error:
        logger.warning("%s was not written (%s: %s)", REPORT, type(error).__name__, error)
        return
    storage.write(REPORT, html.encode())


def make_artefact(
    directory: Path, artefact: Path, scheme: QuantizationScheme, rows: list[list[int]], threads: int
) -> Any:
    """Quantises an encoder and publishes it in an empty directory, with all that its own directory says of texts;
    returns what the artefact makes of rows of token ids (`EncoderScorer.outputs`)."""
    import transformers

    from cluster.pretrained import load_tokenizer
    from jobs.quantization.encoder_scorer import EncoderScorer

    with tempfile.TemporaryDirectory(prefix="raystill-quantize-") as name:
        path = Path(name)
        versions = {"transformers": transformers.__version__, **_maker(scheme)(str(directory), path)}
        load_tokenizer(str(directory)).save_pretrained(path)
        for file in text_files(directory):
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(directory / file, path / file)
        found = EncoderScorer(path, scheme, threads).outputs(rows)
        publish_directory(path, LocalStorage(artefact.parent), artefact.name, scheme=scheme, versions=versions)
    return found


def _maker(scheme: str) -> Any:
    from jobs.quantization import int8_dynamic, int8_weight_only, onnx_float32, onnx_int4, onnx_int8

    makers = (int8_dynamic, int8_weight_only, onnx_float32, onnx_int4, onnx_int8)
    modules = {item.__name__.rpartition(".")[2]: item for item in makers}
    return modules[scheme].quantize


def _located(model: str) -> str:
    from cluster.pretrained import check_model

    found = check_model(model)
    if not Path(found).is_dir():
        raise ModelError(f"model {model}: no such directory; an encoder is quantised from a directory")
    return found


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
    from jobs.evaluating.intervals import median_with_interval
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
    figures: dict[str, float] = {"bytes": model_bytes(asked["directory"]), "timings": _REPEATS}
    figures |= median_with_interval("batch_s", seconds)
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

    Args:
        label_column: None takes no labels.
        max_rows: the first so many are read, and no more of the file.

    Raises:
        CorpusError: the file or a column is not there, a text is none, or a label is no such number.
    """
    columns = [*dict.fromkeys(name for name in (text_column, label_column) if name is not None)]
    read = _parquet_rows if path.suffix == ".parquet" else _jsonl_rows
    rows = list(itertools.islice(read(path, columns), max_rows))
    if not rows:
        raise CorpusError(f"rows {path}: no rows in it")
    for number, row in enumerate(rows):
        if not _is_text(row[text_column]):
            raise CorpusError(
                f"rows {path}: row {number}: {text_column} holds {row[text_column]!r:.80}; expected a text"
            )
        label = 0 if label_column is None else row[label_column]
        if not isinstance(label, int) or isinstance(label, bool) or label < 0:
            raise CorpusError(
                f"rows {path}: row {number}: {label_column} holds {label!r:.80}; expected whole numbers from 0"
            )
    return [row[text_column] for row in rows], None if label_column is None else [row[label_column] for row in rows]


def _is_text(value: Any) -> bool:
    """Half of a surrogate pair can be written in JSON, and is no text."""
    return isinstance(value, str) and all(not "\ud800" <= letter <= "\udfff" for letter in value)


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(f"rows {path}", columns, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=_READ_ROWS, columns=columns):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise CorpusError(f"rows {path}: cannot be read ({str(error).splitlines()[0]})") from error


def _jsonl_rows(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.isspace():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise CorpusError(f"rows {path}: line {number} is not JSON ({error})") from error
                if not isinstance(row, dict):
                    raise CorpusError(f"rows {path}: line {number} is no JSON object")
                _check_columns(f"rows {path}: line {number}", columns, row)
                yield row
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"rows {path}: cannot be read ({error})") from error


def _check_columns(where: str, columns: list[str], found: Iterable[str]) -> None:
    if missing := [name for name in columns if name not in found]:
        raise CorpusError(f"{where}: no column {missing[0]!r}; found {', '.join(found)}")
