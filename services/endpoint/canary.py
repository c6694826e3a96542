"""Whether a challenger goes a step up, waits, becomes champion, or is taken down. Pure: evidence in, decision out.

Every limit is judged in three ways. It is *kept* if the figure lies within it, *breached* if the figure lies beyond it
and chance alone would hardly do that (one-sided tests, p below `_CHANCE`: exact binomial for the error rate,
Mann-Whitney for latencies against the champion's, the mean's standard error for disagreement), and *open* else. One
breach takes the challenger down at once, however little time has passed: a version that always fails is gone after two
or three answers. All limits kept, enough requests and enough time pass the step. Anything else waits, so that too
little traffic, or noise, is never taken for success.
"""

import importlib
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from services.endpoint.schema import CanaryConfig

_CHANCE = 0.001
"""Limits are looked at again and again, so the level is stricter than for one look."""
_LEAST_LATENCIES = 10
"""Answers of each version before their latencies are compared."""
_LEAST_COMPARISONS = 10
_KEPT = 5_000
"""Latest values of each kind that a step is judged by."""

Limit = Literal["kept", "open", "breached"]
Action = Literal["hold", "advance", "promote", "take_down"]


@dataclass(frozen=True)
class Observation:
    """One answer as a router saw it, or the challenger's answer to a copy."""

    manifest_sha256: str
    """Of the version that answered."""
    ok: bool
    ttft_s: float | None = None
    """From the arrival at the version to the first token."""
    token_s: float | None = None
    """Per token after the first."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    trial: tuple[int, int] | None = None
    """The canary's promotion and step when the request came."""
    shadow: bool = False
    """Nobody waits for it."""
    disagreement: float | None = None
    """Of a comparison, mean |difference of log-probabilities| in nats per token."""
    agreement: float | None = None
    """Of a comparison, share of the first tokens that are the same."""
    departed: bool = False
    """The client left before an answer began, `ttft_s` after it came; such a request counts by its time alone."""


@dataclass
class Sample:
    """What was seen of one version at one step."""

    requests: int = 0
    errors: int = 0
    ttft_s: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    token_s: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))

    def add(self, seen: Observation) -> None:
        self.requests += not seen.departed
        self.errors += not seen.ok
        if seen.ok and seen.ttft_s is not None:
            self.ttft_s.append(seen.ttft_s)
        if seen.ok and seen.token_s is not None:
            self.token_s.append(seen.token_s)


@dataclass
class Evidence:
    """What was seen at one step of a canary."""

    challenger_sha256: str
    champion: Sample = field(default_factory=Sample)
    challenger: Sample = field(default_factory=Sample)
    shadowed_champion: Sample = field(default_factory=Sample)
    """Both versions' answers to the same copies."""
    shadowed_challenger: Sample = field(default_factory=Sample)
    disagreements: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    agreements: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))

    def add(self, seen: Observation) -> None:
        new = seen.manifest_sha256 == self.challenger_sha256
        if seen.shadow:
            (self.shadowed_challenger if new else self.shadowed_champion).add(seen)
        else:
            (self.challenger if new else self.champion).add(seen)
        if seen.disagreement is not None:
            self.disagreements.append(seen.disagreement)
        if seen.agreement is not None:
            self.agreements.append(seen.agreement)


@dataclass(frozen=True)
class Decision:
    """What to do, why, and the figures behind it."""

    action: Action
    reason: str
    figures: dict[str, Any]


def judge(plan: CanaryConfig, step: int, held_s: float, seen: Evidence) -> Decision:
    """The decision at a step that has lasted `held_s` seconds."""
    share = plan.steps[step]
    limits, figures = _limits(plan, share, seen)
    for name, (limit, said) in limits.items():
        if limit == "breached":
            return Decision("take_down", f"{name}: {said}", figures)
    count = seen.challenger.requests if share else len(seen.disagreements)
    if count < plan.min_requests:
        what = "answers" if share else "comparisons"
        return Decision("hold", f"too little traffic: {count} of {plan.min_requests} {what}", figures)
    if held_s < plan.hold_s:
        return Decision("hold", f"{held_s:.0f} of {plan.hold_s:g} s at this step", figures)
    for name, (limit, said) in limits.items():
        if limit == "open":
            return Decision("hold", f"{name} is open: {said}", figures)
    last = step + 1 == len(plan.steps)
    return Decision("promote" if last else "advance", "every limit is kept", figures)


