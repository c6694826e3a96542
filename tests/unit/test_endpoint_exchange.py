"""What a router and the supervisor tell each other, also when one of them is away or begins anew."""

from typing import Any

import pytest

from services.endpoint import exchange
from services.endpoint.canary import Observation
from services.endpoint.exchange import Exchange
from services.endpoint.traffic import Route, RoutingTable
from tests.unit.test_endpoint_router import MODEL, REIGN, Bench, arguments, bench, versions

__all__ = ["arguments", "bench", "versions"]  # fixtures


def test_exchange_uses_a_table_when_its_versions_have_answered(bench: Bench) -> None:
    said: list[Any] = []
    warmed: list[str] = []
    table = RoutingTable(5, champion=bench.new, reign=REIGN, problem=None)

    def ask(name: str, message: int, seen: list[Observation], in_flight: dict[str, int], number: int) -> Any:
        said.append((name, list(seen), in_flight, number))
        return table, {"model": MODEL}

    def warm(route: Route) -> None:
        warmed.append(route.app)
        if len(warmed) == 1:
            raise TimeoutError

    talk = Exchange(bench.router, ask, warm, 1.0)
    seen = Observation("a", True)
    bench.router.observe(bench.router.table, bench.old, "200", seen)
    bench.router.count(bench.old, 1)
    with pytest.raises(TimeoutError):
        talk.once()
    assert bench.router.table.number == 1
    talk.once()
    talk.once()
    assert bench.router.table == table
    assert warmed == ["v2", "v2"]
    assert said[0] == (bench.router.name, [seen], {"v1": 1}, 1)
    assert [(item[1], item[3]) for item in said[1:]] == [([], 1), ([], 5)]


def test_exchange_serves_without_a_challenger_that_cannot_be_reached(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = RoutingTable(5, bench.old, REIGN, bench.new, (7, 0), share=0.5, stalled=True, problem="stalled")

    def warm(route: Route) -> None:
        if route == bench.new:
            raise TimeoutError

    talk = Exchange(bench.router, lambda *said: (table, {}), warm, 1.0)
    talk.once()
    assert (bench.router.table.number, bench.router.table.stalled, bench.router.table.share) == (5, True, 0.0)
    assert bench.router.table.challenger is None
    assert bench.seen() == [], "it may only be about to"
    monkeypatch.setattr(exchange, "_UNREACHABLE_S", 0.0)
    talk.once()
    [seen] = bench.seen()
    assert (seen.ok, seen.trial, seen.manifest_sha256) == (False, (7, 0), bench.new.manifest_sha256)


def test_exchange_keeps_the_champion_while_a_supervisor_starts_anew(bench: Bench) -> None:
    bench.set(share=0.5)
    answers = [RoutingTable(77, problem="the endpoint is starting"), RoutingTable(78, bench.new, REIGN)]
    talk = Exchange(bench.router, lambda *said: (answers[0], {}), lambda route: None, 1.0)
    talk.once()
    table = bench.router.table
    assert (table.champion, table.challenger, table.share, table.number) == (bench.old, None, 0.0, 1)
    assert table.problem == "the endpoint is starting"
    del answers[0]
    talk.once()
    assert bench.router.table.champion == bench.new


def test_exchange_repeats_a_message_under_its_number(bench: Bench) -> None:
    said: list[tuple[int, int]] = []

    def ask(name: str, message: int, seen: list[Observation], in_flight: dict[str, int], number: int) -> Any:
        said.append((message, len(seen)))
        if len(said) == 1:
            raise TimeoutError  # it was heard, and its answer was lost
        return bench.router.table, {}

    talk = Exchange(bench.router, ask, lambda route: None, 1.0)
    bench.router.observe(bench.router.table, bench.old, "200", Observation("a", True))
    with pytest.raises(TimeoutError):
        talk.once()
    bench.router.observe(bench.router.table, bench.old, "200", Observation("b", True))
    talk.once()
    talk.once()
    assert said == [(1, 1), (1, 1), (2, 1)]


def test_exchange_keeps_what_was_seen_while_the_supervisor_is_away(bench: Bench) -> None:
    heard: list[Observation] = []
    away = True

    def ask(name: str, message: int, seen: list[Observation], in_flight: dict[str, int], number: int) -> Any:
        if away:
            raise ConnectionError
        heard.extend(seen)
        return bench.router.table, {}

    talk = Exchange(bench.router, ask, lambda route: None, 1.0)
    for number in range(3):
        bench.router.observe(bench.router.table, bench.old, "200", Observation(str(number), True))
        with pytest.raises(ConnectionError):
            talk.once()
    away = False
    talk.once()
    talk.once()
    assert [seen.manifest_sha256 for seen in heard] == ["0", "1", "2"]
