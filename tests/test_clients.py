"""Real clients pull through the mirror from the hub of real parts, as their users do."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from clients import HUB_AUTH
from clients import Dockerd
from clients import Podman
from clients import Skopeo
from hub import PASSWORD
from hub import USER
from hub import Hub
from pulls import assert_denied
from pulls import blobs
from pulls import pulled_by_containerd
from pulls import pulled_by_docker
from pulls import pulled_by_podman
from pulls import refusal
from pulls import succeeds
from serving import Mirror

BASIC = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
TOKEN_START = "eyJ"  # every JWT begins with the base64 of `{"`


@pytest.fixture(autouse=True)
def _fresh_records(hub: Hub) -> None:
    hub.forget()


@pytest.fixture(params=["short", "full"])
def named(request: pytest.FixtureRequest, mirror: Mirror) -> str:
    """Name the image at Docker Hub, which the mirror stands in for, and at the mirror itself."""
    return "" if request.param == "short" else f"{mirror.host}/"


def nothing_leaked(hub: Hub, mirror: Mirror, mark: int) -> None:
    """See that a login went to the token service and the registry only: not to the CDN, not into the mirror's log."""
    assert hub.cdn_requests()
    assert not [request for request in hub.cdn_requests() if request.authorized or request.status == 400]
    used = [request for request in hub.tokens.requests if request.authorization or request.form]
    assert used, "the mirror never asked for a token with the login"
    log = mirror.log(mark)
    assert log
    for secret in secrets_of(hub):
        assert secret not in log


def secrets_of(hub: Hub) -> Iterator[str]:
    """Yield all that may not stand in a log."""
    yield from (PASSWORD, BASIC, TOKEN_START, "Bearer ", "Basic ")
    for request in hub.tokens.requests:
        yield from request.form.get("refresh_token", [])
        yield from [request.authorization] if request.authorization else []


# dockerd


def test_dockerd_pulls_a_short_name(docker: Dockerd, hub: Hub) -> None:
    pulled_by_docker(docker, "hello-world", hub.repositories["library/hello-world"])


def test_dockerd_pulls_a_multi_platform_image(docker: Dockerd, hub: Hub) -> None:
    pulled_by_docker(docker, "bitnami/postgresql", hub.repositories["bitnami/postgresql"])


def test_dockerd_pulls_a_full_name(docker: Dockerd, hub: Hub, mirror: Mirror) -> None:
    pulled_by_docker(docker, f"{mirror.host}/redis", hub.repositories["library/redis"])


def test_dockerd_pulls_another_tag(docker: Dockerd, hub: Hub) -> None:
    pulled_by_docker(docker, "nginx:1.27", hub.repositories["library/nginx"])


def test_dockerd_pulls_by_digest(docker: Dockerd, hub: Hub) -> None:
    repository = hub.repositories["bitnami/postgresql"]
    pulled_by_docker(docker, f"bitnami/postgresql@{repository.top().digest}", repository)


def test_dockerd_asks_in_the_order_of_the_protocol(docker: Dockerd, hub: Hub, mirror: Mirror) -> None:
    mark = mirror.mark()
    repository = hub.repositories["bitnami/postgresql"]
    succeeds(docker.docker("pull", "bitnami/postgresql"))
    path = "/v2/bitnami/postgresql"
    lines = mirror.wait_for_requests(5 + len(blobs(repository)), mark)
    assert lines[:5] == [
        ("GET", "/v2/", 401),
        ("GET", "/token", 200),
        ("HEAD", f"{path}/manifests/latest", 200),
        ("GET", f"{path}/manifests/{repository.top().digest}", 200),
        ("GET", f"{path}/manifests/{repository.local().manifest.digest}", 200),
    ]
    assert sorted(lines[5:]) == sorted(("GET", f"{path}/blobs/{blob.digest}", 200) for blob in blobs(repository))


