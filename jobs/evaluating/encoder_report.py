"""`report.html` of quantised encoders: what was measured of them and of the float model, as one page by itself."""

from datetime import UTC, datetime

from jobs.evaluating.report import Cell, ReportTable, interval_cell, machine_facts, render_page
from jobs.tables import size

Measured = dict[str, dict[str, float]]


def render_encoder_report(model: str, measured: Measured, num_texts: int, machine: dict[str, str]) -> str:
    """The page as HTML.

    Args:
        model: the directory that was quantised.
        measured: what `jobs.quantize_encoder.quantize_encoder` returns.
        num_texts: how many texts there were.
        machine: where they were read (`jobs.evaluating.efficiency.machine`).
    """
    facts = {
        "Model": model,
        "Measured": datetime.now(UTC).isoformat(timespec="seconds"),
        **machine_facts([machine]),
        "Texts": f"{num_texts:,}",
    }
    tables = [_size_and_speed(measured)]
    if "num_rows" in measured["float"]:
        tables.insert(0, _quality(measured))
    return render_page(model.rstrip("/").rpartition("/")[2], facts, tables)


def _quality(measured: Measured) -> ReportTable:
    rows = [
        (
            name,
            [
                Cell(f"{figures['num_rows']:,} rows", f"{figures['num_labels']} labels"),
                *(interval_cell(figures, figure, lambda value: f"{value:.4f}") for figure in ("accuracy", "macro_f1")),
            ],
        )
        for name, figures in measured.items()
    ]
    notes = [
        "Accuracy: share of rows whose likeliest label is theirs, below it the 95 % interval (Wilson). Macro-F1: mean "
        "over the labels of the harmonic mean of precision and recall, below it the 95 % interval (percentile "
        "bootstrap over rows). Models read the same rows, so two of them can differ for certain although their "
        "intervals overlap.",
    ]
    return ReportTable("Quality on rows with labels", ["model", "sample", "accuracy", "macro-F1"], rows, notes)


def _size_and_speed(measured: Measured) -> ReportTable:
    exact = measured["float"]
    rows = [
        (
            name,
            [
                Cell(size(figures["bytes"])),
                Cell(f"{figures['bytes'] / exact['bytes']:.3f}"),
                Cell(f"{figures['timings']} timings"),
                interval_cell(figures, "batch_s", lambda value: f"{1000 * value:.1f}"),
                interval_cell(figures, "similarity", lambda value: f"{value:.5f}"),
            ],
        )
        for name, figures in measured.items()
    ]
    compared = next((f["similar_texts"] for f in measured.values() if "similar_texts" in f), 0)
    notes = [
        "Each model in a process of its own that did not make it. Time for a batch: median of so many timings of the "
        "first texts, 16 at most; below it the 95 % interval, whose ends are timings by rank.",
        "Similarity to float: cosine of the two outputs for a token (of a classifier, for a text), mean over "
        f"{compared} texts; below it the 95 % interval (percentile bootstrap over texts).",
    ]
    columns = ["model", "on disk", "of float", "sample", "ms per batch", "similarity to float"]
    return ReportTable("Size, speed and similarity", columns, rows, notes)
