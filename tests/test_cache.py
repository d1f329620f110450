"""Blobs through the cache: what was pulled once is there for everyone, and one download serves all who want it."""

import hashlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from depot import BROKEN
from depot import PATIENCE
from depot import Cached
from depot import Depot
from depot import Reading
from depot import at_once
from depot import cached_lab
from hub import PASSWORD
from hub import USER
from hub import Hub
from hub import write_registries
from images import MIB
from images import Repository
from images import digest_of
from images import random_bytes
from lab import Reply
from lab import reply
from lab import reply_json
from lab import send_raw
from processes import free_port
from processes import poll
from serving import Mirror
from upstream import RawUpstream

ACCEPT = {
    "Accept": "application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.list.v2+json,"
    " application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
}
SIGNED = "application/vnd.docker.distribution.manifest.v1+prettyjws"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cached]:
    folder = tmp_path_factory.mktemp("cache")
    with cached_lab(folder) as lab:
        yield Cached(lab, folder)


@pytest.fixture(scope="module")
def shared_strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cached]:
    folder = tmp_path_factory.mktemp("cache")
    with cached_lab(folder, cache_size="2500K", cache_finish="off", verify="on", deny_clients="192.0.2.0/24") as lab:
        yield Cached(lab, folder)


@pytest.fixture(scope="module")
def shared_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cached]:
    folder = tmp_path_factory.mktemp("cache")
    with cached_lab(folder, "--workers", "2", cache_size="3500K") as lab:
        assert poll(lambda: len(lab.mirror.pids()) == 3, 10)
        yield Cached(lab, folder)


@pytest.fixture
def cached(shared: Cached) -> Cached:
    """Give a mirror whose cache has all default settings."""
    return ready(shared)


@pytest.fixture
def strict(shared_strict: Cached) -> Cached:
    """Give a mirror that verifies, with a small cache, whose downloads end when their last client leaves."""
    return ready(shared_strict)


@pytest.fixture
def pair(shared_pair: Cached) -> Cached:
    """Give a mirror with two workers, and a small cache."""
    return ready(shared_pair)


def ready(shared: Cached) -> Cached:
    shared.lab.reset()
    shared.lab.upstream.default = RawUpstream().default
    return shared


def content(seed: str, size: int = 3 * MIB) -> bytes:
    return random_bytes(seed, size)


# Hits


def test_a_second_pull_needs_no_upstream(cached: Cached) -> None:
    depot = Depot(content("second"))
    path = cached.serves(depot)
    first = cached.ask(path)
    assert cached.has(depot)
    cached.is_down()
    second = cached.ask(path)
    assert [answer.headers["x-cache"] for answer in (first, second)] == ["MISS", "HIT"]
    for answer in (first, second):
        assert (answer.status, answer.body) == (200, depot.content)
        assert answer.headers["content-length"] == str(len(depot.content))
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["docker-content-digest"] == depot.digest
        assert answer.headers["etag"] == f'"{depot.digest}"'
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert answer.headers["accept-ranges"] == "bytes"
        assert answer.headers["docker-distribution-api-version"] == "registry/2.0"
        assert int(answer.headers["age"]) >= 0
    assert len(depot.asked) == 1
    assert cached.file(depot.digest).read_bytes() == depot.content


def test_a_whole_image_of_the_hub_is_pulled_again_while_the_hub_is_off(hub: Hub, tmp_path: Path) -> None:
    repository = hub.repositories["library/redis"]
    with Mirror(registries=hub.registries_file, cache_dir=tmp_path / "cache", cache_min_free=0) as mirror:
        pulled(mirror, repository)
    off = hub.table() | {"endpoints": [f"https://127.0.0.2:{free_port('127.0.0.2')}"]}
    registries = write_registries(tmp_path / "registries.toml", {"docker.io": off})
    with Mirror(registries=registries, cache_dir=tmp_path / "cache", cache_min_free=0) as mirror:
        assert set(pulled(mirror, repository)) == {"HIT"}
        assert " 200 " in mirror.log()
        assert mirror.log().count("HIT") >= 4


