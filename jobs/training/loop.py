"""The training loop that runs on every Ray Train worker: batch, signal, loss, step.

Read `_train` first. What it leans on: `assemble` puts the parts together, `data` deals out rows, `prefetch` asks the
teacher ahead, `losses` is the maths, `workers` adds up over ranks, `checkpoint` makes stopping harmless.
"""

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluster.logs import setup_logging
from cluster.pretrained import load_tokenizer
from cluster.published import publish_directory
from cluster.storage import open_storage
from jobs.config import TrainConfig
from jobs.labels.teacher import StoredTeacher
from jobs.scoring import TextScore, score_text
from jobs.training.assemble import Training, assembled
from jobs.training.counting import count_step
from jobs.training.data import collate
from jobs.training.plan import TrainPlan
from jobs.training.workers import StepSums, Workers
from services.teacher.client import TeacherAnswers, TeacherClient

Report = Callable[[int, dict[str, float]], None]
Notice = Callable[[], bool]


def never() -> bool:
    return False


def train(
    plan: TrainPlan, workers: Workers, teacher: TeacherAnswers | None, report: Report, notice: Notice = never
) -> dict[str, Any]:
    """Trains to the last step, from the newest checkpoint if there is one; the last one is stored when this returns.

    Args:
        notice: whether a machine of this group is about to be taken away; asked every `train.notice_every` steps by all
            workers, which must hear the same. If so, the step is stored and training returns.

    Returns:
        `{"status": "done" | "non_finite" | "preempted", "message": str, **TrainState}`, the same on every worker.
    """
    with assembled(plan, workers, teacher) as this:
        return _train(this, plan, workers, report, notice)


def _train(this: Training, plan: TrainPlan, workers: Workers, report: Report, notice: Notice) -> dict[str, Any]:
    config, model, state, clock = plan.train, this.model, this.state, this.clock
    model.train()
    for step in range(state.step, config.steps):
        started = time.perf_counter()
        torch.manual_seed(hash((config.seed, step, workers.rank)))  # dropout repeats after a resume
        sums = StepSums()
        for batch, signal in this.shares:
            loss = this.loss_of(batch, signal)
            with clock.part("backward"):
                loss.total.backward()
            sums.add(batch, loss)
            if batch.last:
                break
        sums = workers.add_up(this.counted(sums))
        with clock.part("optimizer"):
            workers.add_up_gradients(model, divisor=max(1.0, sums.positions))
            grad_norm = float(nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm))
            if not math.isfinite(sums.loss + grad_norm):
                return _non_finite(this, step, f"a loss of {sums.loss}, a gradient of {grad_norm}")
            rate = learning_rate(config, step)
            for group in this.optimizer.param_groups:
                group["lr"] = rate
            this.optimizer.step()
            this.optimizer.zero_grad(set_to_none=True)
        metrics = count_step(state, sums, this.batches.num_rows, config, time.perf_counter() - started, workers, clock)
        metrics |= {
            "train/grad_norm": grad_norm,
            "train/learning_rate": rate,
            "train/temperature": this.objective.temperature,
        }
        if state.step % config.validate_every == 0 or state.step == config.steps:
            metrics["validation/bits_per_byte"] = _validate(this, config, workers)
            state.validation.append([state.step, metrics["validation/bits_per_byte"]])
            model.train()
            if not math.isfinite(metrics["validation/bits_per_byte"]):
                return _non_finite(this, step, "a student whose held-out loss is not finite")
        leaves = state.step % config.notice_every == 0 and notice()
        keeps = leaves or state.step % config.checkpoint_every == 0 or state.step == config.steps
        if keeps and not _is_finite(model):  # an update that a finite gradient made too large
            return _non_finite(this, step, "weights that are not finite")
        if workers.leads:
            report(state.step, metrics)
            if keeps:
                this.checkpoints.save(model, this.optimizer, state)
        if leaves:
            break
    done = state.step == config.steps
    if workers.leads:
        this.checkpoints.wait()
        if done:
            _publish(plan, model)
    workers.agree_on(0)
    return {"status": "done" if done else "preempted", "message": "", **vars(state)}


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Entry point of a Ray Train worker."""
    import ray.train
    from ray.train.torch import get_device

    setup_logging("INFO")
    plan: TrainPlan = config["plan"]
    context = ray.train.get_context()
    torch.set_num_threads(plan.threads)
    workers = Workers(context.get_world_rank(), context.get_world_size(), get_device())
    teacher: TeacherClient | StoredTeacher | None = None
    if plan.teacher is not None:
        access = plan.teacher
        if access.app_name is not None:
            teacher = TeacherClient(access.app_name, access.attempt_timeout_s, access.deadline_s, access.fingerprint)
        elif plan.labels is not None:
            teacher = StoredTeacher(open_storage(plan.labels.root), access.fingerprint, access.signal)

    def report(step: int, metrics: dict[str, float]) -> None:
        config["board"].report.remote(step, metrics)

    try:
        notice = (lambda: ray.train.get_preemption_info() is not None) if config["notices"] else never
        return train(plan, workers, teacher, report, notice)
    finally:
        if teacher is not None:
            teacher.close()


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up to the peak rate, then a cosine to `final_rate` times it at the last step. `step` counts from 0.

    The warm-up takes `warmup_steps`, but never more than half of the training.
    """
    warmup = min(config.warmup_steps, config.steps // 2)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup + 1) / (config.steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_rate + (1 - config.final_rate) * cosine)


def _validate(this: Training, config: TrainConfig, workers: Workers) -> float:
    """Held-out bits per byte over the first rows of the validation split, shared out among the workers."""
    store = this.validation
    this.body.eval()
    mine = range(min(len(store), config.validation_rows))[workers.rank :: workers.count]
    score = TextScore()
    for start in range(0, len(mine), config.micro_batch):
        rows = [store.row(index) for index in mine[start : start + config.micro_batch]]
        score += score_text(this.body, this.head, collate(rows), workers.device)
    total = workers.add_up(StepSums(loss=score.nats, positions=score.positions, rows=score.num_bytes))
    return TextScore(total.loss, int(total.positions), int(total.rows)).bits_per_byte


def _is_finite(model: Any) -> bool:
    """Whether all weights are; the same on every worker, since they make the same updates."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def _non_finite(this: Training, step: int, found: str) -> dict[str, Any]:
    """The end of a training in which step `step` (from 0) gave what is not finite; nothing of it was kept."""
    rows = this.batches.row_ids(step)
    shown = ", ".join(str(row) for row in rows[:64]) + (f" and {len(rows) - 64} more" if len(rows) > 64 else "")
    message = (
        f"step {step} gave {found}; the student of the last checkpoint is intact. Rows of its batch "
        f"(shard:row): {shown}. Lower train.learning_rate, or look at these rows"
    )
    return {"status": "non_finite", "message": message, **vars(this.state)}


def _publish(plan: TrainPlan, model: Any) -> None:
    """The finished model with its tokenizer, as a directory anyone can load."""
    with tempfile.TemporaryDirectory(prefix="raystill-model-") as name:
        model.save_pretrained(name)
        load_tokenizer(plan.tokenizer).save_pretrained(name)
        publish_directory(Path(name), open_storage(plan.storage), f"{plan.prefix}/model")
