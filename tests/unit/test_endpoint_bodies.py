"""Request bodies: exact limits whatever the header says, slow clients, and all of them together."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from starlette.requests import Request

from services.endpoint.envelope import BodyReader
from services.endpoint.errors import ApiError

LIMIT = 4096


def sending(chunks: AsyncIterator[bytes], **headers: str) -> Request:
    """A request whose body comes so; it ends when the chunks do."""

    async def receive() -> Any:
        chunk = await anext(chunks, None)
        return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

    encoded = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": encoded}, receive)


async def chunks_of(size: int, chunk: int, read: Callable[[int], None] = lambda _: None) -> AsyncIterator[bytes]:
    for at in range(0, size, chunk):
        read(min(chunk, size - at))
        yield b" " * min(chunk, size - at)


async def trickle() -> AsyncIterator[bytes]:
    while True:
        await asyncio.sleep(0.02)
        yield b" "


async def half() -> AsyncIterator[bytes]:
    yield b" " * 800
    await asyncio.sleep(5)


def status_of(reader: BodyReader, request: Request) -> int:
    try:
        asyncio.run(reader.read(request))
    except ApiError as error:
        return error.status
    return 200


@pytest.mark.parametrize("chunk", [1, 1000, LIMIT, 10**6])
@pytest.mark.parametrize(("size", "status"), [(0, 200), (LIMIT, 200), (LIMIT + 1, 413), (10 * LIMIT, 413)])
def test_limit_is_exact_however_the_body_is_cut(chunk: int, size: int, status: int) -> None:
    reader = BodyReader(LIMIT, 64 * LIMIT)
    assert status_of(reader, sending(chunks_of(size, chunk))) == status
    assert reader.num_bytes == 0


@pytest.mark.parametrize("length", ["10", "-1", "x", "0", str(LIMIT)])
def test_content_length_that_lies_is_not_believed(length: str) -> None:
    read: list[int] = []
    request = sending(chunks_of(10**6, 1000, read.append), content_length=length)
    assert status_of(BodyReader(LIMIT, 64 * LIMIT), request) == 413
    assert sum(read) <= LIMIT + 1000


@pytest.mark.parametrize("length", [str(LIMIT + 1), "1073741824", "99999999999999999999999"])
def test_length_beyond_the_limit_is_refused_before_a_byte_is_read(length: str) -> None:
    read: list[int] = []
    assert status_of(BodyReader(LIMIT, LIMIT), sending(chunks_of(10, 1, read.append), content_length=length)) == 413
    assert read == []


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", "application/jsonp", ""])
def test_other_content_is_415(kind: str) -> None:
    assert status_of(BodyReader(LIMIT, LIMIT), sending(chunks_of(2, 1), content_type=kind)) == 415


def test_body_that_trickles_is_ended_and_others_are_not_held_up() -> None:
    async def scenario() -> None:
        reader = BodyReader(1000, 64_000, grace_s=0.3)
        slow = [asyncio.create_task(reader.read(sending(trickle()))) for _ in range(50)]
        await asyncio.sleep(0.1)
        assert await asyncio.wait_for(reader.read(sending(chunks_of(10, 10))), 1) == b" " * 10
        for task in slow:
            with pytest.raises(ApiError) as refused:
                await task
            assert refused.value.status == 408
        assert reader.num_bytes == 0

    asyncio.run(scenario())


def test_bodies_on_their_way_are_bounded_together() -> None:
    async def scenario() -> None:
        reader = BodyReader(1000, 2000)
        first = [asyncio.create_task(reader.read(sending(half()))) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert reader.num_bytes == 1600
        with pytest.raises(ApiError) as refused:
            await reader.read(sending(half()))
        assert refused.value.status == 503
        for task in first:
            task.cancel()
        await asyncio.gather(*first, return_exceptions=True)
        assert reader.num_bytes == 0

    asyncio.run(scenario())
