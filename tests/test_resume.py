"""A transfer that upstream cuts goes on where it broke off, and the client sees one whole answer; or it breaks off."""

import hashlib
import http.client
import re
import socket
from collections.abc import Callable
from collections.abc import Iterator
from itertools import pairwise

import pytest
from images import random_bytes
from lab import Lab
from lab import Reply
from lab import reply
from upstream import RawUpstream
from upstream import Request
from upstream import reset
from upstream import sends

MIB = 1 << 20
CONTENT = random_bytes("resume", 3 * MIB)
DIGEST = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
ASKED = f"/v2/app/blobs/{DIGEST}"
BLOB = f"/v2/library/app/blobs/{DIGEST}"
CUT = 700_000
BROKEN = (http.client.IncompleteRead, ConnectionResetError)
Answering = Callable[[Request, socket.socket], None]


@pytest.fixture(scope="module")
def shared_lab() -> Iterator[Lab]:
    with Lab(connect_timeout=1, first_byte_timeout=2, idle_timeout=0.5) as lab:
        yield lab


@pytest.fixture
def lab(shared_lab: Lab) -> Lab:
    shared_lab.reset()
    return shared_lab


def bounds(header: str, size: int) -> tuple[int, int]:
    """Return the first and the last byte that a Range header asks for."""
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", header)
    assert found is not None
    return int(found[1]), int(found[2] or size - 1)


class Storage:
    """Serve one content, Range included, and cut each answer after so many bytes of its body.

    `headers` come with each answer; `head` changes the head of an answer before it is sent.
    """

    def __init__(
        self,
        content: bytes = CONTENT,
        cut: int = CUT,
        ranges: bool = True,
        chunked: bool = False,
        end: Callable[[socket.socket], object] = lambda _: None,
        head: Callable[[bytes, int], bytes] = lambda head, number: head,
        **headers: str,
    ) -> None:
        self.content, self.cut, self.ranges, self.chunked = content, cut, ranges, chunked
        self.end, self.head, self.headers = end, head, headers
        self.asked: list[Request] = []

    def __call__(self, request: Request, connection: socket.socket) -> None:
        """Answer one request."""
        self.asked.append(request)
        size, given = len(self.content), request.headers.get("range")
        first, last = bounds(given, size) if given and self.ranges else (0, size - 1)
        fields = dict(self.headers)
        if given and self.ranges:
            fields["Content-Range"] = f"bytes {first}-{last}/{size}"
        fields |= {"Transfer-Encoding": "chunked"} if self.chunked else {"Content-Length": str(last + 1 - first)}
        status = 206 if "Content-Range" in fields else 200
        connection.sendall(self.head(reply(status, b"", fields), len(self.asked)))
        part = self.content[first : last + 1][: self.cut]
        is_cut = len(part) < last + 1 - first
        if self.chunked:
            part = b"%x\r\n%s\r\n" % (len(part), part) + (b"" if is_cut else b"0\r\n\r\n")
        connection.sendall(part)
        if is_cut:
            self.end(connection)

    def ranges_asked(self) -> list[str | None]:
        """Return the Range headers so far."""
        return [request.headers.get("range") for request in self.asked]


def is_whole(answer: Reply) -> bool:
    return answer.status == 200 and hashlib.sha256(answer.body).hexdigest() == DIGEST.partition(":")[2]


def drain(client: socket.socket) -> None:
    while client.recv(65536):
        pass


def stalls(lab: Lab) -> Callable[[socket.socket], object]:
    return lambda _: lab.upstream.ending.wait(3)


