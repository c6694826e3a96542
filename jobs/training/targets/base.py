"""What every target has in common: a student's distribution goes in, a divergence and its gradient come out.

Axes: n positions of a chunk, C columns that both models have, b buckets.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.training.objective import Objective

LOG_FLOOR = -1e4
"""Log-probability of a token that the teacher rules out: finite, so that reverse KL is large instead of infinite."""


@dataclass(frozen=True)
class StudentChunk:
    """The student's distribution over the common columns at the temperature of the divergence."""

    logits_nC: Tensor
    """Already divided by the temperature."""
    probs_nC: Tensor
    log_total_n1: Tensor
    """Log of the sum of `exp(logits)`."""
    best_n: Tensor
    """The most likely column."""

    @classmethod
    def of(cls, logits_nC: Tensor) -> "StudentChunk":
        probs_nC = torch.softmax(logits_nC, -1)
        highest = logits_nC.max(-1, keepdim=True)
        # The softmax has the sum already: its largest probability is exp(highest - log_total), at least 1 / C.
        log_total_n1 = highest.values - probs_nC.gather(-1, highest.indices).log()
        return cls(logits_nC, probs_nC, log_total_n1, highest.indices[:, 0])


@dataclass(frozen=True)
class Comparison:
    """Of a chunk: the divergence summed over positions, its gradient, and the teacher's most likely columns."""

    value: Tensor
    """float64."""
    gradient_nC: Tensor
    """With respect to `StudentChunk.logits_nC`; the caller may overwrite it."""
    best_n: Tensor


class TeacherTarget(ABC):
    """What the teacher said about N positions."""

    vocab_size: int
    """C, the columns over which its distribution is normalised."""

    @abstractmethod
    def compare(self, start: int, stop: int, student: StudentChunk, objective: Objective) -> Comparison:
        """The teacher's positions `start..stop - 1` with the student's, which must not be changed."""


def bucket_divergence(log_p_nb: Tensor, log_q_nb: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Sum of the divergence over a chunk (float64), and `q * dD/dq` [n, b] up to a multiple of q, which the softmax
    removes. `log_p_nb` must be finite."""
    if objective.divergence == "forward_kl":
        p_nb = log_p_nb.exp()
        return (p_nb * (log_p_nb - log_q_nb)).sum(dtype=torch.float64), -p_nb
    q_nb = log_q_nb.exp()
    if objective.divergence == "reverse_kl":
        flow_nb = q_nb * (log_q_nb - log_p_nb)
        return flow_nb.sum(dtype=torch.float64), flow_nb
    beta = objective.beta
    log_m_nb = torch.logaddexp(log_p_nb + math.log(beta), log_q_nb + math.log1p(-beta))
    flow_nb = (1 - beta) * q_nb * (log_q_nb - log_m_nb)
    value = (beta * log_p_nb.exp() * (log_p_nb - log_m_nb)).sum(dtype=torch.float64) + flow_nb.sum(dtype=torch.float64)
    return value, flow_nb