def pulled(mirror: Mirror, repository: Repository, headers: dict[str, str] | None = None) -> list[str]:
    """Pull an image as clients do, and see that it is the right one; return the X-Cache headers."""
    labels = []
    with requests.Session() as session:
        session.trust_env = False
        session.headers.update({**ACCEPT, **(headers or {})})
        top, image = repository.top(), repository.local()
        manifests = [("latest", top), (top.digest, top), (image.manifest.digest, image.manifest)]
        blobs = [(blob.digest, blob) for blob in (image.config, *image.layers)]
        for kind, wanted in (("manifests", manifests), ("blobs", blobs)):
            for reference, expected in wanted:
                answer = session.get(f"{mirror.url}/v2/{repository.name}/{kind}/{reference}")
                assert (answer.status_code, digest_of(answer.content)) == (200, expected.digest)
                if kind == "manifests":
                    assert answer.headers["Content-Type"] == expected.media_type
                labels.append(answer.headers["X-Cache"])
    return labels


@pytest.mark.parametrize(
    ("given", "first", "stop"),
    [
        ("bytes=10-19", 10, 20),
        ("bytes=0-0", 0, 1),
        ("bytes=1000000-", 1_000_000, 3 * MIB),
        ("bytes=-100", 3 * MIB - 100, 3 * MIB),
        ("bytes=3145727-9999999", 3 * MIB - 1, 3 * MIB),
    ],
)
def test_a_part_of_a_kept_blob(cached: Cached, given: str, first: int, stop: int) -> None:
    depot = hit(cached)
    answer = cached.ask(cached.serves(depot), {"Range": given})
    assert (answer.status, answer.headers["x-cache"]) == (206, "HIT")
    assert answer.headers["content-range"] == f"bytes {first}-{stop - 1}/{len(depot.content)}"
    assert answer.headers["content-length"] == str(stop - first)
    assert answer.body == depot.content[first:stop]
    assert depot.asked == []


def hit(cached: Cached) -> Depot:
    """Return a blob that is kept."""
    depot = Depot(content("hit"))
    if not cached.file(depot.digest).exists():
        assert cached.ask(cached.serves(depot)).body == depot.content
        assert cached.has(depot)
        depot.asked.clear()
    return depot


@pytest.mark.parametrize("given", ["bytes=0-1,5-6", "bytes=x", "lines=1-2", "bytes=5-2", ""])
def test_several_ranges_and_what_is_none_get_the_whole(cached: Cached, given: str) -> None:
    depot = hit(cached)
    answer = cached.ask(cached.serves(depot), {"Range": given})
    assert (answer.status, answer.body) == (200, depot.content)
    assert "content-range" not in answer.headers


@pytest.mark.parametrize("given", ["bytes=3145728-", "bytes=99999999-"])
def test_a_range_outside_is_refused_with_the_size(cached: Cached, given: str) -> None:
    answer = cached.ask(cached.serves(hit(cached)), {"Range": given})
    assert (answer.status, answer.code) == (416, "RANGE_INVALID")
    assert answer.headers["content-range"] == f"bytes */{3 * MIB}"


def test_a_head_says_what_a_get_would(cached: Cached) -> None:
    depot = hit(cached)
    path = cached.serves(depot)
    get = cached.ask(path)
    for headers in ({}, {"Range": "bytes=1-2"}):
        head = cached.ask(path, headers, "HEAD")
        assert (head.status, head.body) == (200, b"")
        different = {"age", "date"}
        assert {k: v for k, v in head.headers.items() if k not in different} == {
            k: v for k, v in get.headers.items() if k not in different
        }
    assert depot.asked == []


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("form", ['"{}"', 'W/"{}"', '"x", "{}"', "*"])
def test_a_client_that_has_it_gets_304(cached: Cached, method: str, form: str) -> None:
    depot = hit(cached)
    answer = cached.ask(cached.serves(depot), {"If-None-Match": form.format(depot.digest)}, method)
    assert (answer.status, answer.body, answer.headers["etag"]) == (304, b"", f'"{depot.digest}"')


def test_a_connection_goes_on_after_each_kind_of_hit(cached: Cached) -> None:
    depot = hit(cached)
    path = cached.serves(depot)
    request = "{} {} HTTP/1.1\r\nHost: m\r\n{}\r\n"
    asks = [("HEAD", ""), ("GET", f'If-None-Match: "{depot.digest}"\r\n'), ("GET", "Range: bytes=9-9\r\n"), ("GET", "")]
    text = "".join(request.format(method, path, more) for method, more in [*asks, ("GET", "Connection: close\r\n")])
    received = send_raw(cached.mirror, text.encode())
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200", b"304", b"206", b"200", b"200"]
    assert received.count(b"\r\nDate: ") == 5
    assert received.endswith(depot.content)


