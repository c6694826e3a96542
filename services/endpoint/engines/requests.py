"""Requests to an engine, whatever it is: what is admitted, what is delivered, and how tokens become an answer's pieces.

A `Runner` owns the scheduling. Ours is `scheduler.py`, around an engine in this process; `vllm.py` hands requests to
vLLM. What a client sees is made here for both: text, stop texts, echo, log-probabilities, usage, and the refusal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.errors import ModelError
from services.endpoint.decoding import Piece, TextStream, TokenLogprob, Vocabulary
from services.endpoint.errors import unavailable
from services.endpoint.schema import FinishReason, Sampling

NOT_FINITE = "the model gave a logit that is not a finite number; retrain or register another version"


def too_few_outputs(outputs: int, vocabulary_size: int) -> ModelError:
    """A tokenizer that the model was not made for."""
    return ModelError(
        f"the model has {outputs} outputs, its tokenizer {vocabulary_size} tokens: "
        "register the student with the tokenizer that it was trained with"
    )


END = object()
"""The last item that is delivered of a request."""

Deliver = Callable[[list[Any]], None]
"""Takes items of a request, from a thread of the runner: pieces, an exception that ends it, at last `END`."""


@dataclass(frozen=True)
class Capacity:
    """What is taken at once, and what may wait."""

    max_running: int = 16
    """Choices that are decoded at the same time."""
    max_waiting: int = 32
    """Requests that may be admitted beyond `max_running`."""
    max_cached_tokens: int = 16_384
    """Tokens whose keys and values are kept."""
    max_admitted_tokens: int = 65_536
    """Prompts and longest answers of all choices of all requests that run or wait."""

    def check_room(self, num_jobs: int, admitted_tokens: int, num_tokens: int) -> None:
        """Raises `ApiError` with status 503 if a request of so many tokens is not taken beside what was admitted."""
        full = num_jobs >= self.max_running + self.max_waiting
        # A request that is larger than the bound on its own is taken when nothing else is there.
        if full or (num_jobs and admitted_tokens + num_tokens > self.max_admitted_tokens):
            raise unavailable("The server is overloaded; try again later.", "server_overloaded", retry_after_s=1)


@dataclass(frozen=True)
class Load:
    """What a runner has to do now."""

    running: int
    """Requests of which a choice is being read or written."""
    waiting: int
    admitted_tokens: int


class Runner(Protocol):
    """Answers many requests with one model. Its methods may be called from any thread."""

    @property
    def load(self) -> Load: ...

    def submit(self, prompts: list[tuple[list[int], int]], sampling: Sampling, deliver: Deliver) -> Any:
        """Admits a request: of each prompt its token ids, and how many tokens may be sampled behind them. Choice `c`
        of prompt `p` has the index `p * num_choices + c`. Returns what `cancel` takes.

        Raises:
            ApiError: status 503, at once, when there is no room for it.
        """

    def cancel(self, job: Any) -> None:
        """Ends a request soon. Harmless when it is done."""

    def check_room(self, num_tokens: int) -> None:
        """Raises `ApiError` with status 503 if a request of so many tokens is not taken now."""

    def check(self) -> None:
        """Raises `ModelError` if it will never answer again, so that whoever holds it is to be replaced."""


class Answer:
    """One choice as text: takes its tokens, gives the pieces that are delivered of it."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        eos_ids: frozenset[int],
        sampling: Sampling,
        index: int,
        prompt_ids: list[int],
        limit: int,
    ) -> None:
        """`limit` is the number of tokens to sample at most."""
        self.ended = False
        self._vocabulary, self._eos_ids, self._sampling = vocabulary, eos_ids, sampling
        self._index, self._prompt_ids, self._limit = index, prompt_ids, limit
        self._text: TextStream | None = None
        self._num_sampled = self._num_unreported = 0

    def begin(self, prompt_logprobs: list[TokenLogprob]) -> list[Piece]:
        """The prompt was read: repeats it if that is wanted, with its log-probabilities as far as there are any. It
        ends here if no token may be sampled."""
        pieces, num_echoed = [], 0
        if self._sampling.echo:
            stream = TextStream(self._vocabulary, (), [])
            logprobs: list[TokenLogprob] | list[None] = prompt_logprobs or [None] * len(self._prompt_ids)
            parts = [stream.push(*pair) for pair in zip(self._prompt_ids, logprobs, strict=True)]
            parts.append(stream.finish())
            text = "".join(text for text, _ in parts)
            num_echoed = len(text)
            pieces.append(self._piece(text, [token for _, tokens in parts for token in tokens]))
        self._text = TextStream(self._vocabulary, self._sampling.stop, self._prompt_ids, offset=num_echoed)
        if self._limit == 0:
            pieces.append(self._last("length"))
        return pieces

    def push(self, token_id: int, logprob: TokenLogprob | None) -> Piece | None:
        """Adds a sampled token; a piece if there is something to tell. Whether it was the last, `ended` says."""
        assert self._text is not None
        self._num_sampled += 1
        self._num_unreported += 1
        if token_id in self._eos_ids:
            return self._last("stop")
        text, tokens = self._text.push(token_id, logprob)
        if self._text.stopped or self._num_sampled == self._limit:
            return self._last("length", text, tokens)
        return self._piece(text, tokens) if text or tokens else None

    def _last(self, reason: FinishReason, text: str = "", tokens: list[TokenLogprob] | None = None) -> Piece:
        assert self._text is not None
        rest, rest_tokens = self._text.finish()
        # Text that was held back can turn out to hold a stop text only when a character was left unfinished.
        reason = "stop" if self._text.stopped else reason
        self.ended = True
        return self._piece(text + rest, [*(tokens or []), *rest_tokens], reason)

    def _piece(self, text: str, tokens: list[TokenLogprob], reason: FinishReason | None = None) -> Piece:
        piece = Piece(self._index, text, tokens, self._num_unreported, reason)
        self._num_unreported = 0
        return piece
