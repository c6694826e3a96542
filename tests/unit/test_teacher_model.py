"""The teacher's answers against transformers itself: every family, every kind, merged or alone, and what is refused.

Models are float32 here, so that the only roundings are those of the wire (bfloat16 hidden states, float16
log-probabilities); see `assert_contract` for the tolerances.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import TeacherFailed
from services.teacher.client import TeacherClient
from services.teacher.model import TeacherModel
from services.teacher.schema import ScoreReply, ScoreRequest, check_reply
from services.teacher.signals import (
    DenseSignal,
    HiddenSignal,
    SampledSignal,
    SignalKind,
    SignalSpec,
    TopkSignal,
    copied,
)
from tests import tiny
from tests.in_process_teacher import (
    HALF,
    TEMPERATURES,
    InProcessTeacher,
    assert_contract,
    contract_specs,
    make_request,
    reference_logits,
    reference_tails,
)

KINDS = ("hidden", "topk", "sampled", "dense")


def spec_of(kind: SignalKind, top_k: int = 5) -> SignalSpec:
    return SignalSpec(kind, 320, top_k, (1.0,) if kind == "sampled" else TEMPERATURES, draws=6)


HIDDEN = SignalSpec("hidden", 320)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: tiny.save_model(tmp_path_factory.mktemp(family), family) for family in tiny.FAMILIES}


@pytest.fixture(scope="module")
def teacher(directories: dict[str, Path]) -> TeacherModel:
    return TeacherModel(str(directories["llama"]), "float32", max_request_tokens=600)


def arrays(signal: Any) -> list[np.ndarray]:
    return [value for value in vars(signal).values() if isinstance(value, np.ndarray)]


@pytest.mark.parametrize("where", ["model", "in_process"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_teacher_of_every_family_keeps_the_contract(directories, family, where):
    loaded = TeacherModel(str(directories[family]), "float32")
    answers = InProcessTeacher(loaded)
    if where == "model":  # merged with others in one call, which must change nothing
        answers.submit = lambda request: _merged(loaded, request)  # type: ignore[method-assign]
    assert_contract(answers, tiny.model(family))
    answers.close()


def _merged(model: TeacherModel, request: ScoreRequest) -> Any:
    from concurrent.futures import Future

    future: Future[ScoreReply] = Future()
    others = [make_request([9, 40], HIDDEN, 7), make_request([3], replace(request.spec, kind="dense"), 8)]
    future.set_result(model.score([others[0], request, others[1]])[1])
    return future


def test_teacher_in_bfloat16_keeps_the_contract_within_its_rounding(directories):
    loaded = TeacherModel(str(directories["llama"]), "bfloat16")
    request = make_request([40, 23], SignalSpec("dense", 320), 3)
    [reply] = loaded.score([request])
    expected = torch.log_softmax(reference_logits(tiny.model(), request), -1)
    error = (torch.from_numpy(reply.signal.logprobs_NC).double() - expected).abs()
    assert error.mean() < 0.05
    assert error.max() < 0.5
    assert loaded.head().weight_VD.dtype == np.uint16
    assert loaded.describe().dtype == "bfloat16"


def test_teacher_description_names_model_dtype_and_tokenizer(directories):
    of = {
        (family, dtype): TeacherModel(str(directories[family]), dtype).describe()
        for family, dtype in (("llama", "float32"), ("llama", "bfloat16"), ("gpt2", "float32"))
    }
    assert len({item.fingerprint for item in of.values()}) == 3
    assert len({item.tokenizer_fingerprint for item in of.values()}) == 1
    one = of["llama", "float32"]
    assert (one.vocab_size, one.hidden_size, one.max_sequence_tokens) == (320, 32, 256)


@pytest.mark.parametrize("kind", KINDS)
def test_score_of_a_request_does_not_depend_on_company(teacher, kind):
    spec = spec_of(kind)
    requests = [make_request([20 + i, 1, 50 - i], spec, i, name=str(i)) for i in range(4)]
    alone = [teacher.score([request])[0] for request in requests]
    for order in ([0, 1, 2, 3], [3, 1], [2, 0, 3]):
        for index, reply in zip(order, teacher.score([requests[i] for i in order]), strict=True):
            assert reply.request_id == str(index)
            for found, expected in zip(arrays(reply.signal), arrays(alone[index].signal), strict=True):
                if kind == "hidden":  # shapes of the products differ, so the last of bfloat16's 8 bits may too
                    found, expected = (x.astype(np.uint32) << 16 for x in (found, expected))
                    found, expected = found.view(np.float32), expected.view(np.float32)
                np.testing.assert_allclose(found.astype(np.float64), expected.astype(np.float64), rtol=8e-3, atol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_score_of_a_sequence_does_not_change_with_its_neighbours(directories, family):
    loaded = TeacherModel(str(directories[family]), "float32")
    first = make_request([11, 30, 8], HIDDEN, 1, positions=list(range(11, 41)))
    other = make_request([11, 30, 8], HIDDEN, 2)
    changed = replace(first, token_ids=other.token_ids.copy())
    changed.token_ids[11:41] = first.token_ids[11:41]
    (one,), (two,) = loaded.score([first]), loaded.score([changed])
    # Same shapes, same tokens: bit for bit, since masked products are exactly zero.
    assert np.array_equal(one.signal.hidden_ND, two.signal.hidden_ND)
    (both,) = loaded.score([replace(other, positions=first.positions)])
    assert not np.array_equal(one.signal.hidden_ND, both.signal.hidden_ND)


def test_score_from_several_threads_equals_one(teacher):
    requests = [make_request([20 + n, 7], spec_of(KINDS[n % 4]), name=str(n)) for n in range(12)]
    alone = [arrays(teacher.score([request])[0].signal) for request in requests]
    with ThreadPoolExecutor(4) as pool:
        together = [arrays(replies[0].signal) for replies in pool.map(lambda item: teacher.score([item]), requests)]
    for found, expected in zip(together, alone, strict=True):
        assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))


def test_score_without_positions_is_an_empty_signal(teacher):
    for kind in KINDS:
        request = make_request([5, 3], spec_of(kind), positions=[])
        full = make_request([5, 3], spec_of(kind))
        empty, whole = teacher.score([request, full])
        assert (len(empty.signal), len(whole.signal)) == (0, 8)
        assert check_reply(request, empty, None) is None


def test_topk_of_the_whole_vocabulary_equals_dense_and_has_no_tail(teacher):
    for top_k in (320, 5000):
        topk = make_request([30, 12], SignalSpec("topk", 320, top_k, TEMPERATURES), 4)
        dense = replace(topk, spec=SignalSpec("dense", 320))
        kept, every = (reply.signal for reply in teacher.score([topk, dense]))
        ids_NK, logprobs_NK = kept.entries()
        assert (ids_NK == np.arange(320)).all()
        assert ids_NK.shape == (42, 320)
        assert (kept.tail_logmass_NM == -np.inf).all()
        np.testing.assert_allclose(every.logprobs_NC, logprobs_NK, atol=2**-8)  # the last of float16's bits, below 8
        assert check_reply(topk, ScoreReply("request", "t", 42, kept), None) is None


@pytest.mark.parametrize("top_k", [1, 8, 319])
def test_topk_tail_mass_equals_fp64_at_every_temperature(tmp_path, top_k):
    changes = {"initializer_range": 0.1}  # peaked: e^-5 outside the first 8 of 320
    teacher = TeacherModel(str(tiny.save_model(tmp_path, **changes)), "float32")
    request = make_request([60, 5], SignalSpec("topk", 320, top_k, TEMPERATURES), 5)
    [reply] = teacher.score([request])
    logits = reference_logits(tiny.model(**changes), request)
    expected = reference_tails(logits, torch.from_numpy(reply.signal.entries()[0]), TEMPERATURES)
    tails = torch.from_numpy(reply.signal.tail_logmass_NM).double()
    # Relative to a log, so tiny tails are held as tightly as large ones.
    torch.testing.assert_close(tails, expected, rtol=1e-4, atol=1e-4)
    assert expected.min() < {1: -0.5, 8: -2, 319: -12}[top_k]
    assert expected.diff(dim=-1).min() > 0 or top_k > 1


@pytest.mark.parametrize("kind", ["topk", "dense"])
def test_padded_vocabulary_is_normalised_over_the_asked_columns(teacher, kind):
    columns = 250
    request = make_request([40], SignalSpec(kind, columns, columns, (1.0,)), 6)
    [reply] = teacher.score([request])
    expected = torch.log_softmax(reference_logits(tiny.model(), request)[:, :columns], -1)
    found = reply.signal.logprobs_NC if kind == "dense" else reply.signal.logprobs_NK
    if kind == "topk":
        assert (reply.signal.entries()[0] == np.arange(columns)).all()
        assert (reply.signal.tail_logmass_NM == -np.inf).all()
    assert found.shape == (40, columns)
    torch.testing.assert_close(torch.from_numpy(found).double(), expected, atol=HALF, rtol=0)
    np.testing.assert_allclose(np.exp(found.astype(np.float64)).sum(-1), 1, atol=2e-3)


def test_score_in_small_chunks_equals_one_chunk(teacher, monkeypatch):
    requests = [make_request([37], spec_of(kind)) for kind in ("topk", "sampled", "dense")]
    whole = teacher.score(requests)
    monkeypatch.setattr("services.teacher.scoring._CHUNK_ELEMENTS", 320 * 5)
    for one, other in zip(whole, teacher.score(requests), strict=True):
        for found, expected in zip(arrays(other.signal), arrays(one.signal), strict=True):
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4)


GOOD = make_request([6, 4], HIDDEN)
REFUSED = {
    "lengths": (replace(GOOD, sequence_lengths=np.array([6, 5], np.int32)), "10 tokens do not match 2 sequences of 11"),
    "no_lengths": (replace(GOOD, sequence_lengths=np.array([], np.int32)), "do not match 0 sequences"),
    "zero_length": (replace(GOOD, sequence_lengths=np.array([10, 0], np.int32)), "do not match"),
    "negative_length": (replace(GOOD, sequence_lengths=np.array([12, -2], np.int32)), "do not match"),
    "no_tokens": (make_request([], HIDDEN), "0 tokens do not match"),
    "id_too_large": (replace(GOOD, token_ids=np.full(10, 320, np.int32)), r"token ids outside 0\.\.319"),
    "id_negative": (replace(GOOD, token_ids=np.full(10, -1, np.int32)), r"token ids outside 0\.\.319"),
    "position_too_large": (replace(GOOD, positions=np.array([0, 10], np.int32)), r"positions outside 0\.\.9"),
    "position_negative": (replace(GOOD, positions=np.array([-1], np.int32)), r"positions outside 0\.\.9"),
    "positions_not_integers": (replace(GOOD, positions=np.array([1.0])), "positions must be integers"),
    "tokens_in_a_grid": (replace(GOOD, token_ids=GOOD.token_ids.reshape(2, 5)), "token_ids must be integers in one"),
    "sequence_too_long": (make_request([257], HIDDEN), "a sequence of 257 tokens, this teacher takes at most 256"),
    "too_many_tokens": (make_request([200, 200, 201], HIDDEN), "601 tokens, at most 600"),
    "vocabulary_too_large": (replace(GOOD, spec=SignalSpec("hidden", 321)), "321 vocabulary columns.* has 320"),
    "vocabulary_empty": (replace(GOOD, spec=SignalSpec("dense", 0)), "0 vocabulary columns"),
    "unknown_kind": (replace(GOOD, spec=SignalSpec("logits", 320)), "signal 'logits' is not known"),  # type: ignore[arg-type]
    "top_k": (replace(GOOD, spec=SignalSpec("topk", 320, 0)), "top_k=0"),
    "temperature": (replace(GOOD, spec=SignalSpec("topk", 320, 3, (0.0,))), r"temperatures \(0\.0,\)"),
    "bits": (replace(GOOD, spec=SignalSpec("topk", 320, logprob_bits=4)), "log-probabilities of 4 bits"),  # type: ignore[arg-type]
    "draws": (replace(GOOD, spec=SignalSpec("sampled", 320, draws=0)), "draws=0"),
    "proposal": (replace(GOOD, spec=SignalSpec("sampled", 320, proposal=0)), "proposal=0"),
    "sampled_twice": (replace(GOOD, spec=SignalSpec("sampled", 320, temperatures=(1.0, 2.0))), "one, positive"),
    "seed": (replace(GOOD, spec=SignalSpec("sampled", 320), seed=-1), "seed=-1"),
    "no_temperature": (replace(GOOD, spec=SignalSpec("topk", 320, 3, ())), r"temperatures \(\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_request_that_cannot_be_answered_is_refused(teacher, case):
    request, message = REFUSED[case]
    with pytest.raises(TeacherFailed, match=f"request request was refused: .*{message}"):
        teacher.score([GOOD, request])
    assert len(teacher.score([GOOD])[0].signal) == 10


def test_request_at_its_limits_is_answered(teacher):
    request = make_request([256, 256, 88], SignalSpec("topk", 320, 1))
    assert len(teacher.score([request])[0].signal) == 600


def reply_to(request: ScoreRequest, signal: Any, **changes: Any) -> ScoreReply:
    return replace(ScoreReply(request.request_id, "teacher", request.num_tokens, signal), **changes)


TOPK = SignalSpec("topk", 6, 2, (1.0, 2.0))
IDS = np.array([[0, 5], [2, 3], [1, 4]])
SIGNALS: dict[str, tuple[SignalSpec, Any]] = {
    "hidden": (SignalSpec("hidden", 6), HiddenSignal(np.ones((3, 4), np.uint16))),
    "topk": (TOPK, TopkSignal.of(IDS, -np.ones((3, 2), np.float32), -np.ones((3, 2), np.float32), TOPK)),
    "sampled": (
        SignalSpec("sampled", 6, draws=2, proposal=0.5),
        SampledSignal.of(
            IDS,
            np.full((3, 2), 0.5, np.float32),
            np.ones(3, np.float32),
            np.ones(3, np.int32),
            SignalSpec("sampled", 6, draws=2, proposal=0.5),
        ),
    ),
    "dense": (SignalSpec("dense", 6), DenseSignal(-np.ones((3, 6), np.float16))),
}


def first_rows(signal: Any, count: int) -> Any:
    return replace(
        signal, **{name: value[:count] for name, value in vars(signal).items() if isinstance(value, np.ndarray)}
    )


@pytest.mark.parametrize("kind", KINDS)
def test_reply_to_another_question_is_found(kind):
    spec, signal = SIGNALS[kind]
    request = make_request([5], spec, positions=[0, 2, 3], name="asked")
    good = reply_to(request, signal)
    assert check_reply(request, good, "teacher") is None
    assert check_reply(request, good, None) is None
    assert "answers request other, not asked" in check_reply(request, replace(good, request_id="other"), None)
    assert "comes from teacher teacher, expected mine" in check_reply(request, good, "mine")
    assert "has 2 rows" in check_reply(request, replace(good, signal=first_rows(signal, 2)), None)
    assert "for 4 tokens" in check_reply(request, replace(good, num_tokens=4), None)
    for other in set(KINDS) - {kind}:
        assert "another kind" in check_reply(request, replace(good, signal=SIGNALS[other][1]), None)


def test_reply_of_another_width_is_found():
    for kind, narrower in (
        ("dense", SignalSpec("dense", 7)),
        ("topk", replace(TOPK, top_k=3)),
        ("topk", replace(TOPK, temperatures=(1.0, 3.0))),
        ("topk", replace(TOPK, logprob_bits=8)),
        ("topk", replace(TOPK, vocab_size=7)),
        ("sampled", replace(SIGNALS["sampled"][0], draws=3)),
        ("sampled", replace(SIGNALS["sampled"][0], proposal=1.0)),
    ):
        request = make_request([5], narrower, positions=[0, 2, 3])
        assert "width" in check_reply(request, reply_to(request, SIGNALS[kind][1]), None)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("hidden", "hidden_ND", 0x7F80),  # infinity
        ("hidden", "hidden_ND", 0xFF80),
        ("hidden", "hidden_ND", 0x7FC0),  # NaN
        ("dense", "logprobs_NC", np.nan),
        ("dense", "logprobs_NC", np.inf),
        ("topk", "logprobs_NK", np.nan),
        ("topk", "logprobs_NK", np.inf),
        ("sampled", "weights_NS", np.nan),
        ("sampled", "entropy_N", np.inf),
        ("topk", "tail_logmass_NM", np.nan),
        ("topk", "tail_logmass_NM", np.inf),
    ],
)
def test_reply_with_a_value_that_is_not_finite_is_found(kind, field, value):
    spec, signal = SIGNALS[kind]
    request = make_request([5], spec, positions=[0, 2, 3])
    bad = copied(signal)
    getattr(bad, field)[1, ...] = value
    assert "not finite" in check_reply(request, reply_to(request, bad), None)


def test_reply_with_ruled_out_tokens_is_finite_but_not_with_an_impossible_row():
    for kind, field in (("dense", "logprobs_NC"), ("topk", "logprobs_NK")):
        spec, signal = SIGNALS[kind]
        request = make_request([5], spec, positions=[0, 2, 3])
        some = copied(signal)
        getattr(some, field)[1, 1:] = -np.inf
        assert check_reply(request, reply_to(request, some), None) is None
        getattr(some, field)[1] = -np.inf
        assert "not finite" in check_reply(request, reply_to(request, some), None)


def test_copied_record_has_arrays_of_its_own():
    for _, signal in SIGNALS.values():
        for array in arrays(signal):
            array.flags.writeable = False
        again = copied(signal)
        assert type(again) is type(signal)
        for mine, theirs in zip(arrays(again), arrays(signal), strict=True):
            assert mine.flags.writeable
            assert not np.shares_memory(mine, theirs)
            assert np.array_equal(mine, theirs)
            theirs.flags.writeable = True


def test_bytes_per_position_are_those_of_the_arrays(teacher):
    for spec in (*contract_specs(320).values(), SignalSpec("topk", 320, 9999)):
        [reply] = teacher.score([make_request([10], spec)])
        assert sum(array.nbytes for array in arrays(reply.signal)) == 10 * spec.bytes_per_position(32)


@pytest.mark.parametrize("vocab_size", [49_152, 151_936, 262_144])
def test_bytes_of_64_entries_stay_below_272(vocab_size):
    assert SignalSpec("topk", vocab_size).bytes_per_position(4096) < 272
    assert SignalSpec("topk", vocab_size, logprob_bits=8).bytes_per_position(4096) < 200
    assert SignalSpec("sampled", vocab_size).bytes_per_position(4096) < 80


def test_log_probabilities_in_8_bits_come_back_within_half_a_step():
    rng = np.random.default_rng(0)
    logprobs = (-12 * rng.random((50, 64))).astype(np.float32)
    logprobs[0] = -3.0  # all alike
    logprobs[1, 5] = -np.inf  # ruled out: neither a step nor a part of the range
    spec = SignalSpec("topk", 1000, logprob_bits=8)
    signal = TopkSignal.of(np.tile(np.arange(64), (50, 1)), logprobs, np.zeros((50, 1), np.float32), spec)
    assert signal.logprobs_NK.dtype == np.uint8
    found = signal.entries()[1]
    assert found[1, 5] == -np.inf
    assert signal.is_finite()
    finite = np.isfinite(logprobs)
    assert np.abs(found[finite] - logprobs[finite]).max() <= 12 / 254 / 2 + HALF
    bad = replace(signal, range_N2=np.full((50, 2), np.nan, np.float16))
    assert not bad.is_finite()


def test_client_in_a_process_with_grpc_handles_is_refused(monkeypatch):
    from cluster.errors import TeacherUnavailable

    monkeypatch.setenv("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")
    with pytest.raises(TeacherUnavailable, match="unset it"):
        TeacherClient()
