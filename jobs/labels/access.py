"""Whether a training can do without its teacher: labels of every row that it will read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import ConfigError, TokenizerMismatch
from cluster.pretrained import locate, model_fingerprint
from cluster.storage import Storage, open_storage
from jobs.config import RunConfig
from jobs.labels.store import LabelStore, canonical
from jobs.labels.teacher import stored_teachers
from jobs.training.choice import choose_signal
from jobs.training.data import ExampleStore, GlobalBatches
from jobs.training.plan import LabelAccess, TeacherAccess
from services.teacher.schema import TeacherDescription
from services.teacher.signals import SignalSpec


def label_access(config: RunConfig) -> LabelAccess | None:
    """What the workers of a training do with labels; None for nothing."""
    mode = config.distill.labels
    if mode == "off":
        return None
    return LabelAccess(root=config.label_root, reads="read" in mode, writes="write" in mode)


def signal_for(config: RunConfig, teacher: TeacherDescription, examples: ExampleStore) -> tuple[SignalSpec, str]:
    """The signal that a training of this config asks a teacher for, over the columns that its student has too, and the
    reason."""
    spec, reason = choose_signal(config.distill, teacher)
    student, columns = config.student, teacher.vocab_size
    if student.model is not None:
        columns = model_config(student.model).vocab_size
    elif student.shape is not None:
        own = examples.manifest["vocab_size"] if "model_type" in student.shape else teacher.vocab_size
        columns = int(student.shape.get("vocab_size") or own)
    return replace(spec, vocab_size=min(teacher.vocab_size, columns)), reason


def model_config(model: str) -> Any:
    """The text part of a model's Hugging Face config.

    Raises:
        ConfigError: it says neither vocabulary nor width.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(locate(model)).get_text_config()
        _ = config.vocab_size, config.hidden_size
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"model {model}: its config does not say how large it is ({error})") from error
    return config


def is_of(teacher: TeacherDescription, model: str, dtype: str) -> bool:
    """Whether a teacher is this model, in a dtype that will do."""
    fingerprint = model_fingerprint(Path(locate(model)))
    return teacher.fingerprint.startswith(f"{fingerprint}-") and dtype in ("auto", teacher.dtype)


def access_without_teacher(
    config: RunConfig, model: str, storage: Storage, store: str
) -> tuple[TeacherAccess, str] | None:
    """What a training asks for when labels of this teacher cover all rows that it will read, and a line for people.

    Raises:
        ConfigError: `labels: read`, and they do not; says what there is.
        TokenizerMismatch: they were made with another tokenizer.
    """
    if "read" not in config.distill.labels:
        return None
    assert config.teacher is not None
    root = open_storage(config.label_root)
    examples = ExampleStore(storage, store, "train")
    found = []
    for description, spec in stored_teachers(root):
        if not is_of(description, model, config.teacher.dtype):
            continue
        wanted, reason = signal_for(config, description, examples)
        rows, labelled = _rows_needed(config, examples), 0
        if canonical(wanted) == canonical(spec):
            labels = LabelStore(root, description.fingerprint, wanted, examples)
            labelled = sum(examples.row_id(int(row)) in labels for row in rows)
        if labelled == len(rows):
            if description.tokenizer_fingerprint != examples.manifest["tokenizer_fingerprint"]:
                raise TokenizerMismatch(
                    f"labels in {root.uri} were made with tokenizer {description.tokenizer_fingerprint}, the example "
                    f"store with {examples.manifest['tokenizer_fingerprint']}: label again"
                )
            access = TeacherAccess(
                app_name=None,
                fingerprint=description.fingerprint,
                signal=wanted,
                attempt_timeout_s=config.teacher.attempt_timeout_s,
                deadline_s=config.teacher.deadline_s,
                window_bytes=int(config.teacher.window_mb * 2**20),
            )
            return access, f"labels cover all {len(rows):,} rows, so no teacher is started; {reason}"
        found.append(f"{spec.kind} at T={', '.join(map(str, spec.temperatures))}: {labelled:,} of {len(rows):,} rows")
    if config.distill.labels == "read":
        raise ConfigError(
            f"distill.labels=read, but {root.uri} has no such labels for every row (found of this teacher: "
            f"{'; '.join(found) or 'none'}): run `raystill label` with this config, or set distill.labels=read_write"
        )
    return None


def _rows_needed(config: RunConfig, examples: ExampleStore) -> Any:
    """Indices of the rows that a training reads: all, if it reads that many."""
    train = config.train
    if train.steps * train.global_batch >= len(examples):
        return np.arange(len(examples))
    batches = GlobalBatches(examples, train.global_batch, train.seed)
    return np.array([index for step in range(train.steps) for index in batches.indices(step)])
