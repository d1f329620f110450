"""The blocks of docs/tls.md do what the document says, in real terminators in front of the mirror."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import suppress

import click.testing
import pytest
from conftest import needs
from hub import Hub
from lab import DIGEST
from lab import Lab
from processes import clean_environment
from processes import poll
from pulls import pulled_by_containerd
from pulls import pulled_by_docker
from serving import ROOT
from serving import Mirror
from terminator import CLIENT
from terminator import READMES
from terminator import TrustingDockerd
from terminator import block_of as readme_block
from tls import PROGRAMS
from tls import Documented
from tls import block_of
from tls import secret_lines
from upstream import Request
from upstream import reply
from upstream import reply_json
from upstream import reset
from upstream import sends

import cli

MIB = 1 << 20
SIZE = 4 * MIB
BLOB_PATH = f"/v2/app/blobs/{DIGEST}"
BLOB = f"/v2/library/app/blobs/{DIGEST}"
STRANGER = "203.0.113.9"
SECRET = "/s3cret"
HEAD = reply(200, b"", {"Content-Length": str(SIZE)})
CHUNKED = reply(200, b"", {"Transfer-Encoding": "chunked"})
CHUNK = b"%x\r\n%s\r\n" % (SIZE, b"x" * SIZE)
BROKEN = (http.client.IncompleteRead, ConnectionResetError)


@pytest.fixture(scope="module", params=PROGRAMS)
def kind(request: pytest.FixtureRequest) -> str:
    needs("root", PROGRAMS[request.param])
    return str(request.param)


@pytest.fixture(scope="module")
def terminator(kind: str, mirror: Mirror) -> Iterator[Documented]:
    with Documented(kind, mirror) as running:
        yield running


@pytest.fixture(scope="module")
def trusting(terminator: Documented) -> Iterator[TrustingDockerd]:
    needs("root", "dockerd", "docker", "containerd", "ctr")
    with TrustingDockerd(terminator) as running:
        yield running


def walk(terminator: Documented, path: str = "", image: str = "redis") -> click.testing.Result:
    arguments = ["check", terminator.url + path, image, "--platform=linux/amd64", f"--ca={terminator.ca_file}"]
    return click.testing.CliRunner().invoke(cli.main, arguments)


def test_readmes_block_is_a_part_of_the_documents() -> None:
    lines = [line.strip() for line in block_of("nginx").splitlines()]
    assert "\n".join(line.strip() for line in readme_block(READMES[0]).splitlines()) in "\n".join(lines)


def test_both_readmes_lead_to_the_document() -> None:
    for readme in READMES:
        assert "](docs/tls.md)" in readme.read_text()
    assert (ROOT / "docs/tls.md").exists()


# Real clients


def test_dockerd_pulls_through_https(trusting: TrustingDockerd, mirror: Mirror, hub: Hub) -> None:
    since = mirror.mark()
    pulled_by_docker(trusting, "hello-world", hub.repositories["library/hello-world"])
    pulled_by_docker(trusting, "bitnami/postgresql", hub.repositories["bitnami/postgresql"])
    assert {("GET", "/v2/", 401), ("GET", "/token", 200)} <= set(mirror.access_log(since))


def test_containerd_pulls_through_https_whose_certificate_it_checks(trusting: TrustingDockerd, hub: Hub) -> None:
    pulled_by_containerd(trusting, hub.repositories["library/nginx"])


def test_the_check_finds_nothing_wrong_and_is_offered_http_2(terminator: Documented) -> None:
    ended = walk(terminator, image="bitnami/postgresql")
    assert ended.exit_code == 0, ended.output
    assert ", HTTP/2, certificate valid until" in ended.output


# What the terminator tells the mirror, and the client


def test_a_client_can_neither_turn_the_challenge_elsewhere_nor_claim_an_address(
    terminator: Documented, mirror: Mirror
) -> None:
    since = mirror.mark()
    forged = {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "http", "X-Forwarded-For": STRANGER}
    answer = terminator.ask("/v2/", forged | {"Forwarded": f"for={STRANGER};host=evil.example;proto=http"})
    assert f'realm="{terminator.url}/token"' in answer.headers["www-authenticate"]
    mirror.wait_for_requests(1, since)
    assert mirror.log(since).startswith(f"{CLIENT} ")


def test_http_2_is_spoken_and_names_the_mirror_too(terminator: Documented) -> None:
    needs("curl")
    command = ["curl", "--silent", "--http2", "--include", "--cacert", str(terminator.ca_file), f"{terminator.url}/v2/"]
    answer = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=30, check=True)
    assert answer.stdout.startswith("HTTP/2 401")
    assert f'realm="{terminator.url}/token"' in answer.stdout


def test_nothing_is_compressed(terminator: Documented) -> None:
    for path in ("/token", "/v2/redis/manifests/latest"):
        answer = terminator.ask(path, {"Accept-Encoding": "gzip, deflate, br, zstd"})
        assert "content-encoding" not in answer.headers
        assert answer.headers["content-length"] == str(len(answer.body))
        assert json.loads(answer.body)


# What upstream does


@pytest.fixture(scope="module")
def shared_lab() -> Iterator[Lab]:
    with Lab(first_byte_timeout=2, idle_timeout=0.5) as lab:
        yield lab


@pytest.fixture(scope="module")
def lab_terminator(kind: str, shared_lab: Lab) -> Iterator[Documented]:
    with Documented(kind, shared_lab.mirror) as running:
        yield running


@pytest.fixture
def lab(shared_lab: Lab) -> Lab:
    shared_lab.reset()
    return shared_lab


def open_blob(terminator: Documented) -> tuple[http.client.HTTPSConnection, http.client.HTTPResponse]:
    host, _, port = terminator.host.partition(":")
    connection = http.client.HTTPSConnection(host, int(port), timeout=30, context=terminator._trust)
    connection.request("GET", BLOB_PATH)
    return connection, connection.getresponse()


@pytest.mark.parametrize(
    ("head", "body"), [(HEAD, b"x" * SIZE), (CHUNKED, CHUNK + b"0\r\n\r\n")], ids=["length", "chunked"]
)
def test_a_whole_blob_comes_through_whole(lab: Lab, lab_terminator: Documented, head: bytes, body: bytes) -> None:
    lab.upstream.answers[BLOB] = sends(head, body)
    assert lab_terminator.ask(BLOB_PATH).body == b"x" * SIZE


def test_the_first_bytes_come_while_upstream_still_sends(lab: Lab, lab_terminator: Documented) -> None:
    def drip(request: Request, connection: socket.socket) -> None:
        connection.sendall(HEAD + b"x" * MIB)
        arrived.append(poll(lambda: bool(received), 5))
        connection.sendall(b"x" * (SIZE - MIB))

    received: list[bytes] = []
    arrived: list[bool] = []
    lab.upstream.answers[BLOB] = drip
    connection, response = open_blob(lab_terminator)
    received.append(response.read(MIB // 2))
    assert len(response.read()) == SIZE - MIB // 2
    assert arrived == [True]
    connection.close()


def test_when_the_client_leaves_upstream_is_left(lab: Lab, lab_terminator: Documented) -> None:
    def pour(request: Request, connection: socket.socket) -> None:
        connection.sendall(reply(200, b"", {"Content-Length": str(1 << 40)}))
        try:
            while not lab.upstream.ending.is_set():
                connection.sendall(b"x" * MIB)
        except OSError:
            left.append(True)

    left: list[bool] = []
    lab.upstream.answers[BLOB] = pour
    connection, response = open_blob(lab_terminator)
    response.read(MIB)
    response.close()
    connection.close()
    assert poll(lambda: bool(left), 5)


@pytest.mark.parametrize("end", [lambda _: None, reset, lambda _: time.sleep(3)], ids=["closes", "resets", "stalls"])
@pytest.mark.parametrize(("head", "body"), [(HEAD, CHUNK[8:]), (CHUNKED, CHUNK)], ids=["length", "chunked"])
@pytest.mark.parametrize("received", [1, 2 * MIB])
def test_a_blob_that_is_cut_upstream_breaks_off_behind_the_terminator(
    kind: str,
    lab: Lab,
    lab_terminator: Documented,
    head: bytes,
    body: bytes,
    received: int,
    end: Callable[[socket.socket], object],
) -> None:
    lab.upstream.answers[BLOB] = sends(head, body[: len(CHUNK) - SIZE - 2 + received], then=end)
    ends_cleanly = (kind, head) == ("caddyfile", CHUNKED)  # as the document says of Debian's
    with suppress(*BROKEN) if ends_cleanly else pytest.raises(BROKEN):
        assert len(lab_terminator.ask(BLOB_PATH).body) < SIZE


def test_an_error_of_the_mirror_passes_as_it_is(lab: Lab, lab_terminator: Documented) -> None:
    lab.upstream.answers[BLOB] = reply_json(
        404, {"errors": [{"code": "BLOB_UNKNOWN", "message": "no", "detail": None}]}
    )
    answer = lab_terminator.ask(BLOB_PATH)
    assert (answer.status, answer.code) == (404, "BLOB_UNKNOWN")


# A secret path


@pytest.fixture(scope="module")
def hidden(hub: Hub) -> Iterator[Mirror]:
    with Mirror(registries=hub.registries_file, path_prefix=SECRET) as running:
        yield running


def test_the_blocks_stay_as_they_are_for_a_secret_path(kind: str, hidden: Mirror) -> None:
    with Documented(kind, hidden) as terminator:
        ended = walk(terminator, SECRET)
        assert ended.exit_code == 0, ended.output
        assert terminator.ask("/v2/").body == b"not found\n"
        assert terminator.ask(f"{SECRET}/healthz").json == {"status": "ok"}


def test_the_secret_path_alone_may_be_passed_on(kind: str, hidden: Mirror) -> None:
    with Documented(kind, hidden, changes=secret_lines()[kind]) as terminator:
        ended = walk(terminator, SECRET)
        assert ended.exit_code == 0, ended.output
        assert terminator.ask("/v2/").body != b"not found\n", "that path is another site's"
