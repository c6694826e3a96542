"""Tiny models that say what a test wants: the next token is a function of the last one, put into a Llama's weights.

Attention and MLP add nothing, so the final hidden state is the last token's embedding, and row j of the head is the sum
of the embeddings of the tokens that j follows. Served like any other checkpoint.
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM

from tests.endpoint_models import byte_level_tokenizer

THINKING_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""As Qwen3's: the model opens the block itself, unless the template has closed it already."""
OPENED_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content.split('</think>')[-1] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:<think>\n{% endif %}"
)
"""As DeepSeek-R1's: the template opens the block, so the answer begins inside it."""

THINKER = {
    ":": "<think>", "<think>": " why", " why": " not", " not": "</think>",
    "</think>": "So", "\n": "So", "So": " yes", " yes": "</s>",
}  # fmt: skip
"""Thinks ` why not`, answers `So yes`; behind a block that the template closed, only the latter."""


def text_chain(start: str, text: str) -> dict[str, str]:
    """The successors that make a model write `text` byte by byte after `start` and then end; no byte may come twice."""
    written = [start, *(chr_of(byte) for byte in text.encode()), "</s>"]
    assert len(set(written)) == len(written)
    return dict(pairwise(written))


def chr_of(byte: int) -> str:
    """The byte-level token of a byte that is no printable ASCII character, or the character itself."""
    return chr(byte) if 0x21 <= byte < 0x7F else f"<byte {byte:02x}>"


def save_scripted(
    directory: Path, successors: Mapping[str, str], template: str | None = None, poison: str | None = None
) -> Path:
    """Saves a model whose most likely next token is `successors` of the last one.

    Args:
        successors: from token to token; `</s>` ends. Longer texts than a character become tokens of their own.
        poison: a token after which nothing is a number any more.
    """
    tokenizer = byte_level_tokenizer()
    words = dict.fromkeys([*successors, *successors.values()])
    known = tokenizer.get_vocab()
    new = [word for word in words if len(word) > 1 and word not in known and not word.startswith("<byte ")]
    tokenizer.add_tokens([AddedToken(word, normalized=False, special=False) for word in new])
    tokenizer.chat_template = template
    ids = {word: _id_of(tokenizer, word) for word in words}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings_VD = torch.nn.functional.normalize(torch.randn(len(tokenizer), 64), dim=-1)
        model.model.embed_tokens.weight.copy_(embeddings_VD)
        model.lm_head.weight.zero_()
        for word, following in successors.items():
            model.lm_head.weight[ids[following]] += 4 * embeddings_VD[ids[word]]
        if poison is not None:
            model.model.embed_tokens.weight[ids[poison]] = float("nan")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _id_of(tokenizer: Any, word: str) -> int:
    if word.startswith("<byte "):
        byte = int(word[6:8], 16)
        token = next(token for token in tokenizer.get_vocab() if _is_byte(tokenizer, token, byte))
        return tokenizer.convert_tokens_to_ids(token)
    if word in tokenizer.get_vocab():
        return tokenizer.convert_tokens_to_ids(word)
    [token_id] = tokenizer.encode(word)
    return token_id


def _is_byte(tokenizer: Any, token: str, byte: int) -> bool:
    from services.endpoint.decoding import _BYTE_OF_CHARACTER

    return len(token) == 1 and _BYTE_OF_CHARACTER.get(token) == byte
