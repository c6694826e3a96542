"""A causal language model as an ONNX graph that keeps its keys and values, with the names that optimum gives them.

In: `input_ids` and `position_ids` [B, T], `attention_mask` [B, P + T], and for each layer i `past_key_values.{i}.key`
and `.value` [B, H, P, D]. Out: `logits` [B, T, V], and `present.{i}.key` and `.value` [B, H, P + T, D], which are the
next call's past. P may be 0, which is how a prompt is read or a text scored. All of B, T and P are free, but behind a
past a single row reads more than one token (B = 1 or T = 1), for so is onnxruntime's GroupQueryAttention on a CPU.

The mask has 1 for tokens and 0 for padding, on either side and in the past too. Further numbers say more: a token sees
those before it with its own number, so that sequences numbered 1, 2, 3 share a row without seeing each other.

A cache can also stay where it is: given past and present as one buffer [B, H, L, D] with L >= P + T, the new keys and
values are written behind the past's, and nothing is copied. Where a row reads one token, that is the last column whose
mask is not 0: rows of different lengths stand next to each other, each from the first column on.

`logits_from`, which need not be given, is the first of the T tokens whose logits are wanted; by default all are.

A layer with a sliding window keeps all keys and values and attends to the last. Families whose cache is not one pair of
them for each layer (recurrent states, chunks, values of another width than keys), or whose heads are not a multiple of
8 wide, become a graph of `input_ids` and `position_ids` alone: right for scoring, while generating reads everything
anew each time.

Axes: B rows, T new tokens, P past tokens, S = P + T, Q heads of queries, H heads of keys and values, D width of a head,
V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from cluster.errors import QuantizationFailed
from jobs.quantization.onnx_export import Signature

_CACHED = "raystill_cached"
_TOLERANCE = 1e-4
"""Of a logit, between the model and what is exported of it, relative to the largest; float32 rounding is a tenth."""
_WIDTH_UNIT = 8
"""What the width of a head is a multiple of for GroupQueryAttention."""


def has_plain_cache(config: Any) -> bool:
    """Whether a decoder keeps one pair of keys and values for each layer; of a window only the last ones count."""
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    recurrent = ("mamba", "rwkv", "ssm", "recurrent", "xlstm", "zamba", "jamba", "bamba")
    return kinds <= {"full_attention", "sliding_attention"} and not any(name in config.model_type for name in recurrent)


def _windows(config: Any) -> list[int | None]:
    """How many tokens back each layer sees, itself included; None sees all."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


