"""From files to the example store: nothing lost, nothing predicted twice, and damage named."""

import gzip
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from cluster.errors import CorpusError, CorruptArtifact
from cluster.pretrained import load_tokenizer
from cluster.storage import open_storage
from jobs.config import DataConfig
from jobs.corpus import find_sources, read_documents
from jobs.prepare import prepare
from jobs.preparing.documents import content, document_hash, is_held_out
from jobs.preparing.encoding import Encoder
from jobs.training.data import ExampleStore, collate
from tests import tiny


class NoBar:
    def start(self, total, note=""): ...
    def update(self, done=None, note=None): ...
    def say(self, text): ...
    def over(self, items):
        return items


@pytest.fixture(scope="module")
def tokenizer_uri(tmp_path_factory):
    return str(tiny.tokenizer(tmp_path_factory.mktemp("tokenizer")))


def held_out(text, fraction):
    return is_held_out(document_hash(content(text)), fraction)


def build(tmp_path, tokenizer_uri, sources, smallest=1, **data):
    config = DataConfig(sources=[str(sources)], **{"sequence_length": 32, "validation_fraction": 0.2, **data})
    storage = open_storage(str(tmp_path / "root"))
    found = find_sources(config.sources)
    return storage, prepare(found, config, tokenizer_uri, smallest, storage, "store/x", NoBar())


