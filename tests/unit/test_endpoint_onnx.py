"""ONNX graphs with a cache: sequences that share a run, leave it, and come back get what they would get alone."""

import asyncio
import copy
import errno
import itertools
import mmap
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from cluster.errors import ModelError
from cluster.onnx_graph import open_session
from jobs.quantization import onnx_float32, onnx_int8
from services.endpoint import loading
from services.endpoint.decoding import Piece, joined
from services.endpoint.engines import onnx as onnx_engine
from services.endpoint.engines.base import Place, Read
from services.endpoint.engines.onnx import CachedEngine
from services.endpoint.model import ServedModel
from services.endpoint.schema import EndpointConfig, Sampling
from tests.endpoint_models import answer, answers, byte_level_tokenizer, save_version

CAPACITY = 200


class Engine:
    """An engine around a small exported model, and the model."""

    def __init__(self, directory: Path) -> None:
        self.exact = save_version(directory / "float", seed=5)
        onnx_float32.quantize(str(directory / "float"), directory / "graph")
        self.path = directory / "graph" / "model.onnx"
        self.engine = self.opened()
        self.read: dict[Place, list[int]] = {}

    def opened(self) -> CachedEngine:
        self.engine, self.read = CachedEngine(open_session(self.path, threads=1), CAPACITY), {}
        return self.engine

    def reserve(self, num_tokens: int = 40) -> Place:
        place = self.engine.reserve(num_tokens)
        assert place is not None
        return place

    def step(self, *parts: tuple[Place, list[int]], all_logits: bool = False) -> None:
        """One pass over pairs of a place and the tokens that it reads: each gets what the model says of its text."""
        found_NV = self.engine.forward([Read(place, token_ids, all_logits) for place, token_ids in parts])
        first = 0
        for place, token_ids in parts:
            text = self.read[place] = self.read.get(place, []) + token_ids
            assert place.length == len(text)
            count = len(token_ids) if all_logits else 1
            with torch.no_grad():
                expected_TV = self.exact(torch.tensor([text])).logits[0, -count:]
            assert torch.allclose(found_NV[first : first + count], expected_TV, atol=1e-5)
            first += count
        assert len(found_NV) == first

    def runs(self) -> Callable[[], int]:
        """Counts the runs of the session from now on."""
        numbers = itertools.count()
        run = self.engine._graph.run

        def counted(*arguments: Any, **keywords: Any) -> Any:
            next(numbers)
            return run(*arguments, **keywords)

        self.engine._graph.run = counted  # type: ignore[method-assign]
        return lambda: next(copy.copy(numbers))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(tmp_path_factory.mktemp("exported"))


@pytest.fixture
def engine(exported: Engine) -> Engine:
    exported.opened()
    return exported


def test_sequences_of_any_length_join_leave_and_fork(engine: Engine) -> None:
    first, second, third, fourth = (engine.reserve() for _ in range(4))
    engine.step((third, [1, 2, 3]), (second, [4, 5, 6, 7]), (fourth, [9] * 12))
    for token in (8, 9):
        engine.step((fourth, [token]), (second, [token + 1]))
    engine.step((first, [1]), (third, [2] * 5), (second, [3]))
    for token in range(4):
        engine.step((second, [token]), (third, [token]), (first, [token]))
    engine.engine.release(second)
    engine.step((third, [5]), (first, [6]), (fourth, [7]))
    copied = engine.reserve()
    assert engine.engine.fork(copied, third, 5)
    engine.read[copied] = engine.read[third][:5]
    engine.step((copied, [7]), (third, [8]), (fourth, [2] * 3), (first, [9]))
    engine.step((first, [4]))
    engine.step((fourth, [4]), (copied, [3]))


def test_sequences_that_read_one_token_share_a_run_however_long_they_are(engine: Engine) -> None:
    places = [engine.reserve(capacity) for capacity in (150, 10, 20, 5)]
    engine.step(*((place, [7] * length) for place, length in zip(places, (120, 2, 11, 1), strict=True)))
    runs = engine.runs()
    for token in (3, 4):
        engine.step(*((place, [token]) for place in reversed(places)))
    assert runs() == 2


