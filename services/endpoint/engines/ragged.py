"""A torch model that reads many sequences in one pass, without padding between them.

Selective batching (Orca, Yu et al., OSDI 2022): the tokens of all sequences are laid out in one row of N, so that
every linear layer is one product, and only attention looks at whose token is whose. The keys and values of a layer lie
in one arena [heads, tokens, width], those of a head one behind the other, as its product reads them; a sequence has a
contiguous range of tokens, as long as its prompt and its longest answer, reserved in units of `UNIT` tokens. Sequences
within their first unit attend together, longer ones each alone: the mask of a common product would make them pay for
the longest.

What a sequence gets does not depend on the others beyond last bits: prompts are read in chunks between fixed borders,
and the products of attention have shapes for which the kernels treat each sequence alike, whoever is beside it; of the
linear layers see `services.endpoint.engines.linear`.

The model's own code runs, with its attention function replaced. `prove` compares the result with the plain model, and
says what kinds of models this is wrong for.

Axes: N tokens of a pass, H heads, K heads of keys and values, G = H / K, T columns of keys, D width of a head, U units.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from services.endpoint.engines.base import PROMPT_CHUNK as CHUNK
from services.endpoint.engines.base import Place, Read

UNIT = 256
"""Tokens; what is reserved is a multiple of it."""

_NAME = "raystill_ragged"


class RaggedEngine:
    """An engine around a Hugging Face causal language model whose attention was replaced."""

    def __init__(self, model: Any, max_cached_tokens: int) -> None:
        """Takes the model over: it cannot be called by others any more."""
        _register()
        model.set_attn_implementation(_NAME)
        self._model = model
        self._num_units = -(-max_cached_tokens // UNIT)
        self.max_cached_tokens = self._num_units * UNIT
        self._free = [True] * self._num_units
        self._arenas: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, num_tokens: int) -> Place | None:
        wanted = max(1, -(-num_tokens // UNIT))
        run = 0
        for unit, free in enumerate(self._free):  # the lowest that fit, so that those in use stay close together
            run = run + 1 if free else 0
            if run == wanted:
                first = unit - wanted + 1
                self._free[first : unit + 1] = [False] * wanted
                return Place(wanted * UNIT, state=first)
        return None

    @torch.inference_mode()
    def release(self, place: Place) -> None:
        first, number = place.state, place.capacity // UNIT
        self._free[first : first + number] = [True] * number
        if not all(bool(torch.isfinite(values).all()) for values in self._last_written(place)):
            # Columns behind a mask still count as zero times their value, which is not zero for what is no number.
            for arena in self._arenas.values():
                for values in arena:
                    values[:, first * UNIT : first * UNIT + place.capacity] = 0

    @torch.inference_mode()
    def fork(self, place: Place, source: Place, num_tokens: int) -> bool:
        into, out_of = place.state * UNIT, source.state * UNIT
        for arena in self._arenas.values():
            for values in arena:
                values[:, into : into + num_tokens] = values[:, out_of : out_of + num_tokens]
        place.length = num_tokens
        return True

    @torch.inference_mode()
    def forward(self, reads: list[Read]) -> Tensor:
        step = _Step(self._arenas, self._num_units, reads)
        with _running(step):
            output = self._model(
                input_ids=torch.tensor([[token_id for read in reads for token_id in read.token_ids]]),
                position_ids=step.positions_N[None],
                use_cache=False,
                logits_to_keep=step.kept_N,
            )
        for read in reads:
            read.place.length += len(read.token_ids)
        return output.logits[0].float()

    def _last_written(self, place: Place) -> Iterator[Tensor]:
        """The last token's keys and values: what is no number spreads to all later ones and to the last layer."""
        if place.length and self._arenas:
            yield from (values[:, place.state * UNIT + place.length - 1] for values in self._arenas[max(self._arenas)])


# --- one pass ---------------------------------------------------------------------------------------------------------


@dataclass
class _Chunk:
    """A part of the row of tokens that attends by itself."""

    rows: slice
    first_column: int
    past: int
    """Tokens that the sequence had read before."""
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)


