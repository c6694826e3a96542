"""Quality, size and speed of models, loaded from their directories in processes that did not make them.

One measure for all: float teacher and student, torchao and ONNX artefacts. Both `evaluate` and `quantize` come here.
Each model's speed and memory are taken in a process of its own (`jobs.evaluating.efficiency`), before this one loads
them all; then they read the same held-out rows side by side with the teacher (`quality`), and answer the questions
(`multiple_choice`). Nothing is inferred from bit widths.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from cluster.errors import ModelError
from cluster.storage import open_storage, split_uri
from jobs.config import EvaluateConfig
from jobs.evaluating.questions import Questions
from jobs.evaluating.scorers import Scorer, load_scorer, model_bytes

TEACHER = "teacher"
Report = Callable[[int, str], None]
"""Gets the number of rows done, and a note."""


@dataclass(frozen=True)
class EvaluationPlan:
    """What to measure, on what.

    Args:
        models: by name, `(directory, scheme)`.
        teacher: the model that all others are compared with; if it is to be measured too, it is also among `models`,
            as "teacher".
        storage, store: root and prefix of the example store; its validation split is read.
        tokenizer: of all models; needed for questions only.
        threads: of each process that computes.
        validation_rows: those that the training of the student looked at.
    """

    models: dict[str, tuple[str, str]]
    teacher: str | None
    storage: str
    store: str
    config: EvaluateConfig
    threads: int
    validation_rows: int = 0
    tokenizer: str = ""
    questions: list[Questions] = field(default_factory=list)


def measure(plan: EvaluationPlan, report: Report) -> dict[str, Any]:
    """All figures of all models.

    Returns:
        `{"models", "details"}`: by model, numbers for the table; and what only the report shows, as JSON values: when
        and where it was measured, what is absent and why, agreement by position, scores by subject.

    Raises:
        ModelError: a model whose loss is not finite.
        EvaluationFailed: a model that could not be measured.
    """
    from jobs.evaluating.efficiency import measure_efficiency
    from jobs.training.data import ExampleStore

    config = plan.config
    store = ExampleStore(open_storage(plan.storage), plan.store, "validation")
    rows = [store.row(index) for index in range(min(len(store), config.max_rows))]
    models: dict[str, dict[str, Any]] = {}
    details: dict[str, Any] = {"measured_at": datetime.now(UTC).isoformat(timespec="seconds"), "absent": {}}
    for name, (model, scheme) in plan.models.items():
        report(0, f"{name}: speed and memory")
        found = measure_efficiency(model, scheme, rows[: max(config.speed_batches)], config, plan.threads)
        models[name] = {**found.figures, "bytes": model_bytes(model)}
        details["absent"][name] = found.absent
        details["machine"] = {**details.get("machine", {}), **found.machine}  # a GPU, if any of them used it
    scorers = {name: load_scorer(*place, plan.threads) for name, place in plan.models.items()}
    _measure_quality(plan, scorers, rows, models, details, report)
    details["tasks"] = _ask_all(plan, scorers, rows, report) if plan.questions else {}
    for task, of_models in details["tasks"].items():
        for name, by_subject in of_models.items():
            models[name] |= {f"task/{task}/{what}": value for what, value in by_subject[""].items()}
    return {"models": models, "details": details}


def _measure_quality(
    plan: EvaluationPlan,
    scorers: dict[str, Scorer],
    rows: list[Any],
    models: dict[str, dict[str, Any]],
    details: dict[str, Any],
    report: Report,
) -> None:
    """Adds what held-out rows say to `models` and `details`. The teacher's logits are formed anew for every batch."""
    from jobs.evaluating.quality import RowSums, agreement_by_position, chunk_rows, compare, quality_figures
    from jobs.training.data import collate

    config = plan.config
    every = dict(scorers)
    if plan.teacher is not None and TEACHER not in every:
        every[TEACHER] = load_scorer(plan.teacher, "float", plan.threads)
    teacher = TEACHER if plan.teacher is not None else None
    size = chunk_rows([scorer.vocab_size for scorer in every.values()])
    sums = {name: RowSums(has_teacher=teacher not in (None, name)) for name in scorers}
    for first in range(0, len(rows), config.batch_rows):
        together = rows[first : first + config.batch_rows]
        batch = collate(together)
        chunks = {name: scorer.logit_chunks(batch, size) for name, scorer in every.items()}
        scores = compare(chunks, teacher, batch.targets)
        for name, of_model in sums.items():
            of_model.add(scores[name], batch, together)
        report(first + len(together), "quality")
    details["agreement_by_position"] = {}
    for name, of_model in sums.items():
        model, scheme = plan.models[name]
        try:
            models[name] |= quality_figures(of_model, config.resamples, config.seed)
        except ValueError as error:
            raise ModelError(f"model {model} ({scheme}): {error} on held-out text: train it anew") from error
        if of_model.has_teacher:
            details["agreement_by_position"][name] = agreement_by_position(of_model)
    if TEACHER in sums and plan.validation_rows in range(1, config.max_rows + 1):
        details["teacher_bits_per_byte_in_training"] = sums[TEACHER].bits_per_byte(plan.validation_rows)


