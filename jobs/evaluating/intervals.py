"""How far a median of a few timings can be believed."""

import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95
LEAST_TIMINGS = 6
"""Fewer say nothing of 95 %: all of them lie on one side of the true median more often than one time in twenty."""


def median_with_interval(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """The median under `name`, and under `name_low` and `name_high` its 95 % interval, where there are enough timings.

    The ends are timings themselves, chosen by rank (Thompson 1936, Annals of Mathematical Statistics 7:122), so nothing
    is assumed of how they are distributed; six have their extremes for ends.
    """
    from scipy.stats import quantile_test

    found = {name: statistics.median(seconds)}
    if len(seconds) >= LEAST_TIMINGS:
        interval = quantile_test(seconds, q=0, p=0.5).confidence_interval(CONFIDENCE)
        found |= {f"{name}_low": float(interval.low), f"{name}_high": float(interval.high)}
    return found
