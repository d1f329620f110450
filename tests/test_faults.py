"""What goes wrong upstream: a clean error in time, or a broken connection; never a short body that ends cleanly."""

import http.client
import socket
import ssl
import time
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from lab import DIGEST
from lab import Lab
from lab import Reply
from lab import reply_json
from lab import send_raw
from processes import poll
from upstream import RawUpstream
from upstream import Request
from upstream import reply
from upstream import reset
from upstream import sends

BLOB_PATH = f"/v2/app/blobs/{DIGEST}"
BLOB = f"/v2/library/app/blobs/{DIGEST}"
MIB = 1 << 20
BROKEN = (http.client.IncompleteRead, ConnectionResetError)


@pytest.fixture(scope="module")
def shared_lab() -> Iterator[Lab]:
    with Lab(connect_timeout=1, first_byte_timeout=1.5, idle_timeout=0.3) as lab:
        yield lab


@pytest.fixture
def lab(shared_lab: Lab) -> Lab:
    shared_lab.reset()
    return shared_lab


def unavailable(reply: Reply, status: int) -> bool:
    return (reply.status, reply.code) == (status, "UNAVAILABLE")


def drain(client: socket.socket) -> None:
    while client.recv(65536):
        pass


HEAD = reply(200, b"", {"Content-Length": str(4 * MIB)})
CHUNKED = reply(200, b"", {"Transfer-Encoding": "chunked"}) + b"%x\r\n" % (4 * MIB)
PART = b"x" * (2 * MIB)


@pytest.mark.parametrize("head", [HEAD, CHUNKED], ids=["length", "chunked"])
@pytest.mark.parametrize("part", [b"", b"x", b"x" * 40_000, PART], ids=len)
@pytest.mark.parametrize("end", [lambda _: None, reset, lambda _: time.sleep(3)], ids=["closes", "resets", "stalls"])
def test_an_answer_that_breaks_off_upstream_breaks_off_here(
    lab: Lab, head: bytes, part: bytes, end: Callable[[socket.socket], object]
) -> None:
    lab.upstream.answers[BLOB] = sends(head, part, then=end)
    since = lab.mirror.mark()
    with pytest.raises(BROKEN):
        lab.ask(BLOB_PATH)
    log = lab.mirror.log(since)
    assert "broke off" in log
    assert "Traceback" not in log


def test_an_old_client_is_not_given_a_clean_end_either(lab: Lab) -> None:
    """To HTTP/1.0 a chunked answer goes without a length: there only a reset tells a cut from the end."""
    lab.upstream.answers[BLOB] = sends(CHUNKED, b"x" * 100_000)
    with socket.create_connection(("127.0.0.1", lab.mirror.port), timeout=30) as client:
        client.sendall(f"GET {BLOB_PATH} HTTP/1.0\r\n\r\n".encode())
        with pytest.raises(ConnectionResetError):
            drain(client)


def chunked(*chunks: bytes, **headers: str) -> bytes:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return reply(200, b"".join(chunks), {"Transfer-Encoding": "chunked", **names})


def test_a_length_beside_chunks_is_left_out(lab: Lab) -> None:
    lab.upstream.answers[BLOB] = chunked(b"5\r\nhello\r\n0\r\n\r\n", Content_Length="200")
    answer = lab.ask(BLOB_PATH)
    assert (answer.body, "content-length" in answer.headers) == (b"hello", False)


@pytest.mark.parametrize("coding", ["gzip, chunked", "chunked, chunked", "identity", "x"])
def test_a_transfer_coding_that_is_not_plainly_chunked_is_refused(lab: Lab, coding: str) -> None:
    lab.upstream.answers[BLOB] = sends(reply(200, b"5\r\nhello\r\n0\r\n\r\n", {"Transfer-Encoding": coding}))
    assert unavailable(lab.ask(BLOB_PATH), 502)


