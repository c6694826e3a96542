"""Held-out quality, size and speed of models, loaded from their directories in a process that did not make them.

One measure for all: float teacher and student, torchao and ONNX artefacts. Speed is what scoring the held-out rows
takes here and now, heads included; it is never inferred from bit widths.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cluster.errors import ModelError
from cluster.published import localize
from cluster.storage import open_storage
from jobs.config import EvaluateConfig


@dataclass(frozen=True)
class Measured:
    """One row of the table."""

    parameters: int
    bytes: int
    bits_per_byte: float
    tokens_per_s: float


class Scorer(Protocol):
    """A loaded model that can score text."""

    parameters: int

    def score(self, batch: Any) -> Any:
        """The `jobs.scoring.TextScore` of a micro-batch."""

    def logits(self, batch: Any) -> Any:
        """Logits [N, V], float32, of a micro-batch's scored positions."""


def load_scorer(model: str, scheme: str, threads: int) -> Scorer:
    """Loads a model directory by its scheme: `float`, `int8_weight_only` or `onnx_int8`."""
    if scheme == "onnx_int8":
        from jobs.quantization.onnx_int8 import OnnxScorer

        return OnnxScorer(localize(model), threads)
    from jobs.quantization.torch_scorer import TorchScorer

    return TorchScorer(model, threads)


def measure(
    model: str,
    scheme: str,
    store_uri: str,
    store_prefix: str,
    config: EvaluateConfig,
    threads: int,
    report: Callable[[int], None],
) -> Measured:
    """Scores the first rows of the validation split. `report` gets the number of rows done."""
    from jobs.scoring import TextScore
    from jobs.training.data import ExampleStore, collate

    scorer = load_scorer(model, scheme, threads)
    store = ExampleStore(open_storage(store_uri), store_prefix, "validation")
    num_rows = min(len(store), config.max_rows)
    batches = [
        collate([store.row(index) for index in range(start, min(start + config.batch_rows, num_rows))])
        for start in range(0, num_rows, config.batch_rows)
    ]
    scorer.score(batches[0])  # warm-up: first calls allocate and choose kernels
    total, rows = TextScore(), 0
    started = time.perf_counter()
    for batch in batches:
        total += scorer.score(batch)
        rows += len(batch.row_ids)
        report(rows)
    seconds = time.perf_counter() - started
    if not math.isfinite(total.bits_per_byte):
        raise ModelError(f"model {model} ({scheme}): its loss on held-out text is {total.nats}: train it anew")
    return Measured(
        parameters=scorer.parameters,
        bytes=model_bytes(model),
        bits_per_byte=total.bits_per_byte,
        tokens_per_s=sum(len(batch.token_ids) for batch in batches) / seconds,
    )


def model_bytes(model: str) -> int:
    """Size on disk of a model's weights."""
    from cluster.pretrained import locate

    directory = Path(locate(model))
    if not directory.is_dir():
        from huggingface_hub import snapshot_download

        directory = Path(snapshot_download(str(directory), local_files_only=True))
    files = [path for pattern in ("*.safetensors", "*.onnx", "*.onnx.data") for path in directory.glob(pattern)]
    return sum(path.stat().st_size for path in files)


def evaluate_models(
    models: dict[str, str], store_uri: str, store_prefix: str, config: EvaluateConfig, threads: int, board: Any
) -> dict[str, dict[str, Any]]:
    """Measures float models by name; a Ray task."""
    return {
        name: vars(measure(model, "float", store_uri, store_prefix, config, threads, _reporter(board, name)))
        for name, model in models.items()
    }


def check_and_measure(
    artefacts: dict[str, dict[str, str]],
    store_uri: str,
    store_prefix: str,
    config: EvaluateConfig,
    threads: int,
    board: Any,
) -> dict[str, dict[str, Any]]:
    """Reloads quantised artefacts in this fresh process, compares their logits with those that the process which made
    them recorded, and measures them; a Ray task.

    Args:
        artefacts: by scheme, `{"uri", "probe"}`: the published directory and the recorded logits (.npy object).

    Returns:
        By scheme, the measures and `reload_error`: the largest difference of a logit, relative to the largest one.
    """
    from cluster.storage import split_uri
    from jobs.training.data import ExampleStore, collate

    out = {}
    for scheme, artefact in artefacts.items():
        store = ExampleStore(open_storage(store_uri), store_prefix, "validation")
        probe_storage, probe_key = split_uri(artefact["probe"])
        expected = _load_array(probe_storage.read(probe_key))
        found = load_scorer(artefact["uri"], scheme, threads).logits(collate([store.row(0)])).numpy()
        same_shape = found.shape == expected.shape
        error = float(np.abs(found - expected).max() / np.abs(expected).max()) if same_shape else float("inf")
        measured = measure(artefact["uri"], scheme, store_uri, store_prefix, config, threads, _reporter(board, scheme))
        out[scheme] = {**vars(measured), "reload_error": error}
    return out


def _reporter(board: Any, name: str) -> Callable[[int], None]:
    return lambda rows: board.report.remote(rows, {"model": name})


def _load_array(data: bytes) -> np.ndarray:
    import io

    return np.load(io.BytesIO(data), allow_pickle=False)
