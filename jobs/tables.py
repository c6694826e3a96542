"""The tables that a person reads at the end: models side by side, and the stages of a run."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from jobs.ledger import STAGES
from jobs.training.timing import PARTS

_TITLES = {
    "teacher": "teacher",
    "student": "student",
    "student_int8_weight_only": "student int8 (torchao)",
    "student_int8_dynamic": "student int8 dynamic (torchao)",
    "student_onnx_float32": "student float (ONNX)",
    "student_onnx_int8": "student int8 (ONNX)",
    "student_onnx_int4": "student int4 (ONNX)",
    "student_int4_qat": "student int4 QAT (ONNX)",
    "student_compressed_tensors_w4a16": "student int4 GPTQ",
}


_COLOURS = {"done": "green", "failed": "red", "interrupted": "yellow", "started": "yellow"}


_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("parameters", lambda value: f"{value:,}"),
    "on disk": ("bytes", lambda value: size(value)),
    "bits/byte": ("bits_per_byte", lambda value: f"{value:.4f}"),
    "KL": ("kl_to_teacher", lambda value: f"{value:.3f}"),
    "agrees": ("agreement", lambda value: f"{value:.1%}"),
    "kept": ("retention_percent", lambda value: f"{value:.1f}%"),
    "memory": ("peak_memory_bytes", lambda value: size(value)),
    "ms/token": ("token_s", lambda value: f"{1000 * value:.2f}"),
    "tokens/s": ("tokens_per_s", lambda value: f"{value:,.0f}"),
}
"""Title, figure, and how it is written."""
_BY_IMPORTANCE = ("bits/byte", "on disk", "tokens/s", "parameters", "agrees", "kept", "ms/token", "KL", "memory")


def in_order(names: Iterable[str]) -> list[str]:
    """Models as people want them: the teacher first, then the student, then what was made of it."""
    return sorted(names, key=lambda name: list(_TITLES).index(name) if name in _TITLES else len(_TITLES))


def title(name: str) -> str:
    """A model's name for people."""
    return _TITLES.get(name, name)


def models_table(summary: dict[str, Any], console: Console) -> Table:
    """Every model's size, its held-out bits per byte, KL to the teacher and agreement with it, the quality that is
    kept, and its speed: a new token of one sequence, and scoring. What no model has is left out, and what a narrow
    console has no room for, the least important first."""
    shown = [column for column in _COLUMNS if any(_COLUMNS[column][0] in row for row in summary["models"].values())]
    while True:
        table = _models_table(summary, shown)
        if len(shown) <= 1 or _width(table, console) <= console.width:
            return table
        shown.remove(max(shown, key=list(_BY_IMPORTANCE).index))


def _width(table: Table, console: Console) -> int:
    return Measurement.get(console, console.options.update(max_width=1000), table).maximum


def _models_table(summary: dict[str, Any], columns: list[str]) -> Table:
    table = Table(title=f"{summary['name']}: models", title_justify="left")
    table.add_column("model", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name in in_order(summary["models"]):
        row = summary["models"][name]
        writers = [_COLUMNS[column] for column in columns]
        cells = [write(row[figure]) if figure in row else "" for figure, write in writers]
        table.add_row(escape(title(name)), *cells)
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
        left_out = f", {stage['skipped']:,} objects left out" if stage.get("skipped") else ""
        rows = stage["rows"]
        return f"{stage['documents']:,} documents, {rows['train']:,} + {rows['validation']:,} rows{left_out}"
    if "labelled" in stage:
        return f"{stage['labelled']:,} of {stage['rows']:,} rows labelled now, {size(stage['size_bytes'])} in all"
    if challenger := stage.get("challenger"):
        return f"version {challenger['version']} is challenger at {challenger['share']:.0%} of the traffic"
    if "champion" in stage:
        return f"version {stage['champion']['version']} was made champion of {stage['champion']['model_name']}"
    if "report" in stage:
        return f"report in {stage['report']}"
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


def size(num_bytes: float) -> str:
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
    for column in ("no.", "bits/\nbyte", "on disk"):
        table.add_column(column, justify="right", no_wrap=True)
    least = {"scheme": 9, "run": 3, "aliases": 8, "registered": 10, "verdict": 7}  # whole words in 80 columns
    for column, width in least.items():
        table.add_column(column, no_wrap=column == "aliases", overflow="fold", min_width=width)
    for row in found["versions"]:
        table.add_row(
            row["version"],
            f"{row['bits_per_byte']:.4f}" if row["bits_per_byte"] is not None else "",
            size(row["bytes"]) if row["bytes"] is not None else "",
            escape(row["scheme"]),
            escape(row["run"]),
            escape(", ".join(row["aliases"])) + (f" {row['share']:.0%}" if 0 < row["share"] < 1 else ""),
            row["registered_at"].removesuffix("+00:00").replace("T", " "),
            ", ".join(filter(None, [row["verdict"], row["canary"] and f"canary {row['canary']}"])),
        )
    return table


def encoders_table(measured: dict[str, dict[str, float]], into: Path) -> Table:
    """An encoder and what was made of it: bytes, time of a batch and, if rows had labels, how well it sorts them."""
    rows = measured["float"].get("num_rows")
    title = f"{into}: artefacts" + (f", {rows:,} rows with labels, 95 % intervals" if rows else "")
    table = Table(title=escape(title), title_justify="left")
    table.add_column("model", no_wrap=True)
    for column in ("on disk", "of\nfloat", "ms per\nbatch", *(("accuracy", "macro-F1") if rows else ())):
        table.add_column(column, justify="right", no_wrap=True)
    for name, figures in measured.items():
        share = f"{figures['bytes'] / measured['float']['bytes']:.3f}"
        quality = [
            f"{figures[key]:.4f}\n[dim]{figures[f'{key}_low']:.3f}–{figures[f'{key}_high']:.3f}[/]"
            for key in (("accuracy", "macro_f1") if rows else ())
        ]
        table.add_row(escape(name), size(figures["bytes"]), share, f"{1000 * figures['batch_s']:.1f}", *quality)
    return table


def show(summary: dict[str, Any], console: Console) -> None:
    console.print(stages_table(summary))
    if summary["models"]:
        console.print(models_table(summary, console))
