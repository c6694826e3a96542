"""Causal language models as raystill sees them: a body that gives hidden states, and a head that gives logits.

The split is what makes exact distillation cheap: the teacher sends the output of its body, the loss applies both heads
chunk by chunk, and [N, V] never exists. It works for every Hugging Face family whose logits are
`soft_cap(scale * (hidden @ weight.T + bias))`; `split` proves that on the loaded model or refuses it.

Axes: B rows of a grid, T positions in a row, N scored positions, D hidden width, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import ModelError
from cluster.pretrained import check_model


@dataclass(frozen=True)
class OutputHead:
    """The map from hidden states to logits: `soft_cap * tanh(scale * (h @ weight_VD.T + bias_V) / soft_cap)`."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    @property
    def vocab_size(self) -> int:
        return self.weight_VD.shape[0]

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] in float32 of hidden states [N, D]."""
        return self.cap(self.products(hidden_ND).float())

    def products(self, hidden_ND: Tensor) -> Tensor:
        """What `cap` makes logits of, [N, V] in the dtype of the weights."""
        return nn.functional.linear(hidden_ND.to(self.weight_VD.dtype), self.weight_VD, self.bias_V)

    @property
    def is_plain(self) -> bool:
        """Whether the products are the logits."""
        return self.scale == 1.0 and self.soft_cap is None

    def cap(self, raw_NV: Tensor) -> Tensor:
        """Scale and soft-cap of raw products, in their dtype."""
        if self.scale != 1.0:
            raw_NV = raw_NV * self.scale
        if self.soft_cap is not None:
            raw_NV = torch.tanh(raw_NV / self.soft_cap) * self.soft_cap
        return raw_NV


def load_causal_lm(model: str, dtype: torch.dtype = torch.float32, gguf_file: str | None = None) -> Any:
    """A Hugging Face causal language model in evaluation mode, from safetensors or a named GGUF file.

    Raises:
        ModelError: no config, no weights, or not a causal language model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, GgufConfig

    found = check_model(model, gguf_file)
    extra: dict[str, Any] = {"use_safetensors": True}
    if gguf_file:
        extra = {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(found, dtype=dtype, output_loading_info=True, **extra)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"model {model}: cannot be loaded as a causal language model ({_first_line(error)})"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers would go on with random values in their place.
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ModelError(f"model {model}: {type(loaded).__name__} needs weights that are not there: {shown}")
    return loaded.eval()


def split(model: Any) -> tuple[nn.Module, OutputHead]:
    """Body and head of a causal language model, checked on a few tokens: against the model's own logits, and that
    packed sequences and later tokens are not seen.

    Raises:
        ModelError: the model does something else, so the split or the packing would be silently wrong.
    """
    body = model.base_model
    head = output_head(model)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            problem = _difference(model, body, head)
    except (TypeError, RuntimeError, IndexError, AttributeError) as error:
        problem = f"cannot be run on packed sequences ({_first_line(error)})"
    finally:
        model.train(was_training)
    if problem is not None:
        raise ModelError(f"model family {type(model).__name__} {problem}: use a model of another family, or report it")
    return body, head


def _difference(model: Any, body: nn.Module, head: OutputHead) -> str | None:
    """What a model does differently from a body and a head over packed sequences, if anything."""
    if _turns_with_company(model.config):
        return (
            "rotates its positions by the longest sequence of a batch (longrope), so an answer would depend on others"
        )
    device = head.weight_VD.device
    probe_T = torch.arange(1, 9, device=device) % head.vocab_size
    positions_T = torch.arange(8, device=device)
    # The same products in the same dtype: differences come from rounding only.
    tolerance = 1e-4 if head.weight_VD.dtype == torch.float32 else 3e-2

    def differ(found: Tensor, expected: Tensor) -> bool:
        spread = expected.abs().max().clamp_min(1e-6)
        return found.shape != expected.shape or bool((found - expected).abs().max() > tolerance * spread)

    logits_TV = model(input_ids=probe_T[None], use_cache=False).logits[0].float()
    if not torch.isfinite(logits_TV).all():
        return "gives logits that are not finite"
    if differ(head.logits(hidden_states(body, probe_T[None], positions_T[None])[0]), logits_TV):
        return "computes its logits in a way that raystill does not know (neither plain, scaled nor soft-capped)"
    # Two sequences of four tokens; in the second row the first one and the very last token are others.
    other_T = torch.cat([probe_T[:4].flip(0), probe_T[4:7], probe_T[:1]])
    packed_2TD = hidden_states(body, torch.stack([probe_T, other_T]), (positions_T % 4).expand(2, 8)).float()
    alone_TD = hidden_states(body, probe_T[None, 4:], positions_T[None, :4])[0].float()
    if differ(packed_2TD[0, 4:], alone_TD) or differ(packed_2TD[1, 4:7], packed_2TD[0, 4:7]):
        return "lets a token see later ones, or other sequences in the same row"
    return None


def _turns_with_company(config: Any) -> bool:
    """Whether rotary embeddings have two sets of factors, and the longest sequence of a batch chooses one for all."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    sets = [rope, *(value for value in rope.values() if isinstance(value, dict))]  # one, or one for each kind of layer
    return any(item.get("rope_type", item.get("type")) == "longrope" for item in sets)


def output_head(model: Any) -> OutputHead:
    """The head of a causal language model with the scale or soft-cap that its config names, unchecked: see `split`."""
    embeddings = model.get_output_embeddings()
    if embeddings is None or not isinstance(embeddings, nn.Linear):
        raise ModelError(f"model family {type(model).__name__} has no linear output head")
    config = model.config
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:
        scale = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None) is not None:
        scale = 1.0 / float(config.logits_scaling)
    cap = getattr(config, "final_logit_softcapping", None)
    return OutputHead(embeddings.weight, embeddings.bias, scale, float(cap) if cap is not None else None)


def hidden_states(body: nn.Module, token_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
    """Final hidden states [B, T, D], after the last norm.

    Positions that restart at 0 begin a new sequence: attention never crosses such a border (transformers builds the
    block-diagonal mask from them when no mask is given).
    """
    return body(input_ids=token_ids_BT, position_ids=position_ids_BT, use_cache=False).last_hidden_state


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`float32`, `bfloat16`, or for `auto` bfloat16 where the processor multiplies it natively."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if cpu_has_bfloat16() else torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether this processor has bfloat16 products (AVX512-BF16 or AMX; Arm's bf16)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
