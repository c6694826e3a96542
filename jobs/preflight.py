"""Everything that can be wrong with a run and can be known beforehand, looked at before anything is written.

Each check raises one line that says what was asked, what was found and what to do.
"""

from typing import Any

from cluster.connection import Connection
from cluster.errors import ConfigError, ModelError, UserError
from cluster.pretrained import check_model, check_same_vocabulary, load_tokenizer
from cluster.resources import check_placement, logical_cpus, threads_each
from cluster.storage import open_storage
from jobs.config import RunConfig, TrainConfig
from jobs.corpus import find_sources
from jobs.ledger import Ledger
from jobs.shape import shape_config
from jobs.train import default_threads


def check_config(config: RunConfig) -> None:
    """All checks that need no cluster. Raises a `UserError` for the first mistake found."""
    storage = open_storage(config.storage)
    storage.check_writable()
    Ledger(storage, config.name).check_owner()
    if config.data.sources:
        find_sources(config.data.sources)
    _check_models(config)
    if not config.cluster.resolved_address():
        check_cpus(config, logical_cpus(config.cluster.num_cpus), "this machine")


def check_cluster(config: RunConfig, connection: Connection) -> None:
    """Checks against the cluster that is connected."""
    if not connection.embedded:
        check_cpus(config, connection.num_cpus, "the cluster")


def check_cpus(config: RunConfig, available: float, where: str) -> None:
    """Raises `PlacementError` if a stage can never be placed."""
    wanted = _wanted("train", config.train, config.train.threads_per_worker or default_threads(config))
    if config.teacher is not None and config.distils:
        threads = config.teacher.threads_per_replica or default_threads(config)
        wanted[f"teacher.replicas={config.teacher.replicas} x {threads} threads"] = config.teacher.replicas * threads
    check_placement(wanted, available, where)
    if config.teacher is not None and config.teacher.train is not None:
        train = config.teacher.train
        threads = train.threads_per_worker or threads_each(train.num_workers)
        check_placement(_wanted("teacher.train", train, threads), available, where)


def _wanted(place: str, train: TrainConfig, threads: int) -> dict[str, float]:
    return {f"{place}.num_workers={train.num_workers} x {threads} threads": train.num_workers * threads}


def _check_models(config: RunConfig) -> None:
    teacher, student = config.teacher, config.student
    teacher_tokenizer: Any = None
    if teacher is not None and teacher.model is not None:
        check_model(teacher.model, teacher.gguf_file)
        teacher_tokenizer = load_tokenizer(teacher.model, teacher.gguf_file)
    if student.model is not None:
        check_model(student.model)
    named = student.tokenizer or student.model
    if named is not None:
        student_tokenizer = load_tokenizer(named)
        if teacher_tokenizer is not None:
            check_same_vocabulary(teacher_tokenizer, student_tokenizer, str(teacher and teacher.model), named)
        if student.model is not None:
            _check_vocabulary_size(student.model, len(student_tokenizer))
    for name, shape in (("teacher", teacher.shape if teacher else None), ("student", student.shape)):
        if shape is None:
            continue
        base = teacher.model if name == "student" and teacher is not None and teacher.gguf_file is None else None
        if "model_type" not in shape and base is None:
            if teacher is None or teacher.shape is None:
                continue  # the teacher is converted first; its config is known then
            shape = {**teacher.shape, **shape}
        try:
            shape_config(shape, base, config.data.train_tokenizer.vocab_size if config.data.train_tokenizer else 32_000)
        except UserError as error:
            raise ConfigError(f"{name}.{error}") from error


def _check_vocabulary_size(model: str, num_tokens: int) -> None:
    from transformers import AutoConfig

    from cluster.pretrained import locate

    size = AutoConfig.from_pretrained(locate(model)).vocab_size
    if size < num_tokens:
        raise ModelError(
            f"student {model} has {size} embedding rows, its tokenizer {num_tokens} tokens: resize the embeddings first"
        )
