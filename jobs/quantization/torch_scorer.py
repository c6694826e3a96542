"""Scoring with a torch model: float, or quantised by torchao."""

from typing import Any

import torch

from cluster.language_model import load_causal_lm, split
from jobs.scoring import TextScore, score_text, scored_hidden_states
from jobs.training.data import MicroBatch


class TorchScorer:
    """A causal language model in float32 (or as its quantised tensors say) on this process's device."""

    def __init__(self, model: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded: Any = load_causal_lm(model).to(self._device)
        self.parameters = loaded.num_parameters()
        self._body, self._head = split(loaded)

    def score(self, batch: MicroBatch) -> TextScore:
        return score_text(self._body, self._head, batch, self._device)

    @torch.no_grad()
    def logits(self, batch: MicroBatch) -> torch.Tensor:
        return self._head.logits(scored_hidden_states(self._body, batch, self._device)).cpu()
