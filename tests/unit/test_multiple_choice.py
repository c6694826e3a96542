"""lm-eval through a scorer: likelihoods and scores against ones computed by hand, without any network."""

import math
import socket

import numpy as np
import pytest
import torch

from cluster.language_model import load_causal_lm
from cluster.pretrained import load_tokenizer
from jobs.config import MultipleChoiceTask
from jobs.evaluating.multiple_choice import ScorerModel, _task, ask
from jobs.evaluating.questions import Questions, _checked
from jobs.quantization.torch_scorer import TorchScorer
from tests import tiny
from tests.questions import hellaswag, mmlu

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval and its metrics warn on import


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"a connection was tried: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model") / "m", max_position_embeddings=512)


@pytest.fixture(scope="module")
def scorer(model):
    return TorchScorer(str(model), 1)


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(str(model))


@pytest.fixture(scope="module")
def by_hand(model, tokenizer):
    """`(log-likelihood, is greedy)` of given answer tokens after given question tokens, in float64."""
    plain = load_causal_lm(str(model), torch.float64)

    @torch.no_grad()
    def score(before, after):
        logprobs_TV = torch.log_softmax(plain(input_ids=torch.tensor([before + after])).logits[0], -1)
        found = [logprobs_TV[len(before) + place - 1] for place in range(len(after))]
        total = sum(float(found[place][token]) for place, token in enumerate(after))
        return total, all(int(found[place].argmax()) == token for place, token in enumerate(after))

    return score


def loglikelihoods(scorer, tokenizer, pairs, batch_tokens=200):
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    return ScorerModel(scorer, tokenizer, batch_tokens, lambda done, total: None).loglikelihood(asked)


def test_loglikelihood_is_that_of_the_answer_after_the_question(scorer, tokenizer, by_hand):
    pairs = [
        ("the cat sees", " the river."),
        ("the cat sees", " nothing"),
        ("a", " red house. the old clock remembers seven stones."),
        ("the cat sees ", "the river."),  # lm-eval moves the space into the answer
        ("", "the river"),  # after the begin token
        *[("my neighbour paints", f" {letter}") for letter in "ABCD"],  # one token each: one pass for all
    ]
    found = loglikelihoods(scorer, tokenizer, pairs)
    begin = tokenizer.bos_token_id
    for (context, answer), (value, is_greedy) in zip(pairs, found, strict=True):
        stripped = context.rstrip()
        before, whole = tokenizer.encode(stripped), tokenizer.encode(context + answer)
        assert whole[: len(before)] == before  # a clean border: nothing below is a special case
        expected = by_hand(before or [begin], whole[len(before) :])
        assert value == pytest.approx(expected[0], rel=1e-4)
        assert is_greedy == expected[1]


def test_greedy_answer_is_known_as_such(scorer, tokenizer):
    before = tokenizer.encode("the cat sees the river")
    first, second = scorer.greedy(before, 2)
    model = ScorerModel(scorer, tokenizer, 200, lambda done, total: None)
    answers = [[first], [first, second], [first, (second + 1) % tiny.VOCABULARY]]
    found = model._loglikelihood_tokens([(("", ""), before, answer) for answer in answers])
    assert [is_greedy for _, is_greedy in found] == [True, True, False]


def test_token_across_the_border_does_not_swallow_the_answer(scorer, tokenizer, by_hand):
    """`riv` + `er` is one token in the text: lm-eval's cut would leave nothing of the answer, with likelihood 1."""
    context, answer = "the cat sees the riv", "er"
    before, whole = tokenizer.encode(context), tokenizer.encode(context + answer)
    assert whole[: len(before)] != before
    assert len(whole) <= len(before)
    ((value, _),) = loglikelihoods(scorer, tokenizer, [(context, answer)])
    assert value == pytest.approx(by_hand(before, tokenizer.encode(answer))[0], rel=1e-4)
    assert value < -0.1


def test_question_that_is_too_long_loses_its_beginning(model, tokenizer, by_hand):
    short = TorchScorer(str(model), 1)
    short.max_tokens = 16
    context, answer = " ".join(tiny.sentences(10)), " the river"
    before, after = tokenizer.encode(context), tokenizer.encode(answer)
    ((value, _),) = loglikelihoods(short, tokenizer, [(context, answer)])
    kept = (before + after)[-17:]
    assert value == pytest.approx(by_hand(kept[: -len(after)], after)[0], rel=1e-4)
    with pytest.raises(ValueError, match=r"longer than the model takes \(16\)"):
        loglikelihoods(short, tokenizer, [("a", " the old clock" * 30)])


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_loglikelihood_does_not_depend_on_the_batch(scorer, tokenizer, batch_tokens):
    pairs = [(sentence, f" {answer}") for sentence in tiny.sentences(5) for answer in ("nothing", "a red house", "A")]
    calls = []
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    follow = ScorerModel(scorer, tokenizer, batch_tokens, lambda done, total: calls.append((done, total)))
    found = np.array([value for value, _ in follow.loglikelihood(asked)])
    np.testing.assert_allclose(found, [loglikelihoods(scorer, tokenizer, [pair])[0][0] for pair in pairs], rtol=1e-4)
    assert calls[-1] == (len(pairs), len(pairs))
    assert (len(calls) > 1) == (batch_tokens < 100)


