"""The stages of a run: for each, the key that decides its result, and the work that makes it.

`jobs.run` walks them in order. A stage sees the config and the outputs of the stages before it; what it returns is
stored in the ledger and must be plain JSON.
"""

import contextlib
import platform
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cluster.champions import database_url, find_champion
from cluster.config import fingerprint
from cluster.errors import CorruptArtifact, UserError
from cluster.pretrained import load_tokenizer, locate, model_fingerprint
from cluster.published import publish_directory, read_manifest
from cluster.resources import physical_cores
from cluster.storage import LocalStorage, Storage, split_uri
from cluster.tracking import tracking_uri
from jobs.config import DistillConfig, RunConfig, StudentConfig
from jobs.convert import convert_gguf
from jobs.corpus import Source, find_sources
from jobs.evaluating.stage import evaluate, evaluate_artefacts, evaluation_identity, measured_by, with_report
from jobs.gather import gather_python_docs
from jobs.label import all_there, introduce_teacher, label_store, over_common_columns
from jobs.labels.access import access_without_teacher, label_access
from jobs.ledger import stage_key
from jobs.prepare import corpus_fingerprint, identity, is_small, prepare, train_tokenizer
from jobs.preparing.encoding import encoding_fingerprint
from jobs.progress import Bar
from jobs.promote import promote
from jobs.quantization.config import GRAPH_FORM, ON_ONNXRUNTIME
from jobs.quantize import check_reload
from jobs.register import register
from jobs.serve import ask_once
from jobs.stage import Output, Run, Stage
from jobs.tasks import run_task
from jobs.threads import threads_of
from jobs.train import run_training, teacher_service
from jobs.training.data import ExampleStore
from jobs.training.plan import TeacherAccess, TrainPlan


def _is_whole(uri: str) -> bool:
    """Whether a published directory has its manifest and every file that it names."""
    storage, name = split_uri(uri)
    manifest = _undamaged_manifest(storage, name)
    if manifest is None or "files" not in manifest:
        return False
    sizes = {item.key: item.size_bytes for item in storage.list(f"{name}/")}
    return all(sizes.get(f"{name}/{file}") == facts["size_bytes"] for file, facts in manifest["files"].items())


def _undamaged_manifest(storage: Storage, prefix: str) -> dict[str, Any] | None:
    with contextlib.suppress(CorruptArtifact):
        return read_manifest(storage, prefix)
    return None


# --- prepare: corpus, tokenizer, example store --------------------------------------------------------------------


def _prepare_key(run: Run) -> str:
    config = run.config
    if config.data.gather is not None:
        corpus: Any = [config.data.gather, platform.python_version()]
    else:
        corpus = corpus_fingerprint(find_sources(config.data.sources))
    return stage_key(config.data.identity(), corpus, _tokenizer_identity(config))


def _tokenizer_identity(config: RunConfig) -> Any:
    """What decides the tokenizer: how it is trained, or what the one that is taken does."""
    if config.data.train_tokenizer is not None:
        return config.data.train_tokenizer.identity()
    return encoding_fingerprint(load_tokenizer(*config.tokenizer_source))


def _prepare(run: Run, bar: Bar) -> Output:
    config, storage = run.config, run.storage
    if config.data.gather is not None:
        gather_python_docs(storage, f"corpus/{config.data.gather}.jsonl", bar)
        sources = find_sources([f"{storage.uri}/corpus"])
    else:
        sources = find_sources(config.data.sources)
    # A trained tokenizer belongs to one corpus; a given one, and the store made with it, to any.
    trains = config.data.train_tokenizer is not None
    made_with = run.keys["prepare"] if trains else identity(config.data, _tokenizer_identity(config))
    trained = config.teacher.train if config.teacher is not None else None
    smallest = max(config.train.global_batch, trained.global_batch if trained is not None else 0)
    made_before = read_manifest(storage, f"tokenizer/{made_with}") is not None
    try:
        tokenizer = _tokenizer(run, sources, f"tokenizer/{made_with}", bar)
        manifest = prepare(
            sources, config.data, tokenizer, smallest, storage, f"store/{made_with}", bar, _tasks(run, sources)
        )
    except UserError:
        if not made_before:
            storage.delete(f"tokenizer/{made_with}/")
        raise
    return {
        "store": f"store/{made_with}",
        "tokenizer": tokenizer,
        **{name: manifest[name] for name in ("rows", "tokens", "bytes", "documents", "vocab_size")},
        **{name: manifest[name] for name in ("duplicates", "cut", "without_target")},
        "skipped": len(manifest["skipped"]),
        **{name: manifest[name] for name in ("sequence_length", "tokenizer_fingerprint", "fingerprint")},
    }


