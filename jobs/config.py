"""One strict model per job; a run's config is these models side by side in one YAML file.

Neither torch nor ray is imported here. Fields marked `execution` say where and how fast, not what: changing them does
not make a finished stage start again.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from cluster.config import Config, execution
from cluster.connection import ClusterConfig
from cluster.names import NAME
from cluster.pools import WorkerCount, most
from jobs.quantization.config import QuantizationScheme, QuantizeConfig
from services.endpoint.schema import CanaryConfig, EndpointConfig
from services.teacher.signals import SignalKind

Name = Annotated[str, Field(pattern=NAME), AfterValidator(lambda name: _no_dots(name))]
Scalar = bool | int | float | str | None
Beta = Annotated[float, Field(ge=0, lt=1)]


def _no_dots(name: str) -> str:
    if ".." in name:
        raise ValueError("must not contain '..'")
    return name


class TokenizerTraining(Config):
    """A byte-level BPE tokenizer trained on the corpus."""

    vocab_size: int = Field(2048, ge=300)


class DataConfig(Config):
    sources: list[str] = Field(default_factory=list)
    """Files, directories or prefixes (local or s3://) with .jsonl (.gz, .zst), .parquet or .txt."""
    gather: Literal["python_docs"] | None = None
    """Make the corpus instead: `python_docs` collects the docstrings and language topics of this machine's Python."""
    format: Literal["text", "prompt_completion", "messages"] = "text"
    """What a record holds: a text; a prompt and its completion, of which the completion is learnt; or the messages of a
    chat, written with the tokenizer's chat template, of which the assistant's words are learnt."""
    text_column: str = "text"
    """Key or column with the text; so are the next ones for the other formats."""
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    messages_column: str = "messages"
    """A list of `{role, content}`."""
    sequence_length: int = Field(128, ge=8)
    """Tokens in a row."""
    packing: bool = True
    """Documents share rows without seeing each other, and long ones continue in the next row. Without it every document
    has a row of its own and what does not fit is cut off; how many were cut is counted."""
    deduplicate: bool = True
    """Leave out documents that are exactly the same as an earlier one, in the order of the sources."""
    on_error: Literal["stop", "skip"] = "stop"
    """A source object that is damaged stops the job, or is left out as a whole and counted."""
    validation_fraction: float = Field(0.02, gt=0, lt=1)
    """Share of documents held out, chosen by a hash of their content."""
    train_tokenizer: TokenizerTraining | None = None
    """Train a tokenizer on the corpus; else the student's, else the teacher's is used. A corpus that grows trains
    another one, and then everything is tokenised again: take a given one where files are added."""
    rows_per_shard: int = Field(4096, ge=1)

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if bool(self.sources) == bool(self.gather):
            raise ValueError(f"set either sources or gather; found sources={self.sources}, gather={self.gather}")
        return self

    @model_validator(mode="after")
    def _columns_fit_the_format(self) -> Self:
        if self.gather and self.format != "text":
            raise ValueError(f"gather={self.gather} makes texts; found format={self.format}: leave format out")
        for name, of_format in _COLUMNS.items():
            value = getattr(self, name)
            if not value:
                raise ValueError(f"{name} is empty; name a key or column")
            if self.format != of_format and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name}={value} is read only with format={of_format}; found format={self.format}: change one"
                )
        if self.prompt_column == self.completion_column:
            raise ValueError(f"prompt_column and completion_column are both {self.prompt_column}; name two columns")
        return self


_COLUMNS = {
    "text_column": "text",
    "prompt_column": "prompt_completion",
    "completion_column": "prompt_completion",
    "messages_column": "messages",
}


