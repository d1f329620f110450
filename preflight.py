"""Look at a host for deploy.sh: what it needs before docker-mirror is installed, and whether it answers afterwards.

Before, nothing is there but the standard library and settings.py.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterable
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from typing import NamedTuple
from urllib.parse import urlsplit

from settings import DIRECT
from settings import Config
from settings import ConfigError
from settings import Registry
from settings import load_registries

OWNERS = Path("/etc/docker-mirror")  # the unit's WorkingDirectory=
ENVIRONMENT = OWNERS / "docker-mirror.env"
SERVICE = "docker-mirror.service"
SOCKET = "docker-mirror.socket"
UNIT = Path(__file__).parent / "systemd" / SERVICE
UNITS = Path("/etc/systemd/system")
RELEASES = Path("/opt/docker-mirror")
SYSTEMD = 252  # the version of Debian 12, whose LoadCredential= takes a folder
DISK = 200  # MB: two versions, and what pip needs meanwhile
SECONDS = 10  # that an endpoint has to shake hands
ANSWER_SECONDS = 40  # that the mirror has: it may ask a registry for 25


class Finding(NamedTuple):
    """Hold what was found; with a `fix` it is a problem. What could not be looked at is `skipped`."""

    text: str
    fix: str = ""
    skipped: bool = False

    def __str__(self) -> str:
        if self.fix:
            return "\n         ".join([f"problem  {self.text}", *self.fix.splitlines()])
        return f"{'skipped ' if self.skipped else 'ok      '} {self.text}"


def main() -> int:
    """Print all findings, and return 1 if one is a problem."""
    parser = argparse.ArgumentParser(description="Look at this host for docker-mirror.")
    parser.add_argument("--address", help="where the mirror listens, or shall listen")
    parser.add_argument("--host-only", action="store_true", help="do not ask the registries")
    parser.add_argument("--serving", action="store_true", help="only see whether the service answers")
    options = parser.parse_args()
    found = service() if options.serving else findings(options.address, options.host_only)
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
    yield from settings_and_registries(host_only)


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
                f"end what listens there (ss -ltnp), or name another address, as root, such as:\n{another_address()}",
            )
    return Finding(f"{address} is free")


def another_address() -> str:
    """Return the commands that name one; before the first installation there is no unit that systemctl could edit."""
    folder = UNITS / f"{SOCKET}.d"
    return (
        f"mkdir -p {folder}\nprintf '[Socket]\\nListenStream=\\nListenStream=127.0.0.1:5001\\n' >{folder}/address.conf"
    )


def disk(folder: Path) -> Finding:
    """See whether there is room."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free // 1_000_000
    if free < DISK:
        return Finding(f"{there} has {free} MB free", f"make room: {DISK} MB are needed")
    return Finding(f"{there} has {free} MB free")


def settings_and_registries(host_only: bool) -> Iterator[Finding]:
    """Read the owner's settings as the service would, and ask each endpoint of each registry."""
    try:
        config, registries = load()
    except NotSeenError as error:
        yield Finding(f"the settings and the registries are not checked: {error}", skipped=True)
        return
    except ConfigError as error:
        yield Finding(str(error), f"mend it in {ENVIRONMENT}, or in the file that it names.\n{READABLE}")
        return
    yield Finding(f"the settings: {ENVIRONMENT if ENVIRONMENT.exists() else 'the defaults'}")
    if not host_only:
        yield from endpoints(config, registries)


READABLE = (
    "The service is a user of its own: files that settings name must be readable for everyone, and not in /root or\n"
    f"/home; passwords and users for root alone are in {OWNERS}/credentials: see README, 'As a service'."
)


class NotSeenError(Exception):
    """Say why the owner's settings cannot be read."""


def load() -> tuple[Config, list[Registry]]:
    """Return settings and registries; raise ConfigError where they are wrong, and NotSeenError."""
    if os.access(OWNERS, os.X_OK):
        os.chdir(OWNERS)
    if not ENVIRONMENT.exists() and not drop_ins():
        config = Config.from_environ({})
        return config, list(load_registries(config).values())
    if os.geteuid():
        raise NotSeenError("only root can; run this with sudo")
    seen = read_as_the_service()
    if "error" in seen:
        raise ConfigError(seen["error"])
    config = Config(https_proxy=seen["https_proxy"], all_proxy=seen["all_proxy"])
    return config, [Registry(**values) for values in seen["registries"]]


