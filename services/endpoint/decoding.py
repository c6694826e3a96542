"""From logits to text: which token comes next, what text it adds, what its log-probability was. Knows no models.

Tokens are turned into bytes one by one and bytes into text by an incremental UTF-8 decoder, so a character that spans
tokens is never cut, and the joined pieces of a streamed answer are the whole answer by construction.

Axes: N positions, V vocabulary, K kept entries.
"""

import codecs
import json
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from services.endpoint.schema import FinishReason

LOGPROB_FLOOR = -9999.0
"""Stands for a log-probability of minus infinity, which JSON cannot hold."""


class Vocabulary:
    """The bytes and the name of every token id of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.size = len(tokenizer)
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        self._byte_level = '"ByteLevel"' in json.dumps(backend.get("decoder"))
        self._byte_fallback = '"ByteFallback"' in json.dumps(backend.get("decoder"))
        self._cache: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """What the token adds to a text; nothing for special tokens."""
        found = self._cache.get(token_id)
        if found is None:
            found = self._cache[token_id] = b"" if token_id in self._special else self._derive(token_id)
        return found

    def name_of(self, token_id: int) -> str:
        """The token as text; a special token by its name, and one that is not whole UTF-8 as `bytes:\\xf0\\x9f`."""
        if token_id in self._special:
            return str(self._tokenizer.convert_ids_to_tokens(token_id))
        data = self.bytes_of(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _derive(self, token_id: int) -> bytes:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # a gap in the numbering
            return b""
        if self._byte_level:
            if all(character in _BYTE_OF_CHARACTER for character in token):
                return bytes(_BYTE_OF_CHARACTER[character] for character in token)
            return token.encode("utf-8")
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        # Any other decoder: what the token adds behind another one, where no leading space is stripped.
        anchor = next(index for index in range(self.size) if index not in self._special and self._decode([index]))
        return self._decode([anchor, token_id]).removeprefix(self._decode([anchor])).encode("utf-8")

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)


def _byte_characters() -> dict[str, int]:
    """The alphabet of byte-level tokenizers: printable bytes stand for themselves, the others for 256 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_characters()


# --- choosing a token -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choosing:
    """How one sequence chooses its next token."""

    temperature: float
    """0 takes the most likely token."""
    top_p: float
    """Keeps the smallest set of most likely tokens whose probabilities reach it, at least one."""
    generator: torch.Generator


_COLDEST = 1e-6
"""Below, the most likely token is taken: a float32 cannot divide by much less."""


def choose_tokens(logits_NV: Tensor, rules: list[Choosing]) -> list[int]:
    """Draws a token id for each row, by its own rule and from its own generator, which gives one number for a token.

    The token is the one in whose share of the cumulated probability the number falls, so a row's token depends on
    nothing but the row and its generator.
    """
    chosen = logits_NV.argmax(-1).tolist()
    drawn = [row for row, rule in enumerate(rules) if rule.temperature >= _COLDEST]
    if not drawn:
        return chosen
    logits = logits_NV[drawn] if len(drawn) < len(rules) else logits_NV
    temperatures = torch.tensor([rules[row].temperature for row in drawn], dtype=logits.dtype)[:, None]
    probabilities_NV = torch.softmax((logits - logits.max(-1, keepdim=True).values) / temperatures, dim=-1)
    whole = [number for number, row in enumerate(drawn) if rules[row].top_p >= 1]
    cumulated = dict(zip(whole, probabilities_NV[whole].cumsum(-1, dtype=torch.float64), strict=True)) if whole else {}
    for number, row in enumerate(drawn):
        share = torch.rand((), generator=rules[row].generator, dtype=torch.float64)
        if number in cumulated:
            chosen[row] = _at(cumulated[number], share)
        else:
            ids, cumulated_K = _most_likely(probabilities_NV[number], rules[row].top_p)
            chosen[row] = int(ids[_at(cumulated_K, share)])
    return chosen


