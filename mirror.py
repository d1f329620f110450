"""A pull mirror of container registries for a small host.

One ``docker pull nginx`` from end to end:

1. The client asks ``GET /v2/``. The mirror answers 401 with a challenge that names the mirror itself
   (`Views.ping`, `Challenge.at`), built from the one that the registry gave.
2. The client asks ``GET /token``. Without credentials it gets the word ``anonymous`` at once (`Views.token`); with
   credentials the question goes on to the registry's real realm and its answer comes back as it is.
3. The client asks ``HEAD`` and ``GET /v2/library/nginx/manifests/…``, then the blobs. The names are checked and
   completed (`Router.resolve`), the endpoints are asked in order (`Upstream.fetch`): with the mirror's own token for an
   anonymous client, with the client's own for one that is logged in. Redirects are followed here, not by the client.
4. Status, an allowlist of headers and the bytes go back to the client (`relay`, `Body`).

What always holds:

- No blob is ever held whole, and no byte of a manifest or blob is ever changed.
- A client's Authorization goes to the registry's first endpoint and its realm only: to no other host, and to no log.
- The mirror's own tokens never leave it.
- An answer that broke off upstream breaks off here too: a short body never ends cleanly.

The module reads from top to bottom; each section uses only what stands above it. It runs under gunicorn's gevent
workers: waiting is cooperative, and the time limits are gevent's.
"""

from __future__ import annotations

import errno
import http.client
import ipaddress
import json
import logging
import math
import re
import socket
import ssl
import struct
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from datetime import UTC
from datetime import datetime
from fnmatch import fnmatchcase
from functools import partial
from typing import Any
from typing import NamedTuple
from typing import cast
from urllib.parse import quote
from urllib.parse import urlencode
from urllib.parse import urljoin
from urllib.parse import urlsplit

import certifi
import gevent
import gevent.ssl
import requests
import urllib3
from flask import Flask
from flask import Response
from flask import g
from flask import request
from greenlet import greenlet
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from requests.utils import parse_header_links
from requests.utils import should_bypass_proxies
from urllib3.connection import HTTPConnection
from urllib3.exceptions import ConnectTimeoutError
from urllib3.exceptions import NameResolutionError
from urllib3.exceptions import NewConnectionError
from urllib3.poolmanager import PoolManager
from werkzeug.datastructures import Authorization
from werkzeug.datastructures import Headers
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import HTTPException
from werkzeug.http import parse_date
from werkzeug.http import parse_options_header
from werkzeug.http import parse_range_header
from werkzeug.http import quote_header_value
from werkzeug.middleware.proxy_fix import ProxyFix

from settings import DIRECT
from settings import DOCKER_IO
from settings import Config
from settings import Registry
from settings import load_registries

__version__ = "0.1.0"

log = logging.getLogger("docker-mirror")

# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


class MirrorError(Exception):
    """Be answered to the client as OCI JSON; each subclass is one row of the table of answers.

    `message` is shown to the user. `headers` are sent along. `errors`, where upstream gave such a list, is sent in
    place of our own. Source: OCI distribution spec, "Error Codes".
    """

    status: int = 500
    code: str = "UNKNOWN"
    cools = True  # whether the endpoint that failed so is left alone for a while

    def __init__(
        self,
        message: str = "the mirror failed; its log says why",
        headers: Mapping[str, str] | None = None,
        errors: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(message)
        self.headers = dict(headers or {})
        self.errors = errors or [{"code": self.code, "message": message, "detail": None}]


class NameInvalid(MirrorError):
    """Refuse what is no repository's name."""

    status = 400
    code = "NAME_INVALID"


class DigestInvalid(MirrorError):
    """Refuse what is no digest."""

    status = 400
    code = "DIGEST_INVALID"


class ManifestInvalid(MirrorError):
    """Refuse what is neither a tag nor a digest."""

    status = 400
    code = "MANIFEST_INVALID"


class BadRequest(MirrorError):
    """Refuse any other request that makes no sense."""

    status = 400
    code = "UNSUPPORTED"


class Refused(MirrorError):
    """Pass a refusal of upstream on that has no row of its own, with its status.

    405 to HEAD makes containerd try GET, and 408 makes it try again.
    """

    code = "UNSUPPORTED"

    def __init__(
        self, status: int, message: str, headers: Mapping[str, str], errors: list[dict[str, Any]] | None
    ) -> None:
        super().__init__(message, headers, errors)
        self.status = status


class ClientLeft(MirrorError):
    """Stand in the access line of a client that went away before it got an answer; the status is nginx's."""

    status = 499
    code = "CANCELLED"


class Unauthorized(MirrorError):
    """Be answered with our own challenge, of which `challenge` holds all but the realm."""

    status = 401
    code = "UNAUTHORIZED"

    def __init__(self, message: str, challenge: Challenge, errors: list[dict[str, Any]] | None = None) -> None:
        super().__init__(message, errors=errors)
        self.challenge = challenge


class Denied(MirrorError):
    """Refuse what this client, or everyone, may not have."""

    status = 403
    code = "DENIED"


class NotFound(MirrorError):
    """Say that there is no such repository."""

    status = 404
    code = "NAME_UNKNOWN"


class ManifestUnknown(NotFound):
    """Say that there is no such manifest."""

    code = "MANIFEST_UNKNOWN"


class BlobUnknown(NotFound):
    """Say that there is no such blob."""

    code = "BLOB_UNKNOWN"


class Unsupported(MirrorError):
    """Refuse what a mirror for pulls does not do."""

    status = 405
    code = "UNSUPPORTED"


class RangeInvalid(MirrorError):
    """Refuse a range outside the blob."""

    status = 416
    code = "RANGE_INVALID"


class TooManyRequests(MirrorError):
    """Say that upstream limits the mirror; Retry-After tells for how long."""

    status = 429
    code = "TOOMANYREQUESTS"


class BadGateway(MirrorError):
    """Say that upstream cannot be reached, or that it failed."""

    status = 502
    code = "UNAVAILABLE"


class Cooling(MirrorError):
    """Say that upstream is left alone for a while, because it failed; Retry-After tells for how long."""

    status = 503
    code = "UNAVAILABLE"


class GatewayTimeout(MirrorError):
    """Say that upstream did not answer in time."""

    status = 504
    code = "UNAVAILABLE"


# UnicodeError: a host name that cannot be looked up, such as one with a label of 70 letters.
UPSTREAM_FAILURES = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
    UnicodeError,
)


@contextmanager
def upstream_errors(host: str) -> Iterator[None]:
    """Turn what requests, urllib3 and the socket raise about `host` into BadGateway or GatewayTimeout."""
    try:
        yield
    except UPSTREAM_FAILURES as error:
        if isinstance(error, (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)):
            raise GatewayTimeout(f"{host} did not answer in time") from error
        raise BadGateway(f"{host}: {root_cause(error)}") from error


def root_cause(error: BaseException) -> str:
    """Return the innermost reason of an error of requests or urllib3, fit for a log and for a client.

    The outer ones hold the whole URL, and with it a signed query or a token's scope. What upstream sent is not shown
    either: a status line may be a web page.
    """
    inner = getattr(error, "reason", None) or next((a for a in reversed(error.args) if isinstance(a, Exception)), None)
    if isinstance(inner, Exception):
        return root_cause(inner)
    if isinstance(error, http.client.HTTPException) and not isinstance(error, ConnectionError):
        return f"this is no HTTP ({type(error).__name__})"
    text = str(error).rpartition(": ")[2] if isinstance(error, urllib3.exceptions.HTTPError) else str(error)
    return "".join(character for character in text[:200] if character.isprintable())


# ---------------------------------------------------------------------------------------------------------------------
# Routing
# ---------------------------------------------------------------------------------------------------------------------

# OCI distribution spec, "Pulling manifests" and "Digests" (image spec, descriptor.md).
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
NAME = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
DIGEST = re.compile(r"[a-z0-9]+(?:[+._-][a-z0-9]+)*:[A-Za-z0-9=_-]+")
HEX_DIGITS = {"sha256": 64, "sha512": 128}
HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]{0,253})|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
MAX_NAME = 255  # the spec's advice: many clients limit host and name together to 255


def is_address(host: str) -> bool:
    """Tell whether a host is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class Target(NamedTuple):
    """Name what is asked for: a repository, by the registry's own name of it, of a registry.

    `prefix` is what stands before that name in the client's paths and scopes: ``ghcr.io/`` or nothing.
    """

    registry: Registry
    repository: str
    prefix: str = ""


class Router:
    """Find the registry that a request means. What is not served here is refused: the mirror is no open proxy."""

    def __init__(self, registries: Mapping[str, Registry], default: str) -> None:
        self._registries = registries
        self.default = registries[default]
        self.searched = self.default if self.default.search else registries.get(DOCKER_IO, self.default)
        self._hosts = {host: registry for registry in registries.values() for host in registry.hosts}
        self._aliases = {registry.alias: registry for registry in registries.values() if registry.alias}

    def named(self, name: str) -> Registry:
        """Return the registry of that name; raise Denied if it is not served."""
        if name not in self._registries:
            raise Denied(f"this mirror does not serve that registry; it serves: {', '.join(self._registries)}")
        return self._registries[name]

    def by_host(self, host: str) -> Registry | None:
        """Return the registry that a Host header means: one of a registry's hosts, or its alias as the first label."""
        return self._listed(host) or self._aliased(host)

    def resolve(self, host: str, ns: str | None, name: str) -> Target:
        """Return the registry and repository that a request means.

        `ns` is containerd's query argument, `name` the repository's name in the path. A path may name a registry at an
        alias too: the mirror's own name may be docker.example.com. Raises NameInvalid, and Denied for a registry or an
        image that is not served.
        """
        check_name(name)
        registry = self.named(ns) if ns is not None else self._listed(host)
        if registry is None:
            return self._by_path(name, self._aliased(host) or self.default)
        prefix = f"{registry.name}/" if name.startswith(f"{registry.name}/") else ""
        return _target(registry, name, prefix)

    def _listed(self, host: str) -> Registry | None:
        return self._hosts.get(host.lower()) or self._hosts.get(_bare(host))

    def _aliased(self, host: str) -> Registry | None:
        label, dot, _ = _bare(host).partition(".")
        return self._aliases.get(label) if dot and not is_address(_bare(host)) else None

    def _by_path(self, name: str, default: Registry) -> Target:
        """Return what a name means whose first component may be a registry: ``ghcr.io/owner/image``, or ``nginx``."""
        first, slash, _ = name.partition("/")
        if slash and first in self._registries:
            return _target(self._registries[first], name, f"{first}/")
        if slash and "." in first and default.name == DOCKER_IO:  # no owner at Docker Hub has a dot
            self.named(first)
        return _target(default, name, "")


