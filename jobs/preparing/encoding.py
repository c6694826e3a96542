"""From documents to token ids, to the bytes of text that each token stands for, and to which tokens are learnt.

Bytes per token make bits per byte. For byte-level BPE a token's spelling has one sign per byte, so its bytes are looked
up in a table of the vocabulary, and the tokenizer need not follow offsets: 0.65 of the processor time of transformers
with `return_offsets_mapping` (a vocabulary of 16,384 on Python's documentation, one thread). The table is believed only
where its bytes add up to the document's; any other tokenizer, and any other document, goes by offsets.

Prompt and completion are tokenised apart where the tokenizer allows it, as they are when a prompt is answered, so no
token spans the border; a tokenizer that puts a sign before every text gets both in one.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np

from cluster.errors import ModelError
from jobs.config import DataConfig
from jobs.preparing.chat import Chat
from jobs.preparing.documents import Document


@dataclass(frozen=True, slots=True)
class Example:
    """One document as tokens.

    Args:
        token_ids: int32, framed by the begin and end tokens.
        byte_ends: int64, growing: the bytes of learnt text up to and with each token, from any start.
        loss_mask: int8, which tokens count when they are predicted; None if all do.
    """

    token_ids: np.ndarray
    byte_ends: np.ndarray
    loss_mask: np.ndarray | None = None


class Encoder:
    """Tokenises documents of one format.

    Args:
        tokenizer: a fast one of transformers.
        config: which format.

    Raises:
        ModelError: the tokenizer lacks an end token or, for messages, a chat template.
    """

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self._tokenizer, self._core, self._format = tokenizer, tokenizer.backend_tokenizer, config.format
        self._begin, self._end = _frame(tokenizer)
        self._bytes_of = bytes_per_token(tokenizer)
        self._chat = Chat(tokenizer) if config.format == "messages" else None

    def encode(self, documents: list[Document], place: str) -> list[Example | None]:
        """Every document as tokens, in order; None for one that has none.

        Args:
            place: how to name where they come from in a message.
        """
        if self._format == "text":
            return self._texts([item for item in documents if isinstance(item, str)])
        if self._format == "prompt_completion":
            return self._pairs([item for item in documents if isinstance(item, tuple)])
        assert self._chat is not None
        return [self._message_tokens(*self._chat.render(item, place)) for item in documents if isinstance(item, list)]

    def _texts(self, texts: list[str]) -> list[Example | None]:
        counts, ids, num_bytes = self._tokens(texts)
        counts_framed = counts + 2
        # One array for the whole batch: begin token, ids and end token of every document that has any.
        total = int(counts_framed.sum())
        ends = np.cumsum(counts_framed)
        framed, sizes = np.empty(total, np.int32), np.zeros(total, np.int64)
        inside = np.ones(total, bool)
        inside[ends - counts_framed] = inside[ends - 1] = False
        framed[ends - counts_framed], framed[ends - 1] = self._begin, self._end
        framed[inside], sizes[inside] = ids, num_bytes
        byte_ends = np.cumsum(sizes)
        return [
            Example(framed[end - count : end], byte_ends[end - count : end]) if count > 2 else None
            for end, count in zip(ends.tolist(), counts_framed.tolist(), strict=True)
        ]

    def _pairs(self, pairs: list[tuple[str, str]]) -> list[Example | None]:
        if self._bytes_of is None:
            return [self._joined(*pair) for pair in pairs]
        counts, ids, num_bytes = self._tokens([text for pair in pairs for text in pair])
        starts = [0, *accumulate(counts.tolist())]
        examples: list[Example | None] = []
        for first, border, stop in zip(starts[:-1:2], starts[1::2], starts[2::2], strict=True):
            mask = np.ones(stop - first + 2, np.int8)
            mask[: border - first + 1] = 0
            examples.append(self._framed(ids[first:stop], num_bytes[first:stop], mask))
        return examples

    def _joined(self, prompt: str, completion: str) -> Example:
        """A token that holds the end of the prompt and the start of the completion belongs to the completion."""
        encoding = self._encode_batch([prompt + completion], offsets=True)[0]
        learnt = [stop > len(prompt) for _, stop in encoding.offsets]
        ids, num_bytes = np.array(encoding.ids, np.int32), _bytes_by_offsets(prompt + completion, encoding.offsets)
        return self._framed(ids, num_bytes, np.array([0, *learnt, 1], np.int8))

    def _framed(self, ids: np.ndarray, num_bytes: np.ndarray, mask: np.ndarray) -> Example:
        sizes = np.concatenate([[0], num_bytes, [0]]) * mask
        return Example(np.concatenate([[self._begin], ids, [self._end]]).astype(np.int32), np.cumsum(sizes), mask)

    def _message_tokens(self, text: str, spans: list[tuple[int, int]]) -> Example:
        """A rendered chat: it has its own frame, and its control tokens are no text."""
        assert self._chat is not None
        self._core.encode_special_tokens = False
        encoding = self._core.encode(text, add_special_tokens=False)
        ids, offsets = np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int64).reshape(-1, 2)
        is_control = np.isin(ids, self._chat.control_ids)
        mask = np.zeros(len(ids), np.int8)
        for start, stop in spans:
            first, last = np.searchsorted(offsets[:, 1], start, "right"), np.searchsorted(offsets[:, 0], stop, "left")
            turn_ends = np.flatnonzero(is_control[first:last])
            if len(turn_ends):  # what a template writes behind the end of a turn is not the assistant's
                last = first + turn_ends[-1] + 1
            mask[first:last] = 1
        sizes = np.where(is_control, 0, _bytes_by_offsets(text, encoding.offsets))
        return Example(ids, np.cumsum(sizes * mask), mask)

    def _tokens(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Number of tokens of each text, all ids in one array, and the bytes that each stands for."""
        encodings = self._encode_batch(texts, offsets=self._bytes_of is None)
        counts = np.fromiter(map(len, encodings), np.int64, len(encodings))
        ids = np.fromiter(chain.from_iterable(item.ids for item in encodings), np.int32, int(counts.sum()))
        if self._bytes_of is None:
            parts = [_bytes_by_offsets(text, item.offsets) for text, item in zip(texts, encodings, strict=True)]
            return counts, ids, np.concatenate([np.zeros(0, np.int64), *parts])
        num_bytes = self._bytes_of[ids]
        ends = np.cumsum(counts)
        sums = np.concatenate([[0], np.cumsum(num_bytes)])
        found = sums[ends] - sums[ends - counts]
        sizes = np.fromiter((len(text) if text.isascii() else len(text.encode()) for text in texts), np.int64)
        for wrong in np.flatnonzero(found != sizes).tolist():
            encoding = self._encode_batch([texts[wrong]], offsets=True)[0]
            place = slice(int(ends[wrong] - counts[wrong]), int(ends[wrong]))
            num_bytes[place] = _bytes_by_offsets(texts[wrong], encoding.offsets)
        return counts, ids, num_bytes

    def _encode_batch(self, texts: list[str], offsets: bool) -> list[Any]:
        self._core.encode_special_tokens = True  # "<|endoftext|>" in a text is text: it ends nothing
        encode = self._core.encode_batch if offsets else self._core.encode_batch_fast
        return encode(texts, add_special_tokens=False)