class TrainConfig(Config):
    steps: int = Field(ge=1)
    """Optimiser steps."""
    global_batch: int = Field(32, ge=1)
    """Rows in an optimiser step, over all workers and micro-batches."""
    micro_batch: int = execution(32, ge=1)
    """Rows in one forward and backward pass of one worker."""
    num_workers: WorkerCount = execution(1)
    """A number, or `[least, most]`: then the group grows and shrinks with the cluster; that needs `cluster.pools`."""
    threads_per_worker: int | None = execution(None, ge=1)
    """Default: workers and teacher replicas share the cores of this machine; on a cluster with pools the slots of a
    node share its CPUs, without pools they share what services leave; 1 while such nodes are still to come."""
    use_gpu: bool = execution(False)
    learning_rate: float = Field(1e-3, gt=0)
    """Peak rate, reached after the warm-up; then a cosine down to `final_rate` times it."""
    final_rate: float = Field(0.1, ge=0, le=1)
    warmup_steps: int = Field(20, ge=0)
    """At most half of the steps are taken for it."""
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    clip_norm: float = Field(1.0, gt=0)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`bfloat16` is autocast with float32 weights; `auto` takes it on a GPU, and on processors that multiply it."""
    gradient_checkpointing: bool = execution(False)
    compile: bool = execution(True)
    """Compile the loss where the training is long enough for that and the machine has a C++ compiler."""
    seed: int = Field(0, ge=0, lt=2**32)
    validate_every: int = execution(100, ge=1)
    validation_rows: int = execution(128, ge=1)
    checkpoint_every: int = execution(100, ge=1)
    keep_checkpoints: int = execution(2, ge=1)
    """Besides the newest, and besides the one with the fewest held-out bits per byte."""
    max_failures: int = execution(3, ge=0)
    """Restarts of the worker group before the run gives up. Leaving machines that announce their end is none."""
    notice_every: int = execution(5, ge=1)
    """Steps between looking whether a machine of the group has announced its end."""

    @model_validator(mode="after")
    def _batch_covers_workers(self) -> Self:
        if most(self.num_workers) > self.global_batch:
            raise ValueError(
                f"num_workers={most(self.num_workers)} is more than global_batch={self.global_batch}: "
                "some workers would never have a row; lower num_workers or raise global_batch"
            )
        return self


class TeacherConfig(Config):
    model: str | None = None
    """Directory, s3:// URI, package://NAME, models:/NAME@ALIAS or hub id."""
    gguf_file: str | None = None
    """Name of a GGUF file inside `model`; it is converted to safetensors once."""
    shape: dict[str, Scalar] | None = None
    """Instead of `model`: train a teacher of this shape on the corpus first (Hugging Face config keys, model_type)."""
    train: TrainConfig | None = None
    """How to train the teacher of `shape`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    replicas: int = execution(1, ge=1)
    max_replicas: int | None = execution(None, ge=1)
    """Up to this many while requests wait and students stand still for them; default: no more than `replicas`."""
    threads_per_replica: int | None = execution(None, ge=1)
    """Default: as `train.threads_per_worker`."""
    num_gpus: float = execution(0, ge=0)
    max_batch_tokens: int = execution(16384, ge=1)
    """Waiting requests are merged up to this many tokens."""
    attempt_timeout_s: float = execution(60, gt=0)
    """A request that takes longer is asked again, and then has twice the time."""
    deadline_s: float = execution(600, gt=0)
    """After this long without an answer training stops with an error."""
    window_mb: float = execution(64, gt=0)
    """Answers in flight or waiting, per worker, in MiB."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.model is None) == (self.shape is None):
            raise ValueError(f"set either model or shape; found model={self.model}, shape={self.shape}")
        if (self.shape is None) != (self.train is None):
            raise ValueError("shape and train go together: a teacher made from a shape must be trained")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is less than replicas={self.replicas}; raise it")
        if self.deadline_s < self.attempt_timeout_s:
            raise ValueError(
                f"deadline_s={self.deadline_s} is shorter than attempt_timeout_s={self.attempt_timeout_s}; raise it"
            )
        return self


class KeptLayers(Config):
    layers: list[int] = Field(min_length=1)
    """Indices of the teacher's layers that the student keeps, in order, with their weights."""


