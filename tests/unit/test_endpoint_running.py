"""The way of pieces from the scheduler's thread to the event loop."""

import asyncio
from typing import Any

import pytest

from cluster.errors import ModelError
from services.endpoint.decoding import Piece
from services.endpoint.engines.requests import END
from services.endpoint.running import Running


def test_running_merges_what_comes_while_nobody_looks_and_ends_at_once() -> None:
    async def scenario() -> list[Any]:
        running = Running(7, lambda: 1000)  # a pause of seconds between two events
        found = [await anext(running)]
        running.deliver([Piece(0, "a", num_sampled=1)])
        found.append(await anext(running))
        for text in "bcd":
            running.deliver([Piece(0, text, num_sampled=1), Piece(1, text, num_sampled=1)])
        waiting = asyncio.ensure_future(anext(running))
        await asyncio.sleep(0.05)
        assert not waiting.done(), "the second event comes before its time"
        running.deliver([Piece(0, "e", [], 1, "stop"), END])
        found.append(await asyncio.wait_for(waiting, 1))
        found += [item async for item in running]
        return found

    assert asyncio.run(scenario()) == [
        7,
        Piece(0, "a", [], 1),
        Piece(0, "bcde", [], 4, "stop"),
        Piece(1, "bcd", [], 3),
    ]


def test_running_raises_the_error_behind_what_came_before() -> None:
    async def scenario() -> None:
        running = Running(1, lambda: 1)
        running.deliver([Piece(0, "a"), ModelError("broken"), END])
        assert await anext(running) == 1
        assert await anext(running) == Piece(0, "a")
        with pytest.raises(ModelError, match="broken"):
            await anext(running)
        assert [item async for item in running] == []

    asyncio.run(scenario())
