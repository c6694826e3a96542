"""Quality figures against float64 references made position by position, and what the intervals promise."""

import math

import numpy as np
import pytest
import torch

from cluster.language_model import load_causal_lm, split
from jobs.evaluating.quality import (
    PositionScores,
    RowSums,
    agreement_by_position,
    chunk_rows,
    compare,
    interval,
    quality_figures,
)
from jobs.quantization.torch_scorer import TorchScorer
from jobs.scoring import scored_hidden_states
from jobs.training.data import Row, RowId, collate
from jobs.training.losses import distillation_loss
from jobs.training.objective import Objective
from jobs.training.targets.full import DenseTarget
from services.teacher.signals import DenseSignal
from tests import tiny

LENGTHS = [[25, 15], [7], [40], [1, 12, 3], [33]]
"""Pieces of each row: rows are of different length, so a batch of them has filled-up places."""


def made_rows(vocabulary=280):
    rng = np.random.default_rng(0)
    rows = []
    for number, lengths in enumerate(LENGTHS):
        size = sum(lengths)
        mask = rng.random(size) < 0.8
        mask[-1] = True
        tokens = rng.integers(0, vocabulary, size).astype(np.int32)
        rows.append(Row(RowId(0, number), tokens, np.array(lengths, np.int32), mask, 3 * size))
    return rows


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher of 320 columns, and students with as many, fewer and more that are not far from it."""
    root = tmp_path_factory.mktemp("models")
    teacher = tiny.model("llama")
    teacher.save_pretrained(root / "teacher")
    for name, columns in {"equal": 320, "narrow": 288, "wide": 352}.items():
        student = tiny.model("llama", 1, vocab_size=columns)
        with torch.no_grad():
            for mine, other in zip(student.parameters(), teacher.parameters(), strict=True):
                rows = min(len(mine), len(other))
                mine[:rows] = 0.1 * mine[:rows] + other[:rows]
        student.save_pretrained(root / name)
    return root


def measured(models, names, rows, batch_rows, chunk=13):
    """Sums of each model, compared with the first one."""
    scorers = {name: TorchScorer(str(models / name), 1) for name in names}
    sums = {name: RowSums(has_teacher=name != names[0]) for name in names}
    for first in range(0, len(rows), batch_rows):
        together = rows[first : first + batch_rows]
        batch = collate(together)
        chunks = {name: scorer.logit_chunks(batch, chunk) for name, scorer in scorers.items()}
        found = compare(chunks, names[0], batch.targets)
        for name in names:
            sums[name].add(found[name], batch, together)
    return sums


@torch.no_grad()
def reference(models, name, rows):
    """Of each row: nats, divergence, agreements and positions, piece by piece and position by position in float64."""
    teacher, student = (load_causal_lm(str(models / of), torch.float64) for of in ("teacher", name))
    out = []
    for row in rows:
        nats = divergence = 0.0
        agreements = positions = start = 0
        for length in row.segment_lengths:
            tokens = torch.from_numpy(row.token_ids[start : start + length].astype(np.int64))[None]
            of_teacher, of_student = (model(input_ids=tokens).logits[0] for model in (teacher, student))
            for place in range(length - 1):
                if not row.loss_mask[start + place + 1]:
                    continue
                q = torch.softmax(of_student[place], -1)
                columns = min(len(of_teacher[place]), len(q))
                p = torch.softmax(of_teacher[place][:columns], -1)
                nats -= math.log(q[tokens[0, place + 1]])
                divergence += sum(p[v].item() * math.log(p[v] / q[v]) for v in range(columns) if p[v] > 0)
                agreements += int(p.argmax() == q[:columns].argmax())
                positions += 1
            start += length
        out.append((nats, divergence, agreements, positions))
    return np.array(out)


@pytest.mark.parametrize("name", ["equal", "narrow", "wide"])
def test_figures_equal_a_reference_in_float64(models, name):
    rows = made_rows()
    sums = measured(models, ["teacher", name], rows, batch_rows=3)[name]
    expected = reference(models, name, rows)
    np.testing.assert_allclose(sums.nats, expected[:, 0], rtol=1e-5)
    np.testing.assert_allclose(sums.divergences, expected[:, 1], rtol=1e-4)
    assert sums.agreements == expected[:, 2].tolist()
    assert sums.positions == expected[:, 3].tolist()
    nats, divergence, agreements, positions = expected.sum(0)
    found = quality_figures(sums, 200, 0)
    num_bytes = sum(row.num_bytes for row in rows)
    assert found["perplexity"] == pytest.approx(math.exp(nats / positions), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert found["kl_to_teacher"] == pytest.approx(divergence / positions, rel=1e-4)
    assert found["agreement"] == pytest.approx(agreements / positions)
    assert (found["rows"], found["positions"]) == (len(rows), positions)
    assert 0.2 < found["agreement"] < 1
    for figure in ("perplexity", "bits_per_byte", "kl_to_teacher", "agreement"):
        assert found[f"{figure}_low"] < found[figure] < found[f"{figure}_high"]


def test_figures_do_not_depend_on_how_rows_are_batched(models):
    rows = made_rows()
    whole, single = (
        measured(models, ["teacher", "wide"], rows, batch_rows=size, chunk=chunk)["wide"]
        for size, chunk in ((len(rows), 1000), (1, 5))
    )
    np.testing.assert_allclose(whole.divergences, single.divergences, rtol=1e-4)
    np.testing.assert_allclose(whole.nats, single.nats, rtol=1e-5)
    assert whole.agreements == single.agreements
    assert agreement_by_position(whole) == agreement_by_position(single)


@pytest.mark.parametrize("name", ["equal", "narrow", "wide"])
def test_divergence_is_the_one_of_training(models, name):
    rows = made_rows()
    sums = measured(models, ["teacher", name], rows, batch_rows=2)[name]
    batch = collate(rows)
    body, head = split(load_causal_lm(str(models / name)))
    logits = TorchScorer(str(models / "teacher"), 1).logits(batch)[:, : head.vocab_size]
    target = DenseTarget(DenseSignal(torch.log_softmax(logits, -1).numpy()), torch.device("cpu"))
    hidden = scored_hidden_states(body, batch, torch.device("cpu")).detach()
    loss = distillation_loss(hidden, head, torch.from_numpy(batch.targets), target, Objective(alpha=0.0))
    assert sum(sums.divergences) == pytest.approx(loss.divergence, rel=1e-3)
    assert sum(sums.agreements) == loss.agreements


def test_divergence_of_a_model_from_itself_is_zero(models):
    sums = measured(models, ["teacher", "equal"], made_rows(), batch_rows=2)
    assert sums["teacher"].divergences == []
    assert "kl_to_teacher" not in quality_figures(sums["teacher"], 200, 0)
    batch = collate(made_rows())
    scorer = TorchScorer(str(models / "equal"), 1)
    found = compare({"a": scorer.logit_chunks(batch, 7), "b": scorer.logit_chunks(batch, 7)}, "a", batch.targets)["b"]
    assert np.abs(found.divergence_N).max() < 1e-6
    assert found.agrees_N.all()


def test_tokens_that_a_model_rules_out_stay_finite():
    logits = torch.zeros(2, 4)
    logits[:, 0] = -torch.inf
    others = torch.zeros(2, 4)
    targets = np.array([1, 2])
    for teacher, student in ((logits, others), (others, logits), (logits, logits)):
        found = compare({"t": iter([teacher]), "s": iter([student])}, "t", targets)["s"]
        assert np.isfinite(found.divergence_N).all()
    assert found.divergence_N == pytest.approx(0)


def test_logits_of_too_few_positions_are_refused():
    with pytest.raises(ValueError, match="logits of 2 positions for 3 targets"):
        compare({"a": iter([torch.zeros(2, 4)])}, None, np.zeros(3, np.int64))


def test_agreement_by_position_counts_the_predicted_token_s_place():
    rows = made_rows()[:2]
    batch = collate(rows)
    count = len(batch.targets)
    agrees = np.arange(count) % 2 == 0
    sums = RowSums(has_teacher=True)
    sums.add(PositionScores(np.ones(count), np.zeros(count), agrees), batch, rows)
    places = [t for row in rows for t in range(len(row.token_ids)) if row.loss_mask[t] and t not in (0, 25)]
    assert len(places) == count
    for first, last, share, number in agreement_by_position(sums, parts=5):
        mine = [agree for place, agree in zip(places, agrees, strict=True) if first <= place <= last]
        assert (share, number) == (pytest.approx(np.mean(mine)), len(mine))
    assert sum(part[3] for part in agreement_by_position(sums, parts=5)) == count


def test_chunks_are_the_same_for_models_of_different_vocabularies():
    assert chunk_rows([1 << 10, 1 << 12]) == chunk_rows([1 << 12]) == 1 << 10
    assert chunk_rows([1 << 30]) == 1


# --- intervals --------------------------------------------------------------------------------------------------------


def test_interval_covers_the_truth_as_often_as_it_says():
    """Rows of different length whose tokens are alike within a row: intervals over tokens would be far too narrow."""
    rng = np.random.default_rng(1)
    experiments, rows, truth = 300, 80, 2.0
    covered = widths = 0.0
    for number in range(experiments):
        positions = rng.integers(20, 128, rows)
        nats = positions * rng.gamma(4.0, truth / 4, rows)
        low, high = interval(nats, positions.astype(float), 400, number)
        covered += low <= truth <= high
        widths += high - low
    assert 0.90 <= covered / experiments <= 0.98
    # of a ratio of sums: 2 * 1.96 * standard deviation of a row's mean * sqrt(sum of squared lengths) / sum of lengths
    expected = 2 * 1.96 * (truth / 2) * math.sqrt(rows * (74**2 + 108**2 / 12)) / (rows * 74)
    assert widths / experiments == pytest.approx(expected, rel=0.1)


def test_interval_is_the_same_for_the_same_seed():
    rng = np.random.default_rng(2)
    above, below = rng.random(30), rng.random(30) + 1
    assert interval(above, below, 200, 7) == interval(above, below, 200, 7)
    assert interval(above, below, 200, 7) != interval(above, below, 200, 8)


def test_interval_of_rows_that_are_alike_is_a_point_and_of_one_row_there_is_none():
    assert interval(np.full(5, 2.0), np.full(5, 4.0), 200, 0) == (0.5, 0.5)
    assert interval(np.ones(1), np.ones(1), 200, 0) is None
    sums = RowSums(has_teacher=False, nats=[3.0], positions=[2], num_bytes=[6])
    assert set(quality_figures(sums, 200, 0)) == {"rows", "positions", "bits_per_byte", "perplexity"}


@pytest.mark.parametrize("nats", [math.nan, math.inf, 1e5])
def test_loss_that_is_no_figure_is_refused(nats):
    sums = RowSums(has_teacher=False, nats=[nats, 1.0], positions=[2, 2], num_bytes=[6, 6])
    with pytest.raises(ValueError, match="nats per token"):
        quality_figures(sums, 200, 0)


@pytest.mark.parametrize(("positions", "num_bytes"), [([], []), ([0], [0]), ([2], [0])])
def test_rows_without_a_scored_position_have_no_figures(positions, num_bytes):
    sums = RowSums(
        has_teacher=False, nats=[1.0 * count for count in positions], positions=positions, num_bytes=num_bytes
    )
    with pytest.raises(ValueError, match="no position was scored"):
        quality_figures(sums, 200, 0)
