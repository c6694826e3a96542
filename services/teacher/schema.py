"""What is asked of a teacher and what it answers: plain records of numpy arrays, with their meaning fixed here.

Row n of a signal belongs to `positions[n]` of the request, and is the distribution of the token that FOLLOWS that
position, given the tokens of its sequence up to and including it. This holds for every kind and every backend.

Axes: S tokens of a request, N scored positions, D hidden width, C vocabulary columns asked for, K kept entries,
M temperatures. Everything is restricted to the first C columns and normalised over them: a column that only one model
has is probability zero, not logit zero. Numpy has no bfloat16: such values travel as their uint16 bit patterns.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import numpy as np

from cluster.config import Config, execution

SignalKind = Literal["hidden", "topk", "dense"]


class TeacherServiceConfig(Config):
    """Arguments of `services.teacher.deployment:app`: which model, how many replicas, how much of a machine."""

    model: str
    """Directory, s3:// URI, package://NAME, models:/NAME@ALIAS or hub id; it holds safetensors."""
    tokenizer: str | None = None
    """Where the tokenizer lies, if not beside the weights."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is bfloat16 where the processor multiplies it; name one if the replicas' processors differ."""
    replicas: int = execution(1, ge=1)
    max_replicas: int | None = execution(None, ge=1)
    """Autoscale on waiting requests up to this many; default: no more than `replicas`."""
    threads_per_replica: int = execution(1, ge=1)
    num_gpus: float = execution(0, ge=0)
    max_batch_tokens: int = execution(16384, ge=1)
    """Waiting requests are merged up to this many tokens; a single request may not be larger."""


@dataclass(frozen=True)
class SignalSpec:
    """Which signal is wanted.

    Args:
        kind: `hidden`, `topk` or `dense`.
        vocab_size: C, the columns that both models have.
        top_k: K for `topk`.
        temperatures: for `topk`, the temperatures at which the tail mass is needed.
    """

    kind: SignalKind
    vocab_size: int
    top_k: int = 64
    temperatures: tuple[float, ...] = (1.0,)

    def bytes_per_position(self, hidden_size: int) -> int:
        """Size of one row on the wire; used to bound what is in flight."""
        if self.kind == "hidden":
            return 2 * hidden_size
        if self.kind == "topk":
            return 6 * min(self.top_k, self.vocab_size) + 4 * len(self.temperatures)
        return 2 * self.vocab_size


@dataclass(frozen=True)
class ScoreRequest:
    """Token ids of one or more sequences, and the positions to score.

    Args:
        request_id: comes back in the reply.
        token_ids: int32 [S], the sequences one behind the other. They never see each other.
        sequence_lengths: int32, adding up to S.
        positions: int32 [N], indices into `token_ids`.
        spec: the signal wanted.
    """

    request_id: str
    token_ids: np.ndarray
    sequence_lengths: np.ndarray
    positions: np.ndarray
    spec: SignalSpec

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class HiddenSignal:
    """Final hidden states; with the teacher's head they give every divergence at every temperature exactly."""

    hidden_ND: np.ndarray
    """uint16 [N, D]: bfloat16 bit patterns."""

    def __len__(self) -> int:
        return len(self.hidden_ND)

    def rows(self, start: int, stop: int) -> "HiddenSignal":
        return HiddenSignal(self.hidden_ND[start:stop])

    def answers(self, spec: SignalSpec) -> bool:
        return spec.kind == "hidden"

    def is_finite(self) -> bool:
        return not bool(((self.hidden_ND & 0x7F80) == 0x7F80).any())  # exponent all ones: infinity or NaN


