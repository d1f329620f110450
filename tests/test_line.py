"""A pull over a bad line: the right bytes in one unbroken answer, or a broken connection; never a clean short body."""

import hashlib
import http.client
import json
import re
import socket
from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
from clients import Dockerd
from conftest import needs
from hub import BLOBS
from hub import Hub
from hub import write_registries
from images import MB
from images import MIB
from images import OCI_INDEX
from images import Content
from images import Repository
from images import digest_of
from images import large_repository
from lab import ask
from line import CloseNotify
from line import Corrupt
from line import Cut
from line import Distance
from line import DistantHub
from line import Drip
from line import ExpiringAddresses
from line import Fault
from line import IgnoreRange
from line import Midway
from line import NewETag
from line import Reset
from line import ShiftRange
from line import SignedAddresses
from line import Stall
from line import WrongLength
from line import exponential
from line import uniform
from processes import poll
from pulls import blobs
from pulls import pulled_by_containerd
from pulls import pulled_by_docker
from serving import Mirror

REPOSITORY = "library/line"
SIZE = 8 * MIB
TRIES = 5  # without progress, after which the mirror gives up
TAG = "/v2/library/tagged/manifests/latest"


class Blob(NamedTuple):
    """Hold a blob of the hub."""

    digest: str
    data: bytes

    @property
    def path(self) -> str:
        """Return the path at which a client asks for it."""
        return f"/v2/{REPOSITORY}/blobs/{self.digest}"

    @property
    def key(self) -> str:
        """Return what is part of its path everywhere, at the CDN too."""
        return self.digest.removeprefix("sha256:")


class Pulled(NamedTuple):
    """Hold what a client got: `size` and `digest` are those of the bytes that came before the end."""

    status: int
    length: int
    content_range: str | None
    size: int
    digest: str

    @property
    def is_whole(self) -> bool:
        """Tell whether the body came to its end."""
        return self.size == self.length


def pull(mirror: Mirror, path: str, **headers: str) -> Pulled:
    """Ask the mirror, count what comes and hash it."""
    connection = http.client.HTTPConnection("127.0.0.1", mirror.port, timeout=60)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        size, digest = 0, hashlib.sha256()
        try:
            while block := response.read(65536):
                size += len(block)
                digest.update(block)
        except ConnectionResetError:
            pass
        length, content_range = int(response.headers["Content-Length"]), response.headers.get("Content-Range")
        return Pulled(response.status, length, content_range, size, f"sha256:{digest.hexdigest()}")
    finally:
        connection.close()


def whole(blob: Blob) -> Pulled:
    """Return what a client must get that asks for the whole blob."""
    return Pulled(200, len(blob.data), None, len(blob.data), blob.digest)


def asked_ranges(distant: DistantHub, blob: Blob) -> list[str]:
    """Return the ranges of a blob that the CDN was asked for, "" for the whole."""
    return [request.range for request in distant.cdn.asked(blob.key)]


def resumed(mirror: Mirror, since: int) -> list[int]:
    """Return the bytes at which the log says that a transfer was resumed."""
    return [int(at) for at in re.findall(r"broke off: went on at byte (\d+)", mirror.log(since))]


def gave_up(mirror: Mirror, since: int) -> int:
    """Return how many transfers the log says to have broken off for good."""
    return len(re.findall(r"broke off(?!: went on)", mirror.log(since)))


@pytest.fixture(scope="module")
def distant(hub: Hub) -> Iterator[DistantHub]:
    with DistantHub(hub) as running:
        yield running


@pytest.fixture(scope="module")
def mirror(distant: DistantHub) -> Iterator[Mirror]:
    with Mirror(registries=distant.registries_file, idle_timeout=1) as running:
        yield running


@pytest.fixture(scope="module")
def verifying(distant: DistantHub) -> Iterator[Mirror]:
    with Mirror(registries=distant.registries_file, idle_timeout=1, verify="on") as running:
        yield running


@pytest.fixture(autouse=True)
def _good_lines(distant: DistantHub) -> None:
    distant.forget()


def add(hub: Hub, size: int) -> Blob:
    digest = hub.add_blob(REPOSITORY, size)
    key = digest.removeprefix("sha256:")
    return Blob(digest, (hub.storage / BLOBS / key[:2] / key / "data").read_bytes())


