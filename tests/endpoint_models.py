"""Random, tiny versions for the tests of the endpoint: a Llama with a byte-level tokenizer, published and crowned."""

import asyncio
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cluster import champions, promotions
from cluster.published import manifest_sha256, publish_directory
from cluster.storage import open_storage
from services.endpoint.decoding import Piece, joined
from services.endpoint.model import ServedModel
from services.endpoint.schema import Sampling

NUM_PADDING = 40
"""Rows of the embedding behind the tokenizer's last id."""


def byte_level_tokenizer() -> Any:
    """All 256 bytes, a few merges, `<s>` and `</s>`; characters outside ASCII span several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the hat"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tiny_llama(tokenizer: Any, seed: int, heads: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + NUM_PADDING,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=512,
        initializer_range=0.4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


def save_version(directory: Path, seed: int = 0, heads: int = 4) -> LlamaForCausalLM:
    """Model and tokenizer files, without a manifest."""
    tokenizer = byte_level_tokenizer()
    model = tiny_llama(tokenizer, seed, heads)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model


def publish_version(
    directory: Path,
    root: Path,
    version: str,
    seed: int,
    spoil: Callable[[LlamaForCausalLM], None] | None = None,
    scheme: str = "float",
) -> tuple[str, str]:
    """Publishes a fresh version below `root`, changed by `spoil`; returns its URI and the hash of its manifest."""
    model = save_version(directory, seed)
    if spoil is not None:
        with torch.no_grad():
            spoil(model)
        model.save_pretrained(directory)
    if scheme != "float":
        made = directory / scheme
        importlib.import_module(f"jobs.quantization.{scheme}").quantize(str(directory), made)
        byte_level_tokenizer().save_pretrained(made)
        directory = made
    storage = open_storage(str(root))
    manifest = publish_directory(directory, storage, f"versions/{version}", scheme=scheme)
    return f"{storage.uri}/versions/{version}", manifest_sha256(manifest)


def fail_on_text(model: LlamaForCausalLM) -> None:
    """Spoils a model so that it loads and raises on every prompt: all embeddings but the first, which is read as a
    check when it is loaded, are no numbers."""
    model.get_input_embeddings().weight[1:] = float("nan")


def be_no_numbers(model: LlamaForCausalLM) -> None:
    """Spoils a model so that it cannot be loaded."""
    model.get_input_embeddings().weight[:] = float("nan")


def crown_version(database: str, model_name: str, version: str, uri: str, manifest_hash: str) -> champions.Champion:
    engine = champions.open_database(database)
    try:
        seen = champions.current_champion(engine, model_name)
        artefact = {"version": version, "uri": uri, "manifest_sha256": manifest_hash}
        proposed = promotions.propose(engine, model_name, artefact, seen, run="test")
        _, champion = promotions.crown(engine, promotions.advance(engine, proposed, "checked"))
        return champion
    finally:
        engine.dispose()


def answer(model: ServedModel, prompt_ids: list[int], sampling: Sampling) -> list[Piece]:
    """The whole choices of an answer."""
    return answers(model, [(prompt_ids, sampling)])[0]


def answers(model: ServedModel, requests: list[tuple[list[int], Sampling]]) -> list[list[Piece]]:
    """The answers to requests that come at the same time."""

    async def one(prompt_ids: list[int], sampling: Sampling) -> list[Piece]:
        running = model.submit([prompt_ids], sampling)
        assert await anext(running) == len(prompt_ids)
        return joined([piece async for piece in running if isinstance(piece, Piece)])

    async def together() -> list[list[Piece]]:
        return list(await asyncio.gather(*(one(*request) for request in requests)))

    return asyncio.run(together())
