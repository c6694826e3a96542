"""ONNX graphs with a cache: sequences that share a run, leave it, and come back get what they would get alone."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from cluster.errors import ModelError
from jobs.quantization import onnx_float32, onnx_int8
from services.endpoint import loading
from services.endpoint.decoding import Piece, joined
from services.endpoint.engines.base import Place, Read
from services.endpoint.engines.onnx import CachedEngine, open_session
from services.endpoint.model import ServedModel
from services.endpoint.schema import EndpointConfig, Sampling
from tests.endpoint_models import answer, answers, byte_level_tokenizer, save_version

VOCABULARY = 11


def save_summing_graph(path: Path, table_VV: np.ndarray, outputs: tuple[str, ...] = ("key", "value")) -> None:
    """Logits behind the last token: its row of the table, plus all token ids read so far (keys) and three times their
    sum (values), as far as the mask calls them real."""
    ids, positions, mask = (
        helper.make_tensor_value_info(name, TensorProto.INT64, ["B", length])
        for name, length in (("input_ids", "T"), ("position_ids", "T"), ("attention_mask", "S"))
    )
    shape = ["B", 1, "P", 1]
    pasts = [
        helper.make_tensor_value_info(f"past_key_values.0.{part}", TensorProto.FLOAT, shape)
        for part in ("key", "value")
    ]
    found = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "T", VOCABULARY])]
    found += [
        helper.make_tensor_value_info(f"present.0.{part}", TensorProto.FLOAT, ["B", 1, "S", 1]) for part in outputs
    ]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["input_ids"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["floats", "heads_and_width"], ["new_key"]),
        helper.make_node("Mul", ["new_key", "three"], ["new_value"]),
        helper.make_node("Concat", ["past_key_values.0.key", "new_key"], ["present.0.key"], axis=2),
        helper.make_node("Concat", ["past_key_values.0.value", "new_value"], ["present.0.value"], axis=2),
        helper.make_node("Cast", ["attention_mask"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["real", "heads_and_width"], ["real_columns"]),
        helper.make_node("Add", ["present.0.key", "present.0.value"], ["both"]),
        helper.make_node("Mul", ["both", "real_columns"], ["counted"]),
        helper.make_node("ReduceSum", ["counted", "columns"], ["sums"], keepdims=0),
        helper.make_node("Add", ["rows", "sums"], ["with_sums"]),
        helper.make_node("Cast", ["position_ids"], ["places"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["places", "last"], ["places_1"]),
        helper.make_node("Add", ["with_sums", "places_1"], ["logits"]),
    ]
    constants = [
        helper.make_tensor("table", TensorProto.FLOAT, table_VV.shape, table_VV.flatten()),
        helper.make_tensor("heads_and_width", TensorProto.INT64, [2], [1, 3]),
        helper.make_tensor("columns", TensorProto.INT64, [1], [2]),
        helper.make_tensor("last", TensorProto.INT64, [1], [2]),
        helper.make_tensor("three", TensorProto.FLOAT, [1], [3.0]),
    ]
    graph = helper.make_graph(nodes, "sums", [ids, positions, mask, *pasts], found, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


@pytest.fixture(scope="module")
def table() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)


@pytest.fixture
def engine(tmp_path: Path, table: np.ndarray) -> CachedEngine:
    save_summing_graph(tmp_path / "model.onnx", table)
    return CachedEngine(open_session(tmp_path / "model.onnx"), 200)


def reserved(engine: CachedEngine, num_tokens: int = 40) -> Place:
    place = engine.reserve(num_tokens)
    assert place is not None
    return place


def stepping(engine: CachedEngine, table: np.ndarray, read: dict[Place, list[int]]) -> Callable[..., None]:
    """One pass over pairs of a place and the tokens that it reads, checked and noted in `read`."""

    def step(*parts: tuple[Place, list[int]]) -> None:
        rows = engine.forward([Read(place, token_ids) for place, token_ids in parts])
        for row, (place, token_ids) in zip(rows, parts, strict=True):
            read.setdefault(place, []).extend(token_ids)
            expected = table[token_ids[-1]] + 4 * sum(read[place]) + len(read[place]) - 1
            assert torch.allclose(row, torch.from_numpy(expected), atol=1e-4)
            assert place.length == len(read[place])

    return step


def test_sequences_of_any_length_join_leave_and_fork(engine: CachedEngine, table: np.ndarray) -> None:
    read: dict[Place, list[int]] = {}
    runs = 0
    run = engine._run

    def counted(*arguments: object) -> object:
        nonlocal runs
        runs += 1
        return run(*arguments)  # type: ignore[arg-type]

    engine._run = counted  # type: ignore[method-assign,assignment]

    step = stepping(engine, table, read)
    first, second, third = (reserved(engine) for _ in range(3))
    step((first, [1, 2, 3]), (second, [4, 5, 6, 7]))
    runs = 0
    for token in (8, 9):
        step((first, [token]), (second, [token + 1]))
    assert runs == 2, "two sequences of like lengths share a run"
    step((first, [1]), (third, [2] * 5), (second, [3]))
    for token in range(4):
        step((second, [token]), (third, [token]), (first, [token]))
    engine.release(second)
    step((third, [5]), (first, [6]))
    copied = reserved(engine)
    assert engine.fork(copied, third, 5)
    read[copied] = read[third][:5]
    step((copied, [7]), (third, [8]), (first, [9]))
    # One that is much longer than the others does not make them pay for it.
    long = reserved(engine, 60)
    step((long, [1] * 55))
    runs = 0
    step((long, [3]), (copied, [4]), (third, [5]), (first, [6]))
    assert runs == 4


def test_first_token_of_a_sequence_is_read_beside_others(engine: CachedEngine, table: np.ndarray) -> None:
    step = stepping(engine, table, {})
    written, other, third, fourth = (reserved(engine) for _ in range(4))
    step((written, [1, 2]))
    step((written, [3]), (other, [4]))
    step((written, [5]), (other, [6]))
    step((written, [7]), (third, [8]), (other, [9]), (fourth, [10]))
    step((third, [1]), (fourth, [2]))


def test_places_are_counted_in_tokens(engine: CachedEngine) -> None:
    places = [reserved(engine, 90), reserved(engine, 110)]
    assert engine.reserve(1) is None
    engine.release(places[0])
    assert engine.reserve(90) is not None


def test_graph_without_a_matching_output_is_refused(tmp_path: Path, table: np.ndarray) -> None:
    save_summing_graph(tmp_path / "model.onnx", table, outputs=("key",))
    with pytest.raises(ModelError, match=r"no output present\.0\.value"):
        CachedEngine(open_session(tmp_path / "model.onnx"), 200)


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
        engine = CachedEngine(open_session(student / "model.onnx"), 200)
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
        assert engine._session.get_session_options().intra_op_num_threads == threads


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
