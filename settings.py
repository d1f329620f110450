"""The settings of docker-mirror: environment variables ``MIRROR_*``, and the registries file that one of them names.

Nothing else reads the environment, and nothing is read at import. A wrong setting stops the start with one line.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import ssl
import tomllib
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from dataclasses import Field
from dataclasses import dataclass
from dataclasses import field
from dataclasses import fields
from dataclasses import replace
from pathlib import Path
from typing import Any
from typing import NamedTuple
from urllib.parse import SplitResult
from urllib.parse import urlsplit

PREFIX = "MIRROR_"


class ConfigError(Exception):
    """Say in one line which setting is wrong, and how to mend it. It stops the start."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # a name in the registries file may hold a line break


def parse_number(low: float, high: float, kind: Callable[[str], float] = int) -> Callable[[str], Any]:
    """Return a parser of numbers from `low` to `high`; it raises ValueError."""

    def parse(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
        if not low <= number <= high:  # also refuses nan
            raise ValueError(f"{text} is not between {low} and {high}")
        return number

    return parse


def parse_choice(**choices: Any) -> Callable[[str], Any]:
    """Return a parser of a few words, in any case, to their values; it raises ValueError."""

    def parse(text: str) -> Any:
        if text.lower() not in choices:
            raise ValueError(f"{text!r} is not one of: {', '.join(choices)}")
        return choices[text.lower()]

    return parse


def parse_url(text: str) -> str:
    """Return an http or https URL without its trailing slash; raise ValueError where it is not one."""
    parts = _split(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"[^\x21-\x7e]", text):
        shown = "this" if "@" in text else repr(text)  # there may be a password in it
        raise ValueError(f"{shown} is not a URL such as https://mirror.example")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("the URL has a user name, a query or a fragment: leave them out")
    return parts.geturl().rstrip("/")


def parse_address(text: str) -> str:
    """Return a URL without a path; raise ValueError where it is none."""
    url = parse_url(text)
    if urlsplit(url).path:
        raise ValueError(f"the URL has a path: leave it to {PREFIX}PATH_PREFIX")
    return url


def parse_path(text: str) -> str:
    """Return a path without its trailing slash; raise ValueError where it is none, or could not stand in every URL."""
    path = text.rstrip("/")
    if not re.fullmatch(r"(/(?!\.{1,2}(/|$))[A-Za-z0-9._~-]+)+", path):
        raise ValueError("must be a path such as /s3cret: letters, digits and . _ ~ - after each slash")
    if taken := [word for word in path.lower().split("/") if word in ROUTES]:
        raise ValueError(f"/{taken[0]} is a path of the mirror itself: choose a word that nobody guesses")
    return path


# The first words of the paths that the mirror serves.
ROUTES = ("v1", "v2", "token", "healthz", "readyz", "status", "metrics")


def parse_proxy(text: str) -> str:
    """Return a proxy's URL, which may hold a user and a password; raise ValueError where it is not one."""
    parts = _split(text)
    more = parts.path.strip("/") or parts.query or parts.fragment  # such as the rest of a password that is not quoted
    if parts.scheme not in PROXY_SCHEMES or not parts.hostname or more or re.search(r"[^\x21-\x7e]", text):
        raise ValueError(f"must be a URL such as socks5h://127.0.0.1:1080; schemes: {', '.join(PROXY_SCHEMES)}")
    return parts.geturl()


def _split(text: str) -> SplitResult:
    """Return the parts of a URL; raise ValueError that shows nothing of it, for there may be a password in it."""
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018 - raises ValueError for a port out of range
    except ValueError:
        raise ValueError("the URL's host, IPv6 address or port is not valid") from None
    return parts


def parse_list(text: str) -> tuple[str, ...]:
    """Return the words of a list with commas between them; raise ValueError where there is none."""
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    if not words:
        raise ValueError("names nothing: leave it out, or write words with commas between")
    return words


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def parse_networks(text: str) -> tuple[Network, ...]:
    """Return a list of addresses and networks (``192.0.2.0/24``); raise ValueError where one is none."""
    return tuple(_parse_network(word) for word in parse_list(text))


def _parse_network(word: str) -> Network:
    try:
        found = ipaddress.ip_interface(word)
    except ValueError:
        raise ValueError(f"{word!r} is no address and no network such as 192.0.2.0/24 or 2001:db8::/32") from None
    if found.ip != found.network.network_address:
        raise ValueError(f"{word} is an address within a network: write {found.ip} or {found.network}")
    mapped = getattr(found.ip, "ipv4_mapped", None)
    if mapped is not None and found.network.prefixlen >= 96:
        return ipaddress.IPv4Network((mapped, found.network.prefixlen - 96))
    return found.network


LOOPBACK = parse_networks("127.0.0.0/8, ::1")


def parse_viewers(text: str) -> tuple[Network, ...]:
    """Return a list of networks, empty for ``off``; raise ValueError where it is neither."""
    return () if text.lower() == "off" else parse_networks(text)


class Size(int):
    """Hold a number of bytes, and show it with K, M, G or T for powers of 1024."""

    def __str__(self) -> str:
        power = max(power for power in range(5) if not self % (1 << 10 * power))
        return f"{int(self) >> 10 * power}{' KMGT'[power].strip()}" if self else "0"


def parse_size(text: str) -> Size:
    """Return a number of bytes, written with K, M, G or T for powers of 1024; raise ValueError where it is none."""
    size = parse_free(text)
    if not size:
        raise ValueError(f"{text!r} is no size such as 500K, 10M or 1G")
    return size


def parse_free(text: str) -> Size:
    """Return a size that may be 0; raise ValueError where it is none."""
    found = re.fullmatch(r"([0-9]{1,15})([KMGT]?)(I?B)?", text.strip().upper())
    if not found:
        raise ValueError(f"{text!r} is no size such as 500K, 10M or 1G")
    return Size(int(found[1]) << 10 * " KMGT".index(found[2] or " "))


class Rate(NamedTuple):
    """Say how often something may happen: so many times (`amount`) within so many `seconds`."""

    amount: int
    seconds: int
    text: str

    def __str__(self) -> str:
        return self.text


UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}  # seconds


