"""Preparing a corpus again: what is unchanged is taken over, what is gone goes, the result is that of a first time."""

import json
import shutil

import pytest

from cluster.errors import CorpusError
from cluster.storage import open_storage
from jobs.config import DataConfig
from jobs.corpus import find_sources
from jobs.prepare import prepare
from jobs.training.data import ExampleStore
from tests import tiny
from tests.unit.test_prepare import NoBar


@pytest.fixture(scope="module")
def tokenizer_uri(tmp_path_factory):
    return str(tiny.tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def corpus(tmp_path):
    """Three objects of thirty documents each."""
    for number, name in enumerate("bcd"):
        tiny.corpus(tmp_path / "in", 30, seed=number).rename(tmp_path / "in" / f"{name}.jsonl")
    return tmp_path / "in"


def build(root, corpus, tokenizer_uri, bar=None, smallest=1, **data):
    config = DataConfig(
        sources=[str(corpus)], **{"sequence_length": 32, "validation_fraction": 0.2, "rows_per_shard": 16, **data}
    )
    storage = open_storage(str(root))
    found = find_sources(config.sources)
    return prepare(found, config, tokenizer_uri, smallest, storage, "store/x", bar or NoBar())


def files(root):
    """All files of a store, and what changes when one is written again."""
    return {path.relative_to(root).as_posix(): path.stat().st_ino for path in root.rglob("*") if path.is_file()}


def rows_of(root):
    """Ids and tokens of all rows, in order."""
    stores = [ExampleStore(open_storage(str(root)), "store/x", split) for split in ("train", "validation")]
    rows = [store.row(index) for store in stores for index in range(len(store))]
    return [(str(row.id), row.token_ids.tolist()) for row in rows]


def texts_of(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_prepare_again_writes_nothing_but_the_manifest(tmp_path, corpus, tokenizer_uri):
    first = build(tmp_path / "root", corpus, tokenizer_uri)
    before = files(tmp_path / "root")
    again = build(tmp_path / "root", corpus, tokenizer_uri)
    after = files(tmp_path / "root")
    assert again == first
    assert {name for name in after if after[name] != before.get(name)} <= {"store/x/manifest.json"}


@pytest.mark.parametrize("name", ["a", "e"])
def test_prepare_added_object_leaves_the_others_and_their_row_ids_as_they_were(tmp_path, corpus, tokenizer_uri, name):
    build(tmp_path / "root", corpus, tokenizer_uri)
    before, rows = files(tmp_path / "root"), rows_of(tmp_path / "root")
    tiny.corpus(tmp_path / "more", 30, seed=9).rename(corpus / f"{name}.jsonl")
    added = build(tmp_path / "root", corpus, tokenizer_uri)
    after = files(tmp_path / "root")
    del before["store/x/manifest.json"]
    assert before.items() <= after.items()
    now = rows_of(tmp_path / "root")
    assert set(map(str, rows)) < set(map(str, now))
    assert len(added["sources"]) == 4
    fresh = build(tmp_path / "fresh", corpus, tokenizer_uri)
    assert (fresh["fingerprint"], fresh["rows"], fresh["bytes"]) == (
        added["fingerprint"],
        added["rows"],
        added["bytes"],
    )
    assert rows_of(tmp_path / "fresh") == now


def test_prepare_removed_and_changed_objects_go_with_all_their_files(tmp_path, corpus, tokenizer_uri):
    build(tmp_path / "root", corpus, tokenizer_uri)
    beside = tmp_path / "root" / "store" / "x-other.parquet"
    beside.write_bytes(b"not of this store")
    (corpus / "b.jsonl").unlink()
    write(corpus / "d.jsonl", texts_of(corpus / "d.jsonl")[3:])
    manifest = build(tmp_path / "root", corpus, tokenizer_uri)
    build(tmp_path / "fresh", corpus, tokenizer_uri)
    beside_now = files(tmp_path / "root").keys() - {"store/x-other.parquet"}
    assert beside_now == files(tmp_path / "fresh").keys()
    assert beside.read_bytes() == b"not of this store"
    assert rows_of(tmp_path / "root") == rows_of(tmp_path / "fresh")
    assert [item["uri"][-7:] for item in manifest["sources"]] == ["c.jsonl", "d.jsonl"]


def test_prepare_does_not_depend_on_names_or_times_of_the_files(tmp_path, corpus, tokenizer_uri):
    one = build(tmp_path / "1", corpus, tokenizer_uri)
    shutil.copytree(corpus, tmp_path / "copy", copy_function=shutil.copyfile)
    two = build(tmp_path / "2", tmp_path / "copy", tokenizer_uri)
    assert one["shards"] == two["shards"]
    assert rows_of(tmp_path / "1") == rows_of(tmp_path / "2")


def test_prepare_with_another_config_or_tokenizer_takes_nothing_over(tmp_path, corpus, tokenizer_uri):
    build(tmp_path / "root", corpus, tokenizer_uri)
    build(tmp_path / "root", corpus, tokenizer_uri, sequence_length=48)
    build(tmp_path / "fresh", corpus, tokenizer_uri, sequence_length=48)
    assert files(tmp_path / "root").keys() == files(tmp_path / "fresh").keys()
    other = str(tiny.tokenizer(tmp_path / "other", 300))
    build(tmp_path / "root", corpus, other, sequence_length=48)
    build(tmp_path / "fresh2", corpus, other, sequence_length=48)
    assert rows_of(tmp_path / "root") == rows_of(tmp_path / "fresh2") != rows_of(tmp_path / "fresh")


class StoppingBar(NoBar):
    """A person who presses Ctrl-C when so many objects are under way."""

    def __init__(self, what, updates):
        self._what, self._left = what, updates

    def update(self, done=None, note=None):
        self._left -= note is not None and note.startswith(self._what)
        if self._left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("what", "kept"), [("reading", "hashes.parquet"), ("tokenising", ".json")])
def test_prepare_interrupted_keeps_what_is_finished_and_goes_on(tmp_path, corpus, tokenizer_uri, what, kept):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "root", corpus, tokenizer_uri, StoppingBar(what, 2))
    done = {name: inode for name, inode in files(tmp_path / "root").items() if name.endswith(kept)}
    assert len(done) == 2
    with pytest.raises(CorpusError, match="no example store"):
        rows_of(tmp_path / "root")
    build(tmp_path / "root", corpus, tokenizer_uri)
    build(tmp_path / "fresh", corpus, tokenizer_uri)
    after = files(tmp_path / "root")
    assert done.items() <= after.items()
    assert after.keys() == files(tmp_path / "fresh").keys()
    assert rows_of(tmp_path / "root") == rows_of(tmp_path / "fresh")