def _ask_all(
    plan: EvaluationPlan, scorers: dict[str, Scorer], rows: list[Any], report: Report
) -> dict[str, dict[str, Any]]:
    """By task and model, the scores by subject."""
    from cluster.pretrained import load_tokenizer
    from jobs.evaluating.multiple_choice import ask

    tokenizer, num_rows = load_tokenizer(plan.tokenizer), len(rows)
    batch_tokens = plan.config.batch_rows * len(rows[0].token_ids)

    def follow(task: str, name: str) -> Callable[[int, int], None]:
        return lambda done, total: report(num_rows, f"{task}: {name} {done}/{total}")

    return {
        item.task.name: {
            name: ask(item, scorer, tokenizer, batch_tokens, plan.config.seed, follow(item.task.name, name))
            for name, scorer in scorers.items()
        }
        for item in plan.questions
    }


def evaluate_models(plan: EvaluationPlan, board: Any) -> dict[str, Any]:
    """`measure` as a Ray task."""
    return measure(plan, _reporter(board))


def check_and_measure(plan: EvaluationPlan, probes: dict[str, str], board: Any) -> dict[str, Any]:
    """Reloads quantised artefacts in this fresh process, compares their logits with those that the process which made
    them recorded, and measures them; a Ray task.

    Args:
        probes: by name, the recorded logits (URI of a .npy object).

    Returns:
        As `measure`, with `reload_error` among the figures: the largest difference of a logit, relative to the largest
        one.
    """
    from jobs.training.data import ExampleStore, collate

    store = ExampleStore(open_storage(plan.storage), plan.store, "validation")
    errors = {}
    for name, (model, scheme) in plan.models.items():
        probe_storage, probe_key = split_uri(probes[name])
        expected = _load_array(probe_storage.read(probe_key))
        found = load_scorer(model, scheme, plan.threads).logits(collate([store.row(0)])).numpy()
        same_shape = found.shape == expected.shape
        errors[name] = float(np.abs(found - expected).max() / np.abs(expected).max()) if same_shape else float("inf")
    out = measure(plan, _reporter(board))
    for name, error in errors.items():
        out["models"][name]["reload_error"] = error
    return out


def _reporter(board: Any) -> Report:
    """Reports to the board, twice a second at most."""
    last = 0.0

    def report(rows: int, note: str) -> None:
        nonlocal last
        if time.monotonic() - last >= 0.5:
            last = time.monotonic()
            board.report.remote(rows, {"model": note})

    return report


def _load_array(data: bytes) -> np.ndarray:
    import io

    return np.load(io.BytesIO(data), allow_pickle=False)
