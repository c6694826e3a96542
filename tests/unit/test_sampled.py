"""Draws from the teacher: unbiased in value and gradient, the same whatever company a sequence has, and thrifty."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cluster.language_model import OutputHead
from jobs.training.losses import distillation_loss
from jobs.training.objective import Objective
from jobs.training.targets.base import LOG_FLOOR
from jobs.training.targets.full import FullTarget
from jobs.training.targets.sampled import SampledTarget
from services.teacher.scoring import sampled_of, uniforms
from services.teacher.signals import SampledSignal, SignalSpec
from tests.in_process_teacher import make_request

N, D, V = 6, 8, 60
CPU = torch.device("cpu")
SPEC = SignalSpec("sampled", V, draws=12)


def teacher_logits(seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return 2.5 * torch.randn(N, V)


def signal(logits: torch.Tensor, spec: SignalSpec, uniforms_N: torch.Tensor) -> SampledSignal:
    return SampledSignal.of(*(part.numpy() for part in sampled_of(logits.clone(), uniforms_N, spec)), spec)


def weights_by_column(logits: torch.Tensor, spec: SignalSpec, uniforms_N: torch.Tensor) -> torch.Tensor:
    """What the draws say of each column, [N, V] in float64; unbiased if its mean over the uniforms is the teacher."""
    ids, weights = (torch.from_numpy(array) for array in signal(logits, spec, uniforms_N).entries())
    return torch.zeros(len(logits), V, dtype=torch.float64).scatter_add_(-1, ids.long(), weights.double())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("proposal", [1.0, 0.7, 1.3])
def test_mean_of_the_draws_over_all_uniforms_is_the_teacher(temperature, proposal):
    logits = teacher_logits()
    spec = replace(SPEC, temperatures=(temperature,), proposal=proposal)
    grid = 500
    mean = sum(weights_by_column(logits, spec, torch.full((N,), (index + 0.5) / grid)) / grid for index in range(grid))
    expected = torch.softmax(logits.double() / temperature, -1)
    weight = expected / torch.softmax(logits.double() / temperature * proposal, -1)
    # Together the points are an even grid, of which one may be missing or too many in a token's interval.
    assert ((mean - expected).abs() <= 1.01 * weight / (grid * SPEC.draws) + 1e-3 * expected).all()


def test_draws_of_a_token_differ_from_its_expected_number_by_less_than_one():
    logits = teacher_logits(1)
    counts = SPEC.draws * weights_by_column(logits, SPEC, torch.rand(N))
    assert (counts - SPEC.draws * torch.softmax(logits.double(), -1)).abs().max() < 1 + 1e-4
    assert counts.sum(-1).tolist() == pytest.approx([SPEC.draws] * N)


class Exact(FullTarget):
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits_NC, self.vocab_size = logits.double(), logits.shape[1]

    def logits(self, start, stop):
        return self.logits_NC[start:stop].clamp_min(LOG_FLOOR)


@pytest.mark.parametrize(("temperature", "proposal"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.8)])
def test_loss_and_gradient_are_those_of_full_kl_in_the_mean(temperature, proposal):
    """A statistical test: 400 independent draws, every entry of the gradient within 5 standard errors."""
    torch.manual_seed(2)
    logits, targets = teacher_logits(2), torch.randint(0, V, (N,))
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    head = OutputHead(torch.randn(V, D, dtype=torch.float64, requires_grad=True))
    objective = Objective(0.2, temperature)
    spec = replace(SPEC, temperatures=(temperature,), proposal=proposal)

    def value_and_gradient(target) -> torch.Tensor:
        loss = distillation_loss(hidden, head, targets, target, objective).total
        return torch.cat([loss.detach()[None], torch.autograd.grad(loss, hidden)[0].flatten()])

    exact = value_and_gradient(Exact(logits))
    found = torch.stack(
        [value_and_gradient(SampledTarget(signal(logits, spec, 1 - torch.rand(N)), CPU)) for _ in range(400)]
    )
    error = found.std(0) / len(found) ** 0.5
    assert (error > 0).all()
    assert ((found.mean(0) - exact).abs() / error).max() < 5
    # And worth having: the mean over a single batch is already near.
    assert (found[0, 1:] - exact[1:]).norm() < 0.5 * exact[1:].norm()


def test_entropy_and_best_token_are_exact():
    logits = teacher_logits(3)
    made = signal(logits, replace(SPEC, temperatures=(2.0,)), torch.rand(N))
    p = torch.softmax(logits.double() / 2, -1)
    np.testing.assert_allclose(made.entropy_N, -(p * p.log()).sum(-1), rtol=1e-5)
    assert made.best_N.tolist() == logits.argmax(-1).tolist()


def test_token_without_probability_is_never_drawn():
    logits = torch.full((3, V), float("-inf"))
    logits[:, 5] = logits[:, 40] = 0.0
    for uniform in (1e-7, 0.5, 1.0):
        ids, _ = signal(logits, SPEC, torch.full((3,), uniform)).entries()
        assert set(ids.flatten().tolist()) == {5, 40}


def test_uniforms_follow_from_seed_and_sequence_alone():
    request = make_request([5, 9, 4], SPEC, 1)
    numbers = uniforms(request)
    assert numbers.dtype == np.float32
    assert ((numbers > 0) & (numbers <= 1)).all()
    assert np.array_equal(uniforms(replace(request, request_id="again")), numbers)
    alone = replace(
        request,
        token_ids=request.token_ids[5:14],
        sequence_lengths=np.array([9], np.int32),
        positions=np.array([8, 2], np.int32),
    )
    assert uniforms(alone).tolist() == [numbers[13], numbers[7]]
    assert not np.isin(uniforms(replace(request, seed=1)), numbers).any()
    assert len(set(numbers.tolist())) == 18


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_draws_give_no_other_divergence(divergence):
    target = SampledTarget(signal(teacher_logits(), SPEC, torch.rand(N)), CPU)
    hidden, head = torch.randn(N, D), OutputHead(torch.randn(V, D))
    with pytest.raises(ValueError, match=f"no {divergence}, only forward_kl"):
        distillation_loss(hidden, head, torch.zeros(N, dtype=torch.long), target, Objective(0.0, 1.0, divergence))
