"""Who may pull what, and how much of it: each rule alone, with a client that says where it comes from."""

import hashlib
import http.client
import socket
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from conftest import needs
from lab import Lab
from lab import Reply
from lab import reply
from lab import reply_json
from processes import Process
from processes import StartFailed
from processes import free_port
from processes import poll
from serving import Mirror
from upstream import Request

from mirror import ImageRule
from mirror import client_of
from settings import BUILT_IN
from settings import ConfigError

NAMES = {registry.name: registry for registry in BUILT_IN}
BLOB = "sha256:" + "ab" * 32
MANIFEST = reply_json(200, {"right": True})
MIB = 1 << 20


def opened(lab: Lab) -> Lab:
    """Let the upstream of a lab answer whatever is asked for."""
    lab.upstream.default = MANIFEST
    lab.upstream.answers["/v2/"] = MANIFEST
    return lab


def refused(answer: Reply) -> bool:
    return (answer.status, answer.code) == (403, "DENIED")


def busy(answer: Reply) -> bool:
    if answer.status != 429:
        return False
    assert answer.code == "TOOMANYREQUESTS"
    return int(answer.headers["retry-after"]) >= 1


def at(address: str) -> dict[str, str]:
    """Return the header by which the terminator tells the client's address."""
    return {"X-Forwarded-For": address}


# Clients


@pytest.fixture(scope="module")
def listed() -> Iterator[Lab]:
    allowed, denied = "192.0.2.0/24, 2001:db8::/32, 198.51.100.7", "192.0.2.66,2001:db8:bad::/48"
    with Lab(allow_clients=allowed, deny_clients=denied) as lab:
        yield opened(lab)


@pytest.mark.parametrize("address", ["192.0.2.1", "198.51.100.7", "2001:db8::1", "::ffff:192.0.2.1"])
def test_a_listed_client_may_pull(listed: Lab, address: str) -> None:
    assert listed.ask("/v2/app/manifests/latest", at(address)).status == 200


@pytest.mark.parametrize(
    "address",
    [
        "203.0.113.1",
        "198.51.100.8",
        "192.0.2.66",
        "2001:db8:bad::1",
        "2001:db9::1",
        "::ffff:192.0.2.66",
        "x",
        "",
        "10.1",
    ],
)
def test_a_client_that_is_not_listed_or_denied_is_refused(listed: Lab, address: str) -> None:
    for path in ("/v2/", "/v2/app/manifests/latest", "/token", "/v1/search?q=x"):
        assert refused(listed.ask(path, at(address)))


def test_a_port_beside_the_address_is_no_part_of_it(listed: Lab) -> None:
    assert refused(listed.ask("/v2/", at("192.0.2.66:5555")))
    assert refused(listed.ask("/v2/", at("[2001:db8:bad::1]:5555")))
    assert listed.ask("/v2/", at("192.0.2.1:5555")).status == 200


def test_an_unknown_address_is_refused_where_some_are_denied() -> None:
    with Lab(deny_clients="192.0.2.1, ::ffff:192.0.2.2") as lab:
        assert [opened(lab).ask("/v2/", at(address)).status for address in ("unknown", "192.0.2.2", "192.0.2.3")] == [
            403,
            403,
            200,
        ]


def test_the_reason_of_a_refusal_is_told(listed: Lab) -> None:
    assert b"clients at 203.0.113.1" in listed.ask("/v2/", at("203.0.113.1")).body


def test_the_health_check_is_for_everyone(listed: Lab) -> None:
    assert listed.ask("/healthz", at("203.0.113.1")).status == 200


def test_an_address_is_believed_from_the_terminator_only() -> None:
    with Lab(allow_clients="192.0.2.0/24", terminators="127.0.0.9") as lab:
        since = lab.mirror.mark()
        for _ in range(2):
            assert refused(opened(lab).ask("/v2/", at("192.0.2.1")))
        assert lab.mirror.log(since).count("X-Forwarded-For of 127.0.0.1 is not believed") == 1
        with socket.create_connection(("127.0.0.1", lab.mirror.port), source_address=("127.0.0.9", 0)) as terminator:
            terminator.sendall(b"GET /v2/ HTTP/1.1\r\nHost: m\r\nX-Forwarded-For: 192.0.2.1\r\n\r\n")
            assert terminator.recv(100).startswith(b"HTTP/1.1 200")


def test_host_and_scheme_of_a_stranger_are_not_believed_either() -> None:
    forged = {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "https"}
    with Lab(terminators="127.0.0.9") as lab:
        lab.upstream.answers["/v2/"] = reply(401, b"", {"WWW-Authenticate": f'Bearer realm="{lab.upstream.url}/r"'})
        realm = lab.ask("/v2/", forged).headers["www-authenticate"]
        assert realm == f'Bearer realm="{lab.mirror.url}/token"'