@dataclass(frozen=True)
class TopkSignal:
    """The K most likely tokens, and how much probability lies outside them."""

    ids_NK: np.ndarray
    """int32 [N, K], most likely first."""
    logprobs_NK: np.ndarray
    """float16 [N, K]: natural-log probabilities at temperature 1."""
    tail_logmass_NM: np.ndarray
    """float32 [N, M]: log of the probability outside the K at each temperature; -inf where K = C. The kept entries at
    temperature T are `softmax(logprobs / T) * (1 - exp(tail_logmass_T))`, so nothing is lost to cancellation."""
    temperatures: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.ids_NK)

    def rows(self, start: int, stop: int) -> "TopkSignal":
        return TopkSignal(
            self.ids_NK[start:stop], self.logprobs_NK[start:stop], self.tail_logmass_NM[start:stop], self.temperatures
        )

    def answers(self, spec: SignalSpec) -> bool:
        columns = min(spec.top_k, spec.vocab_size)
        shapes = (self.ids_NK.shape[1], self.logprobs_NK.shape[1], self.tail_logmass_NM.shape[1])
        return (
            spec.kind == "topk"
            and shapes == (columns, columns, len(spec.temperatures))
            and self.temperatures == spec.temperatures
        )

    def is_finite(self) -> bool:
        return _finite_at_best(self.logprobs_NK) and bool((self.tail_logmass_NM < np.inf).all())


@dataclass(frozen=True)
class DenseSignal:
    """Log-probabilities of all C columns; for classifiers and tiny vocabularies."""

    logprobs_NC: np.ndarray
    """float16 [N, C] at temperature 1. At T they are `log_softmax(logprobs / T)`."""

    def __len__(self) -> int:
        return len(self.logprobs_NC)

    def rows(self, start: int, stop: int) -> "DenseSignal":
        return DenseSignal(self.logprobs_NC[start:stop])

    def answers(self, spec: SignalSpec) -> bool:
        return spec.kind == "dense" and self.logprobs_NC.shape[1] == spec.vocab_size

    def is_finite(self) -> bool:
        return _finite_at_best(self.logprobs_NC)


def _finite_at_best(logprobs: np.ndarray) -> bool:
    """Whether no value is NaN or +inf and no row is all -inf; some -inf are tokens that the teacher rules out."""
    return bool(np.isfinite(logprobs.max(-1)).all())


Signal = HiddenSignal | TopkSignal | DenseSignal


@dataclass(frozen=True)
class ScoreReply:
    """A signal with what the client checks before it believes it."""

    request_id: str
    teacher_fingerprint: str
    num_tokens: int
    signal: Signal


@dataclass(frozen=True)
class TeacherDescription:
    """What a teacher is; compared with the student before the first step."""

    fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int
    hidden_size: int
    max_sequence_tokens: int
    max_request_tokens: int
    dtype: str


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


Record = TypeVar("Record", HiddenSignal, TopkSignal, DenseSignal, HeadRecord)


def copied(record: Record) -> Record:
    """The same record with arrays of its own. Arrays from the object store are read-only and pin its memory."""
    values: dict[str, Any] = {item.name: getattr(record, item.name) for item in fields(record)}
    arrays = {name: value.copy() for name, value in values.items() if isinstance(value, np.ndarray)}
    return type(record)(**{**values, **arrays})


def check_reply(request: ScoreRequest, reply: ScoreReply, fingerprint: str | None) -> str | None:
    """Why a reply cannot be used for a request, or None if it can."""
    if reply.request_id != request.request_id:
        return f"answers request {reply.request_id}, not {request.request_id}"
    if fingerprint is not None and reply.teacher_fingerprint != fingerprint:
        return f"comes from teacher {reply.teacher_fingerprint}, expected {fingerprint}"
    if reply.num_tokens != request.num_tokens or len(reply.signal) != len(request.positions):
        return (
            f"has {len(reply.signal)} rows for {reply.num_tokens} tokens, "
            f"expected {len(request.positions)} rows for {request.num_tokens} tokens"
        )
    if not reply.signal.answers(request.spec):
        return f"is a {type(reply.signal).__name__} of another kind or width than asked for: {request.spec}"
    if not reply.signal.is_finite():
        return "holds values that are not finite"
    return None
