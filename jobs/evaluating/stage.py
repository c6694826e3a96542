"""The stages that measure models: what they measure, what decides it, and the report that both write anew."""

import logging
from typing import Any

from cluster.resources import physical_cores
from jobs.evaluate import TEACHER, EvaluationPlan, check_and_measure, evaluate_models
from jobs.evaluating.compression import with_compression
from jobs.evaluating.questions import questions_fingerprint, read_questions
from jobs.progress import Bar
from jobs.stage import Output, Run
from jobs.tasks import run_task

logger = logging.getLogger(__name__)

REPORT = "report.html"
"""Key below the storage root, and name of the artefact in MLflow."""


def evaluation_identity(run: Run) -> list[Any]:
    """What decides the figures, besides the models and the corpus: the config, and what the files of questions hold."""
    config = run.config.evaluate
    return [config.identity(), questions_fingerprint(read_questions(config))]


def evaluate(run: Run, bar: Bar) -> Output:
    """Measures the teacher, if there is one, and the student."""
    of_teacher = {TEACHER: run.teacher_model} if run.teacher_model is not None else {}
    models = {**of_teacher, "student": str(run.outputs["train"]["model"])}
    plan = _plan(run, {name: (model, "float") for name, model in models.items()})
    measured = run_task(evaluate_models, plan, bar=bar, total=_num_rows(run))
    figures = with_compression(measured["models"], measured["models"].get(TEACHER))
    return with_report(run, "evaluate", {"models": figures, "details": measured["details"]})


def evaluate_artefacts(run: Run, artefacts: dict[str, dict[str, str]], bar: Bar) -> Output:
    """Measures quantised students, reloaded in a fresh process.

    Args:
        artefacts: by scheme, `{"uri", "probe"}`.
    """
    plan = _plan(run, {f"student_{scheme}": (artefact["uri"], scheme) for scheme, artefact in artefacts.items()})
    probes = {f"student_{scheme}": artefact["probe"] for scheme, artefact in artefacts.items()}
    measured = run_task(check_and_measure, plan, probes, bar=bar, total=_num_rows(run))
    teacher = run.outputs["evaluate"]["models"].get(TEACHER)
    return {"models": with_compression(measured["models"], teacher), "details": measured["details"]}


def measured_by(run: Run, stage: str) -> dict[str, dict[str, Any]]:
    """Figures by model, each with the `machine` that took them, as a manifest keeps and the gate reads them."""
    output = run.outputs[stage]
    return {name: {**figures, "machine": output["details"]["machine"]} for name, figures in output["models"].items()}


def with_report(run: Run, stage: str, output: Output) -> Output:
    """The output of a stage that measured, after the report was written anew with it.

    A report that cannot be drawn is no reason to lose what was measured: it becomes a warning.
    """
    from jobs.evaluating.report import render_report

    try:
        html = render_report(run.config, {**run.outputs, stage: output}, run.keys)
    except Exception as error:
        logger.warning(
            "%s was not written (%s: %s); the figures are in summary.json", REPORT, type(error).__name__, error
        )
        return output
    run.storage.write(REPORT, html.encode())
    if run.tracker is not None:
        run.tracker.text(html, REPORT)
    return {**output, "report": f"{run.storage.uri}/{REPORT}"}


def _plan(run: Run, models: dict[str, tuple[str, str]]) -> EvaluationPlan:
    return EvaluationPlan(
        models=models,
        teacher=run.teacher_model,
        storage=run.storage.uri,
        store=run.store_prefix,
        config=run.config.evaluate,
        threads=physical_cores(),
        validation_rows=run.config.train.validation_rows,
        tokenizer=run.tokenizer,
        questions=read_questions(run.config.evaluate),
    )


def _num_rows(run: Run) -> int:
    return min(run.config.evaluate.max_rows, int(run.outputs["prepare"]["rows"]["validation"]))