def _tasks(run: Run, sources: list[Source]) -> int:
    """How many Ray tasks prepare the corpus at the same time; 0: it is done in this process."""
    if run.connection is None or is_small(sources):
        return 0
    if run.connection.embedded:
        return physical_cores()
    everywhere = [run.storage, *(source.storage for source in sources)]
    if any(isinstance(storage, LocalStorage) for storage in everywhere):  # other machines cannot read it
        return 0
    return max(1, int(run.connection.num_cpus))


def _prepare_needs_cluster(run: Run) -> bool:
    return run.config.data.gather is None and not is_small(find_sources(run.config.data.sources))


def _tokenizer(run: Run, sources: list[Source], prefix: str, bar: Bar) -> str:
    """URI of the run's tokenizer: trained on the corpus, or copied from where the config names it."""
    if run.config.data.train_tokenizer is not None:
        return train_tokenizer(sources, run.config.data, run.storage, prefix, bar)
    if read_manifest(run.storage, prefix) is None:
        with TemporaryDirectory(prefix="raystill-tokenizer-") as name:
            load_tokenizer(*run.config.tokenizer_source).save_pretrained(name)
            publish_directory(Path(name), run.storage, prefix)
    return f"{run.storage.uri}/{prefix}"


def _prepare_is_there(run: Run, output: Output) -> bool:
    manifest = _undamaged_manifest(run.storage, output["store"])
    sizes = {item.key: item.size_bytes for item in run.storage.list(f"{output['store']}/")}
    return (
        manifest is not None
        and manifest["fingerprint"] == output["fingerprint"]
        and all(sizes.get(f"{output['store']}/{shard['key']}") == shard["size_bytes"] for shard in manifest["shards"])
        and _is_whole(output["tokenizer"])
    )


# --- teacher: given, converted, or trained here -------------------------------------------------------------------


def _teacher_key(run: Run) -> str:
    teacher = run.config.teacher
    if teacher is None:
        return stage_key(None)
    if teacher.model is not None:
        return stage_key(teacher.gguf_file, model_fingerprint(locate(teacher.model)))
    return stage_key(teacher.identity(), run.outputs["prepare"]["fingerprint"])


def _teacher(run: Run, bar: Bar) -> Output:
    teacher = run.config.teacher
    assert teacher is not None
    if teacher.gguf_file is not None:
        prefix = f"teacher/{run.keys['teacher']}/model"
        bar.start(1, "converting to safetensors")
        run_task(convert_gguf, str(teacher.model), teacher.gguf_file, run.storage.uri, prefix)
        return {"model": f"{run.storage.uri}/{prefix}"}
    if teacher.model is not None:
        return {"model": locate(teacher.model)}
    assert teacher.train is not None
    assert teacher.shape is not None
    plan = TrainPlan(
        storage=run.storage.uri,
        prefix=f"teacher/{run.keys['teacher']}",
        store=run.store_prefix,
        tokenizer=run.tokenizer,
        student=StudentConfig(shape=teacher.shape),
        teacher_model=None,
        teacher=None,
        distill=DistillConfig(alpha=1.0),
        train=teacher.train,
        threads=threads_of(run.config, run.cluster).teacher_worker,
    )
    return run_training(plan, run.cluster, bar, run.track("teacher/"))


def _model_is_there(run: Run, output: Output) -> bool:
    """Whether a model that the run made is; others are looked at when the config is checked."""
    model = str(output.get("model"))
    return not model.startswith(f"{run.storage.uri}/") or _is_whole(model)


# --- label: the teacher's answers ahead of training -------------------------------------------------------------------


def _labels_ahead(run: Run) -> bool:
    return run.config.distils and run.config.distill.labels == "read"


def _label_key(run: Run) -> str:
    config = run.config
    assert config.teacher is not None
    identity = (config.distill.identity(), config.teacher.dtype, config.label_root)
    return stage_key(*identity, run.outputs["prepare"]["fingerprint"], run.keys["teacher"])


