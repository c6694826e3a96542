"""Forward KL between whole distributions, cross-entropy and their gradient as one function of the two logits.

Written so that a compiler can fuse it: one pass over the logits finds the maxima, one the sums, one the gradient, and
nothing else of size [n, V] is ever stored. Without a compiler the targets do the same step by step.

One core, 8 million logits at V from 2,048 to 32,000: 5.2 ns for each logit step by step, 2.3 ns compiled (AMD EPYC with
AVX-512, torch 2.13, 2026-11-21); the compilation takes 2 to 5 s.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Fused = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], tuple[Tensor, Tensor, Tensor, Tensor]]

_WORTH = 5e9
"""Logits that a worker must form in all for the compilation to pay: about 10 s of what it saves."""


def compiled_forward_kl(num_logits: float) -> Fused | None:
    """`forward_kl`, compiled, if that many logits are worth it and this machine can compile; else None."""
    if num_logits < _WORTH:
        return None
    import torch._inductor.config  # makes a directory

    torch._inductor.config.compile_threads = 1  # here, not in a pool of processes that would outlive its use
    fused = torch.compile(forward_kl)

    def with_any_number_of_rows(student_nV: Tensor, teacher_nV: Tensor, targets_n1: Tensor, *rest: Any) -> Any:
        for tensor in (student_nV, teacher_nV, targets_n1):
            torch._dynamo.mark_dynamic(tensor, 0)  # else the last chunk would be another program
        return fused(student_nV, teacher_nV, targets_n1, *rest)

    try:
        probe = torch.zeros(3, 64)
        with_any_number_of_rows(probe, probe.clone(), torch.zeros(3, 1, dtype=torch.long), 0.5, None)
    except Exception as error:  # no compiler, no headers, a cache that cannot be written: whatever it is
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning("the loss is not compiled, which makes it slower, not different: %s", reason[:200])
        return None
    return with_any_number_of_rows


def forward_kl(
    student_nV: Tensor, teacher_nV: Tensor, targets_n1: Tensor, alpha: float, temperature: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a chunk: cross-entropy and divergence summed over positions (float64), agreements, and the gradient of
    `alpha * CE + (1 - alpha) * T^2 * KL` with respect to the student's logits, in the dtype of these. Where several
    tokens are most likely, one that is so for both agrees.

    Args:
        student_nV, teacher_nV: logits over the same columns, in any dtype; arithmetic is float32.
        temperature: a scalar tensor, so that another value is no other program; None is 1.
    """
    z_nV, t_nV = student_nV.float(), teacher_nV.float()
    highest_z_n1, highest_t_n1 = z_nV.amax(-1, keepdim=True), t_nV.amax(-1, keepdim=True)
    agree = ((z_nV == highest_z_n1) & (t_nV == highest_t_n1)).any(-1).sum()  # faster than an argmax
    z_nV, t_nV = z_nV - highest_z_n1, t_nV - highest_t_n1
    columns_1V = torch.arange(z_nV.shape[-1], device=z_nV.device)[None]
    exp_z_nV = z_nV.exp()
    sum_z_n1 = exp_z_nV.sum(-1, keepdim=True)
    at_target_n1 = z_nV.gather(-1, targets_n1)
    cross_entropy = (sum_z_n1.log() - at_target_n1).sum(dtype=torch.float64)
    probs_nV = exp_z_nV / sum_z_n1
    soft_nV, log_sum_n1 = probs_nV, sum_z_n1.log()
    if temperature is not None:
        z_nV, t_nV = z_nV / temperature, t_nV / temperature
        soft_exp_nV = z_nV.exp()
        soft_sum_n1 = soft_exp_nV.sum(-1, keepdim=True)
        soft_nV, log_sum_n1 = soft_exp_nV / soft_sum_n1, soft_sum_n1.log()
    exp_t_nV = t_nV.exp()
    sum_t_n1 = exp_t_nV.sum(-1, keepdim=True)
    dot_n1 = (exp_t_nV * (t_nV - z_nV)).sum(-1, keepdim=True)
    divergence = (dot_n1 / sum_t_n1 - sum_t_n1.log() + log_sum_n1).sum(dtype=torch.float64)
    # T^2 in front of the divergence, 1/T from the logits.
    weight = 1 - alpha if temperature is None else (1 - alpha) * temperature
    gradient_nV = alpha * (probs_nV - (columns_1V == targets_n1).float()) + weight * (soft_nV - exp_t_nV / sum_t_n1)
    return cross_entropy, divergence, agree, gradient_nV.to(student_nV.dtype)
