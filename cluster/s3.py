"""Storage on S3 and on servers that speak its protocol.

Credentials and endpoint come from the usual AWS variables, read by boto3 itself; none is stored or logged.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import StorageError
from cluster.storage import ObjectInfo, Storage, check_key


class S3Storage(Storage):
    def __init__(self, bucket: str, prefix: str) -> None:
        import boto3
        from botocore.config import Config as BotoConfig

        self.bucket, self.prefix = bucket, prefix.strip("/")
        self.uri = f"s3://{bucket}/{self.prefix}".rstrip("/")
        self._client = boto3.client(
            "s3",
            config=BotoConfig(
                retries={"mode": "standard", "max_attempts": 8},
                connect_timeout=10,
                read_timeout=60,
                s3={"addressing_style": "path"} if _custom_endpoint() else {},
            ),
        )

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{check_key(key)}".lstrip("/")

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        start = f"{self.prefix}/" if self.prefix else ""
        with self._errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=start + prefix)
            found = [
                ObjectInfo(item["Key"].removeprefix(start), item["Size"], item["ETag"].strip('"'))
                for page in pages
                for item in page.get("Contents", [])
            ]
        return sorted(found, key=lambda item: item.key)

    def read(self, key: str) -> bytes:
        with self._errors(key):
            return self._client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()

    def read_range(self, key: str, start: int, length: int) -> bytes:
        if length <= 0:
            return b""
        asked = f"bytes={start}-{start + length - 1}"
        with self._errors(key):
            return self._client.get_object(Bucket=self.bucket, Key=self._key(key), Range=asked)["Body"].read()

    def write(self, key: str, data: bytes) -> None:
        with self._errors(key):
            self._client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data)

    def download(self, key: str, path: Path) -> None:
        with self._errors(key):
            self._client.download_file(self.bucket, self._key(key), str(path))

    def upload(self, path: Path, key: str) -> None:
        with self._errors(key):
            self._client.upload_file(str(path), self.bucket, self._key(key))

    def delete(self, prefix: str) -> None:
        if not prefix.strip("/"):
            raise ValueError("delete needs a prefix; it never empties a whole root")
        for item in self.list(prefix):
            with self._errors(item.key):
                self._client.delete_object(Bucket=self.bucket, Key=self._key(item.key))

    def check_writable(self) -> None:
        probe = f".probe-{os.getpid()}-{os.urandom(4).hex()}"
        self.write(probe, b"raystill")
        self.delete(probe)

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Turns the SDK's errors into ours: a missing key, or one line that says what failed."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in ("NoSuchKey", "404"):
                raise FileNotFoundError(f"{self.uri}/{key}") from error
            raise StorageError(
                f"storage {self.uri}: {code or error} for {key!r}; check bucket, keys, rights"
            ) from error
        except (BotoCoreError, Boto3Error) as error:
            raise StorageError(
                f"storage {self.uri}: {error}; check AWS_ENDPOINT_URL and the AWS credentials in the environment"
            ) from error


def _custom_endpoint() -> bool:
    return bool(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))
