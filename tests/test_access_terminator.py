"""Who may pull what, and how much of it, on a real host: dockerd, containerd and curl behind README's own nginx.

Each client has an address of its own, and claims others. dockerd and containerd come from 127.0.0.1, as nginx does to
the mirror.
"""

import hashlib
import http.client
import io
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trustme
from clients import Result
from conftest import needs
from hub import Hub
from hub import write_registries
from images import DOCKER_MANIFEST
from images import OCI_MANIFEST
from lab import BLOB
from lab import DIGEST
from lab import Lab
from lab import Reply
from line import DistantHub
from processes import clean_environment
from processes import poll
from pulls import assert_denied
from pulls import pulled_by_containerd
from pulls import pulled_by_docker
from pulls import refusal
from pulls import succeeds
from registries import BASIC_PASSWORD
from registries import BASIC_USER
from registries import HTPASSWD
from serving import Mirror
from terminator import Terminator
from terminator import TrustingDockerd
from upstream import Request
from upstream import reply

LOCAL = "127.0.0.1"
FRIEND, ENEMY, STRANGER = "127.0.0.32", "127.0.0.33", "127.0.0.48"
ONE, TWO, THREE = "127.0.0.49", "127.0.0.50", "127.0.0.51"
UNKNOWN = "192.0.2.1"
MANIFEST = "/v2/redis/manifests/latest"
ACCEPT = f"Accept: {OCI_MANIFEST}, {DOCKER_MANIFEST}, */*"
MIB = 1 << 20
SECONDS = 30  # until a curl is given up


def claims(address: str) -> list[tuple[str, ...]]:
    """Return the ways in which curl claims another address: in one header, in several, in several lines of one."""
    lines = {
        "X-Forwarded-For": (address, f"{address}, {address}", f"{address}, {LOCAL}", f"{LOCAL}, {address}", ""),
        "X_Forwarded_For": (address,),
        "X-Real-IP": (address,),
        "X-Client-IP": (address,),
        "Forwarded": (f"for={address}", f'for="{address}";proto=https;by={LOCAL}'),
    }
    single = [("-H", f"{name}: {value}" if value else f"{name};") for name, values in lines.items() for value in values]
    twice = ("-H", f"X-Forwarded-For: {address}") * 2
    return [*single, twice, tuple(word for claim in single for word in claim)]


def curl(url: str, source: str, *options: str, ca_file: Path | None = None) -> Reply:
    """Let curl ask from an address; raise CalledProcessError where it fails."""
    fixed = ["-sS", "-i", "-H", ACCEPT, "--max-time", str(SECONDS), "--interface", f"host!{source}"]
    trust = ["--cacert", str(ca_file)] if ca_file else []
    command = ["curl", *fixed, *trust, *options, url]
    ended = subprocess.run(command, capture_output=True, env=clean_environment(), check=True)
    head, _, body = ended.stdout.partition(b"\r\n\r\n")
    status, _, lines = head.partition(b"\r\n")
    headers = http.client.parse_headers(io.BytesIO(lines + b"\r\n\r\n"))
    return Reply(int(status.split()[1]), {name.lower(): value for name, value in headers.items()}, body)


class Guarded(Terminator):
    """Be the terminator of a mirror that has rules."""

    def curl(self, source: str, path: str, *options: str) -> Reply:
        """Let curl ask through TLS from an address."""
        return curl(self.url + path, source, *options, ca_file=self.ca_file)

    def statuses(self, source: str, path: str, claimed: str) -> set[int]:
        """Return the statuses that a client gets which claims another address in each way."""
        return {self.curl(source, path, *claim).status for claim in claims(claimed)}


def refused(answer: Reply, *words: str) -> bool:
    """Tell whether an answer is the mirror's refusal for this reason."""
    message = answer.json["errors"][0]["message"]
    return (answer.status, answer.code) == (403, "DENIED") and all(word in message for word in words)


