"""A torch model that reads one sequence after the other, each with its own cache as transformers makes it.

For models that `ragged` cannot hold: a state instead of keys and values, attention that is not replaceable, rotations
that depend on the longest sequence of a pass. A pass over 16 sequences costs 16 passes.

Axes: N tokens, V vocabulary.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from services.endpoint.engines.base import Place, Read, TokenBudget


class SeparateEngine:
    """An engine around any Hugging Face causal language model with a cache."""

    def __init__(self, model: Any, max_cached_tokens: int) -> None:
        self._model = model
        self._budget = TokenBudget(max_cached_tokens)
        self.max_cached_tokens = max_cached_tokens

    def reserve(self, num_tokens: int) -> Place | None:
        from transformers import DynamicCache

        if not self._budget.take(num_tokens):
            return None
        return Place(num_tokens, state=DynamicCache(config=self._model.config))

    def release(self, place: Place) -> None:
        self._budget.give_back(place.capacity)
        place.state = None

    def fork(self, place: Place, source: Place, num_tokens: int) -> bool:
        if source.length != num_tokens:  # a state cannot be cut
            return False
        place.state, place.length = copy.deepcopy(source.state), num_tokens
        return True

    @torch.inference_mode()
    def forward(self, reads: list[Read]) -> Tensor:
        rows = []
        for read in reads:
            output = self._model(
                input_ids=torch.tensor([read.token_ids]),
                past_key_values=read.place.state,
                use_cache=True,
                logits_to_keep=0 if read.all_logits else 1,
            )
            rows.append(output.logits[0].float())
            read.place.length += len(read.token_ids)
        return torch.cat(rows)
