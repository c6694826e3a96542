"""Scoring with a torch model: float, or quantised by torchao or llm-compressor."""

from collections.abc import Iterator
from typing import Any

import torch

from cluster.language_model import load_causal_lm, split
from jobs.evaluating.scorers import context_tokens
from jobs.scoring import TextScore, score_text, scored_hidden_states
from jobs.training.data import MicroBatch


class TorchScorer:
    """A causal language model in float32 (or as its quantised tensors say) on this process's device."""

    def __init__(self, model: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = load_causal_lm(model).to(self.device)
        self.max_tokens = context_tokens(self.model.config.get_text_config())
        self._body, self._head = split(self.model)
        self.vocab_size = self._head.vocab_size
        # Behind the first forward pass, in which compressed-tensors unpacks what it holds.
        self.parameters = sum(
            parameter.numel()
            for name, parameter in self.model.named_parameters()
            if not name.endswith(("_scale", "_shape", "_zero_point", "_g_idx"))
        )

    def score(self, batch: MicroBatch) -> TextScore:
        return score_text(self._body, self._head, batch, self.device)

    @torch.no_grad()
    def logits(self, batch: MicroBatch) -> torch.Tensor:
        return self._head.logits(scored_hidden_states(self._body, batch, self.device)).cpu()

    @torch.no_grad()
    def logit_chunks(self, batch: MicroBatch, size: int) -> Iterator[torch.Tensor]:
        for hidden_nD in scored_hidden_states(self._body, batch, self.device).split(size):
            yield self._head.logits(hidden_nD)

    @torch.no_grad()
    def greedy(self, prompt: list[int], num_tokens: int) -> Iterator[int]:
        """With a cache of keys and values: the prompt is read once, then one token at a time."""
        unread, cache = prompt, None
        for _ in range(num_tokens):
            token_ids_BT = torch.tensor([unread], device=self.device)
            found = self._body(input_ids=token_ids_BT, past_key_values=cache, use_cache=True)
            cache, token = found.past_key_values, int(self._head.logits(found.last_hidden_state[0, -1:]).argmax())
            unread = [token]
            yield token
