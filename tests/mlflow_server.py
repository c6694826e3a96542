"""A real MLflow server for tests: its records on PostgreSQL, its artefacts on S3."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.command_line import free_port
from tests.postgres_server import PostgresServer
from tests.s3_server import S3Server

_START_S = 120.0


@contextlib.contextmanager
def running(postgresql: PostgresServer, s3: S3Server, directory: Path) -> Iterator[str]:
    """A server for the length of the block; its address.

    Args:
        directory: for its log.
    """
    s3.make_bucket("mlflow")
    port = free_port()
    variables = {
        **os.environ,
        **s3.environment(),
        "MLFLOW_S3_ENDPOINT_URL": s3.endpoint,
        "MLFLOW_BACKEND_STORE_URI": postgresql.make_database("mlflow"),
    }
    command = [sys.executable, "-m", "mlflow", "server", "--artifacts-destination", "s3://mlflow/a"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    log = directory / "mlflow.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=variables, stdout=out, stderr=out, start_new_session=True)
    address, ends = f"http://127.0.0.1:{port}", time.monotonic() + _START_S
    try:
        while not _answers(address):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < ends, log.read_text()[-3000:]
            time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/health", timeout=5).close()
        return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