class Duration(int):
    """Hold a number of seconds, and show it with s, m, h or d."""

    def __str__(self) -> str:
        unit = max((unit for unit in UNITS if not self % UNITS[unit]), key=lambda unit: UNITS[unit])
        return f"{int(self) // UNITS[unit]}{unit}" if self else "0"


def parse_duration(text: str) -> Duration:
    """Return a time such as ``90``, ``60s`` or ``30d`` in seconds; raise ValueError where it is none."""
    found = re.fullmatch(r"([0-9]{1,9})([smhd]?)", text.replace(" ", "").lower())
    if not found:
        raise ValueError(f"{text!r} is no time such as 60s, 10m, 6h or 30d")
    return Duration(int(found[1]) * UNITS[found[2] or "s"])


def parse_age(text: str) -> Duration | None:
    """Return a time, or None for ``off``; raise ValueError where it is neither."""
    return None if text.lower() == "off" else parse_duration(text)


def parse_rate(text: str) -> Rate:
    """Return a rate such as ``100/6h`` or ``20/m``; raise ValueError where it is none."""
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{0,5})([smhd])", text.replace(" ", ""))
    if not found or not int(found[1]) or not int(found[2] or 1):
        raise ValueError(f"{text!r} is no rate such as 100/6h: a number, a slash, and a time in s, m, h or d")
    return Rate(int(found[1]), int(found[2] or 1) * UNITS[found[3]], found[0])


def parse_store(text: str) -> str:
    """Return the URL of a store that several processes share; raise ValueError where it is none."""
    if not re.fullmatch(r"(rediss?://([^\s/?#]*@)?[^\s/?#@]+|redis\+unix://([^\s/?#]*@)?/[^\s?#@]+)(/[0-9]*)?", text):
        raise ValueError("must be a URL such as redis://:password@127.0.0.1:6379/0; quote / ? # in the password")
    return text


