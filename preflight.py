"""Look at a host for deploy.sh: what it needs before docker-mirror is installed, and whether it answers afterwards.

Before, nothing is there but the standard library and settings.py.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from settings import DIRECT
from settings import Config
from settings import ConfigError
from settings import Registry
from settings import load_registries
from settings import load_users

OWNERS = Path("/etc/docker-mirror")  # the unit's WorkingDirectory=
ENVIRONMENT = OWNERS / "docker-mirror.env"
CREDENTIALS = OWNERS / "credentials"
RELEASES = Path("/opt/docker-mirror")
SYSTEMD = 252  # the version of Debian 12, whose LoadCredential= takes a folder
DISK = 200  # MB: two versions, and what pip needs meanwhile
SECONDS = 10  # that an endpoint has to shake hands
ANSWER_SECONDS = 40  # that the mirror has: it may ask a registry for 25


class Finding(NamedTuple):
    """Hold what was found; with a `fix` it is a problem."""

    text: str
    fix: str = ""

    def __str__(self) -> str:
        return f"problem  {self.text}\n         {self.fix}" if self.fix else f"ok       {self.text}"


def main() -> int:
    """Print all findings, and return 1 if one is a problem."""
    parser = argparse.ArgumentParser(description="Look at this host for docker-mirror.")
    parser.add_argument("--address", help="where the mirror listens, or shall listen")
    parser.add_argument("--host-only", action="store_true", help="do not ask the registries")
    parser.add_argument("--serving", action="store_true", help="only see whether the mirror answers at the address")
    options = parser.parse_args()
    found = serving(options.address) if options.serving else findings(options.address, options.host_only)
    problems = 0
    for finding in found:
        print(finding, flush=True)
        problems += bool(finding.fix)
    return min(problems, 1)


def findings(address: str | None, host_only: bool) -> Iterator[Finding]:
    """Yield what is found on a host; nothing listens yet at `address`."""
    yield Finding(f"Python {sys.version.split()[0]}")
    yield venv()
    yield systemd()
    if address:
        yield listener(address)
    yield disk(RELEASES)
    if not host_only:
        yield from settings_and_registries()


def venv() -> Finding:
    """Look for what makes a venv; Debian has it in a package of its own."""
    if importlib.util.find_spec("ensurepip") and importlib.util.find_spec("venv"):
        return Finding("Python's venv module")
    return Finding("Python's venv module is missing", "apt-get install python3-venv")


def systemd() -> Finding:
    """Look for a running systemd."""
    if not Path("/run/systemd/system").is_dir():
        return Finding("systemd does not run here", "./deploy.sh run serves without it, in the foreground")
    shown = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=False).stdout  # noqa: S607
    version = int((re.search(r"\d+", shown) or ["0"])[0])
    if version < SYSTEMD:
        return Finding(
            f"systemd {version} is too old", f"systemd {SYSTEMD} is needed: Debian 12, Ubuntu 24.04 or newer"
        )
    return Finding(f"systemd {version}")


def listener(address: str) -> Finding:
    """See whether an address is free: HOST:PORT, PORT, or the path of a Unix socket."""
    if address.startswith(("/", "@")):
        return Finding(f"the socket {address}")
    host, _, port = address.rpartition(":")
    family = socket.AF_INET if "." in host else socket.AF_INET6
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]") or "::", int(port)))
            probe.listen()
        except OSError as error:
            return Finding(
                f"{address} cannot be had: {error.strerror}",
                "end what listens there (ss -ltnp), or name another ListenStream=: systemctl edit docker-mirror.socket",
            )
    return Finding(f"{address} is free")


def disk(folder: Path) -> Finding:
    """See whether there is room."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free // 1_000_000
    if free < DISK:
        return Finding(f"{there} has {free} MB free", f"make room: {DISK} MB are needed")
    return Finding(f"{there} has {free} MB free")


def settings_and_registries() -> Iterator[Finding]:
    """Read the owner's settings as the service would, and ask each endpoint of each registry."""
    try:
        config, registries = load()
    except ConfigError as error:
        yield Finding(
            str(error), f"mend it in {ENVIRONMENT}, or in the file that it names; some of them only root can read"
        )
        return
    yield Finding(f"the settings: {ENVIRONMENT if ENVIRONMENT.exists() else 'the defaults'}")
    yield from endpoints(config, registries.values())