@pytest.mark.parametrize(("tag", "status"), [('"{}"', 206), ('"x"', 200)])
def test_a_range_is_for_the_blob_that_the_client_has_begun(cached: Cached, tag: str, status: int) -> None:
    depot = hit(cached)
    headers = {"Range": "bytes=5-", "If-Range": tag.format(depot.digest)}
    answer = cached.ask(cached.serves(depot), headers)
    assert (answer.status, answer.body) == (status, depot.content[5 if status == 206 else 0 :])


def test_the_access_line_tells_the_bytes_and_the_cache(cached: Cached) -> None:
    depot = hit(cached)
    path, since = cached.serves(depot), cached.mirror.mark()
    cached.ask(path)
    cached.ask(path, {"Range": "bytes=5-104"})
    cached.ask(path, method="HEAD")
    cached.mirror.wait_for_requests(3, since)
    lines = re.findall(r'" (\d+) (\d+|-) [\d.]+ (\S+) (\S+)$', cached.mirror.log(since), re.M)
    expected = [("200", str(3 * MIB), "-", "HIT"), ("206", "100", "-", "HIT"), ("200", "0", "-", "HIT")]
    assert [(status, count.replace("-", "0"), host, label) for status, count, host, label in lines] == expected


def test_a_slowed_client_is_slowed_at_a_hit_too(tmp_path: Path) -> None:
    depot = Depot(content("slow", MIB))
    with cached_lab(tmp_path / "cache", client_bandwidth="1M") as lab:
        slowed = Cached(lab, tmp_path / "cache")
        path = slowed.serves(depot)
        for _ in range(3):
            assert slowed.ask(path).body == depot.content
            assert slowed.has(depot)

        def lines() -> list[tuple[str, str, str]]:
            return re.findall(r'/blobs/\S+" 200 (\d+) ([\d.]+) \S+ (\S+)$', slowed.mirror.log(), re.M)

        assert poll(lambda: len(lines()) == 3, 5)
        assert [(int(count), label) for count, _, label in lines()] == [(MIB, "MISS"), (MIB, "HIT"), (MIB, "HIT")]
        assert sum(float(seconds) for _, seconds, _ in lines()) > 1, "3 MiB at 1 MiB/s: a lower bound"


def test_what_only_some_clients_may_have_is_kept_by_no_one_else(strict: Cached) -> None:
    depot = Depot(content("limited", 1000))
    answer = strict.ask(strict.serves(depot))
    assert answer.headers["cache-control"] == "private, max-age=31536000, immutable"


# Who may see what


def test_a_private_image_pulled_by_a_logged_in_client_is_for_nobody_else(hub: Hub, tmp_path: Path) -> None:
    repository = hub.repositories["private/app"]
    with Mirror(registries=hub.registries_file, cache_dir=tmp_path / "cache", cache_min_free=0) as mirror:
        query = {"service": "hub.test", "scope": f"repository:{repository.name}:pull"}
        with requests.Session() as session:
            session.trust_env = False
            given = session.get(f"{mirror.url}/token", params=query, auth=(USER, PASSWORD)).json()
        own = {"Authorization": f"Bearer {given['token']}"}
        for _ in range(2):
            assert set(pulled_privately(mirror, repository, own)) == {"BYPASS"}
        assert not [file for file in (tmp_path / "cache").rglob("*") if len(file.name) > 60]
        for kind, digest in (("manifests", repository.top().digest), ("blobs", repository.local().config.digest)):
            assert requests.get(f"{mirror.url}/v2/{repository.name}/{kind}/{digest}", timeout=9).status_code == 401
        assert requests.get(f"{mirror.url}/v2/{repository.name}/manifests/latest", timeout=9).status_code == 401


def pulled_privately(mirror: Mirror, repository: Repository, own: dict[str, str]) -> list[str]:
    return [label or "BYPASS" for label in pulled(mirror, repository, own)]


def test_a_logged_in_client_is_not_served_from_the_cache(cached: Cached) -> None:
    depot = hit(cached)
    path = cached.serves(depot)
    answer = cached.ask(path, {"Authorization": "Bearer its-own"})
    assert (answer.body, answer.headers["x-cache"]) == (depot.content, "BYPASS")
    assert [request.headers["authorization"] for request in depot.asked] == ["Bearer its-own"]