def test_prepare_mistake_found_later_keeps_what_an_earlier_call_finished(tmp_path, corpus, tokenizer_uri):
    build(tmp_path / "root", corpus, tokenizer_uri)
    before = files(tmp_path / "root")
    (corpus / "z.jsonl").write_text("{")
    with pytest.raises(CorpusError, match=r"z\.jsonl: line 1 is not JSON"):
        build(tmp_path / "root", corpus, tokenizer_uri)
    assert files(tmp_path / "root") == before


def test_prepare_shard_that_is_gone_is_made_again(tmp_path, corpus, tokenizer_uri):
    manifest = build(tmp_path / "root", corpus, tokenizer_uri)
    before = files(tmp_path / "root")
    path = tmp_path / "root/store/x" / manifest["shards"][1]["key"]
    data = path.read_bytes()
    path.unlink()
    assert build(tmp_path / "root", corpus, tokenizer_uri) == manifest
    assert path.read_bytes() == data
    assert files(tmp_path / "root").keys() == before.keys()


# --- duplicates -------------------------------------------------------------------------------------------------------


def test_prepare_drops_copies_within_and_across_objects_and_the_first_stays(tmp_path, corpus, tokenizer_uri):
    clean = build(tmp_path / "clean", corpus, tokenizer_uri)
    b, d = texts_of(corpus / "b.jsonl"), texts_of(corpus / "d.jsonl")
    write(corpus / "d.jsonl", [d[0], b[3], *d, b[0]])
    write(corpus / "e.jsonl", b[:10])
    manifest = build(tmp_path / "root", corpus, tokenizer_uri)
    assert manifest["duplicates"] == 13
    assert manifest["documents"] == clean["documents"] == 90
    assert manifest["fingerprint"] == clean["fingerprint"]
    assert rows_of(tmp_path / "root") == rows_of(tmp_path / "clean")
    everything = build(tmp_path / "all", corpus, tokenizer_uri, deduplicate=False)
    assert (everything["documents"], everything["duplicates"]) == (103, 0)
    numbers = [shard["number"] for shard in everything["shards"]]
    assert len(set(numbers)) == len(numbers)


