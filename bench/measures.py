"""What is measured: each function takes one running server and what all share, and returns its figures by name.

A name ends with its unit. What counts per second is the better the more it is, all else the less it is.
"""

import itertools
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import requests
from clients import Skopeo
from distance import FarHub
from hub import Hub
from images import layered_repository

from bench import family
from bench.load import Job
from bench.load import LoadFailed
from bench.load import Outcome
from bench.load import load
from bench.load import outcome
from bench.load import running
from bench.load import wait_until_answered
from bench.peers import FAR_REPOSITORIES
from bench.peers import REPOSITORY
from bench.peers import Direct
from bench.peers import Keeper
from bench.peers import Object
from bench.peers import Server
from bench.peers import Static
from bench.peers import Upstream
from bench.peers import keep
from bench.peers import wait_until_kept

KB, MB, GB, KIB, MIB = 10**3, 10**6, 10**9, 1 << 10, 1 << 20
LAYERS, FAR_LAYERS, FAR_LAYER = 20, 5, 300_000
END = 10**9  # requests, which no server answers in time
SMALL = 16  # clients that ask for small objects at the same time
Figures = dict[str, float]


class Scale(NamedTuple):
    """Say how large the measurements are: sizes in bytes, rates in bytes per second, times in seconds.

    In a round, what varies most has so many `passes`. `growing` numbers are those of growth.py, `limits` of limits.py.
    """

    passes: int = 3
    blob: int = GB
    parallel: int = 16
    part: int = 100 * MB
    layer: int = 5 * MB
    passed_requests: int = 100  # of each client
    kept_requests: int = 5
    small_seconds: float = 3  # in which what is kept is asked for again and again
    first_bytes: int = 11
    slow_clients: int = 1000
    slow_rate: int = 50_000
    slow_seconds: float = 8
    slow_arriving: int = 100  # in a second
    slow_rcvbuf: int = 32 * KIB
    burst_clients: int = 200
    burst_seconds: float = 3
    burst_quiet: float = 65  # in which the mirror has given back what a burst took
    settle: float = 1.0  # from a server's start or its first pull until its memory is read
    round_trip: float = 0.1  # to the far hub
    growing_clients: tuple[int, ...] = (10, 100, 1000, 4000)
    growing_rate: int = 20_000
    growing_blobs: tuple[int, ...] = (1000, 10_000, 100_000)
    limits: tuple[tuple[int, int], ...] = ((128, 300), (512, 1000))  # MiB of memory, and slow clients


SHORT = Scale(
    passes=1,
    blob=16 * MB,
    parallel=4,
    part=4 * MB,
    layer=100 * KB,
    passed_requests=2,
    kept_requests=1,
    small_seconds=0.5,
    slow_rate=1_000_000,
    first_bytes=2,
    slow_clients=20,
    slow_seconds=0.2,
    burst_clients=4,
    burst_seconds=0.2,
    burst_quiet=0.1,
    settle=0.05,
    round_trip=0.01,
    growing_clients=(4,),
    growing_blobs=(10,),
    limits=((128, 4), (512, 4)),
)


class Fresh(NamedTuple):
    """Hold blobs that no server has had yet, all of a size that no other blob has."""

    part: Object
    small: list[Object]


