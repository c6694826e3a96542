"""Token buckets, places and fairness, by a clock that the test moves."""

import heapq
import random

import pytest

from cluster.api_keys import ApiKey
from services.endpoint.admission import Account, Admission, Counted, Gate
from services.endpoint.errors import ApiError
from services.endpoint.limits import LONGEST_WAIT_S, Limits, TokenBucket, duration


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def a_key(name="k", requests=None, tokens=None, models=()):
    return ApiKey(name, "0" * 64, name, models, requests, tokens, 0.0, None, None)


def refused(call, *arguments):
    with pytest.raises(ApiError) as found:
        call(*arguments)
    return found.value


def test_bucket_fills_evenly_and_may_be_overdrawn():
    bucket = TokenBucket(60, now=0)
    bucket.charge(90, now=0)
    assert bucket.level(0) == -30
    assert bucket.wait_s(1, 0) == 31
    assert bucket.level(40) == 10
    assert bucket.level(1e9) == 60
    bucket.charge(-1000, now=40)
    assert bucket.level(40) == 60
    assert bucket.level(30) == 60  # a clock that goes back takes nothing


def test_bucket_grants_its_rate_in_the_long_run_and_a_minute_at_once():
    bucket, granted = TokenBucket(120, now=0), 0
    for step in range(6000):  # ten minutes, ten requests a second
        if bucket.wait_s(1, step / 10) == 0:
            bucket.charge(1, step / 10)
            granted += 1
    assert 120 + 10 * 120 - 2 <= granted <= 120 + 10 * 120


def test_requests_beyond_the_limit_wait_as_long_as_they_are_told(clock):
    limits = Limits(clock=clock).of(a_key(requests=30))
    for _ in range(30):
        limits.take_request()
    error = refused(limits.take_request)
    assert (error.status, error.code, error.headers) == (429, "rate_limit_exceeded", {"retry-after": "2"})
    clock.now += 1.9
    refused(limits.take_request)
    clock.now += 0.1
    limits.take_request()


def test_tokens_are_reserved_and_then_charged_as_used(clock):
    gate = Gate(Admission(8, 10_000, clock), Limits(clock=clock))
    key = a_key(tokens=1000)
    account = gate.open_account(key)
    account.admit("m", body_bytes=400, max_new_tokens=300)
    assert account.headers()["x-ratelimit-remaining-tokens"] == "600"
    account.use(20)
    account.use(30)
    account.close()
    account.close()
    assert account.headers()["x-ratelimit-remaining-tokens"] == "950"
    low = gate.open_account(key)
    low.admit("m", body_bytes=40, max_new_tokens=10)
    low.use(2000)  # more than was thought: the key waits for it
    low.close()
    waiting = gate.open_account(key)
    error = refused(waiting.admit, "m", 40, 10)
    assert error.headers == {"retry-after": str(round((2000 - 950 + 20) * 60 / 1000) + 1)}
    waiting.close()
    clock.now += 66
    gate.open_account(key).admit("m", 40, 10)


def test_request_that_can_never_fit_its_minute_is_not_to_be_tried_again(clock):
    gate = Gate(Admission(8, 10_000, clock), Limits(clock=clock))
    error = refused(gate.open_account(a_key(tokens=100, requests=5)).admit, "m", 4000, 1)
    assert (error.status, error.headers) == (429, {"x-should-retry": "false"})


def test_wait_is_never_longer_than_clients_take_for_an_answer(clock):
    limits = Limits(clock=clock).of(a_key(tokens=60))
    limits.charge_tokens(10_000)
    assert int(refused(limits.take_tokens, 1).headers["retry-after"]) == LONGEST_WAIT_S


def test_what_is_refused_costs_no_request(clock):
    key = a_key(requests=10, tokens=100)
    gate = Gate(Admission(1, 10_000, clock), Limits(clock=clock))
    inside = gate.open_account(key)
    second = gate.open_account(key)
    inside.admit("m", 40, 1)
    refused(second.admit, "m", 40, 1)  # no place
    assert inside.headers()["x-ratelimit-remaining-requests"] == "8"
    second.give_back_request()
    second.give_back_request()
    refused(gate.open_account, key)
    inside.close()
    assert inside.headers()["x-ratelimit-remaining-requests"] == "9"


def test_headers_say_what_openai_says(clock):
    limits = Limits(clock=clock).of(a_key(requests=60, tokens=6000))
    limits.take_request()
    limits.take_tokens(50)
    assert limits.headers() == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "5950",
        "x-ratelimit-reset-tokens": "500ms",
    }
    assert Limits(clock=clock).of(a_key()) is None
    assert Limits(clock=clock).of(None) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0001, "1ms"), (0.017, "17ms"), (1, "1s"), (1.5, "1.5s"), (59.9999, "1m0s"), (360, "6m0s")],
)
def test_duration_is_written_as_openai_does(seconds, text):
    assert duration(seconds) == text


def test_shares_of_two_processes_are_the_limit_together(clock):
    granted = 0
    for limits in (Limits(2, clock).of(a_key(requests=30)) for _ in range(2)):
        for _ in range(30):
            try:
                limits.take_request()
                granted += 1
            except ApiError:
                continue
    assert granted == 30


# --- places -----------------------------------------------------------------------------------------------------------


