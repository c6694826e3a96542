"""Takes what a model thinks apart from what it answers. Knows texts and templates, no models.

A model that reasons writes a block such as `<think>…</think>` in front of its answer. Which tags it uses stands in its
chat template; so does whether the template itself opens the block at the end of the prompt, as DeepSeek-R1's does, or
opens and closes it, as Qwen3's does for `enable_thinking=false`. White space between block and answer belongs to
neither.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from services.endpoint.decoding import TokenLogprob


@dataclass(frozen=True)
class ThinkingBlock:
    """The two tags around a model's reasoning."""

    start: str
    end: str


KNOWN_BLOCKS = (
    ThinkingBlock("<think>", "</think>"),  # DeepSeek-R1, Qwen3, GLM-4.5, SmolLM3
    ThinkingBlock("<thinking>", "</thinking>"),
    ThinkingBlock("<seed:think>", "</seed:think>"),  # Seed-OSS
    ThinkingBlock("[THINK]", "[/THINK]"),  # Magistral
    ThinkingBlock("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
)


@dataclass(frozen=True)
class Reasoning:
    """How one request's answers are taken apart."""

    block: ThinkingBlock
    inside: bool
    """Whether the prompt ends within the block, so that the answer begins with reasoning."""
    returned: bool = True
    """Whether the client gets the reasoning; it is left out of the answer in any case."""


def find_block(tokenizer: Any) -> ThinkingBlock | None:
    """The thinking block that a tokenizer's chat template names; None if it names none that is known."""
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name
        template = template.get("default")
    if not template:
        return None
    return next((block for block in KNOWN_BLOCKS if block.end in template), None)


def reasoning_for(tokenizer: Any, arguments: dict[str, Any], returned: bool) -> Reasoning | None:
    """How the answers to a chat are taken apart; None if the model has no thinking block.

    Where an answer begins is read off what the template writes behind a conversation, never off the conversation: a
    user may write tags too.
    """
    from jinja2 import TemplateError

    block = find_block(tokenizer)
    if block is None:
        return None

    def rendered(add_generation_prompt: bool) -> str:
        conversation = [{"role": "user", "content": "x"}]
        return tokenizer.apply_chat_template(
            conversation, add_generation_prompt=add_generation_prompt, tokenize=False, **arguments
        )

    try:
        with_prompt, without = rendered(True), rendered(False)
    except (TemplateError, TypeError):  # refuses so short a conversation
        return Reasoning(block, inside=False, returned=returned)
    pairs = enumerate(zip(with_prompt, without, strict=False))
    behind = with_prompt[next((place for place, (one, other) in pairs if one != other), len(without)) :]
    return Reasoning(block, inside=behind.rfind(block.start) > behind.rfind(block.end), returned=returned)


@dataclass(frozen=True)
class Part:
    """What became certain: text of the reasoning, text of the answer, and the tokens that the latter came from."""

    reasoning: str = ""
    content: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)


class ReasoningSplitter:
    """Splits the text of one choice as it comes. A tag may be cut anywhere; no part of one is ever handed out.

    Joined parts are the same however the text was cut. A tag that nothing opened or closed is left out. A token that
    is partly of the answer counts as the answer's.
    """

    def __init__(self, block: ThinkingBlock, inside: bool, offset: int = 0) -> None:
        """`offset` is the `text_offset` that the first character of the text has."""
        self._block = block
        self._inside = inside
        self._at_start = inside  # of a block, or of what follows one: white space is dropped until something comes
        self._held = ""
        self._position = offset
        self._spaces = ""
        self._tokens: deque[TokenLogprob] = deque()
        self._last: TokenLogprob | None = None  # the last token that was left out
        self._at_seam = True  # no content has come since the last tag

    def push(self, text: str, tokens: Iterable[TokenLogprob] = ()) -> Part:
        """Adds text and the tokens that it came from; returns what became certain."""
        self._held += text
        self._tokens.extend(tokens)
        return self._split(last=False)

    def finish(self) -> Part:
        """The rest, when no text follows."""
        return self._split(last=True)

    def _split(self, last: bool) -> Part:
        reasoning, content, kept = [], [], []

        def take(length: int) -> None:
            text, self._held = self._held[:length], self._held[length:]
            begin, self._position = self._position, self._position + length
            if self._at_start:
                stripped = text.lstrip()
                begin += len(text) - len(stripped)
                self._at_start, text = not stripped, stripped
            if self._inside:
                # White space at the end of the reasoning shows itself as such only at the tag.
                text = self._spaces + text
                ready = text.rstrip()
                self._spaces = text[len(ready) :]
                reasoning.append(ready)
            else:
                content.append(text)
            if text and self._at_seam and not self._inside:
                # The first character may belong to a token that began in the tag or in the white space behind it.
                leave_out(begin)
                straddles = not self._tokens or self._tokens[0].text_offset > begin
                if straddles and self._last is not None:
                    kept.append(self._last)
                self._at_seam, self._last = False, None
            if self._inside or not text:
                leave_out(self._position)
            while self._tokens and self._tokens[0].text_offset < self._position:
                kept.append(self._tokens.popleft())

        def leave_out(until: int) -> None:
            while self._tokens and self._tokens[0].text_offset < until:
                self._last = self._tokens.popleft()

        while found := self._next_tag():
            place, tag = found
            take(place)
            self._held = self._held[len(tag) :]
            self._position += len(tag)
            leave_out(self._position)
            self._inside = tag == self._block.start
            self._at_start, self._at_seam, self._spaces = True, True, ""
        take(len(self._held) if last else len(self._held) - self._possible_tag())
        if last and not self._inside:
            kept += self._tokens  # those of no text, behind the last character
        return Part("".join(reasoning), "".join(content), kept)

    def _next_tag(self) -> tuple[int, str] | None:
        """Where the held text has its first tag, and which one it is."""
        places = [(self._held.find(tag), tag) for tag in (self._block.start, self._block.end)]
        return min((item for item in places if item[0] >= 0), default=None)

    def _possible_tag(self) -> int:
        """Characters at the end of the held text that could begin a tag."""
        tags = (self._block.start, self._block.end)
        longest = max(map(len, tags)) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(tag.startswith(self._held[-length:]) for tag in tags):
                return length
        return 0
