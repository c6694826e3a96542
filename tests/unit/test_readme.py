"""Commands, folders and links that the README files name exist and parse."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from cluster.config import load
from jobs.__main__ import app
from jobs.config import RunConfig

ROOT = Path(__file__).parents[2]
PAGES = [path.relative_to(ROOT) for path in (ROOT / "README.md", *sorted(ROOT.glob("[a-z]*/**/README.md")))]


def code_lines(page):
    """Lines of code blocks (indented or fenced), without their comments."""
    text = (ROOT / page).read_text()
    fenced = [line for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    indented = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    inline = re.findall(r"`((?:raystill|make) [^`]+)`", text)
    return [line.partition("  #")[0].strip() for line in (*fenced, *indented, *inline)]


def commands(start):
    return sorted({line for page in PAGES for line in code_lines(page) if line.startswith(start)})


def test_readme_pages_are_found():
    assert len(PAGES) >= 4
    assert len(commands("raystill ")) >= 6


@pytest.mark.parametrize("line", commands("raystill "))
def test_readme_raystill_command_parses(line):
    import typer.main

    _, command, *arguments = shlex.split(line)
    known = typer.main.get_command(app).commands
    assert command in known
    if hasattr(known[command], "commands"):  # `keys create` is a command of the group `keys`
        known = known[command].commands
        command, *arguments = arguments
        assert command in known
    options = {name for option in known[command].params for name in option.opts}
    for place, argument in reversed([*enumerate(arguments)]):
        if argument.startswith("--"):
            assert argument in options
            option = next(option for option in known[command].params if argument in option.opts)
            del arguments[place : place + (1 if option.is_flag else 2)]
    if arguments and arguments[0].endswith((".yaml", ".yml")) and command not in ("status", "versions"):
        load(RunConfig, ROOT / arguments[0], [override for override in arguments[1:] if command != "revoke"])


@pytest.mark.parametrize(
    ("folder", "page"), [("services/teacher", "services/teacher/README.md"), ("tests/endurance", "README.md")]
)
def test_readme_names_every_file_of(folder, page):
    files = [path for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"]
    text = (ROOT / page).read_text()
    assert len(files) >= 7
    assert [path.name for path in files if f"`{path.name}`" not in text and f"`{path.stem}`" not in text] == []


def test_readme_says_which_command_has_no_json():
    import typer.main

    known = typer.main.get_command(app).commands
    asked = [
        "prepare",
        "label",
        "train",
        "evaluate",
        "quantize",
        "register",
        "promote",
        "serve",
        "rollback",
        "versions",
    ]
    without = [name for name in asked if not any("--json" in option.opts for option in known[name].params)]
    assert without == ["serve"]
    assert "with `--json` all but `serve`" in (ROOT / "README.md").read_text()


def test_readme_runs_on_clusters_are_submitted_by_raystill():
    """Under an id of their own, once for two who ask, and with the checks of paths and storage."""
    assert len([line for page in PAGES for line in code_lines(page) if "raystill submit" in line]) >= 3
    assert not [line for page in PAGES for line in code_lines(page) if "ray job submit" in line]


@pytest.mark.parametrize("line", commands("make "))
def test_readme_make_target_exists(line):
    targets = re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line.split()[1] in targets


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_readme_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        assert "://" in target or (ROOT / page).parent.joinpath(target).exists(), target


def test_readme_config_of_ones_own_is_valid():
    whole, *parts = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for part in ("{}", *parts):
        RunConfig.model_validate({**yaml.safe_load(whole), **yaml.safe_load(part)})
