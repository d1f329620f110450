"""The crowd: clients that pull random blobs and random ranges of them, some slowly, and leave when they like.

    python tests/crowd.py '{"port": 5000, "repository": "library/soak", "blobs": {"sha256:…": "/…/data"}, …}'

All are one thread of a process of its own, which costs as little as it can. It prints one line of JSON, the `Tally`.
What comes is compared with the stored file byte by byte, also where a transfer does not come to its end.
"""

import hashlib
import json
import math
import random
import re
import selectors
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from typing import Self

HOST = "127.0.0.1"
TICK = 0.05  # seconds
BLOCK = 256 << 10  # bytes
MAX_HEAD = 64 << 10  # bytes
MAX_WRONG = 20  # that are described
SLOW_RCVBUF = 32 << 10  # bytes
SLOW_RATES = (50_000, 500_000)  # bytes per second
# Shares: of clients those that read slowly; of pulls those of a range, and those that are left; of these the ones that
# are left because it took too long, in place of after some bytes; of finished pulls those followed by another one over
# the same connection.
SLOW, RANGED, LEAVING, IMPATIENT, KEPT = 0.2, 0.4, 0.3, 0.5, 0.5
PATIENCE = 4.0  # seconds, on average


class Visit(NamedTuple):
    """Say what is pulled: `blobs` are the stored files by digest. After so many `seconds` all clients leave."""

    port: int
    repository: str
    blobs: dict[str, str]
    clients: int
    seconds: float
    seed: int


class Tally(NamedTuple):
    """Count how transfers ended, and the bytes of all bodies; `wrong` says what came that should not have.

    A transfer is `finished` (whole and right), `left` by its client (`early`: before the answer began), or `broken` off
    by the mirror in a way that the client notices; or it has no answer, or one with another status, or it is `wrong`.
    """

    ends: Counter[str]
    received: int
    wrong: list[str]


class Wrong(Exception):
    """Say what came that should not have."""


class Blob(NamedTuple):
    """Hold a blob and the path at which it is pulled."""

    path: str
    content: bytes

    @classmethod
    def read(cls, repository: str, digest: str, file: str) -> Self:
        """Read a blob's file, of which the digest must be true."""
        content = Path(file).read_bytes()
        if f"sha256:{hashlib.sha256(content).hexdigest()}" != digest:
            raise Wrong(f"{file} is not {digest}")
        return cls(f"/v2/{repository}/blobs/{digest}", content)


class Pull:
    """Ask for a blob or a range of it, and compare what comes with what should."""

    def __init__(self, blob: Blob, asked: str, first: int, last: int):
        self.received = 0
        self.status = ""  # until the head is there
        self._blob = blob
        self._asked, self._first, self._last = asked, first, last
        self.size = last + 1 - first
        self._head = b""

    @classmethod
    def whole(cls, blob: Blob) -> Self:
        """Return the pull of a whole blob."""
        return cls(blob, "", 0, len(blob.content) - 1)

    @classmethod
    def range(cls, blob: Blob, source: random.Random) -> Self:
        """Return the pull of a random range, in one of the three ways to write it (RFC 9110, 14.1.2)."""
        size = len(blob.content)
        first, last = sorted((source.randrange(size), source.randrange(size)))
        ways = ((f"{first}-{last}", last), (f"{first}-", size - 1), (f"-{size - first}", size - 1))
        asked, last = source.choice(ways)
        return cls(blob, asked, first, last)

    @property
    def finished(self) -> bool:
        """Tell whether all has come."""
        return bool(self.status) and self.received == self.size

    @property
    def refused(self) -> bool:
        """Tell whether the answer is an error, of which the body is not read."""
        return self.status not in ("", "200", "206")

    def request(self) -> bytes:
        """Return the request."""
        lines = [f"GET {self._blob.path} HTTP/1.1", f"Host: {HOST}", f"Range: bytes={self._asked}", "", ""]
        return "\r\n".join(line for line in lines if self._asked or "Range" not in line).encode()

    def take(self, data: bytes) -> None:
        """Take what has come; raise Wrong."""
        if not self.status:
            head, end, data = (self._head + data).partition(b"\r\n\r\n")
            if not end and len(head) < MAX_HEAD:
                self._head = head
                return
            self._check(head.decode("latin-1"))
        if self.refused:
            return
        if self.received + len(data) > self.size:
            raise Wrong(f"{self}: more than {self.size} bytes")
        if not self._blob.content.startswith(data, self._first + self.received):
            raise Wrong(f"{self}: other bytes than these {len(data)} after the first {self.received}")
        self.received += len(data)

    def _check(self, head: str) -> None:
        found = re.match(r"HTTP/1\.1 (\d{3}) ", head)
        if found is None:
            raise Wrong(f"{self}: the answer begins with {head[:1000]!r}")
        self.status = found[1]
        fields = dict(re.findall(r"^(\S+): (.*)\r?$", head.lower().replace("\r", ""), re.M))
        span = f"bytes {self._first}-{self._last}/{len(self._blob.content)}" if self._asked else None
        expected = ("206" if self._asked else "200", str(self.size), span, None)
        given = (self.status, *map(fields.get, ("content-length", "content-range", "transfer-encoding")))
        if given != expected and not self.refused:
            raise Wrong(f"{self}: {given} in place of {expected}")

    def __str__(self) -> str:
        return f"{self._asked or 'all'} of {self._blob.path}"


