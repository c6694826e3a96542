"""Our side of vLLM, against a small program that speaks the protocol of `vllm_script.py`: runs everywhere."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.config import load, validate
from cluster.connection import ClusterConfig
from cluster.environments import vllm_problem
from cluster.errors import ConfigError, ModelError, PlacementError
from cluster.model_directory import read_json
from jobs.config import RunConfig
from jobs.progress import ConsoleProgress
from jobs.run import run
from jobs.serve import check_engine
from services.endpoint.decoding import LOGPROB_FLOOR, Vocabulary, joined
from services.endpoint.engines import vllm
from services.endpoint.engines.requests import END, Capacity
from services.endpoint.engines.vllm import VllmRunner, VllmSettings
from services.endpoint.errors import ApiError
from services.endpoint.model import ServedModel
from services.endpoint.schema import EndpointConfig, Sampling
from tests import scripted_vllm as scripted
from tests import tiny
from tests.endpoint_models import answer, byte_level_tokenizer, save_version
from tests.unit.test_endpoint_engines import Collected, wait_until

TOKENIZER = byte_level_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER)
ABC = TOKENIZER.encode("abc")
GREEDY = {"temperature": 0.0}
Start = Callable[..., VllmRunner]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "vllm_script", SimpleNamespace(__file__=scripted.__file__))
    monkeypatch.setattr(vllm, "vllm_problem", lambda python: None)


@pytest.fixture
def start(program: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    made: list[VllmRunner] = []

    def start(script: str = "ready", start_s: float = 30.0, eos: tuple[int, ...] = (), **capacity: int) -> VllmRunner:
        monkeypatch.setenv("SCRIPT", script)
        settings = VllmSettings(sys.executable, start_s=start_s)
        made.append(
            VllmRunner(tmp_path, settings, VOCABULARY, frozenset(eos), Capacity(**capacity), 200, dtype="float32")
        )
        return made[-1]

    yield start
    for runner in made:
        runner._program.end()


def ask(runner: VllmRunner, prompt: list[int], limit: int, **sampling: Any) -> Collected:
    found = Collected()
    runner.submit([(prompt, limit)], Sampling(limit, **{**GREEDY, **sampling}), found.deliver)
    return found


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


# --- answers ---------------------------------------------------------------------------------------------------------


def test_answer_is_text_with_usage_and_reason(start: Start) -> None:
    found = ask(start(), ABC, 7).wait()
    assert found.text == "abcabca"
    assert found[-2].finish_reason == "length"
    assert sum(piece.num_sampled for piece in found[:-1]) == 7
    assert not any(piece.tokens for piece in found[:-1])


def test_answer_stops_at_a_text_and_at_the_end_of_text(start: Start) -> None:
    runner = start(eos=(ABC[2],))
    stopped = ask(runner, ABC[:2], 9, stop=("ba",)).wait()
    assert (stopped.text, stopped[-2].finish_reason, stopped[-2].num_sampled) == ("a", "stop", 2)
    whole = ask(runner, ABC, 9).wait()
    assert (whole.text, whole[-2].finish_reason) == ("ab", "stop")
    assert sum(piece.num_sampled for piece in whole[:-1]) == 3, "the end of the text counts"
    assert runner.load.running == 0


def test_answer_has_the_log_probabilities_that_were_asked_for(start: Start) -> None:
    runner = start()
    tokens = [token for piece in ask(runner, ABC, 2, top_logprobs=2).wait()[:-1] for token in piece.tokens]
    assert [(token.token_id, token.logprob, token.text_offset) for token in tokens] == [
        (ABC[0], -0.5, 0),
        (ABC[1], -0.5, 1),
    ]
    assert tokens[0].top == ((ABC[0], -0.5), (ABC[0] + 1, -1.5))
    [echoed] = ask(runner, ABC, 0, top_logprobs=1, echo=True).wait()[:-2]
    assert echoed.text == "abc"
    assert [token.logprob for token in echoed.tokens] == [None, -0.5, -0.5]
    repeated = joined(ask(runner, ABC, 2, echo=True, num_choices=2).wait()[:-1])
    assert [piece.text for piece in repeated] == ["abcab"] * 2


def test_log_probability_of_minus_infinity_is_the_floor() -> None:
    assert vllm._logprob(3, [-float("inf"), [[4, -float("inf")]]]).top == ((4, LOGPROB_FLOOR),)


def test_seed_and_sampling_reach_the_program(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, asked = start(), []
    monkeypatch.setattr(runner._program, "ask", asked.append)
    runner.submit([(ABC, 5)], Sampling(5, temperature=0.7, top_p=0.0, seed=2**63 - 1, num_choices=2), list)
    assert [item["seed"] for item in asked] == [2**63 - 1, 0]
    assert (asked[0]["temperature"], asked[0]["max_tokens"], asked[0]["prompt_logprobs"]) == (0.7, 5, None)
    assert 0 < asked[0]["top_p"] < 1e-3


def test_numbers_that_are_none_end_the_answer(start: Start) -> None:
    runner = start()
    bad, good = ask(runner, [scripted.NAN], 5), ask(runner, ABC, 30)
    assert "not a finite number" in str(bad.wait()[-2])
    assert len(good.wait().text) == 30


@pytest.mark.parametrize(
    ("first", "words"),
    [(scripted.REFUSE, "refused"), (scripted.EARLY, "ended an answer"), (scripted.NOTHING, "ended an answer")],
)
def test_answer_that_the_program_does_not_give_is_an_error(start: Start, first: int, words: str) -> None:
    runner = start()
    found = ask(runner, [first, *ABC], 5).wait()
    assert isinstance(found[-2], ModelError)
    assert words in str(found[-2])
    assert ask(runner, ABC, 3).wait().text == "abc"


# --- who is admitted -------------------------------------------------------------------------------------------------


def test_cancelled_answer_makes_room_for_who_waits(start: Start) -> None:
    runner = start(max_running=1)
    hangs, waits = Collected(), ask(runner, ABC, 0)
    waits.wait()
    job = runner.submit([([scripted.HANG], 50)], Sampling(50, **GREEDY), hangs.deliver)
    wait_until(lambda: hangs)
    waits = ask(runner, ABC, 3)
    time.sleep(0.1)
    assert not waits
    assert (runner.load.running, runner.load.waiting) == (1, 1)
    runner.cancel(job)
    runner.cancel(job)
    assert hangs.wait()[-1] is END
    assert waits.wait().text == "abc"
    assert runner.load.admitted_tokens == 0


def test_requests_take_turns_when_one_asks_for_many(start: Start) -> None:
    runner, many = start(max_running=2), Collected()
    runner.submit([(ABC, 20)], Sampling(20, **GREEDY, num_choices=12), many.deliver)
    ask(runner, ABC, 4).wait()
    assert len([item for item in many if item is not END and item.finish_reason]) < 6
    many.wait()


def test_room_is_bounded_by_requests_and_by_tokens(start: Start) -> None:
    runner = start(max_running=1, max_waiting=1, max_admitted_tokens=60)
    held = [ask(runner, [scripted.HANG], 20) for _ in range(2)]
    with pytest.raises(ApiError) as full:
        runner.check_room(0)
    assert (full.value.status, full.value.code) == (503, "server_overloaded")
    runner.cancel(runner._jobs[1])
    with pytest.raises(ApiError, match="overloaded"):
        ask(runner, ABC, 50)
    held.append(ask(runner, ABC, 10))
    assert runner.load.waiting == 1


# --- ends ------------------------------------------------------------------------------------------------------------


def test_program_that_dies_ends_all_answers_and_takes_no_more(start: Start) -> None:
    runner = start(max_running=2)
    runner.check()
    running, waiting = ask(runner, [scripted.HANG], 50), ask(runner, ABC, 2000)
    ask(runner, [scripted.DIE], 50)
    runner.cancel(runner._jobs[0])
    error = waiting.wait()[-2]
    assert isinstance(error, ModelError)
    assert "the device is gone (killed by signal 9)" in str(error)
    assert running.wait()[-1] is END
    with pytest.raises(ApiError) as refused:
        ask(runner, ABC, 3)
    assert (refused.value.status, refused.value.code) == (503, "engine_stopped")
    with pytest.raises(ModelError, match="vLLM has stopped"):
        runner.check()


def test_program_ends_with_who_started_it(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runner = VllmRunner(tmp_path, VllmSettings(sys.executable), VOCABULARY, frozenset(), Capacity(), 200, "float32")
    ask(runner, ABC, 3).wait()
    pid = runner._program.pid
    assert not ended(pid)
    del runner
    gc.collect()
    wait_until(lambda: ended(pid))


def test_program_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom services.endpoint.engines.program import Program\n"
        f"p = Program([sys.executable, {scripted.__file__!r}, '{{\"vocabulary\": 9}}'], {{}})\n"
        "next(p.answers)\nprint(p.pid, flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not ended(pid)
        os.kill(parent.pid, signal.SIGKILL)
    wait_until(lambda: ended(pid))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("fails", "vLLM did not load the model: RuntimeError: out of memory"),
        ("few", "outputs, its tokenizer 275 tokens"),
        ("nan", "not a finite number"),
        ("never", "not ready within 0.5 s"),
    ],
)
def test_program_that_does_not_start_says_why(start: Start, script: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        start(script, start_s=0.5 if script == "never" else 30)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- which model -----------------------------------------------------------------------------------------------------


def test_model_in_safetensors_is_decoded_by_vllm_and_an_onnx_graph_is_not(program: None, tmp_path: Path) -> None:
    save_version(tmp_path)
    settings = VllmSettings(sys.executable)
    model = ServedModel(tmp_path, 100, 50, vllm=settings)
    [piece] = answer(model, model.encode("abc"), Sampling(4, **GREEDY))
    assert piece.text == "abca", "as the program answers, not the model"
    model.check()
    assert vllm.decodes(tmp_path, "compressed_tensors_w4a16")
    assert not vllm.decodes(tmp_path, "int8_weight_only")
    (tmp_path / "model.onnx").touch()
    assert not vllm.decodes(tmp_path, "float")


@pytest.mark.parametrize(
    ("config", "asked", "expected"),
    [
        ({"dtype": "float32"}, "auto", "float32"),
        ({}, "auto", "float32"),
        ({"torch_dtype": "float16"}, "auto", "float16"),
        ({"dtype": "bfloat16"}, "auto", "bfloat16"),
        ({"dtype": "bfloat16"}, "float32", "float32"),
        ({"dtype": "float32", "quantization_config": {}}, "auto", "bfloat16"),
    ],
)
def test_dtype_is_that_of_the_files(tmp_path: Path, config: Any, asked: str, expected: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config or {"model_type": "x"}))
    assert read_json(tmp_path / "config.json")
    assert vllm._dtype(tmp_path, asked) == expected


@pytest.mark.parametrize(("python", "words"), [("/nowhere/python", "is no program"), (sys.executable, "has no vLLM")])
def test_python_without_vllm_is_refused_with_the_line_that_installs_it(tmp_path: Path, python: str, words: str) -> None:
    save_version(tmp_path)
    problem = vllm_problem(python)
    assert problem is not None
    assert words in problem
    assert "pip install vllm" in problem
    with pytest.raises(ModelError, match=words):
        ServedModel(tmp_path, 100, 50, vllm=VllmSettings(python))


def test_run_looks_for_vllm_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = tmp_path / "storage"
    written = tiny.run_config("small", tmp_path, storage=str(storage), serve={"vllm_python": "/nowhere/python"})
    with pytest.raises(ConfigError, match="vllm_python=/nowhere/python is no program"):
        run(load(RunConfig, written), ConsoleProgress(quiet=True))
    assert not list(storage.rglob("*"))


def test_gpus_that_are_not_there_are_refused_before_anything_waits_for_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("jobs.serve.vllm_problem", lambda python: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for replicas, gpus in ((1, 1.0), (2, 0.5)):
        check_engine(EndpointConfig(vllm_python="python", gpus_per_replica=gpus, replicas=replicas), ClusterConfig())
    many = EndpointConfig(vllm_python="python", gpus_per_replica=1, replicas=2)
    with pytest.raises(PlacementError, match=r"asked for 2 GPUs .* this machine has 1: lower gpus_per_replica"):
        check_engine(many, ClusterConfig())
    check_engine(many, ClusterConfig(address="10.0.0.1:6379"))  # which may have them, or get them


def test_config_says_where_vllm_is_and_on_how_many_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert EndpointConfig(vllm_python="env/bin/python").vllm_python == str(tmp_path / "env/bin/python")
    assert EndpointConfig(vllm_python="python3").vllm_python == "python3"
    for fields, words in (
        ({"gpus_per_replica": 1}, "vllm_python is not set"),
        ({"gpus_per_replica": 1.5, "vllm_python": "x"}, "whole number"),
    ):
        with pytest.raises(ConfigError, match=words):
            validate(EndpointConfig, fields, "of the endpoint")


def test_program_of_another_machine_is_refused_with_the_line_that_installs_it(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_bytes(b"\x7fELF of another processor")
    python.chmod(0o755)
    problem = vllm_problem(str(python))
    assert problem is not None
    assert problem.startswith(f"vllm_python={python} cannot be run (")
    assert "pip install vllm" in problem
