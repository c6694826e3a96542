"""Encoders in memory: texts to vectors, or to probabilities of labels. Knows torch, not Ray.

How a sequence of token vectors becomes one vector is what sentence-transformers' files in the directory say
(`modules.json`, `1_Pooling/config.json`, `sentence_bert_config.json`); without them it is their mean, as there. Texts
are sorted by length and padded within batches; the padding is masked, so that a text's vector depends on its company
only by rounding: 1e-6, but with `int8_dynamic`, which rounds what goes into a layer to 8 bits, some 0.5 % of the scale,
since a difference in the last bit can be one step of 8 bits.

Axes: B texts, T positions, D width, L labels.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cluster.encoder_texts import POOLING_WAYS, TextReader, read_pooling
from cluster.errors import ModelError
from cluster.model_directory import Kind, read_json
from cluster.published import MANIFEST
from services.endpoint.encoder_weights import load_encoder
from services.endpoint.engines.requests import Load
from services.endpoint.errors import invalid
from services.endpoint.pool import Working, WorkPool

_THREADS = 2
"""Requests that are read at the same time: one prepares its texts while the other computes."""

_BATCH_TOKENS = 8192
"""Positions of a batch, padding included; bounds the memory of a request."""

_POOLING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": lambda tokens_BTD, mask_BT1: tokens_BTD[:, 0],
    "max": lambda tokens_BTD, mask_BT1: tokens_BTD.masked_fill(mask_BT1 == 0, -1e9).amax(1),
    "mean": lambda tokens_BTD, mask_BT1: (tokens_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp_min(1e-9),
    "mean_sqrt_len_tokens": lambda tokens_BTD, mask_BT1: (tokens_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).sqrt(),
    "weightedmean": lambda tokens_BTD, mask_BT1: _mean(tokens_BTD, mask_BT1 * mask_BT1.cumsum(1)),
    "lasttoken": lambda tokens_BTD, mask_BT1: tokens_BTD[
        torch.arange(len(tokens_BTD)), mask_BT1[..., 0].sum(1).long() - 1
    ],
}
assert set(_POOLING) == {*POOLING_WAYS}


def _pool_by(ways: list[str]) -> Callable[[Tensor, Tensor], Tensor]:
    """How token vectors [B, T, D] become vectors [B, D], given their mask [B, T, 1]."""
    return lambda tokens_BTD, mask_BT1: torch.cat([_POOLING[way](tokens_BTD, mask_BT1) for way in ways], -1)


def _mean(tokens_BTD: Tensor, weights_BT1: Tensor) -> Tensor:
    return (tokens_BTD * weights_BT1).sum(1) / weights_BT1.sum(1).clamp_min(1e-9)


class EncoderModel:
    """An encoder that answers. Safe to use from several threads; holds no state between requests."""

    def __init__(self, directory: Path, kind: Kind, max_context_tokens: int, max_admitted: int = 48) -> None:
        """Loads a directory and reads one token to see that it works.

        Args:
            max_admitted: requests that are read or wait; one more is refused.

        Raises:
            ModelError: the directory cannot be served; the message says why.
        """
        self.kind, self.scheme = kind, str(read_json(directory / MANIFEST).get("scheme", "float"))
        config = read_json(directory / "config.json")
        self._reader = TextReader(directory, max_context_tokens)
        self.tokenizer, self._pad_id = self._reader.tokenizer, self._reader.pad_id
        self._vocabulary_size = len(self.tokenizer)
        self.max_context_tokens = self._reader.max_tokens
        self._matryoshka = config.get("matryoshka_dimensions") or bool(config.get("is_matryoshka"))
        if kind == "classifications":
            self.labels, self._to_probabilities = _labels(config)
            self._pooled: Callable[[Tensor, Tensor], Tensor] | None = None
            self._normalise = False
        else:
            self.labels = []
            pooling = read_pooling(directory)
            self._pooled, self._normalise = _pool_by(pooling.ways), pooling.normalises
        self._outputs = load_encoder(directory, kind, self.scheme)
        self._work = WorkPool(_THREADS, max(0, max_admitted - _THREADS))
        self.dimensions = int(self._run([[self._pad_id]], lambda: False)[0].numel())
        if self.labels and len(self.labels) != self.dimensions:
            raise ModelError(f"{directory.name}: {len(self.labels)} labels in config.json, {self.dimensions} outputs")

    @property
    def load(self) -> Load:
        """What is running and waiting now."""
        running = min(_THREADS, self._work.num_admitted)
        return Load(running, self._work.num_admitted - running, 0)

    def check(self) -> None:
        """An encoder in this process lives as long as it does."""

    def start(self, work: Callable[[Callable[[], bool]], Iterator[str]]) -> Working[str]:
        """Queues work with this model (`pool.WorkPool.start`)."""
        return self._work.start(work)

    def encode(self, given: str | list[int], truncate: bool, param: str = "input") -> list[int]:
        """Token ids of a text, special tokens included; ids that are given are read as they are.

        Raises:
            ApiError: an id that is not in the vocabulary, no tokens, or more than the model reads.
        """
        limit = self.max_context_tokens
        if isinstance(given, list):
            wrong = next((token_id for token_id in given if token_id >= self._vocabulary_size), None)
            if wrong is not None:
                raise invalid(f"token id {wrong} is not below {self._vocabulary_size}", param, "invalid_value")
            token_ids = given[:limit] if truncate else given
        else:
            token_ids = self._reader.token_ids(given, truncate)
        if not token_ids:
            raise invalid("A text has no tokens", param, "invalid_value")
        if len(token_ids) > limit:
            raise invalid(
                f"This model reads {limit} tokens at most, a text has {len(token_ids)}; shorten it, or set "
                "truncate: true",
                param,
                "context_length_exceeded",
            )
        return token_ids

    def check_dimensions(self, dimensions: int | None) -> None:
        """Raises `ApiError` if the model has no embeddings of this length."""
        if dimensions is None or dimensions == self.dimensions:
            return
        allowed = self._matryoshka if isinstance(self._matryoshka, list) else None
        if not self._matryoshka or dimensions > self.dimensions or (allowed and dimensions not in allowed):
            raise invalid(
                f"This model's embeddings have {self.dimensions} dimensions; asked for {dimensions}"
                + (f"; others: {', '.join(map(str, allowed))}" if allowed else ""),
                "dimensions",
                "invalid_value",
            )

    def embed(
        self, texts: list[list[int]], cancelled: Callable[[], bool], dimensions: int | None = None
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Vectors [B, D] in float32 of token ids that passed `encode`, of unit length if the directory says so."""
        vectors_BD = self._run(texts, cancelled)
        if dimensions is not None:
            vectors_BD = vectors_BD[:, :dimensions]
        if self._normalise or (dimensions is not None and dimensions != self.dimensions):
            vectors_BD = nn.functional.normalize(vectors_BD, dim=-1)
        return vectors_BD.numpy()

    def classify(self, texts: list[list[int]], cancelled: Callable[[], bool]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Probabilities [B, L] of the labels, of token ids that passed `encode`."""
        return self._to_probabilities(self._run(texts, cancelled)).numpy()

    @torch.inference_mode()
    def _run(self, texts: list[list[int]], cancelled: Callable[[], bool]) -> Tensor:
        """The model's outputs [B, D] or [B, L], in the order of the texts; ends early, with zeros, if cancelled."""
        outputs: dict[int, Tensor] = {}
        for places in batches([len(text) for text in texts], _BATCH_TOKENS):
            if cancelled():
                return torch.zeros(len(texts), 1)
            longest = max(len(texts[place]) for place in places)
            ids_BT = torch.full((len(places), longest), self._pad_id)
            mask_BT = torch.zeros(len(places), longest, dtype=torch.long)
            for row, place in enumerate(places):
                ids_BT[row, : len(texts[place])] = torch.tensor(texts[place])
                mask_BT[row, : len(texts[place])] = 1
            found = self._outputs(ids_BT, mask_BT)
            if self._pooled is not None:
                found = self._pooled(found, mask_BT[..., None].float())
            if not torch.isfinite(found).all():
                raise ModelError("the model gave a value that is not a finite number; serve another version")
            outputs.update(zip(places, found, strict=True))
        return torch.stack([outputs[place] for place in range(len(texts))])


def batches(lengths: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Places of texts, the long ones first, in batches whose padded size is at most `max_tokens`; at least one text."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


# --- what the directory says ------------------------------------------------------------------------------------------


def _labels(config: dict[str, Any]) -> tuple[list[str], Callable[[Tensor], Tensor]]:
    """A classifier's labels by output, and how logits become probabilities."""
    if config.get("problem_type") == "regression":
        raise ModelError("config.json says problem_type=regression: such a model has no labels to choose among")
    names = config.get("id2label") or {str(number): f"LABEL_{number}" for number in range(config.get("num_labels", 2))}
    labels = [str(names[key]) for key in sorted(names, key=int)]
    if config.get("problem_type") == "multi_label_classification" or len(labels) == 1:
        return labels, torch.sigmoid
    return labels, lambda logits_BL: torch.softmax(logits_BL, dim=-1)
