"""What a record of a source object holds: a text, a prompt with its completion, or the messages of a chat.

A document is plain Python: a `str`, a pair `(prompt, completion)`, or a list of messages. Its content as bytes decides
whether it is a duplicate and whether it is held out, and nothing else does.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

from cluster.errors import CorpusError
from jobs.config import DataConfig

Message = dict[str, Any]
Document = str | tuple[str, str] | list[Message]


def columns_of(config: DataConfig) -> list[str]:
    """The keys of a jsonl record, or columns of a parquet file, that make a document."""
    return {
        "text": [config.text_column],
        "prompt_completion": [config.prompt_column, config.completion_column],
        "messages": [config.messages_column],
    }[config.format]


def option_of(config: DataConfig, column: str) -> str:
    """The key of the config that names a column."""
    if config.format == "prompt_completion":
        return "prompt_column" if column == config.prompt_column else "completion_column"
    return f"{'text' if config.format == 'text' else 'messages'}_column"


def document_reader(config: DataConfig) -> Callable[[Any], Document | None]:
    """A function that takes the document from a record; None if that holds nothing to learn from.

    It raises `CorpusError` for a record without such keys, or with something else under them; the message goes on
    where the record is named.
    """
    names = columns_of(config)

    def texts(record: Any) -> list[str]:
        values: list[Any] = [record.get(name) if isinstance(record, dict) else None for name in names]
        for name, value in zip(names, values, strict=True):
            if not isinstance(value, str):
                option = option_of(config, name)
                if value is not None:
                    raise CorpusError(f"has {type(value).__name__} in {name!r}, where text is wanted; write it as text")
                raise CorpusError(f"has no text in {name!r} (found: {_found(record)}); set data.{option}")
            _check_whole(value)
        return values

    def text(record: Any) -> Document | None:
        value = texts(record)[0]
        return None if not value or value.isspace() else value

    def pair(record: Any) -> Document | None:
        prompt, completion = texts(record)
        return (prompt, completion) if completion.strip() else None

    def messages(record: Any) -> Document | None:
        return _messages(record, config.messages_column)

    return {"text": text, "prompt_completion": pair, "messages": messages}[config.format]


def content(document: Document) -> bytes:
    """The bytes that two equal documents share, and no others."""
    text = document if isinstance(document, str) else json.dumps(document, ensure_ascii=False, sort_keys=True)
    return text.encode()


def document_hash(data: bytes) -> bytes:
    """16 bytes that name a document's content."""
    return hashlib.blake2b(data, digest_size=16).digest()


def is_held_out(hashed: bytes, fraction: float) -> bool:
    """Whether a document is for validation: decided by its content alone, so it stays so when files are added."""
    return int.from_bytes(hashed[:8]) < fraction * 2**64


def texts_of(document: Document) -> list[str]:
    """All the words of a document, for training a tokenizer."""
    if isinstance(document, str):
        return [document]
    return [part if isinstance(part, str) else part["content"] for part in document]


def _messages(record: Any, column: str) -> Document | None:
    value: Any = record.get(column) if isinstance(record, dict) else None
    fits = isinstance(value, list) and all(
        isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)
        for item in value
    )
    if not fits:
        raise CorpusError(
            f"has no list of messages, each with the texts role and content, in {column!r} "
            f"(found: {_found(record)}); set data.messages_column"
        )
    for item in value:
        _check_whole(item["content"])
    if not any(item["role"] == "assistant" and item["content"].strip() for item in value):
        return None
    return value


def _found(record: Any) -> str:
    return ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__


def _check_whole(text: str) -> None:
    """Half of a surrogate pair can be written in JSON, and is no character."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"has half a character (\\u{ord(text[error.start]):x} alone); repair or remove it") from None
