"""From the pieces of an answer to OpenAI's records: whole, or as the chunks of a stream.

A whole answer is made by joining the pieces that a stream would have sent, so the two cannot differ.
"""

import base64
import time
import uuid
from typing import Any, Protocol

import numpy as np

from services.endpoint.decoding import Piece, TokenLogprob, Vocabulary, joined
from services.endpoint.encoder_schema import (
    Classification,
    ClassificationList,
    Embedding,
    EmbeddingList,
    InputUsage,
    LabelProbability,
)
from services.endpoint.reasoning import Part, Reasoning, ReasoningSplitter
from services.endpoint.records import (
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
    """`/v1/chat/completions`. With a `reasoning`, what the model thought comes apart from what it answers."""

    def __init__(
        self,
        model: str,
        vocabulary: Vocabulary,
        logprobs: bool,
        include_usage: bool,
        reasoning: Reasoning | None = None,
    ) -> None:
        self._id, self._created, self._model = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model
        self._vocabulary, self._logprobs, self._include_usage = vocabulary, logprobs, include_usage
        self._reasoning = reasoning
        self._splitters: dict[int, ReasoningSplitter] = {}
        self._greeted: set[int] = set()

    def whole(self, pieces: list[Piece], usage: Usage) -> str:
        choices = []
        for piece in joined(pieces):
            part = self._part(piece)
            choices.append(
                ChatChoice(
                    index=piece.index,
                    message=AnswerMessage(
                        content=part.content, reasoning_content=part.reasoning if self._returns_reasoning else None
                    ),
                    logprobs=self._logprobs_of(part.tokens),
                    finish_reason=piece.finish_reason or "length",
                )
            )
        return ChatCompletion(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        ).model_dump_json()

    def chunks(self, piece: Piece) -> list[str]:
        choices = []
        part = self._part(piece)
        if piece.index not in self._greeted:
            self._greeted.add(piece.index)
            choices.append(ChatChunkChoice(index=piece.index, delta={"role": "assistant", "content": ""}))
        if part.reasoning and self._returns_reasoning:
            choices.append(ChatChunkChoice(index=piece.index, delta={"reasoning_content": part.reasoning}))
        if part.content or part.tokens:
            choices.append(
                ChatChunkChoice(
                    index=piece.index, delta={"content": part.content}, logprobs=self._logprobs_of(part.tokens)
                )
            )
        if piece.finish_reason is not None:
            choices.append(ChatChunkChoice(index=piece.index, delta={}, finish_reason=piece.finish_reason))
        exclude = None if self._include_usage else {"usage"}
        return [self._record([choice], None).model_dump_json(exclude=exclude) for choice in choices]

    @property
    def _returns_reasoning(self) -> bool:
        return self._reasoning is not None and self._reasoning.returned

    def _part(self, piece: Piece) -> Part:
        """What became certain with a piece; all of the rest with a choice's last one."""
        if self._reasoning is None:
            return Part("", piece.text, piece.tokens)
        splitter = self._splitters.get(piece.index)
        if splitter is None:
            splitter = ReasoningSplitter(self._reasoning.block, self._reasoning.inside)
            self._splitters[piece.index] = splitter
        part = splitter.push(piece.text, piece.tokens)
        if piece.finish_reason is None:
            return part
        rest = splitter.finish()
        return Part(part.reasoning + rest.reasoning, part.content + rest.content, part.tokens + rest.tokens)

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


# --- encoders ---------------------------------------------------------------------------------------------------------

Array = np.ndarray[Any, np.dtype[np.float32]]


def embeddings_body(model: str, vectors_BD: Array, as_base64: bool, num_tokens: int) -> str:
    """`/v1/embeddings`, of vectors [B, D] in the order of the inputs."""
    if as_base64:
        written: list[Any] = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors_BD]
    else:
        written = vectors_BD.tolist()
    data = [Embedding(index=index, embedding=vector) for index, vector in enumerate(written)]
    return EmbeddingList(data=data, model=model, usage=_input_usage(num_tokens)).model_dump_json()


def classifications_body(
    model: str, labels: list[str], probabilities_BL: Array, top_k: int | None, num_tokens: int
) -> str:
    """`/v1/classifications`, of probabilities [B, L] in the order of the inputs; equal ones in the order of labels."""
    data = []
    for index, row in enumerate(probabilities_BL.tolist()):
        order = sorted(range(len(labels)), key=lambda label: -row[label])[:top_k]
        pairs = [LabelProbability(label=labels[label], probability=row[label]) for label in order]
        data.append(Classification(index=index, label=pairs[0].label, probabilities=pairs))
    return ClassificationList(data=data, model=model, usage=_input_usage(num_tokens)).model_dump_json()


def _input_usage(num_tokens: int) -> InputUsage:
    return InputUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)
