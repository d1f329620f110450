"""Two workers share one cache: each blob comes once, whoever is killed, whoever leaves, and however little may stay."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
from crowd import Tally
from crowd import Visit
from crowd import tally
from crowd import visiting
from held import census_of
from held import connections
from held import countable
from held import descriptors
from hub import Hub
from images import MB
from images import MIB
from lab import ask
from line import Corrupt
from line import Cut
from line import DistantHub
from line import Drip
from line import Reset
from line import Stall
from line import exponential
from processes import poll
from serving import HOST
from serving import ROOT
from serving import Mirror

from bench.load import Job
from bench.load import outcome
from bench.load import running
from cache import PART
from cache import SIZE
from cache import Cache
from cache import Limits

REPOSITORY = "library/kept"
TWO = ("--workers", "2")
STALLED_AT = 8 * MB
NEARLY = STALLED_AT - MIB  # bytes that are on disk by then: the last chunks may be on their way
THREADS = {"_WorkerGreenlet", "greenlet"}  # one of each for a thread of a pool, which come and go as they are needed
GOOD_ENDS = {"finished", "left", "left early"}


class Fetched(NamedTuple):
    """Hold what a client got: what the cache did, and the digest of the bytes that came, all or not."""

    label: str
    digest: str
    is_whole: bool


def path_of(digest: str) -> str:
    return f"/v2/{REPOSITORY}/blobs/{digest}"


def fetch(port: int, digest: str) -> Fetched:
    """Get a blob, as far as it comes."""
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", path_of(digest))
        response = connection.getresponse()
        assert response.status == 200, response.read()
        received, count = hashlib.sha256(), 0
        with contextlib.suppress(OSError, http.client.IncompleteRead):
            while chunk := response.read(MIB):
                received.update(chunk)
                count += len(chunk)
        whole = count == int(response.headers["Content-Length"])
        return Fetched(response.headers["X-Cache"], f"sha256:{received.hexdigest()}", whole)


def workers_of(mirror: Mirror) -> list[int]:
    """Return the process numbers of both workers, once both are there."""
    assert poll(lambda: len(mirror.pids()) == 3, 10)
    return mirror.pids()[1:]


def clients_of(mirror: Mirror) -> list[int]:
    """Return how many clients each worker has."""
    return [connections(worker, mirror.port)["clients"] for worker in workers_of(mirror)]


def downloading(mirror: Mirror, distant: DistantHub) -> int:
    """Return the worker that is connected to the CDN."""
    cdn = urlsplit(distant.cdn.url).netloc
    (worker,) = [worker for worker in workers_of(mirror) if connections(worker, mirror.port)[cdn]]
    return worker


def stored_bytes(folder: Path) -> int:
    """Return how many bytes the blobs and parts take that are there all together at one moment."""
    while True:
        found = files_of(folder)
        if found.keys() == files_of(folder).keys():  # files only grow: at that moment they took so much at least
            return sum(found.values())


def files_of(folder: Path) -> dict[int, int]:
    """Return the size of each blob and part, by the number of its file."""
    found = {}
    for file in folder.glob("blobs/*/*/*"):
        with contextlib.suppress(FileNotFoundError):
            if file.suffix != SIZE:
                status = file.stat()
                found[status.st_ino] = status.st_size
    return found


def usage_of(folder: Path) -> int:
    """Return what the store says that it takes."""
    return int((folder / "usage").read_text())


def part_of(folder: Path, digest: str) -> Path:
    path = Cache(folder, Limits(1)).path(digest)
    return path.with_name(path.name + PART)


def locked(folder: Path, digests: list[str]) -> list[str]:
    """Return the blobs that somebody writes."""
    return [digest for digest in digests if is_locked(part_of(folder, digest))]


def is_locked(part: Path) -> bool:
    """Tell whether somebody writes a part."""
    try:
        with part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def settled(folder: Path, digests: list[str]) -> None:
    """See that no download runs any more, and that the store's count of its bytes is right."""
    assert poll(lambda: not locked(folder, digests), 20), "a download goes on"
    assert poll(lambda: usage_of(folder) == stored_bytes(folder), 5), (usage_of(folder), stored_bytes(folder))


@pytest.fixture(scope="module")
def distant(hub: Hub) -> Iterator[DistantHub]:
    with DistantHub(hub) as running:
        yield running


