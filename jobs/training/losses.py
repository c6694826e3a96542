"""The distillation loss, exact and in chunks: `alpha * CE + (1 - alpha) * T^2 * D(teacher, student)`.

[N, V] never exists. A chunk of positions goes through the student's head, both parts of the loss and their gradients
with respect to the logits are formed on the spot, and only the gradients of the hidden states and of the head are
kept. Autograd then sees one function of (hidden states, head) whose backward is a multiplication.

Everything is a SUM over positions. Who sums over micro-batches, accumulation steps and workers divides once, by the
number of positions in the global batch; so the value does not depend on how the batch was cut.

What the divergence is taken from is the target's business (`targets`): whole distributions, K entries and a tail, or
draws from the teacher, each over the C columns that both models have. A student with further columns pays
`-log(its mass on the common ones)` besides, which for forward KL is the divergence over all columns with the teacher's
probability zero on the others; for the other divergences, infinite then, it is what stays finite.

Axes: N positions (n in a chunk), D hidden width, V student vocabulary, C columns that both models have.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cluster.language_model import OutputHead
from jobs.training.objective import Objective
from jobs.training.targets.base import StudentChunk, TeacherTarget
from jobs.training.targets.full import FullTarget
from jobs.training.targets.fused import Fused

_CHUNK_ELEMENTS = 1 << 25
"""Products formed at once. Every chunk also adds a whole [V, D] gradient, so it should not be short."""
_BLOCK_ELEMENTS = 1 << 23
"""Logits worked on at once, in float32: temporaries of 32 MiB."""
_FUSED_BLOCK_ELEMENTS = 1 << 24
"""The same where nothing is stored in float32: the teacher's head is then read half as often."""


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
    hidden_ND: Tensor,
    head: OutputHead,
    targets_N: Tensor,
    teacher: TeacherTarget | None,
    objective: Objective,
    fused: Fused | None = None,
) -> LossParts:
    """Sum over positions of the objective, with gradients for hidden states, head weight and head bias.

    Args:
        hidden_ND: the student's final hidden states at the scored positions.
        head: the student's head; products are formed in the dtype of `hidden_ND`, the rest in float32 (float64 if the
            hidden states are float64).
        targets_N: the token that follows each position.
        teacher: None only with `alpha = 1`.
        fused: used in place of the targets' own steps for forward KL between whole distributions.

    Raises:
        ValueError: no teacher although alpha < 1.
    """
    if teacher is None and objective.alpha < 1:
        raise ValueError(f"alpha={objective.alpha} needs a teacher's signal")
    whole = isinstance(teacher, FullTarget) and teacher.vocab_size == head.vocab_size
    if not whole or objective.divergence != "forward_kl" or hidden_ND.dtype == torch.float64:
        fused = None
    arguments = (head, targets_N, teacher, objective, fused)
    total, sums = _ChunkedLoss.apply(hidden_ND, head.weight_VD, head.bias_V, *arguments)
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
        fused: Fused | None,
    ) -> tuple[Tensor, Tensor]:
        num_positions, vocab_size = len(hidden_ND), len(weight_VD)
        product_dtype = hidden_ND.dtype
        weight = weight_VD.to(product_dtype)
        bias = None if bias_V is None else bias_V.to(product_dtype)
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.empty_like(weight_VD) if num_positions else torch.zeros_like(weight_VD)
        grad_bias = None if bias_V is None else torch.zeros_like(bias_V)
        sums = torch.zeros(3, dtype=torch.float64, device=hidden_ND.device)
        gradient_of = _stepwise if fused is None else partial(_fused, fused)
        chunk = _rows(_CHUNK_ELEMENTS, vocab_size)
        block = _rows(_BLOCK_ELEMENTS if fused is None else _FUSED_BLOCK_ELEMENTS, vocab_size)
        raw_cV = hidden_ND.new_empty(min(chunk, num_positions), vocab_size)  # these two serve every chunk
        part_VD = torch.empty_like(weight)
        for start in range(0, num_positions, chunk):
            hidden_nD = hidden_ND[start : start + chunk]
            raw_nV = raw_cV[: len(hidden_nD)]
            if bias is None:
                torch.mm(hidden_nD, weight.T, out=raw_nV)
            else:
                torch.addmm(bias, hidden_nD, weight.T, out=raw_nV)
            for first in range(start, start + len(hidden_nD), block):
                raw_mV = raw_nV[first - start : first - start + block]
                # Overwritten with its own gradient: what products need it for is then in place, in their dtype.
                raw_mV.copy_(
                    gradient_of(head, raw_mV, targets_N[first : first + len(raw_mV)], first, teacher, objective, sums)
                )
            torch.mm(raw_nV, weight, out=grad_hidden[start : start + chunk])
            torch.mm(raw_nV.T, hidden_nD, out=part_VD)
            if start == 0:
                grad_weight.copy_(part_VD)
            else:
                grad_weight += part_VD
            if grad_bias is not None:
                grad_bias += raw_nV.sum(0, dtype=grad_bias.dtype)
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
            *(None,) * 5,
        )


