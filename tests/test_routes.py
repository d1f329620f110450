"""The routes and what all answers have in common."""

import socket
import struct
from collections.abc import Iterator

import pytest
from lab import DIGEST
from lab import MANIFEST
from lab import Lab
from lab import reply_json
from lab import send_raw
from processes import poll

from mirror import create_app
from settings import Config

DATA_SEGMENTS = 152  # the place of tcpi_data_segs_in, the segments that came with data: linux/tcp.h


@pytest.fixture(scope="module")
def shared_lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.fixture
def lab(shared_lab: Lab) -> Lab:
    shared_lab.reset()
    return shared_lab


@pytest.mark.parametrize("path", ["/v2/", "/v2"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_ping_answers_with_and_without_its_slash_and_never_redirects(lab: Lab, method: str, path: str) -> None:
    reply = lab.ask(path, method=method)
    assert reply.status == 200
    assert reply.headers["docker-distribution-api-version"] == "registry/2.0"
    assert reply.body == (b"{}" if method == "GET" else b"")


def test_health_is_told_without_asking_upstream(lab: Lab) -> None:
    assert lab.ask("/healthz").json == {"status": "ok"}
    assert lab.upstream.requests == []


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/v1/repositories/x/images", "/v2/app", "/v2/app/manifests/", "/v3/", "/v2/../healthz", "/token/x/y"],
)
def test_what_is_not_served_is_404_in_oci_json(lab: Lab, path: str) -> None:
    reply = lab.ask(path)
    assert (reply.status, reply.code) == (404, "NOT_FOUND")
    assert lab.upstream.requests == []


def test_an_error_to_head_has_no_body(lab: Lab) -> None:
    reply = lab.ask("/v2/APP/manifests/latest", method="HEAD")
    assert (reply.status, reply.body) == (400, b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize(
    "path", ["/v2/app/blobs/uploads/", "/v2/app/manifests/latest", f"/v2/app/blobs/{DIGEST}", "/v2/", "/v2/anything"]
)
def test_a_write_is_refused_with_what_is_allowed(lab: Lab, method: str, path: str) -> None:
    reply = lab.ask(path, method=method)
    assert (reply.status, reply.code) == (405, "UNSUPPORTED")
    assert reply.headers["allow"] == "GET, HEAD, OPTIONS"
    assert lab.upstream.requests == []


def test_the_catalog_is_refused(lab: Lab) -> None:
    reply = lab.ask("/v2/_catalog")
    assert (reply.status, reply.code) == (405, "UNSUPPORTED")
    assert "allow" in reply.headers


def test_a_method_that_a_route_does_not_have_is_405_with_what_is_allowed(lab: Lab) -> None:
    reply = lab.ask("/healthz", method="POST")
    assert (reply.status, reply.code) == (405, "UNSUPPORTED")
    assert "GET" in reply.headers["allow"]


@pytest.mark.parametrize("path", ["/v2/", MANIFEST, f"/v2/app/blobs/{DIGEST}", "/v2/app/nothing", "/token"])
def test_a_browser_may_ask_before_it_asks(lab: Lab, path: str) -> None:
    headers = {"Origin": "https://tool.example", "Access-Control-Request-Method": "GET"}
    reply = lab.ask(path, headers, method="OPTIONS")
    assert (reply.status, reply.body) == (204, b"")
    assert reply.headers["access-control-allow-origin"] == "*"
    assert "authorization" in reply.headers["access-control-allow-headers"].lower()
    assert "GET" in reply.headers["access-control-allow-methods"]
    assert lab.upstream.requests == []


@pytest.mark.parametrize("path", ["/v2/", "/v2/app/nothing", "/v2/APP/manifests/x", "/token"])
def test_a_browser_may_read_every_answer_and_its_headers(lab: Lab, path: str) -> None:
    reply = lab.ask(path)
    assert reply.headers["access-control-allow-origin"] == "*"
    exposed = reply.headers["access-control-expose-headers"]
    assert {"Docker-Content-Digest", "Link", "WWW-Authenticate"} <= set(exposed.split(", "))


def test_containerds_namespace_is_known_or_refused(lab: Lab) -> None:
    lab.upstream.answers[MANIFEST] = reply_json(200, {"schemaVersion": 2})
    assert lab.ask("/v2/app/manifests/latest?ns=docker.io").status == 200
    assert "ns=" not in lab.upstream.requests[-1].target
    lab.upstream.requests.clear()
    reply = lab.ask("/v2/app/manifests/latest?ns=evil.example")
    assert (reply.status, reply.code) == (403, "DENIED")
    assert b"docker.io" in reply.body
    assert b"evil" not in reply.body
    assert lab.upstream.requests == []


def test_an_old_client_without_a_host_header_is_served(lab: Lab) -> None:
    assert send_raw(lab.mirror, b"GET /healthz HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 200")


def test_the_access_line_tells_client_request_status_bytes_seconds_and_upstream(lab: Lab) -> None:
    lab.upstream.answers[MANIFEST] = reply_json(200, {"schemaVersion": 2})
    since = lab.mirror.mark()
    size = len(lab.ask("/v2/app/manifests/latest?ns=docker.io", {"X-Forwarded-For": "203.0.113.7"}).body)
    lab.mirror.wait_for_requests(1, since)
    line = lab.mirror.log(since).strip()
    client, _, rest = line.partition(" ")
    request, status, sent, seconds, upstream = rest.partition("] ")[2].rsplit(" ", 4)
    assert (client, request) == ("203.0.113.7", '"GET /v2/app/manifests/latest"')
    assert (status, sent, upstream) == ("200", str(size), lab.upstream.host)
    assert float(seconds) < 30


def test_the_access_line_takes_no_forged_address_and_no_line_break(lab: Lab) -> None:
    since = lab.mirror.mark()
    lab.ask('/v2/a%0a1.2.3.4%20"x"', {"X-Forwarded-For": '1.2.3.4 "GET /forged" 200'})
    lab.mirror.wait_for_requests(1, since)
    log = lab.mirror.log(since)
    assert log.startswith("- [")
    assert log.count("\n") == 1
    assert "forged" not in log


def test_another_format_of_the_access_line_has_all_that_gunicorn_knows() -> None:
    with Lab(options=("--access-logformat", "mine: %({user-agent}i)s %({server}o)s %(r)s %(s)s %(b)s")) as lab:
        lab.ask("/healthz", {"User-Agent": 'a "client"'})
        assert poll(lambda: 'mine: a \\"client\\" - GET /healthz HTTP/1.1 200 16' in lab.mirror.log(), 5)


def test_a_small_answer_comes_in_one_piece(lab: Lab) -> None:
    with socket.create_connection(("127.0.0.1", lab.mirror.port), timeout=30) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: mirror\r\nConnection: close\r\n\r\n")
        received = b"".join(iter(lambda: client.recv(65536), b""))
        info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, DATA_SEGMENTS + 4)
    assert b'{"status": "ok"}' in received
    assert struct.unpack_from("=I", info, DATA_SEGMENTS) == (1,)


def test_warning_and_above_means_no_access_lines() -> None:
    with Lab(log_level="warning") as lab:
        lab.ask("/v2/nothing")
        assert lab.mirror.log() == ""


def test_a_bug_of_ours_is_500_and_tells_the_client_nothing(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(Config())

    def bug() -> str:
        raise RuntimeError("the secret of the bug")

    app.add_url_rule("/bug", "bug", bug)
    response = app.test_client().get("/bug")
    assert response.status_code == 500
    assert response.get_json() == {
        "errors": [{"code": "UNKNOWN", "message": "the mirror failed; its log says why", "detail": None}]
    }
    assert "the secret of the bug" in caplog.text
