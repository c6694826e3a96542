"""The distillation loss, exact and in chunks: `alpha * CE + (1 - alpha) * T^2 * D(teacher, student)`.

[N, V] never exists. A chunk of positions goes through the student's head, both parts of the loss and their gradients
with respect to the logits are formed on the spot, and only the gradients of the hidden states and of the head are
kept. Autograd then sees one function of (hidden states, head) whose backward is a multiplication.

Everything is a SUM over positions. Who sums over micro-batches, accumulation steps and workers divides once, by the
number of positions in the global batch; so the value does not depend on how the batch was cut.

The divergences are those between two distributions over buckets. For `hidden` and `dense` signals the buckets are the
C vocabulary columns that both models have. For `topk` they are the K kept tokens and one bucket for all others (the
tail), so that mass outside the K can never move for free. By the data-processing inequality the bucketed divergence is
at most the full one; forward KL differs from it only inside the tail.

Axes: N positions, D hidden width, V student vocabulary, C common columns, K kept entries, b buckets (C, or K + 1).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cluster.language_model import OutputHead
from services.teacher.schema import DenseSignal, HeadRecord, HiddenSignal, Signal, TopkSignal

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]

_LOG_FLOOR = -1e4
"""Log-probability of a token that the teacher rules out: finite, so that reverse KL is large instead of infinite."""
_CHUNK_ELEMENTS = 1 << 23
"""Logits formed at once: 32 MiB per float32 temporary. Every chunk also adds a whole [V, D] gradient, so few positions
at a large vocabulary cost more than leaving the cache does: at N=2048, D=576, V=49,152 one core took 5.1 s with chunks
of 2^20, 2.7 s with 2^23 and 3.5 s with 2^25 (bfloat16 products); at V=2048 the size does not matter."""


@dataclass(frozen=True)
class Objective:
    """What is minimised at every position.

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


class TeacherTarget(ABC):
    """What the teacher said about N positions, as log-probabilities over buckets at a temperature."""

    @abstractmethod
    def buckets(self, start: int, stop: int, temperature: float) -> tuple[Tensor, Tensor | None, Tensor]:
        """For a chunk of n positions: log-probabilities [n, b]; ids [n, K] if the buckets are K ids and a tail, else
        None (the buckets are the columns); and the most likely id [n]."""

    vocab_size: int
    """C, the columns over which the teacher's distribution is normalised."""


class HiddenTarget(TeacherTarget):
    """Hidden states and the teacher's head: its logits are formed chunk by chunk."""

    def __init__(self, signal: HiddenSignal, head: OutputHead, vocab_size: int) -> None:
        device = head.weight_VD.device
        self.hidden_ND = bfloat16_tensor(signal.hidden_ND).to(device)
        self.head, self.vocab_size = head, vocab_size

    def buckets(self, start: int, stop: int, temperature: float) -> tuple[Tensor, Tensor | None, Tensor]:
        logits_nC = self.head.logits(self.hidden_ND[start:stop])[:, : self.vocab_size]
        return torch.log_softmax(logits_nC / temperature, -1), None, logits_nC.argmax(-1)


class DenseTarget(TeacherTarget):
    """Log-probabilities of all columns. A constant per row does not matter, so those at T=1 serve every T."""

    def __init__(self, signal: DenseSignal, device: torch.device) -> None:
        self.logprobs_NC = torch.from_numpy(signal.logprobs_NC).to(device)
        self.vocab_size = self.logprobs_NC.shape[1]

    def buckets(self, start: int, stop: int, temperature: float) -> tuple[Tensor, Tensor | None, Tensor]:
        logprobs_nC = self.logprobs_NC[start:stop].float()
        return torch.log_softmax(logprobs_nC / temperature, -1), None, logprobs_nC.argmax(-1)


class TopkTarget(TeacherTarget):
    """K entries and the mass of the rest, which is known only at the temperatures that were asked for."""

    def __init__(self, signal: TopkSignal, vocab_size: int, device: torch.device) -> None:
        self.ids_NK = torch.from_numpy(np.array(signal.ids_NK, np.int64)).to(device)
        self.logprobs_NK = torch.from_numpy(signal.logprobs_NK).to(device)
        self.tail_NM = torch.from_numpy(signal.tail_logmass_NM).to(device)
        self.temperatures, self.vocab_size = signal.temperatures, vocab_size

    def buckets(self, start: int, stop: int, temperature: float) -> tuple[Tensor, Tensor | None, Tensor]:
        if temperature not in self.temperatures:
            raise ValueError(f"tail mass at T={temperature} was not asked for; have T in {self.temperatures}")
        tail_n = self.tail_NM[start:stop, self.temperatures.index(temperature)].clamp(_LOG_FLOOR, -1e-7)
        kept_logmass_n = torch.log(-torch.expm1(tail_n))
        kept_nK = torch.log_softmax(self.logprobs_NK[start:stop].float() / temperature, -1) + kept_logmass_n[:, None]
        ids_nK = self.ids_NK[start:stop]
        return torch.cat([kept_nK, tail_n[:, None]], -1), ids_nK, ids_nK[:, 0]


