"""The loss against independent float64 references: value and gradients, for every kind, divergence and temperature.

Tolerances. `dense` and `topk` carry float16 log-probabilities and `hidden` carries bfloat16 hidden states, so each is
compared with a reference computed from the very numbers that travelled: what remains is the loss's own arithmetic, and
in float64 it agrees to 1e-9. What the wire itself costs is a test of its own (`test_wire_...`).
"""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.language_model import OutputHead
from jobs.training import losses
from jobs.training.losses import distillation_loss
from jobs.training.objective import Objective
from jobs.training.targets.base import LOG_FLOOR
from jobs.training.targets.full import DenseTarget, FullTarget, HiddenTarget, bfloat16_tensor
from jobs.training.targets.fused import compiled_forward_kl, forward_kl
from jobs.training.targets.topk import TopkTarget
from services.teacher.signals import DenseSignal, HiddenSignal, SignalSpec, TopkSignal

N, D, V, K = 37, 12, 50, 7
TEMPERATURES = (1.0, 2.0, 4.0)
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
CPU = torch.device("cpu")


def make(seed: int = 0, scale: float = 1.0, soft_cap: float | None = None, bias: bool = False, columns: int = V):
    """Student hidden states and head, targets, and teacher logits over `columns`; all float64."""
    torch.manual_seed(seed)
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    bias_V = torch.randn(V, dtype=torch.float64, requires_grad=True) if bias else None
    targets = torch.randint(0, V, (N,))
    teacher_logits = 2 * torch.randn(N, columns, dtype=torch.float64)
    return hidden, OutputHead(weight, bias_V, scale, soft_cap), targets, teacher_logits


def topk_signal(logits: Tensor, k: int, temperatures=TEMPERATURES) -> TopkSignal:
    logprobs = torch.log_softmax(logits, -1)
    kept = logprobs.topk(k)
    rest = logprobs.scatter(-1, kept.indices, float("-inf"))
    tails = [(rest / t).logsumexp(-1) - (logprobs / t).logsumexp(-1) for t in temperatures]
    spec = SignalSpec("topk", logits.shape[1], k, tuple(temperatures))
    ids, order = kept.indices.sort(-1)
    return TopkSignal.of(
        ids.numpy(), kept.values.gather(-1, order).float().numpy(), torch.stack(tails, -1).float().numpy(), spec
    )


def reference_divergence(p: Tensor, q: Tensor, objective: Objective) -> Tensor:
    """Sum over rows of D(p, q) for probabilities over buckets, by the textbook formulas."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 0, a * (torch.log(a.clamp_min(1e-300)) - torch.log(b)), torch.zeros_like(a)).sum()

    if objective.divergence == "forward_kl":
        return kl(p, q)
    if objective.divergence == "reverse_kl":
        return kl(q, p.clamp_min(1e-300))
    mixture = objective.beta * p + (1 - objective.beta) * q
    return objective.beta * kl(p, mixture) + (1 - objective.beta) * kl(q, mixture)


def reference_loss(hidden, head, targets, objective, p_of, buckets_of=None, columns=V):
    """alpha * CE + (1 - alpha) * T^2 * D with full logits, by autograd."""
    raw = hidden @ head.weight_VD.T + (0 if head.bias_V is None else head.bias_V)
    logits = raw * head.scale
    if head.soft_cap is not None:
        logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
    cross_entropy = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    q = torch.softmax(logits / objective.temperature, -1)
    common = q[:, :columns].sum(-1, keepdim=True)  # other columns are impossible for the teacher
    q = q[:, :columns] / common
    if buckets_of is not None:
        kept = q.gather(-1, buckets_of)
        q = torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)
    divergence = reference_divergence(p_of(objective.temperature), q, objective) - common.log().sum()
    return objective.alpha * cross_entropy + (1 - objective.alpha) * objective.temperature**2 * divergence


def gradients(loss: Tensor, hidden: Tensor, head: OutputHead) -> list[Tensor]:
    leaves = [hidden, head.weight_VD, *([] if head.bias_V is None else [head.bias_V])]
    return list(torch.autograd.grad(loss, leaves))


def assert_same(ours, reference, hidden, head, tolerance=1e-9):
    assert ours.item() == pytest.approx(reference.item(), rel=tolerance, abs=tolerance)
    for mine, theirs in zip(gradients(ours, hidden, head), gradients(reference, hidden, head), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance * 100, atol=tolerance * 10)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 32 positions in blocks of 16, so that tests cross the borders of both and have short last ones."""
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", 40 * V)
    monkeypatch.setattr(losses, "_BLOCK_ELEMENTS", 16 * V)
    monkeypatch.setattr(losses, "_FUSED_BLOCK_ELEMENTS", 16 * V)


