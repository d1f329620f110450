"""A mirror that gets out by a real proxy: nothing goes around it, and its password stays secret."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import pytest
from clients import Dockerd
from conftest import needs
from hub import CDN_HOST
from hub import PASSWORD
from hub import REGISTRY_HOST
from hub import TOKEN_HOST
from hub import USER
from hub import Hub
from hub import write_registries
from images import OCI_MANIFEST
from lab import Reply
from lab import ask
from proxies import CONNECT_HOST
from proxies import SOCKS_HOST
from proxies import ConnectProxy
from proxies import Proxy
from proxies import SocksProxy
from proxies import TlsFront
from pulls import pulled_by_docker
from pulls import succeeds
from registries import BASIC_HOST
from registries import BASIC_PASSWORD
from registries import BASIC_USER
from registries import BasicRegistry
from serving import HOST
from serving import Mirror

HIDDEN_NAME = "basic.lab.test"  # which the proxies know, and nobody else
REDIS = "/v2/library/redis/manifests/latest"
ACCEPT = {"Accept": OCI_MANIFEST}
APP = "/v2/basic.test/team/app/manifests/latest"
Tables = dict[str, dict[str, object]]


@pytest.fixture(scope="module")
def connect() -> Iterator[ConnectProxy]:
    """Run tinyproxy."""
    needs("root", "tinyproxy", "unshare")
    with ConnectProxy({HIDDEN_NAME: BASIC_HOST}) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def socks() -> Iterator[SocksProxy]:
    """Run microsocks."""
    needs("root", "microsocks", "unshare")
    with SocksProxy({HIDDEN_NAME: BASIC_HOST}) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def _fresh_records(hub: Hub, basic_registry: BasicRegistry, connect: ConnectProxy, socks: SocksProxy) -> None:
    for part in (hub, basic_registry, connect, socks):
        part.forget()


@pytest.fixture
def tables(hub: Hub, basic_registry: BasicRegistry) -> Tables:
    """Give the tables of the hub and of the registry that asks for Basic; tests change them."""
    return {"docker.io": hub.table(), "basic.test": basic_registry.table() | basic_registry.account()}


@contextmanager
def mirror_with(tables: Tables, **environment: str) -> Iterator[Mirror]:
    """Run a mirror with these registries and these variables, such as HTTPS_PROXY; no secret may be in its log."""
    with TemporaryDirectory(prefix="outbound-") as folder:
        file = write_registries(Path(folder) / "registries.toml", tables)
        with Mirror(registries=file, env=environment) as mirror:
            yield mirror
            for secret in (ConnectProxy.password, SocksProxy.password, "eat%3Ame", BASIC_PASSWORD, "Bearer ", "Basic "):
                assert secret not in mirror.log()


def everywhere(address: str) -> dict[str, set[str]]:
    """Return the hub's peers where every part was asked from this address, and from no other."""
    return {"registry": {address}, "token service": {address}, "CDN": {address}}


def hosts_of(asked: set[str]) -> set[str]:
    """Return the hosts that a proxy was asked for, without the ports."""
    return {target.rpartition(":")[0] for target in asked}


# Through the proxy of the environment


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_dockerd_pulls_through_an_http_proxy_and_nothing_goes_around_it(
    docker: Dockerd, hub: Hub, tables: Tables, connect: ConnectProxy, variable: str
) -> None:
    with mirror_with(tables, **{variable: connect.url()}) as mirror:
        pulled_by_docker(docker, f"{mirror.host}/redis", hub.repositories["library/redis"])
        assert hub.peers() == everywhere(CONNECT_HOST)
        assert hosts_of(connect.asked()) == {REGISTRY_HOST, TOKEN_HOST, CDN_HOST}


def test_dockerd_logs_in_and_pulls_a_private_image_through_an_http_proxy(
    docker: Dockerd, hub: Hub, tables: Tables, connect: ConnectProxy
) -> None:
    with mirror_with(tables, HTTPS_PROXY=connect.url()) as mirror:
        login = ("login", mirror.host, "--username", USER, "--password-stdin")
        succeeds(docker.docker(*login, config="proxied", stdin=PASSWORD))
        pulled_by_docker(docker, f"{mirror.host}/private/app", hub.repositories["private/app"], "proxied")
        assert hub.peers() == everywhere(CONNECT_HOST)
        assert PASSWORD not in mirror.log()


