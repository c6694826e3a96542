"""From text to the example store: find the sources, train or take a tokenizer, tokenise once, write parquet shards.

Documents are framed by the tokenizer's begin and end tokens and laid into rows of `sequence_length` tokens. A row may
hold several documents; the lengths of the pieces are stored with it, and no model lets one see another. A document that
does not fit goes on in the next row, which repeats one token so that every token but the first is predicted once.

The store is published with its manifest last; without a manifest it does not exist.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config import fingerprint
from cluster.errors import CorpusError, ModelError
from cluster.pretrained import load_tokenizer, tokenizer_fingerprint
from cluster.published import MANIFEST, publish_directory, read_manifest
from cluster.storage import Storage
from jobs.config import DataConfig
from jobs.corpus import Source, read_texts
from jobs.progress import Bar

FORMAT = 1
_SHORTEST_PIECE = 16
"""A document is not begun in the last few tokens of a row: a piece so short teaches little."""
_BATCH = 256

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def corpus_fingerprint(sources: list[Source]) -> str:
    """Changes when any source object does."""
    return fingerprint([[source.uri, source.info.size_bytes, source.info.etag] for source in sources])


def train_tokenizer(sources: list[Source], config: DataConfig, storage: Storage, prefix: str, bar: Bar) -> str:
    """Trains a byte-level BPE tokenizer on the corpus and publishes it. Returns its URI."""
    uri = f"{storage.uri}/{prefix}"
    if read_manifest(storage, prefix) is not None:
        return uri
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    assert config.train_tokenizer is not None
    bar.start(None, "training the tokenizer")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.train_tokenizer.vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_texts(sources, config.text_column), trainer)
    end = SPECIAL_TOKENS[0]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=end, eos_token=end)
    tokenizer.chat_template = CHAT_TEMPLATE
    with TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        publish_directory(Path(directory), storage, prefix)
    return uri


def prepare(
    sources: list[Source],
    config: DataConfig,
    tokenizer_uri: str,
    smallest: int,
    storage: Storage,
    prefix: str,
    bar: Bar,
) -> dict[str, Any]:
    """Writes the example store below `prefix` and returns its manifest.

    Args:
        tokenizer_uri: a directory or hub id.
        smallest: training rows that are needed at least (one global batch).

    Raises:
        CorpusError: damaged sources, or too little text. Nothing of the store is left behind.
    """
    tokenizer = load_tokenizer(tokenizer_uri)
    storage_clean = read_manifest(storage, prefix) is None
    if storage_clean and storage.list(f"{prefix}/"):
        storage.delete(prefix)  # what a killed run left: without a manifest it is nothing
    try:
        writers = {
            split: _SplitWriter(split, number, config, storage, prefix)
            for number, split in enumerate(("train", "validation"))
        }
        start, end = _frame(tokenizer)
        bar.start(sum(source.info.size_bytes for source in sources), "tokenising")
        done = documents = 0
        for source in sources:
            for texts in _batches(read_texts(source, config.text_column)):
                for text, ids, ends in _tokenise(tokenizer, texts):
                    split = "validation" if is_held_out(text, config.validation_fraction) else "train"
                    writers[split].add(
                        np.concatenate([start, ids, end]), np.concatenate([[0] * len(start), ends, ends[-1:]])
                    )
                    documents += 1
                bar.update(note=f"{documents} documents")
            done += source.info.size_bytes
            bar.update(done)
        for writer in writers.values():
            writer.close()
        rows = {split: writer.rows for split, writer in writers.items()}
        if rows["train"] < smallest:
            raise CorpusError(
                f"the corpus gives {rows['train']} training rows of {config.sequence_length} tokens, one batch needs "
                f"{smallest}: add text, or lower train.global_batch or data.sequence_length"
            )
        if rows["validation"] == 0:
            raise CorpusError(
                f"no document of {documents} was held out by data.validation_fraction={config.validation_fraction}: "
                "raise it, or add documents (a .txt file is one, however long; so is a line of .jsonl)"
            )
    except BaseException:
        if storage_clean:
            storage.delete(prefix)
        raise
    shards = [shard for writer in writers.values() for shard in writer.shards]
    manifest = {
        "format": FORMAT,
        "shards": shards,
        "rows": rows,
        "tokens": {split: writer.tokens for split, writer in writers.items()},
        "bytes": {split: writer.bytes for split, writer in writers.items()},
        "documents": documents,
        "sequence_length": config.sequence_length,
        "vocab_size": len(tokenizer),
        "tokenizer": tokenizer_uri,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "sources": [{"uri": item.uri, "size_bytes": item.info.size_bytes, "etag": item.info.etag} for item in sources],
        "fingerprint": fingerprint([[shard["key"], shard["sha256"]] for shard in shards]),
    }
    storage.write_json(f"{prefix}/{MANIFEST}", manifest)
    return manifest


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document is for validation: decided by its text alone, so it stays so when files are added."""
    return (
        int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())
        < fraction * 2**64
    )


