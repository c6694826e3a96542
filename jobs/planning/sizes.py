"""How large the models of a config are, from their config.json alone: built without memory, no weight is read."""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError, ModelError
from cluster.pretrained import locate
from cluster.storage import open_storage
from jobs.config import RunConfig
from jobs.shape import shape_config


@dataclass(frozen=True)
class ModelSize:
    """Counts that arithmetic and memory follow from.

    Args:
        parameters: all that is stored, tied ones once.
        body: of them, those that a token is multiplied with on its way to the final hidden state: no embeddings, no
            head, and of experts the share that a token is sent to.
        head: entries of the output head's matrix.
        attention: heads times their width, added up over layers; scores and mixing cost `2 * attention * T` FLOPs per
            token of a causal sequence of T.
    """

    parameters: int
    body: int
    head: int
    attention: int
    hidden_size: int
    vocab_size: int

    def forward_flops(self, tokens: int, head: bool = True) -> float:
        """FLOPs per token of a forward pass over sequences of `tokens`; a multiplication and an addition are two."""
        return 2 * self.body + 2 * self.attention * tokens + (2 * self.head if head else 0)


def model_sizes(config: RunConfig) -> tuple[ModelSize | None, ModelSize]:
    """Sizes of teacher (None without one) and student.

    Raises:
        ModelError: a model whose config cannot be read.
        ConfigError: a shape that its family does not take, or kept layers that the teacher does not have.
    """
    for name in ("torchao", "torch.utils._pytree", "transformers"):  # what they say on import is for nobody
        logging.getLogger(name).setLevel(logging.ERROR)
    trained = config.data.train_tokenizer
    num_tokens = trained.vocab_size if trained is not None else None
    of_teacher: Any = None
    with tempfile.TemporaryDirectory(prefix="raystill-plan-") as directory:
        teacher, student = config.teacher, config.student
        base = None
        if teacher is not None and teacher.model is not None:
            base = _without_weights(teacher.model, Path(directory, "teacher"))
            of_teacher = _read_config(base, teacher.model, teacher.gguf_file)
        elif teacher is not None:
            of_teacher = shape_config(teacher.shape or {}, None, num_tokens or 32_000)
        if student.model is not None:
            of_student = _read_config(_without_weights(student.model, Path(directory, "student")), student.model)
        elif student.from_teacher is not None:
            return _size(of_teacher), _size(of_teacher, student.from_teacher.layers)
        else:
            shape = dict(student.shape or {})
            vocabulary: int = num_tokens or getattr(of_teacher, "vocab_size", None) or 32_000
            if "model_type" not in shape and base is None and teacher is not None:
                shape = {**(teacher.shape or {}), **shape}
            of_student = shape_config(shape, None if "model_type" in shape else base, vocabulary)
    return (None if of_teacher is None else _size(of_teacher)), _size(of_student)


def _without_weights(model: str, directory: Path) -> str:
    """Where the config of a model can be read; of one in an object store, its config.json alone is fetched."""
    if model.startswith("models:/"):
        from cluster.tracking import version_uri

        model = version_uri(model)
    if not model.startswith("s3://"):
        return locate(model)
    try:
        text = open_storage(model).read("config.json")
    except FileNotFoundError:
        raise ModelError(f"model {model}: no config.json there; check the URI") from None
    directory.mkdir()
    (directory / "config.json").write_bytes(text)
    return str(directory)


def _read_config(found: str, model: str, gguf_file: str | None = None) -> Any:
    from transformers import AutoConfig

    try:
        extra = {"gguf_file": gguf_file} if gguf_file else {}
        return AutoConfig.from_pretrained(found, **extra).get_text_config()
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"model {model}: its config cannot be read ({reason}); check the name or directory") from error


def _size(config: Any, layers: list[int] | None = None) -> ModelSize:
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    from jobs.training.initial import keep_layers

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            if layers is not None:
                model = keep_layers(model, layers)
    except ModelError:
        raise
    except Exception as error:  # every family fails in its own way
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"{type(config).__name__} cannot be built without weights ({reason})") from error
    head = model.get_output_embeddings().weight
    looked_up = {id(item.weight) for item in model.modules() if isinstance(item, nn.Embedding)} | {id(head)}
    share, body = _expert_share(model.config), 0.0
    for name, parameter in model.named_parameters():  # tied ones come once
        if id(parameter) not in looked_up:
            body += parameter.numel() * (share if ".experts." in name else 1.0)
    shape = model.config
    heads = getattr(shape, "num_attention_heads", 0) or 0
    width = getattr(shape, "head_dim", None) or (shape.hidden_size // heads if heads else 0)
    return ModelSize(
        parameters=sum(item.numel() for item in model.parameters()),
        body=round(body),
        head=head.numel(),
        attention=shape.num_hidden_layers * heads * width,
        hidden_size=shape.hidden_size,
        vocab_size=head.shape[0],
    )


def _expert_share(config: Any) -> float:
    """The part of a layer's routed experts that a token is sent to."""
    used = getattr(config, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    total = next((value for name in names if (value := getattr(config, name, None))), None)
    return used / total if used and total else 1.0
