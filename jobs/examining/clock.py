"""Clocks beside each other: storage's, this machine's, the cluster's, each node's.

S3 refuses requests that are signed fifteen minutes off; well before that the times of records and of leases mislead.
"""

import email.utils
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from cluster.storage import open_storage
from jobs.examining.check import Check

_WARNING_S, _FAILURE_S = 5.0, 300.0
_TIMEOUT_S = 10.0
_TRIES = 3


def check_clock(where: str, uri: str) -> Iterator[Check]:
    """This machine's clock beside the storage server's."""
    storage = open_storage(uri)
    client = getattr(storage, "client", None)
    ahead_s = None if client is None else server_ahead_s(client.meta.endpoint_url)
    if ahead_s is None:
        yield Check(where, "clock", "ok", f"{storage.uri} has this machine's")
    else:
        yield check_skew(where, -ahead_s, "the storage server's")


def check_skew(where: str, ahead_s: float, whose: str) -> Check:
    """A clock beside another.

    Args:
        ahead_s: by which the one of `where` is ahead.
        whose: the other, as in "the head's".
    """
    found = f"{ahead_s:+.0f} s from {whose}"
    if abs(ahead_s) <= _WARNING_S:
        return Check(where, "clock", "ok", found)
    fix = "set the clock (chrony or systemd-timesyncd)"
    if abs(ahead_s) > _FAILURE_S:
        return Check(where, "clock", "failure", found, f"{fix}: S3 refuses beyond")
    return Check(where, "clock", "warning", found, fix)


def server_ahead_s(url: str, open_url: Callable[..., Any] = urllib.request.urlopen) -> float | None:
    """Seconds by which a server's clock is ahead of this machine's, by the date of its answer; None where it has none.

    Args:
        open_url: as `urllib.request.urlopen`.
    """
    request = urllib.request.Request(url, method="HEAD")
    before = time.time()
    try:
        with open_url(request, timeout=_TIMEOUT_S) as answer:
            stamp = answer.headers.get("Date")
    except urllib.error.HTTPError as error:  # it says the time whatever it thinks of the question
        stamp = error.headers.get("Date")
    after = time.time()
    if not stamp:
        return None
    return email.utils.parsedate_to_datetime(stamp).timestamp() + 0.5 - (before + after) / 2


def ahead_s(now: Callable[[], float]) -> float:
    """Seconds by which another clock is ahead of this one's; of a few answers the soonest counts.

    Args:
        now: asks for its time, in seconds since 1970.
    """
    found = []
    for _ in range(_TRIES):
        before = time.time()
        there = now()
        after = time.time()
        found.append((after - before, there - (before + after) / 2))
    return min(found)[1]
