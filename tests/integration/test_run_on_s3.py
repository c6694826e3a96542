"""The whole line with corpus and storage on a real S3 server of whose answers one in twenty fails."""

import pytest

from cluster.storage import open_storage
from tests import tiny
from tests.command_line import environment, free_port, last_json, raystill
from tests.fault_proxy import Fault, FaultProxy
from tests.in_process_training import trained_here
from tests.s3_server import SECRET

pytestmark = pytest.mark.integration


ALWAYS = 1_000_000


def test_run_on_s3_that_fails_now_and_then_is_the_run_on_files(s3_server, tmp_path, monkeypatch, forked_raystill):
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    tiny.run_config(
        "small",
        tmp_path,
        storage="s3://bucket/small",
        data={"sources": ["s3://bucket/corpus/"]},
        train={"precision": "float32"},
        evaluate={"max_rows": 8},
        quantize={"schemes": ["int8_weight_only"]},
        promote={"max_quality_drop": 0.5},
        serve={"port": free_port()},
    )
    open_storage("s3://bucket/corpus").upload(tmp_path / "in" / "corpus.jsonl", "text.jsonl")

    with FaultProxy(s3_server.port) as proxy:
        variables = {**environment(), **s3_server.environment(proxy.endpoint), "RAYSTILL_LOG": "INFO"}
        proxy.add(Fault("cut", method="GET", after_requests=30, after_bytes=40))
        proxy.add(Fault("lose", method="PUT", path="checkpoints", times=2))
        proxy.add(Fault("error", ALWAYS, share=0.02, status=503, code="SlowDown"))
        proxy.add(Fault("error", ALWAYS, share=0.015))
        proxy.add(Fault("reset", ALWAYS, share=0.015))
        done = raystill("run", "small.yaml", "--json", cwd=tmp_path, env=variables, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        assert SECRET not in done.stdout + done.stderr
        assert proxy.fired.keys() == {"error", "reset", "cut", "lose"}
        assert sum(proxy.fired.values()) > len(proxy.requests) / 40
    summary = last_json(done.stdout)
    assert {stage["status"] for stage in summary["stages"].values()} == {"done"}
    assert summary["stages"]["train"]["store_retries"] >= 2

    local = [f"storage={tmp_path / 'local'}", f"data.sources=[{tmp_path / 'in'}]"]
    assert forked_raystill("prepare", "small.yaml", *local, cwd=tmp_path).returncode == 0
    trained, unharmed = summary["stages"]["train"], trained_here(tmp_path / "small.yaml", *local)
    assert trained["losses"] == pytest.approx(unharmed["losses"], rel=1e-4)
    assert len(trained["losses"]) == 12
    for same in ("rows", "tokens", "rows_checksum"):
        assert trained[same] == unharmed[same], same
    assert trained["teacher_calls"] == unharmed["teacher_calls"] + 2  # what it is, and its head

    storage = open_storage("s3://bucket/small")
    assert storage.read_json("summary.json") == summary
    left = storage.client.list_multipart_uploads(Bucket="bucket", Prefix="small")
    assert not left.get("Uploads")
    assert not [item.key for item in storage.list() if b"lab-secret" in storage.read(item.key)]
