"""The pull-through store: content-addressed files on disk. It knows digests, files and sizes, and no HTTP.

::

    blobs/sha256/ab/<hex>                            whole, and right: it was hashed before it got this name
    blobs/sha256/ab/<hex>.part                       being written, or left by a process that ended
    blobs/sha256/ab/<hex>.size                       how large that will be, and when this host was started
    tags/<registry>/<repository>/_tags/<reference>   a record: which digest a tag, or a digest, stands for there
    usage                                            how many bytes all that takes
    evict, tidy                                      locks

Manifests are content like any other. Who writes a file holds an exclusive lock on it, flock(2), who reads one a shared
lock, and eviction takes only what nobody has locked. A blob's time of access is when it was last asked for, its time
of modification when it came.

Several processes share a store, and any file may be deleted at any time. All calls may block, and may come from any
thread; no lock is one of this process's own, which gevent would replace. Whatever fails on the disk is raised as
OSError.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import heapq
import json
import os
import re
import stat
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from typing import Protocol

FOLDER_MODE, BLOB_MODE = 0o750, 0o640  # a web server that sends blobs itself is in the group
HEX = {"sha256": re.compile("[a-f0-9]{64}"), "sha512": re.compile("[a-f0-9]{128}")}
MEDIA_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}")
PART, SIZE, NEW = ".part", ".size", ".new"
UNCONFIRMED = b"?"  # behind a size that upstream has not told this time
READ = 1 << 20  # bytes that are hashed at a time
MAX_RECORD = 4096  # bytes; none is longer
END_OF_FILE = 1 << 63  # bytes; no file is so long
LOOK_EVERY = 32 << 20  # bytes after which the free space is looked at
TOUCH_EVERY = 60  # seconds within which a further use is not noted
CANDIDATES = 32_768  # of eviction, that are remembered
ONE_BOOT = 60  # seconds that two readings of one boot's time may differ by, as the clock is set
END_OF_TIME = 1 << 36  # in time.time()
RECOUNTS = 2  # times that the store is counted, until nothing changed meanwhile
ABANDONED = 86_400  # seconds after which a part that nobody went on with is removed


class Limits(NamedTuple):
    """Bound the store: `size` bytes in all, `min_free` bytes left on its disk, `max_age` seconds without use."""

    size: int
    min_free: int = 0
    max_age: float | None = None


class Full(Exception):
    """Say that a blob does not fit into the store, whatever else goes."""


class WrongDigest(Exception):
    """Say that bytes do not have the digest that they are named by."""


class Name(NamedTuple):
    """Name a manifest as clients do; `reference` is a tag or a digest."""

    registry: str
    repository: str
    reference: str


class Record(NamedTuple):
    """Say what a `Name` stands for, its size in bytes, and when upstream said so last, in time.time()."""

    digest: str
    media_type: str
    size: int
    checked: float

    @classmethod
    def parse(cls, text: bytes) -> Record | None:
        """Read a record; None where it is none."""
        try:
            found = cls(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return None
        texts = isinstance(found.digest, str) and isinstance(found.media_type, str)
        numbers = type(found.size) is int and isinstance(found.checked, (int, float))
        return found if texts and numbers and found.is_valid else None

    @property
    def is_valid(self) -> bool:
        """Tell whether digest, media type, size and time are such."""
        texts = is_digest(self.digest) and MEDIA_TYPE.fullmatch(self.media_type) is not None
        return texts and self.size >= 0 and 0 <= self.checked < END_OF_TIME


def is_digest(text: str) -> bool:
    """Tell whether a text is a digest that can be stored: sha256 or sha512."""
    algorithm, _, encoded = text.partition(":")
    return algorithm in HEX and HEX[algorithm].fullmatch(encoded) is not None


class Hash(Protocol):
    """Be hashed into."""

    def update(self, chunk: bytes, /) -> object:
        """Take the next bytes in."""


class Opened:
    """Hold a file of the store open at `fd`. Whoever has one must close it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Blob(Opened):
    """Hold a file of the store open for reading, so that it stays.

    `size` is in bytes; `stored` is when it came, in time.time().
    """

    def __init__(self, path: str, fd: int) -> None:
        super().__init__(fd)
        self.path = path
        found = os.fstat(fd)
        self.size = found.st_size
        self.stored = found.st_mtime

    def read(self) -> bytes:
        """Return all bytes."""
        return os.pread(self.fd, self.size, 0)


