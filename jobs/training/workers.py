"""What the workers of one training tell each other: sums, and gradients that are sums.

Every quantity is a sum over positions, added up over workers in one collective and divided once. Nothing is averaged
per worker, so the result does not depend on how rows were dealt out.
"""

from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist

from jobs.training.data import MicroBatch, rows_checksum
from jobs.training.losses import LossParts


@dataclass
class StepSums:
    """Sums over the positions of an optimiser step. All are exact in float64."""

    loss: float = 0.0
    cross_entropy: float = 0.0
    divergence: float = 0.0
    agreements: float = 0.0
    positions: float = 0.0
    tokens: float = 0.0
    rows: float = 0.0
    rows_checksum: float = 0.0
    store_wait_s: float = 0.0
    """Time spent waiting for the example store."""
    teacher_calls: float = 0.0
    retries: float = 0.0
    teacher_wait_s: float = 0.0
    signal_bytes: float = 0.0
    teacher_s: float = 0.0
    """Time that replicas spent on the answers."""
    asked_tokens: float = 0.0
    asked_positions: float = 0.0
    """Of micro-batches that the teacher answered."""
    labelled_rows: float = 0.0
    """Rows whose signal was a stored label."""
    store_read_bytes: float = 0.0
    store_written_bytes: float = 0.0
    store_retries: float = 0.0
    """Of everything that the workers read and wrote meanwhile: rows, labels, checkpoints."""

    def add(self, batch: MicroBatch, loss: LossParts) -> None:
        self.loss += loss.total.item()
        self.cross_entropy += loss.cross_entropy
        self.divergence += loss.divergence
        self.agreements += loss.agreements
        self.positions += len(batch.positions)
        self.tokens += len(batch.token_ids)
        self.rows += len(batch.row_ids)
        self.rows_checksum += rows_checksum(batch.row_ids)


@dataclass(frozen=True)
class Workers:
    """This worker's place among all. Without a process group there is one."""

    rank: int
    count: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def add_up(self, sums: StepSums) -> StepSums:
        """The sums over all workers, on every worker."""
        if self.count == 1:
            return sums
        vector = torch.tensor(astuple(sums), dtype=torch.float64, device=self.device)
        dist.all_reduce(vector)
        return StepSums(*vector.tolist())

    def add_up_gradients(self, model: Any, divisor: float) -> None:
        """Gradients become their sum over all workers, divided by the positions of the global batch."""
        gradients = []
        for parameter in model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:  # a worker whose share held no scored position
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        if self.count > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([item.numel() for item in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        torch._foreach_mul_(gradients, 1.0 / divisor)

    def agree_on(self, value: int) -> int:
        """The leader's value, on every worker. Also a barrier."""
        if self.count == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.broadcast(tensor, src=0)
        return int(tensor.item())
