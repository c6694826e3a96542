"""MLflow on SQLite as in the embedded default, and a server that is dead: training must not notice."""

import logging
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cluster.errors import ModelError, RegistryFailed
from cluster.pretrained import locate
from cluster.tracking import Tracker, refused_write, register_version, set_alias, tracking_uri, version_uri

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/deep/mlflow.db"


@pytest.fixture
def dead():
    """The address of a server that is not there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return f"http://me:hunter2@127.0.0.1:{port}"


def tracker_of(uri, tmp_path, run_id=None):
    return Tracker(uri, tmp_path.name, "run", (tmp_path / "artifacts").as_uri(), run_id)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_tracker_writes_params_metrics_text_tags_and_status(uri, tmp_path):
    tracker = tracker_of(uri, tmp_path)
    tracker.params({"train.steps": 20, "name": "x" * 600})
    tracker.tags({"raystill.data": "abc"})
    tracker.text("a: 1\n", "config.yaml")
    for step in range(5):
        tracker.metrics({"train/loss": 3.0 - step, "train/step_s": 0.5}, step)
    tracker.close("FINISHED")
    client = MlflowClient(uri)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params == {"train.steps": "20", "name": "x" * 500}
    assert run.data.tags["raystill.data"] == "abc"
    history = client.get_metric_history(tracker.run_id, "train/loss")
    assert [(item.step, item.value) for item in sorted(history, key=lambda item: item.step)] == [
        (step, 3.0 - step) for step in range(5)
    ]
    assert next(tmp_path.rglob("config.yaml")).read_text() == "a: 1\n"
    assert tracker.dropped == 0


def test_tracker_more_than_a_batch_takes_is_written_whole(uri, tmp_path):
    tracker = tracker_of(uri, tmp_path)
    tracker.params({f"p{number}": number for number in range(250)})
    for step in range(700):
        tracker.metrics({"a": step, "b": -step}, step)
    tracker.close()
    client = MlflowClient(uri)
    assert len(client.get_run(tracker.run_id).data.params) == 250
    assert len(client.get_metric_history(tracker.run_id, "b")) == 700
    assert tracker.dropped == 0


def test_tracker_starts_a_run_if_the_store_does_not_know_the_one_it_is_given(uri, tmp_path):
    tracker = tracker_of(uri, tmp_path, "0" * 32)
    tracker.params({"train.steps": 20})
    assert tracker.wait_started() not in (None, "0" * 32)
    tracker.close()
    assert MlflowClient(uri).get_run(tracker.run_id).data.params == {"train.steps": "20"}
    assert tracker.dropped == 0


def test_tracker_keeps_the_parameters_of_a_run_that_goes_on(uri, tmp_path):
    first = tracker_of(uri, tmp_path)
    first.params({"train.steps": 20})
    first.close("FAILED")
    second = tracker_of(uri, tmp_path, first.run_id)
    second.params({"train.steps": 30})
    second.close()
    assert MlflowClient(uri).get_run(first.run_id).data.params == {"train.steps": "20"}
    assert second.dropped == 0


def test_two_threads_may_ask_for_mlflow_first(tmp_path):
    """In a fresh process: a tracker that goes on in a run, and a registration right behind it."""
    code = f"""
from cluster.tracking import Tracker, register_version
uri = "sqlite:///{tmp_path}/mlflow.db"
tracker = Tracker(uri, "e", "run", "file://{tmp_path}/artifacts", "0" * 32)
assert register_version(uri, "m", "file:///1", "1" * 64, None, {{}}) == "1"
assert tracker.wait_started() is not None
tracker.close()
assert tracker.dropped == 0
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def test_tracker_goes_on_in_the_run_it_is_given(uri, tmp_path):
    first = tracker_of(uri, tmp_path)
    first.metrics({"loss": 2.0}, 1)
    first.close("FAILED")
    assert MlflowClient(uri).get_run(first.run_id).info.status == "FAILED"
    second = tracker_of(uri, tmp_path, first.run_id)
    second.metrics({"loss": 1.0}, 2)
    second.close()
    assert second.run_id == first.run_id
    run = MlflowClient(uri).get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert [item.step for item in MlflowClient(uri).get_metric_history(first.run_id, "loss")] == [1, 2]


def test_tracker_param_that_changed_costs_no_other_record_and_no_status(uri, tmp_path):
    first = tracker_of(uri, tmp_path)
    first.params({"train.num_workers": 1})
    first.close("FAILED")
    second = tracker_of(uri, tmp_path, first.run_id)  # continued with more workers, which a run may be
    second.params({"train.num_workers": 2})
    second.tags({"a": "b"})
    second.metrics({"loss": 1.0}, 2)
    second.text("x", "x.txt")
    second.close()
    run = MlflowClient(uri).get_run(first.run_id)
    assert run.data.params == {"train.num_workers": "1"}
    assert run.data.metrics == {"loss": 1.0}
    assert run.data.tags["a"] == "b"
    assert run.info.status == "FINISHED"
    assert list(tmp_path.rglob("x.txt"))


