"""Limits against abuse of the process: each is met at a real socket, and others are served meanwhile."""

import gzip
import os
import re
import resource
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import ExitStack
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode

import pytest
from lab import BLOB
from lab import DIGEST
from lab import MANIFEST
from lab import Lab
from lab import Reply
from lab import ask
from lab import guard
from lab import refuse
from lab import send_raw
from processes import free_port
from processes import poll
from serving import Mirror
from upstream import Answer
from upstream import RawUpstream
from upstream import Request
from upstream import reply
from upstream import reply_json
from upstream import sends
from upstream import token_realm

HASTY = ("-c", "python:tests.hasty")  # a head within 1 s, a byte taken within 1 s
BLOB_PATH = f"/v2/app/blobs/{DIGEST}"
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: m\r\n\r\n"
HALF = b"GET /healthz HTTP/1.1\r\nHost: m\r\nX: "
MIB = 1 << 20
SLACK = 16 * MIB  # of memory, for what a few requests leave behind
ENDLESS = reply(200, b"", {"Content-Length": str(1 << 40)})
CHUNKED = reply(200, b"", {"Transfer-Encoding": "chunked"})
BASIC = {"Authorization": "Basic dXNlcjpwYXNzd29yZA=="}


@pytest.fixture(scope="module")
def shared_lab() -> Iterator[Lab]:
    with Lab(options=HASTY, connect_timeout=1, first_byte_timeout=1) as lab:
        yield lab


@pytest.fixture
def lab(shared_lab: Lab) -> Lab:
    shared_lab.reset()
    return shared_lab


@contextmanager
def connected(mirror: Mirror, text: bytes = b"", count: int = 1) -> Iterator[list[socket.socket]]:
    """Yield clients that have sent so much and no more."""
    with ExitStack() as stack:
        clients = []
        for _ in range(count):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", mirror.port), timeout=20))
            client.sendall(text)
            clients.append(client)
        yield clients


def served(client: socket.socket) -> bool:
    """Send a request whose answer is short; tell whether the answer came."""
    client.sendall(HEALTH)
    return answered(client)


def answered(client: socket.socket) -> bool:
    received = b""
    while not received.endswith(b"}") and (part := client.recv(65536)):
        received += part
    return received.startswith(b"HTTP/1.1 200 OK")


def rest(client: socket.socket) -> bytes:
    """Return what still comes until the mirror ends the connection."""
    received = b""
    try:
        while part := client.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received


def open_still(client: socket.socket) -> bool:
    """Tell whether the mirror has neither sent anything nor ended the connection."""
    looking = select.poll()
    looking.register(client, select.POLLIN)
    return not looking.poll(0)


def worker_of(mirror: Mirror) -> int:
    (worker,) = mirror.pids()[1:]
    return worker


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# Heads


def test_a_request_for_a_token_with_many_scopes_fits(lab: Lab) -> None:
    scopes = [("scope", f"repository:{'group/' * 40}app{number}:pull,push") for number in range(20)]
    path = f"/token?{urlencode([('service', 'hub.test'), *scopes])}"
    assert 6000 < len(path) < 8000
    assert lab.ask(path).json["token"] == "anonymous"


def test_a_large_login_fits(lab: Lab) -> None:
    assert lab.ask("/healthz", {"Authorization": f"Bearer {'x' * 8000}"}).status == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /v2/" + b"a" * 8200 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET /v2/" + b"a" * 20_000, 414),
        (b"GET /v2/ HTTP/1.1\r\nX: " + b"a" * 8200 + b"\r\n\r\n", 431),
        (b"GET /v2/ HTTP/1.1\r\n" + b"X: y\r\n" * 101 + b"\r\n", 431),
        (b"GET /v2/ HTTP/1.1\r\n" + (b"X: " + b"y" * 4000 + b"\r\n") * 10, 431),
        (b"GET /v2/ HTTP/1.1\r\nX: " + b"y" * 60_000, 431),
        (b"GET /v2/ HTTP/1.1\r\nExpect: miracles\r\n\r\n", 417),
    ],
)
def test_a_head_that_is_too_large_is_refused_in_json(lab: Lab, head: bytes, status: int) -> None:
    """Where it has no end, it is not waited for."""
    with connected(lab.mirror, head) as (client,):
        answer = rest(client)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"\r\nConnection: close\r\n" in answer
    assert answer.endswith(b"}]}")