class Stage:
    """Hold what all servers are measured with: the hub, near and far, what is pulled from it, and the scale."""

    def __init__(self, hub: Hub, far: FarHub, scale: Scale) -> None:
        self.hub = hub
        self.far = far
        self.scale = scale
        self.start_seconds = 0.0  # that the latest server took to come up
        self._sizes = itertools.count(1)
        self._fresh: Fresh | None = None
        image = layered_repository("bench", LAYERS, scale.layer)
        hub.push(image)
        for number, name in enumerate(FAR_REPOSITORIES):
            hub.push(layered_repository(name.removeprefix("library/"), FAR_LAYERS, FAR_LAYER + number))
        manifest = image.top()
        self.image_size = sum(blob.descriptor()["size"] for blob in image.images[0].layers)
        path = f"/v2/{REPOSITORY}/manifests/"
        self.by_tag = Object(f"{path}latest", manifest.digest, len(manifest.data), manifest.media_type)
        self.by_digest = self.by_tag._replace(path=path + manifest.digest)

    @cached_property
    def big(self) -> Object:
        """Return the big blob."""
        return self._blob(self.scale.blob)

    @cached_property
    def part(self) -> Object:
        """Return the blob of which several are pulled at once."""
        return self._blob(self.scale.part)

    @cached_property
    def medium(self) -> Object:
        """Return a blob of 1 MB."""
        return self._blob(MB)

    @cached_property
    def tiny(self) -> Object:
        """Return a blob of 1 KB."""
        return self._blob(KB)

    def _blob(self, size: int) -> Object:
        digest = self.hub.add_blob(REPOSITORY, size)
        os.sync()  # else the first one measured would pay for it
        return Object(f"/v2/{REPOSITORY}/blobs/{digest}", digest, size)

    @property
    def fresh(self) -> Fresh:
        """Return the blobs of this turn that nobody has had before this turn."""
        if self._fresh is None:
            sizes = [self.scale.part, *[MB] * self.scale.first_bytes]
            part, *small = (self._blob(size + next(self._sizes)) for size in sizes)
            self._fresh = Fresh(part, small)
        return self._fresh

    def next_turn(self) -> None:
        """Begin a new turn, and remove what only the one before it needed."""
        if self._fresh:
            for thing in (self._fresh.part, *self._fresh.small):
                self.hub.stored(thing.digest).unlink()
        self._fresh = None

    def upstream(self, far: bool) -> Upstream:
        """Return the hub, near or far."""
        return self.far if far else self.hub

    def keep(self, server: Server, *things: Object) -> None:
        """Return once a server has these objects on its disk, and in memory."""
        assert isinstance(server, Keeper)
        for thing in things:
            if isinstance(server, Static) and not server.file(thing).exists():
                server.link(thing, self.hub.stored(thing.digest))
            keep(server, thing)


def one_blob(server: Server, stage: Stage) -> Figures:
    """Pull the big blob."""
    _warm_up(server, stage)
    return _rates("one blob", "MB/s", server, stage.big.job(server.port))


def blobs_at_once(server: Server, stage: Stage) -> Figures:
    """Pull several blobs at once."""
    _warm_up(server, stage)
    return _rates("blobs at once", "MB/s", server, stage.part.job(server.port, clients=stage.scale.parallel))


