"""Secrets that a run is given, looked for in whatever was written: files, Ray's logs, objects, databases.

What is found names the place and the secret, never its value.
"""

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_LOOK_EVERY_S = 0.5


class Planted:
    """A search that adds up.

    Attributes:
        found: `place: name of the secret`.
        searched: how many files, objects and rows were looked at.
    """

    def __init__(self, secrets: Mapping[str, str]) -> None:
        """
        Args:
            secrets: value by name; no value is part of anything that may be written.
        """
        assert all(len(value) >= 10 for value in secrets.values())
        self._secrets = {name: value.encode() for name, value in secrets.items()}
        self.found: list[str] = []
        self.searched: Counter[str] = Counter()

    def in_files(self, directory: Path, pattern: str = "*") -> None:
        """Every file at any depth whose name fits; links are not followed."""
        for path in sorted(directory.rglob(pattern)):
            with contextlib.suppress(FileNotFoundError):  # what is written may also be removed
                if path.is_file() and not path.is_symlink():
                    self._look("files", str(path), path.read_bytes())

    def in_objects(self, client: Any, bucket: str) -> None:
        """Every object of a bucket: its key, its bytes, what is said about it.

        Args:
            client: boto3's, for S3.
        """
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for item in page.get("Contents", []):
                answer = client.get_object(Bucket=bucket, Key=item["Key"])
                said = f"{item['Key']} {answer['Metadata']}".encode()
                self._look("objects", f"s3://{bucket}/{item['Key']}", said + answer["Body"].read())

    def in_database(self, url: str) -> None:
        """Every column of every table."""
        import sqlalchemy

        engine = sqlalchemy.create_engine(url)
        with contextlib.closing(engine.connect()) as connection:
            for table in sorted(sqlalchemy.inspect(engine).get_table_names()):
                for row in connection.execute(sqlalchemy.text(f'SELECT * FROM "{table}"')).mappings():
                    self.searched["rows"] += 1
                    for column, value in row.items():
                        data = bytes(value) if isinstance(value, (bytes, memoryview)) else str(value).encode()
                        self._look("values", f"{table}.{column}", data)
        engine.dispose()

    def _look(self, kind: str, place: str, data: bytes) -> None:
        self.searched[kind] += 1
        for name, value in self._secrets.items():
            if value in data and f"{place}: {name}" not in self.found:
                self.found.append(f"{place}: {name}")


@contextlib.contextmanager
def kept_logs(directory: Path, kept: Path) -> Iterator[None]:
    """While the block runs every log of a Ray whose own directory is below `directory` gets a second name below `kept`:
    there it stays, whole, when the Ray removes what it wrote."""
    over = threading.Event()

    def keep() -> None:
        while not over.wait(_LOOK_EVERY_S):
            _link_logs(directory, kept)

    thread = threading.Thread(target=keep, name="kept-logs", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        _link_logs(directory, kept)


def _link_logs(directory: Path, kept: Path) -> None:
    for logs in directory.glob("*/session_2*/logs"):  # `session_latest` is a link to one of them
        for place, _, names in os.walk(logs):
            into = kept / Path(place).relative_to(directory)
            for name in names:
                with contextlib.suppress(FileNotFoundError, FileExistsError):
                    into.mkdir(parents=True, exist_ok=True)
                    os.link(Path(place, name), into / name, follow_symlinks=False)