def _bare(host: str) -> str:
    return re.sub(r":[0-9]+$", "", host.lower())


def _target(registry: Registry, name: str, prefix: str) -> Target:
    repository = complete(registry, name.removeprefix(prefix))
    patterns = (pattern if "*" in pattern else complete(registry, pattern) for pattern in registry.images)
    if registry.images and not any(fnmatchcase(repository, pattern) for pattern in patterns):
        raise Denied(f"this mirror does not serve that image of {registry.name}")
    return Target(registry, repository, prefix)


def complete(registry: Registry, name: str) -> str:
    """Return the full name of a repository: at Docker Hub, ``nginx`` is ``library/nginx``."""
    return f"library/{name}" if registry.name == DOCKER_IO and "/" not in name else name


def check_name(name: str) -> str:
    """Return `name` if it is a repository's name by the spec's grammar; raise NameInvalid."""
    if len(name) > MAX_NAME or not NAME.fullmatch(name):
        raise NameInvalid("the repository's name is not valid: lowercase letters, digits, and . _ - / between them")
    return name


def check_digest(digest: str) -> str:
    """Return `digest` if it is one, such as ``sha256:`` and 64 hexadecimal digits; raise DigestInvalid."""
    algorithm, _, encoded = digest.partition(":")
    size = HEX_DIGITS.get(algorithm)
    if len(digest) > MAX_NAME or not DIGEST.fullmatch(digest):
        raise DigestInvalid("the digest is not valid: it is written algorithm:hex")
    if size is not None and not re.fullmatch(f"[a-f0-9]{{{size}}}", encoded):
        raise DigestInvalid(f"a digest of {algorithm} has {size} lowercase hexadecimal digits")
    return digest


def check_reference(reference: str) -> str:
    """Return `reference` if it is a tag or a digest; raise ManifestInvalid or DigestInvalid."""
    if ":" in reference:
        return check_digest(reference)
    if not TAG.fullmatch(reference):
        raise ManifestInvalid("the tag is not valid: at most 128 letters, digits, and . _ -")
    return reference


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------

CHALLENGE_KEYS = ("service", "scope", "error", "error_description")
PRINTABLE = re.compile(r"[\x20-\x7e]+")
ANONYMOUS = "anonymous"
ANONYMOUS_SECONDS = 3600
DEFAULT_TOKEN_SECONDS = 60  # token spec: "If omitted, this defaults to 60 seconds"
MAX_TOKENS = 1000


class Challenge(NamedTuple):
    """Hold a registry's challenge: its realm, all its other parameters, and its scheme, ``bearer`` or ``basic``."""

    realm: str
    parameters: Mapping[str, str]
    scheme: str = "bearer"

    @classmethod
    def parse(cls, headers: list[str]) -> Challenge | None:
        """Return the Bearer challenge among the values of WWW-Authenticate, else a Basic one, else None."""
        found = [parsed for header in headers if (parsed := WWWAuthenticate.from_header(header))]
        for scheme in ("bearer", "basic"):
            for one in found:
                if one.type == scheme:
                    given = {key.lower(): value for key, value in one.parameters.items()}
                    parameters = {
                        key: str(given[key]) for key in CHALLENGE_KEYS if PRINTABLE.fullmatch(given.get(key) or "")
                    }
                    realm = str(given.get("realm", ""))
                    return cls(realm if PRINTABLE.fullmatch(realm) else "", parameters, scheme)
        return None

    def at(self, realm: str) -> str:
        """Return the header's value that names another realm. All is quoted: some clients read it by pattern."""
        parameters = {"realm": realm, **self.parameters}
        written = (f"{key}={quote_header_value(value, allow_token=False)}" for key, value in parameters.items())
        return f"{self.scheme.title()} {','.join(written)}"

    def token_url(self, scope: str) -> str:
        """Return where a token for `scope` is to be had. The realm may carry a query already (nvcr.io)."""
        query = {"service": self.parameters.get("service"), "scope": scope}
        return with_query(self.realm, {key: value for key, value in query.items() if value})


def with_query(url: str, query: Mapping[str, Any]) -> str:
    """Return `url` with more arguments in its query; a value may be a list."""
    joint = "&" if urlsplit(url).query else "?"
    return url + joint + urlencode(query, doseq=True) if query else url


def pull_scope(repository: str) -> str:
    """Return the scope that a pull needs."""
    return f"repository:{repository}:pull"


def map_scope(scope: str, change: Callable[[str], str]) -> str:
    """Return a scope parameter (one scope, or several with spaces between) with each repository's name changed."""
    return " ".join(_map_one(one, change) for one in scope.split(" "))


def _map_one(scope: str, change: Callable[[str], str]) -> str:
    kind, _, rest = scope.partition(":")
    name, _, actions = rest.rpartition(":")
    return f"{kind}:{change(name)}:{actions}" if kind.startswith("repository") else scope


def check_realm(registry: Registry, endpoint: str, realm: str) -> None:
    """Raise BadGateway unless tokens may be asked for at `realm`, to which a client's password would go.

    It must be https (unless the endpoint itself is not), on the endpoint's own site, or one of the registry's `realms`.
    """
    try:
        parts, own, asked = urlsplit(realm), urlsplit(endpoint), origin(realm)
        listed = any(asked == origin(url) for url in registry.realms)
    except ValueError:
        raise BadGateway(f"{registry.name} names a realm that is no URL") from None
    if parts.scheme != "https" and parts.scheme != own.scheme:
        raise BadGateway(f"{registry.name} names a realm that is not https")
    if not listed and not same_site(parts.hostname or "", own.hostname or ""):
        raise BadGateway(
            f"{registry.name} names a realm on a foreign host, {parts.hostname}; is it to be in its realms?"
        )


def same_site(host: str, endpoint_host: str) -> bool:
    """Tell whether `host` is the endpoint's own, its parent domain, or another one under that parent."""
    parent = endpoint_host.partition(".")[2]
    if host == endpoint_host:
        return True
    return "." in parent and not is_address(endpoint_host) and f".{host}".endswith(f".{parent}")


