"""Multiple choice by log-likelihood, asked and counted by EleutherAI's lm-eval; a scorer gives the likelihoods.

Wording, metrics and their aggregation are the task definitions inside the lm-eval package; only the questions come from
elsewhere, so nothing is fetched. `acc` takes the answer of the highest log-likelihood, `acc_norm` that of the highest
per character of the answer.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from datasets import Dataset, DatasetDict, disable_progress_bars
from lm_eval.api.group import Group
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.tasks._yaml_loader import load_yaml  # not public: lm-eval is pinned

from jobs.evaluating.quality import chunk_rows
from jobs.evaluating.questions import Questions, subject_of
from jobs.evaluating.scorers import Scorer
from jobs.training.data import MicroBatch

METRICS = ("acc", "acc_norm")
_DEFINITIONS = {"mmlu": "mmlu/default/_default_template_yaml", "hellaswag": "hellaswag/hellaswag.yaml"}
_UNNAMED = "all"

Score = dict[str, float]
Encoded = tuple[tuple[str, str], list[int], list[int]]


def ask(
    questions: Questions,
    scorer: Scorer,
    tokenizer: Any,
    batch_tokens: int,
    seed: int,
    report: Callable[[int, int], None],
) -> dict[str, Score]:
    """Scores of one model on one task: over all questions under `""`, then by subject where there are subjects.

    Args:
        batch_tokens: tokens of questions that go through the model at once, unless one has more.
        seed: of the choice of answered questions, where the task draws them.
        report: gets the number of requests answered so far, and of all.

    Returns:
        By subject, `acc` and `acc_norm`, each with its standard error (`_stderr`; absent for a single question), their
        number of `questions`, and `chance`: the accuracy of guessing.
    """
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bars()
    group = Group.from_config(
        {"group": questions.task.name, "aggregate_metric_list": [{"metric": name} for name in METRICS]}
    )
    tasks = {subject: _task(questions, subject) for subject in questions.subjects}
    for task in tasks.values():
        task.set_fewshot_seed(seed)
        group.add(task)
    found = evaluate(
        ScorerModel(scorer, tokenizer, batch_tokens, report),
        {"tasks": {task.task_name: task for task in tasks.values()}, "groups": {group.name: group}},
        bootstrap_iters=1,  # means have a standard error in closed form
        log_samples=False,
    )
    assert found is not None
    results = found["results"]
    out = {"": _score(results[group.name], questions.documents)}
    for subject, task in tasks.items():
        if subject:
            out[subject] = _score(results[task.task_name], _of(questions.documents, subject))
    return out


def _task(questions: Questions, subject: str) -> ConfigurableTask:
    """One subject as lm-eval's own task, over our questions."""
    task = questions.task
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / _DEFINITIONS[task.format])
    split = config.get("test_split") or config["validation_split"]
    shots_split = config.get("fewshot_split") or config["training_split"]
    parts = {split: _of(questions.documents, subject)}
    for name in ("tag", "dataset_path", "dataset_name", "training_split", "fewshot_split"):
        config.pop(name, None)
    if task.shots:
        parts[shots_split] = _of(questions.shots, subject)
        config["fewshot_split"] = shots_split
    if subject:  # as each of lm-eval's files for a subject of MMLU begins
        topic = subject.replace("_", " ")
        config["description"] = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS]
    return ConfigurableTask(
        config={
            **config,
            "task": f"{task.name}_{subject or _UNNAMED}",
            "custom_dataset": lambda **_: DatasetDict(
                {name: Dataset.from_list(documents) for name, documents in parts.items()}
            ),
            "metric_list": metrics,
            "num_fewshot": task.shots,
        }
    )


def _of(documents: list[dict[str, Any]], subject: str) -> list[dict[str, Any]]:
    return [document for document in documents if subject_of(document) == subject]


def _score(found: dict[str, Any], documents: list[dict[str, Any]]) -> Score:
    score: Score = {"questions": len(documents)}
    for metric in METRICS:
        score[metric] = float(found[f"{metric},none"])
        if isinstance(error := found.get(f"{metric}_stderr,none"), float):
            score[f"{metric}_stderr"] = error
    counts = [len(document.get("choices") or document["endings"]) for document in documents]
    score["chance"] = float(np.mean([1 / count for count in counts]))
    return score


