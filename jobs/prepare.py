"""From text to the example store: find the sources, train or take a tokenizer, tokenise once, write parquet shards.

The work is cut by source object: rows never span two objects, so each object gives shards of its own. Objects are read
twice, once to hash their documents and once to tokenise those that stay (`preparing/duplicates.py` says why), as Ray
tasks of one object or a few small ones, or in this process where the corpus is small. What is done for an object is
kept and taken over for as long as the object, the config and the tokenizer stay the same.

The store's manifest is written last; without it the store does not exist. It follows from the sources, the config and
the tokenizer alone: not from the number of tasks, from who finished first, or from what was there before.
"""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cluster.config import fingerprint
from cluster.errors import CorpusError, UserError
from cluster.pretrained import load_tokenizer, tokenizer_fingerprint
from cluster.published import MANIFEST, publish_directory, read_manifest, write_manifest
from cluster.storage import Storage
from jobs.config import DataConfig
from jobs.corpus import Source, check_endings, read_documents
from jobs.preparing.documents import texts_of
from jobs.preparing.duplicates import find_duplicates
from jobs.preparing.encoding import encoding_fingerprint
from jobs.preparing.objects import Part, Target, scan_objects, tokenise_objects
from jobs.progress import Bar
from jobs.tasks import run_tasks

FORMAT = 2
SMALL_BYTES = 32 << 20
"""A corpus up to this size is prepared in this process, on all its cores, in the time in which a Ray would start."""
_GROUP_BYTES = 32 << 20
_GROUP_OBJECTS = 64
"""Small objects share a task, up to these limits."""

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def corpus_fingerprint(sources: list[Source]) -> str:
    """Changes when any source object does."""
    return fingerprint([[source.uri, source.info.size_bytes, source.info.etag] for source in sources])


def identity(config: DataConfig, tokenizer: Any) -> str:
    """Names what decides what is made of a source object: all of the config but the sources, and the tokenizer (its
    `encoding_fingerprint`, or how it will be trained)."""
    values = {name: value for name, value in config.identity().items() if name not in ("sources", "gather")}
    return fingerprint([FORMAT, values, tokenizer])


def is_small(sources: list[Source]) -> bool:
    return sum(source.info.size_bytes for source in sources) <= SMALL_BYTES


def train_tokenizer(sources: list[Source], config: DataConfig, storage: Storage, prefix: str, bar: Bar) -> str:
    """Trains a byte-level BPE tokenizer on the corpus and publishes it. Returns its URI."""
    uri = f"{storage.uri}/{prefix}"
    if read_manifest(storage, prefix) is not None:
        return uri
    bar.start(None, "training the tokenizer")
    tokenizer = tokenizer_of(_texts(sources, config), config)
    with TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        publish_directory(Path(directory), storage, prefix)
    return uri


