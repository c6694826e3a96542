"""What is looked at before anything is written, on models that are there."""

import pytest

from cluster.errors import ModelError
from jobs.config import RunConfig
from jobs.preflight import check_config
from tests import tiny


def config_of(directory, **student):
    return RunConfig.model_validate(
        {
            "name": "check",
            "storage": str(directory / "storage"),
            "data": {"sources": [str(tiny.corpus(directory / "in", 4))], "sequence_length": 16},
            "teacher": {"model": str(directory / "teacher")},
            "student": {"from_teacher": {"layers": [0]}, **student},
            "train": {"steps": 1, "global_batch": 1, "micro_batch": 1},
        }
    )


def test_teacher_without_tokenizer_takes_the_one_that_is_named(tmp_path):
    whole = tiny.save_model(tmp_path / "whole")
    bare = tiny.save_model(tmp_path / "teacher")
    for path in bare.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    with pytest.raises(ModelError, match=r"student\.tokenizer"):
        check_config(config_of(tmp_path))
    named = config_of(tmp_path, tokenizer=str(whole))
    check_config(named)
    assert named.tokenizer_source == (str(whole), None)