class ScorerModel(TemplateLM):
    """A scorer as lm-eval sees a model.

    Args:
        tokenizer: of the model; what it puts before every text (a begin token) it puts before a question too.
    """

    def __init__(self, scorer: Scorer, tokenizer: Any, batch_tokens: int, report: Callable[[int, int], None]) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._scorer, self._batch_tokens, self._report = scorer, batch_tokens, report

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        own = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **own))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval does it: both are tokenised as one text, and cut where the tokens of the context alone end.

        Where a token spans that border the cut would lose or double characters, up to the whole answer; there the
        answer's text is tokenised by itself, so that every answer to a question follows the same context.
        """
        before, after = super()._encode_pair(context, continuation)
        spaces = len(context) - len(context.rstrip())
        moved = context[len(context) - spaces :] + continuation
        if after and self.tok_encode(context[: len(context) - spaces] + moved)[: len(before)] == before:
            return before, after
        return before, self.tok_encode(moved, add_special_tokens=False)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Encoded], **kwargs: Any) -> list[tuple[float, bool]]:
        """Log-likelihood of each answer's tokens, and whether all of them are the most likely ones.

        Of a question that is longer than the model takes, the beginning is left out. Answers of one token to the same
        question share a pass through the model.
        """
        inputs: dict[tuple[tuple[int, ...], int], list[int]] = defaultdict(list)
        limit = self._scorer.max_tokens
        for number, (_, before, after) in enumerate(requests):
            token_ids = (before + after)[:-1]
            token_ids = token_ids[-limit:] if limit is not None else token_ids
            if len(after) > len(token_ids):
                raise ValueError(f"an answer of {len(after)} tokens is longer than the model takes ({limit})")
            inputs[tuple(token_ids), len(after)].append(number)
        out: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        done = 0
        for batch in _batches(sorted(inputs, key=lambda item: -len(item[0])), self._batch_tokens):
            for item, logprobs_nV in zip(batch, self._logprobs(batch), strict=True):
                for number in inputs[item]:
                    targets_n1 = torch.tensor(requests[number][2], device=logprobs_nV.device)[:, None]
                    chosen_n1 = logprobs_nV.gather(-1, targets_n1)
                    is_greedy = bool((logprobs_nV.argmax(-1, keepdim=True) == targets_n1).all())
                    out[number] = (float(chosen_n1.sum(dtype=torch.float64)), is_greedy)
                    done += 1
            self._report(done, len(requests))
        return out

    def _logprobs(self, batch: list[tuple[tuple[int, ...], int]]) -> Iterator[torch.Tensor]:
        """For each input, log-probabilities [n, V] of what follows its last n tokens."""
        lengths = np.array([len(token_ids) for token_ids, _ in batch], np.int32)
        ends = np.cumsum(lengths)
        positions = np.concatenate([np.arange(end - count, end) for end, (_, count) in zip(ends, batch, strict=True)])
        together = MicroBatch(
            step=0,
            last=True,
            token_ids=np.concatenate([np.array(token_ids, np.int32) for token_ids, _ in batch]),
            sequence_lengths=lengths,
            positions=positions.astype(np.int32),
            targets=np.zeros(len(positions), np.int64),
            row_ids=(),
            row_lengths=lengths,
            num_bytes=0,
        )
        waiting = torch.empty(0)
        chunks = self._scorer.logit_chunks(together, chunk_rows([self._scorer.vocab_size]))
        for _, count in batch:
            while len(waiting) < count:
                found = torch.log_softmax(next(chunks).float(), -1)
                waiting = torch.cat([waiting, found]) if len(waiting) else found
            yield waiting[:count]
            waiting = waiting[count:]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("held-out text is measured by jobs.evaluating.quality; lm-eval asks multiple choice")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("a scorer gives likelihoods; lm-eval asks multiple choice")


def _batches(items: list[tuple[tuple[int, ...], int]], tokens: int) -> Iterator[list[tuple[tuple[int, ...], int]]]:
    batch: list[tuple[tuple[int, ...], int]] = []
    held = 0
    for item in items:
        if batch and held + len(item[0]) > tokens:
            yield batch
            batch, held = [], 0
        batch.append(item)
        held += len(item[0])
    if batch:
        yield batch