def load() -> tuple[Config, Mapping[str, Registry]]:
    """Return settings and registries; raise ConfigError."""
    with tempfile.TemporaryDirectory() as folder:
        for file in CREDENTIALS.glob("*") if os.access(CREDENTIALS, os.R_OK) else []:
            (Path(folder) / f"credentials_{file.name}").symlink_to(file)  # as LoadCredential= names them
        if OWNERS.is_dir():
            os.chdir(OWNERS)
        config = Config.from_environ({"CREDENTIALS_DIRECTORY": folder, **read_environment(ENVIRONMENT)})
        load_users(config)
        return config, load_registries(config)


def read_environment(file: Path) -> dict[str, str]:
    """Return the variables of an EnvironmentFile=, as far as each stands on one line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    found = (re.fullmatch(r"\s*(\w+)=\s*(\"?)(.*?)\2\s*", line) for line in lines)
    return {line[1]: line[3] for line in found if line}


def endpoints(config: Config, registries: Iterable[Registry]) -> Iterator[Finding]:
    """Look each endpoint up and shake hands with it, all at a time."""
    with ThreadPoolExecutor(32) as pool:
        asked = [
            pool.submit(ask, registry, endpoint, registry.proxy or config.https_proxy or config.all_proxy)
            for registry in registries
            for endpoint in registry.endpoints
        ]
        yield from (future.result() for future in asked)


def ask(registry: Registry, endpoint: str, proxy: str | None) -> Finding:
    """Look one endpoint up and shake hands with it."""
    url = urlsplit(endpoint)
    host, name = url.hostname or "", f"{registry.name}: {url.netloc}"
    elsewhere = "name another endpoint, a proxy, or enabled = false for it in the registries file"
    if proxy and proxy != DIRECT:
        return Finding(f"{name} is asked through a proxy, and not checked")
    try:
        with socket.create_connection(
            (host, url.port or (443 if url.scheme == "https" else 80)), SECONDS
        ) as connection:
            if url.scheme == "https":
                context = ssl.create_default_context()
                if registry.ca_file:
                    context.load_verify_locations(registry.ca_file)
                context.wrap_socket(connection, server_hostname=host).close()
    except socket.gaierror:
        return Finding(f"{name} is not found", f"see that DNS works here (/etc/resolv.conf); else {elsewhere}")
    except ssl.SSLCertVerificationError as error:
        return Finding(
            f"{name} has no valid certificate: {error.verify_message}",
            f"see that the clock is right, and that ca-certificates is installed; else set ca_file, or {elsewhere}",
        )
    except OSError as error:
        return Finding(f"{name} cannot be reached: {error.strerror or error}", elsewhere)
    return Finding(name)


def serving(address: str) -> Iterator[Finding]:
    """See whether the mirror answers at its address, and yield one finding for `/healthz` and one for `/v2/`."""
    look = "look at: journalctl --unit docker-mirror"
    try:
        prefix = read_environment(ENVIRONMENT).get("MIRROR_PATH_PREFIX", "").rstrip("/")
        health = status(address, f"{prefix}/healthz")
        if health != 200:
            yield Finding(f"/healthz at {address} answers {health}", look)
            return
        yield Finding(f"/healthz at {address}")
        ping = status(address, f"{prefix}/v2/")
    except (OSError, http.client.HTTPException) as error:
        yield Finding(f"the mirror does not answer at {address}: {error}", look)
        return
    if ping in UPSTREAM_FAILS:
        yield Finding(f"/v2/ answers {ping}: the mirror serves, but the registry does not; see ./deploy.sh check")
    else:
        yield Finding(f"/v2/ answers {ping}", "" if ping in ANSWERS else look)


UPSTREAM_FAILS = (429, 502, 503, 504)
ANSWERS = (200, 401, 403)  # 403: only listed clients may pull, and this host is none


def status(address: str, path: str) -> int:
    """Return the status of an answer; raise OSError or HTTPException where there is none."""
    connection = http.client.HTTPConnection("localhost")
    connection.sock = connect(address)
    with closing(connection):
        connection.request("GET", path)
        return connection.getresponse().status


def connect(address: str) -> socket.socket:
    """Return a connection to HOST:PORT, to a PORT of this host, or to the path of a Unix socket."""
    if address.startswith(("/", "@")):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(ANSWER_SECONDS)
        connection.connect(address.replace("@", "\0", 1))
        return connection
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]") or "localhost", int(port)), ANSWER_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
