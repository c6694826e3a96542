"""Training as a Ray Train job: the teacher replicas it needs, the workers, and what they report.

The same job trains a student against a teacher and, with no teacher and alpha = 1, a teacher on text alone.
"""

import contextlib
import logging
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from cluster.config import fingerprint
from cluster.connection import Connection
from cluster.errors import ConfigError, NonFiniteLoss, TokenizerMismatch, TrainingFailed
from cluster.placement import TEACHER_OF_A_RUN
from cluster.pools import actor_options, slot, waiting_for_places
from cluster.resources import process_environment
from cluster.storage import open_storage
from jobs.config import RunConfig, TeacherConfig
from jobs.progress import Bar, start_board
from jobs.training.choice import choose_signal
from jobs.training.plan import TeacherAccess, TrainPlan
from services.teacher.client import TeacherClient, start_teacher, stop_teacher
from services.teacher.schema import TeacherServiceConfig

logger = logging.getLogger(__name__)

OnStep = Callable[[int, dict[str, float]], None]


def run_training(plan: TrainPlan, connection: Connection, bar: Bar, on_step: OnStep) -> dict[str, Any]:
    """Runs a plan to its end on Ray Train workers. A worker that dies takes the group back to its last checkpoint.

    Returns:
        What training counted: rows, tokens, tokens_per_s, teacher_calls, teacher_wait_s, retries, losses, and more.

    Raises:
        NonFiniteLoss: names the rows of the batch.
        TrainingFailed: the workers failed more often than `train.max_failures`.
    """
    board = start_board()
    with (
        tempfile.TemporaryDirectory(prefix="raystill-train-") as local,
        _following(board, plan.train.steps, bar, on_step),
    ):
        outcome = _fit(plan, connection, board, local)
        while outcome["status"] == "preempted":
            bar.say(f"a machine announced its end at step {outcome['step']}: going on elsewhere")
            outcome = _fit(plan, connection, board, local)
    if outcome["status"] == "non_finite":
        raise NonFiniteLoss(outcome["message"])
    seconds = outcome["train_s"]
    return {
        "model": f"{plan.storage.rstrip('/')}/{plan.prefix}/model",
        "rows": outcome["rows"],
        "rows_checksum": outcome["rows_checksum"],
        "tokens": outcome["tokens"],
        "tokens_per_s": outcome["tokens"] / seconds if seconds else 0.0,
        "train_s": seconds,
        "teacher_calls": outcome["teacher_calls"],
        "teacher_wait_s": outcome["teacher_wait_s"],
        "retries": outcome["retries"],
        "labelled_rows": outcome["labelled_rows"],
        "store_read_bytes": outcome["store_read_bytes"],
        "store_written_bytes": outcome["store_written_bytes"],
        "store_retries": outcome["store_retries"],
        "signal_bytes_per_position": outcome["signal_bytes"] / max(1, outcome["asked_positions"]),
        "teacher_tokens_per_s": outcome["asked_tokens"] / outcome["teacher_s"] if outcome["teacher_s"] else 0.0,
        "parts_s": outcome["parts_s"],
        "validation": outcome["validation"],
        "losses": outcome["losses"],
        "cross_entropies": outcome["cross_entropies"],
        "divergences": outcome["divergences"],
    }


