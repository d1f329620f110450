"""What the mirror counts: requests, running transfers, the last pulls, the endpoints' health, the last hour.

It is told, and asks nobody. Each worker counts for itself, and once a second puts what it knows onto a board that all
workers share, so that any of them can report for all. A worker that takes the place of one that ended goes on with
what that one had counted. Times are time.time(), unless they are durations in seconds; sizes are bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
import zlib
from bisect import bisect_left
from collections import Counter
from collections import deque
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import suppress
from http import HTTPStatus
from struct import Struct
from typing import Any

SLOTS, PAGE = 64, 512 << 10  # workers that share a board, and bytes of each of their two pages: unused ones take none
FRAME = Struct("=III")  # number, length and checksum of what stands on a page
MIN_TICK = 0.5  # seconds, below which a rate says nothing
STEP, STEPS = 10, 360  # seconds of one point of the last hour, and how many there are
MAX_SHOWN = 100  # running transfers of one worker that are shown, the oldest ones
MAX_PULLS = 50  # that are remembered
PULL_GAP = 600  # seconds after which a client's next request for an image is another pull,
PART_GAP = 60  # and after which its next blob is one's of which another worker knows the tag
MAX_TEXT = 200  # characters of an error that are shown
BOUNDS = {  # of durations, in seconds
    "first_byte": (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
    "transfer": (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600),
}
HITS = ("HIT", "JOIN", "STALE")
REASONS = ("connection", "timeout", "limited", "answer", "digest")  # why an endpoint failed
# How a transfer ended. `left`: the client went, or the mirror was stopped. `handed_over`: nginx alone knows.
OUTCOMES = ("whole", "failed", "left", "handed_over")
STATUSES = frozenset((*HTTPStatus, 499))
QUOTA = re.compile(r"([0-9]{1,9})(?:;w=([0-9]{1,9}))?")

Report = dict[str, Any]


class Board:
    """Share memory between the processes of one family: each has a slot, and reads those of all.

    It is made before the fork. A slot is held by a lock, which ends with its process. It has two pages that are written
    in turn: one is whole, whenever the process may be killed.
    """

    def __init__(self) -> None:
        self._fd = os.memfd_create("docker-mirror")
        os.ftruncate(self._fd, SLOTS * 2 * PAGE)
        self._own: int | None = None
        self._number = 0  # of what was written last

    def take(self) -> bytes:
        """Take a free slot, and return what the process before has left there; without one, write() does nothing."""
        for slot in range(SLOTS):
            if self._lock(slot, fcntl.LOCK_EX):
                self._own = slot
                self._number, left = self._read(slot)
                return left
        return b""

    def write(self, content: bytes) -> None:
        """Put content into the own slot."""
        if self._own is not None:
            self._number += 1
            frame = FRAME.pack(self._number, len(content), zlib.crc32(content))
            os.pwrite(self._fd, frame + content, self._place(self._own, self._number % 2))

    def others(self) -> Iterator[tuple[bytes, bool]]:
        """Yield what stands in the slots of all other processes, and whether the process lives."""
        for slot in range(SLOTS):
            content = self._read(slot)[1] if slot != self._own else b""
            if content:
                is_free = self._lock(slot, fcntl.LOCK_SH)
                if is_free:
                    fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, self._place(slot))
                yield content, not is_free

    def _place(self, slot: int, page: int = 0) -> int:
        return (2 * slot + page) * PAGE

    def _lock(self, slot: int, kind: int) -> bool:
        try:
            fcntl.lockf(self._fd, kind | fcntl.LOCK_NB, 1, self._place(slot))
        except OSError:
            return False
        return True

    def _read(self, slot: int) -> tuple[int, bytes]:
        """Return number and content of what was written last into a slot; nothing, if nothing was."""
        found = (0, b"")
        for page in (0, 1):
            place = self._place(slot, page)
            number, length, checksum = FRAME.unpack(os.pread(self._fd, FRAME.size, place))
            content = os.pread(self._fd, length, place + FRAME.size) if length <= PAGE else b""
            if number > found[0] and zlib.crc32(content) == checksum:
                found = (number, content)
        return found


class Histogram:
    """Count durations between bounds; the last count is that of all longer ones."""

    def __init__(self, bounds: tuple[float, ...], counts: list[int] | None = None, total: float = 0.0) -> None:
        self.bounds = bounds
        self.counts = counts or [0] * (len(bounds) + 1)
        self.total = total

    def add(self, seconds: float) -> None:
        """Count a duration."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def __iadd__(self, other: Histogram) -> Histogram:
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total
        return self