def _label(run: Run, bar: Bar) -> Output:
    config, store = run.config, run.outputs["prepare"]
    assert config.teacher is not None
    assert run.teacher_model is not None
    bar.start(None, "starting the teachers")
    threads = threads_of(config, run.cluster).replica
    with teacher_service(config.teacher, run.teacher_model, run.tokenizer, store, config, threads) as (access, reason):
        bar.say(reason)
        access = over_common_columns(access, config, run.storage, run.store_prefix)
        arguments = (config.label_root, run.storage, run.store_prefix, config.train.micro_batch)
        return label_store(access, *arguments, 2 * config.teacher.replicas, bar)


def _labels_are_there(run: Run, output: Output) -> bool:
    return all_there(output, ExampleStore(run.storage, run.store_prefix, "train"))


# --- train ------------------------------------------------------------------------------------------------------------


def _train_key(run: Run) -> str:
    config = run.config
    derived = config.student.from_teacher is not None or "model_type" not in (config.student.shape or {"model_type": 1})
    own = None if config.student.model is None else model_fingerprint(locate(config.student.model))
    return stage_key(
        config.student.identity(),
        own,
        config.distill.identity() if config.distils else None,
        config.train.identity(),
        run.outputs["prepare"]["fingerprint"],
        run.keys["teacher"] if config.distils or derived else None,
        config.teacher.dtype if config.distils and config.teacher is not None else None,
    )


def _train(run: Run, bar: Bar) -> Output:
    config = run.config
    threads = threads_of(config, run.cluster)

    def plan(access: TeacherAccess | None) -> TrainPlan:
        return TrainPlan(
            storage=run.storage.uri,
            prefix=f"student/{run.keys['train']}",
            store=run.store_prefix,
            tokenizer=run.tokenizer,
            student=config.student,
            teacher_model=run.teacher_model,
            teacher=access,
            labels=label_access(config) if access is not None else None,
            distill=config.distill,
            train=config.train,
            threads=threads.worker,
        )

    if config.teacher is None or not config.distils:
        return run_training(plan(None), run.cluster, bar, run.track(""))
    assert run.teacher_model is not None
    stored = access_without_teacher(config, run.teacher_model, run.storage, run.store_prefix)
    with contextlib.ExitStack() as stack:
        if stored is None:
            bar.start(config.train.steps, "starting the teachers")
            arguments = (run.teacher_model, run.tokenizer, run.outputs["prepare"], config, threads.replica)
            access, reason = stack.enter_context(teacher_service(config.teacher, *arguments))
            if "write" in config.distill.labels:
                introduce_teacher(over_common_columns(access, config, run.storage, run.store_prefix), config.label_root)
        else:
            access, reason = stored
        bar.say(reason)
        return run_training(plan(access), run.cluster, bar, run.track(""))


# --- evaluate, quantize -------------------------------------------------------------------------------------------


def _evaluate_key(run: Run) -> str:
    return stage_key(*evaluation_identity(run), run.keys["train"], run.keys["teacher"])


def _quantize_key(run: Run) -> str:
    config = run.config
    learns = [config.distill.identity(), config.train.seed, run.keys["teacher"]]
    of_qat = learns if "int4_qat" in config.quantize.schemes else []
    of_graphs = [GRAPH_FORM] if set(ON_ONNXRUNTIME) & set(config.quantize.schemes) else []
    return stage_key(config.quantize.identity(), *evaluation_identity(run), run.keys["train"], *of_qat, *of_graphs)


def _quantize(run: Run, bar: Bar) -> Output:
    from jobs.quantize import make_artefacts

    config = run.config
    schemes, threads = list(config.quantize.schemes), physical_cores()
    prefix = f"quantized/{run.keys['quantize']}"
    student = run.outputs["train"]["model"]
    artefacts = run_task(
        make_artefacts,
        student,
        config.quantize,
        _qat_plan(run) if "int4_qat" in schemes else None,
        run.storage.uri,
        prefix,
        run.store_prefix,
        threads,
        bar=bar,
        total=len(schemes),
    )
    output = evaluate_artefacts(run, artefacts, bar)
    for scheme in schemes:
        same = artefacts[scheme]["processor"] == output["details"]["machine"]["processor"]
        check_reload(scheme, output["models"][f"student_{scheme}"], same)
    return with_report(run, "quantize", {"artefacts": artefacts, **output})


def _qat_plan(run: Run) -> Any:
    """The run's own loss and teacher; without a teacher the float student is the one."""
    from jobs.quantization.int4_qat import QatPlan
    from jobs.training.objective import Objective

    config, distill = run.config, run.config.distill
    return QatPlan(
        teacher=run.teacher_model or str(run.outputs["train"]["model"]),
        storage=run.storage.uri,
        store=run.store_prefix,
        objective=Objective(
            distill.alpha if config.distils else 0.0, distill.temperature, distill.divergence, distill.jsd_beta
        ),
        config=config.quantize.qat,
        seed=config.train.seed,
    )


