"""What `./deploy.sh check` finds on a host, and what it advises."""

import os
import socket
import subprocess
from pathlib import Path

import pytest
from hub import Hub
from processes import free_port
from serving import Mirror

import preflight
from settings import Config
from settings import Registry

HOST = "127.0.0.1"


def test_an_address_is_free_or_taken() -> None:
    with socket.create_server((HOST, 0)) as server:
        address = f"{HOST}:{server.getsockname()[1]}"
        taken = preflight.listener(address)
        assert taken.text == f"{address} cannot be had: Address already in use"
        assert taken.fix.endswith(preflight.another_address())
    assert preflight.listener(address) == preflight.Finding(f"{address} is free")


def test_the_commands_that_name_another_address_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no unit yet, and so systemctl edit would refuse."""
    monkeypatch.setattr(preflight, "UNITS", tmp_path / "system")
    subprocess.run(["sh", "-ec", preflight.another_address()], check=True)
    (file,) = (tmp_path / "system/docker-mirror.socket.d").iterdir()
    assert file.read_text() == "[Socket]\nListenStream=\nListenStream=127.0.0.1:5001\n"


def test_a_registry_that_answers_is_no_problem(hub: Hub) -> None:
    registry = Registry("docker.io", (hub.registry_url,), ca_file=str(hub.ca_file))
    found = preflight.ask(registry, hub.registry_url, None)
    assert found == preflight.Finding(f"docker.io: {hub.registry_url.removeprefix('https://')}")


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


@pytest.fixture
def owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the owner's files, which there are none of."""
    monkeypatch.setattr(preflight, "OWNERS", tmp_path)
    monkeypatch.setattr(preflight, "ENVIRONMENT", tmp_path / "docker-mirror.env")
    monkeypatch.setattr(preflight, "UNITS", tmp_path)
    return tmp_path


def test_without_files_of_the_owners_the_defaults_are_checked(owners: Path) -> None:
    (found,) = preflight.settings_and_registries(host_only=True)
    assert found == preflight.Finding("the settings: the defaults")


def test_settings_that_only_root_may_read_are_no_problem_for_others(
    owners: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (owners / "docker-mirror.env").touch()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    (found,) = preflight.settings_and_registries(host_only=False)
    assert str(found) == "skipped  the settings and the registries are not checked: only root can; run this with sudo"
    assert not found.fix


def test_the_settings_are_read_with_what_the_unit_and_the_owners_changes_say(owners: Path) -> None:
    folder = owners / "docker-mirror.service.d"
    folder.mkdir()
    (folder / "more.conf").write_text(
        "[Service]\nEnvironment = MIRROR_LOGIN=off \\\n  MIRROR_PROXIES=2\nMemoryMax=1G\n"
    )
    lines = list(preflight.unit_lines())
    assert lines[-1] == "Environment=MIRROR_LOGIN=off    MIRROR_PROXIES=2"
    assert {"DynamicUser=yes", "ProtectHome=yes", "LoadCredential=credentials:/etc/docker-mirror/credentials"} < set(
        lines
    )


def test_a_mirror_that_answers_is_told_from_one_that_does_not(mirror: Mirror) -> None:
    assert [finding.fix for finding in preflight.serving(mirror.host)] == ["", ""]
    (found,) = preflight.serving(f"{HOST}:{free_port(HOST)}")
    assert "journalctl" in found.fix


def test_a_mirror_whose_registry_is_out_of_reach_serves_all_the_same(tmp_path: Path) -> None:
    file = tmp_path / "registries.toml"
    file.write_text(f'["docker.io"]\nendpoints = ["http://{HOST}:9"]\n')
    with Mirror(registries=file) as mirror:
        _, ping = preflight.serving(mirror.host)
    text = "/v2/ answers 502: the mirror serves, but the registry does not; see ./deploy.sh check"
    assert ping == preflight.Finding(text)


def test_the_path_that_is_asked_is_that_of_the_process() -> None:
    with Mirror(path_prefix="/s3cret") as mirror:
        prefix = Config.from_environ(preflight.environ_of(mirror.pid)).path_prefix
        assert prefix == "/s3cret"
        assert [finding.fix for finding in preflight.serving(mirror.host, prefix)] == ["", ""]
        (found,) = preflight.serving(mirror.host)
    assert found.text == f"/healthz at {mirror.host} answers 404"
