"""Plots as inline SVG: drawn by matplotlib, coloured by the page, so that they fit a light and a dark one.

Every colour that matplotlib is given stands for a CSS variable (`PALETTE`), which takes its place in the SVG. Text
stays text. Nothing in the result refers to anything outside it.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

_INK, _MUTED, _LINE = "#010101", "#020202", "#030303"
_SERIES = [f"#0{number}0{number}0f" for number in range(8)]
PALETTE = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _LINE: "var(--line)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES)},
}
_MARKERS = "osD^vPX*"
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class Point:
    """A model in a plot of two figures, with the ends of the second one's interval where there is one."""

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


def training(
    losses: Sequence[float],
    parts: dict[str, Sequence[float]],
    validation: Sequence[Sequence[float]],
    teacher: float | None,
) -> str:
    """Loss of each step, and held-out bits per byte at the steps where they were measured, with the teacher's.

    Args:
        parts: of the loss, by name; drawn where there are at least two. They end with the last step.
    """

    def draw(figure: Figure) -> None:
        of_loss, of_validation = figure.subplots(1, 2)
        lines = {"objective": losses, **(parts if len(parts) > 1 else {})}
        for (name, values), colour in zip(lines.items(), (_SERIES[0], *_SERIES[2:]), strict=False):
            steps_of_it = range(len(losses) - len(values) + 1, len(losses) + 1)
            of_loss.plot(steps_of_it, values, color=colour, linewidth=1, label=name)
        if len(lines) > 1:
            of_loss.legend()
        of_loss.set(title="training loss, nats per token", xlabel="step")
        steps, values = [item[0] for item in validation], [item[1] for item in validation]
        of_validation.plot(steps, values, color=_SERIES[1], marker="o", markersize=4, label="student")
        if teacher is not None:
            of_validation.axhline(teacher, color=_MUTED, linestyle="--", linewidth=1.2, label="teacher, same rows")
            of_validation.legend()
        of_validation.set(title="held-out bits per byte", xlabel="step")
        for axes in (of_loss, of_validation):
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))

    return _svg("training", draw, "Training loss and held-out bits per byte over the steps", 2.7)


def scatter(name: str, points: Sequence[Point], x_label: str, y_label: str, description: str) -> str:
    """Models by two figures; the first one on a logarithmic axis."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, point in enumerate(points):
            colour, marker = _SERIES[number % len(_SERIES)], _MARKERS[number % len(_MARKERS)]
            if point.low is not None and point.high is not None:
                ends = [[point.y - point.low], [point.high - point.y]]
                axes.errorbar(point.x, point.y, ends, color=colour, capsize=3, linewidth=1.2)
            axes.plot(point.x, point.y, color=colour, marker=marker, markersize=8, linestyle="", label=point.name)
        axes.set_xscale("log")
        axes.margins(0.15)
        _plain_numbers(axes.xaxis)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))

    return _svg(name, draw, description, 2.9)


def by_position(curves: dict[str, Sequence[Sequence[float]]]) -> str:
    """Agreement with the teacher along the row, one line for each model; parts are `[first, last, share, count]`."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (name, parts) in enumerate(curves.items(), 1):
            middle = [(part[0] + part[1]) / 2 for part in parts]
            share = [100 * part[2] for part in parts]
            colour, marker = _SERIES[number % len(_SERIES)], _MARKERS[number % len(_MARKERS)]
            axes.plot(middle, share, label=name, color=colour, marker=marker, markersize=4, alpha=0.9)
        axes.set(xlabel="place in the row, tokens", ylabel="agreement with the teacher, %")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))

    return _svg("position", draw, "Agreement with the teacher by place in the row", 2.9)


def shares(parts: dict[str, float]) -> str:
    """How a whole is divided: a bar for each part, with its percentage."""
    total = sum(parts.values())

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        percent = [100 * value / total for value in parts.values()]
        bars = axes.barh(list(parts), percent, color=_SERIES[0], height=0.6)
        axes.bar_label(bars, [f"{value:.0f} %" for value in percent], padding=4, color=_INK)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel="share of the time of a step, %", xlim=(0, max(percent) * 1.12))

    return _svg("time", draw, "Where the time of a training step goes", 2.3)


def _plain_numbers(axis: Any) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 times powers of ten (of a long one at 1 alone), as plain numbers."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _svg(name: str, draw: Callable[[Figure], None], description: str, height: float) -> str:
    """A figure as an element of a page; `name` keeps its ids apart from those of others."""
    style: Any = {**_STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.0, height), layout="constrained")
        draw(figure)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', lambda found: f"{found[1].removeprefix('xlink:')}{name}-", svg)
    for colour, variable in PALETTE.items():
        svg = svg.replace(colour, variable)
    label = f'<svg role="img" aria-label="{description}"'
    return re.sub(
        r'<svg(.*?) width="[^"]*"', lambda found: re.sub(r' height="[^"]*"', "", f"{label}{found[1]}"), svg, count=1
    )
