"""A teacher in this process, and what every teacher must answer: the contract, wherever the teacher runs."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cluster.errors import TeacherFailed
from services.teacher.client import ClientCounters, TeacherAnswers
from services.teacher.model import TeacherModel
from services.teacher.schema import ScoreReply, ScoreRequest, TeacherDescription, check_reply
from services.teacher.signals import DenseSignal, HeadRecord, HiddenSignal, SampledSignal, SignalSpec, TopkSignal

HALF = 8e-3
"""Error of a float16 log-probability down to -16: half a unit in the last place, 2^-8, and that of the arithmetic."""
TEMPERATURES = (1.0, 2.0, 4.0)


class InProcessTeacher:
    """A `TeacherModel` behind the client's interface: no Ray, the same checks, requests answered in a thread."""

    def __init__(self, model: TeacherModel) -> None:
        self.counters = ClientCounters()
        self._model, self._lock = model, threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher")

    def describe(self) -> TeacherDescription:
        return self._model.describe()

    def head(self) -> HeadRecord:
        return self._model.head()

    def submit(self, request: ScoreRequest) -> "Future[ScoreReply]":
        return self._thread.submit(self._score, request)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _score(self, request: ScoreRequest) -> ScoreReply:
        with self._lock:
            self.counters.calls += 1
        [reply] = self._model.score([request])
        problem = check_reply(request, reply, self.describe().fingerprint)
        if problem is not None:
            raise TeacherFailed(f"the answer to request {request.request_id} {problem}")
        return reply


def make_request(
    lengths: list[int],
    spec: SignalSpec,
    seed: int = 0,
    positions: list[int] | None = None,
    name: str = "request",
    vocab_size: int = 320,
) -> ScoreRequest:
    """Random sequences of these lengths; by default every position is scored."""
    total = sum(lengths)
    return ScoreRequest(
        name,
        np.random.default_rng(seed).integers(0, vocab_size, total).astype(np.int32),
        np.array(lengths, np.int32),
        np.arange(total, dtype=np.int32) if positions is None else np.array(positions, np.int32),
        spec,
    )


def reference_logits(model: Any, request: ScoreRequest) -> torch.Tensor:
    """Logits [N, V] in float64 from transformers' own forward, each sequence alone, nothing of ours in between."""
    starts = np.cumsum(request.sequence_lengths) - request.sequence_lengths
    rows = []
    with torch.no_grad():
        for start, length in zip(starts, request.sequence_lengths, strict=True):
            ids = torch.from_numpy(request.token_ids[start : start + length].astype(np.int64))[None]
            rows.append(model(input_ids=ids, use_cache=False).logits[0])
    return torch.cat(rows)[torch.from_numpy(request.positions.astype(np.int64))].double()


def assert_contract(teacher: TeacherAnswers, model: Any) -> None:
    """Row n of every kind of signal is the teacher's distribution of the token that FOLLOWS `positions[n]`.

    Tolerances. `topk` and `dense` are float32 arithmetic rounded to float16: log-probabilities to `HALF`, float32
    tails to 1e-4. `hidden` is rounded to bfloat16 (8 bits), and the head turns that into an error of the logits: 2 %
    of the largest one bounds it for these models.
    """
    described, head = teacher.describe(), teacher.head()
    columns = described.vocab_size - 3
    shuffled = [30, 0, 16, 17, 5, 4, 21]  # a sequence's last token too, and not in order
    for seed, positions in ((1, None), (2, shuffled)):
        lengths = [17, 1, 13]
        for name, spec in contract_specs(columns).items():
            request = make_request(lengths, spec, seed, positions, f"{name}-{seed}")
            reply = teacher.submit(request).result(60)
            assert reply.request_id == request.request_id
            assert reply.teacher_fingerprint == described.fingerprint == head.fingerprint
            assert (reply.num_tokens, len(reply.signal)) == (31, len(request.positions))
            _assert_signal(reply.signal, head, reference_logits(model, request)[:, :columns], spec)


