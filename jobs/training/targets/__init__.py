"""What a teacher said, as something that a student can be compared with: one file for each way of saying it."""

import torch

from cluster.language_model import OutputHead
from jobs.training.targets.base import TeacherTarget
from jobs.training.targets.full import DenseTarget, HiddenTarget
from jobs.training.targets.sampled import SampledTarget
from jobs.training.targets.topk import TopkTarget
from services.teacher.signals import HiddenSignal, SampledSignal, Signal, TopkSignal


def teacher_target(signal: Signal, vocab_size: int, head: OutputHead | None, device: torch.device) -> TeacherTarget:
    """The target for any kind of signal; `hidden` needs the teacher's head."""
    if isinstance(signal, HiddenSignal):
        if head is None:
            raise ValueError("a hidden signal needs the teacher's head")
        return HiddenTarget(signal, head, vocab_size)
    if isinstance(signal, TopkSignal):
        return TopkTarget(signal, device)
    if isinstance(signal, SampledSignal):
        return SampledTarget(signal, device)
    return DenseTarget(signal, device)
