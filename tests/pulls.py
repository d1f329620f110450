"""What a pull by a real client must end with: the very image that the registry holds, or words that a user can read."""

import json

from clients import Dockerd
from clients import Podman
from clients import Result
from images import Content
from images import Repository


def succeeds(result: Result) -> str:
    """Return what a command printed; it must have ended well."""
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def refusal(result: Result) -> str:
    """Return the message of a command that must have failed, in words a user can read."""
    assert result.returncode != 0, result.stdout
    message = result.stdout + result.stderr
    assert "<html" not in message.lower()
    assert "registry-1.docker.io" not in message, "the client left the mirror for Docker Hub"
    return message


def assert_denied(result: Result) -> None:
    """See that a pull was refused for want of a login, and that the client says so."""
    message = refusal(result)
    assert "unauthorized" in message or "denied" in message


def pulled_by_docker(docker: Dockerd, name: str, repository: Repository, config: str = "docker-config") -> None:
    """Pull with dockerd, and see that it holds the image that the registry holds."""
    succeeds(docker.docker("pull", name, config=config))
    shown = succeeds(docker.docker("image", "inspect", name))
    (image,) = json.loads(shown)
    assert image["Id"] == repository.local().config.digest
    assert image["RepoDigests"][0].endswith(f"@{repository.top().digest}")


def pulled_by_containerd(
    docker: Dockerd, repository: Repository, *options: str, registry: str = "docker.io", mirror_url: str = ""
) -> None:
    """Pull with containerd, and see that it holds the manifests and blobs that the registry holds."""
    name = f"{registry}/{repository.name}:latest"
    succeeds(docker.ctr_pull(name, *options, mirror_url=mirror_url))
    assert f" {repository.top().digest} " in succeeds(docker.ctr("images", "ls", f"name=={name}"))
    image = repository.local()
    held = set(succeeds(docker.ctr("content", "ls", "--quiet")).split())
    assert {content.digest for content in (repository.top(), image.manifest, *blobs(repository))} <= held


def pulled_by_podman(podman: Podman, name: str, repository: Repository) -> None:
    """Pull with podman, and see that it holds the image that the registry holds."""
    succeeds(podman.podman("rmi", "--all", "--force"))
    succeeds(podman.podman("pull", name))
    shown = succeeds(podman.podman("image", "inspect", name))
    (image,) = json.loads(shown)
    assert f"sha256:{image['Id']}" == repository.local().config.digest
    assert image["Digest"] in (repository.top().digest, repository.local().manifest.digest)


def blobs(repository: Repository) -> tuple[Content, ...]:
    """Return config and layers of the image that a client on this machine pulls."""
    return (repository.local().config, *repository.local().layers)
