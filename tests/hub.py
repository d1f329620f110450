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
import os
import re
import secrets
import shutil
import ssl
import tempfile
import threading
import time
from contextlib import ExitStack
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
import requests
import trustme
from images import MIB
from images import Content
from images import Repository
from images import random_bytes
from images import repositories
from processes import Process
from processes import free_port
from processes import removed_afterwards

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

# Configuration files are written as templates: nginx's own braces rule out format strings.
REGISTRY_CONFIG = """\
version: 0.1
log: {level: error, accesslog: {disabled: false}}
storage:
  filesystem: {rootdirectory: "@STORAGE@"}
  cache: {blobdescriptor: inmemory}
middleware:
  storage:
    - name: redirect
      options: {baseurl: "@CDN@"}
http:
  addr: "@ADDRESS@"
  secret: "of the tests"
  tls: {certificate: "@CERT@", key: "@CERT@"}
auth:
  token: {realm: "@REALM@", service: "@SERVICE@", issuer: "@ISSUER@", rootcertbundle: "@CA@"}
"""

NGINX_CONFIG = """\
daemon off;
worker_processes 1;
@USER@
pid "@FOLDER@/nginx.pid";
error_log stderr;
events { worker_connections 1000; }
http {
    default_type application/octet-stream;
    map $http_authorization $bears { default authorized; "" anonymous; }
    log_format cdn '$request_method $uri $status $bears $http_range';
    access_log "@FOLDER@/requests.log" cdn;
    client_body_temp_path "@FOLDER@/body";
    proxy_temp_path "@FOLDER@/proxy";
    fastcgi_temp_path "@FOLDER@/fastcgi";
    uwsgi_temp_path "@FOLDER@/uwsgi";
    scgi_temp_path "@FOLDER@/scgi";
    sendfile on;
    tcp_nopush on;
    keepalive_timeout 300;
    keepalive_requests 100000;
    ssl_certificate "@CERT@";
    ssl_certificate_key "@CERT@";
    ssl_session_cache shared:cdn:4m;
    server {
        listen @ADDRESS@ ssl backlog=1024;
        root "@STORAGE@";
        # S3 and R2 answer so to a second kind of credentials besides those in the signed URL.
        if ($http_authorization != "") { return 400; }
    }
}
"""

REGISTRIES_TOML = """\
["docker.io"]
endpoints = ["@REGISTRY@"]
realms = ["@REALM@"]
ca_file = "@CA@"
"""


class TokenRequest(NamedTuple):
    """Record what the token service was asked; `authorization` is the header's value, None without the header."""

    method: str
    query: dict[str, list[str]]
    authorization: str | None
    form: dict[str, list[str]]


class RegistryRequest(NamedTuple):
    """Record what the registry was asked; the path includes the query."""

    method: str
    path: str
    status: int


class CdnRequest(NamedTuple):
    """Record what the CDN was asked; `range` is the header's value, "-" without the header."""

    method: str
    path: str
    status: int
    authorized: bool
    range: str


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
        _server_context(authority, TOKEN_HOST, self._server)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.url = f"https://{TOKEN_HOST}:{self._server.server_address[1]}"
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
        request = TokenRequest(self.command, parse_qs(url.query), self.headers.get("Authorization"), form)
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


