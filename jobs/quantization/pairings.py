"""Which scheme goes with which model on which processor; what does not is refused before any work. No torch here."""

import importlib.util
import platform
from dataclasses import dataclass
from typing import Any, Literal

from cluster.environments import environment_problem
from cluster.errors import ConfigError
from cluster.model_directory import architecture_kind
from jobs.quantization.config import QuantizationScheme, QuantizeConfig

ModelKind = Literal["decoder", "conv1d_decoder", "encoder", "encoder_decoder"]
"""A causal language model with linear layers; one of GPT-2's kind, whose layers are no `nn.Linear`; BERT's kind, by
itself or with a head on top; one of T5's kind, which goes with no scheme."""

_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_OTHER_HEADS = (
    *("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice", "ForNextSentencePrediction"),
    "ForPreTraining",
)
"""Of encoders too, though nothing here measures or serves them; `quantize-encoder` refuses them."""
_INSTALL = "python -m venv ENV && ENV/bin/pip install llmcompressor==0.13.0"


@dataclass(frozen=True)
class Pairing:
    """What a scheme goes with.

    Args:
        kinds: of models.
        else_: by the other kinds, why not.
    """

    kinds: tuple[ModelKind, ...]
    else_: dict[ModelKind, str]


_NO_LINEAR = "its layers are Conv1D, of which torchao quantises none: take onnx_int8"
_NO_NEXT_TOKEN = "its fine-tuning distils next tokens, which an encoder has none of: take onnx_int8"
_NO_ENCODER = "llm-compressor's GPTQ is for decoders: take onnx_int8"

PAIRINGS: dict[QuantizationScheme, Pairing] = {
    "int8_weight_only": Pairing(("decoder", "encoder"), {"conv1d_decoder": _NO_LINEAR}),
    "int8_dynamic": Pairing(("decoder", "encoder"), {"conv1d_decoder": _NO_LINEAR}),
    "int4_qat": Pairing(("decoder",), {"conv1d_decoder": _NO_LINEAR, "encoder": _NO_NEXT_TOKEN}),
    "onnx_float32": Pairing(("decoder", "conv1d_decoder", "encoder"), {}),
    "onnx_int8": Pairing(("decoder", "conv1d_decoder", "encoder"), {}),
    "onnx_int4": Pairing(("decoder", "conv1d_decoder", "encoder"), {}),
    "compressed_tensors_w4a16": Pairing(("decoder",), {"conv1d_decoder": _NO_LINEAR, "encoder": _NO_ENCODER}),
}


def model_kind(config: Any) -> ModelKind:
    """The kind of a model, by the architecture that its Hugging Face config names."""
    if config.model_type in _CONV1D:
        return "conv1d_decoder"
    named = str(next(iter(getattr(config, "architectures", None) or []), ""))
    if getattr(config, "is_encoder_decoder", False) and not named.endswith("EncoderModel"):
        return "encoder_decoder"
    generates = architecture_kind(named) == "language_model" and not named.endswith(_OTHER_HEADS)
    return "decoder" if generates else "encoder"


def check_pairings(config: QuantizeConfig, model: Any, option: str = "quantize.schemes") -> None:
    """Looks at every scheme beside the student before anything is made.

    Args:
        model: the student's Hugging Face config; None where it is not known yet.
        option: where the schemes were named, for messages.

    Raises:
        ConfigError: a scheme that this model or this machine cannot have; the message says why and what to take.
    """
    for scheme in config.schemes:
        if model is not None:
            _check_kind(scheme, model, option)
        if (problem := _problem_with_the_machine(scheme, config)) is not None:
            raise ConfigError(f"{option} has {scheme}: {problem}")


def _check_kind(scheme: QuantizationScheme, model: Any, option: str) -> None:
    pairing, kind = PAIRINGS[scheme], model_kind(model)
    if kind == "encoder_decoder":
        raise ConfigError(
            f"the model is a {model.model_type}, whose encoder and decoder are two models in one: no scheme "
            "quantises those; take a model that is one or the other"
        )
    if kind not in pairing.kinds:
        raise ConfigError(
            f"{option} has {scheme}, the model is a {model.model_type}: {pairing.else_[kind]}"
            + (", and in promote.scheme too if it is named there" if option == "quantize.schemes" else "")
        )
    if scheme == "int4_qat" and (wide := _not_divisible(model)) is not None:
        raise ConfigError(f"{option} has int4_qat, the model's {wide} is no multiple of 32, its block: take onnx_int4")


def _problem_with_the_machine(scheme: QuantizationScheme, config: QuantizeConfig) -> str | None:
    if scheme == "compressed_tensors_w4a16":
        return llmcompressor_problem(config.llmcompressor_python)
    if scheme == "int8_dynamic" and platform.machine() not in ("x86_64", "AMD64", "aarch64", "arm64"):
        return f"torch has no 8-bit products for {platform.machine()}: take int8_weight_only"
    return None


def _not_divisible(model: Any) -> str | None:
    for name in ("hidden_size", "intermediate_size"):
        value = getattr(model, name, None)
        if isinstance(value, int) and value % 32:
            return f"{name}={value}"
    return None


def llmcompressor_problem(python: str | None) -> str | None:
    """Why llm-compressor cannot be used, with the lines that install it; None if it can."""
    if python is None:
        return (
            f"it needs llm-compressor in an environment of its own: {_INSTALL}, then "
            "quantize.llmcompressor_python=ENV/bin/python"
        )
    option = "quantize.llmcompressor_python"
    if (problem := environment_problem(option, python, "llm-compressor", "llmcompressor", _INSTALL)) is not None:
        return problem
    if importlib.util.find_spec("compressed_tensors") is None:
        return "transformers reads it back with compressed-tensors: pip install 'raystill[gptq]'"
    return None
