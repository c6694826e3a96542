"""Tiny random models, tokenizers and corpora for tests: built in well under a second, the same every time."""

import json
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 320
"""Of the tiny tokenizer: 256 bytes, special tokens, a few merges."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen": {"model_type": "qwen2"},
    "qwen3_tied": {"model_type": "qwen3", "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
    "gemma3": {"model_type": "gemma3_text", "pad_token_id": 0},
    "glm": {"model_type": "glm", "pad_token_id": 0, "head_dim": 16},
    "gemma2_soft_cap": {"model_type": "gemma2", "final_logit_softcapping": 2.0, "head_dim": 16},
    "cohere_logit_scale": {"model_type": "cohere", "logit_scale": 0.25, "pad_token_id": 0},
    "granite_logit_scale": {"model_type": "granite", "logits_scaling": 3.0},
    "phi_head_bias": {"model_type": "phi"},
}
_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def tokenizer(directory: Path, vocab_size: int = VOCABULARY, text: str | None = None) -> Path:
    """Saves a byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([text or " ".join(sentences(400))], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    fast.save_pretrained(directory)
    return directory


def model(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random model with logits of useful size, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = dict(FAMILIES[family])
    model_type = keys.pop("model_type")
    small = {} if model_type == "gpt2" else _SMALL
    special = {"bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(model_type, **{"vocab_size": VOCABULARY, **special, **small, **keys, **changes})
    torch.manual_seed(seed)
    built = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        head = built.get_output_embeddings()
        head.weight.mul_(8)  # far from uniform, so that divergences are not lost in rounding
        if head.bias is not None:
            head.bias.normal_()
    return built.eval()


def save_model(directory: Path, family: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Saves a random model with its tokenizer."""
    model(family, seed, **changes).save_pretrained(directory)
    tokenizer(directory)
    return directory


def sentences(number: int, seed: int = 0) -> list[str]:
    """Sentences with enough regularity to be learnt."""
    import random

    rng = random.Random(seed)
    subjects = ["the cat", "a small dog", "my neighbour", "the old clock", "every student", "der Bär", "一只鸟"]
    verbs = ["sees", "follows", "paints", "remembers", "carries", "forgets"]
    objects = ["the river", "a red house", "nothing", "seven stones", "the teacher", "a naïve plan"]
    return [f"{rng.choice(subjects)} {rng.choice(verbs)} {rng.choice(objects)}." for _ in range(number)]


def corpus(directory: Path, documents: int = 300, seed: int = 0) -> Path:
    """Writes a jsonl corpus of documents of a few sentences each; returns its path."""
    import random

    rng = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "corpus.jsonl"
    lines = [
        json.dumps({"text": f"{number}. " + " ".join(sentences(rng.randint(1, 12), seed * 7919 + number))})
        for number in range(documents)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run_config(name: str, directory: Path, documents: int = 120, **changes: Any) -> Path:
    """Writes the config of a run with everything small: a tiny corpus, a tiny teacher, a student of its first layer.

    Args:
        changes: other sections and values of the config. Those of `data`, `teacher` and `train` are put over the ones
            here, a `student` stands instead of this one, and None leaves a section out.
    """
    import yaml

    config: dict[str, Any] = {
        "data": {
            "sources": [str(corpus(directory / "in", documents))],
            "sequence_length": 48,
            "validation_fraction": 0.2,
        },
        "teacher": {"model": str(save_model(directory / "teacher")), "dtype": "float32"},
        "student": {"from_teacher": {"layers": [0]}},
        "train": {"steps": 12, "global_batch": 8, "micro_batch": 4, "checkpoint_every": 4, "validate_every": 4},
    }
    for section, values in changes.items():
        together = section in ("data", "teacher", "train") and values is not None
        config[section] = {**config[section], **values} if together else values
    path = directory / f"{name}.yaml"
    path.write_text(
        yaml.safe_dump({"name": name, **{key: value for key, value in config.items() if value is not None}})
    )
    return path
