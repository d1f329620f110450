"""A real nginx with README's own location sends what the cache keeps, and the client notices nothing of it."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from clients import Dockerd
from conftest import needs
from hub import Hub
from images import MB
from lab import Lab
from processes import poll
from processes import removed_afterwards
from pulls import pulled_by_containerd
from pulls import pulled_by_docker
from serving import Mirror
from terminator import READMES
from terminator import Terminator
from terminator import TrustingDockerd
from terminator import block_of
from upstream import reply

LOCATION = "/protected/blobs/"
STORED_AT = "/var/cache/docker-mirror/"
ACCEL = "/protected/"
REPOSITORY = "library/sent"
SIZE = MB
ACROSS = ("docker-content-digest", "etag", "cache-control", "content-type", "docker-distribution-api-version")
CORS = ("access-control-allow-origin", "access-control-expose-headers")


def location_for(folder: Path) -> str:
    """Return README's location with another folder."""
    block = block_of(READMES[0], LOCATION)
    assert block.count(STORED_AT) == 1
    return block.replace(STORED_AT, f"{folder}/")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Give a folder that the owner and his group can reach; the tests' own can be reached by the owner only."""
    with removed_afterwards(Path(tempfile.mkdtemp(prefix="accel-"))) as made:
        made.chmod(0o710)
        yield made / "store"


@pytest.fixture(scope="module")
def accelerated(hub: Hub, folder: Path) -> Iterator[Mirror]:
    with Mirror(registries=hub.registries_file, cache_dir=folder, accel=ACCEL) as running:
        yield running


@pytest.fixture(scope="module")
def terminator(accelerated: Mirror, folder: Path) -> Iterator[Terminator]:
    with Terminator(accelerated, more=location_for(folder)) as running:
        yield running


@pytest.fixture(scope="module")
def digest(hub: Hub, terminator: Terminator) -> str:
    """Return the digest of a blob that is kept."""
    digest = hub.add_blob(REPOSITORY, SIZE)
    missed = terminator.ask(path_of(digest))
    assert (missed.status, missed.headers["x-cache"], digest_of(missed.body)) == (200, "MISS", digest)
    assert poll(lambda: terminator.ask(path_of(digest)).headers["x-cache"] == "HIT", 10)
    return digest


@pytest.fixture(scope="module")
def content(hub: Hub, digest: str) -> bytes:
    return hub.stored(digest).read_bytes()


def path_of(digest: str) -> str:
    return f"/v2/{REPOSITORY}/blobs/{digest}"