def teacher_target(signal: Signal, vocab_size: int, head: OutputHead | None, device: torch.device) -> TeacherTarget:
    """The target for any kind of signal; `hidden` needs the teacher's head."""
    if isinstance(signal, HiddenSignal):
        if head is None:
            raise ValueError("a hidden signal needs the teacher's head")
        return HiddenTarget(signal, head, vocab_size)
    if isinstance(signal, TopkSignal):
        return TopkTarget(signal, vocab_size, device)
    return DenseTarget(signal, device)


def teacher_head(record: HeadRecord, device: torch.device, dtype: torch.dtype | None = None) -> OutputHead:
    """The head of a teacher from its record, in the record's dtype unless another is asked for."""
    weight = record.weight_VD
    weight_VD = bfloat16_tensor(weight) if weight.dtype == np.uint16 else torch.from_numpy(weight)
    bias_V = None if record.bias_V is None else torch.from_numpy(record.bias_V)
    dtype = dtype or weight_VD.dtype
    return OutputHead(
        weight_VD.to(device, dtype), None if bias_V is None else bias_V.to(device, dtype), record.scale, record.soft_cap
    )


def bfloat16_tensor(bits: np.ndarray) -> Tensor:
    """A bfloat16 tensor that shares memory with uint16 bit patterns."""
    return torch.from_numpy(bits).view(torch.bfloat16)


@dataclass
class LossParts:
    """Sums over positions: the loss (with a gradient), and what it is made of (detached, float64)."""

    total: Tensor
    cross_entropy: float
    divergence: float
    """The divergence D itself, without T^2 and weights."""
    agreements: int
    """Positions where the student's most likely token is the teacher's."""