def parse_folder(text: str) -> str:
    """Return the path of a folder, from the root; raise ValueError where it is none."""
    if not text.startswith("/") or "\0" in text:
        raise ValueError("must be a path from the root, such as /var/cache/docker-mirror")
    return text.rstrip("/").rstrip() or "/"


def parse_location(text: str) -> str:
    """Return the path of an nginx location that ends with a slash; raise ValueError where it is none."""
    if not re.fullmatch(r"/([A-Za-z0-9._~-]+/)+", text):
        raise ValueError("must be the path of an internal location, such as /protected/")
    return text


@dataclass(frozen=True)
class Home:
    """Say what the mirror shows at ``/``: usage, nginx, none, or a redirect to a URL, or a proxy of it."""

    kind: str
    url: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.url}" if self.url else self.kind


def parse_home(text: str) -> Home:
    """Return what is shown at ``/``; raise ValueError for what is no such thing."""
    word, colon, url = text.partition(":")
    kind = word.strip().lower()
    if kind in ("redirect", "proxy") and colon:
        return Home(kind, parse_url(url.strip()))
    if kind in ("usage", "nginx", "none") and not colon:
        return Home(kind)
    raise ValueError("must be one of: usage, nginx, none, redirect:URL, proxy:URL")


PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")


def setting(default: Any, parse: Callable[[str], Any], text: str, variable: str | None = None) -> Any:
    """Declare one setting: its default, the parser of its text, and the help that README's table shows.

    `variable` is set for those that other programs read too; all others are named after their field.
    """
    metadata = {"parse": parse, "help": text, "variable": variable}
    return field(default=default, repr=parse not in (parse_path, parse_proxy, parse_store), metadata=metadata)


seconds = parse_number(0.1, 3600, float)
switch = parse_choice(on=True, off=False)


