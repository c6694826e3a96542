"""A causal language model as an ONNX graph that keeps its keys and values, with the names that optimum gives them.

In: `input_ids` and `position_ids` [B, T], `attention_mask` [B, P + T], and for each layer i `past_key_values.{i}.key`
and `.value` [B, H, P, D]. Out: `logits` [B, T, V], and `present.{i}.key` and `.value` [B, H, P + T, D], which are the
next call's past. P may be 0, which is how a prompt is read or a text scored. All of B, T and P are free.

The mask has 1 for tokens and 0 for padding, on either side and in the past too. Further numbers say more: a token sees
those before it with its own number, so that sequences numbered 1, 2, 3 share a row without seeing each other.

Families whose cache is not one pair of keys and values for each layer (sliding windows, recurrent states) become a
graph of `input_ids` and `position_ids` alone: right for scoring, while generating reads everything anew each time.

Axes: B rows, T new tokens, P past tokens, S = P + T, H heads of keys and values, D width of a head, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from cluster.errors import QuantizationFailed
from jobs.quantization.onnx_export import Signature

_GROUPED = "raystill_grouped"
_TOLERANCE = 1e-4
"""Of a logit, between the model and what is exported of it, relative to the largest; float32 rounding is a tenth."""


def has_plain_cache(config: Any) -> bool:
    """Whether a decoder keeps one pair of keys and values for each layer, of all tokens."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return set(kinds) == {"full_attention"}
    window, longest = getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", 0)
    recurrent = ("mamba", "rwkv", "ssm", "recurrent", "xlstm", "zamba", "jamba", "bamba")
    return (window is None or window >= longest) and not any(name in config.model_type for name in recurrent)


class Decoder(nn.Module):
    """What is exported of a decoder: tensors in, tensors out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids_BT: Tensor, attention_mask_BS: Tensor, position_ids_BT: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        new = input_ids_BT.shape[1]
        cache = DynamicCache(config=self.model.config)
        for layer, keys, values in zip(cache.layers, past[::2], past[1::2], strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        slots_S = torch.arange(past[0].shape[2] + new, device=input_ids_BT.device)
        number_BS = attention_mask_BS.index_select(1, slots_S)
        same_BTS = number_BS[:, -new:, None] == number_BS[:, None, :]
        sees_BTS = same_BTS & (slots_S[None, :] <= slots_S[-new:, None])
        found = self.model(
            input_ids=input_ids_BT,
            attention_mask=sees_BTS[:, None],
            position_ids=position_ids_BT,
            past_key_values=cache,
            use_cache=True,
        )
        return found.logits, *(part for layer in cache.layers for part in (layer.keys, layer.values))

    def signature(self) -> Signature:
        rows, new, past, total = Dim("batch"), Dim("tokens"), Dim("past"), Dim("total")
        held = [torch.zeros(2, *size) for size in _past_sizes(self.model.config, 5)]
        mask = torch.ones(2, 8, dtype=torch.int64)
        arguments = (torch.arange(6).reshape(2, 3), mask, torch.arange(5, 8).repeat(2, 1), held)
        shapes = ({0: rows, 1: new}, {0: rows, 1: total}, {0: rows, 1: new}, [{0: rows, 2: past} for _ in held])
        parts = [f"{i}.{part}" for i in range(len(held) // 2) for part in ("key", "value")]
        inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{part}" for part in parts)]
        return Signature(arguments, shapes, inputs, ["logits", *(f"present.{part}" for part in parts)])


class Reader(nn.Module):
    """The same of a family without a plain cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
        return self.model(input_ids=input_ids_BT, position_ids=position_ids_BT, use_cache=False).logits

    def signature(self) -> Signature:
        free = {0: Dim("batch"), 1: Dim("tokens")}
        arguments = (torch.arange(6).reshape(2, 3), torch.arange(3).repeat(2, 1))
        return Signature(arguments, (free, free), ["input_ids", "position_ids"], ["logits"])


def grouped_attention(
    module: nn.Module,
    query_BQTD: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention of Q query heads to H heads of keys and values, without copying these Q / H times.

    Args:
        attention_mask: bool [B, 1, T, S], true where a token is seen.
    """
    rows, heads, new, width = query_BQTD.shape
    groups = key_BHSD.shape[1]
    shared = heads // groups
    query = query_BQTD * (width**-0.5 if scaling is None else scaling)
    scores = query.reshape(rows, groups, shared * new, width) @ key_BHSD.transpose(2, 3)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    hidden = torch.where(attention_mask, 0.0, torch.finfo(scores.dtype).min)
    scores = scores.reshape(rows, groups, shared, new, -1) + hidden[:, :, None]
    shares = torch.softmax(scores, -1).reshape(rows, groups, shared * new, -1)
    return (shares @ value_BHSD).reshape(rows, heads, new, width).transpose(1, 2), None


def decoder_of(model: Any) -> Decoder | Reader:
    """What will be exported of a model; checked on a few tokens to be the model.

    Raises:
        QuantizationFailed: it is not: packed, padded or continued from a cache, a logit differs.
    """
    if not has_plain_cache(model.config):
        return Reader(model).eval()
    from transformers import AttentionInterface

    token_ids_2T = torch.arange(3, 17).reshape(2, 7) % model.config.get_text_config().vocab_size
    with torch.no_grad():
        expected = model(input_ids=token_ids_2T, use_cache=False).logits
    AttentionInterface.register(_GROUPED, grouped_attention)
    model.set_attn_implementation(_GROUPED)
    decoder = Decoder(model).eval()
    with torch.no_grad():
        problem = _difference(decoder, token_ids_2T, expected)
    if problem is not None:
        raise QuantizationFailed(
            f"onnx: {type(model).__name__} with a cache {problem}; leave the onnx schemes out of quantize.schemes"
        )
    return decoder


def _difference(decoder: Decoder, token_ids_2T: Tensor, expected_2TV: Tensor) -> str | None:
    """What a decoder computes differently from its model, if anything."""
    length = token_ids_2T.shape[1]
    positions_2T = torch.arange(length).expand(2, length)
    ones = torch.ones_like(token_ids_2T)

    def differ(found: Tensor, exact: Tensor) -> bool:
        return bool((found - exact).abs().max() > _TOLERANCE * exact.abs().max().clamp_min(1e-6))

    empty = _empty_past(decoder.model.config, 2)
    first, *past = decoder(token_ids_2T[:, :4], ones[:, :4], positions_2T[:, :4], empty)
    rest = decoder(token_ids_2T[:, 4:], ones, positions_2T[:, 4:], past)[0]
    if differ(torch.cat([first, rest], 1), expected_2TV):
        return "computes other logits than without"
    # Both sequences in one row behind a token of padding.
    packed = torch.cat([token_ids_2T.new_zeros(1), token_ids_2T.flatten()])[None]
    numbers = torch.cat([ones.new_zeros(1), ones[0], 2 * ones[1]])[None]
    positions = torch.cat([positions_2T.new_zeros(1), positions_2T.flatten()])[None]
    together = decoder(packed, numbers, positions, _empty_past(decoder.model.config, 1))[0]
    if differ(together[0, 1:].reshape(expected_2TV.shape), expected_2TV):
        return "lets a token see another sequence in its row"
    return None


def _empty_past(config: Any, rows: int) -> list[Tensor]:
    return [torch.zeros(rows, *size) for size in _past_sizes(config, 0)]


def _past_sizes(config: Any, past: int) -> list[tuple[int, int, int]]:
    """[H, P, D] of the keys and values of each layer, in order."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [(heads, past, width)] * (2 * config.num_hidden_layers)
