"""Which signal `auto` takes, and what is said about it."""

import pytest
from pydantic import ValidationError

from jobs.config import DistillConfig
from jobs.training.choice import choose_signal
from services.teacher.schema import TeacherDescription


def choose(hidden_size: int = 512, vocab_size: int = 32_000, **config):
    teacher = TeacherDescription("teacher", "tokenizer", vocab_size, hidden_size, 1024, 16384, "bfloat16")
    return choose_signal(DistillConfig(**config), teacher)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("hidden", {}),
        ("hidden", {"divergence": "jsd"}),
        ("hidden", {"hidden_size": 2048, "vocab_size": 151_936}),
        ("topk", {"hidden_size": 2560, "vocab_size": 151_936}),
        ("hidden", {"hidden_size": 2560, "vocab_size": 151_936, "divergence": "reverse_kl"}),
        ("dense", {"hidden_size": 768, "vocab_size": 3}),  # a classifier
        ("dense", {"hidden_size": 768, "vocab_size": 60}),
    ],
)
def test_auto_takes_the_smallest_that_is_exact_enough(kind, options):
    assert choose(**options)[0].kind == kind


def test_choice_keeps_the_options_and_says_bytes_flops_and_exactness():
    spec, reason = choose(temperature=2.0, top_k=16)
    assert (spec.vocab_size, spec.top_k, spec.temperatures) == (32_000, 16, (2.0,))
    assert reason.startswith("signal hidden (exact, and at most 4,096 bytes): 1,024 bytes per position")
    assert "dense 64,000" in reason
    assert reason.endswith("forward_kl exact; 32.8 MFLOP per position for its head")


@pytest.mark.parametrize("kind", ["hidden", "topk", "sampled", "dense"])
def test_configured_signal_is_taken(kind):
    spec, reason = choose(signal=kind)
    assert spec.kind == kind
    assert reason.startswith(f"signal {kind} (as configured)")


def test_topk_says_what_its_divergence_means():
    assert "differs from the full one only inside that bucket" in choose(signal="topk")[1]
    reason = choose(signal="topk", divergence="reverse_kl")[1]
    assert "reverse_kl between the 64 likeliest tokens and one bucket for the rest: at most the full one" in reason
    assert "jsd exact" in choose(signal="topk", divergence="jsd", top_k=50_000)[1]


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_sampled_with_another_divergence_is_refused(divergence):
    with pytest.raises(ValidationError, match=f"signal=sampled gives only divergence=forward_kl, found {divergence}"):
        DistillConfig(signal="sampled", divergence=divergence)
