"""A version's replica: how its answers travel, and that it stops when nobody waits."""

import asyncio
import json
from typing import Any

import pytest

from services.endpoint import running
from services.endpoint import versions as version_module
from services.endpoint.router import Part
from tests.unit.test_endpoint_router import TEXT, arguments, versions

__all__ = ["arguments", "versions"]  # fixtures


def test_stream_is_sent_in_far_fewer_parts_than_tokens(
    versions: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "SECONDS_PER_STREAM", 0.0)  # an event for each token
    monkeypatch.setattr(version_module, "_FLUSH_S", 0.3)  # so that a machine that is busy sends together too
    body = json.dumps({**TEXT, "max_tokens": 64, "stream": True}).encode()

    async def parts() -> list[Part]:
        headers = [(b"content-type", b"application/json")]
        return [part async for part in versions["1"][0].answer("/v1/completions", b"", headers, body)]

    found = asyncio.run(parts())
    assert found[0][2].startswith(b"data: ")
    assert b"".join(part[2] for part in found).count(b"data: ") > 20
    assert len(found) < 20
    assert [part[3] is None for part in found] == [True] * (len(found) - 1) + [False]


def test_answer_that_nobody_waits_for_is_not_decoded_further(versions: dict[str, Any]) -> None:
    replica = versions["1"][0]
    body = json.dumps({**TEXT, "max_tokens": 64, "n": 60, "stream": True, "stop": ["\0never"]}).encode()

    async def leave() -> int:
        parts = replica.answer("/v1/completions", b"", [(b"content-type", b"application/json")], body)
        await anext(parts)
        assert replica.describe()["queue"] == 1
        await parts.aclose()
        for _ in range(100):
            if not replica.describe()["queue"]:
                break
            await asyncio.sleep(0.02)
        return replica.describe()["queue"]

    assert asyncio.run(leave()) == 0