def test_image_rules_are_asked_before_the_cache(tmp_path: Path) -> None:
    depot = Depot(content("rules", 1000))
    folder = tmp_path / "cache"
    with cached_lab(folder) as lab:
        cached = Cached(lab, folder)
        path = cached.serves(depot)
        assert lab.ask(path).body == depot.content
        assert cached.has(depot)
        assert lab.ask(path).headers["x-cache"] == "HIT"
    with cached_lab(folder, deny_images="docker.io/library/app") as lab:
        for method in ("GET", "HEAD"):
            assert lab.ask(path, method=method).status == 403
        assert lab.ask(path.replace("/app/", "/other/")).headers["x-cache"] == "HIT"


# One download


def test_twenty_clients_share_one_download(cached: Cached) -> None:
    depot = Depot(content("shared"), pause=MIB)
    answers = twenty_at_once(cached, depot)
    assert [answer.body == depot.content for answer in answers] == [True] * 20
    labels = sorted(answer.headers["x-cache"] for answer in answers)
    assert labels == ["JOIN"] * 19 + ["MISS"]
    assert len(depot.asked) == 1


def twenty_at_once(cached: Cached, depot: Depot) -> list[Reply]:
    """Let twenty clients read up to the place where upstream pauses, and then all the rest."""
    path = cached.serves(depot)
    together = threading.Barrier(20, depot.go.set, PATIENCE)

    def ask() -> Reply:
        with Reading(cached.mirror, path) as reading:
            body = reading.read(depot.pause)
            together.wait()
            return Reply(reading.status, reading.headers, body + reading.read())

    return at_once(*[ask] * 20)


def test_two_workers_share_one_download(pair: Cached) -> None:
    depot = Depot(content("workers"), pause=MIB)
    since = pair.mirror.mark()
    answers = twenty_at_once(pair, depot)
    assert [answer.body == depot.content for answer in answers] == [True] * 20
    assert len(depot.asked) == 1
    assert "failed" not in pair.mirror.log(since)


def test_one_who_comes_later_gets_what_is_there_at_once(cached: Cached) -> None:
    depot = Depot(content("later"), pause=2 * MIB)
    path = cached.serves(depot)
    with Reading(cached.mirror, path) as first:
        assert first.read(2 * MIB) == depot.content[: 2 * MIB]
        part = cached.ask(path, {"Range": "bytes=1000-1999"})
        assert (part.status, part.body) == (206, depot.content[1000:2000])
        head = cached.ask(path, method="HEAD")
        assert (head.status, head.headers["content-length"]) == (200, str(3 * MIB))
        assert {answer.headers["x-cache"] for answer in (part, head)} == {"JOIN"}
        with Reading(cached.mirror, path, {"Range": "bytes=-10"}) as last, Reading(cached.mirror, path) as whole:
            assert whole.read(2 * MIB) == depot.content[: 2 * MIB]
            depot.go.set()
            assert last.read() == depot.content[-10:]
            assert whole.read() == first.read() == depot.content[2 * MIB :]
    assert len(depot.asked) == 1


def test_a_range_of_what_is_not_there_yet_brings_the_whole(cached: Cached) -> None:
    depot = Depot(content("part"))
    answer = cached.ask(cached.serves(depot), {"Range": "bytes=5-14"})
    assert (answer.status, answer.body, answer.headers["x-cache"]) == (206, depot.content[5:15], "MISS")
    assert cached.has(depot)
    assert depot.ranges == [None]


def test_the_download_goes_on_when_its_client_leaves(cached: Cached) -> None:
    depot = Depot(content("leaves"), pause=MIB)
    with Reading(cached.mirror, cached.serves(depot)) as reading:
        reading.read(MIB)
    depot.go.set()
    assert cached.has(depot)
    assert len(depot.asked) == 1


def test_a_client_that_leaves_does_not_disturb_the_next_one(strict: Cached) -> None:
    depot = Depot(content("disturbed", 2 * MIB), pause=MIB)
    path = strict.serves(depot)
    with Reading(strict.mirror, path) as first:
        first.read(MIB)
        second = Reading(strict.mirror, path)
    with second:
        depot.go.set()
        assert second.read() == depot.content
    assert len(depot.asked) == 1