def read_as_the_service() -> dict[str, Any]:
    """Let systemd run settings.py with the unit's environment, user, credentials and view of the disk.

    How systemd reads a file of variables, and what the service may read, is left to systemd.
    """
    options = (*(f"--property={line}" for line in unit_lines()), f"--setenv=PATH={os.defpath}")
    command = ["systemd-run", "--quiet", "--wait", "--pipe", "--collect", *options, sys.executable, "-B", "-"]
    program = (Path(__file__).parent / "settings.py").read_text(encoding="utf-8") + SHOW
    try:
        ended = subprocess.run(command, input=program, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
        return dict(json.loads(ended.stdout))
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotSeenError(str(error)) from None
    except ValueError:
        raise NotSeenError(
            (ended.stderr.strip().splitlines() or [f"systemd-run ended with {ended.returncode}"])[-1]
        ) from None


SHOW = """
import json
import os

try:
    config = Config.from_environ(os.environ)
    load_users(config)
    keys = ("name", "endpoints", "proxy", "ca_file")
    registries = [{key: getattr(registry, key) for key in keys} for registry in load_registries(config).values()]
    print(json.dumps({"https_proxy": config.https_proxy, "all_proxy": config.all_proxy, "registries": registries}))
except ConfigError as error:
    print(json.dumps({"error": str(error)}))
"""
# The lines of the unit that say what it sees, and as whom.
SEEN = re.compile(
    r"^\s*((?:DynamicUser|User|Group|SupplementaryGroups|Environment|EnvironmentFile|PassEnvironment|UnsetEnvironment"
    r"|LoadCredential|SetCredential|WorkingDirectory|ProtectHome|ProtectSystem|PrivateTmp|BindPaths|BindReadOnlyPaths"
    r"|InaccessiblePaths|TemporaryFileSystem|NoNewPrivileges|CapabilityBoundingSet)\s*=.*?)\s*$",
    re.M,
)


def unit_lines() -> Iterator[str]:
    """Yield these lines of the unit, and of the owner's changes to it."""
    for file in (UNIT, *drop_ins()):
        text = file.read_text(encoding="utf-8").replace("\\\n", " ")
        yield from (re.sub(r"\s*=\s*", "=", line, count=1) for line in SEEN.findall(text))


def drop_ins() -> list[Path]:
    """Return the owner's changes to the unit."""
    return sorted((UNITS / f"{SERVICE}.d").glob("*.conf"))


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


LOOK = "look at: journalctl --unit docker-mirror"


def service() -> Iterator[Finding]:
    """See whether the service answers, where systemd listens for it, under the path that its process has."""
    process = shown("MainPID", SERVICE)
    address = next((line.removesuffix(" (Stream)") for line in shown("Listen", SOCKET).splitlines()), "")
    try:
        prefix = Config.from_environ(environ_of(process)).path_prefix
    except (OSError, ConfigError):
        yield Finding(f"{SERVICE} does not run", LOOK)
        return
    yield from serving(address, prefix)


def shown(name: str, unit: str) -> str:
    """Return a property of a unit."""
    command = ["systemctl", "show", "--value", "--property", name, unit]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603


def environ_of(process: str | int) -> dict[str, str]:
    """Return the environment that a process was started with: not that of the files, which may be newer."""
    variables = Path(f"/proc/{process}/environ").read_text(encoding="utf-8", errors="surrogateescape").split("\0")
    return dict(variable.split("=", 1) for variable in variables if "=" in variable)


def serving(address: str, prefix: str = "") -> Iterator[Finding]:
    """See whether a mirror answers at an address, and yield one finding for `/healthz` and one for `/v2/`."""
    try:
        health = status(address, f"{prefix}/healthz")
        if health != 200:
            yield Finding(f"/healthz at {address} answers {health}", LOOK)
            return
        yield Finding(f"/healthz at {address}")
        ping = status(address, f"{prefix}/v2/")
    except (OSError, ValueError, http.client.HTTPException) as error:
        yield Finding(f"the mirror does not answer at {address}: {error}", LOOK)
        return
    if ping in UPSTREAM_FAILS:
        yield Finding(f"/v2/ answers {ping}: the mirror serves, but the registry does not; see ./deploy.sh check")
    else:
        yield Finding(f"/v2/ answers {ping}", "" if ping in ANSWERS else LOOK)


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