class Decoder(nn.Module):
    """What is exported of a decoder: tensors in, tensors out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids_BT: Tensor,
        attention_mask_BS: Tensor,
        position_ids_BT: Tensor,
        past: list[Tensor],
        logits_from: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        cache = _Cache(self.model.config, input_ids_BT, attention_mask_BS, past)
        first: Any = 0 if logits_from is None else logits_from.item()
        torch._check(first >= 0)
        torch._check(first < input_ids_BT.shape[1])
        with _using(cache):
            found = self.model(
                input_ids=input_ids_BT,
                attention_mask=cache.sees_BTS[:, None],
                position_ids=position_ids_BT,
                past_key_values=cache.transformers_cache(),
                use_cache=True,
                logits_to_keep=torch.arange(first, input_ids_BT.shape[1]),
            )
        return found.logits, *cache.present

    def signature(self) -> Signature:
        rows, new, past, total = Dim("batch"), Dim("tokens"), Dim("past"), Dim("total")
        held = [torch.zeros(2, *size) for size in _past_sizes(self.model.config, 5)]
        mask = torch.ones(2, 8, dtype=torch.int64)
        arguments = (torch.arange(6).reshape(2, 3), mask, torch.arange(5, 8).repeat(2, 1), held, torch.tensor(0))
        read = {0: rows, 1: new}
        shapes: Any = (read, {0: rows, 1: total}, read, [{0: rows, 2: past} for _ in held], {})
        parts = [f"{i}.{part}" for i in range(len(held) // 2) for part in ("key", "value")]
        inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{part}" for part in parts)]
        outputs = ["logits", *(f"present.{part}" for part in parts)]
        return Signature(arguments, shapes, [*inputs, "logits_from"], outputs, defaults={"logits_from": arguments[-1]})


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


class _Cache:
    """What the layers of one call share: who sees whom, the keys and values given, those to be handed back."""

    def __init__(self, config: Any, input_ids_BT: Tensor, attention_mask_BS: Tensor, past: list[Tensor]) -> None:
        self.windows = _windows(config)
        self.past = past
        self.present: list[Tensor] = []
        new = input_ids_BT.shape[1]
        self.total = attention_mask_BS.shape[1]
        slots_S = torch.arange(self.total)
        # A row that reads one token ends at its last number, any other with the mask.
        ends_B = torch.where(attention_mask_BS != 0, slots_S + 1, 0).amax(1)
        single = torch.ones_like(input_ids_BT[0]).sum() == 1
        self.ends_B = torch.where(single, ends_B.clamp_min(1), self.total)
        slots_BT = self.ends_B[:, None] - new + torch.arange(new)
        same_BTS = attention_mask_BS.gather(1, slots_BT)[:, :, None] == attention_mask_BS[:, None, :]
        self.back_BTS = slots_BT[:, :, None] - slots_S
        self.sees_BTS = same_BTS & (self.back_BTS >= 0)
        self.bias_B1TS = torch.where(same_BTS, 0.0, torch.finfo(torch.float32).min)[:, None]

    def transformers_cache(self) -> Any:
        """What a transformers model takes for its cache: each layer gets its new keys and values back as they are."""
        from transformers.cache_utils import Cache, DynamicLayer

        class Layer(DynamicLayer):
            def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
                return keys, values

        layers = []
        for keys, values in zip(self.past[::2], self.past[1::2], strict=True):
            layer = Layer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            layers.append(layer)
        return Cache(layers=layers)

    def attend(
        self,
        layer: int,
        query_BQTD: Tensor,
        key_BHTD: Tensor,
        value_BHTD: Tensor,
        scale: float,
        softcap: float,
        window: int | None,
    ) -> Tensor:
        """Writes a layer's new keys and values behind its past, and attends to those within the window; [B, T, Q, D].

        Raises:
            _OtherWindow: the config says another one.
        """
        if window != self.windows[layer]:
            raise _OtherWindow
        attention = _exported_attention if torch.compiler.is_exporting() else _attention
        keys, values = self.past[2 * layer : 2 * layer + 2]
        found, *present = attention(self, query_BQTD, key_BHTD, value_BHTD, keys, values, scale, softcap, window)
        self.present += present
        return found


class _OtherWindow(Exception):
    """A layer attends to another window than the config says, which a text within both would not show."""


_cache_in_use: ContextVar[_Cache] = ContextVar("cache")


@contextmanager
def _using(cache: _Cache) -> Iterator[None]:
    token = _cache_in_use.set(cache)
    try:
        yield
    finally:
        _cache_in_use.reset(token)


def cached_attention(
    module: Any,
    query_BQTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls while a `Decoder` runs; its mask is the cache's own."""
    scale = query_BQTD.shape[-1] ** -0.5 if scaling is None else float(scaling)
    cache = _cache_in_use.get()
    new = (query_BQTD, key_BHTD, value_BHTD)
    return cache.attend(module.layer_idx, *new, scale=scale, softcap=softcap or 0.0, window=sliding_window), None


