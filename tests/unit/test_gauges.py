"""A gauge whose values are set again while nothing changes, and whose thread ends with it."""

import gc
import threading
import time

from cluster.gauges import LastingGauge


class Recorder:
    def __init__(self):
        self.calls = []

    def set(self, value, tags=None):
        self.calls.append((value, tags))


def until(condition, seconds=20):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.005)


def test_gauge_repeats_the_last_value_of_every_set_of_tags():
    inner = Recorder()
    gauge = LastingGauge(inner, every_s=0.01)
    gauge.set(1, {"version": "1"})
    gauge.set(7, {"version": "1"})
    gauge.set(3)
    assert inner.calls[:3] != []
    until(lambda: len(inner.calls) > 8)
    assert set(map(str, inner.calls[-2:])) == {str((7, {"version": "1"})), str((3, None))}


def test_gauge_reads_a_value_that_is_a_function_again():
    inner, waiting = Recorder(), [1]
    gauge = LastingGauge(inner, every_s=0.01)
    gauge.set(lambda: len(waiting), {"version": "1"})
    assert inner.calls == [(1, {"version": "1"})]
    waiting.clear()
    until(lambda: inner.calls[-1] == (0, {"version": "1"}))


def test_gauge_thread_ends_with_it():
    before = set(threading.enumerate())
    gauge = LastingGauge(Recorder(), every_s=0.01)
    [thread] = set(threading.enumerate()) - before
    assert thread.daemon
    del gauge
    gc.collect()
    until(lambda: not thread.is_alive())
