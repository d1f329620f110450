"""A crowd pulls through a line that cuts: every finished transfer is right, and nothing of it all stays in the mirror.

    DOCKER_MIRROR_SOAK_SECONDS=300 pytest tests/test_soak.py -rP

lets it pull for longer than the suite has time for, and shows the figures.
"""

import os
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import requests
from crowd import Tally
from crowd import Visit
from crowd import tally
from crowd import visiting
from held import Census
from held import State
from held import census
from held import countable
from held import state_of
from hub import Hub
from images import MB
from images import MIB
from line import Cut
from line import DistantHub
from line import Reset
from line import Stall
from line import exponential
from processes import poll
from serving import Mirror

from bench import family

REPOSITORY = "library/soak"
SECONDS = float(os.environ.get("DOCKER_MIRROR_SOAK_SECONDS", "32"))
ROUNDS = {"warm-up": SECONDS / 8, "first": SECONDS / 2, "second": SECONDS / 2}
CLIENTS = 200
SIZES = (100_000, 300_000, MB, 3 * MB, 10 * MB, 40 * MB)
IDLE_TIMEOUT = 3  # seconds
SAMPLE_EVERY = 0.5  # seconds
SETTLE = 8.0  # seconds until a countable mirror has given back what it keeps for the next request
POOL = 64  # connections to one host that are kept for it
MAX_BROKEN = 0.02  # of the transfers that no client left
MAX_KEPT, MAX_GROWTH = 8 * MIB, 4 * MIB  # of memory: by the first round, and by the second one in addition
MAX_OBJECTS = 500  # more after the second round than after the first: less than one for each transfer


class Round(NamedTuple):
    """Hold what came of one round, as the clients, the line, the log and /proc tell it.

    `busy` is taken while all are pulling. `left` is the mirror's state once the last client has gone; `after`,
    `memory` (anonymous, in bytes) and `idle` are of some seconds later, and `lines` are the connections that upstream
    sees then. `faults` are drawn for each body: of several in one the nearest strikes, unless the client leaves first.
    """

    tally: Tally
    faults: dict[str, int]
    log: str
    during: list[State]
    busy: Census
    left: State
    after: State
    memory: int
    idle: Census
    lines: int

    @property
    def resumed(self) -> int:
        """Return how often the mirror went on with a transfer."""
        return self.log.count(": went on at byte ")

    def figures(self) -> dict[str, float]:
        """Return the column of the table."""
        ends = Counter(self.tally.ends)
        named = {name: ends.pop(name, 0) for name in ("finished", "left", "left early", "broken")}
        return {
            **named,
            "other ends": ends.total(),
            "resumed": self.resumed,
            **self.faults,
            "MB": self.tally.received / MB,
            "PSS at most, MiB": max(state.pss for state in self.during) / MIB,
            "PSS after, MiB": self.after.pss / MIB,
            "anonymous after, MiB": self.memory / MIB,
            "Python's blocks after": self.idle.blocks,
            "descriptors at most": max(state.descriptors for state in self.during),
            "descriptors after": self.after.descriptors,
            "upstream at most": max(upstream(state) for state in self.during),
            "upstream once left": upstream(self.left),
            "upstream after": upstream(self.after),
            "greenlets while busy": self.busy.greenlets.total(),
            "greenlets after": self.idle.greenlets.total(),
        }


def upstream(state: State) -> int:
    """Return how many connections lead elsewhere than to clients."""
    return state.connections.total() - state.connections["clients"]


