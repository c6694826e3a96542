"""From a torch module to `model.onnx`, for whatever says what its inputs are (`onnx_decoder`, `onnx_encoder`)."""

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from cluster.language_model import load_causal_lm
from jobs.quantization.blocks import use_blocks

GRAPH = "model.onnx"
FACTS = "parameters.json"
_LARGEST_FILE = 1 << 30
"""Bytes of weights up to which a graph is one file; protobuf ends at twice that."""


@dataclass(frozen=True)
class Signature:
    """What goes into a graph and comes out: example tensors, their free axes as torch.export wants them, names, and
    what stands for the inputs that need not be given."""

    arguments: tuple[Any, ...]
    dynamic_shapes: tuple[Any, ...]
    inputs: list[str]
    outputs: list[str]
    defaults: dict[str, torch.Tensor] = field(default_factory=dict)


class Exportable(Protocol):
    """A module around a transformers model."""

    model: Any

    def signature(self) -> Signature: ...


def export_blocks(student: str, directory: Path, body_bits: int) -> dict[str, str]:
    """Rounds a student's weights to blocks (`jobs.quantization.blocks`) and exports it; returns the versions that made
    it.

    Raises:
        QuantizationFailed: a family whose cache is not what it seems.
    """
    module, parameters = exportable(student)
    use_blocks(module.model, body_bits)
    return export(module, parameters, directory)


def exportable(student: str) -> tuple[Exportable, int]:
    """A student in float32 as what can be exported, and the number of its parameters.

    Raises:
        QuantizationFailed: a family whose cache is not what it seems.
    """
    from jobs.quantization.loading import model_class, read_config
    from jobs.quantization.onnx_decoder import decoder_of
    from jobs.quantization.onnx_encoder import Encoder
    from jobs.quantization.pairings import model_kind

    if model_kind(read_config(student)) == "encoder":
        model = model_class(student).from_pretrained(student, dtype=torch.float32, use_safetensors=True).eval()
        model.config.architectures = [type(model).__name__]
        return Encoder(model), model.num_parameters()
    model = load_causal_lm(student)
    return decoder_of(model), model.num_parameters()


def export(module: Any, parameters: int, directory: Path) -> dict[str, str]:
    """Writes `model.onnx`, and `model.onnx.data` where the weights are many, with the model's config to a directory;
    returns the versions that made it.

    Args:
        module: an `Exportable`.
        parameters: of the model; its layers may have been replaced by now.
    """
    import onnx
    import onnx_ir
    import onnxruntime
    from onnx_ir.passes.common import DeduplicateInitializersPass

    model, signature = module.model, module.signature()
    directory.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(directory)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(directory)
    (directory / FACTS).write_text(json.dumps({"parameters": parameters}))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            signature.arguments,
            input_names=signature.inputs,
            output_names=signature.outputs,
            dynamic_shapes=signature.dynamic_shapes,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    DeduplicateInitializersPass()(program.model)
    for item in program.model.graph.inputs:
        if item.name in signature.defaults:
            item.const_value = onnx_ir.tensor(signature.defaults[item.name].numpy(), name=item.name)
            program.model.graph.register_initializer(item)
    for node in program.model.graph:  # where in whose source each came from: a third of a small artefact
        node.metadata_props.clear()
        node.doc_string = None
    program.model.metadata_props.clear()
    weights = sum(item.const_value.nbytes for item in program.model.graph.initializers.values() if item.const_value)
    program.save(str(directory / GRAPH), external_data=weights > _LARGEST_FILE)
    return {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