def test_many_large_heads_leave_memory_flat() -> None:
    head = b"GET /v2/ HTTP/1.1\r\n" + (b"X: " + b"y" * 8000 + b"\r\n") * 2
    with Mirror() as mirror:
        before = mirror.pss()
        with connected(mirror, head, count=200):
            assert poll(lambda: descriptors(worker_of(mirror)) > 200, 5)
            time.sleep(0.5)
            assert mirror.pss() - before < 200 * (64 << 10) + SLACK


def test_a_client_that_sends_no_whole_head_is_ended(lab: Lab) -> None:
    since = lab.mirror.mark()
    with connected(lab.mirror) as (silent,), connected(lab.mirror, b"G") as (half,), connected(lab.mirror) as (slow,):
        assert drip(slow) < 10
        assert (rest(silent), rest(half)) == (b"", b"")
    assert lab.mirror.log(since) == ""


def drip(client: socket.socket) -> float:
    """Send a head without end, a byte now and then; return the seconds until the mirror ends the connection."""
    began = time.monotonic()
    client.sendall(HALF)
    while open_still(client):
        client.sendall(b"x")
        time.sleep(0.1)
    return time.monotonic() - began


def test_a_kept_connection_has_as_long_for_its_next_head_but_may_be_silent_before(lab: Lab) -> None:
    with connected(lab.mirror) as (client,):
        assert served(client)
        time.sleep(2.2)
        assert served(client)
        assert drip(client) < 10


def test_a_kept_connection_is_ended_after_a_while() -> None:
    with Mirror("--keep-alive", "1") as mirror, connected(mirror) as (client,):
        assert served(client)
        assert rest(client) == b""


def test_without_kept_connections_a_head_is_not_waited_for_without_end_either() -> None:
    with Mirror(*HASTY, "--keep-alive", "0") as mirror, connected(mirror, HALF) as (client,):
        assert rest(client) == b""
        with connected(mirror) as (other,):
            assert served(other)


def test_a_client_that_sends_requests_without_a_pause_does_not_keep_others_waiting(lab: Lab) -> None:
    """Where bytes are there already, nothing waits: without a pause of its own a worker would serve nobody else."""
    received = 0

    def receive() -> bytes:
        nonlocal received
        received += len(data := busy.recv(MIB))
        return data

    with connected(lab.mirror) as (busy,):
        doing(lambda: busy.sendall(HEALTH * 500))
        doing(receive)
        assert poll(lambda: received > 0, 10)
        before = received
        for _ in range(5):
            with connected(lab.mirror) as (other,):
                assert served(other)
        assert received - before < 5000 * len(HEALTH)
        busy.shutdown(socket.SHUT_RDWR)


def doing(action: Callable[[], object]) -> None:
    """Do something again and again beside the test, until it fails or returns no bytes."""

    def repeat() -> None:
        with suppress(OSError):
            while action() != b"":
                pass

    threading.Thread(target=repeat, daemon=True).start()


# Idle connections


@pytest.fixture(scope="module")
def small_lab() -> Iterator[Lab]:
    """Run a mirror that takes twenty clients at once, and lets each of them wait for long."""
    with Lab(options=("--worker-connections", "20")) as lab:
        yield lab


@contextmanager
def downloading(lab: Lab, count: int) -> Iterator[Callable[[], list[bytes]]]:
    """Let clients begin to download; yield what lets upstream go on, and returns all that each received."""
    go_on = threading.Event()
    lab.reset()

    def in_two_halves(request: Request, connection: socket.socket) -> None:
        connection.sendall(reply(200, b"half", {"Content-Length": "8"}))
        go_on.wait(60)
        connection.sendall(b"rest")

    lab.upstream.answers[BLOB] = in_two_halves
    request = f"GET {BLOB_PATH} HTTP/1.1\r\nHost: m\r\nConnection: close\r\n\r\n".encode()
    with connected(lab.mirror, request, count) as clients:
        assert poll(lambda: len(lab.upstream.requests) == count, 10)

        def finish() -> list[bytes]:
            go_on.set()
            return [rest(client) for client in clients]

        yield finish
        go_on.set()


