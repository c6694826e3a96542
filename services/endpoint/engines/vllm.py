"""vLLM as the runner of a version: it schedules, keeps keys and values and samples, on GPUs or on a CPU.

vLLM wants other versions of our packages, so it lives in an environment and a process of its own beside the replica
(`vllm_script.py`). Token ids go there, token ids and log-probabilities come back. At most `max_running` choices are
there; the others wait here, so that requests take turns as they do in `scheduler.py`.
"""

import json
import logging
import math
import os
import random
import shutil
import tempfile
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.environments import vllm_problem
from cluster.errors import ModelError
from cluster.model_directory import read_json
from services.endpoint.decoding import LOGPROB_FLOOR, TokenLogprob, Vocabulary
from services.endpoint.engines import vllm_script
from services.endpoint.engines.program import Program
from services.endpoint.engines.requests import (
    END,
    NOT_FINITE,
    Answer,
    Capacity,
    Deliver,
    Load,
    too_few_outputs,
)
from services.endpoint.errors import unavailable
from services.endpoint.schema import Sampling

logger = logging.getLogger(__name__)

SCHEMES = ("float", "compressed_tensors_w4a16")
"""What vLLM decodes; versions of other schemes keep our engines."""
_START_S = 1800.0
"""Time to load a model: of hundreds of gigabytes from a slow disk, and compiled."""
_LEAST_TOP_P = 1e-6
"""vLLM refuses 0, which means the most likely token; so does this."""
_HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class VllmSettings:
    """Where vLLM is, and what it computes with."""

    python: str
    """Of the environment that has it."""
    gpus: float = 0.0
    """A share of one, or several that hold a part of each layer; 0 for a CPU."""
    threads: int = 1
    """On a CPU."""
    start_s: float = _START_S


def decodes(directory: Path, scheme: str) -> bool:
    """Whether a directory is for vLLM; one that is not keeps our engines, which the log says."""
    found = scheme in SCHEMES and not (directory / "model.onnx").is_file()
    if not found:
        logger.info("vllm_python is set, but vLLM does not decode scheme %s: our own engine does", scheme)
    return found


class _Job:
    """A request that was admitted."""

    def __init__(self, sampling: Sampling, num_tokens: int, deliver: Deliver) -> None:
        self.sampling, self.num_tokens, self.deliver = sampling, num_tokens, deliver
        self.unfinished: list[_Choice] = []
        self.num_running = 0
        self.ended = False


@dataclass(eq=False)
class _Choice:
    """One answer to a prompt."""

    job: _Job
    prompt_ids: list[int]
    limit: int
    seed: int | None
    answer: Answer
    number: int | None = None
    """What vLLM knows it by, while it is there."""
    begun: bool = False