def origin(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port of a URL: a credential never goes from one origin to another."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


class Token(NamedTuple):
    """Hold one of the mirror's own tokens; `renew_at` is in seconds of time.monotonic()."""

    value: str
    renew_at: float

    @classmethod
    def parse(cls, body: bytes, asked_at: float) -> Token:
        """Read the answer of a token endpoint; raise ValueError where it holds no token."""
        answer = json.loads(body)
        value = isinstance(answer, dict) and (answer.get("token") or answer.get("access_token"))
        if not isinstance(value, str) or not re.fullmatch(r"[\x21-\x7e]+", value):
            raise ValueError("no token in the answer")
        lifetime = answer.get("expires_in")
        if not isinstance(lifetime, (int, float)) or not 0 < lifetime < 1e9:
            lifetime = DEFAULT_TOKEN_SECONDS
        return cls(value, asked_at + 0.9 * lifetime)


class TokenStore:
    """Keep the mirror's own tokens, one for each registry, site and scope, shared by all clients."""

    def __init__(self) -> None:
        self._tokens: dict[tuple[str, ...], Token] = {}
        self._running: dict[tuple[str, ...], gevent.Greenlet[..., Token | MirrorError]] = {}

    def get(self, key: tuple[str, ...], fetch: Callable[[], Token]) -> str:
        """Return the token for `key`. However many ask, `fetch` runs once; its MirrorError reaches all.

        It runs in a greenlet of its own: the one who asked first may run out of time, or leave.
        """
        token = self._tokens.get(key)
        if token is not None and time.monotonic() < token.renew_at:
            return token.value
        if key not in self._running:
            self._running[key] = gevent.spawn(self._fill, key, fetch)
        found = self._running[key].get()
        if isinstance(found, Token):
            return found.value
        raise found

    def _fill(self, key: tuple[str, ...], fetch: Callable[[], Token]) -> Token | MirrorError:
        try:
            token = fetch()
        except MirrorError as error:
            return error
        else:
            self._keep(key, token)
            return token
        finally:
            del self._running[key]

    def _keep(self, key: tuple[str, ...], token: Token) -> None:
        self._tokens.pop(key, None)  # it goes to the end: the first is the oldest
        self._tokens[key] = token
        if len(self._tokens) > MAX_TOKENS:
            del self._tokens[next(iter(self._tokens))]

    def drop(self, key: tuple[str, ...], value: str) -> None:
        """Forget the token `value`, which the registry refused; a newer one stays."""
        if key in self._tokens and self._tokens[key].value == value:
            del self._tokens[key]


# ---------------------------------------------------------------------------------------------------------------------
# Upstream
# ---------------------------------------------------------------------------------------------------------------------

USER_AGENT = f"docker-mirror/{__version__}"
VIA = "docker-mirror"
REDIRECTS = frozenset((301, 302, 303, 307, 308))
MAX_REDIRECTS = 5
TLS_RECORD = 16 << 10  # bytes, at most
PING_SECONDS = 12  # dockerd waits 15
OPEN_SECONDS = 60  # for which a registry is taken to ask for nothing: a false 200 must not last
MAX_FOREIGN_BODY = 1 << 20  # of a token answer, an error, a redirect: whatever is read whole
MAX_INTERIM = 10  # of answers 1xx before the real one
CHUNKS_AT_ONCE = 256  # until other requests have their turn
MAX_TAGS = 16 << 20  # bytes of a list of tags, which may be renamed: gcr.io lists all digests in it
RETRY_AFTER = "60"  # seconds, where upstream limits and does not say how long
MAX_RETRY_AFTER = 6 * 3600.0  # seconds: Docker Hub's window
KEEP_ON_ERROR = ("Retry-After", "Content-Range", "RateLimit-Limit", "RateLimit-Remaining")
FIRST_CHUNK, SLOW_CHUNK, FAST_CHUNK = 32 << 10, 16 << 10, 256 << 10  # bytes
HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")


class Trail:
    """Note which hosts are asked, for the access line: ``>`` stands before one that was redirected to."""

    def __init__(self) -> None:
        self._text = ""

    def __str__(self) -> str:
        return self._text or "-"

    def ask(self, url: str) -> None:
        """Note an endpoint."""
        self._text += ("," if self._text else "") + host_of(url)

    def redirect(self, url: str) -> None:
        """Note where it redirected to."""
        self._text += ">" + host_of(url)


class Wanted(NamedTuple):
    """Say what a client wants of a repository, and as whom.

    `resource` is the path after the repository's name; `headers` go upstream as they are; `authorization` is the
    client's own, or None where the mirror acts as itself; `missing` is the error that a 404 stands for;
    `whole` asks for the body to be read at once.
    """

    target: Target
    method: str
    resource: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    authorization: str | None
    missing: type[NotFound]
    trail: Trail
    whole: bool = False


class Site(NamedTuple):
    """Name a registry's API at one base URL, and the repository that is asked for there.

    `account` is a Basic header of the mirror's own account. It is set for the registry's first endpoint only: another
    one may be anybody's mirror.
    """

    registry: Registry
    base: str
    repository: str = ""
    account: str | None = None

    @classmethod
    def endpoint(cls, registry: Registry, number: int, repository: str = "") -> Site:
        """Return one of the registry's endpoints."""
        account = None
        if number == 0 and registry.username is not None:
            credentials = {"username": registry.username, "password": registry.password}
            account = Authorization("basic", credentials).to_header()
        return cls(registry, registry.endpoints[number], repository, account)

    @classmethod
    def beyond(cls, registry: Registry, url: str) -> Site | None:
        """Return the other registry that a redirect leads to (registry.k8s.io does so), None for a storage host."""
        found = re.match(r"(https?://[^/]+)/v2/([^?]+)/(?:manifests|blobs|tags|referrers)/", url)
        return cls(registry, found[1], found[2]) if found and NAME.fullmatch(found[2]) else None

    @property
    def key(self) -> tuple[str, str, str]:
        """Return what is known of the site under: never the base alone, for two registries may have the same."""
        return self.registry.name, self.base, "account" if self.account else ""


class Answer(NamedTuple):
    """Hold upstream's response, the registry that answered, and the beginning of the body if it has been read.

    `site` is None where a storage host has the last word, to which the registry redirected.
    """

    response: requests.Response
    site: Site | None
    start: bytes = b""

    @property
    def status(self) -> int:
        """Return the HTTP status."""
        return self.response.status_code

    @property
    def host(self) -> str:
        """Return host and port of the server that answered."""
        return host_of(str(self.response.url))


class Reply(NamedTuple):
    """Hold an answer that was read whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes


# What a registry's answer must not lead the mirror to, unless the registry itself is there.
INNER_NETWORKS = [
    ipaddress.ip_network(block)
    for block in (
        *("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "100.64.0.0/10"),
        *("::1/128", "fc00::/7", "fe80::/10", "fec0::/10", "64:ff9b:1::/48"),
    )
]
# IPv6 addresses whose last 32 bits are an IPv4 address: RFC 6052 (NAT64), 4291, 2765.
EMBEDDING_NETWORKS = [
    ipaddress.IPv6Network(block) for block in ("64:ff9b::/96", "::/96", "::ffff:0:0/96", "::ffff:0:0:0/96")
]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def plain_address(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return an address, or the IPv4 address that it holds."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv4Address) or int(parsed) <= 1:
        return parsed
    if any(parsed in network for network in EMBEDDING_NETWORKS):
        return ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
    return parsed.sixtofour or parsed


def inner_network(address: str) -> Network | None:
    """Return the inner network that an address lies in, or None."""
    parsed = plain_address(address)
    return next((network for network in INNER_NETWORKS if parsed in network), None)


def literal_address(host: str) -> str | None:
    """Return the address that a host is, however it is written (``127.1``, ``localhost``), or None for a name."""
    host = host.rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return "127.0.0.1"
    if is_address(host):
        return host
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return None


class Guard:
    """Decide which addresses a registry may lead the mirror to, by a redirect or a realm.

    Its own endpoints, and what the owner listed, may be anywhere. All others must be public, or in the same inner
    network as an endpoint was when it was last looked up.
    """

    def __init__(self, registry: Registry, ipv4_only: bool) -> None:
        self._endpoints = {urlsplit(url).hostname for url in registry.endpoints}
        self._listed = {urlsplit(url).hostname for url in (*registry.realms, registry.search or "")}
        self._family = socket.AF_INET if ipv4_only else socket.AF_UNSPEC
        self._inner: dict[str, set[Network | None]] = {
            host: {inner_network(host)} for host in self._endpoints if host is not None and is_address(host)
        }

    def addresses(self, host: str, port: int) -> list[str]:
        """Return the addresses of `host` that may be connected to; raise OSError where there is none."""
        found = socket.getaddrinfo(host, port, self._family, socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if host in self._endpoints:
            self._inner[host] = {inner_network(address) for address in addresses}
        admitted = [address for address in addresses if self.admits(host, address)]
        if not admitted:
            raise OSError(errno.EACCES, "its address is a private one, which no registry may lead to")
        return admitted

    def admits(self, host: str, address: str) -> bool:
        """Tell whether `host`, which is at `address`, may be asked."""
        if host in self._endpoints or host in self._listed:
            return True
        network, parsed = inner_network(address), plain_address(address)
        if network is not None:
            return any(network in networks for networks in self._inner.values())
        return parsed.is_global and not parsed.is_multicast


class StrictResponse(http.client.HTTPResponse):
    """Refuse a chunk whose size is negative or none: Python would read to the end of the connection, or fail oddly.

    Nor does Python bound interim answers (1xx) and trailers. A time limit ends no loop over bytes that are there
    already: only where it waits, or sleeps, do other requests and timers have their turn.
    """

    _heads = 0  # of answers and chunks

    def _read_status(self) -> Any:
        self._heads += 1
        if self._heads > MAX_INTERIM:
            raise http.client.HTTPException("interim answers without end")
        return super()._read_status()  # type: ignore[misc]

    def _read_and_discard_trailer(self) -> None:
        http.client.parse_headers(self.fp)  # as many as in a head

    def _read_next_chunk_size(self) -> int:
        self._heads += 1
        if self._heads % CHUNKS_AT_ONCE == 0:
            gevent.sleep()
        try:
            size: int = super()._read_next_chunk_size()  # type: ignore[misc]
        except ValueError:
            size = -1
        if size < 0:
            raise http.client.HTTPException("a chunk without a size")
        return size


def strict(base: type[HTTPConnection], idle: float) -> type[HTTPConnection]:
    """Return a class of connections whose read timeout is `idle` seconds once the head of an answer is there."""

    class Strict(base):  # type: ignore[valid-type,misc]
        response_class = StrictResponse

        def getresponse(self) -> Any:
            sock = self.sock
            response = super().getresponse()
            sock.settimeout(idle)
            return response

    return Strict


def guarded(base: type[HTTPConnection], guard: Guard) -> type[HTTPConnection]:
    """Return a class of connections that go to the very address that the guard has checked."""

    class Guarded(base):  # type: ignore[valid-type,misc]
        _dns_host: str

        def _new_conn(self) -> socket.socket:
            name = self._dns_host
            try:
                addresses = guard.addresses(name, self.port)
            except socket.gaierror as error:
                raise NameResolutionError(name, self, error) from error
            except OSError as error:
                raise NewConnectionError(self, str(error.strerror)) from error
            try:
                return self._connect_to_one(addresses)
            finally:
                self._dns_host = name  # it is the name for TLS and the Host header

        def _connect_to_one(self, addresses: list[str]) -> socket.socket:
            for number, address in enumerate(addresses, 1):
                self._dns_host = address
                try:
                    return cast(socket.socket, super()._new_conn())
                except (NewConnectionError, ConnectTimeoutError):
                    if number == len(addresses):
                        raise
            raise AssertionError("a guard returns at least one address")

    return Guarded


class Adapter(HTTPAdapter):
    """Connect for one registry: through its guard, and with one TLS context, shared by all connections.

    requests would read the CA bundle anew for each connection: 16 ms of CPU and 750 KB.
    """

    def __init__(self, context: ssl.SSLContext, guard: Guard, idle: float) -> None:
        self._context = context
        self._idle = idle
        super().__init__(pool_connections=32, pool_maxsize=64)
        self._set_connections(self.poolmanager, lambda base: guarded(base, guard))

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Give the shared context to every connection pool."""
        super().init_poolmanager(*args, ssl_context=self._context, **kwargs)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        """Give the shared context to the connections through a proxy, and to an https proxy itself."""
        if proxy in self.proxy_manager:
            return self.proxy_manager[proxy]
        if proxy.startswith("https:"):
            kwargs["proxy_ssl_context"] = self._context
        manager = super().proxy_manager_for(proxy, ssl_context=self._context, **kwargs)
        self._set_connections(manager, lambda base: base)
        return manager

    def cert_verify(self, *args: Any) -> None:
        """Leave the connection alone: the shared context verifies."""

    def close_idle(self) -> None:
        """Close the connections that no request uses; those in use are closed when they are given back."""
        for manager in (self.poolmanager, *self.proxy_manager.values()):
            manager.clear()

    def _set_connections(
        self, manager: PoolManager, change: Callable[[type[HTTPConnection]], type[HTTPConnection]]
    ) -> None:
        pools: dict[str, Any] = manager.pool_classes_by_scheme
        manager.pool_classes_by_scheme = {
            scheme: type(pool.__name__, (pool,), {"ConnectionCls": strict(change(pool.ConnectionCls), self._idle)})
            for scheme, pool in pools.items()
        }


class TlsSocket(gevent.ssl.SSLSocket):
    """Fill a large buffer in one call.

    http.client's reader would come down through four more layers of Python for each TLS record of 16 KB.
    """

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        """Fill `buffer`, unless the stream ends. Small ones, as heads are read by, take what is there."""
        size = len(buffer)
        if nbytes is not None or size <= TLS_RECORD:
            return super().recv_into(buffer, nbytes, flags)
        view = memoryview(buffer)
        filled = 0
        while filled < size:
            count: Any = self.read(size - filled, view[filled:])  # the number of bytes, since a buffer is given
            if not count:
                break
            filled += count
        return filled


def tls_context(ca_file: str | None) -> ssl.SSLContext:
    """Return a context that trusts the bundle of requests, the system's authorities, and those of `ca_file`."""
    context = ssl.create_default_context(cafile=certifi.where())
    context.load_default_certs()
    context.sslsocket_class = TlsSocket
    if ca_file is not None:
        context.load_verify_locations(ca_file)
    return context


def host_of(url: str) -> str:
    """Return host and port of a URL, as the log and the messages name it."""
    return urlsplit(url).netloc


def next_hop(url: str, location: str) -> str:
    """Return where a redirect from `url` leads; raise BadGateway where it must not be followed."""
    try:
        target = urljoin(url, location).partition("#")[0]
        parts = urlsplit(target)
        origin(target)
    except ValueError:
        raise BadGateway(f"{host_of(url)} redirects to what is no URL") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise BadGateway(f"{host_of(url)} redirects to what is no plain http or https URL")
    if parts.scheme == "http" and urlsplit(url).scheme == "https":
        raise BadGateway(f"{host_of(url)} redirects from https to http")
    return target


def read_bounded(response: requests.Response, limit: int = MAX_FOREIGN_BODY) -> bytes:
    """Return a body of at most `limit` bytes and give the connection back; raise BadGateway if it is longer.

    It is not decoded: a compressed bomb stays small.
    """
    body = b""
    while part := response.raw.read(limit + 1 - len(body), decode_content=False):  # the last read tells of a cut
        body += part
        if len(body) > limit:
            response.close()
            raise BadGateway("upstream's answer is too long")
    return body


def oci_errors(body: bytes) -> list[dict[str, Any]] | None:
    """Return the list of errors in a registry's answer, or None where it is not OCI JSON."""
    try:
        errors = json.loads(body)["errors"]
        found = [{key: error.get(key) for key in ("code", "message", "detail")} for error in errors]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return found if found and all(isinstance(error["code"], str) for error in found) else None


def plain_text(response: requests.Response, body: bytes) -> str:
    """Return the start of an upstream's error where it is text for people, as Docker Hub's abuse limit sends it."""
    if parse_options_header(response.headers.get("Content-Type"))[0] != "text/plain":
        return ""
    return ": " + "".join(c for c in body[:200].decode(errors="replace") if c.isprintable())


def raise_for_status(
    answer: Answer, missing: type[NotFound], refused: Callable[[list[dict[str, Any]] | None], MirrorError]
) -> None:
    """Raise the error that upstream's status stands for; return where it is an answer to pass on.

    `missing` is raised for 404; `refused` makes the error for a registry's 401 or 403. A storage host has no say in who
    may pull: its 401, 403 and 400 are failures. Source: the table of answers.
    """
    if 200 <= answer.status < 300 or answer.status == 304:
        return
    error = _error_for(answer, missing, refused)
    error.cools = answer.site is not None or answer.status >= 500  # a storage host's refusal is about one object
    raise error


def _error_for(
    answer: Answer, missing: type[NotFound], refused: Callable[[list[dict[str, Any]] | None], MirrorError]
) -> MirrorError:
    status, host = answer.status, answer.host
    body = read_bounded(answer.response)
    errors = oci_errors(body)
    headers = kept(answer.response.headers, KEEP_ON_ERROR)
    if status == 404:
        return missing(f"{host} does not have it", headers, errors)
    if status == 416:
        return RangeInvalid("the range lies outside the blob", headers, errors)
    if status == 429:
        return TooManyRequests(f"{host} limits this mirror{plain_text(answer.response, body)}", headers, errors)
    if status in (401, 403) and answer.site is not None:
        return refused(errors)
    if 400 <= status < 500 and answer.site is not None:
        return Refused(status, f"{host} answered {status}{plain_text(answer.response, body)}", headers, errors)
    return BadGateway(f"{host} answered {status}", kept(headers, ("Retry-After",)))


def started(answer: Answer, method: str, is_blob: bool) -> Answer:
    """Return the answer with its body begun, if that is small: what a stall or a cut spoils can still be an error.

    Raises BadGateway for a body whose end could not be told from a cut: it has no length, and is not plainly chunked.
    """
    response, raw = answer.response, answer.response.raw
    coding = response.headers.get("Transfer-Encoding")
    length = response.headers.get("Content-Length")
    if coding is not None and "Content-Length" in response.headers:
        del response.headers["Content-Length"]  # RFC 9112, 6.3: the chunks tell the length
        length = None
    bodiless = method == "HEAD" or answer.status in (204, 304)
    framed = bodiless or (length is not None if coding is None else coding.lower() == "chunked")
    if not framed or not re.fullmatch("[0-9]+", length or "0") or length == "":
        response.close()
        raise BadGateway(f"{answer.host} does not say how long its answer is")
    if bodiless:
        if coding is None:
            raw.read(decode_content=False)  # there is none: this gives the connection back
        response.close()
        return answer
    if length is not None and int(length) <= FIRST_CHUNK:
        return answer._replace(start=raw.read(decode_content=False))
    if length is None and not is_blob:
        return answer._replace(start=raw.read(FIRST_CHUNK, decode_content=False))
    return answer


def kept(headers: Mapping[str, str] | Headers, names: tuple[str, ...]) -> dict[str, str]:
    """Return those of an upstream's headers that are listed and well-formed."""
    found = ((name, headers.get(name)) for name in names)
    return {name: value for name, value in found if value is not None and HEADER_VALUE.fullmatch(value)}


Key = tuple[str, str, str]
FAILURES = (TooManyRequests, BadGateway, GatewayTimeout)  # after which another endpoint is asked
FIRST_PAUSE, LONGEST_PAUSE = 30, 600  # seconds


class Cooldowns:
    """Remember which endpoints failed, and leave each alone for a while; then one request at a time tries it again.

    Endpoints are given by their `Site.key`. What began before an endpoint last failed says nothing of it any more.
    """

    def __init__(self) -> None:
        self._until: dict[Key, float] = {}  # time.monotonic()
        self._pause: dict[Key, float] = {}
        self._failed_at: dict[Key, float] = {}
        self._tried: set[Key] = set()

    def cooling(self, key: Key) -> bool:
        """Tell whether the endpoint is to be left alone."""
        return time.monotonic() < self._until.get(key, 0)

    def tried(self, keys: list[Key]) -> bool:
        """Tell whether one of these is being tried at this moment."""
        return any(key in self._tried and self.cooling(key) for key in keys)

    def take(self, key: Key, seconds: float) -> bool:
        """Tell whether to ask the endpoint. After its pause that is yes once: within `seconds` the answer is known."""
        if self.cooling(key):
            return False
        if key in self._until:
            self._until[key] = time.monotonic() + seconds
            self._tried.add(key)
        return True

    def failed(self, key: Key, began: float, retry_after: float | None) -> None:
        """Pause for `retry_after` seconds, else for 30 s, doubled after each further failure up to 10 min."""
        if began < self._failed_at.get(key, 0):
            return
        now = time.monotonic()
        if retry_after is None:
            retry_after = self._pause[key] = min(2 * self._pause.get(key, FIRST_PAUSE / 2), LONGEST_PAUSE)
        self._failed_at[key] = now
        self._until[key] = now + max(retry_after, 1)
        self._tried.discard(key)
        log.warning("%s is left alone for %.0f s", host_of(key[1]), self._until[key] - now)

    def succeeded(self, key: Key, began: float) -> None:
        """Forget that the endpoint failed."""
        if key not in self._until or began < self._failed_at[key]:
            return
        log.warning("%s answers again", host_of(key[1]))
        for known in (self._until, self._pause, self._failed_at):
            known.pop(key, None)
        self._tried.discard(key)

    def give_up(self, key: Key) -> None:
        """Let another request try: the one that did has learnt nothing."""
        if key in self._tried:
            self._tried.discard(key)
            self._until[key] = time.monotonic()

    def wait(self, keys: list[Key]) -> int:
        """Return after how many seconds the first of these may be asked again."""
        return max(1, math.ceil(min(self._until.get(key, 0) for key in keys) - time.monotonic()))


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a Retry-After header asks for, at most six hours, or None."""
    text = headers.get("Retry-After", "")
    if re.fullmatch("[0-9]{1,9}", text):
        return min(float(text), MAX_RETRY_AFTER)
    date = parse_date(text)
    if date is None:
        return None
    return min(max((date - datetime.now(UTC)).total_seconds(), 0), MAX_RETRY_AFTER)


class Outbound:
    """Say through which proxy a URL is reached."""

    def __init__(self, config: Config) -> None:
        self._https = config.https_proxy or config.all_proxy
        self._http = config.all_proxy
        self._no_proxy = config.no_proxy
        self._bypassed: dict[tuple[str, str, int], bool] = {}

    def proxies(self, registry: Registry, url: str) -> dict[str, str]:
        """Return the proxies of requests for a URL of this registry; empty: it is reached without one."""
        proxy = registry.proxy
        if proxy == DIRECT:
            return {}
        if proxy is None:
            proxy = self._https if url.startswith("https:") else self._http
            if proxy is None or self._bypasses(url):
                return {}
        # Names are looked up by the proxy, with socks5 as with socks5h: what we looked up might not be connected to.
        return {"all": re.sub("^socks5:", "socks5h:", proxy)}

    def _bypasses(self, url: str) -> bool:
        key = origin(url)
        if key not in self._bypassed:
            if len(self._bypassed) > MAX_TOKENS:
                self._bypassed.clear()
            self._bypassed[key] = should_bypass_proxies(url, self._no_proxy)
        return self._bypassed[key]


class Upstream:
    """Ask the registries, as the mirror itself or as a client, and follow their redirects."""

    def __init__(self, config: Config, registries: Mapping[str, Registry]) -> None:
        self._login = config.login
        self._timeouts = (config.connect_timeout, config.first_byte_timeout)
        self._first_byte = config.first_byte_timeout
        self._budget = config.connect_timeout + config.first_byte_timeout
        contexts = {ca: tls_context(ca) for ca in {registry.ca_file for registry in registries.values()}}
        self._guards = {name: Guard(registry, config.ipv4_only) for name, registry in registries.items()}
        self._adapters = {
            name: Adapter(contexts[registry.ca_file], self._guards[name], config.idle_timeout)
            for name, registry in registries.items()
        }
        self._outbound = Outbound(config)
        self._challenges: dict[Key, Challenge] = {}  # by Site.key
        self._open_until: dict[Key, float] = {}  # by Site.key: a ping was answered without a challenge
        self._tokens = TokenStore()
        self._cooldowns = Cooldowns()

    def fetch(self, wanted: Wanted) -> Answer:
        """Return the answer to pass on: 2xx or 304. Whoever gets it must close its response.

        The mirror itself goes from one endpoint to the next while they limit or fail; a client's own credentials go to
        the first one only. Raises MirrorError: the most telling of the failures, within connect and first-byte timeout
        in all.
        """
        registry, repository, _ = wanted.target
        sites = [Site.endpoint(registry, number, repository) for number in range(len(registry.endpoints))]
        if wanted.authorization is not None or len(sites) == 1:
            return self._attempt(sites[0], wanted, self._budget)
        end, keys = time.monotonic() + self._budget, [site.key for site in sites]
        while (answer := self._first_answer(sites, wanted, end)) is None:
            if not self._cooldowns.tried(keys) or time.monotonic() > end:
                wait = str(self._cooldowns.wait(keys))
                raise Cooling(f"{registry.name} failed a moment ago, and is left alone", {"Retry-After": wait})
            gevent.sleep(0.1)  # another request tries an endpoint again, and will soon know
        return answer

    def _first_answer(self, sites: list[Site], wanted: Wanted, end: float) -> Answer | None:
        """Ask those of several endpoints that are not left alone, until `end`; None: all are."""
        failures: list[MirrorError] = []
        for number, site in enumerate(sites):
            later = [other for other in sites[number + 1 :] if not self._cooldowns.cooling(other.key)]
            seconds = (end - time.monotonic()) / (1 + len(later))
            if not self._cooldowns.take(site.key, seconds):
                continue
            try:
                with self._cooled(site):
                    return self._attempt(site, wanted, seconds)
            except FAILURES as error:
                failures.append(error)
        if failures:
            raise max(failures, key=lambda error: error.status == TooManyRequests.status)
        return None

    @contextmanager
    def _cooled(self, site: Site) -> Iterator[None]:
        """Remember whether one of several endpoints limits or fails; 404, 401 and 403 are answers."""
        began = time.monotonic()
        try:
            yield
        except FAILURES as error:
            if error.cools:
                self._cooldowns.failed(site.key, began, retry_after(error.headers))
            else:
                self._cooldowns.give_up(site.key)
            raise
        except gevent.GreenletExit:  # the client left
            self._cooldowns.give_up(site.key)
            raise
        except MirrorError:
            self._cooldowns.succeeded(site.key, began)
            raise
        self._cooldowns.succeeded(site.key, began)

    def _attempt(self, site: Site, wanted: Wanted, seconds: float) -> Answer:
        url = with_query(f"{site.base}/v2/{site.repository}/{wanted.resource}", wanted.query)
        with self._deadline(site.base, seconds):
            answer = self._follow(site, wanted.method, url, wanted.headers, wanted.authorization, wanted.trail)
            raise_for_status(answer, wanted.missing, lambda errors: self._refusal(site, wanted, answer, errors))
            answer = started(answer, wanted.method, is_blob=wanted.missing is BlobUnknown)
            if not wanted.whole:
                return answer
            return answer._replace(start=answer.start + read_bounded(answer.response, MAX_TAGS - len(answer.start)))

    def challenge(self, registry: Registry, trail: Trail) -> Challenge | None:
        """Return the challenge that a client has to meet, or None; ask the registry only if it is not yet known.

        Where the registry asks for Basic and the mirror has an account, none is left for the client. Where the first
        endpoint fails and there are others, the client gets a challenge without a service, and can pull from those.
        """
        site = Site.endpoint(registry, 0)
        known = site.key in self._challenges or time.monotonic() < self._open_until.get(site.key, 0)
        if not known and not self._ping_first(site, trail):
            return Challenge("", {})
        found = self._challenges.get(site.key)
        return None if found is not None and found.scheme == "basic" and site.account else found

    def _ping_first(self, site: Site, trail: Trail) -> bool:
        """Learn the first endpoint's challenge; tell whether it answered. Raises MirrorError if it is the only one."""
        seconds = min(PING_SECONDS, self._budget / len(site.registry.endpoints))
        if len(site.registry.endpoints) == 1:
            self._ping(site, None, trail, seconds)
        elif not self._cooldowns.take(site.key, seconds):
            return False
        else:
            try:
                with self._cooled(site):
                    self._ping(site, None, trail, seconds)
            except FAILURES:
                return False
        return True

    def admit(self, registry: Registry, authorization: str, trail: Trail) -> None:
        """Ask ``GET /v2/`` as a client that logs in; raise Unauthorized or Denied where the registry refuses it."""
        status, challenge = self._ping(
            Site.endpoint(registry, 0), authorization, trail, min(PING_SECONDS, self._budget)
        )
        if status == 401:
            message = f"{registry.name} does not accept this login"
            raise Unauthorized(message, challenge) if challenge else Denied(message)

    def login(
        self,
        registry: Registry,
        query: Mapping[str, Any],
        form: Mapping[str, Any] | None,
        basic: str | None,
        trail: Trail,
    ) -> Reply:
        """Put a client's own request for a token to the registry's realm; `form` makes it a POST.

        `service` is the registry's own, whatever the client took from another registry's challenge at this host.
        Returns the realm's reply, be it the token or a refusal. Raises MirrorError.
        """
        with self._deadline(registry.endpoints[0], self._budget):
            challenge = self.challenge(registry, trail)
            if challenge is None or challenge.scheme != "bearer":
                raise BadRequest(f"{registry.name} gives no tokens")
            if not challenge.realm:
                raise BadGateway(f"{registry.name} cannot take a login now: its first endpoint fails")
            service = {"service": [challenge.parameters["service"]]} if "service" in challenge.parameters else {}
            if form is None:
                method, url, body = "GET", with_query(challenge.realm, {**query, **service}), None
            else:
                method, url, body = "POST", with_query(challenge.realm, query), urlencode({**form, **service}, True)
            trail.ask(url)
            response = self._send(registry, method, url, _authorized({}, basic), body)
            reply = Reply(response.status_code, response.headers, read_bounded(response))
        if reply.status not in (200, 401, 403, 429):  # the realm may have moved: learn it anew
            self._challenges.pop(Site.endpoint(registry, 0).key, None)
        if reply.status < 300 or 400 <= reply.status < 500:
            return reply
        raise BadGateway(f"{host_of(url)} answered {reply.status}")

    def search(self, registry: Registry, query: Mapping[str, str], trail: Trail) -> Reply:
        """Ask the registry's index, as ``docker search`` does; raise MirrorError."""
        url = with_query(f"{registry.search}/v1/search", query)
        with self._deadline(url, self._budget):
            answer = self._follow(Site(registry, str(registry.search)), "GET", url, {}, None, trail)
            raise_for_status(answer, NotFound, lambda errors: Denied(f"{registry.name} refuses", errors=errors))
            return Reply(answer.status, answer.response.headers, read_bounded(answer.response))

    def close_idle(self) -> None:
        """Close the connections that no request uses."""
        for adapter in self._adapters.values():
            adapter.close_idle()

    def _ping(
        self, site: Site, authorization: str | None, trail: Trail, seconds: float
    ) -> tuple[int, Challenge | None]:
        """Ask ``GET /v2/``; return the status, 2xx or 401, and the challenge, which is learnt."""
        url = f"{site.base}/v2/"
        trail.ask(url)
        with self._deadline(site.base, seconds):
            answer = Answer(self._send(site.registry, "GET", url, _authorized({}, authorization)), site)
            challenge = self._learn(answer)
            if answer.status != 401:
                raise_for_status(
                    answer, NotFound, lambda errors: Denied(f"{site.registry.name} refuses", errors=errors)
                )
            read_bounded(answer.response)
        if challenge is None and authorization is None:
            self._open_until[site.key] = time.monotonic() + OPEN_SECONDS
        return answer.status, challenge

    @contextmanager
    def _deadline(self, url: str, seconds: float) -> Iterator[None]:
        host = host_of(url)
        late = GatewayTimeout(f"{host} did not answer in time")
        with gevent.Timeout(seconds, late), upstream_errors(host):
            yield

    def _follow(
        self, site: Site, method: str, url: str, headers: Mapping[str, str], own: str | None, trail: Trail
    ) -> Answer:
        """Send a request and follow its redirects, as the mirror itself or with a client's `own` Authorization.

        No credential goes to another origin than it is for. Where another registry is redirected to, the mirror
        answers that one's challenge with a token of its own.
        """
        here: Site | None = site
        start, first = origin(url), host_of(url)
        trail.ask(url)
        for _ in range(MAX_REDIRECTS + 1):
            response = self._ask(site.registry, here, method, url, headers, own)
            location = response.headers.get("Location")
            if response.status_code not in REDIRECTS or location is None:
                return Answer(response, here)
            read_bounded(response)  # gives the connection back for the next request
            url = next_hop(url, location)
            if origin(url) != start:
                own, start, here = None, origin(url), Site.beyond(site.registry, url)
            trail.redirect(url)
        raise BadGateway(f"{first} redirects more than {MAX_REDIRECTS} times")

    def _ask(
        self, registry: Registry, site: Site | None, method: str, url: str, headers: Mapping[str, str], own: str | None
    ) -> requests.Response:
        """Send one request; as the mirror itself, answer a registry's challenge."""
        if site is None or own is not None:
            return self._send(registry, method, url, _authorized(headers, own))
        token = self._authorization(site)
        response = self._send(registry, method, url, _authorized(headers, token))
        if response.status_code != 401 or not self._refresh(site, response, token):
            return response
        read_bounded(response)
        return self._send(registry, method, url, _authorized(headers, self._authorization(site)))

    def _refresh(self, site: Site, response: requests.Response, token: str | None) -> bool:
        """Learn from a 401 to the mirror itself; tell whether asking anew may help."""
        challenge = self._learn(Answer(response, site))
        if challenge is None:
            return False
        if challenge.scheme == "basic":
            return token is None and site.account is not None
        if token and challenge.parameters.get("error") == "insufficient_scope":
            return False
        if token:
            self._tokens.drop((*site.key, pull_scope(site.repository)), token.removeprefix("Bearer "))
        return True

    def _learn(self, answer: Answer) -> Challenge | None:
        """Return the challenge of an answer, and keep what of it is true of the whole site."""
        site = answer.site
        challenge = Challenge.parse(answer.response.raw.headers.getlist("WWW-Authenticate"))
        if site is None or challenge is None:
            return None
        if challenge.scheme == "bearer":
            check_realm(site.registry, site.base, challenge.realm)
        service = {key: value for key, value in challenge.parameters.items() if key == "service"}
        if len(self._challenges) > MAX_TOKENS:
            self._challenges.clear()
        self._challenges[site.key] = challenge._replace(parameters=service)
        return challenge

    def _refusal(self, site: Site, wanted: Wanted, answer: Answer, errors: list[dict[str, Any]] | None) -> MirrorError:
        """Return the error for a registry's 401 or 403; the client is asked to log in where that may help."""
        registry, repository, _ = wanted.target
        challenge = self._learn(answer) or self._challenges.get(site.key)
        message = f"{registry.name} has no public image {repository}: it does not exist, or asks for a login"
        if wanted.authorization:
            message = f"{registry.name} does not let this login pull {repository}"
        elsewhere = answer.site != site or site.base != registry.endpoints[0]  # a client's login does not go there
        if not self._login or challenge is None or elsewhere or (wanted.authorization and answer.status == 403):
            return Denied(message, errors=errors)
        if challenge.scheme == "bearer":
            challenge = challenge._replace(parameters={"scope": pull_scope(repository), **challenge.parameters})
        return Unauthorized(message, challenge, errors)

    def _authorization(self, site: Site) -> str | None:
        """Return the Authorization with which the mirror itself asks, or None where none is asked for so far."""
        challenge = self._challenges.get(site.key)
        if challenge is None:
            return None
        if challenge.scheme == "basic":
            return site.account
        scope = pull_scope(site.repository)
        return "Bearer " + self._tokens.get((*site.key, scope), lambda: self._fetch_token(site, challenge, scope))

    def _fetch_token(self, site: Site, challenge: Challenge, scope: str) -> Token:
        try:
            return self._ask_realm(site, challenge, scope)
        except MirrorError:
            self._challenges.pop(site.key, None)  # the realm may have moved: learn it anew
            raise

    def _ask_realm(self, site: Site, challenge: Challenge, scope: str) -> Token:
        host, asked_at = host_of(challenge.realm), time.monotonic()
        with self._deadline(challenge.realm, self._budget):
            response = self._send(site.registry, "GET", challenge.token_url(scope), _authorized({}, site.account))
            answer = Answer(response, site)
            try:
                raise_for_status(answer, NotFound, lambda errors: self._no_token(site, challenge, scope, errors))
                return Token.parse(read_bounded(response), asked_at)
            except (NotFound, Refused, RangeInvalid, ValueError, RecursionError) as error:
                raise BadGateway(f"{host} gave no token: {error}") from error

    def _no_token(
        self, site: Site, challenge: Challenge, scope: str, errors: list[dict[str, Any]] | None
    ) -> MirrorError:
        message = f"{host_of(challenge.realm)} gives this mirror no token for {scope}"
        if site.account:
            log.warning("%s, though it has an account: are username and password right?", message)
        if not self._login or site.base != site.registry.endpoints[0]:
            return Denied(message, errors=errors)
        return Unauthorized(message, challenge._replace(parameters={**challenge.parameters, "scope": scope}), errors)

    def _send(
        self, registry: Registry, method: str, url: str, headers: Mapping[str, str], body: str | None = None
    ) -> requests.Response:
        """Send one request; return once the head of the answer is there."""
        prepared = requests.PreparedRequest()
        prepared.method, prepared.url, prepared.body = method, url, body
        via = f"{headers['Via']}, 1.1 {VIA}" if "Via" in headers else f"1.1 {VIA}"
        fixed = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity", "Via": via}
        prepared.headers = CaseInsensitiveDict({**headers, **fixed})
        if body is not None:
            prepared.headers["Content-Type"] = "application/x-www-form-urlencoded"
            prepared.headers["Content-Length"] = str(len(body))
        host = host_of(url)
        proxies = self._outbound.proxies(registry, url)
        if proxies:
            self._check_behind_proxy(registry, url)
        send = partial(self._adapters[registry.name].send, prepared, True, self._timeouts, proxies=proxies)
        with gevent.Timeout(self._first_byte, GatewayTimeout(f"{host} did not answer in time")), upstream_errors(host):
            try:
                return send()
            except requests.ConnectionError as error:
                if body is not None or not _went_stale(error):
                    raise
                return send()

    def _check_behind_proxy(self, registry: Registry, url: str) -> None:
        """Refuse an inner address in a URL; a name is for the proxy to look up, in its own network."""
        host = urlsplit(url).hostname or ""
        address = literal_address(host)
        if address is not None and not self._guards[registry.name].admits(host, address):
            raise BadGateway(f"{host} is a private address, which no registry may lead to")


def _authorized(headers: Mapping[str, str], authorization: str | None) -> dict[str, str]:
    return {**headers, "Authorization": authorization} if authorization is not None else dict(headers)


def _went_stale(error: requests.ConnectionError) -> bool:
    """Tell whether a kept connection was closed by the server just as it was used: a new one will do."""
    cause = error.args[0] if error.args else None
    return isinstance(cause, urllib3.exceptions.ProtocolError) and any(
        isinstance(reason, ConnectionError) for reason in cause.args
    )


# ---------------------------------------------------------------------------------------------------------------------
# Relay
# ---------------------------------------------------------------------------------------------------------------------

# What a client may say to upstream, and what upstream may say to a client; all else stays here. Not among them:
# Set-Cookie, and docker-ratelimit-source, which holds the mirror's own address.
REQUEST_HEADERS = ("Accept", "Range", "If-Range", "If-None-Match", "If-Modified-Since", "Via")
RESPONSE_HEADERS = (
    "Accept-Ranges",
    "Cache-Control",
    "Content-Encoding",
    "Content-Length",
    "Content-Range",
    "Content-Type",
    "Docker-Content-Digest",
    "ETag",
    "Last-Modified",
    "OCI-Filters-Applied",
    "RateLimit-Limit",
    "RateLimit-Remaining",
    "Retry-After",
    "Warning",
)
# Of a list of tags, which may be renamed: no digest or validator of its bytes.
TAGS_HEADERS = ("Content-Type", "RateLimit-Limit", "RateLimit-Remaining", "Warning")
WINDOW = 1 << 20  # bytes after which the rate is looked at
FAST_RATE = 4_000_000  # bytes per second
READABLE = 1  # of the event loop's io watchers
ESTABLISHED = b"\x01"  # TCP_INFO's first byte, linux/tcp.h
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER for 0 seconds


class ClientGone(gevent.GreenletExit):
    """End a request whose client has gone; no `except Exception` on the way takes it for a failure of upstream."""


class ClientWatch:
    """Notice that the client has gone while its request waits for upstream, and end the request at once.

    As gevent.Timeout does, it throws into the waiting greenlet from the event loop.
    """

    def __init__(self, client: socket.socket) -> None:
        loop = gevent.get_hub().loop
        self._client = client
        self._readable = loop.io(client.fileno(), READABLE)
        self._later = loop.timer(1.0)  # seconds
        self._readable.start(self._look, gevent.getcurrent())

    def _look(self, waiting: greenlet) -> None:
        self._readable.stop()
        if self._has_gone():
            self._later.stop()
            waiting.throw(ClientGone())
        else:  # it sent its next request early, and may still go
            self._later.start(self._look, waiting)

    def _has_gone(self) -> bool:
        try:
            return self._client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) != ESTABLISHED
        except OSError:  # a Unix socket
            return self._client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""

    def stop(self) -> None:
        """Stop watching."""
        for watcher in (self._readable, self._later):
            watcher.stop()
            watcher.close()


