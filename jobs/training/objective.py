"""What is minimised at every position. Plain data."""

from dataclasses import dataclass
from typing import Literal

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


@dataclass(frozen=True)
class Objective:
    """`alpha * CE + (1 - alpha) * T^2 * D(teacher, student)`.

    Args:
        alpha: weight of the cross-entropy with the text.
        temperature: T of the divergence; its gradient is scaled back by T^2 (Hinton et al., arXiv 1503.02531).
        divergence: forward KL, reverse KL, or the generalised Jensen-Shannon divergence (Agarwal et al., arXiv
            2306.13649): `beta * KL(p | m) + (1 - beta) * KL(q | m)` with `m = beta * p + (1 - beta) * q`.
        beta: weight of the teacher in the mixture of `jsd`.
    """

    alpha: float
    temperature: float = 1.0
    divergence: Divergence = "forward_kl"
    beta: float = 0.5