def test_no_authorization_reaches_the_cdn_in_an_anonymous_pull(docker: Dockerd, hub: Hub) -> None:
    succeeds(docker.docker("pull", "redis"))
    assert len(hub.cdn_requests()) == len(blobs(hub.repositories["library/redis"]))
    assert not [request for request in hub.cdn_requests() if request.authorized]


def test_dockerd_with_a_login_at_docker_hub_pulls_a_private_image(docker: Dockerd, hub: Hub, mirror: Mirror) -> None:
    mark = mirror.mark()
    config = docker.config_with_login("hub-login", HUB_AUTH, USER, PASSWORD)
    pulled_by_docker(docker, "private/app", hub.repositories["private/app"], config)
    nothing_leaked(hub, mirror, mark)


def test_dockerd_logs_in_and_pulls_a_private_image_until_it_logs_out(docker: Dockerd, hub: Hub, mirror: Mirror) -> None:
    mark = mirror.mark()
    name = f"{mirror.host}/private/app"
    login = ("login", mirror.host, "--username", USER, "--password-stdin")
    succeeds(docker.docker(*login, config="login", stdin=PASSWORD))
    pulled_by_docker(docker, name, hub.repositories["private/app"], "login")
    nothing_leaked(hub, mirror, mark)
    succeeds(docker.docker("logout", mirror.host, config="login"))
    succeeds(docker.docker("rmi", "--force", name))
    assert_denied(docker.docker("pull", name, config="login"))


def test_dockerd_cannot_log_in_with_a_wrong_password(docker: Dockerd, mirror: Mirror) -> None:
    login = ("login", mirror.host, "--username", USER, "--password-stdin")
    message = refusal(docker.docker(*login, config="wrong", stdin="looking-glass"))
    assert "unauthorized" in message or "incorrect username or password" in message
    assert "looking-glass" not in mirror.log()


def test_a_private_image_is_refused_without_a_login(docker: Dockerd, mirror: Mirror) -> None:
    assert_denied(docker.docker("pull", f"{mirror.host}/private/app"))


def test_an_unknown_image_gives_a_readable_message(docker: Dockerd, mirror: Mirror) -> None:
    message = refusal(docker.docker("pull", f"{mirror.host}/nosuch"))
    assert "not found" in message
    assert "manifest unknown" in message


def test_a_push_is_refused_with_a_readable_message(docker: Dockerd, mirror: Mirror) -> None:
    name = f"{mirror.host}/hello-world"
    succeeds(docker.docker("pull", name))
    message = refusal(docker.docker("push", name))
    assert "mirror for pulls" in message


# containerd


@pytest.mark.parametrize("name", ["library/hello-world", "library/nginx", "bitnami/postgresql"])
def test_containerd_pulls_through_a_hosts_file(docker: Dockerd, hub: Hub, mirror: Mirror, name: str) -> None:
    mark = mirror.mark()
    pulled_by_containerd(docker, hub.repositories[name])
    asked = [(line.method, line.path) for line in mirror.access_log(mark)]
    assert asked[0] == ("HEAD", f"/v2/{name}/manifests/latest")
    assert ("GET", "/v2/") not in asked


def test_containerd_with_a_login_pulls_a_private_image(docker: Dockerd, hub: Hub, mirror: Mirror) -> None:
    mark = mirror.mark()
    pulled_by_containerd(docker, hub.repositories["private/app"], "--user", f"{USER}:{PASSWORD}")
    nothing_leaked(hub, mirror, mark)


def test_containerd_is_refused_a_private_image_without_a_login(docker: Dockerd, mirror: Mirror) -> None:
    mark = mirror.mark()
    result = docker.ctr_pull("docker.io/private/app:latest")
    assert result.returncode != 0
    assert ("HEAD", "/v2/private/app/manifests/latest", 401) in mirror.access_log(mark)


# podman


