"""From a float student to quantised artefacts: made in one process, reloaded and compared in another.

An artefact that does not give the same logits after a reload is refused here, before anything registers it.
"""

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.errors import QuantizationFailed
from cluster.pretrained import load_tokenizer, locate
from cluster.published import publish_directory
from cluster.storage import open_storage
from jobs.quantization.config import QuantizationScheme, QuantizeConfig
from jobs.quantization.pairings import check_pairings

if TYPE_CHECKING:
    from jobs.quantization.int4_qat import QatPlan

RELOAD_TOLERANCE = 1e-5
"""Largest difference of a logit between the process that made an artefact and a fresh one on another processor,
relative to the largest."""


def make_artefacts(
    student: str,
    config: QuantizeConfig,
    qat: "QatPlan | None",
    storage_uri: str,
    prefix: str,
    store_prefix: str,
    threads: int,
    board: Any,
) -> dict[str, dict[str, str]]:
    """Quantises a student in every scheme and publishes each below `prefix`; a Ray task.

    Args:
        qat: what `int4_qat` learns from, if it is among the schemes.

    Returns:
        By scheme, `{"uri", "probe", "processor"}`: the published directory, logits of one held-out row for the
        comparison, and what computed them.

    Raises:
        ConfigError: a scheme that this student or this machine cannot have, before anything is made.
    """
    import torch
    import transformers

    from jobs.evaluating.efficiency import machine
    from jobs.evaluating.scorers import load_scorer
    from jobs.quantization.loading import read_config
    from jobs.training.data import ExampleStore, collate

    storage = open_storage(storage_uri)
    store = ExampleStore(storage, store_prefix, "validation")
    directory = locate(student)
    check_pairings(config, read_config(student))
    torch.set_num_threads(threads)
    processor = machine(threads, False)["processor"]
    out: dict[str, dict[str, str]] = {}
    for number, scheme in enumerate(config.schemes):

        def report(note: str, number: int = number, scheme: str = scheme) -> None:
            board.report.remote(number, {"model": f"{scheme} {note}".strip()})

        report("")
        with tempfile.TemporaryDirectory(prefix="raystill-quantize-") as name:
            path = Path(name)
            versions = _make(scheme, directory, path, config, qat, (storage_uri, store_prefix), report)
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
        place = f"{storage.uri}/{prefix}/{scheme}"
        out[scheme] = {"uri": place, "probe": f"{place}-probe.npy", "processor": processor}
    return out


def _make(
    scheme: QuantizationScheme,
    student: str,
    directory: Path,
    config: QuantizeConfig,
    qat: "QatPlan | None",
    store: tuple[str, str],
    report: Callable[[str], None],
) -> dict[str, str]:
    """Writes one artefact to a directory; returns the versions that made it."""
    from jobs.quantization import (
        compressed_tensors,
        int4_qat,
        int8_dynamic,
        int8_weight_only,
        onnx_float32,
        onnx_int4,
        onnx_int8,
    )

    if scheme == "int4_qat":
        assert qat is not None, "the stage plans the training that its schemes ask for"
        steps = qat.config.steps
        return int4_qat.quantize(
            student, directory, qat, lambda step, loss: report(f"step {step}/{steps}, loss {loss:.3f}")
        )
    if scheme == "compressed_tensors_w4a16":
        python = str(config.llmcompressor_python)
        return compressed_tensors.quantize(student, directory, python, *store, config.calibration_rows)
    makers = {
        "int8_weight_only": int8_weight_only.quantize,
        "int8_dynamic": int8_dynamic.quantize,
        "onnx_float32": onnx_float32.quantize,
        "onnx_int8": onnx_int8.quantize,
        "onnx_int4": onnx_int4.quantize,
    }
    return makers[scheme](student, directory)


def check_reload(
    scheme: str, measured: dict[str, Any], same_processor: bool = True, option: str = "quantize.schemes"
) -> None:
    """Raises `QuantizationFailed` if a fresh process computed something else: anything at all on the processor that
    made the artefact, more than rounding on another one."""
    error, allowed = measured["reload_error"], 0.0 if same_processor else RELOAD_TOLERANCE
    if not error <= allowed:
        raise QuantizationFailed(
            f"scheme {scheme}: reloaded in a fresh process, a logit differs by {error:.3g} (allowed "
            f"{allowed:g}); the artefact is not registered: leave the scheme out of {option}"
        )
