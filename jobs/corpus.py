"""Reading source text: jsonl (plain, .gz, .zst), parquet and txt, local or in object storage.

A damaged file stops the job with its name and place; nothing is skipped silently.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import pyarrow
import pyarrow.parquet as pq

from cluster.errors import CorpusError, StorageError
from cluster.storage import LocalStorage, ObjectInfo, Storage, open_storage, split_uri

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")


@dataclass(frozen=True)
class Source:
    """One source object."""

    storage: Storage
    info: ObjectInfo

    @property
    def uri(self) -> str:
        return f"{self.storage.uri}/{self.info.key}"


def find_sources(uris: list[str]) -> list[Source]:
    """All source objects below the given files, directories and prefixes, sorted within each.

    Raises:
        CorpusError: a URI that holds no source, an empty object, or an ending that is not known.
    """
    found: list[Source] = []
    for uri in uris:
        if not uri.strip():
            raise CorpusError("data.sources holds an empty name; give a file, a directory or an s3:// URI")
        storage = open_storage(uri)
        if isinstance(storage, LocalStorage) and storage.root.is_file():
            listed = _object(LocalStorage(storage.root.parent), storage.root.name)
        elif not isinstance(storage, LocalStorage) and uri.endswith(ENDINGS):
            listed = _object(*split_uri(storage.uri))
        else:
            try:
                listed = [Source(storage, item) for item in storage.list() if item.key.endswith(ENDINGS)]
            except PermissionError as error:
                raise CorpusError(
                    f"data.sources {uri}: cannot be listed ({error}); name a narrower directory"
                ) from None
        if not listed:
            raise CorpusError(f"data.sources {uri}: nothing there that ends in {', '.join(ENDINGS)}; check the path")
        for source in listed:
            if not source.info.key.endswith(ENDINGS):
                raise CorpusError(f"source {source.uri}: unknown ending; use one of {', '.join(ENDINGS)}")
            if source.info.size_bytes == 0:
                raise CorpusError(f"source {source.uri}: the file is empty; remove it or fill it")
        found.extend(listed)
    return found


def _object(parent: Storage, name: str) -> list[Source]:
    return [Source(parent, item) for item in parent.list(name) if item.key == name]


def read_texts(source: Source, text_column: str) -> Iterator[str]:
    """The documents of one source object, in order; empty ones are left out.

    Raises:
        CorpusError: the object is damaged, or a row has no such column; names the object and the row.
    """
    key = source.info.key
    try:
        if key.endswith(".parquet"):
            texts = _parquet(source, text_column)
        elif key.endswith(".txt"):
            texts = iter([source.storage.open(source.info.key).read().decode("utf-8-sig")])
        else:
            texts = _jsonl(source, text_column)
        for text in texts:
            if text.strip():
                yield text
    except FileNotFoundError:
        raise CorpusError(f"source {source.uri}: it is gone; run prepare again") from None
    except UnicodeDecodeError as error:
        raise CorpusError(f"source {source.uri}: not UTF-8 (byte {error.start}); convert it or leave it out") from error
    except StorageError:
        raise
    except (EOFError, OSError, pyarrow.ArrowException) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CorpusError(f"source {source.uri}: cannot be read to its end ({reason}); replace or remove it") from error


def _jsonl(source: Source, text_column: str) -> Iterator[str]:
    with source.storage.open(source.info.key) as raw:
        compression = {".gz": "gzip", ".zst": "zstd"}.get(Path(source.info.key).suffix)
        stream = cast(IO[bytes], pyarrow.CompressedInputStream(raw, compression)) if compression else raw
        for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8-sig"), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError too
                raise CorpusError(
                    f"source {source.uri}: line {number} is not JSON ({error}); the file may be cut off"
                ) from error
            text = record.get(text_column) if isinstance(record, dict) else None
            if not isinstance(text, str):
                keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
                raise CorpusError(
                    f"source {source.uri}: line {number} has no text in {text_column!r} "
                    f"(found: {keys}); set data.text_column"
                )
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise CorpusError(
                    f"source {source.uri}: line {number} has half a character (\\u{ord(text[error.start]):x} alone); "
                    "repair or remove it"
                ) from None
            yield text


def _parquet(source: Source, text_column: str) -> Iterator[str]:
    with source.storage.open(source.info.key) as raw:
        file = pq.ParquetFile(raw, page_checksum_verification=True)
        if text_column not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise CorpusError(f"source {source.uri}: no column {text_column!r} (found: {names}); set data.text_column")
        kind = file.schema_arrow.field(text_column).type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise CorpusError(
                f"source {source.uri}: column {text_column!r} holds {kind}, not text; set data.text_column"
            )
        for batch in file.iter_batches(columns=[text_column]):
            for text in batch.column(0).to_pylist():
                if isinstance(text, str):
                    yield text
