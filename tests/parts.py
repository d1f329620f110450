"""The parts that a lab of real servers is made of: docker-registry and nginx, with certificates of one authority."""

import os
import re
import ssl
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple
from typing import Self

import requests
import trustme
from images import Content
from images import Repository
from processes import Process
from processes import free_port
from processes import removed_afterwards

DOMAIN = "lab.test"  # no DNS server knows it; a server's certificate holds such a name beside its address

# Configuration files are written as templates: nginx's own braces rule out format strings.
REGISTRY_CONFIG = """\
version: 0.1
log: {level: error, accesslog: {disabled: false}}
storage:
  filesystem: {rootdirectory: "@STORAGE@"}
  cache: {blobdescriptor: inmemory}
http:
  addr: "@ADDRESS@"
  secret: "of the tests"
  tls: {certificate: "@CERT@", key: "@CERT@"}
"""

NGINX_CONFIG = """\
daemon off;
worker_processes 1;
@USER@
pid "@FOLDER@/nginx.pid";
error_log stderr;
events { worker_connections 5000; }
http {
    default_type application/octet-stream;
    map $http_authorization $bears { default authorized; "" anonymous; }
    log_format lab '$remote_addr $request_method $uri $status $bears $http_range';
    access_log "@FOLDER@/requests.log" lab;
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
    ssl_session_cache shared:lab:4m;
    server {
        listen @ADDRESS@ ssl backlog=1024 @LISTEN@;
        @RULES@
    }
}
"""


class RegistryRequest(NamedTuple):
    """Record what a registry was asked, and from which address; the path includes the query."""

    method: str
    path: str
    status: int
    peer: str


class NginxRequest(NamedTuple):
    """Record what nginx was asked, and from which address; `range` is the header's value, "-" without the header."""

    method: str
    path: str
    status: int
    authorized: bool
    range: str
    peer: str


class Premises:
    """Keep the folder and the running parts of a lab, and end them together; a subclass starts them."""

    def __init__(self, authority: trustme.CA) -> None:
        self.authority = authority
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack:
            folder = Path(tempfile.mkdtemp(prefix=f"{type(self).__name__.lower()}-"))
            self.folder = self._stack.enter_context(removed_afterwards(folder))
            self.ca_file = self.folder / "ca.pem"
            self.authority.cert_pem.write_to_path(self.ca_file)
            self.session = _session(self.ca_file)
            self._stack.callback(self.session.close)
            self.start()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def start(self) -> None:
        """Start the parts."""
        raise NotImplementedError

    def docker_registry(
        self, name: str, host: str, storage: Path, more: str = "", **values: object
    ) -> "DockerRegistry":
        """Start a docker-registry whose configuration has `more` lines; it is not awaited."""
        config = REGISTRY_CONFIG + more
        return DockerRegistry(self._server(name, host, config, storage=storage, **values), self._stack)

    def nginx(self, name: str, host: str, rules: str, user: str = "", listen: str = "", **values: object) -> "Nginx":
        """Start an nginx with these rules in its server's block, and as a certain user; it is not awaited.

        `listen` are parameters of that directive.
        """
        # Started by root, nginx's worker would be another user, who cannot read a temporary directory.
        user = f"user {user or 'root root'};" if os.geteuid() == 0 else ""
        config = NGINX_CONFIG.replace("@RULES@", rules)
        return Nginx(self._server(name, host, config, user=user, listen=listen, **values), self._stack)

    def _server(self, name: str, host: str, config: str, **values: object) -> "Server":
        folder = self.folder / name
        folder.mkdir()
        certificate = folder / "certificate.pem"
        issued = self.authority.issue_cert(host, f"{name}.{DOMAIN}")
        issued.private_key_and_cert_chain_pem.write_to_path(certificate)
        address = f"{host}:{free_port(host)}"
        values |= {"address": address, "cert": certificate, "folder": folder}
        return Server(folder, f"https://{address}", fill(folder / "config", config, **values), self.session)


