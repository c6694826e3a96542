"""The config: what is shipped parses, a mistake is one line with a way out, and identity holds all that matters."""

import copy
import json
import subprocess
from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import Field, ValidationError

import jobs
from cluster.config import Config, apply_override, execution, load, validate
from cluster.errors import ConfigError
from jobs.config import RunConfig

SHIPPED = sorted((Path(jobs.__file__).parent / "configs").glob("*.yaml"))

BASE = {
    "name": "run",
    "data": {"sources": ["corpus.jsonl"]},
    "teacher": {"model": "/teacher"},
    "student": {"shape": {"num_hidden_layers": 1}},
    "train": {"steps": 2},
}
TRAINED = [
    "teacher.model=null",
    "teacher.shape.model_type=llama",
    "teacher.train.steps=1",
    "data.train_tokenizer.vocab_size=400",
]
"""Overrides that turn the teacher into one that is trained first."""


def made(*overrides):
    raw = copy.deepcopy(BASE)
    for override in overrides:
        apply_override(raw, override)
    return validate(RunConfig, raw, "x.yaml")


def refusal(*overrides):
    with pytest.raises(ConfigError) as caught:
        made(*overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- files ------------------------------------------------------------------------------------------------------------


def test_shipped_configs_are_found():
    assert "demo.yaml" in [path.name for path in SHIPPED]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_parses_and_survives_its_own_dump(path):
    config = load(RunConfig, path)
    assert config.storage
    dumped = yaml.safe_dump(config.model_dump(mode="json", by_alias=True))
    assert RunConfig.model_validate(yaml.safe_load(dumped)) == config


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["no such file", "jobs/configs/"]),
        ("a: [1", ["not valid YAML"]),
        ("- 1\n- 2\n", ["expected keys and values", "list"]),
        ("just text", ["expected keys and values", "str"]),
        ("name: a\nname: b\n", ["'name' is given twice"]),
        ("train:\n  steps: 1\n  steps: 2\n", ["'steps' is given twice"]),
        ("", ["name is missing", "train is missing"]),
    ],
)
def test_config_file_that_is_no_config_is_one_line(tmp_path, content, words):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load(RunConfig, path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in [*words, "mine.yaml"])


def test_config_file_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("name: grün".encode("latin-1"))
    for path in (tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(ConfigError, match="cannot be read"):
            load(RunConfig, path)


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "unknown", "near"),
    [
        (["trian.steps=1"], "trian", "train"),
        (["registr.model_name=x"], "registr", "register"),
        (["train.stepz=1"], "train.stepz", "train.steps"),
        (["register.model_nam=x"], "register.model_nam", "register.model_name"),
        (["cluster.adress=x"], "cluster.adress", "cluster.address"),
        (["serve.prot=1"], "serve.prot", "serve.port"),
        (["serve.questio=1"], "serve.questio", "serve.question"),
        ([*TRAINED, "teacher.train.stepz=1"], "teacher.train.stepz", "teacher.train.steps"),
        (["data.train_tokenizer.vocabsize=400"], "data.train_tokenizer.vocabsize", "data.train_tokenizer.vocab_size"),
        (["student.from_teacher.layer=[1]"], "student.from_teacher.layer", "student.from_teacher.layers"),
    ],
)
def test_unknown_key_names_the_nearest_known_one_at_every_depth(overrides, unknown, near):
    assert f"unknown key {unknown}: did you mean {near}?" in refusal(*overrides)


def test_unknown_key_far_from_any_lists_the_known_ones():
    assert "unknown key register.xyzzy: known: model_name" in refusal("register.xyzzy=1")
    assert "register, serve" in refusal("xyzzy=1")


def test_several_mistakes_are_all_in_one_line():
    message = refusal("train.steps=0", "train.betas=x", "foo=1")
    assert all(part in message for part in ("train.steps: found 0", "train.betas: found 'x'", "unknown key foo"))