@pytest.mark.parametrize("end", ["closes", "resets", "stalls"])
def test_a_cut_blob_goes_on_from_the_next_byte(lab: Lab, end: str) -> None:
    ends = {"closes": lambda _: None, "resets": reset, "stalls": stalls(lab)}
    storage = lab.upstream.answers[BLOB] = Storage(end=ends[end], ETag='"x"')
    since = lab.mirror.mark()
    answer = lab.ask(ASKED)
    assert is_whole(answer)
    assert answer.headers["content-length"] == str(len(CONTENT))
    asked = storage.ranges_asked()
    assert asked[0] is None
    starts = [0, *(bounds(value, len(CONTENT))[0] for value in asked[1:] if value)]
    assert all(later > earlier for earlier, later in pairwise(starts))
    log = lab.mirror.log(since)
    assert [int(at) for at in re.findall(r"went on at byte (\d+)", log)] == starts[1:]
    assert len(re.findall("broke off", log)) == len(starts) - 1, "one line for each"


@pytest.mark.parametrize("given", ["bytes=1000-", "bytes=1000-2999999", f"bytes=0-{len(CONTENT) - 1}"])
def test_a_clients_own_range_goes_on_too(lab: Lab, given: str) -> None:
    storage = lab.upstream.answers[BLOB] = Storage()
    answer = lab.ask(ASKED, {"Range": given})
    first, last = bounds(given, len(CONTENT))
    assert answer.status == 206
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{len(CONTENT)}"
    assert answer.body == CONTENT[first : last + 1]
    assert len(storage.asked) > 1


def test_a_clients_range_and_conditions_do_not_go_with_the_rest(lab: Lab) -> None:
    storage = lab.upstream.answers[BLOB] = Storage(ETag='"x"')
    lab.ask(ASKED, {"Range": "bytes=5-", "If-Range": '"x"', "If-None-Match": '"y"', "Accept": "a/b"})
    rest = storage.asked[1].headers
    assert ("if-range" in rest, "if-none-match" in rest, rest["accept"]) == (False, False, "a/b")


def test_chunks_without_a_length_go_on(lab: Lab) -> None:
    lab.upstream.answers[BLOB] = Storage(chunked=True)
    assert is_whole(lab.ask(ASKED))


def test_the_registry_is_asked_anew_and_its_new_redirect_followed(lab: Lab) -> None:
    """A signed URL may have expired: here each may be used once."""
    storage = Storage()
    number = iter(range(100))

    def redirect(request: Request, connection: socket.socket) -> None:
        path = f"/data/{next(number)}"
        lab.upstream.answers[path] = once
        connection.sendall(reply(307, b"", {"Location": path}))

    def once(request: Request, connection: socket.socket) -> None:
        lab.upstream.answers[request.path] = reply(403)
        storage(request, connection)

    lab.upstream.answers[BLOB] = redirect
    assert is_whole(lab.ask(ASKED))
    assert len(storage.asked) == len(lab.upstream.asked(BLOB)) > 1


def test_a_server_that_ignores_range_is_read_anew(lab: Lab) -> None:
    cuts = iter((CUT, 2 * CUT, len(CONTENT)))

    def answer(request: Request, connection: socket.socket) -> None:
        Storage(cut=next(cuts), ranges=False)(request, connection)

    lab.upstream.answers[BLOB] = answer
    assert is_whole(lab.ask(ASKED))


def test_a_clients_range_ends_where_it_should_if_the_rest_comes_whole(lab: Lab) -> None:
    answers = iter((Storage(), Storage(ranges=False, cut=len(CONTENT))))
    lab.upstream.answers[BLOB] = lambda request, connection: next(answers)(request, connection)
    assert lab.ask(ASKED, {"Range": "bytes=1000-1999999"}).body == CONTENT[1000:2000000]


def test_more_than_32_mb_are_not_read_again(lab: Lab) -> None:
    size = 40 * MIB
    storage = lab.upstream.answers[BLOB] = Storage(bytes(size), cut=33 * MIB, ranges=False)
    since = lab.mirror.mark()
    with pytest.raises(BROKEN):
        lab.ask(ASKED)
    assert "ignores Range" in lab.mirror.log(since)
    assert len(storage.asked) == 6


