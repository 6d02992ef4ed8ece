"""A local server that speaks as an OpenAI-compatible endpoint does, or as the test makes it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes]  # status, headers, body


def completion(text: Any) -> Reply:
    """A chat completion."""
    body = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}
    return 200, {}, json.dumps(body).encode()


class StubEndpoint:
    """Answers each request by `answer(number of the request, its messages)`.

    Attributes:
        requests: (path, headers, payload) of each request, as they came.
        most_at_once: requests that were under way together.
    """

    def __init__(self, answer: Callable[[int, list[dict[str, str]]], Reply]) -> None:
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.most_at_once = 0
        self._answer, self._lock, self._now = answer, threading.Lock(), 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> StubEndpoint:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _take(self, path: str, headers: dict[str, str], payload: dict[str, Any]) -> Reply:
        with self._lock:
            self.requests.append((path, headers, payload))
            number = len(self.requests)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            return self._answer(number, payload["messages"])
        finally:
            with self._lock:
                self._now -= 1

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                size = int(self.headers["Content-Length"])
                payload = json.loads(self.rfile.read(size))
                status, headers, body = stub._take(self.path, dict(self.headers), payload)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.wfile.write(body)  # the client may have waited no longer

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def slowly(seconds: float, reply: Reply) -> Reply:
    """The reply, after a while."""
    time.sleep(seconds)
    return reply