@pytest.mark.parametrize("text", [b"", HALF, HEALTH], ids=["silent", "half", "kept"])
def test_where_idle_clients_fill_all_places_those_that_wait_longest_are_ended(small_lab: Lab, text: bytes) -> None:
    mirror = small_lab.mirror
    worker = worker_of(mirror)
    with downloading(small_lab, 5) as finish, connected(mirror, text, count=100) as idle:
        for _ in range(30):
            assert ask(mirror, "/healthz").status == 200
        assert poll(lambda: sum(map(open_still, idle)) <= 15, 5)
        if text != HEALTH:
            assert not any(map(open_still, idle[:80]))
        assert descriptors(worker) < 60
        assert all(received.endswith(b"\r\n\r\nhalfrest") for received in finish()), "no answer is cut for it"
    assert worker_of(mirror) == worker


def test_where_running_requests_fill_all_places_the_next_free_one_is_for_who_waits_outside(small_lab: Lab) -> None:
    """The client of a request that has just ended could keep its place for the next one."""
    mirror = small_lab.mirror
    with downloading(small_lab, 19) as finish, connected(mirror, count=2) as (first, outside):
        outside.sendall(HEALTH)
        assert served(first)
        assert answered(outside)
        assert all(received.endswith(b"halfrest") for received in finish())


def test_idle_clients_at_one_address_make_room_for_those_at_another() -> None:
    other = free_port("127.0.0.1")
    with Mirror("--bind", f"127.0.0.1:{other}", "--worker-connections", "20") as mirror, connected(mirror, count=50):
        with socket.create_connection(("127.0.0.1", other), timeout=20) as client:
            assert served(client)
        assert ask(mirror, "/healthz").status == 200
        assert descriptors(worker_of(mirror)) < 60


def test_thousands_of_idle_clients_leave_memory_flat() -> None:
    with Mirror("--worker-connections", "200") as mirror:
        ask(mirror, "/healthz")
        before = mirror.pss()
        for text in (b"", HALF, HEALTH):
            with connected(mirror, text, count=700):
                assert ask(mirror, "/healthz").status == 200
                assert mirror.pss() - before < 200 * (16 << 10) + SLACK


def test_few_descriptors_mean_few_clients_at_once_and_all_are_served() -> None:
    """A worker has as many places as it has descriptors for."""
    with Mirror() as mirror:
        resource.prlimit(mirror.pid, resource.RLIMIT_NOFILE, (128, 128))
        os.kill(worker_of(mirror), signal.SIGKILL)
        assert poll(lambda: "32 clients at once and no more: only 128 files may be open" in mirror.log(), 10)
        with connected(mirror, count=100):
            assert ask(mirror, "/healthz").status == 200
            assert descriptors(worker_of(mirror)) < 80
        assert "Traceback" not in mirror.log()


def leave_no_descriptor(mirror: Mirror) -> None:
    """Let the worker open no file but in place of another one."""
    worker = worker_of(mirror)
    limit = descriptors(worker)
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (limit, limit))


def test_where_no_descriptor_is_left_idle_clients_make_room() -> None:
    with Mirror() as mirror, connected(mirror, HALF, count=10) as idle:
        assert poll(lambda: descriptors(worker_of(mirror)) > 10, 5)
        leave_no_descriptor(mirror)
        since = mirror.mark()
        with connected(mirror, HEALTH, count=50) as clients:
            assert all(map(answered, clients))
        assert not any(map(open_still, idle))
        assert "Traceback" not in mirror.log(since)


def test_where_no_descriptor_is_left_at_all_the_worker_neither_spins_nor_ends() -> None:
    with Lab() as lab, downloading(lab, 5) as finish:
        worker = worker_of(lab.mirror)
        leave_no_descriptor(lab.mirror)
        since = lab.mirror.mark()
        with connected(lab.mirror, HEALTH, count=50) as clients:
            before = cpu_seconds(worker)
            assert poll(lambda: "no new client can be taken: Too many open files" in lab.mirror.log(since), 10)
            assert cpu_seconds(worker) - before < 1
            assert all(map(open_still, clients))
            assert all(received.endswith(b"halfrest") for received in finish())
            assert all(map(answered, clients))
        assert worker_of(lab.mirror) == worker
        assert lab.mirror.log(since).count("no new client") < 10
        assert "Traceback" not in lab.mirror.log(since)


# Clients that take nothing


def endlessly(request: Request, connection: socket.socket) -> None:
    connection.sendall(ENDLESS)
    while True:
        connection.sendall(b"x" * MIB)