def test_five_tries_without_progress_are_all(lab: Lab) -> None:
    storage = lab.upstream.answers[BLOB] = Storage()

    def nothing_more(request: Request, connection: socket.socket) -> None:
        storage.cut = CUT if "range" not in request.headers else 0
        storage(request, connection)

    lab.upstream.answers[BLOB] = nothing_more
    with pytest.raises(BROKEN):
        lab.ask(ASKED)
    assert len(storage.asked) == 6


def test_a_line_that_brings_little_each_time_is_not_given_up(lab: Lab) -> None:
    storage = lab.upstream.answers[BLOB] = Storage(cut=150_000)
    assert is_whole(lab.ask(ASKED))
    assert len(storage.asked) > 15


def change(old: bytes, new: bytes) -> Callable[[bytes, int], bytes]:
    """Return what changes the heads of all answers but the first."""
    return lambda head, number: head.replace(old, new) if number > 1 else head


@pytest.mark.parametrize(
    "head",
    [
        change(f"/{len(CONTENT)}".encode(), b"/4000000"),
        change(b"Content-Range: bytes ", b"Content-Range: bytes 1"),
        change(b"Content-Range: bytes", b"Content-Range: lines"),
        change(b"Content-Range", b"X-Content-Range"),
        change(b'ETag: "x"', b'ETag: "y"'),
        change(b'ETag: "x"', b'ETag: "x"\r\nContent-Encoding: gzip'),
        change(b'ETag: "x"', b'ETag: "x"\r\nDocker-Content-Digest: sha256:' + b"0" * 64),
        change(b"206 Partial Content", b"404 Not Found"),
        change(b"206 Partial Content", b"204 No Content"),
        change(b"206 Partial Content", b"416 Range Not Satisfiable"),
    ],
    ids=["total", "start", "unit", "missing", "etag", "coding", "digest", "404", "204", "416"],
)
def test_a_rest_that_is_not_what_was_asked_for_breaks_the_answer_off(
    lab: Lab, head: Callable[[bytes, int], bytes]
) -> None:
    storage = lab.upstream.answers[BLOB] = Storage(head=head, ETag='"x"')
    with pytest.raises(BROKEN) as broken:
        lab.ask(ASKED)
    assert 6 <= len(storage.asked) <= 11, "an error that is cut itself is asked for once more"
    if isinstance(broken.value, http.client.IncompleteRead):
        assert CONTENT.startswith(broken.value.partial)


def test_a_manifest_by_tag_goes_on_only_where_the_etag_is_the_same(lab: Lab) -> None:
    storage = lab.upstream.answers[lab.manifest] = Storage(ETag='"x"')
    assert lab.ask(lab.path).body == CONTENT
    assert storage.asked[1].headers["if-range"] == '"x"'
    lab.upstream.answers[lab.manifest] = Storage(ETag='W/"x"')
    with pytest.raises(BROKEN):
        lab.ask(lab.path)
    lab.upstream.answers[lab.manifest] = Storage()
    with pytest.raises(BROKEN):
        lab.ask(lab.path)


def test_the_next_endpoint_sends_the_rest() -> None:
    with RawUpstream() as second, RawUpstream() as first:
        more = f'["two.test"]\nendpoints = ["{first.url}", "{second.url}"]'
        with Lab(first_byte_timeout=2, idle_timeout=0.5, more=more) as lab:
            path = BLOB.replace("library/", "")
            once = Storage(ETag='"first"')

            def then_nothing(request: Request, connection: socket.socket) -> None:
                once.cut = CUT if "range" not in request.headers else 0
                once(request, connection)

            first.answers[path] = then_nothing
            rest = second.answers[path] = Storage(ETag='"second"', cut=len(CONTENT))
            since = lab.mirror.mark()
            assert is_whole(lab.ask(f"{ASKED}?ns=two.test"))
            assert len(rest.asked) == 1
            assert f"with {second.host}" in lab.mirror.log(since)


