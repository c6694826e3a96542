"""The gate: every rule, what it compares, and that nothing passes for want of a figure."""

import json
import math

import pytest

from cluster.config import validate
from cluster.errors import ConfigError
from jobs.config import PromoteConfig
from jobs.gate import Reigning, judge

MACHINE = {"processor": "Sample CPU", "system": "Linux x86_64", "threads": "2", "torch": "2.13"}
STUDENT = {"bits_per_byte": 2.0}
TEACHER = {"bits_per_byte": 1.8, "bytes": 8_000_000, "token_s": 0.0004, "tokens_per_s": 100.0, "machine": MACHINE}
CANDIDATE = {"bits_per_byte": 2.0, "bytes": 2_000_000, "token_s": 0.0001, "tokens_per_s": 500.0, "machine": MACHINE}
REIGNS = {"bits_per_byte": 1.9, "bytes": 1_600_000, "token_s": 0.0002, "tokens_per_s": 250.0, "machine": MACHINE}
CHAMPION = Reigning("champion, version 7", REIGNS)


def verdict(config, candidate=CANDIDATE, student=STUDENT, teacher=TEACHER, reigning=CHAMPION):
    return judge(PromoteConfig.model_validate(config), candidate, student, teacher, reigning)


@pytest.mark.parametrize(("bits_per_byte", "drop"), [(2.0, 0.0), (2.02, 0.01), (2.0399, 0.01995), (1.5, -0.25)])
def test_gate_lets_pass_what_is_good_enough_and_says_the_drop(bits_per_byte, drop):
    found = verdict({}, {"bits_per_byte": bits_per_byte})
    assert found.passed
    assert found.rules[0].value == pytest.approx(drop)


def test_gate_limit_of_zero_takes_equal_and_nothing_worse():
    assert verdict({"max_quality_drop": 0}).passed
    assert not verdict({"max_quality_drop": 0}, {"bits_per_byte": 2.0000001}).passed


@pytest.mark.parametrize(("student", "candidate"), [(2.0, math.nan), (math.nan, 2.0), (2.0, math.inf), (math.inf,) * 2])
def test_gate_refuses_what_is_no_number_and_can_store_it(student, candidate):
    found = verdict({}, {"bits_per_byte": candidate}, {"bits_per_byte": student})
    assert not found.passed
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["passed"] is False


@pytest.mark.parametrize("harm", [{"bits_per_byte": 10**400}, {"token_s": 10**400}, {"machine": "x"}, {"machine": [1]}])
def test_gate_refuses_figures_of_another_kind(harm):
    found = verdict({"max_latency_ratio": 9}, {**CANDIDATE, **harm})
    assert not found.passed
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["passed"] is False


@pytest.mark.parametrize("figure", ["bits_per_byte", "bytes", "token_s", "tokens_per_s"])
@pytest.mark.parametrize("impossible", [0, 0.0, -1.0, -math.inf])
def test_gate_refuses_figures_that_cannot_be(figure, impossible):
    config = {"max_quality_drop": 9, "max_size_mb": 9, "max_latency_ratio": 9}
    assert verdict(config).passed
    candidate = {**CANDIDATE, figure: impossible}
    if figure == "tokens_per_s":  # only looked at where the time per token is not known
        del candidate["token_s"]
    found = verdict(config, candidate)
    assert not found.passed
    assert "was not measured or cannot be" in found.failures[0]