def kinds(teacher_logits: Tensor):
    """For each kind: a target, the reference's teacher probabilities at T, and the ids of its buckets."""
    dense = DenseSignal(torch.log_softmax(teacher_logits, -1).half().numpy())
    dense_logits = torch.from_numpy(dense.logprobs_NC).double()
    yield "dense", DenseTarget(dense, CPU), lambda t: torch.softmax(dense_logits / t, -1), None

    bits = torch.randn(N, D).bfloat16()
    hidden = HiddenSignal(bits.view(torch.uint16).numpy())
    head = OutputHead(torch.randn(teacher_logits.shape[1], D, dtype=torch.float64), None, 0.7, 30.0)
    raw = 0.7 * (bits.double() @ head.weight_VD.T)
    logits = 30.0 * torch.tanh(raw / 30.0)
    yield "hidden", HiddenTarget(hidden, head, teacher_logits.shape[1]), lambda t: torch.softmax(logits / t, -1), None

    topk = topk_signal(teacher_logits, K)
    ids, kept = (torch.from_numpy(array) for array in topk.entries())
    kept = kept.double()

    def bucketed(t: float) -> Tensor:
        tail = torch.from_numpy(topk.tail_logmass_NM)[:, TEMPERATURES.index(t)].double().exp()[:, None]
        return torch.cat([torch.softmax(kept / t, -1) * (1 - tail), tail], -1)

    yield "topk", TopkTarget(topk, CPU), bucketed, ids.long()


@pytest.mark.parametrize(
    ("divergence", "temperature", "alpha"), itertools.product(DIVERGENCES, TEMPERATURES, (0.0, 0.3))
)
def test_loss_every_kind_equals_fp64_reference_with_gradients(divergence, temperature, alpha):
    hidden, head, targets, teacher_logits = make()
    objective = Objective(alpha, temperature, divergence, 0.3)
    for _kind, target, p_of, ids in kinds(teacher_logits):
        ours = distillation_loss(hidden, head, targets, target, objective).total
        reference = reference_loss(hidden, head, targets, objective, p_of, ids)
        # Targets form the teacher's distribution in float32, and that bounds the agreement.
        assert_same(ours, reference, hidden, head, 2e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "head_options", [{"soft_cap": 3.0}, {"scale": 0.4}, {"bias": True}, {"scale": 2, "soft_cap": 5}]
)
def test_loss_scaled_capped_and_biased_student_heads_equal_reference(divergence, head_options):
    hidden, head, targets, teacher_logits = make(**head_options)
    objective = Objective(0.4, 2.0, divergence)
    target = Exact(teacher_logits)
    ours = distillation_loss(hidden, head, targets, target, objective).total
    reference = reference_loss(hidden, head, targets, objective, lambda t: torch.softmax(teacher_logits / t, -1))
    assert_same(ours, reference, hidden, head)


class Exact(FullTarget):
    """Teacher logits in float64, to test the loss's own arithmetic to the last digits."""

    def __init__(self, logits: Tensor) -> None:
        self.logits_NC, self.vocab_size = logits, logits.shape[1]

    def logits(self, start, stop):
        return self.logits_NC[start:stop].clamp_min(LOG_FLOOR)


def float32(hidden: Tensor, head: OutputHead) -> tuple[Tensor, OutputHead]:
    bias = None if head.bias_V is None else head.bias_V.detach().float().requires_grad_()
    weight = head.weight_VD.detach().float().requires_grad_()
    return hidden.detach().float().requires_grad_(), OutputHead(weight, bias, head.scale, head.soft_cap)


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"scale": 2, "soft_cap": 5}])
@pytest.mark.parametrize(("temperature", "alpha"), itertools.product(TEMPERATURES, (0.0, 0.3)))
def test_loss_fused_equals_step_by_step(options, temperature, alpha):
    hidden, head, targets, teacher_logits = make(**options)
    hidden, head = float32(hidden, head)
    objective = Objective(alpha, temperature)
    for kind, target, _, _ in kinds(teacher_logits):
        found, expected = (
            distillation_loss(hidden, head, targets, target, objective, fused) for fused in (forward_kl, None)
        )
        assert_same(found.total, expected.total, hidden, head, 1e-5)
        assert found.agreements == expected.agreements, kind
        assert found.cross_entropy == pytest.approx(expected.cross_entropy, rel=1e-6)
        assert found.divergence == pytest.approx(expected.divergence, rel=1e-5)


def test_loss_fused_in_bfloat16_is_near_float32():
    hidden, head, targets, teacher_logits = make()
    hidden, head = float32(hidden, head)
    exact = distillation_loss(hidden, head, targets, Exact(teacher_logits), Objective(0.2))
    found = distillation_loss(hidden.bfloat16(), head, targets, Exact(teacher_logits), Objective(0.2), forward_kl)
    assert found.total.item() == pytest.approx(exact.total.item(), rel=1e-2)
    for mine, theirs in zip(gradients(found.total, hidden, head), gradients(exact.total, hidden, head), strict=True):
        assert (mine - theirs).norm() < 0.02 * theirs.norm()


