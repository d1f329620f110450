"""MIRROR_LOGIN=off with real clients: what is public comes down, no challenge is sent and no password comes here."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from clients import HUB_AUTH
from clients import Dockerd
from clients import Skopeo
from conftest import needs
from hub import PASSWORD
from hub import USER
from hub import Hub
from pulls import assert_denied
from pulls import blobs
from pulls import pulled_by_containerd
from pulls import pulled_by_docker
from pulls import succeeds
from serving import Mirror

PRIVATE = "private/app"
# As wsgi.py has it, and what each client sent for a login: gunicorn shows "-" without one.
LOG_FORMAT = '"%(m)s %({mirror.path}e)s" %(s)s login=%({authorization}i)s'


@pytest.fixture(scope="module")
def closed_mirror(hub: Hub) -> Iterator[Mirror]:
    with Mirror("--access-logformat", LOG_FORMAT, registries=hub.registries_file, login="off") as running:
        yield running


@pytest.fixture(scope="module")
def own_dockerd(closed_mirror: Mirror) -> Iterator[Dockerd]:
    needs("root", "dockerd", "docker", "containerd", "ctr")
    with Dockerd(closed_mirror.url) as running:
        yield running


@pytest.fixture
def docker(own_dockerd: Dockerd) -> Dockerd:
    own_dockerd.forget_images()
    return own_dockerd


@pytest.fixture(scope="module")
def skopeo(closed_mirror: Mirror) -> Iterator[Skopeo]:
    needs("skopeo")
    with Skopeo(closed_mirror.url) as client:
        yield client


@pytest.fixture(autouse=True)
def _without_logins(closed_mirror: Mirror, hub: Hub) -> Iterator[None]:
    """See after each test that no client was asked to log in, and that none did, nor the mirror for it."""
    hub.forget()
    since = closed_mirror.mark()
    yield
    lines = closed_mirror.wait_for_requests(2, since)
    assert lines
    assert not [line for line in lines if line.path.startswith("/token") or line.status == 401]
    logins = re.findall(r"login=(.*)", closed_mirror.log(since))
    assert (len(logins), set(logins)) == (len(lines), {"-"})
    assert not [request for request in hub.tokens.requests if request.authorization or request.form]


def test_dockerd_pulls_a_short_and_a_full_name(docker: Dockerd, closed_mirror: Mirror, hub: Hub) -> None:
    pulled_by_docker(docker, "hello-world", hub.repositories["library/hello-world"])
    pulled_by_docker(docker, f"{closed_mirror.host}/redis", hub.repositories["library/redis"])


def test_dockerd_with_a_login_pulls_what_is_public_and_keeps_its_password(docker: Dockerd, hub: Hub) -> None:
    config = docker.config_with_login("hub-login", HUB_AUTH, USER, PASSWORD)
    pulled_by_docker(docker, "nginx", hub.repositories["library/nginx"], config)


def test_dockerd_shows_why_a_private_image_is_refused(docker: Dockerd, closed_mirror: Mirror) -> None:
    name = f"{closed_mirror.host}/{PRIVATE}"
    config = docker.config_with_login("own-login", closed_mirror.host, USER, PASSWORD)
    assert_denied(docker.docker("pull", name))
    assert_denied(docker.docker("pull", name, config=config))


def test_containerd_pulls_an_image_of_several_platforms(docker: Dockerd, hub: Hub) -> None:
    pulled_by_containerd(docker, hub.repositories["bitnami/postgresql"])


def test_containerd_is_refused_a_private_image_with_and_without_a_login(docker: Dockerd) -> None:
    for options in ((), ("--user", f"{USER}:{PASSWORD}")):
        result = docker.ctr_pull(f"docker.io/{PRIVATE}:latest", *options)
        assert result.returncode != 0, result.stdout
        assert "403 FORBIDDEN" in result.stderr, "to HEAD there is no body to show"


def test_skopeo_copies_a_short_and_a_full_name(skopeo: Skopeo, closed_mirror: Mirror, hub: Hub, tmp_path: Path) -> None:
    repository = hub.repositories["library/redis"]
    for number, host in enumerate(("docker.io", closed_mirror.host)):
        folder = tmp_path / str(number)
        succeeds(skopeo.skopeo("copy", f"docker://{host}/redis", f"dir:{folder}"))
        assert (folder / "manifest.json").read_bytes() == repository.top().data
        for blob in blobs(repository):
            assert (folder / blob.digest.removeprefix("sha256:")).read_bytes() == blob.data


@pytest.mark.parametrize("options", [(), ("--src-creds", f"{USER}:{PASSWORD}")], ids=["anonymous", "login"])
def test_skopeo_shows_why_a_private_image_is_refused(
    skopeo: Skopeo, closed_mirror: Mirror, tmp_path: Path, options: tuple[str, ...]
) -> None:
    source = f"docker://{closed_mirror.host}/{PRIVATE}"
    assert_denied(skopeo.skopeo("copy", *options, source, f"dir:{tmp_path / 'image'}"))
