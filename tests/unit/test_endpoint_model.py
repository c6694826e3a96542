import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from cluster.errors import ModelError
from services.endpoint.engines.base import Read
from services.endpoint.errors import ApiError
from services.endpoint.model import ServedModel
from services.endpoint.schema import ChatMessage, Sampling
from tests.endpoint_models import NUM_PADDING, answer, save_version

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = "the cat sat on 猫 mat"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float")
    save_version(path)
    (path / "manifest.json").write_text(json.dumps({"scheme": "float", "files": {}}))
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    return save_version(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def model(directory: Path) -> ServedModel:
    return ServedModel(directory, max_context_tokens=480, max_new_tokens=300)


@torch.no_grad()
def reference_logprobs(reference: torch.nn.Module, token_ids: list[int], size: int) -> torch.Tensor:
    logits_TV = reference(torch.tensor([token_ids]), use_cache=False).logits[0, :, :size]
    return torch.log_softmax(logits_TV, -1)


def test_generate_greedy_follows_the_reference_without_a_cache(model: ServedModel, reference: torch.nn.Module) -> None:
    token_ids = model.encode(PROMPT)
    piece = answer(model, token_ids, Sampling(20, temperature=0, top_logprobs=3))[0]
    for token in piece.tokens:
        logprobs_V = reference_logprobs(reference, token_ids, model.vocabulary.size)[-1]
        assert token.token_id == int(logprobs_V.argmax())
        assert token.logprob == pytest.approx(float(logprobs_V.max()), abs=1e-4)
        assert token.top[0] == (token.token_id, token.logprob)
        assert [value for _, value in token.top] == sorted((value for _, value in token.top), reverse=True)
        token_ids = [*token_ids, token.token_id]
    assert len(piece.tokens) == piece.num_sampled == 20
    assert piece.finish_reason == "length"
    whole = b"".join(model.vocabulary.bytes_of(token.token_id) for token in piece.tokens)
    assert whole.decode("utf-8", "replace") == piece.text


def test_generate_scores_a_long_echoed_prompt_like_the_reference(
    model: ServedModel, reference: torch.nn.Module
) -> None:
    text = PROMPT * 45
    token_ids = model.encode(text)
    assert 256 < len(token_ids) <= 480, "the prompt should need more than one forward pass"
    piece = answer(model, token_ids, Sampling(0, top_logprobs=2, echo=True))[0]
    expected = reference_logprobs(reference, token_ids, model.vocabulary.size)
    assert piece.text == text
    assert piece.num_sampled == 0
    assert [token.token_id for token in piece.tokens] == token_ids
    assert piece.tokens[0].logprob is None
    for position, token in enumerate(piece.tokens[1:]):
        assert token.logprob == pytest.approx(float(expected[position, token.token_id]), abs=1e-4)
        assert text[token.text_offset :].startswith(model.vocabulary.bytes_of(token.token_id).decode("utf-8", "ignore"))


def test_generate_equal_seeds_give_equal_texts_and_choices_differ(model: ServedModel) -> None:
    token_ids = model.encode(PROMPT)
    sampling = Sampling(30, temperature=1.3, top_p=0.95, seed=11, num_choices=3)
    first, second = answer(model, token_ids, sampling), answer(model, token_ids, sampling)
    assert first == second
    assert len({piece.text for piece in first}) == 3
    # A choice is what it would be alone: the cache of the prompt is not shared between choices.
    alone = answer(model, token_ids, Sampling(30, temperature=1.3, top_p=0.95, seed=13))
    assert alone[0].text == first[2].text
    without_seed = {answer(model, token_ids, Sampling(30))[0].text for _ in range(3)}
    assert len(without_seed) > 1


def test_generate_never_samples_padding_rows(directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    head = weights["lm_head.weight"]
    head[-NUM_PADDING:] = head[:NUM_PADDING] * 50
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = ServedModel(tmp_path, 480, 300)
    engine = model._scheduler._engine
    place = engine.reserve(40)
    assert place is not None
    assert int(engine.forward([Read(place, model.encode(PROMPT))])[-1].argmax()) >= model.vocabulary.size
    engine.release(place)
    for temperature in (0.0, 2.0):
        piece = answer(model, model.encode(PROMPT), Sampling(60, temperature=temperature, top_logprobs=20))[0]
        assert all(index < model.vocabulary.size for token in piece.tokens for index, _ in token.top)
        assert all(token.token_id < model.vocabulary.size for token in piece.tokens)


def test_generate_stops_at_stop_text_and_at_end_of_text(model: ServedModel) -> None:
    token_ids = model.encode(PROMPT)
    whole = answer(model, token_ids, Sampling(40, temperature=0))[0]
    stop = whole.text[5:8]
    stopped = answer(model, token_ids, Sampling(40, temperature=0, stop=(stop,)))[0]
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.num_sampled < 40
    drawn = (
        answer(model, token_ids, Sampling(60, temperature=2.0, seed=seed, top_logprobs=0))[0] for seed in range(60)
    )
    ended = next(piece for piece in drawn if piece.finish_reason == "stop")
    assert len(ended.tokens) == ended.num_sampled - 1
    assert "</s>" not in ended.text


def test_generate_ends_at_the_context_limit(model: ServedModel) -> None:
    token_ids = (model.encode(PROMPT) * 60)[:470]
    piece = answer(model, token_ids, Sampling(None, temperature=0))[0]
    assert (piece.num_sampled, piece.finish_reason) == (10, "length")


@pytest.mark.parametrize(("num_prompt", "asked", "fits"), [(470, 10, True), (470, 11, False), (480, None, False)])
def test_check_length_counts_prompt_and_answer(
    model: ServedModel, num_prompt: int, asked: int | None, fits: bool
) -> None:
    if fits:
        model.check_length([1] * num_prompt, Sampling(asked), "prompt")
        return
    with pytest.raises(ApiError) as refused:
        model.check_length([1] * num_prompt, Sampling(asked), "prompt")
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")


def test_check_length_refuses_more_than_the_largest_answer(model: ServedModel) -> None:
    with pytest.raises(ApiError, match="At most 300") as refused:
        model.check_length([1], Sampling(301), "prompt")
    assert refused.value.param == "max_tokens"


def test_encode_empty_prompt_and_unknown_ids(model: ServedModel) -> None:
    assert model.encode("") == [model.tokenizer.bos_token_id]
    with pytest.raises(ApiError, match="not below"):
        model.encode([model.vocabulary.size])


def test_encode_chat_default_template_keeps_control_tokens_of_users_as_text(model: ServedModel) -> None:
    messages = [ChatMessage(role="developer", content="be kind"), ChatMessage(role="user", content="hi</s>")]
    token_ids = model.encode_chat(messages, {})
    assert model.tokenizer.decode(token_ids) == "system: be kind\nuser: hi</s>\nassistant:"
    assert model.tokenizer.eos_token_id not in token_ids


def test_encode_chat_own_template_its_refusal_and_its_variables(directory: Path) -> None:
    model = ServedModel(directory, 480, 300)
    model.tokenizer.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
        "[{{ messages[0].content }}{{ enable_thinking }}]{{ eos_token }}"
    )
    token_ids = model.encode_chat([ChatMessage(role="user", content="hi")], {"enable_thinking": False})
    assert model.tokenizer.decode(token_ids) == "[hiFalse]</s>"
    assert token_ids[-1] == model.tokenizer.eos_token_id
    with pytest.raises(ApiError, match="user first") as refused:
        model.encode_chat([ChatMessage(role="system", content="hi")], {})
    assert refused.value.param == "messages"
    with pytest.raises(ApiError, match="must not set tokenize"):
        model.encode_chat([ChatMessage(role="user", content="hi")], {"tokenize": False})


def test_int8_version_scores_like_the_quantised_model(directory: Path, tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    quantised = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
    )
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    quantised.save_pretrained(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"scheme": "int8_weight_only"}))
    model = ServedModel(tmp_path, 480, 300)
    token_ids = model.encode(PROMPT)
    piece = answer(model, token_ids, Sampling(0, top_logprobs=0, echo=True))[0]
    of_quantised = reference_logprobs(quantised, token_ids, model.vocabulary.size)
    of_float = reference_logprobs(AutoModelForCausalLM.from_pretrained(directory), token_ids, model.vocabulary.size)
    found = np.array([token.logprob for token in piece.tokens[1:]])
    rows = range(len(token_ids) - 1)
    assert np.abs(found - of_quantised[rows, token_ids[1:]].numpy()).max() < 1e-4
    assert np.abs(found - of_float[rows, token_ids[1:]].numpy()).max() > 1e-4
    half = ServedModel(tmp_path, 480, 300, dtype="bfloat16")
    piece = answer(half, token_ids, Sampling(4, temperature=0, top_logprobs=0, echo=True))[0]
    in_half = np.array([token.logprob for token in piece.tokens[1 : len(token_ids)]])
    assert 1e-4 < np.abs(in_half - of_quantised[rows, token_ids[1:]].numpy()).max() < 0.5


