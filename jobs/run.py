"""`raystill run`: walks the stages, skips what is done, and says at the end what came out.

A stage that is already done for the same inputs is skipped, so a run that died is continued by running it again.
Nothing is written before the checks of `jobs.preflight` have passed.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import yaml

from cluster.api_keys import check_address
from cluster.champions import database_url
from cluster.config import fingerprint
from cluster.connection import connect
from cluster.crowning import settle
from cluster.errors import ConfigError, UserError
from cluster.storage import open_storage
from cluster.tracking import Tracker, tracking_uri
from jobs.config import RunConfig
from jobs.ledger import SUMMARY, Ledger, StageRecord
from jobs.lock import only_one
from jobs.preflight import check_cluster, check_config, check_records, check_shapes
from jobs.progress import ConsoleProgress
from jobs.serve import check_engine
from jobs.stage import Run, Stage
from jobs.stages import ALL_STAGES
from services.endpoint.client import check_port_free, start_serve

logger = logging.getLogger(__name__)


def run(
    config: RunConfig, progress: ConsoleProgress, only: tuple[str, ...] | None = None, force: bool = False
) -> dict[str, Any]:
    """Does every stage that is not done (or those named in `only`) and returns the summary.

    Args:
        force: promote whatever the gate says.

    Raises:
        UserError: a mistake that was found before anything was written, or in the corpus.
        RaystillError: a stage failed; its record says so.
    """
    storage = open_storage(config.storage)
    ledger = Ledger(storage, config.name)
    check_config(config)
    if "label" in (only or ()):
        _check_distils(config)
    this = Run(config, storage, only or (), force)
    if "promote" in this.asked:  # also where it is done already: what was broken off does not wait
        settle(database_url(config.state_directory), config.model_name, tracking_uri(config.state_directory))
    stages = [stage for stage in ALL_STAGES if stage.decides or stage.applies(this)]
    while stages and _take_if_done(this, ledger, stages[0]):
        stages.pop(0)
    pending = [stage for stage in stages if only is None or stage.name in only]
    if not pending:
        progress.say(f"{config.name}: nothing to do, everything asked for is done in {storage.uri}")
        return ledger.summary()
    if stages[0].name not in (only or (stages[0].name,)):
        command = "train" if stages[0].name == "teacher" else stages[0].name
        raise ConfigError(
            f"stage {pending[0].name} needs {stages[0].name}, which is not done for this config in {storage.uri}: "
            f"`raystill {command}` comes first, or use `raystill run`"
        )
    answers = any(stage.name == "serve" for stage in pending)
    if answers:
        check_address(config.serve.host, database_url(config.state_directory))
        check_engine(config.serve, config.cluster)
    if any(stage.name in ("register", "promote") for stage in pending):
        check_records(config)
    if any(stage.name in ("teacher", "train") for stage in pending):
        check_shapes(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_one(config))  # before the port, at which this run given twice may answer
        if answers and not config.cluster.resolved_address():  # a cluster may have a Serve there, for us to use
            check_port_free(config.serve.host, config.serve.port)
        stack.enter_context(progress)
        storage.sweep()
        for stage in pending:
            if _take_if_done(this, ledger, stage):
                continue
            if this.connection is None and stage.needs_cluster(this):
                this.connection = stack.enter_context(connect(config.cluster))
                check_cluster(config, this.connection, answers=answers)
                if answers:  # Serve has one address, fixed when it starts: before the teachers, which need none
                    start_serve(config.serve.host, config.serve.port)
            if stage.name != "prepare" and this.tracker is None:
                this.tracker = stack.enter_context(_tracking(this))
            _do(this, ledger, stage, progress)
    return ledger.summary()


def estimate_labels_of(config: RunConfig) -> dict[str, Any]:
    """What `raystill label` would take (`jobs.labels.estimate`).

    Raises:
        ConfigError: the config has no teacher, or its example store or teacher is not there yet.
    """
    from jobs.labels.estimate import estimate_labels

    this = Run(config, open_storage(config.storage))
    ledger = Ledger(this.storage, config.name)
    _check_distils(config)
    assert config.teacher is not None
    prepare, teacher = ALL_STAGES[:2]
    if not _take_if_done(this, ledger, prepare):
        raise ConfigError(f"label: no corpus is prepared for this config in {this.storage.uri}: run `raystill prepare`")
    if _take_if_done(this, ledger, teacher):
        model = this.teacher_model
    else:
        model = config.teacher.model if config.teacher.gguf_file is None else None
    if model is None:
        raise ConfigError(f"label: the teacher is not made yet in {this.storage.uri}; `raystill label` makes it first")
    return estimate_labels(config, this.storage, this.store_prefix, model)


def _check_distils(config: RunConfig) -> None:
    if not config.distils:
        raise ConfigError("label: this config asks no teacher; set teacher and distill.alpha below 1")


def _take_if_done(this: Run, ledger: Ledger, stage: Stage) -> bool:
    """Whether the stage is done for this config, and what it made is still there; its output is taken over then."""
    key = stage.key(this)
    this.keys[stage.name] = key
    record = ledger.done(stage.name, key)
    if record is None or (record.status == "done" and not stage.is_there(this, record.output)):
        return False
    this.outputs[stage.name] = record.output
    return True


def _do(this: Run, ledger: Ledger, stage: Stage, progress: ConsoleProgress) -> None:
    bar = progress.stage(stage.name)
    key, started = this.keys[stage.name], time.monotonic()
    skipped = not stage.applies(this)
    try:
        if stage.decides:
            ledger.forget_after(stage.name)
        if ledger.record("prepare") is not None:  # a corpus with a mistake in it leaves nothing behind
            ledger.write(stage.name, StageRecord(key, "started", 0.0, {}))
        output = {} if skipped else stage.work(this, bar)
    except KeyboardInterrupt:
        bar.fail("interrupted")
        with contextlib.suppress(Exception):
            ledger.write(stage.name, StageRecord(key, "interrupted", time.monotonic() - started, {}))
        raise
    except BaseException as error:
        bar.fail(type(error).__name__)
        if not (isinstance(error, UserError) and ledger.record("prepare") is None):
            with contextlib.suppress(Exception):  # the error itself matters more than its record
                message = " ".join(str(error).split())[:1000] or type(error).__name__
                ledger.write(stage.name, StageRecord(key, "failed", time.monotonic() - started, {}, message))
        raise
    seconds = time.monotonic() - started
    this.outputs[stage.name] = output
    ledger.write(stage.name, StageRecord(key, "skipped" if skipped else "done", seconds, output))
    bar.finish("no teacher" if skipped else f"{seconds:.0f} s")


@contextlib.contextmanager
def _tracking(this: Run) -> Iterator[Tracker]:
    """The run's record in MLflow: a new one for a new training; a run that goes on keeps its own."""
    config, storage, key = this.config, this.storage, "tracking.json"
    uri, values = tracking_uri(config.state_directory), config.identity()
    trained = {part: values.get(part) for part in ("data", "teacher", "student", "distill", "train")}
    identity = {"uri": uri, "training": fingerprint(trained)}
    known: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        known = storage.read_json(key)
    run_id = known.get("run_id") if {**known, **identity} == known else None
    tracker = Tracker(uri, config.name, config.name, f"{storage.uri}/mlflow", run_id)
    resolved = config.model_dump(mode="json", by_alias=True)
    tracker.text(yaml.safe_dump(resolved, sort_keys=False), "config.yaml")
    tracker.params(_flat(resolved))
    tracker.tags({"raystill.storage": storage.uri, "raystill.data": str(this.outputs["prepare"]["fingerprint"])})
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    finally:
        for name, output in this.outputs.items():
            for model, figures in output.get("models", {}).items():
                tracker.metrics({f"{name}/{model}/{what}": value for what, value in figures.items()}, 0)
        if "teacher" in this.keys:
            tracker.tags({"raystill.teacher": this.keys["teacher"]})
        tracker.close(status)
        if tracker.run_id is not None:
            with contextlib.suppress(Exception):  # only saves a second record after a restart
                storage.write_json(key, {**identity, "run_id": tracker.run_id})


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            out[f"{prefix}{name}"] = value
    return out


def status(storage_uri: str) -> dict[str, Any] | None:
    """The summary of a run, or None if there is none below the root."""
    storage = open_storage(storage_uri)
    try:
        return storage.read_json(SUMMARY)
    except FileNotFoundError:
        return None