def digest_of(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def sent_by_the_mirror(mirror: Mirror, since: int, path: str) -> set[tuple[int, str]]:
    """Return how many bytes of each answer came from the mirror itself, and what its cache did."""

    def found() -> set[tuple[int, str]]:
        lines = re.findall(rf'"GET {path}" \d+ (\d+) \S+ \S+ (\S+)$', mirror.log(since), re.M)
        return {(int(count), label) for count, label in lines}

    poll(lambda: bool(found()), 5)  # a line may come after the client's last byte
    return found()


def test_both_readmes_show_the_same_location() -> None:
    assert block_of(READMES[0], LOCATION) == block_of(READMES[1], LOCATION)


# What is kept


def test_nginx_sends_what_is_kept(terminator: Terminator, accelerated: Mirror, digest: str) -> None:
    since = accelerated.mark()
    answer = terminator.ask(path_of(digest))
    assert (answer.status, answer.headers["x-cache"], digest_of(answer.body)) == (200, "HIT", digest)
    assert int(answer.headers["age"]) >= 0
    assert sent_by_the_mirror(accelerated, since, path_of(digest)) == {(0, "HIT")}


def test_its_answer_has_the_headers_that_the_mirrors_own_has(
    terminator: Terminator, accelerated: Mirror, digest: str
) -> None:
    whole = terminator.ask(path_of(digest)).headers
    own = terminator.ask(path_of(digest), method="HEAD").headers  # which the mirror answers itself
    assert {name: whole.get(name) for name in (*ACROSS, *CORS)} == {name: own.get(name) for name in (*ACROSS, *CORS)}
    assert whole["docker-content-digest"] == digest
    assert whole["etag"] == f'"{digest}"'
    assert whole["cache-control"] == "public, max-age=31536000, immutable"
    assert whole["content-type"] == "application/octet-stream"
    assert whole["accept-ranges"] == "bytes"
    assert "x-accel-redirect" not in whole


@pytest.mark.parametrize(
    ("asked", "first", "stop"),
    [("bytes=100-199", 100, 200), ("bytes=999000-", 999_000, SIZE), ("bytes=-5", SIZE - 5, SIZE)],
)
def test_nginx_sends_a_part_of_what_is_kept(
    terminator: Terminator,
    accelerated: Mirror,
    digest: str,
    content: bytes,
    asked: str,
    first: int,
    stop: int,
) -> None:
    since = accelerated.mark()
    answer = terminator.ask(path_of(digest), {"Range": asked})
    assert (answer.status, answer.body) == (206, content[first:stop])
    assert answer.headers["content-range"] == f"bytes {first}-{stop - 1}/{SIZE}"
    assert answer.headers["content-length"] == str(stop - first)
    assert answer.headers["docker-content-digest"] == digest
    assert sent_by_the_mirror(accelerated, since, path_of(digest)) == {(0, "HIT")}


def test_several_parts_at_once_are_answered_with_the_whole(terminator: Terminator, digest: str, content: bytes) -> None:
    answer = terminator.ask(path_of(digest), {"Range": "bytes=0-1,5-6"})
    assert (answer.status, answer.body) == (200, content)


def test_a_range_outside_is_416(terminator: Terminator, digest: str) -> None:
    answer = terminator.ask(path_of(digest), {"Range": f"bytes={SIZE}-"})
    assert (answer.status, answer.code) == (416, "RANGE_INVALID")
    assert answer.headers["content-range"] == f"bytes */{SIZE}"


def test_conditions_are_about_the_digest(terminator: Terminator, digest: str, content: bytes) -> None:
    same, other = f'"{digest}"', '"another"'
    assert terminator.ask(path_of(digest), {"If-None-Match": same}).status == 304
    assert terminator.ask(path_of(digest), {"If-None-Match": other}).body == content
    assert terminator.ask(path_of(digest), {"Range": "bytes=0-4", "If-Range": same}).body == content[:5]
    assert terminator.ask(path_of(digest), {"Range": "bytes=0-4", "If-Range": other}).body == content


def test_nobody_asks_for_the_files_themselves(terminator: Terminator, folder: Path, digest: str) -> None:
    (file,) = folder.glob(f"blobs/sha256/*/{digest.removeprefix('sha256:')}")
    assert terminator.ask(f"{ACCEL}{file.relative_to(folder)}").status == 404
    assert terminator.ask(f"{ACCEL}usage").status == 404
    assert terminator.ask(f"{LOCATION}../usage").status in (400, 404)


def test_dockerd_and_containerd_pull_what_nginx_sends(terminator: Terminator, accelerated: Mirror, hub: Hub) -> None:
    needs("root", "dockerd", "docker", "containerd", "ctr")
    repository = hub.repositories["library/nginx"]
    with TrustingDockerd(terminator) as dockerd:
        pulled_by_docker(dockerd, "nginx", repository)
        dockerd.forget_images()
        since = accelerated.mark()
        pulled_by_docker(dockerd, "nginx", repository)
        forgotten(dockerd)
        pulled_by_containerd(dockerd, repository)
    sent = sent_by_the_mirror(accelerated, since, "/v2/library/nginx/blobs/.*")
    assert sent == {(0, "HIT")}


def forgotten(dockerd: Dockerd) -> None:
    dockerd.forget_images()
    assert not dockerd.docker("image", "ls", "--quiet").stdout


# What is not


def test_a_miss_passes_through_and_its_client_gets_it_from_the_mirror(
    terminator: Terminator, accelerated: Mirror, hub: Hub
) -> None:
    digest, since = hub.add_blob(REPOSITORY, SIZE + 1), accelerated.mark()
    answer = terminator.ask(path_of(digest))
    assert (answer.status, answer.headers["x-cache"], digest_of(answer.body)) == (200, "MISS", digest)
    assert sent_by_the_mirror(accelerated, since, path_of(digest)) == {(SIZE + 1, "MISS")}


def test_a_client_with_a_bandwidth_is_sent_to_by_the_mirror(hub: Hub, folder: Path, digest: str) -> None:
    """By itself, nginx would send as fast as it can."""
    with Mirror(registries=hub.registries_file, cache_dir=folder, accel=ACCEL, client_bandwidth="100M") as mirror:
        with Terminator(mirror, more=location_for(folder)) as terminator:
            answer = terminator.ask(path_of(digest))
        assert (answer.headers["x-cache"], digest_of(answer.body)) == ("HIT", digest)
        assert sent_by_the_mirror(mirror, 0, path_of(digest)) == {(SIZE, "HIT")}


def test_no_registry_makes_nginx_send_a_file(folder: Path, digest: str) -> None:
    (file,) = folder.glob(f"blobs/sha256/*/{digest.removeprefix('sha256:')}")
    led = {"X-Accel-Redirect": f"{ACCEL}{file.relative_to(folder)}", "Content-Type": "application/json"}
    with Lab(cache_dir=folder, accel=ACCEL) as lab, Terminator(lab.mirror, more=location_for(folder)) as terminator:
        lab.reset()
        lab.upstream.answers[lab.manifest] = reply(200, b"{}", led)
        assert terminator.ask(lab.path).body == b"{}"


# Who can read the files


def test_the_files_are_for_the_mirrors_user_and_group(folder: Path, digest: str) -> None:
    (file,) = folder.glob(f"blobs/sha256/*/{digest.removeprefix('sha256:')}")
    assert folder.stat().st_mode & 0o777 == 0o750
    assert file.stat().st_mode & 0o777 == 0o640
    assert (folder / "usage").stat().st_mode & 0o777 == 0o600


def test_an_nginx_of_another_user_sends_them_if_that_one_is_in_the_group(
    accelerated: Mirror, folder: Path, digest: str
) -> None:
    needs("root")
    with Terminator(accelerated, more=location_for(folder), user="www-data root") as member:
        assert digest_of(member.ask(path_of(digest)).body) == digest
    with Terminator(accelerated, more=location_for(folder), user="www-data www-data") as stranger:
        assert stranger.ask(path_of(digest)).status == 403