def choose_token(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """`choose_tokens` for a single row."""
    return choose_tokens(logits_V[None], [Choosing(temperature, top_p, generator)])[0]


_FEW = 256
"""Tokens that mostly hold the share `top_p`; sorting the whole vocabulary takes many times as long."""


def _most_likely(probabilities_V: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Ids of the smallest set of most likely tokens that reaches `top_p`, and their cumulated probability."""
    for count in (min(_FEW, len(probabilities_V)), len(probabilities_V)):
        values, ids = torch.topk(probabilities_V, count)
        cumulated = values.cumsum(-1, dtype=torch.float64)
        num_kept = max(1, int((cumulated - values < top_p).sum()))
        if num_kept < count:
            break
    return ids[:num_kept], cumulated[:num_kept]


def _at(cumulated: Tensor, share: Tensor) -> int:
    return min(int(torch.searchsorted(cumulated, share * cumulated[-1], right=True)), len(cumulated) - 1)


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its natural log-probability at temperature 1, and the most likely tokens at its place, descending."""

    token_id: int
    logprob: float | None
    """None for the first token of a prompt, which nothing predicts."""
    top: tuple[tuple[int, float], ...]
    text_offset: int = 0
    """Characters of the choice's text in front of the token."""


def token_logprobs(logits_NV: Tensor, token_ids: list[int], num_top: int) -> list[TokenLogprob]:
    """Log-probabilities of N tokens; row t of the logits is about token t of the list."""
    logprobs_NV = torch.log_softmax(logits_NV.float(), dim=-1)
    chosen_N = logprobs_NV[torch.arange(len(token_ids)), torch.tensor(token_ids, dtype=torch.long)].tolist()
    top_NK = torch.topk(logprobs_NV, min(num_top, logprobs_NV.shape[-1]), dim=-1)
    rows = zip(token_ids, chosen_N, top_NK.indices.tolist(), top_NK.values.tolist(), strict=True)
    return [
        TokenLogprob(token_id, _finite(chosen), tuple((i, _finite(v)) for i, v in zip(ids, values, strict=True)))
        for token_id, chosen, ids, values in rows
    ]


def _finite(logprob: float) -> float:
    return max(logprob, LOGPROB_FLOOR)


@dataclass(frozen=True)
class Piece:
    """A part of the answer: what one or more tokens added to one choice."""

    index: int
    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    num_sampled: int = 0
    """Tokens sampled since the choice's last piece."""
    finish_reason: FinishReason | None = None
    """Set in the choice's last piece."""


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """One piece per choice, in order of their indexes."""
    by_index: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_index.setdefault(piece.index, []).append(piece)
    return [
        parts[0]
        if len(parts) == 1
        else Piece(
            index,
            "".join(piece.text for piece in parts),
            [token for piece in parts for token in piece.tokens],
            sum(piece.num_sampled for piece in parts),
            parts[-1].finish_reason,
        )
        for index, parts in sorted(by_index.items())
    ]


# --- text that grows --------------------------------------------------------------------------------------------------


class TextStream:
    """Text of tokens as they come, up to the first stop text.

    A piece is handed out once no later token can change it: not within a character, and not while its end could be the
    beginning of a stop text. Log-probabilities travel with the text of their token; those of tokens that begin inside
    or behind the stop text are dropped.
    """

    def __init__(self, vocabulary: Vocabulary, stop: tuple[str, ...], context_ids: list[int], offset: int = 0) -> None:
        """`context_ids` are the tokens in front, whose last character may be unfinished; `offset` counts the
        characters in front that belong to the same choice."""
        self.stopped = False
        self._vocabulary = vocabulary
        self._stop = stop
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in context_ids:
            self._utf8.decode(vocabulary.bytes_of(token_id))
        self._held = ""
        self._released = offset
        self._tokens: deque[TokenLogprob] = deque()

    def push(self, token_id: int, logprob: TokenLogprob | None) -> tuple[str, list[TokenLogprob]]:
        """Adds a token; returns the text that became certain and the tokens it came from."""
        if logprob is not None:
            offset = self._released + len(self._held)
            self._tokens.append(TokenLogprob(logprob.token_id, logprob.logprob, logprob.top, offset))
        self._held += self._utf8.decode(self._vocabulary.bytes_of(token_id))
        return self._release(last=False)

    def finish(self) -> tuple[str, list[TokenLogprob]]:
        """The rest, when no token follows. An unfinished character becomes U+FFFD."""
        if self.stopped:
            return "", []
        self._held += self._utf8.decode(b"", final=True)
        return self._release(last=True)

    def _release(self, last: bool) -> tuple[str, list[TokenLogprob]]:
        starts = [(self._held.find(stop), len(stop)) for stop in self._stop]
        found = [(start + length, start) for start, length in starts if start >= 0]
        if found:
            # The stop text that is complete first counts, as if the text had come character by character.
            self.stopped = True
            text, self._held = self._held[: min(found)[1]], ""
        else:
            num_kept = 0 if last else self._possible_stop()
            cut = len(self._held) - num_kept
            text, self._held = self._held[:cut], self._held[cut:]
        self._released += len(text)
        tokens = []
        while self._tokens and ((last and not self.stopped) or self._tokens[0].text_offset < self._released):
            tokens.append(self._tokens.popleft())
        return text, tokens

    def _possible_stop(self) -> int:
        """Characters at the end of the held text that could begin a stop text."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
