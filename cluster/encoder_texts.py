"""How an encoder's directory wants texts read: what is done to them, how they are tokenised, where long ones end, and
how vectors of tokens become one. All but the tokenizer is in sentence-transformers' files, where there are any.

The endpoint reads by it, and so does whoever measures what the endpoint will do. Torch is not imported here.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.errors import ModelError, StorageError
from cluster.model_directory import model_kind, read_json
from cluster.pretrained import uncut_tokenizer
from cluster.storage import check_key

_OFFSET_POSITIONS = {
    *("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm", "mpnet", "xmod", "longformer"),
    *("data2vec-text", "ibert", "lilt", "luke"),
}
"""Families that number positions from behind the padding's id, so that a text has fewer tokens than the table rows."""

POOLING_WAYS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
"""The ways of sentence-transformers (Reimers and Gurevych, arXiv 1908.10084), in the order in which it joins them."""


@dataclass(frozen=True)
class Pooling:
    """How the vectors of a text's tokens become one."""

    ways: list[str]
    """Of `POOLING_WAYS`; what they give is joined."""
    normalises: bool
    """Whether it is brought to unit length."""


class TextReader:
    """From texts to token ids. `tokenizer` is the directory's own, without a limit."""

    def __init__(self, directory: Path, max_tokens: int) -> None:
        """Reads what the directory says of texts.

        Args:
            max_tokens: a limit beside those that the directory names; `max_tokens` is the least of them.

        Raises:
            ModelError: no tokenizer, a damaged file beside it, or no id to pad a classifier's texts with.
        """
        self.tokenizer = uncut_tokenizer(directory)
        self.pad_id = read_pad_id(directory)
        self._prepare, self._prefix = _preparation(directory)
        self.max_tokens = min([max_tokens, *_limits(directory, self.tokenizer, self.pad_id)])

    def token_ids(self, text: str, truncate: bool) -> list[int]:
        """Token ids of a text, special tokens included.

        Args:
            truncate: whether a text longer than `max_tokens` ends there: its first tokens, with the special tokens
                that stand behind every text still behind them.
        """
        found = self.tokenizer(self._prepare(self._prefix + text), return_special_tokens_mask=True)
        token_ids: list[int] = found["input_ids"]
        too_many = len(token_ids) - self.max_tokens
        if not truncate or too_many <= 0:
            return token_ids
        end = len(token_ids)
        while end > too_many + 1 and found["special_tokens_mask"][end - 1]:
            end -= 1
        return token_ids[: end - too_many] + token_ids[end:]


def read_pad_id(directory: Path) -> int:
    """What fills up the shorter texts of a batch: the config's id, whatever the tokenizer's is. A classifier of a
    decoder's kind reads the last token that is another one; to all else it is masked.

    Raises:
        ModelError: no config that transformers reads, or a classifier whose config names no such id.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(directory))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{directory.name}: its config cannot be read ({reason})") from error
    found = getattr(config.get_text_config(), "pad_token_id", None)
    if isinstance(found, int) and found >= 0:
        return found
    if model_kind(directory) == "classifications":
        raise ModelError(
            f"{directory.name}: config.json has pad_token_id {found}, so a batch's shorter texts cannot be filled up: "
            "name the id that the classifier was trained with"
        )
    return 0


def read_pooling(directory: Path) -> Pooling:
    """What `modules.json` and the files that it names say; the mean where there is none.

    Raises:
        ModelError: modules that are not known or lie outside the directory, or a damaged file.
    """
    modules = _modules(directory)
    normalises, ways, pooled = False, ["mean"], False
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            ways, pooled = _ways(read_json(directory / str(module.get("path", "")) / "config.json")), True
        elif kind == "Normalize":
            normalises = True
        elif kind != "Transformer" or module.get("path"):
            raise ModelError(
                f"{directory.name}: modules.json names a module {kind} in {module.get('path')!r}; served are "
                "Transformer (in the directory itself), Pooling and Normalize"
            )
    if modules and not pooled:
        raise ModelError(f"{directory.name}: modules.json names no Pooling, so there is no vector for a text")
    return Pooling(ways, normalises)


def text_files(directory: Path) -> list[str]:
    """Names of the files that say how texts are read and pooled, beside config and tokenizer; none without modules."""
    modules = _modules(directory)
    if not modules:
        return []
    places = [str(module.get("path") or "") for module in modules]
    of_modules = [f"{place}/config.json" for place in places if PurePosixPath(place).parts]
    beside = [path.name for path in sorted(directory.glob("sentence_*_config.json"))]
    named = ["modules.json", "config_sentence_transformers.json", *beside, *of_modules]
    return [name for name in named if (directory / name).is_file()]


def _ways(config: dict[str, Any]) -> list[str]:
    named = config.get("pooling_mode")
    if named is None:  # as it was written until sentence-transformers 5
        names = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "weightedmean": "weightedmean_tokens"}
        named = [way for way in POOLING_WAYS if config.get(f"pooling_mode_{names.get(way, way)}")]
    ways = [named] if isinstance(named, str) else list(named)
    if unknown := [str(way) for way in ways if way not in POOLING_WAYS]:
        raise ModelError(f"the pooling config asks for {', '.join(unknown)}; known: {', '.join(POOLING_WAYS)}")
    if config.get("include_prompt") is False:
        raise ModelError("the pooling config leaves the prompt out (include_prompt: false), which is not supported")
    return ways or ["mean"]


def _modules(directory: Path) -> list[dict[str, Any]]:
    """The modules that sentence-transformers makes an embedding of; none where it did not save the directory.

    Raises:
        ModelError: `modules.json` is damaged, or names a place that is not below the directory.
    """
    path = directory / "modules.json"
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"model file {path}: not valid JSON ({error})") from error
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise ModelError(f"model file {path}: expected a list of modules")
    for module in found:
        place = str(module.get("path") or "")
        try:
            check_key(place)
        except StorageError as error:
            raise ModelError(f"model file {path}: a module lies in {place!r}, outside the directory") from error
    return found


def _preparation(directory: Path) -> tuple[Callable[[str], str], str]:
    """What is done to a text before it is tokenised, and what is put in front of it."""
    if not _modules(directory):
        return lambda text: text, ""
    prompts = read_json(directory / "config_sentence_transformers.json")
    prefix = (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name") or "", "")
    if _sentence_config(directory).get("do_lower_case"):
        return str.lower, prefix
    return lambda text: text, prefix


def _sentence_config(directory: Path) -> dict[str, Any]:
    """`sentence_bert_config.json`, by whatever family it is named."""
    return next((read_json(path) for path in sorted(directory.glob("sentence_*_config.json"))), {})


def _limits(directory: Path, tokenizer: Any, pad_id: int) -> list[int]:
    """Every limit of a text's length that the directory names."""
    config = read_json(directory / "config.json")
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and config.get("model_type") in _OFFSET_POSITIONS:
        positions -= pad_id + 1
    found = [
        _sentence_config(directory).get("max_seq_length"),
        positions,
        getattr(tokenizer, "model_max_length", None),
    ]
    return [value for value in found if isinstance(value, int) and 0 < value < 10**9]
