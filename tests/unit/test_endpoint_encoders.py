"""Encoders: vectors as sentence-transformers makes them, probabilities of labels, limits, and what is refused."""

import base64
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from cluster.errors import ModelError
from services.endpoint.api import build_api
from services.endpoint.encoder_weights import load_encoder
from services.endpoint.encoders import EncoderModel, batches
from services.endpoint.errors import ApiError
from services.endpoint.fixed import FixedModel
from services.endpoint.schema import DirectoryArguments
from tests.encoder_models import LABELS, save_classifier, save_encoder, word_piece_tokenizer
from tests.endpoint_models import save_version

TEXTS = ["the cat sat on a mat", "red hats", "", "unhappy dogs sat on the red mat und der bar"]


def never() -> bool:
    return False


def token_vectors(model: Any, text: str) -> torch.Tensor:
    """The last hidden states [T, D] of one text alone."""
    ids = torch.tensor([word_piece_tokenizer().encode(text)])
    with torch.no_grad():
        return model(ids).last_hidden_state[0]


# The formulas of sentence_transformers.models.Pooling, for one text without padding.
FORMULAS = {
    "pooling_mode_cls_token": lambda tokens_TD: tokens_TD[0],
    "pooling_mode_mean_tokens": lambda tokens_TD: tokens_TD.mean(0),
    "pooling_mode_max_tokens": lambda tokens_TD: tokens_TD.max(0).values,
    "pooling_mode_mean_sqrt_len_tokens": lambda tokens_TD: tokens_TD.sum(0) / len(tokens_TD) ** 0.5,
    "pooling_mode_weightedmean_tokens": lambda tokens_TD: (
        (tokens_TD * torch.arange(1, len(tokens_TD) + 1)[:, None]).sum(0) / sum(range(1, len(tokens_TD) + 1))
    ),
    "pooling_mode_lasttoken": lambda tokens_TD: tokens_TD[-1],
}


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("mode", FORMULAS)
def test_embeddings_follow_the_pooling_of_the_directory(tmp_path: Path, mode: str, normalise: bool) -> None:
    reference = save_encoder(tmp_path, {"word_embedding_dimension": 16, mode: True}, normalise)
    model = EncoderModel(tmp_path, "embeddings", 64)
    found = model.embed([model.encode(text, truncate=False) for text in TEXTS], never)
    for text, vector in zip(TEXTS, found, strict=True):
        expected = FORMULAS[mode](token_vectors(reference, text))
        if normalise:
            expected = expected / expected.norm()
        assert np.abs(vector - expected.numpy()).max() < 1e-5


def test_embeddings_join_several_poolings_and_read_the_newer_name(tmp_path: Path) -> None:
    both = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    reference = save_encoder(tmp_path / "both", both)
    model = EncoderModel(tmp_path / "both", "embeddings", 64)
    assert model.dimensions == 32
    tokens_TD = token_vectors(reference, "red hats")
    [found] = model.embed([model.encode("red hats", truncate=False)], never)
    assert np.abs(found - torch.cat([tokens_TD[0], tokens_TD.mean(0)]).numpy()).max() < 1e-5
    save_encoder(tmp_path / "newer", {"embedding_dimension": 16, "pooling_mode": "cls"})
    newer = EncoderModel(tmp_path / "newer", "embeddings", 64)
    [found] = newer.embed([newer.encode("red hats", truncate=False)], never)
    assert np.abs(found - tokens_TD[0].numpy()).max() < 1e-5


def test_embeddings_without_a_config_are_the_mean(tmp_path: Path) -> None:
    reference = save_encoder(tmp_path)
    model = EncoderModel(tmp_path, "embeddings", 64)
    [found] = model.embed([model.encode("red hats", truncate=False)], never)
    assert np.abs(found - token_vectors(reference, "red hats").mean(0).numpy()).max() < 1e-5