def _attention(
    cache: _Cache,
    query_BQTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    past_key_BHPD: Tensor,
    past_value_BHPD: Tensor,
    scale: float,
    softcap: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_exported_attention` stands for, in torch, of a past without room behind it."""
    key_BHSD = torch.cat([past_key_BHPD, key_BHTD], 2)
    value_BHSD = torch.cat([past_value_BHPD, value_BHTD], 2)
    shared = query_BQTD.shape[1] // key_BHSD.shape[1]
    scores = query_BQTD @ key_BHSD.repeat_interleave(shared, 1).transpose(2, 3) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    sees_BTS = cache.sees_BTS if window is None else cache.sees_BTS & (cache.back_BTS < window)
    shares = torch.softmax(scores.masked_fill(~sees_BTS[:, None], torch.finfo(scores.dtype).min), -1)
    found = (shares @ value_BHSD.repeat_interleave(shared, 1)).transpose(1, 2)
    return found, key_BHSD, value_BHSD


def _exported_attention(
    cache: _Cache,
    query_BQTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    past_key_BHPD: Tensor,
    past_value_BHPD: Tensor,
    scale: float,
    softcap: float,
    window: int | None,
) -> tuple[Tensor, ...]:
    """onnxruntime's GroupQueryAttention, which knows causality and the rows' lengths; the numbers are its bias."""
    rows, heads, new, width = query_BQTD.shape
    groups = key_BHTD.shape[1]
    found, key, value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (
            *(part.transpose(1, 2).flatten(2) for part in (query_BQTD, key_BHTD, value_BHTD)),
            past_key_BHPD,
            past_value_BHPD,
            (cache.ends_B - 1).to(torch.int32),
            torch.full((1,), cache.total, dtype=torch.int32),
            None,
            None,
            None,
            cache.bias_B1TS,
        ),
        {
            "num_heads": heads,
            "kv_num_heads": groups,
            "scale": scale,
            "softcap": softcap,
            "local_window_size": -1 if window is None else window,
        },
        dtypes=(torch.float32,) * 3,
        shapes=((rows, new, heads * width), *(((rows, groups, cache.total, width),) * 2)),
        version=1,
    )
    return found.unflatten(2, (heads, width)), key, value


def decoder_of(model: Any) -> Decoder | Reader:
    """What will be exported of a model; checked on a few tokens to be the model.

    Raises:
        QuantizationFailed: it is not: packed, padded or continued from a cache, a logit differs.
    """
    from transformers import AttentionInterface

    if not model._can_set_attn_implementation():
        raise QuantizationFailed(
            f"onnx: {type(model).__name__} has an attention of its own; leave the onnx schemes out of quantize.schemes"
        )
    token_ids_2T = torch.arange(3, 17).reshape(2, 7) % model.config.get_text_config().vocab_size
    before = model.config._attn_implementation
    with torch.no_grad():
        expected = model(input_ids=token_ids_2T, use_cache=False).logits
        if not has_plain_cache(model.config) or not _fits_the_operator(model, token_ids_2T):
            return Reader(model).eval()
        AttentionInterface.register(_CACHED, cached_attention)
        model.set_attn_implementation(_CACHED)
        decoder = Decoder(model).eval()
        problem = _difference(decoder, token_ids_2T, expected)
    if problem is None:
        return decoder
    if any(_windows(model.config)):
        model.set_attn_implementation(before)
        return Reader(model).eval()
    raise QuantizationFailed(
        f"onnx: {type(model).__name__} with a cache {problem}; leave the onnx schemes out of quantize.schemes"
    )


def _fits_the_operator(model: Any, token_ids_2T: Tensor) -> bool:
    """Whether keys and values have the sizes that the config says, and GroupQueryAttention takes."""
    rows, length = token_ids_2T.shape
    layers = model(input_ids=token_ids_2T, use_cache=True).past_key_values.layers
    found = [tuple(part.shape) for layer in layers for part in (layer.keys, layer.values)]
    sizes = [(rows, *size) for size in _past_sizes(model.config, length)]
    return found == sizes and sizes[0][-1] % _WIDTH_UNIT == 0


def _difference(decoder: Decoder, token_ids_2T: Tensor, expected_2TV: Tensor) -> str | None:
    """What a decoder computes differently from its model, if anything."""
    length = token_ids_2T.shape[1]
    positions_2T = torch.arange(length).expand(2, length)
    ones = torch.ones_like(token_ids_2T)

    def differ(found: Tensor, exact: Tensor) -> bool:
        return bool((found - exact).abs().max() > _TOLERANCE * exact.abs().max().clamp_min(1e-6))

    empty = _empty_past(decoder.model.config, 2)
    try:
        first, *past = decoder(token_ids_2T[:, :4], ones[:, :4], positions_2T[:, :4], empty)
    except _OtherWindow:
        return "has other windows than its config says"
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
