"""`report.html`: everything that was measured of a run, as one page that needs nothing but itself.

Made from the outputs of the stages, so it shows what is known so far: after `evaluate` the float models, after
`quantize` all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from cluster.config import fingerprint
from jobs.config import RunConfig
from jobs.evaluating import plots
from jobs.evaluating.plots import Point
from jobs.tables import in_order, size, title
from jobs.training.timing import PARTS

_ABSENT = "–"


@dataclass(frozen=True)
class Cell:
    """What stands in a table, and smaller below it what qualifies it."""

    text: str
    below: str = ""


@dataclass(frozen=True)
class ReportTable:
    """A table of the page: each row has a name and cells."""

    caption: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    notes: list[str]


def render_report(config: RunConfig, outputs: dict[str, dict[str, Any]], keys: dict[str, str]) -> str:
    """The page as HTML.

    Args:
        outputs: of the stages that are done, by name; those of `evaluate` and `quantize` have `models` and `details`.
        keys: of the stages.
    """
    measured = [outputs[stage] for stage in ("evaluate", "quantize") if "models" in outputs.get(stage, {})]
    models = {name: figures for output in measured for name, figures in output["models"].items()}
    models = {name: models[name] for name in in_order(models)}
    details = [output["details"] for output in measured]
    return render_page(
        config.name,
        _facts(config, outputs, keys, details),
        [_quality(models), _efficiency(models, details), *_compression(models), *_tasks(details)],
        _figures(models, outputs, details),
        config.model_dump(mode="json", by_alias=True),
    )


def render_page(
    name: str,
    facts: dict[str, str],
    tables: list[ReportTable],
    figures: Sequence[tuple[str, str, str]] = (),
    config: dict[str, Any] | None = None,
) -> str:
    """A page as HTML.

    Args:
        figures: heading, caption and SVG of each plot.
        config: all of its values, where the page is of a run.
    """
    template = files("jobs.evaluating").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        name=name,
        facts=facts,
        tables=tables,
        figures=[(heading, caption, Markup(svg)) for heading, caption, svg in figures],
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config is not None else None,
    )


def _facts(
    config: RunConfig, outputs: dict[str, dict[str, Any]], keys: dict[str, str], details: list[dict[str, Any]]
) -> dict[str, str]:
    prepared = outputs.get("prepare", {})
    prints = {
        "config": fingerprint(config.identity()),
        "corpus": prepared.get("fingerprint"),
        "tokenizer": prepared.get("tokenizer_fingerprint"),
        **{f"stage {stage}": keys.get(stage) for stage in ("teacher", "train", "evaluate", "quantize")},
    }
    return {
        "Measured": " and ".join(dict.fromkeys(part["measured_at"] for part in details)),
        **machine_facts([part["machine"] for part in details]),
        "Storage": config.storage,
        "Fingerprints": ", ".join(f"{name} {value}" for name, value in prints.items() if value is not None),
    }


_HARDWARE = ("processor", "gpu", "system")


def machine_facts(machines: list[dict[str, str]]) -> dict[str, str]:
    """What computed, each machine once, and with which versions; those of the first."""
    versions = [f"{part} {found}" for part, found in machines[0].items() if part not in (*_HARDWARE, "threads")]
    named = [
        f"{', '.join(found[part] for part in _HARDWARE if part in found)}; {found['threads']} threads"
        for found in machines
    ]
    return {"Machine": " and ".join(dict.fromkeys(named)), "Versions": ", ".join(versions)}


# --- tables -----------------------------------------------------------------------------------------------------------


def _quality(models: dict[str, dict[str, Any]]) -> ReportTable:
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "bits per byte": ("bits_per_byte", lambda value: f"{value:.4f}"),
        "perplexity": ("perplexity", lambda value: f"{value:,.2f}"),
        "KL to the teacher, nats": ("kl_to_teacher", lambda value: f"{value:.4f}"),
        "agreement": ("agreement", lambda value: f"{value:.2%}"),
    }
    rows = []
    for name, figures in models.items():
        cells = [Cell(f"{figures['positions']:,} tokens", f"{figures['rows']:,} rows")]
        for figure, write in columns.values():
            cells.append(interval_cell(figures, figure, write))
        rows.append((title(name), cells))
    return ReportTable(
        "Quality on held-out text",
        ["model", "sample", *columns],
        rows,
        [
            "Below each figure its 95 % interval: percentile bootstrap over rows. Models read the same rows, so two of "
            "them can differ for certain although their intervals overlap.",
            "Bits per byte: negative log-likelihood over the UTF-8 bytes of the predicted text, comparable between "
            "tokenizers. Perplexity is per token. KL divergence of the model from the teacher and agreement of the "
            "most likely token: means over predicted tokens, against the teacher's logits formed anew.",
        ],
    )


def _efficiency(models: dict[str, dict[str, Any]], details: list[dict[str, Any]]) -> ReportTable:
    batches = {key.removeprefix("tokens_per_s_batch_") for figures in models.values() for key in figures}
    sizes = sorted(int(number) for number in batches if number.isdigit())
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "parameters": ("parameters", lambda value: f"{value:,}"),
        "on disk": ("bytes", size),
        "peak memory": ("peak_memory_bytes", size),
        "FLOPs per token": ("flops_per_token", _si),
        "first token, ms": ("first_token_s", lambda value: f"{1000 * value:.1f}"),
        "next token, ms": ("token_s", lambda value: f"{1000 * value:.2f}"),
        **{
            f"tokens/s, batch {number}": (f"tokens_per_s_batch_{number}", lambda value: f"{value:,.0f}")
            for number in sizes
        },
        "J per token": ("joules_per_token", lambda value: f"{value:.3g}"),
    }
    reasons = {name: why for part in details for name, why in part["absent"].items()}
    notes: list[str] = []
    rows = []
    for name, figures in models.items():
        cells = [Cell(f"{figures['timings']} timings" if "timings" in figures else _ABSENT)]
        for column, (figure, write) in columns.items():
            if figure in figures:
                cells.append(interval_cell(figures, figure, write))
                continue
            why = f"{column}: absent, {reasons.get(name, {}).get(figure, 'not measured')}"
            notes += [why] if why not in notes else []
            cells.append(Cell(f"{_ABSENT} [{notes.index(why) + 1}]"))
        rows.append((title(name), cells))
    base = max((figures["base_memory_bytes"] for figures in models.values()), default=0)
    prompt = max((figures["prompt_tokens"] for figures in models.values()), default=0)
    said = [
        "Each model in a process of its own that did nothing else. Times and tokens/s are medians of so many timings; "
        "below each its 95 % interval, whose ends are timings by rank (none for fewer than 6). Peak memory is the "
        f"whole process, of which up to {size(base)} are there before the model (Python and its libraries).",
        f"First token: from a prompt of {prompt} tokens to the first new one; next token: one sequence, greedy, with a "
        "cache of keys and values (an ONNX graph without one reads the sequence anew). Tokens/s: held-out rows scored, "
        "loss included, that many rows at once.",
        "FLOPs: of a row read as one sequence, a multiplication and an addition being two. Energy: what the hardware "
        "counts while rows are scored, everything else on it included.",
    ]
    return ReportTable(
        "Size, memory and speed",
        ["model", "sample", *columns],
        rows,
        [*(f"[{n}] {why}" for n, why in enumerate(notes, 1)), *said],
    )


def interval_cell(figures: dict[str, Any], figure: str, write: Callable[[float], str]) -> Cell:
    """A figure, and smaller below it the ends of its interval, as far as they are known."""
    ends = [write(figures[f"{figure}{end}"]) for end in ("_low", "_high") if f"{figure}{end}" in figures]
    return Cell(write(figures[figure]) if figure in figures else _ABSENT, " to ".join(ends))


def _compression(models: dict[str, dict[str, Any]]) -> list[ReportTable]:
    """Beside the teacher; nothing without one."""
    if "teacher" not in models:
        return []
    tasks = [key for key in models["teacher"] if key.endswith("/retention_percent")]
    columns = {
        "fewer parameters": ("parameter_ratio", "{:.2f} ×"),
        "smaller on disk": ("size_ratio", "{:.2f} ×"),
        "quality kept": ("retention_percent", "{:.1f} %"),
        **{f"kept of {key.split('/')[1]}": (key, "{:.1f} %") for key in tasks},
    }
    rows = [
        (
            title(name),
            [Cell(text.format(figures[key]) if key in figures else _ABSENT) for key, text in columns.values()],
        )
        for name, figures in models.items()
    ]
    notes = [
        "Quality kept: the teacher's bits per byte as a percentage of the model's; 100 % predicts held-out text as "
        "well as the teacher. Of a task: accuracy above chance as a percentage of the teacher's.",
    ]
    return [ReportTable("Compared with the teacher", ["model", *columns], rows, notes)]


def _tasks(details: list[dict[str, Any]]) -> list[ReportTable]:
    """A table for each task: subjects below each other, models side by side."""
    by_task: dict[str, dict[str, Any]] = {}
    for part in details:
        for task, of_models in part["tasks"].items():
            by_task.setdefault(task, {}).update(of_models)
    tables = []
    for task, of_models in by_task.items():
        names = in_order(of_models)
        first = of_models[names[0]]
        rows = []
        for subject, score in first.items():
            cells = [Cell(f"{score['questions']:,}"), Cell(f"{score['chance']:.1%}")]
            for name in names:
                plain, normed = (_with_error(of_models[name][subject], metric) for metric in ("acc", "acc_norm"))
                cells.append(Cell(plain, f"norm {normed}"))
            rows.append((subject.replace("_", " ") if subject else "all", cells))
        notes = [
            "Accuracy (acc): the answer of the highest log-likelihood; norm (acc_norm): of the highest log-likelihood "
            "per character. With standard errors. Asked and counted by lm-eval."
        ]
        columns = ["subject", "questions", "chance", *map(title, names)]
        tables.append(ReportTable(f"Multiple choice: {task}", columns, rows, notes))
    return tables


def _with_error(score: dict[str, float], metric: str) -> str:
    error = score.get(f"{metric}_stderr")
    return f"{score[metric]:.1%}" + (f" ± {error:.1%}" if error is not None else "")


def _si(value: float) -> str:
    for unit in ("", " k", " M", " G", " T"):
        if value < 1000 or unit == " T":
            return f"{value:.3g}{unit}"
        value /= 1000
    return ""


# --- plots ------------------------------------------------------------------------------------------------------------


def _figures(
    models: dict[str, dict[str, Any]], outputs: dict[str, dict[str, Any]], details: list[dict[str, Any]]
) -> list[tuple[str, str, str]]:
    """Heading, caption and SVG of each plot for which there are figures."""
    trained = outputs.get("train", {})
    out = []
    caption = "Bars are 95 % intervals. Down and to the left is better."
    for name, figure, unit, scale in (
        ("size", "bytes", "size on disk, MB", 1e6),
        ("latency", "token_s", "time for the next token, ms", 1e-3),
    ):
        points = [
            Point(
                title(model),
                figures[figure] / scale,
                figures["bits_per_byte"],
                figures.get("bits_per_byte_low"),
                figures.get("bits_per_byte_high"),
            )
            for model, figures in models.items()
        ]
        heading = f"Quality against {name}"
        out.append((heading, caption, plots.scatter(name, points, unit, "bits per byte (less is better)", heading)))
    curves = {name: parts for part in details for name, parts in part["agreement_by_position"].items()}
    if curves:
        svg = plots.by_position({title(name): curves[name] for name in in_order(curves)})
        caption = "Share of tokens whose most likely prediction is the teacher's, by their place in the held-out rows."
        out.append(("Agreement by place in the row", caption, svg))
    if trained.get("losses"):
        teacher = details[0].get("teacher_bits_per_byte_in_training")
        named = {"against the text": "cross_entropies", "against the teacher": "divergences"}
        parts = {name: trained[key] for name, key in named.items() if trained.get(key)}
        svg = plots.training(trained["losses"], parts, trained.get("validation", []), teacher)
        caption = (
            "The loss is the objective of the training, its parts the cross-entropy of the text and the divergence "
            "from the teacher before they are weighted; bits per byte are of the held-out rows that it looked at."
        )
        out.append(("Training of the student", caption, svg))
    if sum(trained.get("parts_s", {}).values()):
        parts = {name: trained["parts_s"].get(name, 0.0) for name in PARTS}
        caption = f"Of {trained['train_s']:,.0f} s of training; wait is for the teacher."
        out.append(("Where the time went", caption, plots.shares(parts)))
    return out
