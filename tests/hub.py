"""Run a small Docker Hub of real parts on three loopback addresses: registry, token service and CDN.

As at Docker Hub, the registry (Debian's docker-registry) takes bearer tokens only, the token service is another host,
and blobs are redirected to a CDN (nginx) that refuses any request with an Authorization header. Clients drop
Authorization when a redirect changes the host; with three addresses the tests can see whether a mirror does the same.

    with Hub() as hub:
        print(hub.registry_url, hub.registries_file)
"""

import base64
import hashlib
import json
import random
import secrets
import shutil
import ssl
import threading
import time
from collections.abc import Mapping
from datetime import UTC
from datetime import datetime
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from typing import NamedTuple
from typing import Self
from typing import cast
from urllib.parse import parse_qs
from urllib.parse import urlsplit

import jwt
import trustme
from images import MIB
from images import Repository
from images import repositories
from parts import NginxRequest
from parts import Premises
from parts import RegistryRequest
from parts import server_context

REGISTRY_HOST = "127.0.0.2"
TOKEN_HOST = "127.0.0.3"
CDN_HOST = "127.0.0.4"
SERVICE = "hub.test"
ISSUER = "token.hub.test"
USER = "alice"
PASSWORD = "wonderland"
PRIVATE = "private/"
BLOBS = Path("docker/registry/v2/blobs/sha256")
REPOSITORIES = Path("docker/registry/v2/repositories")

REDIRECT_TO_CDN = """\
middleware:
  storage:
    - name: redirect
      options: {baseurl: "@CDN@"}
"""

TOKEN_AUTH = """\
auth:
  token: {realm: "@REALM@", service: "@SERVICE@", issuer: "@ISSUER@", rootcertbundle: "@CA@"}
"""

CDN_RULES = """\
root "@STORAGE@";
# S3 and R2 answer so to a second kind of credentials besides those in the signed URL.
if ($http_authorization != "") { return 400; }
"""


class TokenRequest(NamedTuple):
    """Record what the token service was asked, and from which address.

    `authorization` is the header's value, None without the header.
    """

    method: str
    query: dict[str, list[str]]
    authorization: str | None
    form: dict[str, list[str]]
    peer: str


class Refused(Exception):
    """Say that a request for a token is answered with an error status."""

    def __init__(self, status: int, details: str):
        super().__init__(details)
        self.status = status