def save_bigram_onnx(path: Path, table_VV: np.ndarray) -> None:
    """A graph whose logits depend on the current token and its position: `table[token] + position`."""
    ids, positions = (
        helper.make_tensor_value_info(name, TensorProto.INT64, ["B", "T"]) for name in ("input_ids", "position_ids")
    )
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "T", table_VV.shape[1]])
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["position_ids"], ["float_positions"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["float_positions", "last"], ["columns"]),
        helper.make_node("Mul", ["rows", "columns"], ["logits"]),
    ]
    constants = [
        helper.make_tensor("table", TensorProto.FLOAT, table_VV.shape, table_VV.flatten()),
        helper.make_tensor("last", TensorProto.INT64, [1], [2]),
    ]
    graph = helper.make_graph(nodes, "bigram", [ids, positions], [logits], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def test_onnx_version_decodes_without_a_cache(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "manifest.json").write_text(json.dumps({"scheme": "onnx_int8"}))
    size = 290 + NUM_PADDING
    table_VV = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    save_bigram_onnx(tmp_path / "model.onnx", table_VV)
    model = ServedModel(tmp_path, 480, 300)
    token_ids = model.encode(PROMPT)
    pieces = answer(model, token_ids, Sampling(6, temperature=0, top_logprobs=1, num_choices=2))
    assert pieces[0].tokens == pieces[1].tokens
    for token in pieces[0].tokens:
        row = table_VV[token_ids[-1], : model.vocabulary.size] * (len(token_ids) - 1)
        assert token.token_id == int(row.argmax())
        assert token.logprob == pytest.approx(float(torch.log_softmax(torch.from_numpy(row), -1).max()), abs=1e-4)
        token_ids = [*token_ids, token.token_id]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", b'{"scheme": "magic"}', "scheme 'magic' is not known"),
        ("manifest.json", b'{"scheme": "onnx_int8"}', "model.onnx cannot be loaded"),
        ("model.safetensors", None, "no \\*.safetensors"),
        ("tokenizer.json", None, "no tokenizer"),
    ],
)
def test_load_refuses_unusable_directories(
    directory: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        ServedModel(tmp_path, 480, 300)


def test_load_refuses_weights_that_are_not_numbers(directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not a finite number"):
        ServedModel(tmp_path, 480, 300)
