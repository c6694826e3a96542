"""An ASGI application behind a real HTTP server on a free port, in a thread; or called by a client that leaves."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Serves in the length of the block; the base URL."""
    # httpx drops a connection that was idle for five seconds, and so does uvicorn by itself: a request may meet that.
    config = uvicorn.Config(
        app, log_level="error", access_log=False, timeout_keep_alive=120, timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


async def call(app: Any, body: dict[str, Any], leave_after: int | None = None) -> list[Any]:
    """Asks an application for a completion without a socket; the messages of its answer.

    Args:
        leave_after: so many messages the client leaves; 0: when none has come for a moment.
    """
    content = json.dumps(body).encode()
    sent: list[Any] = []
    left = asyncio.Event()
    messages = iter([{"type": "http.request", "body": content, "more_body": False}])

    async def receive() -> Any:
        if (message := next(messages, None)) is not None:
            return message
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == leave_after:
            left.set()

    if leave_after == 0:
        asyncio.get_running_loop().call_later(0.2, left.set)
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions"}
    scope |= {"query_string": b"", "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1)}
    scope |= {"scheme": "http", "http_version": "1.1", "server": ("x", 1), "root_path": ""}
    await asyncio.wait_for(app(scope, receive, send), 20)
    return sent
