"""A newcomer who knows only the address: each client is set up with the page's own words, to the letter, and pulls."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from clients import Dockerd
from clients import Podman
from conftest import needs
from hub import Hub
from page import Page
from page import open_page
from pulls import succeeds
from serving import Mirror


@pytest.fixture
def redis(mirror: Mirror) -> Page:
    """Open the page, with the name of an image in its field."""
    return open_page(mirror, "/?image=redis:7")


def commands(page: Page, key: str, *programs: str) -> Iterator[list[str]]:
    """Yield the words of each line of a snippet that is for one of these programs."""
    for line in page.text(key).splitlines():
        words = [word for word in line.split() if word != "sudo"]
        if words[0] in programs:
            yield words


def test_dockerd_with_the_pages_file_pulls_what_the_page_says(redis: Page, mirror: Mirror, hub: Hub) -> None:
    needs("root", "dockerd", "docker", "containerd", "ctr")
    with Dockerd("", json.loads(redis.text("dockerd-file"))) as docker:
        mark = mirror.mark()
        (pull,) = commands(redis, "dockerd-run", "docker")
        assert pull == ["docker", "pull", "redis:7"]
        succeeds(docker.docker(*pull[1:]))
        shown = json.loads(succeeds(docker.docker("image", "inspect", "redis:7")))
        assert shown[0]["Id"] == hub.repositories["library/redis"].local().config.digest
        assert any("/blobs/" in line.path for line in mirror.access_log(mark))


def test_docker_with_no_setup_pulls_by_the_mirrors_name_and_retags(docker: Dockerd, redis: Page, hub: Hub) -> None:
    for key in ("pull", "retag"):
        for words in commands(redis, key, "docker"):
            succeeds(docker.docker(*words[1:]))
    shown = json.loads(succeeds(docker.docker("image", "inspect", "redis:7")))
    assert shown[0]["Id"] == hub.repositories["library/redis"].local().config.digest
    assert shown[0]["RepoTags"] == ["redis:7"]


def test_containerd_with_the_pages_file_pulls_what_the_page_says(
    docker: Dockerd, redis: Page, mirror: Mirror, hub: Hub
) -> None:
    docker.write(redis.text("containerd-file-file").lstrip("/"), redis.text("containerd-file"))
    mark = mirror.mark()
    (words,) = commands(redis, "containerd-run", "ctr")
    folder = [str(docker.folder) + word if word.startswith("/etc/") else word for word in words[1:]]
    succeeds(docker.ctr(*folder[:2], "--snapshotter", "native", *folder[2:]))
    assert hub.repositories["library/redis"].top().digest in succeeds(docker.ctr("images", "ls"))
    assert any("/blobs/" in line.path for line in mirror.access_log(mark))


class FromThePage(Podman):
    """Run podman with a file of the page in its registries.conf.d, and nothing else."""

    def __init__(self, page: Page):
        super().__init__("")
        self._page = page

    def start(self) -> None:
        """Write the file where podman looks for it."""
        super().start()
        name = Path(self._page.text("podman-file-file")).name
        self.write(f".config/containers/registries.conf.d/{name}", self._page.text("podman-file"))
        self.registries_conf.unlink()

    def environment(self) -> dict[str, str]:
        """Return the environment in which the client runs."""
        found = super().environment()
        del found["CONTAINERS_REGISTRIES_CONF"]
        return found


def test_podman_with_the_pages_file_pulls_what_the_page_says(redis: Page, mirror: Mirror, hub: Hub) -> None:
    needs("root", "podman")
    with FromThePage(redis) as podman:
        mark = mirror.mark()
        (words,) = commands(redis, "podman-run", "podman")
        succeeds(podman.podman(*words[1:]))
        (image,) = json.loads(succeeds(podman.podman("image", "inspect", words[-1])))
        assert f"sha256:{image['Id']}" == hub.repositories["library/redis"].local().config.digest
        assert any("/blobs/" in line.path for line in mirror.access_log(mark))