@contextmanager
def watched(client: socket.socket | None) -> Iterator[None]:
    """Watch the client while upstream is asked; raise ClientLeft when it goes. None: a server without gevent."""
    watch = ClientWatch(client) if client is not None else None
    try:
        yield
    except ClientGone:
        raise ClientLeft("the client has gone") from None
    finally:
        if watch is not None:
            watch.stop()


class Body:
    """Pass the bytes of an answer on as they come. Whoever has one must close it.

    The size of a chunk follows the transfer's rate: large ones save CPU, small ones keep a slow client cheap. If
    upstream breaks off, or is silent for longer than the idle timeout, the client's connection is reset.
    A class and no generator: a generator that was never started cannot close its response.
    """

    def __init__(self, answer: Answer, client: socket.socket | None) -> None:
        self._answer = answer
        self._client = client
        self._watch: ClientWatch | None = None
        self._size = FIRST_CHUNK
        self._window = 0
        self._since = 0.0

    def __iter__(self) -> Iterator[bytes]:
        if self._client is not None:
            self._watch = ClientWatch(self._client)
        self._since = time.monotonic()
        yield self._answer.start  # empty, it sends the headers: containerd waits 30 s for them, a chunk may take longer
        while chunk := self._read():
            yield chunk

    def _read(self) -> bytes:
        try:
            chunk: bytes = self._answer.response.raw.read(self._size, decode_content=False)
        except UPSTREAM_FAILURES as error:
            raise self._broken(error) from error
        self._window += len(chunk)
        if self._window >= WINDOW:
            self._pace()
        return chunk

    def _pace(self) -> None:
        now = time.monotonic()
        fast = self._window > FAST_RATE * (now - self._since)
        self._size = FAST_CHUNK if fast else SLOW_CHUNK
        self._window, self._since = 0, now

    def _broken(self, error: Exception) -> ConnectionResetError:
        log.warning("%s broke off in mid-answer: %s", self._answer.host, root_cause(error))
        if self._client is not None:  # a plain close would end an answer without a length as if it were whole
            self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        return ConnectionResetError(errno.ECONNRESET, "upstream broke off")

    def close(self) -> None:
        """Close the connection to upstream, unless the answer was read to its end and gave it back."""
        if self._watch is not None:
            self._watch.stop()
        self._answer.response.close()


