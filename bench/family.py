"""What a family of processes, a master and its workers, has used so far: from /proc."""

import os
import re
from pathlib import Path

TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds
PAGE = os.sysconf("SC_PAGE_SIZE")  # bytes


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


def kernel_tcp() -> int:
    """Return the bytes in the buffers of all TCP connections of this network namespace."""
    pages = re.search(r"^TCP: .*\bmem (\d+)", Path("/proc/net/sockstat").read_text(), re.M)
    return int(pages[1]) * PAGE if pages else 0


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
