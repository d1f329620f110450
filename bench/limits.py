"""Slow clients of a mirror whose memory is limited, by a control group of its own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path
from typing import Any

from processes import poll
from serving import ROOT

from bench.growth import Curves
from bench.growth import Say
from bench.growth import note
from bench.load import LoadFailed
from bench.load import load
from bench.measures import MIB
from bench.measures import Stage
from bench.measures import slow_job
from bench.peers import Checkout
from bench.report import ALL_RIGHT

ROOTS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))  # of version 1, and of version 2
NAME = f"docker-mirror-bench-{os.getpid()}"


class Group:
    """Bound the memory of processes, in a folder of the kernel's control groups, version 1 or 2.

    Version 1 bounds the buffers of sockets apart, by the same number; version 2 counts them with all else, and nothing
    is swapped out there. Source: the kernel's admin guide, cgroup-v1/memory and cgroup-v2 (memory.peak: Linux 5.19).
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.processes = folder / "cgroup.procs"
        self._folder = folder
        if (folder / "memory.limit_in_bytes").exists():
            self._peaks = ["memory.max_usage_in_bytes", "memory.kmem.tcp.max_usage_in_bytes"]
            self._events = "memory.oom_control"
            bounds = {"memory.limit_in_bytes": limit, "memory.kmem.tcp.limit_in_bytes": limit}
        else:
            self._peaks, self._events = ["memory.peak"], "memory.events"
            bounds = {"memory.max": limit} | ({"memory.swap.max": 0} if (folder / "memory.swap.max").exists() else {})
        for name, value in bounds.items():
            (folder / name).write_text(str(value))
        self.peak()  # a kernel that cannot tell is of no use here

    def peak(self) -> int:
        """Return how many bytes were taken at most, buffers of sockets among them."""
        return sum(int((self._folder / name).read_text()) for name in self._peaks)

    def killed(self) -> int:
        """Return how many processes were killed for want of memory."""
        lines = map(str.split, (self._folder / self._events).read_text().splitlines())
        return sum(int(count) for name, count in lines if name == "oom_kill")


class Limited(Checkout):
    """Run the mirror within a group."""

    def __init__(self, group: Group, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self._group = group

    def _command(self) -> list[str]:
        return ["sh", "-c", f'echo $$ >{self._group.processes} && exec "$@"', "sh", *super()._command()]


@contextmanager
def group_of(limit: int) -> Iterator[Group | None]:
    """Make a group, and remove it; None where this host lets nobody make one."""
    folder = next((root / NAME for root in ROOTS if (root / "cgroup.procs").exists()), None)
    group = None
    if folder is not None:
        with suppress(OSError):
            folder.mkdir()
            group = Group(folder, limit)
    try:
        yield group
    finally:
        if folder is not None:
            poll(lambda: _removed(folder), 2)


def _removed(folder: Path) -> bool:
    """Remove a group; tell whether it has gone: its last process may still end."""
    with suppress(FileNotFoundError):
        try:
            folder.rmdir()
        except OSError:
            return False
    return True


def limited(stage: Stage, say: Say) -> Curves:
    """Let slow clients pull through mirrors with little memory, and see whether all get their bytes."""
    curves: Curves = {}
    for limit, clients in stage.scale.limits:
        with group_of(limit * MIB) as group:
            if group is None:
                say("  no control group that limits memory can be made here")
                break
            with Limited(group, stage.hub, ROOT) as server:
                job = slow_job(server, stage)._replace(path=stage.medium.path, size=stage.medium.size, clients=clients)
                try:
                    right = load(job._replace(digest=stage.medium.digest, whole=False)).right
                except LoadFailed as error:  # one client was refused, or cut off
                    say(f"  {clients}, {limit} MiB: {error}")
                    right = 0
            figures = {
                ALL_RIGHT: 100 * right / clients,
                "clients within a limit: taken at most, MiB": group.peak() / MIB,
                "clients within a limit: processes killed": float(group.killed()),
            }
        note(curves, f"mirror, {limit} MiB", clients, figures, say)
    return curves
