"""Online distillation, whole steps, against one-process loops and TRL: `python -m tests.benchmarks.end_to_end`.

Ours is the training loop of `jobs.training.loop` with its optimiser, against a teacher replica on Ray Serve. The others
hold teacher and student in one process and form full logits: the plain loop in float32, the same with a bfloat16
teacher and autocast, and TRL's GKD trainer on given text (`lmbda=0`). Same models, batch and text. Each peer as it
comes and with raystill's process settings.
"""

import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from cluster.resources import physical_cores
from services.teacher.client import TeacherAnswers
from tests import tiny
from tests.benchmarks.paced import PacedTraining
from tests.benchmarks.sides import AS_IT_COMES, OUR_SETTINGS, Side, arguments, show, take_turns

BATCH, LENGTH, ALPHA, RATE = 8, 256, 0.1, 1e-3
TEACHER = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
STUDENT = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4}
VOCABULARIES = (512, 8_192, 32_000, 49_152)
ENDLESS = 1_000_000
"""Steps; a side is ended when its turns are over."""
ANSWERS_AHEAD = 2
"""Steps of a turn that do not count where a teacher works ahead: their answers were computed in others' turns."""


def make_inputs(directory: Path, vocab_size: int, documents: int = 1000) -> None:
    """Teacher, student and an example store below a directory. Ids come from a small tokenizer: for the time a step
    takes it does not matter which ids they are."""
    from cluster.storage import open_storage
    from jobs.config import DataConfig
    from jobs.corpus import find_sources
    from jobs.prepare import prepare
    from tests.unit.test_prepare import NoBar

    for name, shape in (("teacher", TEACHER), ("student", STUDENT)):
        heads = {"num_key_value_heads": shape["num_attention_heads"], "max_position_embeddings": LENGTH}
        tiny.save_model(directory / name, vocab_size=vocab_size, **shape, **heads)
    config = DataConfig(sources=[str(tiny.corpus(directory / "in", documents))], sequence_length=LENGTH)
    storage = open_storage(str(directory))
    prepare(find_sources(config.sources), config, str(directory / "teacher"), BATCH, storage, "store", NoBar())


def side(name: str, options: dict[str, Any]) -> Callable[[], dict[str, float]]:
    directory = Path(options["directory"])
    start = {"ours": with_service, "trl": _trl}.get(name.split()[0], _loop)
    ahead = ANSWERS_AHEAD if name == "ours" else 0
    training = PacedTraining(lambda step: start(name, directory, step), ahead, options["counted"])

    def measure() -> dict[str, float]:
        return {"seconds": training.turn(), "teacher_bytes": _peak_of_replicas() if name == "ours" else 0}

    return measure


