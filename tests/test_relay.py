"""The relay: bytes and headers, redirects, ranges, paging; what goes upstream and what comes back."""

import gzip
import socket
import time
from collections.abc import Iterator

import pytest
from lab import DIGEST
from lab import Lab
from lab import guard
from lab import reply_json
from lab import send_raw
from processes import poll
from upstream import RawUpstream
from upstream import Request
from upstream import head_of
from upstream import reply

from mirror import Pace

BODY = bytes(range(256)) * 4096  # 1 MiB, all byte values
BLOB_PATH = f"/v2/app/blobs/{DIGEST}"
BLOB = f"/v2/library/app/blobs/{DIGEST}"
REDIRECTS = [301, 302, 303, 307, 308]
KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(scope="module")
def shared_lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.fixture
def lab(shared_lab: Lab) -> Lab:
    shared_lab.reset()
    return shared_lab


@pytest.fixture(scope="module")
def shared_cdn() -> Iterator[RawUpstream]:
    with RawUpstream("127.0.0.9") as cdn:
        yield cdn


@pytest.fixture
def cdn(shared_cdn: RawUpstream) -> RawUpstream:
    shared_cdn.requests.clear()
    shared_cdn.answers.clear()
    shared_cdn.answers["/data"] = reply(200, BODY)
    return shared_cdn


def test_a_blob_comes_byte_for_byte_with_its_length(lab: Lab) -> None:
    lab.upstream.answers[BLOB] = reply(200, BODY, {"Content-Type": "application/octet-stream"})
    answer = lab.ask(BLOB_PATH)
    assert answer.body == BODY
    assert answer.headers["content-length"] == str(len(BODY))
    assert answer.headers["content-type"] == "application/octet-stream"


def test_a_chunked_answer_stays_chunked_and_whole(lab: Lab) -> None:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (BODY, b"end")) + b"0\r\n\r\n"
    lab.upstream.answers[BLOB] = reply(200, chunks, {"Transfer-Encoding": "chunked"})
    answer = lab.ask(BLOB_PATH)
    assert answer.body == BODY + b"end"
    assert "content-length" not in answer.headers


def test_an_empty_blob_is_empty(lab: Lab) -> None:
    lab.upstream.answers[BLOB] = reply(200, b"")
    answer = lab.ask(BLOB_PATH)
    assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "0")


def test_only_listed_headers_come_back(lab: Lab) -> None:
    good = {
        "Docker-Content-Digest": DIGEST,
        "ETag": '"x"',
        "Accept-Ranges": "bytes",
        "RateLimit-Limit": "100;w=21600",
        "RateLimit-Remaining": "99;w=21600",
        "Warning": '299 - "old"',
        "Last-Modified": "Sat, 21 Nov 2026 07:00:00 GMT",
        "Cache-Control": "max-age=1",
    }
    bad = {"Set-Cookie": "a=b", "Docker-RateLimit-Source": "192.0.2.1", "X-Anything": "1", "Server": "secret"}
    lab.upstream.answers[BLOB] = reply(200, b"x", {**good, **bad})
    answer = lab.ask(BLOB_PATH)
    assert {name: answer.headers[name.lower()] for name in good} == good
    assert answer.headers["server"] != "secret"
    assert not {"set-cookie", "docker-ratelimit-source", "x-anything"} & answer.headers.keys()


def test_a_header_with_control_characters_is_left_out(lab: Lab) -> None:
    lab.upstream.answers[BLOB] = reply(200, b"x", {"ETag": "a\x01b", "Warning": '299 - "x"'})
    answer = lab.ask(BLOB_PATH)
    assert (answer.status, "etag" in answer.headers, answer.headers["warning"]) == (200, False, '299 - "x"')


