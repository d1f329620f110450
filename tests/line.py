"""Bad lines: a proxy in front of a TLS server that spoils what it passes on, and the hub behind two of them.

    with Hub() as hub, DistantHub(hub) as distant, Mirror(registries=distant.registries_file) as mirror:
        distant.cdn.faults = [Cut(exponential(5 * MB))]

The faults of a line may be changed while it runs. Those of bodies leave short ones alone, and with them tokens,
manifests and redirects.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import random
import re
import secrets
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO
from typing import NamedTuple
from typing import NoReturn
from typing import Self
from typing import cast
from urllib.parse import parse_qs
from urllib.parse import urlsplit

import trustme
from hub import REDIRECT_TO_CDN
from hub import TOKEN_AUTH
from hub import Hub
from hub import write_registries
from parts import Premises
from parts import server_context
from upstream import reply
from upstream import reset

REGISTRY_HOST = "127.0.0.13"
REGISTRY_LINE_HOST = "127.0.0.14"
CDN_LINE_HOST = "127.0.0.15"
BLOCK = 64 << 10  # bytes that are passed on at once
SHORT = 256 << 10  # bytes of a body that is left alone
CONNECTIONS = 512  # that wait to be accepted

# Says after how many bytes of a body something happens, anew for each body.
Distance = Callable[[], float]


def exponential(mean: float, seed: int = 0) -> Distance:
    """Return random distances with this mean: something happens after any byte with the same probability."""
    source = random.Random(seed)
    return lambda: source.expovariate(1 / mean)


def uniform(low: int, high: int, seed: int = 0) -> Distance:
    """Return random distances between two bounds."""
    source = random.Random(seed)
    return lambda: source.uniform(low, high)


class Ended(Exception):
    """Say that a connection is to be closed."""


class LineRequest(NamedTuple):
    """Record what was asked through a line; `range` is the header's value, "" without the header."""

    method: str
    path: str
    query: str
    range: str
    authorized: bool


class Head:
    """Hold the head of a request or of an answer; it may be changed."""

    def __init__(self, first: str, headers: http.client.HTTPMessage) -> None:
        self.first = first
        self.headers = headers

    @classmethod
    def read(cls, stream: BinaryIO) -> Head:
        """Read a head; raise Ended where the connection ends before it."""
        first = stream.readline().decode("latin-1").rstrip()
        if not first:
            raise Ended
        return cls(first, http.client.parse_headers(stream))

    def __bytes__(self) -> bytes:
        lines = [self.first, *(f"{name}: {value}" for name, value in self.headers.items()), "", ""]
        return "\r\n".join(lines).encode("latin-1")

    def put(self, name: str, value: str) -> None:
        """Set a header, in place of any that has its name."""
        del self.headers[name]
        self.headers[name] = value

    @property
    def target(self) -> str:
        """Return the target of a request."""
        return self.first.split()[1]

    def record(self) -> LineRequest:
        """Return the record of a request."""
        method, (path, _, query) = self.first.split()[0], self.target.partition("?")
        return LineRequest(method, path, query, self.headers.get("Range", ""), "Authorization" in self.headers)

    def body_length(self, method: str) -> int:
        """Return how long the body of this answer is; raise Ended where its head does not say."""
        if method == "HEAD" or self.first.split()[1] in ("204", "304"):
            return 0
        if "Content-Length" not in self.headers:
            raise Ended
        return int(self.headers["Content-Length"])


