"""Storage on S3 and on servers that speak its protocol.

Every request is one attempt of `attempts.py`: watched, repeated where that may help, ended in time; the SDK's own
repetitions are off. A body that breaks off is taken up where it broke, by a range, and only from the same object: the
ETag of every answer is compared, which holds on servers that do not know `If-Match` too.

Credentials and endpoint come from the usual AWS variables, read by boto3 itself; none is stored, logged or shown: the
messages of the SDK, which may hold a whole URL, are not passed on.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TypeVar, cast
from urllib.parse import urlparse

from cluster.attempts import Attempts, CutAnswer, Limits, Progress, body_of
from cluster.errors import StorageError
from cluster.multipart import PART_BYTES, Multipart, PartsWriter, ranges_of
from cluster.storage import ObjectInfo, Storage, check_key, replaced, whole_file

logger = logging.getLogger(__name__)

T = TypeVar("T")

_making = threading.Lock()
"""Clients may be used by several threads, but not made by them at once."""
_PIECE = 256 << 10
"""Bytes of a body that are taken at a time."""
_DELETED_AT_ONCE = 1000
_RETRIED_STATUS = frozenset({429, 500, 502, 503, 504})
_RETRIED_CODES = frozenset({"SlowDown", "InternalError", "RequestTimeout", "ServiceUnavailable", "Throttling"})
_FAILURES = {
    "EndpointConnectionError": "no server answers",
    "ConnectTimeoutError": "no connection in time",
    "ReadTimeoutError": "no data in time",
    "ConnectionClosedError": "the connection was closed",
    "ResponseStreamingError": "the connection broke",
    "IncompleteReadError": "the body was cut short",
    "ResponseParserError": "an answer that is not S3's",
    "ParamValidationError": "a bucket or key that S3 does not take",
    "FlexibleChecksumError": "a body that does not match its checksum",
}


class S3Storage(Storage):
    def __init__(self, bucket: str, prefix: str, limits: Limits | None = None) -> None:
        import boto3
        from botocore.config import Config as BotoConfig
        from botocore.exceptions import BotoCoreError

        super().__init__()
        self.bucket, self.prefix = bucket, prefix.strip("/")
        self.uri = f"s3://{bucket}/{self.prefix}".rstrip("/")
        self._limits = limits or Limits.of_environment()
        config = BotoConfig(
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=16,
            s3={"addressing_style": "path"} if _custom_endpoint() else {},
        )
        try:
            with _making:
                self.client = boto3.client("s3", config=config)
        except (BotoCoreError, ValueError) as error:
            raise StorageError(
                f"storage {self.uri}: no client ({type(error).__name__}); check AWS_ENDPOINT_URL, AWS_PROFILE and the "
                "region, for example AWS_ENDPOINT_URL=http://127.0.0.1:9000"
            ) from None
        server = urlparse(self.client.meta.endpoint_url)
        self._server = f"{server.hostname}:{server.port}" if server.port else str(server.hostname)

    # --- one object -------------------------------------------------------------------------------------------------

    def info(self, key: str) -> ObjectInfo:
        found = self.request("head", key, lambda target, _: self.client.head_object(**target))
        return ObjectInfo(key, found["ContentLength"], found["ETag"].strip('"'))

    def exists(self, key: str) -> bool:
        try:
            self.info(key)
        except FileNotFoundError:
            return False
        return True

    def read(self, key: str) -> bytes:
        data = bytearray()
        self._receive(key, _into(data))
        return bytes(data)

    def read_range(self, key: str, start: int, length: int, etag: str | None = None) -> bytes:
        if start < 0:
            raise ValueError(f"a range starts at 0 or later, not at {start}")
        if length <= 0:
            return b""
        data = bytearray()
        self._receive(key, _into(data), start, length, etag)
        return bytes(data)

    def download(self, key: str, path: Path) -> None:
        info = self.info(key)
        with whole_file(path, self.uri) as partial, partial.open("r+b") as file:

            def put(offset: int, piece: bytes) -> None:
                os.pwrite(file.fileno(), piece, offset)

            def part(start: int, length: int, shares: int) -> None:
                self._receive(key, lambda at, piece: put(start + at, piece), start, length, info.etag, shares)

            if info.size_bytes:
                ranges_of(info.size_bytes, part)
            if os.fstat(file.fileno()).st_size != info.size_bytes:
                raise replaced(self.uri, key, info.etag, "of another size")

    def write(self, key: str, data: bytes) -> None:
        if len(data) > PART_BYTES:
            with self.writer(key) as file:
                file.write(data)
            return
        self.request("put", key, lambda target, progress: self._put(target, data, progress), len(data))
        self.traffic.count(written_bytes=len(data))

    def _put(self, target: dict[str, str], data: bytes, progress: Progress) -> Any:
        return self.client.put_object(**target, Body=body_of(data, progress))

    def upload(self, path: Path, key: str) -> None:
        with path.open("rb") as source, self.writer(key, path.stat().st_size) as file:
            while piece := source.read(PART_BYTES):
                file.write(piece)

    @contextlib.contextmanager
    def writer(self, key: str, size_bytes: int = 0) -> Iterator[IO[bytes]]:
        """See `Storage.writer`. `size_bytes` is what is expected: objects of more than 150 GB need larger parts."""
        file = PartsWriter(lambda: Multipart(self, key), lambda data: self.write(key, data), size_bytes)
        try:
            yield cast(IO[bytes], file)
        except BaseException:
            file.abandon()
            raise
        file.finish()

    # --- many objects -----------------------------------------------------------------------------------------------

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        start = f"{self.prefix}/" if self.prefix else ""
        found: list[ObjectInfo] = []
        more: dict[str, str] = {}
        while True:
            page = self.request("list", prefix, lambda _, __, more=more: self._page(start + prefix, more))  # type: ignore[misc]
            found.extend(
                ObjectInfo(item["Key"].removeprefix(start), item["Size"], item["ETag"].strip('"'))
                for item in page.get("Contents", [])
            )
            if not page["IsTruncated"]:
                return sorted(found, key=lambda item: item.key)
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _page(self, prefix: str, more: dict[str, str]) -> dict[str, Any]:
        page = self.client.list_objects_v2(Bucket=self.bucket, Prefix=prefix, **more)
        if "IsTruncated" not in page:  # an empty body reads like an empty listing
            raise CutAnswer
        return page

    def delete(self, prefix: str) -> None:
        name = prefix.rstrip("/")
        if not name:
            raise ValueError("delete needs a prefix; it never empties a whole root")
        keys = [item.key for item in self.list(f"{name}/")]
        if self.exists(name):
            keys.append(name)
        for start in range(0, len(keys), _DELETED_AT_ONCE):
            some = keys[start : start + _DELETED_AT_ONCE]
            self.request("delete", name, lambda _, __, some=some: self._delete(some))  # type: ignore[misc]
        self._abort_uploads(name)

    def _delete(self, keys: Sequence[str]) -> None:
        names = [{"Key": self._key(key)} for key in keys]
        answer = self.client.delete_objects(Bucket=self.bucket, Delete={"Objects": names})
        failed = [item for item in answer.get("Errors", []) if item.get("Code") != "NoSuchKey"]
        if failed:
            code = failed[0].get("Code", "an error")
            if code in _RETRIED_CODES:
                raise CutAnswer
            raise StorageError(f"storage {self.uri}: {code} for {len(failed)} of {len(keys)} objects; check the rights")
        if len(answer.get("Deleted", [])) + len(answer.get("Errors", [])) < len(keys):
            raise CutAnswer

    def _abort_uploads(self, name: str) -> None:
        """Removes the parts of uploads that a killed writer left: they are not listed, but stored and paid for."""
        own = self._key(name)
        try:
            found = self.request(
                "list the uploads of",
                name,
                lambda _, __: self.client.list_multipart_uploads(Bucket=self.bucket, Prefix=own),
            )
            for item in found.get("Uploads", []):
                if item["Key"] == own or item["Key"].startswith(f"{own}/"):
                    target = {"Bucket": self.bucket, "Key": item["Key"], "UploadId": item["UploadId"]}
                    self.request("abort", name, lambda _, __, t=target: self.client.abort_multipart_upload(**t))  # type: ignore[misc]
        except (StorageError, FileNotFoundError) as error:  # a server without it, or another process was first
            logger.info("%s", error)

    def sweep(self) -> None:
        """Nothing: whose an upload in parts is cannot be told. What was left goes with its directory (`delete`)."""

    def check_writable(self) -> None:
        hasty = S3Storage(
            self.bucket, self.prefix, replace(self._limits, patience_s=min(10.0, self._limits.patience_s))
        )
        probe = f".probe-{os.getpid()}-{os.urandom(4).hex()}"
        hasty.write(probe, b"raystill")
        hasty.delete(probe)

    # --- requests ---------------------------------------------------------------------------------------------------

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{check_key(key)}".lstrip("/")

    def request(
        self,
        what: str,
        key: str,
        attempt: Callable[[dict[str, str], Progress], T],
        size_bytes: int = 0,
        shares: int = 1,
        answer_s: float | None = None,
    ) -> T:
        """Calls `attempt({"Bucket", "Key"}, progress)` until it succeeds or it is time to give up; see `Attempts`.

        Raises:
            FileNotFoundError: there is no such object.
            StorageError: everything else, in one line.
        """
        target = {"Bucket": self.bucket, "Key": self._key(key)}
        title = f"storage {self.uri}: {what} {key!r}"
        attempts = Attempts(title, self._limits, self._why_again, size_bytes, shares, answer_s)
        started = time.monotonic()
        try:
            with self._errors(key):
                return attempts.run(lambda progress: attempt(target, progress))
        finally:
            self.traffic.count(seconds=time.monotonic() - started, retries=attempts.failures)

    def _receive(
        self,
        key: str,
        put: Callable[[int, bytes], None],
        start: int = 0,
        length: int | None = None,
        etag: str | None = None,
        shares: int = 1,
    ) -> None:
        """Gives the bytes of an object, or of `length` of them from `start`, to `put(offset from start, piece)`."""
        received = 0
        found = etag

        def attempt(target: dict[str, str], progress: Progress) -> None:
            nonlocal received, found
            first = start + received
            last = "" if length is None else start + length - 1
            asked = {} if first == 0 and length is None else {"Range": f"bytes={first}-{last}"}
            answer = self.client.get_object(**target, **asked)
            now = answer["ETag"].strip('"')
            if found is not None and now != found:
                raise replaced(self.uri, key, found, now)
            if asked and not str(answer.get("ContentRange", "")).startswith(f"bytes {first}-"):
                raise StorageError(f"storage {self.uri}: asked for bytes {first}- of {key!r}, the server sent others")
            found = now
            progress.check()
            progress.begin(answer["ContentLength"], kept=True)
            with answer["Body"] as raw:
                progress.on_cancel(lambda: raw.shutdown())
                while piece := answer["Body"].read(_PIECE):
                    progress.move(len(piece))
                    put(received, piece)
                    received += len(piece)

        def again_from_the_start(target: dict[str, str], progress: Progress) -> None:
            nonlocal received
            from botocore.exceptions import FlexibleChecksumError

            try:
                attempt(target, progress)
            except FlexibleChecksumError:
                received = 0
                raise

        try:
            self.request("get", key, again_from_the_start, length or 0, shares)
        except _NoSuchRange:
            if received or (etag is not None and start == 0):
                raise replaced(self.uri, key, found, "none of these bytes") from None
        finally:
            self.traffic.count(read_bytes=received)

    def _why_again(self, error: BaseException) -> str | None:
        from botocore import exceptions as sdk
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError  # what the SDK lets through while a body is read

        if isinstance(error, sdk.ClientError):
            code, status = _code(error)
            return f"{code} (HTTP {status})" if status in _RETRIED_STATUS or code in _RETRIED_CODES else None
        if isinstance(error, sdk.SSLError) and "CERTIFICATE" in str(error):
            return None
        passing = (sdk.HTTPClientError, sdk.IncompleteReadError, sdk.FlexibleChecksumError, ResponseParserError)
        if isinstance(error, (*passing, HTTPError, ConnectionError)) and not isinstance(error, StorageError):
            name = type(error).__name__
            return f"{_FAILURES.get(name, name)} at {self._server}"
        return None

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Turns the SDK's errors into ours: a missing key, or one line that says what failed."""
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

        try:
            yield
        except ClientError as error:
            code, status = _code(error)
            if code in ("NoSuchKey", "404"):
                raise FileNotFoundError(f"{self.uri}/{key}") from None
            if status == 416:
                raise _NoSuchRange(f"storage {self.uri}: {key!r} has no bytes in the range") from None
            raise StorageError(
                f"storage {self.uri}: {code} (HTTP {status}) for {key!r}; check bucket, keys, rights"
            ) from None
        except BotoCoreError as error:
            known = isinstance(error, (NoCredentialsError, PartialCredentialsError))
            reason = str(error) if known else _FAILURES.get(type(error).__name__, type(error).__name__)
            raise StorageError(
                f"storage {self.uri}: {reason} at {self._server}; check AWS_ENDPOINT_URL and the AWS credentials in "
                "the environment"
            ) from None


class _NoSuchRange(StorageError):
    """The range begins at or after the end of the object."""


def _into(data: bytearray) -> Callable[[int, bytes], None]:
    def put(offset: int, piece: bytes) -> None:
        data[offset : offset + len(piece)] = piece

    return put


def _code(error: Any) -> tuple[str, int]:
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return str(error.response.get("Error", {}).get("Code", "") or status), status


def _custom_endpoint() -> bool:
    return bool(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))
