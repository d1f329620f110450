"""The servers that are compared: each speaks plain HTTP to its clients and TLS to the hub, with one worker process.

The clients send no Authorization. The mirror gets its own token, as it does for any anonymous client; the nginx peers
have one in their configuration. `Keeper` are those that have files of their own.
"""

import os
import socket
import tempfile
from abc import abstractmethod
from collections.abc import Callable
from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from typing import NamedTuple
from typing import Protocol
from typing import Self
from typing import runtime_checkable
from urllib.parse import urlsplit

import requests
from hub import TokenService
from processes import Process
from processes import clean_environment
from processes import free_port
from processes import poll
from processes import removed_afterwards
from serving import ROOT
from serving import Mirror

from bench.load import Job
from bench.load import LoadFailed
from bench.load import load

HOST = "127.0.0.1"
REPOSITORY = "library/bench"
FAR_REPOSITORIES = ("library/five-layers", "library/five-others")  # images of five layers
KEPT_SECONDS = 120  # in which what was pulled must be kept

# The frame of all nginx peers.
NGINX_CONFIG = """\
daemon off;
worker_processes 1;
@USER@
pid "@FOLDER@/nginx.pid";
error_log stderr;
events { worker_connections @CONNECTIONS@; }
http {
    default_type application/octet-stream;
    keepalive_requests 1000000;
    access_log "@FOLDER@/access.log";
    client_body_temp_path "@FOLDER@/body";
    proxy_temp_path "@FOLDER@/proxy";
    fastcgi_temp_path "@FOLDER@/fastcgi";
    uwsgi_temp_path "@FOLDER@/uwsgi";
    scgi_temp_path "@FOLDER@/scgi";
@SERVER@
}
"""

# The block that is pasted from page to page. A proxy_pass with a variable cannot keep connections alive.
RECIPE = """\
    server {
        listen @ADDRESS@ backlog=1024;
        location / {
            proxy_pass @REGISTRY_URL@;
            proxy_set_header Host @REGISTRY@;
            proxy_set_header Authorization "Bearer @TOKEN@";
            proxy_ssl_server_name on;
            proxy_buffering off;
            proxy_intercept_errors on;
            recursive_error_pages on;
            error_page 301 302 307 = @handle_redirect;
        }
        location @handle_redirect {
            resolver 127.0.0.1;
            set $saved_redirect_location '$upstream_http_location';
            proxy_set_header Authorization "";
            proxy_ssl_server_name on;
            proxy_buffering off;
            proxy_pass $saved_redirect_location;
        }
    }
"""

# What nginx can do if one CDN is all there is: its address is fixed, so that connections to it are kept alive.
TUNED = """\
    upstream registry { server @REGISTRY@; keepalive 64; }
    upstream cdn { server @CDN@; keepalive 64; }
    proxy_ssl_protocols TLSv1.2 TLSv1.3;
    map $upstream_http_location $redirect_path { ~^https://[^/]+(?<path>/.*)$ $path; }
    server {
        listen @ADDRESS@ backlog=1024;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_ssl_server_name on;
        proxy_buffering on;
        proxy_buffer_size 64k;
        proxy_buffers 8 64k;
        proxy_busy_buffers_size 128k;
        proxy_max_temp_file_size 0;
        location / {
            proxy_pass https://registry;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host @REGISTRY@;
            proxy_set_header Authorization "Bearer @TOKEN@";
            proxy_intercept_errors on;
            error_page 301 302 307 = @cdn;
        }
        location @cdn {
            set $saved_redirect_path $redirect_path;
            proxy_set_header Connection "";
            proxy_set_header Host @CDN@;
            proxy_set_header Authorization "";
            proxy_pass https://cdn$saved_redirect_path;
        }
    }
"""


# nginx with files of its own, at the paths of the registry's API.
STATIC = """\
    server {
        listen @ADDRESS@ backlog=1024;
        root "@ROOT@";
        sendfile on;
        tcp_nopush on;
    }
"""