RULES = {
    "max_quality_drop": (
        {"max_quality_drop": 0.01},
        {"bits_per_byte": 2.03},
        ["2.03 bits", "against 2 of the float student", "drop of 1.5 %", "allowed 1 %"],
    ),
    "min_retention": (
        {"min_retention": 0.95},
        {},
        ["2 bits", "against 1.8 of the teacher", "keeps 90 %", "wanted 95 %"],
    ),
    "max_latency_ratio": ({"max_latency_ratio": 0.2}, {}, ["0.1", "0.4", "0.25 times", "allowed 0.2", "teacher"]),
    "max_size_ratio": (
        {"max_size_ratio": 0.2},
        {},
        ["2.000 MB of weights against 8.000 of the teacher", "0.25 times", "allowed 0.2"],
    ),
    "max_size_mb": ({"max_size_mb": 1.5}, {}, ["2.000 MB", "allowed 1.5"]),
    "champion.max_quality_drop": (
        {"champion": {"max_quality_drop": 0.01}},
        {},
        ["2 bits", "against 1.9 of the champion, version 7", "drop of 5.263 %", "allowed 1 %"],
    ),
    "champion.min_retention": (
        {"champion": {"min_retention": 0.96}},
        {},
        ["2 bits", "against 1.9 of the champion, version 7", "keeps 95 %", "wanted 96 %"],
    ),
    "champion.max_latency_ratio": (
        {"champion": {"max_latency_ratio": 0.4}},
        {},
        ["0.1", "0.2", "0.5 times", "allowed 0.4", "champion, version 7"],
    ),
    "champion.max_size_ratio": (
        {"champion": {"max_size_ratio": 1}},
        {},
        ["2.000 MB of weights against 1.600 of the champion, version 7", "1.25 times", "allowed 1"],
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rule_refuses_with_both_values_and_the_limit(name):
    config, change, words = RULES[name]
    found = verdict(config, {**CANDIDATE, **change})
    (failure,) = found.failures
    for word in (f"promote.{name}: ", *words):
        assert word in failure


PASSES = {
    "min_retention": {"min_retention": 0.9},
    "max_latency_ratio": {"max_latency_ratio": 0.25},
    "max_size_ratio": {"max_size_ratio": 0.25},
    "max_size_mb": {"max_size_mb": 2},
    "champion.max_quality_drop": {"champion": {"max_quality_drop": 0.06}},
    "champion.min_retention": {"champion": {"min_retention": 0.95}},
    "champion.max_latency_ratio": {"champion": {"max_latency_ratio": 0.5}},
    "champion.max_size_ratio": {"champion": {"max_size_ratio": 1.25}},
}


@pytest.mark.parametrize("name", PASSES)
def test_rule_lets_pass_at_its_limit(name):
    found = verdict(PASSES[name])
    assert found.passed
    assert [rule.rule for rule in found.rules] == ["promote.max_quality_drop", f"promote.{name}"]


def test_refusal_names_every_rule_that_failed():
    found = verdict(
        {
            "max_quality_drop": 0.01,
            "min_retention": 0.99,
            "max_latency_ratio": 0.1,
            "max_size_ratio": 0.1,
            "max_size_mb": 1,
            "champion": {"max_quality_drop": -0.5, "min_retention": 2, "max_latency_ratio": 0.1, "max_size_ratio": 1},
        },
        {**CANDIDATE, "bits_per_byte": 2.2},
    )
    assert len(found.failures) == 9
    assert [failure.partition(":")[0] for failure in found.failures] == [f"promote.{name}" for name in RULES]


@pytest.mark.parametrize(
    ("config", "candidate", "teacher", "words"),
    [
        ({}, {}, TEACHER, "bits_per_byte of the candidate was not measured"),
        ({"min_retention": 0.5}, CANDIDATE, None, "bits_per_byte of the teacher was not measured"),
        ({"max_latency_ratio": 9}, {"bits_per_byte": 2.0}, {}, "of the candidate and of the teacher was not measured"),
        ({"max_size_mb": 9}, {"bits_per_byte": 2.0}, TEACHER, "bytes of the candidate was not measured"),
        ({"max_size_ratio": 9}, CANDIDATE, None, "bytes of the teacher was not measured"),
        ({}, {"bits_per_byte": "2.0"}, TEACHER, "bits_per_byte of the candidate was not measured"),
        ({}, {"bits_per_byte": True}, TEACHER, "bits_per_byte of the candidate was not measured"),
    ],
)
def test_rule_whose_figure_was_not_measured_refuses(config, candidate, teacher, words):
    found = verdict(config, candidate, teacher=teacher)
    assert words in found.failures[-1]


def test_latency_takes_one_measure_for_both_sides():
    scored = {"bits_per_byte": 2.0, "tokens_per_s": 500.0, "machine": MACHINE}
    found = verdict({"max_latency_ratio": 1}, scored)  # the teacher has both, the candidate has no token_s
    assert (found.rules[-1].figure, found.rules[-1].value) == ("1/tokens_per_s", pytest.approx(0.2))
    found = verdict({"max_latency_ratio": 1})
    assert (found.rules[-1].figure, found.rules[-1].value) == ("token_s", pytest.approx(0.25))


OTHER = {**MACHINE, "processor": "Other CPU", "gpu": "Other GPU"}


@pytest.mark.parametrize(
    ("mine", "theirs", "words"),
    [
        (MACHINE, OTHER, "Sample CPU, Linux x86_64, 2 threads and of Other CPU, Other GPU, Linux x86_64, 2 threads"),
        (MACHINE, {**MACHINE, "threads": "8"}, "Linux x86_64, 2 threads and of Sample CPU, Linux x86_64, 8 threads"),
        ({**OTHER, "gpu": "Sample GPU"}, OTHER, "Other CPU, Sample GPU, Linux x86_64, 2 threads and of Other CPU, Oth"),
        (MACHINE, None, "and of a machine that was not recorded"),
        (None, None, "of a machine that was not recorded and of a machine that was not recorded"),
    ],
)
@pytest.mark.parametrize("against", ["teacher", "champion"])
def test_times_of_two_machines_are_not_compared(against, mine, theirs, words):
    teacher, reigning = {**TEACHER, "machine": theirs}, Reigning("champion", {**REIGNS, "machine": theirs})
    config = {"max_latency_ratio": 9} if against == "teacher" else {"champion": {"max_latency_ratio": 9}}
    found = verdict(config, {**CANDIDATE, "machine": mine}, teacher=teacher, reigning=reigning)
    (failure,) = found.failures
    for word in (f"0.1 ms per token against {'0.4 of the teacher' if against == 'teacher' else '0.2'}", words):
        assert word in failure
    assert "measure both on one machine, or leave the limit out" in failure
    sizes = {"champion": {"max_size_ratio": 9, "max_quality_drop": 9}}  # the rest is not of a machine
    assert verdict(sizes, {**CANDIDATE, "machine": mine}, reigning=reigning).passed


def test_model_on_the_gpu_and_one_on_the_processors_of_a_machine_are_compared():
    assert verdict({"max_latency_ratio": 9}, teacher={**TEACHER, "machine": {**MACHINE, "gpu": "Sample GPU"}}).passed
    newer = {**MACHINE, "torch": "2.14"}  # a faster version is an advantage like any other
    assert verdict({"max_latency_ratio": 9}, teacher={**TEACHER, "machine": newer}).passed


def test_rules_against_a_champion_that_is_not_there_are_noted_and_not_asked():
    config = {"champion": {"max_quality_drop": 0, "min_retention": 2, "max_latency_ratio": 0.1, "max_size_ratio": 0.1}}
    found = verdict(config, reigning=Reigning())
    assert found.passed
    assert len(found.notes) == 4
    assert all("no version is champion yet" in note for note in found.notes)


def test_champion_without_the_figure_refuses():
    found = verdict({"champion": {"max_latency_ratio": 1}}, reigning=Reigning("champion, version 7", {}))
    assert "token_s of the champion, version 7 was not measured" in found.failures[0]


def test_old_name_of_a_limit_is_an_error_that_names_the_new_one():
    with pytest.raises(ConfigError, match="max_quality_loss is called max_quality_drop now"):
        validate(PromoteConfig, {"max_quality_loss": 0.1}, "x.yaml")
