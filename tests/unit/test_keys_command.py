"""`raystill keys` as a user calls it, and the addresses that are refused without a key."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs.__main__ import app

CONFIG = str(Path(__file__).parents[2] / "jobs/configs/demo.yaml")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def raystill(*arguments: str, code: int = 0) -> Any:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == code, done.output
    return done


def test_key_is_printed_once_and_listed_without_it(tmp_path: Path) -> None:
    assert "open to this machine" in raystill("keys", "list", CONFIG).stdout
    assert not list(tmp_path.iterdir())  # looking makes no database
    made = raystill(
        *("keys", "create", CONFIG, "--name", "alice", "--model", "demo-student", "--model", "other"),
        *("--requests-per-minute", "60", "--tokens-per-minute", "20000", "--expires-in", "90d"),
    )
    [key] = made.stdout.split()
    assert key.startswith("rs-")
    shown = raystill("keys", "list", CONFIG).stdout
    assert key not in shown
    assert key[14:] not in shown
    for text in (key[:13], "alice", "active", "demo-student, other", "60", "20,000"):
        assert text in shown


def test_key_is_revoked_by_name_and_id() -> None:
    made = json.loads(raystill("keys", "create", CONFIG, "--name", "bob", "--json").stdout)
    assert made["key"][3:13] == made["id"]
    assert made["expires_at"] is None
    raystill("keys", "revoke", CONFIG, "bob")
    [row] = json.loads(raystill("keys", "list", CONFIG, "--json").stdout)["keys"]
    assert row["state"] == "revoked"
    assert "key" not in row
    assert "sha256" not in row
    second = json.loads(raystill("keys", "create", CONFIG, "name=other", "--name", "bob", "--json").stdout)
    assert "no such id or name" in raystill("keys", "revoke", CONFIG, second["id"], code=2).stderr
    raystill("keys", "revoke", CONFIG, second["id"], "name=other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--expires-in", "soon"), "12h or 90d"),
        (("--requests-per-minute", "0"), "requests per minute 0"),
        (("--model", "a/b"), "model name"),
        (("--name", ""), "1 to 100 printable"),
    ],
)
def test_values_that_cannot_be_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = raystill("keys", "create", CONFIG, *arguments, code=2)
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["serve", "run"])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_public_address_without_a_key_is_refused_before_anything_starts(
    tmp_path: Path, command: str, host: str
) -> None:
    done = raystill(command, CONFIG, f"serve.host='{host}'", code=2)
    assert f"serve.host {host}" in done.stderr
    assert "raystill keys create CONFIG" in done.stderr
    assert not list(tmp_path.rglob("*.parquet"))
    raystill("keys", "create", CONFIG)
    assert "no champion" in raystill("serve", CONFIG, f"serve.host='{host}'", code=2).stderr
