"""Joining requests that wait: in order, up to the budget, none failing its neighbours, none computed for nobody."""

import asyncio
import threading
from typing import Any

from services.teacher.merging import Merger
from services.teacher.schema import ScoreRequest
from services.teacher.signals import SignalSpec
from tests.in_process_teacher import make_request

HIDDEN = SignalSpec("hidden", 320)


class Recorder:
    """Replies with the number of tokens; notes its batches; waits at a gate; fails for a marked request."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.gate = threading.Event()

    def __call__(self, requests: list[ScoreRequest]) -> list[Any]:
        self.batches.append([request.request_id for request in requests])
        assert self.gate.wait(30)
        if any(request.request_id == "bad" for request in requests):
            raise ValueError("bad")
        return [request.request_id for request in requests]


def merge(names_and_tokens: list[tuple[str, int]], recorder: Recorder, cancelled: str | None = None) -> list[Any]:
    """Asks for "first", and for the others while that one runs."""

    async def ask() -> list[Any]:
        merger = Merger(recorder, max_tokens=10)
        first = asyncio.ensure_future(merger.reply(make_request([3], HIDDEN, name="first")))
        while not recorder.batches:
            await asyncio.sleep(0)
        others = {
            name: asyncio.ensure_future(merger.reply(make_request([tokens], HIDDEN, name=name)))
            for name, tokens in names_and_tokens
        }
        await asyncio.sleep(0)
        if cancelled is not None:
            others[cancelled].cancel()
            await asyncio.sleep(0)
        recorder.gate.set()
        return await asyncio.gather(first, *others.values(), return_exceptions=True)

    return asyncio.run(ask())


def test_merger_joins_what_waits_up_to_the_budget_in_order():
    recorder = Recorder()
    replies = merge([("a", 4), ("b", 4), ("c", 3), ("d", 7), ("e", 12), ("f", 1)], recorder)
    assert replies == ["first", "a", "b", "c", "d", "e", "f"]
    assert recorder.batches == [["first"], ["a", "b"], ["c", "d"], ["e"], ["f"]]


def test_merger_tells_what_it_does():
    seen: list[Any] = []

    class Notes:
        def in_flight(self, tokens: int) -> None:
            seen.append(tokens)

        def batch(self, tokens: int, fill: float, age_s: float) -> None:
            assert 0 <= age_s < 30
            seen.append(("batch", tokens, fill))

    recorder = Recorder()
    recorder.gate.set()

    async def ask() -> None:
        merger = Merger(recorder, 10, Notes())
        await asyncio.gather(*(merger.reply(make_request([tokens], HIDDEN, name=str(tokens))) for tokens in (4, 5, 3)))

    asyncio.run(ask())
    assert [item for item in seen if isinstance(item, tuple)] == [("batch", 9, 0.9), ("batch", 3, 0.3)]
    counts = [item for item in seen if isinstance(item, int)]
    assert (max(counts), counts[-1]) == (12, 0)


def test_merger_begins_a_second_batch_only_when_it_is_full_and_never_a_third():
    recorder = Recorder()

    async def ask() -> list[Any]:
        merger = Merger(recorder, max_tokens=10)
        asked = []

        async def begin(name: str, tokens: int) -> list[list[str]]:
            asked.append(asyncio.ensure_future(merger.reply(make_request([tokens], HIDDEN, name=name))))
            await asyncio.sleep(0.05)
            return recorder.batches

        assert await begin("first", 3) == [["first"]]
        assert await begin("waits", 6) == [["first"]]
        assert await begin("fills", 4) == [["first"], ["waits", "fills"]]
        assert len(await begin("other", 10)) == 2
        recorder.gate.set()
        return await asyncio.gather(*asked)

    assert asyncio.run(ask()) == ["first", "waits", "fills", "other"]
    assert recorder.batches[2:] == [["other"]]


def test_merger_bad_request_fails_alone():
    recorder = Recorder()
    first, good, bad, other = merge([("good", 2), ("bad", 2), ("other", 2)], recorder)
    assert (first, good, other) == ("first", "good", "other")
    assert isinstance(bad, ValueError)
    assert recorder.batches[1:] == [["good", "bad", "other"], ["good"], ["bad"], ["other"]]


def test_merger_does_not_repeat_a_request_that_failed_alone_nor_one_whose_caller_has_gone():
    recorder = Recorder()
    replies = merge([("bad", 10)], recorder)
    assert isinstance(replies[1], ValueError)
    assert recorder.batches == [["first"], ["bad"]]

    async def ask() -> list[Any]:
        merger, recorder.batches = Merger(recorder, max_tokens=10), []
        recorder.gate.clear()
        names = ("first", "gone", "bad", "good")
        asked = [asyncio.ensure_future(merger.reply(make_request([3], HIDDEN, name=name))) for name in names]
        while not recorder.batches:
            await asyncio.sleep(0)
        asked[1].cancel()  # while it is computed
        recorder.gate.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    first, gone, bad, good = asyncio.run(ask())
    assert (first, good) == ("first", "good")
    assert isinstance(gone, asyncio.CancelledError)
    assert isinstance(bad, ValueError)
    assert recorder.batches == [["first", "gone", "bad"], ["first"], ["bad"], ["good"]]


def test_merger_leaves_out_requests_whose_caller_has_gone():
    recorder = Recorder()
    replies = merge([("gone", 2), ("kept", 2)], recorder, cancelled="gone")
    assert isinstance(replies[1], asyncio.CancelledError)
    assert replies[2] == "kept"
    assert recorder.batches == [["first"], ["kept"]]
