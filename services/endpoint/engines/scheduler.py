"""Many requests share one engine: who reads how many tokens in the next pass, and what its logits become.

Every pass takes one token of each choice that is being written and a part of the prompts that are still being read
(iteration-level scheduling, Orca, Yu et al., OSDI 2022; prompts in chunks beside the decoding, Sarathi-Serve, Agrawal
et al., OSDI 2024). A choice that ends or is cancelled frees its place before the next pass. A choice is admitted when
the engine has room for its prompt and its longest answer, so that what was admitted can always be finished. Choices of
one prompt read it once: the others copy the first one's keys and values.

The thread lives while there is work, and some seconds longer; an engine that nobody asks holds none.
"""

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cluster.errors import ModelError
from services.endpoint.decoding import Choosing, TokenLogprob, Vocabulary, choose_tokens, token_logprobs
from services.endpoint.engines.base import PROMPT_CHUNK, Engine, Place, Read
from services.endpoint.engines.requests import END, NOT_FINITE, Answer, Capacity, Deliver, Load
from services.endpoint.schema import Sampling

_PROMPT_TOKENS = 256
"""Tokens of prompts read in one pass; bounds the [N, V] logits of an echoed prompt and the wait for cancel."""
_PROMPT_TOKENS_BESIDE_DECODING = 64
"""The same while answers are being written, which wait for the pass as a whole. Both are rounded up to whole chunks."""
_LINGER_S = 5.0


class Job:
    """A request that was admitted."""

    def __init__(self, sampling: Sampling, num_tokens: int, deliver: Deliver) -> None:
        self.sampling, self.num_tokens, self.deliver = sampling, num_tokens, deliver
        self.cancelled = False
        self.ended = False
        self.unfinished: list[_Choice] = []
        self.num_running = 0
        self.items: list[Any] = []
        """What this pass added and was not delivered yet."""


@dataclass(eq=False)
class _Prompt:
    """One prompt of a request, shared by its choices."""

    token_ids: list[int]
    reader: "_Choice | None" = None
    """Who is reading it for all."""
    logits_V: Tensor | None = None
    """Those behind its last token, once it was read."""
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(eq=False)
class _Choice:
    """One answer to a prompt."""

    job: Job
    prompt: _Prompt
    limit: int
    """Tokens to sample at most."""
    rule: Choosing
    answer: Answer
    place: Place | None = None
    next_id: int | None = None
    """The token that was chosen and not read yet."""