class Relayed(Response):
    """Send headers as upstream gave them: werkzeug adds and computes none."""

    default_mimetype = None
    automatically_set_content_length = False


def relay(answer: Answer, method: str, client: socket.socket | None) -> Response:
    """Return the response that passes `answer` on; `client` is the socket to reset if upstream breaks off."""
    headers = kept(answer.response.headers, RESPONSE_HEADERS)
    if method == "HEAD" or answer.status in (204, 304):
        return Relayed(b"", answer.status, headers)
    if len(answer.start) == int(headers.get("Content-Length", -1)):
        return Relayed(answer.start, answer.status, headers)
    return Relayed(Body(answer, client), answer.status, headers, direct_passthrough=True)


def next_page(header: str, path: str, ns: str | None) -> str | None:
    """Return an upstream's Link header with its target at the mirror, ``path``; None where it has no next page."""
    same = f"&ns={quote(ns)}" if ns else ""
    for link in parse_header_links(header):
        query = link["url"].partition("?")[2].partition("#")[0]
        relation = {key.lower(): value.lower() for key, value in link.items()}.get("rel")
        if relation == "next" and re.fullmatch(r"[\x21-\x3b\x3d\x3f-\x7e]+", query):
            return f'<{path}?{query}{same}>; rel="next"'
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Access
# ---------------------------------------------------------------------------------------------------------------------