@pytest.fixture(scope="module")
def blob(hub: Hub) -> Blob:
    return add(hub, SIZE)


# The whole blob


@pytest.mark.parametrize(
    ("kind", "after", "times"),
    [
        (Cut, exponential(MIB), None),
        (Cut, uniform(0, 2 * MIB), None),
        (CloseNotify, exponential(MIB), None),
        (Reset, exponential(MIB), None),
        (Reset, 300_000, None),
        (Stall, uniform(0, MIB), 2),
    ],
    ids=["cuts", "cuts evenly", "ends", "resets", "resets evenly", "stalls"],
)
def test_a_blob_comes_whole_and_in_one_piece_over_a_line_that_breaks(
    mirror: Mirror, distant: DistantHub, blob: Blob, kind: type[Midway], after: Distance | int, times: int | None
) -> None:
    fault = kind(after, times=times)
    distant.cdn.faults = [fault]
    since = mirror.mark()
    assert pull(mirror, blob.path) == whole(blob)
    places = resumed(mirror, since)
    assert len(places) >= fault.applied > 1
    assert places == sorted(places)
    assert asked_ranges(distant, blob) == ["", *(f"bytes={at}-" for at in places)]
    assert len(mirror.wait_for_requests(1, since)) == 1
    assert "Traceback" not in mirror.log(since)


@pytest.mark.parametrize("at", [0, 1, SIZE - 1])
def test_a_cut_is_resumed_wherever_it_is(mirror: Mirror, distant: DistantHub, blob: Blob, at: int) -> None:
    distant.cdn.faults = [Cut(at, times=1)]
    since = mirror.mark()
    assert pull(mirror, blob.path) == whole(blob)
    assert resumed(mirror, since) == [at]
    assert asked_ranges(distant, blob) == ["", f"bytes={at}-"]


