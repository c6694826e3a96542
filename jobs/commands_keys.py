"""The commands about API keys: `raystill keys create | list | revoke`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.arguments import AsJson, ConfigPath, Guard, Load, Overrides

Answer = Callable[[Callable[[], tuple[dict[str, Any], str]], bool], None]
"""Prints what was found, as JSON or as text."""


def add_key_commands(app: typer.Typer, guard: Guard, load: Load, answer: Answer) -> None:
    """Adds these commands to the program."""
    keys = typer.Typer(
        help="Make, list and revoke API keys. Once there is one, the endpoint asks for one.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    app.add_typer(keys, name="keys")

    def database(config: Path, overrides: list[str] | None) -> str:
        from cluster.champions import database_url

        return database_url(load(config, overrides).state_directory)

    @keys.command("create")
    def create_key(
        config: ConfigPath,
        overrides: Overrides = None,
        name: Annotated[str, typer.Option(metavar="TEXT", help="Who or what it is for.")] = "unnamed",
        model: Annotated[
            list[str] | None,
            typer.Option(metavar="NAME", help="It may ask this registered model only; may be repeated."),
        ] = None,
        requests_per_minute: Annotated[int | None, typer.Option(metavar="N")] = None,
        tokens_per_minute: Annotated[int | None, typer.Option(metavar="N", help="Of prompts and answers.")] = None,
        expires_in: Annotated[str | None, typer.Option(metavar="TIME", help="For example 12h or 90d.")] = None,
        as_json: AsJson = False,
    ) -> None:
        """Make a key and print it; it is not stored and cannot be shown again."""

        def created() -> tuple[dict[str, Any], str]:
            from jobs.keys import create

            found = create(
                database(config, overrides),
                name,
                tuple(model or ()),
                requests_per_minute,
                tokens_per_minute,
                expires_in,
            )
            typer.echo("raystill: the key is shown this once; it works within 2 s", err=True)
            return found, found["key"]

        answer(created, as_json)

    @keys.command("list")
    def show_keys(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
        """Show all keys, their limits and their state; never the keys themselves."""

        def work() -> None:
            from rich.console import Console

            from jobs.keys import keys_table, listed

            rows = listed(database(config, overrides))
            if as_json:
                typer.echo(json.dumps({"keys": rows}, sort_keys=True))
            elif rows:
                Console().print(keys_table(rows))
            else:
                typer.echo(
                    "There are no API keys: the endpoint is open to this machine. `raystill keys create` makes one."
                )

        guard(work, as_json)

    @keys.command("revoke")
    def revoke_key(
        config: ConfigPath,
        key: Annotated[str, typer.Argument(metavar="ID|NAME", help="As `raystill keys list` shows it.")],
        overrides: Overrides = None,
        as_json: AsJson = False,
    ) -> None:
        """Revoke a key; endpoints refuse it within 2 s."""

        def revoked() -> tuple[dict[str, Any], str]:
            from jobs.keys import revoke

            found = revoke(database(config, overrides), key)
            return found, f"rs-{found['id']} ({found['name']}) is revoked"

        answer(revoked, as_json)
