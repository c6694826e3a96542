"""Chats as the tokenizer's own template writes them, and where in that text the assistant speaks.

A template that marks the assistant's words with `{% generation %}` says it itself. For any other, the text of the first
messages must be how the text of more messages begins; then an answer is what comes between the prompt for it and the
next message. Templates that rewrite what came before (some drop earlier reasoning) are refused: no span would be right.
"""

import re
from typing import Any

import numpy as np

from cluster.errors import CorpusError, ModelError
from jobs.preparing.documents import Message

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Chat:
    """Renders chats.

    Raises:
        ModelError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        try:
            template = tokenizer.get_chat_template()
        except ValueError:
            template = None
        if template is None:
            raise ModelError(
                "the tokenizer has no chat template, data.format=messages needs one: "
                "use the tokenizer of a chat model, or set chat_template in its tokenizer_config.json"
            )
        self._tokenizer, self._is_marked = tokenizer, _MARK.search(template) is not None
        control = {index: token for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.control_ids = np.array(sorted(control), np.int32)
        """Tokens that steer and stand for no text."""
        self._control = re.compile("|".join(re.escape(token.content) for token in control.values()) or r"(?!)")

    def render(self, messages: list[Message], place: str) -> tuple[str, list[tuple[int, int]]]:
        """The text of a chat, and from which to which character the assistant speaks.

        Raises:
            CorpusError: the template refuses the messages or rewrites them, or a message holds a control token.
        """
        for message in messages:
            if found := self._control.search(message["content"]):
                raise CorpusError(
                    f"{place}: a message holds {found[0]!r}, which steers the model and is no text; "
                    "remove it from the message, or leave the chat out"
                )
        try:
            return self._marked(messages) if self._is_marked else self._by_prefixes(messages, place)
        except CorpusError:
            raise
        except Exception as error:  # a template is a program of somebody else's: it raises what it likes
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise CorpusError(
                f"{place}: the chat template refuses a chat ({reason}); repair the messages, or leave the chat out"
            ) from error

    def _marked(self, messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = render_jinja_template(
            conversations=[[_given(message) for message in messages]],
            chat_template=self._tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        return texts[0], [(start, stop) for start, stop in spans[0]]

    def _by_prefixes(self, messages: list[Message], place: str) -> tuple[str, list[tuple[int, int]]]:
        whole = self._text(messages, False)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            # The first message may be the assistant's; many templates refuse to write nothing at all.
            before = self._text(messages[:number], True) if number else ""
            after = whole if number == len(messages) - 1 else self._text(messages[: number + 1], False)
            if not (number and after.startswith(before) and whole.startswith(after)):
                raise CorpusError(
                    f"{place}: the chat template gives message {number + 1} of a chat another text when more follow, "
                    "or has no prompt for it, so it cannot be told which words are the assistant's; put "
                    "{% generation %} marks into the template"
                )
            spans.append((len(before), len(after)))
        return whole, spans

    def _text(self, messages: list[Message], add_generation_prompt: bool) -> str:
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )


def _given(message: Message) -> Message:
    return {name: value for name, value in message.items() if value is not None}
