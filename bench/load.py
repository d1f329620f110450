"""The load: many downloads of one object at once, in one process of its own that costs as little as it can.

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
ANSWERED = "answered"
START_SECONDS = 120  # in which all clients of a job that is `together` must be answered
TICKS = 20  # looks per second at a download that has a rate
BUFFER = memoryview(bytearray(1 << 20))


class LoadFailed(Exception):
    """Say that an answer was not what was asked for, or that the load did not end in time."""


class Job(NamedTuple):
    """Say what to download, and how.

    `size` is the object's, in bytes, `rate` is each client's, in bytes per second (0: as fast as it comes), `rcvbuf` is
    each client's receive buffer in bytes (0: the kernel's choice). With a rate, so many clients come in a second as are
    `arriving` (0: all at once). Each client asks `requests` times, one after the other, over one connection, with
    `accept` as its Accept header. A job ends after `seconds`, and failed if it was to be `whole` and is not. With
    `together` and a rate, seconds and bytes count from when all clients have been answered, and a line says so. With a
    `digest` all bytes are hashed; otherwise the kernel drops them uncopied.
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
    requests: int = 1
    accept: str = ""
    together: bool = False
    arriving: int = 0


class Outcome(NamedTuple):
    """Hold what came of a job: its seconds, the bytes of all bodies, and how many answers had which end."""

    seconds: float
    received: int
    started: int
    complete: int
    right: int

    @property
    def rate(self) -> float:
        """Return the bytes per second of all clients together."""
        return self.received / self.seconds

    @property
    def answers(self) -> float:
        """Return the whole answers per second of all clients together."""
        return self.complete / self.seconds


class Download:
    """Fetch the object, once or several times, over a connection of its own that never blocks once it stands.

    `received` counts the bytes of all bodies, `started`, `complete` and `right` count answers.
    """

    def __init__(self, job: Job):
        self.socket = socket.socket()
        if job.rcvbuf:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, job.rcvbuf)  # counts if set before connect
        self.socket.settimeout(30)
        self.socket.connect((HOST, job.port))
        accept = f"Accept: {job.accept}\r\n" if job.accept else ""
        self._request = f"GET {job.path} HTTP/1.1\r\nHost: {HOST}:{job.port}\r\n{accept}\r\n".encode()
        self._job = job
        self.began = time.monotonic()
        self.received = self.started = self.complete = self.right = 0
        self._ask()
        self.socket.setblocking(False)

    def _ask(self) -> None:
        self.socket.sendall(self._request)  # so short that it never blocks
        self._left = self._job.size
        self._head: bytes | None = b""
        self._hash = hashlib.sha256() if self._job.digest else None

    @property
    def done(self) -> bool:
        """Tell whether all answers are there."""
        return self.complete == self._job.requests

    def receive(self, limit: int) -> None:
        """Take at most `limit` bytes of what has come, if anything has; raise LoadFailed for a wrong answer."""
        wanted = min(limit, len(BUFFER), self._left + (MAX_HEAD if self._head is not None else 0))
        dropped = self._head is None and self._hash is None
        try:
            # MSG_TRUNC: Linux drops TCP's bytes without a copy, tcp(7).
            count = self.socket.recv_into(BUFFER, wanted, socket.MSG_TRUNC if dropped else 0)
        except BlockingIOError:
            return
        if count == 0:
            raise LoadFailed(f"the connection was closed {self._left} bytes before the answer's end")
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
        if not text.startswith("HTTP/1.1 200 ") or not re.search(rf"(?im)^content-length: {self._job.size}\r?$", text):
            raise LoadFailed(f"the answer is not 200 with {self._job.size} bytes:\n{text[:1000]}")
        self._head = None
        self.started += 1
        self._count(memoryview(body))

    def _count(self, data: memoryview) -> None:
        self.received += len(data)
        self._left -= len(data)
        if self._hash:
            self._hash.update(data)
        if self._left == 0:
            self.complete += 1
            self.right += self._hash is not None and self._job.digest == f"sha256:{self._hash.hexdigest()}"
            if not self.done:
                self._ask()


class Downloads:
    """Run the downloads of one job."""

    def __init__(self, job: Job):
        self._job = job
        self._all: list[Download] = []
        self._since = (0.0, 0)  # from when, and from how many bytes on, it counts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for download in self._all:
            download.socket.close()

    def run(self) -> Outcome:
        """Download; return when all is there or the time is over. Raises LoadFailed."""
        self._since = (time.monotonic(), 0)
        (self._run_paced if self._job.rate else self._run_free)(self._since[0] + self._job.seconds)
        seconds = time.monotonic() - self._since[0]
        started, complete, right, received = (
            sum(getattr(download, name) for download in self._all)
            for name in ("started", "complete", "right", "received")
        )
        wanted = self._job.clients * self._job.requests
        if self._job.whole and complete < wanted:
            raise LoadFailed(f"only {complete} of {wanted} answers were complete after {seconds:.0f} s")
        return Outcome(seconds, received - self._since[1], started, complete, right)

    def _open(self, count: int) -> list[Download]:
        """Let so many more clients come."""
        new = [Download(self._job) for _ in range(count)]
        self._all += new
        return new

    def _run_free(self, deadline: float) -> None:
        with selectors.DefaultSelector() as selector:
            for download in self._open(self._job.clients):
                selector.register(download.socket, selectors.EVENT_READ, download)
            while selector.get_map() and time.monotonic() < deadline:
                for key, _ in selector.select(timeout=1):
                    key.data.receive(len(BUFFER))
                    if key.data.done:
                        selector.unregister(key.fileobj)

    def _run_paced(self, deadline: float) -> None:
        waiting: list[Download] = []
        job, began, starting = self._job, time.monotonic(), self._job.together
        deadline += START_SECONDS if starting else 0
        while (waiting or len(self._all) < job.clients) and time.monotonic() < deadline:
            here = 1 + int((time.monotonic() - began) * job.arriving) if job.arriving else job.clients
            waiting += self._open(min(here, job.clients) - len(self._all))
            if starting and sum(download.started > 0 for download in self._all) == job.clients:
                self._since = (time.monotonic(), sum(download.received for download in self._all))
                starting, deadline = False, self._since[0] + job.seconds
                print(ANSWERED, flush=True)
            for download in waiting:
                due = int(self._job.rate * (time.monotonic() - download.began)) - download.received
                if due > 0:
                    download.receive(due)
            waiting = [download for download in waiting if not download.done]
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
    output, _ = process.communicate(timeout=job.seconds + START_SECONDS)
    if process.returncode:
        raise LoadFailed(f"the load on port {job.port} failed; its message stands above")
    return Outcome(*json.loads(output.splitlines()[-1]))


def wait_until_answered(process: subprocess.Popen[str]) -> None:
    """Return when all clients of a running job that is `together` have been answered; raise LoadFailed."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if line.rstrip() != ANSWERED:
        raise LoadFailed(f"some clients were not answered in {START_SECONDS} s: {line}")


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
