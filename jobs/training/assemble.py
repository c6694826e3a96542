"""What a worker holds while it trains: model, optimiser, rows and signals, as the newest checkpoint left them."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cluster.language_model import OutputHead, choose_dtype, load_causal_lm, split
from cluster.pretrained import load_tokenizer
from cluster.storage import open_storage
from jobs.config import TrainConfig
from jobs.scoring import scored_hidden_states
from jobs.training.checkpoint import Checkpoints, TrainState
from jobs.training.counting import StoreTraffic
from jobs.training.data import ExampleStore, GlobalBatches, MicroBatch
from jobs.training.initial import build_student
from jobs.training.losses import LossParts, distillation_loss
from jobs.training.objective import Objective
from jobs.training.plan import TrainPlan
from jobs.training.signals import Signals
from jobs.training.targets.fused import compiled_forward_kl
from jobs.training.timing import StepClock
from jobs.training.workers import StepSums, Workers
from services.teacher.client import TeacherAnswers
from services.teacher.signals import Signal

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """One worker's part of a training, ready for its next step."""

    model: Any
    body: nn.Module
    head: OutputHead
    optimizer: torch.optim.Optimizer
    state: TrainState
    batches: GlobalBatches
    validation: ExampleStore
    signals: Signals
    objective: Objective
    clock: StepClock
    checkpoints: Checkpoints
    shares: Iterator[tuple[MicroBatch, Signal | None]]
    """This worker's micro-batches from the state's step to the last, each with what the teacher says about it."""
    loss_of: Callable[[MicroBatch, Signal | None], LossParts]
    """The student's forward pass and the loss: sums over the micro-batch's positions, to call `backward` on."""
    traffic: StoreTraffic

    def counted(self, sums: StepSums) -> StepSums:
        """A step's sums with what happened on the way to them: waiting, asking, reading, writing."""
        sums.store_wait_s = self.batches.take_waited_s()
        return self.signals.count_into(self.traffic.count_into(sums))


@contextlib.contextmanager
def assembled(plan: TrainPlan, workers: Workers, teacher: TeacherAnswers | None) -> Iterator[Training]:
    """What `plan` describes, from the newest checkpoint. The end of the block stores what is on its way, however it
    ends: labels that were not written, the checkpoint that is being uploaded."""
    config, storage, traffic = plan.train, open_storage(plan.storage), StoreTraffic()
    store = ExampleStore(storage, plan.store, "train")
    decides, keep = plan.decides(store.fingerprint), config.keep_checkpoints
    with Checkpoints(storage, f"{plan.prefix}/checkpoints", keep, decides) as checkpoints:
        model, optimizer, state = _restore(plan, workers, checkpoints)
        body, head = split(model)
        batches = GlobalBatches(store, config.global_batch, config.seed)
        mine = batches.micro_batches(range(state.step, config.steps), workers.rank, workers.count, config.micro_batch)
        dtype = choose_dtype(config.precision, workers.device)  # of the products; weights and sums are float32
        objective = Objective(
            plan.distill.alpha if teacher else 1.0,
            plan.distill.temperature,
            plan.distill.divergence,
            plan.distill.jsd_beta,
        )
        clock = StepClock()
        positions = config.steps * config.global_batch / workers.count * store.manifest["sequence_length"]
        fused = compiled_forward_kl(positions * head.vocab_size) if teacher and config.compile else None
        with Signals(plan, workers, teacher, head, dtype, store, state.step) as signals:

            def loss_of(batch: MicroBatch, signal: Signal | None) -> LossParts:
                with clock.part("forward"), torch.autocast(workers.device.type, dtype, enabled=dtype != torch.float32):
                    hidden_ND = scored_hidden_states(body, batch, workers.device)
                with clock.part("loss"):
                    targets_N = torch.from_numpy(batch.targets).to(workers.device)
                    target = signals.target(signal)
                    return distillation_loss(hidden_ND.to(dtype), head, targets_N, target, objective, fused)

            yield Training(
                model=model,
                body=body,
                head=head,
                optimizer=optimizer,
                state=state,
                batches=batches,
                validation=ExampleStore(storage, plan.store, "validation"),
                signals=signals,
                objective=objective,
                clock=clock,
                checkpoints=checkpoints,
                shares=signals.with_signals(mine),
                loss_of=loss_of,
                traffic=traffic,
            )


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
