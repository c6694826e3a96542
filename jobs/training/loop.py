"""The training loop that runs on every Ray Train worker: batch, signal, loss, step.

Read `train` and `_train` first. What they lean on: `data` deals out rows, `prefetch` asks the teacher ahead, `losses`
is the maths, `workers` adds up over ranks, `checkpoint` makes stopping harmless.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cluster.language_model import OutputHead, choose_dtype, load_causal_lm, split
from cluster.logs import setup_logging
from cluster.pretrained import load_tokenizer
from cluster.published import publish_directory
from cluster.storage import open_storage
from jobs.config import TrainConfig
from jobs.labels.teacher import StoredTeacher
from jobs.scoring import TextScore, score_text, scored_hidden_states
from jobs.training.checkpoint import Checkpoints, TrainState
from jobs.training.data import ExampleStore, GlobalBatches, MicroBatch, collate
from jobs.training.initial import build_student
from jobs.training.losses import distillation_loss
from jobs.training.objective import Objective
from jobs.training.plan import TrainPlan
from jobs.training.signals import Signals
from jobs.training.targets.fused import compiled_forward_kl
from jobs.training.timing import StepClock
from jobs.training.workers import StepSums, Workers
from services.teacher.client import TeacherAnswers, TeacherClient
from services.teacher.signals import Signal

logger = logging.getLogger(__name__)

Report = Callable[[int, dict[str, float]], None]


def train(plan: TrainPlan, workers: Workers, teacher: TeacherAnswers | None, report: Report) -> dict[str, Any]:
    """Trains to the last step, from the newest checkpoint if there is one; the last one is stored when this returns.

    Returns:
        `{"status": "done" | "non_finite", "message": str, **TrainState}`, the same on every worker.
    """
    with contextlib.ExitStack() as ending:  # stores what is on its way, however it ends
        return _train(plan, workers, teacher, report, ending)


def _train(
    plan: TrainPlan,
    workers: Workers,
    teacher: TeacherAnswers | None,
    report: Report,
    ending: contextlib.ExitStack,
) -> dict[str, Any]:
    config, storage = plan.train, open_storage(plan.storage)
    store = ExampleStore(storage, plan.store, "train")
    decides, keep = plan.decides(store.fingerprint), config.keep_checkpoints
    checkpoints = ending.enter_context(Checkpoints(storage, f"{plan.prefix}/checkpoints", keep, decides))
    model, optimizer, state = _restore(plan, workers, checkpoints)
    body, student_head = split(model)
    batches = GlobalBatches(store, config.global_batch, config.seed)
    validation = ExampleStore(storage, plan.store, "validation")
    dtype = choose_dtype(config.precision, workers.device)  # of the products; weights and sums are float32
    signals = ending.enter_context(Signals(plan, workers, teacher, student_head, dtype, store, state.step))
    objective = Objective(
        plan.distill.alpha if teacher else 1.0, plan.distill.temperature, plan.distill.divergence, plan.distill.jsd_beta
    )
    clock = StepClock()
    positions = config.steps * config.global_batch / workers.count * store.manifest["sequence_length"]
    fused = compiled_forward_kl(positions * student_head.vocab_size) if teacher and config.compile else None

    def loss_of(batch: MicroBatch, signal: Signal | None) -> Any:
        with clock.part("forward"), torch.autocast(workers.device.type, dtype, enabled=dtype != torch.float32):
            hidden_ND = scored_hidden_states(body, batch, workers.device)
        with clock.part("loss"):
            targets_N = torch.from_numpy(batch.targets).to(workers.device)
            target = signals.target(signal)
            return distillation_loss(hidden_ND.to(dtype), student_head, targets_N, target, objective, fused)

    shares = signals.with_signals(
        batches.micro_batches(range(state.step, config.steps), workers.rank, workers.count, config.micro_batch)
    )
    model.train()
    for step in range(state.step, config.steps):
        started = time.perf_counter()
        torch.manual_seed(hash((config.seed, step, workers.rank)))  # dropout repeats after a resume
        sums = StepSums()
        for batch, signal in shares:
            loss = loss_of(batch, signal)
            with clock.part("backward"):
                loss.total.backward()
            sums.add(batch, loss)
            if batch.last:
                break
        sums.store_wait_s = batches.take_waited_s()
        sums = workers.add_up(signals.count_into(sums))
        with clock.part("optimizer"):
            workers.add_up_gradients(model, divisor=max(1.0, sums.positions))
            grad_norm = float(nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm))
            if not math.isfinite(sums.loss + grad_norm):
                return _non_finite(state, step, f"a loss of {sums.loss}, a gradient of {grad_norm}", batches)
            rate = learning_rate(config, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        metrics = _count(state, sums, len(store), config, time.perf_counter() - started, workers, clock)
        metrics |= {
            "train/grad_norm": grad_norm,
            "train/learning_rate": rate,
            "train/temperature": objective.temperature,
        }
        if state.step % config.validate_every == 0 or state.step == config.steps:
            metrics["validation/bits_per_byte"] = _validate(body, student_head, validation, config, workers)
            state.validation.append([state.step, metrics["validation/bits_per_byte"]])
            model.train()
            if not math.isfinite(metrics["validation/bits_per_byte"]):
                return _non_finite(state, step, "a student whose held-out loss is not finite", batches)
        keeps = state.step % config.checkpoint_every == 0 or state.step == config.steps
        if keeps and not _is_finite(model):  # an update that a finite gradient made too large
            return _non_finite(state, step, "weights that are not finite", batches)
        if workers.leads:
            report(state.step, metrics)
            if keeps:
                checkpoints.save(model, optimizer, state)
    if workers.leads:
        checkpoints.wait()
        _publish(plan, model)
    workers.agree_on(0)
    return {"status": "done", "message": "", **vars(state)}


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
    try:
        return train(plan, workers, teacher, lambda step, metrics: config["board"].report.remote(step, metrics))
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


def _restore(
    plan: TrainPlan, workers: Workers, checkpoints: Checkpoints
) -> tuple[Any, torch.optim.Optimizer, TrainState]:
    """Model, optimiser and counts of the newest whole checkpoint; the leader makes that of step 0 if there is none."""
    step = -1
    if workers.leads:
        found = checkpoints.fetch()
        if found is None:
            tokenizer = load_tokenizer(plan.tokenizer)
            model = build_student(plan.student, plan.teacher_model, tokenizer, plan.train.seed)
            checkpoints.save(model, _optimizer(model, plan.train), TrainState())
            found = checkpoints.fetch()
            assert found is not None
        step = found.state.step
        found.discard()
    found = checkpoints.fetch(workers.agree_on(step))
    assert found is not None
    model = load_causal_lm(str(found.model), torch.float32).to(workers.device)
    if plan.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = _optimizer(model, plan.train)
    found.restore_moments(model, optimizer)
    found.discard()
    logger.info("worker %d of %d starts at step %d", workers.rank, workers.count, found.state.step)
    return model, optimizer, found.state


def _optimizer(model: Any, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; matrices decay, vectors (norms, biases) do not."""
    matrices = [item for item in model.parameters() if item.requires_grad and item.dim() >= 2]
    vectors = [item for item in model.parameters() if item.requires_grad and item.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def _count(
    state: TrainState,
    sums: StepSums,
    num_rows: int,
    config: TrainConfig,
    seconds: float,
    workers: Workers,
    clock: StepClock,
) -> dict[str, float]:
    """Advances the state by one step and returns the step's metrics; parts of the time are the leader's."""
    wait_s = sums.teacher_wait_s / workers.count
    parts = clock.take(seconds, wait_s)
    positions = max(1.0, sums.positions)
    state.step += 1
    epoch, position = divmod(state.step * config.global_batch, num_rows)
    state.cursor = {"epoch": epoch, "position": position}
    state.losses.append(sums.loss / positions)
    state.rows += int(sums.rows)
    state.tokens += int(sums.tokens)
    state.rows_checksum += int(sums.rows_checksum)
    state.teacher_calls += int(sums.teacher_calls)
    state.retries += int(sums.retries)
    state.teacher_wait_s += wait_s
    state.signal_bytes += int(sums.signal_bytes)
    state.teacher_s += sums.teacher_s
    state.labelled_rows += int(sums.labelled_rows)
    state.asked_tokens += int(sums.asked_tokens)
    state.asked_positions += int(sums.asked_positions)
    state.positions += int(sums.positions)
    state.train_s += seconds
    state.parts_s = {name: state.parts_s.get(name, 0.0) + part_s for name, part_s in parts.items()}
    metrics = {
        "train/loss": sums.loss / positions,
        "train/cross_entropy": sums.cross_entropy / positions,
        "train/tokens_per_s": sums.tokens / seconds,
        "train/step_s": seconds,
        "train/store_wait_s": sums.store_wait_s / workers.count,
        **{f"train/{name}_s": part_s for name, part_s in parts.items() if name != "wait"},
    }
    if sums.teacher_calls or state.teacher_calls or sums.labelled_rows:
        metrics |= {
            "train/divergence": sums.divergence / positions,
            "train/agreement": sums.agreements / positions,
            "train/teacher_wait_s": wait_s,
            "train/retries": sums.retries,
            "train/labelled_share": sums.labelled_rows / max(1.0, sums.rows),
        }
    if sums.asked_positions:
        metrics |= {
            "train/signal_bytes_per_position": sums.signal_bytes / sums.asked_positions,
            "teacher/tokens_per_s": sums.asked_tokens / max(sums.teacher_s, 1e-9),
        }
    return metrics


def _validate(body: nn.Module, head: OutputHead, store: ExampleStore, config: TrainConfig, workers: Workers) -> float:
    """Held-out bits per byte over the first rows of the validation split, shared out among the workers."""
    body.eval()
    mine = range(min(len(store), config.validation_rows))[workers.rank :: workers.count]
    score = TextScore()
    for start in range(0, len(mine), config.micro_batch):
        rows = [store.row(index) for index in mine[start : start + config.micro_batch]]
        score += score_text(body, head, collate(rows), workers.device)
    total = workers.add_up(StepSums(loss=score.nats, positions=score.positions, rows=score.num_bytes))
    return TextScore(total.loss, int(total.positions), int(total.rows)).bits_per_byte


def _is_finite(model: Any) -> bool:
    """Whether all weights are; the same on every worker, since they make the same updates."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def _non_finite(state: TrainState, step: int, found: str, batches: GlobalBatches) -> dict[str, Any]:
    """The end of a training in which step `step` (from 0) gave what is not finite; nothing of it was kept."""
    rows = batches.row_ids(step)
    shown = ", ".join(str(row) for row in rows[:64]) + (f" and {len(rows) - 64} more" if len(rows) > 64 else "")
    message = (
        f"step {step} gave {found}; the student of the last checkpoint is intact. Rows of its batch "
        f"(shard:row): {shown}. Lower train.learning_rate, or look at these rows"
    )
    return {"status": "non_finite", "message": message, **vars(state)}


def _publish(plan: TrainPlan, model: Any) -> None:
    """The finished model with its tokenizer, as a directory anyone can load."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory(prefix="raystill-model-") as name:
        model.save_pretrained(name)
        load_tokenizer(plan.tokenizer).save_pretrained(name)
        publish_directory(Path(name), open_storage(plan.storage), f"{plan.prefix}/model")
