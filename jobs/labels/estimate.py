"""What labelling takes, before it begins: rows, teacher tokens, bytes."""

from typing import Any

from cluster.storage import Storage, open_storage
from jobs.config import RunConfig
from jobs.labels.access import is_of, model_config, signal_for
from jobs.labels.store import LabelStore, canonical
from jobs.labels.teacher import stored_teachers
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
    assert config.teacher is not None
    examples, root = ExampleStore(storage, store, "train"), open_storage(config.label_root)
    sizes = model_config(model)
    unloaded = TeacherDescription("", "", sizes.vocab_size, sizes.hidden_size, 0, 0, "")
    spec, reason = signal_for(config, unloaded, examples)
    missing = len(examples)
    for teacher, stored in stored_teachers(root):
        if is_of(teacher, model, config.teacher.dtype) and canonical(stored) == canonical(spec):
            labels = LabelStore(root, teacher.fingerprint, spec, examples)
            missing = min(missing, sum(len(labels.missing(shard["number"])) for shard in examples.shards))
    return {
        "rows": len(examples),
        "missing": missing,
        "reason": reason,
        **cost(examples, missing, spec.bytes_per_position(sizes.hidden_size)),
    }


def cost(examples: ExampleStore, rows: int, bytes_per_position: int) -> dict[str, int]:
    """Teacher tokens and bytes, at most, for so many rows of a store."""
    tokens = round(rows / max(1, len(examples)) * examples.manifest["tokens"]["train"])
    return {"teacher_tokens": tokens, "bytes": tokens * bytes_per_position}


def cost_line(rows: int, cost: dict[str, int]) -> str:
    """The same for people."""
    return f"{rows:,} rows: {cost['teacher_tokens']:,} teacher tokens, at most {cost['bytes'] / 1e6:,.1f} MB of labels"
