"""A real PostgreSQL for tests: one server on a loopback port, its data in a temporary directory that it removes.

The programs are looked for where `pg_config --bindir` says, then in /usr/lib/postgresql, or in the directory that
`RAYSTILL_POSTGRES` names. initdb refuses root, so as root the server runs as the user `postgres`.
"""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

USER, SECRET = "raystill", "lab-secret-2"
_START_S = 30.0


@dataclass(frozen=True)
class PostgresServer:
    """A server that runs."""

    port: int
    process: subprocess.Popen

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://{USER}:{SECRET}@127.0.0.1:{self.port}/{database}"

    def make_database(self, name: str, password: str | None = None) -> str:
        """An empty database; returns its URL.

        Args:
            password: of a user of the same name, whose database it is.
        """
        import psycopg
        from psycopg.sql import SQL, Identifier, Literal

        with psycopg.connect(self.url(), autocommit=True) as connection:
            if password is None:
                connection.execute(SQL("CREATE DATABASE {}").format(Identifier(name)))
                return self.url(name)
            user = Identifier(name)
            connection.execute(SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(user, Literal(password)))
            connection.execute(SQL("CREATE DATABASE {} OWNER {}").format(user, user))
        return f"postgresql://{name}:{password}@127.0.0.1:{self.port}/{name}"


def programs() -> Path | None:
    """The directory of initdb and postgres, or None where PostgreSQL or its driver is not installed."""
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return None
    places = [Path(os.environ["RAYSTILL_POSTGRES"])] if "RAYSTILL_POSTGRES" in os.environ else []
    if (config := shutil.which("pg_config")) is not None:
        places.append(Path(subprocess.check_output([config, "--bindir"], text=True).strip()))
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "initdb").exists() and (place / "postgres").exists()), None)


def may_run() -> bool:
    """Whether there is a user that the server may run as."""
    with contextlib.suppress(KeyError):
        return os.getuid() != 0 or pwd.getpwnam("postgres") is not None
    return False


@contextlib.contextmanager
def running() -> Iterator[PostgresServer]:
    """A server with an empty cluster of databases, for the length of the block."""
    found = programs()
    assert found is not None, "PostgreSQL or psycopg is not installed: set RAYSTILL_POSTGRES, or install them"
    directory = Path(tempfile.mkdtemp(prefix="raystill-pg-"))
    other = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
    if other:
        shutil.chown(directory, "postgres", "postgres")
    password = directory / "password"
    password.write_text(SECRET)
    password.chmod(0o644)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = directory / "data"
    make = ["initdb", "-D", data, "-U", USER, "--auth=scram-sha-256", f"--pwfile={password}", "-E", "UTF8"]
    settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": directory, "fsync": "off"}
    start = ["postgres", "-D", data, *(part for name, value in settings.items() for part in ("-c", f"{name}={value}"))]
    process = None
    try:
        with (directory / "log").open("wb") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "cwd": directory}
            command = [str(found / "initdb"), *map(str, make[1:]), "--locale=C.UTF-8", "--no-sync"]
            subprocess.run(command, check=True, **streams, **other)
            command = [str(found / "postgres"), *map(str, start[1:])]
            process = subprocess.Popen(command, **streams, **other)
        server = PostgresServer(port, process)
        _wait_for(server, directory / "log")
        yield server
    finally:
        if process is not None:
            process.send_signal(signal.SIGINT)  # a fast shutdown
            process.wait(30)
        shutil.rmtree(directory)


def _wait_for(server: PostgresServer, log: Path) -> None:
    import psycopg

    ends = time.monotonic() + _START_S
    while True:
        try:
            psycopg.connect(server.url()).close()
            return
        except psycopg.OperationalError:
            if server.process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"PostgreSQL did not start:\n{log.read_text()[-2000:]}") from None
        time.sleep(0.05)