class Transfer:
    """Pass one answer on; `left` counts the bytes of its body that are still to come."""

    def __init__(self, request: LineRequest, head: Head, connection: Connection) -> None:
        self.request = request
        self.head = head
        self.client = connection.client
        self.length = self.left = head.body_length(request.method)
        self._connection = connection

    def run(self, faults: Sequence[Fault]) -> None:
        """Pass head and body on, with these faults; raise Ended where the connection cannot serve another request."""
        for fault in faults:
            fault.change_head(self)
        self.client.sendall(bytes(self.head))
        distances = [(int(distance), fault) for fault in faults if (distance := fault.distance(self)) is not None]
        for distance, fault in sorted(distances, key=lambda pair: pair[0]):
            self.pass_on(distance - (self.length - self.left))
            fault.strike(self)
        self.pass_on(self.left)
        if self.length and self.head.headers["Content-Length"] != str(self.length):
            raise Ended

    def pass_on(self, count: int) -> None:
        """Pass so many bytes on."""
        while count > 0:
            block = self.read(count)
            self.client.sendall(block)
            count -= len(block)

    def read(self, count: int) -> memoryview:
        """Return at most so many bytes, which are not passed on."""
        room = self._connection.buffer[: min(count, BLOCK)]
        received = self._connection.answers.readinto1(room)
        if not received:
            raise Ended
        self.left -= received
        return room[:received]

    def wait(self, seconds: float) -> None:
        """Pause, unless the line ends."""
        if self._connection.line.ending.wait(seconds):
            raise Ended


