"""What is measured: each function takes one running server and returns its figures by name."""

import time
from collections.abc import Callable
from typing import NamedTuple

from hub import Hub

from bench import family
from bench.load import Job
from bench.load import LoadFailed
from bench.load import Outcome
from bench.load import load
from bench.load import outcome
from bench.load import running
from bench.peers import REPOSITORY
from bench.peers import Server

MB, GB, KIB, MIB = 10**6, 10**9, 1 << 10, 1 << 20
SETTLE = 1.0  # seconds from a server's start or its first pull until its memory is read
SAMPLE_EVERY = 0.5  # seconds


class Scale(NamedTuple):
    """Say how large the measurements are: sizes in bytes, rates in bytes per second, times in seconds.

    A round has so many `passes` for the rates, which vary most, and one for the memory.
    """

    passes: int = 3
    blob: int = GB
    parallel: int = 16
    part: int = 100 * MB
    slow_clients: int = 200
    slow_rate: int = 50_000
    slow_seconds: float = 10
    slow_rcvbuf: int = 32 * KIB
    clients: int = 100
    client_rate: int = MB


SHORT = Scale(passes=1, blob=64 * MB, parallel=4, part=10 * MB, slow_clients=20, slow_seconds=3, clients=10)


class Blob(NamedTuple):
    """Name one blob of the hub's registry; the size is in bytes."""

    digest: str
    size: int

    @property
    def path(self) -> str:
        """Return the path at which it is pulled."""
        return f"/v2/{REPOSITORY}/blobs/{self.digest}"


class Blobs(NamedTuple):
    """Hold the blobs that are pulled: a small one that warms a server up, the big one, and one of the many."""

    small: Blob
    big: Blob
    part: Blob


def make_blobs(hub: Hub, scale: Scale) -> Blobs:
    """Put the blobs into the hub's registry."""
    return Blobs(*(Blob(hub.add_blob(REPOSITORY, size), size) for size in (MB, scale.blob, scale.part)))


def one_blob(server: Server, blobs: Blobs, scale: Scale) -> dict[str, float]:
    """Pull the big blob: its rate in MB/s, and seconds of CPU per GB."""
    return _throughput(server, blobs, Job(server.port, blobs.big.path, blobs.big.size), "one blob")


def many_blobs(server: Server, blobs: Blobs, scale: Scale) -> dict[str, float]:
    """Pull several blobs at once: the rate of all together in MB/s, and seconds of CPU per GB."""
    job = Job(server.port, blobs.part.path, blobs.part.size, clients=scale.parallel)
    return _throughput(server, blobs, job, f"{scale.parallel} at once")


def memory(server: Server, blobs: Blobs, scale: Scale) -> dict[str, float]:
    """Read the memory of a fresh server when idle, in MiB, and what each slow client adds to it, in KiB.

    No other server may run meanwhile: pages shared with it would count in part only.
    """
    time.sleep(SETTLE)
    idle, anonymous = family.pss(server.pid), family.pss(server.pid, "Pss_Anon")
    _warm_up(server, blobs)
    time.sleep(SETTLE)
    pss, kernel = family.pss(server.pid), family.kernel_tcp()
    job = Job(
        server.port,
        blobs.big.path,
        blobs.big.size,
        clients=scale.slow_clients,
        rate=scale.slow_rate,
        rcvbuf=scale.slow_rcvbuf,
        seconds=scale.slow_seconds + 1,
        whole=False,
    )
    with running(job) as process:
        time.sleep(scale.slow_seconds)
        pss, kernel = family.pss(server.pid) - pss, family.kernel_tcp() - kernel
        ended = outcome(process, job)
    if ended.started < scale.slow_clients:
        raise LoadFailed(f"only {ended.started} of {scale.slow_clients} slow clients were answered")
    per_client = KIB * scale.slow_clients
    return {
        "idle PSS, MiB": idle / MIB,
        "idle PSS, without files, MiB": anonymous / MIB,
        "PSS per slow client, KiB": pss / per_client,
        "kernel TCP per slow client, KiB": kernel / per_client,
    }


Measure = Callable[[Server, Blobs, Scale], dict[str, float]]
RATES: list[Measure] = [one_blob, many_blobs]


def _throughput(server: Server, blobs: Blobs, job: Job, name: str) -> dict[str, float]:
    _warm_up(server, blobs)
    cpu = family.cpu(server.pid)
    ended = load(job)
    cpu = family.cpu(server.pid) - cpu
    return {f"{name}, MB/s": ended.rate / MB, f"{name}, CPU s/GB": cpu / ended.received * GB}


def _warm_up(server: Server, blobs: Blobs) -> None:
    """Pull a little first: tokens, names and the first connection are no part of any measurement."""
    load(Job(server.port, blobs.small.path, blobs.small.size))


class Acceptance(NamedTuple):
    """Hold what came of many clients at a fixed rate; memory is in bytes."""

    ended: Outcome
    idle: int
    peak: int

    @property
    def growth(self) -> int:
        """Return by how much the family's memory grew at most, in bytes."""
        return self.peak - self.idle


def many_clients(server: Server, blobs: Blobs, scale: Scale) -> Acceptance:
    """Pull one blob with many clients at a fixed rate each, hash what each gets, and watch the memory."""
    time.sleep(SETTLE)
    idle = peak = family.pss(server.pid)
    job = Job(
        server.port,
        blobs.part.path,
        blobs.part.size,
        clients=scale.clients,
        rate=scale.client_rate,
        seconds=3 * blobs.part.size / scale.client_rate + 10,
        digest=blobs.part.digest,
        whole=False,
    )
    with running(job) as process:
        while process.poll() is None:  # ends with the job, whose time is bounded
            peak = max(peak, family.pss(server.pid))
            time.sleep(SAMPLE_EVERY)
        return Acceptance(outcome(process, job), idle, peak)