@dataclass(frozen=True)
class Config:
    """Hold all settings, read from environment variables: ``MIRROR_`` + the field's name, or a well-known one."""

    public_url: str | None = setting(
        None, parse_address, "Address at which clients reach the mirror. Unset: the Host and scheme of each request."
    )
    path_prefix: str = setting(
        "", parse_path, "Secret path, such as `/s3cret`, under which all is served; elsewhere nothing is found."
    )
    proxies: int = setting(
        1,
        parse_number(0, 10),
        "TLS terminators in front of the mirror whose X-Forwarded-For, -Proto and -Host are believed. "
        "0: clients connect directly.",
    )
    terminators: tuple[Network, ...] = setting(
        LOOPBACK,
        parse_networks,
        "Addresses of these terminators; from any other address X-Forwarded-* is not believed.",
    )
    login: bool = setting(
        True,
        switch,
        "on: a client may log in, and its credentials go on to the registry. "
        "off: no challenge is ever sent, and no password comes here.",
    )
    users: str | None = setting(
        None,
        str,
        "htpasswd file (bcrypt) of the mirror's own users: nobody else may pull, and the mirror pulls as itself. "
        "MIRROR_LOGIN is off then.",
    )
    allow_clients: tuple[Network, ...] = setting((), parse_networks, "Clients that may pull, and no others.")
    deny_clients: tuple[Network, ...] = setting((), parse_networks, "Clients that may not.")
    allow_images: tuple[str, ...] = setting(
        (),
        parse_list,
        "Images that may be pulled, and no others: globs such as `docker.io/library/*`, `ghcr.io/me/app:1.*`.",
    )
    deny_images: tuple[str, ...] = setting((), parse_list, "Images that may not.")
    block_agents: tuple[str, ...] = setting(
        (),
        parse_list,
        "Parts of the User-Agent header by which crawlers and scanners are known: they see nginx's page.",
    )
    home: Home = setting(
        Home("usage"),
        parse_home,
        "What a browser sees at `/`: usage, nginx (its welcome page), none (404), `redirect:URL`, "
        "or `proxy:URL` (that site, shown here).",
    )
    status: tuple[Network, ...] = setting(
        LOOPBACK, parse_viewers, "Clients that see what the mirror does, at `/status`; off: nobody."
    )
    metrics: tuple[Network, ...] = setting(
        LOOPBACK, parse_viewers, "Clients that get its figures for Prometheus, at `/metrics`; off: nobody."
    )
    pull_rate: Rate | None = setting(
        None, parse_rate, "Manifests that one client (an IPv6 /64 is one) may get, such as `100/6h`; HEAD is free."
    )
    pull_rate_store: str | None = setting(
        None, parse_store, "Redis in which several hosts count together. Unset: each worker counts for itself."
    )
    transfers: int | None = setting(
        None, parse_number(1, 100_000), "Blob transfers that may run at a time, in each worker."
    )
    client_transfers: int | None = setting(
        None, parse_number(1, 100_000), "The same for one client; dockerd runs 4 at a time."
    )
    client_bandwidth: int | None = setting(
        None,
        parse_size,
        "Bytes per second for all blob transfers of one client together, such as `5M`, in each worker.",
    )
    registries: str | None = setting(None, str, "TOML file that adds, changes and switches off registries.")
    default: str = setting("docker.io", str, "Registry of names that name none, such as `nginx`.")
    connect_timeout: float = setting(5, seconds, "Seconds until a connection to upstream must stand.")
    first_byte_timeout: float = setting(20, seconds, "Seconds until upstream must begin to answer.")
    idle_timeout: float = setting(60, seconds, "Seconds that upstream may be silent within an answer.")
    verify: bool = setting(
        False,
        switch,
        "on: what is named by a digest is hashed as it passes, and never ends well with a wrong byte; "
        "clients do so themselves.",
    )
    cache_dir: str | None = setting(
        None, parse_folder, "Folder in which what was pulled is kept for everyone. Unset: nothing is kept."
    )
    cache_size: Size = setting(
        Size(10 << 30), parse_size, "Bytes that the cache may take; what was not used for longest goes first."
    )
    cache_min_free: Size = setting(
        Size(1 << 30), parse_free, "Bytes that the cache leaves free on its disk, whoever fills it."
    )
    cache_max_age: Duration | None = setting(
        None, parse_age, "Time without use after which something goes, such as `90d`; off: never."
    )
    cache_finish: bool = setting(
        True,
        switch,
        "on: a download into the cache goes on when its last client leaves. off: it stops, and is resumed.",
    )
    accel: str | None = setting(
        None,
        parse_location,
        "nginx's internal location of the cache's folder, such as `/protected/`: nginx then sends what is kept.",
    )
    tag_ttl: Duration = setting(
        Duration(60), parse_duration, "Time for which a kept tag is served without asking upstream whether it moved."
    )
    stale: Duration = setting(
        Duration(30 * 86400),
        parse_duration,
        "Time since then for which a kept tag is served while upstream is down, slow or limiting.",
    )
    ipv4_only: bool = setting(False, switch, "on: upstream is never reached by IPv6, for hosts where that is broken.")
    log_level: str = setting(
        "info",
        parse_choice(debug="debug", info="info", warning="warning", error="error"),
        "debug, info, warning or error; the access lines are info.",
    )
    https_proxy: str | None = setting(
        None, parse_proxy, "Outbound proxy for https: http, https, socks5 or socks5h.", "HTTPS_PROXY"
    )
    all_proxy: str | None = setting(
        None, parse_proxy, "Outbound proxy where HTTPS_PROXY is not set or not meant.", "ALL_PROXY"
    )
    no_proxy: str = setting(
        "", str, "Hosts, domains and networks that are reached without a proxy, with commas between.", "NO_PROXY"
    )
    credentials: str | None = setting(
        None,
        str,
        "Folder of `MIRROR_USERS` and of each `password_file`, where their path is relative; systemd sets it.",
        "CREDENTIALS_DIRECTORY",
    )

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Config:
        """Read the settings; an empty variable counts as unset.

        Raises ConfigError for an unknown ``MIRROR_`` variable or a value that cannot be read.
        """
        known = {variable(f): f for f in fields(cls)}
        values = {}
        for name in environ:
            if name.startswith(PREFIX) and name not in known:
                raise ConfigError(f"{name} is no setting{did_you_mean(name, known)}")
        for name, item in known.items():
            text = environ.get(name, "").strip()
            if not name.startswith(PREFIX):  # as curl and requests do, for both spellings are in use
                text = environ.get(name.lower(), "").strip() or text
            if text:
                values[item.name] = _parse(name, item.metadata["parse"], text)
        if "users" in values:
            if values.get("login"):
                raise ConfigError(
                    f"{PREFIX}USERS: logins are either the mirror's own users' or the registries' users':"
                    f" leave {PREFIX}LOGIN=on out, or this"
                )
            values["login"] = False
        if "pull_rate_store" in values and "pull_rate" not in values:
            raise ConfigError(f"{PREFIX}PULL_RATE_STORE: counts nothing without {PREFIX}PULL_RATE")
        for name in OF_THE_CACHE:
            if "cache_dir" not in values and values.get(name, getattr(cls, name)) != getattr(cls, name):
                raise ConfigError(f"{PREFIX}{name.upper()}: there is no cache without {PREFIX}CACHE_DIR")
        if values.get("terminators", LOOPBACK) != LOOPBACK and values.get("proxies") == 0:
            raise ConfigError(f"{PREFIX}TERMINATORS: {PREFIX}PROXIES=0 says that there are none")
        return cls(**values)


