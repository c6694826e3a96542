"""The whole line through the command line, as a user has it: run, run again, kill and go on, serve."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests import tiny
from tests.command_line import COMMAND, COMPUTES, end, environment, free_port, last_json, rays_below, raystill
from tests.in_process_training import trained_here

pytestmark = pytest.mark.integration
CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The shipped demo, smaller: its overrides, and what the first run gave."""
    directory = tmp_path_factory.mktemp("demo")
    overrides = [
        "data.validation_fraction=0.8",
        "teacher.replicas=1",
        "train.num_workers=1",
        "teacher.train.steps=12",
        "train.steps=12",
        "evaluate.max_rows=32",
        "promote.max_quality_drop=0.05",
        "promote.max_latency_ratio=100",
        f"serve.port={free_port()}",
    ]
    first = raystill("run", CONFIGS / "demo.yaml", *overrides, "--json", cwd=directory, timeout=500)
    assert first.returncode == 0, first.stderr[-3000:]
    return directory, overrides, first


def test_demo_runs_every_stage_and_json_is_the_stored_summary(demo):
    directory, _, first = demo
    summary = last_json(first.stdout)
    assert summary == json.loads((directory / "runs/demo/summary.json").read_text())
    assert sorted(summary["stages"]) == sorted(
        ["prepare", "teacher", "train", "evaluate", "quantize", "register", "promote", "serve"]
    )
    assert all(stage["status"] == "done" and stage["seconds"] >= 0 for stage in summary["stages"].values())
    for name in ("teacher", "train"):
        figures = summary["stages"][name]
        assert {"rows", "tokens", "tokens_per_s", "teacher_calls", "teacher_wait_s", "retries", "losses"} <= set(
            figures
        )
        assert len(figures["losses"]) == 12
    assert summary["stages"]["train"]["teacher_calls"] >= 24
    assert set(summary["models"]) == {"teacher", "student", "student_int8_weight_only", "student_onnx_int8"}
    for model in summary["models"].values():
        assert {"parameters", "bytes", "bits_per_byte", "tokens_per_s"} <= set(model)
    assert 4 * summary["models"]["student"]["parameters"] <= summary["models"]["teacher"]["parameters"]
    assert summary["models"]["student_int8_weight_only"]["bytes"] < summary["models"]["student"]["bytes"]
    assert summary["models"]["student_onnx_int8"]["kl_to_teacher"] > 0
    assert summary["models"]["teacher"]["retention_percent"] == 100
    assert summary["stages"]["serve"]["answer"]


def test_demo_report_shows_every_model(demo):
    directory, _, first = demo
    stages = last_json(first.stdout)["stages"]
    report = directory / "runs/demo/report.html"
    assert stages["evaluate"]["report"] == stages["quantize"]["report"] == report.as_uri()
    html = report.read_text()
    for name in ("teacher", "student", "student int8 (torchao)", "student int8 (ONNX)"):
        assert f'<th scope="row">{name}</th>' in html
    assert "://" not in html.replace(report.parent.as_uri(), "")
    (recorded,) = (directory / "runs/demo/mlflow").rglob("report.html")
    assert recorded.read_text() == html


def test_demo_leaves_no_process_behind(demo):
    directory, _, _ = demo
    until = time.monotonic() + 120
    while rays_below(directory) and time.monotonic() < until:
        time.sleep(0.5)
    assert rays_below(directory) == []


def test_demo_again_does_nothing_but_say_so(demo, forked_raystill):
    directory, overrides, first = demo
    started = time.monotonic()
    again = forked_raystill("run", CONFIGS / "demo.yaml", *overrides, "--json", cwd=directory)
    assert again.returncode == 0
    assert "nothing to do" in again.stderr
    assert last_json(again.stdout) == last_json(first.stdout)
    assert time.monotonic() - started < 30