def test_without_a_terminator_the_address_is_the_connections_own() -> None:
    with Lab(proxies=0, deny_clients="127.0.0.0/8") as lab:
        assert refused(lab.ask("/v2/", at("192.0.2.1")))


# Agents


def is_nginx(answer: Reply, status: int) -> bool:
    """Tell whether an answer shows nginx, and nothing of the mirror."""
    ours = [name for name in answer.headers if name.startswith(("access-", "docker-", "oci-", "x-", "www-"))]
    page = b"Welcome to nginx!" if status == 200 else b"<hr><center>nginx</center>"
    found = (answer.status, answer.headers["server"], answer.headers["content-type"], ours)
    return found == (status, "nginx", "text/html", []) and page in answer.body


def test_a_blocked_agent_sees_nginx_whatever_its_case() -> None:
    with Lab(block_agents="GPTBot, masscan/") as lab:
        opened(lab).upstream.requests.clear()
        for agent in ("Mozilla/5.0 (compatible; gptbot/1.2)", "MASSCAN/1.3"):
            said = {"User-Agent": agent}
            for path in ("/", "/nothing", "/search?q=x", "/robots.txt", "/page.css"):
                assert is_nginx(lab.ask(path, said), 200)
            for path in (
                "/v2/",
                "/v2",
                "/v2/app/manifests/latest?ns=docker.io",
                "/v2/A/B",
                "/token",
                "/v1/search?q=x",
                "/readyz",
            ):
                assert is_nginx(lab.ask(path, said), 404)
            for method in ("POST", "OPTIONS", "DELETE"):
                assert is_nginx(lab.ask("/v2/", said, method), 404)
            assert is_nginx(lab.ask("/", {**said, "Host": "<b>"}), 200)
        assert lab.upstream.requests == []
        assert lab.ask("/healthz", {"User-Agent": "GPTBot"}).status == 200
        for agent in ("docker/28.2.2", "masscan", ""):
            assert lab.ask("/v2/", {"User-Agent": agent}).status == 200


# Images


@pytest.fixture(scope="module")
def ruled() -> Iterator[Lab]:
    allowed = "nginx, bitnami/*, library/redis:7*, library/pinned@sha256:" + "cd" * 32
    with Lab(allow_images=allowed, deny_images="bitnami/evil*,nginx:1.0,docker.io/library/nginx@" + BLOB) as lab:
        yield opened(lab)


@pytest.mark.parametrize(
    "path",
    [
        "nginx/manifests/latest",
        "library/nginx/manifests/latest",
        "docker.io/library/nginx/manifests/latest",
        "nginx/tags/list",
        "bitnami/app/manifests/1",
        "redis/manifests/7.2",
        "redis/manifests/sha256:" + "ef" * 32,
        "redis/blobs/" + BLOB,
        "redis/tags/list",
        "redis/referrers/" + BLOB,
        "pinned/manifests/sha256:" + "cd" * 32,
    ],
)
def test_an_allowed_image_is_served(ruled: Lab, path: str) -> None:
    assert ruled.ask(f"/v2/{path}").status == 200


@pytest.mark.parametrize(
    "path",
    [
        "alpine/manifests/latest",
        "alpine/blobs/" + BLOB,
        "alpine/tags/list",
        "library/nginxx/manifests/latest",
        "redis/manifests/8",
        "pinned/manifests/latest",
        "bitnami/evil/manifests/1",
        "bitnami/evil-too/blobs/sha256:" + "00" * 32,
        "nginx/manifests/1.0",
        "nginx/blobs/" + BLOB,
        "nginx/manifests/" + BLOB,
        "ghcr.io/nginx/nginx/manifests/latest",
    ],
)
def test_another_image_is_refused_before_upstream_is_asked(ruled: Lab, path: str) -> None:
    ruled.upstream.requests.clear()
    assert refused(ruled.ask(f"/v2/{path}"))
    assert refused(ruled.ask(f"/v2/{path}?ns=docker.io")) or path.startswith("docker.io")
    assert ruled.upstream.requests == []


@pytest.mark.parametrize(
    ("text", "name", "reference"),
    [
        ("nginx", "docker.io/library/nginx", ""),
        ("nginx:1.*", "docker.io/library/nginx", "1.*"),
        ("me/app", "docker.io/me/app", ""),
        ("*", "*", ""),
        ("*/nginx", "*/nginx", ""),
        ("ghcr.io/*", "ghcr.io/*", ""),
        ("docker.io/library/*@sha256:*", "docker.io/library/*", "sha256:*"),
        ("docker.io/nginx", "docker.io/library/nginx", ""),
        ("ghcr.io", "ghcr.io/*", ""),
        ("ghcr.io*", "ghcr.io*", ""),
        ("*.io/*", "*.io/*", ""),
        ("nginx*", "docker.io/library/nginx*", ""),
    ],
)
def test_a_rule_is_read_as_docker_reads_a_name(text: str, name: str, reference: str) -> None:
    assert ImageRule.parse(text, NAMES, "docker.io") == ImageRule(name, reference)