def test_a_cut_in_a_short_rest_is_resumed_too(mirror: Mirror, distant: DistantHub, blob: Blob) -> None:
    """The mirror reads a short body before it goes on: this cut spoils the try, not the answer."""
    rest = 10_000
    distant.cdn.faults = [Cut(SIZE - rest, times=1), Cut(rest // 2, above=0, ranged=True, times=1)]
    since = mirror.mark()
    assert pull(mirror, blob.path) == whole(blob)
    assert resumed(mirror, since) == [SIZE - rest]
    assert asked_ranges(distant, blob) == ["", *[f"bytes={SIZE - rest}-"] * 2]


def test_a_slow_drip_is_waited_for(mirror: Mirror, distant: DistantHub, blob: Blob) -> None:
    distant.cdn.faults = [Drip(MIB)]
    since = mirror.mark()
    assert pull(mirror, blob.path) == whole(blob)
    assert resumed(mirror, since) == []


def test_what_comes_before_a_stall_counts_as_progress(hub: Hub, mirror: Mirror, distant: DistantHub) -> None:
    """By then the mirror reads so much at once that all of it comes too late, if it does not come to less."""
    blob = add(hub, 1_600_000 + 700_000)
    distant.cdn.faults = [Stall(1_600_000, ranged=False), Stall(200_000, ranged=True)]
    assert pull(mirror, blob.path) == whole(blob)


def test_a_server_that_ignores_range_sends_again_what_is_skipped(
    mirror: Mirror, distant: DistantHub, blob: Blob
) -> None:
    distant.cdn.faults = [IgnoreRange(), Cut(3 * MIB, times=1), Cut(5 * MIB, ranged=True, times=1)]
    since = mirror.mark()
    assert pull(mirror, blob.path) == whole(blob)
    assert resumed(mirror, since) == [3 * MIB, 5 * MIB]


def test_a_rest_with_too_short_a_length_is_refused_and_asked_for_again(
    mirror: Mirror, distant: DistantHub, blob: Blob
) -> None:
    distant.cdn.faults = [Cut(MIB, times=1), WrongLength(-5, ranged=True, times=1)]
    assert pull(mirror, blob.path) == whole(blob)
    assert asked_ranges(distant, blob) == ["", *[f"bytes={MIB}-"] * 2]


def test_another_range_is_refused_and_asked_for_again(mirror: Mirror, distant: DistantHub, blob: Blob) -> None:
    distant.cdn.faults = [Cut(MIB, times=1), ShiftRange(1, times=1)]
    assert pull(mirror, blob.path) == whole(blob)
    assert asked_ranges(distant, blob) == ["", *[f"bytes={MIB}-"] * 2]


def test_the_registry_is_asked_for_a_new_address_each_time(mirror: Mirror, distant: DistantHub, blob: Blob) -> None:
    signed = SignedAddresses()
    expiring = ExpiringAddresses(signed)
    distant.registry.faults = [signed]
    distant.cdn.faults = [expiring, Cut(exponential(MIB))]
    since = mirror.mark()
    assert pull(mirror, blob.path) == whole(blob)
    assert expiring.applied == 0
    requests = distant.cdn.asked(blob.key)
    assert len(requests) == len({request.query for request in requests}) == 1 + len(resumed(mirror, since)) > 2
    assert len(distant.registry.asked(blob.digest)) >= len(requests)
    assert "signature" not in mirror.log(since)


def test_the_next_endpoint_serves_as_well(hub: Hub, distant: DistantHub, blob: Blob) -> None:
    table = distant.table() | {"endpoints": [distant.registry.url, hub.registry_url]}
    hub.forget()
    distant.cdn.faults = [Cut(MIB, ranged=False), Cut(0, ranged=True)]
    file = write_registries(distant.folder / "two.toml", {"docker.io": table})
    with Mirror(registries=file) as mirror:
        since = mirror.mark()
        assert pull(mirror, blob.path) == whole(blob)
        assert f"went on at byte {MIB} with {hub.cdn_url.removeprefix('https://')}" in mirror.log(since)
    assert [request.range for request in hub.cdn_requests() if f"{blob.key}/data" in request.path][
        -1
    ] == f"bytes={MIB}-"


def test_a_login_is_used_for_the_rest_too_and_goes_to_the_registry_only(
    hub: Hub, mirror: Mirror, distant: DistantHub
) -> None:
    digest = hub.add_blob("private/line", SIZE)
    distant.cdn.faults = [Cut(exponential(MIB))]
    hub.tokens.requests.clear()
    since = mirror.mark()
    pulled = pull(mirror, f"/v2/private/line/blobs/{digest}", **hub.tokens.push_authorization("private/line"))
    assert pulled == Pulled(200, SIZE, None, SIZE, digest)
    assert len(distant.registry.asked(digest)) == 1 + len(resumed(mirror, since)) > 2
    assert all(request.authorized for request in distant.registry.requests)
    assert not any(request.authorized for request in distant.cdn.requests)
    assert not hub.tokens.requests


def test_a_connection_serves_the_next_request_after_a_resumed_answer(
    mirror: Mirror, distant: DistantHub, blob: Blob
) -> None:
    distant.cdn.faults = [Cut(MIB, times=2)]
    connection = http.client.HTTPConnection("127.0.0.1", mirror.port, timeout=60)
    for _ in range(2):
        connection.request("GET", blob.path)
        assert digest_of(connection.getresponse().read()) == blob.digest
    connection.close()


def test_a_client_that_leaves_while_the_mirror_tries_again_ends_the_tries(distant: DistantHub, blob: Blob) -> None:
    """By default the pauses between the tries are of 1 to 8 seconds."""
    broken = Cut(0, ranged=True)
    distant.cdn.faults = [Cut(100_000, ranged=False), broken]
    with Mirror(registries=distant.registries_file) as mirror:
        since = mirror.mark()
        with socket.create_connection(("127.0.0.1", mirror.port), timeout=30) as client:
            client.sendall(f"GET {blob.path} HTTP/1.1\r\nHost: m\r\n\r\n".encode())
            assert poll(lambda: broken.applied > 0, 10)
        assert len(mirror.wait_for_requests(1, since)) == 1
        assert broken.applied < TRIES
        assert gave_up(mirror, since) == 0, "the client's leave is no fault of upstream"
        assert "Traceback" not in mirror.log(since)


# A part of it


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("1000000-6999999", 1_000_000, 6_999_999),
        ("3000000-", 3_000_000, SIZE - 1),
        ("-5000000", SIZE - 5_000_000, SIZE - 1),
        ("0-", 0, SIZE - 1),
        (f"3000000-{10 * SIZE}", 3_000_000, SIZE - 1),
    ],
)
@pytest.mark.parametrize("ignored", [False, True])
def test_a_clients_own_range_is_resumed(
    mirror: Mirror, distant: DistantHub, blob: Blob, asked: str, first: int, last: int, ignored: bool
) -> None:
    """Where the server ignores Range from the second request on, that is no matter to the client."""
    more = [IgnoreRange(spare=1)] if ignored else []
    distant.cdn.faults = [*more, Cut(MIB, times=1), Cut(last - MIB, spare=1, times=1)]
    since = mirror.mark()
    part = blob.data[first : last + 1]
    expected = Pulled(206, len(part), f"bytes {first}-{last}/{SIZE}", len(part), digest_of(part))
    assert pull(mirror, blob.path, Range=f"bytes={asked}") == expected
    places = resumed(mirror, since)
    assert places[0] == first + MIB
    end = "" if last == SIZE - 1 else last
    assert asked_ranges(distant, blob) == [f"bytes={asked}", *(f"bytes={at}-{end}" for at in places)]