def test_the_download_stops_with_its_client_and_is_gone_on_with(strict: Cached) -> None:
    depot = Depot(content("stops", 2 * MIB), pause=MIB)
    path, since = strict.serves(depot), strict.mirror.mark()
    with Reading(strict.mirror, path) as reading:
        reading.read(MIB)
        part = strict.file(depot.digest, ".part")
        assert poll(lambda: part.stat().st_size >= MIB, 5)
    assert strict.mirror.wait_for_requests(1, since), "it has left"
    depot.go.set()
    assert poll(lambda: is_let_go(strict, depot), 5)
    at = part.stat().st_size
    assert strict.ask(path).body == depot.content
    assert strict.has(depot)
    assert depot.ranges == [None, f"bytes={at}-"]
    assert f"went on at byte {at} of {depot.digest}" in strict.mirror.log(since)
    assert strict.file(depot.digest).read_bytes() == depot.content


def is_let_go(cached: Cached, depot: Depot) -> bool:
    """Tell whether no process writes a blob any more: its part is not locked."""
    found = os.stat(cached.file(depot.digest, ".part"))
    return f":{found.st_ino} " not in Path("/proc/locks").read_text()


def test_a_cut_download_goes_on_where_it_broke_off(cached: Cached) -> None:
    depot = Depot(content("cut"), cut=1_000_000)
    answer = cached.ask(cached.serves(depot))
    assert (answer.status, answer.body) == (200, depot.content)
    assert cached.has(depot)
    assert depot.ranges == [None, "bytes=1000000-", "bytes=2000000-", "bytes=3000000-"]


def test_after_a_kill_only_the_rest_is_fetched(tmp_path: Path) -> None:
    depot = Depot(content("killed"), pause=2 * MIB)
    with cached_lab(tmp_path / "cache") as lab:
        cached = Cached(lab, tmp_path / "cache")
        path = cached.serves(depot)
        with Reading(cached.mirror, path) as reading:
            reading.read(2 * MIB)
            (worker,) = cached.mirror.pids()[1:]
            os.kill(worker, signal.SIGKILL)
            with pytest.raises(BROKEN):
                reading.read()
        depot.go.set()
        assert poll(lambda: cached.mirror.pids()[1:] not in ([], [worker]), 10)
        assert cached.ask(path).body == depot.content
        assert depot.ranges[0] is None
        assert depot.ranges[1:] == [f"bytes={2 * MIB}-"]
        assert cached.has(depot)
        assert poll(lambda: (tmp_path / "cache/usage").read_text().strip() == str(3 * MIB), 5)


def test_a_worker_that_dies_does_not_break_the_pulls_of_the_other(pair: Cached) -> None:
    depot = Depot(content("dies", 3 * MIB), pause=MIB)
    path = pair.serves(depot)
    workers = pair.mirror.pids()[1:]
    readings = [Reading(pair.mirror, path) for _ in range(12)]
    bodies = [reading.read(MIB) for reading in readings]
    depot.pause = None
    os.kill(writer(pair, depot), signal.SIGKILL)
    results = []
    for reading, body in zip(readings, bodies, strict=True):
        with reading:
            try:
                results.append(body + reading.read() == depot.content)
            except BROKEN:
                results.append(False)
    depot.go.set()
    assert poll(lambda: len(pair.mirror.pids()) == 3 and pair.mirror.pids()[1:] != workers, 10)
    joined = [reading.headers["x-cache"] for reading in readings]
    assert joined.count("MISS") == 1
    if True not in results:
        pytest.skip("one worker had all the clients")
    assert pair.ask(path).body == depot.content


def writer(cached: Cached, depot: Depot) -> int:
    """Return the process that downloads a blob."""
    inode = cached.file(depot.digest, ".part").stat().st_ino
    found = re.search(rf"FLOCK +ADVISORY +WRITE (\d+) \S+:{inode} ", Path("/proc/locks").read_text())
    assert found is not None
    return int(found[1])


