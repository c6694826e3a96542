"""From final hidden states to signals: the head, and what is kept of its logits. Pure torch.

Logits exist for a chunk of positions at a time, in float32, and are reduced in place; [N, C] is formed only where it
is the answer (`dense`), and nothing at all where the hidden states are (`hidden`).
"""

import zlib
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cluster.language_model import OutputHead
from services.teacher.schema import ScoreRequest
from services.teacher.signals import DenseSignal, HiddenSignal, SampledSignal, Signal, SignalSpec, TopkSignal

_CHUNK_ELEMENTS = 1 << 22


def signal_of(hidden_ND: Tensor, head: OutputHead, request: ScoreRequest) -> Callable[[], Signal]:
    """The signal that a request asks for, from the final hidden states at its positions.

    What is returned packs it, on the processor and without the model: somebody else may use the model meanwhile.
    """
    return _SCORERS[request.spec.kind](hidden_ND, head, request)


def _hidden(hidden_ND: Tensor, head: OutputHead, request: ScoreRequest) -> Callable[[], HiddenSignal]:
    return partial(HiddenSignal, hidden_ND.to(torch.bfloat16).cpu().view(torch.uint16).numpy())


def _dense(hidden_ND: Tensor, head: OutputHead, request: ScoreRequest) -> Callable[[], DenseSignal]:
    chunks = hidden_ND.split(_chunk(request.spec))
    logprobs = [torch.log_softmax(_logits(chunk, head, request.spec), -1).half() for chunk in chunks]
    return partial(DenseSignal, torch.cat(logprobs).cpu().numpy())


def _topk(hidden_ND: Tensor, head: OutputHead, request: ScoreRequest) -> Callable[[], TopkSignal]:
    spec = request.spec
    parts = [topk_of(_logits(chunk, head, spec), spec) for chunk in hidden_ND.split(_chunk(spec))]
    ids, logprobs, tails = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    return partial(TopkSignal.of, ids, logprobs, tails, spec)


def _sampled(hidden_ND: Tensor, head: OutputHead, request: ScoreRequest) -> Callable[[], SampledSignal]:
    spec, chunk = request.spec, _chunk(request.spec)
    uniforms_N = torch.from_numpy(uniforms(request)).to(hidden_ND.device)
    parts = [
        sampled_of(_logits(hidden_nD, head, spec), uniforms_n, spec)
        for hidden_nD, uniforms_n in zip(hidden_ND.split(chunk), uniforms_N.split(chunk), strict=True)
    ]
    ids, weights, entropy, best = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    return partial(SampledSignal.of, ids, weights, entropy, best, spec)


_SCORERS: dict[str, Callable[[Tensor, OutputHead, ScoreRequest], Callable[[], Signal]]] = {
    "hidden": _hidden,
    "topk": _topk,
    "sampled": _sampled,
    "dense": _dense,
}


def topk_of(logits_nC: Tensor, spec: SignalSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Of a chunk of logits, which are overwritten: ids [n, K] (int32) in rising order, their log-probabilities [n, K]
    at T=1, and the log-mass [n, M] outside them at each temperature, all in float32."""
    ids_nK = largest(logits_nC, spec.kept).sort(-1).values
    values_nK = logits_nC.gather(-1, ids_nK)
    peak_n1 = values_nK.amax(-1, keepdim=True)
    logits_nC -= peak_n1
    log_totals, log_rests = {}, {}
    for temperature in {1.0, *spec.temperatures}:
        weights_nC = (logits_nC / temperature).exp_()
        log_totals[temperature] = weights_nC.sum(-1).log_()
        # Summed over the rest itself: 1 - (kept mass) would lose the small tails to cancellation.
        log_rests[temperature] = weights_nC.scatter_(-1, ids_nK, 0.0).sum(-1).log_()
    tails_nM = torch.stack([log_rests[t] - log_totals[t] for t in spec.temperatures], -1)
    return ids_nK.int(), values_nK - peak_n1 - log_totals[1.0][:, None], tails_nM


def largest(logits_nC: Tensor, count: int) -> Tensor:
    """Ids [n, count] of the largest entries of each row, in no order.

    In two rounds where that is less work: an entry among the `count` largest lies in one of the `count` groups with
    the largest maxima, so the second round looks only into those.
    """
    columns = logits_nC.shape[1]
    size = int((columns / count) ** 0.5)
    if size < 4 or logits_nC.device.type != "cpu":
        return logits_nC.topk(count, sorted=False).indices
    groups = columns // size  # group g holds the columns g, g + groups, g + 2 * groups, …
    maxima_nG = logits_nC[:, : groups * size].unflatten(-1, (size, groups)).amax(1)
    chosen_nc = maxima_nG.topk(count, sorted=False).indices
    offsets_s = torch.arange(0, groups * size, groups)
    candidates = (chosen_nc[:, None, :] + offsets_s[:, None]).flatten(1)
    left_over = torch.arange(groups * size, columns).expand(len(logits_nC), -1)
    candidates = torch.cat([candidates, left_over], -1)
    return candidates.gather(-1, logits_nC.gather(-1, candidates).topk(count, sorted=False).indices)


def sampled_of(logits_nC: Tensor, uniforms_n: Tensor, spec: SignalSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a chunk of logits: ids [n, S] (int32) in rising order, weights [n, S], entropy [n] and the best id [n].

    Systematic sampling: one uniform number places S equally spaced points on the cumulative distribution. Each point
    alone is uniform, so every mean is unbiased as with independent draws; but a token of probability p is drawn
    S * p times up to one, so the variance is far smaller.
    """
    temperature, draws = spec.temperatures[0], spec.draws
    logprobs_nC = torch.log_softmax(logits_nC / temperature, -1)
    proposal_nC = logprobs_nC if spec.proposal == 1.0 else torch.log_softmax(logprobs_nC * spec.proposal, -1)
    cumulative_nC = proposal_nC.exp().cumsum(-1)
    points_S = torch.arange(draws, device=logits_nC.device)
    points_nS = (points_S + uniforms_n[:, None]) / draws * cumulative_nC[:, -1:]
    ids_nS = torch.searchsorted(cumulative_nC, points_nS)  # the points are above 0: never a token of no probability
    weights_nS = (logprobs_nC.gather(-1, ids_nS) - proposal_nC.gather(-1, ids_nS)).exp() / draws
    entropy_n = -(logprobs_nC.exp() * logprobs_nC.clamp_min(-1e4)).sum(-1)
    return ids_nS.int(), weights_nS, entropy_n, logits_nC.argmax(-1).int()


def uniforms(request: ScoreRequest) -> np.ndarray:
    """A number in (0, 1], float32 [N], for each position of a request.

    It follows from the request's seed, the tokens of the position's sequence and its place there alone. So a request
    that is asked again is answered alike, and what is drawn does not depend on how sequences were put into requests.
    """
    numbers, start = [], 0
    for length in request.sequence_lengths.tolist():
        tokens = request.token_ids[start : start + length].astype("<i4").tobytes()
        numbers.append(1 - np.random.default_rng([request.seed, zlib.crc32(tokens)]).random(length, np.float32))
        start += length
    return np.concatenate(numbers)[request.positions]


def _logits(hidden_nD: Tensor, head: OutputHead, spec: SignalSpec) -> Tensor:
    return head.logits(hidden_nD)[:, : spec.vocab_size]


def _chunk(spec: SignalSpec) -> int:
    return max(1, _CHUNK_ELEMENTS // spec.vocab_size)
