"""What becomes of a canary: simulated versions, healthy and spoilt, under the rules as they are configured."""

import random

import pytest

from cluster.config import validate
from cluster.errors import ConfigError
from services.endpoint.canary import Decision, Evidence, Observation, judge
from services.endpoint.schema import CanaryConfig

OLD, NEW = "a" * 64, "b" * 64
PLAN = CanaryConfig(steps=[0.05, 0.25], hold_s=60, min_requests=50, max_error_rate=0.02, max_latency_ratio=1.5)


def answer(
    digest: str, chance: random.Random, error: float = 0.0, slow: float = 1.0, noise: float = 0.2
) -> Observation:
    """An answer of a version that fails at a rate, and takes log-normal times around `slow` times 10 ms and 2 ms."""
    times = [slow * base * chance.lognormvariate(0, noise) for base in (0.01, 0.002)]
    return Observation(digest, chance.random() >= error, ttft_s=times[0], token_s=times[1])


def run(plan: CanaryConfig, step: int, requests: int, seed: int = 0, **of_challenger: float) -> tuple[int, Decision]:
    """Judges after each request of the challenger (one a second), with three times as many of the champion's; returns
    how many the challenger had when something was decided, or all."""
    chance, seen = random.Random(seed), Evidence(NEW)
    decision = Decision("hold", "", {})
    for count in range(1, requests + 1):
        seen.add(answer(NEW, chance, **of_challenger))
        for _ in range(3):
            seen.add(answer(OLD, chance))
        decision = judge(plan, step, float(count), seen)
        if decision.action != "hold":
            return count, decision
    return requests, decision


@pytest.mark.parametrize("seed", range(5))
def test_healthy_challenger_goes_up_and_then_reigns(seed: int) -> None:
    count, decision = run(PLAN, 0, 200, seed)
    assert (count, decision.action) == (60, "advance")
    assert decision.figures["requests"] == 60
    assert decision.figures["time_to_first_token_ratio"] == pytest.approx(1, abs=0.2)
    assert run(PLAN, 1, 200, seed)[1].action == "promote"


@pytest.mark.parametrize(("rate", "most"), [(0.05, 700), (0.2, 40), (1.0, 3)])
def test_challenger_that_fails_is_taken_down_the_sooner_the_more_it_fails(rate: float, most: int) -> None:
    counts = []
    for seed in range(20):
        count, decision = run(PLAN.replace(min_requests=100_000), 0, 5000, seed, error=rate)
        assert decision.action == "take_down"
        assert decision.reason.startswith("error rate: ")
        assert decision.figures["errors"] > 0.02 * count
        counts.append(count)
    assert sorted(counts)[10] <= most


def test_challenger_within_its_error_rate_is_seldom_taken_down() -> None:
    taken = sum(run(PLAN, 0, 60, seed, error=0.005)[1].action == "take_down" for seed in range(100))
    assert taken <= 1


@pytest.mark.parametrize("seed", range(5))
def test_slow_challenger_is_taken_down(seed: int) -> None:
    count, decision = run(PLAN, 0, 200, seed, slow=3.0)
    assert decision.action == "take_down"
    assert count <= 15
    assert decision.reason.startswith("time to first token: ")


@pytest.mark.parametrize("seed", range(5))
def test_noisy_but_equal_latency_is_no_reason(seed: int) -> None:
    assert run(PLAN, 0, 200, seed, noise=1.5)[1].action != "take_down"


def test_latency_just_over_the_limit_waits_and_is_not_passed() -> None:
    count, decision = run(PLAN, 0, 65, 1, slow=1.55, noise=0.8)
    assert (count, decision.action) == (65, "hold") or decision.action == "take_down"


def test_too_little_traffic_is_inconclusive_however_long_it_lasts() -> None:
    chance, seen = random.Random(0), Evidence(NEW)
    for _ in range(49):
        seen.add(answer(NEW, chance))
        seen.add(answer(OLD, chance))
    decision = judge(PLAN, 0, 1e9, seen)
    assert (decision.action, decision.reason) == ("hold", "too little traffic: 49 of 50 answers")
    assert judge(PLAN, 0, 1e9, Evidence(NEW)).action == "hold"


