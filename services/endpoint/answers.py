"""From the pieces of an answer to OpenAI's records: whole, or as the chunks of a stream.

A whole answer is made by joining the pieces that a stream would have sent, so the two cannot differ.
"""

import time
import uuid
from typing import Protocol

from services.endpoint.decoding import Piece, TokenLogprob, Vocabulary, joined
from services.endpoint.schema import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatTokenLogprob,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    TopLogprob,
    Usage,
)


class Answer(Protocol):
    """How one request is answered. Bodies and chunks are JSON texts."""

    def whole(self, pieces: list[Piece], usage: Usage) -> str: ...

    def chunks(self, piece: Piece) -> list[str]:
        """The events of a stream for one piece."""

    def usage_chunk(self, usage: Usage) -> str: ...


class CompletionAnswer:
    """`/v1/completions`."""

    def __init__(self, model: str, vocabulary: Vocabulary, logprobs: bool, include_usage: bool) -> None:
        self._id, self._created, self._model = f"cmpl-{uuid.uuid4().hex}", int(time.time()), model
        self._vocabulary, self._logprobs, self._include_usage = vocabulary, logprobs, include_usage

    def whole(self, pieces: list[Piece], usage: Usage) -> str:
        choices = [self._choice(piece) for piece in joined(pieces)]
        return self._record(choices, usage).model_dump_json()

    def chunks(self, piece: Piece) -> list[str]:
        record = self._record([self._choice(piece)], None)
        return [record.model_dump_json(exclude=None if self._include_usage else {"usage"})]

    def usage_chunk(self, usage: Usage) -> str:
        return self._record([], usage).model_dump_json()

    def _record(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _choice(self, piece: Piece) -> CompletionChoice:
        logprobs = self._logprobs_of(piece.tokens) if self._logprobs else None
        return CompletionChoice(
            index=piece.index, text=piece.text, logprobs=logprobs, finish_reason=piece.finish_reason
        )

    def _logprobs_of(self, tokens: list[TokenLogprob]) -> CompletionLogprobs:
        name = self._vocabulary.name_of
        return CompletionLogprobs(
            tokens=[name(token.token_id) for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[self._top(token) for token in tokens],
            text_offset=[token.text_offset for token in tokens],
        )

    def _top(self, token: TokenLogprob) -> dict[str, float] | None:
        """The most likely tokens by name; the chosen one is always among them, at the end if it is not one of these."""
        if token.logprob is None:
            return None
        name = self._vocabulary.name_of
        return {name(top): value for top, value in token.top} | {name(token.token_id): token.logprob}


class ChatAnswer:
    """`/v1/chat/completions`."""

    def __init__(self, model: str, vocabulary: Vocabulary, logprobs: bool, include_usage: bool) -> None:
        self._id, self._created, self._model = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model
        self._vocabulary, self._logprobs, self._include_usage = vocabulary, logprobs, include_usage
        self._greeted: set[int] = set()

    def whole(self, pieces: list[Piece], usage: Usage) -> str:
        choices = [
            ChatChoice(
                index=piece.index,
                message=AnswerMessage(content=piece.text),
                logprobs=self._logprobs_of(piece.tokens),
                finish_reason=piece.finish_reason or "length",
            )
            for piece in joined(pieces)
        ]
        return ChatCompletion(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        ).model_dump_json()

    def chunks(self, piece: Piece) -> list[str]:
        choices = []
        if piece.index not in self._greeted:
            self._greeted.add(piece.index)
            choices.append(ChatChunkChoice(index=piece.index, delta={"role": "assistant", "content": ""}))
        if piece.text or piece.tokens:
            choices.append(
                ChatChunkChoice(
                    index=piece.index, delta={"content": piece.text}, logprobs=self._logprobs_of(piece.tokens)
                )
            )
        if piece.finish_reason is not None:
            choices.append(ChatChunkChoice(index=piece.index, delta={}, finish_reason=piece.finish_reason))
        exclude = None if self._include_usage else {"usage"}
        return [self._record([choice], None).model_dump_json(exclude=exclude) for choice in choices]

    def usage_chunk(self, usage: Usage) -> str:
        return self._record([], usage).model_dump_json()

    def _record(self, choices: list[ChatChunkChoice], usage: Usage | None) -> ChatChunk:
        return ChatChunk(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _logprobs_of(self, tokens: list[TokenLogprob]) -> ChatLogprobs | None:
        if not self._logprobs:
            return None
        content = [
            ChatTokenLogprob(
                **self._entry(token.token_id, token.logprob or 0.0),
                top_logprobs=[TopLogprob(**self._entry(top, value)) for top, value in token.top],
            )
            for token in tokens
        ]
        return ChatLogprobs(content=content)

    def _entry(self, token_id: int, logprob: float) -> dict:
        data = self._vocabulary.bytes_of(token_id)
        token = data.decode("utf-8", "replace") or self._vocabulary.name_of(token_id)
        return {"token": token, "logprob": logprob, "bytes": list(data)}
