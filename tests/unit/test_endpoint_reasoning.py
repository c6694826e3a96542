"""Taking reasoning and answer apart: tags cut anywhere, templates that open or close the block, log-probabilities."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.endpoint.decoding import TokenLogprob
from services.endpoint.reasoning import (
    KNOWN_BLOCKS,
    Reasoning,
    ReasoningSplitter,
    ThinkingBlock,
    find_block,
    reasoning_for,
)
from tests.endpoint_models import byte_level_tokenizer
from tests.scripted_models import OPENED_TEMPLATE, THINKING_TEMPLATE

BLOCK = ThinkingBlock("<think>", "</think>")


def split(texts: list[str], inside: bool = False, block: ThinkingBlock = BLOCK) -> tuple[str, str]:
    """Reasoning and content of a text that comes in pieces."""
    splitter = ReasoningSplitter(block, inside)
    parts = [splitter.push(text) for text in texts] + [splitter.finish()]
    return "".join(part.reasoning for part in parts), "".join(part.content for part in parts)


@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("plain", False, ("", "plain")),
        (" plain \n", False, ("", " plain \n")),
        ("<think>\nwhy\n</think>\n\nso", False, ("why", "so")),
        ("why\n</think>\n\nso\n", True, ("why", "so\n")),
        ("<think>why</think>so", True, ("why", "so")),
        ("</think>so", True, ("", "so")),
        ("why", True, ("why", "")),
        ("<think>why", False, ("why", "")),
        ("<think></think>", False, ("", "")),
        ("a<think>b</think>c<think>d</think>e", False, ("bd", "ace")),
        ("so</think>", False, ("", "so")),
        ("a < b and <thin air> </thinking>", False, ("", "a < b and <thin air> </thinking>")),
        ("a <thi", False, ("", "a <thi")),
        ("a </thi", True, ("a </thi", "")),
        ("<think>a  b \n c</think> d  e ", False, ("a  b \n c", "d  e ")),
    ],
)
def test_splitter_takes_blocks_out(text: str, inside: bool, expected: tuple[str, str]) -> None:
    assert split([text], inside) == expected
    assert split(list(text), inside) == expected


@given(
    st.lists(
        st.sampled_from([BLOCK.start, BLOCK.end, " ", "\n", "a", "é", "<", "</", "<thi", "nk>", ">"]), max_size=12
    ),
    st.lists(st.integers(0, 60), max_size=8),
    st.booleans(),
)
def test_splitter_result_does_not_depend_on_the_cuts(parts: list[str], cuts: list[int], inside: bool) -> None:
    text = "".join(parts)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[start:end] for start, end in pairwise(places)]
    assert split(pieces, inside) == split([text], inside)


@given(st.lists(st.sampled_from(["<think>", "</think>", "ab", "\n", "c", " d"]), max_size=10), st.booleans())
def test_splitter_gives_the_tokens_of_the_content_once(words: list[str], inside: bool) -> None:
    """A token a word: those that the content came from come with it, in order, and none of the reasoning's."""
    splitter = ReasoningSplitter(BLOCK, inside)
    offset, content, kept = 0, "", []
    for number, word in enumerate(words):
        part = splitter.push(word, [TokenLogprob(number, -1.0, (), offset)])
        offset += len(word)
        content, kept = content + part.content, kept + part.tokens
    part = splitter.finish()
    content, kept = content + part.content, kept + part.tokens
    ids = [token.token_id for token in kept]
    assert ids == sorted(set(ids))
    assert "".join("".join(words[number] for number in ids).split()) == "".join(content.split())


@pytest.mark.parametrize("block", KNOWN_BLOCKS)
def test_splitter_knows_every_block(block: ThinkingBlock) -> None:
    text = f"{block.start}why{block.end}so"
    assert split(list(text), block=block) == ("why", "so")
    assert find_block(SimpleNamespace(chat_template=f"{{{{ x }}}}{block.start}{{{{ y }}}}{block.end}")) == block


def tokenizer(template: str | dict[str, str] | None) -> Any:
    made = byte_level_tokenizer()
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    ("template", "arguments", "expected"),
    [
        (None, {}, None),
        ("{{ messages[0].content }}", {"enable_thinking": True}, None),
        (THINKING_TEMPLATE, {}, Reasoning(BLOCK, inside=False)),
        (THINKING_TEMPLATE, {"enable_thinking": False}, Reasoning(BLOCK, inside=False)),
        (OPENED_TEMPLATE, {}, Reasoning(BLOCK, inside=True)),
        ({"default": OPENED_TEMPLATE, "tool_use": "x"}, {}, Reasoning(BLOCK, inside=True)),
        ("{{ raise_exception('no') }}</think>", {}, Reasoning(BLOCK, inside=False)),
    ],
)
def test_reasoning_is_read_off_the_template(template: Any, arguments: dict, expected: Reasoning | None) -> None:
    assert reasoning_for(tokenizer(template), arguments, returned=True) == expected
