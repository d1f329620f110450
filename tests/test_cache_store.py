"""The store: its files, who may write and read them, its bounds, and what survives a crash or a deleted file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import ExitStack
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any
from typing import NamedTuple
from typing import Self

import pytest
from conftest import needs
from images import digest_of
from images import random_bytes
from processes import clean_environment
from processes import removed_afterwards

from cache import ABANDONED
from cache import LOOK_EVERY
from cache import Cache
from cache import Follower
from cache import Full
from cache import Limits
from cache import Name
from cache import Partial
from cache import Record
from cache import WrongDigest

ROOT = Path(__file__).resolve().parent.parent
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
NAME = Name("docker.io", "library/app", "latest")
ROOM = Limits(10**6)
# A process that evaluates what it is told, a line at a time.
OTHER = """
import json, sys
from pathlib import Path
from cache import *
store = Cache(Path(sys.argv[1]), Limits(int(sys.argv[2])))
for line in sys.stdin:
    print(json.dumps(eval(line)), flush=True)
"""


class Content(NamedTuple):
    """Hold bytes and their digest."""

    data: bytes
    digest: str

    @classmethod
    def make(cls, seed: str, size: int = 1000) -> Content:
        """Return so many bytes that no other seed gives."""
        data = random_bytes(seed, size)
        return cls(data, digest_of(data))


class Other:
    """Run another process that has the store open."""

    def __init__(self, folder: Path, size: int = ROOM.size) -> None:
        command = [sys.executable, "-c", OTHER, str(folder), str(size)]
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stdin=pipe, stdout=pipe, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()

    def does(self, expression: str) -> Any:
        """Let it evaluate an expression of Python; `store` is its store. Return the value."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(f"{expression}\n")
        self._child.stdin.flush()
        return json.loads(self._child.stdout.readline())

    def kill(self) -> None:
        """End it without a chance to tidy up."""
        self._child.send_signal(signal.SIGKILL)
        self._child.communicate()

    def writes(self, content: Content, count: int) -> None:
        """Let it claim a blob, and write its first bytes."""
        self.does(f"(part := store.claim({content.digest!r})) and part.begin({len(content.data)})")
        self.goes_on(content, 0, count)

    def goes_on(self, content: Content, start: int, stop: int | None = None) -> None:
        """Let it write further bytes of what it has claimed."""
        self.does(f"part.write([bytes.fromhex({content.data[start:stop].hex()!r})])")

    def lets_go(self) -> None:
        """Let it end without the whole blob."""
        self.does("(part.let_go(), os.close(part.fd))")


@pytest.fixture
def store(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "store", ROOM)


@pytest.fixture
def other(store: Cache) -> Iterator[Other]:
    with Other(store.directory) as running:
        yield running


@contextmanager
def claimed(store: Cache, digest: str) -> Iterator[Partial]:
    partial = store.claim(digest)
    assert partial is not None
    try:
        yield partial
    finally:
        os.close(partial.fd)


@contextmanager
def followed(store: Cache, content: Content) -> Iterator[Follower]:
    follower = store.follow(content.digest)
    assert follower is not None
    assert follower.size == len(content.data)
    try:
        yield follower
    finally:
        follower.close()
        follower.close()  # a second time does nothing


def read(store: Cache, digest: str) -> bytes | None:
    blob = store.open(digest)
    if blob is None:
        return None
    try:
        return blob.read()
    finally:
        blob.close()


def put(store: Cache, *contents: Content, used: float = 0) -> None:
    """Keep blobs; the first of them was used `used` seconds ago, each further one a minute later."""
    for number, content in enumerate(contents):
        store.put(content.digest, content.data)
        if used:
            was_used(store, content, used - 60 * number)


def was_used(store: Cache, content: Content, seconds: float) -> None:
    path = store.path(content.digest)
    os.utime(path, (time.time() - seconds, path.stat().st_mtime))


def leave(store: Cache, content: Content, count: int) -> None:
    """Write the first bytes of a blob, and let go of it."""
    with claimed(store, content.digest) as partial:
        partial.begin(len(content.data))
        partial.write([content.data[:count]])
        partial.let_go()


def part_of(store: Cache, content: Content) -> Path:
    return store.path(content.digest).with_suffix(".part")


def size_of(store: Cache, content: Content) -> Path:
    return store.path(content.digest).with_suffix(".size")


def hex_of(content: Content) -> str:
    return content.digest.partition(":")[2]


def held(store: Cache) -> int:
    """Return the bytes of the blobs and parts that are there."""
    found = [file for file in (store.directory / "blobs").rglob("*") if file.suffix != ".size" and file.is_file()]
    return sum(file.stat().st_size for file in found)


def files(store: Cache) -> list[str]:
    return sorted(file.name for file in (store.directory / "blobs").rglob("*") if file.is_file())


def boot() -> int:
    """Return when this host was started."""
    return int(time.time() - time.clock_gettime(time.CLOCK_BOOTTIME))