def test_missing_key_is_named():
    raw = copy.deepcopy(BASE)
    del raw["train"]["steps"]
    with pytest.raises(ConfigError, match=r"train\.steps is missing; set it"):
        validate(RunConfig, raw, "x.yaml")


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("train.steps=20", "train.steps", 20),
        ("train.learning_rate=3e-3", "train.learning_rate", 0.003),
        ("train.learning_rate=3.0e-3", "train.learning_rate", 0.003),
        ("train.learning_rate=1E-4", "train.learning_rate", 0.0001),
        ("train.betas=[0.8, 9e-1]", "train.betas", (0.8, 0.9)),
        ("train.threads_per_worker=null", "train.threads_per_worker", None),
        ("train.threads_per_worker=", "train.threads_per_worker", None),
        ("train.use_gpu=true", "train.use_gpu", True),
        ("data.sources=[a.jsonl, s3://b/c]", "data.sources", ["a.jsonl", "s3://b/c"]),
        ("serve.question=1 = 1?", "serve.question", "1 = 1?"),
        ("storage=file:///somewhere/a=b", "storage", "file:///somewhere/a=b"),
        ("student.shape.rms_norm_eps=1e-5", "student.shape", {"num_hidden_layers": 1, "rms_norm_eps": 1e-5}),
        ("student.shape={hidden_size: 8, tie_word_embeddings: false}", "student.shape", None),
        ("register.model_name=other", "model_name", "other"),
    ],
)
def test_override_sets_a_typed_value(override, place, value):
    found = made(override)
    for part in place.split("."):
        found = getattr(found, part)
    assert found == (value if place != "student.shape" or value else {"hidden_size": 8, "tie_word_embeddings": False})
    assert type(found) is type(value) or value is None


def test_number_in_scientific_notation_is_a_number_in_yaml_too(tmp_path):
    path = tmp_path / "x.yaml"
    text = yaml.safe_dump(BASE).replace("steps: 2", "steps: 2e1\n  learning_rate: 3e-3\n  weight_decay: -0e0")
    path.write_text(text.replace("num_hidden_layers: 1", "rms_norm_eps: 1e-05\n    name: 3e"))
    config = load(RunConfig, path, ["train.final_rate=5e-2"])
    assert (config.train.steps, config.train.learning_rate, config.train.final_rate) == (20, 0.003, 0.05)
    assert config.student.shape == {"rms_norm_eps": 1e-5, "name": "3e"}


def test_override_makes_a_section_that_was_null():
    assert made("data.train_tokenizer=null").data.train_tokenizer is None
    assert made(*TRAINED[:-1], "data.train_tokenizer=null", TRAINED[-1]).data.train_tokenizer.vocab_size == 400


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps", ["'train.steps'", "expected key.path=value"]),
        ("=3", ["expected key.path=value"]),
        ("name.first=x", ["name is 'run'", "no keys of its own"]),
        ("train.steps.more.deep=x", ["train.steps is 2", "no keys of its own"]),
        ("train.steps=[1", ["not valid YAML", "quote it"]),
        ("train.steps=20=30", ["train.steps: found '20=30'", "integer"]),
        ("train.steps=2.5", ["train.steps: found 2.5", "integer"]),
        ("train.steps=0", ["train.steps: found 0", "greater than or equal to 1"]),
        ("train.steps=null", ["train.steps: found null"]),
        ("train.steps=true", ["train.steps: found true", "neither a number nor a text"]),
        ("name=false", ["name: found false"]),
        ("train.learning_rate=.inf", ["train.learning_rate: found inf", "finite"]),
        ("train.learning_rate=.nan", ["train.learning_rate: found nan", "finite"]),
        ("train=5", ["train: found 5", "mapping of keys to values"]),
        ("data.sources.0=x", ["data.sources", "no keys of its own"]),
        ("data.sources=[a, 5]", ["data.sources.1: found 5", "string"]),
        ("student.shape.rope={a: 1}", ["student.shape.rope: found {'a': 1}; input should be a valid boolean or"]),
        ("quantize.schemes=[int4]", ["quantize.schemes.0: found 'int4'", "'onnx_int8'"]),
        ("quantize.schemes=[]", ["quantize.schemes: found []", "at least 1"]),
        ("name=../other", ["name: found '../other'"]),
        ("name=a..b", ["name: must not contain '..'"]),
        ("serve.port=70000", ["serve.port: found 70000", "65535"]),
    ],
)
def test_wrong_value_names_the_key_and_what_was_found(override, words):
    message = refusal(override)
    assert all(word in message for word in words), message


def test_very_long_value_does_not_flood_the_message():
    assert len(refusal(f"train.steps={'x' * 5000}")) < 400