@pytest.mark.parametrize("size", [b"-1", b"-5", b"x", b"", b"5x"])
@pytest.mark.parametrize("path", ["blob", "manifest"])
def test_a_chunk_without_a_size_breaks_the_answer_off(lab: Lab, size: bytes, path: str) -> None:
    lab.upstream.answers[BLOB] = lab.upstream.answers[lab.manifest] = sends(
        chunked(b"%x\r\n%s\r\n" % (len(PART), PART), size + b"\r\n" + PART)
    )
    since = lab.mirror.mark()
    with pytest.raises(BROKEN):
        lab.ask(BLOB_PATH if path == "blob" else lab.path)
    assert "Traceback" not in lab.mirror.log(since)
    lab.upstream.answers[BLOB] = sends(chunked(size + b"\r\n" + PART).replace(b"200 OK", b"404 Not Found"))
    assert unavailable(lab.ask(BLOB_PATH), 502)


@pytest.mark.parametrize("status", [204, 304])
def test_an_answer_that_can_have_no_body_is_not_waited_for(lab: Lab, status: int) -> None:
    answer = reply(status, b"", {"Transfer-Encoding": "chunked", "ETag": '"x"'})
    lab.upstream.answers[lab.manifest] = sends(answer, then=lambda _: lab.upstream.ending.wait(10))
    assert lab.ask(lab.path).status == status
    lab.upstream.answers[lab.manifest] = reply_json(200, {"right": True})
    assert lab.ask(lab.path).json == {"right": True}


def test_a_small_body_that_stalls_or_drips_is_504(lab: Lab) -> None:
    head = reply(200, b"", {"Content-Length": "1000"})
    lab.upstream.answers[lab.manifest] = sends(head, b"x", then=lambda _: lab.upstream.ending.wait(10))
    assert unavailable(lab.ask(lab.path), 504)

    def drip(request: Request, connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(100):
            connection.sendall(b"x")
            time.sleep(0.2)

    lab.upstream.answers[lab.manifest] = drip
    assert unavailable(lab.ask(lab.path), 504)


@pytest.mark.parametrize("answer", [reply(200, b"x", {"Content-Length": "100"}), chunked(b"5\r\nhel")])
def test_a_small_body_that_is_cut_is_502(lab: Lab, answer: bytes) -> None:
    lab.upstream.answers[lab.manifest] = answer
    assert unavailable(lab.ask(lab.path), 502)


def test_a_manifest_in_chunks_larger_than_one_read_is_whole(lab: Lab) -> None:
    lab.upstream.answers[lab.manifest] = chunked(b"%x\r\n%s\r\n" % (len(PART), PART), b"0\r\n\r\n")
    assert lab.ask(lab.path).body == PART


@pytest.mark.parametrize("label", ["a" * 70, "a..b", "xn--"])
def test_a_host_that_cannot_be_looked_up_is_502(lab: Lab, label: str) -> None:
    lab.upstream.answers[BLOB] = reply(307, b"", {"Location": f"http://{label}.example/"})
    assert unavailable(lab.ask(BLOB_PATH), 502)


def test_a_status_line_of_html_is_shown_to_nobody(lab: Lab) -> None:
    lab.upstream.answers[BLOB] = sends(b"<html><script>alert(1)</script>\r\n\r\n")
    since = lab.mirror.mark()
    answer = lab.ask(BLOB_PATH)
    assert unavailable(answer, 502)
    assert b"script" not in answer.body
    assert "script" not in lab.mirror.log(since)


def test_the_idle_limit_does_not_shorten_the_wait_for_the_first_byte() -> None:
    with Lab(idle_timeout=0.5, first_byte_timeout=10) as lab:

        def late(request: Request, connection: socket.socket) -> None:
            time.sleep(1.5)
            connection.sendall(HEAD)
            connection.recv(1)

        lab.upstream.answers[BLOB] = late
        with socket.create_connection(("127.0.0.1", lab.mirror.port), timeout=30) as client:
            client.sendall(f"GET {BLOB_PATH} HTTP/1.1\r\nHost: m\r\n\r\n".encode())
            assert client.recv(100).startswith(b"HTTP/1.1 200 OK")
            with pytest.raises(ConnectionResetError):
                drain(client)


def test_an_answer_without_a_length_is_refused(lab: Lab) -> None:
    lab.upstream.answers[BLOB] = reply(200, b"who knows whether this is all", {"X-Unframed": "1"})
    assert unavailable(lab.ask(BLOB_PATH), 502)


@pytest.mark.parametrize("length", ["-1", "abc", "1, 2", "1e3", "", "0x10"])
def test_a_length_that_is_none_is_refused(lab: Lab, length: str) -> None:
    lab.upstream.answers[BLOB] = sends(reply(200, b"x", {"Content-Length": length}))
    assert unavailable(lab.ask(BLOB_PATH), 502)


def test_a_body_that_is_longer_than_its_length_is_cut_there(lab: Lab) -> None:
    lab.upstream.answers[BLOB] = reply(200, b"abcd" + reply(200, b"smuggled"), {"Content-Length": "4"})
    assert lab.ask(BLOB_PATH).body == b"abcd"
    lab.upstream.answers[lab.manifest] = reply_json(200, {"right": True})
    assert lab.ask(lab.path).json == {"right": True}


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\r\n\r\n",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 99999 OK\r\n\r\n",
        b"SSH-2.0-OpenSSH_9\r\n",
        b"\x16\x03\x01\x02\x00",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 300 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 " + b"2" * 100_000,
    ],
    ids=lambda garbage: repr(garbage[:20]),
)
def test_garbage_is_502_or_what_can_be_read_of_it(lab: Lab, garbage: bytes) -> None:
    lab.upstream.answers[BLOB] = sends(garbage)
    assert unavailable(lab.ask(BLOB_PATH), 502)


