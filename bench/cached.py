"""The cache beside those that people use: docker-registry as a pull-through cache, and nginx with a file of its own.

`cached` is the mirror with a cache, `hashing` the one without that hashes what passes (MIRROR_VERIFY=on). Each cold
pull is of a blob that nobody has yet.
"""

import http.client
import itertools
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import requests
from hub import Hub
from processes import Process
from processes import clean_environment
from processes import free_port
from processes import poll
from processes import removed_afterwards
from serving import Mirror

from bench import family
from bench.load import Job
from bench.load import LoadFailed
from bench.load import load
from bench.load import outcome
from bench.load import running
from bench.measures import GB
from bench.measures import KIB
from bench.measures import MB
from bench.measures import Blob
from bench.measures import Scale
from bench.peers import HOST
from bench.peers import REPOSITORY
from bench.peers import Nginx
from bench.peers import Server
from bench.report import Samples
from bench.report import add

PEERS = ["cached", "hashing", "registry", "static"]  # the first one is compared with the others
Say = Callable[[str], None]  # shows a line of progress
SETTLE = 1.0  # seconds from a pull's end until memory or files are looked at
SYNC_SECONDS = 120  # in which what was pulled must be on disk
FIRST_BYTES = 10  # of how many small blobs the first byte's delay is taken

STATIC = """\
    server {
        listen @ADDRESS@ backlog=1024;
        root "@ROOT@";
        sendfile on;
        tcp_nopush on;
    }
"""
REGISTRY = """\
version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage:
  filesystem: {rootdirectory: "@FOLDER@"}
  cache: {blobdescriptor: inmemory}
http: {addr: "@ADDRESS@", secret: "of the measurements"}
proxy: {remoteurl: "@REMOTE@"}
"""


class Registry:
    """Run docker-registry as a pull-through cache of the hub."""

    def __init__(self, hub: Hub, stack: ExitStack) -> None:
        folder = temporary(stack)
        self.port = free_port(HOST)
        self.folder = folder / "storage"
        config = folder / "config.yml"
        values = {"FOLDER": self.folder, "ADDRESS": f"{HOST}:{self.port}", "REMOTE": hub.registry_url}
        text = REGISTRY
        for key, value in values.items():
            text = text.replace(f"@{key}@", str(value))
        config.write_text(text)
        environment = clean_environment() | {"SSL_CERT_FILE": str(hub.ca_file)}
        process = Process(["docker-registry", "serve", str(config)], folder / "log", environment, folder)
        self.pid = stack.enter_context(process).pid
        process.wait_until(self._answers)

    def _answers(self) -> bool:
        try:
            return requests.get(f"http://{HOST}:{self.port}/v2/", timeout=5).status_code == 200
        except requests.ConnectionError:
            return False


class Static(Nginx):
    """Run nginx with the very files of the hub's CDN, at the paths of the registry's API."""

    def __init__(self, hub: Hub, blobs: list[Blob], stack: ExitStack) -> None:
        root = temporary(stack)
        for blob in blobs:
            link = root / blob.path.removeprefix("/")
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub.stored(blob.digest), link)
        super().__init__(hub, STATIC.replace("@ROOT@", str(root)))


class Cached(Mirror):
    """Run the mirror with a cache."""

    def __init__(self, hub: Hub, stack: ExitStack) -> None:
        self.folder = temporary(stack)
        super().__init__(registries=hub.registries_file, cache_dir=self.folder, cache_size="1T", cache_min_free="0")

    def wait_for(self, blob: Blob) -> None:
        """Return once a blob has its name in the cache."""
        encoded = blob.digest.removeprefix("sha256:")
        if not poll((self.folder / "blobs/sha256" / encoded[:2] / encoded).exists, SYNC_SECONDS):
            raise LoadFailed(f"{blob.digest} was not kept")


def temporary(stack: ExitStack) -> Path:
    """Return a folder that goes with the stack."""
    return stack.enter_context(removed_afterwards(Path(tempfile.mkdtemp(prefix="bench-"))))


