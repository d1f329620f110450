"""Run servers as child processes that come up within a bound, keep a log and never outlive the tests."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

# Daemons live in sbin, which is not on an ordinary user's PATH.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
HELD_PORTS: list[socket.socket] = []
PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


class StartFailed(Exception):
    """Say that a server did not come up, with the end of its log."""


def find_program(name: str) -> str | None:
    """Return the path of an installed program, or None."""
    return shutil.which(name, path=SEARCH_PATH)


def free_port(host: str) -> int:
    """Return a TCP port that nobody listens on at this address, and that nobody else is given while the tests run.

    It stays bound, though not listened on: a server with SO_REUSEADDR, as all have, can still have it.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((host, 0))
    HELD_PORTS.append(held)
    return int(held.getsockname()[1])


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment without its proxies, which must not stand between servers on loopback."""
    dropped = {*PROXY_VARIABLES, *map(str.lower, PROXY_VARIABLES)}
    return {name: value for name, value in os.environ.items() if name not in dropped} | dict(extra or {})


def poll(ready: Callable[[], bool], seconds: float, interval: float = 0.02) -> bool:
    """Ask until the answer is yes or the time is over; return the last answer."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval)
    return True


class Process:
    """Run one server in the foreground, with stdout and stderr in a log file.

    The kernel sends it SIGTERM when the thread that started it dies, however that happens:
    so start it from a thread that lives as long as the server is wanted.
    """

    def __init__(self, command: list[str], log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None):
        program = find_program(command[0])
        if program is None:
            raise StartFailed(f"{command[0]} is not installed")
        self.name = Path(program).name
        self.log_file = log
        with log.open("ab") as output:
            self._child = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", program, *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=clean_environment() if env is None else env,
                cwd=cwd,
            )
        self.pid = self._child.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def running(self) -> bool:
        """Tell whether the process has not ended yet."""
        return self._child.poll() is None

    def wait_until(self, ready: Callable[[], bool], seconds: float = 30) -> None:
        """Wait until the server is ready; raise StartFailed with its log if it ends or takes too long."""
        if poll(lambda: ready() or not self.running(), seconds) and self.running():
            return
        state = "did not come up" if self.running() else f"ended with status {self._child.returncode}"
        self.stop()
        tail = self.log_file.read_text(errors="replace")[-4000:]
        raise StartFailed(f"{self.name} {state}; its log ends with:\n{tail}")

    def stop(self, seconds: float = 15) -> int:
        """End the process with SIGTERM, or SIGKILL when that takes too long; return its exit status."""
        if self.running():
            self._child.send_signal(signal.SIGTERM)
        try:
            return self._child.wait(seconds)
        except subprocess.TimeoutExpired:
            self._child.kill()
            return self._child.wait()


@contextmanager
def removed_afterwards(folder: Path) -> Iterator[Path]:
    """Remove a folder at the end, after anything that is still mounted below it."""
    try:
        yield folder
    finally:
        for mount in _mounts_below(folder):
            subprocess.run(["umount", "--lazy", mount], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def _mounts_below(folder: Path) -> list[str]:
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return sorted((mount for mount in mounts if Path(mount).is_relative_to(folder)), reverse=True)
