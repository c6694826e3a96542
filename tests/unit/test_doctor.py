"""Each check of the doctor on a service that is well and on one that is not."""

import contextlib
import http.server
import json
import os
import threading
import time

import pytest
from packaging.specifiers import SpecifierSet

from cluster.api_keys import create_key, opened_keys
from cluster.champions import database_url
from jobs.config import RunConfig
from jobs.doctor import examine, line_of
from jobs.examining import clock, machine, services
from jobs.examining.check import Check, guarded
from jobs.examining.ray_cluster import check_dashboard, check_dashboard_clock, from_inside
from tests.command_line import free_port, last_json


def statuses(checks):
    return {check.what: check.status for check in checks}


def made(tmp_path, **changes):
    return RunConfig.model_validate(
        {
            "name": "small",
            "storage": str(tmp_path / "storage"),
            "data": {"gather": "python_docs", "train_tokenizer": {}},
            "student": {"shape": {"model_type": "llama"}},
            "distill": {"alpha": 1},
            "train": {"steps": 10},
            **changes,
        }
    )


@pytest.fixture
def server():
    """An HTTP server that answers with what the test says: status, headers, texts by path, paths that are forbidden.
    What is written to it is kept."""
    answer = {"status": 200, "headers": {}, "texts": {}, "forbidden": [], "written": []}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            forbidden = any(self.path.endswith(path) for path in answer["forbidden"])
            self.send_response_only(403 if forbidden else answer["status"])
            for name, value in answer["headers"].items():
                self.send_header(name, value)
            text = answer["texts"].get(self.path, "").encode()
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_HEAD = do_GET

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer["written"].append((self.command, self.path.rpartition("/")[2], body))
            self.do_GET()

        do_DELETE = do_POST

        def log_message(self, *arguments):
            pass

    started = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=started.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{started.server_port}", answer
    started.shutdown()
    started.server_close()
    thread.join()


def test_versions_of_here_are_those_of_the_constraints():
    wanted = machine.wanted_versions()
    assert {"ray", "torch", "transformers"} <= wanted.keys()
    assert str(wanted["ray"]) == "==2.60.0"
    found = list(machine.check_versions("here", machine.versions(), wanted))
    assert {check.status for check in found} == {"ok"}


def test_versions_other_or_missing_are_failures():
    wanted = {"ray": SpecifierSet("==2.60.0"), "torch": SpecifierSet("==2.13.0")}
    found = statuses(machine.check_versions("here", {"python": "3.9.1", "ray": "2.59.0"}, wanted))
    assert found == {"python": "failure", "ray": "failure", "torch": "failure"}
    fine = {"python": "3.11.2", "ray": "2.60.0", "torch": "2.13.0+cpu"}
    assert set(statuses(machine.check_versions("here", fine, wanted)).values()) == {"ok"}


def test_versions_of_nodes_are_compared():
    here = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0"}
    [same] = machine.check_same_versions(here, "node", {**here, "python": "3.11.2"})
    assert same.status == "ok"
    [other] = machine.check_same_versions(here, "node", {**here, "torch": "2.12.0", "python": "3.12.0"})
    assert other.status == "failure"
    assert "torch 2.12.0, here 2.13.0" in other.found
    assert "python 3.12, here 3.11" in other.found


def test_room_is_measured(monkeypatch):
    assert statuses(machine.check_room("here", 1e15))["shared memory"] == "failure"
    monkeypatch.setattr(machine, "_LEAST_DISK_GB", 1e12)
    assert statuses(machine.check_room("here"))["disk"] == "failure"
    monkeypatch.setattr(machine, "_LEAST_DISK_GB", 0)
    monkeypatch.setattr(machine, "_LITTLE_DISK_GB", 0)
    assert statuses(machine.check_room("here", 0)) == {"disk": "ok", "shared memory": "ok"}


def test_gpus_that_are_asked_for_and_missing_are_a_failure(monkeypatch):
    monkeypatch.setattr(machine, "_gpus", lambda: iter(["card 80 GiB"]))
    [one] = machine.check_gpus("here", 1)
    assert (one.status, one.found) == ("ok", "card 80 GiB")
    [two] = machine.check_gpus("here", 2)
    assert two.status == "failure"
    assert "the config asks for 2" in two.found