@contextmanager
def small_disk(tmp_path: Path, size: str = "4m") -> Iterator[Path]:
    needs("root", "mount")
    with removed_afterwards(tmp_path / "disk") as folder:
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
        yield folder


A, B, C, D = (Content.make(letter) for letter in "abcd")
BIG = Content.make("big", 10_000)


# Whole and right


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_what_is_whole_and_right_is_kept_under_its_digest(store: Cache, algorithm: str, durable: bool) -> None:
    digest = f"{algorithm}:{hashlib.new(algorithm, A.data).hexdigest()}"
    with claimed(store, digest) as partial:
        partial.begin(len(A.data))
        for start in range(0, len(A.data), 200):
            assert not store.has(digest)
            partial.write([A.data[start : start + 150], A.data[start + 150 : start + 200]])
            assert os.pread(partial.fd, 10_000, 0) == A.data[: partial.written] == A.data[: start + 200]
        partial.finish(durable=durable)
    assert read(store, digest) == A.data
    encoded = digest.partition(":")[2]
    assert store.path(digest) == store.directory / "blobs" / algorithm / encoded[:2] / encoded
    assert files(store) == [encoded]
    assert store.count(0) == len(A.data)


def test_what_is_not_there_is_none(store: Cache) -> None:
    assert store.open(A.digest) is None
    assert store.follow(A.digest) is None
    assert store.record(NAME) is None
    assert not store.has(A.digest)
    assert not store.remove(A.digest)
    assert list(store.blobs()) == []
    assert list(store.records()) == []


@pytest.mark.parametrize("wrong", [B.data, A.data[:-1] + b"x", A.data + b"x"], ids=["other", "last byte", "longer"])
def test_wrong_bytes_get_no_name(store: Cache, wrong: bytes) -> None:
    with claimed(store, A.digest) as partial:
        partial.begin(len(A.data))
        partial.write([wrong[:500]])
        with pytest.raises(WrongDigest):
            partial.write([wrong[500:900], wrong[900:]])
        assert os.fstat(partial.fd).st_size == 500, "the last bytes must not be there to be read"
        with pytest.raises(WrongDigest):
            partial.finish()
        partial.discard()
    assert files(store) == []
    assert store.count(0) == 0


def test_what_is_not_whole_gets_no_name(store: Cache) -> None:
    with claimed(store, A.digest) as partial:
        with pytest.raises(WrongDigest):
            partial.finish()
        partial.begin(len(A.data))
        partial.write([A.data[:999]])
        with pytest.raises(WrongDigest):
            partial.finish()
    assert not store.has(A.digest)


def test_the_group_may_read_what_is_whole_and_no_part(store: Cache) -> None:
    put(store, A)
    leave(store, B, 400)
    assert stat.S_IMODE(store.path(A.digest).stat().st_mode) == 0o640
    assert stat.S_IMODE(part_of(store, B).stat().st_mode) == 0o600


def test_no_bytes_at_all_are_right_for_one_digest_only(store: Cache) -> None:
    with claimed(store, A.digest) as partial:
        with pytest.raises(WrongDigest):
            partial.begin(0)
        partial.discard()
    assert files(store) == []
    empty = Content(b"", digest_of(b""))
    put(store, empty)
    assert read(store, empty.digest) == b""


def test_a_small_blob_is_kept_at_once_and_wrong_ones_never(store: Cache) -> None:
    put(store, A, A)
    with pytest.raises(WrongDigest):
        store.put(B.digest, A.data)
    assert files(store) == [hex_of(A)]
    assert store.count(0) == len(A.data)
    assert [digest for digest, _ in store.blobs()] == [A.digest]


# One writer


def test_a_blob_has_one_writer_among_all_processes(store: Cache, other: Other) -> None:
    other.writes(A, 400)
    assert store.claim(A.digest) is None
    put(store, A)  # it is on its way: nothing to do
    assert not store.has(A.digest)
    other.lets_go()
    with claimed(store, A.digest):
        assert not other.does(f"bool(store.claim({A.digest!r}))")
        assert store.claim(A.digest) is None, "nor has another thread"


def test_many_at_once_keep_a_blob_once(store: Cache) -> None:
    with ExitStack() as stack:
        others = [stack.enter_context(Other(store.directory)) for _ in range(4)]
        for number in range(20):
            content = Content.make(f"race {number}")
            expression = f"store.put({content.digest!r}, bytes.fromhex({content.data.hex()!r}))"
            threads = [Thread(target=other.does, args=(expression,)) for other in others]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert read(store, content.digest) == content.data
    assert not [name for name in files(store) if "." in name]
    assert store.count(0) == held(store) == 20 * len(A.data)


def test_nobody_writes_what_is_there(store: Cache) -> None:
    put(store, A)
    assert store.claim(A.digest) is None
    assert files(store) == [hex_of(A)]


