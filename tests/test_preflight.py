"""What `./deploy.sh check` finds on a host, and what it advises."""

import socket
from pathlib import Path

import pytest
from hub import Hub
from processes import free_port
from serving import Mirror

import preflight
from settings import Registry

HOST = "127.0.0.1"


def test_an_address_is_free_or_taken() -> None:
    with socket.create_server((HOST, 0)) as server:
        address = f"{HOST}:{server.getsockname()[1]}"
        taken = preflight.listener(address)
        assert taken.text == f"{address} cannot be had: Address already in use"
        assert "systemctl edit docker-mirror.socket" in taken.fix
    assert preflight.listener(address) == (f"{address} is free", "")


def test_a_registry_that_answers_is_no_problem(hub: Hub) -> None:
    registry = Registry("docker.io", (hub.registry_url,), ca_file=str(hub.ca_file))
    found = preflight.ask(registry, hub.registry_url, None)
    assert found == (f"docker.io: {hub.registry_url.removeprefix('https://')}", "")


def test_a_certificate_that_is_not_valid_is_told(hub: Hub) -> None:
    found = preflight.ask(Registry("docker.io", (hub.registry_url,)), hub.registry_url, None)
    assert "has no valid certificate" in found.text
    assert "ca_file" in found.fix


@pytest.mark.parametrize(
    ("endpoint", "text"),
    [("https://registry.invalid", "is not found"), (f"http://{HOST}:9", "cannot be reached: Connection refused")],
)
def test_a_registry_that_is_out_of_reach_is_told_with_what_can_be_done(endpoint: str, text: str) -> None:
    found = preflight.ask(Registry("quay.io", (endpoint,)), endpoint, None)
    assert text in found.text
    assert "enabled = false" in found.fix


def test_what_is_behind_a_proxy_is_not_asked() -> None:
    registry = Registry("quay.io", ("https://registry.invalid",))
    assert preflight.ask(registry, registry.endpoints[0], "http://proxy.example:3128").fix == ""
    assert preflight.ask(registry, registry.endpoints[0], "direct").fix


def test_settings_are_read_as_systemd_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text('# MIRROR_A=1\n#MIRROR_B=2\n\nMIRROR_LOGIN=off\nMIRROR_DEFAULT="ghcr.io"\nMIRROR_USERS=\n')
    assert preflight.read_environment(file) == {"MIRROR_LOGIN": "off", "MIRROR_DEFAULT": "ghcr.io", "MIRROR_USERS": ""}
    assert preflight.read_environment(tmp_path / "none") == {}


def test_a_mirror_that_answers_is_told_from_one_that_does_not(mirror: Mirror) -> None:
    assert [finding.fix for finding in preflight.serving(mirror.host)] == ["", ""]
    (found,) = preflight.serving(f"{HOST}:{free_port(HOST)}")
    assert "journalctl" in found.fix


def test_a_mirror_whose_registry_is_out_of_reach_serves_all_the_same(tmp_path: Path) -> None:
    file = tmp_path / "registries.toml"
    file.write_text(f'["docker.io"]\nendpoints = ["http://{HOST}:9"]\n')
    with Mirror(registries=file) as mirror:
        _, ping = preflight.serving(mirror.host)
    assert ping == ("/v2/ answers 502: the mirror serves, but the registry does not; see ./deploy.sh check", "")
