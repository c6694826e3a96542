"""`raystill prepare CONFIG --dry-run`: close to what preparing gives, and nothing is written."""

import gzip
import json
import subprocess

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cluster.errors import CorpusError
from cluster.storage import open_storage
from jobs.config import RunConfig
from jobs.corpus import find_sources
from jobs.prepare import prepare
from jobs.preparing.estimate import estimate
from tests import tiny
from tests.unit.test_prepare import NoBar

SHAPE = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}


def config_of(tmp_path, **data):
    return RunConfig(
        name="mine",
        storage=str(tmp_path / "out"),
        data={"sources": [str(tmp_path / "in")], "sequence_length": 32, **data},
        student={"shape": SHAPE, **({} if "train_tokenizer" in data else {"tokenizer": str(tmp_path / "tokenizer")})},
        distill={"alpha": 1},
        train={"steps": 1, "global_batch": 1},
    )


@pytest.fixture
def corpus(tmp_path):
    """Objects of all kinds, larger than the sample."""
    tiny.tokenizer(tmp_path / "tokenizer")
    lines = tiny.corpus(tmp_path / "in", 9000, seed=1).read_bytes()
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress(tiny.corpus(tmp_path / "x", 9000, seed=2).read_bytes()))
    texts = [json.loads(line)["text"] + "." for line in lines.splitlines()]
    pq.write_table(pa.table({"text": texts}), tmp_path / "in" / "c.parquet", row_group_size=1000)
    return tmp_path


def test_dry_run_is_near_what_preparing_gives(corpus):
    config = config_of(corpus)
    found = estimate(config, NoBar())
    sources = find_sources(config.data.sources)
    manifest = prepare(
        sources, config.data, str(corpus / "tokenizer"), 1, open_storage(str(corpus / "root")), "store/x", NoBar()
    )
    assert found["objects"] == 3
    assert found["bytes"] == sum(source.info.size_bytes for source in sources)
    assert found["sampled_bytes"] < 0.8 * found["bytes"]
    assert found["documents"] == pytest.approx(manifest["documents"] + manifest["duplicates"], rel=0.15)
    assert found["tokens"] == pytest.approx(sum(manifest["tokens"].values()), rel=0.15)


def test_dry_run_of_an_object_that_is_read_whole_is_exact(tmp_path):
    tiny.tokenizer(tmp_path / "tokenizer")
    tiny.corpus(tmp_path / "in", 50)
    found = estimate(config_of(tmp_path), NoBar())
    assert found["sampled_bytes"] == found["bytes"]
    assert found["documents"] == 50


def test_dry_run_trains_its_tokenizer_on_the_sample_and_names_damage(tmp_path):
    tiny.corpus(tmp_path / "in", 50)
    assert estimate(config_of(tmp_path, train_tokenizer={"vocab_size": 300}), NoBar())["tokens"] > 500
    (tmp_path / "in" / "bad.jsonl").write_text("{")
    with pytest.raises(CorpusError, match=r"bad\.jsonl: line 1"):
        estimate(config_of(tmp_path, train_tokenizer={"vocab_size": 300}), NoBar())
    skipping = config_of(tmp_path, train_tokenizer={"vocab_size": 300}, on_error="skip")
    assert estimate(skipping, NoBar())["objects"] == 2


def test_dry_run_on_the_command_line_writes_nothing(tmp_path, command):
    tiny.corpus(tmp_path / "in", 50)
    config = config_of(tmp_path, train_tokenizer={"vocab_size": 300}).model_dump(mode="json", by_alias=True)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    before = sorted(tmp_path.rglob("*"))
    said = [
        subprocess.run(
            [*command, "prepare", "mine.yaml", "--dry-run", *more], cwd=tmp_path, capture_output=True, text=True
        )
        for more in ([], ["--json"])
    ]
    assert [item.returncode for item in said] == [0, 0], said[0].stderr
    assert "1 object," in said[0].stdout
    assert "nothing was written" in said[0].stdout
    assert json.loads(said[1].stdout)["documents"] == 50
    assert sorted(tmp_path.rglob("*")) == before