def test_first_token_of_a_sequence_is_read_beside_others(engine: Engine) -> None:
    written, other, third, fourth = (engine.reserve() for _ in range(4))
    engine.step((written, [1, 2]))
    engine.step((written, [3]), (other, [4]))
    engine.step((written, [5]), (other, [6]))
    engine.step((written, [7]), (third, [8]), (other, [9]), (fourth, [10]))
    engine.step((third, [1]), (fourth, [2]))


def test_logits_of_every_token_where_they_are_wanted(engine: Engine) -> None:
    first, second, third = (engine.reserve() for _ in range(3))
    engine.step((first, [1, 2, 3]), (second, [4]), (third, [5, 6]), all_logits=True)
    engine.step((third, [7, 8, 9]), (first, [1]), (second, [2, 3]), all_logits=True)


def test_more_sequences_than_rows_keep_what_they_have_read(engine: Engine) -> None:
    places = [engine.reserve(10) for _ in range(18)]
    for number, place in enumerate(places[:15]):
        engine.step((place, [number, number + 1]))
    engine.step(*((place, [number + 2]) for number, place in enumerate(places)))


def test_without_address_space_for_more_rows_a_sequence_waits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **keywords: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    places = [engine.reserve(10) for _ in range(16)]
    engine.step(*((place, [3]) for place in places))
    with monkeypatch.context() as patch:
        patch.setattr(onnx_engine.mmap, "mmap", full)
        assert engine.engine.reserve(10) is None
        with pytest.raises(ModelError, match=r"16 sequences .*Cannot allocate memory\): lower max_cached_tokens"):
            engine.opened()
    engine.engine.release(places[4])
    places[4] = engine.reserve(50)  # all tokens that are left: the one that found no row took none
    engine.step(*((place, [4]) for place in places))


def test_what_a_sequence_leaves_behind_reaches_no_other(engine: Engine) -> None:
    spoilt, other = engine.reserve(), engine.reserve()
    engine.step((spoilt, [1, 2, 3]), (other, [4, 5]))
    for cache in engine.engine._caches:
        cache.rows[spoilt.state] = float("nan")
    engine.engine.release(spoilt)
    later = engine.reserve()
    engine.step((later, [6]), (other, [7]))
    engine.step((later, [8]), (other, [9]))