def test_two_workers_evict_at_once_and_every_pull_is_right(pair: Cached) -> None:
    depots = [Depot(content(f"evict-{number}", MIB)) for number in range(8)]
    paths = [pair.serves(depot) for depot in depots]
    since = pair.mirror.mark()
    for _ in range(4):
        answers = at_once(*[lambda path=path: pair.ask(path) for path in paths * 2])
        assert sorted(digest_of(answer.body) for answer in answers) == sorted(depot.digest for depot in depots * 2)
    files = [file for file in (pair.folder / "blobs").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 3500 << 10
    assert "went on" not in pair.mirror.log(since)
    assert "Traceback" not in pair.mirror.log(since)


# Wrong bytes


@pytest.mark.parametrize("wrong", [0, 1_500_000, 3 * MIB - 1])
def test_wrong_bytes_never_end_well_and_are_never_kept(cached: Cached, wrong: int) -> None:
    depot = Depot(content(f"wrong {wrong}"), wrong=wrong)
    path = cached.serves(depot)
    with pytest.raises(BROKEN):
        cached.ask(path)
    assert poll(lambda: not left(cached, depot), 5)
    depot.wrong = None
    assert cached.ask(path).body == depot.content


def left(cached: Cached, depot: Depot) -> list[str]:
    """Return the names of what is there of a blob."""
    file = cached.file(depot.digest)
    return [found.name for found in file.parent.glob(f"{file.name}*")]


def test_wrong_bytes_never_end_well_for_those_who_joined(pair: Cached) -> None:
    depot = Depot(content("joined"), wrong=5, pause=MIB)
    path = pair.serves(depot)
    readings = [Reading(pair.mirror, path) for _ in range(8)]
    depot.go.set()
    for reading in readings:
        with reading, pytest.raises(BROKEN):
            reading.read()
    assert len(depot.asked) == 1
    assert poll(lambda: not left(pair, depot), 5)


def test_a_spoilt_part_of_an_earlier_run_is_thrown_away(cached: Cached) -> None:
    depot = Depot(content("spoilt"))
    path = cached.serves(depot)
    begun(cached, depot, bytes(MIB))
    with pytest.raises(BROKEN):
        cached.ask(path)
    assert poll(lambda: not left(cached, depot), 5)
    assert cached.ask(path).body == depot.content
    assert depot.ranges == [f"bytes={MIB}-", None]


def begun(cached: Cached, depot: Depot, part: bytes) -> None:
    """Leave a part as an earlier run would."""
    cached.file(depot.digest).parent.mkdir(parents=True, exist_ok=True)
    cached.file(depot.digest, ".part").write_bytes(part)
    cached.file(depot.digest, ".size").write_text(size_note(len(depot.content)))


def size_note(size: int) -> str:
    """Return how the store notes a size: with the time at which this host was started."""
    return f"{size} {int(time.time() - time.clock_gettime(time.CLOCK_BOOTTIME))}\n"


@pytest.mark.parametrize("wrong", [False, True])
def test_a_part_that_is_whole_is_kept_only_if_it_is_right(cached: Cached, wrong: bool) -> None:
    depot = Depot(content(f"whole {wrong}"))
    begun(cached, depot, bytes(len(depot.content)) if wrong else depot.content)
    assert cached.ask(cached.serves(depot)).body == depot.content
    assert cached.has(depot)
    assert len(depot.asked) == (1 if wrong else 0)


@pytest.mark.parametrize("failure", ["ignores Range", "has another size", "refuses"])
def test_a_part_whose_rest_is_not_to_be_had_is_begun_anew(cached: Cached, failure: str) -> None:
    depot = Depot(content(f"anew {failure}"))
    path = cached.serves(depot)
    begun(cached, depot, depot.content[:MIB])
    if failure == "has another size":
        cached.file(depot.digest, ".size").write_text(size_note(9_999_999))
    else:
        whole, refused = reply(200, depot.content), reply(416, b"", {"Content-Range": "bytes */1"})

        def answer(request: Any, connection: Any) -> None:
            depot.asked.append(request)
            connection.sendall(refused if failure == "refuses" and "range" in request.headers else whole)

        cached.lab.upstream.answers[f"/v2/library{path.removeprefix('/v2')}"] = answer
    assert cached.ask(path).body == depot.content
    assert cached.has(depot)


def test_a_part_whose_rest_comes_encoded_is_not_gone_on_with(cached: Cached) -> None:
    depot = Depot(content("encoded rest"), headers={"Content-Encoding": "x-odd"})
    begun(cached, depot, depot.content[:MIB])
    answer = cached.ask(cached.serves(depot))
    assert (answer.status, answer.body) == (200, depot.content)
    assert (answer.headers["content-encoding"], answer.headers["x-cache"]) == ("x-odd", "BYPASS")


def test_an_upstream_with_nothing_to_send_poisons_nothing(cached: Cached) -> None:
    for number in range(10):
        depot = Depot(content(f"nothing {number}"))
        path = cached.serves(depot)
        cached.lab.upstream.answers[f"/v2/library{path.removeprefix('/v2')}"] = reply(200, b"")
        answer = cached.ask(path)
        assert (answer.status, answer.code) == (502, "UNAVAILABLE")
        again = cached.ask(cached.serves(depot))  # though the first download may not quite have ended
        assert (again.status, again.body == depot.content) == (200, True)
        assert poll(lambda depot=depot: cached.has(depot), 5)  # type: ignore[misc]


def test_the_empty_blob_is_kept(cached: Cached) -> None:
    depot = Depot(b"")
    path = cached.serves(depot)
    cached.lab.upstream.answers[f"/v2/library{path.removeprefix('/v2')}"] = reply(200, b"")
    for _ in range(2):
        answer = cached.ask(path)
        assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "0")
        assert cached.has(depot)
    assert answer.headers["x-cache"] == "HIT"


