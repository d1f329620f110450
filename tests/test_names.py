"""Names, tags and digests: completed, checked before anything goes upstream, and never reflected."""

import json
from collections.abc import Iterator

import pytest
from lab import DIGEST
from lab import Lab
from lab import reply_json
from lab import send_raw

import mirror


@pytest.fixture(scope="module")
def shared_lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.fixture
def lab(shared_lab: Lab) -> Lab:
    shared_lab.reset()
    return shared_lab


@pytest.mark.parametrize(
    ("asked", "upstream"),
    [
        ("app", "library/app"),
        ("library/app", "library/app"),
        ("owner/app", "owner/app"),
        ("owner/group/app", "owner/group/app"),
        ("manifests", "library/manifests"),
        ("owner/manifests/blobs/tags", "owner/manifests/blobs/tags"),
        ("ab_c__d---e/1.2", "ab_c__d---e/1.2"),
    ],
)
def test_a_short_name_is_completed_and_a_full_one_kept(lab: Lab, asked: str, upstream: str) -> None:
    lab.upstream.answers[f"/v2/{upstream}/manifests/latest"] = reply_json(200, {})
    assert lab.ask(f"/v2/{asked}/manifests/latest").status == 200
    assert [request.target for request in lab.upstream.requests] == [f"/v2/{upstream}/manifests/latest"]