def compare_cached(hub: Hub, scale: Scale, rounds: int, say: Say) -> Samples:
    """Measure all in every round, in an order that chance makes."""
    samples: Samples = {}
    sizes = itertools.count()
    for number in range(1, rounds + 1):
        say(f"round {number} of {rounds}")
        with ExitStack() as stack:
            new = [new_blob(hub, scale.part + next(sizes)) for _ in range(scale.passes)]
            small = [new_blob(hub, MB + next(sizes)) for _ in range(FIRST_BYTES)]
            kept = [new_blob(hub, scale.blob), new_blob(hub, scale.part)]
            cached = stack.enter_context(Cached(hub, stack))
            servers: dict[str, Server] = {
                "cached": cached,
                "hashing": stack.enter_context(Mirror(registries=hub.registries_file, verify="on")),
                "registry": Registry(hub, stack),
                "static": stack.enter_context(Static(hub, kept, stack)),
            }
            for peer in ("cached", "hashing", "registry"):
                first_byte(servers[peer], [new_blob(hub, MB + next(sizes))])  # brings tokens and connections
            for blob in new:
                for peer in random.sample(["cached", "hashing", "registry"], 3):
                    note(samples, peer, cold(servers[peer], blob), say)
                    os.sync()  # nobody pays for what another one wrote
                    forget(servers[peer], blob)
            for peer in random.sample(["cached", "hashing", "registry"], 3):
                note(samples, peer, first_byte(servers[peer], small), say)
            for blob in kept:
                load(Job(cached.port, blob.path, blob.size))
                cached.wait_for(blob)
            for _ in range(scale.passes):
                for peer in random.sample(["cached", "static"], 2):
                    note(samples, peer, warm(servers[peer], kept, scale), say)
            for peer in random.sample(["cached", "static"], 2):
                note(samples, peer, slow(servers[peer], kept[0], scale), say)
    return samples


def note(samples: Samples, peer: str, figures: dict[str, float], say: Say) -> None:
    """Keep what one peer reached, and show it."""
    add(samples, peer, figures)
    say(f"  {peer}: " + "; ".join(f"{name}: {value:.3g}" for name, value in figures.items()))


def new_blob(hub: Hub, size: int) -> Blob:
    """Put a blob into the hub's registry."""
    return Blob(hub.add_blob(REPOSITORY, size), size)


def cold(server: Server, blob: Blob) -> dict[str, float]:
    """Pull a blob that the server does not have: its rate in MB/s, and seconds of CPU per GB until it is on disk."""
    cpu = family.cpu(server.pid)
    ended = load(Job(server.port, blob.path, blob.size))
    if isinstance(server, Cached):
        server.wait_for(blob)
    time.sleep(SETTLE)
    cpu = family.cpu(server.pid) - cpu
    return {"not yet kept, MB/s": ended.rate / MB, "not yet kept, CPU s/GB": cpu / ended.received * GB}


def forget(server: Server, blob: Blob) -> None:
    """Remove a blob from a server's disk.

    The next one then gets the memory that this one had: on a virtual machine, memory that was never used costs far
    more than to copy into it.
    """
    if isinstance(server, (Cached, Registry)):
        for file in server.folder.rglob("*"):
            if file.is_file() and file.stat().st_size == blob.size:
                file.unlink()


def first_byte(server: Server, blobs: list[Blob]) -> dict[str, float]:
    """Return the median of the milliseconds until the first byte of a blob that the server does not have."""
    times = sorted(_first_byte(server, blob) for blob in blobs)
    return {"not yet kept, first byte, ms": 1000 * times[len(times) // 2]}


def _first_byte(server: Server, blob: Blob) -> float:
    connection = http.client.HTTPConnection(HOST, server.port, timeout=30)
    began = time.monotonic()
    try:
        connection.request("GET", blob.path)
        response = connection.getresponse()
        response.read(1)
        waited = time.monotonic() - began
        response.read()
    finally:
        connection.close()
    return waited


def warm(server: Server, kept: list[Blob], scale: Scale) -> dict[str, float]:
    """Pull what is kept: the rates in MB/s of one blob and of several at once, and seconds of CPU per GB."""
    big, part = kept
    figures: dict[str, float] = {}
    for name, job in (
        ("kept, one", Job(server.port, big.path, big.size)),
        (f"kept, {scale.parallel} at once", Job(server.port, part.path, part.size, clients=scale.parallel)),
    ):
        cpu = family.cpu(server.pid)
        ended = load(job)
        cpu = family.cpu(server.pid) - cpu
        figures |= {f"{name}, MB/s": ended.rate / MB, f"{name}, CPU s/GB": cpu / ended.received * GB}
    return figures


def slow(server: Server, blob: Blob, scale: Scale) -> dict[str, float]:
    """Return what each slow client of a kept blob adds to the server's memory, in KiB."""
    time.sleep(SETTLE)
    clients = 5 * scale.slow_clients
    before = family.pss(server.pid)
    seconds = scale.slow_seconds
    job = Job(server.port, blob.path, blob.size, clients, scale.slow_rate, scale.slow_rcvbuf, seconds + 1, whole=False)
    with running(job) as process:
        time.sleep(seconds)
        grown = family.pss(server.pid) - before
        ended = outcome(process, job)
    if ended.started < clients:
        raise LoadFailed(f"only {ended.started} of {clients} slow clients were answered")
    return {"kept, PSS per slow client, KiB": grown / KIB / clients}