def limited(answer: Reply, *words: str) -> bool:
    """Tell whether an answer is the mirror's own limit of this kind, and says when to come again."""
    message = answer.json["errors"][0]["message"]
    found = (answer.status, answer.code) == (429, "TOOMANYREQUESTS") and all(word in message for word in words)
    return found and int(answer.headers["retry-after"]) >= 1


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Give the one authority of all terminators here, which one dockerd trusts."""
    needs("nginx", "curl")
    return trustme.CA()


@pytest.fixture(scope="module")
def dockerd(listed: Guarded) -> Iterator[TrustingDockerd]:
    """Run one dockerd for all mirrors: it names them by their addresses."""
    needs("root", "dockerd", "docker", "containerd", "ctr")
    with TrustingDockerd(listed) as running:
        yield running


@pytest.fixture
def docker(dockerd: TrustingDockerd, hub: Hub) -> TrustingDockerd:
    """Give that dockerd without any image, and a hub that was asked for nothing yet."""
    dockerd.forget_images()
    hub.forget()
    return dockerd


# Clients


@pytest.fixture(scope="module")
def listed_mirror(hub: Hub) -> Iterator[Mirror]:
    file = hub.registries_file
    with Mirror(registries=file, terminators=LOCAL, allow_clients="127.0.0.32/28", deny_clients=ENEMY) as running:
        yield running


@pytest.fixture(scope="module")
def listed(listed_mirror: Mirror, authority: trustme.CA) -> Iterator[Guarded]:
    with Guarded(listed_mirror, authority) as running:
        yield running


@pytest.mark.parametrize("path", [MANIFEST, "/v2/", "/token", f"/v2/redis/blobs/{DIGEST}", "/v1/search?q=redis"])
def test_a_client_that_is_not_listed_is_refused_with_its_own_address(listed: Guarded, path: str) -> None:
    assert refused(listed.curl(STRANGER, path), f"clients at {STRANGER}")
    assert refused(listed.curl(ENEMY, path), f"clients at {ENEMY}")


def test_no_claim_makes_a_friend_of_a_stranger(listed: Guarded, hub: Hub) -> None:
    hub.forget()
    for source in (STRANGER, ENEMY):
        for claim in claims(FRIEND):
            assert refused(listed.curl(source, MANIFEST, *claim), f"clients at {source}")
    assert not hub.registry_requests()


def test_no_claim_makes_an_enemy_of_a_friend(listed: Guarded) -> None:
    assert listed.statuses(FRIEND, MANIFEST, ENEMY) == {200}


def test_dockerd_is_told_that_the_mirror_is_not_for_its_address(
    docker: TrustingDockerd, listed: Guarded, hub: Hub
) -> None:
    before = len(listed.asked())
    assert f"this mirror is not for clients at {LOCAL}" in refusal(docker.docker("pull", f"{listed.host}/redis"))
    assert {status for _, _, status in listed.asked(before)} == {403}
    assert not hub.registry_requests()


def test_who_comes_around_the_terminator_is_who_he_is(listed_mirror: Mirror) -> None:
    url = listed_mirror.url + MANIFEST
    since = listed_mirror.mark()
    for claim in claims(FRIEND):
        assert refused(curl(url, STRANGER, *claim), f"clients at {STRANGER}")
    assert {curl(url, FRIEND, *claim).status for claim in claims(ENEMY)} == {200}
    assert f"X-Forwarded-For of {STRANGER} is not believed" in listed_mirror.log(since)


def test_who_comes_around_the_terminator_cannot_turn_the_challenge_elsewhere(listed_mirror: Mirror) -> None:
    forged = ("-H", "X-Forwarded-Host: evil.example", "-H", "X-Forwarded-Proto: https", "-H", "X-Forwarded-Prefix: /x")
    answer = curl(f"{listed_mirror.url}/v2/", FRIEND, *forged)
    assert f'realm="{listed_mirror.url}/token"' in answer.headers["www-authenticate"]


# Images


@pytest.fixture(scope="module")
def chosen(hub: Hub, authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """Run a mirror of two registries with the same images, which are not all for everyone."""
    file = tmp_path_factory.mktemp("chosen") / "registries.toml"
    allowed, denied = "library/*, ghcr.io/library/nginx", "nginx, redis:7"
    with (
        DistantHub(hub) as other,  # one endpoint for both would make their images the same
        Mirror(
            registries=write_registries(file, {"docker.io": hub.table(), "ghcr.io": other.table()}),
            terminators=LOCAL,
            allow_images=allowed,
            deny_images=denied,
        ) as mirror,
        Guarded(mirror, authority) as running,
    ):
        yield running


@pytest.mark.parametrize("name", ["redis", "docker.io/library/hello-world", "ghcr.io/library/nginx"])
def test_dockerd_pulls_an_allowed_image(docker: TrustingDockerd, chosen: Guarded, hub: Hub, name: str) -> None:
    before = len(chosen.asked())
    repository = hub.repositories[f"library/{name.rpartition('/')[2]}"]
    pulled_by_docker(docker, f"{chosen.host}/{name}", repository)
    assert ("HEAD", f"/v2/{name}/manifests/latest", 200) in chosen.asked(before), "through TLS"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("nginx", "docker.io/library/nginx"),
        ("library/nginx:alpine", "docker.io/library/nginx"),
        ("docker.io/library/nginx", "docker.io/library/nginx"),
        ("redis:7", "docker.io/library/redis"),
        ("private/app", "docker.io/private/app"),
        ("ghcr.io/library/redis", "ghcr.io/library/redis"),
    ],
)
def test_dockerd_shows_why_another_image_is_refused(
    docker: TrustingDockerd, chosen: Guarded, hub: Hub, name: str, meant: str
) -> None:
    message = refusal(docker.docker("pull", f"{chosen.host}/{name}"))
    assert f"this mirror does not serve {meant}, or not by that name" in message
    assert not [request for request in hub.registry_requests() if request.path != "/v2/"], "the ping is for everyone"


def test_dockerd_is_refused_a_denied_image_by_its_digest(docker: TrustingDockerd, chosen: Guarded, hub: Hub) -> None:
    digest = hub.repositories["library/nginx"].top().digest
    message = refusal(docker.docker("pull", f"{chosen.host}/nginx@{digest}"))
    assert "does not serve docker.io/library/nginx" in message


@pytest.mark.parametrize(("registry", "name"), [("docker.io", "library/redis"), ("ghcr.io", "library/nginx")])
def test_containerd_pulls_an_allowed_image_by_ns(
    docker: TrustingDockerd, chosen: Guarded, hub: Hub, registry: str, name: str
) -> None:
    pulled_by_containerd(docker, hub.repositories[name], registry=registry, mirror_url=chosen.url)


@pytest.mark.parametrize("image", ["docker.io/library/nginx:latest", "ghcr.io/library/redis:latest"])
def test_containerd_is_refused_another_image_by_ns(
    docker: TrustingDockerd, chosen: Guarded, hub: Hub, image: str
) -> None:
    before = len(chosen.asked())
    result = docker.ctr_pull(image, mirror_url=chosen.url)
    assert result.returncode != 0, result.stdout
    assert {status for _, _, status in chosen.asked(before)} == {403}
    assert not hub.registry_requests()


def test_a_claimed_host_makes_no_other_registrys_image_of_a_denied_one(chosen: Guarded) -> None:
    path = "/v2/library/nginx/manifests/latest"
    assert chosen.curl(FRIEND, path, "-H", "Host: ghcr.mirror.example").status == 200, "it is ghcr.io's"
    for name in ("X-Forwarded-Host", "X_Forwarded_Host", "X-Host", "X-Original-Host"):
        answer = chosen.curl(FRIEND, path, "-H", f"{name}: ghcr.mirror.example")
        assert refused(answer, "docker.io/library/nginx")


@pytest.mark.parametrize(
    "path",
    ["/v2/library/redis/../nginx/manifests/latest", "/v2/library%2Fnginx/manifests/latest", "/v2//nginx/manifests/1"],
)
def test_no_spelling_of_a_path_leads_around_a_rule(chosen: Guarded, hub: Hub, path: str) -> None:
    hub.forget()
    assert chosen.curl(FRIEND, path, "--path-as-is").status in (400, 404)
    assert not hub.registry_requests()


# Pulls and agents


@pytest.fixture(scope="module")
def counted(hub: Hub, authority: trustme.CA) -> Iterator[Guarded]:
    file, agents = hub.registries_file, "GPTBot, containerd/"
    with (
        Mirror(registries=file, terminators=LOCAL, pull_rate="3/d", block_agents=agents) as mirror,
        Guarded(mirror, authority) as running,
    ):
        yield running


LIMIT = "limit for one client is 3/d manifests"


def test_dockerd_is_refused_once_it_had_its_pulls(docker: TrustingDockerd, counted: Guarded, hub: Hub) -> None:
    pulled_by_docker(docker, f"{counted.host}/hello-world", hub.repositories["library/hello-world"])  # takes two
    pulled_by_docker(docker, f"{counted.host}/redis", hub.repositories["library/redis"])
    message = refusal(docker.docker("pull", f"{counted.host}/nginx"))
    assert "toomanyrequests" in message
    assert LIMIT in message
    assert counted.statuses(LOCAL, MANIFEST, UNKNOWN) == {429}
    assert limited(counted.curl(LOCAL, MANIFEST), LIMIT)


def test_no_claim_gives_new_pulls(counted: Guarded) -> None:
    found = [counted.curl(ONE, MANIFEST, *claim).status for claim in claims(UNKNOWN)]
    assert found == [200] * 3 + [429] * (len(found) - 3)


def test_no_claim_takes_another_clients_pulls(counted: Guarded) -> None:
    assert counted.statuses(TWO, MANIFEST, THREE) == {200, 429}
    assert [counted.curl(THREE, MANIFEST).status for _ in range(4)] == [200] * 3 + [429]


def test_a_blocked_agent_finds_no_registry(docker: TrustingDockerd, counted: Guarded, hub: Hub) -> None:
    since = len(counted.asked())
    assert docker.ctr_pull("docker.io/library/redis:latest", mirror_url=counted.url).returncode != 0
    assert {status for _, _, status in counted.asked(since)} == {404}
    assert not hub.registry_requests()
    twice = ("-H", "User-Agent: curl/8", "-H", "User-Agent: GPTBot")
    for options in (("-A", "Mozilla/5.0 (compatible; gptbot/1.2)"), twice):
        assert b"<center>nginx</center>" in counted.curl(FRIEND, MANIFEST, *options).body
        assert b"Welcome to nginx!" in counted.curl(FRIEND, "/", *options).body
    assert counted.curl(FRIEND, MANIFEST).status == 200, "curl is another one"


# Transfers and bandwidth


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(client_transfers=2, transfers=3, client_bandwidth="2M", terminators=LOCAL) as running:
        yield running


@pytest.fixture(scope="module")
def bounded(lab: Lab, authority: trustme.CA) -> Iterator[Guarded]:
    with Guarded(lab.mirror, authority) as running:
        yield running


ASKED = f"/v2/app/blobs/{DIGEST}"


def test_so_many_transfers_run_for_one_client_whatever_it_claims(lab: Lab, bounded: Guarded) -> None:
    go_on, content = threading.Event(), b"x" * MIB

    def answer(request: Request, connection: socket.socket) -> None:
        connection.sendall(reply(200, b"", {"Content-Length": str(MIB)}))
        if request.method == "HEAD":
            return
        connection.sendall(content[: MIB // 2])
        go_on.wait(SECONDS)
        connection.sendall(content[MIB // 2 :])

    lab.upstream.answers[BLOB] = answer
    with ThreadPoolExecutor() as pool:

        def begin(source: str, *options: str) -> None:
            before = len(lab.upstream.asked(BLOB))
            running.append(pool.submit(bounded.curl, source, ASKED, *options))
            assert poll(lambda: len(lab.upstream.asked(BLOB)) > before, SECONDS)

        running: list[Future[Reply]] = []
        try:
            begin(ONE)
            begin(ONE, "-H", f"X-Forwarded-For: {UNKNOWN}")
            for claim in claims(UNKNOWN):
                assert limited(bounded.curl(ONE, ASKED, *claim), "2 transfers for one client")
            assert bounded.curl(ONE, ASKED, "--head").status == 200, "a HEAD is no transfer"
            begin(TWO)
            assert limited(bounded.curl(THREE, ASKED), "3 transfers at a time")
        finally:
            go_on.set()
        assert [transfer.result().body for transfer in running] == [content] * 3
    assert poll(lambda: bounded.curl(ONE, ASKED).body == content, SECONDS)


def test_the_transfers_of_one_client_share_its_bandwidth_whatever_it_claims(lab: Lab, bounded: Guarded) -> None:
    content = b"y" * (3 * MIB)
    lab.upstream.answers[BLOB] = reply(200, content)
    began = time.monotonic()
    with ThreadPoolExecutor() as pool:
        running = [
            pool.submit(bounded.curl, THREE, ASKED, "-H", f"X-Forwarded-For: {claimed}")
            for claimed in (UNKNOWN, "192.0.2.2")
        ]
        found = [hashlib.sha256(transfer.result().body).digest() for transfer in running]
    assert found == [hashlib.sha256(content).digest()] * 2
    assert time.monotonic() - began > 1.5, "6 MiB at 2 MiB/s, the first second's worth at once: a lower bound"


# The mirror's own users


@pytest.fixture(scope="module")
def closed_mirror(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mirror]:
    file = tmp_path_factory.mktemp("users") / "htpasswd"
    file.write_text(HTPASSWD)
    with Mirror(registries=hub.registries_file, terminators=LOCAL, users=file) as running:
        yield running


@pytest.fixture(scope="module")
def closed(closed_mirror: Mirror, authority: trustme.CA) -> Iterator[Guarded]:
    with Guarded(closed_mirror, authority) as running:
        yield running


@pytest.fixture
def _keeps_passwords(closed_mirror: Mirror, hub: Hub) -> Iterator[None]:
    """See after a test that no login reached the hub or the log."""
    yield
    assert not [request for request in hub.tokens.requests if request.authorization or request.form]
    log = closed_mirror.log()
    assert not [word for word in (BASIC_PASSWORD, "of-a-raven", "Basic ", "Bearer ") if word in log]


TOKENS = ("anonymous", BASIC_USER, "x.y.z")  # which are none


def login(docker: TrustingDockerd, host: str, config: str, password: str) -> Result:
    return docker.docker("login", host, "-u", BASIC_USER, "--password-stdin", config=config, stdin=password)


@pytest.mark.usefixtures("_keeps_passwords")
def test_dockerd_pulls_as_a_user_only(docker: TrustingDockerd, closed: Guarded, hub: Hub) -> None:
    name = f"{closed.host}/redis"
    assert_denied(docker.docker("pull", name))
    assert not hub.registry_requests()
    succeeds(login(docker, closed.host, "user", BASIC_PASSWORD))
    pulled_by_docker(docker, name, hub.repositories["library/redis"], "user")
    succeeds(docker.docker("logout", closed.host, config="user"))
    docker.forget_images()
    assert_denied(docker.docker("pull", name, config="user"))


@pytest.mark.usefixtures("_keeps_passwords")
def test_dockerd_cannot_log_in_with_a_wrong_password(docker: TrustingDockerd, closed: Guarded, hub: Hub) -> None:
    message = refusal(login(docker, closed.host, "wrong", "of-a-raven"))
    assert "the user or the password is wrong" in message
    assert_denied(docker.docker("pull", f"{closed.host}/redis", config="wrong"))
    assert not hub.registry_requests()


@pytest.mark.usefixtures("_keeps_passwords")
def test_a_user_gets_what_is_public_and_nothing_more(docker: TrustingDockerd, closed: Guarded) -> None:
    succeeds(login(docker, closed.host, "public", BASIC_PASSWORD))
    before = len(closed.asked())
    assert_denied(docker.docker("pull", f"{closed.host}/private/app", config="public"))
    assert {status for _, path, status in closed.asked(before) if "/manifests/" in path} == {403}


@pytest.mark.usefixtures("_keeps_passwords")
def test_containerd_pulls_as_a_user_only(docker: TrustingDockerd, closed: Guarded, hub: Hub) -> None:
    image = "docker.io/library/nginx:latest"
    for options in ((), ("--user", f"{BASIC_USER}:of-a-raven")):
        assert docker.ctr_pull(image, *options, mirror_url=closed.url).returncode != 0
    assert not hub.registry_requests()
    user = ("--user", f"{BASIC_USER}:{BASIC_PASSWORD}")
    pulled_by_containerd(docker, hub.repositories["library/nginx"], *user, mirror_url=closed.url)


def test_the_users_challenge_names_the_terminator_whatever_the_client_claims(closed: Guarded) -> None:
    forged = ("-H", "X-Forwarded-Host: evil.example", "-H", "X-Forwarded-Proto: http", "-H", "Forwarded: host=evil")
    for claim in [(), forged, *claims(LOCAL)]:
        answer = closed.curl(STRANGER, "/v2/", *claim)
        assert answer.status == 401
        expected = f'Bearer realm="{closed.url}/token",service="docker-mirror"'
        assert answer.headers["www-authenticate"] == expected


def test_who_comes_around_the_terminator_needs_a_login_too(closed_mirror: Mirror) -> None:
    logins = [("-u", f"{BASIC_USER}:{BASIC_PASSWORD}"), *(("-H", f"Authorization: Bearer {word}") for word in TOKENS)]
    for options in [(), *logins, *claims(LOCAL)]:
        assert curl(closed_mirror.url + MANIFEST, STRANGER, *options).status == 401