def tokenizer_of(texts: Iterator[str], config: DataConfig) -> Any:
    """A byte-level BPE tokenizer trained on texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    assert config.train_tokenizer is not None
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.train_tokenizer.vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    end = SPECIAL_TOKENS[0]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=end, eos_token=end)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _texts(sources: list[Source], config: DataConfig) -> Iterator[str]:
    for source in sources:
        with contextlib.suppress(*([CorpusError] if config.on_error == "skip" else [])):
            for batch in read_documents(source, config):
                for document in batch.documents:
                    yield from texts_of(document)


def prepare(
    sources: list[Source],
    config: DataConfig,
    tokenizer_uri: str,
    smallest: int,
    storage: Storage,
    prefix: str,
    bar: Bar,
    at_once: int = 0,
) -> dict[str, Any]:
    """Writes the example store below `prefix` and returns its manifest.

    Args:
        tokenizer_uri: a directory or hub id.
        smallest: training rows that are needed at least (one global batch).
        at_once: Ray tasks of one CPU at the same time; 0 does the work in this process.

    Raises:
        CorpusError: damaged sources, or too little text. Where nothing was before, nothing is left behind.
    """
    check_endings(sources, config)
    was_empty = not storage.list(f"{prefix}/")
    target = Target(storage.uri, prefix, tokenizer_uri, config)
    try:
        manifest, kept = _prepare(target, sources, smallest, storage, bar, at_once)
    except UserError:
        if was_empty:
            storage.delete(f"{prefix}/")
        raise
    manifest = write_manifest(storage, prefix, manifest)
    for item in storage.list(f"{prefix}/"):
        if item.key.removeprefix(f"{prefix}/") not in kept:
            storage.delete(item.key)
    return manifest


def _prepare(
    target: Target, sources: list[Source], smallest: int, storage: Storage, bar: Bar, at_once: int
) -> tuple[dict[str, Any], set[str]]:
    """The manifest, and the keys below the prefix that belong to it."""
    config, tokenizer = target.config, load_tokenizer(target.tokenizer_uri)
    made_with = identity(config, encoding_fingerprint(tokenizer))
    parts = [Part(place, source, made_with) for place, source in enumerate(sources)]
    reasons = _scan(target, parts, storage, bar, at_once)
    skipped = [{"uri": parts[place].source.uri, "reason": reason} for place, reason in sorted(reasons.items())]
    for item in skipped:
        bar.say(f"left out: {item['reason']}")
    parts = [part for part in parts if part.place not in reasons]
    if config.deduplicate:
        found = find_duplicates(storage, [f"{target.prefix}/{part.hashes_key}" for part in parts])
        parts = [Part(part.place, part.source, made_with, copies) for part, copies in zip(parts, found, strict=True)]
    records = _tokenise(target, parts, storage, bar, at_once)
    shards = _numbered([shard for record in records for shard in record["shards"]])
    totals = {
        name: {split: sum(record[name][split] for record in records) for split in ("train", "validation")}
        for name in ("rows", "tokens", "bytes")
    }
    counts = {
        name: sum(record[name] for record in records) for name in ("documents", "duplicates", "cut", "without_target")
    }
    _check_size(totals["rows"], counts["documents"], smallest, config)
    manifest = {
        "format": FORMAT,
        "shards": shards,
        **totals,
        **counts,
        "skipped": skipped,
        "sequence_length": config.sequence_length,
        "vocab_size": len(tokenizer),
        "tokenizer": target.tokenizer_uri,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "sources": [{"uri": item.uri, "size_bytes": item.info.size_bytes, "etag": item.info.etag} for item in sources],
        "fingerprint": fingerprint([[shard["split"], shard["sha256"]] for shard in shards]),
    }
    kept = {MANIFEST, *(shard["key"] for shard in shards)}
    return manifest, kept.union(*({part.hashes_key, part.record_key} for part in parts))


def _scan(target: Target, parts: list[Part], storage: Storage, bar: Bar, at_once: int) -> dict[int, str]:
    """Hashes the documents of every object that has not been; returns what is wrong with those that cannot be read."""
    there = {item.key for item in storage.list(f"{target.prefix}/objects/")}
    new = [part for part in parts if f"{target.prefix}/{part.hashes_key}" not in there]
    groups = _groups(new, at_once)
    results = _spread(scan_objects, target, groups, bar, "reading", at_once)
    return {
        part.place: reason
        for group, reasons in zip(groups, results, strict=True)
        for part, reason in zip(group, reasons, strict=True)
        if reason is not None
    }


def _tokenise(target: Target, parts: list[Part], storage: Storage, bar: Bar, at_once: int) -> list[dict[str, Any]]:
    """The records of all objects in source order, made where there is none or where a shard of it is gone."""

    def read(part: Part) -> dict[str, Any] | None:
        key = f"{target.prefix}/{part.record_key}"
        record = storage.read_json(key) if key in sizes else None
        shards = record["shards"] if record else []
        if all(sizes.get(f"{target.prefix}/{shard['key']}") == shard["size_bytes"] for shard in shards):
            return record
        storage.delete(key)
        return None

    sizes = {item.key: item.size_bytes for item in storage.list(f"{target.prefix}/")}
    with ThreadPoolExecutor(16) as pool:
        records = {part.place: record for part, record in zip(parts, pool.map(read, parts), strict=True) if record}
        missing = [part for part in parts if part.place not in records]
        if records and missing:
            bar.say(f"{len(records)} of {len(parts)} objects are done already")
        _spread(tokenise_objects, target, _groups(missing, at_once), bar, "tokenising", at_once)
        new = pool.map(lambda part: storage.read_json(f"{target.prefix}/{part.record_key}"), missing)
        records |= {part.place: record for part, record in zip(missing, new, strict=True)}
    return [records[part.place] for part in parts]


def _groups(parts: list[Part], at_once: int) -> list[list[Part]]:
    """Parts that share a task: whole objects, large ones alone, neighbours in source order together."""
    if at_once == 0:
        return [parts] if parts else []
    limit = min(_GROUP_BYTES, sum(part.source.info.size_bytes for part in parts) // (4 * at_once))
    groups: list[list[Part]] = []
    size = 0
    for part in parts:
        size += part.source.info.size_bytes
        if not groups or size > limit or len(groups[-1]) == _GROUP_OBJECTS:
            groups.append([])
            size = part.source.info.size_bytes
        groups[-1].append(part)
    return groups


def _spread(function: Any, target: Target, groups: list[list[Part]], bar: Bar, what: str, at_once: int) -> list[Any]:
    """Runs the work on all groups and shows how far it is. Few large objects get several threads each."""
    if not groups:
        return []
    total = sum(part.source.info.size_bytes for group in groups for part in group)
    threads = max(1, at_once // len(groups)) if at_once else 0
    read: dict[float, int] = {}
    figures: dict[float, dict[str, float]] = {}
    started = time.monotonic()

    def follow(position: int, said: dict[str, float]) -> None:
        read[said["place"]], figures[said["place"]] = position, said
        seconds = max(time.monotonic() - started, 1e-3)
        sums = {name: sum(item.get(name, 0) for item in figures.values()) for name in ("documents", "rows")}
        rows = f", {sums['rows'] / seconds:,.0f} rows/s" if sums["rows"] else ""
        done = sum(read.values())
        bar.update(done, f"{what}: {sums['documents']:,.0f} documents, {done / seconds / 1e6:,.1f} MB/s{rows}")

    bar.start(total, what)
    largest_first = sorted(range(len(groups)), key=lambda place: -sum(p.source.info.size_bytes for p in groups[place]))
    calls = [(target, groups[place], threads) for place in largest_first]
    results = dict(zip(largest_first, run_tasks(function, calls, at_once, max(1, threads), follow), strict=True))
    return [results[place] for place in range(len(groups))]


def _numbered(shards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Shards with numbers that differ: two of the same content (documents are not deduplicated) get neighbours."""
    taken: set[int] = set()
    out = []
    for shard in shards:
        number = shard["number"]
        while number in taken:
            number += 1
        taken.add(number)
        out.append({**shard, "number": number})
    return out


def _check_size(rows: dict[str, int], documents: int, smallest: int, config: DataConfig) -> None:
    if rows["train"] < smallest:
        raise CorpusError(
            f"the corpus gives {rows['train']} training rows of {config.sequence_length} tokens, one batch needs "
            f"{smallest}: add text, or lower train.global_batch or data.sequence_length"
        )
    if rows["validation"] == 0:
        raise CorpusError(
            f"no document of {documents} was held out by data.validation_fraction={config.validation_fraction}: "
            "raise it, or add documents (a .txt file is one, up to 4 MB; so is a line of .jsonl)"
        )