def test_storage_is_written_read_listed_and_deleted(tmp_path):
    assert statuses(services.check_storage("here", str(tmp_path))) == {"storage": "ok"}
    assert not list(tmp_path.iterdir())
    assert statuses(services.check_storage("here", str(tmp_path / "new"))) == {"storage": "ok"}
    assert not (tmp_path / "new").exists()


def test_storage_that_loses_or_forbids_is_a_failure(tmp_path, monkeypatch):
    def refuse(self, prefix):
        raise PermissionError("not for you")

    monkeypatch.setattr("cluster.storage.LocalStorage.delete", refuse)
    found = list(services.check_storage("here", str(tmp_path)))
    assert statuses(found)["storage, delete"] == "failure"
    assert "the right to delete" in found[0].fix
    monkeypatch.setattr("cluster.storage.LocalStorage.read", lambda self, key: b"other")
    assert statuses(services.check_storage("here", str(tmp_path)))["storage, read"] == "failure"


@pytest.mark.parametrize(("offset_s", "status"), [(0, "ok"), (60, "warning"), (-3600, "failure")])
def test_clock_is_compared_with_the_server(server, monkeypatch, offset_s, status):
    url, answer = server
    stamp = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() - offset_s))
    answer["headers"]["Date"], answer["status"] = stamp, 403
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    [check] = clock.check_clock("here", "s3://bucket/x")
    assert check.status == status, check


@pytest.mark.parametrize(("offset_s", "status"), [(0, "ok"), (-60, "warning"), (3600, "failure")])
def test_clock_of_a_cluster_is_compared_with_the_one_here(server, offset_s, status):
    url, answer = server
    answer["headers"]["Date"] = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + offset_s))
    answer["status"] = 401
    [check] = check_dashboard_clock(url)
    assert (check.what, check.status) == ("clock", status)
    assert abs(int(check.found.split()[0]) - offset_s) <= 1
    assert "this machine's" in check.found
    answer["headers"].clear()
    assert not list(check_dashboard_clock(url))


def test_clock_of_a_node_is_known_as_well_as_the_soonest_answer_knows_it():
    pauses = iter([0.3, 0.0, 0.3])

    def there():
        now = time.time()
        time.sleep(next(pauses))
        return now + 100

    assert clock.ahead_s(there) == pytest.approx(100, abs=0.1)


def test_endpoint_that_anybody_reaches_needs_keys(tmp_path):
    open_door = made(tmp_path, serve={"host": "0.0.0.0"})
    assert statuses(services.check_endpoint("here", open_door)) == {"endpoint keys": "failure"}
    assert statuses(services.check_endpoint("here", made(tmp_path))) == {"endpoint keys": "ok"}
    with opened_keys(database_url(open_door.state_directory)) as engine:
        create_key(engine, "test")
    assert statuses(services.check_endpoint("here", open_door)) == {"endpoint keys": "ok"}


def test_teacher_of_the_page_that_is_not_up_is_a_warning(tmp_path, server):
    address, answer = server
    assert not list(services.check_teacher("here", made(tmp_path)))
    config = made(tmp_path, serve={"teacher_url": address})
    answer["texts"]["/v1/models"] = json.dumps({"data": [{"id": "big"}]})
    [check] = services.check_teacher("here", config)
    assert check.found == f"{address} answers as big"
    for change, expected in (
        ({"status": 401}, "refuses this endpoint's key"),
        ({"status": 200, "texts": {}}, "no list of models"),
    ):
        answer.update(change)
        [check] = services.check_teacher("here", config)
        assert check.status == "warning"
        assert expected in check.found
    [check] = services.check_teacher("here", made(tmp_path, serve={"teacher_url": f"http://127.0.0.1:{free_port()}"}))
    assert check.status == "warning"
    assert "nothing answers" in check.found