def soak(visit: Visit, distant: DistantHub, mirror: Mirror, folder: Path) -> Round:
    """Let a crowd pull, and leave."""
    faults = {
        "cuts": Cut(exponential(5 * MB, 3 * visit.seed)),
        "resets": Reset(exponential(25 * MB, 3 * visit.seed + 1)),
        "stalls": Stall(exponential(100 * MB, 3 * visit.seed + 2)),
    }
    distant.cdn.faults = list(faults.values())
    mark, during = mirror.mark(), []
    with visiting(visit) as crowd:
        assert poll(lambda: state_of(mirror).connections["clients"] > CLIENTS / 2, 30)
        busy = census(mirror, folder)
        while crowd.poll() is None:  # ends after the visit's time
            during.append(state_of(mirror))
            time.sleep(SAMPLE_EVERY)
        ended = tally(crowd)
    poll(lambda: not state_of(mirror).connections["clients"], 10)
    left = state_of(mirror)
    until = time.monotonic() + SETTLE
    while time.monotonic() < until:  # a monitor that looks is no client
        assert requests.get(f"{mirror.url}/healthz", timeout=10).status_code == 200
        time.sleep(SAMPLE_EVERY)
    return Round(
        ended,
        {name: fault.applied for name, fault in faults.items()},
        mirror.log(mark),
        during,
        busy,
        left,
        state_of(mirror),
        family.pss(mirror.pid, "Pss_Anon"),
        census(mirror, folder),
        distant.cdn.open_connections + distant.registry.open_connections,
    )


def table(rounds: list[Round]) -> str:
    """Return the figures of all rounds."""
    columns = [each.figures() for each in rounds]
    rows = [f"{name:22}" + "".join(f"{column[name]:10.0f}" for column in columns) for name in columns[0]]
    return "\n".join(["", f"{'':22}" + "".join(f"{name:>10}" for name in ROUNDS), *rows])


@pytest.fixture(scope="module")
def rounds(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> list[Round]:
    """Soak one mirror with one worker: a short round to warm it up, and two long ones."""
    folder = tmp_path_factory.mktemp("census")
    blobs = {digest: str(hub.stored(digest)) for digest in [hub.add_blob(REPOSITORY, size) for size in SIZES]}
    with (
        DistantHub(hub) as distant,
        countable(folder, registries=str(distant.registries_file), idle_timeout=IDLE_TIMEOUT) as mirror,
    ):
        (worker,) = mirror.pids()[1:]
        visits = [
            Visit(mirror.port, REPOSITORY, blobs, CLIENTS, ROUNDS[name], seed) for seed, name in enumerate(ROUNDS)
        ]
        done = [soak(visit, distant, mirror, folder) for visit in visits]
        print(table(done))
        assert mirror.pids()[1:] == [worker], "no worker died"
        return done


def test_every_finished_transfer_is_right(rounds: list[Round]) -> None:
    assert [wrong for each in rounds for wrong in each.tally.wrong] == []
    assert sum(each.tally.ends["finished"] for each in rounds) > 0


def test_hardly_a_transfer_breaks(rounds: list[Round]) -> None:
    ends = sum((each.tally.ends for each in rounds), Counter[str]())
    not_left = ends.total() - ends["left"] - ends["left early"]
    assert not_left - ends["finished"] <= MAX_BROKEN * not_left, ends
    assert sum(each.resumed for each in rounds) > 0


def test_no_traceback_is_in_the_log(rounds: list[Round]) -> None:
    assert not any("Traceback" in each.log for each in rounds)


def test_no_connection_and_no_descriptor_stays(rounds: list[Round]) -> None:
    """Those to upstream that are kept for the next request are closed too, once none comes."""
    for each in rounds:
        assert each.left.connections["clients"] == 0
        assert all(count <= POOL for count in each.left.connections.values()), each.left.connections
        assert not each.after.connections
        assert each.lines == 0
        assert each.after.descriptors == rounds[0].after.descriptors


def test_no_greenlet_stays(rounds: list[Round]) -> None:
    for each in rounds:
        assert each.busy.greenlets.total() > CLIENTS / 2, "they are counted"
        assert each.idle.greenlets == rounds[0].idle.greenlets


def test_no_memory_stays(rounds: list[Round]) -> None:
    """What all processes share of a file counts for each in part, and so varies with what else runs: it is left out."""
    warm, first, second = rounds
    assert first.memory - warm.memory < MAX_KEPT
    assert second.memory - first.memory < MAX_GROWTH
    assert second.idle.blocks - first.idle.blocks < MAX_OBJECTS
