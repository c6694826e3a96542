"""How well a model predicts held-out text: summed negative log-likelihood and the bytes it covers. Pure torch.

Bits per byte = nats / ln 2 / UTF-8 bytes. The end-of-text token of every document counts as a target and covers no
bytes, since a model must also know when to stop. Comparable across tokenizers.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cluster.grid import pack
from cluster.language_model import OutputHead, hidden_states
from jobs.training.data import MicroBatch

_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class TextScore:
    """Sums over scored positions."""

    nats: float = 0.0
    positions: int = 0
    num_bytes: int = 0

    def __add__(self, other: "TextScore") -> "TextScore":
        return TextScore(self.nats + other.nats, self.positions + other.positions, self.num_bytes + other.num_bytes)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(1, self.num_bytes)


def scored_hidden_states(body: nn.Module, batch: MicroBatch, device: torch.device) -> Tensor:
    """Final hidden states [N, D] of a batch's scored positions, in their order."""
    grid = pack(batch.token_ids, batch.sequence_lengths)
    hidden_BTD = hidden_states(
        body, torch.from_numpy(grid.token_ids_BT).to(device), torch.from_numpy(grid.position_ids_BT).to(device)
    )
    return hidden_BTD.flatten(0, 1)[torch.from_numpy(grid.index_S[batch.positions]).to(device)]


@torch.no_grad()
def score_text(body: nn.Module, head: OutputHead, batch: MicroBatch, device: torch.device) -> TextScore:
    """The score of one batch. Logits are formed in chunks of positions."""
    hidden_ND = scored_hidden_states(body, batch, device)
    targets_N = torch.from_numpy(batch.targets).to(device)
    chunk = max(1, _CHUNK_ELEMENTS // head.vocab_size)
    nats = 0.0
    for hidden_nD, targets_n in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True):
        losses_n = nn.functional.cross_entropy(head.logits(hidden_nD), targets_n, reduction="none")
        nats += losses_n.sum(dtype=torch.float64).item()
    return TextScore(nats, len(batch.targets), batch.num_bytes)
