"""A teacher of about 8 B parameters and the loss on a CUDA device: `python -m tests.benchmarks.gpu`.

Random weights, so nothing is downloaded and nothing is read but this repository; no Ray. Three parts:

- the peak: bfloat16 products of square matrices, as the device really does them;
- the teacher: tokens/s of packed sequences to signals, and the arithmetic of that as a share of the peak;
- the loss with both heads: time and peak memory beside the textbook form, and beside Liger's fused JSD where the
  package `liger-kernel` is installed. Turns alternate; medians.

`--tiny` does the same with a model of a few layers on whatever device there is, to see that it runs.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tests.benchmarks.sides import show

ALPHA = 0.1


@dataclass(frozen=True)
class Sizes:
    """What is measured. `lengths`: the packings of a request, as the lengths of its sequences."""

    hidden: int = 4096
    intermediate: int = 14_336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128_256
    student_hidden: int = 2048
    lengths: tuple[tuple[int, ...], ...] = ((1024,) * 8, (8192,))
    positions: int = 8192
    square: int = 8192
    repeats: int = 5


TINY = Sizes(64, 128, 2, 4, 2, 512, 32, ((64,) * 4, (256,)), 256, 256, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model, on a CPU too")
    sizes = TINY if parser.parse_args().tiny else Sizes()
    if sizes is not TINY and not torch.cuda.is_available():
        raise SystemExit("benchmark gpu: asked for an 8 B model, found no CUDA device; --tiny runs anywhere")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    peak = _peak_flops(sizes, device)
    rows = [["bfloat16 products", "", f"{peak / 1e12:,.2f} TFLOP/s", "100 %", ""]]
    result: dict[str, Any] = {"peak_tflops": peak / 1e12, "teacher": {}, "loss": {}}
    _measure_teacher(sizes, device, peak, rows, result["teacher"])
    _measure_loss(sizes, device, rows, result["loss"])
    show("On one device (medians)", ["", "ms", "speed", "of the peak", "peak MB"], rows, result)


# --- the peak ---------------------------------------------------------------------------------------------------------


def _peak_flops(sizes: Sizes, device: torch.device) -> float:
    left, right = (torch.randn(sizes.square, sizes.square, device=device, dtype=torch.bfloat16) for _ in range(2))
    (seconds,) = _medians([lambda: left @ right], 4 * sizes.repeats, device)
    return 2 * sizes.square**3 / seconds


# --- the teacher ------------------------------------------------------------------------------------------------------


def _measure_teacher(
    sizes: Sizes, device: torch.device, peak: float, rows: list[list[str]], result: dict[str, Any]
) -> None:
    from cluster.grid import pack
    from cluster.language_model import hidden_states, split
    from services.teacher.schema import ScoreRequest
    from services.teacher.scoring import signal_of
    from services.teacher.signals import SignalSpec

    model = _random_llama(sizes, device)
    body, head = split(model)
    in_body = sum(weight.numel() for weight in body.parameters()) - body.get_input_embeddings().weight.numel()
    for lengths in sizes.lengths:
        token_ids = np.random.default_rng(0).integers(0, sizes.vocabulary, sum(lengths)).astype(np.int32)
        grid = pack(token_ids, np.array(lengths, np.int32))
        tokens_BT, places_BT = (torch.from_numpy(part).to(device) for part in (grid.token_ids_BT, grid.position_ids_BT))
        index_N = torch.from_numpy(grid.index_S).to(device)
        positions = np.arange(len(token_ids), dtype=np.int32)
        for kind in ("hidden", "topk"):
            spec = SignalSpec(kind, sizes.vocabulary)  # type: ignore[arg-type]
            request = ScoreRequest("r", token_ids, np.array(lengths, np.int32), positions, spec)

            @torch.inference_mode()
            def score(request: Any = request, parts: Any = (tokens_BT, places_BT, index_N)) -> None:
                tokens_BT, places_BT, index_N = parts
                hidden_ND = hidden_states(body, tokens_BT, places_BT).flatten(0, 1)[index_N]
                signal_of(hidden_ND, head, request)()

            (seconds,) = _medians([score], sizes.repeats, device)
            # Two for a product and its sum; attention: scores and values, each half of the square.
            attention = 2 * sizes.layers * sizes.hidden * sum(length**2 for length in lengths)
            flops = 2 * in_body * len(token_ids) + attention
            if kind == "topk":
                flops += 2 * head.weight_VD.numel() * len(token_ids)
            name = f"teacher, {len(lengths)} x {lengths[0]:,} tokens, {kind}"
            share = flops / seconds / peak
            rows.append(
                [name, f"{seconds * 1000:,.1f}", f"{len(token_ids) / seconds:,.0f} tokens/s", f"{share:.1%}", ""]
            )
            result[f"{len(lengths)}x{lengths[0]}_{kind}"] = {
                "tokens_per_s": len(token_ids) / seconds,
                "share_of_peak": share,
            }


def _random_llama(sizes: Sizes, device: torch.device) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=max(max(lengths) for lengths in sizes.lengths),
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


# --- the loss ---------------------------------------------------------------------------------------------------------


def _measure_loss(sizes: Sizes, device: torch.device, rows: list[list[str]], result: dict[str, Any]) -> None:
    hidden_ND = torch.randn(sizes.positions, sizes.student_hidden, device=device).bfloat16().requires_grad_()
    weight_VD = torch.randn(sizes.vocabulary, sizes.student_hidden, device=device).div_(sizes.student_hidden**0.5)
    weight_VD = weight_VD.bfloat16().requires_grad_()
    teacher_ND = torch.randn(sizes.positions, sizes.hidden, device=device).bfloat16()
    teacher_VD = torch.randn(sizes.vocabulary, sizes.hidden, device=device).mul_(2 / sizes.hidden**0.5).bfloat16()
    targets_N = torch.randint(sizes.vocabulary, (sizes.positions,), device=device)
    given = (hidden_ND, weight_VD, teacher_ND, teacher_VD, targets_N)
    losses = {"ours": _ours(teacher_ND, teacher_VD, targets_N), "textbook": _textbook(*given[2:])}
    if (liger := _liger(*given[2:])) is not None:
        losses["Liger, fused JSD"] = liger

    def step(loss_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            hidden_ND.grad = weight_VD.grad = None
            loss_of(hidden_ND, weight_VD).backward()

        return run

    steps = {name: step(loss_of) for name, loss_of in losses.items()}
    medians = dict(zip(steps, _medians(list(steps.values()), sizes.repeats, device), strict=True))
    for name, seconds in medians.items():
        peak_mb = _peak_mb(steps[name], device)
        times = medians["textbook"] / seconds
        rows.append([f"loss, {name}", f"{seconds * 1000:,.1f}", f"{times:.2f} times the textbook's", "", peak_mb])
        result[name] = {"ms": seconds * 1000, "speedup": times}


def _ours(teacher_ND: Tensor, teacher_VD: Tensor, targets_N: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    from cluster.language_model import OutputHead
    from jobs.training.losses import distillation_loss
    from jobs.training.objective import Objective
    from jobs.training.targets.full import HiddenTarget
    from jobs.training.targets.fused import compiled_forward_kl
    from services.teacher.signals import HiddenSignal

    signal, fused = HiddenSignal(teacher_ND.cpu().view(torch.uint16).numpy()), compiled_forward_kl(float("inf"))

    def loss_of(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        target = HiddenTarget(signal, OutputHead(teacher_VD), len(teacher_VD))
        loss = distillation_loss(hidden_ND, OutputHead(weight_VD), targets_N, target, Objective(ALPHA), fused)
        return loss.total / len(hidden_ND)

    return loss_of


def _textbook(teacher_ND: Tensor, teacher_VD: Tensor, targets_N: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def loss_of(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        logits_NV = functional.linear(hidden_ND, weight_VD).float()
        with torch.no_grad():
            log_p = functional.log_softmax(functional.linear(teacher_ND, teacher_VD).float(), -1)
        divergence = functional.kl_div(
            functional.log_softmax(logits_NV, -1), log_p, reduction="batchmean", log_target=True
        )
        return ALPHA * functional.cross_entropy(logits_NV, targets_N) + (1 - ALPHA) * divergence

    return loss_of


def _liger(teacher_ND: Tensor, teacher_VD: Tensor, targets_N: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Liger's fused linear JSD with beta 0 (forward KL) and the same weights; None where it is not installed."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # type: ignore[import-not-found]
    except ImportError:
        return None
    fused = LigerFusedLinearJSDLoss(weight_hard_loss=ALPHA, weight_soft_loss=1 - ALPHA, beta=0.0)

    def loss_of(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        return fused(hidden_ND, weight_VD, teacher_ND, teacher_VD, targets_N)

    return loss_of


# --- measuring --------------------------------------------------------------------------------------------------------


def _medians(works: list[Callable[[], Any]], repeats: int, device: torch.device) -> list[float]:
    """Median seconds of each, taking turns; a first turn does not count."""
    seconds: list[list[float]] = [[] for _ in works]
    for turn in range(repeats + 1):
        for number, work in enumerate(works):
            _finish(device)
            started = time.perf_counter()
            work()
            _finish(device)
            if turn:
                seconds[number].append(time.perf_counter() - started)
    return [statistics.median(found) for found in seconds]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak_mb(work: Callable[[], None], device: torch.device) -> str:
    """What a step allocates at most on top of what lies there; only a CUDA device counts it."""
    if device.type != "cuda":
        return ""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return f"{(torch.cuda.max_memory_allocated() - before) / 1e6:,.0f}"


if __name__ == "__main__":
    main()