class TokenService:
    """Sign tokens as the registry expects them.

    Anonymous clients may pull everything outside `private/`, the one user may pull and push everywhere.
    Tests may set `expires_in` (seconds) and `delay` (seconds before an answer), and read or clear `requests`.
    """

    def __init__(self, authority: trustme.CA):
        signer = authority.issue_cert(ISSUER)
        self._key = signer.private_key_pem.bytes()
        self._chain = [base64.b64encode(ssl.PEM_cert_to_DER_cert(signer.cert_chain_pems[0].bytes().decode())).decode()]
        self._refresh_tokens: dict[str, str] = {}
        self._server = _TokenServer((TOKEN_HOST, 0), _TokenHandler, self)
        context = server_context(authority, TOKEN_HOST)
        # The handshake is left to each request's own thread.
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.url = f"https://{TOKEN_HOST}:{self._server.server_address[1]}"
        self.config = {"realm": f"{self.url}/token", "service": SERVICE, "issuer": ISSUER}  # of TOKEN_AUTH
        self.expires_in = 300
        self.delay = 0.0
        self.requests: list[TokenRequest] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, request: TokenRequest) -> dict[str, Any]:
        """Return the JSON object that grants what this client may do; raise Refused for wrong credentials."""
        self.requests.append(request)
        time.sleep(self.delay)
        asked = request.form or request.query
        if asked.get("service") != [SERVICE]:
            raise Refused(400, f"the service is {SERVICE}")
        user = self._user_of_form(request.form) if request.method == "POST" else _user_of_header(request.authorization)
        grants = [_grant(user, scope) for scope in " ".join(asked.get("scope", [])).split()]
        token = self.sign(user, [grant for grant in grants if grant["actions"]])
        issued_at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        answer = {"token": token, "access_token": token, "expires_in": self.expires_in, "issued_at": issued_at}
        if asked.get("offline_token") == ["true"] or asked.get("access_type") == ["offline"]:
            answer["refresh_token"] = self._refresh_token(user)
        return answer

    def sign(self, user: str, access: list[dict[str, Any]]) -> str:
        """Return a signed token that grants this access; user is "" for an anonymous client."""
        now = int(time.time())
        claims = {"iss": ISSUER, "aud": SERVICE, "sub": user, "jti": secrets.token_hex(8), "access": access}
        times = {"iat": now, "nbf": now - 10, "exp": now + self.expires_in}
        return jwt.encode(claims | times, self._key, "ES256", headers={"x5c": self._chain})

    def push_authorization(self, repository: str) -> dict[str, str]:
        """Return the header that lets its bearer pull and push one repository."""
        access = {"type": "repository", "name": repository, "actions": ["pull", "push"]}
        return {"Authorization": f"Bearer {self.sign(USER, [access])}"}

    def _user_of_form(self, form: dict[str, list[str]]) -> str:
        values = {name: value for name, (value, *_) in form.items()}
        match values.get("grant_type"):
            case "password":
                return _checked_user(values.get("username", ""), values.get("password", ""))
            case "refresh_token" if values.get("refresh_token") in self._refresh_tokens:
                return self._refresh_tokens[values["refresh_token"]]
            case "refresh_token":
                raise Refused(401, "unknown refresh token")
        raise Refused(400, "unknown grant_type")

    def _refresh_token(self, user: str) -> str:
        token = secrets.token_urlsafe(24)
        self._refresh_tokens[token] = user
        return token


class _TokenServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], service: TokenService):
        super().__init__(address, handler)
        self.service = service

    def handle_error(self, request: object, client_address: object) -> None:
        """Keep quiet about clients that go away."""


