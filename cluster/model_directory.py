"""A plain model directory that is to be served: what it is, and what can be known of it before it is loaded.

Nothing that came with the directory is run: weights are safetensors (or the ONNX graph of one of our own versions), and
neither pickles nor Python files are opened. A directory that raystill published has a manifest, and is held to it to
the last byte. Torch is not imported here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.errors import CorruptArtifact, ModelError
from cluster.pretrained import check_model, locate, model_fingerprint
from cluster.published import MANIFEST, check_version, manifest_sha256

Kind = Literal["language_model", "embeddings", "classifications"]
"""What a model does: continue a text, turn a text into a vector, or choose among labels."""

_CODE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".py", ".so", ".h5", ".msgpack", ".joblib")


@dataclass(frozen=True)
class ModelDirectory:
    path: Path
    kind: Kind
    version: str
    """The fingerprint of its files."""
    verified: bool
    """Whether every file was compared with a manifest."""
    left_alone: tuple[str, ...]
    """Files that may hold code; they are never opened."""


def read_model_directory(model: str) -> ModelDirectory:
    """Looks at a directory (or `s3://…`, `models:/NAME@ALIAS`, `package://NAME`) that is to be served.

    Raises:
        ModelError: no such directory, or one without a config or weights that are data alone.
        CorruptArtifact: it has a manifest of ours and differs from it.
    """
    path = Path(locate(model))
    if not path.is_dir():
        raise ModelError(f"model {model}: no such directory; download the model first, or give its directory")
    manifest = _own_manifest(path)
    if manifest is None:
        check_model(str(path))
    else:
        try:
            check_version(path.absolute().as_posix(), manifest_sha256(manifest))
        except CorruptArtifact as error:
            raise CorruptArtifact(f"model {model} is not served: {error}") from error
    names = sorted(item.relative_to(path).as_posix() for item in path.rglob("*") if item.is_file())
    return ModelDirectory(
        path=path,
        kind=model_kind(path),
        version=model_fingerprint(path),
        verified=manifest is not None,
        left_alone=tuple(name for name in names if name.endswith(_CODE_ENDINGS)),
    )


def model_kind(path: Path) -> Kind:
    """What the model in a directory does, by its config: as its architecture says (`architecture_kind`), but whatever
    sentence-transformers saved without labels embeds.

    Raises:
        ModelError: config.json is missing or damaged.
    """
    config = read_json(path / "config.json")
    if not config:
        raise ModelError(f"model {path}: no config.json, or an empty one; expected a Hugging Face model directory")
    architecture = str(next(iter(config.get("architectures") or []), ""))
    kind = architecture_kind(architecture)
    if kind == "language_model" and (path / "modules.json").is_file() and not architecture.endswith("LMHeadModel"):
        return "embeddings"
    return kind


def architecture_kind(architecture: str) -> Kind:
    """What the architecture that a config names does: `…ForSequenceClassification` classifies, a bare `…Model` or
    `…ForMaskedLM` embeds, all else continues texts."""
    if architecture.endswith("ForSequenceClassification"):
        return "classifications"
    # GPT2LMHeadModel, OpenAIGPTLMHeadModel and their like are language models by another custom of naming.
    bare = architecture.endswith("Model") and not architecture.endswith("LMHeadModel")
    return "embeddings" if bare or architecture.endswith("ForMaskedLM") else "language_model"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file; empty if there is no such file.

    Raises:
        ModelError: it is something else.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"model file {path}: not valid JSON ({error}); copy the directory again") from error
    if not isinstance(found, dict):
        raise ModelError(f"model file {path}: expected an object, found {type(found).__name__}")
    return found


def _own_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest if it is one of ours; others use the same file name for other things.

    Raises:
        CorruptArtifact: it cannot be read, or it is half of one of ours.
    """
    try:
        found = read_json(path / MANIFEST)
    except ModelError as error:
        raise CorruptArtifact(f"model {path} is not served: {MANIFEST} is damaged ({error})") from error
    files = found.get("files")
    lists_files = isinstance(files, dict) and all(
        isinstance(item, dict) and "sha256" in item for item in files.values()
    )
    if lists_files and "sha256" not in found:
        raise CorruptArtifact(f"model {path} is not served: {MANIFEST} is damaged (its own sha256 is missing)")
    return found if lists_files else None