def test_verifying_and_keeping_go_together(strict: Cached) -> None:
    depot = Depot(content("verified", 2 * MIB), wrong=2 * MIB - 1)
    path = strict.serves(depot)
    with pytest.raises(BROKEN):
        strict.ask(path)
    depot.wrong = None
    assert strict.ask(path).body == depot.content
    assert strict.has(depot)
    assert strict.ask(path).headers["x-cache"] == "HIT"
    passing = Depot(content("too large and wrong", 3 * MIB), wrong=3 * MIB - 1)
    with pytest.raises(BROKEN):
        strict.ask(strict.serves(passing))


# What is not kept


@pytest.mark.parametrize(
    ("digest", "headers"),
    [
        (None, {"Transfer-Encoding": "chunked"}),
        (None, {"Content-Encoding": "gzip", "Content-Length": "1000"}),
        ("sha384", {"Content-Length": "1000"}),
    ],
    ids=["no length", "encoded", "another digest"],
)
def test_what_cannot_be_kept_passes_through(cached: Cached, digest: str | None, headers: dict[str, str]) -> None:
    data = content(f"{headers}", 1000)
    depot = Depot(data, f"{digest}:{hashlib.new(digest, data).hexdigest()}" if digest else "")
    path = cached.serves(depot)
    body = b"3e8\r\n%s\r\n0\r\n\r\n" % data if "Transfer-Encoding" in headers else data
    cached.lab.upstream.answers[f"/v2/library{path.removeprefix('/v2')}"] = reply(200, body, headers)
    answers = at_once(*[lambda: cached.ask(path)] * 3)
    assert [answer.body for answer in answers] == [data] * 3
    assert {answer.headers["x-cache"] for answer in answers} == {"BYPASS"}
    assert answers[0].headers.get("content-encoding") == headers.get("Content-Encoding")
    assert poll(lambda: not left(cached, depot), 5)


def test_what_is_larger_than_the_cache_passes_through(strict: Cached) -> None:
    depot = Depot(content("larger", 3 * MIB))
    path = strict.serves(depot)
    since = strict.mirror.mark()
    answers = at_once(*[lambda: strict.ask(path)] * 3)
    assert [answer.body == depot.content for answer in answers] == [True] * 3
    assert {answer.headers["x-cache"] for answer in answers} == {"BYPASS"}
    part = strict.ask(path, {"Range": "bytes=5-"})
    assert part.body in (depot.content, depot.content[5:])
    assert left(strict, depot) == []
    assert "the cache fails" not in strict.mirror.log(since)
    assert strict.ask("/healthz").json == {"status": "ok"}


def test_a_part_that_has_become_too_large_passes_through_from_its_first_byte_on(strict: Cached) -> None:
    depot = Depot(content("grown", 4 * MIB))
    begun(strict, depot, depot.content[:MIB])
    answer = strict.ask(strict.serves(depot))
    assert (answer.status, answer.body == depot.content) == (200, True)


def test_a_sha512_digest_is_kept_as_well(cached: Cached) -> None:
    data = content("sha512")
    depot = Depot(data, f"sha512:{hashlib.sha512(data).hexdigest()}")
    path = cached.serves(depot)
    assert cached.ask(path).body == data
    assert cached.has(depot)
    answer = cached.ask(path)
    assert (answer.body, answer.headers["x-cache"]) == (data, "HIT")
    assert answer.headers["docker-content-digest"] == depot.digest