class _Step:
    """Where the tokens of a pass are written, and what each of them may see."""

    def __init__(self, arenas: dict[int, tuple[Tensor, Tensor]], num_units: int, reads: list[Read]) -> None:
        self.arenas, self._num_units = arenas, num_units
        rows = 0
        columns: list[int] = []
        positions: list[int] = []
        kept: list[int] = []
        self.chunks: list[_Chunk] = []
        short: list[tuple[int, int, int]] = []
        for read in reads:
            count, past, start = len(read.token_ids), read.place.length, read.place.state * UNIT
            if past + count > read.place.capacity:
                raise ValueError(f"a sequence of {past + count} tokens in a place for {read.place.capacity}")
            positions += range(past, past + count)
            columns += range(start + past, start + past + count)
            kept += range(rows, rows + count) if read.all_logits else [rows + count - 1]
            if count == 1 and past < UNIT:
                short.append((rows, read.place.state, past))
            else:
                borders = [past, *range((past // CHUNK + 1) * CHUNK, past + count, CHUNK), past + count]
                for first, last in pairwise(borders):
                    row = rows + first - past
                    self.chunks.append(_Chunk(slice(row, row + last - first), start, first))
            rows += count
        self.positions_N, self.columns_N = torch.tensor(positions), torch.tensor(columns)
        self.kept_N = torch.tensor(kept)
        self.short_rows = torch.tensor([row for row, _, _ in short], dtype=torch.long)
        units = [unit for _, unit, _ in short]
        self.first_unit, self.last_unit = (min(units), max(units)) if units else (0, -1)
        self.short_units = torch.tensor([unit - self.first_unit for unit in units], dtype=torch.long)
        order = list(range(len(short)))
        self.all_in_order = not self.chunks and units == [self.first_unit + number for number in order]
        """Whether the pass is one common product without gaps, so that nothing has to be moved for it."""
        self.short_past = torch.tensor([past for _, _, past in short], dtype=torch.long)
        # Padding to whole chunks leaves the sums of the kernel as they are.
        self.short_columns = max((past // CHUNK + 1 for _, _, past in short), default=0) * CHUNK
        self._short_masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def arena(self, layer: int, key_KND: Tensor, value_KND: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer, [K, tokens, D], with those of this pass written."""
        if layer not in self.arenas:
            # Zeros, and not whatever is in the memory: masked columns count as zero times their value.
            tokens = self._num_units * UNIT
            keys, values = (item.new_zeros(item.shape[0], tokens, item.shape[2]) for item in (key_KND, value_KND))
            self.arenas[layer] = (keys, values)
        keys, values = self.arenas[layer]
        keys.index_copy_(1, self.columns_N, key_KND)
        values.index_copy_(1, self.columns_N, value_KND)
        return keys, values

    def short_mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """What the sequences within their first unit may see, [U, 1, 1, T], added to the scores."""
        found = self._short_masks.get((window, dtype))
        if found is None:
            columns_T = torch.arange(self.short_columns)
            past_U = torch.zeros(self.last_unit - self.first_unit + 1, dtype=torch.long)
            past_U[self.short_units] = self.short_past
            seen_UT = columns_T <= past_U[:, None]
            if window is not None:
                seen_UT &= columns_T > past_U[:, None] - window
            found = _additive(seen_UT, dtype)[:, None, None, :]
            self._short_masks[window, dtype] = found
        return found


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))


_STEP: ContextVar[_Step] = ContextVar("step")


@contextlib.contextmanager
def _running(step: _Step) -> Iterator[None]:
    token = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(token)


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attention)  # no mask function of this name: transformers makes no mask


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [1, H, N, D], key and value [1, K, N, D]; gives [1, N, H, D]."""
    unknown = [name for name in ("s_aux", "position_bias", "cache", "sinks") if others.get(name) is not None]
    if unknown or others.get("is_causal") is False:
        raise NotImplementedError(f"attention with {unknown or 'is_causal=False'}")
    step = _STEP.get()
    keys_KTD, values_KTD = step.arena(module.layer_idx, key[0], value[0])
    query_NHD = query[0].transpose(0, 1)
    num_rows, num_heads, _ = query_NHD.shape
    num_kv = len(keys_KTD)
    group = num_heads // num_kv
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output_NHD = query.new_empty(num_rows, num_heads, values_KTD.shape[2])
    if len(step.short_rows):
        units = slice(step.first_unit, step.last_unit + 1)
        keys, values = (
            item.view(num_kv, -1, UNIT, item.shape[2])[:, units, : step.short_columns].transpose(0, 1)
            for item in (keys_KTD, values_KTD)
        )
        mask = step.short_mask(sliding_window, query.dtype)
        if step.all_in_order:
            query_UKGD = query_NHD.reshape(num_rows, num_kv, group, query.shape[-1])
            return _product(query_UKGD, keys, values, mask, scale, softcap).flatten(1, 2)[None], None
        query_UKGD = query.new_zeros(len(keys), num_kv, group, query.shape[-1])
        query_UKGD[step.short_units] = query_NHD[step.short_rows].view(-1, num_kv, group, query.shape[-1])
        output_UKGD = _product(query_UKGD, keys, values, mask, scale, softcap)
        output_NHD[step.short_rows] = output_UKGD[step.short_units].flatten(1, 2)

    for chunk in step.chunks:
        count = chunk.rows.stop - chunk.rows.start
        # A single token sees all columns up to itself: what lies before the window is cut off instead of masked.
        cut = 0 if count > 1 or sliding_window is None else max(0, chunk.past + 1 - sliding_window)
        columns = slice(chunk.first_column + cut, chunk.first_column + chunk.past + count)
        keys, values = (item[None, :, columns] for item in (keys_KTD, values_KTD))
        query_KGND = query[0, :, chunk.rows].reshape(1, num_kv, group * count, query.shape[-1])
        if count > 1 and sliding_window not in chunk.masks:
            chunk.masks[sliding_window] = _chunk_mask(chunk.past, count, group, sliding_window, query.dtype)
        found = _product(query_KGND, keys, values, chunk.masks.get(sliding_window), scale, softcap)
        output_NHD[chunk.rows] = found.reshape(num_heads, count, -1).transpose(0, 1)
    return output_NHD[None], None


def _chunk_mask(past: int, count: int, group: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """What `count` tokens behind `past` others may see, [G * N, T], added to the scores."""
    rows, columns = torch.arange(past, past + count)[:, None], torch.arange(past + count)
    seen = columns <= rows
    if window is not None:
        seen &= columns > rows - window
    return _additive(seen, dtype).repeat(group, 1)


def _product(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    if softcap is None:
        # The kernel's threads work in memory of their own, which an odd number of rows leaves without alignment.
        odd = query.shape[2] % 2
        if odd:
            query = torch.cat([query, query[:, :, -1:]], dim=2)
            if mask is not None and mask.shape[-2] > 1:
                mask = torch.cat([mask, mask[..., -1:, :]], dim=-2)
        found = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
        return found[:, :, :-1] if odd else found
    scores = torch.tanh(query @ keys.transpose(-1, -2) * (scale / softcap)) * softcap
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ values


# --- which models ----------------------------------------------------------------------------------------------------


def suits(config: Any) -> bool:
    """Whether a model's config promises that a token's logits depend on nothing but its own sequence and its place.

    Left out: attention other than full or with a window, and rotations that change with the longest sequence at hand.
    """
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    rotations = getattr(config, "rope_parameters", None) or {}
    nested = [item for item in rotations.values() if isinstance(item, dict)] or [rotations]
    return (
        kinds <= {"full_attention", "sliding_attention"}
        and not getattr(config, "attention_chunk_size", None)
        and not any(item.get("rope_type") in ("dynamic", "longrope") for item in nested)
    )


@torch.inference_mode()
def prove(
    engine: RaggedEngine, expected: list[Tensor], token_ids: list[list[int]], tolerance: float, every_token: bool
) -> bool:
    """Whether sequences that are read in pieces, side by side, get the logits of a plain forward pass.

    Args:
        expected: of each sequence the logits [T, V] of the model before its attention was replaced.
        tolerance: allowed difference in units of the logits' standard deviation.
        every_token: it holds for all tokens of a sequence, or for the half of them that are nearest. In bfloat16
            rounding alone throws single tokens of a deep model further off: one of SmolLM2's 17 by 0.6 standard
            deviations, where the model itself in bfloat16 is as far from float32. A wrong attention shows in most.
    """
    places = [engine.reserve(len(ids)) for ids in token_ids]
    found: list[list[Tensor]] = [[] for _ in token_ids]
    position = 0
    try:
        while position < max(map(len, token_ids)):
            size = 3 if position == 0 else 1
            reads, whose = [], []
            for number, (place, ids) in enumerate(zip(places, token_ids, strict=True)):
                if position < len(ids):
                    assert place is not None
                    reads.append(Read(place, ids[position : position + size], all_logits=True))
                    whose += [number] * len(reads[-1].token_ids)
            logits_NV = engine.forward(reads)
            if len(logits_NV) != len(whose):
                return False
            for number, row in zip(whose, logits_NV, strict=True):
                found[number].append(row)
            position += size
    except (NotImplementedError, TypeError, RuntimeError, IndexError, AttributeError, KeyError):
        return False
    finally:
        for place in places:
            if place is not None:
                engine.release(place)
    for rows, wanted in zip(found, expected, strict=True):
        off_T = (torch.stack(rows) - wanted).abs().amax(-1).sort().values / wanted.std()
        # What is no number is sorted to the end, is not within the tolerance, and comes of no rounding.
        if not off_T[-1 if every_token else len(off_T) // 2] <= tolerance or off_T[-1].isnan():
            return False
    return True
