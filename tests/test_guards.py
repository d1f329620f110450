"""Where a registry may lead the mirror to: public addresses, its own inner network, and what the owner listed."""

import pytest
from lab import DIGEST
from lab import Lab
from upstream import RawUpstream
from upstream import reply

import mirror
from settings import Registry

BLOB_PATH = f"/v2/app/blobs/{DIGEST}"
BLOB = f"/v2/library/app/blobs/{DIGEST}"


def guard_of(endpoint: str, *realms: str) -> mirror.Guard:
    return mirror.Guard(Registry("x", (endpoint,), realms=realms), ipv4_only=False)


@pytest.mark.parametrize(
    ("address", "admitted"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("172.32.0.1", True),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("ff02::1", False),
        ("64:ff9b::808:808", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b:1::a00:1", False),
        ("2002:7f00:1::", False),
        ("2002:808:808::", True),
        ("::127.0.0.1", False),
        ("::ffff:0:127.0.0.1", False),
        ("fec0::1", False),
    ],
)
def test_a_public_registry_leads_to_public_addresses_only(address: str, admitted: bool) -> None:
    guard = guard_of("https://registry.example")
    assert guard.admits("registry.example", "198.41.0.4")
    assert guard.admits("elsewhere.example", address) == admitted


def test_an_inner_registry_leads_to_its_own_network_only() -> None:
    guard = guard_of("https://10.0.0.5")
    assert guard.admits("storage.inner", "10.200.0.9")
    assert guard.admits("storage.example", "8.8.8.8")
    assert not guard.admits("router.inner", "192.168.0.1")
    assert not guard.admits("localhost", "127.0.0.1")


def test_what_the_owner_listed_may_be_anywhere() -> None:
    guard = guard_of("https://registry.example", "https://auth.inner")
    assert guard.admits("auth.inner", "192.168.0.7")
    assert not guard.admits("other.inner", "192.168.0.7")


def test_a_name_is_connected_to_at_the_address_that_was_checked() -> None:
    guard = mirror.Guard(Registry("x", ("http://localhost:1",)), ipv4_only=True)
    assert guard.addresses("localhost", 1) == ["127.0.0.1"]
    assert guard_of("https://registry.example").admits("localhost", "127.0.0.1") is False
    with pytest.raises(OSError, match="private"):
        guard_of("https://registry.example").addresses("localhost", 1)


def test_a_named_endpoint_is_reached_by_name() -> None:
    with RawUpstream() as upstream:
        upstream.url = upstream.url.replace("127.0.0.1", "localhost")
        with Lab(upstream) as lab:
            lab.upstream.answers[BLOB] = reply(200, b"x")
            assert lab.ask(BLOB_PATH).body == b"x"
            assert lab.upstream.requests[0].headers["host"] == upstream.url.removeprefix("http://")


@pytest.mark.parametrize("host", ["10.255.255.1", "169.254.169.254", "[::1]", "[::ffff:10.0.0.1]", "0.0.0.0"])
def test_a_redirect_to_another_inner_network_is_refused_at_once(host: str) -> None:
    with Lab() as lab:
        lab.upstream.answers[BLOB] = reply(307, b"", {"Location": f"http://{host}/latest/meta-data"})
        answer = lab.ask(BLOB_PATH)
        assert (answer.status, answer.code) == (502, "UNAVAILABLE")
        assert "private" in answer.json["errors"][0]["message"]


@pytest.mark.parametrize(
    "host",
    ["10.255.255.1", "[::1]", "localhost", "LOCALHOST.", "x.localhost", "127.1", "2130706433", "0x7f.0.0.1", "10.1"],
)
def test_behind_a_proxy_an_inner_address_is_refused_too(host: str) -> None:
    registry = RawUpstream()
    registry.url = "http://registry.test"  # a name that the proxy knows
    with RawUpstream("127.0.0.9") as proxy, Lab(registry, more=f'proxy = "{proxy.url}"') as lab:
        proxy.answers[registry.url + BLOB] = reply(307, b"", {"Location": f"http://{host}/"})
        answer = lab.ask(BLOB_PATH)
        assert (answer.status, answer.code) == (502, "UNAVAILABLE")
        assert [request.target for request in proxy.requests] == [registry.url + BLOB]
