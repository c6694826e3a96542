"""How many requests a client may have under way: more while answers are quick, fewer when they are slow, in order."""

import contextlib
import threading
import time

import pytest

from services.teacher.pacing import Pacing


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def answer(pacing, clock, seconds):
    with pacing.place():
        clock.now += seconds


def test_places_grow_with_quick_answers_up_to_the_most():
    clock = Clock()
    pacing = Pacing(6, slow_s=10, clock=clock)
    seen = []
    for _ in range(6):
        answer(pacing, clock, 1)
        seen.append(pacing.places)
    assert seen == [3, 4, 5, 6, 6, 6]


def test_places_stay_with_answers_that_are_neither_quick_nor_slow():
    clock = Clock()
    pacing = Pacing(6, slow_s=10, clock=clock)
    for seconds in (5, 7, 10):
        answer(pacing, clock, seconds)
    assert pacing.places == 2


def test_places_do_not_grow_with_quick_failures_but_shrink_with_slow_ones():
    clock = Clock()
    pacing = Pacing(6, slow_s=10, clock=clock)

    def fail(seconds):
        with contextlib.suppress(TimeoutError), pacing.place():
            clock.now += seconds
            raise TimeoutError

    fail(1)
    assert pacing.places == 2
    fail(11)
    assert pacing.places == 1


def test_places_halve_with_slow_answers_but_one_is_always_left():
    clock = Clock()
    pacing = Pacing(16, slow_s=10, clock=clock)
    for _ in range(14):
        answer(pacing, clock, 1)
    seen = []
    for _ in range(6):
        answer(pacing, clock, 11)
        seen.append(pacing.places)
    assert seen == [8, 4, 2, 1, 1, 1]


def test_places_halve_once_for_all_that_were_under_way_together():
    clock = Clock()
    pacing = Pacing(8, slow_s=10, clock=clock)
    for _ in range(6):
        answer(pacing, clock, 1)
    held = [pacing.place() for _ in range(8)]
    for place in held:
        place.__enter__()
    clock.now += 60
    for place in held:
        place.__exit__(None, None, None)
    assert pacing.places == 4


def test_place_is_given_back_when_the_request_fails():
    pacing = Pacing(1, slow_s=10)
    for _ in range(3):
        with pytest.raises(ConnectionError), pacing.place():
            raise ConnectionError
    with pacing.place():
        pass


def test_waiting_requests_go_in_order_and_never_more_than_the_places():
    pacing = Pacing(1, slow_s=1e9)
    order, threads = [], []
    inside = [0, 0]  # now, most

    def ask(number):
        with pacing.place():
            inside[0] += 1
            inside[1] = max(inside)
            order.append(number)
            time.sleep(0.001)
            inside[0] -= 1

    with pacing.place():
        for number in range(20):
            thread = threading.Thread(target=ask, args=(number,))
            thread.start()
            threads.append(thread)
            while pacing._next_ticket < number + 2:  # it waits now; the next one must be behind it
                time.sleep(0.0005)
    for thread in threads:
        thread.join(10)
    assert order == list(range(20))
    assert inside[1] == 1


def test_close_lets_those_who_wait_go():
    pacing = Pacing(1, slow_s=10)
    with pacing.place():
        thread = threading.Thread(target=lambda: pacing.place().__enter__())
        thread.start()
        pacing.close()
        thread.join(10)
        assert not thread.is_alive()