READS = "GET, HEAD, OPTIONS"
MAX_MIRRORS = 3  # one after another
PREFLIGHT = {
    "Access-Control-Allow-Methods": READS,
    "Access-Control-Allow-Headers": "Authorization, Accept, Range, If-None-Match, If-Range",
    "Access-Control-Max-Age": "86400",
}
CORS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Expose-Headers": "Accept-Ranges, Content-Length, Content-Range, Docker-Content-Digest, "
    "Docker-Distribution-Api-Version, ETag, Link, RateLimit-Limit, RateLimit-Remaining, Retry-After, Warning, "
    "WWW-Authenticate",
}


def is_api(path: str) -> bool:
    """Tell whether a path belongs to the registry's API."""
    return path == "/v2" or path.startswith("/v2/")


def is_token(path: str) -> bool:
    """Tell whether a path is that of the token endpoint, of the default registry or of a named one."""
    return path == "/token" or path.startswith("/token/")


def takes_body(method: str, path: str) -> bool:
    """Tell whether a request may bring a body, of at most `MAX_FORM` bytes: a login by POST is the only one."""
    return method == "POST" and is_token(path)


def note_request(environ: dict[str, Any]) -> None:
    """Put into the WSGI environment what the access line shows (wsgi.py has its format); the query is not among it."""
    address = environ.get("REMOTE_ADDR", "")
    if not is_address(address):  # what X-Forwarded-For holds is anybody's word
        address = environ.get("werkzeug.proxy_fix.orig", {}).get("REMOTE_ADDR") or "-"
    environ["mirror.client"] = address
    environ["mirror.upstream"] = Trail()
    environ["mirror.path"] = quote(environ.get("PATH_INFO", "").encode("latin-1"), safe="/:@+=,~")[:500]