class StudentConfig(Config):
    model: str | None = None
    """Start from this model (same forms as teacher.model)."""
    shape: dict[str, Scalar] | None = None
    """Fresh weights: the teacher's config with these keys changed (without a teacher, with model_type)."""
    from_teacher: KeptLayers | None = None
    tokenizer: str | None = None
    """Directory or hub id; default: the trained one, else the teacher's."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [name for name in ("model", "shape", "from_teacher") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"set exactly one of model, shape, from_teacher; found {', '.join(given) or 'none'}")
        return self


class DistillConfig(Config):
    """`alpha * CE + (1 - alpha) * T^2 * D(teacher, student)`, mean over the positions of the global batch."""

    alpha: float = Field(0.1, ge=0, le=1)
    """Weight of the cross-entropy with the text; at 1 no teacher is asked."""
    temperature: float = Field(1.0, ge=0.01, le=1000)
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    jsd_beta: float = Field(0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture of the Jensen-Shannon divergence."""
    signal: SignalKind | Literal["auto"] = "auto"
    """What the teacher sends: `hidden` states (every divergence exact), the `topk` entries with the mass of the rest,
    `sampled` tokens (forward KL without bias), `dense` log-probabilities; `auto` chooses and says why."""
    top_k: int = Field(64, ge=1)
    """Entries of `topk`."""
    logprob_bits: Literal[16, 8] = 16
    """Of each entry of `topk`: float16, or 8 bits between the extremes of its position."""
    draws: int = Field(32, ge=1)
    """Tokens drawn for each position of `sampled`."""
    proposal: float = Field(1.0, gt=0, allow_inf_nan=False)
    """`sampled` draws from the teacher's probabilities to this power and weights back: below 1 favours rare tokens."""
    labels: Literal["off", "read", "write", "read_write"] = execution("off")
    """Stored answers of the teacher. `read`: label the whole store first, then train without a teacher; `write`: keep
    what the teacher says; `read_write`: take what is there, ask for the rest and keep it, so that a second epoch asks
    nothing. `sampled` labels are the same draws in every epoch."""
    label_store: str | None = execution(None)
    """Root URI of stored answers; default: labels/ below the run's storage. Runs with one teacher may share it."""

    @model_validator(mode="after")
    def _signal_gives_the_divergence(self) -> Self:
        if self.signal == "sampled" and self.divergence != "forward_kl":
            raise ValueError(
                f"signal=sampled gives only divergence=forward_kl, found {self.divergence}: draws from the teacher say "
                "nothing of tokens that only the student believes in; use signal=hidden"
            )
        return self


class MultipleChoiceTask(Config):
    """Questions with given answers; the answer that the model finds most likely counts."""

    name: Name
    format: Literal["mmlu", "hellaswag"]
    """Columns and wording. `mmlu`: question, subject, choices (four), answer (0 to 3, or A to D). `hellaswag`:
    activity_label, ctx_a, ctx_b, endings, label."""
    source: str
    """A .parquet, .jsonl, .jsonl.gz or .jsonl.zst file, local or s3://."""
    shots: int = Field(0, ge=0)
    """Answered questions in front of each; of `mmlu`, of the same subject."""
    shots_source: str | None = None
    """File of the same format with the answered ones."""
    max_questions: int | None = Field(None, ge=1)
    """The first so many of each subject; default: all."""

    @model_validator(mode="after")
    def _shots_come_from_somewhere(self) -> Self:
        if (self.shots > 0) != (self.shots_source is not None):
            raise ValueError(f"shots={self.shots} and shots_source={self.shots_source} go together: set both or none")
        return self


