"""What a family of processes, a master and its workers, has used so far: from /proc."""

import os
import re
import subprocess
from pathlib import Path

TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds


def pids(master: int) -> list[int]:
    """Return the process numbers of the master and its children."""
    return [master, *(pid for pid, fields in _stats().items() if int(fields[1]) == master)]


def cpu(master: int) -> float:
    """Return the seconds of CPU, user's and system's, of the master and its children."""
    stats = _stats()
    family = [fields for pid, fields in stats.items() if master in (pid, int(fields[1]))]
    return sum(int(fields[11]) + int(fields[12]) for fields in family) * TICK


def pss(master: int, kind: str = "Pss") -> int:
    """Return the memory of the master and its children in bytes; of each shared page, their part.

    `kind` may be Pss_Anon: without the pages of files, which strangers that run the same interpreter share.
    """
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids(master)]
    return sum(int(kib) for rollup in rollups for kib in re.findall(rf"^{kind}:\s+(\d+) kB", rollup, re.M)) * 1024


def kernel_tcp(served: int, upstream: int) -> int:
    """Return the bytes in the kernel's buffers of a server's connections: from its own port, and to upstream's.

    Source: ss(8), skmem.
    """
    command = ["ss", "-tmnH", f"( sport = :{served} or dport = :{upstream} )"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # r: received; f: set aside, for either way, and shown as unsigned; w: sent, and not yet acknowledged.
    numbers = [int(number) for number in re.findall(r"[(,][rfw](\d+)", shown)]
    return sum(number if number < 1 << 31 else number - (1 << 32) for number in numbers)


def _stats() -> dict[int, list[str]]:
    """Return the fields of each process's stat from the third on: state, parent and so on."""
    stats = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in parentheses may hold spaces and parentheses itself: count from its end.
            stats[int(file.parent.name)] = file.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return stats