@pytest.mark.parametrize("size", [95, 105, 40_000])
def test_a_part_whose_length_contradicts_its_range_is_502(lab: Lab, size: int) -> None:
    headers = {"Content-Range": "bytes 0-99/100000", "Content-Length": str(size)}
    lab.upstream.answers[BLOB] = reply(206, b"x" * size, headers)
    assert lab.ask(ASKED, {"Range": "bytes=0-99"}).status == 502


@pytest.mark.parametrize("total", [str(len(CONTENT)), "*"])
def test_a_rest_that_is_a_part_of_the_rest_is_never_taken_for_all(lab: Lab, total: str) -> None:
    """A server may send less than it was asked for (RFC 9110, 14.2); chunks do not tell where the end is."""
    chunked = Storage(chunked=True)
    asked: list[str] = []

    def answer(request: Request, connection: socket.socket) -> None:
        given = request.headers.get("range")
        if given is None:
            return chunked(request, connection)
        asked.append(given)
        first = bounds(given, len(CONTENT))[0]
        last = min(first + 200_000, len(CONTENT)) - 1
        head = {"Content-Range": f"bytes {first}-{last}/{total}"}
        return connection.sendall(reply(206, CONTENT[first : last + 1], head))

    lab.upstream.answers[BLOB] = answer
    if total == "*":
        with pytest.raises(BROKEN):
            lab.ask(ASKED)
    else:
        assert is_whole(lab.ask(ASKED))
        assert len(asked) > 10


def test_a_part_never_gets_longer_by_a_rest_that_comes_whole(lab: Lab) -> None:
    small = CONTENT[:30_000]
    answers = iter((Storage(small, cut=10_000, chunked=True), Storage(small, ranges=False)))
    lab.upstream.answers[BLOB] = lambda request, connection: next(answers)(request, connection)
    assert lab.ask(ASKED, {"Range": "bytes=1000-19999"}).body == small[1000:20000]


def test_a_length_of_thousands_of_digits_is_refused_at_first_and_later(lab: Lab) -> None:
    long = b"Content-Length: " + b"9" * 5000
    lab.upstream.answers[BLOB] = sends(reply(200, b"x").replace(b"Content-Length: 1", long))
    since = lab.mirror.mark()
    assert [lab.ask(ASKED, method=method).status for method in ("GET", "HEAD")] == [502, 502]
    lab.upstream.answers[BLOB] = Storage(chunked=True, head=change(b"Transfer-Encoding: chunked", long))
    with socket.create_connection(("127.0.0.1", lab.mirror.port), timeout=30) as client:
        client.sendall(f"GET {ASKED} HTTP/1.0\r\n\r\n".encode())
        with pytest.raises(ConnectionResetError):
            drain(client)
    assert "Traceback" not in lab.mirror.log(since)


def test_an_endpoint_that_falls_silent_again_and_again_is_left_for_the_next() -> None:
    with RawUpstream() as second, RawUpstream() as first:
        more = f'["two.test"]\nendpoints = ["{first.url}", "{second.url}"]'
        with Lab(first_byte_timeout=2, idle_timeout=0.5, more=more) as lab:
            path = BLOB.replace("library/", "")
            trickle = first.answers[path] = Storage(cut=40_000, end=stalls(lab))
            second.answers[path] = Storage(cut=len(CONTENT))
            assert is_whole(lab.ask(f"{ASKED}?ns=two.test"))
            assert len(trickle.asked) == 1


@pytest.mark.parametrize("end", [lambda _: None, reset])
def test_a_small_body_that_is_cut_is_asked_for_again(lab: Lab, end: Callable[[socket.socket], object]) -> None:
    storage = Storage(CONTENT[:1000], cut=500, end=end)

    def better_the_second_time(request: Request, connection: socket.socket) -> None:
        storage(request, connection)
        storage.cut = 1000

    lab.upstream.answers[BLOB] = better_the_second_time
    assert lab.ask(ASKED).body == CONTENT[:1000]
    assert len(storage.asked) == 2