def test_a_rule_about_a_registry_that_is_not_served_stops_the_start() -> None:
    with pytest.raises(ConfigError, match=r"did you mean ghcr\.io"):
        ImageRule.parse("ghrc.io/me/*", NAMES, "docker.io")
    with pytest.raises(StartFailed, match=r"MIRROR_DENY_IMAGES: ghrc\.io/me/\*"), Mirror(deny_images="ghrc.io/me/*"):
        pass


@pytest.mark.parametrize(
    "text", ["Nginx", "nginx:1@sha256:ab", "ghcr.io/", "nginx:", "nginx@", "a//b", "/a", "x.io:99/a", "a b", ""]
)
def test_a_rule_that_no_image_can_meet_stops_the_start(text: str) -> None:
    with pytest.raises(ConfigError):
        ImageRule.parse(text, NAMES, "docker.io")


def test_a_denied_image_is_denied_under_the_other_names_of_its_registry() -> None:
    with Lab(deny_images="registry.k8s.io/pause, ghcr.io/linuxserver/*") as lab:
        for path in ("registry.k8s.io/pause", "k8s.gcr.io/pause", "ghcr.io/linuxserver/x", "lscr.io/linuxserver/x"):
            assert refused(lab.ask(f"/v2/{path}/manifests/latest"))


# Rates


def get(lab: Lab, address: str, reference: str = "latest", method: str = "GET") -> Reply:
    return lab.ask(f"/v2/app/manifests/{reference}", at(address), method)


def test_a_client_gets_so_many_manifests_and_no_more() -> None:
    with Lab(pull_rate="3/h") as lab:
        opened(lab)
        for _ in range(5):
            assert get(lab, "192.0.2.1", method="HEAD").status == 200
        assert [get(lab, "192.0.2.1", reference).status for reference in ("a", "b", f"{BLOB}")] == [200] * 3
        last = get(lab, "192.0.2.1")
        assert busy(last)
        assert 1 <= int(last.headers["retry-after"]) <= 3600
        assert b"limit for one client is 3/h manifests" in last.body
        assert get(lab, "192.0.2.2").status == 200
        assert lab.ask(f"/v2/app/blobs/{BLOB}", at("192.0.2.1")).status == 200, "blobs are not counted"


def test_an_ipv6_network_is_one_client() -> None:
    with Lab(pull_rate="2/h") as lab:
        opened(lab)
        assert [get(lab, f"2001:db8::{host}").status for host in (1, 2, 3)] == [200, 200, 429]
        assert get(lab, "2001:db8:0:1::1").status == 200
        assert [client_of(text) for text in ("2001:db8::1", "::ffff:192.0.2.1", "192.0.2.1", "-")] == [
            "2001:db8::/64",
            "192.0.2.1",
            "192.0.2.1",
            "-",
        ]


def test_a_rate_is_over_when_its_time_is() -> None:
    with Lab(pull_rate="1/2s") as lab:
        opened(lab)
        assert get(lab, "192.0.2.1").status == 200
        assert busy(get(lab, "192.0.2.1"))
        assert poll(lambda: get(lab, "192.0.2.1").status == 200, 10, 0.2)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    needs("redis-server")
    folder, port = tmp_path_factory.mktemp("redis"), free_port("127.0.0.1")
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with Process(command, folder / "log") as process:
        process.wait_until(lambda: answers(port))
        yield f"redis://127.0.0.1:{port}/0"


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(100) == b"+PONG\r\n"
    except OSError:
        return False


def test_two_mirrors_count_together_in_redis(redis: str) -> None:
    with Lab(pull_rate="2/h", pull_rate_store=redis) as one, Lab(pull_rate="2/h", pull_rate_store=redis) as two:
        assert [get(opened(lab), "192.0.2.9").status for lab in (one, two, one, two)] == [200, 200, 429, 429]


def test_while_redis_is_away_nobody_is_refused() -> None:
    with Lab(pull_rate="1/h", pull_rate_store=f"redis://:secret@127.0.0.1:{free_port('127.0.0.1')}/0") as lab:
        since = lab.mirror.mark()
        assert [get(opened(lab), "192.0.2.1").status for _ in range(3)] == [200] * 3
        log = lab.mirror.log(since)
        assert log.count("pulls are not counted") == 1
        assert "secret" not in log


# Transfers


SIZE = 8 * MIB
CONTENT = b"x" * SIZE