def contract_specs(columns: int) -> dict[str, SignalSpec]:
    """One of each kind, with its options."""
    topk = SignalSpec("topk", columns, 7, TEMPERATURES)
    return {
        "hidden": SignalSpec("hidden", columns),
        "topk": topk,
        "topk, 8 bits": replace(topk, logprob_bits=8),
        "sampled": SignalSpec("sampled", columns, temperatures=(2.0,), draws=9),
        "sampled, weighted": SignalSpec("sampled", columns, draws=9, proposal=0.5),
        "dense": SignalSpec("dense", columns),
    }


def _assert_signal(signal: Any, head: HeadRecord, logits_NC: torch.Tensor, spec: SignalSpec) -> None:
    expected = torch.log_softmax(logits_NC, -1)
    if isinstance(signal, HiddenSignal):
        assert signal.hidden_ND.dtype == np.uint16
        hidden = torch.from_numpy(signal.hidden_ND).view(torch.bfloat16).double()
        weight = torch.from_numpy(head.weight_VD)
        weight = (weight.view(torch.bfloat16) if weight.dtype == torch.uint16 else weight).double()
        raw = hidden @ weight.T
        raw = (raw if head.bias_V is None else raw + torch.from_numpy(head.bias_V)) * head.scale
        found = raw if head.soft_cap is None else head.soft_cap * torch.tanh(raw / head.soft_cap)
        error = (found[:, : spec.vocab_size] - logits_NC).abs().max()
        assert error < 2e-2 * logits_NC.abs().max(), error
    elif isinstance(signal, TopkSignal):
        assert signal.temperatures == spec.temperatures
        ids_NK, logprobs_NK = (torch.from_numpy(array) for array in signal.entries())
        of_kept = expected.gather(-1, ids_NK.long())
        # By value: two tokens that are almost as likely may swap places.
        kept = expected.topk(spec.top_k).values
        torch.testing.assert_close(of_kept.sort(-1, descending=True).values, kept, atol=1e-4, rtol=0)
        step = 0.0 if spec.logprob_bits == 16 else (kept[:, :1] - kept[:, -1:]) / 254 / 2
        assert ((logprobs_NK.double() - of_kept).abs() <= HALF + step).all()
        tails = torch.from_numpy(signal.tail_logmass_NM).double()
        torch.testing.assert_close(tails, reference_tails(logits_NC, ids_NK, spec.temperatures), atol=1e-4, rtol=1e-4)
    elif isinstance(signal, SampledSignal):
        p = torch.softmax(logits_NC / spec.temperatures[0], -1)
        torch.testing.assert_close(
            torch.from_numpy(signal.entropy_N).double(), -(p * p.log()).sum(-1), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(p.gather(-1, torch.from_numpy(signal.best_N)[:, None].long())[:, 0], p.amax(-1))
        ids_NS, weights_NS = (torch.from_numpy(array) for array in signal.entries())
        proposal = torch.softmax(p.log() * spec.proposal, -1)
        found = torch.zeros_like(p).scatter_add_(-1, ids_NS.long(), weights_NS.double()) * proposal / p
        assert ((found - proposal).abs() <= 1.01 / spec.draws).all()  # systematic draws: less than one too many or few
    else:
        assert isinstance(signal, DenseSignal)
        assert signal.logprobs_NC.dtype == np.float16
        torch.testing.assert_close(torch.from_numpy(signal.logprobs_NC).double(), expected, atol=HALF, rtol=0)


def reference_tails(logits_NC: torch.Tensor, ids_NK: torch.Tensor, temperatures: tuple[float, ...]) -> torch.Tensor:
    """Log of the probability outside `ids_NK` at each temperature, in float64 from probabilities."""
    columns = []
    for temperature in temperatures:
        outside = torch.softmax(logits_NC.double() / temperature, -1).scatter(-1, ids_NK.long(), 0.0)
        columns.append(outside.sum(-1).log())
    return torch.stack(columns, -1)
