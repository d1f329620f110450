"""Run the mirror as its users do: gunicorn with gevent workers, in processes of its own."""

import re
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple
from typing import Self

import requests
from processes import Process
from processes import clean_environment
from processes import free_port
from processes import poll
from processes import removed_afterwards

HOST = "127.0.0.1"
ROOT = Path(__file__).resolve().parent.parent
# As deploy.sh runs it, but for the graceful timeout: a test does not wait for its transfers.
SERVED_AS = ("--worker-connections", "2000", "--keep-alive", "75", "--graceful-timeout", "1")
SERVED_WITH = {
    "PYTHONOPTIMIZE": "2",
    "PYTHONNODEBUGRANGES": "1",
    "PYTHONPYCACHEPREFIX": f"{sys.prefix}/bytecode",
}


class AccessLine(NamedTuple):
    """Hold what a line of the access log says of one request."""

    method: str
    path: str
    status: int


class Mirror:
    """Serve the mirror on loopback with these settings and gunicorn options.

    A keyword becomes a setting of the mirror: `login="off"` is MIRROR_LOGIN=off. No other MIRROR_* variable of this
    process's environment reaches it. `env` adds variables that are no settings, such as HTTPS_PROXY. Where its memory
    is looked at, it must not be `covered`: what coverage notes grows with each new way through the code.
    """

    def __init__(
        self,
        *options: str,
        port: int | None = None,
        env: Mapping[str, str] | None = None,
        covered: bool = True,
        **settings: object,
    ):
        hidden = ("MIRROR_", "PYTHONDONTWRITEBYTECODE")  # compiled anew at each start, it would take more memory
        self._hidden = hidden if covered else (*hidden, "COVERAGE_")
        self.port = port or free_port(HOST)
        self.host = f"{HOST}:{self.port}"
        self.url = f"http://{self.host}{settings.get('path_prefix', '')}"
        self._options = options
        self._settings = {f"MIRROR_{name.upper()}": str(value) for name, value in settings.items()} | dict(env or {})
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack:
            folder = self._stack.enter_context(removed_afterwards(Path(tempfile.mkdtemp(prefix="mirror-"))))
            self.log_file = folder / "log"
            process = Process(self._command(), self.log_file, self._environment(), ROOT)
            self._process = self._stack.enter_context(process)
            self.pid = process.pid
            process.wait_until(self._healthy)
            if self._settings.get("MIRROR_LOG_LEVEL") != "warning":
                self.wait_for_requests(1, 0)  # its line may come later, and is nobody else's
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        # gunicorn takes a second to end, and the next test need not wait for that; the tests' end does.
        threading.Thread(target=self._stack.close).start()

    def _command(self) -> list[str]:
        gunicorn = [sys.executable, "-m", "gunicorn", "-c", "python:wsgi", "-b", self.host]
        return [*gunicorn, *SERVED_AS, *self._options, "wsgi:app"]

    def _environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in clean_environment().items() if not name.startswith(self._hidden)}
        return inherited | {"PYTHONUNBUFFERED": "1"} | SERVED_WITH | self._settings

    def _healthy(self) -> bool:
        with requests.Session() as session:
            session.trust_env = False
            try:
                return session.get(f"{self.url}/healthz", timeout=5).status_code == 200
            except requests.RequestException:
                return False

    def stop(self) -> int:
        """End the mirror with SIGTERM and return gunicorn's exit status; its log is gone after the `with` block."""
        return self._process.stop()

    def mark(self) -> int:
        """Return the place in the log where the next line will stand."""
        return self.log_file.stat().st_size

    def log(self, since: int = 0) -> str:
        """Return what master and workers wrote, from a mark on."""
        return self.log_file.read_bytes()[since:].decode(errors="replace")

    def access_log(self, since: int = 0) -> list[AccessLine]:
        """Return the requests that the log shows from a mark on, in the order in which they ended."""
        found = re.findall(r'"([A-Z]+) (\S+)(?: HTTP/[\d.]+)?" (\d{3})\b', self.log(since))
        return [AccessLine(method, path, int(status)) for method, path, status in found]

    def wait_for_requests(self, count: int, since: int, seconds: float = 5) -> list[AccessLine]:
        """Return the access log once it holds so many requests: a line may come after the client's last byte."""
        poll(lambda: len(self.access_log(since)) >= count, seconds)
        return self.access_log(since)

    def pids(self) -> list[int]:
        """Return the process numbers of the master, first, and its workers.

        gunicorn starts several workers one after the other: just after the start, some may still be missing.
        """
        return [self.pid, *(pid for pid, parent in _parents().items() if parent == self.pid)]

    def pss(self) -> int:
        """Return the memory of master and workers in bytes, each shared page counted once."""
        rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in self.pids()]
        return sum(int(kib) for rollup in rollups for kib in re.findall(r"^Pss:\s+(\d+) kB", rollup, re.M)) * 1024


def _parents() -> dict[int, int]:
    """Return the parent's process number for each process number."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in parentheses may hold spaces and parentheses itself: count from its end.
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    return parents