@pytest.mark.parametrize("begun", [True, False])
def test_a_claim_that_wrote_nothing_leaves_nothing(store: Cache, begun: bool) -> None:
    with claimed(store, A.digest) as partial:
        if begun:
            partial.begin(len(A.data))
        partial.let_go()
    assert files(store) == []
    assert store.count(0) == 0


def test_a_killed_writer_lets_go_and_its_part_is_gone_on_with(store: Cache, other: Other) -> None:
    other.writes(A, 400)
    assert size_of(store, A).read_text() == f"1000 {boot()}\n"
    other.kill()
    with claimed(store, A.digest) as partial:
        assert (partial.written, partial.size) == (400, len(A.data))
        partial.begin(len(A.data))
        partial.rehash()
        partial.write([A.data[400:]])
        partial.finish()
    assert read(store, A.digest) == A.data
    assert files(store) == [hex_of(A)]


def test_what_was_let_go_of_is_gone_on_with_by_another_process(store: Cache, other: Other) -> None:
    leave(store, A, 400)
    assert other.does(f"(part := store.claim({A.digest!r})).written") == 400
    other.does(f"(part.begin({len(A.data)}), part.rehash())[0]")
    other.goes_on(A, 400, 700)
    other.lets_go()
    with claimed(store, A.digest) as partial:
        assert (partial.written, partial.size) == (700, len(A.data))
        partial.begin(len(A.data))
        partial.rehash()
        partial.write([A.data[700:]])
        partial.finish()
    assert read(store, A.digest) == A.data


def test_a_part_is_not_named_unless_its_bytes_were_hashed(store: Cache) -> None:
    leave(store, A, len(A.data))
    with claimed(store, A.digest) as partial:
        partial.begin(len(A.data))
        assert partial.is_whole
        with pytest.raises(WrongDigest):
            partial.finish()
    assert not store.has(A.digest)


def test_a_small_blob_is_begun_anew_where_a_part_is_left(store: Cache, other: Other) -> None:
    other.writes(A, 400)
    other.kill()
    part_of(store, A).write_bytes(b"x" * 400)
    put(store, A)
    assert read(store, A.digest) == A.data
    assert files(store) == [hex_of(A)]


def test_a_spoilt_part_is_found_out_before_it_gets_a_name(store: Cache, other: Other) -> None:
    other.writes(A, 400)
    other.kill()
    with part_of(store, A).open("r+b") as file:
        file.write(b"xx")
    with claimed(store, A.digest) as partial:
        partial.begin(len(A.data))
        partial.rehash()
        with pytest.raises(WrongDigest):
            partial.write([A.data[400:]])
        partial.discard()
    assert files(store) == []


def test_a_part_that_is_shorter_than_it_was_is_an_error(store: Cache) -> None:
    leave(store, A, 400)
    with claimed(store, A.digest) as partial:
        partial.begin(len(A.data))
        os.truncate(part_of(store, A), 300)
        with pytest.raises(OSError, match="too short"):
            partial.rehash()


def test_a_whole_part_is_taken_only_if_it_is_right(store: Cache) -> None:
    for content, data in ((A, A.data), (B, bytes(len(B.data)))):  # as a disk that fails
        leave(store, content, 400)
        part_of(store, content).write_bytes(data)
    with claimed(store, A.digest) as partial:
        assert partial.is_whole
        partial.rehash()
        partial.finish()
    assert read(store, A.digest) == A.data
    with claimed(store, B.digest) as partial:
        with pytest.raises(WrongDigest):
            partial.rehash()
        partial.restart()
        assert (partial.written, partial.size) == (0, None)
        partial.begin(len(B.data))
        partial.write([B.data])
        partial.finish()
    assert read(store, B.digest) == B.data


def test_a_part_of_another_boot_is_begun_anew(store: Cache, other: Other) -> None:
    other.writes(A, 400)
    other.kill()
    size_of(store, A).write_text(f"{len(A.data)} {boot() - 3600}\n")  # the disk may not have what was written
    with claimed(store, A.digest) as partial:
        assert (partial.written, partial.size) == (0, None)
        assert os.fstat(partial.fd).st_size == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1000",
        "1000 {boot}",
        "1000 {boot}\n\n",
        "-1000 {boot}\n",
        "9999999999999999999 {boot}\n",
        "1000 9999999999999\n",
        "399 {boot}\n",
        "\N{ARABIC-INDIC DIGIT ONE} {boot}\n",
    ],
)
def test_a_part_whose_size_is_not_known_is_begun_anew(store: Cache, other: Other, text: str) -> None:
    other.writes(A, 400)
    other.kill()
    size_of(store, A).write_text(text.format(boot=boot()))
    with claimed(store, A.digest) as partial:
        assert (partial.written, partial.size) == (0, None)


def test_who_still_reads_a_part_that_is_begun_anew_reads_the_old_one(store: Cache) -> None:
    leave(store, A, 400)
    with part_of(store, A).open("rb") as reader, claimed(store, A.digest) as partial:
        partial.restart()
        partial.begin(len(A.data))
        partial.write([bytes(100)])
        assert reader.read() == A.data[:400]
        assert store.claim(A.digest) is None, "the new file is claimed too"


