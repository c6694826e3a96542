"""ONNX graphs: with inputs and outputs for keys and values, several sequences at once; without, the whole text again.

A graph with a cache has inputs `past_key_values.{i}.key|value` [B, K, P, D] and outputs `present.{i}.key|value`
[B, K, P + T, D], as optimum names them. Sequences that each read one token share a run: their caches are padded on the
left to the longest, `attention_mask` says which columns are real. The graph hands back a new cache of the whole batch
every time; it stays one array until the batch changes, and is cut into its sequences then.

A graph without a cache reads each whole sequence anew for every token, which suits short answers only.

Axes: B sequences, K heads of keys and values, P tokens read before, T new tokens, D width of a head, V vocabulary.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.errors import ModelError
from services.endpoint.engines.base import Place, Read, TokenBudget

_WASTE = 2.0
"""Sequences share a run while its columns, padding included, are at most so many times their tokens."""


def open_session(path: Path, threads: int | None = None) -> Any:
    """A session on the CPU, by default with torch's number of threads.

    Raises:
        ModelError: the file cannot be loaded.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no base class
        raise ModelError(f"{path.name} cannot be loaded ({str(error).splitlines()[0]})") from error


def has_cache(session: Any) -> bool:
    return any(item.name.startswith("past_key_values.") for item in session.get_inputs())


class _OnnxEngine:
    """What both kinds of graphs share: places are counted, and sequences are read by runs of the session."""

    def __init__(self, session: Any, max_cached_tokens: int) -> None:
        self._session = session
        self._inputs = {item.name: item for item in session.get_inputs()}
        self._budget = TokenBudget(max_cached_tokens)
        self.max_cached_tokens = max_cached_tokens

    def reserve(self, num_tokens: int) -> Place | None:
        return Place(num_tokens) if self._budget.take(num_tokens) else None

    def release(self, place: Place) -> None:
        self._budget.give_back(place.capacity)
        place.state = None


class WholeTextEngine(_OnnxEngine):
    """An engine around a graph without a cache: the state of a place is its token ids."""

    def fork(self, place: Place, source: Place, num_tokens: int) -> bool:
        place.state, place.length = source.state[:num_tokens], num_tokens
        return True

    def forward(self, reads: list[Read]) -> Tensor:
        rows = []
        for read in reads:
            token_ids = read.place.state = (read.place.state or []) + read.token_ids
            read.place.length = len(token_ids)
            feed = {
                "input_ids": np.asarray([token_ids], np.int64),
                "position_ids": np.arange(len(token_ids), dtype=np.int64)[None],
                "attention_mask": np.ones((1, len(token_ids)), np.int64),
            }
            feed = {name: value for name, value in feed.items() if name in self._inputs}
            logits_TV = torch.from_numpy(self._session.run(["logits"], feed)[0][0]).float()
            rows.append(logits_TV[-len(read.token_ids) :] if read.all_logits else logits_TV[-1:])
        return torch.cat(rows)


