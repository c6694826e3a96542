"""K entries and the mass of the rest, as K + 1 buckets: mass outside the K can never move for free.

By the data-processing inequality the bucketed divergence is at most the full one; forward KL differs from it only
inside the tail. With reverse KL and JSD the student is free to spread what lies in the tail as it likes.
"""

import torch
from torch import Tensor

from jobs.training.objective import Objective
from jobs.training.targets.base import LOG_FLOOR, Comparison, StudentChunk, TeacherTarget, bucket_divergence
from services.teacher.signals import TopkSignal


class TopkTarget(TeacherTarget):
    """The tail's mass is known only at the temperatures that were asked for."""

    def __init__(self, signal: TopkSignal, device: torch.device) -> None:
        ids_NK, logprobs_NK = signal.entries()
        self.ids_NK = torch.from_numpy(ids_NK).to(device, torch.int64)
        self.logprobs_NK = torch.from_numpy(logprobs_NK).to(device)
        self.tail_NM = torch.from_numpy(signal.tail_logmass_NM).to(device)
        self.temperatures, self.vocab_size = signal.temperatures, signal.vocab_size

    def compare(self, start: int, stop: int, student: StudentChunk, objective: Objective) -> Comparison:
        ids_nK = self.ids_NK[start:stop]
        log_p_nb = self._log_buckets(start, stop, objective.temperature).to(student.logits_nC.dtype)
        log_q_nK = student.logits_nC.gather(-1, ids_nK) - student.log_total_n1
        # From the rest itself: 1 - (kept mass) would lose a small tail to cancellation.
        rest = StudentChunk.of(student.logits_nC.scatter(-1, ids_nK, LOG_FLOOR))
        log_rest_n1 = (rest.log_total_n1 - student.log_total_n1).clamp_min(LOG_FLOOR)
        value, flow_nb = bucket_divergence(log_p_nb, torch.cat([log_q_nK, log_rest_n1], -1), objective)
        total_n1 = flow_nb.sum(-1, keepdim=True)
        kept_nK = flow_nb[:, :-1] - log_q_nK.exp() * total_n1
        # A column of the tail gets its share of what flows into the tail bucket.
        tail_n1 = flow_nb[:, -1:] - log_rest_n1.exp() * total_n1
        gradient_nC = rest.probs_nC.mul_(tail_n1).scatter_(-1, ids_nK, kept_nK)
        best_n1 = self.logprobs_NK[start:stop].argmax(-1, keepdim=True)
        return Comparison(value, gradient_nC, ids_nK.gather(-1, best_n1)[:, 0])

    def _log_buckets(self, start: int, stop: int, temperature: float) -> Tensor:
        """The teacher's log-probabilities [n, K + 1]; the last is that of the tail."""
        if temperature not in self.temperatures:
            raise ValueError(f"tail mass at T={temperature} was not asked for; have T in {self.temperatures}")
        tail_n = self.tail_NM[start:stop, self.temperatures.index(temperature)].clamp(LOG_FLOOR, -1e-7)
        kept_logmass_n = torch.log(-torch.expm1(tail_n))
        kept_nK = torch.log_softmax(self.logprobs_NK[start:stop] / temperature, -1) + kept_logmass_n[:, None]
        return torch.cat([kept_nK, tail_n[:, None]], -1).clamp_min(LOG_FLOOR)