@pytest.mark.parametrize("saved", ["T5EncoderModel", "T5Model"])
@torch.inference_mode()
def test_half_of_t5_that_reads_is_an_encoder(tmp_path: Path, saved: str) -> None:
    import transformers
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    getattr(transformers, saved)(config).save_pretrained(tmp_path)
    ids_BT = torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]])
    mask_BT = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    found = load_encoder(tmp_path, "embeddings", "float")(ids_BT, mask_BT)
    plain = T5EncoderModel.from_pretrained(tmp_path)
    assert torch.equal(found, plain(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state)


def test_texts_are_prepared_as_the_directory_says(tmp_path: Path) -> None:
    save_encoder(tmp_path, {"pooling_mode_mean_tokens": True})
    prompts = {"prompts": {"query": "the cat "}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    model = EncoderModel(tmp_path, "embeddings", 64)
    assert model.encode("  sat ", truncate=False) == word_piece_tokenizer().encode("the cat sat")
    assert model.max_context_tokens == 32


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}], "names a module Dense"),
        ([{"type": "sentence_transformers.models.Transformer", "path": "0_Transformer"}], "in the directory itself"),
        ([{"type": "sentence_transformers.models.Transformer", "path": ""}], "names no Pooling"),
        ({"a": 1}, "expected a list of modules"),
    ],
)
def test_modules_that_are_not_known_are_refused(tmp_path: Path, modules: Any, message: str) -> None:
    save_encoder(tmp_path, {"pooling_mode_mean_tokens": True})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match=message):
        EncoderModel(tmp_path, "embeddings", 64)


def test_classifier_without_its_head_is_refused(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    with pytest.raises(ModelError, match="needs weights that are not there"):
        EncoderModel(tmp_path, "classifications", 64)


def test_regression_is_refused(tmp_path: Path) -> None:
    save_classifier(tmp_path, problem_type="regression")
    with pytest.raises(ModelError, match="regression"):
        EncoderModel(tmp_path, "classifications", 64)


@pytest.mark.parametrize(("problem", "total"), [(None, 1.0), ("multi_label_classification", None)])
def test_probabilities_are_those_of_transformers(tmp_path: Path, problem: str | None, total: float | None) -> None:
    reference = save_classifier(tmp_path, **({"problem_type": problem} if problem else {}))
    model = EncoderModel(tmp_path, "classifications", 64)
    assert model.labels == LABELS
    found = model.classify([model.encode(text, truncate=False) for text in TEXTS], never)
    for text, row in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([word_piece_tokenizer().encode(text)])).logits[0]
        expected = logits.sigmoid() if problem else logits.softmax(-1)
        assert np.abs(row - expected.numpy()).max() < 1e-5
        assert total is None or abs(row.sum() - total) < 1e-5


def test_long_texts_are_refused_or_cut(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    model = EncoderModel(tmp_path, "embeddings", 8)
    with pytest.raises(ApiError) as refused:
        model.encode("the cat " * 20, truncate=False)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "input")
    cut = model.encode("the cat " * 20, truncate=True)
    assert len(cut) == 8
    assert (cut[0], cut[-1]) == (model.tokenizer.cls_token_id, model.tokenizer.sep_token_id)
    assert model.encode(list(range(20)), truncate=True) == list(range(8))
    with pytest.raises(ApiError, match="not below"):
        model.encode([10**6], truncate=False)


