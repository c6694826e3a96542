"""Model directories and tokenizers: finding them, checking them before anything expensive starts, naming them.

A model is a local or object-store directory, `package://NAME` (files inside an installed Python package), a registered
version `models:/NAME@champion`, or a hub id. Weights are safetensors, or a GGUF file that is named; pickles are never
loaded. Torch is not imported here.
"""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from cluster.errors import ModelError, TokenizerMismatch
from cluster.published import MANIFEST, localize

_WEIGHTS = ("*.safetensors",)
_SAMPLE_BYTES = 1 << 20


def locate(model: str) -> str:
    """Where to load a model from: a local directory, or a hub id.

    Raises:
        ModelError: a directory, package or version that does not exist.
    """
    if model.startswith("package://"):
        name = model.removeprefix("package://")
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(
                f"model {model}: Python package {name} is not installed; pip install {name.replace('_', '-')}"
            )
        return str(spec.submodule_search_locations[0])
    if model.startswith("models:/"):
        from cluster.tracking import version_uri

        return str(localize(version_uri(model)))
    if model.startswith(("s3://", "file://")):
        try:
            path = localize(model)
        except FileNotFoundError:
            raise ModelError(f"model {model}: no objects there; check the URI") from None
        if not path.is_dir():
            raise ModelError(f"model {model}: no such directory")
        return str(path)
    if Path(model).expanduser().is_dir():
        return str(Path(model).expanduser().absolute())
    if model.startswith(("/", "./", "../", "~")) or model.count("/") != 1:
        raise ModelError(
            f"model {model}: no such directory; give a directory, s3:// URI, models:/NAME@ALIAS or hub id (OWNER/NAME)"
        )
    return model


def check_model(model: str, gguf_file: str | None = None) -> str:
    """Locates a model and makes sure that a directory holds a config and weights. Returns what `locate` returns."""
    found = locate(model)
    directory = Path(found)
    if not directory.is_dir():
        return found
    if gguf_file is not None:
        if not (directory / gguf_file).is_file():
            names = ", ".join(sorted(path.name for path in directory.glob("*.gguf"))) or "none"
            raise ModelError(f"model {model}: no file {gguf_file}; GGUF files there: {names}")
        return found
    if not (directory / "config.json").is_file():
        raise ModelError(f"model {model}: {directory} has no config.json; expected a Hugging Face model directory")
    weights = [path for pattern in _WEIGHTS for path in directory.glob(pattern)]
    if not weights:
        present = ", ".join(sorted(path.name for path in directory.iterdir())[:8])
        raise ModelError(
            f"model {model}: {directory} holds no *.safetensors weights (found: {present}); "
            "save it with save_pretrained, or name a GGUF file with gguf_file"
        )
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        missing = sorted(
            {name for name in json.loads(index.read_text())["weight_map"].values() if not (directory / name).is_file()}
        )
        if missing:
            raise ModelError(f"model {model}: weight files named in the index are missing: {', '.join(missing)}")
    return found


def load_tokenizer(model: str, gguf_file: str | None = None) -> Any:
    """The fast tokenizer of a located model.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        extra = {"gguf_file": gguf_file} if gguf_file else {}
        return AutoTokenizer.from_pretrained(locate(model), **extra)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"model {model}: no tokenizer could be loaded ({reason}); name one with student.tokenizer: a directory, if "
            "the hub cannot be reached"
        ) from error


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of the map from ids to tokens, added tokens included. Equal hashes mean equal meaning of every id."""
    pairs = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]


def check_same_vocabulary(teacher: Any, student: Any, teacher_name: str, student_name: str) -> None:
    """Raises `TokenizerMismatch` naming the first id that means different tokens."""
    of_teacher, of_student = (
        {index: token for token, index in item.get_vocab().items()} for item in (teacher, student)
    )
    if of_teacher == of_student:
        return
    first = min(
        index for index in of_teacher.keys() | of_student.keys() if of_teacher.get(index) != of_student.get(index)
    )
    raise TokenizerMismatch(
        f"teacher {teacher_name} has {len(of_teacher)} tokens, student tokenizer {student_name} has {len(of_student)}; "
        f"id {first} is {of_teacher.get(first)!r} for the teacher and {of_student.get(first)!r} for the student: "
        "use the teacher's tokenizer for the student"
    )


def _published_files(manifest: Path) -> dict[str, Any] | None:
    """What our manifest says of a directory's files; None without one, or if it is somebody else's."""
    try:
        found = json.loads(manifest.read_text())
    except (OSError, ValueError):
        return None
    files = found.get("files") if isinstance(found, dict) else None
    return files if isinstance(files, dict) else None


def model_fingerprint(directory: str | Path) -> str:
    """The identity of a model directory: its manifest if it has one; else the config and, of every weight file, size,
    header and samples from start, middle and end (so that naming 100 GB does not mean reading 100 GB)."""
    directory = Path(directory)
    if not directory.is_dir():
        return hashlib.sha256(str(directory).encode()).hexdigest()[:16]
    digest = hashlib.sha256()
    manifest = directory / MANIFEST
    files = _published_files(manifest)
    if files is not None:
        digest.update(json.dumps(files, sort_keys=True).encode())
        return digest.hexdigest()[:16]
    for path in sorted([*directory.glob("config.json"), *directory.glob("*.safetensors"), *directory.glob("*.gguf")]):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for offset in {0, size // 2, max(0, size - _SAMPLE_BYTES)}:
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def uncut_tokenizer(directory: Path) -> Any:
    """The tokenizer of a directory, without a limit or padding that was saved with it and would cut long texts without
    a word.

    Raises:
        ModelError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory.name}: no tokenizer could be loaded ({error})") from error
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer
