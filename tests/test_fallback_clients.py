"""Real clients pull although the first endpoint of Docker Hub limits, fails or is not there."""

import socket
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from contextlib import ExitStack
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from clients import Dockerd
from clients import Podman
from conftest import needs
from hub import PASSWORD
from hub import USER
from hub import Hub
from hub import write_registries
from images import OCI_MANIFEST
from lab import ask
from parts import Premises
from parts import server_context
from processes import free_port
from pulls import assert_denied
from pulls import pulled_by_containerd
from pulls import pulled_by_docker
from pulls import pulled_by_podman
from pulls import succeeds
from registries import BasicRegistry
from registries import OpenRegistry
from serving import Mirror
from upstream import Answer
from upstream import RawUpstream
from upstream import Request
from upstream import reply
from upstream import reply_json

BROKEN_HOST, PREFIX_HOST = "127.0.0.10", "127.0.0.11"
LIMIT = 25  # seconds within which a client must have its first byte
PING_LIMIT = 15  # seconds for which dockerd waits for the answer to /v2/
# Seconds, of the mirrors here: with the defaults, 5 and 20, those that meet silence would make the suite slow.
QUICK: dict[str, Any] = {"connect_timeout": 1, "first_byte_timeout": 3}
REDIS = "/v2/library/redis/manifests/latest"
ACCEPT = {"Accept": OCI_MANIFEST}  # of REDIS
HTML = b"<html><body><h1>503 Service Temporarily Unavailable</h1></body></html>"
LIMITED = {"errors": [{"code": "TOOMANYREQUESTS", "message": "You have reached your pull rate limit."}]}
PREFIX_RULES = """\
location /secret/hub/ { proxy_pass @HUB@/; }
location / { return 404; }
"""

# Ways to be broken: each gives the URL of an endpoint.

SilentEndpoints = dict[int, list[Future[tuple[int, float]]]]  # by their number: a ping's and a pull's answer
Fault = Callable[[Hub], AbstractContextManager[str]]


@contextmanager
def down(hub: Hub) -> Iterator[str]:
    """Have nobody listening."""
    yield f"https://{BROKEN_HOST}:{free_port(BROKEN_HOST)}"


@contextmanager
def refusing_tls(hub: Hub) -> Iterator[str]:
    """Close each connection as soon as the client has said something."""
    with socket.create_server((BROKEN_HOST, 0)) as listener:
        threading.Thread(target=_close_all, args=(listener,), daemon=True).start()
        yield f"https://{BROKEN_HOST}:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def _close_all(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.recv(1)


@contextmanager
def with_a_foreign_certificate(hub: Hub) -> Iterator[str]:
    """Speak TLS in another host's name."""
    with RawUpstream(BROKEN_HOST, server_context(hub.authority, PREFIX_HOST)) as upstream:
        yield upstream.url


@contextmanager
def hanging(hub: Hub) -> Iterator[str]:
    """Take connections, as the kernel does, and never say a word."""
    with socket.create_server((BROKEN_HOST, 0), backlog=128) as listener:
        yield f"https://{BROKEN_HOST}:{listener.getsockname()[1]}"


@contextmanager
def reading_only(hub: Hub) -> Iterator[str]:
    """Speak TLS, read each request and never answer."""
    with RawUpstream(BROKEN_HOST, server_context(hub.authority, BROKEN_HOST)) as upstream:

        def wait(request: Request, connection: socket.socket) -> None:
            upstream.ending.wait(60)

        upstream.default = wait
        yield upstream.url


def answering(answer: bytes) -> Fault:
    """Return an endpoint that gives the same answer to everything."""

    @contextmanager
    def start(hub: Hub) -> Iterator[str]:
        with answers_all(hub, answer) as upstream:
            yield upstream.url

    return start


def answers_all(hub: Hub, answer: Answer, host: str = BROKEN_HOST) -> RawUpstream:
    """Return an upstream, not yet started, that speaks TLS and gives the same answer to everything."""
    upstream = RawUpstream(host, server_context(hub.authority, host))
    upstream.default = answer
    return upstream


FAULTS: dict[str, Fault] = {
    "down": down,
    "refusing-tls": refusing_tls,
    "with-a-foreign-certificate": with_a_foreign_certificate,
    "hanging": hanging,
    "reading-only": reading_only,
    "429-with-retry-after": answering(reply_json(429, LIMITED, {"Retry-After": "30"})),
    "429": answering(reply_json(429, LIMITED)),
    "429-in-plain-text": answering(reply(429, b"Too Many Requests\n", {"Content-Type": "text/plain"})),
    "500": answering(reply_json(500, {"errors": [{"code": "UNKNOWN"}]})),
    "503-in-html": answering(reply(503, HTML, {"Content-Type": "text/html"})),
}


@contextmanager
def mirror_of(hub: Hub, *endpoints: str, settings: Mapping[str, Any] = QUICK) -> Iterator[Mirror]:
    """Run a mirror that has these endpoints for Docker Hub."""
    with TemporaryDirectory(prefix="fallback-") as folder:
        table = {**hub.table(), "endpoints": endpoints}
        file = write_registries(Path(folder) / "registries.toml", {"docker.io": table})
        with Mirror(registries=file, **settings) as mirror:
            yield mirror


@pytest.fixture
def limited(hub: Hub) -> Iterator[RawUpstream]:
    """Run an endpoint that answers 429 to everything, and does not want to be asked for half a minute."""
    with answers_all(hub, reply_json(429, LIMITED, {"Retry-After": "30"})) as upstream:
        yield upstream


@pytest.fixture(autouse=True)
def _fresh_records(hub: Hub) -> None:
    hub.forget()


@pytest.fixture(scope="module", autouse=True)
def silent_endpoints(hub: Hub) -> Iterator[SilentEndpoints]:
    """Give the answers to a ping and a pull, with their seconds, where one or two endpoints are silent for too long.

    The settings are the defaults. The answers are asked for at once, and come in while the other tests run.
    """
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor())
        answers = {}
        silent = [stack.enter_context(FAULTS[fault](hub)) for fault in ("hanging", "reading-only")]
        for count in (1, 2):
            endpoints = [*silent[-count:], hub.registry_url]
            mirror = stack.enter_context(mirror_of(hub, *endpoints, settings={}))
            answers[count] = [pool.submit(timed, mirror, path) for path in ("/v2/", REDIS)]
        yield answers


def timed(mirror: Mirror, path: str) -> tuple[int, float]:
    """Return the status of an answer, and the seconds that it took."""
    started = time.monotonic()
    return ask(mirror, path, ACCEPT).status, time.monotonic() - started


# One endpoint is broken


@pytest.mark.parametrize("fault", FAULTS)
def test_dockerd_pulls_from_the_next_endpoint_where_the_first_is(docker: Dockerd, hub: Hub, fault: str) -> None:
    with FAULTS[fault](hub) as broken, mirror_of(hub, broken, hub.registry_url) as mirror:
        started = time.monotonic()
        pulled_by_docker(docker, f"{mirror.host}/hello-world", hub.repositories["library/hello-world"])
        assert time.monotonic() - started < LIMIT


@pytest.mark.parametrize("fault", ["hanging", "429-with-retry-after", "503-in-html"])
def test_podman_pulls_from_the_next_endpoint_where_the_first_is(hub: Hub, fault: str) -> None:
    needs("root", "podman")
    with (
        FAULTS[fault](hub) as broken,
        mirror_of(hub, broken, hub.registry_url) as mirror,
        Podman(mirror.url) as podman,
    ):
        started = time.monotonic()
        pulled_by_podman(podman, "redis", hub.repositories["library/redis"])
        assert time.monotonic() - started < LIMIT


def test_dockerd_pulls_a_short_name_where_the_last_of_three_endpoints_alone_is_well(
    hub: Hub, limited: RawUpstream
) -> None:
    needs("root", "dockerd", "docker", "containerd", "ctr")
    with (
        down(hub) as closed,
        mirror_of(hub, closed, limited.url, hub.registry_url) as mirror,
        Dockerd(mirror.url) as docker,
    ):
        pulled_by_docker(docker, "bitnami/postgresql", hub.repositories["bitnami/postgresql"])


def test_an_endpoint_that_limits_is_left_alone_for_the_next_pulls(
    docker: Dockerd, hub: Hub, limited: RawUpstream
) -> None:
    with mirror_of(hub, limited.url, hub.registry_url) as mirror:
        pulled_by_docker(docker, f"{mirror.host}/redis", hub.repositories["library/redis"])
        assert not [request for request in limited.requests if "/blobs/" in request.path]
        count = len(limited.requests)
        pulled_by_docker(docker, f"{mirror.host}/nginx", hub.repositories["library/nginx"])
        assert len(limited.requests) == count


def test_an_endpoint_that_does_well_again_is_asked_again(hub: Hub, limited: RawUpstream) -> None:
    limited.default = reply_json(429, LIMITED, {"Retry-After": "1"})
    with mirror_of(hub, limited.url, hub.registry_url) as mirror:
        assert ask(mirror, REDIS, ACCEPT).body == hub.repositories["library/redis"].top().data
        limited.default = reply_json(200, {"schemaVersion": 2})
        time.sleep(1.1)
        assert ask(mirror, REDIS, ACCEPT).json == {"schemaVersion": 2}


# What the next endpoint may be


def test_the_next_endpoint_may_be_another_mirror(
    docker: Dockerd, hub: Hub, limited: RawUpstream, mirror: Mirror
) -> None:
    mark = mirror.mark()
    repository = hub.repositories["library/redis"]
    with mirror_of(hub, limited.url, mirror.url) as first:
        pulled_by_docker(docker, f"{first.host}/redis", repository)
        assert_denied(docker.docker("pull", f"{first.host}/private/app"))
    asked = mirror.access_log(mark)
    assert ("GET", "/token", 200) in asked
    assert ("GET", f"/v2/library/redis/manifests/{repository.top().digest}", 200) in asked
    for blob in (repository.local().config, *repository.local().layers):
        assert ("GET", f"/v2/library/redis/blobs/{blob.digest}", 200) in asked


class PrefixedHub(Premises):
    """Run nginx with a hub behind it, below a path."""

    def __init__(self, hub: Hub) -> None:
        super().__init__(hub.authority)
        self._hub = hub

    def start(self) -> None:
        """Start nginx."""
        nginx = self.nginx("prefix", PREFIX_HOST, PREFIX_RULES, hub=self._hub.registry_url)
        nginx.wait()
        self.url = f"{nginx.url}/secret/hub"


def test_the_next_endpoint_may_have_a_path(docker: Dockerd, hub: Hub, limited: RawUpstream) -> None:
    with PrefixedHub(hub) as prefixed, mirror_of(hub, limited.url, prefixed.url) as mirror:
        pulled_by_docker(docker, f"{mirror.host}/redis", hub.repositories["library/redis"])
        pulled_by_containerd(docker, hub.repositories["library/redis"], mirror_url=mirror.url)


def test_the_first_endpoint_may_have_a_path_and_a_client_logs_in_there(docker: Dockerd, hub: Hub) -> None:
    with PrefixedHub(hub) as prefixed, mirror_of(hub, prefixed.url) as mirror:
        login = ("login", mirror.host, "--username", USER, "--password-stdin")
        succeeds(docker.docker(*login, config="prefix-login", stdin=PASSWORD))
        pulled_by_docker(docker, f"{mirror.host}/private/app", hub.repositories["private/app"], "prefix-login")


# A client's own credentials


def test_a_login_reaches_the_first_endpoint_only(docker: Dockerd, hub: Hub) -> None:
    with (
        answers_all(hub, reply_json(200, {})) as second,
        mirror_of(hub, hub.registry_url, second.url) as mirror,
    ):
        config = docker.config_with_login("first-only", mirror.host, USER, PASSWORD)
        pulled_by_docker(docker, f"{mirror.host}/private/app", hub.repositories["private/app"], config)
        answer = ask(mirror, "/v2/private/nosuch/manifests/latest", {"Authorization": "Bearer of-a-client"})
        assert answer.status == 401
        assert second.requests == []


@pytest.mark.parametrize("status", [429, 500])
def test_a_login_reaches_no_other_endpoint_where_the_first_fails(hub: Hub, status: int) -> None:
    with (
        answers_all(hub, reply_json(status, LIMITED)) as first,
        answers_all(hub, reply_json(200, {}), PREFIX_HOST) as second,
        mirror_of(hub, first.url, second.url) as mirror,
    ):
        answer = ask(mirror, "/v2/private/app/manifests/latest", {"Authorization": "Bearer of-a-client"})
        assert answer.status == {429: 429, 500: 502}[status]
        assert {request.headers.get("authorization") for request in first.requests} == {"Bearer of-a-client"}
        ask(mirror, "/token?scope=repository:private/app:pull", {"Authorization": "Basic YWxpY2U6d29uZGVybGFuZA=="})
        assert not [request for request in second.requests if "authorization" in request.headers]


# All registries, all clients, at once


def test_one_mirror_serves_all_registries_to_all_clients_at_once_while_docker_hub_limits_it(
    hub: Hub,
    open_registry: OpenRegistry,
    guarded_registry: OpenRegistry,
    basic_registry: BasicRegistry,
    limited: RawUpstream,
    tmp_path: Path,
) -> None:
    needs("root", "dockerd", "docker", "containerd", "ctr", "podman")
    others = {
        "registry.k8s.io": open_registry.table(),
        "pkg.test": guarded_registry.table(),
        "basic.test": basic_registry.table() | basic_registry.account(),
    }
    tables = {"docker.io": {**hub.table(), "endpoints": [limited.url, hub.registry_url]}, **others}
    file = write_registries(tmp_path / "registries.toml", tables)
    redis, pause = hub.repositories["library/redis"], open_registry.repositories["pause"]
    images = [
        ("registry.k8s.io", pause),
        ("pkg.test", guarded_registry.repositories["coredns/coredns"]),
        ("basic.test", basic_registry.repositories["team/app"]),
    ]
    with (
        Mirror(registries=file, **QUICK) as mirror,
        Dockerd(mirror.url) as docker,
        Podman(mirror.url, *others) as podman,
        ThreadPoolExecutor() as pool,
    ):

        def all_by_docker() -> None:
            pulled_by_docker(docker, "redis", redis)
            for registry, repository in images:
                pulled_by_docker(docker, f"{mirror.host}/{registry}/{repository.name}", repository)

        def all_by_containerd() -> None:
            pulled_by_containerd(docker, redis)
            for registry, repository in images:
                pulled_by_containerd(docker, repository, registry=registry)

        def all_by_podman() -> None:
            pulled_by_podman(podman, "redis", redis)
            for registry, repository in images:
                pulled_by_podman(podman, f"{registry}/{repository.name}", repository)

        for pulls in [pool.submit(pulls) for pulls in (all_by_docker, all_by_containerd, all_by_podman)]:
            pulls.result()
        assert not [line for line in mirror.access_log() if line.status >= 500 or line.status == 429]
    assert limited.requests


# Silence, with the default settings: the last tests, for the answers take their time


@pytest.mark.parametrize("count", [1, 2])
def test_the_first_byte_comes_in_time_with_the_default_settings(silent_endpoints: SilentEndpoints, count: int) -> None:
    ping, manifest = [answer.result() for answer in silent_endpoints[count]]
    assert (ping[0], manifest[0]) == (401, 200)
    assert ping[1] < PING_LIMIT
    assert manifest[1] < LIMIT
