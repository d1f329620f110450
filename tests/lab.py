"""A mirror before a recording raw-socket upstream, for what the real registry of hub.py will not do."""

from __future__ import annotations

import http.client
import itertools
import json
import socket
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any
from typing import NamedTuple
from typing import Self

from serving import Mirror
from upstream import RawUpstream
from upstream import reply
from upstream import reply_json
from upstream import token_realm

DIGEST = "sha256:" + "0123456789abcdef" * 4
BLOB = f"/v2/library/app/blobs/{DIGEST}"
MANIFEST = "/v2/library/app/manifests/latest"
_numbers = itertools.count(1)


class Reply(NamedTuple):
    """Hold what a client got; header names are lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """Return the first error's code of an OCI answer."""
        assert self.headers["content-type"] == "application/json"
        return str(self.json["errors"][0]["code"])


def ask(
    mirror: Mirror, path: str, headers: Mapping[str, str] | None = None, method: str = "GET", body: str | None = None
) -> Reply:
    """Send one request with the path to the letter; raise what http.client raises where the answer breaks off."""
    connection = http.client.HTTPConnection("127.0.0.1", mirror.port, timeout=30)
    try:
        connection.request(method, path, body, dict(headers or {}))
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, found, response.read())
    finally:
        connection.close()


def send_raw(mirror: Mirror, text: bytes) -> bytes:
    """Send bytes that no HTTP library would send, and return all that comes back."""
    with socket.create_connection(("127.0.0.1", mirror.port), timeout=30) as connection:
        connection.sendall(text)
        received = b""
        try:
            while part := connection.recv(65536):
                received += part
        except ConnectionResetError:  # the server did not read all that was sent
            pass
        return received


class Lab:
    """Run a mirror whose Docker Hub is a `RawUpstream`.

    `more` ends its registries file, `options` are gunicorn's, keywords are its settings.
    """

    def __init__(
        self,
        upstream: RawUpstream | None = None,
        realms: tuple[str, ...] = (),
        ca: str = "",
        more: str = "",
        options: tuple[str, ...] = (),
        **settings: Any,
    ):
        self.upstream = upstream or RawUpstream()
        self._realms = realms
        self._ca = ca
        self._more = more
        self._options = options
        self._settings = settings
        self._stack = ExitStack()
        self.name = "app"

    @property
    def path(self) -> str:
        """Return the path at which a client asks for the manifest."""
        return f"/v2/{self.name}/manifests/latest"

    @property
    def manifest(self) -> str:
        """Return the path at which upstream has the manifest."""
        return f"/v2/library/{self.name}/manifests/latest"

    def __enter__(self) -> Self:
        with self._stack:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="lab-")))
            self._stack.enter_context(self.upstream)
            file = self.registries = folder / "registries.toml"
            realms = json.dumps([self.upstream.url, *self._realms])
            ca = f'ca_file = "{self._ca}"' if self._ca else ""
            file.write_text(
                f'["docker.io"]\nendpoints = ["{self.upstream.url}"]\nrealms = {realms}\n{ca}\n{self._more}\n'
            )
            self.mirror = self._stack.enter_context(Mirror(*self._options, registries=file, **self._settings))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def ask(
        self, path: str, headers: Mapping[str, str] | None = None, method: str = "GET", body: str | None = None
    ) -> Reply:
        """Ask the mirror."""
        return ask(self.mirror, path, headers, method, body)

    def reset(self) -> None:
        """Forget what the upstream saw and answers; it asks for no token. For the new name the mirror knows none."""
        self.name = f"app{next(_numbers)}"
        self.upstream.answers.clear()
        self.upstream.requests.clear()
        self.upstream.closed.clear()
        self.upstream.answers["/v2/"] = reply_json(200, {})


def guard(upstream: RawUpstream, path: str, answer: bytes, service: str = "hub.test", expires_in: int = 300) -> None:
    """Let the upstream ask for a token: its realm gives a numbered one, and `path` takes only the newest."""
    realm = token_realm(upstream.url)
    given: list[str] = []

    def give(request: Any, connection: socket.socket) -> None:
        given.append(f"real-token-{len(given) + 1}")
        connection.sendall(reply_json(200, {"token": given[-1], "expires_in": expires_in}))

    def check(request: Any, connection: socket.socket) -> None:
        authorized = given and request.headers.get("authorization") == f"Bearer {given[-1]}"
        connection.sendall(answer if authorized else refuse(realm, service))

    upstream.answers["/realm"] = give
    upstream.answers["/v2/"] = refuse(realm, service, scope=None)
    upstream.answers[path] = check


def refuse(
    realm: str, service: str, scope: str | None = "repository:library/app:pull", error: str | None = None
) -> bytes:
    """Return a registry's 401 with its challenge."""
    parameters = {"realm": realm, "service": service, "scope": scope, "error": error}
    challenge = ",".join(f'{name}="{value}"' for name, value in parameters.items() if value is not None)
    errors = {"errors": [{"code": "UNAUTHORIZED", "message": "authentication required", "detail": None}]}
    return reply_json(401, errors, {"WWW-Authenticate": f"Bearer {challenge}"})


__all__ = ["BLOB", "DIGEST", "MANIFEST", "Lab", "Reply", "ask", "guard", "refuse", "reply", "reply_json", "send_raw"]
