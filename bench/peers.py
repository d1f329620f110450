"""The servers that are compared: each speaks plain HTTP to its clients and TLS to the hub, with one worker process.

The clients send no Authorization. The mirror gets its own token, as it does for any anonymous client; the nginx peers
have one in their configuration.
"""

import os
import socket
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol
from typing import Self
from urllib.parse import urlsplit

from hub import Hub
from processes import Process
from processes import free_port
from processes import removed_afterwards
from serving import Mirror

HOST = "127.0.0.1"
REPOSITORY = "library/bench"

# The frame of both nginx peers. worker_connections as gunicorn has them: one for the client and one for upstream.
NGINX_CONFIG = """\
daemon off;
worker_processes 1;
@USER@
pid "@FOLDER@/nginx.pid";
error_log stderr;
events { worker_connections 4000; }
http {
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


class Server(Protocol):
    """Be a running server: its port on 127.0.0.1, and the process number of its master."""

    port: int
    pid: int


Start = Callable[[Hub], AbstractContextManager[Server]]


class Checkout(Mirror):
    """Run the mirror of another working copy, to compare two states of the code in one run."""

    def __init__(self, folder: Path, *options: str, registries: Path):
        super().__init__(*options, registries=registries)
        self._folder = folder

    def _command(self) -> list[str]:
        return ["env", "--chdir", str(self._folder), *super()._command()]


class Nginx:
    """Run nginx with the server block of a peer."""

    def __init__(self, hub: Hub, block: str):
        self.port = free_port(HOST)
        self._hub = hub
        self._block = block
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack:
            folder = self._stack.enter_context(removed_afterwards(Path(tempfile.mkdtemp(prefix="nginx-"))))
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
            "@SERVER@": self._block,
            "@FOLDER@": str(folder),
            # Started by root, nginx's worker would be another user, who cannot read a temporary directory.
            "@USER@": "user root root;" if os.geteuid() == 0 else "",
            "@ADDRESS@": f"{HOST}:{self.port}",
            "@REGISTRY_URL@": self._hub.registry_url,
            "@REGISTRY@": urlsplit(self._hub.registry_url).netloc,
            "@CDN@": urlsplit(self._hub.cdn_url).netloc,
            "@TOKEN@": pull_token(self._hub),
        }
        config = NGINX_CONFIG
        for key, value in values.items():
            config = config.replace(key, value)
        return config

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((HOST, self.port)) == 0


def pull_token(hub: Hub) -> str:
    """Return a token that lets its bearer pull the repository of the measurements."""
    return hub.tokens.sign("", [{"type": "repository", "name": REPOSITORY, "actions": ["pull"]}])


def peers(also: list[Path]) -> dict[str, Start]:
    """Return how to start each peer, by name; `also` are working copies to compare with this one."""
    found: dict[str, Start] = {
        "mirror": lambda hub: Mirror(registries=hub.registries_file),
        "tuned": lambda hub: Nginx(hub, TUNED),
        "recipe": lambda hub: Nginx(hub, RECIPE),
    }
    for folder in also:
        found[folder.name] = _checkout(folder)
    return found


def _checkout(folder: Path) -> Start:
    return lambda hub: Checkout(folder, registries=hub.registries_file)