def _rows(elements: int, vocab_size: int) -> int:
    """Positions in a chunk or block: a power of two, since products of 262 rows take a tenth longer than of 256."""
    return max(16, 1 << (elements // vocab_size).bit_length() - 1)


def _fused(
    fused: Fused,
    head: OutputHead,
    raw_nV: Tensor,
    targets_n: Tensor,
    start: int,
    teacher: Any,
    objective: Objective,
    sums: Tensor,
) -> Tensor:
    """As `_stepwise`, with everything between the products in one function."""
    temperature = None if objective.temperature == 1.0 else torch.tensor(objective.temperature)
    logits_nV = raw_nV if head.is_plain else head.cap(raw_nV.float())
    of_teacher = teacher.logits(start, start + len(raw_nV))
    *parts, grad_nV = fused(logits_nV, of_teacher, targets_n[:, None], objective.alpha, temperature)
    sums += torch.stack([part.double() for part in parts])
    return _through_cap(head, logits_nV, grad_nV)


def _stepwise(
    head: OutputHead,
    raw_nV: Tensor,
    targets_n: Tensor,
    start: int,
    teacher: TeacherTarget | None,
    objective: Objective,
    sums: Tensor,
) -> Tensor:
    """Adds a block's cross-entropy, divergence and agreements to `sums`; returns d loss / d products [n, V]."""
    logits_nV = head.cap(raw_nV if raw_nV.dtype == torch.float64 else raw_nV.float())
    alpha, temperature = objective.alpha, objective.temperature
    plain = StudentChunk.of(logits_nV)
    sums[0] += (plain.log_total_n1 - logits_nV.gather(-1, targets_n[:, None])).sum(dtype=torch.float64)
    if teacher is None:
        return _through_cap(head, logits_nV, _minus_one_at(plain.probs_nC, targets_n, 1.0))
    columns, weight = teacher.vocab_size, (1 - alpha) * temperature  # T^2 of the divergence, 1/T from the logits
    everywhere = plain if temperature == 1.0 else StudentChunk.of(logits_nV / temperature)
    common = everywhere if columns == logits_nV.shape[1] else StudentChunk.of(everywhere.logits_nC[:, :columns])
    found = teacher.compare(start, start + len(logits_nV), common, objective)
    sums[1] += found.value
    sums[2] += (common.best_n == found.best_n).sum()
    grad_nV = plain.probs_nC * alpha
    grad_nV[:, :columns].add_(found.gradient_nC, alpha=weight)
    if common is not everywhere:
        # Columns that only the student has are -log(mass of the common ones) away from a teacher that rules them out.
        sums[1] += (everywhere.log_total_n1 - common.log_total_n1).sum(dtype=torch.float64)
        grad_nV.add_(everywhere.probs_nC, alpha=weight)
        grad_nV[:, :columns].sub_(common.probs_nC, alpha=weight)
    return _through_cap(head, logits_nV, _minus_one_at(grad_nV, targets_n, alpha))


def _through_cap(head: OutputHead, logits_nV: Tensor, grad_nV: Tensor) -> Tensor:
    """From the gradient of the logits, which is overwritten, to that of the products."""
    if head.soft_cap is not None:
        grad_nV.mul_(1 - (logits_nV / head.soft_cap).square_())
    if head.scale != 1.0:
        grad_nV.mul_(head.scale)
    return grad_nV


def _minus_one_at(grad_nV: Tensor, targets_n: Tensor, alpha: float) -> Tensor:
    return grad_nV.scatter_add_(-1, targets_n[:, None], torch.full_like(grad_nV[:, :1], -alpha))
