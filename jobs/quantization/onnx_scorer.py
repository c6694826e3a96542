"""Scoring and generating with an ONNX artefact on the CPU, with its cache where the graph has one.

Axes: B rows, T positions in a row, V vocabulary.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cluster.grid import pack
from jobs.evaluating.scorers import context_tokens
from jobs.quantization.onnx_export import FACTS, GRAPH
from jobs.scoring import TextScore
from jobs.training.data import MicroBatch


class OnnxScorer:
    """An ONNX artefact."""

    def __init__(self, directory: Path, threads: int) -> None:
        import onnxruntime
        from transformers import AutoConfig

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(directory / GRAPH), options, providers=["CPUExecutionProvider"]
        )
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._inputs = {item.name: item.shape for item in self._session.get_inputs()}
        self._outputs = [item.name for item in self._session.get_outputs()]
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
        read, unread = 0, list(prompt)
        cache: dict[str, Any] = {name: self._value(value) for name, value in self._empty_past(1).items()}
        for _ in range(num_tokens):
            total = read + len(unread)
            feed = {
                "input_ids": np.array([unread], np.int64),
                "position_ids": np.arange(read, total, dtype=np.int64)[None],
                "attention_mask": np.ones((1, total), np.int64),
            }
            given = {name: self._value(value) for name, value in feed.items() if name in self._inputs}
            # Keys and values stay where onnxruntime put them.
            logits_BTV, *present = self._session.run_with_ort_values(self._outputs, given | cache)
            token = int(logits_BTV.numpy()[0, -1].argmax())
            yield token
            if cache:
                cache, read, unread = dict(zip(cache, present, strict=True)), total, [token]
            else:
                unread = [*unread, token]

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
