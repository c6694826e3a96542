"""How long a transfer is tried: what is repeated, what ends it, and that its caller is never held."""

import dataclasses
import threading
import time

import pytest

from cluster.attempts import Attempts, CutAnswer, Limits
from cluster.errors import StorageError

LIMITS = Limits(
    patience_s=1.0,
    answer_s=0.4,
    min_bytes_per_s=1000,
    window_s=0.4,
    slow_attempts=2,
    first_pause_s=0.01,
    longest_pause_s=0.05,
)


def again(error):
    return "it broke" if isinstance(error, ConnectionError) else None


def test_attempts_are_repeated_until_one_succeeds():
    outcomes = [ConnectionError(), CutAnswer(), "done"]

    def attempt(progress):
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    attempts = Attempts("get 'k'", LIMITS, again)
    assert attempts.run(attempt) == "done"
    assert attempts.failures == 2


def test_attempts_that_cannot_help_are_not_repeated():
    calls = []

    def attempt(progress):
        calls.append(1)
        raise KeyError("k")

    with pytest.raises(KeyError):
        Attempts("get 'k'", LIMITS, again).run(attempt)
    assert len(calls) == 1


def test_attempts_end_with_patience():
    def attempt(progress):
        raise ConnectionError

    started = time.monotonic()
    with pytest.raises(StorageError, match=r"get 'k': it broke; gave up after \d+ attempts in 1 s: look at"):
        Attempts("get 'k'", LIMITS, again).run(attempt)
    assert 0.8 < time.monotonic() - started < 10


def test_attempts_that_went_on_for_a_while_begin_their_patience_anew():
    received = []

    def attempt(progress):
        progress.begin(1_000_000, kept=True)
        time.sleep(0.3)
        progress.move(1000)
        received.append(1)
        if len(received) < 8:  # 2.4 s of work, with a patience of one second
            raise ConnectionError
        return len(received)

    assert Attempts("get 'k'", LIMITS, again).run(attempt) == 8


def test_attempts_that_lose_what_they_moved_do_not():
    def attempt(progress):
        progress.begin(1_000_000)
        progress.move(100_000)
        raise ConnectionError

    started = time.monotonic()
    with pytest.raises(StorageError, match="gave up"):
        Attempts("put 'k'", LIMITS, again).run(attempt)
    assert time.monotonic() - started < 10


def test_attempts_without_an_answer_are_ended_though_they_hang():
    hanging = threading.Event()
    limits = dataclasses.replace(LIMITS, patience_s=60)
    with pytest.raises(StorageError, match="no answer in 0 s; gave up after 2 attempts"):
        Attempts("get 'k'", limits, again).run(lambda progress: hanging.wait(60))
    hanging.set()


def test_attempts_slower_than_the_least_rate_are_ended_and_their_threads_stopped():
    stopped = []

    def attempt(progress):
        unblocked = threading.Event()
        progress.on_cancel(unblocked.set)
        progress.begin(10_000)
        try:
            while not unblocked.wait(0.05):
                progress.move(5)  # 100 bytes a second, never silent for long
        finally:  # reached by the event or by the error that `move` raises, whichever comes first
            stopped.append(1)
        progress.move(5)

    with pytest.raises(StorageError, match=r"0 kB/s over 0 s, the least is 1 kB/s \(RAYS.*\); gave up after 2"):
        Attempts("get 'k'", LIMITS, again).run(attempt)
    end = time.monotonic() + 20
    while len(stopped) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    assert len(stopped) == 2


def test_attempts_end_with_the_time_for_the_whole():
    """Progress that is always just fast enough for a window does not make a transfer endless."""

    def attempt(progress):
        progress.begin(500, kept=True)
        time.sleep(0.3)
        progress.move(499)
        raise ConnectionError

    started = time.monotonic()
    with pytest.raises(StorageError, match="gave up after"):
        Attempts("get 'k'", dataclasses.replace(LIMITS, window_s=0.1), again, size_bytes=500).run(attempt)
    assert time.monotonic() - started < LIMITS.deadline_s(500) + 5


def test_attempts_hold_nothing_when_the_caller_is_interrupted():
    """An exception in the waiting thread, as Ctrl-C raises it, stops the transfer."""
    stopped = threading.Event()
    attempts = Attempts("get 'k'", LIMITS, again)

    def interrupted(*_):
        raise KeyboardInterrupt

    attempts._wait = interrupted

    def attempt(progress):
        progress.on_cancel(stopped.set)
        stopped.wait(30)

    with pytest.raises(KeyboardInterrupt):
        attempts.run(attempt)
    assert stopped.wait(5)


def test_limits_come_from_the_environment_and_bad_ones_are_one_line(monkeypatch):
    assert Limits.of_environment() == Limits()
    monkeypatch.setenv("RAYSTILL_STORAGE_MIN_BYTES_PER_S", "5e4")
    monkeypatch.setenv("RAYSTILL_STORAGE_PATIENCE_S", "10")
    assert Limits.of_environment() == Limits(min_bytes_per_s=50_000.0, patience_s=10.0)
    for bad in ("0", "-1", "inf", "nan", "200 kB"):
        monkeypatch.setenv("RAYSTILL_STORAGE_MIN_BYTES_PER_S", bad)
        with pytest.raises(StorageError, match=r"RAYSTILL_STORAGE_MIN_BYTES_PER_S='.*': expected a positive number"):
            Limits.of_environment()