def test_prepare_original_that_comes_or_goes_moves_its_copies(tmp_path, corpus, tokenizer_uri):
    first = build(tmp_path / "root", corpus, tokenizer_uri)
    before = files(tmp_path / "root")
    write(corpus / "a.jsonl", texts_of(corpus / "c.jsonl")[:5])
    second = build(tmp_path / "root", corpus, tokenizer_uri)
    assert (second["duplicates"], second["documents"]) == (5, 90)
    after = files(tmp_path / "root")
    rewritten = {shard["key"] for shard in first["shards"]} - {shard["key"] for shard in second["shards"]}
    assert rewritten  # those of c, which lost documents
    same = {shard["key"] for shard in first["shards"]} - rewritten
    assert all(after[f"store/x/{key}"] == before[f"store/x/{key}"] for key in same)
    assert rows_of(tmp_path / "root") != []
    build(tmp_path / "fresh", corpus, tokenizer_uri)
    assert rows_of(tmp_path / "root") == rows_of(tmp_path / "fresh")
    (corpus / "a.jsonl").unlink()
    assert build(tmp_path / "root", corpus, tokenizer_uri) == first
    assert files(tmp_path / "root").keys() == before.keys()


def test_prepare_corpus_twice_under_two_names_is_the_corpus_once(tmp_path, corpus, tokenizer_uri):
    once = build(tmp_path / "once", corpus, tokenizer_uri)
    for path in list(corpus.iterdir()):
        shutil.copy(path, corpus / f"z{path.name}")
    twice = build(tmp_path / "twice", corpus, tokenizer_uri)
    assert twice["shards"] == once["shards"]
    assert twice["duplicates"] == once["documents"]


# --- broken objects ---------------------------------------------------------------------------------------------------


def test_prepare_skips_broken_objects_when_asked_and_names_them(tmp_path, corpus, tokenizer_uri):
    clean = build(tmp_path / "clean", corpus, tokenizer_uri, on_error="skip")
    (corpus / "broken.jsonl").write_bytes((corpus / "b.jsonl").read_bytes()[:-5])
    (corpus / "broken.parquet").write_bytes(b"PAR1 no")
    manifest = build(tmp_path / "root", corpus, tokenizer_uri, on_error="skip")
    assert [item["uri"].rpartition("/")[2] for item in manifest["skipped"]] == ["broken.jsonl", "broken.parquet"]
    assert "line 30 is not JSON" in manifest["skipped"][0]["reason"]
    assert manifest["fingerprint"] == clean["fingerprint"]
    with pytest.raises(CorpusError, match=r"broken\.jsonl: line 30"):
        build(tmp_path / "stop", corpus, tokenizer_uri)
    for path in corpus.glob("?.jsonl"):
        path.unlink()
    with pytest.raises(CorpusError, match="0 training rows"):
        build(tmp_path / "none", corpus, tokenizer_uri, on_error="skip")


def test_prepare_object_that_changes_while_it_is_read_is_refused(tmp_path, corpus, tokenizer_uri):
    found = find_sources([str(corpus)])
    write(corpus / "c.jsonl", texts_of(corpus / "c.jsonl")[1:])
    config = DataConfig(sources=[str(corpus)], sequence_length=32)
    with pytest.raises(CorpusError, match=r"c\.jsonl: it changed while it was read; run prepare again"):
        prepare(found, config, tokenizer_uri, 1, open_storage(str(tmp_path / "root")), "store/x", NoBar())
    assert not files(tmp_path / "root")