def test_enough_traffic_waits_for_its_time() -> None:
    chance, seen = random.Random(0), Evidence(NEW)
    for _ in range(500):
        seen.add(answer(NEW, chance))
        seen.add(answer(OLD, chance))
    assert judge(PLAN, 0, 59.0, seen).reason == "59 of 60 s at this step"
    assert judge(PLAN, 0, 60.0, seen).action == "advance"


def test_champion_without_traffic_leaves_the_latency_open() -> None:
    chance, seen = random.Random(0), Evidence(NEW)
    for _ in range(100):
        seen.add(answer(NEW, chance))
    decision = judge(PLAN, 0, 100.0, seen)
    assert decision.action == "hold"
    assert decision.reason.startswith("time to first token is open: 100 answers of the challenger and 0 ")


def test_answers_without_a_time_per_token_are_judged_by_the_rest() -> None:
    seen = Evidence(NEW)
    for _ in range(100):
        for digest in (OLD, NEW):
            seen.add(Observation(digest, True, ttft_s=0.01))
    assert judge(PLAN, 0, 100.0, seen).action == "advance"


# --- shadow traffic ---------------------------------------------------------------------------------------------------

SHADOWED = PLAN.replace(steps=[0.0, 0.25], shadow=0.5, max_disagreement=0.5, min_requests=20)


def copies(disagreement: float, count: int, ok: bool = True) -> Evidence:
    chance, seen = random.Random(3), Evidence(NEW)
    for _ in range(count):
        differs = disagreement * chance.lognormvariate(0, 0.3) if ok else None
        seen.add(Observation(OLD, True, ttft_s=0.01, token_s=0.002, shadow=True))
        seen.add(Observation(NEW, ok, ttft_s=0.01, token_s=0.002, shadow=True, disagreement=differs, agreement=0.5))
    return seen


def test_step_of_copies_alone_passes_on_agreement() -> None:
    decision = judge(SHADOWED, 0, 60.0, copies(0.2, 20))
    assert decision.action == "advance"
    assert decision.figures["disagreement"] == pytest.approx(0.2, rel=0.3)
    assert decision.figures["agreement"] == pytest.approx(0.5)
    assert judge(SHADOWED, 0, 60.0, copies(0.2, 19)).reason == "too little traffic: 19 of 20 comparisons"


def test_noise_instead_of_answers_is_taken_down_before_any_user_sees_it() -> None:
    decision = judge(SHADOWED, 0, 1.0, copies(5.0, 10))
    assert decision.action == "take_down"
    assert decision.reason.startswith("disagreement: ")
    assert decision.figures["requests"] == 0


def test_challenger_that_fails_on_copies_is_taken_down() -> None:
    decision = judge(SHADOWED, 0, 1.0, copies(0.2, 3, ok=False))
    assert (decision.action, decision.figures["shadow_errors"]) == ("take_down", 3)


def test_comparisons_that_were_not_possible_leave_the_limit_open() -> None:
    seen = copies(0.2, 5)
    chance = random.Random(0)
    for _ in range(100):
        seen.add(answer(NEW, chance))
        seen.add(answer(OLD, chance))
    assert judge(SHADOWED, 1, 100.0, seen).reason == "disagreement is open: 5 of 10 comparisons"


# --- the config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({"steps": [0.25, 0.05]}, "must rise"),
        ({"steps": [0.5, 0.5]}, "must rise"),
        ({"steps": [0.0, 0.5]}, "set shadow"),
        ({"steps": []}, "at least 1 item"),
        ({"steps": [1.0]}, "less than 1"),
        ({"max_disagreement": 0.5}, "set shadow"),
        ({"max_error_rat": 0.5}, "did you mean max_error_rate"),
    ],
)
def test_config_that_cannot_work_is_refused(raw: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        validate(CanaryConfig, raw, "x")