# Reading along


def test_another_process_reads_along(store: Cache, other: Other) -> None:
    other.writes(A, 400)
    with followed(store, A) as follower:
        assert (follower.written, follower.has_ended) == (400, False)
        other.goes_on(A, 400)
        assert (follower.written, follower.has_ended) == (len(A.data), False)
        other.does("part.finish()")
        assert (follower.written, follower.has_ended) == (len(A.data), True)
        store.path(A.digest).unlink()
        assert os.pread(follower.fd, 10_000, 0) == A.data


def test_a_reader_learns_that_its_writer_died(store: Cache, other: Other) -> None:
    other.writes(A, 400)
    with followed(store, A) as follower:
        other.kill()
        assert (follower.written, follower.has_ended) == (400, True)
        with claimed(store, A.digest) as partial:  # to look at it was no hindrance
            partial.begin(len(A.data))
            assert (follower.written, follower.has_ended) == (400, False)
            partial.rehash()
            partial.write([A.data[400:]])
            assert os.pread(follower.fd, follower.written, 0) == A.data


def test_a_reader_learns_that_its_writer_let_go(store: Cache, other: Other) -> None:
    other.writes(A, 400)
    with followed(store, A) as follower:
        other.does("part.let_go()")  # and those who read along there still have it open
        assert (follower.written, follower.has_ended) == (400, True)


def test_a_reader_learns_that_the_bytes_were_thrown_away(store: Cache, other: Other) -> None:
    other.writes(A, 400)
    with followed(store, A) as follower:
        assert follower.written == 400
        other.does("part.discard()")
        with pytest.raises(WrongDigest):
            _ = follower.written


def test_a_reader_learns_that_the_writer_began_anew(store: Cache, other: Other) -> None:
    other.writes(A, 400)
    with followed(store, A) as follower:
        other.does("part.restart()")
        assert (follower.written, follower.has_ended) == (400, True)
        assert store.follow(A.digest) is None


def test_nobody_reads_what_an_earlier_process_left_before_its_writer_goes_on(store: Cache, other: Other) -> None:
    other.writes(A, 400)
    other.kill()
    assert store.follow(A.digest) is None
    with claimed(store, A.digest) as partial, Other(store.directory) as reader:
        assert not reader.does(f"bool(store.follow({A.digest!r}))")
        partial.begin(len(A.data))
        assert reader.does(f"bool(store.follow({A.digest!r}))")


def test_what_is_kept_is_not_followed(store: Cache) -> None:
    with claimed(store, A.digest) as partial:
        partial.begin(len(A.data))
        partial.write([A.data])
        partial.finish()
        assert store.follow(A.digest) is None
        assert read(store, A.digest) == A.data


# Files that go


@pytest.mark.parametrize("suffixes", [[".size"], [".part"], [".size", ".part"]], ids="+".join)
def test_a_second_writer_after_a_deletion_never_spoils_what_the_first_one_names(
    store: Cache, other: Other, suffixes: list[str]
) -> None:
    with claimed(store, A.digest) as partial:
        partial.begin(len(A.data))
        partial.write([A.data[:700]])
        for suffix in suffixes:
            store.path(A.digest).with_suffix(suffix).unlink()
        is_second = other.does(f"bool(part := store.claim({A.digest!r}))")
        assert is_second == (".part" in suffixes)
        if is_second:
            other.does(f"part.begin({len(A.data)})")
            other.goes_on(A, 0, 10)
        partial.write([A.data[700:]])
        partial.finish()
        assert os.pread(partial.fd, 10_000, 0) == A.data, "who reads it still can"
    assert read(store, A.digest) == (None if is_second else A.data)
    if is_second:
        other.goes_on(A, 10)
        other.does("part.finish()")
    assert read(store, A.digest) == A.data
    assert files(store) == [hex_of(A)]
    assert store.count(0) == len(A.data)


@pytest.mark.parametrize("end", ["discard", "let_go"])
def test_a_writer_whose_part_was_deleted_leaves_the_second_ones_alone(store: Cache, other: Other, end: str) -> None:
    with claimed(store, A.digest) as partial:
        partial.begin(len(A.data))
        partial.write([A.data[:700]])
        part_of(store, A).unlink()
        other.writes(A, 10)
        getattr(partial, end)()
    assert files(store) == [f"{hex_of(A)}.part", f"{hex_of(A)}.size"]
    other.goes_on(A, 10)
    other.does("part.finish()")
    assert read(store, A.digest) == A.data
    store.tidy()
    assert store.count(0) == held(store) == len(A.data)


def test_a_blob_whose_size_was_deleted_is_kept_all_the_same(store: Cache) -> None:
    with claimed(store, A.digest) as partial:
        partial.begin(len(A.data))
        partial.write([A.data])
        size_of(store, A).unlink()
        partial.finish()
    assert read(store, A.digest) == A.data
    assert store.count(0) == len(A.data)