# --- formats, end to end ----------------------------------------------------------------------------------------------


def test_prepare_txt_among_prompts_is_refused_before_anything(tmp_path, corpus, tokenizer_uri):
    (corpus / "x.txt").write_text("a")
    with pytest.raises(CorpusError, match=r"x\.txt: a \.txt holds plain text, data.format=prompt_completion needs"):
        build(tmp_path / "root", corpus, tokenizer_uri, format="prompt_completion")


def test_prepare_prompts_of_jsonl_and_parquet_give_the_same_rows(tmp_path, tokenizer_uri):
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [{"prompt": f"{number} the cat", "completion": f" sees {number}"} for number in range(60)]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "one/a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pq.write_table(pa.Table.from_pylist([*records, {"prompt": "x", "completion": None}]), tmp_path / "two/a.parquet")
    asked = {"format": "prompt_completion", "packing": False}
    one = build(tmp_path / "1", tmp_path / "one", tokenizer_uri, **asked)
    two = build(tmp_path / "2", tmp_path / "two", tokenizer_uri, **asked)
    assert one["shards"] == two["shards"]
    assert one["documents"] == one["rows"]["train"] + one["rows"]["validation"] == 60
    assert sum(one["bytes"].values()) == sum(len(record["completion"]) for record in records)


def test_prepare_long_txt_is_several_documents_that_hold_all_of_it(tmp_path, tokenizer_uri, monkeypatch):
    from jobs import corpus

    monkeypatch.setattr(corpus, "_TXT_CHARACTERS", 200)
    (tmp_path / "in").mkdir()
    text = "\r\n".join(f"{number} {line}" for number, line in enumerate(tiny.sentences(100)))
    (tmp_path / "in/a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    manifest = build(tmp_path / "root", tmp_path / "in", tokenizer_uri)
    assert manifest["documents"] > 10
    assert sum(manifest["bytes"].values()) == len(text.encode())


@pytest.fixture
def bucket(monkeypatch):
    from moto import mock_aws

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        import boto3

        boto3.client("s3").create_bucket(Bucket="bucket")
        yield open_storage("s3://bucket/in")


def test_prepare_from_and_to_object_storage_gives_the_same_store(tmp_path, corpus, tokenizer_uri, bucket):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": [f"line {number} of parquet" for number in range(50)]}), corpus / "p.parquet")
    local = build(tmp_path / "root", corpus, tokenizer_uri)
    for path in corpus.iterdir():
        bucket.upload(path, path.name)
    config = DataConfig(sources=["s3://bucket/in"], sequence_length=32, validation_fraction=0.2, rows_per_shard=16)
    storage = open_storage("s3://bucket/run")
    arguments = (config, tokenizer_uri, 1, storage, "store/x", NoBar())
    assert prepare(find_sources(config.sources), *arguments)["shards"] == local["shards"]
    bucket.delete("b.jsonl")
    (corpus / "b.jsonl").unlink()
    assert (
        prepare(find_sources(config.sources), *arguments)["shards"]
        == (build(tmp_path / "root", corpus, tokenizer_uri)["shards"])
    )
    assert len(storage.list("store/x/")) == len(files(tmp_path / "root"))


def test_prepare_that_fails_on_object_storage_deletes_nothing_beside_its_store(corpus, tokenizer_uri, bucket):
    (corpus / "z.jsonl").write_text("{")
    for path in corpus.iterdir():
        bucket.upload(path, path.name)
    config = DataConfig(sources=["s3://bucket/in"], sequence_length=32)
    storage = open_storage("s3://bucket/run")
    storage.write("store/x-other/manifest.json", b"{}")
    with pytest.raises(CorpusError, match=r"s3://bucket/in/z\.jsonl: line 1"):
        prepare(find_sources(config.sources), config, tokenizer_uri, 1, storage, "store/x", NoBar())
    assert [item.key for item in storage.list()] == ["store/x-other/manifest.json"]