def test_several_ranges_are_not_resumed(mirror: Mirror, distant: DistantHub, blob: Blob) -> None:
    distant.cdn.faults = [Cut(MIB)]
    since = mirror.mark()
    pulled = pull(mirror, blob.path, Range="bytes=0-999999,2000000-4999999")
    assert (pulled.status, pulled.content_range, pulled.is_whole) == (206, None, False)
    assert (resumed(mirror, since), gave_up(mirror, since)) == ([], 1)


# A manifest


def tagged(letter: str) -> Repository:
    """Return a repository with one manifest that is too long to be read at once."""
    manifest = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [], "annotations": {"long": letter * 600_000}}
    return Repository("library/tagged", ("latest",), Content(OCI_INDEX, json.dumps(manifest).encode()), ())


def test_a_manifest_by_tag_is_resumed_where_the_tag_still_names_it(
    hub: Hub, mirror: Mirror, distant: DistantHub
) -> None:
    """docker-registry ignores Range for manifests."""
    hub.push(tagged("a"))
    manifest = tagged("a").top()
    distant.registry.faults = [Cut(500_000, times=1), Cut(550_000, spare=1, times=1)]
    since = mirror.mark()
    size = len(manifest.data)
    assert pull(mirror, TAG, Accept=OCI_INDEX) == Pulled(200, size, None, size, manifest.digest)
    assert resumed(mirror, since) == [500_000, 550_000]
    assert [request.range for request in distant.registry.asked(TAG)] == ["", "bytes=500000-", "bytes=550000-"]


# What is not to be mended

DOOMED: dict[str, Callable[[str], list[Fault]]] = {
    "each rest is cut before its first byte": lambda of: [Cut(MIB, of=of, ranged=False), Cut(0, of=of, ranged=True)],
    "each rest is reset after a few bytes": lambda of: [Cut(MIB, of=of, ranged=False), Reset(99, of=of, ranged=True)],
    "each rest stalls": lambda of: [Cut(MIB, of=of, ranged=False), Stall(0, of=of, ranged=True)],
    "Range is ignored, and too much would come again": lambda of: [Cut(33 * MIB, of=of, times=1), IgnoreRange(of=of)],
    "other bytes, with another ETag": lambda of: [
        Cut(MIB, of=of, times=1),
        NewETag(of=of),
        Corrupt(0, of=of, ranged=True),
    ],
    "the same bytes, but with another ETag": lambda of: [Cut(MIB, of=of, times=1), NewETag(of=of)],
    "each rest is another range": lambda of: [Cut(MIB, of=of, times=1), ShiftRange(1, of=of)],
    "each rest has too short a length": lambda of: [Cut(MIB, of=of, times=1), WrongLength(-5, of=of, ranged=True)],
    "each rest has too great a length": lambda of: [Cut(MIB, of=of, times=1), WrongLength(5, of=of, ranged=True)],
    "the whole has too great a length": lambda of: [WrongLength(5, of=of)],
}