def test_an_upstream_that_does_not_answer_is_504(lab: Lab) -> None:
    lab.upstream.answers[BLOB] = sends(then=lambda _: lab.upstream.ending.wait(10))
    assert unavailable(lab.ask(BLOB_PATH), 504)


def test_a_head_that_drips_is_504(lab: Lab) -> None:
    def drip(request: Request, connection: socket.socket) -> None:
        for byte in HEAD:
            connection.sendall(bytes([byte]))
            time.sleep(0.2)

    lab.upstream.answers[BLOB] = drip
    assert unavailable(lab.ask(BLOB_PATH), 504)


def test_redirects_share_one_time_limit(lab: Lab) -> None:
    def slowly(request: Request, connection: socket.socket) -> None:
        time.sleep(1.2)
        connection.sendall(reply(307, b"", {"Location": BLOB}))

    lab.upstream.answers[BLOB] = slowly
    assert unavailable(lab.ask(BLOB_PATH), 504)


def test_a_token_endpoint_that_does_not_answer_is_504() -> None:
    challenge = {"WWW-Authenticate": 'Bearer realm="{}/realm",service="s"'}
    with Lab(connect_timeout=1, first_byte_timeout=1) as lab:
        challenge["WWW-Authenticate"] = challenge["WWW-Authenticate"].format(lab.upstream.url)
        lab.upstream.answers[BLOB] = reply(401, b"", challenge)
        lab.upstream.answers["/realm"] = sends(then=lambda _: lab.upstream.ending.wait(10))
        assert unavailable(lab.ask(BLOB_PATH), 504)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://nowhere.invalid", "https://127.0.0.1:1"])
def test_an_upstream_that_cannot_be_reached_is_502(url: str, lab: Lab) -> None:
    lab.upstream.answers[BLOB] = reply(307, b"", {"Location": f"{url}/data?signature=secret"})
    since = lab.mirror.mark()
    answer = lab.ask(BLOB_PATH)
    assert unavailable(answer, 502)
    assert b"secret" not in answer.body
    assert "secret" not in lab.mirror.log(since)


def test_an_address_that_swallows_packets_is_504(lab: Lab) -> None:
    with socket.create_server(("127.0.0.9", 0), backlog=0) as full:
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        lab.upstream.answers[BLOB] = reply(307, b"", {"Location": f"http://127.0.0.9:{full.getsockname()[1]}/"})
        assert unavailable(lab.ask(BLOB_PATH), 504)
        for filler in fillers:
            filler.close()