def admit_request() -> Response | None:
    """Refuse what no route may see, and answer what none needs to: the preflight of a browser.

    Raises BadRequest, NameInvalid and Unsupported.
    """
    environ = request.environ
    note_request(environ)
    host = environ.get("HTTP_HOST")
    if host is not None and not HOST.fullmatch(host):
        raise BadRequest("the Host header is not valid")
    if "%2f" in environ.get("RAW_URI", "").partition("?")[0].lower() or "//" in environ["PATH_INFO"]:
        raise NameInvalid("a slash in the path must be neither encoded nor doubled")
    if request.headers.get("Via", "").count(VIA) > MAX_MIRRORS:
        raise BadGateway("this request comes from here: a registry redirects to the mirror, or it is its own fallback")
    if is_api(request.path) and request.method not in READS.split(", "):
        raise Unsupported("this is a mirror for pulls: push to the registry itself", {"Allow": READS})
    length = environ.get("CONTENT_LENGTH", "").strip("0")
    if "HTTP_TRANSFER_ENCODING" in environ or (length and not takes_body(request.method, request.path)):
        raise BadRequest("only a login has a body, and that has a Content-Length")
    environ.pop("wsgi.input_terminated", None)  # werkzeug then goes by the length, and refuses a body that was cut
    if request.method == "OPTIONS" and (is_api(request.path) or is_token(request.path)):
        return Response(status=204, headers=PREFLIGHT)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Application
# ---------------------------------------------------------------------------------------------------------------------

NOBODY = "Og=="  # base64 of a colon
MAX_FORM = 64 << 10  # bytes of a POST to /token


def create_app(config: Config) -> Flask:
    """Return the WSGI application; raise ConfigError for a wrong registries file."""
    app = Flask("mirror", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_FORM
    app.url_map.merge_slashes = False
    app.url_map.strict_slashes = False
    views = Views(config, load_registries(config))
    app.extensions["docker-mirror"] = views
    app.before_request(admit_request)
    app.after_request(finish_response)
    app.register_error_handler(Exception, views.error)
    for rule, view, methods in views.routes():
        app.add_url_rule(rule, rule, view, methods=methods)
    if config.proxies:
        hops = config.proxies
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=hops, x_proto=hops, x_host=hops)  # type: ignore[method-assign]
    return app


def finish_response(response: Response) -> Response:
    """Add the headers that every answer of the API has."""
    if is_api(request.path):
        response.headers["Docker-Distribution-Api-Version"] = "registry/2.0"
        if "ns" in g:
            response.headers["OCI-Namespace"] = g.ns  # OCI distribution spec, "Registry Proxying"
    if is_api(request.path) or is_token(request.path):
        response.headers.update(CORS)
    return response