class EvaluateConfig(Config):
    max_rows: int = Field(1024, ge=1)
    """Held-out rows scored."""
    batch_rows: int = Field(16, ge=1)
    """Rows scored at once; ONNX int8 quantises activations over a whole batch, so its figures depend on it a little."""
    resamples: int = Field(2000, ge=100)
    """Bootstrap samples of the rows behind each 95 % interval."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of the bootstrap and of the choice of answered questions."""
    tasks: list[MultipleChoiceTask] = Field(default_factory=list)
    speed_batches: list[Annotated[int, Field(ge=1)]] = Field([1, 8], min_length=1)
    """Rows scored at once where speed is measured."""
    prompt_tokens: int = Field(128, ge=2)
    """Tokens of the prompt whose continuation is timed; at most a row."""
    new_tokens: int = Field(16, ge=2)
    """Tokens of that continuation."""
    repeats: int = Field(6, ge=1)
    """Timed repetitions, of which the median counts; fewer than 6 have no 95 % interval."""

    @model_validator(mode="after")
    def _one_task_of_a_name(self) -> Self:
        names = [task.name for task in self.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"tasks has {twice[0]!r} {names.count(twice[0])} times: give each a name of its own")
        return self


class RegisterConfig(Config):
    model_name: Name | None = None
    """Registered model; default: the run's name with `-student`."""


class ChampionRules(Config):
    """What a candidate is asked beside the reigning champion. Without a champion these rules have nothing to say."""

    max_quality_drop: float | None = Field(None, gt=-1)
    """Largest relative increase of held-out bits per byte over the champion's; below 0 it must be better."""
    min_retention: float | None = Field(None, gt=0)
    """Least share of the champion's quality: its held-out bits per byte over the candidate's."""
    max_latency_ratio: float | None = Field(None, gt=0)
    """Largest time per token, as a multiple of the champion's as it was recorded, on a machine of the same kind."""
    max_size_ratio: float | None = Field(None, gt=0)
    """Largest size of the weights on disk, as a multiple of the champion's; at 1 they must not grow."""


