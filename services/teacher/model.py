"""The teacher's forward pass: token ids in, signals out. Knows torch, not Ray.

Prefill only: no cache, no decoding. Waiting requests are packed into one grid with next to no padding; the head runs in
chunks, only on the positions asked for, and not at all for `hidden`.
"""

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from cluster.errors import TeacherFailed
from cluster.grid import Grid, pack
from cluster.language_model import choose_dtype, hidden_states, load_causal_lm, split
from cluster.pretrained import load_tokenizer, locate, model_fingerprint, tokenizer_fingerprint
from services.teacher.schema import ScoreReply, ScoreRequest, TeacherDescription
from services.teacher.scoring import signal_of
from services.teacher.signals import HeadRecord, SignalKind

_DEFAULT_CONTEXT = 1 << 20


@dataclass(frozen=True)
class _Prepared:
    """Several requests as one grid."""

    grid: Grid
    index_N: np.ndarray
    """Where the scored positions of all requests lie in the flattened grid."""
    rows: list[int]
    """How many of them each request has."""


class TeacherModel:
    """A causal language model that answers what it thinks of given tokens.

    Args:
        model: anything `cluster.pretrained.locate` takes.
        dtype: `float32`, `bfloat16`, or `auto`: bfloat16 where the processor multiplies it.
        tokenizer: where the tokenizer lies, if not beside the weights.
        max_request_tokens: larger requests are refused.
    """

    def __init__(
        self, model: str, dtype: str = "auto", tokenizer: str | None = None, max_request_tokens: int = 1 << 20
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = choose_dtype(dtype, self.device)
        directory = locate(model)
        loaded = load_causal_lm(directory, self.dtype).to(self.device)
        self._body, self._head = split(loaded)
        self._turn = threading.Lock()
        context = getattr(loaded.config, "max_position_embeddings", None)
        self._description = TeacherDescription(
            fingerprint=f"{model_fingerprint(Path(directory))}-{str(self.dtype).removeprefix('torch.')}",
            tokenizer_fingerprint=tokenizer_fingerprint(load_tokenizer(tokenizer or directory)),
            vocab_size=self._head.vocab_size,
            hidden_size=self._head.weight_VD.shape[1],
            max_sequence_tokens=context or _DEFAULT_CONTEXT,
            max_request_tokens=max_request_tokens,
            dtype=str(self.dtype).removeprefix("torch."),
        )

    def describe(self) -> TeacherDescription:
        return self._description

    def head(self) -> HeadRecord:
        """The output head, in the dtype in which the teacher uses it."""
        weight = self._head.weight_VD.detach().cpu()
        bias = self._head.bias_V
        return HeadRecord(
            fingerprint=self._description.fingerprint,
            weight_VD=weight.view(torch.uint16).numpy() if weight.dtype == torch.bfloat16 else weight.numpy(),
            bias_V=None if bias is None else bias.detach().float().cpu().numpy(),
            scale=self._head.scale,
            soft_cap=self._head.soft_cap,
        )

    @torch.inference_mode()
    def score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        """Answers several requests with one forward pass; none sees another. Callers in several threads take turns
        with the model, and prepare and pack while another has it.

        Raises:
            TeacherFailed: a request that can never be answered; nothing is computed then.
        """
        for request in requests:
            self.check(request)
        prepared = _prepare(requests)
        with self._turn:
            started = time.perf_counter()
            rows_ND = self._forward(prepared)
            signals = [
                signal_of(hidden_ND, self._head, request)
                for request, hidden_ND in zip(requests, rows_ND.split(prepared.rows), strict=True)
            ]
            seconds_per_token = (time.perf_counter() - started) / sum(request.num_tokens for request in requests)
        return [
            ScoreReply(
                request.request_id,
                self._description.fingerprint,
                request.num_tokens,
                signal(),
                seconds_per_token * request.num_tokens,
            )
            for request, signal in zip(requests, signals, strict=True)
        ]

    def check(self, request: ScoreRequest) -> None:
        """Raises `TeacherFailed` if this request can never be answered."""
        problem = self._problem(request)
        if problem is not None:
            raise TeacherFailed(f"request {request.request_id} was refused: {problem}")

    def _problem(self, request: ScoreRequest) -> str | None:
        tokens, lengths, positions = request.token_ids, request.sequence_lengths, request.positions
        spec, teacher = request.spec, self._description
        for name, array in (("token_ids", tokens), ("sequence_lengths", lengths), ("positions", positions)):
            if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
                return f"{name} must be integers in one row, found {array.dtype} of shape {array.shape}"
        total = int(lengths.sum(dtype=np.int64))
        if len(tokens) == 0 or total != len(tokens) or int(lengths.min()) < 1:
            return f"{len(tokens)} tokens do not match {len(lengths)} sequences of {total} tokens"
        if len(tokens) > teacher.max_request_tokens:
            return f"{len(tokens)} tokens, at most {teacher.max_request_tokens} are answered at once"
        if int(lengths.max()) > teacher.max_sequence_tokens:
            return (
                f"a sequence of {int(lengths.max())} tokens, this teacher takes at most {teacher.max_sequence_tokens}"
            )
        if int(tokens.min()) < 0 or int(tokens.max()) >= teacher.vocab_size:
            return f"token ids outside 0..{teacher.vocab_size - 1}"
        if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < len(tokens):
            return f"positions outside 0..{len(tokens) - 1}"
        if spec.kind not in get_args(SignalKind):
            return f"signal {spec.kind!r} is not known here; known: {', '.join(get_args(SignalKind))}"
        if not 1 <= spec.vocab_size <= teacher.vocab_size:
            return f"{spec.vocab_size} vocabulary columns, this teacher has {teacher.vocab_size}"
        temperatures = spec.temperatures
        if spec.kind == "topk" and not (spec.top_k > 0 and temperatures and all(0 < t < np.inf for t in temperatures)):
            return f"top_k={spec.top_k} at temperatures {temperatures}: at least one of each, all positive"
        if spec.kind == "topk" and spec.logprob_bits not in (16, 8):
            return f"log-probabilities of {spec.logprob_bits} bits: 16 or 8"
        if spec.kind == "sampled" and not (len(temperatures) == 1 and 0 < temperatures[0] < np.inf):
            return f"sampled at temperatures {temperatures}: one, positive"
        if spec.kind == "sampled" and not (spec.draws > 0 and 0 < spec.proposal < np.inf and request.seed >= 0):
            return f"draws={spec.draws}, proposal={spec.proposal}, seed={request.seed}: all positive"
        return None

    def _forward(self, prepared: _Prepared) -> Tensor:
        hidden_BTD = hidden_states(
            self._body,
            torch.from_numpy(prepared.grid.token_ids_BT).to(self.device),
            torch.from_numpy(prepared.grid.position_ids_BT).to(self.device),
        )
        return hidden_BTD.flatten(0, 1)[torch.from_numpy(prepared.index_N).to(self.device)]


def _prepare(requests: list[ScoreRequest]) -> _Prepared:
    grid = pack(
        np.concatenate([request.token_ids for request in requests]),
        np.concatenate([request.sequence_lengths for request in requests]),
    )
    firsts = np.cumsum([0, *(request.num_tokens for request in requests)])
    positions = [first + request.positions for first, request in zip(firsts, requests, strict=False)]
    return _Prepared(grid, grid.index_S[np.concatenate(positions)], [len(request.positions) for request in requests])
