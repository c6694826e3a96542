"""What labelling takes, before it begins: rows, teacher tokens, bytes."""

from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from cluster.pretrained import locate, model_fingerprint
from cluster.storage import Storage, open_storage
from jobs.config import RunConfig
from jobs.labels.store import LabelStore, canonical
from jobs.labels.teacher import stored_teachers
from jobs.training.choice import choose_signal
from jobs.training.data import ExampleStore
from services.teacher.schema import TeacherDescription


def estimate_labels(config: RunConfig, storage: Storage, store: str, model: str) -> dict[str, Any]:
    """Counts of a label job that has not begun; no teacher is started and nothing is written.

    Args:
        store: prefix of the example store.
        model: of the teacher.

    Returns:
        `rows` of the store, `missing` of them, `teacher_tokens`, `bytes` (at most), and `reason` for the signal.
    """
    examples = ExampleStore(storage, store, "train")
    description = _described(model)
    spec, reason = choose_signal(config.distill, description)
    missing = len(examples)
    for teacher, stored in stored_teachers(open_storage(config.label_root)):
        if teacher.fingerprint.startswith(f"{description.fingerprint}-") and canonical(stored) == canonical(spec):
            labels = LabelStore(open_storage(config.label_root), teacher.fingerprint, spec, examples)
            missing = min(missing, sum(len(labels.missing(shard["number"])) for shard in examples.shards))
    return {
        "rows": len(examples),
        "missing": missing,
        "reason": reason,
        **cost(examples, missing, spec.bytes_per_position(description.hidden_size)),
    }


def cost(examples: ExampleStore, rows: int, bytes_per_position: int) -> dict[str, int]:
    """Teacher tokens and bytes, at most, for so many rows of a store."""
    tokens = round(rows / max(1, len(examples)) * examples.manifest["tokens"]["train"])
    return {"teacher_tokens": tokens, "bytes": tokens * bytes_per_position}


def cost_line(rows: int, cost: dict[str, int]) -> str:
    """The same for people."""
    return f"{rows:,} rows: {cost['teacher_tokens']:,} teacher tokens, at most {cost['bytes'] / 1e6:,.1f} MB of labels"


def _described(model: str) -> TeacherDescription:
    """A teacher by its config alone; its dtype and tokenizer are left open."""
    from transformers import AutoConfig

    directory = locate(model)
    try:
        config = AutoConfig.from_pretrained(directory).get_text_config()
        sizes = (config.vocab_size, config.hidden_size)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"teacher {model}: its config does not say how wide it is ({error})") from error
    return TeacherDescription(model_fingerprint(Path(directory)), "", *sizes, 0, 0, "")