class Run:
    """Follow a transfer of one blob while it runs. Whoever has one must end it."""

    def __init__(self, telemetry: Telemetry, registry: str, client: str, image: str, digest: str) -> None:
        self.size: int | None = None  # of the answer's body, once it is known
        self.label = ""  # as X-Cache has it
        self.sent = 0
        self.has_begun = False  # there is an answer with a body
        self.outcome = "left"  # one of OUTCOMES
        self.handed = 0  # bytes that nginx sends
        self.rate = 0.0  # bytes per second
        self._telemetry = telemetry
        self._key = ("sent", registry)
        self._registry, self._client, self._image, self._digest = registry, client, image, digest
        self._pull = telemetry.pull(client, image)
        self._began, self._start = time.time(), time.monotonic()
        self._sent_before = 0

    def begin(self, size: int | None, label: str) -> None:
        """Note the answer: how long its body is, if that is known, and what X-Cache says."""
        self.size, self.label, self.has_begun = size, label, True

    def add(self, count: int) -> None:
        """Account for bytes that are sent."""
        self.sent += count
        self._telemetry.counts[self._key] += count

    def tick(self, seconds: float) -> None:
        """Find out how fast it is, `seconds` after the last time."""
        now = (self.sent - self._sent_before) / seconds
        self.rate = (self.rate + now) / 2 if self._sent_before else now
        self._sent_before = self.sent

    def end(self) -> None:
        """Count the transfer; a second time does nothing."""
        if self._telemetry.ended(self, self._registry, time.monotonic() - self._start):
            count = self.sent + self.handed
            self._pull["blobs"] += 1
            self._pull["bytes"] += count
            self._pull["kept"] += count if self.label in HITS else 0
            self._pull["ended"] = time.time()

    def shown(self) -> dict[str, Any]:
        """Return what is shown of it."""
        return {
            "client": self._client,
            "image": self._image,
            "digest": self._digest,
            "cache": self.label,
            "began": self._began,
            "size": self.size,
            "sent": self.sent,
            "rate": self.rate,
        }


