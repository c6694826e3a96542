"""Four bits that were trained for: the student goes on learning with its weights rounded in every forward pass
(quantisation-aware training, Jacob et al., arXiv 1712.05877; with a teacher as in LLM-QAT, arXiv 2305.17888).

torchao rounds and passes gradients straight through; the loss is that of the run, on its rows, against its teacher (the
float student where there is none). The rounded integers themselves become the weights of an ONNX graph, laid out as
those of `onnx_int4`: torchao's own 4-bit tensors would take a byte for each weight.
"""

import json
import logging
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster.language_model import OutputHead, choose_dtype, load_causal_lm, split
from cluster.storage import open_storage
from jobs.quantization.blocks import FOUR_BIT_BLOCK, Blocks, pack_integers, use_blocks
from jobs.quantization.config import QatConfig
from jobs.quantization.onnx_decoder import decoder_of
from jobs.quantization.onnx_export import export
from jobs.scoring import scored_hidden_states
from jobs.training.data import ExampleStore, GlobalBatches
from jobs.training.losses import distillation_loss
from jobs.training.objective import Objective
from jobs.training.targets.full import FullTarget

logger = logging.getLogger(__name__)

TRAINING = "training.json"
"""What the training was, in the artefact's directory."""


@dataclass(frozen=True)
class QatPlan:
    """What `int4_qat` learns from.

    Args:
        teacher: directory or hub id.
        storage, store: root and prefix of the example store; its training split is read.
        seed: of the order of the rows.
    """

    teacher: str
    storage: str
    store: str
    objective: Objective
    config: QatConfig
    seed: int = 0


class _LocalTarget(FullTarget):
    """A teacher in this process: its hidden states at the scored positions, and its head."""

    def __init__(self, hidden_ND: Tensor, head: OutputHead, vocab_size: int) -> None:
        self._hidden_ND, self._head, self.vocab_size = hidden_ND, head, vocab_size

    def logits(self, start: int, stop: int) -> Tensor:
        return self._head.logits(self._hidden_ND[start:stop])[:, : self.vocab_size]


def quantize(
    student: str, directory: Path, plan: QatPlan, report: Callable[[int, float], None] | None = None
) -> dict[str, str]:
    """Trains, rounds and writes `model.onnx`, the model's config and `training.json` to a directory; returns the
    versions that made it.

    Args:
        report: is given each step's number and its loss for each position.

    Raises:
        QuantizationFailed: a family whose cache is not what it seems.
    """
    import torchao
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.qat import QATConfig

    model = load_causal_lm(student)
    parameters, head = model.num_parameters(), model.get_output_embeddings()
    names = {
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and module.in_features % FOUR_BIT_BLOCK == 0
    }
    rounding = IntxWeightOnlyConfig(torch.int4, PerGroup(FOUR_BIT_BLOCK))  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_(model, QATConfig(rounding, step="prepare"), filter_fn=lambda module, name: name in names)
        losses = fine_tune(model, plan, report or (lambda step, loss: None))
        quantize_(model, QATConfig(rounding, step="convert"), filter_fn=lambda module, name: name in names)
    rounded = {name: _as_blocks(model.get_submodule(name)) for name in names}
    decoder = decoder_of(model.eval())
    use_blocks(model, 4, rounded)
    versions = export(decoder, parameters, directory)
    facts = {"steps": len(losses), "steps_asked": plan.config.steps, "first_loss": losses[0], "last_loss": losses[-1]}
    (directory / TRAINING).write_text(json.dumps(facts))
    return {"torchao": torchao.__version__, **versions}


def _as_blocks(layer: Any) -> Blocks:
    """The integers and scales that torchao rounded a layer's weights to; the layer keeps what they stand for."""
    rounded = layer.weight
    assert not rounded.zero_point.any(), "symmetric rounding has its zero at zero"
    blocks = pack_integers(rounded.qdata, rounded.scale.reshape(rounded.qdata.shape[0], -1))
    layer.weight = nn.Parameter(rounded.dequantize(), requires_grad=False)
    return blocks


def fine_tune(model: Any, plan: QatPlan, report: Callable[[int, float], None]) -> list[float]:
    """Trains a prepared model in place; returns each step's loss for each position.

    AdamW without decay, its rate falling to a tenth along a cosine, gradients clipped to 1. It stops early after
    `max_minutes`.
    """
    config, device = plan.config, torch.device("cpu")
    body, head = split(model)
    teacher_body, teacher_head = split(load_causal_lm(plan.teacher))
    columns = min(head.vocab_size, teacher_head.vocab_size)
    dtype = choose_dtype("auto", device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    store = ExampleStore(open_storage(plan.storage), plan.store, "train")
    batches = GlobalBatches(store, config.batch_rows, plan.seed)
    torch.manual_seed(plan.seed)
    ends, losses = time.monotonic() + 60 * config.max_minutes, []
    model.train()
    for step, batch in enumerate(batches.micro_batches(range(config.steps), 0, 1, config.batch_rows)):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                teacher_ND = scored_hidden_states(teacher_body, batch, device).float()
            hidden_ND = scored_hidden_states(body, batch, device)
        target = _LocalTarget(teacher_ND, teacher_head, columns)
        loss = distillation_loss(
            hidden_ND.to(dtype), head, torch.from_numpy(batch.targets), target, plan.objective
        ).total / len(batch.targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (0.55 + 0.45 * math.cos(math.pi * step / config.steps))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        report(step + 1, losses[-1])
        if time.monotonic() > ends:
            logger.warning(
                "int4_qat stopped after %d of %d steps (quantize.qat.max_minutes)", len(losses), config.steps
            )
            break
    model.eval()
    return losses
