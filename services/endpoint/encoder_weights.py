"""An encoder's weights in memory, by its scheme: safetensors, float or of torchao, or an ONNX graph. Not Ray.

All of them become one function from token ids and mask to logits [B, L] of a classifier, or to the last hidden state
[B, T, D] of what embeds; both in float32.

Axes: B texts, T positions, D width, L labels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.errors import ModelError
from cluster.model_directory import Kind
from cluster.onnx_graph import open_session

Outputs = Callable[[Tensor, Tensor], Tensor]
"""Of `ids_BT` and `mask_BT`, both int64."""

_TORCH_SCHEMES = ("float", "int8_weight_only", "int8_dynamic")


def load_encoder(directory: Path, kind: Kind, scheme: str) -> Outputs:
    """Loads the weights of a verified directory.

    Raises:
        ModelError: the directory cannot be served; the message says why.
    """
    if scheme.startswith("onnx"):
        return _graph(directory, kind)
    if scheme not in _TORCH_SCHEMES:
        raise ModelError(
            f"scheme {scheme!r} of an encoder is not known here; known: {', '.join(_TORCH_SCHEMES)}, and ONNX graphs"
        )
    if scheme.startswith("int8"):
        import torchao  # noqa: F401  # registers the tensor types that the file names
    return _torch_model(directory, kind)


def _torch_model(directory: Path, kind: Kind) -> Outputs:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoModelForTextEncoding

    classifies = kind == "classifications"
    loader = AutoModelForSequenceClassification if classifies else AutoModel
    try:
        config = AutoConfig.from_pretrained(str(directory))
        named = config.architectures or [""]
        if not classifies and (named[0].endswith("EncoderModel") or config.is_encoder_decoder):
            loader = AutoModelForTextEncoding  # the half of T5 that reads, also of a whole one
        loaded, report = loader.from_pretrained(
            str(directory), dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{directory.name}: cannot be loaded as an encoder ({reason})") from error
    # The pooler is a layer of BERT's that neither way of use reads, except by a classifier.
    missing = sorted(key for key in report["missing_keys"] if classifies or "pooler." not in key)
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ModelError(f"{directory.name}: {type(loaded).__name__} needs weights that are not there: {shown}")
    model = loaded.eval()

    def outputs(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        found = model(input_ids=ids_BT, attention_mask=mask_BT)
        return (found.logits if classifies else found.last_hidden_state).float()

    return outputs


def _graph(directory: Path, kind: Kind) -> Outputs:
    session = open_session(directory / "model.onnx", torch.get_num_threads(), spinning=False)
    result = "logits" if kind == "classifications" else "last_hidden_state"
    offered = [item.name for item in session.get_outputs()]
    if result not in offered:
        raise ModelError(
            f"{directory.name}: its ONNX graph gives {', '.join(offered)}, {kind} need {result}; quantise a directory "
            + ("of a classifier" if kind == "classifications" else "without a head (saved by AutoModel)")
        )
    names = [item.name for item in session.get_inputs()]
    if unknown := sorted({*names} - {"input_ids", "attention_mask", "token_type_ids"}):
        raise ModelError(f"{directory.name}: its ONNX graph asks for {', '.join(unknown)}, which no encoder has")

    def outputs(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        feed: dict[str, Any] = {"input_ids": ids_BT.numpy(), "attention_mask": mask_BT.numpy()}
        feed["token_type_ids"] = torch.zeros_like(ids_BT).numpy()
        [found] = session.run([result], {name: feed[name] for name in names})
        return torch.from_numpy(found).float()

    return outputs