@dataclass(kw_only=True, eq=False)
class Fault:
    """Spoil bodies of more than `above` bytes: the first `times` ones (None: all) after the first `spare` ones.

    `of` limits it to paths that hold this, `ranged` to requests with a Range, or to those without. `applied` counts
    what was spoilt.
    """

    above: int = SHORT
    times: int | None = None
    spare: int = 0
    of: str = ""
    ranged: bool | None = None
    applied: int = field(default=0, init=False)
    _met: int = field(default=0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def change_request(self, head: Head) -> bytes | None:
        """Change a request before it goes on; return the answer to give in its place, or None."""

    def change_head(self, transfer: Transfer) -> None:
        """Change the head of an answer."""

    def distance(self, transfer: Transfer) -> float | None:
        """Return after how many bytes of this body to strike, or None."""

    def strike(self, transfer: Transfer) -> None:
        """Do what there is to do in the middle of a body."""

    def _means(self, request: LineRequest) -> bool:
        return self.of in request.path and self.ranged in (None, bool(request.range))

    def _takes(self, transfer: Transfer) -> bool:
        """Tell whether to spoil this transfer, and count it."""
        return transfer.length > self.above and self._means(transfer.request) and self._counts()

    def _counts(self) -> bool:
        with self._lock:
            self._met += 1
            if self._met <= self.spare or (self.times is not None and self.applied >= self.times):
                return False
            self.applied += 1
            return True


@dataclass(eq=False)
class Midway(Fault):
    """Do something after some bytes of a body, or nothing where the body is shorter."""

    after: Distance | int

    def distance(self, transfer: Transfer) -> float | None:
        """Return after how many bytes of this body to strike, or None."""
        distance = self.after if isinstance(self.after, int) else self.after()
        return distance if distance < transfer.length and self._takes(transfer) else None


class Cut(Midway):
    """End the connection as if it were over, without the alert by which TLS tells an end from a cut."""

    def strike(self, transfer: Transfer) -> NoReturn:
        """Close the connection."""
        raise Ended


class CloseNotify(Midway):
    """End the connection as a server does that stops serving: with the alert that TLS has for an end."""

    def strike(self, transfer: Transfer) -> NoReturn:
        """Send the alert; close the connection once the client has done so, or after a while."""
        transfer.client.settimeout(5)
        with contextlib.suppress(OSError):
            transfer.client.unwrap()
        raise Ended


class Reset(Midway):
    """End the connection with a reset; what the client has not read by then is lost."""

    def strike(self, transfer: Transfer) -> NoReturn:
        """Reset the connection."""
        reset(transfer.client)
        raise Ended


class Stall(Midway):
    """Send nothing any more, and keep the connection until the client closes it."""

    def strike(self, transfer: Transfer) -> NoReturn:
        """Wait for the client's end."""
        with contextlib.suppress(OSError):
            transfer.client.recv(1)
        raise Ended


@dataclass(eq=False)
class Drip(Midway):
    """Send so many `pieces` of one byte with a `pause` (seconds) after each, and the rest at once."""

    pieces: int = field(default=50, kw_only=True)
    pause: float = field(default=0.02, kw_only=True)

    def strike(self, transfer: Transfer) -> None:
        """Let the bytes drip."""
        for _ in range(min(self.pieces, transfer.left)):
            transfer.pass_on(1)
            transfer.wait(self.pause)


class Corrupt(Midway):
    """Turn one byte into another."""

    def strike(self, transfer: Transfer) -> None:
        """Send another byte in place of the next one."""
        (byte,) = transfer.read(1)
        transfer.client.sendall(bytes([byte ^ 0xFF]))


@dataclass(eq=False)
class WrongLength(Fault):
    """Say in Content-Length that a body is `by` bytes longer than it is, or shorter; then close the connection.

    The body is sent whole all the same.
    """

    by: int

    def change_head(self, transfer: Transfer) -> None:
        """Change the length."""
        if self._takes(transfer):
            transfer.head.put("Content-Length", str(transfer.length + self.by))


class IgnoreRange(Fault):
    """Answer with 200 and the whole body where a range was asked for."""

    def change_request(self, head: Head) -> None:
        """Drop Range and what goes with it."""
        request = head.record()
        if request.range and self._means(request) and self._counts():
            del head.headers["Range"]
            del head.headers["If-Range"]


@dataclass(eq=False)
class ShiftRange(Fault):
    """Answer with another range than was asked for, from `by` bytes further on, and say so in Content-Range."""

    by: int

    def change_request(self, head: Head) -> None:
        """Ask for the other range."""
        request = head.record()
        if request.range and self._means(request) and self._counts():
            head.put("Range", re.sub("[0-9]+", lambda first: str(int(first[0]) + self.by), request.range, count=1))


@dataclass(eq=False)
class NewETag(Fault):
    """Give each answer after the first one for the same path another ETag; as to the content, see Corrupt."""

    _seen: Counter[str] = field(default_factory=Counter, init=False)

    def change_head(self, transfer: Transfer) -> None:
        """Change the ETag of an answer with a body."""
        path = transfer.request.path
        if transfer.length:
            self._seen[path] += 1
        if self._seen[path] > 1 and self._takes(transfer):
            transfer.head.put("ETag", f'"changed-{self._seen[path]}"')


@dataclass(eq=False)
class SignedAddresses(Fault):
    """Sign the address of each redirect anew; it belongs on the registry's line."""

    valid: set[str] = field(default_factory=set, init=False)

    def change_head(self, transfer: Transfer) -> None:
        """Add the signature to the address."""
        if location := transfer.head.headers.get("Location"):
            signature = secrets.token_urlsafe(12)
            self.valid.add(signature)
            transfer.head.put("Location", f"{location}{'&' if '?' in location else '?'}signature={signature}")


@dataclass(eq=False)
class ExpiringAddresses(Fault):
    """Take each signature once, and refuse it from then on, as where it has expired; it belongs on the CDN's line."""

    signed: SignedAddresses

    def change_request(self, head: Head) -> bytes | None:
        """Return a refusal where the signature is not, or no longer, valid."""
        (signature,) = parse_qs(head.record().query).get("signature", [""])
        with self._lock:
            if signature in self.signed.valid:
                self.signed.valid.remove(signature)
                return None
        self._counts()
        return reply(403, b"<Error><Code>AccessDenied</Code></Error>", {"Content-Type": "application/xml"})


class Connection:
    """Serve one client of a line in a thread of its own."""

    def __init__(self, line: Line, plain: socket.socket) -> None:
        self.line = line
        self.buffer = memoryview(bytearray(BLOCK))
        self._ends = [plain]
        self._thread = threading.Thread(target=self._run, args=(plain,), daemon=True)

    def start(self) -> None:
        """Start to serve."""
        self._thread.start()

    def end(self) -> None:
        """Let neither side be waited for any more."""
        for end in list(self._ends):
            with contextlib.suppress(OSError):
                # SSLSocket's own method would take the TLS state from under the thread that uses it.
                socket.socket.shutdown(end, socket.SHUT_RDWR)

    def join(self) -> None:
        """Wait until both sides are closed."""
        self._thread.join(10)

    def _run(self, plain: socket.socket) -> None:
        try:
            with plain, contextlib.suppress(OSError, Ended):
                self._serve(plain)
        finally:
            self.line.left(self)

    def _serve(self, plain: socket.socket) -> None:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.client = self.line.context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        with (
            self.client,
            self._connected() as server,
            self.client.makefile("rb") as requests,
            cast(io.BufferedReader, server.makefile("rb", BLOCK)) as self.answers,
        ):
            self._ends = [self.client, server]
            while not self.line.ending.is_set():
                self._exchange(Head.read(requests), server)

    def _connected(self) -> ssl.SSLSocket:
        plain = socket.create_connection(self.line.target)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self.line.trusting.wrap_socket(plain, server_hostname=self.line.target[0])

    def _exchange(self, request: Head, server: ssl.SSLSocket) -> None:
        faults, record = self.line.faults, request.record()
        self.line.requests.append(record)
        for fault in faults:
            if answer := fault.change_request(request):
                return self.client.sendall(answer)
        server.sendall(bytes(request))
        Transfer(record, Head.read(self.answers), self).run(faults)
        return None


class Line:
    """Listen with TLS at a loopback address, and pass requests and answers on, from and to a TLS server.

    Requests have no bodies, and answers have a Content-Length. `requests` records what was asked, `accepted` is the
    number of connections so far.
    """

    def __init__(self, host: str, server_url: str, authority: trustme.CA, ca_file: Path) -> None:
        self._listener = socket.create_server((host, 0), backlog=CONNECTIONS)
        self._connections: set[Connection] = set()
        self.url = f"https://{host}:{self._listener.getsockname()[1]}"
        self.target = cast(tuple[str, int], (urlsplit(server_url).hostname, urlsplit(server_url).port))
        self.context = server_context(authority, host)
        self.trusting = ssl.create_default_context(cafile=ca_file)
        self.ending = threading.Event()
        self.faults: Sequence[Fault] = ()
        self.requests: list[LineRequest] = []
        self.accepted = 0

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.ending.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        connections = list(self._connections)
        for connection in connections:
            connection.end()
        for connection in connections:
            connection.join()

    @property
    def open_connections(self) -> int:
        """Return how many clients are connected now."""
        return len(self._connections)

    def asked(self, of: str = "", method: str = "GET") -> list[LineRequest]:
        """Return the recorded requests of a method whose path holds `of`."""
        return [request for request in list(self.requests) if request.method == method and of in request.path]

    def forget(self) -> None:
        """Clear the record, and be a good line again."""
        self.faults = ()
        self.requests.clear()

    def left(self, connection: Connection) -> None:
        """Take note that a client is served no more."""
        self._connections.discard(connection)

    def _accept(self) -> None:
        while not self.ending.is_set():
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            connection = Connection(self, plain)
            self._connections.add(connection)
            self.accepted += 1
            connection.start()


class DistantHub(Premises):
    """Put a line in front of the hub's CDN, and one in front of a second registry that redirects to it.

    The registry stands on the hub's storage and takes the hub's tokens, so that it has all that is in the hub.
    """

    def __init__(self, hub: Hub) -> None:
        super().__init__(hub.authority)
        self._hub = hub

    def start(self) -> None:
        """Start the registry and the lines."""
        hub = self._hub
        self.cdn = self._line(CDN_LINE_HOST, hub.cdn_url)
        more, values = REDIRECT_TO_CDN + TOKEN_AUTH, {"cdn": self.cdn.url, "ca": self.ca_file, **hub.tokens.config}
        registry = self.docker_registry("registry", REGISTRY_HOST, hub.storage, more, **values)
        registry.wait()
        self.registry = self._line(REGISTRY_LINE_HOST, registry.url)
        self.registries_file = write_registries(self.folder / "registries.toml", {"docker.io": self.table()})

    def table(self) -> dict[str, object]:
        """Return its table of the registries file, as Hub.table()."""
        return self._hub.table() | {"endpoints": [self.registry.url]}

    def forget(self) -> None:
        """Clear the records of both lines, and make good lines of them."""
        self.registry.forget()
        self.cdn.forget()

    def _line(self, host: str, target: str) -> Line:
        return self._stack.enter_context(Line(host, target, self.authority, self.ca_file))