def test_only_listed_headers_go_upstream_and_no_encoding_is_asked_for(lab: Lab) -> None:
    lab.upstream.answers[lab.manifest] = reply_json(200, {})
    good = {"Accept": "application/a, application/b", "If-None-Match": '"x"', "If-Range": '"y"'}
    bad = {"Cookie": "a=b", "X-Forwarded-For": "203.0.113.7", "Referer": "x", "User-Agent": "docker/28"}
    lab.ask(lab.path, {**good, **bad, "Accept-Encoding": "gzip, zstd"})
    seen = lab.upstream.requests[0].headers
    assert {name: seen[name.lower()] for name in good} == good
    assert seen["accept-encoding"] == "identity"
    assert not {"cookie", "x-forwarded-for", "referer"} & seen.keys()
    assert seen["user-agent"].startswith("docker-mirror/")


def test_several_accept_lines_all_go_upstream(lab: Lab) -> None:
    lab.upstream.answers[lab.manifest] = reply_json(200, {})
    text = f"GET {lab.path} HTTP/1.1\r\nHost: m\r\nAccept: a/b\r\nAccept: c/d\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", lab.mirror.port)) as connection:
        connection.sendall(text.encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    assert lab.upstream.requests[0].headers["accept"].replace(" ", "") == "a/b,c/d"


def test_an_answer_that_is_encoded_all_the_same_is_not_decoded(lab: Lab) -> None:
    packed = gzip.compress(b"content")
    lab.upstream.answers[BLOB] = reply(200, packed, {"Content-Encoding": "gzip"})
    answer = lab.ask(BLOB_PATH)
    assert (answer.body, answer.headers["content-encoding"]) == (packed, "gzip")


def test_a_head_stays_head_and_keeps_what_clients_need(lab: Lab) -> None:
    headers = {"Docker-Content-Digest": DIGEST, "Content-Type": "application/vnd.oci.image.index.v1+json"}
    lab.upstream.answers[lab.manifest] = reply(200, b"x" * 1234, headers)
    answer = lab.ask(lab.path, method="HEAD")
    assert [request.method for request in lab.upstream.requests] == ["HEAD"]
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["content-length"] == "1234"
    assert answer.headers["docker-content-digest"] == DIGEST
    assert answer.headers["content-type"] == headers["Content-Type"]


def test_a_head_sends_nothing_after_its_head(lab: Lab) -> None:
    lab.upstream.answers[lab.manifest] = reply(200, b"x" * 1234)
    for path in (lab.path, "/v2/", "/v2/nothing/manifests/x", "/v2/BAD/manifests/x"):
        raw = send_raw(lab.mirror, f"HEAD {path} HTTP/1.1\r\nHost: m\r\nConnection: close\r\n\r\n".encode())
        assert raw.startswith(b"HTTP/1.1 ")
        assert raw.endswith(b"\r\n\r\n")
        assert raw.count(b"\r\n\r\n") == 1


def test_a_head_without_a_length_invents_none(lab: Lab) -> None:
    lab.upstream.answers[lab.manifest] = reply(200, b"", {"X-Unframed": "1"})
    assert "content-length" not in lab.ask(lab.path, method="HEAD").headers


@pytest.mark.parametrize("status", REDIRECTS)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_redirect_is_followed_here_with_its_method(lab: Lab, cdn: RawUpstream, status: int, method: str) -> None:
    lab.upstream.answers[BLOB] = reply(status, b"<html>moved</html>", {"Location": f"{cdn.url}/data?signature=a%2Fb~c"})
    answer = lab.ask(BLOB_PATH, {"Range": "bytes=0-"}, method=method)
    assert (answer.status, answer.body) == (200, BODY if method == "GET" else b"")
    assert [(request.method, request.target) for request in cdn.requests] == [(method, "/data?signature=a%2Fb~c")]
    assert cdn.requests[0].headers["range"] == "bytes=0-"
    assert "location" not in answer.headers


@pytest.mark.parametrize("location", ["/elsewhere/data", "../../../../elsewhere/data", "//{host}/elsewhere/data"])
def test_a_relative_redirect_is_followed(lab: Lab, location: str) -> None:
    lab.upstream.answers["/elsewhere/data"] = reply(200, b"found")
    lab.upstream.answers[BLOB] = reply(302, b"", {"Location": location.format(host=lab.upstream.host)})
    assert lab.ask(BLOB_PATH).body == b"found"


def test_manifests_redirect_too(lab: Lab, cdn: RawUpstream) -> None:
    lab.upstream.answers[lab.manifest] = reply(307, b"", {"Location": f"{cdn.url}/data"})
    assert lab.ask(lab.path).body == BODY


def test_no_authorization_goes_to_another_host_not_even_on_the_way_back(cdn: RawUpstream) -> None:
    with Lab() as lab:
        guard(lab.upstream, lab.manifest, reply(307, b"", {"Location": f"{cdn.url}/hop"}))
        cdn.answers["/hop"] = reply(307, b"", {"Location": f"{lab.upstream.url}/back"})
        lab.upstream.answers["/back"] = reply(200, b"found")
        assert lab.ask(lab.path).body == b"found"
        assert lab.upstream.asked("manifests/latest")[-1].headers["authorization"] == "Bearer real-token-1"
        assert "authorization" not in cdn.requests[0].headers
        assert "authorization" not in lab.upstream.asked("/back")[0].headers


def test_a_clients_own_authorization_goes_to_no_other_host(lab: Lab, cdn: RawUpstream) -> None:
    lab.upstream.answers[BLOB] = reply(307, b"", {"Location": f"{cdn.url}/data"})
    assert lab.ask(BLOB_PATH, {"Authorization": "Bearer the-clients-own"}).status == 200
    assert lab.upstream.requests[0].headers["authorization"] == "Bearer the-clients-own"
    assert "authorization" not in cdn.requests[0].headers


def test_another_port_is_another_host(lab: Lab) -> None:
    with RawUpstream() as neighbour:
        neighbour.answers["/data"] = reply(200, b"found")
        lab.upstream.answers[BLOB] = reply(307, b"", {"Location": f"{neighbour.url}/data"})
        assert lab.ask(BLOB_PATH, {"Authorization": "Bearer the-clients-own"}).body == b"found"
        assert "authorization" not in neighbour.requests[0].headers


def test_authorization_is_kept_on_the_same_host(lab: Lab) -> None:
    lab.upstream.answers["/data"] = reply(200, b"found")
    lab.upstream.answers[BLOB] = reply(307, b"", {"Location": "/data"})
    assert lab.ask(BLOB_PATH, {"Authorization": "Bearer the-clients-own"}).body == b"found"
    assert lab.upstream.asked("/data")[0].headers["authorization"] == "Bearer the-clients-own"


def test_a_mirror_that_is_led_to_itself_stops() -> None:
    with Lab() as lab:
        lab.upstream.answers[BLOB] = reply(307, b"", {"Location": lab.mirror.url + BLOB})
        assert lab.ask(BLOB_PATH).status == 502
        assert len(lab.upstream.requests) < 10


def test_a_cookie_is_neither_kept_nor_sent(lab: Lab) -> None:
    lab.upstream.answers["/data"] = reply(200, b"found")
    lab.upstream.answers[BLOB] = reply(307, b"", {"Location": "/data", "Set-Cookie": "a=b; Path=/"})
    assert "set-cookie" not in lab.ask(BLOB_PATH).headers
    lab.ask(BLOB_PATH)
    assert not any("cookie" in request.headers for request in lab.upstream.requests)


def test_a_netrc_is_never_read(tmp_path: object) -> None:
    netrc = f"{tmp_path}/netrc"
    with open(netrc, "w") as file:
        file.write("default login alice password wonderland\n")
    with Lab(env={"NETRC": netrc}) as lab:
        lab.upstream.answers[BLOB] = reply(200, b"x")
        assert lab.ask(BLOB_PATH).status == 200
        assert "authorization" not in lab.upstream.requests[0].headers


def test_a_range_comes_back_as_it_is(lab: Lab) -> None:
    headers = {"Content-Range": "bytes 2-4/10", "Accept-Ranges": "bytes"}
    lab.upstream.answers[BLOB] = reply(206, b"abc", headers)
    answer = lab.ask(BLOB_PATH, {"Range": "bytes=2-4", "If-Range": '"x"'})
    assert (answer.status, answer.body, answer.headers["content-range"]) == (206, b"abc", "bytes 2-4/10")
    seen = lab.upstream.requests[0].headers
    assert (seen["range"], seen["if-range"]) == ("bytes=2-4", '"x"')


@pytest.mark.parametrize("value", ["bytes=zz", "bytes", "lines=1-2", "bytes=5-2"])
def test_a_range_that_makes_no_sense_is_ignored(lab: Lab, value: str) -> None:
    lab.upstream.answers[BLOB] = reply(200, b"whole")
    assert lab.ask(BLOB_PATH, {"Range": value}).body == b"whole"
    assert lab.upstream.requests[0].headers.get("range") in (None, "lines=1-2")


def test_a_bad_range_is_416_with_the_size(lab: Lab) -> None:
    lab.upstream.answers[BLOB] = reply(416, b"<html>", {"Content-Range": "bytes */10", "Content-Type": "text/html"})
    answer = lab.ask(BLOB_PATH, {"Range": "bytes=99-"})
    assert (answer.status, answer.code, answer.headers["content-range"]) == (416, "RANGE_INVALID", "bytes */10")


def test_not_modified_comes_back_as_it_is(lab: Lab) -> None:
    lab.upstream.answers[lab.manifest] = head_of(reply(304, b"", {"ETag": '"x"', "X-Unframed": "1"}))
    answer = lab.ask(lab.path, {"If-None-Match": '"x"'})
    assert (answer.status, answer.body, answer.headers["etag"]) == (304, b"", '"x"')
    assert lab.ask(lab.path).status == 304, "the connection is fit for the next request"


@pytest.mark.parametrize(
    "link", ["</v2/library/{name}/tags/list?last=b&n=2>", "<{url}/v2/library/{name}/tags/list?last=b&n=2>"]
)
def test_the_link_to_the_next_page_leads_to_the_mirror(lab: Lab, link: str) -> None:
    path = f"/v2/library/{lab.name}/tags/list"
    link = link.format(name=lab.name, url=lab.upstream.url) + '; rel="next"'
    lab.upstream.answers[path] = reply_json(200, {"tags": ["a", "b"]}, {"Link": link})
    answer = lab.ask(f"/v2/{lab.name}/tags/list?n=2&last=0&ns=docker.io&evil=1")
    assert answer.headers["link"] == f'</v2/{lab.name}/tags/list?last=b&n=2&ns=docker.io>; rel="next"'
    assert lab.upstream.requests[0].target == f"{path}?n=2&last=0"


@pytest.mark.parametrize(
    "link",
    ['</x?last=b>; rel="next"; title=x', "</x?last=b>; REL=NEXT", '</x?n=1>; rel="prev", </x?last=b>; rel="next"'],
)
def test_the_next_page_is_found_however_it_is_written(lab: Lab, link: str) -> None:
    lab.upstream.answers[f"/v2/library/{lab.name}/tags/list"] = reply_json(200, {}, {"Link": link})
    answer = lab.ask(f"/v2/{lab.name}/tags/list")
    assert answer.headers["link"] == f'</v2/{lab.name}/tags/list?last=b>; rel="next"'


@pytest.mark.parametrize(
    "link", ["</x?a=\x01b>; rel=next", '</x?"<>; rel=next', "</x>; rel=prev", "nonsense", "<a<b>>; rel=next", ""]
)
def test_another_link_is_left_out(lab: Lab, link: str) -> None:
    lab.upstream.answers[f"/v2/library/{lab.name}/tags/list"] = reply_json(200, {}, {"Link": link})
    assert "link" not in lab.ask(f"/v2/{lab.name}/tags/list").headers


def test_referrers_are_passed_on_with_their_filter(lab: Lab) -> None:
    path = f"/v2/library/{lab.name}/referrers/{DIGEST}"
    lab.upstream.answers[path] = reply_json(200, {"manifests": []}, {"OCI-Filters-Applied": "artifactType"})
    answer = lab.ask(f"/v2/{lab.name}/referrers/{DIGEST}?artifactType=application/x%2By")
    assert (answer.json, answer.headers["oci-filters-applied"]) == ({"manifests": []}, "artifactType")
    assert lab.upstream.requests[0].target == f"{path}?artifactType=application%2Fx%2By"


def test_a_connection_to_upstream_serves_many_requests(lab: Lab, cdn: RawUpstream) -> None:
    lab.upstream.answers[BLOB] = reply(307, b"<html>", {"Location": f"{cdn.url}/data"})
    lab.ask(BLOB_PATH)
    before = lab.upstream.connections + cdn.connections
    for _ in range(10):
        assert lab.ask(BLOB_PATH).body == BODY
    assert lab.upstream.connections + cdn.connections == before


def test_a_kept_connection_that_upstream_has_closed_is_replaced(lab: Lab) -> None:
    def answer_and_close(request: Request, connection: socket.socket) -> None:
        connection.sendall(reply(200, b"first"))

    lab.upstream.answers[BLOB] = answer_and_close
    assert lab.ask(BLOB_PATH).body == b"first"
    time.sleep(0.1)
    assert lab.ask(BLOB_PATH).body == b"first"


def test_a_connection_that_is_closed_instead_of_an_answer_is_tried_once_more(lab: Lab) -> None:
    def answer_the_second(request: Request, connection: socket.socket) -> None:
        if len(lab.upstream.requests) == 2:
            connection.sendall(reply(200, b"second"))

    lab.upstream.answers[BLOB] = answer_the_second
    assert lab.ask(BLOB_PATH).body == b"second"


def test_the_access_line_names_the_host_that_was_redirected_to(lab: Lab, cdn: RawUpstream) -> None:
    cdn.answers["/data"] = reply(403)  # an error's line tells it too
    lab.upstream.answers[BLOB] = reply(307, b"", {"Location": f"{cdn.url}/data?signature=secret"})
    since = lab.mirror.mark()
    lab.ask(BLOB_PATH)
    assert poll(lambda: lab.mirror.log(since).endswith(f" {lab.upstream.host}>{cdn.host}\n"), 5)
    log = lab.mirror.log(since)
    assert f"[WARNING] {cdn.host} answered 403" in log
    assert "secret" not in lab.mirror.log()


def chunks(monkeypatch: pytest.MonkeyPatch, *parts: tuple[int, float]) -> list[int]:
    """Return the sizes of the chunks of a transfer, in KiB; its `parts` are bytes and their rate in bytes a second."""
    clock, sizes = 0.0, []
    monkeypatch.setattr("mirror.time.monotonic", lambda: clock)
    pace = Pace()
    for part, rate in parts:
        left = part
        while left > 0:
            sizes.append(pace.size // KIB)
            clock += pace.size / rate
            left -= pace.size
            pace.count(pace.size)
    return sizes


def test_chunks_of_a_fast_transfer_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = chunks(monkeypatch, (3 * MIB, 100e6))
    assert sizes == [16, 16, 32, *[64] * 15, *[256] * 8]


def test_chunks_are_small_once_the_buffers_of_a_slow_client_are_full(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = chunks(monkeypatch, (512 * KIB, 100e6), (64 * KIB, 50e3), (2 * MIB, 50e3))
    assert sizes[:10] == [16, 16, 32, *[64] * 7]
    assert set(sizes[10:]) == {64, 16}
    assert sizes.count(64) == 8, "that one is the first that was slow"


def test_chunks_of_a_transfer_that_becomes_fast_later_are_large_then(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = chunks(monkeypatch, (MIB, 1e6), (MIB, 100e6), (MIB, 100e6))
    assert sizes == [*[16] * 128, *[256] * 4]