class PromoteConfig(Config):
    """The gate. A rule that is not set is not asked; one whose figures were not measured refuses."""

    scheme: QuantizationScheme = "int8_weight_only"
    """Which quantised student becomes champion."""
    max_quality_drop: float = Field(0.02, ge=0)
    """Largest relative increase of held-out bits per byte over the float student."""
    min_retention: float | None = Field(None, gt=0)
    """Least share of the teacher's quality that is kept: its held-out bits per byte over the candidate's. At 1 the
    candidate is as good as the teacher; at 0.9 it may take 11 % more bits."""
    max_latency_ratio: float | None = Field(None, gt=0)
    """Largest time per token, as a multiple of the teacher's on a machine of the same kind."""
    max_size_ratio: float | None = Field(None, gt=0)
    """Largest size of the weights on disk, as a share of the teacher's."""
    max_size_mb: float | None = Field(None, gt=0)
    """Largest size of the weights on disk, in megabytes of 1,000,000 bytes."""
    champion: ChampionRules = ChampionRules()

    @model_validator(mode="before")
    @classmethod
    def _old_name(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "max_quality_loss" in raw:
            raise ValueError("max_quality_loss is called max_quality_drop now: rename the key, it means the same")
        return raw


class ServeConfig(EndpointConfig):
    question: str = "Return a list of"
    """What `run` asks the endpoint at the end."""
    canary: CanaryConfig | None = execution(None)
    """A promoted version first serves a growing share of the traffic beside the champion; without, all at once."""


class RunConfig(Config):
    """A whole run: from text and a teacher to a quantised student that answers."""

    name: Name
    storage: str = ""
    """Root URI of everything that the run writes: file:///dir, s3://bucket/prefix or a path; default runs/<name>."""
    cluster: ClusterConfig = ClusterConfig()
    data: DataConfig
    teacher: TeacherConfig | None = None
    student: StudentConfig
    distill: DistillConfig = DistillConfig()
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    registry: RegisterConfig = Field(RegisterConfig(), alias="register")
    promote: PromoteConfig = PromoteConfig()
    serve: ServeConfig = ServeConfig()

    @model_validator(mode="before")
    @classmethod
    def _default_storage(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and not raw.get("storage") and raw.get("name"):
            raw = {**raw, "storage": f"runs/{raw['name']}"}
        return raw

    @model_validator(mode="after")
    def _teacher_is_there_where_it_is_needed(self) -> Self:
        shape = self.student.shape
        if self.teacher is None and self.distill.alpha < 1:
            raise ValueError(f"distill.alpha={self.distill.alpha} needs a teacher: set teacher.model, or alpha=1")
        if self.teacher is None and self.student.from_teacher is not None:
            raise ValueError("student.from_teacher needs a teacher: set teacher.model")
        if self.teacher is None and shape is not None and "model_type" not in shape:
            raise ValueError("student.shape needs model_type when there is no teacher to take it from")
        if self.teacher is not None and self.teacher.shape is not None and "model_type" not in self.teacher.shape:
            raise ValueError("teacher.shape needs model_type, for example model_type: llama")
        return self

    @model_validator(mode="after")
    def _one_tokenizer(self) -> Self:
        of_models = {
            "teacher.model": self.teacher.model if self.teacher is not None else None,
            "student.model": self.student.model,
            "student.tokenizer": self.student.tokenizer,
        }
        given = [f"{name}={value}" for name, value in of_models.items() if value is not None]
        if self.data.train_tokenizer is not None and given:
            raise ValueError(f"data.train_tokenizer makes a new vocabulary, {', '.join(given)} has its own: drop one")
        if self.data.train_tokenizer is None and not given:
            raise ValueError("there is no tokenizer: set data.train_tokenizer or student.tokenizer")
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.distils and self.teacher is not None:
            tokens = self.train.micro_batch * self.data.sequence_length
            if tokens > self.teacher.max_batch_tokens:
                raise ValueError(
                    f"a request of train.micro_batch={self.train.micro_batch} rows of data.sequence_length="
                    f"{self.data.sequence_length} is {tokens} tokens, teacher.max_batch_tokens is "
                    f"{self.teacher.max_batch_tokens}: lower train.micro_batch"
                )
        if self.promote.scheme not in self.quantize.schemes:
            raise ValueError(
                f"promote.scheme={self.promote.scheme} is not among quantize.schemes={self.quantize.schemes}: add it"
            )
        for name in ("min_retention", "max_latency_ratio", "max_size_ratio"):
            if self.teacher is None and getattr(self.promote, name) is not None:
                raise ValueError(
                    f"promote.{name}={getattr(self.promote, name)} compares with the teacher, and there is none: "
                    "leave it out, or set teacher.model"
                )
        return self

    @property
    def distils(self) -> bool:
        """Whether a teacher is asked while the student trains."""
        return self.teacher is not None and self.distill.alpha < 1

    @property
    def tokenizer_source(self) -> tuple[str, str | None]:
        """The model whose tokenizer is taken, and its GGUF file; only where none is trained."""
        named = self.student.tokenizer
        if named is None and self.teacher is not None and self.teacher.model is not None:
            return self.teacher.model, self.teacher.gguf_file
        named = named or self.student.model
        assert named is not None, "the config checks that a tokenizer is named"
        return named, None

    @property
    def model_name(self) -> str:
        return self.registry.model_name or f"{self.name}-student"[:63]

    @property
    def label_root(self) -> str:
        """Root URI of label stores."""
        root = self.distill.label_store or f"{self.storage.rstrip('/')}/labels"
        return root if "://" in root else Path(root).expanduser().absolute().as_uri()

    @property
    def state_directory(self) -> Path:
        """Local directory for databases: the storage root if it is local, else runs/<name>."""
        from cluster.storage import LocalStorage, open_storage

        storage = open_storage(self.storage) if "://" not in self.storage or self.storage.startswith("file:") else None
        return storage.root if isinstance(storage, LocalStorage) else Path("runs", self.name).absolute()
