"""The training loop against a plain one: transformers' own forward, autograd, clipping, AdamW, each row by itself.

What the loop's own tests compare is one run with another; here are the absolute values: loss, gradient norm, clipping,
weights after several steps, bits per byte. And what happens when a worker's share holds nothing to learn from.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cluster.language_model import load_causal_lm
from cluster.published import fetch_directory
from cluster.storage import open_storage
from jobs.config import TrainConfig
from jobs.evaluating.quality import RowSums, compare, quality_figures
from jobs.quantization.torch_scorer import TorchScorer
from jobs.training import data
from jobs.training.data import ExampleStore, GlobalBatches, Row, collate
from jobs.training.loop import learning_rate
from jobs.training.workers import Workers
from tests.unit.test_training_loop import ALONE, plan, prepared, run, teacher

__all__ = ["prepared", "teacher"]  # fixtures

CLIP = 0.15
"""Below the gradient norms of these runs, so that clipping acts; differently in every step."""
STUDENT = {"shape": {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "tie_word_embeddings": True}}
TRAINING = {"steps": 4, "clip_norm": CLIP, "student": STUDENT, "checkpoint_every": 100}


def log_likelihoods(model, row: Row) -> torch.Tensor:
    """Of every counted token of a row that has one before it in its own document; documents one at a time."""
    parts, start = [], 0
    for length in row.segment_lengths:
        ids = torch.from_numpy(row.token_ids[start : start + length].astype(np.int64))
        counts = torch.from_numpy(row.loss_mask[start : start + length].astype(bool))[1:]
        start += length
        if length < 2:
            continue
        log_q = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1].double(), -1)
        parts.append(log_q.gather(-1, ids[1:, None])[:, 0][counts])
    return torch.cat(parts)


def saved(this, name: str, to):
    """A model of a finished training."""
    fetch_directory(open_storage(this.storage), f"{this.prefix}/{name}", to)
    return to


def reference(this, model, global_batch: int = 12):
    """Losses and gradient norms of every step, and the model after the last; the loss is cross-entropy alone."""
    config = this.train
    store = ExampleStore(open_storage(this.storage), "store/x", "train")
    batches = GlobalBatches(store, global_batch, config.seed)
    matrices = [item for item in model.parameters() if item.dim() >= 2]
    vectors = [item for item in model.parameters() if item.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=config.betas, foreach=False)
    losses, norms = [], []
    for step in range(config.steps):
        parts = [log_likelihoods(model, store.row(index)) for index in batches.indices(step)]
        loss = -torch.cat(parts).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(item.grad.double().square().sum()) for item in model.parameters()))
        for item in model.parameters():
            item.grad *= min(1.0, config.clip_norm / norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm)
    return losses, norms, model


def test_loop_gives_loss_gradient_norm_and_weights_of_a_plain_one(prepared, tmp_path):
    this = plan(prepared, "plain-loop", distil=False, **TRAINING)
    outcome, metrics = run(this)
    initial = load_causal_lm(str(saved(this, "checkpoints/step-00000000", tmp_path / "first") / "model"))
    losses, norms, model = reference(this, initial)
    assert min(norms) > 1.1 * CLIP
    assert max(norms) > 1.05 * min(norms)
    np.testing.assert_allclose(outcome["losses"], losses, rtol=1e-5)
    np.testing.assert_allclose([item["train/grad_norm"] for item in metrics], norms, rtol=1e-4)
    ours = load_causal_lm(str(saved(this, "model", tmp_path / "last")))
    for (name, found), expected in zip(ours.named_parameters(), model.parameters(), strict=True):
        # Adam divides by the gradient's size, so rounding shows where a gradient is nearly zero.
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4, msg=name)
        assert (found - expected).abs().mean() < 1e-5, name


def test_bits_per_byte_is_that_of_a_plain_forward(prepared, tmp_path):
    this = plan(prepared, "scored", distil=False, steps=1, student=STUDENT, validate_every=1)
    outcome, _ = run(this)
    directory = saved(this, "model", tmp_path / "model")
    model = load_causal_lm(str(directory))
    store = ExampleStore(open_storage(this.storage), "store/x", "validation")
    rows = [store.row(index) for index in range(len(store))]
    from cluster.pretrained import load_tokenizer

    tokenizer = load_tokenizer(str(directory))
    with torch.no_grad():
        nats = -sum(float(log_likelihoods(model, row).sum()) for row in rows)
    text = tokenizer.decode(np.concatenate([row.token_ids for row in rows]).tolist(), skip_special_tokens=True)
    # All bytes of the text are predicted, but for pieces whose first token has nothing before it in its row.
    assert sum(row.num_bytes for row in rows) == pytest.approx(len(text.encode()), rel=0.1)
    expected = nats / math.log(2) / sum(row.num_bytes for row in rows)
    assert outcome["validation"][-1][1] == pytest.approx(expected, rel=1e-5)
    sums, batch = RowSums(has_teacher=False), collate(rows)
    found = compare({"student": TorchScorer(str(directory), 1).logit_chunks(batch, 100)}, None, batch.targets)
    sums.add(found["student"], batch, rows)
    assert quality_figures(sums, 100, 0)["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def without_targets(monkeypatch):
    """Every second row has no token that counts."""
    read = data.ExampleStore.row

    def masked(self, index):
        row = read(self, index)
        return replace(row, loss_mask=row.loss_mask * 0) if row.id.row % 2 else row

    monkeypatch.setattr(data.ExampleStore, "row", masked)


def test_loop_micro_batches_without_a_target_change_nothing(prepared, teacher, monkeypatch):
    without_targets(monkeypatch)
    runs = [run(plan(prepared, f"empty-{size}", micro_batch=size, clip_norm=CLIP), teacher) for size in (12, 1)]
    np.testing.assert_allclose(runs[1][0]["losses"], runs[0][0]["losses"], rtol=1e-5)
    norms = [[item["train/grad_norm"] for item in metrics] for _, metrics in runs]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-4)


def _worker(rank: int, count: int, port: int, this, prepared, results) -> None:
    import torch.distributed as dist

    from services.teacher.model import TeacherModel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    patch = pytest.MonkeyPatch()
    without_targets(patch)
    workers = Workers(rank, count, torch.device("cpu"))
    outcome, metrics = run(this, TeacherModel(prepared[1], "float32"), workers)
    if rank == 0:
        results.put((outcome["losses"], [item["train/grad_norm"] for item in metrics], outcome["validation"]))
    dist.destroy_process_group()


def test_loop_workers_of_which_some_have_no_target_equal_one(prepared, teacher, monkeypatch):
    """Three processes with one row each: in most steps a worker's whole share has nothing to learn from."""
    import socket

    options = {"global_batch": 3, "micro_batch": 1, "clip_norm": CLIP}
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    this = plan(prepared, "three", **options)
    processes = [context.Process(target=_worker, args=(rank, 3, port, this, prepared, results)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0
    losses, norms, validation = results.get()
    without_targets(monkeypatch)
    alone, metrics = run(plan(prepared, "one", **options), teacher, ALONE)
    np.testing.assert_allclose(losses, alone["losses"], rtol=1e-5)
    np.testing.assert_allclose(norms, [item["train/grad_norm"] for item in metrics], rtol=1e-4)
    np.testing.assert_allclose(validation, alone["validation"], rtol=1e-5)


def test_loop_dropout_is_repeated_after_a_resume(prepared):
    shape = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 320}
    student = {"shape": {**shape, "resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}}
    whole, _ = run(plan(prepared, "dropout", distil=False, student=student))
    broken = plan(prepared, "dropout-broken", distil=False, student=student)

    class Killed(Exception):
        pass

    def kill(step, values):
        if step == 5:
            raise Killed

    from jobs.training.loop import train

    with pytest.raises(Killed):
        train(broken, ALONE, None, kill)
    assert run(broken)[0]["losses"] == whole["losses"]
    other = plan(prepared, "dropout-other", distil=False, student=student, seed=1)
    assert run(other)[0]["losses"] != whole["losses"]


@pytest.mark.parametrize("where", ["gradient", "weights"])
def test_loop_update_that_is_not_finite_is_never_kept(prepared, where, monkeypatch):
    """A finite loss with an infinite gradient, and a finite gradient that makes infinite weights."""
    options = {"learning_rate": 1e30, "clip_norm": 1e30} if where == "weights" else {}
    this = plan(prepared, f"overflows-{where}", distil=False, checkpoint_every=1, weight_decay=0.0, **options)
    if where == "gradient":
        add_up = Workers.add_up_gradients

        def spoilt(self, model, divisor):
            add_up(self, model, divisor)
            if (calls := calls_so_far.pop()) == 2:
                next(model.parameters()).grad[0, 0] = float("inf")
            calls_so_far.append(calls + 1)

        calls_so_far = [0]
        monkeypatch.setattr(Workers, "add_up_gradients", spoilt)
    outcome, _ = run(this)
    assert outcome["status"] == "non_finite"
    if where == "gradient":
        assert "step 2 gave a loss of" in outcome["message"]
        assert "gradient of inf" in outcome["message"]
        store = ExampleStore(open_storage(this.storage), "store/x", "train")
        assert all(str(row) in outcome["message"] for row in GlobalBatches(store, 12, 0).row_ids(2))
    from jobs.training.checkpoint import Checkpoints

    found = Checkpoints(open_storage(this.storage), f"{this.prefix}/checkpoints", 2).fetch()
    assert found is not None
    model = load_causal_lm(str(found.model))
    assert all(bool(torch.isfinite(item).all()) for item in model.parameters())
    assert not open_storage(this.storage).list(f"{this.prefix}/model/")


def test_learning_rate_warm_up_takes_half_of_a_short_training_at_most():
    config = TrainConfig(steps=10, learning_rate=1.0, warmup_steps=20, final_rate=0.1)
    rates = [learning_rate(config, step) for step in range(10)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] < 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert learning_rate(TrainConfig(steps=1, learning_rate=1.0), 0) == pytest.approx(0.1)