@pytest.fixture(scope="module")
def blob(hub: Hub) -> str:
    return hub.add_blob(REPOSITORY, 20 * MB)


@pytest.fixture
def stalled(distant: DistantHub) -> DistantHub:
    """Let the next transfer fall silent in the middle."""
    distant.forget()
    distant.cdn.faults = [Stall(STALLED_AT, times=1)]
    return distant


# One download


def test_fifty_clients_of_two_workers_cost_one_download(hub: Hub, tmp_path: Path) -> None:
    size = 100 * MB
    digest = hub.add_blob(REPOSITORY, size)
    hub.forget()
    with Mirror(*TWO, registries=hub.registries_file, cache_dir=tmp_path) as mirror:
        workers, mark = workers_of(mirror), mirror.mark()
        job = Job(mirror.port, path_of(digest), size, clients=50, digest=digest)
        with running(job) as process:
            assert poll(lambda: all(clients_of(mirror)), 20), "both workers serve"
            assert outcome(process, job).right == 50
        lines = mirror.wait_for_requests(50, mark)
        assert [line.status for line in lines] == [200] * 50
        assert [(request.method, request.range) for request in hub.cdn_requests()] == [("GET", "-")]
        labels = Counter(line.rpartition(" ")[2] for line in mirror.log(mark).splitlines() if path_of(digest) in line)
        assert labels["MISS"] == 1
        assert labels.total() == labels["MISS"] + labels["JOIN"] + labels["HIT"]
        assert workers_of(mirror) == workers
    assert stored_bytes(tmp_path) == usage_of(tmp_path) == size


# A worker, or all, end in the middle


def test_clients_of_the_other_worker_go_on_when_the_downloading_one_is_killed(
    stalled: DistantHub, blob: str, tmp_path: Path
) -> None:
    with Mirror(*TWO, registries=stalled.registries_file, cache_dir=tmp_path) as mirror:
        with ThreadPoolExecutor(24) as pool:
            pulls = clients_on_both(pool, mirror, blob)
            assert poll(lambda: part_of(tmp_path, blob).stat().st_size >= NEARLY, 20)
            killed = downloading(mirror, stalled)
            lost = connections(killed, mirror.port)["clients"]
            os.kill(killed, signal.SIGKILL)
        ended = [pull.result() for pull in pulls]
        assert [each.digest for each in ended if each.is_whole] == [blob] * (len(pulls) - lost)
        continued_once(stalled)
        settled(tmp_path, [blob])
        assert fetch(mirror.port, blob) == Fetched("HIT", blob, True)
        continued_once(stalled)


def clients_on_both(pool: ThreadPoolExecutor, mirror: Mirror, digest: str) -> list[Future[Fetched]]:
    """Let clients come until each worker has some, and all are being served."""
    pulls = [pool.submit(fetch, mirror.port, digest) for _ in range(12)]
    assert poll(lambda: sum(clients_of(mirror)) == 12, 20)
    while not all(clients_of(mirror)):
        pulls.append(pool.submit(fetch, mirror.port, digest))
        assert poll(lambda: sum(clients_of(mirror)) == len(pulls), 20)
    return pulls


def continued_once(distant: DistantHub) -> None:
    """See that the CDN was asked for all, and then for the rest only."""
    first, second = distant.cdn.asked("data")
    assert first.range == ""
    assert second.range.startswith("bytes=")
    assert second.range.endswith("-")
    assert NEARLY <= int(second.range.removeprefix("bytes=").rstrip("-")) <= STALLED_AT


def test_after_the_whole_mirror_was_killed_only_the_rest_is_fetched(
    stalled: DistantHub, blob: str, tmp_path: Path
) -> None:
    with Mirror(*TWO, registries=stalled.registries_file, cache_dir=tmp_path) as mirror, ThreadPoolExecutor(1) as pool:
        workers_of(mirror)
        pull = pool.submit(fetch, mirror.port, blob)
        assert poll(lambda: written(tmp_path, blob) >= NEARLY, 20)
        for pid in mirror.pids():  # the master first: it would make new workers
            os.kill(pid, signal.SIGKILL)
        assert not pull.result().is_whole
    goes_on(stalled, blob, tmp_path)