class Hub:
    """Run registry, token service and CDN, filled with the images of images.py, below one temporary directory."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack:
            self.folder = self._stack.enter_context(removed_afterwards(Path(tempfile.mkdtemp(prefix="hub-"))))
            self._start()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def _start(self) -> None:
        authority = trustme.CA()
        self.ca_file = self.folder / "ca.pem"
        authority.cert_pem.write_to_path(self.ca_file)
        self.storage = self.folder / "storage"
        (self.storage / BLOBS).mkdir(parents=True)
        self.session = _session(self.ca_file)
        self._stack.callback(self.session.close)
        self.tokens = self._stack.enter_context(TokenService(authority))
        self.cdn_url = f"https://{CDN_HOST}:{free_port(CDN_HOST)}"
        self.registry_url = f"https://{REGISTRY_HOST}:{free_port(REGISTRY_HOST)}"
        cdn, registry = self._start_cdn(authority), self._start_registry(authority)
        self.registries_file = self._write("registries.toml", self.registries_toml())
        self.repositories = {repository.name: repository for repository in repositories()}
        cdn.wait_until(lambda: self._answers(self.cdn_url))
        registry.wait_until(lambda: self._answers(self.registry_url))
        for repository in self.repositories.values():
            self._push(repository)
        self.forget()

    def _start_cdn(self, authority: trustme.CA) -> Process:
        folder = self.folder / "cdn"
        folder.mkdir()
        # Started by root, nginx's worker would be another user, who cannot read a temporary directory.
        user = "user root root;" if os.geteuid() == 0 else ""
        config = self._write("nginx.conf", NGINX_CONFIG, folder=folder, user=user, **self._serves(authority, CDN_HOST))
        command = ["nginx", "-e", "stderr", "-p", str(folder), "-c", str(config)]
        return self._stack.enter_context(Process(command, self.folder / "cdn.log"))

    def _start_registry(self, authority: trustme.CA) -> Process:
        names = {"cdn": self.cdn_url, "realm": f"{self.tokens.url}/token", "service": SERVICE, "issuer": ISSUER}
        config = self._write("registry.yml", REGISTRY_CONFIG, **names, **self._serves(authority, REGISTRY_HOST))
        command = ["docker-registry", "serve", str(config)]
        return self._stack.enter_context(Process(command, self.folder / "registry.log"))

    def _serves(self, authority: trustme.CA, host: str) -> dict[str, object]:
        """Return what both servers' configuration files have in common."""
        certificate = self.folder / f"{host}.pem"
        authority.issue_cert(host).private_key_and_cert_chain_pem.write_to_path(certificate)
        url = self.cdn_url if host == CDN_HOST else self.registry_url
        return {"address": urlsplit(url).netloc, "cert": certificate, "ca": self.ca_file, "storage": self.storage}

    def _write(self, name: str, template: str, **values: object) -> Path:
        for key, value in values.items():
            template = template.replace(f"@{key.upper()}@", str(value))
        path = self.folder / name
        path.write_text(template)
        return path

    def _answers(self, url: str) -> bool:
        try:
            return self.session.get(f"{url}/v2/", timeout=5).status_code in (401, 404)
        except requests.ConnectionError:
            return False

    def registries_toml(self) -> str:
        """Return the registries file that makes the mirror take this hub for docker.io."""
        values = {"@REGISTRY@": self.registry_url, "@REALM@": self.tokens.url, "@CA@": str(self.ca_file)}
        return re.sub("@[A-Z]+@", lambda match: values[match[0]], REGISTRIES_TOML)

    def push_authorization(self, repository: str) -> dict[str, str]:
        """Return the header that lets its bearer pull and push one repository."""
        access = {"type": "repository", "name": repository, "actions": ["pull", "push"]}
        return {"Authorization": f"Bearer {self.tokens.sign(USER, [access])}"}

    def _push(self, repository: Repository) -> None:
        for image in repository.images:
            for blob in (image.config, *image.layers):
                self._push_blob(repository.name, blob)
            self._push_manifest(repository.name, image.manifest.digest, image.manifest)
        for tag in repository.tags:
            self._push_manifest(repository.name, tag, repository.top())

    def _push_blob(self, repository: str, blob: Content) -> None:
        headers = self.push_authorization(repository)
        started = self.session.post(f"{self.registry_url}/v2/{repository}/blobs/uploads/", headers=headers)
        started.raise_for_status()
        upload = self.session.put(
            started.headers["Location"],
            params={"digest": blob.digest},
            data=blob.data,
            headers=headers | {"Content-Type": "application/octet-stream"},
        )
        upload.raise_for_status()

    def _push_manifest(self, repository: str, reference: str, manifest: Content) -> None:
        headers = self.push_authorization(repository) | {"Content-Type": manifest.media_type}
        url = f"{self.registry_url}/v2/{repository}/manifests/{reference}"
        self.session.put(url, data=manifest.data, headers=headers).raise_for_status()

    def add_blob(self, repository: str, size: int) -> str:
        """Put a blob of so many bytes straight into the registry's storage and return its digest.

        The bytes are incompressible, and the same for the same size; they never stand in memory as a whole.
        """
        block = random_bytes("blob", MIB)
        written = self.storage / BLOBS / f"new-{size}"
        digest = hashlib.sha256()
        with written.open("wb") as file:
            for start in range(0, size, MIB):
                part = (start.to_bytes(8) + block)[: min(MIB, size - start)]
                digest.update(part)
                file.write(part)
        return self._link_blob(repository, written, digest.hexdigest())

    def _link_blob(self, repository: str, written: Path, digest: str) -> str:
        data = self.storage / BLOBS / digest[:2] / digest / "data"
        link = self.storage / REPOSITORIES / repository / "_layers/sha256" / digest / "link"
        for file in (data, link):
            file.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(written, data)
        link.write_text(f"sha256:{digest}")
        return f"sha256:{digest}"

    def registry_requests(self) -> list[RegistryRequest]:
        """Return what the registry was asked since the last forget()."""
        log = (self.folder / "registry.log").read_text()
        found = re.findall(r'"([A-Z]+) (\S+) HTTP/[\d.]+" (\d{3}) ', log)
        return [RegistryRequest(method, path, int(status)) for method, path, status in found]

    def cdn_requests(self) -> list[CdnRequest]:
        """Return what the CDN was asked since the last forget()."""
        lines = [line.split(maxsplit=4) for line in (self.folder / "cdn/requests.log").read_text().splitlines()]
        return [CdnRequest(line[0], line[1], int(line[2]), line[3] == "authorized", line[4]) for line in lines]

    def forget(self) -> None:
        """Clear the records of all three parts; call it while no request is under way."""
        self.tokens.requests.clear()
        # Both servers write with O_APPEND, so that their next line stands at the beginning again.
        for log in ("registry.log", "cdn/requests.log"):
            os.truncate(self.folder / log, 0)


def _server_context(authority: trustme.CA, host: str, server: ThreadingHTTPServer) -> None:
    """Make a server speak TLS; the handshake is left to each request's own thread."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(host).configure_cert(context)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)


def _session(ca_file: Path) -> requests.Session:
    """Return a session that trusts the hub, whatever REQUESTS_CA_BUNDLE and the proxy variables say."""
    session = requests.Session()
    session.trust_env = False
    session.verify = str(ca_file)
    return session


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
