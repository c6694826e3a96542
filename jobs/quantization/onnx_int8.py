"""ONNX with dynamic int8, run by onnxruntime: weights of products in int8 with one scale per channel, activations
quantised as they come, over a whole batch. An embedding has one scale for all of it, and so has a head that is tied to
it, whose product is then formed in float from the unpacked weights.

The graph is the whole model without a cache: token ids and position ids in, logits out. Good for scoring; generating
with it recomputes the prompt at every token.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cluster.grid import pack
from cluster.language_model import load_causal_lm
from jobs.evaluating.scorers import context_tokens
from jobs.scoring import TextScore
from jobs.training.data import MicroBatch


class _LogitsOnly(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits


def quantize(student: str, directory: Path) -> dict[str, str]:
    """Writes `model.onnx` and the model's config to a directory; returns the versions that made it."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = load_causal_lm(student)
    directory.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(directory)
    (directory / "parameters.json").write_text(json.dumps({"parameters": model.num_parameters()}))
    example = torch.arange(2 * 8).reshape(2, 8) % model.config.vocab_size
    positions = torch.arange(8).repeat(2, 1)
    with tempfile.TemporaryDirectory(prefix="raystill-onnx-") as name:
        exported = Path(name) / "float.onnx"
        shape = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        torch.onnx.export(
            _LogitsOnly(model).eval(),
            (example, positions),
            str(exported),
            input_names=["input_ids", "position_ids"],
            output_names=["logits"],
            dynamic_shapes=(shape, shape),
            dynamo=True,
            verbose=False,
        )
        quantize_dynamic(exported, directory / "model.onnx", per_channel=True, weight_type=QuantType.QInt8)
    return {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}


class OnnxScorer:
    """An ONNX artefact on the CPU."""

    def __init__(self, directory: Path, threads: int) -> None:
        import onnxruntime
        from transformers import AutoConfig

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.parameters = int(json.loads((directory / "parameters.json").read_text())["parameters"])
        config = AutoConfig.from_pretrained(str(directory)).get_text_config()
        self.vocab_size, self.max_tokens = int(config.vocab_size), context_tokens(config)

    def logits(self, batch: MicroBatch) -> Tensor:
        grid = pack(batch.token_ids, batch.sequence_lengths)
        logits_BTV = self._run(grid.token_ids_BT, grid.position_ids_BT)
        flat = logits_BTV.reshape(-1, logits_BTV.shape[-1])
        return torch.from_numpy(flat[grid.index_S[batch.positions]])

    def logit_chunks(self, batch: MicroBatch, size: int) -> Iterator[Tensor]:
        yield from self.logits(batch).split(size)

    def greedy(self, prompt: list[int], num_tokens: int) -> Iterator[int]:
        """Without a cache: the whole sequence is read anew for every token."""
        token_ids = list(prompt)
        for _ in range(num_tokens):
            positions_T = np.arange(len(token_ids), dtype=np.int64)
            logits_BTV = self._run(np.array([token_ids], np.int64), positions_T[None])
            token_ids.append(int(logits_BTV[0, -1].argmax()))
            yield token_ids[-1]

    def _run(self, token_ids_BT: np.ndarray, position_ids_BT: np.ndarray) -> np.ndarray:
        logits_BTV: np.ndarray = self._session.run(
            ["logits"], {"input_ids": token_ids_BT, "position_ids": position_ids_BT}
        )[0]
        return logits_BTV

    def score(self, batch: MicroBatch) -> TextScore:
        losses_n = nn.functional.cross_entropy(self.logits(batch), torch.from_numpy(batch.targets), reduction="none")
        return TextScore(losses_n.sum(dtype=torch.float64).item(), len(batch.targets), batch.num_bytes)