class _TokenHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 300
    # Head and body are two writes; Nagle's algorithm would hold the second back for 40 ms.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._handle({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._handle(parse_qs(body.decode()))

    def _handle(self, form: dict[str, list[str]]) -> None:
        url = urlsplit(self.path)
        authorization = self.headers.get("Authorization")
        request = TokenRequest(self.command, parse_qs(url.query), authorization, form, self.client_address[0])
        if url.path != "/token":
            return self._send(404, {"details": "the only path is /token"})
        try:
            self._send(200, cast(_TokenServer, self.server).service.answer(request))
        except Refused as refused:
            self._send(refused.status, {"details": str(refused)})

    def _send(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing: the tests read TokenService.requests."""


class Hub(Premises):
    """Run registry, token service and CDN, filled with the images of images.py, below one temporary directory.

    `cdn_listen` are parameters of the listen directive of the CDN, which is nginx.
    """

    def __init__(self, cdn_listen: str = "") -> None:
        super().__init__(trustme.CA())
        self._cdn_listen = cdn_listen

    def start(self) -> None:
        """Start the three parts and push the images."""
        self.storage = self.folder / "storage"
        (self.storage / BLOBS).mkdir(parents=True)
        self.tokens = self._stack.enter_context(TokenService(self.authority))
        self._cdn = self.nginx("cdn", CDN_HOST, CDN_RULES, listen=self._cdn_listen, storage=self.storage)
        more, values = REDIRECT_TO_CDN + TOKEN_AUTH, {"cdn": self._cdn.url, "ca": self.ca_file, **self.tokens.config}
        self._registry = self.docker_registry("registry", REGISTRY_HOST, self.storage, more, **values)
        self.cdn_url, self.registry_url = self._cdn.url, self._registry.url
        self.registries_file = write_registries(self.folder / "registries.toml", {"docker.io": self.table()})
        self.repositories = {repository.name: repository for repository in repositories()}
        for part in (self._cdn, self._registry):
            part.wait()
        for repository in self.repositories.values():
            self.push(repository)
        self.forget()

    def table(self) -> dict[str, object]:
        """Return the table of the registries file that makes the mirror take this hub for a registry."""
        return {"endpoints": [self.registry_url], "realms": [self.tokens.url], "ca_file": str(self.ca_file)}

    def push(self, repository: Repository) -> None:
        """Push all images of a repository."""
        self._registry.push(repository, self.tokens.push_authorization(repository.name))

    def add_blob(self, repository: str, size: int) -> str:
        """Put a blob of so many bytes straight into the registry's storage and return its digest.

        The bytes are incompressible, and the same for the same size; they never stand in memory as a whole.
        """
        source, digest = random.Random(size), hashlib.sha256()
        written = self.storage / BLOBS / f"new-{size}"
        with written.open("wb") as file:
            for start in range(0, size, MIB):
                part = source.randbytes(min(MIB, size - start))
                digest.update(part)
                file.write(part)
        return self._link_blob(repository, written, digest.hexdigest())

    def _link_blob(self, repository: str, written: Path, digest: str) -> str:
        data = self.stored(digest)
        link = self.storage / REPOSITORIES / repository / "_layers/sha256" / digest / "link"
        for file in (data, link):
            file.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(written, data)
        link.write_text(f"sha256:{digest}")
        return f"sha256:{digest}"

    def stored(self, digest: str) -> Path:
        """Return the file that holds a blob."""
        encoded = digest.removeprefix("sha256:")
        return self.storage / BLOBS / encoded[:2] / encoded / "data"

    def registry_requests(self) -> list[RegistryRequest]:
        """Return what the registry was asked since the last forget()."""
        return self._registry.requests()

    def cdn_requests(self) -> list[NginxRequest]:
        """Return what the CDN was asked since the last forget()."""
        return self._cdn.requests()

    def peers(self) -> dict[str, set[str]]:
        """Return the addresses from which each part was asked since the last forget()."""
        return {
            "registry": {request.peer for request in self.registry_requests()},
            "token service": {request.peer for request in self.tokens.requests},
            "CDN": {request.peer for request in self.cdn_requests()},
        }

    def forget(self) -> None:
        """Clear the records of all three parts; call it while no request is under way."""
        self.tokens.requests.clear()
        self._registry.forget()
        self._cdn.forget()


def write_registries(file: Path, tables: Mapping[str, Mapping[str, object]]) -> Path:
    """Write a registries file: its tables by the registries' names. JSON's texts, lists and switches are TOML's."""
    lines = [
        line
        for name, table in tables.items()
        for line in (f'["{name}"]', *(f"{key} = {json.dumps(value)}" for key, value in table.items()), "")
    ]
    file.write_text("\n".join(lines))
    return file


def _user_of_header(authorization: str | None) -> str:
    if authorization is None:
        return ""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() != "basic":
        raise Refused(401, "only Basic is understood")
    try:
        user, _, password = base64.b64decode(value, validate=True).decode().partition(":")
    except ValueError as exc:
        raise Refused(401, "unreadable credentials") from exc
    return _checked_user(user, password)


def _checked_user(user: str, password: str) -> str:
    if (user, password) != (USER, PASSWORD):
        raise Refused(401, "incorrect username or password")
    return user


def _grant(user: str, scope: str) -> dict[str, Any]:
    """Return the part of a scope such as `repository:library/nginx:pull,push` that this user may have."""
    kind, _, rest = scope.partition(":")
    name, _, asked = rest.rpartition(":")
    allowed = {"pull", "push"} if user else {"pull"} if not name.startswith(PRIVATE) else set()
    actions = sorted(allowed.intersection(asked.split(","))) if kind == "repository" else []
    return {"type": kind, "name": name, "actions": actions}
