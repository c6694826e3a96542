"""The loss with both heads, value and gradients, against the textbook form: `python -m tests.benchmarks.loss`.

Textbook: two linear layers, `alpha * CE + (1 - alpha) * T^2 * KL` of full logits, autograd. In float32, and with
bfloat16 products (autocast) as most trainers do it. Each as it comes, and with raystill's process settings (allocator,
waits).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from tests.benchmarks.sides import AS_IT_COMES, OUR_SETTINGS, Side, arguments, show, take_turns

N, MORE, STUDENT_WIDTH, TEACHER_WIDTH, ALPHA = 2048, 16_384, 256, 512, 0.1
VOCABULARIES = (8_192, 32_000, 151_936)


def side(name: str, options: dict[str, Any]) -> Callable[[], dict[str, float]]:
    torch.manual_seed(0)
    vocab_size = options["vocab_size"]
    hidden_ND = torch.randn(options.get("positions", N), STUDENT_WIDTH, requires_grad=True)
    weight_VD = torch.randn(vocab_size, STUDENT_WIDTH).div_(STUDENT_WIDTH**0.5).requires_grad_()
    teacher_ND = torch.randn(len(hidden_ND), TEACHER_WIDTH).bfloat16()
    teacher_VD = torch.randn(vocab_size, TEACHER_WIDTH).mul_(2 / TEACHER_WIDTH**0.5).bfloat16()
    targets_N = torch.randint(vocab_size, (len(hidden_ND),))
    if name.startswith("textbook"):
        dtype = torch.bfloat16 if "bf16" in name else torch.float32
        loss_of = _textbook(teacher_ND.to(dtype), teacher_VD.to(dtype), targets_N, dtype)
    else:
        dtype = torch.bfloat16 if "bf16" in name else torch.float32
        loss_of = _ours(teacher_ND, teacher_VD, targets_N, dtype, compiled="compiled" in name)

    def measure() -> dict[str, float]:
        hidden_ND.grad = weight_VD.grad = None
        loss = loss_of(hidden_ND, weight_VD)
        loss.backward()
        assert hidden_ND.grad is not None
        assert weight_VD.grad is not None
        return {
            "loss": loss.item(),
            "hidden_grad": hidden_ND.grad.norm().item(),
            "weight_grad": weight_VD.grad.norm().item(),
        }

    return measure


def _textbook(teacher_ND: Any, teacher_VD: Any, targets_N: Any, dtype: torch.dtype) -> Callable[[Any, Any], Any]:
    def loss_of(hidden_ND: Any, weight_VD: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits_NV = functional.linear(hidden_ND, weight_VD)
            with torch.no_grad():
                teacher_NV = functional.linear(teacher_ND, teacher_VD)
        logits_NV, teacher_NV = logits_NV.float(), teacher_NV.float()
        cross_entropy = functional.cross_entropy(logits_NV, targets_N)
        log_q, log_p = functional.log_softmax(logits_NV, -1), functional.log_softmax(teacher_NV, -1)
        return ALPHA * cross_entropy + (1 - ALPHA) * functional.kl_div(
            log_q, log_p, reduction="batchmean", log_target=True
        )

    return loss_of


def _ours(
    teacher_ND: Any, teacher_VD: Any, targets_N: Any, dtype: torch.dtype, compiled: bool
) -> Callable[[Any, Any], Any]:
    from cluster.language_model import OutputHead
    from jobs.training.losses import distillation_loss
    from jobs.training.objective import Objective
    from jobs.training.targets.full import HiddenTarget
    from jobs.training.targets.fused import compiled_forward_kl
    from services.teacher.signals import HiddenSignal

    signal = HiddenSignal(teacher_ND.view(torch.uint16).numpy())
    fused = compiled_forward_kl(float("inf")) if compiled else None

    def loss_of(hidden_ND: Any, weight_VD: Any) -> Any:
        target = HiddenTarget(signal, OutputHead(teacher_VD.to(dtype)), len(teacher_VD))
        head = OutputHead(weight_VD)
        loss = distillation_loss(hidden_ND.to(dtype), head, targets_N, target, Objective(ALPHA), fused)
        return loss.total / len(hidden_ND)

    return loss_of


OURS = "ours bf16, compiled"
SIDES = {
    OURS: OUR_SETTINGS,
    "ours bf16": OUR_SETTINGS,
    "ours fp32": OUR_SETTINGS,
    "textbook fp32": AS_IT_COMES,
    "textbook bf16": AS_IT_COMES,
    "textbook fp32, our settings": OUR_SETTINGS,
    "textbook bf16, our settings": OUR_SETTINGS,
}


def main() -> None:
    options = arguments(__doc__ or "")
    rows, result = [], {}
    for vocab_size in VOCABULARIES[: 2 if options.quick else 3]:
        sides = [Side("tests.benchmarks.loss", name, {"vocab_size": vocab_size}, SIDES[name]) for name in SIDES]
        take_turns(sides, options.repeats or 5)
        by_name = {item.name: item for item in sides}
        ours, exact = by_name[OURS], by_name["textbook fp32"]
        for item in sides:
            rows.append(
                [
                    f"V={vocab_size:,}: {item.name}",
                    f"{item.median_s * 1000:,.0f}",
                    f"{exact.median_s / item.median_s:.2f}",
                    f"{item.facts['peak_bytes'] / 1e6:,.0f}",
                    *(f"{_difference(item, exact, fact):.1e}" for fact in ("loss", "hidden_grad", "weight_grad")),
                ]
            )
            item.close()
        result[str(vocab_size)] = {
            "speedup": exact.median_s / ours.median_s,
            "speedup_same_settings": by_name["textbook fp32, our settings"].median_s / ours.median_s,
            "speedup_bf16": by_name["textbook bf16"].median_s / ours.median_s,
            "speedup_bf16_same_settings": by_name["textbook bf16, our settings"].median_s / ours.median_s,
            "memory_ratio": ours.facts["peak_bytes"] / exact.facts["peak_bytes"],
        }
    more = Side("tests.benchmarks.loss", OURS, {"vocab_size": vocab_size, "positions": MORE}, OUR_SETTINGS)
    take_turns([more], 1)
    more.close()
    # Less what any loss gives back: the gradient of the hidden states, in float32 and in the products' dtype.
    grown = more.facts["peak_bytes"] - ours.facts["peak_bytes"] - (MORE - N) * STUDENT_WIDTH * 6
    rows.append([f"V={vocab_size:,}: {OURS}, N={MORE:,}", f"{more.median_s * 1000:,.0f}", "", f"{grown / 1e6:+,.0f}"])
    result["peak_growth"] = grown / ours.facts["peak_bytes"]
    columns = ["loss and gradients, N=2048", "ms", "times faster", "peak MB", "loss off by", "dh off by", "dW off by"]
    show("Loss against the textbook form (medians; off by: relative to textbook fp32)", columns, rows, result)


def _difference(item: Side, exact: Side, fact: str) -> float:
    return abs(item.facts[fact] / exact.facts[fact] - 1)


if __name__ == "__main__":
    main()