def test_a_graceful_stop_leaves_a_part_that_the_next_start_goes_on_with(
    stalled: DistantHub, blob: str, tmp_path: Path
) -> None:
    with Mirror(*TWO, registries=stalled.registries_file, cache_dir=tmp_path) as mirror, ThreadPoolExecutor(1) as pool:
        workers_of(mirror)
        pull = pool.submit(fetch, mirror.port, blob)
        assert poll(lambda: written(tmp_path, blob) >= NEARLY, 20)
        assert mirror.stop() == 0
        assert not pull.result().is_whole
        assert "Traceback" not in mirror.log()
    goes_on(stalled, blob, tmp_path)


def written(folder: Path, digest: str) -> int:
    """Return how many bytes of a part are there."""
    part = part_of(folder, digest)
    return part.stat().st_size if part.exists() else 0


def goes_on(distant: DistantHub, digest: str, folder: Path) -> None:
    """See that a new mirror fetches only what is not there yet, and that all is right then."""
    assert locked(folder, [digest]) == []
    with Mirror(*TWO, registries=distant.registries_file, cache_dir=folder) as mirror:
        workers_of(mirror)
        assert fetch(mirror.port, digest) == Fetched("MISS", digest, True)
        settled(folder, [digest])
        assert fetch(mirror.port, digest) == Fetched("HIT", digest, True)
        assert f"of {digest}, which an earlier download left" in mirror.log()
    continued_once(distant)


# Too little room


def test_two_workers_evict_at_once_and_the_store_never_takes_more_than_it_may(hub: Hub, tmp_path: Path) -> None:
    sizes = range(4 * MIB, 4 * MIB + 10)
    limit = 3 * sizes[-1]
    digests = [hub.add_blob(REPOSITORY, size) for size in sizes]
    wishes = random.Random(5).choices(digests, k=250)
    settings: dict[str, Any] = {"cache_dir": tmp_path, "cache_size": limit, "cache_min_free": 0}
    with Mirror(*TWO, registries=hub.registries_file, **settings) as mirror:
        workers, most = workers_of(mirror), 0
        with ThreadPoolExecutor(12) as pool:
            pulls = [pool.submit(fetch, mirror.port, digest) for digest in wishes]
            while not all(pull.done() for pull in pulls):
                most = max(most, stored_bytes(tmp_path))
                time.sleep(0.01)
        ended = [pull.result() for pull in pulls]
        assert [each.digest for each in ended] == wishes
        assert sizes[0] <= most <= limit
        assert sum(each.label == "MISS" for each in ended) > len(digests), "what was evicted came again"
        settled(tmp_path, digests)
        assert workers_of(mirror) == workers
        assert "Traceback" not in mirror.log()


def test_clients_of_what_there_is_no_room_for_do_not_wait_for_each_other(hub: Hub, blob: str, tmp_path: Path) -> None:
    with Mirror(registries=hub.registries_file, cache_dir=tmp_path, cache_size="1M", cache_min_free=0) as mirror:
        hub.forget()
        with ThreadPoolExecutor(12) as pool:
            ended = list(pool.map(lambda _: fetch(mirror.port, blob), range(12)))
        assert ended == [Fetched("BYPASS", blob, True)] * 12
        settled(tmp_path, [blob])


def test_a_part_of_what_there_is_no_room_for_is_a_part(hub: Hub, blob: str, tmp_path: Path) -> None:
    content = hub.stored(blob).read_bytes()
    with Mirror(registries=hub.registries_file, cache_dir=tmp_path, cache_size="1M", cache_min_free=0) as mirror:
        for asked, part in (("bytes=5-9", content[5:10]), ("bytes=-7", content[-7:])):
            answer = ask(mirror, path_of(blob), {"Range": asked})
            assert (answer.status, answer.headers["x-cache"], answer.body) == (206, "BYPASS", part)
        assert fetch(mirror.port, blob) == Fetched("BYPASS", blob, True)
        settled(tmp_path, [blob])


def test_wrong_bytes_get_no_name_and_no_client_of_either_worker_ends_well(
    distant: DistantHub, blob: str, tmp_path: Path
) -> None:
    distant.forget()
    distant.cdn.faults = [Corrupt(STALLED_AT), Drip(STALLED_AT + MB, pieces=200)]
    with Mirror(*TWO, registries=distant.registries_file, cache_dir=tmp_path) as mirror:
        with ThreadPoolExecutor(24) as pool:
            pulls = clients_on_both(pool, mirror, blob)
        assert not any(pull.result().is_whole for pull in pulls)
        settled(tmp_path, [blob])
        assert stored_bytes(tmp_path) == 0
        distant.forget()
        assert fetch(mirror.port, blob) == Fetched("MISS", blob, True)


