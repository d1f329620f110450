"""A disk that fails never fails a pull: what cannot be kept passes through, the log has one line, /healthz says so."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from contextlib import closing
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gevent
import pytest
from conftest import needs
from depot import BROKEN
from depot import PATIENCE
from depot import Cached
from depot import Depot
from depot import Reading
from depot import cached_lab
from images import MIB
from images import OCI_MANIFEST
from images import digest_of
from images import random_bytes
from lab import reply
from processes import clean_environment
from processes import poll
from processes import removed_afterwards

from cache import Cache
from cache import Limits
from mirror import MAX_UNWRITTEN
from mirror import Threads
from mirror import Writer

ROOT = Path(__file__).resolve().parent.parent
DISK = 8 * MIB
OK = {"status": "ok"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Give a small disk."""
    needs("root", "mount")
    with removed_afterwards(tmp_path / "disk") as folder:
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder], check=True)
        yield folder


@pytest.fixture
def cached(disk: Path) -> Iterator[Cached]:
    """Give a mirror whose cache is on that disk."""
    yield from running(disk)


def running(folder: Path, *options: str, **settings: Any) -> Iterator[Cached]:
    with cached_lab(folder, *options, **settings) as lab:
        yield Cached(lab, folder)


def fill(cached: Cached) -> Path:
    """Leave no byte free; return the file that takes it all."""
    foreign = cached.folder / "foreign"
    with foreign.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    assert os.statvfs(cached.folder).f_bfree == 0
    return foreign


def failures(cached: Cached, since: int = 0) -> list[str]:
    return [line for line in cached.mirror.log(since).splitlines() if "the cache" in line]


def is_degraded(cached: Cached) -> bool:
    answer = cached.ask("/healthz")
    assert answer.status == 200
    return bool(answer.json["status"] == "degraded")


def works_again(cached: Cached) -> None:
    """See that what comes from now on is kept, and that the owner is told so."""
    depot = Depot(random_bytes("again", 1000))
    assert cached.ask(cached.serves(depot)).body == depot.content
    assert cached.has(depot)
    assert poll(lambda: cached.ask("/healthz").json == OK, 5)
    assert failures(cached)[-1].endswith("the cache works again")


def test_a_disk_that_is_full_keeps_nothing_and_passes_all(cached: Cached) -> None:
    foreign = fill(cached)
    for number in range(3):
        depot = Depot(random_bytes(str(number), 2 * MIB))
        answer = cached.ask(cached.serves(depot))
        assert (answer.status, answer.body, answer.headers["x-cache"]) == (200, depot.content, "BYPASS")
        assert depot.ranges == [None]
        part = cached.ask(cached.serves(depot), {"Range": "bytes=5-9"})
        assert (part.status, part.body) == (206, depot.content[5:10])
    assert is_degraded(cached)
    assert len(failures(cached)) == 1
    foreign.unlink()
    works_again(cached)


def test_manifests_pass_while_the_disk_is_full(cached: Cached) -> None:
    foreign = fill(cached)
    body = b'{"schemaVersion": 2}' * 1000
    headers = {"Content-Type": OCI_MANIFEST, "Docker-Content-Digest": digest_of(body)}
    path = f"/v2/app/manifests/{digest_of(body)}"
    cached.lab.upstream.answers[path.replace("app", "library/app")] = reply(200, body, headers)
    for _ in range(2):
        answer = cached.ask(path)
        assert (answer.status, answer.body, answer.headers["x-cache"]) == (200, body, "MISS")
    assert is_degraded(cached)
    assert len(failures(cached)) == 1
    foreign.unlink()
    works_again(cached)
    assert [cached.ask(path).headers["x-cache"] for _ in range(2)] == ["MISS", "HIT"]


