"""What is measured of every model goes through one interface: float, quantised, or an ONNX graph."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from cluster.published import localize
from jobs.quantization.config import ON_ONNXRUNTIME


class Scorer(Protocol):
    """A loaded model that can score text."""

    parameters: int
    vocab_size: int
    """Columns of its logits."""
    max_tokens: int | None
    """The longest sequence that it takes, if its config says so."""

    def score(self, batch: Any) -> Any:
        """The `jobs.scoring.TextScore` of a micro-batch."""

    def logits(self, batch: Any) -> Any:
        """Logits [N, V], float32, of a micro-batch's scored positions."""

    def logit_chunks(self, batch: Any, size: int) -> Iterator[Any]:
        """The same in chunks of `size` positions; the last one is shorter."""

    def greedy(self, prompt: list[int], num_tokens: int) -> Iterator[int]:
        """The most likely continuation of a prompt, token by token, each as soon as it is known."""


def load_scorer(model: str, scheme: str, threads: int) -> Scorer:
    """Loads a model directory by its scheme: `float`, or one of `jobs.quantization.config`."""
    if scheme in ON_ONNXRUNTIME:
        from jobs.quantization.onnx_scorer import OnnxScorer

        return OnnxScorer(localize(model), threads)
    from jobs.quantization.torch_scorer import TorchScorer

    return TorchScorer(model, threads)


def context_tokens(config: Any) -> int | None:
    """The longest sequence that a Hugging Face config allows, or None if it does not say."""
    named = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_sequence_length")]
    return min((limit for limit in named if isinstance(limit, int) and limit > 0), default=None)


def model_bytes(model: str) -> int:
    """Size on disk of a model's weights."""
    from cluster.pretrained import locate

    directory = Path(locate(model))
    if not directory.is_dir():
        from huggingface_hub import snapshot_download

        directory = Path(snapshot_download(str(directory), local_files_only=True))
    files = [path for pattern in ("*.safetensors", "*.onnx", "*.onnx.data") for path in directory.glob(pattern)]
    return sum(path.stat().st_size for path in files)
