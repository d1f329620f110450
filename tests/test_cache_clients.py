"""Real clients pull a second time, and the whole of Docker Hub is off: registry, token service and CDN."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from typing import NamedTuple

import pytest
from clients import Dockerd
from clients import Podman
from clients import Skopeo
from conftest import needs
from hub import PASSWORD
from hub import USER
from hub import Hub
from hub import write_registries
from images import Repository
from lab import ask
from pulls import assert_denied
from pulls import blobs
from pulls import pulled_by_containerd
from pulls import pulled_by_docker
from pulls import pulled_by_podman
from pulls import succeeds
from serving import Mirror

ALL_TYPES = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
TAG_TTL = 1  # seconds


class Kept(NamedTuple):
    """Hold a mirror with a cache, and clients that pulled through it while their hub was still there."""

    mirror: Mirror
    repositories: dict[str, Repository]
    dockerd: Dockerd
    podman: Podman
    skopeo: Skopeo


def labels(mirror: Mirror, since: int, path: str = "/v2/.*(?:manifests|blobs)/.*") -> set[str]:
    """Return what the access log says that the cache did for these paths, from a mark on."""
    return set(re.findall(rf'^.*"(?:GET|HEAD) {path}" 200 .* (\S+)$', mirror.log(since), re.M))


def skopeo_copies(skopeo: Skopeo, name: str, repository: Repository, folder: Path) -> None:
    """Copy an image by its digest, and see that the very bytes come."""
    succeeds(skopeo.skopeo("copy", f"docker://docker.io/{name}@{repository.top().digest}", f"dir:{folder}"))
    assert (folder / "manifest.json").read_bytes() == repository.top().data
    for blob in blobs(repository):
        assert (folder / blob.digest.removeprefix("sha256:")).read_bytes() == blob.data


@pytest.fixture(scope="module")
def without_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    """Let each client pull what no other one pulls, remove it all from the clients, and end the hub."""
    needs("root", "docker-registry", "nginx", "dockerd", "docker", "containerd", "ctr", "podman", "skopeo")
    folder = tmp_path_factory.mktemp("cache")
    with ExitStack() as there, ExitStack() as stack:
        hub = there.enter_context(Hub())
        mirror = stack.enter_context(
            Mirror(registries=hub.registries_file, cache_dir=folder / "store", tag_ttl=TAG_TTL)
        )
        dockerd = stack.enter_context(Dockerd(mirror.url))
        podman, skopeo = stack.enter_context(Podman(mirror.url)), stack.enter_context(Skopeo(mirror.url))
        has = hub.repositories
        pulled_by_docker(dockerd, "bitnami/postgresql", has["bitnami/postgresql"])
        pulled_by_docker(dockerd, "hello-world", has["library/hello-world"])
        pulled_by_containerd(dockerd, has["library/redis"])
        pulled_by_podman(podman, "nginx", has["library/nginx"])
        skopeo_copies(skopeo, "library/redis", has["library/redis"], folder / "copy")
        dockerd.forget_images()
        there.close()
        time.sleep(TAG_TTL)
        yield Kept(mirror, has, dockerd, podman, skopeo)


# Without the hub


@pytest.mark.parametrize("name", ["library/hello-world", "bitnami/postgresql"])
def test_dockerd_pulls_again_without_the_hub(without_hub: Kept, name: str) -> None:
    mark = without_hub.mirror.mark()
    pulled_by_docker(without_hub.dockerd, name.removeprefix("library/"), without_hub.repositories[name])
    assert labels(without_hub.mirror, mark) == {"HIT", "STALE"}


def test_containerd_pulls_again_without_the_hub(without_hub: Kept) -> None:
    without_hub.dockerd.forget_images()
    mark = without_hub.mirror.mark()
    pulled_by_containerd(without_hub.dockerd, without_hub.repositories["library/redis"])
    assert labels(without_hub.mirror, mark) == {"HIT", "STALE"}


def test_podman_pulls_again_without_the_hub(without_hub: Kept) -> None:
    mark = without_hub.mirror.mark()
    pulled_by_podman(without_hub.podman, "nginx", without_hub.repositories["library/nginx"])
    assert labels(without_hub.mirror, mark) == {"HIT", "STALE"}


def test_skopeo_copies_again_by_digest_without_the_hub(without_hub: Kept, tmp_path: Path) -> None:
    mark = without_hub.mirror.mark()
    skopeo_copies(without_hub.skopeo, "library/redis", without_hub.repositories["library/redis"], tmp_path / "copy")
    assert labels(without_hub.mirror, mark) == {"HIT"}


def test_what_one_client_pulled_another_one_gets_without_the_hub(without_hub: Kept) -> None:
    pulled_by_podman(without_hub.podman, "bitnami/postgresql", without_hub.repositories["bitnami/postgresql"])
    pulled_by_docker(without_hub.dockerd, "nginx", without_hub.repositories["library/nginx"])


def test_a_mirror_that_starts_without_the_hub_has_what_the_one_before_kept(tmp_path: Path) -> None:
    needs("root", "docker-registry", "nginx", "dockerd", "docker", "containerd", "ctr", "podman")
    settings: dict[str, Any] = {"cache_dir": tmp_path, "tag_ttl": TAG_TTL}
    with ExitStack() as there, ExitStack() as stack:
        hub = there.enter_context(Hub())
        repository = hub.repositories["library/hello-world"]
        first = stack.enter_context(Mirror(registries=hub.registries_file, **settings))
        dockerd, podman = stack.enter_context(Dockerd(first.url)), stack.enter_context(Podman(first.url))
        pulled_by_docker(dockerd, "hello-world", repository)
        dockerd.forget_images()
        first.stop()
        authority = tmp_path / "authority.pem"
        authority.write_bytes(hub.ca_file.read_bytes())
        table = hub.table() | {"ca_file": str(authority)}
        registries = write_registries(tmp_path / "registries.toml", {"docker.io": table})
        there.close()
        second = stack.enter_context(Mirror(port=first.port, registries=registries, **settings))
        pulled_by_docker(dockerd, "hello-world", repository)
        pulled_by_podman(podman, "hello-world", repository)
        assert labels(second, 0) == {"HIT", "STALE"}


# With the hub


@pytest.fixture
def caching(hub: Hub, tmp_path: Path) -> Iterator[Mirror]:
    with Mirror(registries=hub.registries_file, cache_dir=tmp_path, tag_ttl=TAG_TTL) as running:
        yield running


@pytest.fixture
def own_dockerd(caching: Mirror) -> Iterator[Dockerd]:
    needs("root", "dockerd", "docker", "containerd", "ctr")
    with Dockerd(caching.url) as running:
        yield running


def test_a_tag_that_moved_upstream_is_seen_after_its_time(hub: Hub, caching: Mirror, own_dockerd: Dockerd) -> None:
    before, after = (
        dataclasses.replace(hub.repositories[name], name="library/moving", tags=("latest",))
        for name in ("library/nginx", "library/redis")
    )
    hub.push(before)
    pulled_by_docker(own_dockerd, "moving", before)
    hub.push(after)
    time.sleep(TAG_TTL)
    pulled_by_docker(own_dockerd, "moving", after)
    own_dockerd.forget_images()
    pulled_by_docker(own_dockerd, "moving", after)


def test_what_a_logged_in_client_pulled_is_not_for_the_next_one(
    hub: Hub, caching: Mirror, own_dockerd: Dockerd, tmp_path: Path
) -> None:
    name, repository = f"{caching.host}/private/app", hub.repositories["private/app"]
    login = ("login", caching.host, "--username", USER, "--password-stdin")
    succeeds(own_dockerd.docker(*login, config="login", stdin=PASSWORD))
    pulled_by_docker(own_dockerd, name, repository, "login")
    own_dockerd.forget_images()
    assert_denied(own_dockerd.docker("pull", name))
    layer, manifest = repository.local().layers[0].digest, repository.top().digest
    for path in (f"blobs/{layer}", f"manifests/{manifest}", "manifests/latest"):
        assert ask(caching, f"/v2/private/app/{path}", {"Accept": ALL_TYPES}).status == 401
    assert kept_digests(tmp_path).isdisjoint({manifest, *(blob.digest for blob in blobs(repository))})


def test_who_logs_in_is_not_served_from_what_others_pulled(hub: Hub, caching: Mirror, own_dockerd: Dockerd) -> None:
    name, repository = f"{caching.host}/redis", hub.repositories["library/redis"]
    pulled_by_docker(own_dockerd, name, repository)
    succeeds(
        own_dockerd.docker("login", caching.host, "--username", USER, "--password-stdin", config="in", stdin=PASSWORD)
    )
    own_dockerd.forget_images()
    mark = caching.mark()
    pulled_by_docker(own_dockerd, name, repository, "in")
    assert labels(caching, mark) == {"BYPASS"}


@pytest.mark.parametrize("rule", [{"deny_images": "docker.io/library/redis"}, {"deny_clients": "127.0.0.1"}])
def test_what_is_kept_is_refused_as_all_else_is(
    hub: Hub, caching: Mirror, tmp_path: Path, rule: dict[str, str]
) -> None:
    repository = hub.repositories["library/redis"]
    paths = [f"/v2/library/redis/{path}" for path in (f"blobs/{blobs(repository)[0].digest}", "manifests/latest")]
    settings: dict[str, Any] = {"registries": hub.registries_file, "cache_dir": tmp_path, **rule}
    assert [ask(caching, path, {"Accept": ALL_TYPES}).status for path in paths] == [200, 200]
    with Mirror(**settings) as other:
        assert [ask(other, path, {"Accept": ALL_TYPES}).status for path in paths] == [403, 403]


def kept_digests(folder: Path) -> set[str]:
    return {f"sha256:{file.name}" for file in folder.glob("blobs/sha256/*/*")}
