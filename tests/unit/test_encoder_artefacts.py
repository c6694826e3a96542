"""Encoders from a directory to a served quantised artefact: its answers beside those of the model it was made of."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from starlette.testclient import TestClient

from cluster.encoder_texts import TextReader, text_files
from cluster.errors import ConfigError, ModelError
from cluster.model_directory import read_model_directory
from jobs import quantize_encoder as job
from jobs.quantization import onnx_int8
from jobs.quantization.encoder_scorer import EncoderScorer
from services.endpoint.api import build_api
from services.endpoint.encoders import EncoderModel
from services.endpoint.fixed import FixedModel
from services.endpoint.schema import DirectoryArguments
from tests.encoder_models import LABELS, save_classifier, save_encoder

TEXTS = ["the cat sat on a mat", "red hats", "unhappy dogs sat on the red mat und der bar " * 9]
SCHEMES = ["int8_weight_only", "onnx_int8"]
ROWS = [[2, 7, 8, 9, 3]]


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder whose pooling, prompt and limit are none that hold by themselves; its config names a head that is not
    there, as that of all-mpnet-base-v2 does."""
    directory = tmp_path_factory.mktemp("sentences") / "m"
    save_encoder(directory, {"pooling_mode_cls_token": True}, normalise=True)
    prompts = {"prompts": {"query": "the cat "}, "default_prompt_name": "query"}
    (directory / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    (directory / "README.md").write_text("not about texts")
    _quantise(directory)
    return directory


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("classifier") / "m"
    save_classifier(directory, problem_type="multi_label_classification")
    _quantise(directory)
    return directory


def _quantise(directory: Path) -> None:
    for scheme in SCHEMES:
        job.make_artefact(directory, directory.parent / scheme, scheme, ROWS, 1)


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[TestClient]:
    arguments = DirectoryArguments(model_name="m", directory=str(directory))
    with TestClient(build_api(arguments, FixedModel(arguments))) as client:
        yield client


def ask(directory: Path, path: str) -> list[Any]:
    with serving(directory) as client:
        answer = client.post(path, json={"model": "m", "input": TEXTS, "truncate": True})
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_embeddings_of_an_artefact_are_near_those_of_its_model(sentences: Path, scheme: str) -> None:
    artefact = sentences.parent / scheme
    exact, found = (
        np.array([item["embedding"] for item in ask(path, "/v1/embeddings")]) for path in (sentences, artefact)
    )
    assert 0 < np.abs(found - exact).max() < 0.06
    scored = EncoderScorer(artefact, scheme, 1).outputs(job.read_texts(sentences, TEXTS))[:, 0]
    expected = torch.nn.functional.normalize(scored, dim=-1).numpy()
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_classifications_of_an_artefact_are_near_those_of_its_model(classifier: Path, scheme: str) -> None:
    artefact = classifier.parent / scheme

    def probabilities(path: Path) -> np.ndarray[Any, Any]:
        answers = ask(path, "/v1/classifications")
        rows = [{pair["label"]: pair["probability"] for pair in item["probabilities"]} for item in answers]
        return np.array([[row[label] for label in LABELS] for row in rows])

    exact, found = probabilities(classifier), probabilities(artefact)
    assert 0 < np.abs(found - exact).max() < 0.06
    scored = EncoderScorer(artefact, scheme, 1).outputs(job.read_texts(classifier, TEXTS))
    assert np.abs(found - torch.sigmoid(scored).numpy()).max() < 1e-5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_artefact_says_of_texts_what_its_directory_says(sentences: Path, scheme: str) -> None:
    artefact = sentences.parent / scheme
    assert read_model_directory(str(artefact)).verified
    for name in (
        *("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
    ):
        assert (artefact / name).read_bytes() == (sentences / name).read_bytes()
    assert not (artefact / "README.md").exists()
    model = EncoderModel(artefact, "embeddings", 64)
    assert (model.scheme, model.max_context_tokens) == (scheme, 32)
    before = EncoderModel(sentences, "embeddings", 64)
    assert [model.encode(text, True) for text in TEXTS] == [before.encode(text, True) for text in TEXTS]
    assert job.read_texts(artefact, TEXTS) == job.read_texts(sentences, TEXTS)


def test_artefact_takes_the_place_of_nothing_but_an_older_one(classifier: Path, tmp_path: Path) -> None:
    old = tmp_path / "int8_weight_only"
    job.make_artefact(classifier, old, "int8_weight_only", ROWS, 1)
    (tmp_path / "onnx_int8").mkdir()
    (tmp_path / "onnx_int8" / "thesis.txt").write_text("mine")
    for scheme, model, words in (
        ("onnx_int8", classifier, "is there already and has no manifest"),
        ("int8_weight_only", old, "lies where its int8_weight_only would go"),
    ):
        with pytest.raises(ConfigError, match=words):
            job.quantize_encoder(str(model), tmp_path, [scheme], TEXTS)
    assert (tmp_path / "onnx_int8" / "thesis.txt").read_text() == "mine"
    assert (old / "model.safetensors").is_file()


def test_modules_that_cannot_be_served_are_refused_before_any_work(tmp_path: Path) -> None:
    save_encoder(tmp_path / "m", {"pooling_mode_mean_tokens": True})
    modules = json.loads((tmp_path / "m/modules.json").read_text())
    dense = {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (tmp_path / "m/modules.json").write_text(json.dumps([*modules, dense]))
    with pytest.raises(ModelError, match="names a module Dense"):
        job.quantize_encoder(str(tmp_path / "m"), tmp_path / "made", ["onnx_int8"], TEXTS)
    assert not (tmp_path / "made").exists()


def test_masked_language_model_is_served_without_its_head(tmp_path: Path) -> None:
    save_encoder(tmp_path / "m")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "m")
    exact = np.array([item["embedding"] for item in ask(tmp_path / "m", "/v1/embeddings")])
    job.make_artefact(tmp_path / "m", tmp_path / "onnx_int8", "onnx_int8", ROWS, 1)
    found = np.array([item["embedding"] for item in ask(tmp_path / "onnx_int8", "/v1/embeddings")])
    assert 0 < np.abs(found - exact).max() < 0.06 * np.abs(exact).max()


@pytest.mark.parametrize("place", ["../x", "/", "1_Pooling/../../x"])
def test_module_outside_its_directory_is_refused(tmp_path: Path, place: str) -> None:
    save_encoder(tmp_path / "m", {"pooling_mode_mean_tokens": True})
    place = str(tmp_path / "x") if place == "/" else place
    modules = json.loads((tmp_path / "m/modules.json").read_text())
    (tmp_path / "m/modules.json").write_text(json.dumps([modules[0], {**modules[1], "path": place}]))
    (tmp_path / "m/1_Pooling").rename(tmp_path / "x")
    with pytest.raises(ModelError, match="outside the directory"):
        text_files(tmp_path / "m")
    with pytest.raises(ModelError, match="outside the directory"):
        EncoderModel(tmp_path / "m", "embeddings", 64)
    with pytest.raises(ModelError, match="outside the directory"):
        job.quantize_encoder(str(tmp_path / "m"), tmp_path / "made", ["onnx_int8"], TEXTS)
    assert not (tmp_path / "made").exists()


def test_module_that_lies_in_the_directory_itself_adds_no_file(tmp_path: Path) -> None:
    save_encoder(tmp_path, {"pooling_mode_mean_tokens": True}, normalise=True)
    modules = json.loads((tmp_path / "modules.json").read_text())
    (tmp_path / "modules.json").write_text(json.dumps([*modules[:2], {**modules[2], "path": "."}]))
    assert text_files(tmp_path) == ["modules.json", "sentence_bert_config.json", "1_Pooling/config.json"]


@pytest.mark.parametrize("family", ["roberta", "longformer", "xmod", "data2vec-text", "ibert", "lilt", "luke", "mpnet"])
def test_families_that_count_positions_from_behind_the_padding_read_fewer_tokens(tmp_path: Path, family: str) -> None:
    save_encoder(tmp_path)
    transformers.AutoConfig.for_model(family, max_position_embeddings=66, pad_token_id=1).save_pretrained(tmp_path)
    assert TextReader(tmp_path, 2048).max_tokens == 64


def test_graph_of_another_use_and_unknown_scheme_are_refused(tmp_path: Path) -> None:
    save_encoder(tmp_path / "m")
    bare = transformers.BertForTokenClassification(transformers.AutoConfig.from_pretrained(tmp_path / "m"))
    bare.save_pretrained(tmp_path / "m")
    onnx_int8.quantize(str(tmp_path / "m"), tmp_path / "m")
    for scheme, words in (
        ("onnx_int8", "its ONNX graph gives logits, embeddings need last_hidden_state"),
        ("int4_qat", "scheme 'int4_qat' of an encoder is not known here; known: float, int8_weight_only"),
    ):
        (tmp_path / "m/manifest.json").write_text(json.dumps({"scheme": scheme}))
        with pytest.raises(ModelError, match=words):
            EncoderModel(tmp_path / "m", "embeddings", 64)