@pytest.mark.parametrize("image", ["hello-world", "bitnami/postgresql"])
def test_podman_pulls_a_short_and_a_full_name(podman: Podman, hub: Hub, named: str, image: str) -> None:
    pulled_by_podman(podman, named + image, hub.repositories[image if "/" in image else f"library/{image}"])


def test_podman_logs_in_and_pulls_a_private_image_until_it_logs_out(podman: Podman, hub: Hub, mirror: Mirror) -> None:
    mark = mirror.mark()
    name = f"{mirror.host}/private/app"
    succeeds(podman.podman("login", "--username", USER, "--password-stdin", mirror.host, stdin=PASSWORD))
    pulled_by_podman(podman, name, hub.repositories["private/app"])
    nothing_leaked(hub, mirror, mark)
    succeeds(podman.podman("logout", mirror.host))
    succeeds(podman.podman("rmi", "--all", "--force"))
    assert_denied(podman.podman("pull", name))


def test_podman_shows_a_readable_message_for_an_unknown_image(podman: Podman, mirror: Mirror) -> None:
    assert "manifest unknown" in refusal(podman.podman("pull", f"{mirror.host}/nosuch"))


# skopeo


def test_skopeo_inspects_a_short_and_a_full_name(skopeo: Skopeo, hub: Hub, mirror: Mirror) -> None:
    repository = hub.repositories["bitnami/postgresql"]
    for host in ("docker.io", mirror.host):
        # The tags would come from Docker Hub itself: for them, this client asks no mirror.
        result = skopeo.skopeo("inspect", "--no-tags", f"docker://{host}/bitnami/postgresql")
        shown = json.loads(succeeds(result))
        assert shown["Digest"] == repository.top().digest
        assert shown["Layers"] == [layer.digest for layer in repository.local().layers]


def test_skopeo_copies_a_short_and_a_full_name(skopeo: Skopeo, hub: Hub, mirror: Mirror, tmp_path: Path) -> None:
    repository = hub.repositories["library/redis"]
    for number, host in enumerate(("docker.io", mirror.host)):
        folder = tmp_path / str(number)
        succeeds(skopeo.skopeo("copy", f"docker://{host}/redis", f"dir:{folder}"))
        assert (folder / "manifest.json").read_bytes() == repository.top().data
        for blob in blobs(repository):
            assert (folder / blob.digest.removeprefix("sha256:")).read_bytes() == blob.data


def test_skopeo_copies_all_platforms_as_they_are(skopeo: Skopeo, hub: Hub, mirror: Mirror, tmp_path: Path) -> None:
    repository = hub.repositories["bitnami/postgresql"]
    succeeds(skopeo.skopeo("copy", "--all", f"docker://{mirror.host}/bitnami/postgresql", f"dir:{tmp_path}"))
    assert (tmp_path / "manifest.json").read_bytes() == repository.top().data
    for image in repository.images:
        digest = image.manifest.digest.removeprefix("sha256:")
        assert (tmp_path / f"{digest}.manifest.json").read_bytes() == image.manifest.data


def test_skopeo_lists_the_tags(skopeo: Skopeo, hub: Hub, mirror: Mirror) -> None:
    shown = json.loads(succeeds(skopeo.skopeo("list-tags", f"docker://{mirror.host}/nginx")))
    assert sorted(shown["Tags"]) == sorted(hub.repositories["library/nginx"].tags)


def test_skopeo_with_a_login_copies_a_private_image(skopeo: Skopeo, hub: Hub, mirror: Mirror, tmp_path: Path) -> None:
    mark = mirror.mark()
    source = f"docker://{mirror.host}/private/app"
    succeeds(skopeo.skopeo("copy", "--src-creds", f"{USER}:{PASSWORD}", source, f"dir:{tmp_path}"))
    assert (tmp_path / "manifest.json").read_bytes() == hub.repositories["private/app"].top().data
    nothing_leaked(hub, mirror, mark)