@pytest.mark.parametrize(
    "location",
    [
        "ftp://127.0.0.1/x",
        "file:///etc/passwd",
        "http://",
        "http://[::1",
        "http://user:password@127.0.0.1/x",
        "http://127.0.0.1:99999/",
        "javascript:alert(1)",
        "http://a b/",
    ],
)
def test_a_redirect_to_what_is_no_web_address_is_502(lab: Lab, location: str) -> None:
    lab.upstream.answers[BLOB] = reply(307, b"", {"Location": location})
    assert unavailable(lab.ask(BLOB_PATH), 502)


def test_a_redirect_loop_is_502(lab: Lab) -> None:
    lab.upstream.answers[BLOB] = reply(307, b"", {"Location": BLOB})
    assert unavailable(lab.ask(BLOB_PATH), 502)
    assert len(lab.upstream.requests) == 6


def test_a_redirect_without_a_location_is_502(lab: Lab) -> None:
    lab.upstream.answers[BLOB] = reply(307, b"")
    assert unavailable(lab.ask(BLOB_PATH), 502)


def test_a_redirect_with_a_huge_body_is_502(lab: Lab) -> None:
    lab.upstream.answers[BLOB] = reply(307, b"x" * (2 * MIB), {"Location": "/data"})
    assert unavailable(lab.ask(BLOB_PATH), 502)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def tls_upstream(authority: trustme.CA, host: str = "127.0.0.1") -> RawUpstream:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(host).configure_cert(context)
    return RawUpstream(context=context)


def test_tls_is_verified_against_the_registrys_own_authority(authority: trustme.CA, tmp_path: Path) -> None:
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    with Lab(tls_upstream(authority), ca=str(tmp_path / "ca.pem")) as lab:
        lab.upstream.answers[BLOB] = reply(200, b"x")
        assert lab.ask(BLOB_PATH).body == b"x"


def test_an_unknown_authority_is_502(authority: trustme.CA) -> None:
    with Lab(tls_upstream(authority)) as lab:
        lab.upstream.answers[BLOB] = reply(200, b"x")
        assert unavailable(lab.ask(BLOB_PATH), 502)
        assert lab.upstream.requests == []


def test_a_certificate_for_another_host_is_502(authority: trustme.CA, tmp_path: Path) -> None:
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    with Lab(tls_upstream(authority, "other.example"), ca=str(tmp_path / "ca.pem")) as lab:
        lab.upstream.answers[BLOB] = reply(200, b"x")
        assert unavailable(lab.ask(BLOB_PATH), 502)
        assert lab.upstream.requests == []


def test_a_redirect_from_https_to_http_is_not_followed(authority: trustme.CA, tmp_path: Path) -> None:
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    with RawUpstream() as plain, Lab(tls_upstream(authority), ca=str(tmp_path / "ca.pem")) as lab:
        lab.upstream.answers[BLOB] = reply(307, b"", {"Location": f"{plain.url}/data"})
        assert unavailable(lab.ask(BLOB_PATH), 502)
        assert plain.requests == []


def test_a_tls_connection_that_is_cut_breaks_the_answer_off(authority: trustme.CA, tmp_path: Path) -> None:
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    with Lab(tls_upstream(authority), ca=str(tmp_path / "ca.pem"), idle_timeout=1) as lab:
        lab.upstream.answers[BLOB] = sends(HEAD, PART)
        with pytest.raises(BROKEN):
            lab.ask(BLOB_PATH)


def test_the_headers_go_out_before_a_slow_first_chunk(lab: Lab) -> None:
    lab.upstream.answers[BLOB] = sends(HEAD, b"x", then=lambda _: lab.upstream.ending.wait(10))
    with socket.create_connection(("127.0.0.1", lab.mirror.port), timeout=30) as client:
        client.sendall(f"GET {BLOB_PATH} HTTP/1.1\r\nHost: m\r\n\r\n".encode())
        assert client.recv(65536).startswith(b"HTTP/1.1 200 OK")


@pytest.fixture
def patient_lab() -> Iterator[Lab]:
    with Lab(idle_timeout=600) as lab:
        lab.reset()
        yield lab