def test_demo_status_shows_stages_and_models(demo):
    directory, _, _ = demo
    status = raystill("status", "demo", cwd=directory, timeout=60)
    assert status.returncode == 0
    for word in ("prepare", "train", "quantize", "bits/byte", "champion"):
        assert word in status.stdout
    missing = raystill("status", "nothing", cwd=directory, timeout=60)
    assert missing.returncode == 2
    assert "no run" in missing.stderr


def test_demo_is_recorded_in_mlflow(demo):
    directory, _, _ = demo
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{directory}/runs/demo/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    assert len(found) == 1
    run = found[0]
    assert run.info.status == "FINISHED"
    assert run.data.params["distill.alpha"] == "0.1"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted(item.step for item in history) == list(range(1, 13))
    for name in ("train/divergence", "train/agreement", "train/grad_norm", "train/teacher_wait_s", "train/temperature"):
        assert name in run.data.metrics
    assert {"raystill.data", "raystill.teacher"} <= set(run.data.tags)
    version = client.get_model_version_by_alias("demo-student", "champion")
    assert version.tags["scheme"] == "int8_weight_only"
    rules = json.loads(version.tags["verdict_rules"])
    assert [rule["figure"] for rule in rules] == ["bits_per_byte", "token_s"]  # by the names that evaluation measures
    manifest = json.loads((Path(version.source.removeprefix("file://")) / "manifest.json").read_text())
    assert {"files", "scheme", "versions", "run", "data_fingerprint", "teacher_fingerprint", "measured"} <= set(
        manifest
    )
    for figures in (manifest["measured"], manifest["teacher"]):  # without it the gate would not have compared times
        assert {"processor", "threads", "system"} <= set(figures["machine"])
    assert not [name for name in manifest["files"] if name.endswith((".bin", ".pt", ".pkl"))]