@pytest.mark.parametrize("scheme", ["socks5h", "socks5"])
def test_dockerd_pulls_through_a_socks_proxy_and_nothing_goes_around_it(
    docker: Dockerd, hub: Hub, tables: Tables, socks: SocksProxy, scheme: str
) -> None:
    with mirror_with(tables, ALL_PROXY=socks.url(scheme)) as mirror:
        pulled_by_docker(docker, f"{mirror.host}/redis", hub.repositories["library/redis"])
        assert hub.peers() == everywhere(SOCKS_HOST)
        assert hosts_of(socks.asked()) == {REGISTRY_HOST, TOKEN_HOST, CDN_HOST}


def test_dockerd_pulls_through_a_proxy_that_speaks_tls(
    docker: Dockerd, hub: Hub, tables: Tables, connect: ConnectProxy
) -> None:
    with TlsFront(connect, hub.authority) as front, mirror_with(tables, HTTPS_PROXY=front.url()) as mirror:
        pulled_by_docker(docker, f"{mirror.host}/redis", hub.repositories["library/redis"])
        assert hub.peers() == everywhere(CONNECT_HOST)
        assert front.connections


# Around it, where the owner says so


@pytest.mark.parametrize("no_proxy", [CDN_HOST, f"example.com, {CDN_HOST}/32"])
def test_no_proxy_is_honoured_host_by_host(hub: Hub, tables: Tables, connect: ConnectProxy, no_proxy: str) -> None:
    with mirror_with(tables, HTTPS_PROXY=connect.url(), NO_PROXY=no_proxy) as mirror:
        blob = hub.repositories["library/redis"].local().layers[0]
        assert ask(mirror, f"/v2/library/redis/blobs/{blob.digest}").body == blob.data
        assert hub.peers() == everywhere(CONNECT_HOST) | {"CDN": {HOST}}
        assert hosts_of(connect.asked()) == {REGISTRY_HOST, TOKEN_HOST}


def test_each_registry_may_have_a_proxy_of_its_own(
    docker: Dockerd,
    hub: Hub,
    basic_registry: BasicRegistry,
    tables: Tables,
    connect: ConnectProxy,
    socks: SocksProxy,
) -> None:
    tables["basic.test"]["proxy"] = socks.url()
    with mirror_with(tables, HTTPS_PROXY=connect.url(), NO_PROXY=BASIC_HOST) as mirror:
        pulled_by_docker(docker, f"{mirror.host}/redis", hub.repositories["library/redis"])
        pulled_by_docker(docker, f"{mirror.host}/basic.test/team/app", basic_registry.repositories["team/app"])
        assert hub.peers() == everywhere(CONNECT_HOST)
        assert {request.peer for request in basic_registry.requests()} == {SOCKS_HOST}
        assert hosts_of(socks.asked()) == {BASIC_HOST}


def test_a_registry_may_be_reached_directly_whatever_the_environment_says(
    hub: Hub, basic_registry: BasicRegistry, tables: Tables, connect: ConnectProxy
) -> None:
    tables["basic.test"]["proxy"] = "direct"
    with mirror_with(tables, HTTPS_PROXY=connect.url(), ALL_PROXY=connect.url()) as mirror:
        assert ask(mirror, REDIS, ACCEPT).status == ask(mirror, APP).status == 200
        assert {request.peer for request in hub.registry_requests()} == {CONNECT_HOST}
        assert {request.peer for request in basic_registry.requests()} == {HOST}


# Names that only the proxy knows


@pytest.fixture
def hidden(tables: Tables, basic_registry: BasicRegistry) -> Tables:
    """Give the tables with the Basic registry under a name that no DNS server knows."""
    tables["basic.test"]["endpoints"] = [f"https://{HIDDEN_NAME}:{urlsplit(basic_registry.url).port}"]
    return tables


