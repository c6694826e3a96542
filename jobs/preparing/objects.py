"""The work on one source object: hash its documents, then turn those that stay into rows. Runs anywhere.

What is finished is written at once, below `objects/` in the store, named by the object's URI, ETag and size, by config
and tokenizer (and, for its rows, by which documents were left out). So neither an object that is unchanged nor one that
was finished before a job was killed is worked on again. Two tasks that do the same write the same bytes.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from cluster.config import fingerprint
from cluster.errors import CorpusError
from cluster.pretrained import load_tokenizer
from cluster.storage import Storage, open_storage
from jobs.config import DataConfig
from jobs.corpus import Source, check_unchanged, read_documents
from jobs.preparing.documents import content, document_hash, is_held_out
from jobs.preparing.duplicates import count_hashes, write_hashes
from jobs.preparing.encoding import Encoder
from jobs.preparing.rows import RowWriter

Report = Callable[[int, dict[str, float]], None]
"""Called with the number of bytes of an object that are read, and figures: which object, documents, rows."""


@dataclass(frozen=True)
class Target:
    """Where the store is, and how it is made."""

    storage_uri: str
    prefix: str
    tokenizer_uri: str
    config: DataConfig

    def storage(self) -> Storage:
        return open_storage(self.storage_uri)


@dataclass(frozen=True)
class Part:
    """One object of the corpus.

    Args:
        place: in source order.
        made_with: names the config and the tokenizer.
        dropped: numbers of the documents that are left out.
    """

    place: int
    source: Source
    made_with: str
    dropped: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))

    @property
    def hashes_key(self) -> str:
        """Of the hashes of its documents, below the store's prefix."""
        return f"objects/{self._name}.hashes.parquet"

    @property
    def record_key(self) -> str:
        """Of what came out of it, below the store's prefix."""
        return f"objects/{self._name}-{fingerprint(self.dropped.tobytes().hex())}.json"

    @property
    def _name(self) -> str:
        info = self.source.info
        return fingerprint([self.source.uri, info.etag, info.size_bytes, self.made_with])


def scan_objects(target: Target, parts: list[Part], threads: int, report: Report) -> list[str | None]:
    """Reads objects through and stores the hashes of their documents. Returns what is wrong with each, or None.

    Raises:
        CorpusError: an object is damaged, and `on_error` is `stop`.
    """
    storage, reasons = target.storage(), list[str | None]()
    for part in parts:
        try:
            hashes = bytearray()
            for batch in read_documents(part.source, target.config):
                for document in batch.documents:
                    hashes += document_hash(content(document))
                report(batch.position, {"place": part.place, "documents": len(hashes) // 16})
            check_unchanged(part.source)
        except CorpusError as error:
            if target.config.on_error == "stop":
                raise
            reasons.append(str(error))
            continue
        write_hashes(storage, f"{target.prefix}/{part.hashes_key}", hashes)
        reasons.append(None)
    return reasons


def tokenise_objects(target: Target, parts: list[Part], threads: int, report: Report) -> None:
    """Writes the shards and the record of each object. A record has the object's shards and counts.

    Args:
        threads: that the tokenizer may use; 0 leaves it as it is in this process.

    Raises:
        CorpusError: an object is not what it was when its documents were hashed.
    """
    if threads:
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
        os.environ["RAYON_NUM_THREADS"] = str(threads)  # read once, when the tokenizer first works in this process
    storage = target.storage()
    encoder = _encoder(target.tokenizer_uri, target.config.model_dump_json())
    for part in parts:
        if not storage.exists(f"{target.prefix}/{part.record_key}"):  # else a task that died with others had done it
            record = _tokenise(target, part, encoder, storage, report)
            storage.write_json(f"{target.prefix}/{part.record_key}", record)


@lru_cache(1)
def _encoder(tokenizer_uri: str, config_json: str) -> Encoder:
    """Kept for the next task of the same store: a process that loads a tokenizer works for a while."""
    return Encoder(load_tokenizer(tokenizer_uri), DataConfig.model_validate_json(config_json))


def _tokenise(target: Target, part: Part, encoder: Encoder, storage: Storage, report: Report) -> dict[str, Any]:
    config, uri = target.config, part.source.uri

    def write(key: str, data: bytes) -> None:
        storage.write(f"{target.prefix}/{key}", data)

    writers = {split: RowWriter(split, config, write) for split in ("train", "validation")}
    total = count_hashes(storage, f"{target.prefix}/{part.hashes_key}")
    stays = np.ones(total, bool)
    stays[part.dropped] = False
    counts: Counter[str] = Counter()
    seen = 0
    for batch in read_documents(part.source, config):
        numbers = range(seen, seen + len(batch.documents))
        seen = numbers.stop
        if seen > total:
            break
        documents = [item for item, number in zip(batch.documents, numbers, strict=True) if stays[number]]
        for document, example in zip(documents, encoder.encode(documents, f"source {uri}"), strict=True):
            if example is None:
                continue
            counts["documents"] += 1
            held_out = is_held_out(document_hash(content(document)), config.validation_fraction)
            writers["validation" if held_out else "train"].add(example)
        rows = sum(writer.counts["rows"] for writer in writers.values())
        report(batch.position, {"place": part.place, "documents": seen, "rows": rows})
    check_unchanged(part.source)
    if seen != total:
        raise CorpusError(f"source {uri}: it held {total} documents and now {seen}; run prepare again")
    for writer in writers.values():
        writer.close()
    return {
        "uri": uri,
        "documents": counts["documents"],
        "duplicates": len(part.dropped),
        "cut": sum(writer.counts["cut"] for writer in writers.values()),
        "without_target": sum(writer.counts["without_target"] for writer in writers.values()),
        **{
            name: {split: writer.counts[name] for split, writer in writers.items()}
            for name in ("rows", "tokens", "bytes")
        },
        "shards": [shard for writer in writers.values() for shard in writer.shards],
    }
