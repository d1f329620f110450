"""The real servers and clients that the tests share; each is started once, by the first test that wants it.

A browser is started once for each file.
"""

import os
from collections.abc import Iterator
from typing import NoReturn

import pytest
from browser import Browser
from clients import Dockerd
from clients import Podman
from clients import Skopeo
from hub import Hub
from processes import find_program
from registries import BasicRegistry
from registries import OpenRegistry
from serving import Mirror

pytest.register_assert_rewrite("pulls")


def needs(*parts: str) -> None:
    """Skip the test unless all parts are here: programs by name, and `root` for the superuser's rights."""
    missing = [part for part in parts if not (os.geteuid() == 0 if part == "root" else find_program(part))]
    if missing:
        unavailable(f"needs {', '.join(missing)}")


def unavailable(reason: str) -> NoReturn:
    """Skip the test; in CI, where every part has to be, let it fail."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}, and in CI nothing may skip")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Run a browser that asks for English."""
    needs("chromium", "chromedriver")
    with Browser() as running:
        yield running


@pytest.fixture(scope="module")
def chinese() -> Iterator[Browser]:
    """Run a browser that asks for Chinese."""
    needs("chromium", "chromedriver")
    with Browser("zh-CN,zh") as running:
        yield running


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    """Run a Docker Hub of real parts."""
    needs("docker-registry", "nginx")
    with Hub() as running:
        yield running


@pytest.fixture(scope="session")
def open_registry(hub: Hub) -> Iterator[OpenRegistry]:
    """Run a registry without auth that redirects to another one without auth."""
    with OpenRegistry(hub) as running:
        yield running


@pytest.fixture(scope="session")
def guarded_registry(hub: Hub) -> Iterator[OpenRegistry]:
    """Run a registry without auth that redirects to one that asks for a token."""
    with OpenRegistry(hub, guarded=True) as running:
        yield running


@pytest.fixture(scope="session")
def basic_registry(hub: Hub) -> Iterator[BasicRegistry]:
    """Run a registry that asks for Basic."""
    with BasicRegistry(hub) as running:
        yield running


@pytest.fixture(scope="session")
def mirror(hub: Hub) -> Iterator[Mirror]:
    """Run the mirror of that hub with its default settings."""
    with Mirror(registries=hub.registries_file) as running:
        yield running


@pytest.fixture(scope="session")
def dockerd(mirror: Mirror) -> Iterator[Dockerd]:
    """Run a dockerd whose registry-mirrors names the mirror, and its containerd."""
    needs("root", "dockerd", "docker", "containerd", "ctr")
    with Dockerd(mirror.url) as running:
        yield running


@pytest.fixture
def docker(dockerd: Dockerd) -> Dockerd:
    """Give dockerd and its containerd without any image."""
    dockerd.forget_images()
    return dockerd


@pytest.fixture(scope="session")
def podman(mirror: Mirror) -> Iterator[Podman]:
    """Give podman with storage of its own and the mirror in its registries.conf."""
    needs("root", "podman")
    with Podman(mirror.url) as client:
        yield client


@pytest.fixture(scope="session")
def skopeo(mirror: Mirror) -> Iterator[Skopeo]:
    """Give skopeo with the mirror in its registries.conf."""
    needs("skopeo")
    with Skopeo(mirror.url) as client:
        yield client