def _artefacts_are_there(run: Run, output: Output) -> bool:
    return all(_is_whole(artefact["uri"]) for artefact in output["artefacts"].values())


# --- register, promote, serve -------------------------------------------------------------------------------------


def _register_key(run: Run) -> str:
    where = tracking_uri(run.config.state_directory)
    return stage_key(run.config.model_name, where, run.keys["quantize"], run.keys["evaluate"])


def _register(run: Run, bar: Bar) -> Output:
    artefacts = run.outputs["quantize"]["artefacts"]
    bar.start(1, f"{len(artefacts)} versions of {run.config.model_name}")
    measured, quantised = measured_by(run, "evaluate"), measured_by(run, "quantize")
    with_measures = {
        scheme: {"uri": artefact["uri"], "measured": quantised[f"student_{scheme}"]}
        for scheme, artefact in artefacts.items()
    }
    facts = {
        "run": run.config.name,
        "data_fingerprint": run.outputs["prepare"]["fingerprint"],
        "teacher_fingerprint": run.keys["teacher"],
        "config_fingerprint": fingerprint(run.config.identity()),
        "float_student": measured["student"],
        **({"teacher": measured["teacher"]} if "teacher" in measured else {}),
    }
    run_id = run.tracker.wait_started() if run.tracker is not None else None
    tracking = tracking_uri(run.config.state_directory)
    versions = register(with_measures, run.config.model_name, run.storage, tracking, run_id, facts)
    return {"model_name": run.config.model_name, "versions": versions}


def _versions_are_there(run: Run, output: Output) -> bool:
    """Whether the files are, and the registry if it is a local file; a server's is its own business."""
    database = tracking_uri(run.config.state_directory)
    if database.startswith("sqlite:///") and not Path(database.removeprefix("sqlite:///")).is_file():
        return False
    return all(_is_whole(version["uri"]) for version in output["versions"].values())


def _promote_key(run: Run) -> str:
    return stage_key(run.config.promote.identity(), database_url(run.config.state_directory), run.keys["register"])


def _promote(run: Run, bar: Bar) -> Output:
    config = run.config
    scheme = config.promote.scheme
    bar.start(1, f"{scheme} at the gate")
    measured = measured_by(run, "evaluate")
    champion, verdict = promote(
        config.promote,
        config.model_name,
        run.outputs["register"]["versions"][scheme],
        measured["student"],
        measured_by(run, "quantize")[f"student_{scheme}"],
        database_url(config.state_directory),
        tracking_uri(config.state_directory),
        teacher=measured.get("teacher"),
        run=config.name,
        force=run.force,
        canary=config.serve.canary,
    )
    challenger = {"challenger": verdict["canary"]} if "canary" in verdict else {}
    return {"champion": vars(champion), "verdict": verdict, **challenger}


def _champion_is_there(run: Run, output: Output) -> bool:
    """Whether anyone reigns: by now it may be somebody else, who stays unless this promotion is asked for by name."""
    champion = find_champion(database_url(run.config.state_directory), run.config.model_name)
    if champion is None or "promote" not in run.asked:
        return champion is not None
    if "challenger" in output:  # ask again: whether it is champion by now, challenger still, or taken down
        return False
    return champion.is_version(output["champion"])


def _serve_key(run: Run) -> str:
    return stage_key(run.config.serve.question, run.keys["promote"])


def _serve(run: Run, bar: Bar) -> Output:
    bar.start(1, "asking the endpoint one question")
    return ask_once(run.config)


ALL_STAGES = (
    Stage("prepare", _prepare_key, _prepare, _prepare_is_there, _prepare_needs_cluster),
    Stage("teacher", _teacher_key, _teacher, _model_is_there, applies=lambda run: run.config.teacher is not None),
    Stage("label", _label_key, _label, _labels_are_there, applies=_labels_ahead, decides=False),
    Stage("train", _train_key, _train, _model_is_there),
    Stage("evaluate", _evaluate_key, evaluate),
    Stage("quantize", _quantize_key, _quantize, _artefacts_are_there),
    Stage("register", _register_key, _register, _versions_are_there, needs_cluster=lambda run: False),
    Stage("promote", _promote_key, _promote, _champion_is_there, needs_cluster=lambda run: False),
    Stage("serve", _serve_key, _serve),
)
