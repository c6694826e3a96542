"""What a teacher says about N positions: four kinds of record, with their meaning fixed here. Numpy alone.

Row n of a signal is the distribution of the token that FOLLOWS the n-th position asked for, given the tokens of its
sequence up to and including it. This holds for every kind and every backend.

Axes: N scored positions, D hidden width, C vocabulary columns asked for, K kept entries, S draws, M temperatures,
W bytes of packed ids. Everything is restricted to the first C columns and normalised over them: a column that only one
model has is probability zero, not logit zero. Numpy has no bfloat16: such values travel as their uint16 bit patterns.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

import numpy as np

from services.teacher.packing import pack_ids, packed_width, unpack_ids

SignalKind = Literal["hidden", "topk", "sampled", "dense"]

_STEPS = 254
"""Steps between the lowest and the highest log-probability of a position in 8 bits; the code 0 is minus infinity."""


@dataclass(frozen=True)
class SignalSpec:
    """Which signal is wanted.

    Args:
        kind: `hidden`, `topk`, `sampled` or `dense`.
        vocab_size: C, the columns that both models have.
        top_k: K for `topk`.
        temperatures: for `topk`, the temperatures at which the tail mass is needed; for `sampled` the one at which the
            teacher's distribution is drawn from.
        logprob_bits: for `topk`, 16 (float16) or 8 (equal steps between the extremes of a position).
        draws: S for `sampled`.
        proposal: for `sampled`, tokens are drawn from `p_T ^ proposal`, normalised, and weighted back to p_T.
    """

    kind: SignalKind
    vocab_size: int
    top_k: int = 64
    temperatures: tuple[float, ...] = (1.0,)
    logprob_bits: Literal[16, 8] = 16
    draws: int = 32
    proposal: float = 1.0

    @property
    def kept(self) -> int:
        """K, at most all columns."""
        return min(self.top_k, self.vocab_size)

    def bytes_per_position(self, hidden_size: int) -> int:
        """Size of one row on the wire; used to bound what is in flight."""
        if self.kind == "hidden":
            return 2 * hidden_size
        if self.kind == "dense":
            return 2 * self.vocab_size
        if self.kind == "sampled":
            weights = 0 if self.proposal == 1.0 else 2 * self.draws
            return packed_width(self.draws, self.vocab_size) + weights + 8
        values = 2 * self.kept if self.logprob_bits == 16 else self.kept + 4
        return packed_width(self.kept, self.vocab_size) + values + 4 * len(self.temperatures)


@dataclass(frozen=True)
class HiddenSignal:
    """Final hidden states; with the teacher's head they give every divergence at every temperature exactly."""

    hidden_ND: np.ndarray
    """uint16 [N, D]: bfloat16 bit patterns."""

    def __len__(self) -> int:
        return len(self.hidden_ND)

    def answers(self, spec: SignalSpec) -> bool:
        return spec.kind == "hidden"

    def is_finite(self) -> bool:
        return not bool(((self.hidden_ND & 0x7F80) == 0x7F80).any())  # exponent all ones: infinity or NaN


