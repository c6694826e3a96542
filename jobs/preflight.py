"""Everything that can be wrong with a run and can be known beforehand, looked at before anything is written.

Each check raises one line that says what was asked, what was found and what to do.
"""

import logging
import os
from typing import Any

from cluster.champions import database_url, open_database
from cluster.connection import Connection, check_address, in_a_job
from cluster.errors import ConfigError, ModelError, PlacementError, UserError
from cluster.placement import Demand, check_demands, cluster_nodes
from cluster.pools import Pool, PoolsConfig, least, slot
from cluster.pretrained import check_model, check_same_vocabulary, load_tokenizer, locate
from cluster.resources import check_placement, logical_cpus
from cluster.storage import LocalStorage, open_storage
from jobs.config import RunConfig, TrainConfig
from jobs.corpus import check_endings, find_sources
from jobs.evaluating.questions import read_questions
from jobs.ledger import Ledger
from jobs.quantization.pairings import check_pairings
from jobs.shape import shape_config
from jobs.threads import Threads, threads_of, threads_on


def check_config(config: RunConfig) -> None:
    """All checks that need no cluster. Raises a `UserError` for the first mistake found."""
    storage = open_storage(config.storage)
    storage.check_writable()
    Ledger(storage, config.name).check_owner()
    if config.data.sources:
        check_endings(find_sources(config.data.sources), config.data)
    read_questions(config.evaluate)
    check_elastic(config)
    _check_models(config)
    if os.environ.get("RAYSTILL_DATABASE_URL"):  # else a file below the storage root, made when it is needed
        open_database(database_url(config.state_directory)).dispose()
    address = config.cluster.resolved_address()
    if address:
        check_address(address)
    else:
        check_cpus(config, logical_cpus(config.cluster.num_cpus), "this machine")
        if any(wanted_gpus(config)):
            import torch

            check_gpus(config, torch.cuda.device_count(), "this machine")


def check_records(config: RunConfig) -> None:
    """Raises `ConfigError` if a submitted job would keep the registry, or who is champion, in its own directory."""
    if not in_a_job() or isinstance(open_storage(config.storage), LocalStorage):
        return
    missing = [name for name in ("MLFLOW_TRACKING_URI", "RAYSTILL_DATABASE_URL") if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)}: not set on the head, so a job's versions and champions would be in files that "
            "go with its machine; set them where the nodes start Ray, or submit --command train"
        )


def check_elastic(config: RunConfig) -> None:
    """Raises `ConfigError` where workers may come and go on nodes that are not theirs.

    Ray counts what nodes hold in all: beside teachers on the same nodes it would ask for workers that have no room,
    stop the group for them, and wait.
    """
    of_teacher = config.teacher.train if config.teacher is not None else None
    for place, train in (("train", config.train), ("teacher.train", of_teacher)):
        if train is None or isinstance(train.num_workers, int) or config.cluster.active_pools is not None:
            continue
        asked = f"{place}.num_workers={list(train.num_workers)}"
        if config.cluster.pools is None:
            raise ConfigError(
                f"{asked}: workers that come and go need nodes of their own, else they are counted on those of the "
                "teachers: set cluster.pools={} and start nodes with student_slot and teacher_slot, or give one number"
            )
        raise ConfigError(f"{asked}: a Ray on this machine does not grow: set cluster.address, or give one number")


def check_cluster(config: RunConfig, connection: Connection, *, answers: bool = True) -> None:
    """Checks against the cluster that is connected. `answers`: whether the endpoint is to be placed, too."""
    if connection.embedded:
        return
    nodes = cluster_nodes()
    threads = threads_on(nodes, connection.pools, config)

    def has(name: str) -> float:
        return sum(node.resources.get(name, 0.0) * node.count for node in nodes)

    check_cpus(config, max(connection.num_cpus, has("CPU")), "the cluster", threads)
    if connection.num_cpus > has("CPU"):  # it grows further than is known here, to nodes of any kind
        return
    check_gpus(config, has("GPU"), "the cluster")
    if connection.pools is not None:
        for demands in placed_together(config, connection.pools, threads, answers=answers):
            check_demands(demands, nodes)


