"""Many claimants for one crown, and claimants that die on the way: shared by the tests on SQLite and on PostgreSQL.

Processes come from a fork server that has everything imported, so that fifty of them cost little.
"""

import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

from cluster import crowning
from cluster.champions import current_champion, open_database
from cluster.errors import PromotionRefused
from cluster.promotions import advance, crown, history, propose
from jobs import promote as promoting
from jobs.config import PromoteConfig

MODEL = "m"
CLAIMANTS = 8
GOOD = {"bits_per_byte": 2.0, "bytes": 1000, "tokens_per_s": 100.0}


def artefact(number: Any) -> dict[str, str]:
    return {"version": str(number), "uri": f"file:///nowhere/{number}", "manifest_sha256": f"{number}".zfill(64)}


def fork_server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.promotion_races", "mlflow", "jobs.promote"])
    return context


def crown_one(database: str, number: Any, run: str = "test") -> Any:
    """A promotion through all its steps, without a gate; returns the champion."""
    engine = open_database(database)
    try:
        proposed = propose(engine, MODEL, artefact(number), current_champion(engine, MODEL), run)
        return crown(engine, advance(engine, proposed, "checked"))[1]
    finally:
        engine.dispose()


def race_of_threads(database: str, rounds: int) -> None:
    """Asserts for every round that one of the claimants wins, and that the others are told who."""
    engines = [open_database(database) for _ in range(CLAIMANTS)]
    start = Barrier(CLAIMANTS)

    def claim(number: int, turn: int) -> tuple[str, Any]:
        engine = engines[number]
        proposed = propose(
            engine, MODEL, artefact(f"{turn}.{number}"), current_champion(engine, MODEL), run=f"r{number}"
        )
        start.wait(300)  # all have seen the same champion
        try:
            return "won", crown(engine, advance(engine, proposed, "checked"))[1]
        except PromotionRefused as refused:
            return "lost", str(refused)

    with ThreadPoolExecutor(CLAIMANTS) as pool:
        for turn in range(1, rounds + 1):
            outcomes = list(pool.map(claim, range(CLAIMANTS), [turn] * CLAIMANTS))
            winners = [found for kind, found in outcomes if kind == "won"]
            assert len(winners) == 1
            assert current_champion(engines[0], MODEL) == winners[0]
            assert winners[0].epoch == turn
            owner = winners[0].version.partition(".")[2]
            for kind, message in outcomes:
                if kind == "lost":
                    assert f"version {winners[0].version} was promoted meanwhile by " in message
                    assert f"run r{owner} at " in message
    check_history(engines[0], rounds, CLAIMANTS)
    for engine in engines:
        engine.dispose()


def check_history(engine: Any, rounds: int, claimants: int) -> None:
    rows = history(engine, MODEL)
    assert sorted(row.epoch for row in rows if row.epoch) == list(range(1, rounds + 1))
    assert [row.state for row in rows].count("lost") == rounds * (claimants - 1)
    assert all(row.reason for row in rows if row.state == "lost")


def _claim_all(number: int, database: str, rounds: int, start: Any, outcomes: Any) -> None:
    def wait(version: dict[str, str]) -> str:
        start.wait(300)  # in the look at the files: all have seen the same champion
        return ""

    promoting._damage = wait  # type: ignore[assignment]
    for turn in range(rounds):
        start.wait(300)
        try:
            version, nowhere = artefact(f"{turn}.{number}"), "sqlite:////nowhere/mlflow.db"
            champion, _ = promoting.promote(PromoteConfig(), MODEL, version, GOOD, GOOD, database, nowhere, run="r")
            outcomes.put((turn, champion.epoch, champion.version, ""))
        except PromotionRefused as refused:
            outcomes.put((turn, None, "", str(refused)))


def race_of_processes(database: str, rounds: int) -> None:
    """The same with processes and the whole of `promote`, the gate included."""
    context = fork_server()
    start, outcomes = context.Barrier(CLAIMANTS), context.Queue()
    claimants = [
        context.Process(target=_claim_all, args=(number, database, rounds, start, outcomes))
        for number in range(CLAIMANTS)
    ]
    for process in claimants:
        process.start()
    found = [outcomes.get(timeout=300) for _ in range(CLAIMANTS * rounds)]
    for process in claimants:
        process.join(300)
    assert [process.exitcode for process in claimants] == [0] * CLAIMANTS
    for turn in range(rounds):
        winners = [(epoch, version) for when, epoch, version, _ in found if when == turn and epoch]
        assert [epoch for epoch, _ in winners] == [turn + 1]
        said = [reason for when, _, _, reason in found if when == turn and reason]
        assert len(said) == CLAIMANTS - 1
        assert all(f"version {winners[0][1]} was promoted meanwhile by " in reason for reason in said)
    engine = open_database(database)
    check_history(engine, rounds, CLAIMANTS)
    engine.dispose()


# --- death on the way -------------------------------------------------------------------------------------------------

BOUNDARIES = {
    "propose": (promoting, "propose"),
    "judge": (promoting, "judge"),
    "files": (promoting, "check_version"),
    "check": (crowning, "advance"),
    "crown": (crowning, "crown"),
    "seat": ("cluster.promotions", "_seat"),
    "alias": (crowning, "point_champion"),
    "tags": (crowning, "_tag_verdict"),
    "announce": (crowning, "mark_announced"),
}
"""The steps of a promotion in their order; `seat` lies inside the transaction that crowns."""
OF_A_CANARY = {"canary": (promoting, "begin"), "canary_move": ("cluster.canaries", "move")}
"""How a challenger's promotion goes on after `files`; the second lies inside the transaction of the first."""


def _die_at(step: str, after: bool, work: Any, arguments: tuple[Any, ...]) -> None:
    import importlib

    module, name = {**BOUNDARIES, **OF_A_CANARY}[step]
    module = importlib.import_module(module) if isinstance(module, str) else module
    whole = getattr(module, name)
    to_come = ["of the settling before"] if step in ("alias", "announce") else []

    def dying(*args: Any, **more: Any) -> Any:
        found = whole(*args, **more) if to_come or after else None
        if not to_come:
            os.kill(os.getpid(), signal.SIGKILL)
        to_come.pop()
        return found

    setattr(module, name, dying)
    work(*arguments)


def do_and_die(step: str, after: bool, work: Any, *arguments: Any) -> None:
    """Calls `promote` or `rollback` in a process that is killed before or after a step."""
    process = fork_server().Process(target=_die_at, args=(step, after, work, arguments))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL, process.exitcode
