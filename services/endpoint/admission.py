"""How much may be in the house at once: requests and tokens, counted where requests come in.

A request that would not be answered soon is refused at once, before its body is read where that can be known, and long
before a model hears of it: a queue without a bound turns overload into time-outs, and work spent on a refusal is taken
from the answers. A request holds its place from the moment its body is read until its answer is sent; a client that
sends slowly holds none.

Among several keys, one that asks without end must not shut out the others: a key holds at most `GREED` times as many
places as are free (dynamic thresholds, Choudhury and Hahne 1998). Alone it gets two thirds of them, and there is always
room for the next key, whoever that is.

The path of a request:

    Envelope ──► authenticate ──► open_account ──► body ──► Account.admit ──► work ──► Account.close
                 401                429, 503       408, 413   403, 429, 503            what it did cost
"""

import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, Protocol, Self, TypeVar

from cluster.api_keys import ApiKey
from services.endpoint.errors import ApiError, unavailable
from services.endpoint.keys import check_model_allowed
from services.endpoint.limits import BYTES_PER_TOKEN, KeyLimits, Limits

GREED = 2

_LONGEST_RETRY_S = 30
_SMOOTHING = 0.1
"""Weight of the latest answer in the mean time between two answers."""

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Admission:
    """Places for requests and tokens. Used on one event loop."""

    def __init__(self, max_requests: int, max_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.num_requests = 0
        """Requests that hold a place now."""
        self.num_tokens = 0
        """What these may cost at most, by the guess at admission."""
        self._held: Counter[str] = Counter()
        self._clock = clock
        self._interval_s = 0.0
        self._left_at: float | None = None

    def check(self, key: ApiKey | None, num_tokens: int = 0) -> None:
        """Raises `ApiError` if there is no place now: 503, or 429 where the key itself holds too many."""
        too_many = self.num_requests >= self.max_requests
        # A request that is larger than the whole bound gets in when it is alone.
        too_large = bool(self.num_tokens) and self.num_tokens + num_tokens > self.max_tokens
        if too_many or too_large:
            message = "The server is overloaded; try again later."
            raise unavailable(message, "server_overloaded", retry_after_s=self.retry_after_s())
        if key is not None and self._held[key.id] >= GREED * (self.max_requests - self.num_requests):
            raise ApiError(
                429,
                f"This API key has {self._held[key.id]} requests running or waiting, which is its share; wait for some",
                kind="requests",
                code="rate_limit_exceeded",
                headers={"retry-after": str(self.retry_after_s())},
            )

    def enter(self, key: ApiKey | None, num_tokens: int) -> None:
        """Takes a place; the same refusals."""
        self.check(key, num_tokens)
        self.num_requests += 1
        self.num_tokens += num_tokens
        if key is not None:
            self._held[key.id] += 1

    def leave(self, key: ApiKey | None, num_tokens: int) -> None:
        self.num_requests -= 1
        self.num_tokens -= num_tokens
        if key is not None:
            self._held[key.id] -= 1
            if not self._held[key.id]:
                del self._held[key.id]
        now = self._clock()
        if self._left_at is not None and self.num_requests:  # a pause without work says nothing about the speed
            self._interval_s += _SMOOTHING * (now - self._left_at - self._interval_s)
        self._left_at = now

    def retry_after_s(self) -> int:
        """Whole seconds until half of those inside have left, spread a little so that not all come back at once."""
        expected_s = self._interval_s * self.num_requests / 2 * random.uniform(1, 2)
        return max(1, min(_LONGEST_RETRY_S, math.ceil(expected_s)))


class Work(Protocol[T_co]):
    """What an account can count: an asynchronous iterator that can be cancelled."""

    def __aiter__(self) -> AsyncIterator[T_co]: ...
    async def __anext__(self) -> T_co: ...
    def cancel(self) -> None: ...


class Counting(Protocol):
    """What a route says of a request: an `Account`, or whoever else counts."""

    def admit(self, model: str, body_bytes: int, max_new_tokens: int) -> None: ...
    def use(self, num_tokens: int) -> None: ...
    def use_reserved(self) -> None: ...
    def counted(self, work: Work[T]) -> Work[T]: ...


class Account:
    """What one request was granted and what it used. Opened when it comes in, closed when its answer is sent."""

    def __init__(self, admission: Admission, key: ApiKey | None, limits: KeyLimits | None) -> None:
        """Raises `ApiError` if there is no place now, or the key has no request left this minute."""
        admission.check(key)
        if limits is not None:
            limits.take_request()
        self.key = key
        self._admission, self._limits = admission, limits
        self._reserved: int | None = None
        self._used = 0
        self._given_back = False

    def admit(self, model: str, body_bytes: int, max_new_tokens: int) -> None:
        """Lets a request in whose body was read and checked.

        Args:
            model: what it asks for.
            max_new_tokens: the longest answer it may get, all choices together.

        Raises:
            ApiError: 403, the key is for other models; 429, too many tokens for its minute; 503, no place.
        """
        check_model_allowed(self.key, model)
        num_tokens = body_bytes // BYTES_PER_TOKEN + max_new_tokens
        self._admission.check(self.key, num_tokens)
        if self._limits is not None:
            self._limits.take_tokens(num_tokens)
        self._admission.enter(self.key, num_tokens)
        self._reserved = num_tokens

    def use(self, num_tokens: int) -> None:
        """Counts tokens that were read or written for this request."""
        self._used += num_tokens

    def use_reserved(self) -> None:
        """Counts what was reserved as used: for a request whose cost nobody says."""
        self._used = self._reserved or 0

    def counted(self, work: Work[T]) -> Work[T]:
        """The same work; what passes is counted: first the number of prompt tokens, then pieces by `num_sampled`."""
        return Counted(work, self)

    def give_back_request(self) -> None:
        """Takes the request from the key's count again: its answer is a refusal. May be called twice."""
        if self._limits is not None and not self._given_back:
            self._limits.give_back_request()
        self._given_back = True

    def close(self) -> None:
        """Gives the place back and charges what was used instead of what was reserved. May be called twice."""
        if self._reserved is None:
            return
        if self._limits is not None:
            self._limits.charge_tokens(self._used - self._reserved)
        self._admission.leave(self.key, self._reserved)
        self._reserved = None

    def headers(self) -> dict[str, str]:
        """What the answer says about the key's limits."""
        return self._limits.headers() if self._limits is not None else {}


class Counted(Generic[T]):
    """Work whose tokens are counted on the way."""

    def __init__(self, work: Work[T], account: Account) -> None:
        self._work, self._account = work, account

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        item: Any = await self._work.__anext__()
        self._account.use(item if isinstance(item, int) else item.num_sampled)
        return item

    def cancel(self) -> None:
        self._work.cancel()


class Gate:
    """Admission and limits of one process: what `Envelope` asks before a request is let through."""

    def __init__(self, admission: Admission, limits: Limits) -> None:
        self._admission, self._limits = admission, limits

    def open_account(self, key: ApiKey | None) -> Account:
        """Raises `ApiError` 503 or 429 before anything was read."""
        return Account(self._admission, key, self._limits.of(key))

    def headers(self, key: ApiKey | None) -> dict[str, str]:
        """What a refusal says about the key's limits."""
        limits = self._limits.of(key)
        return limits.headers() if limits is not None else {}
