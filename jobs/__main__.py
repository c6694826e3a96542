"""The command line: `raystill run CONFIG [key=value ...]`, one command per stage, and `status`.

Imports nothing heavy before a command runs, so `--help` answers at once. Progress goes to standard error, results to
standard output. Exit code 0: everything asked for is done; 2: a mistake in the config, the arguments or the inputs;
1: anything else.
"""

import errno
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.arguments import AsJson, ConfigPath, Overrides
from jobs.commands_cluster import add_cluster_commands
from jobs.commands_encoders import add_encoder_commands
from jobs.commands_keys import add_key_commands

app = typer.Typer(
    name="raystill",
    help="Turns a large model into a small one on a Ray cluster and keeps the small one in service.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda shown: _show_version(shown), help="Show it.")
    ] = False,
) -> None:
    """What holds for every command."""


@app.command()
def run(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """All stages, from text to a student that answers. What is done already is skipped."""
    _stages(config, overrides, as_json, None)


@app.command()
def prepare(
    config: ConfigPath,
    overrides: Overrides = None,
    as_json: AsJson = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say how large the corpus is, by a sample; write nothing.")
    ] = False,
) -> None:
    """Gather or read the corpus, train or take the tokenizer, write the example store."""
    if not dry_run:
        _stages(config, overrides, as_json, ("prepare",))
        return

    def estimated() -> tuple[dict[str, Any], str]:
        from jobs.preparing.estimate import estimate
        from jobs.progress import ConsoleProgress

        found = estimate(_load(config, overrides), ConsoleProgress(quiet=True).stage("prepare"))
        return found, (
            f"{found['objects']:,} object{'s'[: found['objects'] != 1]}, {found['bytes']:,} bytes\n"
            f"about {found['documents']:,} documents and {found['tokens']:,} tokens, "
            f"by a sample of {found['sampled_bytes']:,} bytes; nothing was written"
        )

    _answer(estimated, as_json)


@app.command()
def label(
    config: ConfigPath,
    overrides: Overrides = None,
    as_json: AsJson = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say how many teacher tokens and bytes it takes; start nothing.")
    ] = False,
) -> None:
    """Store what the teacher says about every training row, so that `train` needs no teacher (distill.labels=read)."""
    if not dry_run:
        _stages(config, [*(overrides or []), "distill.labels=read"], as_json, ("teacher", "label"))
        return

    def estimated() -> tuple[dict[str, Any], str]:
        from jobs.labels.estimate import cost_line
        from jobs.run import estimate_labels_of

        found = estimate_labels_of(_load(config, overrides))
        there = f"{found['rows'] - found['missing']:,} rows have one already"
        return found, f"{found['reason']}\n{cost_line(found['missing'], found)}; {there}"

    _answer(estimated, as_json)


