"""Random, tiny encoders of the BERT family, saved as transformers or as sentence-transformers does."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "dog",
    "##s",
    "##ed",
    "red",
    "hat",
    "un",
    "##happy",
    "und",
    "der",
    "bar",
]
LABELS = ["negative", "neutral", "positive"]


def word_piece_tokenizer() -> Any:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = dict.fromkeys([*special, *WORDS, *letters, *(f"##{letter}" for letter in letters)])
    vocabulary = {word: number for number, word in enumerate(words)}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def _config(tokenizer: Any, **changes: Any) -> BertConfig:
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id,
        **changes,
    )


def save_encoder(directory: Path, pooling: dict[str, Any] | None = None, normalise: bool = False, **more: Any) -> Any:
    """Saves an encoder; with `pooling` (the content of `1_Pooling/config.json`) as sentence-transformers does."""
    tokenizer = word_piece_tokenizer()
    torch.manual_seed(0)
    model = BertModel(_config(tokenizer, **more)).eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if pooling is not None:
        modules = [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ]
        if normalise:
            kind = "sentence_transformers.models.Normalize"
            modules.append({"idx": 2, "name": "2", "path": "2_Normalize", "type": kind})
        (directory / "modules.json").write_text(json.dumps(modules))
        (directory / "1_Pooling").mkdir(exist_ok=True)
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 32, "do_lower_case": false}')
    return model


def save_classifier(directory: Path, **more: Any) -> Any:
    tokenizer = word_piece_tokenizer()
    torch.manual_seed(0)
    names = dict(enumerate(LABELS))
    fields = {"id2label": names, "label2id": {label: number for number, label in names.items()}, **more}
    model = BertForSequenceClassification(_config(tokenizer, **fields)).eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model