def test_a_client_that_takes_nothing_is_ended_and_upstream_with_it(lab: Lab) -> None:
    lab.upstream.answers[BLOB] = endlessly
    since = lab.mirror.mark()
    with connected(lab.mirror, f"GET {BLOB_PATH} HTTP/1.1\r\nHost: m\r\n\r\n".encode()):
        assert lab.upstream.closed.wait(20)
        assert poll(lambda: f'"GET {BLOB_PATH}" 200' in lab.mirror.log(since), 5)
        assert "Traceback" not in lab.mirror.log(since)


def test_a_client_that_takes_none_of_many_short_answers_is_ended(lab: Lab) -> None:
    since = lab.mirror.mark()
    with connected(lab.mirror) as (client,), suppress(ConnectionError):
        while True:
            client.sendall(HEALTH * 500)
    assert "Traceback" not in lab.mirror.log(since)


def test_a_client_that_takes_a_little_now_and_then_is_not_ended(lab: Lab) -> None:
    lab.upstream.answers[BLOB] = endlessly
    with connected(lab.mirror, f"GET {BLOB_PATH} HTTP/1.1\r\nHost: m\r\n\r\n".encode()) as (client,):
        for _ in range(5):
            time.sleep(0.35)
            assert client.recv(MIB)
        assert not lab.upstream.closed.is_set()


# Requests with a body


def request_with(headers: str, request: str) -> bytes:
    return f"{request} HTTP/1.1\r\nHost: m\r\n{headers}\r\n\r\n".encode()


UNWANTED = [
    (f"GET {BLOB_PATH}", 400),
    ("GET /v2/", 400),
    ("HEAD /v2/app/manifests/latest", 400),
    ("OPTIONS /v2/", 400),
    ("GET /token", 400),
    ("POST /healthz", 400),
    ("GET /nothing", 400),
    ("PUT /v2/app/manifests/latest", 405),
    ("PATCH /v2/app/blobs/uploads/1", 405),
]


@pytest.mark.parametrize(("request_line", "status"), UNWANTED)
@pytest.mark.parametrize("framing", ["Content-Length: 9999999999", "Transfer-Encoding: chunked"])
def test_a_body_that_no_route_takes_is_refused_before_it_is_sent(
    lab: Lab, request_line: str, status: int, framing: str
) -> None:
    with connected(lab.mirror, request_with(framing, request_line)) as (client,):
        answer = rest(client)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"\r\nConnection: close\r\n" in head
    assert b"\r\nContent-Type: application/json" in head
    assert body.startswith(b'{"errors": [{"code": "') or request_line.startswith("HEAD")
    assert lab.upstream.requests == []


@pytest.mark.parametrize("head", [request_with("Content-Length: 40000", "GET /v2/"), b"GET /v2/ HTTP/1.1\r\nX: "])
def test_a_client_that_goes_on_sending_still_gets_the_answer(lab: Lab, head: bytes) -> None:
    """A plain close would reset the connection, and with it an answer that is under way."""
    with connected(lab.mirror, head + b"x" * 30_000) as (client,):
        time.sleep(0.5)
        client.sendall(b"x" * 20_000)
        assert rest(client).endswith(b"}]}")


@pytest.mark.parametrize("framing", ["Content-Length: {}", "Transfer-Encoding: chunked"])
def test_what_stands_in_a_refused_body_is_no_request(lab: Lab, framing: str) -> None:
    answer = send_raw(lab.mirror, request_with(framing.format(len(HEALTH)), "GET /v2/") + HEALTH)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert answer.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("headers", ["Content-Length: 0", "Content-Length: 00"])
def test_a_body_of_no_bytes_is_none(lab: Lab, headers: str) -> None:
    with connected(lab.mirror, request_with(headers, "GET /healthz")) as (client,):
        assert answered(client)
        assert served(client)