def test_prepare_every_token_is_a_target_once_and_bytes_add_up(tmp_path, tokenizer_uri):
    path = tiny.corpus(tmp_path / "in", 60)
    storage, manifest = build(tmp_path, tokenizer_uri, path)
    from cluster.pretrained import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_uri)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    for split in ("train", "validation"):
        mine = [text for text in texts if held_out(text, 0.2) == (split == "validation")]
        expected = [token for text in mine for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
        store = ExampleStore(storage, "store/x", split)
        rows = [store.row(index) for index in range(len(store))]
        targets = [token for row in rows for token in collate([row]).targets.tolist()]
        assert targets == expected
        assert (
            sum(row.num_bytes for row in rows) == sum(len(text.encode()) for text in mine) == manifest["bytes"][split]
        )
        assert max(len(row.token_ids) for row in rows) <= 32
        assert all(row.segment_lengths.sum() == len(row.token_ids) for row in rows)


def test_prepare_special_tokens_that_stand_in_a_text_are_text(tmp_path, tokenizer_uri):
    tokenizer = load_tokenizer(tokenizer_uri)
    text = "before <|endoftext|> after"
    [example] = Encoder(tokenizer, DataConfig(sources=["x"])).encode([text], "here")
    ids = example.token_ids[1:-1]
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert example.byte_ends[-1] == len(text)


def test_prepare_is_the_same_every_time_and_changes_with_the_text(tmp_path, tokenizer_uri):
    one = build(tmp_path / "1", tokenizer_uri, tiny.corpus(tmp_path / "a", 40))[1]
    two = build(tmp_path / "2", tokenizer_uri, tiny.corpus(tmp_path / "b", 40))[1]
    other = build(tmp_path / "3", tokenizer_uri, tiny.corpus(tmp_path / "c", 41))[1]
    assert one["fingerprint"] == two["fingerprint"] != other["fingerprint"]


def test_prepare_many_shards_have_stable_row_ids(tmp_path, tokenizer_uri):
    storage, manifest = build(tmp_path, tokenizer_uri, tiny.corpus(tmp_path / "in", 60), rows_per_shard=8)
    store = ExampleStore(storage, "store/x", "train")
    ids = [store.row(index).id for index in range(len(store))]
    assert len(set(ids)) == len(ids) == manifest["rows"]["train"]
    assert len({item.shard for item in ids}) > 2


def texts_of(source, **config):
    config = DataConfig(sources=["x"], **config)
    return [document for batch in read_documents(source, config) for document in batch.documents]


def test_prepare_reads_all_formats_to_the_same_texts(tmp_path):
    texts = [f"document {number}: grüße 猫" for number in range(20)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    pq.write_table(pa.table({"text": texts}), tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_text(texts[0], encoding="utf-8")
    found = {source.info.key: texts_of(source) for source in find_sources([str(tmp_path)])}
    assert found.pop("e.txt") == texts[:1]
    assert len(found) == 4
    assert all(value == texts for value in found.values())


def damaged(name, lines):
    if name == "cut.jsonl":
        return lines[:-9]
    if name == "cut.jsonl.gz":
        return gzip.compress(lines)[:-20]
    if name == "cut.jsonl.zst":
        return zstandard.compress(os.urandom(300_000).hex().encode() + b"\n")[:-100]
    if name == "noise.parquet":
        return b"PAR1" + os.urandom(500)
    if name == "latin1.jsonl":
        return lines + '{"text": "grün"}\n'.encode("latin-1")
    if name == "list.jsonl":
        return lines + b"[1, 2]\n"
    return lines.replace(b'"text"', b'"content"')


@pytest.mark.parametrize(
    "name",
    ["cut.jsonl", "cut.jsonl.gz", "cut.jsonl.zst", "noise.parquet", "latin1.jsonl", "list.jsonl", "other_column.jsonl"],
)
def test_prepare_damaged_file_among_good_ones_is_named_and_nothing_is_left(tmp_path, tokenizer_uri, name):
    tiny.corpus(tmp_path / "in", 30)
    (tmp_path / "in" / name).write_bytes(damaged(name, (tmp_path / "in" / "corpus.jsonl").read_bytes()))
    with pytest.raises(CorpusError, match=name.replace(".", r"\.")):
        build(tmp_path, tokenizer_uri, tmp_path / "in", rows_per_shard=4)
    assert not [path for path in (tmp_path / "root").rglob("*") if path.is_file()]


def test_prepare_missing_empty_or_unknown_sources_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "image.png").write_bytes(b"x")
    (tmp_path / "nothing").mkdir()
    for path in ("missing.jsonl", "empty.jsonl", "image.png", "nothing"):
        with pytest.raises(CorpusError, match=path):
            find_sources([str(tmp_path / path)])


def test_prepare_corpus_smaller_than_a_batch_is_refused_and_nothing_is_left(tmp_path, tokenizer_uri):
    with pytest.raises(CorpusError, match="one batch needs 500"):
        build(tmp_path, tokenizer_uri, tiny.corpus(tmp_path / "in", 30), smallest=500)
    assert not [path for path in (tmp_path / "root").rglob("*") if path.is_file()]


def test_store_without_manifest_does_not_exist(tmp_path, tokenizer_uri):
    storage, _ = build(tmp_path, tokenizer_uri, tiny.corpus(tmp_path / "in", 30))
    (tmp_path / "root/store/x/manifest.json").unlink()
    with pytest.raises(CorpusError, match="run prepare"):
        ExampleStore(storage, "store/x", "train")


def test_store_every_flipped_bit_in_a_shard_is_noticed(tmp_path, tokenizer_uri):
    storage, manifest = build(tmp_path, tokenizer_uri, tiny.corpus(tmp_path / "in", 30))
    shard = next(item for item in manifest["shards"] if item["split"] == "train")
    path = tmp_path / "root/store/x" / shard["key"]
    good = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(good), 60):
        bad = bytearray(good)
        bad[place] ^= 1 << int(place % 8)
        path.write_bytes(bad)
        with pytest.raises(CorruptArtifact, match="sha256"):
            ExampleStore(storage, "store/x", "train").row(0)


def test_held_out_documents_stay_held_out_when_files_are_added():
    texts = [f"text {number}" for number in range(2000)]
    chosen = [text for text in texts if held_out(text, 0.1)]
    assert 120 < len(chosen) < 280
    assert all(held_out(text, 0.1) for text in chosen)
    assert set(chosen) <= {text for text in texts if held_out(text, 0.2)}


def test_a_store_larger_than_the_cache_gives_the_same_rows_by_ranges(tmp_path, tokenizer_uri, monkeypatch):
    storage, _ = build(tmp_path, tokenizer_uri, tiny.corpus(tmp_path / "in", 300), rows_per_shard=50)
    whole = ExampleStore(storage, "store/x", "train")
    other, read = open_storage(storage.uri), []
    by_ranges = ExampleStore(other, "store/x", "train", cache_bytes=20_000)
    monkeypatch.setattr(other, "read", lambda key: read.append(key))
    for index in np.random.default_rng(0).permutation(len(whole)):
        expected, found = whole.row(int(index)), by_ranges.row(int(index))
        assert (found.id, found.num_bytes) == (expected.id, expected.num_bytes)
        for name in ("token_ids", "segment_lengths", "loss_mask"):
            assert np.array_equal(getattr(found, name), getattr(expected, name))
    assert read == []
