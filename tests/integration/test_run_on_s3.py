"""The whole line with corpus and storage on a real S3 server that fails now and then."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.storage import open_storage
from tests import tiny
from tests.fault_proxy import Fault, FaultProxy
from tests.s3_server import SECRET

pytestmark = pytest.mark.integration


def test_run_on_s3_that_fails_now_and_then_ends_well(s3_server, tmp_path, monkeypatch):
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    open_storage("s3://bucket/corpus").upload(tiny.corpus(tmp_path / "in", 80), "text.jsonl")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = {
        "name": "small",
        "storage": "s3://bucket/small",
        "data": {"sources": ["s3://bucket/corpus/"], "sequence_length": 48, "validation_fraction": 0.2},
        "teacher": {"model": str(tiny.save_model(tmp_path / "teacher")), "dtype": "float32"},
        "student": {"from_teacher": {"layers": [0]}},
        "train": {"steps": 12, "global_batch": 8, "micro_batch": 4, "checkpoint_every": 4, "validate_every": 4},
        "promote": {"max_quality_loss": 0.5},
        "serve": {"port": port},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    with FaultProxy(s3_server.port) as proxy:
        for number, mode in enumerate(("error", "reset", "cut", "lose") * 3):
            fault = Fault(mode, after_requests=12 * number, status=503, code="SlowDown", after_bytes=40)
            fault.method = {"cut": "GET", "lose": "PUT"}.get(mode, "")
            proxy.add(fault)
        done = subprocess.run(
            [sys.executable, "-m", "jobs", "run", "small.yaml", "--json"],
            cwd=tmp_path,
            env={
                **os.environ,
                **s3_server.environment(proxy.endpoint),
                "PYTHONPATH": str(Path(__file__).parents[2]),
                "RAYSTILL_LOG": "INFO",
            },
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert proxy.fired.keys() == {"error", "reset", "cut", "lose"}
        assert sum(proxy.fired.values()) >= 8
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert {stage["status"] for stage in summary["stages"].values()} == {"done"}
    assert len(summary["stages"]["train"]["losses"]) == 12
    storage = open_storage("s3://bucket/small")
    assert storage.read_json("summary.json") == summary
    left = storage.client.list_multipart_uploads(Bucket="bucket", Prefix="small")
    assert not left.get("Uploads")
    assert SECRET not in done.stdout + done.stderr
    assert not [item.key for item in storage.list() if b"lab-secret" in storage.read(item.key)]