def test_a_disk_that_fills_up_in_mid_download_hands_the_download_to_its_client(cached: Cached) -> None:
    depot = Depot(random_bytes("mid", 6 * MIB), pause=2 * MIB)
    path = cached.serves(depot)
    with Reading(cached.mirror, path) as reading:
        body = reading.read(2 * MIB)
        foreign = fill(cached)
        depot.go.set()
        assert body + reading.read() == depot.content
    assert depot.ranges == [None]
    assert is_degraded(cached)
    assert len(failures(cached)) == 1
    foreign.unlink()
    since = cached.mirror.mark()
    assert cached.ask(path).body == depot.content
    assert cached.has(depot)
    (again,) = depot.ranges[1:]
    assert again is not None
    assert again.startswith("bytes=")
    assert "went on at byte" in cached.mirror.log(since)
    assert poll(lambda: not is_degraded(cached), 5)


def test_each_of_several_readers_gets_the_right_bytes_when_the_disk_fills_up(cached: Cached) -> None:
    depot = Depot(random_bytes("several", 6 * MIB), pause=2 * MIB)
    path = cached.serves(depot)
    with ExitStack() as stack:
        readings = [stack.enter_context(Reading(cached.mirror, path)) for _ in range(4)]
        bodies = [reading.read(2 * MIB) for reading in readings]
        behind = stack.enter_context(Reading(cached.mirror, path))
        part = stack.enter_context(Reading(cached.mirror, path, {"Range": f"bytes=1000-{5 * MIB}"}))
        foreign = fill(cached)
        depot.go.set()
        for reading, body in zip(readings, bodies, strict=True):
            assert body + reading.read() == depot.content
        assert behind.read() == depot.content
        assert part.read() == depot.content[1000 : 5 * MIB + 1]
    assert len(failures(cached)) == 1
    foreign.unlink()


@pytest.mark.parametrize("readers", [1, 3])
def test_wrong_bytes_never_end_well_on_a_full_disk_either(disk: Path, readers: int) -> None:
    for cached in running(disk, verify="on"):
        depot = Depot(random_bytes("wrong", 6 * MIB), pause=2 * MIB, wrong=6 * MIB - 1)
        path = cached.serves(depot)
        with ExitStack() as stack:
            readings = [stack.enter_context(Reading(cached.mirror, path)) for _ in range(readers)]
            for reading in readings:
                reading.read(2 * MIB)
            fill(cached)
            depot.go.set()
            for reading in readings:
                with pytest.raises(BROKEN):
                    reading.read()


def test_a_client_that_leaves_a_failed_download_closes_it(cached: Cached) -> None:
    depot = Depot(random_bytes("left", 6 * MIB), pause=2 * MIB)
    with Reading(cached.mirror, cached.serves(depot)) as reading:
        reading.read(2 * MIB)
        foreign = fill(cached)
    depot.go.set()
    assert poll(lambda: is_degraded(cached), 5)
    (worker,) = cached.mirror.pids()[1:]
    assert poll(lambda: not [link for link in links(worker) if link.startswith(str(cached.folder))], 5)
    foreign.unlink()
    works_again(cached)


def links(pid: int) -> list[str]:
    """Return what a process has open."""
    found = []
    for file in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(str(file.readlink()))
        except FileNotFoundError:
            continue
    return found


def test_what_others_put_on_the_disk_evicts_what_is_kept(disk: Path) -> None:
    for cached in running(disk, cache_min_free="2M"):
        old = Depot(random_bytes("old", 2 * MIB))
        assert cached.ask(cached.serves(old)).body == old.content
        assert cached.has(old)
        (disk / "foreign").write_bytes(bytes(3 * MIB))
        new = Depot(random_bytes("new", 2 * MIB))
        assert cached.ask(cached.serves(new)).body == new.content
        assert cached.has(new)
        assert not cached.file(old.digest).exists()
        assert cached.ask("/healthz").json == OK


