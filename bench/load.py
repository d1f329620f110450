"""The load: many downloads of one blob at once, in one process of its own that costs as little as it can.

    python -m bench.load '{"port": 5000, "path": "/v2/…", "size": 100000000, "clients": 16}'

It prints one line of JSON, the `Outcome`. One thread does it all: downloads without a rate are read as they become
readable; those with one are looked at in turn, several times a second.
"""

import hashlib
import json
import re
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from typing import Self

from bench import ROOT

HOST = "127.0.0.1"
MAX_HEAD = 64 << 10  # bytes
TICKS = 20  # looks per second at a download that has a rate
BUFFER = memoryview(bytearray(1 << 20))


class LoadFailed(Exception):
    """Say that an answer was not what was asked for, or that the load did not end in time."""


class Job(NamedTuple):
    """Say what to download, and how.

    `size` is the blob's, in bytes, `rate` is each client's, in bytes per second (0: as fast as it comes), `rcvbuf` is
    each client's receive buffer in bytes (0: the kernel's choice). A job ends after `seconds`, and failed if it was to
    be `whole` and is not. With a `digest` each client's bytes are hashed; otherwise the kernel drops them uncopied.
    """

    port: int
    path: str
    size: int
    clients: int = 1
    rate: int = 0
    rcvbuf: int = 0
    seconds: float = 300
    whole: bool = True
    digest: str = ""


class Outcome(NamedTuple):
    """Hold what came of a job: its seconds, the bytes of all bodies, and how many downloads had which end."""

    seconds: float
    received: int
    started: int
    complete: int
    right: int

    @property
    def rate(self) -> float:
        """Return the bytes per second of all clients together."""
        return self.received / self.seconds


class Download:
    """Fetch the blob once, over a connection of its own that never blocks after the request is sent."""

    def __init__(self, job: Job):
        self.socket = socket.socket()
        if job.rcvbuf:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, job.rcvbuf)  # counts if set before connect
        self.socket.settimeout(30)
        self.socket.connect((HOST, job.port))
        self.socket.sendall(f"GET {job.path} HTTP/1.1\r\nHost: {HOST}:{job.port}\r\n\r\n".encode())
        self.socket.setblocking(False)
        self.started = time.monotonic()
        self.received = 0
        self._size = job.size
        self._head: bytes | None = b""
        self._hash = hashlib.sha256() if job.digest else None

    @property
    def answered(self) -> bool:
        """Tell whether the head of the answer is there."""
        return self._head is None

    @property
    def complete(self) -> bool:
        """Tell whether the whole body is there."""
        return self.received == self._size

    def digest(self) -> str:
        """Return the digest of the bytes so far, as registries write it; "" if they are not hashed."""
        return f"sha256:{self._hash.hexdigest()}" if self._hash else ""

    def receive(self, limit: int) -> None:
        """Take at most `limit` bytes of what has come, if anything has; raise LoadFailed for a wrong answer."""
        wanted = min(limit, len(BUFFER), self._size - self.received)
        dropped = self.answered and self._hash is None
        try:
            # MSG_TRUNC: Linux drops TCP's bytes without a copy, tcp(7).
            count = self.socket.recv_into(BUFFER, wanted, socket.MSG_TRUNC if dropped else 0)
        except BlockingIOError:
            return
        if count == 0:
            raise LoadFailed(f"the connection was closed after {self.received} of {self._size} bytes")
        if self._head is not None:
            self._receive_head(self._head + bytes(BUFFER[:count]))
        else:
            self._count(BUFFER[:count])

    def _receive_head(self, data: bytes) -> None:
        head, end, body = data.partition(b"\r\n\r\n")
        if not end and len(data) < MAX_HEAD:
            self._head = data
            return
        text = head.decode("latin-1")
        if not text.startswith("HTTP/1.1 200 ") or not re.search(rf"(?im)^content-length: {self._size}\r?$", text):
            raise LoadFailed(f"the answer is not 200 with {self._size} bytes:\n{text[:1000]}")
        self._head = None
        self._count(memoryview(body))

    def _count(self, data: memoryview) -> None:
        self.received += len(data)
        if self._hash:
            self._hash.update(data)


class Downloads:
    """Run the downloads of one job."""

    def __init__(self, job: Job):
        self._job = job
        self._all: list[Download] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for download in self._all:
            download.socket.close()

    def run(self) -> Outcome:
        """Download; return when all is there or the time is over. Raises LoadFailed."""
        started = time.monotonic()
        self._all += [Download(self._job) for _ in range(self._job.clients)]
        (self._run_paced if self._job.rate else self._run_free)(started + self._job.seconds)
        seconds = time.monotonic() - started
        complete = [download for download in self._all if download.complete]
        if self._job.whole and len(complete) < len(self._all):
            raise LoadFailed(f"only {len(complete)} of {len(self._all)} were complete after {seconds:.0f} s")
        received = sum(download.received for download in self._all)
        right = sum(download.digest() == self._job.digest for download in complete)
        return Outcome(seconds, received, sum(download.answered for download in self._all), len(complete), right)

    def _run_free(self, deadline: float) -> None:
        with selectors.DefaultSelector() as selector:
            for download in self._all:
                selector.register(download.socket, selectors.EVENT_READ, download)
            while selector.get_map() and time.monotonic() < deadline:
                for key, _ in selector.select(timeout=1):
                    key.data.receive(len(BUFFER))
                    if key.data.complete:
                        selector.unregister(key.fileobj)

    def _run_paced(self, deadline: float) -> None:
        waiting = list(self._all)
        while waiting and time.monotonic() < deadline:
            for download in waiting:
                due = int(self._job.rate * (time.monotonic() - download.started)) - download.received
                if due > 0:
                    download.receive(due)
            waiting = [download for download in waiting if not download.complete]
            time.sleep(1 / TICKS)


@contextmanager
def running(job: Job) -> Iterator[subprocess.Popen[str]]:
    """Run a job in a process of its own, which is ended at the latest with the block."""
    command = [sys.executable, "-m", "bench.load", json.dumps(job._asdict())]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


def outcome(process: subprocess.Popen[str], job: Job) -> Outcome:
    """Wait for the end of a running job and return its outcome; raise LoadFailed."""
    output, _ = process.communicate(timeout=job.seconds + 60)
    if process.returncode:
        raise LoadFailed(f"the load on port {job.port} failed; its message stands above")
    return Outcome(*json.loads(output))


def load(job: Job) -> Outcome:
    """Run a job in a process of its own and return its outcome; raise LoadFailed."""
    with running(job) as process:
        return outcome(process, job)


def main() -> None:
    """Run the job that the first argument holds."""
    with Downloads(Job(**json.loads(sys.argv[1]))) as downloads:
        try:
            print(json.dumps(downloads.run()))
        except (LoadFailed, OSError) as error:
            sys.exit(f"bench.load: {error}")


if __name__ == "__main__":
    main()