# --- fields that must fit each other ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.sources=[]"], ["sources=[]", "gather=None", "set either"]),
        (["data.gather=python_docs"], ["sources=['corpus.jsonl']", "gather=python_docs", "set either"]),
        (["train.num_workers=33"], ["num_workers=33", "global_batch=32", "lower num_workers or raise global_batch"]),
        (["teacher.model=null"], ["model=None", "shape=None", "set either"]),
        (["teacher.shape.model_type=llama", "teacher.train.steps=1"], ["model=/teacher", "shape={", "set either"]),
        (["teacher.train.steps=1"], ["shape", "train", "go together"]),
        (["teacher.deadline_s=1"], ["deadline_s=1.0", "attempt_timeout_s=60", "raise it"]),
        (["student.shape=null"], ["model, shape, from_teacher", "found none"]),
        (["student.model=x"], ["exactly one", "found model, shape"]),
        (["teacher=null"], ["distill.alpha=0.1", "teacher.model", "alpha=1"]),
        (
            ["teacher=null", "distill.alpha=1", "student={from_teacher: {layers: [0]}}"],
            ["student.from_teacher", "set teacher.model"],
        ),
        (TRAINED[:3], ["tokenizer", "data.train_tokenizer or student.tokenizer"]),
        (
            [*TRAINED[:2], "teacher.shape={hidden_size: 8}", *TRAINED[2:]],
            ["teacher.shape", "model_type", "for example"],
        ),
        (
            ["teacher=null", "distill.alpha=1", "student.shape.model_type=llama"],
            ["no tokenizer", "data.train_tokenizer or student.tokenizer"],
        ),
        (["teacher=null", "distill.alpha=1", "student.tokenizer=t"], ["student.shape", "model_type"]),
        (TRAINED[3:], ["data.train_tokenizer", "teacher.model=/teacher", "drop one"]),
        ([*TRAINED, "student.tokenizer=/t"], ["data.train_tokenizer", "student.tokenizer=/t", "drop one"]),
        (["teacher.replicas=3", "teacher.max_replicas=2"], ["max_replicas=2", "replicas=3", "raise it"]),
        (
            ["train.micro_batch=9", "data.sequence_length=100", "teacher.max_batch_tokens=899"],
            ["train.micro_batch=9", "data.sequence_length=100", "900", "is 899", "lower train.micro_batch"],
        ),
        (
            ["quantize.schemes=[onnx_int8]"],
            ["promote.scheme=int8_weight_only", "quantize.schemes=['onnx_int8']", "add it"],
        ),
    ],
)
def test_fields_that_do_not_fit_are_one_line_with_values_and_a_way_out(overrides, words):
    message = refusal(*overrides)
    assert all(word in message for word in words), message


def test_fields_at_the_edge_of_what_fits_are_taken():
    made("train.num_workers=32")
    made("train.micro_batch=9", "data.sequence_length=100", "teacher.max_batch_tokens=900")
    made("teacher.deadline_s=60")
    made(*TRAINED)
    made("teacher=null", "distill.alpha=1", "student.tokenizer=t", "student.shape.model_type=llama")
    # Without a question to the teacher its token budget is of no interest.
    made("distill.alpha=1", "train.micro_batch=9", "data.sequence_length=100", "teacher.max_batch_tokens=899")


# --- the base ---------------------------------------------------------------------------------------------------------


class Inner(Config):
    size: int = Field(1, ge=1)
    speed: int = execution(1, ge=1)


class Outer(Config):
    inner: Inner = Inner()
    kind: Literal["a", "b"] = "a"
    flag: bool | None = None


def test_config_is_frozen_and_replace_validates():
    config = Outer()
    with pytest.raises(ValidationError, match="frozen"):
        config.kind = "b"
    assert config.replace(kind="b") == Outer(kind="b")
    assert config.replace(inner=Inner(size=3)).inner.size == 3
    assert config == Outer()
    with pytest.raises(ValidationError, match="'a' or 'b'"):
        config.replace(kind="c")
    with pytest.raises(ValidationError, match="Extra inputs"):
        config.replace(knd="b")


def test_run_config_replace_validates_fields_against_each_other():
    config = made()
    assert config.replace(name="other").name == "other"
    with pytest.raises(ValidationError, match="needs a teacher"):
        config.replace(teacher=None)


def test_execution_keeps_the_constraints_and_the_default():
    assert Inner().speed == 1
    with pytest.raises(ValidationError):
        Inner(speed=0)


def test_flag_takes_true_and_a_number_does_not():
    assert Outer(flag=True).flag is True
    with pytest.raises(ValidationError, match="neither a number nor a text"):
        Inner(size=True)


def test_storage_defaults_to_the_runs_name():
    assert made().storage == "runs/run"
    assert made("storage=s3://bucket/x").storage == "s3://bucket/x"


def test_schema_command_prints_a_json_schema_with_descriptions(command, tmp_path):
    done = subprocess.run([*command, "schema"], cwd=tmp_path, capture_output=True, text=True, check=True)
    schema = json.loads(done.stdout)
    assert {"name", "storage", "teacher", "student", "data", "distill", "train"} <= schema["properties"].keys()
    assert "register" in schema["properties"]
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["TrainConfig"]["properties"]["steps"]["description"] == "Optimiser steps."
    assert schema["$defs"]["TrainConfig"]["properties"]["num_workers"]["execution"] is True
