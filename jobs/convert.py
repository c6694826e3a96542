"""Models in other formats as safetensors."""

from pathlib import Path
from tempfile import TemporaryDirectory

from cluster.pretrained import load_tokenizer
from cluster.published import publish_directory


def convert_gguf(model: str, gguf_file: str, storage_uri: str, prefix: str) -> None:
    """Publishes a GGUF file as safetensors (bfloat16) with its tokenizer; a Ray task."""
    import torch

    from cluster.language_model import load_causal_lm
    from cluster.storage import open_storage

    with TemporaryDirectory(prefix="raystill-convert-") as name:
        loaded = load_causal_lm(model, torch.bfloat16, gguf_file)
        loaded.save_pretrained(name)
        load_tokenizer(model, gguf_file).save_pretrained(name)
        publish_directory(Path(name), open_storage(storage_uri), prefix)