class Follower(Opened):
    """Read along what another process writes."""

    def __init__(self, fd: int, size: int) -> None:
        super().__init__(fd)
        self.size = size
        self._seen = 0
        self._stays = False

    @property
    def written(self) -> int:
        """Return how many bytes are there; raise WrongDigest where the writer threw them away."""
        found = os.fstat(self.fd)
        if found.st_size < self._seen or not (found.st_size or found.st_nlink):
            raise WrongDigest
        self._seen = found.st_size
        if self._seen == self.size and not self._stays:
            self._stays = _lock(self.fd, fcntl.LOCK_SH)  # no eviction takes it, once it has its name
        return self._seen

    @property
    def has_ended(self) -> bool:
        """Tell whether the writer has let go."""
        ended = _lock(self.fd, fcntl.LOCK_SH)
        if ended and not self._stays:
            fcntl.flock(self.fd, fcntl.LOCK_UN)  # the next one may go on with it
        return ended


class Partial(Opened):
    """Write one blob. Whoever has a partial is the only one in all processes.

    `written` bytes are on disk, and may be read at `fd`. The last ones get there only if all are right. `size` is None
    until it is known; what an earlier process wrote may be gone on with.
    """

    def __init__(self, cache: Cache, digest: str, fd: int) -> None:
        super().__init__(fd)
        self.path = cache.path(digest)
        self._cache = cache
        self._algorithm, _, self._expected = digest.partition(":")
        self._hash = hashlib.new(self._algorithm)  # of the bytes that write() took
        self._looked = 0
        self._counted = self.written = os.fstat(fd).st_size
        self.size = _read_size(_size(self.path), UNCONFIRMED)
        if self.size is None or self.written > self.size:
            self.restart()
        elif self.written:
            _write_size(_size(self.path), self.size, UNCONFIRMED)  # nobody reads along what may be dropped

    def restart(self) -> None:
        """Drop what an earlier process wrote, for a new file: somebody may still read the old one."""
        if self.written:
            self._replace()
        _remove(_size(self.path))
        self._count(0)
        self.size, self.written = None, 0
        self._hash = hashlib.new(self._algorithm)

    def _replace(self) -> None:
        part, new = _part(self.path), self.path.with_name(f"{self.path.name}.{os.urandom(4).hex()}{NEW}")
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # nobody else knows it
            if _is_at(self.fd, part):
                os.rename(new, part)
            else:  # somebody deleted the part: this one will have no name
                os.unlink(new)
            os.dup2(fd, self.fd, inheritable=False)
        finally:
            os.close(fd)

    def begin(self, size: int) -> None:
        """Make room for a blob of so many bytes; raise Full where there is none, WrongDigest for an empty blob."""
        if not size and not self.is_right:
            raise WrongDigest
        self._cache.make_room(size, self._counted)
        self.size = self._counted = size
        _write_size(_size(self.path), size)

    def rehash(self) -> None:
        """Hash what an earlier process wrote; raise WrongDigest where that is all, and not right."""
        hash_file(self._hash, self.fd, self.written)
        self._check(self.written)

    def write(self, chunks: list[bytes]) -> None:
        """Append bytes; raise WrongDigest in place of writing the last ones, if all together are not right."""
        for chunk in chunks:
            self._hash.update(chunk)
        self._check(self.written + sum(map(len, chunks)))
        if self.written - self._looked >= LOOK_EVERY:
            self._looked = self.written
            self._cache.look_after_disk()
        for chunk in chunks:
            view = memoryview(chunk)
            while view:
                count = os.pwrite(self.fd, view, self.written)
                self.written += count
                view = view[count:]

    def _check(self, end: int) -> None:
        if self.size is not None and (end > self.size or (end == self.size and not self.is_right)):
            raise WrongDigest

    @property
    def is_whole(self) -> bool:
        """Tell whether all bytes are there."""
        return self.written == self.size

    @property
    def is_right(self) -> bool:
        """Tell whether the bytes that were hashed are the right ones."""
        return self._hash.hexdigest() == self._expected

    def finish(self, durable: bool = True) -> None:
        """Give the blob its name, and let others read it; raise WrongDigest where it is not whole and right.

        That waits for the disk, if it has to be `durable`: after a power cut a name must not stand for nothing.
        """
        if not self.is_whole or not self.is_right:
            raise WrongDigest
        if durable:
            os.fdatasync(self.fd)
        if _is_at(self.fd, _part(self.path)):  # else somebody deleted it
            os.fchmod(self.fd, BLOB_MODE)
            os.rename(_part(self.path), self.path)
            _remove(_size(self.path))
        else:  # somebody deleted the part, and another one may have begun anew
            self._count(0)
            if not _part(self.path).exists():
                _remove(_size(self.path))
        fcntl.flock(self.fd, fcntl.LOCK_SH)

    def adopt(self, fd: int) -> None:
        """Give the blob's name to a file elsewhere on this disk, by a hard link; raise OSError where that cannot be.

        The file is open at `fd`, and the caller has hashed it. It is counted, but no room is made for it.
        """
        self.restart()
        # With a descriptor beside it, the path is followed (linkat(2)): the link is to the very file that was hashed.
        os.link(f"/proc/self/fd/{fd}", self.path, src_dir_fd=fd)
        found = os.fstat(fd)
        self._count(found.st_size)
        _touch(fd, found)
        self._unlink()

    def discard(self) -> None:
        """Throw the bytes away: they are wrong, and whoever reads along is to see it."""
        with suppress(OSError):
            self._unlink()
            os.ftruncate(self.fd, 0)
            self.written = 0
            self._count(0)

    def let_go(self) -> None:
        """End without the whole blob: what was written stays, for the next one to go on with. `fd` stays open."""
        try:
            self._count(self.written if _is_at(self.fd, _part(self.path)) else 0)
            if not self.written:
                self._unlink()
        finally:
            fcntl.flock(self.fd, fcntl.LOCK_UN)

    def _unlink(self) -> None:
        if _is_at(self.fd, _part(self.path)):
            _remove(_part(self.path))
            _remove(_size(self.path))

    def _count(self, size: int) -> None:
        if size != self._counted:
            self._cache.count(size - self._counted)
            self._counted = size