REGISTRY = """\
version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage:
  filesystem: {rootdirectory: "@FOLDER@"}
  cache: {blobdescriptor: inmemory}
http: {addr: "@ADDRESS@", secret: "of the measurements"}
proxy: {remoteurl: "@REMOTE@"}
"""


class Object(NamedTuple):
    """Name one blob or manifest of the hub; the size is in bytes, `accept` is the Accept header to ask with."""

    path: str
    digest: str
    size: int
    accept: str = ""

    def job(self, port: int, **more: Any) -> Job:
        """Return the job of pulling it from a port."""
        return Job(port, self.path, self.size, accept=self.accept, **more)


class Upstream(Protocol):
    """Be a running hub, near or far."""

    tokens: TokenService
    registry_url: str
    cdn_url: str
    ca_file: Path
    registries_file: Path


class Server(Protocol):
    """Be a running server: its port and URL at 127.0.0.1, and the process number of its master."""

    port: int
    url: str
    pid: int


@runtime_checkable
class Keeper(Server, Protocol):
    """Be a server that has, or comes to have, objects on its disk."""

    @abstractmethod
    def file(self, thing: Object) -> Path:
        """Return where it keeps an object."""


Start = Callable[[Upstream], AbstractContextManager[Server]]


class Checkout(Mirror):
    """Run the mirror of a working copy, this one or another, to compare two states of the code in one run."""

    def __init__(self, upstream: Upstream, folder: Path = ROOT, *options: str, **settings: Any):
        super().__init__(*options, registries=upstream.registries_file, **settings)
        self._folder = folder

    def __exit__(self, *error: Any) -> None:
        self.stop()  # what still runs would share memory with the next one
        super().__exit__(*error)

    def _command(self) -> list[str]:
        return ["env", "--chdir", str(self._folder), *super()._command()]


class Cached(Checkout):
    """Run the mirror with a cache, which goes with it unless it has a `store` already."""

    def __init__(self, upstream: Upstream, folder: Path = ROOT, *options: str, store: Path | None = None):
        self._files = ExitStack()
        self.store = store or temporary(self._files)
        super().__init__(upstream, folder, *options, cache_dir=self.store, cache_size="1T", cache_min_free="0")

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._files.close()

    def file(self, thing: Object) -> Path:
        """Return where it keeps an object."""
        return blob_path(self.store / "blobs", thing)


class Nginx:
    """Run nginx with the server block of a peer, and places for this many connections.

    gunicorn has 2,000 for clients, who take one for upstream each.
    """

    def __init__(self, upstream: Upstream, block: str, connections: int = 4000):
        self.port = free_port(HOST)
        self.url = f"http://{HOST}:{self.port}"
        self._upstream = upstream
        self._block = block
        self._connections = connections
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack:
            folder = temporary(self._stack)
            config = folder / "nginx.conf"
            config.write_text(self._config(folder))
            command = ["nginx", "-e", "stderr", "-p", str(folder), "-c", str(config)]
            process = self._stack.enter_context(Process(command, folder / "log"))
            self.pid = process.pid
            process.wait_until(self._listens)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _config(self, folder: Path) -> str:
        values = {
            "SERVER": self._block,
            "FOLDER": folder,
            # Started by root, nginx's worker would be another user, who cannot read a temporary directory.
            "USER": "user root root;" if os.geteuid() == 0 else "",
            "ADDRESS": f"{HOST}:{self.port}",
            "CONNECTIONS": self._connections,
            "REGISTRY_URL": self._upstream.registry_url,
            "REGISTRY": urlsplit(self._upstream.registry_url).netloc,
            "CDN": urlsplit(self._upstream.cdn_url).netloc,
            "TOKEN": pull_token(self._upstream.tokens),
        }
        return filled(NGINX_CONFIG, values)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((HOST, self.port)) == 0