def placed_together(
    config: RunConfig, pools: PoolsConfig, threads: Threads, *, answers: bool = True
) -> list[list[Demand]]:
    """What each part of a run asks of a cluster with pools at the same time."""

    def demand(role: str, pool: Pool, count: int, cpus: float, gpus: float) -> Demand:
        resources = {"CPU": cpus, "GPU": gpus, slot(pool): 1.0}
        taken = {name: amount for name, amount in resources.items() if amount}
        return Demand(f"{role}={count}", count, taken, pools.labels(pool))

    def of_train(place: str, train: TrainConfig, cpus: int) -> Demand:
        return demand(f"{place}.num_workers", "student", least(train.num_workers), cpus, float(train.use_gpu))

    teacher = config.teacher
    training = [of_train("train", config.train, threads.worker)]
    if teacher is not None and config.distils:
        training.append(demand("teacher.replicas", "teacher", teacher.replicas, threads.replica, teacher.num_gpus))
    together = [training]
    if answers:
        endpoint = config.serve
        together.append([demand("serve.replicas", "endpoint", endpoint.replicas, 1, endpoint.gpus_per_replica)])
    if teacher is not None and teacher.train is not None:
        together.append([of_train("teacher.train", teacher.train, threads.teacher_worker)])
    return together


def check_cpus(config: RunConfig, available: float, where: str, threads: Threads | None = None) -> None:
    """Raises `PlacementError` if a stage can never be placed. `threads`: by default those of this machine."""
    threads, teacher = threads or threads_of(config), config.teacher
    wanted = _wanted("train", config.train, threads.worker)
    if teacher is not None and config.distils:
        role = f"teacher.replicas={teacher.replicas} x {threads.replica} threads"
        wanted[role] = teacher.replicas * threads.replica
    check_placement(wanted, available, where)
    if teacher is not None and teacher.train is not None:
        check_placement(_wanted("teacher.train", teacher.train, threads.teacher_worker), available, where)


def check_gpus(config: RunConfig, available: float, where: str) -> None:
    """Raises `PlacementError` if a stage would wait for GPUs for ever."""
    for_train, for_teacher, for_teacher_train = wanted_gpus(config)
    if for_train + for_teacher > available:
        raise PlacementError(
            f"asked for {for_train:g} (train.use_gpu, one for each worker) + {for_teacher:g} (teacher.num_gpus, for "
            f"each replica) GPUs, {where} has {available:g}: lower the counts, or set cluster.address"
        )
    if for_teacher_train > available:
        raise PlacementError(
            f"asked for {for_teacher_train:g} GPUs (teacher.train.use_gpu, one for each worker), {where} has "
            f"{available:g}: lower teacher.train.num_workers, or set cluster.address"
        )


def wanted_gpus(config: RunConfig) -> tuple[float, float, float]:
    """GPUs for training, for the teacher replicas beside it, and for the training of the teacher before."""
    teacher, train = config.teacher, config.train
    of_teacher = teacher.train if teacher is not None else None
    return (
        least(train.num_workers) if train.use_gpu else 0,
        teacher.replicas * teacher.num_gpus if teacher is not None and config.distils else 0,
        least(of_teacher.num_workers) if of_teacher is not None and of_teacher.use_gpu else 0,
    )


def gpus_at_once(config: RunConfig) -> float:
    """The most GPUs that a run holds at a time: the teacher's training, the student's, and the endpoint follow each
    other."""
    for_train, for_teacher, for_teacher_train = wanted_gpus(config)
    return max(for_train + for_teacher, for_teacher_train, config.serve.replicas * config.serve.gpus_per_replica)


def _wanted(place: str, train: TrainConfig, threads: int) -> dict[str, float]:
    count = least(train.num_workers)
    return {f"{place}.num_workers={count} x {threads} threads": count * threads}


def _check_models(config: RunConfig) -> None:
    teacher, student, trained = config.teacher, config.student, config.data.train_tokenizer
    num_tokens = trained.vocab_size if trained is not None else None
    teacher_tokenizer: Any = None
    if teacher is not None and teacher.model is not None:
        check_model(teacher.model, teacher.gguf_file)
        try:
            teacher_tokenizer = load_tokenizer(teacher.model, teacher.gguf_file)
            num_tokens = len(teacher_tokenizer)
        except ModelError:
            if student.tokenizer is None:  # else that one is taken, and nothing contradicts it
                raise
    if student.model is not None:
        check_model(student.model)
    named = student.tokenizer or student.model
    if named is not None and trained is None:
        student_tokenizer = load_tokenizer(named)
        if teacher_tokenizer is not None:
            check_same_vocabulary(teacher_tokenizer, student_tokenizer, str(teacher and teacher.model), named)
        num_tokens = len(student_tokenizer)
    of_teacher = _teacher_config(config, num_tokens)
    of_student = _student_config(config, num_tokens, of_teacher)
    check_pairings(config.quantize, of_student)
    for place, shape in (("teacher", of_teacher), ("student", of_student)):
        if shape is not None:
            _check_size(place, shape, config.data.sequence_length, num_tokens)


