"""What decides a result is part of its identity; where and how fast it is computed is not."""

import json

import pytest

from cluster.config import Config, fingerprint, validate
from jobs.config import RunConfig
from tests.unit.test_config import BASE, made

EXECUTION = {
    "cluster.address=host:1": "address",
    "cluster.num_cpus=9": "num_cpus",
    "cluster.object_store_mb=100": "object_store_mb",
    **{f"cluster.pools.{pool}_labels={{a: b}}": f"{pool}_labels" for pool in ("teacher", "student", "endpoint")},
    "train.micro_batch=3": "micro_batch",
    "train.num_workers=3": "num_workers",
    "train.threads_per_worker=3": "threads_per_worker",
    "train.use_gpu=true": "use_gpu",
    "train.gradient_checkpointing=true": "gradient_checkpointing",
    "train.validate_every=7": "validate_every",
    "train.validation_rows=7": "validation_rows",
    "train.checkpoint_every=7": "checkpoint_every",
    "train.keep_checkpoints=7": "keep_checkpoints",
    "train.max_failures=7": "max_failures",
    "train.notice_every=7": "notice_every",
    "cluster.pools.resize_every_s=7": "resize_every_s",
    "teacher.replicas=3": "replicas",
    "teacher.max_replicas=3": "max_replicas",
    "teacher.threads_per_replica=3": "threads_per_replica",
    "teacher.num_gpus=0.5": "num_gpus",
    "teacher.max_batch_tokens=99999": "max_batch_tokens",
    "teacher.attempt_timeout_s=3": "attempt_timeout_s",
    "teacher.deadline_s=900": "deadline_s",
    "train.compile=false": "compile",
    "teacher.window_mb=3": "window_mb",
    "distill.labels=write": "labels",
    "distill.label_store=s3://b/l": "label_store",
    "quantize.llmcompressor_python=/env/bin/python": "llmcompressor_python",
    "serve.host=0.0.0.0": "host",
    "serve.port=3": "port",
    "serve.replicas=3": "replicas",
    "serve.routers=2": "routers",
    "serve.keep_previous=true": "keep_previous",
    "serve.threads_per_replica=3": "threads_per_replica",
    "serve.poll_s=3": "poll_s",
    "serve.max_running=3": "max_running",
    "serve.max_waiting=3": "max_waiting",
    "serve.max_cached_tokens=999": "max_cached_tokens",
    "serve.max_admitted_tokens=9999": "max_admitted_tokens",
    "serve.max_body_bytes=9999": "max_body_bytes",
    "serve.teacher_url=http://h": "teacher_url",
    "serve.teacher_name=t": "teacher_name",
    "serve.vllm_python=/env/bin/python": "vllm_python",
    "serve.gpus_per_replica=1": "gpus_per_replica",
}
"""What says where and how fast: nothing else may be left out of the identity."""

DECIDING = [
    "data.sources=[other.jsonl]",
    "data.text_column=body",
    "data.sequence_length=64",
    "data.validation_fraction=0.1",
    "data.rows_per_shard=7",
    "teacher.model=/other",
    "teacher.gguf_file=x.gguf",
    "teacher.dtype=float32",
    "student.shape.num_hidden_layers=2",
    "student.tokenizer=t",
    "distill.alpha=0.5",
    "distill.temperature=2",
    "distill.divergence=jsd",
    "distill.jsd_beta=0.4",
    "distill.signal=topk",
    "distill.top_k=7",
    "train.steps=3",
    "train.global_batch=64",
    "train.learning_rate=1e-4",
    "train.final_rate=0.2",
    "train.warmup_steps=7",
    "train.weight_decay=0.2",
    "train.betas=[0.8, 0.9]",
    "train.clip_norm=2",
    "train.precision=float32",
    "train.seed=7",
    "evaluate.max_rows=7",
    "evaluate.seed=7",
    "evaluate.tasks=[{name: t, format: mmlu, source: q.jsonl}]",
    "quantize.schemes=[int8_weight_only]",
    "quantize.qat.steps=3",
    "quantize.calibration_rows=3",
    "register.model_name=other",
    "promote.scheme=onnx_int8",
    "promote.max_quality_drop=0.5",
    "serve.max_context_tokens=99",
    "serve.dtype=bfloat16",
    "serve.question=why",
]


def leaves_of(model, prefix=""):
    for name, field in model.model_fields.items():
        inner = field.annotation
        parts = [inner, *getattr(inner, "__args__", ())]
        nested = [part for part in parts if isinstance(part, type) and issubclass(part, Config)]
        if nested:
            yield from leaves_of(nested[0], f"{prefix}{field.alias or name}.")
        else:
            yield f"{prefix}{field.alias or name}", (field.json_schema_extra or {}).get("execution", False)


@pytest.mark.parametrize("override", EXECUTION)
def test_identity_leaves_out_where_and_how_fast(override):
    needed = ["serve.vllm_python=vllm"] if "gpus_per_replica" in override else []
    assert made(*needed, override) != made(*needed)
    assert made(*needed, override).identity() == made().identity()


@pytest.mark.parametrize("override", DECIDING)
def test_identity_changes_with_everything_that_decides_the_result(override):
    assert fingerprint(made(override).identity()) != fingerprint(made().identity())


def test_identity_marks_no_other_field_as_execution():
    marked = {name for name, is_execution in leaves_of(RunConfig) if is_execution and "teacher.train." not in name}
    assert marked - {"storage"} == {override.partition("=")[0] for override in EXECUTION}
    assert set(EXECUTION.values()).isdisjoint(fingerprint_keys(made().identity()))


def fingerprint_keys(value):
    return set(value) | {key for item in value.values() if isinstance(item, dict) for key in fingerprint_keys(item)}


def test_identity_is_json_and_does_not_depend_on_the_order_of_keys(tmp_path):
    identity = made().identity()
    assert json.loads(json.dumps(identity)) == identity
    turned = dict(reversed(list(BASE.items())))
    assert fingerprint(validate(RunConfig, turned, "x").identity()) == fingerprint(identity)
