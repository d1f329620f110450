"""What a running mirror holds: memory, descriptors and connections, by /proc, and the worker's own census."""

import json
import os
import signal
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from typing import NamedTuple

from processes import poll
from serving import Mirror

LISTENING = "0A"  # of the states in /proc/net/tcp


class State(NamedTuple):
    """Hold the mirror's memory in bytes, its worker's descriptors, and that one's connections by their other end."""

    pss: int
    descriptors: int
    connections: Counter[str]


def state_of(mirror: Mirror) -> State:
    """Read the mirror's state from /proc."""
    (worker,) = mirror.pids()[1:]
    return State(mirror.pss(), descriptors(worker), connections(worker, mirror.port))


def descriptors(pid: int) -> int:
    """Count what a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def connections(pid: int, served: int) -> Counter[str]:
    """Count a process's TCP connections, half-closed ones too, by the other end; "clients" are those to its own port.

    Source: proc_pid_net(5), /proc/net/tcp.
    """
    own = {link for file in Path(f"/proc/{pid}/fd").iterdir() if (link := target(file)).startswith("socket:")}
    found = {}  # by socket: while many come and go, the kernel may show one twice
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, *fields = line.split()
        if (link := f"socket:[{fields[5]}]") in own and state != LISTENING:
            found[link] = "clients" if int(local.partition(":")[2], 16) == served else readable(remote)
    return Counter(found.values())


def target(file: Path) -> str:
    """Return where a descriptor leads; it may be closed by now."""
    try:
        return str(file.readlink())
    except FileNotFoundError:
        return ""


def readable(address: str) -> str:
    """Return host and port as they are usually written; the kernel shows the host's four bytes as one number."""
    host, _, port = address.partition(":")
    return f"{socket.inet_ntoa(int(host, 16).to_bytes(4, sys.byteorder))}:{int(port, 16)}"


class Census(NamedTuple):
    """Count a worker's greenlets, by what they run, and the blocks of memory that Python uses, each for an object."""

    greenlets: Counter[str]
    blocks: int


def countable(folder: Path, *options: str, **settings: Any) -> Mirror:
    """Return a mirror of whose workers a census can be taken by means of a file in this folder."""
    config = Path(__file__).with_name("census.py")
    return Mirror("-c", f"file:{config}", *options, env={"CENSUS_FOLDER": str(folder)}, covered=False, **settings)


def census(mirror: Mirror, folder: Path) -> Census:
    """Let the one worker of a countable mirror collect its garbage, and count."""
    (worker,) = mirror.pids()[1:]
    return census_of(worker, folder)


def census_of(worker: int, folder: Path) -> Census:
    """Let one of its workers collect its garbage, and count."""
    counted = folder / str(worker)
    counted.unlink(missing_ok=True)
    os.kill(worker, signal.SIGRTMIN)
    assert poll(counted.exists, 10), "the worker does not answer"
    greenlets, blocks = json.loads(counted.read_text())
    return Census(Counter(greenlets), blocks)