def test_memory_of_a_long_sequence_goes_back_with_it(exported: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("how much memory a process has is read from /proc")
    monkeypatch.setattr(onnx_engine, "_KEPT_COLUMNS", 100)
    engine = CachedEngine(open_session(exported.path, threads=1), max_cached_tokens=1 << 18)
    for length, kept in ((101, False), (100, True)):
        place = engine.reserve(length)
        assert place is not None
        rows = [cache.rows[place.state] for cache in engine._caches]
        for row in rows:
            row[:] = 1.0  # far more than the sequence itself would need, so that it shows
        full, size = resident(), sum(row.nbytes for row in rows)
        place.length = length
        engine.release(place)
        assert (full - resident() < 0.1 * size) if kept else (full - resident() > 0.9 * size)


def test_memory_of_a_row_goes_back_when_a_long_sequence_moves_out_of_it(
    exported: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("how much memory a process has is read from /proc")
    monkeypatch.setattr(onnx_engine, "_KEPT_COLUMNS", 100)
    engine = CachedEngine(open_session(exported.path, threads=1), max_cached_tokens=1 << 18)
    short, long = engine.reserve(3), engine.reserve(102)
    assert short is not None
    assert long is not None
    rows = [cache.rows[long.state] for cache in engine._caches]
    for row in rows:
        row[:] = 1.0
    short.length, long.length = 2, 101
    full, size = resident(), sum(row.nbytes for row in rows)
    engine.forward([Read(long, [3])])
    assert (short.state, long.state) == (1, 0)
    assert full - resident() > 0.9 * size
    assert all((cache.rows[0, :, :101] == 1).all() for cache in engine._caches)
    assert all((cache.rows[1] == 0).all() for cache in engine._caches)


def test_places_are_counted_in_tokens(engine: Engine) -> None:
    places = [engine.reserve(90), engine.reserve(110)]
    assert engine.engine.reserve(1) is None
    engine.engine.release(places[0])
    assert engine.engine.reserve(90) is not None
    with pytest.raises(ValueError, match="111 tokens in a place for 110"):
        engine.step((places[1], [1] * 111))


def test_graphs_whose_cache_cannot_stay_in_place_are_refused(tmp_path: Path, exported: Engine) -> None:
    model = onnx.load(exported.path)
    [asked] = [item for item in model.graph.input if item.name == "logits_from"]
    model.graph.input.remove(asked)
    for problem in ("no input logits_from", r"no output present\.1\.value"):
        onnx.save(model, tmp_path / "model.onnx")
        with pytest.raises(ModelError, match=problem):
            CachedEngine(open_session(tmp_path / "model.onnx", threads=1), CAPACITY)
        del model.graph.output[-1]


@pytest.fixture(scope="module", params=[onnx_float32, onnx_int8], ids=["float32", "int8"])
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version with an exported graph."""
    source, made = tmp_path_factory.mktemp("float"), tmp_path_factory.mktemp("graph")
    save_version(source, seed=3)
    request.param.quantize(str(source), made)
    byte_level_tokenizer().save_pretrained(made)
    return made


def test_exported_student_answers_among_others_what_it_answers_alone(student: Path) -> None:
    torch.set_num_threads(1)
    model = ServedModel(student, max_context_tokens=120, max_new_tokens=40)
    greedy = Sampling(max_new_tokens=24, temperature=0.0, top_logprobs=0)
    prompts = [model.encode(text) for text in ("the cat", "a", "on the mat sat the cat and the", "猫", "dog dog")]
    alone = [joined(answer(model, prompt, greedy)) for prompt in prompts]
    together = [joined(pieces) for pieces in answers(model, [(prompt, greedy) for prompt in prompts])]

    def read_at_once(token_ids: list[int]) -> int:
        engine = CachedEngine(open_session(student / "model.onnx", threads=1), 200)
        place = engine.reserve(len(token_ids))
        assert place is not None
        return int(engine.forward([Read(place, token_ids)])[0, : model.vocabulary.size].argmax())

    for prompt, [mine], [theirs] in zip(prompts, alone, together, strict=True):
        assert theirs.text == mine.text
        for one, other in zip(mine.tokens, theirs.tokens, strict=True):
            assert abs((one.logprob or 0) - (other.logprob or 0)) < 1e-4
        ids = [token.token_id for token in mine.tokens]
        assert ids[-1] == read_at_once(prompt + ids[:-1])


def test_graph_computes_with_all_cores_unless_the_config_says(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "threads_each", lambda replicas: 6 // replicas)
    torch.set_num_threads(1)
    for fields, threads in (({}, 6), ({"replicas": 2}, 3), ({"threads_per_replica": 2}, 2)):
        model = loading.load_model(student, EndpointConfig.model_validate(fields))
        assert isinstance(model, ServedModel)
        engine = model._scheduler._engine
        assert isinstance(engine, CachedEngine)
        assert engine._graph._session.get_session_options().intra_op_num_threads == threads


def test_exported_student_reads_prompts_of_one_token_beside_answers(student: Path) -> None:
    torch.set_num_threads(1)
    model = ServedModel(student, max_context_tokens=120, max_new_tokens=80)
    greedy = Sampling(max_new_tokens=8, temperature=0.0, top_logprobs=0)
    longer = Sampling(max_new_tokens=60, temperature=0.0, top_logprobs=0)
    long, short, other = (model.encode(text) for text in ("the cat", "c", "t"))
    assert len(short) == len(other) == 1
    alone = [joined(answer(model, *request)) for request in ((long, longer), (short, greedy), (other, greedy))]

    async def rest(running: AsyncGenerator[int | Piece]) -> list[Piece]:
        return joined([piece async for piece in running if isinstance(piece, Piece)])

    async def short_while_the_long_is_written() -> list[list[Piece]]:
        running = model.submit([long], longer)
        await anext(running)
        begun = await anext(running)
        assert isinstance(begun, Piece)
        later = await asyncio.gather(*(rest(model.submit([prompt], greedy)) for prompt in (short, other)))
        return [joined([begun, *await rest(running)]), *later]

    assert texts(asyncio.run(short_while_the_long_is_written())) == texts(alone)
    assert texts(answers(model, [(short, greedy), (other, greedy)])) == texts(alone[1:])


def texts(answers: list[list[Piece]]) -> list[list[str]]:
    return [[choice.text for choice in pieces] for pieces in answers]
