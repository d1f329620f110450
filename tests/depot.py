"""What the tests of the cache share: an upstream that serves a blob as it is told, and a client that takes its time."""

from __future__ import annotations

import http.client
import re
import socket
import threading
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from typing import Self

from images import digest_of
from lab import Lab
from lab import Reply
from lab import ask
from processes import poll
from serving import Mirror
from upstream import Request
from upstream import reply

PATIENCE = 30  # seconds after which a test that hangs goes on, and fails
TIMEOUTS = {"connect_timeout": 1, "first_byte_timeout": 3, "idle_timeout": 2, "cache_min_free": 0}
BROKEN = (http.client.IncompleteRead, ConnectionResetError)


class Depot:
    """Serve one content by GET, HEAD and Range, and note what it was asked.

    After `pause` bytes of the whole it waits until `go` is set; after `cut` bytes of an answer it breaks off. The byte
    number `wrong` is another one. `headers` come with each answer.
    """

    def __init__(
        self,
        content: bytes,
        digest: str = "",
        pause: int | None = None,
        cut: int | None = None,
        wrong: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.content, self.digest = content, digest or digest_of(content)
        self.pause, self.cut, self.wrong, self.headers = pause, cut, wrong, dict(headers or {})
        self.go = threading.Event()
        self.asked: list[Request] = []
        self._alone = threading.Lock()

    def __call__(self, request: Request, connection: socket.socket) -> None:
        """Answer one request."""
        self.asked.append(request)
        size = len(self.content)
        first, last = bounds(request.headers.get("range"), size)
        fields = {"Content-Length": str(last + 1 - first), **self.headers}
        if "range" in request.headers:
            fields["Content-Range"] = f"bytes {first}-{last}/{size}"
        head = reply(206 if "range" in request.headers else 200, b"", fields)
        connection.sendall(head)
        if request.method == "HEAD":
            return
        stop = last + 1 if self.cut is None else min(last + 1, first + self.cut)
        middle = stop if self.pause is None else min(max(first, self.pause), stop)
        connection.sendall(self._bytes(first, middle))
        if middle < stop or middle == self.pause:
            self.go.wait(PATIENCE)
        connection.sendall(self._bytes(middle, stop))

    def _bytes(self, first: int, stop: int) -> bytes:
        part = bytearray(self.content[first:stop])
        if self.wrong is not None and first <= self.wrong < stop:
            part[self.wrong - first] ^= 1
        return bytes(part)

    @property
    def ranges(self) -> list[str | None]:
        """Return the Range headers of the GETs so far."""
        return [request.headers.get("range") for request in self.asked if request.method == "GET"]


def bounds(header: str | None, size: int) -> tuple[int, int]:
    """Return the first and the last byte that a Range header asks for."""
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", header or "bytes=0-")
    assert found is not None
    return int(found[1]), min(int(found[2] or size - 1), size - 1)


class Reading:
    """Ask for something, and read it bit by bit; leaving the `with` block ends the connection."""

    def __init__(self, mirror: Mirror, path: str, headers: Mapping[str, str] | None = None) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", mirror.port, timeout=PATIENCE)
        self._connection.request("GET", path, headers=dict(headers or {}))
        self._response = self._connection.getresponse()
        self.status = self._response.status
        self.headers = {name.lower(): value for name, value in self._response.getheaders()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._response.close()
        self._connection.close()

    def read(self, size: int | None = None) -> bytes:
        """Return so many bytes, or all that are left; raise one of BROKEN where the answer breaks off."""
        return self._response.read(size)


def at_once(*asks: Callable[[], Reply]) -> list[Reply]:
    """Ask all at the same time; an answer that broke off, or an error, is missing."""
    replies: list[Reply] = []
    threads = [threading.Thread(target=lambda one=one: replies.append(one())) for one in asks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    return replies


def cached_lab(folder: Path, *options: str, **settings: Any) -> Lab:
    """Return a lab whose mirror has its cache in this folder."""
    return Lab(options=options, cache_dir=folder, **{**TIMEOUTS, **settings})


class Cached:
    """Bind a lab, whose mirror has a cache, to a repository and its blobs."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        self.folder = folder
        self.mirror = lab.mirror

    def serves(self, depot: Depot, repository: str | None = None) -> str:
        """Let upstream serve a blob; return the path at which a client asks for it."""
        name = repository or self.lab.name
        self.lab.upstream.answers[f"/v2/library/{name}/blobs/{depot.digest}"] = depot
        return f"/v2/{name}/blobs/{depot.digest}"

    def ask(self, path: str, headers: Mapping[str, str] | None = None, method: str = "GET") -> Reply:
        """Ask the mirror."""
        return ask(self.mirror, path, headers, method)

    def file(self, digest: str, suffix: str = "") -> Path:
        """Return where the cache has a blob."""
        algorithm, _, encoded = digest.partition(":")
        return self.folder / "blobs" / algorithm / encoded[:2] / f"{encoded}{suffix}"

    def has(self, depot: Depot) -> bool:
        """Tell whether the whole blob is on disk; a moment may pass after its last byte."""
        return poll(lambda: self.file(depot.digest).is_file(), 5)

    def is_down(self) -> None:
        """Let upstream break off whatever it is asked."""
        self.lab.upstream.answers.clear()
        self.lab.upstream.default = breaks_off


def breaks_off(request: Request, connection: socket.socket) -> None:
    """Answer nothing."""
