"""The gate: what a candidate must be beside its float student, the teacher, and the champion that reigns. Pure.

Figures are read by name from what was measured: bits per byte on held-out text, bytes on disk, seconds per token.
The candidate's were measured on the artefact that will be served, reloaded in a fresh process. Every rule is asked,
so that a refusal names all that fail; one whose figure was not measured, is not a number or cannot be, fails.

Retention is the other's bits per byte over the candidate's (`compression.quality_kept`). Time per token is `token_s`,
from one new token to the next, where both sides have it; otherwise the time of scoring, 1 / `tokens_per_s`, for both.
Times are of a machine: figures carry what computed them as `machine`, and those of two machines, or of one that nobody
wrote down, are not compared. Two machines are the same where processor, system, threads and, if both used one, GPU are.
"""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.config import PromoteConfig
from jobs.evaluating.compression import quality_kept

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class RuleResult:
    """One rule and what it found."""

    rule: str
    """The key of the limit in the config."""
    limit: float
    against: str
    """Whose figure the candidate's is compared with; empty where it stands alone."""
    figure: str
    candidate: float | None
    """The candidate's figure; None: not measured."""
    other: float | None
    value: float | None
    """What is compared with the limit; None: it could not be formed."""
    passed: bool
    reason: str
    """The finding as a sentence."""


