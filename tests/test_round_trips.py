"""How often the mirror asks upstream for one pull by dockerd, beside a dockerd that asks upstream itself.

Requests and connections are counted, which are the same on each run; no time is. bench/ measures what they take.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from clients import Dockerd
from conftest import needs
from distance import FarHub
from hub import Hub
from images import layered_repository
from processes import poll
from pulls import succeeds
from serving import Mirror

IMAGES = ("five-layers", "five-others", "five-more")
LAYERS, LAYER = 5, 300_000  # bytes
ROUND_TRIP = 0.02  # seconds, so that what can be asked at the same time is
ONE_BY_ONE = {"max-concurrent-downloads": 1}
AT_ONCE = 2  # blobs that dockerd asks for even so: a layer, and the config


class Asked(NamedTuple):
    """Count what a pull made each part of the hub hear: requests, and new connections."""

    requests: dict[str, int]
    connections: dict[str, int]


class DirectDockerd(Dockerd):
    """Run a dockerd that asks the hub itself: its registry mirror is the registry."""

    def __init__(self, far: FarHub) -> None:
        super().__init__(far.registry_url, ONE_BY_ONE)
        self._ca_file: Path = far.ca_file

    def environment(self) -> dict[str, str]:
        """Return the environment in which the client runs."""
        return super().environment() | {"SSL_CERT_FILE": str(self._ca_file)}


@pytest.fixture(scope="module")
def far(hub: Hub) -> Iterator[FarHub]:
    for number, name in enumerate(IMAGES):
        hub.push(layered_repository(name, LAYERS, LAYER + number))
    with FarHub(hub, ROUND_TRIP) as far:
        yield far


@pytest.fixture(scope="module")
def direct(far: FarHub, hub: Hub) -> Asked:
    needs("root", "dockerd", "docker", "containerd", "ctr")
    with DirectDockerd(far) as dockerd:
        return pull(dockerd, IMAGES[0], far, hub)


@pytest.fixture(scope="module")
def mirrored(far: FarHub, hub: Hub) -> list[Asked]:
    """Pull one image after the other through a mirror that has asked nobody before."""
    needs("root", "dockerd", "docker", "containerd", "ctr")
    with Mirror(registries=far.registries_file) as mirror, Dockerd(mirror.url, ONE_BY_ONE) as dockerd:
        return [pull(dockerd, name, far, hub) for name in IMAGES]


def pull(dockerd: Dockerd, name: str, far: FarHub, hub: Hub) -> Asked:
    """Pull an image and count what the hub heard of it."""
    before = far.connections()
    far.forget()
    succeeds(dockerd.docker("pull", name))
    poll(lambda: len(hub.cdn_requests()) == LAYERS + 1, 5)  # a log's line may come after the client's last byte
    requests = {
        "registry": len(far.registry_requests()),
        "token service": len(hub.tokens.requests),
        "CDN": len(hub.cdn_requests()),
    }
    connections = {part: count - before[part] for part, count in far.connections().items()}
    return Asked(requests, connections)


def test_a_cold_pull_asks_upstream_no_more_than_dockerd_itself_does(direct: Asked, mirrored: list[Asked]) -> None:
    first = mirrored[0].requests
    assert {part: count for part, count in first.items() if count > direct.requests[part]} == {}
    # The challenge, the tag, the manifest, and config and layers, which the CDN has.
    assert first == {"registry": 3 + LAYERS + 1, "token service": 1, "CDN": LAYERS + 1}


def test_a_cold_pull_opens_no_more_connections_than_dockerd_itself_does(direct: Asked, mirrored: list[Asked]) -> None:
    first = mirrored[0].connections
    assert {part: count for part, count in first.items() if count > direct.connections[part]} == {}


def test_a_second_image_of_the_same_registry_takes_fewer_round_trips(mirrored: list[Asked]) -> None:
    """The challenge is known, and so is the way: what is left is a token of its own, and the image."""
    for asked in mirrored[1:]:
        assert asked.requests == mirrored[0].requests | {"registry": mirrored[0].requests["registry"] - 1}


def test_connections_to_registry_token_service_and_cdn_are_kept_for_the_next_pull(mirrored: list[Asked]) -> None:
    """All pulls together open as many as were needed at once."""
    opened = {part: sum(asked.connections[part] for asked in mirrored) for part in mirrored[0].connections}
    assert opened["token service"] == 1
    assert 1 <= opened["registry"] <= AT_ONCE
    assert 1 <= opened["CDN"] <= AT_ONCE