def _peak_of_replicas() -> int:
    """Peak resident bytes of the teacher replicas below this process, everything in them included."""
    below = psutil.Process().children(recursive=True)
    statuses = [Path(f"/proc/{item.pid}/status") for item in below if "ServeReplica" in " ".join(item.cmdline())]
    peaks = [line for status in statuses for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return sum(int(line.split()[1]) * 1024 for line in peaks)


def with_service(name: str, directory: Path, step: Callable[[], None]) -> None:
    """Our training loop without an end, against a teacher replica on Ray Serve."""
    from cluster.connection import ClusterConfig, connect
    from services.teacher.client import TeacherClient, start_teacher
    from services.teacher.schema import TeacherServiceConfig

    with connect(ClusterConfig(num_cpus=8)):
        start_teacher(TeacherServiceConfig(model=str(directory / "teacher"), threads_per_replica=physical_cores()))
        train_with(TeacherClient(), directory, step)


def train_with(
    teacher: TeacherAnswers, directory: Path, step: Callable[[], None], labels: str | None = None, **distil: Any
) -> None:
    """Our training loop without an end, against a given teacher; `labels` is the root of a label store to read and to
    write."""
    from jobs.config import DistillConfig, StudentConfig, TrainConfig
    from jobs.training.choice import choose_signal
    from jobs.training.loop import train
    from jobs.training.plan import LabelAccess, TeacherAccess, TrainPlan
    from jobs.training.workers import Workers

    distill, described = DistillConfig(alpha=ALPHA, **distil), teacher.describe()
    signal, _ = choose_signal(distill, described)
    access = TeacherAccess(
        app_name="teacher",
        fingerprint=described.fingerprint,
        signal=signal,
        attempt_timeout_s=60,
        deadline_s=600,
        window_bytes=1,  # one request ahead, which is all that a teacher on the same cores can use
    )
    plan = TrainPlan(
        storage=str(directory),
        prefix=f"run-{os.getpid()}",
        store="store",
        tokenizer=str(directory / "student"),
        student=StudentConfig(model=str(directory / "student")),
        teacher_model=None,
        teacher=access,
        labels=LabelAccess(root=labels, reads=True, writes=True) if labels is not None else None,
        distill=distill,
        train=TrainConfig(
            steps=ENDLESS,
            global_batch=BATCH,
            micro_batch=BATCH,
            learning_rate=RATE,
            validate_every=ENDLESS,
            checkpoint_every=ENDLESS,
        ),
        threads=physical_cores(),
    )
    train(plan, Workers(0, 1, torch.device("cpu")), teacher, lambda number, metrics: step())


def _batches(directory: Path) -> Any:
    """Token ids [BATCH, LENGTH] and targets of every step, as the loop has them; the rows of the store."""
    from cluster.storage import open_storage
    from jobs.training.data import ExampleStore, GlobalBatches

    batches = GlobalBatches(ExampleStore(open_storage(str(directory)), "store", "train"), BATCH, 0)
    for micro_batch in batches.micro_batches(range(ENDLESS), 0, 1, BATCH):
        ids = torch.zeros(BATCH * LENGTH, dtype=torch.long)  # a row may be a token short
        ids[: len(micro_batch.token_ids)] = torch.from_numpy(micro_batch.token_ids)
        yield ids.view(BATCH, LENGTH)


def _loop(name: str, directory: Path, step: Callable[[], None]) -> None:
    """The plain loop: both models here, full logits, autograd."""
    from transformers import AutoModelForCausalLM

    bf16 = "bf16" in name
    dtype = torch.bfloat16 if bf16 else torch.float32
    teacher = AutoModelForCausalLM.from_pretrained(directory / "teacher", dtype=dtype).eval()
    student = AutoModelForCausalLM.from_pretrained(directory / "student", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE)
    for ids in _batches(directory):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = student(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            with torch.no_grad():
                of_teacher = teacher(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        cross_entropy = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        log_q, log_p = torch.log_softmax(logits, -1), torch.log_softmax(of_teacher, -1)
        divergence = torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        (ALPHA * cross_entropy + (1 - ALPHA) * divergence).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step()


def _trl(name: str, directory: Path, step: Callable[[], None]) -> None:
    """TRL's GKD trainer on given text, bfloat16; its divergence is forward KL without a part of cross-entropy."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class Turns(TrainerCallback):
        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            step()

    tokenizer = AutoTokenizer.from_pretrained(directory / "student")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    rows = [tokenizer.decode(row[: LENGTH - 2]) for ids in _first(_batches(directory), 40) for row in ids]
    messages = [[{"role": "user", "content": " "}, {"role": "assistant", "content": text}] for text in rows]
    teacher = AutoModelForCausalLM.from_pretrained(directory / "teacher", dtype=torch.bfloat16)
    student = AutoModelForCausalLM.from_pretrained(directory / "student", dtype=torch.float32)
    with tempfile.TemporaryDirectory(prefix="raystill-bench-") as output:
        config = GKDConfig(
            output_dir=output,
            per_device_train_batch_size=BATCH,
            max_steps=ENDLESS,
            learning_rate=RATE,
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            max_length=2 * LENGTH,  # of prompt and text together
            bf16=True,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            logging_steps=ENDLESS,
            disable_tqdm=True,
            gradient_checkpointing=False,
        )
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_dict({"messages": messages}),
            callbacks=[Turns()],
        )
        trainer.train()


def _first(items: Any, count: int) -> Any:
    return [next(items) for _ in range(count)]


def _peak(item: Side) -> float:
    return item.facts["peak_bytes"] + item.facts["teacher_bytes"]


def main() -> None:
    options = arguments(__doc__ or "")
    has_trl = importlib.util.find_spec("trl") is not None
    if not has_trl:
        print("TRL is not installed (pip install trl==1.16.0): its rows are missing")
    peers = ["loop fp32", "loop bf16", *(["trl gkd"] if has_trl else [])]
    settings = {"ours": OUR_SETTINGS}
    settings |= dict.fromkeys(peers, AS_IT_COMES) | {f"{peer}, our settings": OUR_SETTINGS for peer in peers}
    rows, result = [], {}
    for vocab_size in (32_000,) if options.quick else VOCABULARIES:
        with tempfile.TemporaryDirectory(prefix="raystill-bench-") as directory:
            make_inputs(Path(directory), vocab_size)
            values = {"directory": directory, "counted": max(1, min(8, 16_384 // vocab_size))}
            sides = {name: Side("tests.benchmarks.end_to_end", name, values, settings[name]) for name in settings}
            take_turns(list(sides.values()), options.repeats or 5)
            for item in sides.values():
                item.close()
        speed = {name: BATCH * LENGTH / item.median_s for name, item in sides.items()}
        for name, item in sides.items():
            ratio = f"{speed['ours'] / speed[name]:.2f}"
            rows.append([f"V={vocab_size:,}: {name}", f"{speed[name]:,.0f}", ratio, f"{_peak(item) / 1e6:,.0f}"])
        result[str(vocab_size)] = {
            f"vs_{key}{suffix}": speed["ours"] / speed[f"{peer}{', our settings' if suffix else ''}"]
            for key, peer in (("fp32_loop", "loop fp32"), ("bf16_loop", "loop bf16"), ("trl_gkd", "trl gkd"))
            if peer in peers
            for suffix in ("", "_same_settings")
        }
    show(
        "Online distillation, Llama 8 x 512 to 4 x 256, batch 8 x 256 (medians)",
        ["side", "tokens/s", "ours is faster by", "peak MB, teacher included"],
        rows,
        result,
    )


if __name__ == "__main__":
    main()
