"""The interface of an engine: sequences read tokens, several of them in one pass, and get logits.

An engine owns the weights and the memory of keys and values. It knows neither requests nor sampling; it is used from
one thread at a time.

Axes: N rows of logits, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

PROMPT_CHUNK = 64
"""Prompts are read in multiples of so many tokens; only the last part is shorter."""


@dataclass(eq=False)
class Place:
    """Where an engine keeps one sequence."""

    capacity: int
    """Tokens that it was reserved for, or more."""
    length: int = 0
    """Tokens read so far."""
    state: Any = None
    """The engine's own."""


@dataclass(frozen=True)
class Read:
    """Tokens that a sequence reads in the next pass."""

    place: Place
    token_ids: list[int]
    all_logits: bool = False
    """Whether the logits behind every token are wanted, or only those behind the last one."""


class Engine(Protocol):
    """A model in memory. Reading is causal, and a sequence sees nothing of the others."""

    max_cached_tokens: int
    """Bound of the memory of keys and values."""

    def reserve(self, num_tokens: int) -> Place | None:
        """A place for a sequence of at most `num_tokens`; None while there is no room for it."""

    def release(self, place: Place) -> None:
        """Gives a place back. Its sequence is forgotten."""

    def fork(self, place: Place, source: Place, num_tokens: int) -> bool:
        """Makes an empty place hold the first `num_tokens` that `source` has read; False where that cannot be had."""

    def forward(self, reads: list[Read]) -> Tensor:
        """Reads tokens; float32 logits [N, V], in the order of the reads: one row for each, or one for each of its
        tokens where it asks for all."""


class TokenBudget:
    """Counts reserved tokens where the memory itself is made and freed by somebody else."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.used = 0

    def take(self, num_tokens: int) -> bool:
        if self.used + num_tokens > self.max_tokens and self.used:
            return False
        self.used += num_tokens
        return True

    def give_back(self, num_tokens: int) -> None:
        self.used -= num_tokens