def small_objects(server: Server, stage: Stage) -> Figures:
    """Pull blobs of 1 MB and of 1 KB again and again."""
    _warm_up(server, stage)
    many, few = stage.scale.passed_requests, max(1, stage.scale.passed_requests // 4)
    return {
        **_rates("1 MB blobs", "requests/s", server, stage.medium.job(server.port, clients=SMALL, requests=few)),
        **_rates("1 KB blobs", "requests/s", server, stage.tiny.job(server.port, clients=SMALL, requests=many)),
    }


def manifest(server: Server, stage: Stage) -> Figures:
    """Pull a manifest by its tag again and again."""
    _warm_up(server, stage)
    job = stage.by_tag.job(server.port, clients=SMALL, requests=stage.scale.passed_requests)
    return _rates("manifest", "requests/s", server, job)


def image(server: Server, stage: Stage) -> Figures:
    """Pull an image of many layers with skopeo."""
    _warm_up(server, stage)
    return _image("image", server, stage)


def kept_blobs(server: Server, stage: Stage) -> Figures:
    """Pull what the server has on its disk, and in memory: the big blob, and several at once."""
    stage.keep(server, stage.big, stage.part)
    more = stage.scale.kept_requests
    several = stage.part.job(server.port, clients=stage.scale.parallel, requests=more)
    return {
        **_rates("kept blob", "MB/s", server, stage.big.job(server.port, requests=more)),
        **_rates("kept blobs at once", "MB/s", server, several),
    }


def cold_blob(server: Server, stage: Stage) -> Figures:
    """Pull what the server has on its disk only."""
    assert isinstance(server, Keeper)
    stage.keep(server, stage.big)
    _drop_from_memory(server.file(stage.big))
    return _rates("kept blob, cold", "MB/s", server, stage.big.job(server.port))


def kept_small(server: Server, stage: Stage) -> Figures:
    """Pull the manifest, and a blob of 1 KB, that the server has on its disk, again and again."""
    stage.keep(server, stage.by_digest, stage.tiny)
    return {
        **_rates("kept manifest", "requests/s", server, again_and_again(server, stage.by_digest, stage)),
        **_rates("kept 1 KB blobs", "requests/s", server, again_and_again(server, stage.tiny, stage)),
    }


def kept_image(server: Server, stage: Stage) -> Figures:
    """Pull an image of many layers with skopeo, all of which the server has on its disk."""
    _image("kept image", server, stage)
    return _image("kept image", server, stage)


def new_blob(server: Server, stage: Stage) -> Figures:
    """Pull blobs that the server is to keep, but does not have yet; the CPU time is all until one is on disk."""
    assert isinstance(server, Keeper)
    fresh = stage.fresh
    _first_byte(server, fresh.small[0])  # brings tokens and connections
    wait_until_kept(server, fresh.small[0])
    time.sleep(stage.scale.settle)
    cpu = family.cpu(server.pid)
    ended = load(fresh.part.job(server.port))
    wait_until_kept(server, fresh.part)
    time.sleep(stage.scale.settle)
    cpu = family.cpu(server.pid) - cpu
    times = [_first_byte(server, thing) for thing in fresh.small[1:]]
    os.sync()  # nobody else pays for what this one wrote
    # The next one gets the memory that this one had: where a virtual machine has not used it yet, it costs far more.
    server.file(fresh.part).unlink()
    return {
        "new blob, MB/s": ended.rate / MB,
        "new blob, CPU s/GB": cpu / ended.received * GB,
        "new blob, MiB": _memory(server),
        "new blob, first byte, ms": 1000 * _middle(times),
    }


def first_byte(server: Server, stage: Stage) -> Figures:
    """Wait for the first byte of a blob of 1 KB, over connections that stand."""
    return {"first byte, ms": 1000 * _first_bytes(server, stage)}


def first_byte_far(server: Server, stage: Stage) -> Figures:
    """Wait for the first byte of a blob of 1 KB, over connections that stand, from far away."""
    return {"far: first byte, ms": 1000 * _first_bytes(server, stage, far=True)}


def image_far(server: Server, stage: Stage) -> Figures:
    """Pull an image of five layers with skopeo from far away, and a second one; count the hub's new connections."""
    seconds, connections = [], []
    for name in FAR_REPOSITORIES:
        before = sum(stage.far.connections().values())
        seconds.append(_copy(server, name))
        connections.append(sum(stage.far.connections().values()) - before)
    return {
        "far: first image, s": seconds[0],
        "far: second image, s": seconds[1],
        "far: first image, new connections": connections[0],
        "far: second image, new connections": connections[1],
    }


def idle(server: Server, stage: Stage) -> Figures:
    """Read the memory of a fresh server, and how long it took to come up."""
    time.sleep(stage.scale.settle)
    return {
        "idle PSS, MiB": family.pss(server.pid) / MIB,
        "idle PSS without files, MiB": _memory(server),
        "start, s": stage.start_seconds,
    }


def slow_clients(server: Server, stage: Stage) -> Figures:
    """Let many slow clients pull the big blob."""
    _warm_up(server, stage)
    return _slow("slow clients", server, stage)


def kept_slow_clients(server: Server, stage: Stage) -> Figures:
    """Let many slow clients pull the big blob, which the server has on its disk."""
    stage.keep(server, stage.big)
    return _slow("kept: slow clients", server, stage)


def burst(server: Server, stage: Stage) -> Figures:
    """Let many fast clients pull the big blob at once, and leave; read the memory meanwhile, and after some quiet."""
    scale = stage.scale
    _warm_up(server, stage)
    job = stage.big.job(server.port, clients=scale.burst_clients, seconds=scale.burst_seconds, whole=False)
    with running(job) as process:
        time.sleep(0.8 * scale.burst_seconds)
        memory = _memory(server)
        outcome(process, job)
    time.sleep(scale.burst_quiet)
    return {"burst, MiB": memory, "burst, a minute later, MiB": _memory(server)}


class Measure(NamedTuple):
    """Say what is measured, and beside which peers; the mirror is the one with a cache, or the one without.

    `alone`: no other server may run meanwhile, with which memory would be shared. `far`: the hub is far away. Each
    server is a fresh one then.
    """

    name: str
    take: Callable[[Server, Stage], Figures]
    peers: tuple[str, ...]
    ours: str = "mirror"
    repeated: bool = False
    alone: bool = False
    far: bool = False


NGINX, KEEPERS = ("tuned", "recipe"), ("registry", "static")
MEASURES = (
    Measure("blob", one_blob, NGINX, repeated=True),
    Measure("blobs", blobs_at_once, NGINX, repeated=True),
    Measure("small", small_objects, NGINX),
    Measure("manifest", manifest, NGINX),
    Measure("image", image, NGINX, repeated=True),
    Measure("new", new_blob, ("registry",), ours="cached", repeated=True),
    Measure("kept", kept_blobs, KEEPERS, ours="cached", repeated=True),
    Measure("cold", cold_blob, KEEPERS, ours="cached"),
    Measure("kept-small", kept_small, KEEPERS, ours="cached"),
    Measure("kept-image", kept_image, ("registry",), ours="cached", repeated=True),
    Measure("first-byte", first_byte, (*NGINX, "direct")),
    Measure("far-first-byte", first_byte_far, (*NGINX, "direct"), alone=True, far=True),
    Measure("far-image", image_far, ("direct",), alone=True, far=True),
    Measure("idle", idle, (*NGINX, *KEEPERS), alone=True),
    Measure("burst", burst, ("tuned",), alone=True),
    Measure("slow", slow_clients, NGINX, alone=True),
    Measure("kept-slow", kept_slow_clients, KEEPERS, ours="cached", alone=True),
)


class Taken(NamedTuple):
    """Hold what a server took for many clients: bytes of memory, part of a core, bytes in the kernel's TCP buffers."""

    pss: int
    cpu: float
    kernel: int


def watched(server: Server, job: Job, stage: Stage) -> tuple[Outcome, Taken]:
    """Run a job of many clients; return what came of it once all were there, and what the server took meanwhile."""
    seconds = stage.scale.slow_seconds
    pss = family.pss(server.pid)
    with running(job._replace(seconds=1.1 * seconds, whole=False, together=True)) as process:
        wait_until_answered(process)
        cpu, began = family.cpu(server.pid), time.monotonic()
        time.sleep(seconds)
        cpu = (family.cpu(server.pid) - cpu) / (time.monotonic() - began)
        pss = family.pss(server.pid) - pss
        kernel = family.kernel_tcp(server.port, urlsplit(stage.hub.cdn_url).port or 0)
        ended = outcome(process, job)
    return ended, Taken(pss, cpu, kernel)


def slow_job(server: Server, stage: Stage) -> Job:
    """Return the job of slow clients."""
    scale = stage.scale
    return stage.big.job(
        server.port,
        clients=scale.slow_clients,
        rate=scale.slow_rate,
        rcvbuf=scale.slow_rcvbuf,
        arriving=scale.slow_arriving,
    )


def again_and_again(server: Server, thing: Object, stage: Stage) -> Job:
    """Return the job of asking for a small object until the time is over."""
    return thing.job(server.port, clients=SMALL, requests=END, seconds=stage.scale.small_seconds, whole=False)


def _slow(name: str, server: Server, stage: Stage) -> Figures:
    time.sleep(stage.scale.settle)
    job = slow_job(server, stage)
    ended, taken = watched(server, job, stage)
    return {
        f"{name}, MB/s": ended.rate / MB,
        f"{name}, CPU s/GB": taken.cpu / ended.rate * GB,
        f"{name}, PSS each, KiB": taken.pss / KIB / job.clients,
        f"{name}, kernel TCP each, KiB": taken.kernel / KIB / job.clients,
    }


def _rates(name: str, unit: str, server: Server, job: Job) -> Figures:
    """Run a job: its rate, CPU per GB or per request, and the memory that the server has after it."""
    cpu = family.cpu(server.pid)
    ended = load(job)
    cpu = family.cpu(server.pid) - cpu
    if not ended.complete:
        raise LoadFailed(f"no answer was complete within {ended.seconds:.1f} s")
    memory = {f"{name}, MiB": _memory(server)}
    if unit == "MB/s":
        return {f"{name}, MB/s": ended.rate / MB, f"{name}, CPU s/GB": cpu / ended.received * GB, **memory}
    return {f"{name}, {unit}": ended.answers, f"{name}, CPU ms/request": 1000 * cpu / ended.complete, **memory}


def _memory(server: Server) -> float:
    """Return the MiB that a server has, without files: two mirrors that run side by side share those."""
    return family.pss(server.pid, "Pss_Anon") / MIB


def _image(name: str, server: Server, stage: Stage) -> Figures:
    cpu = family.cpu(server.pid)
    seconds = _copy(server, REPOSITORY)
    cpu = family.cpu(server.pid) - cpu
    size = stage.image_size
    return {
        f"{name}, MB/s": size / seconds / MB,
        f"{name}, CPU s/GB": cpu / size * GB,
        f"{name}, MiB": _memory(server),
    }


def _copy(server: Server, repository: str) -> float:
    """Copy an image to files with skopeo; return the seconds that took."""
    host = server.url.partition("//")[2]
    with Skopeo(f"http://{host}") as skopeo:
        began = time.monotonic()
        copied = skopeo.skopeo("copy", f"docker://{host}/{repository}", f"dir:{skopeo.folder}/copy")
        seconds = time.monotonic() - began
    if copied.returncode:
        raise LoadFailed(copied.stdout + copied.stderr)
    return seconds


def _first_bytes(server: Server, stage: Stage, far: bool = False) -> float:
    """Return the median of the seconds until the first byte of a small blob, asked for again and again."""
    with requests.Session() as session:
        session.trust_env = False
        session.verify = str(stage.upstream(far).ca_file)
        if isinstance(server, Direct):
            session.headers["Authorization"] = f"Bearer {server.token}"
        times = [_answered(session, server, stage.tiny) for _ in range(stage.scale.first_bytes)]
        return _middle(times[1:])  # the first brings token and connections


def _first_byte(server: Server, thing: Object) -> float:
    with requests.Session() as session:
        session.trust_env = False
        return _answered(session, server, thing)


def _answered(session: requests.Session, server: Server, thing: Object) -> float:
    began = time.monotonic()
    with session.get(server.url + thing.path, stream=True, timeout=30) as response:
        response.raise_for_status()
        response.raw.read(1)
        waited = time.monotonic() - began
        while response.raw.read(MIB):  # so that the connection can be kept
            pass
    return waited


def _middle(times: list[float]) -> float:
    return sorted(times)[len(times) // 2]


def _warm_up(server: Server, stage: Stage) -> None:
    """Pull a little first: tokens, names and the first connection are no part of any measurement."""
    load(stage.tiny.job(server.port))


def _drop_from_memory(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    with suppress(OSError):
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