@dataclass(frozen=True)
class TopkSignal:
    """The K most likely tokens, and how much probability lies outside them."""

    packed_ids_NW: np.ndarray
    """uint8 [N, W]: the ids in rising order (`packing`)."""
    logprobs_NK: np.ndarray
    """Natural-log probabilities at temperature 1, in the order of the ids: float16, or uint8 steps in `range_N2`."""
    range_N2: np.ndarray | None
    """float16 [N, 2]: the lowest and the highest log-probability of a position, where `logprobs_NK` are steps."""
    tail_logmass_NM: np.ndarray
    """float32 [N, M]: log of the probability outside the K at each temperature; -inf where K = C. The kept entries at
    temperature T are `softmax(logprobs / T) * (1 - exp(tail_logmass_T))`, so nothing is lost to cancellation."""
    temperatures: tuple[float, ...]
    vocab_size: int

    @classmethod
    def of(
        cls, ids_NK: np.ndarray, logprobs_NK: np.ndarray, tail_logmass_NM: np.ndarray, spec: SignalSpec
    ) -> "TopkSignal":
        """The record of ids in rising order with their float32 log-probabilities."""
        range_N2 = None
        if spec.logprob_bits == 8:
            logprobs_NK, range_N2 = _as_steps(logprobs_NK)
        else:
            logprobs_NK = logprobs_NK.astype(np.float16)
        packed_NW = pack_ids(ids_NK, spec.vocab_size)
        return cls(packed_NW, logprobs_NK, range_N2, tail_logmass_NM, spec.temperatures, spec.vocab_size)

    def entries(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids [N, K] (int32), rising along each row, and their log-probabilities [N, K] (float32).

        Raises:
            ValueError: the packed ids are damaged.
        """
        ids_NK = unpack_ids(self.packed_ids_NW, self.logprobs_NK.shape[1], self.vocab_size)
        if self.range_N2 is None:
            return ids_NK, self.logprobs_NK.astype(np.float32)
        return ids_NK, _from_steps(self.logprobs_NK, self.range_N2)

    def __len__(self) -> int:
        return len(self.logprobs_NK)

    def answers(self, spec: SignalSpec) -> bool:
        shapes = (self.packed_ids_NW.shape[1], self.logprobs_NK.shape[1], self.tail_logmass_NM.shape[1])
        wanted = (packed_width(spec.kept, spec.vocab_size), spec.kept, len(spec.temperatures))
        return (
            spec.kind == "topk"
            and shapes == wanted
            and (self.temperatures, self.vocab_size) == (spec.temperatures, spec.vocab_size)
            and (self.range_N2 is not None) == (spec.logprob_bits == 8)
        )

    def is_finite(self) -> bool:
        values = self.logprobs_NK if self.range_N2 is None else self.range_N2
        return _finite_at_best(values) and bool((self.tail_logmass_NM < np.inf).all())


@dataclass(frozen=True)
class SampledSignal:
    """Tokens drawn from the teacher: `sum(weight * f(id))` over the draws of a row is the mean of f under the teacher
    at the temperature asked for, without bias (random sampling distillation, arXiv 2503.16870)."""

    packed_ids_NW: np.ndarray
    """uint8 [N, W]: the S ids in rising order, one as often as it was drawn (`packing`)."""
    weights_NS: np.ndarray | None
    """float16 [N, S], in the order of the ids; None where each is 1 / S."""
    entropy_N: np.ndarray
    """float32 [N]: entropy in nats of the teacher's whole distribution at that temperature."""
    best_N: np.ndarray
    """int32 [N]: its most likely token."""
    num_draws: int
    vocab_size: int

    @classmethod
    def of(
        cls, ids_NS: np.ndarray, weights_NS: np.ndarray, entropy_N: np.ndarray, best_N: np.ndarray, spec: SignalSpec
    ) -> "SampledSignal":
        """The record of ids in rising order with their float32 weights."""
        weights = None if spec.proposal == 1.0 else weights_NS.astype(np.float16)
        return cls(pack_ids(ids_NS, spec.vocab_size), weights, entropy_N, best_N, spec.draws, spec.vocab_size)

    def entries(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids [N, S] (int32) and weights [N, S] (float32).

        Raises:
            ValueError: the packed ids are damaged.
        """
        ids_NS = unpack_ids(self.packed_ids_NW, self.num_draws, self.vocab_size)
        if self.weights_NS is None:
            return ids_NS, np.full(ids_NS.shape, 1 / self.num_draws, np.float32)
        return ids_NS, self.weights_NS.astype(np.float32)

    def __len__(self) -> int:
        return len(self.entropy_N)

    def answers(self, spec: SignalSpec) -> bool:
        return (
            spec.kind == "sampled"
            and (self.num_draws, self.vocab_size) == (spec.draws, spec.vocab_size)
            and self.packed_ids_NW.shape[1] == packed_width(spec.draws, spec.vocab_size)
            and (self.weights_NS is None) == (spec.proposal == 1.0)
            and (self.weights_NS is None or self.weights_NS.shape[1] == spec.draws)
        )

    def is_finite(self) -> bool:
        weights = () if self.weights_NS is None else self.weights_NS
        return bool(np.isfinite(self.entropy_N).all() and np.isfinite(weights).all())


@dataclass(frozen=True)
class DenseSignal:
    """Log-probabilities of all C columns; for classifiers and tiny vocabularies."""

    logprobs_NC: np.ndarray
    """float16 [N, C] at temperature 1. At T they are `log_softmax(logprobs / T)`."""

    def __len__(self) -> int:
        return len(self.logprobs_NC)

    def answers(self, spec: SignalSpec) -> bool:
        return spec.kind == "dense" and self.logprobs_NC.shape[1] == spec.vocab_size

    def is_finite(self) -> bool:
        return _finite_at_best(self.logprobs_NC)


Signal = HiddenSignal | TopkSignal | SampledSignal | DenseSignal


@dataclass(frozen=True)
class HeadRecord:
    """The teacher's output head, fetched once per worker for `hidden` signals.

    `soft_cap * tanh(scale * (h @ weight.T + bias) / soft_cap)`; without the cap when it is None.
    """

    fingerprint: str
    weight_VD: np.ndarray
    """uint16 bit patterns of bfloat16, or float32, as the teacher computes."""
    bias_V: np.ndarray | None = None
    scale: float = 1.0
    soft_cap: float | None = None


Record = TypeVar("Record", HiddenSignal, TopkSignal, SampledSignal, DenseSignal, HeadRecord)


def copied(record: Record) -> Record:
    """The same record with arrays of its own. Arrays from the object store are read-only and pin its memory."""
    values: dict[str, Any] = {item.name: getattr(record, item.name) for item in fields(record)}
    arrays = {name: value.copy() for name, value in values.items() if isinstance(value, np.ndarray)}
    return type(record)(**{**values, **arrays})


def cut(signal: Signal, start: int, stop: int) -> Signal:
    """The signal of positions `start` to `stop` alone, with arrays of its own."""
    values = vars(signal)
    parts: Any = {name: value[start:stop].copy() for name, value in values.items() if isinstance(value, np.ndarray)}
    return replace(signal, **parts)


def joined(signals: list[Signal]) -> Signal:
    """One signal of the positions of several that answer the same `SignalSpec`."""
    signals = [item for item in signals if len(item)] or signals[:1]
    if len(signals) == 1:
        return signals[0]
    names = [name for name, value in vars(signals[0]).items() if isinstance(value, np.ndarray)]
    arrays: Any = {name: np.concatenate([vars(item)[name] for item in signals]) for name in names}
    return replace(signals[0], **arrays)


def num_bytes(record: Any) -> int:
    """Bytes of all arrays of a record."""
    return sum(value.nbytes for value in vars(record).values() if isinstance(value, np.ndarray))


def _as_steps(logprobs_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps 1..255 between the extremes of each row, 0 for minus infinity; and the extremes as they travel."""
    finite_NK = np.where(np.isneginf(logprobs_NK), np.inf, logprobs_NK)
    range_N2 = np.stack([finite_NK.min(-1), logprobs_NK.max(-1)], -1).astype(np.float16)
    lowest_N1, highest_N1 = range_N2[:, :1].astype(np.float32), range_N2[:, 1:].astype(np.float32)
    width_N1 = np.maximum(highest_N1 - lowest_N1, np.float32(1e-6))
    with np.errstate(invalid="ignore"):  # rows that are not finite are refused by who receives them
        steps_NK = 1 + np.rint((logprobs_NK - lowest_N1) * (_STEPS / width_N1)).clip(0, _STEPS)
        return np.where(np.isneginf(logprobs_NK), 0, steps_NK).astype(np.uint8), range_N2


def _from_steps(steps_NK: np.ndarray, range_N2: np.ndarray) -> np.ndarray:
    lowest_N1, highest_N1 = range_N2[:, :1].astype(np.float32), range_N2[:, 1:].astype(np.float32)
    logprobs_NK = lowest_N1 + (steps_NK.astype(np.float32) - 1) * ((highest_N1 - lowest_N1) / _STEPS)
    logprobs_NK[steps_NK == 0] = -np.inf
    return logprobs_NK


def _finite_at_best(logprobs: np.ndarray) -> bool:
    """Whether no value is NaN or +inf and no row is all -inf; some -inf are tokens that the teacher rules out."""
    if logprobs.dtype == np.float16:  # by their bits, since processors compare no float16
        bits = logprobs.view(np.uint16)
        no_number = ((bits & 0x7FFF) > 0x7C00) | (bits == 0x7C00)
        return not no_number.any() and bool((bits != 0xFC00).any(-1).all())
    return bool(np.isfinite(logprobs.max(-1)).all())