@pytest.mark.parametrize("kind", ["connect", "socks"])
def test_the_proxy_looks_the_registrys_name_up(
    request: pytest.FixtureRequest, docker: Dockerd, basic_registry: BasicRegistry, hidden: Tables, kind: str
) -> None:
    proxy: Proxy = request.getfixturevalue(kind)
    with mirror_with(hidden, ALL_PROXY=proxy.url()) as mirror:
        pulled_by_docker(docker, f"{mirror.host}/basic.test/team/app", basic_registry.repositories["team/app"])
        assert {request.peer for request in basic_registry.requests()} == {proxy.host}


def test_with_plain_socks5_the_proxy_looks_names_up_too(
    basic_registry: BasicRegistry, hidden: Tables, socks: SocksProxy
) -> None:
    with mirror_with(hidden, ALL_PROXY=socks.url("socks5")) as mirror:
        assert ask(mirror, APP).status == 200
        assert {request.peer for request in basic_registry.requests()} == {SOCKS_HOST}


# What goes wrong


def assert_unavailable(answer: Reply) -> None:
    """See that an answer is a clean 502 that tells no secret."""
    assert (answer.status, answer.code) == (502, "UNAVAILABLE")
    for secret in (ConnectProxy.password, SocksProxy.password, "wonder", "@"):
        assert secret not in str(answer.body)


@pytest.mark.parametrize("kind", ["connect", "socks"])
def test_a_wrong_proxy_password_gives_a_clean_502(
    request: pytest.FixtureRequest, hub: Hub, tables: Tables, kind: str
) -> None:
    proxy: Proxy = request.getfixturevalue(kind)
    with mirror_with(tables, HTTPS_PROXY=proxy.url(password="wonder-of-wonders")) as mirror:
        for path in (REDIS, "/v2/"):
            assert_unavailable(ask(mirror, path))
        assert "wonder-of-wonders" not in mirror.log()
        assert hub.peers() == {"registry": set(), "token service": set(), "CDN": set()}


@pytest.mark.parametrize("scheme", ["http", "https", "socks5", "socks5h"])
def test_a_proxy_that_is_down_gives_a_clean_502(hub: Hub, tables: Tables, scheme: str) -> None:
    url = f"{scheme}://{USER}:wonder-of-wonders@{CONNECT_HOST}:9"
    with mirror_with(tables, HTTPS_PROXY=url) as mirror:
        assert_unavailable(ask(mirror, REDIS))
        assert "wonder-of-wonders" not in mirror.log()
        assert hub.peers()["registry"] == set()


def test_a_proxys_wrong_password_does_not_hinder_a_registry_that_is_reached_directly(
    tables: Tables, connect: ConnectProxy
) -> None:
    tables["basic.test"]["proxy"] = "direct"
    with mirror_with(tables, HTTPS_PROXY=connect.url(password="wonder-of-wonders")) as mirror:
        assert ask(mirror, APP).status == 200


# netrc


def test_netrc_is_never_read(hub: Hub, basic_registry: BasicRegistry, tables: Tables, tmp_path: Path) -> None:
    del tables["basic.test"]["username"], tables["basic.test"]["password"]
    logins = {BASIC_HOST: (BASIC_USER, BASIC_PASSWORD), REGISTRY_HOST: (USER, PASSWORD), TOKEN_HOST: (USER, PASSWORD)}
    netrc = tmp_path / ".netrc"
    netrc.write_text("".join(f"machine {host} login {user} password {word}\n" for host, (user, word) in logins.items()))
    netrc.chmod(0o600)
    with mirror_with(tables, HOME=str(tmp_path), NETRC=str(netrc)) as mirror:
        assert ask(mirror, APP).status == 401
        assert ask(mirror, REDIS, ACCEPT).status == 200
        assert ask(mirror, "/v2/private/app/manifests/latest").status == 401
        assert {request.status for request in basic_registry.requests()} == {401}
        assert {request.authorization for request in hub.tokens.requests} == {None}