def held(lab: Lab) -> threading.Event:
    """Let the upstream send the first half of each blob, and the rest once the event is set."""
    go_on = threading.Event()

    def answer(request: Request, connection: socket.socket) -> None:
        connection.sendall(reply(200, b"", {"Content-Length": str(SIZE)}))
        if request.method == "HEAD":
            return
        connection.sendall(CONTENT[: SIZE // 2])
        go_on.wait(30)
        connection.sendall(CONTENT[SIZE // 2 :])

    lab.upstream.answers[f"/v2/library/app/blobs/{BLOB}"] = answer
    return go_on


def begin(lab: Lab, address: str, stack: ExitStack) -> http.client.HTTPResponse:
    """Begin a transfer, which the stack ends."""
    connection = http.client.HTTPConnection("127.0.0.1", lab.mirror.port, timeout=30)
    stack.callback(connection.close)
    connection.request("GET", f"/v2/app/blobs/{BLOB}", headers=at(address))
    return connection.getresponse()


def test_so_many_transfers_run_for_one_client_and_in_all() -> None:
    with Lab(client_transfers=2, transfers=3) as lab, ExitStack() as stack:
        go_on = held(opened(lab))
        running = [begin(lab, "192.0.2.1", stack) for _ in range(2)]
        assert [response.status for response in running] == [200, 200]
        blob = f"/v2/app/blobs/{BLOB}"
        assert busy(lab.ask(blob, at("192.0.2.1")))
        assert get(lab, "192.0.2.1").status == 200, "a manifest is no transfer"
        assert lab.ask(blob, at("192.0.2.1"), "HEAD").status == 200, "nor is a HEAD"
        running.append(begin(lab, "192.0.2.2", stack))
        last = lab.ask(blob, at("192.0.2.3"))
        assert busy(last)
        assert b"3 transfers at a time" in last.body
        go_on.set()
        assert [len(response.read()) for response in running] == [SIZE] * 3
        assert poll(lambda: lab.ask(blob, at("192.0.2.1")).status == 200, 5)


def finishes(lab: Lab) -> None:
    assert lab.ask(f"/v2/app/blobs/{BLOB}", at("192.0.2.1")).status == 200


def fails(lab: Lab) -> None:
    assert lab.ask("/v2/app/blobs/sha256:" + "0" * 64, at("192.0.2.1")).status == 404


def leaves(lab: Lab) -> None:
    with ExitStack() as stack:
        assert begin(lab, "192.0.2.1", stack).status == 200


@pytest.mark.parametrize("end", [finishes, fails, leaves])
def test_a_transfer_that_has_ended_makes_room(end: Callable[[Lab], None]) -> None:
    with Lab(client_transfers=1, transfers=1) as lab:
        held(lab).set()
        for _ in range(3):
            assert poll(lambda: get_first_byte(lab) == 200, 5)
            end_when_free(lab, end)


def get_first_byte(lab: Lab) -> int:
    return lab.ask(f"/v2/app/blobs/{BLOB}", at("192.0.2.1") | {"Range": "bytes=0-0"}).status


def end_when_free(lab: Lab, end: Callable[[Lab], None]) -> None:
    def ended() -> bool:
        try:
            end(lab)
        except AssertionError:
            return False
        return True

    assert poll(ended, 5)


def test_the_transfers_of_one_client_share_its_bandwidth() -> None:
    """Ten seconds' worth is asked for by four transfers, of which each would be alone within the limit."""
    part = 512 << 10
    with Lab(client_bandwidth="1M") as lab:
        lab.upstream.answers[f"/v2/library/app/blobs/{BLOB}"] = reply(200, b"y" * part)
        began = time.monotonic()
        results: list[bytes] = []

        def pull() -> None:
            results.append(lab.ask(f"/v2/app/blobs/{BLOB}", at("192.0.2.1")).body)

        threads = [threading.Thread(target=pull) for _ in range(8)]
        for thread in threads:
            thread.start()
        quick = lab.ask(f"/v2/app/blobs/{BLOB}", at("192.0.2.2"))
        for thread in threads:
            thread.join()
        assert quick.body == b"y" * part
        assert [hashlib.sha256(body).digest() for body in results] == [hashlib.sha256(b"y" * part).digest()] * 8
        assert time.monotonic() - began > 2.5, "4 MiB at 1 MiB/s, the first second's worth at once: a lower bound"


def test_small_blobs_begin_at_once_and_a_client_that_waits_and_leaves_is_noticed() -> None:
    with Lab(client_bandwidth="50K") as lab:
        lab.upstream.answers[f"/v2/library/app/blobs/{BLOB}"] = reply(200, b"y" * 30_000)
        since = lab.mirror.mark()
        for _ in range(30):
            with ExitStack() as stack:
                assert begin(lab, "192.0.2.1", stack).status == 200
        assert len(lab.mirror.wait_for_requests(30, since)) == 30
        with ExitStack() as stack:
            assert begin(lab, "192.0.2.1", stack).read(1) == b"y"