@pytest.mark.parametrize("named", [True, False])
def test_a_signed_manifest_passes_through(cached: Cached, named: bool) -> None:
    headers = {"Content-Type": SIGNED} | ({"Docker-Content-Digest": digest_of(b"without signatures")} if named else {})
    cached.lab.upstream.answers[cached.lab.manifest] = reply(200, b'{"schemaVersion": 1}', headers)
    for _ in range(2):
        answer = cached.ask(cached.lab.path, ACCEPT)
        assert (answer.status, answer.body, answer.headers["content-type"]) == (200, b'{"schemaVersion": 1}', SIGNED)
        assert answer.headers.get("docker-content-digest") == headers.get("Docker-Content-Digest")
        assert answer.headers["x-cache"] == "BYPASS"
    assert len(cached.lab.upstream.asked(cached.lab.manifest)) == 2


# Failures


def test_an_error_reaches_all_who_wait_but_another_repository_is_asked_for_itself(cached: Cached) -> None:
    depot = Depot(content("error"))
    missing = Depot(depot.content)
    here, there = cached.serves(missing), cached.serves(depot, "elsewhere")
    answering = reply_json(404, {"errors": [{"code": "BLOB_UNKNOWN", "message": "gone"}]})

    def refuse(request: Any, connection: Any) -> None:
        missing.asked.append(request)
        missing.go.wait(2)
        connection.sendall(answering)

    cached.lab.upstream.answers[f"/v2/library{here.removeprefix('/v2')}"] = refuse
    asks = [lambda: cached.ask(here)] * 3

    def ask_elsewhere() -> Reply:
        assert poll(lambda: bool(missing.asked), 5)
        try:
            with Reading(cached.mirror, there) as reading:
                return Reply(reading.status, reading.headers, reading.read())
        finally:
            depot.go.set()

    def let_go() -> Reply:
        assert poll(lambda: bool(missing.asked), 5)
        poll(lambda: False, 0.5)
        missing.go.set()
        return Reply(0, {}, b"")

    answers = at_once(*asks, ask_elsewhere, let_go)
    assert sorted(answer.status for answer in answers) == [0, 200, 404, 404, 404]
    assert {answer.code for answer in answers if answer.status == 404} == {"BLOB_UNKNOWN"}
    assert (len(missing.asked), len(depot.asked)) == (1, 1)


def test_a_failed_download_is_begun_anew_by_the_next_client(cached: Cached) -> None:
    depot = Depot(content("failed"))
    path = cached.serves(depot)
    cached.is_down()
    assert cached.ask(path).status == 502
    assert poll(lambda: not left(cached, depot), 5)
    ready(cached)
    assert cached.ask(cached.serves(depot)).body == depot.content


def test_a_line_that_stays_cut_breaks_the_pull_and_the_next_one_goes_on(cached: Cached) -> None:
    depot = Depot(content("stays cut"), cut=MIB)
    path = cached.serves(depot)
    served = cached.lab.upstream.answers.pop(f"/v2/library{path.removeprefix('/v2')}")

    def once(request: Any, connection: Any) -> None:
        if not depot.asked:
            depot(request, connection)

    cached.lab.upstream.answers[f"/v2/library{path.removeprefix('/v2')}"] = once
    with pytest.raises(BROKEN):
        cached.ask(path)
    depot.cut = None
    cached.lab.upstream.answers[f"/v2/library{path.removeprefix('/v2')}"] = served
    assert cached.ask(path).body == depot.content
    assert depot.ranges == [None, f"bytes={MIB}-"]


def test_a_kept_blob_that_is_deleted_is_fetched_anew(cached: Cached) -> None:
    depot = Depot(content("deleted"))
    path = cached.serves(depot)
    for _ in range(2):
        assert cached.ask(path).body == depot.content
        assert cached.has(depot)
        cached.file(depot.digest).unlink()
    assert len(depot.asked) == 2


def test_a_kept_blob_that_is_shortened_while_it_is_sent_ends_with_bytes_from_upstream(cached: Cached) -> None:
    depot = Depot(content("shortened", 20 * MIB))
    path = cached.serves(depot)
    assert cached.ask(path).body == depot.content
    assert cached.has(depot)
    with Reading(cached.mirror, path) as reading:
        body = reading.read(MIB)
        os.truncate(cached.file(depot.digest), 15 * MIB)
        assert body + reading.read() == depot.content
    cached.file(depot.digest).unlink()
    assert depot.ranges in ([None, f"bytes={15 * MIB}-{20 * MIB - 1}"], [None])


def test_all_is_well(cached: Cached) -> None:
    assert cached.ask("/healthz").json == {"status": "ok"}
    assert "the cache fails" not in cached.mirror.log()
