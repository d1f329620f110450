"""Many slow clients at once, as where users pull over thin lines: bench/ measures it, here are its bounds."""

import time
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
from held import State
from held import state_of
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
POOL = 64  # connections to one host that are kept for the next request
SETTLE = 1.0  # seconds until the memory of a fresh server is read
SAMPLE_EVERY = 0.25  # seconds


class Load(NamedTuple):
    """Hold what came of the clients, and the mirror's states before, during and soon after."""

    ended: Outcome
    before: State
    during: list[State]
    after: State


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