class Cache:
    """Keep blobs and records in one directory, within limits."""

    def __init__(self, directory: Path, limits: Limits) -> None:
        self.directory = directory
        self._limits = limits
        self._blobs = directory / "blobs"
        self._tags = directory / "tags"
        self._candidates: deque[tuple[float, str]] = deque()  # last use and path, the oldest first
        self._evicted: list[int] = []  # sizes

    def path(self, digest: str) -> Path:
        """Return where a blob is, or would be."""
        return Path(self._blob_path(digest))

    def _blob_path(self, digest: str) -> str:  # a Path would take longer to be made than the file to be opened
        algorithm, _, encoded = digest.partition(":")
        return f"{self._blobs}/{algorithm}/{encoded[:2]}/{encoded}"

    # Blobs

    def open(self, digest: str, *, is_use: bool = True) -> Blob | None:
        """Return a blob, and note that it was used, unless this is no use; None where it is not there."""
        path = self._blob_path(digest)
        try:
            fd = _open_to_read(path, is_use)
        except FileNotFoundError:
            return None
        try:
            if not _lock(fd, fcntl.LOCK_SH):  # it is being evicted
                raise BlockingIOError
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EISDIR, "is no file", path)
            if not found.st_nlink:  # it was evicted just now
                raise BlockingIOError
            if is_use:
                _touch(fd, found)
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        return Blob(path, fd)

    def has(self, digest: str) -> bool:
        """Tell whether a blob is there."""
        return self.path(digest).is_file()

    def claim(self, digest: str) -> Partial | None:
        """Return the blob to be written; None where somebody writes it, or has done so by now."""
        path = self.path(digest)
        while True:
            fd = _create(_part(path))
            try:
                if not _lock(fd, fcntl.LOCK_EX):
                    os.close(fd)
                    return None
                if _is_at(fd, _part(path)):  # else its last owner has just renamed or removed it
                    if not path.is_file():
                        return Partial(self, digest, fd)
                    _remove(_part(path))
                    os.close(fd)
                    return None
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def follow(self, digest: str) -> Follower | None:
        """Return what another process writes, once its size is known; None where nobody writes it, or not yet."""
        path = self.path(digest)
        try:
            fd = os.open(_part(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        size = None
        try:
            size = None if _lock(fd, fcntl.LOCK_SH) else _read_size(_size(path))
        finally:
            if size is None:
                os.close(fd)
        return Follower(fd, size) if size is not None else None

    def put(self, digest: str, content: bytes) -> None:
        """Keep a small blob, unless it is there or on its way; raise Full or WrongDigest.

        It is not waited for the disk: whoever reads a small blob whole can hash it.
        """
        partial = self.claim(digest) if not self.has(digest) else None
        if partial is None:
            return
        try:
            if partial.written:
                partial.restart()
            partial.begin(len(content))
            partial.write([content])
            partial.finish(durable=False)
        except BaseException:
            partial.discard()
            raise
        finally:
            partial.close()

    def blobs(self) -> Iterator[tuple[str, os.stat_result]]:
        """Yield the digest of each whole blob, and what the disk says of its file."""
        for path, found in self._files():
            algorithm, _, encoded = path.rsplit("/", 3)[-3:]
            if is_digest(f"{algorithm}:{encoded}"):
                yield f"{algorithm}:{encoded}", found

    def remove(self, digest: str) -> bool:
        """Remove a blob; tell whether it went: one that is being read stays."""
        size = self._evict(str(self.path(digest)))
        self.count(-(size or 0))
        return size is not None

    def drop(self, blob: Blob) -> None:
        """Remove a blob that was found to be wrong, whoever reads it."""
        if _is_at(blob.fd, blob.path):
            os.unlink(blob.path)
            self.count(-blob.size)

    # Records

    def record(self, name: Name) -> Record | None:
        """Return what is known of a manifest's name, or None."""
        try:
            fd = os.open(self._record_path(name), os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return Record.parse(os.read(fd, MAX_RECORD))
        finally:
            os.close(fd)

    def note(self, name: Name, record: Record) -> None:
        """Keep what a name stands for."""
        if not record.is_valid:
            raise ValueError("a record without a digest or a media type")
        path = Path(self._record_path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{os.urandom(8).hex()}")
        try:
            temporary.write_text(json.dumps(record._asdict()))
            os.rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                _remove(temporary)
            raise

    def forget(self, name: Name) -> None:
        """Remove a record, if it is there."""
        _remove(Path(self._record_path(name)))

    def names(self) -> Iterator[Name]:
        """Yield the names of all records, of those that are none too."""
        for folder, _, files in os.walk(self._tags):
            if os.path.basename(folder) == "_tags":
                registry, _, repository = os.path.relpath(os.path.dirname(folder), self._tags).partition("/")
                for reference in sorted(file for file in files if not file.startswith(".")):
                    yield Name(registry, repository, reference)

    def records(self) -> Iterator[tuple[Name, Record]]:
        """Yield all records, with their names."""
        for name in self.names():
            record = self.record(name)
            if record is not None:
                yield name, record

    def _record_path(self, name: Name) -> str:
        return f"{self._tags}/{name.registry}/{name.repository}/_tags/{name.reference}"

    # Bounds

    def count(self, change: int) -> int:
        """Add to the number of bytes that the store takes, and return it."""
        fd = _create(self.directory / "usage")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            before = _number(fd)
            total = max(0, (before or 0) + change)
            if total != before:
                os.pwrite(fd, b"%-19d" % total, 0)
                os.ftruncate(fd, 19)
            return total
        finally:
            os.close(fd)

    def room(self) -> tuple[int, int]:
        """Return how many bytes may come before anything has to go: into the store, and onto its disk."""
        return self._limits.size - self.count(0), self._free() - self._limits.min_free

    def fill(self) -> tuple[int, int]:
        """Return how many bytes the store takes, and how many are free on its disk."""
        return self.count(0), self._free()

    def take_evicted(self) -> list[int]:
        """Return the sizes of what this process has removed since the last time."""
        return [self._evicted.pop() for _ in range(len(self._evicted))]

    def make_room(self, size: int, counted: int = 0) -> None:
        """Count `size` bytes, of which some are `counted`, and evict what was not used for longest until they fit.

        Raises Full where the store is too small for them, and OSError (ENOSPC) where the disk is too full.
        """
        if size > self._limits.size:
            raise Full(f"{size} bytes are more than the whole store may take")
        more = size - counted
        total = self.count(more)
        try:
            if self._needs(total, more) > 0:
                self._free_up(more)
        except BaseException:
            self.count(-more)
            raise

    def look_after_disk(self) -> None:
        """Evict where something else fills the disk; raise OSError (ENOSPC) where that does not help."""
        if self._limits.min_free > self._free():
            self._free_up(0)

    def _needs(self, total: int, size: int) -> int:
        """Return how many bytes have to go, of which the store takes `total`, and `size` are not on the disk yet."""
        return max(total - self._limits.size, self._limits.min_free + size - self._free())

    def _free_up(self, size: int) -> None:
        """Evict until all bounds hold, with `size` bytes more on the disk; raise Full or OSError."""
        with self._locked("evict"):
            scanned = False
            while (need := self._needs(total := self.count(0), size)) > 0:
                if need > total - size:  # then nothing that goes would help
                    raise OSError(errno.ENOSPC, "the disk has too little space left")
                if self._candidates:
                    self._evict_oldest(need)
                elif not scanned:
                    scanned = True
                    self._candidates = deque(self._oldest())
                elif total > self._limits.size:
                    raise Full("there is no room, and all is in use")
                else:
                    raise OSError(errno.ENOSPC, "the disk has too little space left")

    def _evict_oldest(self, need: int) -> None:
        freed = 0
        while freed < need and self._candidates:
            used, path = self._candidates.popleft()
            freed += self._evict(path, used) or 0
        self.count(-freed)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold one of the store's own locks, against all processes and threads."""
        fd = _create(self.directory / name)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def tidy(self) -> bool:
        """Count anew what the store takes, remove what is abandoned or too old, and keep within the limits.

        It is for one process at a time: another one returns False at once.
        """
        fd = _create(self.directory / "tidy")
        try:
            if not _lock(fd, fcntl.LOCK_EX):
                return False
            self._sweep_blobs()
            self._recount()
            self._sweep_records()
            with suppress(Full):
                self._free_up(0)
            return True
        finally:
            os.close(fd)

    def _sweep_blobs(self) -> None:
        """Remove parts that nobody went on with, and what was not used for too long."""
        now, max_age = time.time(), self._limits.max_age
        for path, found in self._files():
            if path.endswith(PART):
                is_old = now - found.st_mtime > ABANDONED
            else:
                is_old = max_age is not None and now - found.st_atime > max_age
            if is_old:
                self.count(-(self._evict(path) or 0))

    def _recount(self) -> None:
        """Count anew. What comes and goes meanwhile may be counted or not, so that a quiet moment is better."""
        for _ in range(RECOUNTS):
            before, total = self.count(0), 0
            for path, found in self._files():
                total += max(found.st_size, self._reserved(Path(path)) if path.endswith(PART) else 0)
            if self.count(0) == before:
                break
        self.count(total - before)

    def _reserved(self, part: Path) -> int:
        """Return how many bytes a running writer has made room for."""
        with suppress(FileNotFoundError), _opened(part, os.O_RDONLY) as fd:
            if not _lock(fd, fcntl.LOCK_SH):
                return _read_size(_size(part.with_suffix(""))) or 0
        return 0

    def _sweep_records(self) -> None:
        """Remove records whose content has gone, but for those of a pull that is under way."""
        for name, record in self.records():
            if time.time() - record.checked > ABANDONED and not self.has(record.digest):
                self.forget(name)
        for folder, _, files in os.walk(self._tags):
            for file in files:
                if file.startswith("."):  # of a process that ended while it wrote
                    _remove_old(os.path.join(folder, file))

    def _free(self) -> int:
        found = os.statvfs(self.directory)
        return found.f_bavail * found.f_frsize

    def _oldest(self) -> list[tuple[float, str]]:
        """Return last use and path of the files that were not used for longest."""
        found = ((found.st_atime, path) for path, found in self._files())
        return heapq.nsmallest(CANDIDATES, found)

    def _evict(self, path: str, used: float | None = None) -> int | None:
        """Remove a blob or an abandoned part, unless it is open, or was used since.

        Return its size, which is still to be taken off the count; None where it stays.
        """
        try:
            with _opened(path, os.O_RDONLY) as fd:
                if not _lock(fd, fcntl.LOCK_EX):
                    return None
                found = os.fstat(fd)
                if (used is not None and found.st_atime > used) or not _is_at(fd, path):
                    return None
                os.unlink(path)
                if path.endswith(PART):
                    _remove(Path(path).with_suffix(SIZE))
                self._evicted.append(found.st_size)
                return found.st_size
        except OSError:  # it has gone, or the disk fails: then there are others
            return None

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Yield the path of each blob and part, and what the disk says of it."""
        for algorithm in HEX:
            for folder in _scan(self._blobs / algorithm):
                for entry in _scan(folder.path):
                    with suppress(FileNotFoundError):
                        if entry.is_file(follow_symlinks=False) and not entry.name.endswith((SIZE, NEW)):
                            yield entry.path, entry.stat(follow_symlinks=False)


def _scan(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        yield from entries


def _part(path: Path) -> Path:
    return path.with_name(path.name + PART)


def _size(path: Path) -> Path:
    return path.with_name(path.name + SIZE)


def _read_size(path: Path, mark: bytes = b"") -> int | None:
    """Return the size that was noted, with this mark or without.

    None: it was noted before the host was started anew, and the disk may not have what was written.
    """
    try:
        found = re.fullmatch(rb"([0-9]{1,18}) ([0-9]{1,12})\n", path.read_bytes().removesuffix(mark))
    except FileNotFoundError:
        return None
    return int(found[1]) if found and abs(int(found[2]) - _booted()) < ONE_BOOT else None


def _write_size(path: Path, size: int, mark: bytes = b"") -> None:
    path.write_bytes(b"%d %d\n%s" % (size, _booted(), mark))


def _booted() -> int:
    """Return when this host was started, in time.time(): a sandbox may hide the boot's own name in /proc/sys."""
    return int(time.time() - time.clock_gettime(time.CLOCK_BOOTTIME))


def hash_file(whole: Hash, fd: int, end: int) -> None:
    """Hash the first `end` bytes of a file; raise OSError where it has not so many."""
    at = 0
    for chunk in chunks(fd, end):
        whole.update(chunk)
        at += len(chunk)
    if at < end:
        raise OSError(errno.EIO, "a file of the cache is too short")


def chunks(fd: int, end: int = END_OF_FILE) -> Iterator[bytes]:
    """Yield the bytes of an open file from the beginning, up to number `end` or its own end."""
    at = 0
    while chunk := os.pread(fd, min(READ, end - at), at):
        yield chunk
        at += len(chunk)


def _create(path: Path) -> int:
    """Open a file for reading and writing, made with its folders where it is missing."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o600)
    except FileNotFoundError:
        path.parent.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
        return os.open(path, flags, 0o600)


def _open_to_read(path: str, is_use: bool) -> int:
    """Open a file; where this is no use of it, the kernel must not note one either, and obeys the file's owner."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    if not is_use:
        with suppress(PermissionError):
            return os.open(path, flags | os.O_NOATIME)
    return os.open(path, flags)


@contextmanager
def _opened(path: Path | str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _number(fd: int) -> int | None:
    """Return the number that a file holds, or None."""
    text = os.pread(fd, 20, 0).strip()
    return int(text) if text.isdigit() else None


def _is_at(fd: int, path: Path | str) -> bool:
    """Tell whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _lock(fd: int, kind: int) -> bool:
    """Lock an open file, unless somebody else has it locked; tell whether it is."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _touch(fd: int, found: os.stat_result) -> None:
    """Note a use; on a disk that is read only there is no eviction either."""
    now = time.time_ns()
    if now - found.st_atime_ns > TOUCH_EVERY * 1_000_000_000:
        with suppress(OSError):
            os.utime(fd, ns=(now, found.st_mtime_ns))


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _remove_old(path: str) -> None:
    with suppress(OSError):
        if time.time() - os.stat(path).st_mtime > ABANDONED:
            os.unlink(path)