def test_tracker_bad_record_costs_a_warning_and_not_the_others(uri, tmp_path, caplog):
    tracker = tracker_of(uri, tmp_path)
    assert tracker.wait_started() is not None
    tracker.metrics({"not a / valid % name \n": 1.0}, 0)
    deadline = time.monotonic() + 20
    while tracker.dropped == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert tracker.dropped == 1
    tracker.metrics({"loss": 1.0}, 1)
    with caplog.at_level(logging.WARNING):
        tracker.close()
    assert len(MlflowClient(uri).get_metric_history(tracker.run_id, "loss")) == 1
    assert "1 records were not written" in caplog.text


# --- a server that is dead --------------------------------------------------------------------------------------------


def test_tracker_of_a_dead_server_never_raises_nor_blocks(dead, tmp_path, caplog):
    tracker = tracker_of(dead, tmp_path)
    started = time.monotonic()
    for step in range(12_000):  # more than the queue holds
        tracker.metrics({"loss": 1.0}, step)
        tracker.params({"a": 1})
        tracker.tags({"a": "b"})
        tracker.text("x", "x.txt")
    assert time.monotonic() - started < 60  # a call that waited for the server would take hours for all of them
    assert tracker.wait_started(timeout_s=0.1) is None
    started = time.monotonic()
    tracker.close(timeout_s=2.0)
    assert time.monotonic() - started < 2.0 + 15
    assert tracker.run_id is None
    assert tracker.dropped > 0
    assert "records were not written" in caplog.text


def test_tracker_of_a_dead_server_says_so_once(dead, tmp_path, caplog):
    tracker = tracker_of(dead, tmp_path)
    tracker._thread.join(60)
    assert not tracker._thread.is_alive()
    assert caplog.text.count("is off for this run") == 1
    assert "hunter2" not in caplog.text
    started = time.monotonic()
    tracker.metrics({"loss": 1.0}, 1)
    tracker.close()
    assert time.monotonic() - started < 15


def test_tracking_uri_comes_from_the_environment_first(tmp_path, monkeypatch):
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    assert tracking_uri(tmp_path) == "http://server"


# --- the registry -----------------------------------------------------------------------------------------------------


def test_register_the_same_directory_twice_is_one_version(uri):
    first = register_version(uri, "twice", "file:///a", "1" * 64, None, {"scheme": "x"})
    assert register_version(uri, "twice", "file:///a", "1" * 64, None, {}) == first == "1"
    assert register_version(uri, "twice", "file:///a", "2" * 64, None, {}) == "2"
    assert register_version(uri, "twice", "file:///b", "1" * 64, None, {}) == "3"
    tags = MlflowClient(uri).get_model_version("twice", "1").tags
    assert tags == {"scheme": "x", "manifest_sha256": "1" * 64}


def test_right_to_write_is_proved_and_nothing_stays(uri, dead):
    before = [model.name for model in MlflowClient(uri).search_registered_models()]
    assert refused_write(uri) is None
    assert [model.name for model in MlflowClient(uri).search_registered_models()] == before
    refused = refused_write(dead)
    assert refused.startswith("a model cannot be made: ")
    assert "hunter2" not in refused


def test_register_a_dead_registry_raises(dead):
    with pytest.raises(RegistryFailed, match=r"m was not registered .*; run it again") as caught:
        register_version(dead, "m", "file:///a", "1" * 64, None, {})
    assert "hunter2" not in str(caught.value)


def test_alias_and_number_lead_to_the_directory(uri):
    for number in "12":
        register_version(uri, "named", f"file:///{number}", number * 64, None, {})
    set_alias(uri, "named", "champion", "1")
    assert version_uri("models:/named@champion", uri) == "file:///1"
    set_alias(uri, "named", "champion", "2")
    assert version_uri("models:/named@champion", uri) == "file:///2"
    assert version_uri("models:/named/1", uri) == "file:///1"


@pytest.mark.parametrize("model", ["models:/named@nobody", "models:/nothing@champion", "models:/named/99", "models:/"])
def test_version_that_does_not_exist_is_one_line(uri, model):
    register_version(uri, "named", "file:///1", "1" * 64, None, {})
    with pytest.raises(ModelError, match="not found in the registry at sqlite") as caught:
        version_uri(model, uri)
    assert "\n" not in str(caught.value)


def test_locate_finds_a_registered_model_by_its_alias(uri, tmp_path, monkeypatch):
    directory = tmp_path / "a model"
    directory.mkdir()
    version = register_version(uri, "found", directory.as_uri(), "1" * 64, None, {})
    set_alias(uri, "found", "champion", version)
    with pytest.raises(ModelError, match="set MLFLOW_TRACKING_URI"):
        locate("models:/found@champion")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert locate("models:/found@champion") == str(directory)