def test_a_login_takes_a_body_of_64_kib_with_its_length_told(lab: Lab) -> None:
    guard(lab.upstream, "/v2/library/app/manifests/latest", b"")
    form = "application/x-www-form-urlencoded"
    start = "grant_type=password&password="
    body = start + "x" * ((64 << 10) - len(start))
    assert lab.ask("/token", {"Content-Type": form}, "POST", body).status == 200
    assert lab.ask("/token", {"Content-Type": form}, "POST", body + "x").status == 413
    lab.upstream.requests.clear()
    chunks = request_with(f"Content-Type: {form}\r\nTransfer-Encoding: chunked", "POST /token")
    assert send_raw(lab.mirror, chunks + b"3\r\na=b\r\n0\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert lab.upstream.requests == []


def test_a_login_whose_body_does_not_come_is_ended(lab: Lab) -> None:
    start = request_with("Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 1000", "POST /token")
    since = lab.mirror.mark()
    with connected(lab.mirror, start + b"grant_type=") as (client,):
        assert b'{"errors": [{"code": "BAD_REQUEST"' in rest(client)
    assert "Traceback" not in lab.mirror.log(since)


def test_a_body_is_asked_for_only_where_it_is_wanted(lab: Lab) -> None:
    """Expect: 100-continue, RFC 9110, 10.1.1."""
    expecting = "Expect: 100-continue\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: 3"
    assert send_raw(lab.mirror, request_with(expecting, "PUT /v2/app/manifests/latest")).startswith(b"HTTP/1.1 405 ")
    assert send_raw(lab.mirror, request_with(expecting, "GET /v2/")).startswith(b"HTTP/1.1 400 ")
    guard(lab.upstream, "/v2/library/app/manifests/latest", b"")
    with connected(lab.mirror, request_with(expecting, "POST /token")) as (client,):
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"a=b")
        assert rest(client).startswith(b"HTTP/1.1 200 ")
    assert lab.upstream.asked("/realm")[-1].body.startswith(b"a=b")


# Foreign bodies


class Place(NamedTuple):
    """Say where the mirror reads a foreign body whole: upstream's path and status, and the client's request."""

    upstream: str
    status: int
    path: str
    headers: dict[str, str]

    def ask(self, lab: Lab, answer: Callable[[bytes], Answer], **framing: str) -> Reply:
        """Let upstream answer there with what is made from a head with this framing, and ask the mirror."""
        headers = {name.replace("_", "-"): value for name, value in framing.items()}
        challenge = refuse(token_realm(lab.upstream.url), "hub.test")
        lab.upstream.answers |= {"/v2/": challenge, MANIFEST: challenge, "/realm": reply_json(200, {"token": "x"})}
        if self.status == 401:
            headers["WWW-Authenticate"] = challenge.partition(b"WWW-Authenticate: ")[2].partition(b"\r\n")[0].decode()
        elif self.status == 307:
            headers["Location"] = "/elsewhere"
        lab.upstream.answers[self.upstream] = answer(reply(self.status, b"", headers))
        return lab.ask(self.path, self.headers)


MANIFEST_PATH = "/v2/app/manifests/latest"
PLACES = {
    "token": Place("/realm", 200, MANIFEST_PATH, {}),
    "login": Place("/realm", 200, "/token", BASIC),
    "challenge": Place(MANIFEST, 401, MANIFEST_PATH, {}),
    "error": Place(MANIFEST, 404, MANIFEST_PATH, {}),
    "redirect": Place(MANIFEST, 307, MANIFEST_PATH, {}),
    "ping": Place("/v2/", 200, "/v2/", BASIC),
    "search": Place("/v1/search", 200, "/v1/search?q=x", {}),
    "tags": Place("/v2/library/app/tags/list", 200, "/v2/app/tags/list", {}),
}


def peak(mirror: Mirror) -> int:
    """Return the most memory that the worker has ever had, in bytes."""
    (kib,) = re.findall(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{worker_of(mirror)}/status").read_text(), re.M)
    return int(kib) * 1024


@pytest.fixture(scope="module")
def hurried_lab() -> Iterator[Lab]:
    """Run a mirror that gives upstream little time, and searches there too."""
    upstream = RawUpstream()
    with Lab(upstream, more=f'search = "{upstream.url}"', connect_timeout=0.5, first_byte_timeout=0.5) as lab:
        yield lab


@pytest.fixture
def upstream_lab(hurried_lab: Lab) -> Lab:
    hurried_lab.reset()
    return hurried_lab


def again_and_again(data: bytes, pause: float = 0) -> Callable[[bytes], Answer]:
    """Return what makes answers that go on with the same bytes until the mirror ends the connection."""

    def answer_with(head: bytes) -> Answer:
        def answer(request: Request, connection: socket.socket) -> None:
            connection.sendall(head)
            while True:
                connection.sendall(data)
                time.sleep(pause)

        return answer

    return answer_with


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("framing", "data"),
    [
        ({"Content_Length": str(1 << 40)}, b"x" * MIB),
        ({"Transfer_Encoding": "chunked"}, b"%x\r\n%s\r\n" % (MIB, b"x" * MIB)),
    ],
    ids=["length", "chunked"],
)
def test_a_foreign_body_without_end_is_read_to_a_bound(
    upstream_lab: Lab, place: str, framing: dict[str, str], data: bytes
) -> None:
    before = peak(upstream_lab.mirror)
    got = PLACES[place].ask(upstream_lab, again_and_again(data), **framing)
    assert (got.status, got.code) == (502, "UNAVAILABLE")
    assert upstream_lab.upstream.closed.wait(10)
    assert peak(upstream_lab.mirror) - before < (64 * MIB if place == "tags" else SLACK)


