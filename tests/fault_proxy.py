"""A proxy for HTTP that does harm on request: it stands before a real server and counts what it did.

with FaultProxy(port) as proxy:
    proxy.add(Fault("cut", times=2, method="GET", after_bytes=1000))
    ...
    assert proxy.fired["cut"] == 2
"""

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

_PIECE = 16 << 10
_ONLY_BETWEEN_TWO = {"connection", "keep-alive", "expect", "transfer-encoding"}


@dataclass
class Fault:
    """What to do to the next requests that match.

    `error`: answers `status` with `code` as S3's XML. `latency`: waits `seconds` first. `reset`: breaks the connection
    without an answer; the server never hears of it. `lose`: the same, after the server did what was asked. `cut`: the
    answer's body ends after `after_bytes`. `empty`: the answer has no body, and says so. `trickle`: bodies move at
    `bytes_per_s`, in both directions.
    """

    mode: Literal["error", "latency", "reset", "lose", "cut", "empty", "trickle"]
    times: int = 1
    share: float = 1.0
    """Of the requests that match, which of them by chance."""
    after_requests: int = 0
    """Requests that match and are spared first."""
    method: str = ""
    path: str = ""
    """A part of the path or the query."""
    status: int = 500
    code: str = "InternalError"
    seconds: float = 0.0
    after_bytes: int = 0
    bytes_per_s: float = 0.0

    def matches(self, method: str, path: str) -> bool:
        return self.times > 0 and self.method in ("", method) and self.path in path


class FaultProxy:
    def __init__(self, server_port: int) -> None:
        self.fired: Counter[str] = Counter()
        self.requests: list[str] = []
        self._faults: list[Fault] = []
        self._chance = random.Random(0)
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self, "server_port": server_port})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # clients that give up are the purpose
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def clear(self) -> None:
        """Forgets faults, counts and requests."""
        with self._lock:
            self._faults.clear()
            self.fired.clear()
            self.requests.clear()

    def take(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests.append(f"{method} {path}")
            for fault in self._faults:
                if not fault.matches(method, path):
                    continue
                if fault.after_requests > 0:
                    fault.after_requests -= 1
                    continue
                if self._chance.random() >= fault.share:
                    continue
                fault.times -= 1
                self.fired[fault.mode] += 1
                return fault
            return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy
    server_port: int

    def log_message(self, *_: object) -> None:
        pass

    def handle_expect_100(self) -> bool:
        self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _pass_on(self) -> None:
        fault = self.proxy.take(self.command, self.path)
        mode = fault.mode if fault is not None else ""
        rate = fault.bytes_per_s if fault is not None and mode == "trickle" else 0.0
        if rate and self.command == "PUT":  # small buffers, or the kernel would take megabytes at once
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _PIECE)
        body = self._take_body(rate)
        if fault is not None and mode == "latency":
            time.sleep(fault.seconds)
        if mode == "reset":
            return self._break()
        if fault is not None and mode == "error":
            text = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>injected</Message></Error>".encode()
            self._send_head(fault.status, [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))])
            if self.command != "HEAD":
                self.wfile.write(text)
            return None
        server = http.client.HTTPConnection("127.0.0.1", self.server_port, timeout=60)
        try:
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _ONLY_BETWEEN_TWO:
                    server.putheader(name, value)
            server.endheaders(body or None)
            answer = server.getresponse()
            if mode == "lose":
                answer.read()
                return self._break()
            return self._answer(answer, fault, rate)
        finally:
            server.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

    def _take_body(self, rate: float) -> bytes:
        left, parts = int(self.headers.get("Content-Length", 0)), []
        while left > 0:
            piece = self.rfile.read(min(left, _PIECE))
            if not piece:
                raise ConnectionAbortedError
            parts.append(piece)
            left -= len(piece)
            if rate:
                time.sleep(len(piece) / rate)
        return b"".join(parts)

    def _answer(self, answer: http.client.HTTPResponse, fault: Fault | None, rate: float) -> None:
        mode = fault.mode if fault is not None else ""
        head = [(name, value) for name, value in answer.getheaders() if name.lower() not in _ONLY_BETWEEN_TWO]
        if mode == "empty":
            head = [(name, "0" if name.lower() == "content-length" else value) for name, value in head]
            return self._send_head(answer.status, head)
        if answer.length is None:  # its end is the end of the connection
            self.close_connection = True
        self._send_head(answer.status, head)
        left = fault.after_bytes if fault is not None and mode == "cut" else None
        while piece := answer.read(_PIECE if left is None else min(_PIECE, left)):
            self.wfile.write(piece)
            if left is not None:
                left -= len(piece)
            if rate:
                time.sleep(len(piece) / rate)
        if mode == "cut":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_WR)
        return None

    def _send_head(self, status: int, head: list[tuple[str, str]]) -> None:
        self.send_response_only(status)
        for name, value in head:
            self.send_header(name, value)
        self.end_headers()

    def _break(self) -> None:
        """Ends the connection with a reset."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()  # it holds the socket open
            self.connection.close()