class Server(NamedTuple):
    """Say where a server's files and address are."""

    folder: Path
    url: str
    config: Path
    session: requests.Session

    def answers(self) -> bool:
        """Tell whether anything is heard at its address."""
        try:
            return self.session.get(f"{self.url}/v2/", timeout=5, allow_redirects=False).status_code > 0
        except requests.ConnectionError:
            return False


class DockerRegistry:
    """Run Debian's docker-registry with TLS."""

    def __init__(self, server: Server, stack: ExitStack) -> None:
        self._server = server
        self._log = server.folder / "log"
        self.url = server.url
        self._process = stack.enter_context(Process(["docker-registry", "serve", str(server.config)], self._log))

    def wait(self) -> None:
        """Wait until it answers."""
        self._process.wait_until(self._server.answers)

    def push(self, repository: Repository, headers: dict[str, str]) -> None:
        """Push all images of a repository with these headers."""
        for image in repository.images:
            for blob in (image.config, *image.layers):
                self._push_blob(repository.name, blob, headers)
            self._push_manifest(repository.name, image.manifest.digest, image.manifest, headers)
        for tag in repository.tags:
            self._push_manifest(repository.name, tag, repository.top(), headers)

    def _push_blob(self, repository: str, blob: Content, headers: dict[str, str]) -> None:
        session = self._server.session
        started = session.post(f"{self.url}/v2/{repository}/blobs/uploads/", headers=headers)
        started.raise_for_status()
        upload = session.put(
            started.headers["Location"],
            params={"digest": blob.digest},
            data=blob.data,
            headers=headers | {"Content-Type": "application/octet-stream"},
        )
        upload.raise_for_status()

    def _push_manifest(self, repository: str, reference: str, manifest: Content, headers: dict[str, str]) -> None:
        url = f"{self.url}/v2/{repository}/manifests/{reference}"
        headers = headers | {"Content-Type": manifest.media_type}
        self._server.session.put(url, data=manifest.data, headers=headers).raise_for_status()

    def requests(self) -> list[RegistryRequest]:
        """Return what the registry was asked since the last forget()."""
        found = re.findall(r'^(\S+) .*"([A-Z]+) (\S+) HTTP/[\d.]+" (\d{3}) ', self._log.read_text(), re.M)
        return [RegistryRequest(method, path, int(status), peer) for peer, method, path, status in found]

    def forget(self) -> None:
        """Clear the record."""
        os.truncate(self._log, 0)  # the server writes with O_APPEND, so that its next line stands at the beginning


class Nginx:
    """Run Debian's nginx with TLS."""

    def __init__(self, server: Server, stack: ExitStack) -> None:
        self._server = server
        self.url = server.url
        command = ["nginx", "-e", "stderr", "-p", str(server.folder), "-c", str(server.config)]
        self._process = stack.enter_context(Process(command, server.folder / "log"))

    def wait(self) -> None:
        """Wait until it answers."""
        self._process.wait_until(self._server.answers)

    def requests(self) -> list[NginxRequest]:
        """Return what nginx was asked since the last forget()."""
        lines = [line.split(maxsplit=5) for line in (self._server.folder / "requests.log").read_text().splitlines()]
        return [
            NginxRequest(line[1], line[2], int(line[3]), line[4] == "authorized", line[5], line[0]) for line in lines
        ]

    def forget(self) -> None:
        """Clear the record."""
        os.truncate(self._server.folder / "requests.log", 0)  # O_APPEND, as above


def fill(file: Path, template: str, **values: object) -> Path:
    """Write a file from its template, in which each value's name stands between two @."""
    for key, value in values.items():
        template = template.replace(f"@{key.upper()}@", str(value))
    file.write_text(template)
    return file


def server_context(authority: trustme.CA, host: str) -> ssl.SSLContext:
    """Return the context of a server written in Python, with a certificate for this host."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(host).configure_cert(context)
    return context


def _session(ca_file: Path) -> requests.Session:
    """Return a session that trusts the lab, whatever REQUESTS_CA_BUNDLE and the proxy variables say."""
    session = requests.Session()
    session.trust_env = False
    session.verify = str(ca_file)
    return session
