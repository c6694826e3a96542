"""Arguments that many commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; shipped ones are in jobs/configs/.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides such as train.steps=20.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of standard output.")]

Guard = Callable[[Callable[[], None], bool], None]
"""Runs a command; a known error becomes one line and an exit code."""
Load = Callable[[Path, list[str] | None], Any]
"""Reads a config with its overrides."""