def test_records_in_files_that_cannot_be_written_are_a_failure(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAYSTILL_DATABASE_URL", raising=False)
    (tmp_path / "file").write_text("no directory")
    for look in (services.check_tracking, services.check_database):
        [check] = guarded("here", "records", lambda look=look: look("here", tmp_path / "file" / "below", False))
        assert check.status == "failure"
        assert "not writable" in check.found


def test_records_in_files_are_looked_for_where_the_variables_say(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no directory")
    looks = (("MLFLOW_TRACKING_URI", services.check_tracking), ("RAYSTILL_DATABASE_URL", services.check_database))
    for name, look in looks:
        monkeypatch.setenv(name, f"sqlite:///{tmp_path}/there/records.db")
        assert [check.status for check in look("here", tmp_path / "file" / "below", False)] == ["ok"]
        monkeypatch.setenv(name, f"sqlite:///{tmp_path}/file/below/records.db")
        [check] = guarded("here", "records", lambda look=look: look("here", tmp_path, False))
        assert check.status == "failure"
        assert name in check.found
        [check] = look("here", tmp_path, True)
        assert name in check.fix
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_records_in_files_of_a_job_would_be_lost(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAYSTILL_DATABASE_URL", raising=False)
    for lost, status in ((False, "ok"), (True, "failure")):
        assert statuses(services.check_tracking("here", tmp_path, lost)) == {"MLflow": status}
        assert statuses(services.check_database("here", tmp_path, lost)) == {"champions": status}


def test_mlflow_that_does_not_answer_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:word@127.0.0.1:{free_port()}")
    [check] = services.check_tracking("here", tmp_path, False)
    assert check.status == "failure"
    assert "word" not in check.found


@pytest.mark.parametrize(
    ("forbidden", "status", "said"),
    [([], "ok", "made, tagged and deleted"), (["create"], "failure", "made"), (["set-tag"], "failure", "tagged")],
)
def test_mlflow_is_written_and_nothing_stays_there(server, tmp_path, monkeypatch, forbidden, status, said):
    url, answer = server
    models = "/api/2.0/mlflow/registered-models"
    answer["texts"] = dict.fromkeys(
        (f"{models}/set-tag", f"{models}/delete", "/api/2.0/mlflow/experiments/search"), "{}"
    )
    answer["texts"][f"{models}/create"] = json.dumps({"registered_model": {"name": "x"}})
    answer["forbidden"] = [f"{models}/{path}" for path in forbidden]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    reads, writes = services.check_tracking("here", tmp_path, True)
    assert (reads.what, reads.status) == ("MLflow", "ok")
    assert (writes.what, writes.status) == ("MLflow, write", status)
    assert said in writes.found
    assert ("right to create models" in writes.fix) == (status == "failure")
    names = {path: body["name"] for _, path, body in answer["written"] if path in ("create", "delete")}
    assert names["create"].startswith("raystill-probe-")
    assert names.get("delete") == (None if forbidden == ["create"] else names["create"])


def test_dashboard_open_or_closed(server, monkeypatch):
    url, answer = server
    assert statuses(check_dashboard(url)) == {"authentication": "warning"}
    answer["status"] = 401
    assert statuses(check_dashboard(url)) == {"authentication": "ok"}
    monkeypatch.setattr("jobs.examining.ray_cluster.is_loopback", lambda host: False)
    assert statuses(check_dashboard(url)) == {"authentication": "ok", "encryption": "warning"}
    answer["status"] = 200
    assert statuses(check_dashboard(url))["authentication"] == "failure"
    assert statuses(check_dashboard(f"http://127.0.0.1:{free_port()}")) == {"dashboard": "failure"}


@pytest.mark.parametrize(
    ("addresses", "status"),
    [
        ([("127.0.0.1", "ALIVE")], "warning"),
        ([("127.0.0.1", "ALIVE"), ("10.0.0.7", "DEAD")], "warning"),
        ([("127.0.0.1", "ALIVE"), ("10.0.0.7", "ALIVE")], "failure"),
        ([("fd00::7", "ALIVE")], "failure"),
    ],
)
def test_dashboard_at_the_end_of_a_tunnel_is_judged_by_the_addresses_of_its_nodes(server, addresses, status):
    url, answer = server
    nodes = [{"node_ip": ip, "state": state} for ip, state in addresses]
    answer["texts"]["/api/v0/nodes"] = json.dumps({"result": True, "data": {"result": {"result": nodes}}})
    [check] = check_dashboard(url)
    assert (check.what, check.status) == ("authentication", status)
    assert (status == "failure") == (addresses[-1][0] in check.found)
    answer["status"] = 401
    assert statuses(check_dashboard(url)) == {"authentication": "ok"}


def test_report_from_inside_is_the_line_of_json():
    assert from_inside('Running\n{"checks": [], "versions": {}}\n', "x") == {"checks": [], "versions": {}}
    [check] = guarded("cluster", "nodes", lambda: [from_inside("Traceback\nValueError: no", "http://head")])
    assert check.status == "failure"
    assert "ValueError: no" in check.found


def test_nodes_are_looked_at_without_a_config_too(monkeypatch):
    """The job that is handed in is run here in its directory, with a cluster of one node."""
    from typer.testing import CliRunner

    from jobs.__main__ import app

    class Cluster:
        def __init__(self, address):
            self.address = address

        def submit(self, job_id, entrypoint, runtime_env, metadata):
            assert sorted(os.listdir(runtime_env["working_dir"])) == ["cluster", "jobs", "services"]
            assert not runtime_env.keys() - {"working_dir"}
            self.words = entrypoint.split()

        def follow(self, job_id, write, say):
            assert self.words[:3] == ["python", "-m", "jobs"]
            with monkeypatch.context() as inside:
                inside.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
                write(CliRunner().invoke(app, self.words[3:]).output)

    disk = Check("node 10.0.0.7", "disk", "ok", "much")
    report = {"node 10.0.0.7": {"versions": machine.versions(), "checks": [disk.as_json()]}}
    monkeypatch.setattr("jobs.doctor.Submissions", Cluster)
    monkeypatch.setattr("jobs.doctor.nodes_report", lambda: report)
    monkeypatch.setattr("cluster.connection.connect", lambda config: contextlib.nullcontext())
    for name in ("check_dashboard", "check_dashboard_clock"):
        monkeypatch.setattr(f"jobs.doctor.{name}", lambda address: [])
    monkeypatch.setattr("jobs.doctor.check_same_ray", lambda address, here: [])
    there = [check for check in examine(None, "http://head:8265") if check.where != "this machine"]
    assert there == [disk, Check("node 10.0.0.7", "same versions", "ok", f"{len(machine.versions())} as here")]


def test_a_check_that_raises_is_a_failure_and_not_an_end():
    def broken():
        yield Check("here", "first", "ok", "fine")
        raise ZeroDivisionError("what")

    [check] = guarded("here", "thing", broken)
    assert (check.status, check.found) == ("failure", "ZeroDivisionError: what")
    assert str(line_of(check)) == "failure here: thing: ZeroDivisionError: what"


def test_examine_a_config_looks_at_what_it_needs(tmp_path):
    found = statuses(examine(made(tmp_path), None))
    assert {
        "python",
        "ray",
        "torch",
        "disk",
        "storage",
        "clock",
        "MLflow",
        "champions",
        "endpoint keys",
    } <= found.keys()
    assert "failure" not in {status for what, status in found.items() if what not in ("disk", "shared memory")}


def test_doctor_command_ends_with_one_where_something_fails(tmp_path, forked_raystill):
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(json.loads(made(tmp_path).model_dump_json(by_alias=True))))
    bad = forked_raystill("doctor", config, "serve.host=0.0.0.0", "--json", cwd=tmp_path)
    assert bad.returncode == 1
    report = last_json(bad.stdout)
    assert report["failures"] >= 1
    assert "endpoint keys" in [check["what"] for check in report["checks"] if check["status"] == "failure"]
    lines = forked_raystill("doctor", config, cwd=tmp_path).stdout.splitlines()
    assert len(lines) == len(report["checks"]) + 1
    assert all(line.startswith(("ok", "warning", "failure")) for line in lines[:-1])