# --- whole tasks ------------------------------------------------------------------------------------------------------


def questions(records, format, shots=()):
    task = MultipleChoiceTask(
        name="t", format=format, source="x.jsonl", shots=len(shots) and 1, shots_source="y.jsonl" if shots else None
    )
    return Questions(task, [_checked(item, format) for item in records], [_checked(item, format) for item in shots])


def best(texts, scores):
    """The answers by log-likelihood, and by log-likelihood per character."""
    return int(np.argmax(scores)), int(
        np.argmax([score / len(text) for text, score in zip(texts, scores, strict=True)])
    )


def likelihoods(by_hand, tokenizer, prompt, answers):
    before = tokenizer.encode(prompt)
    return [by_hand(before, tokenizer.encode(f" {answer}"))[0] for answer in answers]


def mmlu_prompt(record, answer=""):
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", record["choices"], strict=True))
    return f"{record['question'].strip()}\n{choices}\nAnswer:{answer}"


@pytest.mark.parametrize("with_shots", [False, True])
def test_mmlu_scores_are_those_of_the_prompts_written_by_hand(scorer, tokenizer, by_hand, with_shots):
    records = mmlu()
    shots = [{**records[4], "question": "Who was it?"}, {**records[7], "question": "How many?"}] if with_shots else []
    found = ask(questions(records, "mmlu", shots), scorer, tokenizer, 2000, 0, lambda done, total: None)
    right: dict[str, list[float]] = {}
    for record in records:
        topic = record["subject"].replace("_", " ")
        prompt = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
        for shot in shots:
            if shot["subject"] == record["subject"]:
                prompt += mmlu_prompt(shot, f" {'ABCD'[shot['answer']]}") + "\n\n"
        scores = likelihoods(by_hand, tokenizer, prompt + mmlu_prompt(record), "ABCD")
        right.setdefault(record["subject"], []).append(best("ABCD", scores)[0] == record["answer"])
    assert set(found) == {"", "world_history", "algebra"}
    for subject, answers in right.items():
        score, share = found[subject], np.mean(answers)
        assert (score["questions"], score["chance"]) == (len(answers), 0.25)
        assert score["acc"] == score["acc_norm"] == pytest.approx(share)  # letters are all one character long
        assert score["acc_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (len(answers) - 1)))
    every = [answer for answers in right.values() for answer in answers]
    assert found[""]["acc"] == pytest.approx(np.mean(every))
    assert found[""]["questions"] == len(records)
    assert found[""]["acc_stderr"] > 0


def test_hellaswag_scores_are_those_of_the_prompts_written_by_hand(scorer, tokenizer, by_hand):
    records = hellaswag()
    found = ask(questions(records, "hellaswag"), scorer, tokenizer, 2000, 0, lambda done, total: None)
    plain, normed = [], []
    for place, record in enumerate(records):
        second = " Every student" if place % 2 else " "
        # what stands in brackets is left out, and two spaces become one
        prompt = f"Painting: Neighbour {place} paints.{second}"
        endings = [ending.replace("  ", " ") for ending in record["endings"]]
        scores = likelihoods(by_hand, tokenizer, prompt.rstrip(), endings)
        if prompt != prompt.rstrip():  # the space at the end moves into the answers, in front of their own
            before = tokenizer.encode(prompt.rstrip())
            scores = [by_hand(before, tokenizer.encode(f"  {ending}"))[0] for ending in endings]
        by_score, by_character = best(endings, scores)
        plain.append(by_score == int(record["label"]))
        normed.append(by_character == int(record["label"]))
    assert set(found) == {""}
    assert found[""]["acc"] == pytest.approx(np.mean(plain))
    assert found[""]["acc_norm"] == pytest.approx(np.mean(normed))
    assert found[""]["questions"] == 6


@pytest.mark.parametrize("format", ["mmlu", "hellaswag"])
def test_likelihoods_are_those_of_lm_eval_s_own_model(model, scorer, tokenizer, format):
    from lm_eval.models.huggingface import HFLM

    asked = questions(mmlu() if format == "mmlu" else hellaswag(), format)
    instances = []
    for subject in asked.subjects:
        task = _task(asked, subject)
        task.build_all_requests()
        instances += task.instances
    theirs = HFLM(pretrained=str(model), device="cpu", batch_size=4, dtype="float32").loglikelihood(instances)
    ours = ScorerModel(scorer, tokenizer, 500, lambda done, total: None).loglikelihood(instances)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], rel=1e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_single_question_has_a_score_and_no_standard_error(scorer, tokenizer):
    found = ask(questions(mmlu()[:1], "mmlu"), scorer, tokenizer, 100, 0, lambda done, total: None)
    assert found[""]["acc"] in (0.0, 1.0)
    assert "acc_stderr" not in found[""]