def test_small_limit_shared_by_many_processes_grants_its_rate(clock):
    shares = [Limits(8, clock) for _ in range(8)]
    granted = 0
    for _ in range(600):
        for share in shares:
            try:
                share.of(a_key(requests=1)).take_request()
                granted += 1
            except ApiError:
                pass
        clock.now += 1
    assert 10 <= granted <= 10 + 8  # one a minute, and one at once in each


def test_places_are_bounded_and_come_back(clock):
    admission = Admission(3, 100, clock)
    for _ in range(3):
        admission.enter(None, 10)
    error = refused(admission.enter, None, 10)
    assert (error.status, error.code) == (503, "server_overloaded")
    assert 1 <= int(error.headers["retry-after"]) <= 30
    admission.leave(None, 10)
    admission.enter(None, 80)
    assert (admission.num_requests, admission.num_tokens) == (3, 100)


def test_tokens_are_bounded_but_one_large_request_gets_in(clock):
    admission = Admission(10, 100, clock)
    admission.enter(None, 5000)
    refused(admission.enter, None, 1)
    admission.leave(None, 5000)
    admission.enter(None, 60)
    refused(admission.enter, None, 41)
    admission.enter(None, 40)


def test_one_key_leaves_room_for_the_next(clock):
    admission = Admission(34, 10**6, clock)
    greedy, other = a_key("greedy"), a_key("other")
    for _ in range(23):
        admission.enter(greedy, 1)
    error = refused(admission.enter, greedy, 1)  # 23 held, 11 free
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    for _ in range(8):
        admission.enter(other, 1)
    assert refused(admission.enter, greedy, 1).status == 429


def test_model_that_the_key_is_not_for_is_403_and_takes_no_place(clock):
    admission = Admission(2, 100, clock)
    gate = Gate(admission, Limits(clock=clock))
    account = gate.open_account(a_key(models=("mine",)))
    error = refused(account.admit, "other", 4, 1)
    assert (error.status, error.param, error.code) == (403, "model", "model_not_allowed")
    account.close()
    assert admission.num_requests == 0
    account = gate.open_account(a_key(models=("mine",)))
    account.admit("mine@challenger", 4, 1)
    assert admission.num_requests == 1


def test_counted_work_passes_on_what_it_counts(clock):
    import asyncio

    class Work:
        cancelled = False

        def __init__(self):
            self.items = iter([7, type("Piece", (), {"num_sampled": 3})(), type("Piece", (), {"num_sampled": 0})()])

        def __aiter__(self):
            return self

        async def __anext__(self):
            try:
                return next(self.items)
            except StopIteration:
                raise StopAsyncIteration from None

        def cancel(self):
            self.cancelled = True

    account = Account(Admission(2, 100, clock), a_key(), Limits(clock=clock).of(a_key(tokens=100)))
    account.admit("m", 0, 50)
    work = Work()
    counted = Counted(work, account)

    async def read():
        return [item async for item in counted]

    assert asyncio.run(read())[0] == 7
    counted.cancel()
    assert work.cancelled
    account.close()
    assert account.headers()["x-ratelimit-remaining-tokens"] == "90"


def simulate(rates, *, servers=2, service_s=0.5, places=34, seconds=600, requests_per_minute=None, tries=1):
    """Shares of the requests of each key that were answered; Poisson arrivals, one queue, first come first served.

    A refused request comes again after its Retry-After, up to `tries` times in all, as OpenAI's client does.
    """
    chance, clock = random.Random(1), Clock()
    admission, limits = Admission(places, 10**9, clock), Limits(clock=clock)
    gate = Gate(admission, limits)
    keys = [a_key(f"k{number}", requests=requests_per_minute) for number in range(len(rates))]
    asked, answered, free_at = [0] * len(rates), [0] * len(rates), [0.0] * servers
    events, order = [], iter(range(10**9))
    for number, rate in enumerate(rates):
        at = clock.now
        while (at := at + chance.expovariate(rate)) < clock.now + seconds:
            events.append((at, next(order), "ask", number, 1))
            asked[number] += 1
    heapq.heapify(events)
    while events:
        clock.now, _, what, number, extra = heapq.heappop(events)
        if what == "leave":
            extra.close()
            continue
        try:
            account = gate.open_account(keys[number])
            account.admit("m", 40, 10)
        except ApiError as error:
            if extra < tries:
                later = clock.now + int(error.headers["retry-after"])
                heapq.heappush(events, (later, next(order), "ask", number, extra + 1))
            continue
        server = min(range(servers), key=free_at.__getitem__)
        free_at[server] = max(free_at[server], clock.now) + chance.expovariate(1 / service_s)
        heapq.heappush(events, (free_at[server], next(order), "leave", number, account))
        answered[number] += 1
    return [found / count for found, count in zip(answered, asked, strict=True)]


def test_greedy_key_at_fifty_times_leaves_the_nine_others_theirs_by_places():
    greedy, *others = simulate([10.0, *[0.2] * 9])  # capacity 4 a second; the nine ask 1.8
    assert min(others) >= 0.99
    assert greedy < 0.4


def test_greedy_key_at_fifty_times_leaves_the_nine_others_theirs_by_limits():
    greedy, *others = simulate([10.0, *[0.2] * 9], requests_per_minute=60)
    assert min(others) >= 0.99
    assert greedy < 0.15


def test_without_places_by_key_the_greedy_one_shuts_out_the_others(monkeypatch):
    monkeypatch.setattr("services.endpoint.admission.GREED", 10**9)
    _, *others = simulate([10.0, *[0.2] * 9])
    assert max(others) < 0.9