def test_loss_fused_is_left_out_where_it_is_not_the_same():
    def never(*arguments):
        raise AssertionError("must not be called")

    hidden, head, targets, teacher_logits = make()
    distillation_loss(hidden, head, targets, Exact(teacher_logits), Objective(0.2), never)  # float64
    hidden, head = float32(hidden, head)
    fewer = Exact(teacher_logits[:, : V - 6])
    for target, objective in (
        (fewer, Objective(0.2)),
        (Exact(teacher_logits), Objective(0.2, 1.0, "jsd")),
        (TopkTarget(topk_signal(teacher_logits, K), CPU), Objective(0.2)),
        (None, Objective(1.0)),
    ):
        distillation_loss(hidden, head, targets, target, objective, never)


def test_loss_compiled_equals_step_by_step_for_any_number_of_rows():
    compiled = compiled_forward_kl(1e12)
    if compiled is None:
        pytest.skip("no C++ compiler here")
    assert compiled_forward_kl(1e6) is None  # not worth it
    hidden, head, targets, teacher_logits = make()
    hidden, head = float32(hidden, head)
    for objective in (Objective(0.3), Objective(0.3, 2.0), Objective(0.3, 3.0)):
        for rows in (N, 20, 1):
            some = (hidden[:rows], head, targets[:rows], Exact(teacher_logits[:rows]), objective)
            found, expected = (distillation_loss(*some, fused) for fused in (compiled, None))
            assert_same(found.total, expected.total, hidden, head, 1e-5)
            assert found.agreements == expected.agreements
            assert found.cross_entropy == pytest.approx(expected.cross_entropy, rel=1e-5)
            assert found.divergence == pytest.approx(expected.divergence, rel=1e-5)


def test_loss_without_a_compiler_says_so_and_is_formed_step_by_step(monkeypatch, caplog):
    def fails(*arguments):
        raise RuntimeError("no working C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", lambda function: fails)
    assert compiled_forward_kl(1e12) is None
    assert "not compiled, which makes it slower, not different: no working C++ compiler found" in caplog.text


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_loss_with_exact_teacher_equals_reference_to_1e_9(divergence, temperature):
    hidden, head, targets, teacher_logits = make(seed=3)
    objective = Objective(0.25, temperature, divergence, 0.7)
    ours = distillation_loss(hidden, head, targets, Exact(teacher_logits), objective).total
    reference = reference_loss(hidden, head, targets, objective, lambda t: torch.softmax(teacher_logits / t, -1))
    assert_same(ours, reference, hidden, head)


def test_loss_forward_kl_equals_torch_kl_div():
    hidden, head, targets, teacher_logits = make(seed=5)
    ours = distillation_loss(hidden, head, targets, Exact(teacher_logits), Objective(0.0, 2.0)).total
    log_q = torch.log_softmax(hidden @ head.weight_VD.T / 2, -1)
    reference = 4 * torch.nn.functional.kl_div(
        log_q, torch.log_softmax(teacher_logits / 2, -1), reduction="sum", log_target=True
    )
    assert_same(ours, reference, hidden, head)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_of_a_student_equal_to_its_teacher_is_zero_with_zero_gradient(divergence):
    hidden, head, targets, _ = make()
    teacher = Exact((hidden @ head.weight_VD.T).detach())
    parts = distillation_loss(hidden, head, targets, teacher, Objective(0.0, 2.0, divergence))
    assert parts.total.item() == pytest.approx(0, abs=1e-10)
    assert parts.agreements == N
    for gradient in gradients(parts.total, hidden, head):
        assert gradient.abs().max() < 1e-10


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_loss_topk_of_the_whole_vocabulary_equals_dense(divergence, temperature):
    hidden, head, targets, teacher_logits = make()
    objective = Objective(0.1, temperature, divergence)
    everything = TopkTarget(topk_signal(teacher_logits, V), CPU)
    dense = DenseTarget(DenseSignal(torch.log_softmax(teacher_logits, -1).half().numpy()), CPU)
    ours = distillation_loss(hidden, head, targets, everything, objective).total
    reference = distillation_loss(hidden, head, targets, dense, objective).total
    assert_same(ours, reference, hidden, head, 1e-6)


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_topk_never_negative_and_moves_mass_outside_the_kept(k, divergence):
    hidden, head, targets, teacher_logits = make(seed=9)
    target = TopkTarget(topk_signal(teacher_logits, k), CPU)
    parts = distillation_loss(hidden, head, targets, target, Objective(0.0, 1.0, divergence))
    assert parts.divergence > 0.1  # with K=1 a renormalised top-k would be identically zero
    bucketed = parts.total.item()
    full = distillation_loss(hidden, head, targets, Exact(teacher_logits), Objective(0.0, 1.0, divergence)).total.item()
    assert bucketed <= full * (1 + 1e-3)
    assert gradients(parts.total, hidden, head)[1].abs().sum(-1).min() > 0  # every column of the head is told something


