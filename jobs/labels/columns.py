"""Signals as the columns of a parquet file: what the wire carries, as plain numbers.

| kind | columns of a row with n scored positions |
|---|---|
| hidden | `hidden` binary: n x D bfloat16, little-endian |
| topk | `gaps` int32 [n x K]; `logprobs` float16 [n x K] at temperature 1, or `steps` binary [n x K] with `range` |
|      | float16 [n x 2]; `tail_logmass` float32 [n x M], one for each temperature |
| sampled | `gaps` int32 [n x S]; `weights` float16 [n x S] where not all are 1 / S; `entropy` float32 [n]; |
|         | `best` int32 [n] |
| dense | `logprobs` float16 [n x C] at temperature 1 |

Token ids rise along a position and are stored as the steps between them, which compress below the wire's code:
`ids = np.cumsum(np.reshape(gaps, (n, K)), axis=1)`. A log-probability in 8 bits is
`lowest + (step - 1) * (highest - lowest) / 254`, and step 0 is minus infinity.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from services.teacher.packing import pack_ids
from services.teacher.signals import DenseSignal, HiddenSignal, SampledSignal, Signal, SignalSpec, TopkSignal

_BINARY = (np.uint8, np.uint16)
"""Parquet would spend four bytes on each."""


def columns_of(signal: Signal) -> dict[str, np.ndarray]:
    """Fields of a signal, each [N, ...], by the name of its column."""
    match signal:
        case HiddenSignal():
            return {"hidden": signal.hidden_ND}
        case DenseSignal():
            return {"logprobs": signal.logprobs_NC}
        case TopkSignal():
            ids_NK, _ = signal.entries()
            columns = {"gaps": _gaps(ids_NK), "tail_logmass": signal.tail_logmass_NM}
            if signal.range_N2 is None:
                return {**columns, "logprobs": signal.logprobs_NK}
            return {**columns, "steps": signal.logprobs_NK, "range": signal.range_N2}
        case SampledSignal():
            ids_NS, _ = signal.entries()
            columns = {"gaps": _gaps(ids_NS), "entropy": signal.entropy_N, "best": signal.best_N}
            return columns if signal.weights_NS is None else {**columns, "weights": signal.weights_NS}


def signal_of(columns: dict[str, np.ndarray], spec: SignalSpec, num_positions: int) -> Signal:
    """The signal that `columns_of` took apart; the columns are flat.

    Raises:
        KeyError, ValueError: these are not the columns of such a signal of so many positions.
    """

    def field(name: str, *shape: int) -> np.ndarray:
        return columns[name].reshape(num_positions, *shape)

    if spec.kind == "hidden":
        width = len(columns["hidden"]) // num_positions if num_positions else 0
        return HiddenSignal(field("hidden", width))
    if spec.kind == "dense":
        return DenseSignal(field("logprobs", spec.vocab_size))
    if spec.kind == "sampled":
        ids_NW = pack_ids(field("gaps", spec.draws).cumsum(-1), spec.vocab_size)
        weights_NS = None if spec.proposal == 1.0 else field("weights", spec.draws)
        return SampledSignal(ids_NW, weights_NS, field("entropy"), field("best"), spec.draws, spec.vocab_size)
    ids_NW = pack_ids(field("gaps", spec.kept).cumsum(-1), spec.vocab_size)
    tails_NM = field("tail_logmass", len(spec.temperatures))
    if spec.logprob_bits == 16:
        values_NK, range_N2 = field("logprobs", spec.kept), None
    else:
        values_NK, range_N2 = field("steps", spec.kept), field("range", 2)
    return TopkSignal(ids_NW, values_NK, range_N2, tails_NM, spec.temperatures, spec.vocab_size)


def _gaps(ids_NK: np.ndarray) -> np.ndarray:
    return np.diff(ids_NK, axis=-1, prepend=0).astype(np.int32)


def to_arrow(rows: list[np.ndarray]) -> pa.Array:
    """One cell for each array, flattened."""
    dtype = rows[0].dtype
    if dtype in _BINARY:
        return pa.array([np.ascontiguousarray(row).astype(dtype.newbyteorder("<")).tobytes() for row in rows])
    return pa.array([row.reshape(-1) for row in rows], pa.list_(pa.from_numpy_dtype(dtype)))


def from_arrow(cell: Any, name: str) -> np.ndarray:
    """The flat array of a cell that `to_arrow` made, not to be written to."""
    if isinstance(cell, pa.BinaryScalar):
        return np.frombuffer(cell.as_buffer(), np.dtype("<u2") if name == "hidden" else np.uint8)
    return cell.values.to_numpy(zero_copy_only=False)