def _limits(plan: CanaryConfig, share: float, seen: Evidence) -> tuple[dict[str, tuple[Limit, str]], dict[str, Any]]:
    """Every limit of the plan with what is to be said of it, and the figures."""
    requests = seen.challenger.requests + seen.shadowed_challenger.requests
    errors = seen.challenger.errors + seen.shadowed_challenger.errors
    figures: dict[str, Any] = {
        "share": share,
        "requests": seen.challenger.requests,
        "champion_requests": seen.champion.requests,
        "errors": seen.challenger.errors,
        "champion_errors": seen.champion.errors,
        "comparisons": len(seen.disagreements),
        "shadow_errors": seen.shadowed_challenger.errors,
    }
    limits = {"error rate": _error_rate(plan.max_error_rate, errors, requests)}
    if plan.max_latency_ratio is not None:
        new, old = (seen.challenger, seen.champion) if share else (seen.shadowed_challenger, seen.shadowed_champion)
        for name, these, those in (
            ("time to first token", new.ttft_s, old.ttft_s),
            ("time per token", new.token_s, old.token_s),
        ):
            ratio, limit = _latency(plan.max_latency_ratio, these, those)
            figures[f"{name.replace(' ', '_')}_ratio"] = ratio
            # Where answers are of one token, or no tokens at all, there is no time per token to compare.
            if name == "time to first token" or len(those) >= _LEAST_LATENCIES:
                limits[name] = limit
    if seen.disagreements:
        figures["disagreement"] = statistics.fmean(seen.disagreements)
    if seen.agreements:
        figures["agreement"] = statistics.fmean(seen.agreements)
    if plan.max_disagreement is not None:
        limits["disagreement"] = _disagreement(plan.max_disagreement, seen.disagreements)
    return limits, figures


def prepare() -> None:
    """Imports what `judge` needs of scipy, which takes seconds: for before the first answer of a challenger."""
    importlib.import_module("scipy.stats")


def _error_rate(most: float, errors: int, requests: int) -> tuple[Limit, str]:
    said = f"{errors} of {requests} answers failed, at most {most:.1%} may"
    if requests == 0:
        return "open", said
    if errors <= most * requests:
        return "kept", said
    from scipy.stats import binomtest

    by_chance = binomtest(errors, requests, most, alternative="greater").pvalue
    return ("breached" if by_chance < _CHANCE else "open"), said


def _latency(most: float, new: Sequence[float], old: Sequence[float]) -> tuple[float | None, tuple[Limit, str]]:
    """The ratio of the medians, where both are known, and whether it keeps the limit."""
    if min(len(new), len(old)) < _LEAST_LATENCIES:
        return None, ("open", f"{len(new)} answers of the challenger and {len(old)} of the champion to compare")
    medians = statistics.median(new), statistics.median(old)
    ratio = medians[0] / max(medians[1], 1e-9)
    said = (
        f"{1000 * medians[0]:.1f} ms, the champion's {1000 * medians[1]:.1f} ms, at most {most:g} times that is allowed"
    )
    if ratio <= most:
        return ratio, ("kept", said)
    from scipy.stats import mannwhitneyu

    by_chance = mannwhitneyu([value / most for value in new], list(old), alternative="greater").pvalue
    return ratio, ("breached" if by_chance < _CHANCE else "open", said)


def _disagreement(most: float, values: Sequence[float]) -> tuple[Limit, str]:
    if len(values) < _LEAST_COMPARISONS:
        return "open", f"{len(values)} of {_LEAST_COMPARISONS} comparisons"
    mean = statistics.fmean(values)
    said = f"{mean:.3g} nats per token over {len(values)} comparisons, at most {most:g}"
    if mean <= most:
        return "kept", said
    error = statistics.stdev(values) / math.sqrt(len(values))
    return ("breached" if mean - 3.1 * error > most else "open"), said  # 3.1 standard errors: one chance in a thousand