def test_a_blob_whose_part_was_deleted_is_not_kept(store: Cache) -> None:
    with claimed(store, A.digest) as partial:
        partial.begin(len(A.data))
        partial.write([A.data])
        part_of(store, A).unlink()
        partial.finish()
        assert os.pread(partial.fd, 10_000, 0) == A.data
    assert files(store) == []
    assert store.count(0) == 0


def test_a_part_that_was_deleted_is_begun_anew(store: Cache) -> None:
    leave(store, A, 400)
    part_of(store, A).unlink()
    with claimed(store, A.digest) as partial:
        assert partial.written == 0
        partial.begin(len(A.data))
        partial.write([A.data])
        partial.finish()
    assert read(store, A.digest) == A.data
    assert files(store) == [hex_of(A)]


@pytest.mark.parametrize("name", ["usage", "evict", "tidy"])
def test_the_stores_own_files_may_go_while_something_is_written(tmp_path: Path, name: str) -> None:
    store = Cache(tmp_path, Limits(2 * len(A.data)))
    put(store, A, used=1000)
    with claimed(store, B.digest) as partial:
        partial.begin(len(B.data))
        partial.write([B.data[:400]])
        (tmp_path / name).unlink(missing_ok=True)
        partial.write([B.data[400:]])
        partial.finish()
    put(store, C)
    store.tidy()
    assert read(store, C.digest) == C.data
    assert store.count(0) == held(store) == 2 * len(A.data)


def test_a_deleted_blob_can_be_read_to_its_end_and_kept_anew(store: Cache) -> None:
    put(store, A)
    blob = store.open(A.digest)
    assert blob is not None
    store.path(A.digest).unlink()
    assert not store.has(A.digest)
    put(store, A)
    assert blob.read() == A.data == read(store, A.digest)
    blob.close()


def test_the_whole_folder_may_go_at_any_time(store: Cache) -> None:
    put(store, A)
    store.note(NAME, Record(A.digest, MANIFEST_TYPE, len(A.data), 1.0))
    with claimed(store, B.digest) as partial:
        partial.begin(len(B.data))
        shutil.rmtree(store.directory)
        partial.write([B.data])
        partial.finish()
        assert os.pread(partial.fd, 10_000, 0) == B.data
    assert (read(store, A.digest), read(store, B.digest)) == (None, None)
    assert store.record(NAME) is None
    assert store.tidy()
    put(store, A, B)
    assert (read(store, A.digest), read(store, B.digest)) == (A.data, B.data)


def test_what_is_no_file_is_an_error_and_no_blob(store: Cache) -> None:
    store.path(A.digest).mkdir(parents=True)
    assert not store.has(A.digest)
    with pytest.raises(OSError, match="is no file"):
        store.open(A.digest)
    with pytest.raises(OSError, match="Is a directory"):
        put(store, A)
    assert files(store) == []
    assert store.count(0) == 0