class Telemetry:
    """Keep what one worker counts, and report for all. `endpoints` are pairs of a registry's name and a base URL."""

    def __init__(self, endpoints: Iterable[tuple[str, str]] = ()) -> None:
        self.counts: Counter[tuple[str, ...]] = Counter()  # by a name and the values of its labels
        self._endpoints = tuple(endpoints)
        self._began = time.monotonic()
        self._durations: dict[tuple[str, ...], Histogram] = {}
        self._runs: dict[int, Run] = {}
        self._pulls: deque[dict[str, Any]] = deque(maxlen=MAX_PULLS)
        self._health: dict[tuple[str, str], dict[str, Any]] = {}  # times are time.monotonic(), which workers share
        self._quotas: dict[tuple[str, str], dict[str, Any]] = {}
        self._hour: dict[int, list[int]] = {}  # by time in steps: bytes sent, bytes received, hits, misses
        self._summed = [0, 0, 0, 0]
        self._ticked = time.monotonic()
        self._written = b""
        self._board: Board | None = None

    @property
    def requests(self) -> int:
        """Return how many requests there were."""
        return sum(count for key, count in self.counts.items() if key[0] == "requests")

    # What it is told

    def request(self, registry: str, kind: str, status: int, seconds: float) -> None:
        """Count a request, whose answer's head was ready after `seconds`; a status that upstream made up, by class."""
        shown = str(status) if status in STATUSES else f"{status // 100}xx"
        self.counts["requests", registry, kind, shown] += 1
        self._duration("first_byte", kind).add(seconds)

    def looked_up(self, kind: str, label: str) -> None:
        """Count what the cache had; `label` as X-Cache has it."""
        self.counts["cache", kind, label] += 1

    def sent(self, registry: str, count: int) -> None:
        """Count bytes of an answer that is no transfer."""
        self.counts["sent", registry] += count

    def received(self, registry: str, count: int) -> None:
        """Count bytes of manifests and blobs that came from upstream."""
        self.counts["received", registry] += count

    def resumed(self, registry: str) -> None:
        """Count a transfer that went on after upstream broke off."""
        self.counts["resumes", registry] += 1

    def transfer(self, registry: str, client: str, image: str, digest: str) -> Run:
        """Count a transfer that begins, and return it."""
        run = Run(self, registry, client, image, digest)
        self._runs[id(run)] = run
        return run

    def ended(self, run: Run, registry: str, seconds: float) -> bool:
        """Count a transfer that ended, one way or another; tell whether it had begun, and is not counted yet."""
        if self._runs.pop(id(run), None) is None or not run.has_begun:
            return False
        self.counts["transfers", registry, run.outcome] += 1
        if run.outcome == "whole":
            self._duration("transfer", registry).add(seconds)
        return True

    def manifest(self, client: str, image: str, reference: str, status: int) -> None:
        """Note the beginning of a pull, or its next step, by tag or digest."""
        self.pull(client, image, reference)["status"] = status

    def pull(self, client: str, image: str, reference: str = "") -> dict[str, Any]:
        """Return the pull that a request belongs to: another tag, or the same after its blobs, begins another one."""
        now, is_tag = time.time(), reference != "" and ":" not in reference
        known = (one for one in reversed(self._pulls) if (one["client"], one["image"]) == (client, image))
        pull = next(known, None)
        if pull is not None:
            gap = PULL_GAP if pull["reference"] else PART_GAP
            is_next = is_tag and (pull["blobs"] > 0 or pull["reference"] != reference)
            if is_next or not -gap < now - pull["ended"] < gap:
                pull = None
        if pull is None:
            pull = {"client": client, "image": image, "reference": reference, "began": now, "status": 200}
            pull |= {"blobs": 0, "bytes": 0, "kept": 0}
            self._pulls.append(pull)
        pull["ended"] = now
        return pull

    def answered(self, registry: str, url: str, began: float, is_ping: bool = False) -> None:
        """Note that an endpoint answered what it was asked at `began`; a ping tells nothing of limits and contents."""
        known = self._endpoint(registry, url)
        is_failing = known.get("failed", 0) > known.get("answered", 0)
        if not is_failing or (
            began >= known["failed"] and (not is_ping or known["reason"] in ("connection", "timeout"))
        ):
            known["answered"] = time.monotonic()

    def failed(self, registry: str, url: str, reason: str, text: str) -> None:
        """Note that an endpoint failed, by one of a few reasons, and in words."""
        self.counts["failures", registry, url, reason] += 1
        known, now = self._endpoint(registry, url), time.monotonic()
        if known.get("failed", 0) <= known.get("answered", 0):
            known["since"] = now
        known.update(failed=now, reason=reason, why=text[:MAX_TEXT])

    def cools(self, registry: str, url: str, seconds: float) -> None:
        """Note that an endpoint is left alone."""
        self.counts["cooldowns", registry, url] += 1
        self._endpoint(registry, url)["until"] = time.monotonic() + seconds

    def recovered(self, registry: str, url: str) -> None:
        """Note that an endpoint is not left alone any more."""
        self._endpoint(registry, url)["until"] = 0

    def quota(self, registry: str, url: str, limit: str, remaining: str) -> None:
        """Note what a registry tells of its limit, such as ``100;w=21600`` and ``76;w=21600``; nonsense is ignored.

        Source: Docker Hub, RateLimit-Limit and RateLimit-Remaining.
        """
        most, left = QUOTA.fullmatch(limit.strip()), QUOTA.fullmatch(remaining.strip())
        if most is not None and left is not None:
            window = int(left[2] or most[2] or 0)
            found = {"limit": int(most[1]), "remaining": int(left[1]), "window": window, "at": time.time()}
            self._quotas[registry, url] = found

    def evicted(self, sizes: list[int]) -> None:
        """Count what went from the cache to make room for other things."""
        if sizes:
            self.counts["evictions",] += len(sizes)
            self.counts["evicted",] += sum(sizes)

    # What it reports

    def share(self) -> None:
        """Let the processes that will be forked report together, where the system lets them."""
        with suppress(OSError):
            self._board = Board()

    def join(self) -> None:
        """Report together with the others from now on, and go on with what an ended process has counted."""
        if self._board is None:
            return
        left = self._board.take()
        if left:
            self._go_on(json.loads(left))
        self.tick()

    def tick(self) -> None:
        """Bring rates, the last hour and the board up to date. It is to be called each second."""
        seconds = time.monotonic() - self._ticked
        if seconds > MIN_TICK:
            self._ticked += seconds
            for run in list(self._runs.values()):
                run.tick(seconds)
        self._note_hour()
        if self._board is not None:
            snapshot = self._snapshot()
            content = as_json(snapshot)
            if len(content) > PAGE - FRAME.size:
                content = as_json({**snapshot, "runs": [], "pulls": []})
            if content != self._written and len(content) <= PAGE - FRAME.size:
                self._board.write(content)
                self._written = content

    def report(self) -> Report:
        """Return what all workers know, fit for JSON."""
        living, ended = self._everyone()
        every = living + ended
        now, pids = time.time(), [one["pid"] for one in living]
        if self._board is not None:
            pids.append(os.getppid())
        return {
            "at": now,
            "uptime": time.monotonic() - min(one["began"] for one in living),
            "workers": len(living),
            "memory": sum(map(memory_of, pids)),
            "running": sum(one["running"] for one in living),
            "rate": sum(one["rate"] for one in living),
            "transfers": sorted((run for one in living for run in one["runs"]), key=lambda run: run["began"]),
            "pulls": _merged_pulls([one["pulls"] for one in every]),
            "endpoints": [_state(now - time.monotonic(), *endpoint, living, every) for endpoint in self._endpoints],
            "quotas": _newest(quota for one in every for quota in one["quotas"]),
            "hour": _hour(now, [one["hour"] for one in every]),
        }

    def totals(self) -> tuple[Counter[tuple[str, ...]], dict[tuple[str, ...], Histogram]]:
        """Return what all workers counted, and how long it took, by a name and the values of its labels."""
        living, ended = self._everyone()
        every = living + ended
        return sum((_counted(one) for one in every), Counter()), _durations(every)

    def _everyone(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the snapshots of the workers that live, this one first, and of those that ended."""
        self.tick()
        living: list[dict[str, Any]] = [self._snapshot()]
        ended: list[dict[str, Any]] = []
        for content, lives in self._board.others() if self._board is not None else ():
            (living if lives else ended).append(json.loads(content))
        return living, ended

    def _snapshot(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "began": self._began,
            "running": len(self._runs),
            "rate": sum(run.rate for run in self._runs.values()),
            "runs": [run.shown() for run in list(self._runs.values())[:MAX_SHOWN]],
            "pulls": list(self._pulls),
            "health": [[*key, value] for key, value in self._health.items()],
            "quotas": [{"registry": key[0], "url": key[1], **value} for key, value in self._quotas.items()],
            "hour": list(self._hour.items()),
            "counts": [[*key, value] for key, value in list(self.counts.items())],
            "durations": [[*key, found.counts, found.total] for key, found in self._durations.items()],
        }

    def _go_on(self, left: dict[str, Any]) -> None:
        """Count on from where an ended process stopped; what it was doing is over."""
        self.counts += _counted(left)
        self._durations |= _durations([left])
        self._pulls.extend(left["pulls"])
        self._health = {(registry, url): value for registry, url, value in left["health"]}
        self._quotas = {
            (quota["registry"], quota["url"]): {key: quota[key] for key in ("limit", "remaining", "window", "at")}
            for quota in left["quotas"]
        }
        self._hour = dict(left["hour"])
        self._summed = self._sums()

    def _duration(self, name: str, label: str) -> Histogram:
        found = self._durations.get((name, label))
        if found is None:
            found = self._durations[name, label] = Histogram(BOUNDS[name])
        return found

    def _endpoint(self, registry: str, url: str) -> dict[str, Any]:
        return self._health.setdefault((registry, url), {})

    def _sums(self) -> list[int]:
        """Return bytes sent, bytes received, hits and misses so far."""
        sums = [0, 0, 0, 0]
        for key, count in self.counts.items():
            if key[0] == "sent":
                sums[0] += count
            elif key[0] == "received":
                sums[1] += count
            elif key[0] == "cache" and key[2] in (*HITS, "MISS"):
                sums[2 if key[2] in HITS else 3] += count
        return sums

    def _note_hour(self) -> None:
        sums = self._sums()
        if sums != self._summed:
            step = int(time.time() // STEP)
            here = self._hour.setdefault(step, [0, 0, 0, 0])
            self._hour[step] = [old + new - last for old, new, last in zip(here, sums, self._summed, strict=True)]
            self._summed = sums
            for old in [one for one in self._hour if not step - STEPS < one <= step]:  # a clock may be set back
                del self._hour[old]


def _state(
    offset: float, registry: str, url: str, living: list[dict[str, Any]], every: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return what is known of an endpoint: up, cooling, failing or unknown, and since when and why.

    `offset` is what time.time() is ahead of time.monotonic(). It is cooling if any worker leaves it alone.
    """
    found, cooled = (
        [value for one in some for *key, value in one["health"] if key == [registry, url]] for some in (every, living)
    )
    answered = max((one.get("answered", 0) for one in found), default=0)
    until = max((one.get("until", 0) for one in cooled), default=0)
    worst: dict[str, Any] = max(found, key=lambda one: one.get("failed", 0), default={})
    is_cooling = until + offset > time.time()
    shown: dict[str, Any] = {"registry": registry, "url": url, "state": "unknown"}
    shown["answered"] = answered + offset if answered else None
    if is_cooling or worst.get("failed", 0) > answered:
        shown |= {"state": "cooling" if is_cooling else "failing", "until": until + offset if is_cooling else None}
        since = min((one["since"] for one in found if one.get("since", 0) > answered), default=worst["failed"])
        shown |= {"since": since + offset, "failed": worst["failed"] + offset}
        shown |= {"reason": worst["reason"], "why": worst["why"]}
    elif answered:
        shown["state"] = "up"
    return shown


def as_json(content: Any) -> bytes:
    """Return content as short JSON."""
    return json.dumps(content, separators=(",", ":")).encode()


def _counted(one: dict[str, Any]) -> Counter[tuple[str, ...]]:
    return Counter({tuple(key): value for *key, value in one["counts"]})


def _durations(every: list[dict[str, Any]]) -> dict[tuple[str, ...], Histogram]:
    found: dict[tuple[str, ...], Histogram] = {}
    for one in every:
        for name, label, counts, total in one["durations"]:
            histogram = found.setdefault((name, label), Histogram(BOUNDS[name]))
            histogram += Histogram(BOUNDS[name], counts, total)
    return found


def _newest(quotas: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each registry's quota as it was told last."""
    by_time = sorted(quotas, key=lambda quota: quota["at"])
    return list({(quota["registry"], quota["url"]): quota for quota in by_time}.values())


def _merged_pulls(every: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the last pulls of all workers, the newest first; the parts of one that several of them served are one."""
    merged: list[tuple[dict[str, Any], set[int]]] = []  # each pull, and the workers that served it
    parts = [(pull, worker) for worker, pulls in enumerate(every) for pull in pulls]
    for pull, worker in sorted(parts, key=lambda part: part[0]["began"]):
        for same, served in reversed(merged):
            if _is_same_pull(same, pull) and not (worker in served and _tag(pull)):
                break
        else:
            merged.append((dict(pull), {worker}))
            continue
        served.add(worker)
        for key in ("blobs", "bytes", "kept"):
            same[key] += pull[key]
        same["ended"] = max(same["ended"], pull["ended"])
        same["status"] = min(same["status"], pull["status"])
        if not _tag(same):
            same["reference"] = pull["reference"] or same["reference"]
    return sorted((pull for pull, _ in merged), key=lambda pull: pull["ended"], reverse=True)[:MAX_PULLS]


def _is_same_pull(one: dict[str, Any], other: dict[str, Any]) -> bool:
    tags = {_tag(one), _tag(other)} - {""}
    same_name = one["client"] == other["client"] and one["image"] == other["image"]
    return same_name and len(tags) < 2 and other["began"] - one["ended"] < (PULL_GAP if tags else PART_GAP)


def _tag(pull: dict[str, Any]) -> str:
    """Return the tag that was pulled, as far as it is known."""
    return "" if ":" in pull["reference"] else pull["reference"]


def _hour(now: float, hours: list[list[Any]]) -> dict[str, Any]:
    """Return the last hour as points: bytes sent and received, hits and misses in each step, the newest last."""
    last = int(now // STEP)
    points = [[0] * STEPS for _ in range(4)]
    for hour in hours:
        for step, values in hour:
            at = step - last + STEPS - 1
            if 0 <= at < STEPS:
                for line, value in zip(points, values, strict=True):
                    line[at] += value
    sent, received, hits, misses = points
    return {"step": STEP, "sent": sent, "received": received, "hits": hits, "misses": misses}


def memory_of(pid: int) -> int:
    """Return the memory of a process, its part of what it shares (PSS); 0 where that is not to be seen."""
    with suppress(OSError), open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        for line in file:
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0
