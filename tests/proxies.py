"""Run real outbound proxies on loopback addresses of their own: tinyproxy, for HTTP CONNECT, and microsocks.

A proxy connects from its own address, so that the registries' records tell who came through it. It may know host names
that nobody else knows: such a name is looked up by the proxy, or not at all.
"""

import os
import re
import select
import socket
import ssl
import tempfile
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import trustme
from parts import fill
from parts import server_context
from processes import Process
from processes import free_port

CONNECT_HOST = "127.0.0.8"
SOCKS_HOST = "127.0.0.9"
FRONT_HOST = "127.0.0.12"
USER = "alice-of-the-proxy"

TINYPROXY_CONF = """\
Port @PORT@
Listen @HOST@
Bind @HOST@
BasicAuth @USER@ @PASSWORD@
LogLevel Connect
Timeout 60
MaxClients 100
"""

# A mount namespace ends with the process: nobody else sees this /etc/hosts.
WITH_HOSTS = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"']


class Proxy:
    """Run one proxy until the end of the `with` block; it knows these names and their addresses."""

    host: str
    scheme: str
    password: str

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        self.port = free_port(self.host)
        self._names = names or {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack:
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="proxy-")))
            self._log = self._folder / "log"
            process = self._stack.enter_context(Process(self._wrapped(self.command()), self._log))
            process.wait_until(self._listens)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def command(self) -> list[str]:
        """Return the command that runs the proxy in the foreground."""
        raise NotImplementedError

    def url(self, scheme: str = "", password: str = "") -> str:
        """Return the proxy's URL with its user and password, or a wrong one, as in HTTPS_PROXY."""
        quoted = quote(password or self.password, safe="")
        return f"{scheme or self.scheme}://{USER}:{quoted}@{self.host}:{self.port}"

    def forget(self) -> None:
        """Clear the record."""
        os.truncate(self._log, 0)  # Process opened it with O_APPEND

    def _asked(self, pattern: str) -> set[str]:
        return set(re.findall(pattern, self._log.read_text(errors="replace")))

    def _listens(self) -> bool:
        try:
            socket.create_connection((self.host, self.port), timeout=5).close()
        except OSError:
            return False
        return True

    def _wrapped(self, command: list[str]) -> list[str]:
        if not self._names:
            return command
        hosts = self._folder / "hosts"
        hosts.write_text("".join(f"{address} {name}\n" for name, address in self._names.items()))
        return [*WITH_HOSTS, str(hosts), *command]


class ConnectProxy(Proxy):
    """Run tinyproxy, which speaks HTTP and asks for a password."""

    host = CONNECT_HOST
    scheme = "http"
    password = "curiouser-and-curiouser"  # tinyproxy takes hardly more than letters

    def command(self) -> list[str]:
        """Return the command that runs tinyproxy in the foreground."""
        values = {"host": self.host, "port": self.port, "user": USER, "password": self.password}
        return ["tinyproxy", "-d", "-c", str(fill(self._folder / "tinyproxy.conf", TINYPROXY_CONF, **values))]

    def asked(self) -> set[str]:
        """Return the hosts and ports to which it was to connect since the last forget()."""
        return self._asked(r": CONNECT (\S+) HTTP/")


class SocksProxy(Proxy):
    """Run microsocks, which speaks SOCKS5 and asks for a password."""

    host = SOCKS_HOST
    scheme = "socks5h"
    password = "eat:me/drink@me"

    def command(self) -> list[str]:
        """Return the command that runs microsocks in the foreground."""
        login = ["-u", USER, "-P", self.password]
        return ["microsocks", "-i", self.host, "-p", str(self.port), *login, "-b", self.host]

    def asked(self) -> set[str]:
        """Return the hosts and ports to which it connected since the last forget()."""
        return self._asked(r": connected to (\S+)")


class TlsFront:
    """Speak TLS in front of a proxy, as an `https://` proxy does; `connections` is their number so far."""

    def __init__(self, proxy: Proxy, authority: trustme.CA) -> None:
        self._proxy = proxy
        self._listener = socket.create_server((FRONT_HOST, 0), backlog=128)
        self._context = server_context(authority, FRONT_HOST)
        self.connections = 0

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def url(self) -> str:
        """Return the URL of the front, with the user and the password of the proxy behind it."""
        return f"https://{self._proxy.url().partition('://')[2].rpartition('@')[0]}@{FRONT_HOST}:{self._port()}"

    def _port(self) -> int:
        return int(self._listener.getsockname()[1])

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with (
                self._context.wrap_socket(connection, server_side=True) as front,
                socket.create_connection((self._proxy.host, self._proxy.port)) as back,
            ):
                self.connections += 1
                _pump(front, back)
        except OSError:
            connection.close()


def _pump(front: ssl.SSLSocket, back: socket.socket) -> None:
    """Pass bytes on in both directions until one side closes."""
    while True:
        readable = [front] if front.pending() else select.select([front, back], [], [])[0]
        for source in readable:
            data = source.recv(65536)
            if not data:
                return
            (back if source is front else front).sendall(data)