class Wish(NamedTuple):
    """Say what a client pulls, and after how many seconds, or how many bytes of the body, it leaves."""

    pull: Pull
    seconds: float
    bytes: float


class Client:
    """Pull one thing or more over a connection of its own; a slow client has a rate, in bytes per second."""

    def __init__(self, port: int, rate: float, wish: Wish):
        self.rate = rate
        self.socket = socket.socket()
        if rate:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_RCVBUF)  # counts if set before connect
        self.socket.settimeout(30)
        self.socket.connect((HOST, port))
        self.begin(wish)
        self.socket.setblocking(False)

    def begin(self, wish: Wish) -> None:
        """Ask for something."""
        self.pull, self._wish, self._began = wish.pull, wish, time.monotonic()
        with suppress(ConnectionError):  # receive() will tell
            self.socket.sendall(self.pull.request())

    @property
    def wants_to_leave(self) -> bool:
        """Tell whether this took too long, or was enough."""
        return time.monotonic() - self._began > self._wish.seconds or self.pull.received > self._wish.bytes

    def due(self) -> int:
        """Return how many bytes a slow client may read now."""
        return int(self.rate * (time.monotonic() - self._began)) - self.pull.received

    def receive(self, limit: int) -> str | None:
        """Take at most so many bytes of what has come; return how the pull ended, or None. Raises Wrong."""
        try:
            data = self.socket.recv(limit)
        except BlockingIOError:
            return None
        except ConnectionError:
            data = b""
        if not data:
            return "broken" if self.pull.status else "no answer"
        self.pull.take(data)
        if self.pull.refused:
            return f"status {self.pull.status}"
        if self.pull.finished:
            return "finished"
        return "left" if self.wants_to_leave else None


class Crowd:
    """Let the clients come, pull and leave."""

    def __init__(self, visit: Visit):
        self._visit = visit
        self._source = random.Random(visit.seed)
        self._blobs = [Blob.read(visit.repository, digest, file) for digest, file in visit.blobs.items()]
        self._weights = [len(blob.content) ** -0.25 for blob in self._blobs]
        self._clients: set[Client] = set()
        self._selector = selectors.DefaultSelector()  # has those that are not slow
        self._ends: Counter[str] = Counter()
        self._received = 0
        self._wrong: list[str] = []

    def run(self) -> Tally:
        """Pull; return after the visit's time."""
        end = time.monotonic() + self._visit.seconds
        while (now := time.monotonic()) < end:
            self._look_around()
            self._read_until(now + TICK)
        for client in list(self._clients):
            self._leave(client)
        return Tally(self._ends, self._received, self._wrong)

    def _look_around(self) -> None:
        for client in list(self._clients):
            if client.wants_to_leave:
                self._leave(client)
            elif client.rate and (due := client.due()) > 0:
                self._read(client, due)
        while len(self._clients) < self._visit.clients:
            self._admit()

    def _read_until(self, end: float) -> None:
        while (seconds := end - time.monotonic()) > 0:
            for key, _ in self._selector.select(seconds):
                self._read(key.data, BLOCK)

    def _admit(self) -> None:
        rate = self._source.uniform(*SLOW_RATES) if self._source.random() < SLOW else 0
        client = Client(self._visit.port, rate, self._wish())
        self._clients.add(client)
        if not rate:
            self._selector.register(client.socket, selectors.EVENT_READ, client)

    def _wish(self) -> Wish:
        """Return what to pull next, and when to leave."""
        blob, source = self._source.choices(self._blobs, self._weights)[0], self._source
        pull = Pull.range(blob, source) if source.random() < RANGED else Pull.whole(blob)
        if source.random() >= LEAVING:
            return Wish(pull, math.inf, math.inf)
        if source.random() < IMPATIENT:
            return Wish(pull, source.expovariate(1 / PATIENCE), math.inf)
        return Wish(pull, math.inf, source.randrange(pull.size))

    def _leave(self, client: Client) -> None:
        self._end(client, "left" if client.pull.status else "left early")

    def _read(self, client: Client, limit: int) -> None:
        try:
            end = client.receive(min(limit, BLOCK))
        except Wrong as wrong:
            self._wrong = [*self._wrong, str(wrong)][:MAX_WRONG]
            end = "wrong"
        if end:
            self._end(client, end)

    def _end(self, client: Client, how: str) -> None:
        """Count the end of a pull; where it was a good one, the connection may be used again."""
        self._ends[how] += 1
        self._received += client.pull.received
        if how == "finished" and self._source.random() < KEPT:
            client.begin(self._wish())
            return
        if not client.rate:
            self._selector.unregister(client.socket)
        client.socket.close()
        self._clients.discard(client)


@contextmanager
def visiting(visit: Visit) -> Iterator[subprocess.Popen[str]]:
    """Let a crowd pull in a process of its own, which is ended at the latest with the block."""
    command = [sys.executable, __file__, json.dumps(visit._asdict())]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def tally(process: subprocess.Popen[str]) -> Tally:
    """Return what came of a visit that is over."""
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, "the crowd failed; its message stands above"
    ends, received, wrong = json.loads(output)
    return Tally(Counter(ends), received, wrong)


if __name__ == "__main__":
    print(json.dumps(Crowd(Visit(**json.loads(sys.argv[1]))).run()))