def test_demo_labels_its_store_and_keeps_what_is_done(demo, forked_raystill):
    directory, overrides, first = demo
    rows = last_json(first.stdout)["stages"]["prepare"]["rows"]["train"]

    def estimate():
        found = forked_raystill("label", CONFIGS / "demo.yaml", *overrides, "--dry-run", "--json", cwd=directory)
        assert found.returncode == 0, found.stderr
        return last_json(found.stdout)

    assert (estimate()["rows"], estimate()["missing"]) == (rows, rows)
    done = raystill("label", CONFIGS / "demo.yaml", *overrides, "--json", cwd=directory, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    stages = last_json(done.stdout)["stages"]
    assert (stages["label"]["labelled"], stages["label"]["rows"]) == (rows, rows)
    assert {name: stage for name, stage in stages.items() if name != "label"} == last_json(first.stdout)["stages"]
    assert estimate()["missing"] == 0
    (directory / "runs/demo/stages/label.json").unlink()  # the other tests compare summaries


def test_demo_serve_answers_the_openai_client_until_interrupted(demo):
    directory, overrides, _ = demo
    port = free_port()
    process = subprocess.Popen(
        [*COMMAND, "serve", str(CONFIGS / "demo.yaml"), *overrides, f"serve.port={port}"],
        cwd=directory,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert "loading the champion" in process.stdout.readline()
        assert f"127.0.0.1:{port}" in process.stdout.readline()
        import openai

        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["demo-student"]
        answer = client.completions.create(model="demo-student", prompt="Return the", max_tokens=8, temperature=0)
        assert answer.usage.completion_tokens >= 1
        stream = client.chat.completions.create(
            model="demo-student", messages=[{"role": "user", "content": "hello"}], max_tokens=8, stream=True
        )
        assert list(stream)[-1].choices[0].finish_reason in ("stop", "length")
    finally:
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(120) == 0
        finally:
            end(process)


def test_demo_another_version_reigns_and_the_one_before_comes_back(demo, forked_raystill):
    directory, overrides, _ = demo
    config = (CONFIGS / "demo.yaml", *overrides)

    def call(*arguments, code=0):
        done = forked_raystill(*arguments, "--json", cwd=directory)
        assert done.returncode == code, done.stderr[-3000:]
        return last_json(done.stdout)

    before = call("versions", "demo")
    assert before == call("versions", *config)
    assert [row["scheme"] for row in before["versions"]] == ["int8_weight_only", "onnx_int8"]
    assert [row["aliases"] for row in before["versions"]] == [["champion"], []]
    assert before["versions"][0]["verdict"] == "passed"
    assert call("promote", *config, "--version", "2", "--force")["champion"]["version"] == "2"
    assert call("run", *config)["stages"]["promote"]["status"] == "done"  # a finished run leaves who reigns
    assert call("versions", "demo")["champion"]["version"] == "2"
    assert call("rollback", *config)["champion"]["version"] == "1"
    assert "no champion before version 1" in call("rollback", *config, code=1)["error"]
    assert call("rollback", *config, "--to", "2")["champion"]["version"] == "2"
    assert call("promote", *config)["stages"]["promote"]["champion"]["version"] == "1"  # asked for by name

    weights = Path(before["versions"][0]["uri"].removeprefix("file://")) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused = raystill("serve", *config, cwd=directory, timeout=120)  # an endpoint would be waited for longer
    weights.write_bytes(whole)
    assert refused.returncode == 1
    assert "its champion, version 1, cannot be served" in refused.stderr
    assert rays_below(directory) == []
    assert [row["state"] for row in call("versions", "demo")["history"]] == ["announced"] * 5


def test_demo_without_its_databases_makes_what_they_held_again(demo, forked_raystill):
    directory, overrides, _ = demo
    for name in ("champions.db", "mlflow.db"):
        (directory / "runs/demo" / name).unlink()
    again = forked_raystill("promote", CONFIGS / "demo.yaml", *overrides, cwd=directory)
    assert again.returncode == 2
    assert "needs register" in again.stderr
    for stage in ("register", "promote"):
        done = forked_raystill(stage, CONFIGS / "demo.yaml", *overrides, "--json", cwd=directory)
        assert done.returncode == 0, done.stderr[-3000:]
    assert last_json(done.stdout)["stages"]["promote"]["champion"]["epoch"] == 1


def test_demo_with_another_gate_repeats_the_promotion_only(demo, forked_raystill):
    directory, overrides, _ = demo
    more = [*overrides, "promote.max_quality_drop=0.06"]
    promoted = forked_raystill("promote", CONFIGS / "demo.yaml", *more, "--json", cwd=directory)
    assert promoted.returncode == 0, promoted.stderr[-3000:]
    summary = last_json(promoted.stdout)
    assert summary["stages"]["promote"]["status"] == "done"
    assert "serve" not in summary["stages"]  # what it asked is not known to hold for this champion

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{directory}/runs/demo/mlflow.db")
    assert len(client.search_runs([client.get_experiment_by_name("demo").experiment_id])) == 1


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A config whose training takes a while, and a place for its runs."""
    directory = tmp_path_factory.mktemp("small")
    teacher = tiny.save_model(directory / "teacher", num_hidden_layers=4, hidden_size=128, intermediate_size=256)
    config = {
        "name": "small",
        "data": {"sources": [str(tiny.corpus(directory / "in", 120))], "sequence_length": 64},
        "teacher": {"model": str(teacher), "replicas": 1, "dtype": "float32"},
        "student": {"from_teacher": {"layers": [0, 3]}},
        "evaluate": {"max_rows": 16},
        "quantize": {"schemes": ["onnx_int8"]},
        "promote": {"scheme": "onnx_int8", "max_quality_drop": 0.5},
        "train": {
            "steps": 80,
            "global_batch": 8,
            "micro_batch": 4,
            "precision": "float32",
            "checkpoint_every": 10,
            "validate_every": 1000,
        },
    }
    (directory / "small.yaml").write_text(yaml.safe_dump(config))
    return directory


def wait_until_gone(directory):
    """All that compute or write; Ray's own agents take a minute to go after a driver was killed."""
    until = time.monotonic() + 120
    while rays_below(directory, COMPUTES):
        assert time.monotonic() < until, "workers or replicas outlived the run"
        time.sleep(0.2)


def wait_for_checkpoint(storage, step, process):
    until = time.monotonic() + 240
    while not list(storage.glob(f"student/*/checkpoints/step-{step:08}/manifest.json")):
        assert process.poll() is None, "training ended before it could be broken off"
        assert time.monotonic() < until
        time.sleep(0.02)


def train_figures(storage):
    return json.loads((storage / "summary.json").read_text())["stages"]["train"]


@pytest.mark.parametrize(("number", "code", "group"), [(signal.SIGINT, 130, False), (signal.SIGTERM, 143, True)])
def test_run_interrupted_in_training_says_so_and_leaves_nothing_running(small, number, code, group):
    """Ctrl-C for the driver alone; SIGTERM for its whole process group, in which Ray's own processes are not."""
    storage = small / f"interrupted-{code}"
    process = subprocess.Popen(
        [*COMMAND, "run", "small.yaml", f"storage={storage}", f"serve.port={free_port()}", "train.steps=400"],
        cwd=small,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for_checkpoint(storage, 10, process)
        daemons = rays_below(small, ("raylet", "gcs_server"))
        assert daemons
        assert process.pid not in map(os.getpgid, daemons)  # else Ray's code may choose how the driver ends
        (os.killpg if group else os.kill)(process.pid, number)
        _, said = process.communicate(timeout=120)
    finally:
        end(process)
    assert process.returncode == code, said[-3000:]
    assert "interrupted; run the same command again to go on" in said
    assert "Traceback" not in said
    assert train_figures(storage)["status"] == "interrupted"
    wait_until_gone(small)


def test_run_killed_in_training_and_run_again_sees_the_rows_of_an_unbroken_run(small, forked_raystill):
    prepared = forked_raystill("prepare", "small.yaml", f"storage={small / 'whole'}", cwd=small)
    assert prepared.returncode == 0, prepared.stderr
    shutil.copytree(small / "whole", small / "broken")
    command = [*COMMAND, "train", "small.yaml", f"storage={small / 'broken'}"]
    process = subprocess.Popen(
        command, cwd=small, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for_checkpoint(small / "broken", 10, process)  # the first of eight: 70 steps are left
        process.kill()
        process.wait()
    finally:
        end(process)
    wait_until_gone(small)
    assert not list((small / "broken").glob("student/*/checkpoints/step-00000080/manifest.json"))

    done = raystill("train", "small.yaml", f"storage={small / 'broken'}", cwd=small, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    broken, whole = train_figures(small / "broken"), trained_here(small / "small.yaml", f"storage={small / 'whole'}")
    for key in ("rows", "tokens", "rows_checksum"):
        assert broken[key] == whole[key], key
    assert broken["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    assert len(broken["losses"]) == 80


def test_single_stages_go_on_where_train_ended(small, forked_raystill):
    calls = {"evaluate": raystill, "quantize": raystill, "register": forked_raystill, "promote": forked_raystill}
    for stage, call in calls.items():
        done = call(stage, "small.yaml", f"storage={small / 'broken'}", "--json", cwd=small)
        assert done.returncode == 0, done.stderr[-3000:]
        assert last_json(done.stdout)["stages"][stage]["status"] == "done"


def test_gate_refuses_and_exit_code_is_one(small, forked_raystill):
    refused = forked_raystill(
        "promote", "small.yaml", f"storage={small / 'broken'}", "promote.max_quality_drop=0", "--json", cwd=small
    )
    summary = json.loads((small / "broken" / "summary.json").read_text())
    models = summary["models"]
    worse = models["student_onnx_int8"]["bits_per_byte"] > models["student"]["bits_per_byte"]
    assert refused.returncode == (1 if worse else 0)
    if worse:
        assert "promote.max_quality_drop: " in refused.stderr
        assert "allowed 0 %" in refused.stderr
        assert summary["stages"]["promote"]["status"] == "failed"
