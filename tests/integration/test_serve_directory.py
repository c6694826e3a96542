"""`raystill serve --model DIR` as a user starts it: a real Serve application around a plain directory."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from services.endpoint.client import wait_healthy
from services.endpoint.errors import EndpointUnavailable
from tests.endpoint_models import byte_level_tokenizer, save_version
from tests.scripted_models import THINKER, THINKING_TEMPLATE, save_scripted

pytestmark = pytest.mark.integration


def healthy(url: str, served: subprocess.Popen[bytes]) -> dict[str, Any]:
    """What /healthz says, as soon as it answers while the process lives."""
    deadline = time.monotonic() + 240
    while True:
        try:
            return wait_healthy(url, timeout_s=0)
        except EndpointUnavailable:
            assert served.poll() is None, "raystill serve has ended"
            assert time.monotonic() < deadline
            time.sleep(0.5)


def test_serve_model_answers_until_it_is_interrupted(command: list[str], tmp_path: Path) -> None:
    model = save_scripted(tmp_path / "Thinker", THINKER, THINKING_TEMPLATE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["serve", "--model", str(model), "--port", str(port), "max_new_tokens=32"]
    with (tmp_path / "said").open("w") as said:
        served = subprocess.Popen([*command, *arguments], cwd=tmp_path, stdout=said, stderr=said)
    url = f"http://127.0.0.1:{port}"
    try:
        health = healthy(url, served)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as api:
            [card] = api.models.list()
            assert card.id == health["model"] == "Thinker"
            answer = api.chat.completions.with_raw_response.create(
                model="Thinker", messages=[{"role": "user", "content": "so?"}], temperature=0
            )
            message = answer.parse().choices[0].message
            assert (message.content, message.model_extra) == ("So yes", {"reasoning_content": "why not"})
            assert len(answer.headers.get_list("x-request-id")) == 1
            with pytest.raises(openai.NotFoundError, match="ask /v1/completions"):
                api.embeddings.create(model="Thinker", input="a")
        deadline = time.monotonic() + 60
        while "curl" not in (tmp_path / "said").read_text():  # a signal before is an interrupted start
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        served.send_signal(signal.SIGINT)
        code = served.wait(timeout=120)
    text = (tmp_path / "said").read_text()
    assert code == 0, text
    assert "language model, version" in text
    body = next(line for line in text.splitlines() if "curl" in line)
    assert json.loads(body.partition(" -d ")[2].strip("'"))["model"] == "Thinker"


def test_a_model_that_cannot_be_loaded_says_why(command: list[str], tmp_path: Path) -> None:
    save_version(tmp_path / "model")
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([f"~{number}" for number in range(500)])
    tokenizer.save_pretrained(tmp_path / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["serve", "--model", str(tmp_path / "model"), "--port", str(port)]
    done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "could not be loaded (" in last
    assert "register the student with the tokenizer that it was trained with" in last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve"], "neither CONFIG nor --model DIR"),
        (["serve", "--model", "missing"], "no such directory"),
        (["serve", "config.yaml", "--port", "1"], "--port goes with --model"),
        (["serve", "--model", "model", "max_tokens=3"], "max_tokens"),
    ],
)
def test_serve_mistakes_are_one_line_and_exit_code_2(
    command: list[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    save_version(tmp_path / "model")
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert message in line