class Scheduler:
    """The runner of the engines in this process (see `Runner`)."""

    def __init__(self, engine: Engine, vocabulary: Vocabulary, eos_ids: frozenset[int], capacity: Capacity) -> None:
        self._engine, self._vocabulary, self._eos_ids, self._capacity = engine, vocabulary, eos_ids, capacity
        self._condition = threading.Condition()
        self._jobs: list[Job] = []
        self._waiting: list[_Choice] = []
        self._running: list[_Choice] = []
        self._outbox: list[Job] = []
        self._thread: threading.Thread | None = None

    @property
    def load(self) -> Load:
        with self._condition:
            running = sum(job.num_running > 0 for job in self._jobs)
            return Load(running, len(self._jobs) - running, sum(job.num_tokens for job in self._jobs))

    def submit(self, prompts: list[tuple[list[int], int]], sampling: Sampling, deliver: Deliver) -> Job:
        """See `Runner.submit`."""
        choices = sampling.num_choices
        job = Job(sampling, choices * sum(len(ids) + limit for ids, limit in prompts), deliver)
        for number, (token_ids, limit) in enumerate(prompts):
            prompt = _Prompt(token_ids)
            job.unfinished += [self._choice(job, prompt, number * choices + offset, limit) for offset in range(choices)]
        with self._condition:
            self._check_room(job.num_tokens)
            self._jobs.append(job)
            self._waiting += job.unfinished
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
                self._thread.start()
            self._condition.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Ends a request before the next pass. Harmless when it is done."""
        with self._condition:
            job.cancelled = True
            self._condition.notify()

    def check_room(self, num_tokens: int) -> None:
        """See `Runner.check_room`."""
        with self._condition:
            self._check_room(num_tokens)

    def check(self) -> None:
        """An engine in this process lives as long as it does."""

    def _check_room(self, num_tokens: int) -> None:
        self._capacity.check_room(len(self._jobs), sum(job.num_tokens for job in self._jobs), num_tokens)

    def _choice(self, job: Job, prompt: _Prompt, index: int, limit: int) -> _Choice:
        sampling = job.sampling
        generator = torch.Generator()
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed((sampling.seed + index) % 2**63)
        rule = Choosing(sampling.temperature, sampling.top_p, generator)
        answer = Answer(self._vocabulary, self._eos_ids, sampling, index, prompt.token_ids, limit)
        return _Choice(job, prompt, limit, rule, answer)

    # --- the thread ---

    def _serve(self) -> None:
        while self._wait_for_work():
            try:
                self._step()
            except Exception as error:  # raised again where the answers are awaited
                for job in {choice.job for choice in self._running} or set(self._jobs):
                    self._end(job, error)
            outbox, self._outbox = self._outbox, []
            for job in outbox:
                items, job.items = job.items, []
                job.deliver(items)

    def _wait_for_work(self) -> bool:
        deadline = time.monotonic() + _LINGER_S
        with self._condition:
            while not self._jobs:
                left = deadline - time.monotonic()
                if left <= 0:
                    self._thread = None
                    return False
                self._condition.wait(left)
        return True

    def _step(self) -> None:
        """One pass: ends what was cancelled, admits what fits, reads, and chooses tokens."""
        with self._condition:
            cancelled = [job for job in self._jobs if job.cancelled]
        for job in cancelled:
            self._end(job)
        writers = self._admit()
        rows = [choice.prompt.logits_V[None] for choice in writers if choice.prompt.logits_V is not None]
        reads, readers = self._plan()
        if reads:
            # Rows behind the tokenizer's are padding: never sampled, and without a share of the probability.
            logits_NV = self._engine.forward(reads)[:, : self._vocabulary.size]
            finite_N = _finite(logits_NV)
            first = 0
            for read, choice in zip(reads, readers, strict=True):
                last = first + (len(read.token_ids) if read.all_logits else 1)
                if not all(finite_N[first:last]):
                    self._end(choice.job, ModelError(NOT_FINITE))
                elif not choice.job.ended and self._has_read(choice, read, logits_NV[first:last]):
                    writers.append(choice)
                    rows.append(logits_NV[last - 1 : last])
                first = last
        if writers:
            self._write(writers, torch.cat(rows))

    def _admit(self) -> list[_Choice]:
        """Gives places to choices that wait; returns those whose prompt was read already."""
        begun = []
        while len(self._running) < self._capacity.max_running:
            with self._condition:
                # Requests take turns; the choices of one that asks for many do not keep the others out.
                ready = [choice for choice in self._waiting if choice.prompt.reader is None]
                choice = min(ready, key=lambda choice: choice.job.num_running, default=None)
                place = self._engine.reserve(len(choice.prompt.token_ids) + choice.limit) if choice else None
                if choice is None or place is None:
                    break
                self._waiting.remove(choice)
                choice.job.num_running += 1
            choice.place = place
            source = next((other.place for other in self._running if other.prompt is choice.prompt), None)
            self._running.append(choice)
            number = len(choice.prompt.token_ids)
            if source is None or choice.prompt.logits_V is None or not self._engine.fork(place, source, number):
                choice.prompt.reader, choice.prompt.logits_V, choice.prompt.logprobs = choice, None, []
            elif self._begin(choice):
                begun.append(choice)
        return begun

    def _plan(self) -> tuple[list[Read], list[_Choice]]:
        """What is read in the next pass, and by whom: every choice's last token, and as much of prompts as allowed."""
        reads: list[Read] = []
        readers: list[_Choice] = []
        for choice in self._running:
            if choice.next_id is not None and choice.place is not None:
                reads.append(Read(choice.place, [choice.next_id]))
                readers.append(choice)
        left = _PROMPT_TOKENS_BESIDE_DECODING if reads else _PROMPT_TOKENS
        for choice in self._running:
            if left and choice.prompt.reader is choice and choice.place is not None:
                done = choice.place.length
                # Whole chunks, so that it does not show in the logits who else was reading.
                token_ids = choice.prompt.token_ids[done : done + -(-left // PROMPT_CHUNK) * PROMPT_CHUNK]
                reads.append(Read(choice.place, token_ids, all_logits=_scores_prompt(choice.job.sampling)))
                readers.append(choice)
                left = max(0, left - len(token_ids))
        return reads, readers

    # --- one choice ---

    def _has_read(self, choice: _Choice, read: Read, logits_NV: Tensor) -> bool:
        """Takes the logits behind the tokens that were read; returns whether a token is to be chosen from the last."""
        choice.next_id = None
        prompt = choice.prompt
        if prompt.reader is not choice:
            return True
        if read.all_logits:
            start = read.place.length - len(read.token_ids)
            following = prompt.token_ids[start + 1 : read.place.length + 1]
            if start == 0:
                prompt.logprobs = [TokenLogprob(prompt.token_ids[0], None, ())]
            top = choice.job.sampling.top_logprobs or 0
            prompt.logprobs += token_logprobs(logits_NV[: len(following)], following, top)
        if read.place.length < len(prompt.token_ids):
            return False
        prompt.reader, prompt.logits_V = None, logits_NV[-1].clone()
        return self._begin(choice)

    def _begin(self, choice: _Choice) -> bool:
        """The prompt was read. Returns whether there is a token to be chosen."""
        for piece in choice.answer.begin(choice.prompt.logprobs):
            self._add(choice.job, piece)
        if choice.answer.ended:
            self._finish(choice)
        return not choice.answer.ended

    def _write(self, choices: list[_Choice], logits_NV: Tensor) -> None:
        """Chooses a token for each of the choices and adds it to their texts."""
        token_ids = choose_tokens(logits_NV, [choice.rule for choice in choices])
        tops = [choice.job.sampling.top_logprobs for choice in choices]
        scored = [row for row, top in enumerate(tops) if top is not None]
        logprobs: dict[int, TokenLogprob] = {}
        if scored:
            found = token_logprobs(
                logits_NV[scored], [token_ids[row] for row in scored], max(tops[row] or 0 for row in scored)
            )
            for row, item in zip(scored, found, strict=True):
                logprobs[row] = TokenLogprob(item.token_id, item.logprob, item.top[: tops[row]])
        for row, (choice, token_id) in enumerate(zip(choices, token_ids, strict=True)):
            if not choice.job.ended:
                self._push(choice, token_id, logprobs.get(row))

    def _push(self, choice: _Choice, token_id: int, logprob: TokenLogprob | None) -> None:
        piece = choice.answer.push(token_id, logprob)
        if piece is not None:
            self._add(choice.job, piece)
        choice.next_id = None if choice.answer.ended else token_id
        if choice.answer.ended:
            self._finish(choice)

    def _finish(self, choice: _Choice) -> None:
        self._leave(choice)
        choice.job.unfinished.remove(choice)
        if not choice.job.unfinished:
            self._end(choice.job)

    # --- leaving ---

    def _leave(self, choice: _Choice) -> None:
        """Frees a choice's place."""
        if choice.place is not None:
            self._engine.release(choice.place)
            self._running.remove(choice)
            choice.place = None
            choice.job.num_running -= 1
        if choice.prompt.reader is choice:
            choice.prompt.reader = None

    def _end(self, job: Job, error: Exception | None = None) -> None:
        """Ends a request: because it is answered, was cancelled, or failed."""
        if job.ended:
            return
        job.ended = True
        with self._condition:
            self._jobs.remove(job)
            self._waiting = [choice for choice in self._waiting if choice.job is not job]
        for choice in job.unfinished:
            self._leave(choice)
        if error is not None:
            self._add(job, error)
        self._add(job, END)

    def _add(self, job: Job, item: Any) -> None:
        if not job.items:
            self._outbox.append(job)
        job.items.append(item)


def _scores_prompt(sampling: Sampling) -> bool:
    return sampling.echo and sampling.top_logprobs is not None


def _finite(logits_NV: Tensor) -> list[bool]:
    # What is no number is both. aminmax would take 20 times as long.
    least_N, most_N = logits_NV.amin(-1), logits_NV.amax(-1)
    return (torch.isfinite(least_N) & torch.isfinite(most_N)).tolist()