def _texts(sources: list[Source], text_column: str) -> Iterator[str]:
    for source in sources:
        yield from read_texts(source, text_column)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _frame(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids put before and behind every document."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ModelError("the tokenizer has no end-of-text token; set eos_token in its tokenizer_config.json")
    begin = tokenizer.bos_token_id
    return np.array([end if begin is None else begin], np.int32), np.array([end], np.int32)


def _tokenise(tokenizer: Any, texts: list[str]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Text, int32 token ids, and the UTF-8 byte at which each token ends."""
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,  # "<|endoftext|>" in a text is text: it ends nothing
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if not ids:
            continue
        ends = np.fromiter((stop for _, stop in offsets), np.int64, len(offsets))
        if not text.isascii():
            widths = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
            sizes = 1 + (widths > 0x7F) + (widths > 0x7FF) + (widths > 0xFFFF)
            ends = np.concatenate([[0], np.cumsum(sizes)])[ends]
        yield text, np.array(ids, np.int32), ends


@dataclass
class _SplitWriter:
    """Lays documents into rows and rows into shards of one split."""

    split: str
    number: int
    config: DataConfig
    storage: Storage
    prefix: str
    rows: int = 0
    tokens: int = 0
    bytes: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    _pieces: list[np.ndarray] = field(default_factory=list)
    _row_tokens: int = 0
    _row_bytes: int = 0
    _waiting: list[tuple[np.ndarray, np.ndarray, int]] = field(default_factory=list)

    def add(self, token_ids: np.ndarray, byte_ends: np.ndarray) -> None:
        """One framed document; `byte_ends` is where each token ends in its text."""
        length, position = self.config.sequence_length, 0
        while position < len(token_ids) - 1:
            room = length - self._row_tokens
            if room < min(_SHORTEST_PIECE, length, len(token_ids) - position):
                self._finish_row()
                room = length
            piece = token_ids[position : position + room]
            self._pieces.append(piece)
            self._row_tokens += len(piece)
            self._row_bytes += int(byte_ends[position + len(piece) - 1] - byte_ends[position])
            # The last token of a cut piece begins the next one: as context there, as a target here.
            position += len(piece) - 1
            if self._row_tokens >= length:
                self._finish_row()

    def close(self) -> None:
        self._finish_row()
        self._write_shard()

    def _finish_row(self) -> None:
        if not self._pieces:
            return
        lengths = np.array([len(piece) for piece in self._pieces], np.int32)
        self._waiting.append((np.concatenate(self._pieces), lengths, self._row_bytes))
        self.rows += 1
        self.tokens += self._row_tokens
        self.bytes += self._row_bytes
        self._pieces, self._row_tokens, self._row_bytes = [], 0, 0
        if len(self._waiting) >= self.config.rows_per_shard:
            self._write_shard()

    def _write_shard(self) -> None:
        if not self._waiting:
            return
        tokens, segments, sizes = zip(*self._waiting, strict=True)
        table = pa.table(
            {
                "token_ids": pa.array(list(tokens), pa.list_(pa.int32())),
                "segment_lengths": pa.array(list(segments), pa.list_(pa.int32())),
                "loss_mask": pa.array([np.ones(len(row), np.int8) for row in tokens], pa.list_(pa.int8())),
                "num_bytes": pa.array(sizes, pa.int64()),
            }
        )
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        data = buffer.getvalue()
        digest = hashlib.sha256(data).hexdigest()
        number = 2 * len(self.shards) + self.number
        key = f"{self.split}-{number:06d}-{digest[:16]}.parquet"
        self.storage.write(f"{self.prefix}/{key}", data)
        self.shards.append(
            {
                "key": key,
                "number": number,
                "split": self.split,
                "rows": len(self._waiting),
                "size_bytes": len(data),
                "sha256": digest,
            }
        )
        self._waiting = []