@pytest.mark.parametrize(("lengths", "limit"), [([3, 1, 2, 9, 1], 6), ([], 6), ([7, 7], 6), ([1] * 50, 8)])
def test_batches_hold_every_text_once_within_the_limit(lengths: list[int], limit: int) -> None:
    found = list(batches(lengths, limit))
    assert sorted(place for batch in found for place in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or max(lengths[place] for place in batch) * len(batch) <= limit


def test_embedding_does_not_depend_on_its_company(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    model = EncoderModel(tmp_path, "embeddings", 64)
    ids = [model.encode(text, truncate=False) for text in TEXTS]
    together = model.embed(ids, never)
    for place, alone in enumerate(ids):
        assert np.abs(model.embed([alone], never)[0] - together[place]).max() < 1e-5


# --- over HTTP --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[TestClient]:
    arguments = DirectoryArguments(model_name="m", directory=str(directory), max_inputs=8)
    with TestClient(build_api(arguments, FixedModel(arguments))) as client:
        yield client


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    directory = tmp_path_factory.mktemp("embeddings")
    save_encoder(directory, {"pooling_mode_mean_tokens": True}, normalise=True)
    with serving(directory) as client:
        yield client


@pytest.fixture(scope="module")
def classifications(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    directory = tmp_path_factory.mktemp("classifications")
    save_classifier(directory)
    with serving(directory) as client:
        yield client


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    directory = tmp_path_factory.mktemp("language")
    save_version(directory)
    with serving(directory) as client:
        yield client


def test_embeddings_are_listed_with_usage(embeddings: TestClient) -> None:
    found = embeddings.post("/v1/embeddings", json={"model": "m", "input": TEXTS}).json()
    assert (found["object"], found["model"]) == ("list", "m")
    assert [(item["object"], item["index"]) for item in found["data"]] == [("embedding", i) for i in range(len(TEXTS))]
    num_tokens = sum(len(word_piece_tokenizer().encode(text)) for text in TEXTS)
    assert found["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    for item in found["data"]:
        assert abs(np.linalg.norm(item["embedding"]) - 1) < 1e-5


def test_embeddings_in_base64_are_the_same_numbers(embeddings: TestClient) -> None:
    plain = embeddings.post("/v1/embeddings", json={"model": "m", "input": "red hats"}).json()["data"][0]["embedding"]
    body = {"model": "m", "input": "red hats", "encoding_format": "base64"}
    packed = embeddings.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(packed), "<f4").tolist() == plain


def test_embeddings_take_token_ids(embeddings: TestClient) -> None:
    ids = word_piece_tokenizer().encode("red hats")
    forms = ("red hats", ["red hats"], ids, [ids])
    found = [embeddings.post("/v1/embeddings", json={"model": "m", "input": form}).json()["data"] for form in forms]
    assert all(item == found[0] for item in found)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"dimensions": 8}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"input": []}, "input"),
        ({"input": 7}, "input"),
        ({"input": ["a"] * 9}, "input"),
        ({"input": "the cat " * 40}, "input"),
        ({"input": [10**6]}, "input"),
        ({"truncate": "yes"}, "truncate"),
    ],
)
def test_embeddings_refuse_what_they_cannot_do(embeddings: TestClient, change: dict, param: str) -> None:
    refused = embeddings.post("/v1/embeddings", json={"model": "m", "input": "a", **change})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"].partition(".")[0] == param
    assert embeddings.post("/v1/embeddings", json={"model": "m", "input": "a", "dimensions": 16}).status_code == 200


def test_embeddings_are_shortened_only_where_the_model_was_trained_for_it(tmp_path: Path) -> None:
    save_encoder(tmp_path, {"pooling_mode_mean_tokens": True}, matryoshka_dimensions=[4, 16])
    body = {"model": "m", "input": "red hats"}
    with serving(tmp_path) as client:
        full, short = (client.post("/v1/embeddings", json={**body, "dimensions": size}).json() for size in (16, 4))
        assert client.post("/v1/embeddings", json={**body, "dimensions": 5}).status_code == 400
    expected = np.array(full["data"][0]["embedding"][:4])
    assert np.abs(short["data"][0]["embedding"] - expected / np.linalg.norm(expected)).max() < 1e-6


def test_classifications_list_labels_by_probability(classifications: TestClient) -> None:
    found = classifications.post("/v1/classifications", json={"model": "m", "input": TEXTS}).json()
    assert len(found["data"]) == len(TEXTS)
    for item in found["data"]:
        values = [pair["probability"] for pair in item["probabilities"]]
        assert {pair["label"] for pair in item["probabilities"]} == set(LABELS)
        assert values == sorted(values, reverse=True)
        assert abs(sum(values) - 1) < 1e-5
        assert item["label"] == item["probabilities"][0]["label"]
    top = classifications.post("/v1/classifications", json={"model": "m", "input": TEXTS, "top_k": 1}).json()
    assert [len(item["probabilities"]) for item in top["data"]] == [1] * len(TEXTS)


@pytest.mark.parametrize("kind", ["language_model", "embeddings", "classifications"])
def test_paths_for_other_models_are_404(kind: str, request: pytest.FixtureRequest) -> None:
    client: TestClient = request.getfixturevalue(kind)
    paths = {
        "/v1/completions": ("language_model", {"prompt": "a"}),
        "/v1/chat/completions": ("language_model", {"messages": [{"role": "user", "content": "a"}]}),
        "/v1/embeddings": ("embeddings", {"input": "a"}),
        "/v1/classifications": ("classifications", {"input": "a"}),
    }
    for path, (right, body) in paths.items():
        answer = client.post(path, json={"model": "m", **body})
        assert answer.status_code == (200 if right == kind else 404)
        if right != kind:
            error = answer.json()["error"]
            assert (error["param"], error["code"]) == ("model", "operation_not_supported")
            assert "ask /v1/" in error["message"]
