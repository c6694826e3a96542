"""Decoders as ONNX graphs (`jobs.quantization.onnx_decoder` makes them), run with keys and values that stay in place.

Axes: B rows, T new tokens, S tokens of a row with the new ones, H heads of keys and values, L columns of a cache, D
width of a head, N tokens whose logits are wanted, V vocabulary.
"""

from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import ModelError

_PAST, _PRESENT, _FIRST_LOGITS = "past_key_values.", "present.", "logits_from"
_ERRORS_ONLY = 3


def open_session(path: Path, threads: int, spinning: bool = True) -> Any:
    """A session on the CPU.

    Args:
        spinning: whether threads that wait for a part of a product keep their core, which is faster where nothing else
            wants it.

    Raises:
        ModelError: the file cannot be loaded.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _ERRORS_ONLY
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no base class
        raise ModelError(f"{path.name} cannot be loaded ({str(error).splitlines()[0]})") from error


def has_cache(session: Any) -> bool:
    return any(item.name.startswith(_PAST) for item in session.get_inputs())


class CachedGraph:
    """A session whose graph has inputs and outputs for keys and values.

    Raises:
        ModelError: it cannot keep them in place, as graphs of other programs and earlier versions, or lacks an output.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        inputs = {item.name: item for item in session.get_inputs()}
        outputs = {item.name: item for item in session.get_outputs()}
        self._pasts = [name for name in inputs if name.startswith(_PAST)]
        self._presents = [_PRESENT + name.removeprefix(_PAST) for name in self._pasts]
        missing = sorted({"logits", *self._presents} - set(outputs))
        if missing:
            raise ModelError(f"the ONNX graph has no output {missing[0]} for its input of keys and values")
        if _FIRST_LOGITS not in {item.name for item in session.get_overridable_initializers()}:
            raise ModelError(
                f"the ONNX graph cannot keep its keys and values in place (it has no input {_FIRST_LOGITS}), as one of "
                "another program or of an earlier raystill: make it with raystill quantize"
            )
        _, self.heads, _, self.width = inputs[self._pasts[0]].shape
        self.num_caches = len(self._pasts)
        self.vocab_size: int = outputs["logits"].shape[-1]

    def run(
        self,
        token_ids_BT: np.ndarray,
        positions_BT: np.ndarray,
        mask_BS: np.ndarray,
        caches: list[np.ndarray],
        logits_from: int = 0,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Reads tokens; returns float32 logits [B, N, V] of those from `logits_from` on.

        Args:
            token_ids_BT, positions_BT, mask_BS: int64.
            caches: float32 [B, H, L, D], contiguous, keys and values of each layer in turn; the new ones are written
                into them, in front of the last column that the row's mask calls real.
            out: where the logits go.
        """
        from onnxruntime import OrtValue

        rows, new = token_ids_BT.shape
        if out is None:
            out = np.empty((rows, new - logits_from, self.vocab_size), np.float32)
        binding = self._session.io_binding()
        given = {
            "input_ids": token_ids_BT,
            "position_ids": positions_BT,
            "attention_mask": mask_BS,
            _FIRST_LOGITS: np.array(logits_from),
        }  # which owns this memory for as long as the graph runs
        for name, value in given.items():
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(value))
        for past, present, cache in zip(self._pasts, self._presents, caches, strict=True):
            where = ("cpu", 0, np.float32, cache.shape, cache.__array_interface__["data"][0])
            binding.bind_input(past, *where)
            binding.bind_output(present, *where)
        binding.bind_output("logits", "cpu", 0, np.float32, out.shape, out.__array_interface__["data"][0])
        self._session.run_with_iobinding(binding)
        return out