ENV_LINE = re.compile(
    r"""[ \t]*(?:
        [#;](?P<comment>[^\n]*)
      | (?P<name>[A-Za-z_][A-Za-z0-9_]*)[ \t]*=[ \t]*(?:
            '(?P<single>[^']*)'[ \t]*
          | "(?P<double>(?:[^"\\]|\\.)*)"[ \t]*
          | (?!['"])(?P<plain>(?:[^\\\n]|\\.)*)
        )
    )?(?:\n|\Z)""",
    re.VERBOSE | re.DOTALL,
)


def read_env_file(file: Path) -> dict[str, str]:
    """Return the variables of a file that systemd reads as EnvironmentFile=, by its rules of quotes and backslashes.

    What systemd would skip, or joins in another way, raises ConfigError, which shows no value: it may be a password.
    Source: systemd.exec(5).
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {getattr(error, 'strerror', None) or 'is no text'}") from None
    values, at = {}, 0
    while at < len(text):
        found = ENV_LINE.match(text, at)
        if found is None or "\0" in found[0] or (found["comment"] or "").endswith("\\"):
            raise ConfigError(
                f"{file}: line {text.count(chr(10), 0, at) + 1} is neither a comment nor NAME=value, with one pair of "
                "quotes around all of the value or none"
            )
        if found["name"]:
            values[found["name"]] = _unquoted(found)
        at = found.end()
    return values


def _unquoted(line: re.Match[str]) -> str:
    """Return the value of a line: the meaning of a backslash is another one within each kind of quotes."""
    if line["single"] is not None:
        return line["single"]
    if line["double"] is not None:
        return re.sub(r"\\(?:\n|([\"\\`$]))", lambda found: found[1] or "", line["double"])
    return re.sub(r"\\(?:\n|(.))", lambda found: found[1] or "", line["plain"]).strip()


OF_THE_CACHE = ("cache_size", "cache_min_free", "cache_max_age", "cache_finish", "accel", "tag_ttl", "stale")


def variable(item: Field[Any]) -> str:
    """Return the environment variable of a field of `Config`."""
    return item.metadata["variable"] or PREFIX + item.name.upper()


def did_you_mean(word: str, known: Collection[str]) -> str:
    """Return the end of a sentence about an unknown word: the nearest known one, or all of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.8)
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(known)}"