def test_when_the_client_goes_in_mid_transfer_upstream_is_closed_at_once(patient_lab: Lab) -> None:
    def endless(request: Request, connection: socket.socket) -> None:
        connection.sendall(reply(200, b"", {"Content-Length": str(1 << 40)}))
        while True:
            connection.sendall(PART)

    leave_in_mid_transfer(patient_lab, endless)


def test_when_the_client_goes_while_upstream_is_silent_upstream_is_closed_at_once(patient_lab: Lab) -> None:
    def silent(request: Request, connection: socket.socket) -> None:
        connection.sendall(HEAD + PART)
        assert connection.recv(1) == b""  # the mirror's end
        patient_lab.upstream.closed.set()

    leave_in_mid_transfer(patient_lab, silent)


def test_when_the_client_goes_before_the_first_byte_upstream_is_closed_at_once() -> None:
    with Lab(first_byte_timeout=600) as lab:

        def silent(request: Request, connection: socket.socket) -> None:
            assert connection.recv(1) == b""
            lab.upstream.closed.set()

        lab.upstream.answers[BLOB] = silent
        since = lab.mirror.mark()
        with socket.create_connection(("127.0.0.1", lab.mirror.port)) as client:
            client.sendall(f"GET {BLOB_PATH} HTTP/1.1\r\nHost: m\r\n\r\n".encode())
            assert poll(lambda: bool(lab.upstream.requests), 10)
        assert lab.upstream.closed.wait(20)
        assert poll(lambda: 499 in {line.status for line in lab.mirror.access_log(since)}, 5)
        assert "Traceback" not in lab.mirror.log()


def test_a_client_that_sent_bytes_early_and_goes_is_noticed(patient_lab: Lab) -> None:
    def silent(request: Request, connection: socket.socket) -> None:
        connection.sendall(HEAD + PART)
        assert connection.recv(1) == b""
        patient_lab.upstream.closed.set()

    leave_in_mid_transfer(patient_lab, silent, early=b"GET /v2/ HTTP/1.1\r\n")


def leave_in_mid_transfer(lab: Lab, answer: Callable[[Request, socket.socket], None], early: bytes = b"") -> None:
    lab.upstream.answers[BLOB] = answer
    since = lab.mirror.mark()
    with socket.create_connection(("127.0.0.1", lab.mirror.port), timeout=30) as client:
        client.sendall(f"GET {BLOB_PATH} HTTP/1.1\r\nHost: m\r\n\r\n".encode() + early)
        received = 0
        while received < MIB:
            received += len(client.recv(65536))
        time.sleep(0.5)  # the mirror waits for upstream, or for us
    assert lab.upstream.closed.wait(20)
    lab.mirror.wait_for_requests(1, since)
    log = lab.mirror.log(since)
    assert "Traceback" not in log
    assert "broke off" not in log, "the client's leave is no fault of upstream"


def test_a_client_that_sends_its_next_request_early_is_served_both(patient_lab: Lab) -> None:
    patient_lab.upstream.answers[BLOB] = reply(200, PART)
    request = f"GET {BLOB_PATH} HTTP/1.1\r\nHost: m\r\n"
    received = send_raw(patient_lab.mirror, f"{request}\r\n{request}Connection: close\r\n\r\n".encode())
    assert received.count(b"HTTP/1.1 200 OK") == 2
    assert received.count(b"x" * 1024) >= 2 * len(PART) // 1024


