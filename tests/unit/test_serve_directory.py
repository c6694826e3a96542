"""A plain directory to be served: what is looked at before anything starts, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError, CorruptArtifact, ModelError
from cluster.model_directory import model_kind, read_model_directory
from cluster.published import publish_directory
from cluster.storage import open_storage
from jobs.serve_directory import directory_arguments, name_of
from services.endpoint.encoders import EncoderModel
from services.endpoint.fixed import FixedModel
from services.endpoint.model import ServedModel
from services.endpoint.schema import DirectoryArguments
from tests.encoder_models import save_classifier, save_encoder
from tests.endpoint_models import save_version


def arguments(directory: Path, **fields: Any) -> DirectoryArguments:
    return DirectoryArguments(model_name="m", directory=str(directory), **fields)


def test_directory_without_a_manifest_is_served_as_it_is(tmp_path: Path) -> None:
    save_version(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not opened")
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('ran')")
    found = read_model_directory(str(tmp_path))
    assert (found.kind, found.verified) == ("language_model", False)
    assert found.left_alone == ("modeling_evil.py", "pytorch_model.bin")
    fixed = FixedModel(arguments(tmp_path))
    assert fixed.served is not None
    assert isinstance(fixed.served.model, ServedModel)
    assert fixed.served.champion.version == found.version
    assert fixed.problem is None


@pytest.mark.parametrize(("save", "kind"), [(save_encoder, "embeddings"), (save_classifier, "classifications")])
def test_directory_of_an_encoder_is_known_by_its_config(tmp_path: Path, save: Any, kind: str) -> None:
    save(tmp_path)
    fixed = FixedModel(arguments(tmp_path))
    assert fixed.served is not None
    assert isinstance(fixed.served.model, EncoderModel)
    assert fixed.served.model.kind == model_kind(tmp_path) == kind


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("LlamaForCausalLM", "language_model"),
        ("GPT2LMHeadModel", "language_model"),
        ("BertModel", "embeddings"),
        ("BertForMaskedLM", "embeddings"),
        ("DistilBertForSequenceClassification", "classifications"),
        (None, "language_model"),
    ],
)
def test_kind_is_read_off_the_architecture(tmp_path: Path, architecture: str | None, kind: str) -> None:
    config = {"model_type": "x", **({"architectures": [architecture]} if architecture else {})}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_kind(tmp_path) == kind


def test_published_directory_is_held_to_its_manifest(tmp_path: Path) -> None:
    save_version(tmp_path / "local")
    publish_directory(tmp_path / "local", open_storage(str(tmp_path)), "published", scheme="float")
    directory = tmp_path / "published"
    assert read_model_directory(str(directory)).verified
    weights = directory / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors has sha256"):
        read_model_directory(str(directory))
    weights.write_bytes(whole)
    manifest = (directory / "manifest.json").read_text()
    for damaged in (manifest[:-20], "[]", manifest.replace('"sha256": "' + json.loads(manifest)["sha256"], '"x": "')):
        (directory / "manifest.json").write_text(damaged)
        with pytest.raises(CorruptArtifact, match=r"manifest\.json is damaged"):
            read_model_directory(str(directory))
    (directory / "manifest.json").write_text(manifest)
    (directory / "added.json").write_text("{}")
    with pytest.raises(CorruptArtifact, match="not in the manifest"):
        FixedModel(arguments(directory))


def test_directories_that_cannot_be_served_are_refused_in_one_line(tmp_path: Path) -> None:
    def refused(directory: Path, message: str) -> None:
        with pytest.raises(ModelError, match=message) as error:
            FixedModel(arguments(directory))
        assert "\n" not in str(error.value)

    refused(tmp_path / "missing", "no such directory")
    refused(tmp_path, "no config.json")
    save_version(tmp_path)
    config = (tmp_path / "config.json").read_text()
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "not valid JSON")
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    refused(tmp_path, r"holds no \*.safetensors weights")
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(tmp_path, "cannot be loaded")
    unknown = {**json.loads(config), "model_type": "mystery", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(unknown))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(ModelError):
        FixedModel(arguments(tmp_path))


def test_hub_ids_are_not_downloaded() -> None:
    with pytest.raises(ModelError, match="download the model first"):
        read_model_directory("someone/model")


def test_arguments_come_from_options_and_overrides(tmp_path: Path) -> None:
    save_version(tmp_path)
    made, found = directory_arguments(str(tmp_path), None, ["max_new_tokens=7", "port=1"], None, 9)
    assert (made.max_new_tokens, made.port, made.host) == (7, 9, "127.0.0.1")
    assert made.model_name == tmp_path.name
    assert made.directory == str(found.path)
    assert directory_arguments(str(tmp_path), "teacher", [], "::1", None)[0].model_name == "teacher"
    with pytest.raises(ConfigError, match="max_new_token"):
        directory_arguments(str(tmp_path), None, ["max_new_token=7"], None, None)


@pytest.mark.parametrize(
    ("model", "name"),
    [("/a/b/SmolLM2-135M/", "SmolLM2-135M"), ("s3://b/Ein Modell", "Ein-Modell"), ("models:/demo@champion", "demo")],
)
def test_name_is_the_last_part_of_the_place(model: str, name: str) -> None:
    assert name_of(model) == name


def test_place_without_a_name_asks_for_one() -> None:
    with pytest.raises(ConfigError, match="--name"):
        name_of("/")