class Views:
    """Answer the routes. It holds the state of the application: the registries, and the way upstream."""

    def __init__(self, config: Config, registries: Mapping[str, Registry]) -> None:
        self._config = config
        self._router = Router(registries, config.default)
        self._upstream = Upstream(config, registries)

    def routes(self) -> list[tuple[str, Callable[..., Response], list[str]]]:
        """Return rule, view and methods of each route."""
        return [
            ("/healthz", self.healthz, ["GET"]),
            ("/token", self.token, ["GET", "POST"]),
            ("/token/<registry>", self.token, ["GET", "POST"]),
            ("/v1/_ping", self.index_ping, ["GET"]),
            ("/v1/search", self.search, ["GET"]),
            ("/v2/", self.ping, ["GET"]),
            ("/v2/_catalog", self.catalog, ["GET"]),
            ("/v2/<path:name>/manifests/<reference>", self.manifest, ["GET"]),
            ("/v2/<path:name>/blobs/<digest>", self.blob, ["GET"]),
            ("/v2/<path:name>/tags/list", self.tags, ["GET"]),
            ("/v2/<path:name>/referrers/<digest>", self.referrers, ["GET"]),
        ]

    def close_idle(self) -> None:
        """Close the connections to upstream that no request uses."""
        self._upstream.close_idle()

    def healthz(self) -> Response:
        """Tell that the process is alive; upstream is not asked."""
        return json_response({"status": "ok"})

    def ping(self) -> Response:
        """Answer ``/v2/``: 200, or 401 with the challenge from which dockerd learns where tokens are to be had."""
        registry = self._registry_here()
        g.target = Target(registry, "")
        if self._config.login and not request.headers.get("Authorization"):
            challenge = self._upstream.challenge(registry, trail())
            if challenge is not None:
                raise Unauthorized("a token is needed, even for public images", challenge)
        own = self._own_authorization()
        if own is not None:
            self._upstream.admit(registry, own, trail())
        return json_response({})

    def catalog(self) -> Response:
        """Refuse the list of all repositories: Docker Hub has none either."""
        raise Unsupported("this mirror has no catalog", {"Allow": "OPTIONS"})

    def manifest(self, name: str, reference: str) -> Response:
        """Pass a manifest on, by tag or digest."""
        return self._relay(self._fetch(name, f"manifests/{check_reference(reference)}", ManifestUnknown))

    def blob(self, name: str, digest: str) -> Response:
        """Pass a blob on."""
        return self._relay(self._fetch(name, f"blobs/{check_digest(digest)}", BlobUnknown))

    def tags(self, name: str) -> Response:
        """Pass a list of tags on, a page at a time, under the name by which the client asked."""
        answer = self._fetch(name, "tags/list", NotFound, ("n", "last"), whole=request.method == "GET")
        body = answer.start if name == g.target.repository else renamed(answer.start, name)
        headers = kept(answer.response.headers, TAGS_HEADERS)
        if request.method == "GET":
            headers["Content-Length"] = str(len(body))
        return self._linked(Relayed(body, answer.status, headers), answer)

    def referrers(self, name: str, digest: str) -> Response:
        """Pass the list of what refers to a manifest on."""
        arguments = ("artifactType", "n", "last")
        return self._relay(self._fetch(name, f"referrers/{check_digest(digest)}", ManifestUnknown, arguments))

    def token(self, registry: str | None = None) -> Response:
        """Answer a request for a token: ``anonymous`` at once, or the realm's own answer to a login.

        Source: distribution's token specification (GET, and POST as in OAuth2).
        """
        here = self._router.named(registry) if registry is not None else self._registry_here()
        basic = basic_login(request.headers.get("Authorization"))
        if basic is None and request.method == "GET":
            return anonymous_token()
        if not self._config.login:
            raise Denied("this mirror takes no login: pull without one")
        reply = self._log_in(here, registry, basic)
        if reply is None:
            return anonymous_token()
        headers = kept(reply.headers, ("Content-Type", "Content-Encoding", "Retry-After"))
        if parse_options_header(headers.get("Content-Type"))[0] == "text/html":
            raise Refused(reply.status, f"{here.name} does not accept this login", {}, None)
        return Relayed(reply.body, reply.status, {**headers, "Cache-Control": "no-store"})

    def _log_in(self, here: Registry, named: str | None, basic: str | None) -> Reply | None:
        """Return the realm's reply to a login; None where the client may still pull what is public.

        A client has one login for this host, and sends it for whatever registry a path names. Where that one is not
        `here`, the registry that the host or `named` stands for, and knows no such login, the pull goes on without.
        """
        meant = set()

        def upstreams_name(name: str) -> str:
            target = self._router.resolve(request.host, named, name)
            meant.add(target.registry)
            return target.repository

        query = with_scopes(request.args.to_dict(flat=False), upstreams_name)
        form = with_scopes(request.form.to_dict(flat=False), upstreams_name) if request.method == "POST" else None
        if len(meant) > 1:
            raise BadRequest("one token cannot be for two registries")
        asked = meant.pop() if meant else here
        try:
            reply = self._upstream.login(asked, query, form, basic, trail())
        except BadRequest:
            if asked == here:
                raise
            return None
        return None if asked != here and reply.status in (400, 401, 403, 404, 405) else reply

    def index_ping(self) -> Response:
        """Answer ``docker search``'s first question: yes, there is an index here, and no registry of version 1."""
        return json_response({"standalone": False})

    def search(self) -> Response:
        """Answer ``docker search`` from the registry's index."""
        registry = self._router.by_host(request.host) or self._router.searched
        g.target = Target(registry, "")
        if registry.search is None:
            raise NotFound(f"{registry.name} has no index to search")
        query = {key: request.args[key] for key in ("q", "n", "page") if key in request.args}
        reply = self._upstream.search(registry, query, trail())
        return Relayed(reply.body, reply.status, kept(reply.headers, ("Content-Type",)))

    def error(self, error: Exception) -> Response:
        """Write any error as OCI JSON; of a bug of ours, only the log tells more."""
        if isinstance(error, HTTPException):
            return http_error(error)
        if not isinstance(error, MirrorError):
            log.error("%s %s failed", request.method, request.environ.get("mirror.path"), exc_info=error)
            error = MirrorError()
        if isinstance(error, (BadGateway, GatewayTimeout)):
            log.warning("%s", error)
        response = json_response({"errors": error.errors}, error.status)
        response.headers.update(error.headers)
        if isinstance(error, TooManyRequests):
            response.headers.setdefault("Retry-After", RETRY_AFTER)
        if isinstance(error, Unauthorized):
            response.headers["WWW-Authenticate"] = self._our_challenge(error.challenge, g.target)
        return response

    def _fetch(
        self,
        name: str,
        resource: str,
        missing: type[NotFound],
        arguments: tuple[str, ...] = (),
        whole: bool = False,
    ) -> Answer:
        ns = request.args.get("ns") or None
        target = g.target = self._router.resolve(request.host, ns, name)
        if ns is not None:
            g.ns = ns
        query = {key: request.args[key] for key in arguments if key in request.args}
        headers = kept(request.headers, REQUEST_HEADERS)
        if whole or parse_range_header(headers.get("Range")) is None:
            headers.pop("Range", None)  # RFC 9110, 14.2: one that makes no sense is ignored
        own = self._own_authorization()
        with watched(client_socket()):
            return self._upstream.fetch(
                Wanted(target, request.method, resource, query, headers, own, missing, trail(), whole)
            )

    def _relay(self, answer: Answer) -> Response:
        return self._linked(relay(answer, request.method, client_socket()), answer)

    def _linked(self, response: Response, answer: Answer) -> Response:
        """Return the response with the way to its next page, if upstream gave one."""
        link = next_page(answer.response.headers.get("Link", ""), request.path, g.get("ns"))
        if link is not None:
            response.headers["Link"] = link
        return response

    def _registry_here(self) -> Registry:
        """Return the registry whose own address the client may take this Host for."""
        return self._router.by_host(request.host) or self._router.default

    def _own_authorization(self) -> str | None:
        """Return the client's own Authorization, or None where the mirror acts as itself."""
        value = request.headers.get("Authorization")
        if not value or not self._config.login or value.lower() == f"bearer {ANONYMOUS}":
            return None
        return value

    def _our_challenge(self, challenge: Challenge, target: Target) -> str:
        """Return the challenge that names the mirror, and the repository as the client does."""
        if challenge.scheme == "basic":  # the credentials come with each request: there is no token service to name
            return challenge.at(challenge.realm)
        parameters = dict(challenge.parameters)
        if "scope" in parameters:
            parameters["scope"] = map_scope(parameters["scope"], lambda name: target.prefix + name)
        plain = target.prefix or target.registry == self._router.default
        realm = f"{self._public_url()}/token" if plain else f"{self._public_url()}/token/{target.registry.name}"
        return challenge._replace(parameters=parameters).at(realm)

    def _public_url(self) -> str:
        if self._config.public_url is not None:
            return self._config.public_url
        scheme = "https" if request.scheme == "https" else "http"
        return f"{scheme}://{request.host}"


def with_scopes(arguments: dict[str, list[str]], change: Callable[[str], str]) -> dict[str, list[str]]:
    """Return the arguments of a token request with the repository's name in each scope changed."""
    return {
        key: [map_scope(value, change) for value in values] if key == "scope" else values
        for key, values in arguments.items()
    }


def renamed(body: bytes, name: str) -> bytes:
    """Return a list of tags with another repository's name, or the bytes as they are where they are no such list."""
    try:
        tags = json.loads(body)
    except (ValueError, RecursionError):
        return body
    return json.dumps({**tags, "name": name}).encode() if isinstance(tags, dict) and "name" in tags else body


def basic_login(authorization: str | None) -> str | None:
    """Return a header of Basic credentials, or None where it is none or names nobody.

    One that cannot be read goes on as well: it is for the realm to refuse it, not for us to take it for no login.
    """
    scheme, _, credentials = (authorization or "").partition(" ")
    return authorization if scheme.lower() == "basic" and credentials.strip() not in ("", NOBODY) else None


def trail() -> Trail:
    """Return where this request notes whom it asks."""
    return cast(Trail, request.environ["mirror.upstream"])


def client_socket() -> socket.socket | None:
    """Return the connection to the client, None under another server than gunicorn."""
    return request.environ.get("gunicorn.socket")


def anonymous_token() -> Response:
    """Return the token that stands for no login; the real one stays with the mirror."""
    issued = datetime.now(UTC).replace(microsecond=0, tzinfo=None).isoformat() + "Z"
    answer = {
        "token": ANONYMOUS,
        "access_token": ANONYMOUS,
        "expires_in": ANONYMOUS_SECONDS,
        "issued_at": issued,
    }
    response = json_response(answer)
    response.headers["Cache-Control"] = "no-store"
    return response


def json_response(content: Any, status: int = 200) -> Response:
    """Return a response of JSON."""
    return Response(json.dumps(content), status, mimetype="application/json")


def http_error(error: HTTPException) -> Response:
    """Return what werkzeug refuses (no such route, a form that is too large) as OCI JSON."""
    status = error.code or 500
    code = {404: "NOT_FOUND", 405: Unsupported.code}.get(status, "BAD_REQUEST")
    message = {404: "there is nothing at this path"}.get(status, error.name.lower())
    response = json_response({"errors": [{"code": code, "message": message, "detail": None}]}, status)
    response.headers.extend((key, value) for key, value in error.get_headers() if key == "Allow")
    return response