BAD_NAMES = [
    "APP", "-app", "app-", "a..b", "a___b", "a//b", "../etc", "a/../b", "a b", "a\\b", "ä", "a%00b", "%2e%2e/x",
    "a%0d%0aX:y", "a?b", "a%3fb", "a#b", "a:b", "a@b", "a" * 256, "a/" * 130 + "a", "<script>", "a%25b",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("rest", ["manifests/latest", f"blobs/{DIGEST}", "tags/list", f"referrers/{DIGEST}"])
def test_a_bad_name_goes_no_further(lab: Lab, name: str, rest: str) -> None:
    path = f"/v2/{name}/{rest}".encode()
    raw = send_raw(
        lab.mirror, b"GET " + path.replace(b" ", b"%20") + b" HTTP/1.1\r\nHost: m\r\nConnection: close\r\n\r\n"
    )
    status = int(raw.split()[1])
    assert status in (400, 404)
    assert b"script" not in raw
    assert lab.upstream.requests == []


@pytest.mark.parametrize("name", ["APP", "a..b", "a//b", "a" * 256])
def test_a_bad_name_is_told_by_its_code(lab: Lab, name: str) -> None:
    reply = lab.ask(f"/v2/{name}/manifests/latest")
    assert (reply.status, reply.code) == (400, "NAME_INVALID")


@pytest.mark.parametrize("path", ["/v2/library%2Fapp/manifests/latest", "/v2/app/manifests%2flatest"])
def test_an_encoded_slash_is_no_slash(lab: Lab, path: str) -> None:
    reply = lab.ask(path)
    assert (reply.status, reply.code) == (400, "NAME_INVALID")
    assert lab.upstream.requests == []


@pytest.mark.parametrize(
    ("reference", "code"),
    [
        (".hidden", "MANIFEST_INVALID"),
        ("-x", "MANIFEST_INVALID"),
        ("a" * 129, "MANIFEST_INVALID"),
        ("a%20b", "MANIFEST_INVALID"),
        ("ta$g", "MANIFEST_INVALID"),
        ("sha256:abc", "DIGEST_INVALID"),
        (DIGEST.upper().replace("SHA256", "sha256"), "DIGEST_INVALID"),
        ("SHA256:" + "0" * 64, "DIGEST_INVALID"),
        ("sha512:" + "0" * 64, "DIGEST_INVALID"),
        (":", "DIGEST_INVALID"),
        ("other:" + "a" * 300, "DIGEST_INVALID"),
    ],
)
def test_a_bad_reference_is_told_by_its_code(lab: Lab, reference: str, code: str) -> None:
    reply = lab.ask(f"/v2/app/manifests/{reference}")
    assert (reply.status, reply.code) == (400, code)
    assert lab.upstream.requests == []


@pytest.mark.parametrize("digest", ["latest", "sha256:", "sha256:" + "g" * 64])
def test_a_blob_has_a_digest(lab: Lab, digest: str) -> None:
    reply = lab.ask(f"/v2/app/blobs/{digest}")
    assert (reply.status, reply.code) == (400, "DIGEST_INVALID")
    assert lab.upstream.requests == []


@pytest.mark.parametrize(
    "reference", ["latest", "v1.0_x-y", "_", "A" * 128, DIGEST, "sha512:" + "a" * 128, "b3+x:Zz=="]
)
def test_good_references_pass(reference: str) -> None:
    assert mirror.check_reference(reference) == reference


@pytest.mark.parametrize(
    "host",
    ["evil.example/x", "a b", "<script>", 'a"b', "a,b", "a@b", "x" * 300, "a:99999999", "", "-x", "[::1", "a\tb"],
)
@pytest.mark.parametrize("path", ["/v2/", "/token", "/healthz"])
def test_a_hostile_host_header_is_refused_and_not_reflected(lab: Lab, host: str, path: str) -> None:
    raw = send_raw(lab.mirror, f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert raw.startswith(b"HTTP/1.1 400")
    assert b"script" not in raw
    assert b"evil" not in raw
    assert lab.upstream.requests == []


@pytest.mark.parametrize("host", ["mirror.example", "mirror.example:8443", "127.0.0.1:5000", "[::1]:5000", "my_host"])
def test_a_plain_host_header_is_taken(lab: Lab, host: str) -> None:
    assert lab.ask("/healthz", {"Host": host}).status == 200


@pytest.mark.parametrize(
    "path", ["//v2/app/manifests/latest", "///v2/", "/v2//app/manifests/latest", "/v2/app//tags/list"]
)
def test_a_doubled_slash_goes_no_further(lab: Lab, path: str) -> None:
    raw = send_raw(lab.mirror, f"GET {path} HTTP/1.1\r\nHost: m\r\nConnection: close\r\n\r\n".encode())
    assert raw.startswith(b"HTTP/1.1 400")
    assert lab.upstream.requests == []


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /v2/" + b"a" * 9000 + b"?password=hunter2 HTTP/1.1", 414),
        (b"GET  /v2/ HTTP/1.1", 400),
        (b"G\x00T /v2/?password=hunter2 HTTP/1.1", 400),
        (b"GET /token?password=hunter2\x01 HTTP/1.1", 400),
        (b"<SCRIPT> /v2/ HTTP/1.1", 400),
        (b"GET /v2/ HTTP/9.9", 400),
        (b"GET /v2/ HTTP/1.1\r\nAuthorization: Basic hunter2\x01", 400),
        (b"GET /v2/ HTTP/1.1\r\nhunter2 : x", 400),
        (b"GET /v2/ HTTP/1.1\r\nX: " + b"hunter2" * 3000, 431),
        (b"GET /v2/ HTTP/1.1\r\nTransfer-Encoding: hunter2", 501),
    ],
)
def test_what_is_no_http_is_refused_in_json_and_repeated_nowhere(lab: Lab, request_line: bytes, status: int) -> None:
    since = lab.mirror.mark()
    raw = send_raw(lab.mirror, request_line + b"\r\nHost: m\r\nConnection: close\r\n\r\n")
    head, _, body = raw.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert json.loads(body)["errors"][0]["code"] == "UNSUPPORTED"
    assert b"hunter2" not in raw
    assert b"SCRIPT" not in raw
    log = lab.mirror.log(since)
    assert f"127.0.0.1 got {status}" in log
    assert "hunter2" not in log
    assert lab.upstream.requests == []
