"""Reading source objects: jsonl (plain, .gz, .zst), parquet and txt, local or in object storage.

Objects are read piece by piece, so memory is bounded by a batch of documents (for parquet: by a row group), not by an
object. A damaged object is named with the place of the damage.
"""

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast

import pyarrow
import pyarrow.parquet as pq

from cluster.errors import CorpusError, RaystillError
from cluster.storage import LocalStorage, ObjectInfo, Storage, open_storage, split_uri
from jobs.config import DataConfig
from jobs.preparing.documents import Document, columns_of, document_reader, option_of

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 1 << 20
_TXT_CHARACTERS = 4 << 20
"""A .txt is one document; of a longer one each stretch of this length, up to the end of its line, is one."""


@dataclass(frozen=True)
class Source:
    """One source object."""

    storage: Storage
    info: ObjectInfo

    @property
    def uri(self) -> str:
        return f"{self.storage.uri}/{self.info.key}"

    def __reduce__(self) -> Any:
        """Travels as names: a client of object storage cannot."""
        return _source, (self.storage.uri, self.info)


def _source(storage_uri: str, info: ObjectInfo) -> Source:
    return Source(_storage(storage_uri), info)


@lru_cache(16)
def _storage(uri: str) -> Storage:
    return open_storage(uri)


@dataclass(frozen=True)
class Batch:
    """Documents that follow each other in an object, and how many of its bytes are read so far."""

    documents: list[Document]
    position: int


def find_sources(uris: list[str]) -> list[Source]:
    """All source objects below the given files, directories and prefixes, sorted within each; each object once.

    Raises:
        CorpusError: a URI that holds no source, an empty object, or an ending that is not known.
    """
    found: dict[str, Source] = {}
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
            found.setdefault(source.uri, source)
    return list(found.values())


def _object(parent: Storage, name: str) -> list[Source]:
    return [Source(parent, item) for item in parent.list(name) if item.key == name]


def check_endings(sources: list[Source], config: DataConfig) -> None:
    """Raises `CorpusError` if an object cannot hold the documents that the config asks for."""
    for source in sources:
        if source.info.key.endswith(".txt") and config.format != "text":
            raise CorpusError(
                f"source {source.uri}: a .txt holds plain text, data.format={config.format} needs .jsonl or .parquet; "
                "leave it out, or set data.format=text"
            )


def read_documents(source: Source, config: DataConfig) -> Iterator[Batch]:
    """The documents of one source object, in order; empty ones are left out.

    Raises:
        CorpusError: the object is damaged, or a record is not what the config says; names the object and the record.
    """
    key = source.info.key
    read = _parquet if key.endswith(".parquet") else _txt if key.endswith(".txt") else _jsonl
    try:
        with source.storage.open(key) as raw:
            yield from _batches(source, *read(source, raw, config))
    except FileNotFoundError:
        raise CorpusError(f"source {source.uri}: it is gone; run prepare again") from None
    except (EOFError, OSError, pyarrow.ArrowException) as error:
        if isinstance(error, RaystillError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CorpusError(f"source {source.uri}: cannot be read to its end ({reason}); replace or remove it") from error


def check_unchanged(source: Source) -> None:
    """Raises `CorpusError` if the object is not the one that was listed: what was read of it fits nothing then."""
    if source.info not in source.storage.list(source.info.key):
        raise CorpusError(f"source {source.uri}: it changed while it was read; run prepare again")


_Documents = tuple[Iterator[Document | None], Callable[[], int]]
"""The documents of an object, and a function that says how many of its bytes are read."""


def _batches(source: Source, documents: Iterator[Document | None], position: Callable[[], int]) -> Iterator[Batch]:
    """Batches that are bounded in documents and in characters."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        if document is None:
            continue
        batch.append(document)
        characters += len(document) if isinstance(document, str) else sum(map(_length, document))
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield Batch(batch, position())
            batch, characters = [], 0
    if batch:
        yield Batch(batch, source.info.size_bytes)


def _length(part: Any) -> int:
    return len(part) if isinstance(part, str) else len(part["content"])


def _jsonl(source: Source, raw: IO[bytes], config: DataConfig) -> _Documents:
    compression = {".gz": "gzip", ".zst": "zstd"}.get(Path(source.info.key).suffix)
    stream = cast(IO[bytes], pyarrow.CompressedInputStream(raw, compression)) if compression else raw
    text = io.TextIOWrapper(stream, encoding="utf-8-sig")
    decode, document_of, line_of = json.JSONDecoder().decode, document_reader(config), f"source {source.uri}: line"

    def documents() -> Iterator[Document | None]:
        with _named_place(source, raw, is_plain=compression is None):
            for number, line in enumerate(text, 1):
                if line.isspace():
                    continue
                try:
                    record = decode(line)
                except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError too
                    raise CorpusError(f"{line_of} {number} is not JSON ({error}); the file may be cut off") from error
                try:
                    yield document_of(record)
                except CorpusError as error:
                    raise CorpusError(f"{line_of} {number} {error}") from None

    return documents(), raw.tell


def _txt(source: Source, raw: IO[bytes], config: DataConfig) -> _Documents:
    text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")

    def documents() -> Iterator[Document | None]:
        with _named_place(source, raw, is_plain=True):
            while stretch := text.read(_TXT_CHARACTERS):
                stretch += text.readline(_TXT_CHARACTERS)
                yield stretch if stretch.strip() else None

    return documents(), raw.tell


@contextlib.contextmanager
def _named_place(source: Source, raw: IO[bytes], is_plain: bool) -> Iterator[None]:
    """Bytes that are no UTF-8 as an error that names the object and, unless it is compressed, the byte."""
    try:
        yield
    except UnicodeDecodeError as error:
        place = f" (byte {raw.tell() - len(error.object) + error.start})" if is_plain else ""
        raise CorpusError(f"source {source.uri}: not UTF-8{place}; convert it or leave it out") from error


def _parquet(source: Source, raw: IO[bytes], config: DataConfig) -> _Documents:
    file = pq.ParquetFile(raw, page_checksum_verification=True)
    names = columns_of(config)
    for name in names:
        if name not in file.schema_arrow.names:
            found = ", ".join(file.schema_arrow.names)
            raise CorpusError(
                f"source {source.uri}: no column {name!r} (found: {found}); set data.{option_of(config, name)}"
            )
        kind = file.schema_arrow.field(name).type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        if config.format != "messages" and not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise CorpusError(
                f"source {source.uri}: column {name!r} holds {kind}, not text; set data.{option_of(config, name)}"
            )
    document_of, done = document_reader(config), 0

    def documents() -> Iterator[Document | None]:
        nonlocal done
        for batch in file.iter_batches(batch_size=_BATCH_DOCUMENTS, columns=names):
            for record in batch.to_pylist():
                done += 1
                if any(value is None for value in record.values()):
                    continue
                try:
                    yield document_of(record)
                except CorpusError as error:
                    raise CorpusError(f"source {source.uri}: row {done} {error}") from None

    return documents(), lambda: source.info.size_bytes * done // file.metadata.num_rows