class Static(Nginx):
    """Run nginx with files of its own. They are the very files of the hub: `link` puts one where it is asked for."""

    def __init__(self, upstream: Upstream) -> None:
        self._files = ExitStack()
        self.root = temporary(self._files)
        super().__init__(upstream, STATIC.replace("@ROOT@", str(self.root)))

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._files.close()

    def file(self, thing: Object) -> Path:
        """Return where it keeps an object."""
        return self.root / thing.path.removeprefix("/")

    def link(self, thing: Object, source: Path) -> None:
        """Take an object in."""
        self.file(thing).parent.mkdir(parents=True, exist_ok=True)
        self.file(thing).hardlink_to(source)


class Registry:
    """Run docker-registry as a pull-through cache of the hub."""

    def __init__(self, upstream: Upstream) -> None:
        self.port = free_port(HOST)
        self.url = f"http://{HOST}:{self.port}"
        self._upstream = upstream
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack:
            folder = temporary(self._stack)
            self.store = folder / "storage"
            config = folder / "config.yml"
            remote = self._upstream.registry_url
            values = {"FOLDER": self.store, "ADDRESS": f"{HOST}:{self.port}", "REMOTE": remote}
            config.write_text(filled(REGISTRY, values))
            environment = clean_environment({"SSL_CERT_FILE": str(self._upstream.ca_file)})
            process = Process(["docker-registry", "serve", str(config)], folder / "log", environment, folder)
            self.pid = self._stack.enter_context(process).pid
            process.wait_until(self._answers)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/v2/", timeout=5).status_code == 200
        except requests.ConnectionError:
            return False

    def file(self, thing: Object) -> Path:
        """Return where it keeps an object."""
        return blob_path(self.store / "docker/registry/v2/blobs", thing) / "data"


class Direct:
    """Be the hub itself, which a client asks without anything in between."""

    pid = port = 0

    def __init__(self, upstream: Upstream) -> None:
        self.url = upstream.registry_url
        self.token = pull_token(upstream.tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the hub as it is."""


def temporary(stack: ExitStack) -> Path:
    """Return a folder that goes with the stack."""
    return stack.enter_context(removed_afterwards(Path(tempfile.mkdtemp(prefix="bench-"))))


def blob_path(blobs: Path, thing: Object) -> Path:
    """Return where an object is below the folder of all blobs."""
    encoded = thing.digest.removeprefix("sha256:")
    return blobs / "sha256" / encoded[:2] / encoded


def filled(template: str, values: Mapping[str, object]) -> str:
    """Return a template with a value in place of each name between two @; values may hold names that come later."""
    for name, value in values.items():
        template = template.replace(f"@{name}@", str(value))
    return template


def keep(server: Keeper, thing: Object) -> None:
    """Return once a server has an object on its disk."""
    if not server.file(thing).exists():
        load(thing.job(server.port))
    wait_until_kept(server, thing)


def wait_until_kept(server: Keeper, thing: Object) -> None:
    """Return once a server that was asked for an object has it on its disk."""
    if not poll(lambda: is_whole(server.file(thing), thing.size), KEPT_SECONDS):
        raise LoadFailed(f"{thing.path} was not kept")


def is_whole(file: Path, size: int) -> bool:
    """Tell whether a file is there with all its bytes."""
    try:
        return file.stat().st_size == size
    except FileNotFoundError:
        return False


def pull_token(tokens: TokenService) -> str:
    """Return a token that lets its bearer pull the repositories of the measurements."""
    names = (REPOSITORY, *FAR_REPOSITORIES)
    return tokens.sign("", [{"type": "repository", "name": name, "actions": ["pull"]} for name in names])


# How each peer is started, by name. The mirror stands here without a cache and with one.
STARTS: dict[str, Start] = {
    "mirror": Checkout,
    "cached": Cached,
    "tuned": lambda upstream: Nginx(upstream, TUNED),
    "recipe": lambda upstream: Nginx(upstream, RECIPE),
    "registry": Registry,
    "static": Static,
    "direct": Direct,
}