ERROR = {"errors": [{"code": "X_CODE", "message": "upstream's own words", "detail": {"a": 1}}]}
HTML = {"Content-Type": "text/html"}


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (reply_json(404, ERROR), 404, "X_CODE"),
        (reply(404, b"<html>", HTML), 404, "BLOB_UNKNOWN"),
        (reply(404, b'{"errors": "x"}'), 404, "BLOB_UNKNOWN"),
        (reply(404, b'{"errors": [{"message": 1}]}'), 404, "BLOB_UNKNOWN"),
        (reply(404, b'{"errors": []}'), 404, "BLOB_UNKNOWN"),
        (reply(404, b"[" * 500_000), 404, "BLOB_UNKNOWN"),
        (reply(404, b"x" * (2 * MIB)), 502, "UNAVAILABLE"),
        (reply_json(400, ERROR), 400, "X_CODE"),
        (reply(410, b"<html>", HTML), 410, "UNSUPPORTED"),
        (reply(405, b"<html>", HTML), 405, "UNSUPPORTED"),
        (reply(408, b""), 408, "UNSUPPORTED"),
        (reply_json(429, ERROR), 429, "X_CODE"),
        (reply(429, b"Too many\x00requests", {"Content-Type": "text/plain; charset=utf-8"}), 429, "TOOMANYREQUESTS"),
        (reply(403, b"<html>", HTML), 403, "DENIED"),
        (reply(500, b"<html>", HTML), 502, "UNAVAILABLE"),
        (reply_json(500, ERROR), 502, "UNAVAILABLE"),
        (reply(503, b"<html>", HTML), 502, "UNAVAILABLE"),
        (reply(305, b"<html>", HTML), 502, "UNAVAILABLE"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_each_refusal_of_upstream_has_its_answer(lab: Lab, answer: bytes, status: int, code: str, method: str) -> None:
    lab.upstream.answers[BLOB] = answer
    got = lab.ask(BLOB_PATH, method=method)
    if method == "GET":
        assert (got.status, got.code) == (status, code)
        assert b"<html>" not in got.body
    else:
        too_long = status == 502 and answer.startswith(b"HTTP/1.1 404")
        assert (got.status, got.body) == (404 if too_long else status, b"")
        assert got.headers["content-type"] == "application/json"


def test_upstreams_words_and_detail_are_kept(lab: Lab) -> None:
    lab.upstream.answers[BLOB] = reply_json(404, ERROR)
    assert lab.ask(BLOB_PATH).json == ERROR


@pytest.mark.parametrize("given", [{"Retry-After": "77", "RateLimit-Remaining": "0;w=21600"}, {}])
def test_a_limit_says_when_to_come_again(lab: Lab, given: dict[str, str]) -> None:
    lab.upstream.answers[BLOB] = reply(429, b"Too Many Requests (HAP429)", {"Content-Type": "text/plain", **given})
    answer = lab.ask(BLOB_PATH)
    assert answer.headers["retry-after"] == given.get("Retry-After", "60")
    assert answer.headers.get("ratelimit-remaining") == given.get("RateLimit-Remaining")
    assert "HAP429" in answer.json["errors"][0]["message"]


def test_what_is_missing_is_told_in_the_terms_of_its_route(lab: Lab) -> None:
    lab.upstream.answers["/v2/library/nothing/tags/list"] = reply(404, b"")
    assert lab.ask("/v2/nothing/tags/list").code == "NAME_UNKNOWN"
    lab.upstream.answers[lab.manifest] = reply(404, b"")
    assert lab.ask(lab.path).code == "MANIFEST_UNKNOWN"


@pytest.mark.parametrize(("status", "expected"), [(400, 502), (401, 502), (403, 502), (404, 404), (503, 502)])
def test_a_storage_host_has_no_say_in_who_may_pull(lab: Lab, status: int, expected: int) -> None:
    with RawUpstream("127.0.0.9") as cdn:
        cdn.answers["/data"] = reply(status, b"<?xml?>", {"WWW-Authenticate": 'Bearer realm="http://evil.example/"'})
        lab.upstream.answers[BLOB] = reply(307, b"", {"Location": f"{cdn.url}/data"})
        answer = lab.ask(BLOB_PATH)
        assert answer.status == expected
        assert "www-authenticate" not in answer.headers


@pytest.mark.parametrize("status", [404, 429, 500, 503])
def test_a_ping_that_fails_upstream_fails_here(status: int) -> None:
    with Lab() as lab:
        lab.upstream.answers["/v2/"] = reply(status, b"<html>", HTML)
        expected = {404: 404, 429: 429}.get(status, 502)
        assert lab.ask("/v2/").status == expected
        lab.upstream.answers["/v2/"] = reply_json(200, {})
        assert lab.ask("/v2/").status == 200