@pytest.mark.parametrize("place", ["token", "login", "error", "ping", "search"])
def test_a_foreign_body_that_drips_is_not_waited_for(upstream_lab: Lab, place: str) -> None:
    got = PLACES[place].ask(upstream_lab, again_and_again(b"x", pause=0.1), Content_Length="1000")
    assert (got.status, got.code) == (504, "UNAVAILABLE")


@pytest.mark.parametrize(
    "data",
    [b"1\r\nx\r\n" * 10_000, b"0\r\n" + b"X: y\r\n" * 10_000, (b"1;" + b"x" * 60_000 + b"\r\nx\r\n") * 10],
    ids=["chunks", "trailers", "extensions"],
)
def test_no_framing_of_upstream_keeps_other_clients_waiting(upstream_lab: Lab, data: bytes) -> None:
    """Its bytes are there already when they are asked for, so that nothing waits while they are read."""
    upstream_lab.upstream.answers[MANIFEST] = again_and_again(data)(reply(200, b"", {"Transfer-Encoding": "chunked"}))
    pull = f"GET {MANIFEST_PATH} HTTP/1.1\r\nHost: m\r\n\r\n".encode()
    with connected(upstream_lab.mirror, pull) as (busy,), connected(upstream_lab.mirror) as (other,):
        doing(lambda: busy.recv(MIB))
        assert poll(lambda: bool(upstream_lab.upstream.requests), 10)
        for _ in range(3):
            time.sleep(0.1)
            assert served(other)
        busy.shutdown(socket.SHUT_RDWR)


def test_interim_answers_without_end_are_no_answer(upstream_lab: Lab) -> None:
    upstream_lab.upstream.answers[BLOB] = again_and_again(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)(b"")
    assert upstream_lab.ask(BLOB_PATH).status == 502


def test_some_interim_answers_are_skipped(upstream_lab: Lab) -> None:
    upstream_lab.upstream.answers[BLOB] = sends(b"HTTP/1.1 100 Continue\r\n\r\n" * 3, reply(200, b"blob"))
    assert upstream_lab.ask(BLOB_PATH).body == b"blob"


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """Return what would be 128 MiB if it were decoded."""
    return gzip.compress(b"\0" * (128 * MIB), 6)


@pytest.mark.parametrize(
    ("place", "status"), [("token", 502), ("login", 200), ("error", 404), ("ping", 200), ("search", 200), ("tags", 200)]
)
def test_a_bomb_is_not_decoded(upstream_lab: Lab, bomb: bytes, place: str, status: int) -> None:
    before = peak(upstream_lab.mirror)
    length = str(len(bomb))
    got = PLACES[place].ask(upstream_lab, lambda head: head + bomb, Content_Encoding="gzip", Content_Length=length)
    assert got.status == status
    assert got.body == bomb or place not in ("login", "search", "tags"), "it goes on as it came"
    assert peak(upstream_lab.mirror) - before < SLACK


def test_a_manifest_that_is_a_bomb_goes_on_as_it_came(upstream_lab: Lab, bomb: bytes) -> None:
    before = peak(upstream_lab.mirror)
    upstream_lab.upstream.answers[MANIFEST] = reply(200, bomb, {"Content-Encoding": "gzip"})
    got = upstream_lab.ask("/v2/app/manifests/latest")
    assert (got.body, got.headers["content-encoding"]) == (bomb, "gzip")
    assert peak(upstream_lab.mirror) - before < SLACK