def test_a_disk_that_is_read_only_serves_what_it_has(cached: Cached) -> None:
    kept, other = Depot(random_bytes("kept", MIB)), Depot(random_bytes("other", MIB))
    assert cached.ask(cached.serves(kept)).body == kept.content
    assert cached.has(kept)
    assert poll(lambda: remounted(cached.folder, "ro"), 5), "a file is still open for writing"
    for _ in range(2):
        answer = cached.ask(cached.serves(kept))
        assert (answer.body, answer.headers["x-cache"]) == (kept.content, "HIT")
        answer = cached.ask(cached.serves(other))
        assert (answer.body, answer.headers["x-cache"]) == (other.content, "BYPASS")
    assert is_degraded(cached)
    assert len(failures(cached)) == 1
    assert "Read-only file system" in failures(cached)[0]
    assert remounted(cached.folder, "rw")
    works_again(cached)


def remounted(folder: Path, mode: str) -> bool:
    return subprocess.run(["mount", "-o", f"remount,{mode}", folder], capture_output=True, check=False).returncode == 0


def test_a_mirror_starts_on_a_disk_that_is_read_only(disk: Path) -> None:
    assert remounted(disk, "ro")
    for cached in running(disk / "cache"):
        depot = Depot(random_bytes("start", MIB))
        assert cached.ask(cached.serves(depot)).body == depot.content
        assert is_degraded(cached)
        assert len(failures(cached)) == 1
        assert remounted(disk, "rw")
        works_again(cached)


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Cached]:
    """Give a mirror whose cache is on the disk of the tests."""
    yield from running(tmp_path / "cache")


def test_a_blob_that_became_a_folder_passes_through(local: Cached) -> None:
    depot = Depot(random_bytes("folder", MIB))
    local.file(depot.digest).mkdir(parents=True)
    for method in ("GET", "GET", "HEAD"):
        answer = local.ask(local.serves(depot), method=method)
        assert (answer.status, answer.body) == (200, depot.content if method == "GET" else b"")
        assert answer.headers["x-cache"] == "BYPASS"
    assert is_degraded(local)
    assert len(failures(local)) == 1
    works_again(local)
    local.file(depot.digest).rmdir()
    assert local.ask(local.serves(depot)).body == depot.content
    assert local.has(depot)


@pytest.mark.parametrize("suffix", [".part", ".size"])
def test_a_part_that_became_a_folder_passes_through(local: Cached, suffix: str) -> None:
    depot = Depot(random_bytes("folder", MIB))
    local.file(depot.digest, suffix).mkdir(parents=True)
    for _ in range(2):
        assert local.ask(local.serves(depot)).body == depot.content
    assert is_degraded(local)
    works_again(local)


def test_a_folder_that_became_a_file_passes_through(local: Cached) -> None:
    depot = Depot(random_bytes("file", MIB))
    folder = local.file(depot.digest).parent
    folder.parent.mkdir(parents=True)
    folder.touch()
    assert local.ask(local.serves(depot)).body == depot.content
    assert is_degraded(local)
    works_again(local)


def test_the_folder_may_go_while_the_mirror_runs(local: Cached) -> None:
    depot = Depot(random_bytes("gone", 3 * MIB), pause=MIB)
    path = local.serves(depot)
    with Reading(local.mirror, path) as reading:
        body = reading.read(MIB)
        shutil.rmtree(local.folder)
        depot.go.set()
        assert body + reading.read() == depot.content
    assert poll(lambda: local.ask(path).body == depot.content and local.file(depot.digest).is_file(), 5)
    answer = local.ask(path)
    assert (answer.body, answer.headers["x-cache"]) == (depot.content, "HIT")
    assert poll(lambda: not is_degraded(local), 5)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_cache_in_a_file_stops_the_start_with_one_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "gunicorn", "-c", "python:wsgi", "-b", "127.0.0.1:0", "wsgi:app"]
    environment = clean_environment({"MIRROR_CACHE_DIR": str(tmp_path / place)})
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode != 0
    (line,) = (ended.stdout + ended.stderr).strip().splitlines()
    assert f"MIRROR_CACHE_DIR: {tmp_path / place}: " in line
    assert os.listdir(tmp_path) == ["file"]


# Input and output errors, which no disk here has: the mirror's process is made to meet them while a file is there.