class CachedEngine(_OnnxEngine):
    """An engine around a graph with a cache.

    The state of a place is a dict of arrays [1, K, P, D] by input name, or a `_Batch` that holds it as one of several.
    """

    def __init__(self, session: Any, max_cached_tokens: int) -> None:
        super().__init__(session, max_cached_tokens)
        self._pasts = [name for name in self._inputs if name.startswith("past_key_values.")]
        self._outputs = ["logits", *(name.replace("past_key_values.", "present.", 1) for name in self._pasts)]
        missing = sorted(set(self._outputs) - {item.name for item in session.get_outputs()})
        if missing:
            raise ModelError(f"the ONNX graph has no output {missing[0]} for its input of keys and values")
        self._batch: _Batch | None = None

    def release(self, place: Place) -> None:
        if self._batch is not None and place in self._batch.places:
            self._split()
        super().release(place)

    def fork(self, place: Place, source: Place, num_tokens: int) -> bool:
        self._split()
        place.state = {name: value[:, :, :num_tokens] for name, value in source.state.items()}
        place.length = num_tokens
        return True

    def forward(self, reads: list[Read]) -> Tensor:
        found: dict[int, Tensor] = {}
        # The first token of a sequence has no cache that could be joined with those of others.
        single = [read for read in reads if len(read.token_ids) == 1 and read.place.length]
        shared = single if len(single) > 1 and self._worthwhile(single) else []
        if shared:
            for read, row in zip(shared, self._run_batch(shared), strict=True):
                found[id(read)] = row[None]
        for read in reads:
            if id(read) not in found:
                found[id(read)] = self._run_alone(read)
        return torch.cat([found[id(read)] for read in reads])

    def _worthwhile(self, reads: list[Read]) -> bool:
        lengths = [read.place.length + 1 for read in reads]
        return max(lengths) * len(lengths) <= _WASTE * sum(lengths)

    def _run_alone(self, read: Read) -> Tensor:
        self._split()
        place, count = read.place, len(read.token_ids)
        past = place.state if place.state is not None else self._empty()
        total = place.length + count
        logits_BTV, present = self._run(
            np.asarray([read.token_ids], np.int64),
            np.arange(place.length, total, dtype=np.int64)[None],
            np.ones((1, total), np.int64),
            past,
        )
        place.state, place.length = present, total
        logits_TV = logits_BTV[0]
        return logits_TV if read.all_logits else logits_TV[-1:]

    def _run_batch(self, reads: list[Read]) -> Tensor:
        places = [read.place for read in reads]
        if self._batch is None or self._batch.places != places:
            self._split()
            self._batch = _Batch.of(places, self._pasts)
        batch = self._batch
        columns = next(iter(batch.past.values())).shape[2] + 1
        starts_B = np.array([columns - place.length - 1 for place in places])
        logits_BTV, batch.past = self._run(
            np.asarray([read.token_ids for read in reads], np.int64),
            np.asarray([[place.length] for place in places], np.int64),
            (np.arange(columns)[None] >= starts_B[:, None]).astype(np.int64),
            batch.past,
        )
        for place in places:
            place.length += 1
        return logits_BTV[:, -1]

    def _run(
        self, token_ids_BT: np.ndarray, positions_BT: np.ndarray, mask_BP: np.ndarray, past: dict[str, np.ndarray]
    ) -> tuple[Tensor, dict[str, np.ndarray]]:
        feed = {"input_ids": token_ids_BT, "position_ids": positions_BT, "attention_mask": mask_BP}
        feed = {name: value for name, value in feed.items() if name in self._inputs}
        logits_BTV, *present = self._session.run(self._outputs, {**feed, **past})
        return torch.from_numpy(logits_BTV).float(), dict(zip(self._pasts, present, strict=True))

    def _empty(self) -> dict[str, np.ndarray]:
        empty = {}
        for name in self._pasts:
            _, heads, _, width = self._inputs[name].shape
            kind = np.float16 if "float16" in self._inputs[name].type else np.float32
            empty[name] = np.zeros((1, heads, 0, width), kind)
        return empty

    def _split(self) -> None:
        if self._batch is not None:
            for row, place in enumerate(self._batch.places):
                # Copies: a view of one sequence would keep the arrays of the whole batch.
                place.state = {
                    name: np.ascontiguousarray(value[row : row + 1, :, value.shape[2] - place.length :])
                    for name, value in self._batch.past.items()
                }
            self._batch = None


class _Batch:
    """Caches of several sequences in one array for each input, padded on the left."""

    def __init__(self, places: list[Place], past: dict[str, np.ndarray]) -> None:
        self.places, self.past = places, past

    @classmethod
    def of(cls, places: list[Place], names: list[str]) -> "_Batch":
        longest = max(place.length for place in places)
        past = {}
        for name in names:
            parts = [place.state[name] for place in places]
            _, heads, _, width = parts[0].shape
            joined = np.zeros((len(parts), heads, longest, width), parts[0].dtype)
            for row, part in enumerate(parts):
                joined[row, :, longest - part.shape[2] :] = part[0]
            past[name] = joined
        for place in places:
            place.state = None
        return cls(places, past)
