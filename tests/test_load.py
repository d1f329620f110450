"""Many slow clients at once, as where users pull over thin lines: bench/ measures it, here are its bounds."""

import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
from hub import Hub
from processes import poll
from serving import Mirror

from bench.load import Job
from bench.load import Outcome
from bench.load import outcome
from bench.load import running

REPOSITORY = "library/load"
MB, MIB = 10**6, 1 << 20
CLIENTS = 100
SIZE = 10 * MB
RATE = MB  # bytes per second of each client
MAX_GROWTH = 64 * MIB
LISTENING = "0A"  # of the states in /proc/net/tcp
POOL = 64  # connections to one host that are kept for the next request
SETTLE = 1.0  # seconds until the memory of a fresh server is read
SAMPLE_EVERY = 0.25  # seconds


class State(NamedTuple):
    """Hold the mirror's memory in bytes, its worker's descriptors, and that one's connections by their other end."""

    pss: int
    descriptors: int
    connections: Counter[str]


class Load(NamedTuple):
    """Hold what came of the clients, and the mirror's states before, during and soon after."""

    ended: Outcome
    before: State
    during: list[State]
    after: State


def state_of(mirror: Mirror) -> State:
    """Read the mirror's state from /proc."""
    (worker,) = mirror.pids()[1:]
    return State(mirror.pss(), len(list(Path(f"/proc/{worker}/fd").iterdir())), connections(worker, mirror.port))


def connections(pid: int, served: int) -> Counter[str]:
    """Count a process's TCP connections, half-closed ones too, by the other end; "clients" are those to its own port.

    Source: proc_pid_net(5), /proc/net/tcp.
    """
    own = {link for file in Path(f"/proc/{pid}/fd").iterdir() if (link := target(file)).startswith("socket:")}
    found: Counter[str] = Counter()
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, *fields = line.split()
        if f"socket:[{fields[5]}]" in own and state != LISTENING:
            found["clients" if int(local.partition(":")[2], 16) == served else readable(remote)] += 1
    return found


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


@pytest.fixture(scope="module")
def slow_clients(hub: Hub) -> Load:
    """Let many slow clients pull one blob at once through one worker."""
    digest = hub.add_blob(REPOSITORY, SIZE)
    with Mirror(registries=hub.registries_file) as mirror:
        job = Job(mirror.port, f"/v2/{REPOSITORY}/blobs/{digest}", SIZE)
        time.sleep(SETTLE)
        before, during = state_of(mirror), []
        slow = job._replace(clients=CLIENTS, rate=RATE, digest=digest, whole=False, seconds=3 * SIZE / RATE)
        with running(slow) as process:
            while process.poll() is None:  # ends with the job, whose time is bounded
                during.append(state_of(mirror))
                time.sleep(SAMPLE_EVERY)
            ended = outcome(process, slow)
        poll(lambda: not state_of(mirror).connections["clients"], 10)
        return Load(ended, before, during, state_of(mirror))


def test_all_of_many_slow_clients_get_the_right_bytes(slow_clients: Load) -> None:
    assert slow_clients.ended.right == CLIENTS
    assert slow_clients.ended.seconds < 2 * SIZE / RATE, "each got nearly the rate that it wanted"


def test_many_slow_clients_cost_little_memory(slow_clients: Load) -> None:
    """All their blobs together are 1 GB."""
    peak = max(state.pss for state in slow_clients.during)
    assert peak - slow_clients.before.pss < MAX_GROWTH


def test_what_many_clients_opened_is_closed_after_them(slow_clients: Load, hub: Hub) -> None:
    before, after = slow_clients.before, slow_clients.after
    busiest = max(slow_clients.during, key=lambda state: state.descriptors)
    cdn = urlsplit(hub.cdn_url).netloc
    assert busiest.connections["clients"] == CLIENTS
    assert busiest.connections[cdn] == CLIENTS
    assert after.connections["clients"] == 0
    assert all(count <= POOL for count in after.connections.values()), after.connections
    opened = after.connections.total() - before.connections.total()
    assert after.descriptors - before.descriptors == opened, "nothing but kept connections stays open"
