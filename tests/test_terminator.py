"""A real nginx with README's own block does TLS in front of the mirror, as on its users' hosts."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Callable
from collections.abc import Iterator

import pytest
from clients import Dockerd
from conftest import needs
from hub import PASSWORD
from hub import USER
from hub import Hub
from lab import DIGEST
from lab import Lab
from processes import poll
from pulls import assert_denied
from pulls import pulled_by_containerd
from pulls import pulled_by_docker
from pulls import succeeds
from serving import Mirror
from terminator import CLIENT
from terminator import READMES
from terminator import Terminator
from terminator import TrustingDockerd
from terminator import block_of
from upstream import reply
from upstream import reset
from upstream import sends

STRANGER = "203.0.113.9"
MIB = 1 << 20
BLOB_PATH = f"/v2/app/blobs/{DIGEST}"
BLOB = f"/v2/library/app/blobs/{DIGEST}"
BROKEN = (http.client.IncompleteRead, ConnectionResetError)


@pytest.fixture(scope="module")
def terminator(mirror: Mirror) -> Iterator[Terminator]:
    with Terminator(mirror) as running:
        yield running


@pytest.fixture(scope="module")
def trusting(terminator: Terminator) -> Iterator[TrustingDockerd]:
    needs("root", "dockerd", "docker", "containerd", "ctr")
    with TrustingDockerd(terminator) as running:
        yield running


def test_both_readmes_show_the_same_block() -> None:
    assert block_of(READMES[0]) == block_of(READMES[1])


# Real clients


def test_dockerd_pulls_short_names_through_tls(trusting: TrustingDockerd, terminator: Terminator, hub: Hub) -> None:
    before = len(terminator.asked())
    pulled_by_docker(trusting, "hello-world", hub.repositories["library/hello-world"])
    pulled_by_docker(trusting, "bitnami/postgresql", hub.repositories["bitnami/postgresql"])
    assert poll(lambda: len(terminator.asked(before)) >= 10, 5)
    path = "/v2/library/hello-world/manifests/latest"
    assert terminator.asked(before)[:3] == [("GET", "/v2/", 401), ("GET", "/token", 200), ("HEAD", path, 200)]


def test_dockerd_logs_in_through_tls_and_pulls_a_private_image_by_its_full_name(
    trusting: TrustingDockerd, terminator: Terminator, hub: Hub
) -> None:
    name = f"{terminator.host}/private/app"
    assert_denied(trusting.docker("pull", name))
    login = ("login", terminator.host, "--username", USER, "--password-stdin")
    succeeds(trusting.docker(*login, config="login", stdin=PASSWORD))
    pulled_by_docker(trusting, name, hub.repositories["private/app"], "login")


def test_containerd_pulls_through_tls_whose_certificate_it_checks(
    trusting: TrustingDockerd, docker: Dockerd, terminator: Terminator, hub: Hub
) -> None:
    before = len(terminator.asked())
    assert docker.ctr_pull("docker.io/library/redis:latest", mirror_url=terminator.url).returncode != 0
    assert terminator.asked(before) == [], "this containerd does not know the authority"
    pulled_by_containerd(trusting, hub.repositories["library/redis"])
    assert ("HEAD", "/v2/library/redis/manifests/latest", 200) in terminator.asked(before)


# What the terminator tells the mirror


def test_the_challenge_names_the_terminator_by_https(terminator: Terminator) -> None:
    answer = terminator.ask("/v2/")
    assert answer.status == 401
    assert f'realm="{terminator.url}/token"' in answer.headers["www-authenticate"]


def test_a_client_cannot_turn_the_challenge_elsewhere(terminator: Terminator) -> None:
    forged = {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "http", "X-Forwarded-Prefix": "/evil"}
    answer = terminator.ask("/v2/", forged | {"Forwarded": "host=evil.example;proto=http"})
    assert f'realm="{terminator.url}/token"' in answer.headers["www-authenticate"]


def test_the_log_shows_the_client_and_not_the_terminator(terminator: Terminator, mirror: Mirror) -> None:
    since = mirror.mark()
    terminator.ask("/healthz")
    mirror.wait_for_requests(1, since)
    assert mirror.log(since).startswith(f"{CLIENT} ")


@pytest.mark.parametrize("forged", [STRANGER, f"{STRANGER}, {STRANGER}", f"{STRANGER}, 127.0.0.1", "x", ""])
def test_an_address_that_a_client_claims_is_not_believed(terminator: Terminator, mirror: Mirror, forged: str) -> None:
    since = mirror.mark()
    headers = {"X-Forwarded-For": forged, "X-Real-IP": STRANGER, "Forwarded": f"for={STRANGER}"}
    terminator.ask("/healthz", headers)
    mirror.wait_for_requests(1, since)
    log = mirror.log(since)
    assert log.startswith(f"{CLIENT} ")
    assert STRANGER not in log


# What breaks off


@pytest.fixture(scope="module")
def shared_lab() -> Iterator[Lab]:
    with Lab(first_byte_timeout=2, idle_timeout=0.5) as lab:
        yield lab


@pytest.fixture(scope="module")
def lab_terminator(shared_lab: Lab) -> Iterator[Terminator]:
    needs("nginx")
    with Terminator(shared_lab.mirror) as running:
        yield running


@pytest.fixture
def lab(shared_lab: Lab) -> Lab:
    shared_lab.reset()
    return shared_lab


SIZE = 4 * MIB
LENGTH = reply(200, b"", {"Content-Length": str(SIZE)})
CHUNKED = reply(200, b"", {"Transfer-Encoding": "chunked"})
CHUNK = b"%x\r\n%s\r\n" % (SIZE, b"x" * SIZE)


@pytest.mark.parametrize(
    ("head", "body"), [(LENGTH, b"x" * SIZE), (CHUNKED, CHUNK + b"0\r\n\r\n")], ids=["length", "chunked"]
)
def test_a_whole_blob_comes_through_whole(lab: Lab, lab_terminator: Terminator, head: bytes, body: bytes) -> None:
    lab.upstream.answers[BLOB] = sends(head, body)
    assert lab_terminator.ask(BLOB_PATH).body == b"x" * SIZE


@pytest.mark.parametrize("end", [lambda _: None, reset, lambda _: time.sleep(3)], ids=["closes", "resets", "stalls"])
@pytest.mark.parametrize("received", [1, 40_000, 2 * MIB])
@pytest.mark.parametrize(("head", "body"), [(LENGTH, CHUNK[8:]), (CHUNKED, CHUNK)], ids=["length", "chunked"])
def test_a_blob_that_is_cut_upstream_breaks_off_behind_the_terminator(
    lab: Lab,
    lab_terminator: Terminator,
    head: bytes,
    body: bytes,
    received: int,
    end: Callable[[socket.socket], object],
) -> None:
    lab.upstream.answers[BLOB] = sends(head, body[: len(CHUNK) - SIZE - 2 + received], then=end)
    with pytest.raises(BROKEN):
        lab_terminator.ask(BLOB_PATH)


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_blob_that_is_cut_between_two_chunks_breaks_off_behind_the_terminator(
    lab: Lab, lab_terminator: Terminator, chunks: int
) -> None:
    """There all bytes so far make a whole number of chunks: only the missing last one tells the cut."""
    lab.upstream.answers[BLOB] = sends(CHUNKED, CHUNK * chunks)
    with pytest.raises(BROKEN):
        lab_terminator.ask(BLOB_PATH)
