"""Tokens drawn from the teacher: the forward KL and its gradient without bias, from a few ids for each position.

`KL(p | q) = -H(p) - sum_v p log q`, and the sum is a mean under p, for which the weighted draws stand. The log-sum of
the student is not estimated: with `z` its logits at the temperature, the gradient is `softmax(z) - sum_s w_s e(id_s)`.
"""

import torch

from jobs.training.objective import Objective
from jobs.training.targets.base import Comparison, StudentChunk, TeacherTarget
from services.teacher.signals import SampledSignal


class SampledTarget(TeacherTarget):
    """Only for forward KL, at the temperature at which the teacher was drawn from."""

    def __init__(self, signal: SampledSignal, device: torch.device) -> None:
        ids_NS, weights_NS = signal.entries()
        self.ids_NS = torch.from_numpy(ids_NS).to(device, torch.int64)
        self.weights_NS = torch.from_numpy(weights_NS).to(device)
        self.entropy_N = torch.from_numpy(signal.entropy_N).to(device)
        self.best_N = torch.from_numpy(signal.best_N).to(device)
        self.vocab_size = signal.vocab_size

    def compare(self, start: int, stop: int, student: StudentChunk, objective: Objective) -> Comparison:
        if objective.divergence != "forward_kl":
            raise ValueError(f"draws from the teacher give no {objective.divergence}, only forward_kl")
        ids_nS = self.ids_NS[start:stop]
        weights_nS = self.weights_NS[start:stop].to(student.logits_nC.dtype)
        drawn_n = (weights_nS * student.logits_nC.gather(-1, ids_nS)).sum(-1)
        value = (student.log_total_n1[:, 0] - drawn_n - self.entropy_N[start:stop]).sum(dtype=torch.float64)
        gradient_nC = student.probs_nC.scatter_add(-1, ids_nS, -weights_nS)
        return Comparison(value, gradient_nC, self.best_N[start:stop])