def distillation_loss(
    hidden_ND: Tensor, head: OutputHead, targets_N: Tensor, teacher: TeacherTarget | None, objective: Objective
) -> LossParts:
    """Sum over positions of the objective, with gradients for hidden states, head weight and head bias.

    Args:
        hidden_ND: the student's final hidden states at the scored positions.
        head: the student's head; products are formed in the dtype of `hidden_ND`, the rest in float32 (float64 if the
            hidden states are float64).
        targets_N: the token that follows each position.
        teacher: None only with `alpha = 1`.

    Raises:
        ValueError: no teacher although alpha < 1.
    """
    if teacher is None and objective.alpha < 1:
        raise ValueError(f"alpha={objective.alpha} needs a teacher's signal")
    total, sums = _ChunkedLoss.apply(hidden_ND, head.weight_VD, head.bias_V, head, targets_N, teacher, objective)
    cross_entropy, divergence, agreements = sums.tolist()
    return LossParts(total, cross_entropy, divergence, int(agreements))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: OutputHead,
        targets_N: Tensor,
        teacher: TeacherTarget | None,
        objective: Objective,
    ) -> tuple[Tensor, Tensor]:
        num_positions, vocab_size = len(hidden_ND), len(weight_VD)
        product_dtype = hidden_ND.dtype
        weight = weight_VD.to(product_dtype)
        bias = None if bias_V is None else bias_V.to(product_dtype)
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.zeros_like(weight_VD)
        grad_bias = None if bias_V is None else torch.zeros_like(bias_V)
        sums = torch.zeros(3, dtype=torch.float64, device=hidden_ND.device)
        chunk = max(16, _CHUNK_ELEMENTS // vocab_size)
        for start in range(0, num_positions, chunk):
            stop = min(start + chunk, num_positions)
            hidden_nD = hidden_ND[start:stop]
            raw_nV = torch.nn.functional.linear(hidden_nD, weight, bias)
            logits_nV = head.cap(raw_nV if raw_nV.dtype == torch.float64 else raw_nV.float())
            grad_nV = _chunk_loss_and_gradient(logits_nV, targets_N[start:stop], start, teacher, objective, sums)
            if head.soft_cap is not None:
                grad_nV.mul_(1 - (logits_nV / head.soft_cap).square_())
            if head.scale != 1.0:
                grad_nV.mul_(head.scale)
            grad_product = grad_nV.to(product_dtype)
            torch.mm(grad_product, weight, out=grad_hidden[start:stop])
            grad_weight += grad_product.T @ hidden_nD
            if grad_bias is not None:
                grad_bias += grad_nV.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.mark_non_differentiable(sums)
        alpha, t_squared = objective.alpha, objective.temperature**2
        return alpha * sums[0] + (1 - alpha) * t_squared * sums[1], sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        scale = grads[0]
        return (
            grad_hidden * scale.to(grad_hidden.dtype),
            grad_weight * scale.to(grad_weight.dtype),
            None if grad_bias is None else grad_bias * scale.to(grad_bias.dtype),
            *(None,) * 4,
        )


def _chunk_loss_and_gradient(
    logits_nV: Tensor,
    targets_n: Tensor,
    start: int,
    teacher: TeacherTarget | None,
    objective: Objective,
    sums: Tensor,
) -> Tensor:
    """Adds a chunk's cross-entropy, divergence and agreements to `sums`; returns d loss / d logits [n, V]."""
    alpha, temperature = objective.alpha, objective.temperature
    logprobs_nV = torch.log_softmax(logits_nV, -1)
    sums[0] -= logprobs_nV.gather(-1, targets_n[:, None]).sum(dtype=torch.float64)
    grad_nV = logprobs_nV.exp_().mul_(alpha)
    grad_nV.scatter_add_(-1, targets_n[:, None], torch.full_like(grad_nV[:, :1], -alpha))
    if teacher is None:
        return grad_nV
    columns = teacher.vocab_size
    log_p_nb, ids_nK, best_n = teacher.buckets(start, start + len(logits_nV), temperature)
    log_q_nC = torch.log_softmax(logits_nV[:, :columns] / temperature, -1)
    weight = (1 - alpha) * temperature  # T^2 in front of the divergence, 1/T from the logits
    if ids_nK is None:
        value, flow_nb = _divergence(log_p_nb.to(log_q_nC), log_q_nC, objective)
        flow_nb -= log_q_nC.exp_() * flow_nb.sum(-1, keepdim=True)
        grad_nV[:, :columns].add_(flow_nb, alpha=weight)
    else:
        log_q_nb = _bucketed(log_q_nC, ids_nK)
        value, flow_nb = _divergence(log_p_nb.to(log_q_nC), log_q_nb, objective)
        total_n1 = flow_nb.sum(-1, keepdim=True)
        kept_nK = flow_nb[:, :-1] - log_q_nb[:, :-1].exp() * total_n1
        # A column of the tail gets its share q_v / Q_tail of what flows into the tail bucket.
        tail_share_nC = (log_q_nC - log_q_nb[:, -1:]).exp_()
        flow_nC = tail_share_nC.mul_(flow_nb[:, -1:] - log_q_nb[:, -1:].exp() * total_n1)
        flow_nC.scatter_(-1, ids_nK, kept_nK)
        grad_nV[:, :columns].add_(flow_nC, alpha=weight)
    sums[1] += value
    sums[2] += (logits_nV[:, :columns].argmax(-1) == best_n).sum()
    return grad_nV


def _bucketed(log_q_nC: Tensor, ids_nK: Tensor) -> Tensor:
    """Log-probabilities [n, K + 1] of the kept ids and of everything else."""
    kept_nK = log_q_nC.gather(-1, ids_nK)
    rest_n1 = log_q_nC.scatter(-1, ids_nK, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([kept_nK, rest_n1.clamp_min(_LOG_FLOOR)], -1)


def _divergence(log_p_nb: Tensor, log_q_nb: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Sum of the divergence over a chunk, and `q * dD/dq` [n, b] up to a multiple of q, which the softmax removes."""
    log_p_nb = log_p_nb.clamp_min(_LOG_FLOOR)
    if objective.divergence == "forward_kl":
        p_nb = log_p_nb.exp()
        return (p_nb * (log_p_nb - log_q_nb)).sum(dtype=torch.float64), -p_nb
    q_nb = log_q_nb.exp()
    if objective.divergence == "reverse_kl":
        flow_nb = q_nb * (log_q_nb - log_p_nb)
        return flow_nb.sum(dtype=torch.float64), flow_nb
    beta = objective.beta
    log_m_nb = torch.logaddexp(log_p_nb + np.log(beta), log_q_nb + np.log1p(-beta))
    flow_nb = (1 - beta) * q_nb * (log_q_nb - log_m_nb)
    value = (beta * log_p_nb.exp() * (log_p_nb - log_m_nb)).sum(dtype=torch.float64) + flow_nb.sum(dtype=torch.float64)
    return value, flow_nb