FAULTY = """\
import errno, os
def faulty(name, number_of):
    call = getattr(os, name)
    def wrapped(*arguments):
        path = os.readlink(f"/proc/self/fd/{arguments[number_of]}")
        if "/blobs/" in path and os.path.exists(f"@FOLDER@/{name}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call(*arguments)
    setattr(os, name, wrapped)
faulty("pwrite", 0)
faulty("pread", 0)
faulty("sendfile", 1)
"""


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[tuple[Cached, Path]]:
    """Give a mirror and a folder: what a file in that is named after fails on the blobs of the cache."""
    faults = tmp_path / "faults"
    faults.mkdir()
    (faults / "sitecustomize.py").write_text(FAULTY.replace("@FOLDER@", str(faults)))
    with cached_lab(tmp_path / "cache", env={"PYTHONPATH": str(faults)}) as lab:
        yield Cached(lab, tmp_path / "cache"), faults


def test_what_the_disk_does_not_give_back_comes_from_upstream(faulty: tuple[Cached, Path]) -> None:
    cached, faults = faulty
    depot = Depot(random_bytes("unreadable", 2 * MIB))
    path = cached.serves(depot)
    cached.ask(path)
    assert cached.has(depot)
    (faults / "sendfile").touch()
    answer = cached.ask(path)
    assert (answer.status, answer.body, answer.headers["x-cache"]) == (200, depot.content, "HIT")
    assert depot.ranges == [None, f"bytes=0-{2 * MIB - 1}"]
    assert not cached.file(depot.digest).exists(), "the next client does not get there"
    assert is_degraded(cached)
    assert len(failures(cached)) == 1
    (faults / "sendfile").unlink()
    works_again(cached)


def test_what_the_disk_does_not_take_passes_through(faulty: tuple[Cached, Path]) -> None:
    cached, faults = faulty
    (faults / "pwrite").touch()
    for number in range(3):
        depot = Depot(random_bytes(f"unwritable {number}", 2 * MIB))
        assert cached.ask(cached.serves(depot)).body == depot.content
        assert depot.ranges == [None], "one connection brings all of it"
    assert is_degraded(cached)
    assert len(failures(cached)) == 1
    (faults / "pwrite").unlink()
    works_again(cached)


def test_a_manifest_that_the_disk_does_not_give_back_comes_from_upstream(faulty: tuple[Cached, Path]) -> None:
    cached, faults = faulty
    body = b'{"schemaVersion": 2}'
    headers = {"Content-Type": OCI_MANIFEST, "Docker-Content-Digest": digest_of(body)}
    path = f"/v2/app/manifests/{digest_of(body)}"
    cached.lab.upstream.answers[path.replace("app", "library/app")] = reply(200, body, headers)
    assert [cached.ask(path).headers["x-cache"] for _ in range(2)] == ["MISS", "HIT"]
    (faults / "pread").touch()
    answer = cached.ask(path)
    assert (answer.status, answer.body, answer.headers["x-cache"]) == (200, body, "MISS")
    assert "Input/output error" in failures(cached)[0]


def test_more_comes_while_the_disk_takes_what_came_before(tmp_path: Path) -> None:
    """Read upstream and write at the same time, but never far ahead of a disk that is stuck."""
    content = random_bytes("overlapped", 3 * MAX_UNWRITTEN)
    partial = Cache(tmp_path, Limits(10 * MIB)).claim(digest_of(content))
    assert partial is not None
    partial.begin(len(content))
    works, write = threading.Event(), partial.write

    def stuck(chunks: list[bytes]) -> None:
        works.wait(PATIENCE)
        write(chunks)

    with closing(partial), patch.object(partial, "write", stuck):
        writer = Writer(Threads(1), partial, lambda: None)
        first, second, third = (content[at : at + MAX_UNWRITTEN] for at in range(0, len(content), MAX_UNWRITTEN))
        writer.put(first)
        assert not partial.written
        waiting = gevent.spawn(writer.put, second)
        gevent.idle()
        assert not waiting.ready()
        works.set()
        waiting.join()
        writer.put(third)
        writer.end()
        partial.finish()
        assert partial.path.read_bytes() == content
