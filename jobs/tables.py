"""The tables that a person reads at the end: models side by side, and the stages of a run."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs.ledger import STAGES
from jobs.training.timing import PARTS

_TITLES = {
    "teacher": "teacher",
    "student": "student",
    "student_int8_weight_only": "student int8 (torchao)",
    "student_onnx_int8": "student int8 (ONNX)",
}


_COLOURS = {"done": "green", "failed": "red", "interrupted": "yellow", "started": "yellow"}


def models_table(summary: dict[str, Any]) -> Table:
    """Parameters, size on disk, held-out bits per byte and scoring speed of every model."""
    table = Table(title=f"{summary['name']}: models", title_justify="left")
    table.add_column("model")
    for column in ("parameters", "on disk", "bits per byte", "tokens/s"):
        table.add_column(column, justify="right")
    for name in sorted(summary["models"], key=lambda item: list(_TITLES).index(item) if item in _TITLES else 99):
        row = summary["models"][name]
        table.add_row(
            _TITLES.get(name, escape(name)),
            f"{row['parameters']:,}",
            size(row["bytes"]),
            f"{row['bits_per_byte']:.4f}",
            f"{row['tokens_per_s']:,.0f}",
        )
    return table


def stages_table(summary: dict[str, Any]) -> Table:
    """Status and seconds of every stage, with training's main figures."""
    table = Table(title=escape(f"{summary['name']}: stages in {summary['storage']}"), title_justify="left")
    table.add_column("stage")
    table.add_column("status")
    table.add_column("seconds", justify="right")
    table.add_column("what came out")
    for name in sorted(summary["stages"], key=STAGES.index):
        stage = summary["stages"][name]
        colour = _COLOURS.get(stage["status"], "dim")
        table.add_row(name, f"[{colour}]{stage['status']}[/]", f"{stage['seconds']:.1f}", escape(_note(stage)))
    return table


def _note(stage: dict[str, Any]) -> str:
    if "message" in stage:
        return str(stage["message"])
    if stage.get("losses"):
        note = f"{stage['rows']:,} rows, {stage['tokens_per_s']:,.0f} tokens/s, loss {stage['losses'][-1]:.3f}"
        if stage.get("teacher_calls"):
            note += f", {stage['teacher_calls']:,} teacher calls, waited {stage['teacher_wait_s']:.1f} s"
        if stage.get("labelled_rows"):
            note += f", {stage['labelled_rows']:,} rows from labels"
        return "\n".join([note, *_where_it_goes(stage)])
    if "documents" in stage:
        return f"{stage['documents']:,} documents, {stage['rows']['train']:,} + {stage['rows']['validation']:,} rows"
    if "labelled" in stage:
        return f"{stage['labelled']:,} of {stage['rows']:,} rows labelled now, {size(stage['size_bytes'])} in all"
    if "champion" in stage:
        return f"version {stage['champion']['version']} was made champion of {stage['champion']['model_name']}"
    if "answer" in stage:
        return f"{stage['question']!r} → {stage['answer']!r}"
    return ""


def _where_it_goes(stage: dict[str, Any]) -> list[str]:
    """Time and bytes; a record of an older version does not have them all."""
    lines = []
    if stage.get("teacher_tokens_per_s"):
        per_replica, size_b = stage["teacher_tokens_per_s"], stage["signal_bytes_per_position"]
        lines.append(f"a replica scored {per_replica:,.0f} tokens/s, {size_b:,.0f} bytes per position")
    if "store_read_bytes" in stage:
        read, written, retries = (stage[f"store_{what}"] for what in ("read_bytes", "written_bytes", "retries"))
        lines.append(f"storage: {size(read)} read, {size(written)} written, {retries:,} attempts repeated")
    parts_s = stage.get("parts_s", {})
    if total := sum(parts_s.values()):
        lines.append("time: " + ", ".join(f"{name} {parts_s.get(name, 0) / total:.0%}" for name in PARTS))
    return lines


def size(num_bytes: int) -> str:
    """Bytes for people: 1.7 MB."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return ""


def versions_table(found: dict[str, Any]) -> Table:
    """The versions of a registered model, the first first."""
    table = Table(title=escape(f"{found['model_name']}: versions"), title_justify="left")
    for column in ("version", "bits per byte", "on disk"):
        table.add_column(column, justify="right")
    for column in ("scheme", "run", "aliases", "registered", "verdict"):
        table.add_column(column)
    for row in found["versions"]:
        table.add_row(
            row["version"],
            f"{row['bits_per_byte']:.4f}" if row["bits_per_byte"] is not None else "",
            size(row["bytes"]) if row["bytes"] is not None else "",
            escape(row["scheme"]),
            escape(row["run"]),
            escape(", ".join(row["aliases"])),
            row["registered_at"].removesuffix("+00:00").replace("T", " "),
            row["verdict"] or "",
        )
    return table


def show(summary: dict[str, Any], console: Console) -> None:
    console.print(stages_table(summary))
    if summary["models"]:
        console.print(models_table(summary))
