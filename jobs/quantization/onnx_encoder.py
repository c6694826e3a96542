"""An encoder (BERT's kind, by itself or with a head such as a classifier's) as an ONNX graph, with optimum's names.

In: `input_ids`, `attention_mask` and, where the model knows it, `token_type_ids`, all [B, T]. Out: `logits`,
[B, labels] of a classifier, [B, T, labels] of other heads; `last_hidden_state` [B, T, D] without a head.

Axes: B rows, T tokens, D hidden width.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from jobs.quantization.onnx_export import Signature


class Encoder(nn.Module):
    """What is exported of an encoder: tensors in, a tensor out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        knows_types = "token_type_ids" in accepted and getattr(model.config, "type_vocab_size", 0) > 1
        self.names = ["input_ids", "attention_mask", *(["token_type_ids"] if knows_types else [])]

    def forward(self, *inputs_BT: Tensor) -> Tensor:
        found = self.model(**dict(zip(self.names, inputs_BT, strict=True)))
        return found.logits if hasattr(found, "logits") else found.last_hidden_state

    def signature(self) -> Signature:
        rows, tokens = Dim("batch"), Dim("tokens")
        one = torch.ones(2, 6, dtype=torch.int64)
        arguments = (one.cumsum(1), one, 0 * one)[: len(self.names)]
        with torch.no_grad():
            found = self.model(**dict(zip(self.names, arguments, strict=True)))
        result = "logits" if hasattr(found, "logits") else "last_hidden_state"
        shapes = tuple({0: rows, 1: tokens} for _ in self.names)
        return Signature(arguments, (shapes,), self.names, [result])