def check_shapes(config: RunConfig) -> None:
    """Builds every model that starts from a shape, without its memory, and runs it on a few tokens: families find out
    late what they cannot be. Imports torch."""
    for name in ("torchao", "torch.utils._pytree", "transformers"):  # what they say on import is for nobody
        logging.getLogger(name).setLevel(logging.ERROR)
    import torch
    from transformers import AutoModelForCausalLM

    vocabulary = config.data.train_tokenizer.vocab_size if config.data.train_tokenizer is not None else None
    of_teacher = _teacher_config(config, vocabulary)
    shapes = {
        "teacher.shape": of_teacher if config.teacher is not None and config.teacher.shape is not None else None,
        "student.shape": _student_config(config, vocabulary, of_teacher) if config.student.shape is not None else None,
    }
    for place, shape in shapes.items():
        if shape is None:
            continue
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
                tokens, mask = torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 1, 4, 4)
            model.train()(input_ids=tokens, attention_mask=mask, use_cache=False).logits  # noqa: B018
        except Exception as error:  # every family fails in its own way
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            if "meta" in reason:  # it looks at values, which are not there: the training will tell
                continue
            raise ConfigError(f"{place}: {type(shape).__name__} with these values cannot be run ({reason})") from error


def _teacher_config(config: RunConfig, num_tokens: int | None) -> Any:
    """The teacher's Hugging Face config, or None if there is no teacher or it is converted first."""
    teacher = config.teacher
    if teacher is None or teacher.gguf_file is not None:
        return None
    if teacher.model is not None:
        return _read_config(teacher.model)
    return _shape_config("teacher", teacher.shape or {}, None, num_tokens)


def _student_config(config: RunConfig, num_tokens: int | None, of_teacher: Any) -> Any:
    """The student's, or None if it follows from a teacher that is converted first."""
    teacher, student = config.teacher, config.student
    if student.model is not None:
        return _read_config(student.model)
    if student.from_teacher is not None:
        if of_teacher is not None:
            _check_layers(student.from_teacher.layers, of_teacher.num_hidden_layers)
        return of_teacher
    shape = student.shape or {}
    if "model_type" in shape:
        return _shape_config("student", shape, None, num_tokens)
    if of_teacher is None or teacher is None:
        return None
    return _shape_config("student", {**(teacher.shape or {}), **shape}, teacher.model, num_tokens)


def _read_config(model: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(locate(model)).get_text_config()
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"model {model}: its config cannot be read ({reason}); check the name or directory") from error


def _shape_config(place: str, shape: dict[str, Any], base: str | None, num_tokens: int | None) -> Any:
    try:
        return shape_config(shape, base, num_tokens or 32_000)
    except UserError as error:
        raise ConfigError(f"{place}.{error}") from error


def _check_layers(layers: list[int], total: int) -> None:
    if len(set(layers)) != len(layers) or not all(0 <= index < total for index in layers):
        raise ModelError(
            f"student.from_teacher.layers={layers}: the teacher has layers 0..{total - 1}, each can be kept once"
        )


def _check_size(place: str, shape: Any, sequence_length: int, num_tokens: int | None) -> None:
    """Raises `ModelError` if the tokenizer's ids or the rows of the example store are more than a model takes."""
    if num_tokens is not None and shape.vocab_size < num_tokens:
        raise ModelError(
            f"{place} has {shape.vocab_size} embedding rows (vocab_size), its tokenizer {num_tokens} tokens: "
            "resize the embeddings, or leave vocab_size out of the shape"
        )
    context = getattr(shape, "max_position_embeddings", None)
    if context is not None and sequence_length > context:
        raise ModelError(
            f"data.sequence_length={sequence_length}, the {place} takes at most {context} tokens "
            "(max_position_embeddings): lower data.sequence_length"
        )