def _fit(plan: TrainPlan, connection: Connection, board: Any, local: str) -> dict[str, Any]:
    """One life of a worker group and its restarts, until training ended or left machines that are taken away."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from cluster.rendezvous import ProcessGroup
    from jobs.training.loop import train_worker

    config = plan.train
    resources: dict[str, float] = {"CPU": plan.threads}
    labels: dict[str, str] = {}
    if connection.pools is not None:
        resources[slot("student")] = 1
        labels = connection.pools.labels("student")
    name = f"raystill-{uuid.uuid4().hex[:8]}"
    storage = open_storage(plan.storage)
    notes = local if connection.embedded else f"{storage.uri}/ray_train"
    deadline_s = plan.teacher.deadline_s if plan.teacher else 0
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"plan": plan, "board": board, "notices": not connection.embedded},
        # While one worker waits for the teacher the others wait in a collective: it must outlast the deadline.
        torch_config=ProcessGroup(backend="nccl" if config.use_gpu else "gloo", timeout_s=int(deadline_s) + 600),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            resources_per_worker=resources,
            label_selector=labels or None,
            elastic_resize_monitor_interval_s=connection.pools.resize_every_s if connection.pools is not None else 60,
        ),
        # Checkpoints are ours (jobs.training.checkpoint); Ray Train keeps only its own notes, under a fresh name.
        run_config=RunConfig(
            name=name,
            storage_path=notes,
            failure_config=FailureConfig(max_failures=config.max_failures),
            worker_runtime_env={"env_vars": process_environment()} if not connection.embedded else None,
        ),
    )
    # Ray Train's own handler for Ctrl-C would stay for good, and end the process with exit code 0.
    trainer._register_sigint_handler = lambda controller: None
    try:
        with waiting_for_places(config.num_workers):
            outcome = trainer.fit().return_value
    except Exception as error:
        raise TrainingFailed(f"training {plan.prefix} stopped: {_root_message(error)}") from error
    finally:
        if not connection.embedded:
            with contextlib.suppress(Exception):  # a few hundred bytes that nobody reads again
                storage.delete(f"ray_train/{name}")
    if outcome is None:
        raise TrainingFailed(f"training {plan.prefix} ended without a result; see the workers' logs")
    return dict(outcome)


@contextlib.contextmanager
def teacher_service(
    config: TeacherConfig, model: str, tokenizer: str, store: dict[str, Any], run: RunConfig, threads: int
) -> Iterator[tuple[TeacherAccess, str]]:
    """Teacher replicas for the length of the block, checked against the example store before any step.

    Args:
        threads: of each replica.

    Yields:
        How to reach them and what to ask for, and why that, as a line for people.

    Raises:
        TokenizerMismatch: the teacher's ids mean other tokens than the store's.
        ConfigError: requests that the teacher could not answer.
    """
    service = TeacherServiceConfig(
        model=model,
        tokenizer=tokenizer,
        dtype=config.dtype,
        replicas=config.replicas,
        max_replicas=config.max_replicas,
        threads_per_replica=threads,
        num_gpus=config.num_gpus,
        max_batch_tokens=config.max_batch_tokens,
        **actor_options(run.cluster.active_pools, "teacher"),
    )
    # A cluster may hold the teachers of several runs.
    app_name = f"{TEACHER_OF_A_RUN}{run.name}-{fingerprint(run.storage)[:8]}"
    start_teacher(service, app_name)
    try:
        client = TeacherClient(app_name, attempt_timeout_s=config.attempt_timeout_s, deadline_s=config.deadline_s)
        description = client.describe()
        client.close()
        if description.tokenizer_fingerprint != store["tokenizer_fingerprint"]:
            raise TokenizerMismatch(
                f"teacher {model} has tokenizer {description.tokenizer_fingerprint}, the example store was made with "
                f"{store['tokenizer_fingerprint']}: prepare with the teacher's tokenizer"
            )
        if store["sequence_length"] > description.max_sequence_tokens:
            raise ConfigError(
                f"data.sequence_length={store['sequence_length']}, teacher {model} takes at most "
                f"{description.max_sequence_tokens} tokens: lower it"
            )
        signal, reason = choose_signal(run.distill, description)
        access = TeacherAccess(
            app_name=app_name,
            fingerprint=description.fingerprint,
            signal=signal,
            attempt_timeout_s=config.attempt_timeout_s,
            deadline_s=config.deadline_s,
            window_bytes=int(config.window_mb * 2**20),
        )
        yield access, reason
    finally:
        stop_teacher(app_name)


@contextlib.contextmanager
def _following(board: Any, steps: int, bar: Bar, on_step: OnStep) -> Iterator[None]:
    """Moves the bar and passes metrics on while the block runs, from a thread of its own."""
    import ray

    stop = threading.Event()
    bar.start(steps, "starting the workers")

    def drain() -> None:
        for report in ray.get(board.take.remote(), timeout=30):
            step = report.pop("step")
            on_step(step, report)
            bar.update(step, _note(report))

    def follow() -> None:
        while not stop.wait(0.5):
            with contextlib.suppress(Exception):  # a late answer is drawn next time; training goes on
                drain()

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(35)
        with contextlib.suppress(Exception):
            drain()


def _note(metrics: dict[str, float]) -> str:
    parts = [f"loss {metrics['train/loss']:.3f}", f"{metrics['train/tokens_per_s']:,.0f} tok/s"]
    if "train/teacher_wait_s" in metrics:
        parts.append(f"waits {metrics['train/teacher_wait_s'] * 1000:.0f} ms")
    return "  ".join(parts)


def _root_message(error: BaseException) -> str:
    """The innermost reason of a failure that crossed several processes, as one line."""
    seen = str(error).strip().splitlines()
    failures = getattr(error, "worker_failures", None)
    if isinstance(failures, dict) and failures:
        first = next(iter(failures.values()))
        cause = getattr(first, "cause", first)
        text = str(cause).strip().splitlines()
        return (text[-1] if text else type(cause).__name__)[:600]
    return (seen[-1] if seen else type(error).__name__)[:600]
