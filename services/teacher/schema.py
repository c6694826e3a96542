"""What is asked of a teacher and what it answers: plain records of numpy arrays. The answers' content is in `signals`.

Axes: S tokens of a request, N scored positions. Row n of a signal belongs to `positions[n]` of its request.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cluster.config import Config, execution
from services.teacher.signals import Signal, SignalSpec


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
    """Up to this many while requests wait and students stand still for them; default: no more than `replicas`."""
    threads_per_replica: int = execution(1, ge=1)
    num_gpus: float = execution(0, ge=0)
    max_batch_tokens: int = execution(16384, ge=1)
    """Waiting requests are merged up to this many tokens; a single request may not be larger."""
    resources: dict[str, float] = execution({})
    """Custom resources that each replica takes, such as `{teacher_slot: 1}`."""
    label_selector: dict[str, str] = execution({})
    """Labels that a replica's node must have."""
    graceful_shutdown_s: float = execution(60, ge=1)
    """How long a replica that has to go may finish what it was given; longer than the longest batch."""


@dataclass(frozen=True)
class ScoreRequest:
    """Token ids of one or more sequences, and the positions to score.

    Args:
        request_id: comes back in the reply.
        token_ids: int32 [S], the sequences one behind the other. They never see each other.
        sequence_lengths: int32, adding up to S.
        positions: int32 [N], indices into `token_ids`.
        spec: the signal wanted.
        seed: for `sampled`: what is drawn follows from it and the tokens alone.
        waited_s: how long the asker stood still for answers since it sent one before; more replicas follow from it.
        elapsed_s: how long ago that was; 0 where it does not say.
    """

    request_id: str
    token_ids: np.ndarray
    sequence_lengths: np.ndarray
    positions: np.ndarray
    spec: SignalSpec
    seed: int = 0
    waited_s: float = 0.0
    elapsed_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class ScoreReply:
    """A signal with what the client checks before it believes it."""

    request_id: str
    teacher_fingerprint: str
    num_tokens: int
    signal: Signal
    seconds: float = 0.0
    """This request's share, by tokens, of the time that its batch took."""


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