def _parse(name: str, parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


@dataclass(frozen=True)
class Registry:
    """Say where one registry is, how it is named here, and as whom it is asked.

    `endpoints` are base URLs, tried in order. `alias` is the first label of a Host that means this registry, `hosts`
    are whole ones. `realms` are token services that are trusted besides those on an endpoint's site. `username` and
    `password` are the mirror's own account. `images` are globs over repositories; empty: all. `search` is the base
    URL of an index for ``docker search``.
    """

    name: str
    endpoints: tuple[str, ...]
    alias: str | None = None
    hosts: tuple[str, ...] = ()
    realms: tuple[str, ...] = ()
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    images: tuple[str, ...] = ()
    proxy: str | None = field(default=None, repr=False)
    ca_file: str | None = None
    search: str | None = None


DOCKER_IO = "docker.io"
BUILT_IN = (
    Registry(DOCKER_IO, ("https://registry-1.docker.io",), "docker", search="https://index.docker.io"),
    Registry("ghcr.io", ("https://ghcr.io",), "ghcr"),
    Registry("quay.io", ("https://quay.io",), "quay"),
    Registry("gcr.io", ("https://gcr.io",), "gcr"),
    Registry("registry.k8s.io", ("https://registry.k8s.io",), "k8s"),
    Registry("k8s.gcr.io", ("https://registry.k8s.io",), "k8s-gcr"),  # frozen since 2023, an alias
    Registry("mcr.microsoft.com", ("https://mcr.microsoft.com",), "mcr"),
    Registry("nvcr.io", ("https://nvcr.io",), "nvcr"),
    Registry("docker.elastic.co", ("https://docker.elastic.co",), "elastic"),
    Registry("public.ecr.aws", ("https://public.ecr.aws",), "ecr"),
    Registry("lscr.io", ("https://ghcr.io",), "lscr"),  # lscr.io only counts, and redirects to ghcr.io
    Registry("docker.cloudsmith.io", ("https://docker.cloudsmith.io",), "cloudsmith"),
    Registry("registry.gitlab.com", ("https://registry.gitlab.com",), "gitlab"),
)


def load_registries(config: Config) -> dict[str, Registry]:
    """Return the registries by name: the built-in ones, changed by the file that the settings name.

    Raises ConfigError that names the file, the table and the key.
    """
    registries = {registry.name: registry for registry in BUILT_IN}
    for name, table in _read_file(config.registries).items():
        where = f'{config.registries}: ["{name}"]'
        if not isinstance(table, dict):
            raise ConfigError(f'{where} must be a table: write ["{name}"] on a line of its own')
        values = _read_table(where, table, config.credentials)
        if not values.pop("enabled", True):
            registries.pop(name, None)
            continue
        registries[name] = _changed(where, registries.get(name) or _new(where, name), values)
    _refuse_two_meanings(config.registries, registries)
    if config.default not in registries:
        raise ConfigError(f"{PREFIX}DEFAULT: {config.default} is no registry{did_you_mean(config.default, registries)}")
    return registries


def load_users(config: Config) -> dict[str, bytes]:
    """Return the mirror's own users and their bcrypt hashes; empty where it has none.

    Raises ConfigError that names the file and the line. Source: htpasswd(1), whose -B writes bcrypt.
    """
    if config.users is None:
        return {}
    where = f"{PREFIX}USERS: {config.users}"
    try:
        lines = _credential(config.users, config.credentials).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {getattr(error, 'strerror', None) or 'is no text'}") from None
    users: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        user, _, encoded = line.strip().partition(":")
        if not line.strip() or line.startswith("#"):
            continue
        if not user or not BCRYPT.fullmatch(encoded):
            raise ConfigError(f"{where}: line {number} is not USER:HASH with bcrypt, cost 4 to 14: use htpasswd -B")
        if user in users:
            raise ConfigError(f"{where}: line {number} names a user a second time")
        users[user] = encoded.encode()
    if not users:
        raise ConfigError(f"{where}: names nobody: write a user with htpasswd -B")
    return users


def _credential(file: str, credentials: str | None) -> Path:
    """Return where a secret is: systemd has copied it, and named it after its folder, or it still stands there."""
    path = Path(credentials or "") / file
    if credentials is None and not path.exists() and file.startswith("credentials_"):
        return Path("credentials") / file.removeprefix("credentials_")
    return path


BCRYPT = re.compile(r"\$2[aby]\$(0[4-9]|1[0-4])\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31}")


def _read_file(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # of a number with 5000 digits, and of "[[[[…"
        raise ConfigError(f"{PREFIX}REGISTRIES: {path}: {error}") from None


def _read_table(where: str, table: dict[str, Any], credentials: str | None) -> dict[str, Any]:
    values = {}
    for key, value in table.items():
        if key not in READERS:
            raise ConfigError(f"{where} {key} is no key{did_you_mean(key, READERS)}")
        try:
            values[key] = READERS[key](value)
            if key == "password_file":
                values[key] = _read_password(values[key], credentials)
        except ValueError as error:
            raise ConfigError(f"{where} {key}: {error}") from None
    return values


def _new(where: str, name: str) -> Registry:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[0-9]{1,5})?", name):
        raise ConfigError(f"{where} is no host name, which a registry is named after")
    return Registry(name, ())


def _changed(where: str, registry: Registry, values: dict[str, Any]) -> Registry:
    """Return a registry with the values of its table in place of its own."""
    if "password" in values and "password_file" in values:
        raise ConfigError(f"{where} has both password and password_file: leave one out")
    if "password_file" in values:
        values["password"] = values.pop("password_file")
    changed = replace(registry, **values)
    if not changed.endpoints:
        raise ConfigError(f'{where} endpoints is missing, such as ["https://{registry.name}"]')
    if (changed.username is None) != (changed.password is None):
        missing = "username" if changed.username is None else "password or password_file"
        raise ConfigError(f"{where} {missing} is missing: an account has both")
    return changed


def _refuse_two_meanings(path: str | None, registries: Mapping[str, Registry]) -> None:
    meanings: dict[str, str] = {}
    for name, registry in registries.items():
        for host in (*registry.hosts, *([registry.alias] if registry.alias else [])):
            other = meanings.setdefault(host, name)
            if other != name:
                raise ConfigError(f'{path}: ["{name}"] {host} means ["{other}"] already')


def _read_text(value: Any) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError("must be a text, and not empty")
    return value


def _read_list(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ValueError('must be a list of texts, such as ["a", "b"]')
    return tuple(value)


def _read_images(value: Any) -> tuple[str, ...]:
    images = _read_list(value)
    if not images:
        raise ValueError("must name at least one image; to serve none, write enabled = false")
    return images


def _read_urls(value: Any) -> tuple[str, ...]:
    return tuple(parse_url(item) for item in _read_list(value))


def _read_endpoints(value: Any) -> tuple[str, ...]:
    urls = _read_urls(value)
    if not urls or len(set(urls)) < len(urls):
        raise ValueError("must hold at least one URL, and none twice")
    return urls


def _read_hosts(value: Any) -> tuple[str, ...]:
    hosts = tuple(host.lower() for host in _read_list(value))
    if any(re.search(r"[/@\s]", host) for host in hosts):
        raise ValueError('must hold host names, such as "hub.example.com"')
    return hosts


def _read_alias(value: Any) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", _read_text(value)):
        raise ValueError(f"{value!r} is no label of a host name: lowercase letters, digits and - between them")
    return str(value)


def _read_switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _read_proxy(value: Any) -> str:
    return value if value == DIRECT else parse_proxy(_read_text(value))


def _read_password(file: str, credentials: str | None) -> str:
    """Return the first line of a password file; raise ValueError where there is none."""
    try:
        lines = _credential(file, credentials).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: {getattr(error, 'strerror', None) or 'is no text'}") from None
    if not lines or not lines[0]:
        raise ValueError(f"{file} is empty")
    return lines[0]


def _read_ca(value: Any) -> str:
    path = _read_text(value)
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:  # ssl.SSLError is one
        raise ValueError(f"{path}: {error.strerror or error}") from None
    return path


DIRECT = "direct"  # as a registry's proxy: none, whatever the environment says
READERS: Mapping[str, Callable[[Any], Any]] = {
    "endpoints": _read_endpoints,
    "alias": _read_alias,
    "hosts": _read_hosts,
    "realms": _read_urls,
    "username": _read_text,
    "password": _read_text,
    "password_file": _read_text,
    "images": _read_images,
    "proxy": _read_proxy,
    "ca_file": _read_ca,
    "search": lambda value: parse_url(_read_text(value)),
    "enabled": _read_switch,
}
