"""A plan for people."""

from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.tables import size


def show_plan(found: dict[str, Any], console: Console) -> None:
    """The two sides beside each other, then what they cost together, then what will not go."""
    console.print(_sides(found))
    for line in plan_lines(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def plan_lines(found: dict[str, Any]) -> list[str]:
    """The figures that belong to both sides, and the warnings."""
    lines = [
        f"{found['tokens']:,.0f} tokens at {found['tokens_per_s']:,.0f} tokens/s: {found['hours']:,.1f} hours, "
        + (f"about ${found['usd']:,.0f} for whole nodes" if found["usd"] is not None else "no price (--price CARD=USD)")
    ]
    if signal := found["signal"]:
        out, into = signal["gbps_per_teacher_node"], signal["gbps_per_student_node"]
        lines.append(
            f"signal {signal['kind']}: {signal['bytes_per_position']:,} bytes per position, "
            f"{size(signal['bytes_per_s'])}/s; {out:,.1f} Gbit/s out of each teacher node, {into:,.1f} into each "
            f"student node; {signal['label_bytes'] / 1e12:,.2f} TB if stored"
        )
    if found["gradient_bytes"]:
        lines.append(
            f"gradients: {size(found['gradient_bytes'])} in and out of each student node at every step of "
            f"{found['step_s']:,.1f} s, {found['gradient_share']:.0%} of it"
        )
    then = found["tenfold"]
    lines.append(
        f"on ten times the cards: {then['speed_up']:.1f} times as fast, {then['hours']:,.1f} hours, "
        f"{then['rows_per_card']:,.1f} rows per student card and step, gradients {then['gradient_share']:.0%} of a step"
    )
    return lines + [f"! {line}" for line in found["warnings"]]


def _sides(found: dict[str, Any]) -> Table:
    table = Table()
    table.add_column("")
    names = [name for name in ("teacher", "student") if found[name] is not None]
    for name in names:
        table.add_column(name, justify="right")
    rows = {
        "parameters": lambda side: f"{side['parameters'] / 1e9:,.2f} B",
        "GFLOP per token": lambda side: f"{side['flops_per_token'] / 1e9:,.1f}",
        "card": lambda side: f"{side['card']['name']} ({side['card']['instance']})",
        "of its bf16 peak": lambda side: f"{side['utilisation']:.0%} of {side['card']['bf16_tflops']:,.0f} TFLOP/s",
        "tokens/s of a card": lambda side: f"{side['card_tokens_per_s']:,.0f}",
        "cards": lambda side: f"{side['cards']:,}",
        "nodes": lambda side: f"{side['nodes']:,}",
        "busy": lambda side: f"{side['busy']:.0%}",
        "memory of a card": lambda side: (
            f"{size(side['memory_bytes'])} of {side['card']['memory_gb']:,.0f} GB"
            + ("" if side["fits"] else ": does not fit")
        ),
        "price of a card": lambda side: (
            f"${side['card']['usd_per_hour']:,.2f}/h ({side['card']['priced']})"
            if side["card"]["usd_per_hour"] is not None
            else side["card"]["priced"]
        ),
    }
    for title, write in rows.items():
        table.add_row(title, *[write(found[name]) for name in names])
    return table