class VllmRunner:
    """See `Runner`. What is not referred to any more ends vLLM."""

    def __init__(
        self,
        directory: Path,
        settings: VllmSettings,
        vocabulary: Vocabulary,
        eos_ids: frozenset[int],
        capacity: Capacity,
        max_context_tokens: int,
        dtype: str,
    ) -> None:
        """Starts vLLM and waits until it has loaded the model and read a token.

        Args:
            dtype: `auto` (that of the files), `float32` or `bfloat16`.

        Raises:
            ModelError: there is no vLLM, or it cannot serve the directory; the message says why.
        """
        if (problem := vllm_problem(settings.python)) is not None:
            raise ModelError(problem)
        self._vocabulary, self._eos_ids, self._capacity = vocabulary, eos_ids, capacity
        self._lock = threading.RLock()
        self._jobs: list[_Job] = []
        self._waiting: list[_Choice] = []
        self._running: dict[int, _Choice] = {}
        self._last_number = 0
        self._stopped: str | None = None
        asked = {
            "directory": str(directory),
            "dtype": _dtype(directory, dtype),
            "vocabulary": vocabulary.size,
            "eos_ids": sorted(eos_ids),
            "max_context_tokens": max_context_tokens,
            "max_running": capacity.max_running,
            "max_cached_tokens": capacity.max_cached_tokens,
            "gpus": settings.gpus,
            "seed": random.SystemRandom().randrange(2**31),
        }
        # Isolated: else the script's own folder, where this file lies, would stand for the package of its name.
        command = [settings.python, "-I", vllm_script.__file__, json.dumps(asked)]
        scratch = tempfile.mkdtemp(prefix="raystill-vllm-")  # sockets of vLLM's processes; the program removes it too
        weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
        self._program = Program(command, environment(settings, scratch))
        answers = self._program.answers
        self._wait_until_ready(answers, settings.start_s)
        threading.Thread(target=_read, args=(answers, weakref.ref(self)), name="engine", daemon=True).start()

    def _wait_until_ready(self, answers: Any, start_s: float) -> None:
        too_late = threading.Event()

        def give_up() -> None:
            too_late.set()
            self._program.kill()

        late = threading.Timer(start_s, give_up)
        late.daemon = True
        late.start()
        said = next(answers, None)
        if said is None and too_late.is_set():
            raise ModelError(f"vLLM was not ready within {start_s:g} s; its last words are in the log")
        late.cancel()
        if said is None or "failed" in said:
            self._program.end()
            words = self._program.last_words()
            if said is not None and "root cause" not in said["failed"]:  # that it failed in another process
                words = " ".join(said["failed"].split())[:300]
            raise ModelError(f"vLLM did not load the model: {words}")
        ready = said["ready"]
        if ready["outputs"] < self._vocabulary.size:
            self._program.end()
            raise too_few_outputs(ready["outputs"], self._vocabulary.size)
        if not math.isfinite(ready["logprob"]):
            self._program.end()
            raise ModelError(NOT_FINITE)
        self._program.forget_errors()

    # --- from any thread ---

    @property
    def load(self) -> Load:
        """See `Runner.load`."""
        with self._lock:
            running = sum(job.num_running > 0 for job in self._jobs)
            return Load(running, len(self._jobs) - running, sum(job.num_tokens for job in self._jobs))

    def submit(self, prompts: list[tuple[list[int], int]], sampling: Sampling, deliver: Deliver) -> _Job:
        """See `Runner.submit`."""
        number = sampling.num_choices
        job = _Job(sampling, number * sum(len(ids) + limit for ids, limit in prompts), deliver)
        for index in range(number * len(prompts)):
            prompt_ids, limit = prompts[index // number]
            seed = None if sampling.seed is None else (sampling.seed + index) % 2**63
            answer = Answer(self._vocabulary, self._eos_ids, sampling, index, prompt_ids, limit)
            job.unfinished.append(_Choice(job, prompt_ids, limit, seed, answer))
        with self._lock:
            if self._stopped is not None:
                raise unavailable("The model's engine has stopped and is replaced.", "engine_stopped", retry_after_s=10)
            self._check_room(job.num_tokens)
            self._jobs.append(job)
            self._waiting += job.unfinished
            self._admit()
        return job

    def cancel(self, job: _Job) -> None:
        """See `Runner.cancel`."""
        with self._lock:
            self._end(job)

    def check_room(self, num_tokens: int) -> None:
        """See `Runner.check_room`."""
        with self._lock:
            self._check_room(num_tokens)

    def check(self) -> None:
        """See `Runner.check`."""
        if self._stopped is not None:
            raise ModelError(f"vLLM has stopped: {self._stopped}")

    def end(self) -> None:
        """Ends vLLM without waiting for it."""
        self._program.end()

    # --- the choices; all with the lock ---

    def _check_room(self, num_tokens: int) -> None:
        self._capacity.check_room(len(self._jobs), sum(job.num_tokens for job in self._jobs), num_tokens)

    def _admit(self) -> None:
        """Hands choices to vLLM; requests take turns, as in our scheduler."""
        while self._waiting and len(self._running) < self._capacity.max_running:
            choice = min(self._waiting, key=lambda choice: choice.job.num_running)
            self._waiting.remove(choice)
            self._last_number += 1
            choice.number = self._last_number
            choice.job.num_running += 1
            self._running[choice.number] = choice
            sampling = choice.job.sampling
            top = sampling.top_logprobs
            self._program.ask(
                {
                    "id": choice.number,
                    "token_ids": choice.prompt_ids,
                    "max_tokens": max(1, choice.limit),
                    "temperature": sampling.temperature,
                    "top_p": max(sampling.top_p, _LEAST_TOP_P),
                    "seed": choice.seed,
                    "logprobs": top or 0,  # also where nobody asks: they show logits that are no numbers
                    "prompt_logprobs": top if sampling.echo else None,
                }
            )

    def _leave(self, choice: _Choice, finished: bool = False) -> None:
        """Takes a choice from vLLM, which has `finished` it or is told."""
        if choice.number is not None:
            del self._running[choice.number]
            if not finished:
                self._program.ask({"id": choice.number, "cancel": True})
            choice.number = None
            choice.job.num_running -= 1

    def _end(self, job: _Job, error: Exception | None = None) -> None:
        """Ends a request: because it is answered, was cancelled, or failed."""
        if job.ended:
            return
        job.ended = True
        self._jobs.remove(job)
        self._waiting = [choice for choice in self._waiting if choice.job is not job]
        for choice in job.unfinished:
            self._leave(choice)
        job.deliver([END] if error is None else [error, END])
        self._admit()

    # --- from the thread that reads ---

    def _take(self, said: dict[str, Any]) -> None:
        with self._lock:
            choice = self._running.get(said["id"])
            if choice is None:  # it was cancelled meanwhile
                return
            try:
                pieces = self._pieces(choice, said)
            except Exception as error:  # raised again where the answer is awaited
                self._end(choice.job, error)
                return
            if pieces:
                choice.job.deliver(pieces)
            if choice.answer.ended:
                self._leave(choice, finished=bool(said["finished"]))
                choice.job.unfinished.remove(choice)
                if not choice.job.unfinished:
                    self._end(choice.job)
                self._admit()

    def _pieces(self, choice: _Choice, said: dict[str, Any]) -> list[Any]:
        """What vLLM's tokens add to a choice.

        Raises:
            ModelError: it refused the request, gave no numbers, or ended where nobody had asked it to.
        """
        if "refused" in said:
            raise ModelError(f"vLLM refused a request: {said['refused'][:300]}")
        pieces: list[Any] = []
        if not choice.begun:
            if not (said["token_ids"] or said["finished"] or "prompt_logprobs" in said):
                return []
            choice.begun = True
            rows = zip(choice.prompt_ids[1:], said.get("prompt_logprobs", []), strict=False)
            logprobs = [_logprob(token_id, row) for token_id, row in rows]
            scored = choice.job.sampling.echo and choice.job.sampling.top_logprobs is not None
            first = [TokenLogprob(choice.prompt_ids[0], None, ())] if scored else []
            pieces += choice.answer.begin([*first, *logprobs])
        wanted = choice.job.sampling.top_logprobs is not None
        for token_id, row in zip(said["token_ids"], said.get("logprobs", []), strict=True):
            logprob = _logprob(token_id, row)
            if not choice.answer.ended:
                piece = choice.answer.push(token_id, logprob if wanted else None)
                pieces += [] if piece is None else [piece]
        if said["finished"] and not choice.answer.ended:
            raise ModelError(f"vLLM ended an answer by itself ({said['finished']})")
        return pieces

    def _has_ended(self) -> None:
        """vLLM is gone: whoever waits is told, and nobody is taken any more."""
        reason = self._program.last_words()
        with self._lock:
            self._stopped = reason
            if self._jobs:
                logger.error("vLLM has stopped: %s", reason)
            for job in list(self._jobs):
                self._end(job, ModelError(f"vLLM has stopped: {reason}"))


def _read(answers: Any, runner: "weakref.ref[VllmRunner]") -> None:
    """Hands on what vLLM says, for as long as somebody has the runner."""
    for said in answers:
        if (found := runner()) is None:
            return
        found._take(said)
        del found
    if (found := runner()) is not None:
        found._has_ended()


def _logprob(token_id: int, row: list[Any]) -> TokenLogprob:
    """Raises `ModelError` if it is no number; minus infinity is one."""
    value, top = row
    if math.isnan(value):
        raise ModelError(NOT_FINITE)
    return TokenLogprob(
        token_id, max(value, LOGPROB_FLOOR), tuple((index, max(other, LOGPROB_FLOOR)) for index, other in top)
    )


def _dtype(directory: Path, dtype: str) -> str:
    """vLLM's own `auto` would make float32 files half as precise."""
    config = read_json(directory / "config.json")
    stored = config.get("dtype") or config.get("torch_dtype")
    if dtype != "auto":
        return dtype
    if "quantization_config" in config:  # its kernels multiply 4-bit weights with halves alone
        return stored if stored in _HALF else "bfloat16"
    return stored if stored in _HALF else "float32"


def environment(settings: VllmSettings, scratch: str) -> dict[str, str]:
    """Of vLLM's processes: without a network, but for sockets on this machine's own address."""
    return {
        **os.environ,
        "RAYSTILL_SCRATCH": scratch,
        "TMPDIR": scratch,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(settings.threads),
    }