@dataclass(frozen=True)
class Verdict:
    rules: list[RuleResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Rules that had nothing to compare with, and why."""

    @property
    def passed(self) -> bool:
        return all(rule.passed for rule in self.rules)

    @property
    def failures(self) -> list[str]:
        return [rule.reason for rule in self.rules if not rule.passed]

    def as_json(self) -> dict[str, Any]:
        """The verdict as plain JSON; a figure that is no finite number is text there."""
        rules = [{name: _plain(value) for name, value in vars(rule).items()} for rule in self.rules]
        return {"passed": self.passed, "rules": rules, "notes": self.notes}


@dataclass(frozen=True)
class Reigning:
    """The champion at the gate: its figures, or why there is nothing to compare with."""

    name: str = "champion"
    figures: Figures | None = None
    absent: str = "no version is champion yet"


def judge(
    config: PromoteConfig, candidate: Figures, student: Figures, teacher: Figures | None, reigning: Reigning
) -> Verdict:
    """Asks every rule of the config.

    Args:
        candidate, student, teacher: figures by name, with `machine`; the student's are those of its float version.
    """
    rules = [_quality_drop("promote.max_quality_drop", config.max_quality_drop, candidate, student, "float student")]
    for name, ask in _BESIDE_ANOTHER.items():
        if (limit := getattr(config, name)) is not None and name != "max_quality_drop":
            rules.append(ask(f"promote.{name}", limit, candidate, teacher or {}, "teacher"))
    if config.max_size_mb is not None:
        rules.append(_size(config.max_size_mb, candidate))
    notes = []
    for name, ask in _BESIDE_ANOTHER.items():
        limit = getattr(config.champion, name)
        if limit is None:
            continue
        if reigning.figures is None:
            notes.append(f"promote.champion.{name} was not asked: {reigning.absent}")
        else:
            rules.append(ask(f"promote.champion.{name}", limit, candidate, reigning.figures, reigning.name))
    return Verdict(rules, notes)


def _quality_drop(rule: str, limit: float, candidate: Figures, other: Figures, against: str) -> RuleResult:
    figure, mine, theirs = _bits(candidate, other)
    if (missing := _not_measured(rule, figure, limit, mine, theirs, against)) is not None:
        return missing
    drop = _ratio(mine, theirs) - 1
    said = f"{_beside(mine, theirs, against)} is a drop of {_percent(drop)}, allowed {_percent(limit)}"
    return RuleResult(rule, limit, against, figure, mine, theirs, drop, drop <= limit, f"{rule}: {said}")


def _retention(rule: str, limit: float, candidate: Figures, other: Figures, against: str) -> RuleResult:
    figure, mine, theirs = _bits(candidate, other)
    if (missing := _not_measured(rule, figure, limit, mine, theirs, against)) is not None:
        return missing
    assert mine is not None
    assert theirs is not None
    kept = quality_kept(theirs, mine) if 0 < mine < math.inf else math.nan
    said = f"{_beside(mine, theirs, against)} keeps {_percent(kept)}, wanted {_percent(limit)}"
    return RuleResult(rule, limit, against, figure, mine, theirs, kept, kept >= limit, f"{rule}: {said}")


def _latency_ratio(rule: str, limit: float, candidate: Figures, other: Figures, against: str) -> RuleResult:
    figure, mine, theirs = "token_s", _number(candidate, "token_s"), _number(other, "token_s")
    if candidate.get("token_s") is None or other.get("token_s") is None:
        speeds = _number(candidate, "tokens_per_s"), _number(other, "tokens_per_s")
        if speeds[0] is not None and speeds[1] is not None:
            figure, (mine, theirs) = "1/tokens_per_s", (_ratio(1, speed) for speed in speeds)
    if (missing := _not_measured(rule, figure, limit, mine, theirs, against)) is not None:
        return missing
    beside = f"{_ms(mine)} ms per token against {_ms(theirs)} of the {against}"
    machines = candidate.get("machine"), other.get("machine")
    if not _same_machine(*machines):
        said = (
            f"{beside} are times of {_machine(machines[0])} and of {_machine(machines[1])}, which say nothing beside "
            f"each other (allowed {limit:g} times): measure both on one machine, or leave the limit out"
        )
        return RuleResult(rule, limit, against, figure, mine, theirs, None, False, f"{rule}: {said}")
    ratio = _ratio(mine, theirs)
    said = f"{beside} is {ratio:.3g} times, allowed {limit:g}"
    return RuleResult(rule, limit, against, figure, mine, theirs, ratio, ratio <= limit, f"{rule}: {said}")


def _size_ratio(rule: str, limit: float, candidate: Figures, other: Figures, against: str) -> RuleResult:
    mine, theirs = _number(candidate, "bytes"), _number(other, "bytes")
    if (missing := _not_measured(rule, "bytes", limit, mine, theirs, against)) is not None:
        return missing
    assert mine is not None
    assert theirs is not None
    ratio = _ratio(mine, theirs)
    sizes = f"{mine / 1e6:.3f} MB of weights against {theirs / 1e6:.3f} of the {against}"
    said = f"{sizes} is {ratio:.3g} times, allowed {limit:g}"
    return RuleResult(rule, limit, against, "bytes", mine, theirs, ratio, ratio <= limit, f"{rule}: {said}")


_BESIDE_ANOTHER: dict[str, Callable[[str, float, Figures, Figures, str], RuleResult]] = {
    "max_quality_drop": _quality_drop,
    "min_retention": _retention,
    "max_latency_ratio": _latency_ratio,
    "max_size_ratio": _size_ratio,
}
"""Rules that compare with the champion and, but for the drop (which is from the float student), with the teacher."""


def _size(limit: float, candidate: Figures) -> RuleResult:
    rule, num_bytes = "promote.max_size_mb", _number(candidate, "bytes")
    if (missing := _not_measured(rule, "bytes", limit, num_bytes, 0.0, "")) is not None:
        return missing
    assert num_bytes is not None
    size_mb = num_bytes / 1e6
    said = f"{size_mb:.3f} MB of weights, allowed {limit:g}"
    return RuleResult(rule, limit, "", "bytes", num_bytes, None, size_mb, size_mb <= limit, f"{rule}: {said}")


def _not_measured(
    rule: str, figure: str, limit: float, mine: float | None, theirs: float | None, against: str
) -> RuleResult | None:
    """The failure of a rule that lacks a figure."""
    whose = [name for name, value in (("candidate", mine), (against, theirs)) if value is None]
    if not whose:
        return None
    said = f"{figure} of the {' and of the '.join(whose)} was not measured or cannot be, the limit is {limit:g}"
    return RuleResult(rule, limit, against, figure, mine, theirs, None, False, f"{rule}: {said}")


def _bits(candidate: Figures, other: Figures) -> tuple[str, float | None, float | None]:
    return "bits_per_byte", _number(candidate, "bits_per_byte"), _number(other, "bits_per_byte")


def _beside(mine: float | None, theirs: float | None, against: str) -> str:
    return f"{mine:.6g} bits per byte against {theirs:.6g} of the {against}"


def _same_machine(one: Any, other: Any) -> bool:
    """Whether both are known and compute alike; a GPU counts where both used one."""
    if not (isinstance(one, dict) and isinstance(other, dict) and one and other):
        return False
    both = one.get("gpu", ""), other.get("gpu", "")
    return all(one.get(part) == other.get(part) for part in _PARTS) and (not all(both) or both[0] == both[1])


_PARTS = ("processor", "system", "threads")


def _machine(found: Any) -> str:
    """A machine for people."""
    if not isinstance(found, dict) or not found:
        return "a machine that was not recorded"
    hardware = [str(found[part]) for part in ("processor", "gpu", "system") if part in found]
    return f"{', '.join(hardware)}, {found.get('threads', '?')} threads"


def _ms(seconds: float | None) -> str:
    return f"{1000 * seconds:.4g}" if seconds is not None else "?"


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _number(figures: Figures, name: str) -> float | None:
    """A figure; None where it is absent or cannot be: all that is looked at here is above zero."""
    value = figures.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        return None
    return float(value) if value < sys.float_info.max else math.inf


def _ratio(numerator: float | None, denominator: float | None) -> float:
    """Not a number where the division says nothing; no limit lets that pass."""
    if numerator is None or denominator is None or not 0 < denominator < math.inf:
        return math.nan
    return numerator / denominator


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
