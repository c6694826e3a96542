"""Scoring and generating with an ONNX artefact on the CPU, with its cache where the graph has one.

Axes: B rows, T positions in a row, V vocabulary.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cluster.grid import pack
from cluster.onnx_graph import CachedGraph, has_cache, open_session
from jobs.evaluating.scorers import context_tokens
from jobs.quantization.onnx_export import FACTS, GRAPH
from jobs.scoring import TextScore
from jobs.training.data import MicroBatch


class OnnxScorer:
    """An ONNX artefact."""

    def __init__(self, directory: Path, threads: int) -> None:
        from transformers import AutoConfig

        self._session = open_session(directory / GRAPH, threads)
        self._graph = CachedGraph(self._session) if has_cache(self._session) else None
        self._inputs = {item.name: item.shape for item in self._session.get_inputs()}
        self.parameters = int(json.loads((directory / FACTS).read_text())["parameters"])
        config = AutoConfig.from_pretrained(str(directory)).get_text_config()
        self.vocab_size, self.max_tokens = int(config.vocab_size), context_tokens(config)

    def logits(self, batch: MicroBatch) -> Tensor:
        grid = pack(batch.token_ids, batch.sequence_lengths)
        feed = {"input_ids": grid.token_ids_BT, "position_ids": grid.position_ids_BT}
        if "attention_mask" in self._inputs:  # sequences are numbered, so that they share a row
            feed["attention_mask"] = (grid.position_ids_BT == 0).cumsum(1)
        feed |= self._empty_past(len(grid.token_ids_BT))
        logits_BTV = self._session.run(["logits"], feed)[0]
        flat = logits_BTV.reshape(-1, logits_BTV.shape[-1])
        return torch.from_numpy(flat[grid.index_S[batch.positions]])

    def logit_chunks(self, batch: MicroBatch, size: int) -> Iterator[Tensor]:
        yield from self.logits(batch).split(size)

    def greedy(self, prompt: list[int], num_tokens: int) -> Iterator[int]:
        """With a cache the prompt is read once, then one token at a time; without one all is read anew each time."""
        if self._graph is None:
            yield from self._greedy_without_cache(prompt, num_tokens)
            return
        graph, read, unread = self._graph, 0, list(prompt)
        shape = (1, graph.heads, len(prompt) + num_tokens, graph.width)
        caches = [np.zeros(shape, np.float32) for _ in range(graph.num_caches)]
        for _ in range(num_tokens):
            total = read + len(unread)
            positions_T = np.arange(read, total, dtype=np.int64)
            mask_S = np.ones(total, np.int64)
            ids_T = np.array(unread, np.int64)
            logits_11V = graph.run(ids_T[None], positions_T[None], mask_S[None], caches, logits_from=len(unread) - 1)
            token = int(logits_11V[0, -1].argmax())
            yield token
            read, unread = total, [token]

    def _greedy_without_cache(self, prompt: list[int], num_tokens: int) -> Iterator[int]:
        token_ids = list(prompt)
        for _ in range(num_tokens):
            ids_T = np.array(token_ids, np.int64)
            feed = {"input_ids": ids_T[None], "position_ids": np.arange(len(ids_T), dtype=np.int64)[None]}
            logits_1TV = self._session.run(["logits"], feed)[0]
            token_ids.append(int(logits_1TV[0, -1].argmax()))
            yield token_ids[-1]

    def score(self, batch: MicroBatch) -> TextScore:
        losses_n = nn.functional.cross_entropy(self.logits(batch), torch.from_numpy(batch.targets), reduction="none")
        return TextScore(losses_n.sum(dtype=torch.float64).item(), len(batch.targets), batch.num_bytes)

    def _empty_past(self, rows: int) -> dict[str, np.ndarray]:
        """Keys and values of no tokens, in the order of the graph's outputs behind the logits."""
        return {
            name: np.zeros((rows, shape[1], 0, shape[3]), np.float32)
            for name, shape in self._inputs.items()
            if name.startswith("past_key_values.")
        }