def test_a_client_that_leaves_ends_the_tries(lab: Lab) -> None:
    since = lab.mirror.mark()
    asked = Storage(end=stalls(lab))
    lab.upstream.answers[BLOB] = asked
    with socket.create_connection(("127.0.0.1", lab.mirror.port), timeout=30) as client:
        client.sendall(f"GET {ASKED} HTTP/1.1\r\nHost: m\r\n\r\n".encode())
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
    assert lab.mirror.wait_for_requests(1, since)[0].status == 200
    assert len(asked.asked) == 1


# MIRROR_VERIFY


@pytest.fixture(scope="module")
def verifying() -> Iterator[Lab]:
    with Lab(idle_timeout=0.5, verify="on") as lab:
        yield lab


WRONG = b"y" + CONTENT[1:]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_wrong_byte_breaks_the_answer_off_before_its_end(verifying: Lab, chunked: bool) -> None:
    verifying.reset()
    verifying.upstream.answers[BLOB] = Storage(WRONG, cut=len(WRONG), chunked=chunked)
    since = verifying.mirror.mark()
    with pytest.raises(BROKEN):
        verifying.ask(ASKED)
    assert "do not have the digest" in verifying.mirror.log(since)


@pytest.mark.parametrize("chunked", [False, True])
def test_right_bytes_pass_the_check_cut_or_not(verifying: Lab, chunked: bool) -> None:
    verifying.reset()
    for cut in (CUT, len(CONTENT)):
        verifying.upstream.answers[BLOB] = Storage(cut=cut, chunked=chunked)
        assert is_whole(verifying.ask(ASKED))


def test_a_part_is_not_checked(verifying: Lab) -> None:
    verifying.reset()
    verifying.upstream.answers[BLOB] = Storage(WRONG, cut=len(WRONG))
    assert verifying.ask(ASKED, {"Range": "bytes=0-99999"}).body == WRONG[:100_000]


@pytest.mark.parametrize("kind", ["blobs", "manifests"])
def test_a_small_wrong_body_is_502(verifying: Lab, kind: str) -> None:
    verifying.reset()
    sizes = {"sha256": hashlib.sha256(b"right"), "sha512": hashlib.sha512(b"right")}
    for algorithm, whole in sizes.items():
        path = f"/{kind}/{algorithm}:{whole.hexdigest()}"
        verifying.upstream.answers[f"/v2/library/app{path}"] = reply(200, b"wrong")
        assert verifying.ask(f"/v2/app{path}").status == 502
        verifying.upstream.answers[f"/v2/library/app{path}"] = reply(200, b"right")
        assert verifying.ask(f"/v2/app{path}").body == b"right"


def test_wrong_bytes_of_one_object_leave_the_endpoint_in_use() -> None:
    with RawUpstream() as second:
        digest = f"sha256:{hashlib.sha256(b'right').hexdigest()}"
        with RawUpstream() as first:
            more = f'["two.test"]\nendpoints = ["{first.url}", "{second.url}"]'
            with Lab(verify="on", more=more) as lab:
                for upstream in (first, second):
                    upstream.answers[f"/v2/app/blobs/{DIGEST}"] = reply(200, b"wrong")
                    upstream.answers[f"/v2/app/blobs/{digest}"] = reply(200, b"right")
                assert lab.ask(f"{ASKED}?ns=two.test").status == 502
                assert lab.ask(f"/v2/app/blobs/{digest}?ns=two.test").body == b"right"


def test_a_digest_of_another_algorithm_is_passed_on(verifying: Lab) -> None:
    verifying.reset()
    verifying.upstream.answers["/v2/library/app/blobs/md5:abc"] = reply(200, b"who knows")
    assert verifying.ask("/v2/app/blobs/md5:abc").body == b"who knows"


def test_a_wrong_byte_is_passed_on_where_nobody_asked_for_a_check(lab: Lab) -> None:
    lab.upstream.answers[BLOB] = Storage(WRONG, cut=len(WRONG))
    assert lab.ask(ASKED).body == WRONG