@pytest.mark.parametrize(("divergence", "temperature"), itertools.product(DIVERGENCES, (1.0, 2.0)))
def test_loss_columns_that_only_the_student_has_are_driven_out(divergence, temperature):
    hidden, head, targets, teacher_logits = make(columns=V - 6, bias=True)
    targets = targets % (V - 6)
    objective = Objective(0.2, temperature, divergence)
    ours = distillation_loss(hidden, head, targets, Exact(teacher_logits), objective).total
    reference = reference_loss(
        hidden, head, targets, objective, lambda t: torch.softmax(teacher_logits / t, -1), columns=V - 6
    )
    assert_same(ours, reference, hidden, head)
    alone = distillation_loss(hidden, head, targets, Exact(teacher_logits), Objective(0.0, temperature, divergence))
    assert gradients(alone.total, hidden, head)[2][V - 6 :].min() > 0  # every one is pushed down, without cross-entropy


def test_loss_forward_kl_with_further_columns_is_that_over_all_columns():
    hidden, head, targets, teacher_logits = make(columns=V - 6)
    ours = distillation_loss(hidden, head, targets, Exact(teacher_logits), Objective(0.0)).total
    everywhere = torch.nn.functional.pad(teacher_logits, (0, 6), value=float("-inf"))
    reference = torch.nn.functional.kl_div(
        torch.log_softmax(hidden @ head.weight_VD.T, -1), torch.softmax(everywhere, -1), reduction="sum"
    )
    assert_same(ours, reference, hidden, head)


def test_loss_is_a_sum_so_cutting_the_positions_changes_nothing():
    hidden, head, targets, teacher_logits = make(seed=2)
    objective = Objective(0.3, 2.0, "reverse_kl")
    whole = distillation_loss(hidden, head, targets, Exact(teacher_logits), objective).total
    parts = [
        distillation_loss(hidden[part], head, targets[part], Exact(teacher_logits[part]), objective).total
        for part in (slice(0, 5), slice(5, 20), slice(20, N))
    ]
    assert_same(sum(parts), whole, hidden, head)


def test_loss_without_positions_is_zero_not_nan():
    hidden, head, targets, teacher_logits = make()
    parts = distillation_loss(hidden[:0], head, targets[:0], Exact(teacher_logits[:0]), Objective(0.5))
    assert parts.total.item() == 0.0
    assert all(torch.isfinite(gradient).all() for gradient in gradients(parts.total, hidden, head))


def test_loss_alpha_below_one_without_a_teacher_is_refused():
    hidden, head, targets, _ = make()
    with pytest.raises(ValueError, match="needs a teacher"):
        distillation_loss(hidden, head, targets, None, Objective(0.5))


def test_loss_topk_at_a_temperature_not_asked_for_is_refused():
    hidden, head, targets, teacher_logits = make()
    target = TopkTarget(topk_signal(teacher_logits, K, (1.0,)), CPU)
    with pytest.raises(ValueError, match="T=2"):
        distillation_loss(hidden, head, targets, target, Objective(0.5, 2.0))


def test_loss_of_impossible_teacher_tokens_stays_finite():
    hidden, head, targets, teacher_logits = make()
    teacher_logits[:, 3] = float("-inf")
    for divergence in DIVERGENCES:
        parts = distillation_loss(hidden, head, targets, Exact(teacher_logits), Objective(0.1, 1.0, divergence))
        assert np.isfinite(parts.total.item())
        assert all(torch.isfinite(gradient).all() for gradient in gradients(parts.total, hidden, head))


def test_wire_costs_little_bfloat16_and_float16_against_exact_logits():
    hidden, head, targets, _ = make()
    torch.manual_seed(1)
    exact_hidden, teacher_weight = torch.randn(N, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    logits = exact_hidden @ teacher_weight.T
    objective = Objective(0.0)
    exact = distillation_loss(hidden, head, targets, Exact(logits), objective).total.item()
    bits = exact_hidden.bfloat16().view(torch.uint16).numpy()
    assert torch.equal(bfloat16_tensor(bits), exact_hidden.bfloat16())
    wired = {
        "hidden": HiddenTarget(HiddenSignal(bits), OutputHead(teacher_weight), V),
        "dense": DenseTarget(DenseSignal(torch.log_softmax(logits, -1).half().numpy()), CPU),
    }
    for target in wired.values():
        assert distillation_loss(hidden, head, targets, target, objective).total.item() == pytest.approx(
            exact, rel=5e-3
        )