@pytest.mark.parametrize("last", ["the worker that downloaded", "another worker"])
def test_what_is_read_along_is_not_evicted_once_it_is_whole(tmp_path: Path, last: str) -> None:
    content = b"some bytes"
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    cache, other = Cache(tmp_path, Limits(1000)), Cache(tmp_path, Limits(1000))
    partial = cache.claim(digest)
    assert partial is not None
    partial.begin(len(content))
    follower = other.follow(digest)
    assert follower is not None
    partial.write([content])
    partial.finish()
    assert follower.written == len(content)
    leave: list[Callable[[], None]] = [follower.close, lambda: os.close(partial.fd)]
    first, second = leave if last == "the worker that downloaded" else reversed(leave)
    first()
    assert not other.remove(digest)
    second()
    assert other.remove(digest)


EVICTING = """\
from gevent import monkey
monkey.patch_all()
import hashlib, os, sys, gevent
from pathlib import Path
from cache import Cache, Limits
from mirror import Threads
cache, threads = Cache(Path(sys.argv[1]), Limits(5000)), Threads(4)
def put(number):
    for count in range(100):
        content = b"%500d" % (1000 * number + count)
        threads.run(cache.put, "sha256:" + hashlib.sha256(content).hexdigest(), content)
writers = [gevent.spawn(put, number) for number in range(12)]
print(len(gevent.joinall(writers, timeout=40)), flush=True)
os._exit(0)
"""


def test_threads_that_evict_at_once_all_get_their_turn(tmp_path: Path) -> None:
    """A lock of gevent's, as threading's are in the mirror, would let some wait for ever."""
    script = [sys.executable, "-c", EVICTING, str(tmp_path)]
    ended = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout == "12\n", ended.stderr
    assert usage_of(tmp_path) == stored_bytes(tmp_path) <= 5000


# A bad line


class Soaked(NamedTuple):
    """Hold what came of a crowd: as it says itself, and what each worker has open and runs once it is idle again."""

    tally: Tally
    descriptors: list[int]
    greenlets: list[Counter[str]]


def soak(visit: Visit, mirror: Mirror, distant: DistantHub, folder: Path) -> Soaked:
    """Let a crowd pull and leave; wait until the workers have let go of the connections that they keep for a while."""
    with visiting(visit) as crowd:
        ended = tally(crowd)
    assert poll(lambda: not sum(clients_of(mirror)), 10)
    assert poll(lambda: not distant.cdn.open_connections + distant.registry.open_connections, 30)
    workers = workers_of(mirror)
    found = [census_of(worker, folder).greenlets for worker in workers]
    ours = [Counter({name: count for name, count in each.items() if name not in THREADS}) for each in found]
    return Soaked(ended, [descriptors(worker) for worker in workers], ours)


def test_nothing_stays_of_a_crowd_on_a_line_that_cuts(hub: Hub, distant: DistantHub, tmp_path: Path) -> None:
    sizes = (100_000, MB, 3 * MB, 5 * MB, 10 * MB, 15 * MB)
    blobs = {digest: str(hub.stored(digest)) for digest in [hub.add_blob(REPOSITORY, size) for size in sizes]}
    store, counts = tmp_path / "store", tmp_path / "counts"
    counts.mkdir()
    distant.forget()
    distant.cdn.faults = [Cut(exponential(4 * MB, 1)), Reset(exponential(15 * MB, 2))]
    settings: dict[str, Any] = {"cache_dir": store, "cache_size": "20M", "cache_min_free": 0, "idle_timeout": 3}
    with countable(counts, *TWO, registries=distant.registries_file, **settings) as mirror:
        workers = workers_of(mirror)
        warm, done = [
            soak(Visit(mirror.port, REPOSITORY, blobs, 60, seconds, seed), mirror, distant, counts)
            for seed, seconds in enumerate((4, 12))
        ]
        assert warm.tally.wrong + done.tally.wrong == []
        assert done.tally.ends["finished"] > 0
        assert ": went on at byte " in mirror.log()
        assert "Traceback" not in mirror.log()
        assert done.descriptors == warm.descriptors
        assert done.greenlets == warm.greenlets
        assert all(sum(each.values()) for each in done.greenlets), "they are counted"
        settled(store, list(blobs))
        assert workers_of(mirror) == workers