class Doom(NamedTuple):
    """Hold what a client got of each blob that cannot be had, how often the CDN was asked, and the mirror's log."""

    pulled: dict[str, Pulled]
    blobs: dict[str, Blob]
    asked: dict[str, int]
    resumed: list[int]
    gave_up: int
    log: str


@pytest.fixture(scope="module")
def doom(hub: Hub, mirror: Mirror, distant: DistantHub) -> Doom:
    """Pull them all at once: between two tries, the mirror waits for seconds."""
    sizes = [33 * MIB + 300_000 if "too much" in name else 2 * MIB + number for number, name in enumerate(DOOMED)]
    blobs = {name: add(hub, size) for name, size in zip(DOOMED, sizes, strict=True)}
    distant.forget()
    distant.cdn.faults = [fault for name, faults in DOOMED.items() for fault in faults(blobs[name].key)]
    since = mirror.mark()
    with ThreadPoolExecutor(len(DOOMED)) as pool:
        pulled = dict(zip(DOOMED, pool.map(lambda name: pull(mirror, blobs[name].path), DOOMED), strict=True))
    asked = {name: len(distant.cdn.asked(blob.key)) for name, blob in blobs.items()}
    return Doom(pulled, blobs, asked, resumed(mirror, since), gave_up(mirror, since), mirror.log(since))


@pytest.mark.parametrize("name", DOOMED)
def test_an_answer_breaks_off_where_the_rest_is_not_to_be_had(doom: Doom, name: str) -> None:
    pulled, blob = doom.pulled[name], doom.blobs[name]
    assert pulled.status == 200
    assert not pulled.is_whole
    assert digest_of(blob.data[: pulled.size]) == pulled.digest
    assert doom.asked[name] == 1 + TRIES


def test_each_answer_that_broke_off_has_its_line_in_the_log(doom: Doom) -> None:
    assert doom.gave_up == len(DOOMED)
    assert "Traceback" not in doom.log


def test_a_tag_that_moves_in_mid_transfer_breaks_its_answer_off(hub: Hub, mirror: Mirror, distant: DistantHub) -> None:
    hub.push(tagged("a"))
    stall = Stall(500_000, times=1)
    distant.registry.faults = [stall]
    with ThreadPoolExecutor() as pool:
        pulling = pool.submit(pull, mirror, TAG, Accept=OCI_INDEX)
        assert poll(lambda: stall.applied == 1, 10)
        hub.push(tagged("b"))
        assert not pulling.result().is_whole


# MIRROR_VERIFY=on


@pytest.fixture(scope="module")
def small(hub: Hub) -> Blob:
    return add(hub, 20_000)


