"""Limits of a key on requests and tokens per minute: token buckets, and the headers that tell a client about them.

A bucket holds a minute's worth and fills evenly. A request takes one from the first bucket when it comes in. From the
second it takes, once its body is read, what it may cost at most by a guess (a quarter of the body's bytes and the
longest answer asked for), and is charged what it did cost when it ends: a guess that was too low leaves the bucket
below zero, and the key waits that much longer. What is refused costs nothing, save one request for a mistake of the
client's.

The counts are this process's own. With several processes in front, each grants its share: a key whose requests do not
spread evenly meets its limit earlier, and never gets more than it. One row in SQL per key would be exact, and costs
4 ms a request on SQLite (median; 87 ms at the 99th percentile) and 16 ms on PostgreSQL where memory costs a
microsecond (`python -m tests.benchmarks.limits`, on two busy cores): more than many an answer.
"""

import math
import time
from collections.abc import Callable

from cluster.api_keys import ApiKey
from services.endpoint.errors import ApiError

LONGEST_WAIT_S = 120
"""OpenAI's client does not try again at all when it is asked to wait longer."""

BYTES_PER_TOKEN = 4
"""Of a request's body, for the guess at admission."""


class TokenBucket:
    """At most `per_minute` at once, filled at `per_minute / 60` a second; may be overdrawn by `charge`.

    The token bucket of ATM and of RFC 2697, with the time as an argument.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self.per_minute = per_minute
        self.most = max(1.0, per_minute)
        self._level = self.most
        self._at = now

    def level(self, now: float) -> float:
        """What could be taken now; below zero when more was charged than was there."""
        elapsed_s = max(0.0, now - self._at)
        return min(self.most, self._level + elapsed_s * self.per_minute / 60)

    def charge(self, amount: float, now: float) -> None:
        """Takes `amount`, also if it is not there; a negative one gives back."""
        self._level, self._at = min(self.most, self.level(now) - amount), now

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` could be taken, 0 if it can be now."""
        return max(0.0, amount - self.level(now)) * 60 / self.per_minute


class KeyLimits:
    """The buckets of one key."""

    def __init__(self, key: ApiKey, num_shares: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._requests = _bucket(key.requests_per_minute, num_shares, clock())
        self._tokens = _bucket(key.tokens_per_minute, num_shares, clock())

    def take_request(self) -> None:
        """Raises `ApiError` 429 if this minute's requests are used up."""
        self._take(self._requests, 1, "requests")

    def give_back_request(self) -> None:
        if self._requests is not None:
            self._requests.charge(-1, self._clock())

    def take_tokens(self, num_tokens: int) -> None:
        """Raises `ApiError` 429 if this minute's tokens do not suffice."""
        self._take(self._tokens, num_tokens, "tokens")

    def charge_tokens(self, num_tokens: int) -> None:
        """Takes more, or gives back a negative number."""
        if self._tokens is not None:
            self._tokens.charge(num_tokens, self._clock())

    def headers(self) -> dict[str, str]:
        """`x-ratelimit-{limit,remaining,reset}-{requests,tokens}` for the limits that there are.

        `reset` is the time until the bucket is full, as OpenAI writes it: `120ms`, `1.5s`, `1m0s`.
        """
        found = {}
        now = self._clock()
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = str(math.ceil(bucket.per_minute))
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, int(bucket.level(now))))
                found[f"x-ratelimit-reset-{name}"] = duration(bucket.wait_s(bucket.most, now))
        return found

    def _take(self, bucket: TokenBucket | None, amount: int, what: str) -> None:
        if bucket is None:
            return
        now, limit = self._clock(), f"{math.ceil(bucket.per_minute)} {what} per minute"
        if amount > bucket.most:
            raise ApiError(
                429,
                f"Request too large: it may cost {amount} {what}, this key has {limit}",
                kind=what,
                code="rate_limit_exceeded",
                headers={"x-should-retry": "false"},
            )
        wait_s = bucket.wait_s(amount, now)
        if wait_s > 0:
            raise ApiError(
                429,
                f"Rate limit reached: {limit}; try again in {duration(wait_s)}",
                kind=what,
                code="rate_limit_exceeded",
                headers={"retry-after": str(min(LONGEST_WAIT_S, math.ceil(wait_s)))},
            )
        bucket.charge(amount, now)


class Limits:
    """The buckets of all keys that have asked. Used on one event loop."""

    def __init__(self, num_shares: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        """`num_shares`: processes that grant the same keys' limits, each its part."""
        self._num_shares, self._clock = num_shares, clock
        self._by_key: dict[str, KeyLimits] = {}

    def of(self, key: ApiKey | None) -> KeyLimits | None:
        """None where nothing is limited."""
        if key is None or (key.requests_per_minute is None and key.tokens_per_minute is None):
            return None
        if key.id not in self._by_key:  # at most one entry for each key that was ever made
            self._by_key[key.id] = KeyLimits(key, self._num_shares, self._clock)
        return self._by_key[key.id]


def _bucket(per_minute: int | None, num_shares: int, now: float) -> TokenBucket | None:
    return TokenBucket(per_minute / num_shares, now) if per_minute is not None else None


def duration(seconds: float) -> str:
    """Seconds as OpenAI's headers have them, rounded up: `0s`, `17ms`, `1.5s`, `6m0s`."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(milliseconds, 60_000)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{minutes}m{text}s" if minutes else f"{text}s"