def encoding_fingerprint(tokenizer: Any) -> str:
    """Changes when any document could be tokenised differently: vocabulary, merges, rules, chat template."""
    parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def bytes_per_token(tokenizer: Any) -> np.ndarray | None:
    """int64 [V]: bytes of text that each token of a byte-level vocabulary stands for; None for other tokenizers."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    if rules["normalizer"] is not None or _kinds(rules["decoder"]) != ["ByteLevel"]:
        return None
    split = rules["pre_tokenizer"]
    last = split["pretokenizers"][-1] if split and split["type"] == "Sequence" else split
    if not last or last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    added = {item["id"]: item["content"] for item in rules["added_tokens"]}
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
    table = np.zeros(max(vocabulary.values(), default=0) + 1, np.int64)
    for token, index in vocabulary.items():
        table[index] = len(added[index].encode()) if index in added else len(token)
    return table


def _kinds(part: Any) -> list[str]:
    if part is None:
        return []
    return (
        [kind for item in part["decoders"] for kind in _kinds(item)] if part["type"] == "Sequence" else [part["type"]]
    )


def _bytes_by_offsets(text: str, offsets: Iterable[tuple[int, int]]) -> np.ndarray:
    """UTF-8 bytes of each token. A character that is split into several tokens counts for the first of them."""
    ends = np.fromiter((stop for _, stop in offsets), np.int64)
    if not text.isascii():
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        sizes = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
        ends = np.concatenate([[0], np.cumsum(sizes)])[ends]
    return np.diff(ends, prepend=0)


def _frame(tokenizer: Any) -> tuple[int, int]:
    """Ids put before and behind every document."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ModelError("the tokenizer has no end-of-text token; set eos_token in its tokenizer_config.json")
    begin = tokenizer.bos_token_id
    return (end if begin is None else begin), end