def test_a_link_is_not_followed(store: Cache, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(A.data)
    for path in (store.path(A.digest), part_of(store, B), size_of(store, C)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(secret)
    for act in (store.open, store.remove, store.follow, store.claim):
        for content in (A, B) if act is not store.claim else (B,):
            with suppress(OSError):
                assert not act(content.digest)
    with pytest.raises(OSError, match="symbolic") as raised:
        store.open(A.digest)
    assert raised.value.errno == errno.ELOOP
    with pytest.raises(OSError, match="symbolic"):
        store.claim(B.digest)
    put(store, C)
    assert read(store, C.digest) == C.data
    assert secret.read_bytes() == A.data


# Bounds


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    store = Cache(tmp_path, Limits(3 * len(A.data)))
    put(store, A, B, C, used=1000)
    assert read(store, A.digest)  # and so it was used now
    put(store, D)
    assert [store.has(content.digest) for content in (A, B, C, D)] == [True, False, True, True]
    assert store.count(0) == held(store) == 3 * len(A.data)


def test_to_open_a_blob_is_a_use(store: Cache) -> None:
    put(store, A, used=1000)
    before = store.path(A.digest).stat()
    blob = store.open(A.digest)
    assert blob is not None
    after = os.fstat(blob.fd)
    blob.close()
    assert after.st_atime > before.st_atime + 900
    assert after.st_mtime_ns == before.st_mtime_ns


def test_a_use_since_the_last_look_saves_a_blob(tmp_path: Path) -> None:
    store = Cache(tmp_path, Limits(3 * len(A.data)))
    put(store, A, B, C, used=1000)
    put(store, D)  # all were looked at now
    assert read(store, B.digest)
    put(store, Content.make("e"))
    assert [store.has(content.digest) for content in (B, C, D)] == [True, False, True]


def test_what_is_read_or_written_stays(tmp_path: Path) -> None:
    store = Cache(tmp_path, Limits(3 * len(A.data)))
    put(store, A, B, used=1000)
    with Other(tmp_path, 3 * len(A.data)) as other:
        assert other.does(f"bool(blob := store.open({A.digest!r}))")
        other.writes(C, 100)
        was_used(store, A, 2000)
        was_used(store, B, 2000)
        os.utime(part_of(store, C), (0, 0))
        put(store, D)
        assert [store.has(content.digest) for content in (A, B, D)] == [True, False, True]
        assert not store.remove(A.digest)
        other.does("blob.close()")
        assert store.remove(A.digest)
        other.goes_on(C, 100)
        other.does("part.finish()")
    assert read(store, C.digest) == C.data


def test_what_its_writer_still_reads_stays_once_it_has_its_name(store: Cache, other: Other) -> None:
    with claimed(store, A.digest) as partial:
        partial.begin(len(A.data))
        partial.write([A.data])
        partial.finish()
        assert not other.does(f"store.remove({A.digest!r})")
        assert other.does(f"bool(blob := store.open({A.digest!r}))")
    assert not store.remove(A.digest)
    other.does("blob.close()")
    assert store.remove(A.digest)


def test_what_is_read_along_stays_once_it_has_its_name(store: Cache, other: Other) -> None:
    other.writes(A, 400)
    with followed(store, A) as follower:
        other.goes_on(A, 400)
        other.does("(part.finish(), os.close(part.fd))")
        assert follower.written == len(A.data)
        assert not store.remove(A.digest)
    assert store.remove(A.digest)


def test_an_abandoned_part_goes_before_a_blob_that_was_used_since(tmp_path: Path) -> None:
    store = Cache(tmp_path, Limits(3 * len(A.data)))
    leave(store, A, 999)
    os.utime(part_of(store, A), (0, 0))
    put(store, B, C, used=1000)
    put(store, D)
    assert files(store) == sorted(map(hex_of, (B, C, D)))
    assert store.count(0) == held(store) == 3 * len(A.data)


def test_what_is_larger_than_the_store_evicts_nothing(tmp_path: Path) -> None:
    store = Cache(tmp_path, Limits(3 * len(A.data)))
    put(store, A)
    with claimed(store, BIG.digest) as partial:
        with pytest.raises(Full):
            partial.begin(len(BIG.data))
        partial.let_go()
    assert files(store) == [hex_of(A)]
    assert store.count(0) == held(store) == len(A.data)


def test_a_store_whose_all_is_in_use_is_full(tmp_path: Path) -> None:
    store = Cache(tmp_path, Limits(len(A.data)))
    put(store, A)
    blob = store.open(A.digest)
    assert blob is not None
    with claimed(store, B.digest) as partial:
        with pytest.raises(Full):
            partial.begin(len(B.data))
        partial.let_go()
    blob.close()
    assert store.count(0) == len(A.data)
    put(store, B)
    assert files(store) == [hex_of(B)]


def test_what_is_still_to_be_written_counts(tmp_path: Path) -> None:
    store = Cache(tmp_path, Limits(2 * len(A.data)))
    with claimed(store, A.digest) as first, claimed(store, B.digest) as second:
        first.begin(len(A.data))
        second.begin(len(B.data))
        with pytest.raises(Full):
            put(store, C)
        first.let_go()
        put(store, C)
    assert files(store) == sorted([hex_of(C), f"{hex_of(B)}.part", f"{hex_of(B)}.size"])


def test_a_claim_for_which_there_is_no_room_leaves_nothing(tmp_path: Path) -> None:
    store = Cache(tmp_path, Limits(len(A.data)))
    with pytest.raises(Full):
        put(store, BIG)
    assert files(store) == []


def test_two_processes_keep_one_account(tmp_path: Path) -> None:
    size = 20 * len(A.data)
    store = Cache(tmp_path, Limits(size))

    def fill(put_one: Callable[[str], Any], name: str) -> None:
        for number in range(60):
            put_one(f"{name}{number}")

    expression = "(data := bytes.fromhex({!r})) and store.put({!r}, data)"
    with Other(tmp_path, size) as other:

        def put_there(seed: str) -> None:
            content = Content.make(seed)
            other.does(expression.format(content.data.hex(), content.digest))

        threads = [
            Thread(target=fill, args=(put_there, "there")),
            Thread(target=fill, args=(lambda seed: put(store, Content.make(seed)), "here")),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert store.count(0) == held(store) <= size
    assert held(store) > size // 2


def test_a_write_that_ends_early_gives_its_room_back(store: Cache) -> None:
    with claimed(store, A.digest) as partial:
        partial.begin(len(A.data))
        assert store.count(0) == len(A.data)
        partial.write([A.data[:400]])
        partial.let_go()
    assert store.count(0) == held(store) == 400
    with claimed(store, A.digest) as partial:
        partial.begin(len(A.data))
        assert store.count(0) == len(A.data)
        partial.let_go()
    assert store.count(0) == held(store) == 400
    with claimed(store, A.digest) as partial:
        partial.restart()
        assert store.count(0) == 0
        partial.begin(len(A.data))
        partial.write([A.data])
        partial.finish()
    assert store.count(0) == len(A.data)


@pytest.mark.parametrize("usage", [None, b"", b"rubbish", b"999999999999", b"-5"])
def test_a_wrong_account_is_mended_by_tidying(store: Cache, usage: bytes | None) -> None:
    put(store, A, B)
    file = store.directory / "usage"
    file.unlink() if usage is None else file.write_bytes(usage)
    assert store.tidy()
    assert store.count(0) == held(store) == 2 * len(A.data)


def test_tidying_counts_what_a_killed_writer_left_and_what_a_running_one_takes(store: Cache, other: Other) -> None:
    other.writes(A, 400)
    other.kill()
    with claimed(store, B.digest) as partial:
        partial.begin(len(B.data))
        partial.write([B.data[:100]])
        assert store.count(0) == len(A.data) + len(B.data)
        assert store.tidy()
        assert store.count(0) == 400 + len(B.data)
        partial.write([B.data[100:]])
        partial.finish()
    assert store.tidy()
    assert store.count(0) == held(store) == 400 + len(B.data)


def test_tidying_takes_nothing_from_who_reads_or_writes(store: Cache, other: Other) -> None:
    other.writes(A, 400)
    with followed(store, A) as follower:
        assert store.tidy()
        assert (follower.written, follower.has_ended) == (400, False)
        other.goes_on(A, 400)
        other.does("part.finish()")
    assert read(store, A.digest) == A.data


def test_tidying_keeps_within_the_limits(tmp_path: Path) -> None:
    put(Cache(tmp_path, ROOM), A, B, C, used=1000)
    store = Cache(tmp_path, Limits(2 * len(A.data)))  # they were lowered
    store.tidy()
    assert [store.has(content.digest) for content in (A, B, C)] == [False, True, True]


def test_what_was_not_used_for_too_long_goes(tmp_path: Path) -> None:
    store = Cache(tmp_path, Limits(ROOM.size, max_age=100))
    put(store, A, B, used=150)
    was_used(store, B, 50)
    store.tidy()
    assert [store.has(content.digest) for content in (A, B)] == [False, True]
    assert store.count(0) == held(store) == len(A.data)


def test_what_is_abandoned_goes_after_a_day(store: Cache, other: Other) -> None:
    old = time.time() - ABANDONED - 60
    leave(store, A, 400)
    with claimed(store, C.digest):  # it ended before it wrote anything
        pass
    other.writes(B, 400)  # and goes on with it
    for content in (A, B, C):
        os.utime(part_of(store, content), (old, old))
    put(store, D)
    store.note(NAME, Record(A.digest, MANIFEST_TYPE, 5, old))
    store.note(NAME._replace(reference="new"), Record(A.digest, MANIFEST_TYPE, 5, time.time()))
    store.note(NAME._replace(reference="kept"), Record(D.digest, MANIFEST_TYPE, 5, old))
    temporary = store.directory / "tags/docker.io/library/app/_tags/.left"
    temporary.touch()
    os.utime(temporary, (old, old))
    store.tidy()
    assert files(store) == sorted([hex_of(D), f"{hex_of(B)}.part", f"{hex_of(B)}.size"])
    assert sorted(name.reference for name, _ in store.records()) == ["kept", "new"]
    assert not temporary.exists()


def test_one_process_tidies_at_a_time(store: Cache, other: Other) -> None:
    put(store, A)
    other.does("setattr(sys, 'held', open(store.directory / 'tidy', 'w'))")
    other.does("__import__('fcntl').flock(sys.held, 2)")
    (store.directory / "usage").write_text("7")
    assert not store.tidy()
    assert store.count(0) == 7
    other.kill()
    assert store.tidy()
    assert store.count(0) == len(A.data)


def test_some_of_the_disk_stays_free(tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        store = Cache(disk, Limits(100 << 20, min_free=1 << 20))
        contents = [Content.make(str(number), 1 << 20) for number in range(5)]
        put(store, *contents, used=10_000)
        kept = [store.has(content.digest) for content in contents]
        assert kept == sorted(kept)
        assert kept[-1]
        assert os.statvfs(disk).f_bavail * 4096 >= 1 << 20
        with claimed(store, BIG.digest) as partial:
            with pytest.raises(OSError, match="too little space") as raised:
                partial.begin(4 << 20)
            partial.let_go()
        assert raised.value.errno == errno.ENOSPC
        assert [store.has(content.digest) for content in contents] == kept, "what would not help does not go"
        assert store.count(0) == held(store)


def test_somebody_else_may_fill_the_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        store = Cache(disk, Limits(100 << 20, min_free=1 << 20))
        put(store, Content.make("old", 2 << 20), used=1000)
        (disk / "foreign").write_bytes(bytes(3 << 19))
        store.look_after_disk()
        assert list(store.blobs()) == []
        put(store, A)
        (disk / "more").write_bytes(bytes(2 << 20))
        with pytest.raises(OSError, match="too little space") as raised:
            store.look_after_disk()
        assert raised.value.errno == errno.ENOSPC
        assert read(store, A.digest) == A.data, "what would not help does not go"


def test_a_disk_that_fills_up_is_seen_while_a_large_blob_is_written(tmp_path: Path) -> None:
    with small_disk(tmp_path, "80m") as disk:
        store = Cache(disk, Limits(100 << 20, min_free=4 << 20))
        put(store, Content.make("old", 8 << 20), used=1000)
        size = LOOK_EVERY + (16 << 20)
        with claimed(store, A.digest) as partial:
            partial.begin(size)
            partial.write([bytes(LOOK_EVERY)])
            (disk / "foreign").write_bytes(bytes(37 << 20))
            partial.write([b"x"])
            assert list(store.blobs()) == []


def test_a_full_disk_is_an_error_and_what_was_written_can_be_gone_on_with(tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        store = Cache(disk, Limits(100 << 20))
        content = Content.make("full", 3 << 20)
        with claimed(store, content.digest) as partial:
            partial.begin(len(content.data))
            partial.write([content.data[: 1 << 20]])
            filler = disk / "foreign"
            with pytest.raises(OSError, match="No space"):
                filler.write_bytes(bytes(4 << 20))
            with pytest.raises(OSError, match="No space"):
                partial.write([content.data[1 << 20 :]])
            assert partial.written == os.fstat(partial.fd).st_size < len(content.data)
            partial.let_go()
        assert store.count(0) == held(store)
        filler.unlink()
        with claimed(store, content.digest) as partial:
            at = partial.written
            assert at >= 1 << 20
            partial.begin(len(content.data))
            partial.rehash()
            partial.write([content.data[at:]])
            partial.finish()
        assert read(store, content.digest) == content.data


def test_a_claim_that_fails_lets_go_of_the_part(tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        store = Cache(disk, ROOM)
        part_of(store, A).parent.mkdir(parents=True)
        part_of(store, A).write_bytes(A.data)  # of which nobody knows the size
        filler = disk / "foreign"
        with pytest.raises(OSError, match="No space"):
            filler.write_bytes(bytes(8 << 20))
        with part_of(store, A).open(), pytest.raises(OSError, match="No space"):  # so that its bytes do not go
            store.claim(A.digest)
        filler.unlink()
        with claimed(store, A.digest) as partial:
            assert partial.written == 0
        put(store, A)
        assert read(store, A.digest) == A.data


# Records


def test_a_name_stands_for_what_was_noted_last(store: Cache) -> None:
    first, second = (Record(content.digest, MANIFEST_TYPE, 5, 1.5) for content in (A, B))
    store.note(NAME, first)
    store.note(NAME, second)
    by_digest = Name("ghcr.io", "owner/tool/part", A.digest)
    store.note(by_digest, first)
    assert store.record(NAME) == second
    assert sorted(store.records()) == [(NAME, second), (by_digest, first)]
    store.forget(NAME)
    store.forget(NAME)
    assert store.record(NAME) is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"[" * 100_000,
        b"{}",
        b'{"digest": 1, "media_type": 2, "size": 3, "checked": 4}',
        *(
            json.dumps(Record(A.digest, MANIFEST_TYPE, 5, 1.5)._asdict() | wrong).encode()
            for wrong in (
                {"digest": "sha256:../../../etc/passwd"},
                {"digest": A.digest.upper()},
                {"media_type": "text"},
                {"media_type": "a/b\r\nX: y"},
                {"size": "5"},
                {"size": -1},
                {"size": True},
                {"size": 1.5},
                {"checked": "now"},
                {"checked": float("nan")},
                {"checked": float("inf")},
                {"checked": -(10**400)},
                {"more": 1},
            )
        ),
    ],
)
def test_rubbish_is_no_record(store: Cache, text: bytes) -> None:
    store.note(NAME, Record(A.digest, MANIFEST_TYPE, 5, 1.0))
    (file,) = (store.directory / "tags").rglob("latest")
    file.write_bytes(text)
    assert store.record(NAME) is None
    assert list(store.records()) == []
    store.tidy()
    store.note(NAME, Record(B.digest, MANIFEST_TYPE, 5, 1.0))
    assert store.record(NAME) == Record(B.digest, MANIFEST_TYPE, 5, 1.0)


def test_rubbish_is_not_noted(store: Cache) -> None:
    with pytest.raises(ValueError, match="without a digest"):
        store.note(NAME, Record("sha256:x", MANIFEST_TYPE, 5, 1.0))


def test_a_record_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        store = Cache(disk, ROOM)
        before = Record(A.digest, MANIFEST_TYPE, 5, 1.0)
        store.note(NAME, before)
        with pytest.raises(OSError, match="No space"):
            (disk / "foreign").write_bytes(bytes(8 << 20))
        with pytest.raises(OSError, match="No space"):
            store.note(NAME, before._replace(digest=B.digest))
        assert store.record(NAME) == before
        assert [file.name for file in (disk / "tags").rglob("*") if file.is_file()] == ["latest"]
