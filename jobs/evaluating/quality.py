"""How well a model predicts held-out rows, and how near it is to its teacher there. Pure torch and numpy.

Everything is a sum over scored positions, kept for each row, and divided once by a total over all rows: the figures do
not depend on how rows are batched, and rows are what is drawn again for the intervals. Rows are packed, so a long
document can lie in several; such rows are not quite independent, and the intervals are a little too narrow then.

Axes: R rows, N positions of a batch (n in a chunk), V columns of one model, C columns that both models have.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor

from jobs.training.data import MicroBatch, Row
from jobs.training.targets.base import LOG_FLOOR

CONFIDENCE = 0.95
CHUNK_ELEMENTS = 1 << 22
"""Logits formed at once for one model."""
_MOST_NATS = 700.0
"""Mean loss of a position beyond which the perplexity is no float64 any more."""


@dataclass
class RowSums:
    """Of one model: what each row's scored positions add up to, in the order in which rows were added."""

    has_teacher: bool
    nats: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    agreements: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    agreements_at: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Agreements by place in the row of the token that is predicted."""
    positions_at: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def bits_per_byte(self, rows: int) -> float:
        """Of the first so many rows."""
        return sum(self.nats[:rows]) / math.log(2) / max(1, sum(self.num_bytes[:rows]))

    def add(self, scores: "PositionScores", batch: MicroBatch, rows: list[Row]) -> None:
        """The scores of a batch that was collated from these rows."""
        ends_R = np.cumsum(batch.row_lengths)
        row_N = np.searchsorted(ends_R, batch.positions, side="right")
        count = len(rows)
        self.nats += np.bincount(row_N, scores.nats_N, count).tolist()
        self.positions += np.bincount(row_N, minlength=count).tolist()
        self.num_bytes += [row.num_bytes for row in rows]
        if not self.has_teacher:
            return
        assert scores.divergence_N is not None
        assert scores.agrees_N is not None
        self.divergences += np.bincount(row_N, scores.divergence_N, count).tolist()
        self.agreements += np.bincount(row_N, scores.agrees_N, count).astype(int).tolist()
        place_N = batch.positions - (ends_R - batch.row_lengths)[row_N] + 1
        longest = max(len(self.positions_at), int(batch.row_lengths.max()))
        self.positions_at = _padded(self.positions_at, longest) + np.bincount(place_N, minlength=longest)
        agreeing = np.bincount(place_N[scores.agrees_N], minlength=longest)
        self.agreements_at = _padded(self.agreements_at, longest) + agreeing


@dataclass(frozen=True)
class PositionScores:
    """Of one model and one batch, for each scored position."""

    nats_N: np.ndarray
    """Negative log-likelihood of the target, float64."""
    divergence_N: np.ndarray | None = None
    """KL(teacher, model), float64."""
    agrees_N: np.ndarray | None = None
    """Whether the most likely token is the teacher's, bool."""


def compare(
    models: dict[str, Iterator[Tensor]], teacher: str | None, targets_N: np.ndarray
) -> dict[str, PositionScores]:
    """Scores of several models on one batch, in one walk over its positions.

    Args:
        models: by name, the logits [n, V] of consecutive chunks of positions; chunks of all models are equally long.
        teacher: the name of the one that the others are compared with; None gives likelihoods alone.
        targets_N: int64, the tokens that follow.
    """
    parts: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in models}
    start = 0
    for chunk in zip(*models.values(), strict=True):
        logits = dict(zip(models, chunk, strict=True))
        targets_n = torch.from_numpy(targets_N[start : start + len(chunk[0])])
        of_teacher = logits[teacher] if teacher is not None else None
        for name, logits_nV in logits.items():
            parts[name].append(_score(logits_nV, of_teacher if name != teacher else None, targets_n))
        start += len(chunk[0])
    if start != len(targets_N):
        raise ValueError(f"logits of {start} positions for {len(targets_N)} targets")
    return {
        name: PositionScores(*(torch.cat(part).cpu().numpy() for part in zip(*found, strict=True)))
        for name, found in parts.items()
    }


