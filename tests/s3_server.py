"""A real S3 server for developers and tests: OpenStack Swift with its S3 API, as four processes on loopback ports.

`make s3` (or `python -m tests.s3_server`) runs one in the foreground and prints the variables that point raystill at
it; Ctrl-C ends it. Its data is in a temporary directory that it removes. Swift is looked for beside this Python, or in
the virtual environment that `RAYSTILL_SWIFT` names. Good to know: its conditional writes are not atomic.
"""

import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

USER, SECRET = "lab:writer", "lab-secret-0"
READER, READER_SECRET = "lab:reader", "lab-secret-1"
_FILTERS = ("catch_errors", "gatekeeper", "healthcheck", "bulk", "slo", "dlo", "symlink")
_START_S = 60.0
_RINGS = """
import json, sys
from swift.common.ring import RingBuilder
for name, port in json.loads(sys.argv[2]).items():
    if name != "proxy":
        ring = RingBuilder(6, 1, 0)
        ring.add_dev({"id": 0, "region": 1, "zone": 1, "ip": "127.0.0.1", "port": port, "device": "d1", "weight": 1})
        ring.rebalance()
        ring.get_ring().save(f"{sys.argv[1]}/{name}.ring.gz")
"""
"""Where the one disk is; run by Swift's own Python."""


@dataclass(frozen=True)
class S3Server:
    """A server that runs: where it is, and the process of each of its parts."""

    endpoint: str
    processes: dict[str, subprocess.Popen]

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """The variables that point an S3 client at it, or at something that stands before it."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": USER,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def make_bucket(self, name: str) -> None:
        import boto3
        from botocore.config import Config

        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=USER,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}),
        )
        client.create_bucket(Bucket=name)


def programs() -> Path | None:
    """The directory of Swift's programs, or None where it is not installed."""
    chosen = os.environ.get("RAYSTILL_SWIFT")
    places = [Path(chosen, "bin")] if chosen else [Path(sys.executable).parent]
    return next((place for place in places if (place / "swift-proxy-server").exists()), None)


@contextlib.contextmanager
def running(directory: Path, port: int = 0) -> Iterator[S3Server]:
    """A server with its data below `directory`, on `port` or a free one, for the length of the block."""
    found = programs()
    if found is None:
        raise RuntimeError("OpenStack Swift is not installed: run make s3, or set RAYSTILL_SWIFT to a venv that has it")
    ports = dict(zip(("object", "container", "account", "proxy"), _free_ports(4), strict=True))
    ports["proxy"] = port or ports["proxy"]
    settings = _write_settings(directory, ports, found)
    processes: dict[str, subprocess.Popen] = {}
    endpoint = f"http://127.0.0.1:{ports['proxy']}"
    try:
        for name in ports:
            command = [str(found / f"swift-{name}-server"), str(settings / f"{name}-server.conf"), "-v"]
            with (directory / f"{name}.log").open("wb") as log:
                processes[name] = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
        _wait_for(endpoint, processes, directory)
        yield S3Server(endpoint, processes)
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(endpoint: str, processes: dict[str, subprocess.Popen], directory: Path) -> None:
    ends = time.monotonic() + _START_S
    while True:
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError),
            urllib.request.urlopen(f"{endpoint}/healthcheck", timeout=5),
        ):
            return
        for name, process in processes.items():
            if process.poll() is not None or time.monotonic() > ends:
                text = (directory / f"{name}.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"swift-{name}-server did not start (exit code {process.poll()}):\n{text}")
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]


def _write_settings(directory: Path, ports: dict[str, int], found: Path) -> Path:
    settings, data = directory / "etc", directory / "srv"
    for path in (settings, data / "d1", directory / "cache"):
        path.mkdir(parents=True)
    common = [f"user = {getpass.getuser()}", f"swift_dir = {settings}", "bind_ip = 127.0.0.1", "workers = 0"]
    (settings / "swift.conf").write_text(
        "[swift-hash]\nswift_hash_path_prefix = p\nswift_hash_path_suffix = s\n"
        "[storage-policy:0]\nname = one\ndefault = yes\n"
    )
    for name in ("object", "container", "account"):
        lines = [
            *("[DEFAULT]", *common, f"bind_port = {ports[name]}", f"devices = {data}", "mount_check = false"),
            *("disable_fallocate = true", "fallocate_reserve = 0", f"recon_cache_path = {directory / 'cache'}"),
            *("[pipeline:main]", f"pipeline = healthcheck {name}-server"),
            *(f"[app:{name}-server]", f"use = egg:swift#{name}"),
            *("[filter:healthcheck]", "use = egg:swift#healthcheck"),
        ]
        (settings / f"{name}-server.conf").write_text("\n".join(lines) + "\n")
    subprocess.run([str(found / "python"), "-c", _RINGS, str(settings), json.dumps(ports)], check=True)
    lines = [
        *("[DEFAULT]", *common, f"bind_port = {ports['proxy']}"),
        "[pipeline:main]",
        "pipeline = catch_errors gatekeeper healthcheck proxy-logging bulk s3api tempauth slo dlo versioned_writes "
        "symlink proxy-logging proxy-server",
        *("[app:proxy-server]", "use = egg:swift#proxy", "allow_account_management = true"),
        "account_autocreate = true",
        *("[filter:s3api]", "use = egg:swift#s3api", "location = us-east-1"),
        *("[filter:tempauth]", "use = egg:swift#tempauth"),
        f"user_{USER.replace(':', '_')} = {SECRET} .admin",
        f"user_{READER.replace(':', '_')} = {READER_SECRET}",
        *("[filter:versioned_writes]", "use = egg:swift#versioned_writes", "allow_object_versioning = true"),
        *("[filter:proxy-logging]", "use = egg:swift#proxy_logging"),
        *(line for name in _FILTERS for line in (f"[filter:{name}]", f"use = egg:swift#{name}")),
    ]
    (settings / "proxy-server.conf").write_text("\n".join(lines) + "\n")
    return settings


def main() -> None:
    """Runs a server in the foreground until Ctrl-C, or until it is asked to end."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    directory = Path(tempfile.mkdtemp(prefix="raystill-s3-"))
    try:
        with running(directory) as server, contextlib.suppress(KeyboardInterrupt):
            server.make_bucket("raystill")
            for name, value in server.environment().items():
                print(f"export {name}={value}")
            print("# bucket: raystill, for example storage=s3://raystill/demo; Ctrl-C ends the server", flush=True)
            server.processes["proxy"].wait()
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
