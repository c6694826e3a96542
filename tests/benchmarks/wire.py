"""What each kind of signal weighs and what it loses: `python -m tests.benchmarks.wire`.

Bytes per position at V = 151,936 and D = 4,096 (an 8 B teacher), counted from the arrays of a record. The loss of each
kind is measured on next-token distributions whose ranks fall as those of language models do (a mixture of a few likely
tokens and a Zipf tail): the error of forward KL against a student, and how far the gradient points elsewhere.
"""

from typing import Any

import numpy as np
import torch

from cluster.language_model import OutputHead
from jobs.training.losses import distillation_loss
from jobs.training.objective import Objective
from jobs.training.targets import teacher_target
from services.teacher.schema import ScoreRequest
from services.teacher.scoring import signal_of
from services.teacher.signals import DenseSignal, SignalSpec, num_bytes
from tests.benchmarks.sides import arguments, show

V, D = 151_936, 4_096
MEASURED_V, MEASURED_D = 32_000, 256


def kinds(vocab_size: int) -> dict[str, SignalSpec]:
    topk = {f"topk{count}": SignalSpec("topk", vocab_size, count) for count in (16, 64, 128)}
    return {
        "hidden": SignalSpec("hidden", vocab_size),
        **topk,
        "topk64 in 8 bits": SignalSpec("topk", vocab_size, 64, logprob_bits=8),
        "sampled32": SignalSpec("sampled", vocab_size, draws=32),
        "sampled64": SignalSpec("sampled", vocab_size, draws=64),
        "dense": SignalSpec("dense", vocab_size),
    }


def model(positions: int) -> tuple[torch.Tensor, OutputHead, torch.Tensor, OutputHead]:
    """Hidden states and heads of a teacher and of a student that agrees with it in part."""
    torch.manual_seed(0)
    directions = torch.randn(MEASURED_V, MEASURED_D) / MEASURED_D**0.5
    zipf = -1.0 * torch.log(torch.arange(1, MEASURED_V + 1).float())[torch.randperm(MEASURED_V)]
    hidden = torch.randn(positions, MEASURED_D) * 3.5
    teacher = OutputHead(directions, zipf)
    student = OutputHead(
        (directions + 0.3 * torch.randn_like(directions) / MEASURED_D**0.5).requires_grad_(), zipf * 0.9
    )
    return hidden, teacher, (hidden + torch.randn_like(hidden)).requires_grad_(), student


def main() -> None:
    options = arguments(__doc__ or "")
    positions = 256 if options.quick else 1024
    hidden, head, student_hidden, student_head = model(positions)
    targets = torch.zeros(positions, dtype=torch.long)

    def loss(spec: SignalSpec) -> tuple[float, torch.Tensor, int]:
        request = ScoreRequest("r", *_tokens(positions), spec)
        signal = signal_of(hidden, head, request)()
        target = teacher_target(signal, MEASURED_V, head, torch.device("cpu"))
        parts = distillation_loss(student_hidden, student_head, targets, target, Objective(0.0))
        [gradient] = torch.autograd.grad(parts.total, student_hidden)
        return parts.divergence / positions, gradient, num_bytes(signal) // positions

    exact_target = teacher_target(_exact(hidden, head), MEASURED_V, head, torch.device("cpu"))
    exact = distillation_loss(student_hidden, student_head, targets, exact_target, Objective(0.0))
    [exact_gradient] = torch.autograd.grad(exact.total, student_hidden)
    exact_kl = exact.divergence / positions
    kl_of_entries = _entry_errors(hidden, head, positions)
    rows, result = [], {}
    wide = kinds(V)
    for name, spec in kinds(MEASURED_V).items():
        divergence, gradient, measured_bytes = loss(spec)
        width = wide[name].bytes_per_position(D)
        assert measured_bytes == spec.bytes_per_position(MEASURED_D), name
        cosine = torch.nn.functional.cosine_similarity(gradient, exact_gradient).mean().item()
        error = abs(divergence - exact_kl)
        result[name.replace(" in 8 bits", "_int8")] = {
            "bytes": width,
            "kl_error": error,
            "gradient_cosine": cosine,
            "rounding_kl": kl_of_entries.get(name, 0.0),
        }
        rounding = f"{kl_of_entries[name]:.1e}" if name in kl_of_entries else ""
        rows.append([name, f"{width:,}", f"{width * 50_000 / 1e6:,.1f}", f"{error:.2e}", f"{cosine:.4f}", rounding])
    columns = ["kind", "bytes", "MB/s at 50k tokens/s", "error of KL, nats", "gradient, cosine", "KL of the rounding"]
    title = f"Signals at V={V:,}, D={D:,}; errors at V={MEASURED_V:,}, KL of the student {exact_kl:.3f} nats"
    show(title, columns, rows, result)


def _tokens(positions: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    places = np.arange(positions, dtype=np.int32)
    return places, np.array([positions], np.int32), places


def _exact(hidden: torch.Tensor, head: OutputHead) -> Any:
    return DenseSignal(torch.log_softmax(head.logits(hidden), -1).numpy())


def _entry_errors(hidden: torch.Tensor, head: OutputHead, positions: int) -> dict[str, float]:
    """KL, in nats, between the kept entries of `topk` and what their rounding makes of them."""
    errors = {}
    for name, spec in kinds(MEASURED_V).items():
        if spec.kind != "topk":
            continue
        signal = signal_of(hidden, head, ScoreRequest("r", *_tokens(positions), spec))()
        ids, logprobs = (torch.from_numpy(array) for array in signal.entries())
        exact = torch.log_softmax(head.logits(hidden).double(), -1).gather(-1, ids.long())
        p, q = torch.softmax(exact, -1), torch.log_softmax(logprobs.double(), -1)
        errors[name] = (p * (p.log() - q)).sum(-1).mean().item()
    return errors


if __name__ == "__main__":
    main()