@pytest.mark.parametrize(
    "faults",
    [
        lambda: [Corrupt(0)],
        lambda: [Corrupt(SIZE // 2)],
        lambda: [Corrupt(SIZE - 1)],
        lambda: [WrongLength(-5)],
        lambda: [Cut(MIB, times=1), Corrupt(MIB, ranged=True)],
    ],
    ids=["first byte", "a byte in the middle", "last byte", "too short a length", "a byte of the rest"],
)
def test_a_wrong_body_breaks_off_before_its_last_byte(
    verifying: Mirror, distant: DistantHub, blob: Blob, faults: Callable[[], list[Fault]]
) -> None:
    distant.cdn.faults = faults()
    since = verifying.mark()
    pulled = pull(verifying, blob.path)
    assert pulled.status == 200
    assert pulled.size < pulled.length
    assert distant.cdn.faults[-1].applied == 1
    assert "digest" in verifying.log(since)
    assert "Traceback" not in verifying.log(since)


@pytest.mark.parametrize("fault", [Corrupt(10_000, above=0), WrongLength(-5, above=0)], ids=["byte", "length"])
def test_a_small_wrong_body_is_502(verifying: Mirror, distant: DistantHub, small: Blob, fault: Fault) -> None:
    distant.cdn.faults = [fault]
    reply = ask(verifying, small.path)
    assert (reply.status, reply.code) == (502, "UNAVAILABLE")


def test_a_wrong_manifest_is_502_where_its_digest_is_known(hub: Hub, verifying: Mirror, distant: DistantHub) -> None:
    repository = hub.repositories["library/nginx"]
    distant.registry.faults = [Corrupt(100, above=0, of="/manifests/")]
    reply = ask(verifying, f"/v2/{repository.name}/manifests/{repository.top().digest}")
    assert (reply.status, reply.code) == (502, "UNAVAILABLE")


def test_what_is_right_passes_verification(verifying: Mirror, distant: DistantHub, blob: Blob, small: Blob) -> None:
    assert pull(verifying, blob.path) == whole(blob)
    assert pull(verifying, small.path) == whole(small)
    distant.cdn.faults = [Cut(exponential(MIB))]
    since = verifying.mark()
    assert pull(verifying, blob.path) == whole(blob)
    assert resumed(verifying, since)
    part = blob.data[5:3_000_000]
    pulled = pull(verifying, blob.path, Range="bytes=5-2999999")
    assert (pulled.status, pulled.digest, pulled.is_whole) == (206, digest_of(part), True)


# Real clients


@pytest.fixture(scope="module")
def large(hub: Hub) -> Repository:
    repository = large_repository()
    hub.push(repository)
    return repository


@pytest.fixture(scope="module")
def running_docker(mirror: Mirror) -> Iterator[Dockerd]:
    """Run a dockerd that hides as few failures as it can: one for each layer; the mirror's log shows that one too."""
    needs("root", "dockerd", "docker", "containerd", "ctr")
    with Dockerd(mirror.url, {"max-download-attempts": 1}) as running:
        yield running


@pytest.fixture
def docker(running_docker: Dockerd) -> Dockerd:
    running_docker.forget_images()
    return running_docker


FAULTS = [
    lambda: Cut(exponential(5 * MB)),
    lambda: CloseNotify(exponential(5 * MB)),
    lambda: Reset(exponential(5 * MB)),
    lambda: Stall(uniform(0, 10 * MB), times=3),
]
NAMES = ["cuts", "ends", "resets", "stalls"]


@pytest.mark.parametrize("fault", FAULTS, ids=NAMES)
def test_dockerd_pulls_at_the_first_try_over_a_line_that_breaks(
    docker: Dockerd, mirror: Mirror, distant: DistantHub, large: Repository, fault: Callable[[], Fault]
) -> None:
    distant.cdn.faults = [fault()]
    since = mirror.mark()
    pulled_by_docker(docker, large.name, large)
    pulled_at_the_first_try(mirror, distant, large, since)


@pytest.mark.parametrize("fault", FAULTS, ids=NAMES)
def test_containerd_pulls_at_the_first_try_over_a_line_that_breaks(
    docker: Dockerd, mirror: Mirror, distant: DistantHub, large: Repository, fault: Callable[[], Fault]
) -> None:
    distant.cdn.faults = [fault()]
    since = mirror.mark()
    pulled_by_containerd(docker, large)
    pulled_at_the_first_try(mirror, distant, large, since)


def pulled_at_the_first_try(mirror: Mirror, distant: DistantHub, repository: Repository, since: int) -> None:
    """See that the client asked for each blob once, and that the mirror went on wherever the line broke."""
    digests = [blob.digest for blob in blobs(repository)]
    assert poll(lambda: len(blobs_asked(mirror, since)) >= len(digests), 5)
    assert sorted(blobs_asked(mirror, since)) == sorted(digests)
    (fault,) = distant.cdn.faults
    assert len(resumed(mirror, since)) >= fault.applied > 2
    assert gave_up(mirror, since) == 0


def blobs_asked(mirror: Mirror, since: int) -> list[str]:
    """Return the digests of the blobs that clients got, once for each time."""
    lines = mirror.access_log(since)
    return [line.path.rpartition("/")[2] for line in lines if line.method == "GET" and "/blobs/" in line.path]


def test_a_pull_that_cannot_succeed_fails(docker: Dockerd, distant: DistantHub, large: Repository) -> None:
    distant.cdn.faults = [Cut(5 * MB, ranged=False), Cut(0, ranged=True)]
    assert docker.docker("pull", large.name).returncode != 0
    assert docker.docker("image", "inspect", large.name).returncode != 0
