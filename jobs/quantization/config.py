"""What `quantize` in a config may say. Imports neither torch nor ray."""

from typing import Literal

from pydantic import Field

from cluster.config import Config, execution

QuantizationScheme = Literal[
    "int8_weight_only",
    "int8_dynamic",
    "int4_qat",
    "onnx_float32",
    "onnx_int8",
    "onnx_int4",
    "compressed_tensors_w4a16",
]

ON_ONNXRUNTIME = ("onnx_float32", "onnx_int8", "onnx_int4", "int4_qat")
"""Schemes whose artefact is an ONNX graph."""
GRAPH_FORM = 2
"""Of the graphs, counted up when what goes in and out changes: what was made in an earlier form is made anew."""


class QatConfig(Config):
    """The fine-tuning of `int4_qat`: the run's own loss and rows, weights rounded to 4 bits in each forward pass."""

    steps: int = Field(100, ge=1)
    batch_rows: int = Field(8, ge=1)
    """Rows of a step."""
    learning_rate: float = Field(1e-4, gt=0)
    """Falls to a tenth along a cosine."""
    max_minutes: float = Field(30, gt=0)
    """Training stops after this long with the steps that it made; what it made is in the artefact's manifest."""


class QuantizeConfig(Config):
    schemes: list[QuantizationScheme] = Field(["int8_weight_only", "onnx_int8"], min_length=1)
    """Each makes an artefact, which is reloaded and measured. `int8_weight_only`, `int8_dynamic`: torchao, safetensors.
    `onnx_int8`, `onnx_int4`: a graph for onnxruntime; `onnx_float32`: one whose weights are not rounded. `int4_qat`:
    `onnx_int4`, trained for its 4 bits first.
    `compressed_tensors_w4a16`: GPTQ by llm-compressor, for vLLM."""
    qat: QatConfig = QatConfig()
    calibration_rows: int = Field(128, ge=1)
    """Rows of the example store that GPTQ sees."""
    llmcompressor_python: str | None = execution(None)
    """The Python of an environment in which llm-compressor is installed; it cannot share that of raystill."""
