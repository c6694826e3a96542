"""The teacher's whole distribution: from its hidden states and head, or from log-probabilities of every column."""

from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor

from cluster.language_model import OutputHead
from jobs.training.objective import Objective
from jobs.training.targets.base import LOG_FLOOR, Comparison, StudentChunk, TeacherTarget, bucket_divergence
from services.teacher.signals import DenseSignal, HeadRecord, HiddenSignal


class FullTarget(TeacherTarget):
    """Every divergence at every temperature; buckets are columns."""

    @abstractmethod
    def logits(self, start: int, stop: int) -> Tensor:
        """The teacher's logits [n, C], finite, up to a constant for each position, in any dtype; the caller's own."""

    def compare(self, start: int, stop: int, student: StudentChunk, objective: Objective) -> Comparison:
        logits_nC = self.logits(start, stop).to(student.logits_nC.dtype)
        if objective.temperature != 1.0:
            logits_nC /= objective.temperature
        if objective.divergence != "forward_kl":
            log_p_nC = torch.log_softmax(logits_nC, -1).clamp_min_(LOG_FLOOR)
            log_q_nC = student.logits_nC - student.log_total_n1
            value, flow_nC = bucket_divergence(log_p_nC, log_q_nC, objective)
            gradient_nC = flow_nC.addcmul_(student.probs_nC, flow_nC.sum(-1, keepdim=True), value=-1)
            return Comparison(value, gradient_nC, logits_nC.argmax(-1))
        teacher = StudentChunk.of(logits_nC)
        # sum_v p (log p - log q), with the two log-sums taken out of the sum.
        logits_nC.sub_(student.logits_nC).mul_(teacher.probs_nC)
        log_totals_n1 = student.log_total_n1 - teacher.log_total_n1
        value = (logits_nC.sum(-1, keepdim=True) + log_totals_n1).sum(dtype=torch.float64)
        gradient_nC = torch.sub(student.probs_nC, teacher.probs_nC, out=teacher.probs_nC)
        return Comparison(value, gradient_nC, teacher.best_n)


class HiddenTarget(FullTarget):
    """Hidden states and the teacher's head: its logits are formed chunk by chunk."""

    def __init__(self, signal: HiddenSignal, head: OutputHead, vocab_size: int) -> None:
        self.hidden_ND = bfloat16_tensor(signal.hidden_ND).to(head.weight_VD.device)
        self.head, self.vocab_size = head, vocab_size

    def logits(self, start: int, stop: int) -> Tensor:
        raw_nV = self.head.products(self.hidden_ND[start:stop])
        logits_nC = (raw_nV if self.head.is_plain else self.head.cap(raw_nV.float()))[:, : self.vocab_size]
        return logits_nC if self.head.bias_V is None else logits_nC.clamp_min_(LOG_FLOOR)  # a bias may rule tokens out


class DenseTarget(FullTarget):
    """Log-probabilities of all columns. A constant per row does not matter, so those at T=1 serve every T."""

    def __init__(self, signal: DenseSignal, device: torch.device) -> None:
        self.logprobs_NC = torch.from_numpy(signal.logprobs_NC).to(device)
        self.vocab_size = self.logprobs_NC.shape[1]

    def logits(self, start: int, stop: int) -> Tensor:
        return self.logprobs_NC[start:stop].float().clamp_min_(LOG_FLOOR)


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
