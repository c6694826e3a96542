"""Large objects on S3 in parts, several at once; they appear whole when all parts are there, or not at all."""

import io
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from cluster.attempts import CutAnswer, Progress, body_of
from cluster.errors import StorageError

if TYPE_CHECKING:
    from cluster.s3 import S3Storage

logger = logging.getLogger(__name__)

PART_BYTES = 16 << 20
"""Objects up to this size are one request."""
AT_ONCE = 4
"""Parts on their way at the same time: bounds memory to `AT_ONCE * PART_BYTES`."""
_MOST_PARTS = 9000
"""Servers take 10,000."""
_COMPLETE_S = 600.0
"""A server may take minutes to join the parts of a large object."""


def ranges_of(size_bytes: int, part: Callable[[int, int, int], None]) -> None:
    """Calls `part(start, length, how many at once)` for ranges that cover an object, several at a time."""
    if size_bytes <= 2 * PART_BYTES:
        part(0, size_bytes, 1)
        return
    with ThreadPoolExecutor(AT_ONCE, "range") as pool:
        starts = range(0, size_bytes, PART_BYTES)
        futures = [pool.submit(part, start, min(PART_BYTES, size_bytes - start), AT_ONCE) for start in starts]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()


class Multipart:
    """One multipart upload. End it with `complete` or `abort`."""

    def __init__(self, storage: "S3Storage", key: str) -> None:
        self._storage, self._key = storage, key
        self._futures: list[Future[str]] = []
        self._size = 0
        self._upload = storage.request("begin an upload of", key, self._begin)
        self._pool = ThreadPoolExecutor(AT_ONCE, "part")

    def _begin(self, target: dict[str, str], progress: Progress) -> str:
        answer = self._storage.client.create_multipart_upload(**target)
        if "UploadId" not in answer:
            raise CutAnswer
        return str(answer["UploadId"])

    def add(self, data: bytes) -> None:
        """Sends the next part, as soon as fewer than `AT_ONCE` are on their way."""
        while len(on_their_way := [item for item in self._futures if not item.done()]) >= AT_ONCE:
            wait(on_their_way, return_when=FIRST_COMPLETED)
        for item in self._futures:
            if item.done():
                item.result()
        self._size += len(data)
        self._futures.append(self._pool.submit(self._send, len(self._futures) + 1, data))

    def _send(self, number: int, data: bytes) -> str:
        def attempt(target: dict[str, str], progress: Progress) -> str:
            part = {"UploadId": self._upload, "PartNumber": number}
            return str(self._storage.client.upload_part(**target, **part, Body=body_of(data, progress))["ETag"])

        etag = self._storage.request(f"put part {number} of", self._key, attempt, len(data), AT_ONCE)
        self._storage.traffic.count(written_bytes=len(data))
        return etag

    def complete(self) -> None:
        from botocore.exceptions import ClientError

        parts = [{"PartNumber": number, "ETag": item.result()} for number, item in enumerate(self._futures, 1)]
        asked = 0

        def attempt(target: dict[str, str], progress: Progress) -> None:
            nonlocal asked
            asked += 1
            try:
                answer = self._storage.client.complete_multipart_upload(
                    **target, UploadId=self._upload, MultipartUpload={"Parts": parts}
                )
            except ClientError as error:
                gone = error.response.get("Error", {}).get("Code") == "NoSuchUpload"
                if asked > 1 and gone and self._is_there(target, len(parts)):
                    return  # done by an earlier attempt whose answer was lost
                raise
            if "ETag" not in answer:
                raise CutAnswer

        self._storage.request("complete the upload of", self._key, attempt, answer_s=_COMPLETE_S)
        self._pool.shutdown()

    def _is_there(self, target: dict[str, str], parts: int) -> bool:
        found: dict[str, Any] = self._storage.client.head_object(**target)
        return found["ContentLength"] == self._size and found["ETag"].strip('"').endswith(f"-{parts}")

    def abort(self) -> None:
        """Gives the upload up and removes its parts; never raises."""
        for item in self._futures:
            item.cancel()
        self._pool.shutdown()  # a part that arrives after the end of its upload would stay

        def attempt(target: dict[str, str], progress: Progress) -> None:
            self._storage.client.abort_multipart_upload(**target, UploadId=self._upload)

        try:
            self._storage.request("abort the upload of", self._key, attempt)
        except (StorageError, FileNotFoundError) as error:
            if "NoSuchUpload" not in str(error):
                logger.warning("%s; its parts stay until the key is deleted", error)


class PartsWriter(io.RawIOBase):
    """A file whose content becomes an object at `finish`: in one request if it is small, else in parts.

    Args:
        begin: starts a multipart upload; called when there is more than one part.
        put: stores small content at once.
        size_bytes: expected size; only very large objects need it, for larger parts.
    """

    def __init__(self, begin: Callable[[], Multipart], put: Callable[[bytes], None], size_bytes: int) -> None:
        self._begin, self._put = begin, put
        self._part_bytes = max(PART_BYTES, -(-size_bytes // _MOST_PARTS))
        self._waiting = bytearray()
        self._upload: Multipart | None = None
        self._place = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def write(self, data: Any) -> int:
        for piece in _pieces(memoryview(data).cast("B"), self._part_bytes):
            if len(self._waiting) + len(piece) > self._part_bytes:
                room = self._part_bytes - len(self._waiting)
                self._waiting += piece[:room]
                if self._upload is None:
                    self._upload = self._begin()
                self._upload.add(bytes(self._waiting))
                self._waiting = bytearray(piece[room:])
            else:
                self._waiting += piece
            self._place += len(piece)
        return len(memoryview(data).cast("B"))

    def finish(self) -> None:
        """Stores what was written; on failure nothing is."""
        if self._upload is None:
            self._put(bytes(self._waiting))
            return
        try:
            self._upload.add(bytes(self._waiting))
            self._upload.complete()
        except BaseException:
            self._upload.abort()
            raise

    def abandon(self) -> None:
        """Forgets what was written."""
        if self._upload is not None:
            self._upload.abort()


def _pieces(data: memoryview, size: int) -> Iterator[memoryview]:
    for start in range(0, len(data), size):
        yield data[start : start + size]