@app.command()
def train(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Make the teacher ready (train or convert it if asked), then train the student against it."""
    _stages(config, overrides, as_json, ("teacher", "train"))


@app.command()
def evaluate(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Measure teacher and student (held-out text, questions, size, speed) and write report.html."""
    _stages(config, overrides, as_json, ("evaluate",))


@app.command()
def quantize(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Quantise the student, reload each artefact in a fresh process, compare and measure it."""
    _stages(config, overrides, as_json, ("quantize",))


@app.command()
def register(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Register the quantised students in MLflow, with a manifest of hashes and figures."""
    _stages(config, overrides, as_json, ("register",))


@app.command()
def promote(
    config: ConfigPath,
    overrides: Overrides = None,
    version: Annotated[
        str | None, typer.Option(metavar="N", help="This registered version instead of the one of the config's run.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Let it pass whatever the gate says; files still count.")] = (
        False
    ),
    as_json: AsJson = False,
) -> None:
    """Make a registered student champion, if it passes the gate."""

    def of_a_version() -> tuple[dict[str, Any], str]:
        from jobs.promote import promote_version

        champion, verdict = promote_version(_load(config, overrides), str(version), force)
        found = {"champion": vars(champion), "verdict": verdict}
        if canary := verdict.get("canary"):
            steps = ", ".join(f"{share:.0%}" for share in canary["steps"])
            return found, (
                f"{champion.model_name}: version {canary['version']} is challenger, at {canary['share']:.0%} of the "
                f"traffic (steps: {steps}); version {champion.version} stays champion meanwhile\n"
                f"Watch it:  {shlex.join([_program(), 'versions', str(config)])}"
            )
        return found, f"{champion.model_name}: version {champion.version} is champion (epoch {champion.epoch})"

    if version is None:
        _stages(config, overrides, as_json, ("promote",), force)
    else:
        _answer(of_a_version, as_json)


@app.command()
def rollback(
    config: ConfigPath,
    overrides: Overrides = None,
    to: Annotated[str | None, typer.Option(metavar="N", help="This version, if it ever was champion.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make the champion before champion again; while a canary runs, end it instead."""

    def back() -> tuple[dict[str, Any], str]:
        from jobs.rollback import end_running_canary, rollback
        from jobs.versions import model_of

        loaded = _load(config, overrides)
        model = model_of(loaded)
        ended = end_running_canary(model.name, model.database, model.tracking)
        if ended is not None and to is None:
            said = f"{model.name}: the canary of version {ended.version} is ended, the champion stays"
            return {"canary": vars(ended)}, said
        champion, before = rollback(model.name, model.database, model.tracking, to=to, run=loaded.name)
        said = f"{model.name}: version {champion.version} is champion (epoch {champion.epoch}), before {before.version}"
        return {"champion": vars(champion), "before": vars(before)}, said

    _answer(back, as_json)


@app.command()
def versions(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME|CONFIG", help="Run name, storage root, config file, or a model on a server."),
    ],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show the registered versions of a model, their figures, and which one is champion."""

    def work() -> None:
        from rich.console import Console

        from jobs.tables import versions_table
        from jobs.versions import find_model, model_of
        from jobs.versions import versions as read_versions

        of_config = name.endswith((".yaml", ".yml"))
        found = read_versions(model_of(_load(Path(name), overrides)) if of_config else find_model(name))
        if as_json:
            typer.echo(json.dumps(found, sort_keys=True))
        else:
            Console().print(versions_table(found))

    _guard(work, as_json)


@app.command()
def serve(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="YAML file; left out with --model.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(metavar="DIR", help="A model directory to serve as it is, without a registry.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="With --model: what clients call it (default: of DIR).")] = None,
    host: Annotated[str | None, typer.Option(help="With --model: where it listens.")] = None,
    port: Annotated[int | None, typer.Option(help="With --model: the port; 8000 by default.")] = None,
) -> None:
    """Keep the OpenAI-style endpoint up with the champion, until Ctrl-C; or, with --model, with any model directory."""

    def champion() -> None:
        from cluster.api_keys import check_address
        from cluster.champions import database_url
        from cluster.connection import connect
        from cluster.errors import ConfigError
        from jobs.serve import check_champion, check_engine, serve_until_interrupted
        from services.endpoint.client import check_port_free

        if config is None:
            raise ConfigError("serve: neither CONFIG nor --model DIR; give one of the two")
        for option, value in (("--name", name), ("--host", host), ("--port", port)):
            if value is not None:
                raise ConfigError(f"serve: {option} goes with --model; with CONFIG write serve.port=... and the like")
        loaded = _load(Path(config), overrides)
        check_address(loaded.serve.host, database_url(loaded.state_directory))
        check_champion(loaded)
        check_engine(loaded.serve, loaded.cluster)
        if not loaded.cluster.resolved_address():  # a cluster may have a Serve there, for us to use
            check_port_free(loaded.serve.host, loaded.serve.port)
        with connect(loaded.cluster):
            serve_until_interrupted(loaded, typer.echo)

    def directory() -> None:
        from jobs.serve_directory import directory_arguments, serve_directory

        given = [*filter(None, [config]), *(overrides or [])]
        serve_directory(*directory_arguments(str(model), name, given, host, port), typer.echo)

    _guard(champion if model is None else directory, False)


@app.command()
def status(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Run name (in runs/), config file, or storage root URI.")],
    as_json: AsJson = False,
) -> None:
    """Show the stages of a run and what came out of it."""

    def work() -> None:
        from cluster.errors import ConfigError
        from jobs.run import status as read_status

        if name.endswith((".yaml", ".yml")):
            root = _load(Path(name), None).storage
        else:
            root = name if "/" in name else f"runs/{name}"
        summary = read_status(root)
        if summary is None:
            where = root if "://" in root else Path(root).absolute()
            raise ConfigError(f"status {name}: no run in {where}; give a run's name, config or storage root")
        _print(summary, as_json)

    _guard(work, as_json)


@app.command()
def schema() -> None:
    """Print the JSON schema of a config file, for editors."""
    from jobs.config import RunConfig

    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))


def _stages(
    config: Path, overrides: list[str] | None, as_json: bool, only: tuple[str, ...] | None, force: bool = False
) -> None:
    def work() -> None:
        from jobs.progress import ConsoleProgress
        from jobs.run import run as run_stages

        loaded = _load(config, overrides)
        summary = run_stages(loaded, ConsoleProgress(), only, force)
        _print(summary, as_json)
        if only is None and not as_json:
            typer.echo(f"The student: {summary['stages']['train']['model']}")
            typer.echo(f"Keep the endpoint up:  {shlex.join([_program(), 'serve', str(config), *(overrides or [])])}")

    _guard(work, as_json)


def _answer(found: Callable[[], tuple[dict[str, Any], str]], as_json: bool) -> None:
    """Prints what a command found: as JSON, or the same for people."""

    def work() -> None:
        values, text = found()
        typer.echo(json.dumps(values, sort_keys=True) if as_json else text)

    _guard(work, as_json)


def _show_version(shown: bool) -> None:
    if shown:
        from importlib.metadata import version

        typer.echo(f"raystill {version('raystill')}")
        raise typer.Exit


def _program() -> str:
    """How this program is called from here: by its name if that is on the path."""
    return "raystill" if shutil.which("raystill") else os.path.relpath(sys.argv[0])


def _load(config: Path, overrides: list[str] | None) -> Any:
    from cluster.config import load
    from jobs.config import RunConfig

    return load(RunConfig, config, overrides)


def _print(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(summary, sort_keys=True))
        return
    from rich.console import Console

    from jobs.tables import show

    show(summary, Console())


def _guard(work: Any, as_json: bool) -> None:
    """Runs a command; a known error becomes one line and an exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from cluster.errors import RaystillError, UserError
    from cluster.interrupts import exit_code, raise_on_signals
    from cluster.logs import setup_logging

    setup_logging()
    raise_on_signals()
    try:
        work()
    except RaystillError as error:
        code = 2 if isinstance(error, UserError) else 1
        message = " ".join(str(error).split())
        typer.echo(f"raystill: {message}", err=True)
        if as_json:
            typer.echo(json.dumps({"error": message, "error_type": type(error).__name__, "exit_code": code}))
        raise SystemExit(code) from None
    except KeyboardInterrupt:
        typer.echo("raystill: interrupted; run the same command again to go on", err=True)
        raise SystemExit(exit_code()) from None
    except OSError as error:
        if error.errno not in _FULL:
            raise
        typer.echo(f"raystill: {error.strerror}: {error.filename or 'a file'}; make room, then run it again", err=True)
        raise SystemExit(1) from None


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


add_key_commands(app, _guard, _load, _answer)
add_cluster_commands(app, _guard, _load)
add_encoder_commands(app, _guard)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