def _score(logits_nV: Tensor, teacher_nV: Tensor | None, targets_n: Tensor) -> tuple[Tensor, ...]:
    """Loss of each position; with a teacher also divergence and agreement. Models may be on different devices."""
    logprobs_nV = torch.log_softmax(logits_nV.float(), -1)
    nats_n = -logprobs_nV.gather(-1, targets_n.to(logits_nV.device)[:, None])[:, 0].double()
    if teacher_nV is None:
        return (nats_n,)
    # As in training (jobs.training.losses): the teacher's distribution over the columns that both have, the model's
    # over all of its own, so that what it believes of further columns counts against it.
    columns = min(teacher_nV.shape[-1], logits_nV.shape[-1])
    log_p_nC = torch.log_softmax(teacher_nV[:, :columns].to(logits_nV.device).float(), -1).clamp_min_(LOG_FLOOR)
    log_q_nC = logprobs_nV[:, :columns].clamp_min(LOG_FLOOR)
    divergence_n = (log_p_nC.exp() * (log_p_nC - log_q_nC)).sum(-1, dtype=torch.float64)
    return nats_n, divergence_n, log_p_nC.argmax(-1) == log_q_nC.argmax(-1)


def chunk_rows(vocab_sizes: list[int]) -> int:
    """Positions in a chunk, the same for models of all these vocabularies."""
    return max(1, CHUNK_ELEMENTS // max(vocab_sizes))


def quality_figures(sums: RowSums, resamples: int, seed: int) -> dict[str, float]:
    """Figures of the quality table with the ends of their 95 % intervals (`_low`, `_high`) and their sample size.

    `bits_per_byte` = nats / ln 2 / UTF-8 bytes of the targets; `perplexity` = exp(nats / positions), of tokens, so only
    comparable where the tokenizer is the same; `kl_to_teacher` in nats and `agreement` (share of positions where the
    most likely token is the teacher's), means over positions. Intervals are percentile bootstraps over rows, each
    resample of rows giving a ratio of sums; none with a single row.

    Raises:
        ValueError: nothing was scored, or the loss is not finite or beyond what a perplexity can say.
    """
    columns = {"nats": sums.nats, "positions": sums.positions, "bytes": sums.num_bytes}
    if sums.has_teacher:
        columns |= {"divergence": sums.divergences, "agreement": sums.agreements}
    of_row = {name: np.asarray(values, np.float64) for name, values in columns.items()}
    total = {name: float(values.sum()) for name, values in of_row.items()}
    if not total["positions"] or not total["bytes"]:
        raise ValueError("no position was scored")
    nats = total["nats"] / total["positions"]
    if not nats < _MOST_NATS:
        raise ValueError(f"a loss of {nats} nats per token")
    ratios = {"bits_per_byte": ("nats", "bytes"), "perplexity": ("nats", "positions")}
    if sums.has_teacher:
        ratios |= {"kl_to_teacher": ("divergence", "positions"), "agreement": ("agreement", "positions")}
    out: dict[str, float] = {"rows": len(of_row["nats"]), "positions": int(total["positions"])}
    for name, (above, below) in ratios.items():
        value = total[above] / total[below]
        ends = interval(of_row[above], of_row[below], resamples, seed)
        for ending, number in zip(("", "_low", "_high"), (value, *(ends or ())), strict=False):
            out[f"{name}{ending}"] = _in_its_unit(name, number)
    return out


def _in_its_unit(name: str, ratio: float) -> float:
    if name == "bits_per_byte":
        return ratio / math.log(2)
    return math.exp(min(ratio, _MOST_NATS)) if name == "perplexity" else ratio


def interval(above_R: np.ndarray, below_R: np.ndarray, resamples: int, seed: int) -> tuple[float, float] | None:
    """The 95 % interval of `sum(above) / sum(below)` when rows are drawn anew; None with fewer than two rows.

    Percentile bootstrap (Efron 1979, doi:10.1214/aos/1176344552) of the ratio of sums, rows drawn with replacement.
    """
    if len(above_R) < 2:
        return None

    def ratio(above: np.ndarray, below: np.ndarray, axis: int = -1) -> Any:
        return above.sum(axis) / np.maximum(below.sum(axis), 1e-12)

    found = bootstrap(
        (above_R, below_R),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, (1 << 22) // len(above_R)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def agreement_by_position(sums: RowSums, parts: int = 16) -> list[list[float]]:
    """Agreement along the row: `[first, last, share, positions]` for stretches of places, each with a scored one."""
    length = len(sums.positions_at)
    out = []
    for first in range(0, length, -(-length // parts) if length else 1):
        stretch = slice(first, min(first + -(-length // parts), length))
        count = int(sums.positions_at[stretch].sum())
        if count:
            out.append([first, stretch.stop - 1, float(sums.agreements_at[stretch].sum() / count), count])
    return out


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([values, np.zeros(length - len(values), np.int64)])
