"""A proxy between MLflow's client and its server that fails as told."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections import deque
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, get_args

Fault = Literal["none", "429", "500", "404", "empty", "braces", "html", "lost answer", "twice", "hang", "late"]
FAULTS: tuple[Fault, ...] = get_args(Fault)
"""`429` asks to be left alone for an hour. `empty`, `braces` and `html` are answers with status 200, of a proxy that
does not forward. `lost answer` and `twice` forward first. `hang` never answers; `late` forwards when the client has
given up."""

_BODIES = {"429": b"", "500": b"", "404": b"<html>no such service</html>", "empty": b"", "braces": b"{}"}


class FaultyProxy:
    """Forwards to the server at `upstream` (a port), one fault of `faults` a request as long as there are some.

    `gate`, cleared, makes every request wait. `requests` counts those that came, `answers` those that were answered.
    """

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.faults: deque[Fault] = deque()
        self.gate = threading.Event()
        self.gate.set()
        self.requests = self.answers = 0
        self.port = 0
        self._server: ThreadingHTTPServer | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listens, on the same port as ever."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                proxy._handle(self)

            do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """From now on connections are refused."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    def fail(self, faults: Iterable[Fault]) -> None:
        self.faults.extend(faults)

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        self.requests += 1
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        try:
            fault = self.faults.popleft()
        except IndexError:
            fault = "none"
        self.gate.wait()
        with contextlib.suppress(OSError):
            self._answer(request, body, fault)

    def _answer(self, request: BaseHTTPRequestHandler, body: bytes, fault: Fault) -> None:
        if fault in ("hang", "late"):
            request.connection.settimeout(60.0)
            request.connection.recv(1)  # returns when the client closes the connection
        if fault in ("none", "lost answer", "twice", "late"):
            status, content = self._forward(request, body)
            if fault == "twice":
                status, content = self._forward(request, body)
        else:
            status, content = int(fault) if fault.isdigit() else 200, _BODIES.get(fault, b"<html>log in first</html>")
        if fault in ("hang", "late", "lost answer"):
            request.close_connection = True
            request.connection.close()
            return
        request.send_response(status)
        if fault == "429":
            request.send_header("Retry-After", "3600")
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)
        self.answers += 1

    def _forward(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60.0)
        headers = {name: value for name, value in request.headers.items() if name.lower() != "host"}
        try:
            connection.request(request.command, request.path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()
