"""What grows, and how: with running transfers, for one worker and two, and with the blobs in the cache."""

import hashlib
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from processes import poll
from processes import removed_afterwards
from serving import ROOT

from bench import family
from bench.load import LoadFailed
from bench.load import load
from bench.measures import KB
from bench.measures import MB
from bench.measures import MIB
from bench.measures import Stage
from bench.measures import again_and_again
from bench.measures import slow_job
from bench.measures import watched
from bench.peers import REPOSITORY
from bench.peers import TUNED
from bench.peers import Cached
from bench.peers import Checkout
from bench.peers import Nginx
from bench.peers import Object
from bench.peers import Server
from cache import BLOB_MODE
from cache import Cache
from cache import Limits

# Points by figure and by whose they are: a number of transfers or of blobs, and the value there.
Curves = dict[str, dict[str, list[tuple[float, float]]]]
Say = Callable[[str], None]
CONNECTIONS = 5000  # that a worker of the mirror takes; nginx takes two for each client
QUIET_SECONDS = 30  # in which a fresh mirror has looked through its cache
LARGE = 1 << 50  # bytes, which no store of the measurements reaches


def growth(stage: Stage, say: Say) -> Curves:
    """Measure all that grows, once."""
    curves: Curves = {}
    with_transfers(stage, say, curves)
    with_blobs(stage, say, curves)
    return curves


def with_transfers(stage: Stage, say: Say, curves: Curves) -> None:
    """Let more and more slow clients pull at the same time."""
    upstream, more = stage.hub, ("--worker-connections", str(CONNECTIONS))
    servers: dict[str, Callable[[], Checkout | Nginx]] = {
        "mirror, 1 worker": lambda: Checkout(upstream, ROOT, *more),
        "mirror, 2 workers": lambda: Checkout(upstream, ROOT, *more, "--workers", "2"),
        "nginx, tuned": lambda: Nginx(upstream, TUNED, 2 * CONNECTIONS),
    }
    for clients in stage.scale.growing_clients:
        for name, start in servers.items():
            try:
                with start() as server:
                    note(curves, name, clients, transfers(server, stage, clients), say)
            except LoadFailed as error:  # the host may end here
                say(f"  {clients}, {name}: {error}")


def transfers(server: Server, stage: Stage, clients: int) -> dict[str, float]:
    """Let so many slow clients pull, and return what the server took for all of them."""
    load(stage.tiny.job(server.port))
    time.sleep(stage.scale.settle)
    before = family.pss(server.pid)
    job = slow_job(server, stage)._replace(clients=clients, rate=stage.scale.growing_rate)
    ended, taken = watched(server, job, stage)
    return {
        "transfers: PSS, MiB": (before + taken.pss) / MIB,
        "transfers: kernel TCP, MiB": taken.kernel / MIB,
        "transfers: CPU, % of a core": 100 * taken.cpu,
        "transfers: rate, MB/s": ended.rate / MB,
    }


def with_blobs(stage: Stage, say: Say, curves: Curves) -> None:
    """Let a cache hold more and more blobs."""
    with ExitStack() as stack:
        store = stack.enter_context(removed_afterwards(Path(tempfile.mkdtemp(prefix="bench-"))))
        blobs: list[Object] = []
        for count in stage.scale.growing_blobs:
            blobs += [put(store, number) for number in range(len(blobs), count)]
            note(curves, "mirror, 1 worker", count, blobs_kept(store, blobs, stage), say)


def put(store: Path, number: int) -> Object:
    """Put a blob of 1 KB into a store without asking anyone."""
    content = random.Random(number).randbytes(KB)
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    file = Cache(store, Limits(LARGE)).path(digest)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    file.chmod(BLOB_MODE)
    return Object(f"/v2/{REPOSITORY}/blobs/{digest}", digest, KB)


def blobs_kept(store: Path, blobs: list[Object], stage: Stage) -> dict[str, float]:
    """Run a mirror with a full store, and make room in it."""
    began = time.monotonic()
    with Cached(stage.hub, store=store) as server:
        start = time.monotonic() - began
        wait_until_quiet(server.pid)
        pss = family.pss(server.pid)
        ended = load(again_and_again(server, blobs[0], stage))
    tidy = took(lambda: Cache(store, Limits(LARGE)).tidy())
    size = Cache(store, Limits(LARGE)).count(0)
    room = took(lambda: Cache(store, Limits(size)).make_room(KB))
    Cache(store, Limits(LARGE)).count(-KB)  # nothing comes that would take the room
    return {
        "kept blobs: start, s": start,
        "kept blobs: PSS, MiB": pss / MIB,
        "kept blobs: hits of 1 KB, requests/s": ended.answers,
        "kept blobs: first eviction, s": room,
        "kept blobs: hourly tidying, s": tidy,
    }


def wait_until_quiet(master: int) -> None:
    """Return when a server has nothing to do any more."""
    seen = -1.0

    def is_quiet() -> bool:
        nonlocal seen
        before, seen = seen, family.cpu(master)
        return seen == before

    poll(is_quiet, QUIET_SECONDS, interval=0.5)


def took(function: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    began = time.monotonic()
    function()
    return time.monotonic() - began


def note(curves: Curves, whose: str, at: int, figures: dict[str, float], say: Say) -> None:
    """Keep the values at a number, and show them."""
    for figure, value in figures.items():
        curves.setdefault(figure, {}).setdefault(whose, []).append((at, value))
    say(f"  {at}, {whose}: " + "; ".join(f"{name}: {value:.3g}" for name, value in figures.items()))
