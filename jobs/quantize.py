"""From a float student to quantised artefacts: made in one process, reloaded and compared in another.

An artefact that does not give the same logits after a reload is refused here, before anything registers it.
"""

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import QuantizationFailed
from cluster.pretrained import load_tokenizer, locate
from cluster.published import publish_directory
from cluster.storage import open_storage

RELOAD_TOLERANCE = 1e-5
"""Largest difference of a logit between the process that made an artefact and a fresh one, relative to the largest."""


def make_artefacts(
    student: str,
    schemes: list[str],
    storage_uri: str,
    prefix: str,
    store_prefix: str,
    threads: int,
    board: Any,
) -> dict[str, dict[str, str]]:
    """Quantises a student in every scheme and publishes each below `prefix`; a Ray task.

    Returns:
        By scheme, `{"uri", "probe"}`: the published directory, and logits of one held-out row for the comparison.
    """
    import transformers

    from jobs.evaluating.scorers import load_scorer
    from jobs.quantization import int8_weight_only, onnx_int8
    from jobs.training.data import ExampleStore, collate

    makers = {"int8_weight_only": int8_weight_only.quantize, "onnx_int8": onnx_int8.quantize}
    storage = open_storage(storage_uri)
    store = ExampleStore(storage, store_prefix, "validation")
    directory = locate(student)
    out = {}
    for number, scheme in enumerate(schemes):
        board.report.remote(number, {"model": scheme})
        with tempfile.TemporaryDirectory(prefix="raystill-quantize-") as name:
            path = Path(name)
            versions = makers[scheme](directory, path)
            load_tokenizer(directory).save_pretrained(path)
            logits = load_scorer(name, scheme, threads).logits(collate([store.row(0)])).numpy()
            publish_directory(
                path,
                storage,
                f"{prefix}/{scheme}",
                scheme=scheme,
                versions={"transformers": transformers.__version__, **versions},
            )
        buffer = io.BytesIO()
        np.save(buffer, logits, allow_pickle=False)
        storage.write(f"{prefix}/{scheme}-probe.npy", buffer.getvalue())
        out[scheme] = {"uri": f"{storage.uri}/{prefix}/{scheme}", "probe": f"{storage.uri}/{prefix}/{scheme}-probe.npy"}
    return out


def check_reload(scheme: str, measured: dict[str, Any]) -> None:
    """Raises `QuantizationFailed` if a fresh process computed something else."""
    error = measured["reload_error"]
    if not error <= RELOAD_TOLERANCE:
        raise QuantizationFailed(
            f"scheme {scheme}: reloaded in a fresh process, a logit differs by {error:.3g} (allowed "
            f"{RELOAD_TOLERANCE:g}); the artefact is not registered: leave the scheme out of quantize.schemes"
        )
