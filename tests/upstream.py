"""A recording upstream on a raw socket: it does what a real registry will not do.

    with RawUpstream() as upstream:
        upstream.answers["/v2/library/x/blobs/sha256:…"] = reply(200, b"short", {"Content-Length": "1000"})

An answer is the bytes to send (the connection then closes unless the answer has a true length), or a function that is
given the request and the connection and does as it likes with both.
"""

from __future__ import annotations

import json
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from types import TracebackType
from typing import NamedTuple
from typing import Self

LOOPBACK = "127.0.0.1"


class Request(NamedTuple):
    """Record a request: `target` is as it stood on the line, header names are lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def path(self) -> str:
        """Return the target without its query."""
        return self.target.partition("?")[0]


Answer = bytes | Callable[[Request, socket.socket], None]


def reply(status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
    """Return an answer; its length is set unless `headers` do, or name another framing."""
    fields = dict(headers or {})
    framed = {name.lower() for name in fields} & {"content-length", "transfer-encoding", "x-unframed"}
    if not framed:
        fields["Content-Length"] = str(len(body))
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def reply_json(status: int, content: object, headers: Mapping[str, str] | None = None) -> bytes:
    """Return an answer of JSON."""
    return reply(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})


def head_of(answer: bytes) -> bytes:
    """Return an answer without its body, as to a HEAD request."""
    return answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"


class RawUpstream:
    """Listen on a loopback address; answer by path, all others with the default, a 404; record all requests.

    `closed` is set when a client has closed a connection. With a `context` it speaks TLS.
    """

    def __init__(self, host: str = LOOPBACK, context: ssl.SSLContext | None = None):
        self._context = context
        self._listener = socket.create_server((host, 0), backlog=128)
        scheme = "http" if context is None else "https"
        self.host = f"{host}:{self._listener.getsockname()[1]}"
        self.url = f"{scheme}://{self.host}"
        self.answers: dict[str, Answer] = {}
        self.default: Answer = reply_json(404, {"errors": [{"code": "NAME_UNKNOWN"}]})
        self.requests: list[Request] = []
        self.connections = 0
        self.closed = threading.Event()
        self.ending = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.ending.set()
        with suppress(OSError):  # it was closed before
            self._listener.shutdown(socket.SHUT_RDWR)  # accept() would wait for one more client
        self._listener.close()

    def asked(self, path: str = "") -> list[Request]:
        """Return the recorded requests whose path ends so."""
        return [request for request in self.requests if request.path.endswith(path)]

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
            with connection, connection.makefile("rb") as stream:
                while request := _read_request(stream.readline, stream.read):
                    self.requests.append(request)
                    if not self._answer(request, connection):
                        return
                self.closed.set()
        except OSError:
            self.closed.set()

    def _answer(self, request: Request, connection: socket.socket) -> bool:
        """Send the answer; tell whether the connection stays open for the next request."""
        answer = self.answers.get(request.path, self.default)
        if callable(answer):
            answer(request, connection)
            return False
        connection.sendall(head_of(answer) if request.method == "HEAD" else answer)
        return request.method == "HEAD" or _is_whole(answer)


def _read_request(readline: Callable[[], bytes], read: Callable[[int], bytes]) -> Request | None:
    words = readline().decode("latin-1").split()
    if len(words) != 3:
        return None
    headers = {}
    while line := readline().decode("latin-1").strip():
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return Request(words[0], words[1], headers, read(int(headers.get("content-length", 0))))


def _is_whole(answer: bytes) -> bool:
    head, _, body = answer.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    chunked = fields.get(b"transfer-encoding") == b"chunked" and body.endswith(b"0\r\n\r\n")
    return chunked or head.startswith(b"HTTP/1.1 304") or fields.get(b"content-length") == str(len(body)).encode()


def token_realm(url: str) -> str:
    """Return the realm of an upstream that gives its own tokens."""
    return f"{url}/realm"


def sends(*parts: bytes, then: Callable[[socket.socket], object] = lambda _: None) -> Callable[..., None]:
    """Return an answer of these bytes, after which the connection is treated so and closed."""

    def answer(request: Request, connection: socket.socket) -> None:
        for part in parts:
            connection.sendall(part)
        then(connection)

    return answer


def reset(connection: socket.socket) -> None:
    """Let a connection end with a reset when it is closed."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
