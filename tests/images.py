"""Build the images of the tests' registries: real layers that can be unpacked, with the same digests on every run."""

import gzip
import hashlib
import io
import json
import platform
import random
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from typing import NamedTuple

DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"

MB, MIB = 10**6, 1 << 20
BIG_LAYER = 52 * MIB
ARCHITECTURES = ("amd64", "arm64")


class Content(NamedTuple):
    """Hold some bytes with the media type they are served under."""

    media_type: str
    data: bytes

    @property
    def digest(self) -> str:
        """Return the name that a registry gives these bytes."""
        return digest_of(self.data)

    def descriptor(self) -> dict[str, Any]:
        """Return the JSON object by which a manifest refers to these bytes."""
        return {"mediaType": self.media_type, "size": len(self.data), "digest": self.digest}


class Layer(NamedTuple):
    """Hold a compressed layer and the digest of its uncompressed tar."""

    blob: Content
    diff_id: str


class Image(NamedTuple):
    """Hold one platform's image."""

    architecture: str
    manifest: Content
    config: Content
    layers: tuple[Content, ...]


@dataclass(frozen=True)
class Repository:
    """Hold what stands behind the tags of one repository: an image, or an index of one image per platform."""

    name: str
    tags: tuple[str, ...]
    index: Content | None
    images: tuple[Image, ...]

    def top(self) -> Content:
        """Return the manifest that the tags name."""
        return self.index or self.images[0].manifest

    def local(self) -> Image:
        """Return the image that a client on this machine picks."""
        wanted = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
        return next((image for image in self.images if image.architecture == wanted), self.images[0])


def repositories() -> Iterator[Repository]:
    """Build all repositories of the hub, one after the other.

    Media types differ on purpose: Docker Hub still serves both families, and clients must get what was pushed.
    """
    yield _repository("library/hello-world", ("latest",), (_text_layer("hello"),), family="docker", indexed=True)
    yield _repository("library/nginx", ("1.27", "1.28", "alpine", "latest"), _layers("nginx", 400_000, 90_000, 3_000))
    yield _repository("library/redis", ("7", "latest"), _layers("redis", 250_000, 20_000), family="oci")
    postgresql = (*_layers("postgresql", 300_000, 40_000), _random_layer("data", BIG_LAYER, compresslevel=0))
    yield _repository("bitnami/postgresql", ("16", "latest"), postgresql, family="oci", indexed=True)
    yield _repository("private/app", ("latest",), (_text_layer("secret recipe"), *_layers("app", 10_000)))


def large_repository() -> Repository:
    """Build a repository of 100 MB in three layers."""
    return _repository("library/large", ("latest",), _stored_layers("large", 50 * MB, 30 * MB, 20 * MB))


def layered_repository(name: str, layers: int, size: int) -> Repository:
    """Build a repository with so many layers of so many bytes."""
    return _repository(f"library/{name}", ("latest",), _stored_layers(name, *[size] * layers))


def open_repositories() -> Iterator[Repository]:
    """Build the repositories of the registry without auth."""
    yield _repository("pause", ("3.9", "3.10", "latest"), (_text_layer("pause"),), family="docker", indexed=True)
    yield _repository("coredns/coredns", ("v1.12", "latest"), _layers("coredns", 120_000, 4_000), family="oci")


def basic_repositories() -> Iterator[Repository]:
    """Build the repositories of the registry that asks for Basic."""
    yield _repository("team/app", ("latest",), _layers("team-app", 80_000, 2_000))
    yield _repository("team/tool", ("1", "latest"), (_text_layer("tool"),), family="oci")


def digest_of(data: bytes) -> str:
    """Return the sha256 digest of some bytes as registries write it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def random_bytes(seed: str, size: int) -> bytes:
    """Return bytes that no compression shortens and that are the same for the same seed."""
    source = random.Random(seed)
    return b"".join(source.randbytes(min(MIB, size - start)) for start in range(0, size, MIB))


def _repository(
    name: str, tags: tuple[str, ...], layers: tuple[Layer, ...], *, family: str = "docker", indexed: bool = False
) -> Repository:
    if not indexed:
        return Repository(name, tags, None, (_image("amd64", layers, family),))
    # Only the first platform carries all layers: what the other one shares need not be big.
    images = (_image("amd64", layers, family), _image("arm64", layers[:1], family))
    return Repository(name, tags, _index(images, OCI_INDEX if family == "oci" else DOCKER_LIST), images)


def _index(images: tuple[Image, ...], media_type: str) -> Content:
    manifests = [
        image.manifest.descriptor() | {"platform": {"architecture": image.architecture, "os": "linux"}}
        for image in images
    ]
    return _json(media_type, {"schemaVersion": 2, "mediaType": media_type, "manifests": manifests})


def _image(architecture: str, layers: tuple[Layer, ...], family: str) -> Image:
    manifest_type, config_type, layer_type = (
        (OCI_MANIFEST, OCI_CONFIG, OCI_LAYER) if family == "oci" else (DOCKER_MANIFEST, DOCKER_CONFIG, DOCKER_LAYER)
    )
    config = _config(architecture, layers, config_type)
    blobs = tuple(layer.blob._replace(media_type=layer_type) for layer in layers)
    manifest = {
        "schemaVersion": 2,
        "mediaType": manifest_type,
        "config": config.descriptor(),
        "layers": [blob.descriptor() for blob in blobs],
    }
    return Image(architecture, _json(manifest_type, manifest), config, blobs)


def _config(architecture: str, layers: tuple[Layer, ...], media_type: str) -> Content:
    created = "2026-01-01T00:00:00Z"
    config = {
        "architecture": architecture,
        "os": "linux",
        "created": created,
        "config": {"Cmd": ["/hello"], "Env": ["PATH=/usr/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        "history": [{"created": created, "created_by": f"layer {number}"} for number, _ in enumerate(layers)],
    }
    return _json(media_type, config)


def _json(media_type: str, value: dict[str, Any]) -> Content:
    return Content(media_type, json.dumps(value, indent=2).encode())


def _layers(name: str, *sizes: int) -> tuple[Layer, ...]:
    return tuple(_random_layer(f"{name}-{number}", size) for number, size in enumerate(sizes))


def _stored_layers(name: str, *sizes: int) -> tuple[Layer, ...]:
    return tuple(_random_layer(f"{name}-{number}", size, compresslevel=0) for number, size in enumerate(sizes))


def _random_layer(name: str, size: int, compresslevel: int = 1) -> Layer:
    return _layer(name, random_bytes(name, size), compresslevel)


def _text_layer(text: str) -> Layer:
    return _layer(text.replace(" ", "-"), f"{text}\n".encode(), compresslevel=6)


def _layer(name: str, data: bytes, compresslevel: int) -> Layer:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        member.mode = 0o644
        tar.addfile(member, io.BytesIO(data))
    plain = archive.getvalue()
    # The time is part of a gzip header: a fixed one keeps the digest the same on every run.
    return Layer(Content("", gzip.compress(plain, compresslevel, mtime=0)), digest_of(plain))
