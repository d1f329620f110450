"""Boot a tree of Debian with its own systemd in systemd-nspawn; it shares this machine's network."""

import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from processes import Process
from processes import find_program
from processes import removed_afterwards

Ended = subprocess.CompletedProcess[str]
PATH = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"


class Machine:
    """Run a tree's systemd as process 1 of its own."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack:
            folder = self._stack.enter_context(removed_afterwards(Path(tempfile.mkdtemp(prefix="machine-"))))
            options = ("--boot", "--register=no", "--keep-unit", "--quiet", "--console=pipe")
            command = ["systemd-nspawn", *options, f"--directory={self.tree}"]
            self._nspawn = self._stack.enter_context(Process(command, folder / "log"))
            self._nspawn.wait_until(self._booted)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def _booted(self) -> bool:
        return bool(self._children()) and self.run("systemctl", "is-system-running").stdout.strip() == "running"

    def _children(self) -> list[str]:
        return Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()

    def run(self, *command: str, seconds: float = 120) -> Ended:
        """Run a command to its end, as root of the machine."""
        enter = [find_program("nsenter") or "nsenter", "--target", self._children()[0], "--all"]
        return subprocess.run(
            [*enter, "env", "-i", PATH, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def succeeds(self, *command: str) -> str:
        """Return what a command printed; it must have ended well."""
        ended = self.run(*command)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout.strip()

    def path(self, inside: str) -> Path:
        """Return where a file of the machine is."""
        return self.tree / inside.removeprefix("/")

    def write(self, inside: str, text: str) -> None:
        """Write a file of the machine."""
        self.path(inside).parent.mkdir(parents=True, exist_ok=True)
        self.path(inside).write_text(text)
