"""An encoder in memory, float or quantised: rows of token ids in, its output out.

Axes: B rows, T tokens of the longest, L labels, D hidden width.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.encoder_texts import read_pad_id
from cluster.errors import ModelError
from jobs.quantization.config import ON_ONNXRUNTIME
from jobs.quantization.loading import model_class
from jobs.quantization.onnx_export import GRAPH


class EncoderScorer:
    """Loads a directory by its scheme: `float`, or one that goes with encoders (`jobs.quantization.pairings`).

    Raises:
        ModelError: the directory cannot be loaded, or is a classifier without an id to pad with.
    """

    def __init__(self, directory: Path, scheme: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._pad_id = read_pad_id(directory)
        self._session: Any = None
        try:
            if scheme in ON_ONNXRUNTIME:
                self._session = _session(directory / GRAPH, threads)
                self._names = [item.name for item in self._session.get_inputs()]
            else:
                if scheme != "float":
                    import torchao  # noqa: F401  # registers the tensor types that the file names

                found = model_class(str(directory)).from_pretrained(str(directory), use_safetensors=True)
                self._model = found.float().eval() if scheme == "float" else found.eval()
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"model {directory}: cannot be loaded as {scheme} ({reason})") from error

    @torch.inference_mode()
    def outputs(self, rows: list[list[int]]) -> Tensor:
        """Logits [B, L] of a classifier, the last hidden state [B, T, D] of what embeds; float32.

        Shorter rows are filled up behind their end, where the output means nothing.
        """
        longest = max(map(len, rows))
        ids_BT = np.array([row + [self._pad_id] * (longest - len(row)) for row in rows], np.int64)
        mask_BT = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in rows], np.int64)
        if self._session is not None:
            feed = {"input_ids": ids_BT, "attention_mask": mask_BT, "token_type_ids": np.zeros_like(ids_BT)}
            [found] = self._session.run(None, {name: feed[name] for name in self._names})
            return torch.from_numpy(found)
        output = self._model(input_ids=torch.from_numpy(ids_BT), attention_mask=torch.from_numpy(mask_BT))
        return (output.logits if hasattr(output, "logits") else output.last_hidden_state).float()


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
