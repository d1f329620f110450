"""Run a real nginx with README's own block, which does TLS in front of a mirror as on its users' hosts."""

from __future__ import annotations

import http.client
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import trustme
from clients import Dockerd
from lab import Reply
from parts import Premises
from serving import ROOT

READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
ADDRESS = "127.0.0.20"
CLIENT = "127.0.0.21"  # the mirror sees the terminator come from 127.0.0.1
SERVED_AT = "http://127.0.0.1:5000"


def block_of(readme: Path, location: str = "/") -> str:
    """Return the nginx block of a location that a README tells its reader to paste."""
    blocks = re.findall(r"^```nginx\n(.*?)^```$", readme.read_text(), re.M | re.S)
    (block,) = [block for block in blocks if block.startswith(f"location {location} {{\n")]
    return str(block)


class Served(Protocol):
    """Be served at an address."""

    @property
    def url(self) -> str:
        """Return the address."""


class Terminator(Premises):
    """Run nginx with TLS and README's block in front of a mirror; several may have one authority.

    `more` are further locations; a `user` of nginx's other than the tests' is written as its directive takes it.
    """

    def __init__(self, mirror: Served, authority: trustme.CA | None = None, more: str = "", user: str = "") -> None:
        super().__init__(authority or trustme.CA())
        self._mirror = mirror
        self._more = more
        self._user = user

    def start(self) -> None:
        """Start nginx."""
        block = block_of(READMES[0])
        assert block.count(SERVED_AT) == 1
        rules = block.replace(SERVED_AT, self._mirror.url) + self._more
        self._nginx = self.nginx("terminator", ADDRESS, rules, self._user)
        self.url = self._nginx.url
        self.host = self.url.removeprefix("https://")
        self._trust = ssl.create_default_context(cafile=str(self.ca_file))
        self._nginx.wait()

    def ask(self, path: str, headers: Mapping[str, str] | None = None, method: str = "GET") -> Reply:
        """Ask through TLS, from an address of the client's own; raise what http.client raises for a broken answer."""
        host, _, port = self.host.partition(":")
        connection = http.client.HTTPSConnection(
            host, int(port), timeout=30, context=self._trust, source_address=(CLIENT, 0)
        )
        try:
            connection.request(method, path, None, dict(headers or {}))
            response = connection.getresponse()
            found = {name.lower(): ", ".join(response.headers.get_all(name, [])) for name in response.headers}
            return Reply(response.status, found, response.read())
        finally:
            connection.close()

    def asked(self, since: int = 0) -> list[tuple[str, str, int]]:
        """Return the requests that came through TLS, from a count on."""
        return [(request.method, request.path, request.status) for request in self._nginx.requests()[since:]]


class TrustingDockerd(Dockerd):
    """Run dockerd and containerd on a host that trusts the terminator's authority, and no other.

    dockerd itself does not check certificates of loopback addresses; containerd does.
    """

    def __init__(self, terminator: Terminator):
        super().__init__(terminator.url)
        self._ca_file = terminator.ca_file

    def environment(self) -> dict[str, str]:
        """Return the environment in which daemons and clients run."""
        return super().environment() | {"SSL_CERT_FILE": str(self._ca_file), "SSL_CERT_DIR": str(self.folder)}
