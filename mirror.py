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
import hashlib
import hmac
import http.client
import importlib
import ipaddress
import json
import logging
import math
import mmap
import os
import re
import select
import socket
import ssl
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import ExitStack
from contextlib import closing
from contextlib import contextmanager
from contextlib import suppress
from datetime import UTC
from datetime import datetime
from fnmatch import fnmatchcase
from functools import cached_property
from functools import lru_cache
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any
from typing import Generic
from typing import NamedTuple
from typing import NoReturn
from typing import Protocol
from typing import TypeVar
from typing import cast
from urllib.parse import parse_qsl
from urllib.parse import quote
from urllib.parse import urlencode
from urllib.parse import urljoin
from urllib.parse import urlsplit

import certifi
import gevent
import gevent.ssl
import itsdangerous
import requests
import urllib3
from flask import Flask
from flask import Response
from flask import abort
from flask import g
from flask import request
from gevent import monkey
from gevent.event import Event
from gevent.pool import Pool
from gevent.threadpool import ThreadPool
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
from werkzeug.datastructures import MIMEAccept
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import HTTPException
from werkzeug.exceptions import RequestedRangeNotSatisfiable
from werkzeug.http import parse_accept_header
from werkzeug.http import parse_content_range_header
from werkzeug.http import parse_date
from werkzeug.http import parse_options_header
from werkzeug.http import parse_range_header
from werkzeug.http import quote_header_value
from werkzeug.http import unquote_etag
from werkzeug.middleware.proxy_fix import ProxyFix

from cache import FOLDER_MODE
from cache import MEDIA_TYPE
from cache import Blob
from cache import Cache
from cache import Follower
from cache import Full
from cache import Limits
from cache import Name
from cache import Partial
from cache import Record
from cache import WrongDigest
from cache import hash_file
from cache import is_digest
from pages import FILES
from pages import MAX_TYPED
from pages import NO_INDEX
from pages import Address
from pages import Facts
from pages import Image
from pages import Pages
from pages import ServedRegistry
from pages import by_name
from pages import clients
from pages import nginx_error
from pages import nginx_welcome
from pages import page_file
from pages import read_config
from pages import read_image
from pages import read_manifest
from pages import read_results
from pages import robots
from pages import sorted_tags
from settings import DIRECT
from settings import DOCKER_IO
from settings import LOOPBACK
from settings import Config
from settings import ConfigError
from settings import Network
from settings import Rate
from settings import Registry
from settings import did_you_mean
from settings import load_registries
from settings import load_users
from telemetry import Report
from telemetry import Run
from telemetry import Telemetry

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
    reason = ""  # why an endpoint failed, in one word for the metrics
    is_final = False  # whether it is the registry's own word, which no kept copy contradicts

    def __init__(
        self,
        message: str = "the mirror failed; its log says why",
        headers: Mapping[str, str] | None = None,
        errors: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(message)
        self.headers = dict(headers or {})
        self.is_quoted = errors is not None
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
    """Say that upstream limits the mirror, or the mirror its client; Retry-After tells for how long."""

    status = 429
    code = "TOOMANYREQUESTS"
    reason = "limited"


class BadGateway(MirrorError):
    """Say that upstream cannot be reached, or that it failed."""

    status = 502
    code = "UNAVAILABLE"
    reason = "answer"


class Cooling(MirrorError):
    """Say that upstream is left alone for a while, because it failed; Retry-After tells for how long."""

    status = 503
    code = "UNAVAILABLE"


class GatewayTimeout(MirrorError):
    """Say that upstream did not answer in time."""

    status = 504
    code = "UNAVAILABLE"
    reason = "timeout"


class Late(GatewayTimeout):
    """Say that an answer is still awaited, but not by this client."""


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
        failure = BadGateway(f"{host}: {root_cause(error)}")
        failure.reason = "connection"
        raise failure from error


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


@lru_cache(maxsize=64)  # a request asks some times about the same few
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

    def served(self, host: str) -> list[Registry]:
        """Return the registries that can be named at this host: one of a registry's hosts stands for that alone."""
        listed = self._listed(host)
        return [listed] if listed is not None else list(self._registries.values())

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


@lru_cache(maxsize=64)
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
                    realm = given.get("realm") or ""
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
    joint = "&" if "?" in url else "?"
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
    if not HOST.fullmatch(parts.netloc):
        raise BadGateway(f"{registry.name} names a realm without a plain host")
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


Found = TypeVar("Found")


class Once(Generic[Found]):
    """Do what several ask for at a time once for all of them.

    It runs in a greenlet of its own: the one who asked first may run out of time, or leave.
    """

    def __init__(self) -> None:
        self._running: dict[tuple[str, ...], gevent.Greenlet[..., Found | MirrorError]] = {}

    def get(self, key: tuple[str, ...], run: Callable[[], Found], seconds: float | None = None) -> Found:
        """Return what `run` returns; its MirrorError reaches all. Raises Late after so many seconds."""
        if key not in self._running:
            self._running[key] = gevent.spawn(self._run, key, run)
        try:
            found = self._running[key].get(timeout=seconds)
        except gevent.Timeout:
            raise Late("upstream is slow") from None
        if isinstance(found, MirrorError):
            raise found
        return found

    def _run(self, key: tuple[str, ...], run: Callable[[], Found]) -> Found | MirrorError:
        try:
            return run()
        except MirrorError as error:
            return error
        finally:
            del self._running[key]


class TokenStore:
    """Keep the mirror's own tokens, one for each registry, site and scope, shared by all clients."""

    def __init__(self) -> None:
        self._tokens: dict[tuple[str, ...], Token] = {}
        self._asked: Once[Token] = Once()

    def get(self, key: tuple[str, ...], fetch: Callable[[], Token]) -> str:
        """Return the token for `key`. However many ask, `fetch` runs once; its MirrorError reaches all."""
        token = self._tokens.get(key)
        if token is not None and time.monotonic() < token.renew_at:
            return token.value
        return self._asked.get(key, lambda: self._kept(key, fetch())).value

    def _kept(self, key: tuple[str, ...], token: Token) -> Token:
        self._tokens.pop(key, None)  # it goes to the end: the first is the oldest
        self._tokens[key] = token
        if len(self._tokens) > MAX_TOKENS:
            del self._tokens[next(iter(self._tokens))]
        return token

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
PLAIN_POLL: Any = monkey.get_original("select", "poll")
PING_SECONDS = 12  # dockerd waits 15
OPEN_SECONDS = 60  # for which a registry is taken to ask for nothing: a false 200 must not last
MAX_FOREIGN_BODY = 1 << 20  # of a token answer, an error, a redirect: whatever is read whole
MAX_INTERIM = 10  # of answers 1xx before the real one
CHUNKS_AT_ONCE = 256  # until other requests have their turn
MAX_TAGS = 16 << 20  # bytes of a list of tags, which may be renamed: gcr.io lists all digests in it
RETRY_AFTER = "60"  # seconds, where upstream limits and does not say how long
MAX_RETRY_AFTER = 6 * 3600.0  # seconds: Docker Hub's window
LIMIT_HEADERS = ("RateLimit-Limit", "RateLimit-Remaining")
KEEP_ON_ERROR = ("Retry-After", "Content-Range", *LIMIT_HEADERS)
SLOW_CHUNK, EARLY_CHUNK, FAST_CHUNK = 16 << 10, 64 << 10, 256 << 10  # bytes
SMALL = 32 << 10  # bytes of a body that are read before the answer begins
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
    `whole`, a number of bytes, asks for a body of at most so many to be read at once, `verify` for a body that has not
    its digest to be refused.
    """

    target: Target
    method: str
    resource: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    authorization: str | None
    missing: type[NotFound]
    trail: Trail
    whole: int = 0
    verify: bool = False

    @property
    def plain_headers(self) -> dict[str, str]:
        """Return the headers that neither ask for a part nor set a condition."""
        return kept(self.headers, ("Accept", "Via"))

    @property
    def digest(self) -> str | None:
        """Return the digest that names the content, and so every byte of it; None for a tag or a list."""
        kind, _, reference = self.resource.partition("/")
        return reference if kind in ("blobs", "manifests") and ":" in reference else None

    def hash(self, answer: Answer) -> Hash | None:
        """Return what the answer's body is to be hashed with; None where it is not whole, or not to be verified."""
        digest = self.digest if self.verify and self.method == "GET" and answer.status == 200 else None
        return Hash(digest) if digest is not None and digest.partition(":")[0] in HEX_DIGITS else None


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
        found = re.match(r"(https?://[^/?]+)/v2/([^?]+)/(?:manifests|blobs|tags|referrers)/", url)
        return cls(registry, found[1], found[2]) if found and NAME.fullmatch(found[2]) else None

    @property
    def key(self) -> tuple[str, str, str]:
        """Return what is known of the site under: never the base alone, for two registries may have the same."""
        return self.registry.name, self.base, "account" if self.account else ""


class Answer(NamedTuple):
    """Hold upstream's response, the registry that answered, and the beginning of the body if it has been read.

    `site` is None where a storage host has the last word, to which the registry redirected. `base` is the URL of the
    endpoint that was asked.
    """

    response: requests.Response
    site: Site | None
    start: bytes = b""
    base: str = ""

    @property
    def status(self) -> int:
        """Return the HTTP status."""
        return self.response.status_code

    @property
    def host(self) -> str:
        """Return host and port of the server that answered."""
        return host_of(str(self.response.url))

    @property
    def is_complete(self) -> bool:
        """Tell whether the body has been read whole."""
        return str(len(self.start)) == self.response.headers.get("Content-Length")


class Span(NamedTuple):
    """Say which bytes of a whole an answer holds, the first and the last counted in; None is not known."""

    first: int
    last: int | None
    total: int | None

    @classmethod
    def of(cls, answer: Answer) -> Span | None:
        """Return what an answer to GET holds; None where the rest of it could not be asked for: several ranges."""
        length = answer.response.headers.get("Content-Length")
        if answer.status == 200:
            return cls(0, None, None) if length is None else cls(0, int(length) - 1, int(length))
        found = parse_content_range_header(answer.response.headers.get("Content-Range"))
        if answer.status != 206 or found is None or found.start is None or found.stop is None:
            return None
        fits = found.units == "bytes" and length in (None, str(found.stop - found.start))
        return cls(found.start, found.stop - 1, found.length) if fits else None


class Hash:
    """Hash bytes as they pass, and tell whether all together have a digest of sha256 or sha512."""

    def __init__(self, digest: str) -> None:
        algorithm, _, self._expected = digest.partition(":")
        self._hash = hashlib.new(algorithm)

    def update(self, chunk: bytes) -> None:
        """Take the next bytes in."""
        self._hash.update(chunk)

    @property
    def is_right(self) -> bool:
        """Tell whether the bytes are the right ones."""
        return self._hash.hexdigest() == self._expected


def wrong_digest(host: str) -> BadGateway:
    """Return the error for bytes that are not what was asked for."""
    error = BadGateway(f"{host} sent bytes that do not have the digest they are named by")
    error.cools, error.reason = False, "digest"  # it is about one object
    return error


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
    except (OSError, ValueError):  # ValueError: a zero byte
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
    """Refuse what Python fails oddly at, and bound what it does not.

    Its parser of mail stumbles over some heads, and it takes a negative size of a chunk for all up to the end of the
    connection. It takes interim answers (1xx) and trailers without end. A time limit ends no loop over bytes that are
    there already: only where it waits, or sleeps, do other requests and timers have their turn.
    """

    _heads = 0  # of answers and chunks

    def begin(self) -> None:
        """Read the head of an answer."""
        try:
            super().begin()
        except (TypeError, ValueError) as error:  # of "multipart/x; boundary*=a; boundary*0=b"
            raise http.client.HTTPException("a head that cannot be read") from error

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


def is_ready(sock: socket.socket, event: int) -> bool:
    """Tell whether a socket can be read (POLLIN) or written (POLLOUT) now; gevent's poll would take far longer."""
    look = PLAIN_POLL()
    look.register(sock.fileno(), event)
    return bool(look.poll(0))


def strict(base: type[HTTPConnection], idle: float) -> type[HTTPConnection]:
    """Return a class of connections whose read timeout is `idle` seconds once the head of an answer is there."""

    class Strict(base):  # type: ignore[valid-type,misc]
        response_class = StrictResponse

        @property
        def is_connected(self) -> bool:
            """Tell whether a kept connection may be used: none that has ended, or brings what nobody asked for."""
            return self.sock is not None and not is_ready(self.sock, select.POLLIN)

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
    if parts.scheme not in ("http", "https") or not HOST.fullmatch(parts.netloc):
        raise BadGateway(f"{host_of(url)} redirects to what is no plain http or https URL")
    if parts.scheme == "http" and urlsplit(url).scheme == "https":
        raise BadGateway(f"{host_of(url)} redirects from https to http")
    return parts.geturl()


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
        json.dumps(found, allow_nan=False)  # it has to be written again, which 1e999 cannot be
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
    is_page = parse_options_header(answer.response.headers.get("Content-Type"))[0] == "text/html"  # of a middlebox
    error.is_final = answer.site is not None and not is_page and (error.is_quoted or answer.status in (401, 404))
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
    if not framed or not re.fullmatch("[0-9]{1,18}", length or "0") or length == "":
        response.close()
        raise BadGateway(f"{answer.host} does not say how long its answer is")
    if answer.status == 206 and "Content-Range" in response.headers and Span.of(answer) is None:
        response.close()
        raise BadGateway(f"{answer.host} contradicts itself about the range that it sends")
    if bodiless:
        if coding is None:
            raw.read(decode_content=False)  # there is none: this gives the connection back
        response.close()
        return answer
    if length is not None and int(length) <= SMALL:
        return answer._replace(start=raw.read(decode_content=False))
    if length is None and not is_blob:
        return answer._replace(start=raw.read(SMALL, decode_content=False))
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

    def failed(self, key: Key, began: float, retry_after: float | None) -> float | None:
        """Pause for `retry_after` seconds, else for 30 s, doubled after each further failure up to 10 min.

        Return for how long; None where that is known already.
        """
        if began < self._failed_at.get(key, 0):
            return None
        now = time.monotonic()
        if retry_after is None:
            retry_after = self._pause[key] = min(2 * self._pause.get(key, FIRST_PAUSE / 2), LONGEST_PAUSE)
        self._failed_at[key] = now
        self._until[key] = now + max(retry_after, 1)
        self._tried.discard(key)
        log.warning("%s is left alone for %.0f s", host_of(key[1]), self._until[key] - now)
        return self._until[key] - now

    def succeeded(self, key: Key, began: float) -> bool:
        """Forget that the endpoint failed; tell whether that was known."""
        if key not in self._until or began < self._failed_at[key]:
            return False
        log.warning("%s answers again", host_of(key[1]))
        for known in (self._until, self._pause, self._failed_at):
            known.pop(key, None)
        self._tried.discard(key)
        return True

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
    try:
        date = parse_date(text)
    except OverflowError:  # of a year with eleven digits
        date = None
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
            proxy = self._https if origin(url)[0] == "https" else self._http
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

    def __init__(self, config: Config, registries: Mapping[str, Registry], telemetry: Telemetry) -> None:
        self.telemetry = telemetry
        self._login = config.login
        self._timeouts = (config.connect_timeout, config.first_byte_timeout)
        self._first_byte = config.first_byte_timeout
        self._budget = config.connect_timeout + config.first_byte_timeout
        self.idle_timeout = config.idle_timeout
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

    def fetch(self, wanted: Wanted, endpoint: int = 0) -> Answer:
        """Return the answer to pass on: 2xx or 304. Whoever gets it must close its response.

        The mirror itself goes from one endpoint to the next while they limit or fail, round from number `endpoint`; a
        client's own credentials go to number 0 only. Raises MirrorError: the most telling of the failures, within
        connect and first-byte timeout in all.
        """
        registry, repository, _ = wanted.target
        sites = [Site.endpoint(registry, number, repository) for number in range(len(registry.endpoints))]
        if wanted.authorization is not None or len(sites) == 1:
            return self._attempt(sites[0], wanted, self._budget)
        sites = sites[endpoint % len(sites) :] + sites[: endpoint % len(sites)]
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
            except MirrorError as error:
                error.is_final &= site.base == wanted.target.registry.endpoints[0]  # another one may be anybody's
                raise
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
                pause = self._cooldowns.failed(site.key, began, retry_after(error.headers))
                if pause is not None:
                    self.telemetry.cools(site.registry.name, site.base, pause)
            else:
                self._cooldowns.give_up(site.key)
            raise
        except gevent.GreenletExit:  # the client left
            self._cooldowns.give_up(site.key)
            raise
        except MirrorError:
            self._recovered(site, began)
            raise
        self._recovered(site, began)

    def _recovered(self, site: Site, began: float) -> None:
        if self._cooldowns.succeeded(site.key, began):
            self.telemetry.recovered(site.registry.name, site.base)

    def _attempt(self, site: Site, wanted: Wanted, seconds: float) -> Answer:
        url = with_query(f"{site.base}/v2/{site.repository}/{wanted.resource}", wanted.query)
        with self._noted(site), self._deadline(site.base, seconds):
            try:
                return self._answer(site, wanted, url)
            except UPSTREAM_FAILURES as error:  # a body that was begun here was cut: on a bad line, once is no time
                log.warning("%s broke off: asked again (%s)", host_of(site.base), root_cause(error))
                return self._answer(site, wanted, url)

    @contextmanager
    def _noted(self, site: Site, is_ping: bool = False) -> Iterator[None]:
        """Tell whether an endpoint answers or fails; 404, 401 and 403 are answers."""
        name, began = site.registry.name, time.monotonic()
        try:
            yield
        except FAILURES as error:
            self.telemetry.failed(name, site.base, error.reason, str(error))
            raise
        except MirrorError:
            self.telemetry.answered(name, site.base, began, is_ping)
            raise
        self.telemetry.answered(name, site.base, began, is_ping)

    def wrong_digest(self, registry: str, answer: Answer) -> BadGateway:
        """Return the error for an answer whose bytes are not what was asked for, and note it."""
        error = wrong_digest(answer.host)
        self.telemetry.failed(registry, answer.base, error.reason, str(error))
        return error

    def _answer(self, site: Site, wanted: Wanted, url: str) -> Answer:
        answer = self._follow(site, wanted.method, url, wanted.headers, wanted.authorization, wanted.trail)
        limit, remaining = (answer.response.headers.get(name) for name in LIMIT_HEADERS)
        if limit is not None and remaining is not None and wanted.authorization is None:
            self.telemetry.quota(site.registry.name, site.base, limit, remaining)
        raise_for_status(answer, wanted.missing, lambda errors: self._refusal(site, wanted, answer, errors))
        answer = started(answer, wanted.method, is_blob=wanted.missing is BlobUnknown)
        if answer.is_complete and (whole := wanted.hash(answer)):
            whole.update(answer.start)
            if not whole.is_right:
                raise wrong_digest(answer.host)
        if wanted.whole:
            rest = read_bounded(answer.response, wanted.whole - len(answer.start))
            answer = answer._replace(start=answer.start + rest)
        self.telemetry.received(site.registry.name, len(answer.start))
        return answer._replace(base=site.base)

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

    def reach(self, registry: Registry, trail: Trail) -> None:
        """Return where one of the registry's endpoints answers; else raise the last one's MirrorError."""
        seconds = min(PING_SECONDS, self._budget) / len(registry.endpoints)
        failure: MirrorError = BadGateway(f"{registry.name} has no endpoint")
        for number in range(len(registry.endpoints)):
            try:
                self._ping(Site.endpoint(registry, number), None, trail, seconds)
                return
            except MirrorError as error:
                failure = error
        raise failure

    def visit(self, site: Registry, method: str, path: str, headers: Mapping[str, str], trail: Trail) -> Answer:
        """Ask a site, which is no registry, for a page, as nobody; a redirect is the browser's to follow.

        Whoever gets the answer must close its response. Raises MirrorError.
        """
        url = site.endpoints[0] + path
        trail.ask(url)
        with self._deadline(url, self._budget):
            answer = Answer(self._send(site, method, url, headers), None)
            if answer.status < 500:
                return started(answer, method, is_blob=True)
            read_bounded(answer.response)
        raise BadGateway(f"{answer.host} answered {answer.status}")

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
        with self._noted(site, is_ping=True), self._deadline(site.base, seconds):
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
RESUME_PAUSES = (0, 1 / 60, 1 / 30, 1 / 15, 2 / 15)  # of the idle timeout, before each try to go on
PROGRESS = SLOW_CHUNK  # bytes after which the tries are counted anew
MAX_SKIPPED = 32 << 20  # bytes that a server which ignores Range may send again


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


def is_same(before: Answer, after: Answer, digest: str | None) -> bool:
    """Tell whether two answers hold bytes of one thing.

    What a `digest` names is the same everywhere, and its ETags are compared at one host only: another one may have its
    own. All else must have the same digest in its header, or the same strong ETag (RFC 9110, 13.1.5) of the same host.
    """
    old, new = before.response.headers, after.response.headers
    if old.get("Content-Encoding") != new.get("Content-Encoding"):
        return False
    digests = {headers.get("Docker-Content-Digest") for headers in (old, new)}
    (tag, weak), (new_tag, new_weak) = unquote_etag(old.get("ETag")), unquote_etag(new.get("ETag"))
    if digest is not None:
        same_tags = before.host != after.host or None in (tag, new_tag) or tag == new_tag
        return same_tags and digests <= {None, digest}
    if None not in digests:
        return len(digests) == 1
    return before.host == after.host and tag is not None and (tag, weak) == (new_tag, new_weak) and not weak


class Stream:
    """Read the body of an answer to GET. When upstream breaks off in the middle, ask for the rest, and go on.

    The registry is asked anew, since a storage host's signed URL may have expired; after a silence, or a try that
    brought nothing, the next endpoint is asked first. A server that ignores Range sends it all again, of which up to
    `MAX_SKIPPED` is skipped. Source: RFC 9110, 14.2 to 14.4. Whoever has a stream must close it.
    """

    def __init__(self, upstream: Upstream, wanted: Wanted, answer: Answer) -> None:
        self._upstream = upstream
        self._telemetry = upstream.telemetry
        self._registry = wanted.target.registry.name
        self._wanted = wanted
        self._answer = answer
        self._ready = answer.start
        self._span = Span.of(answer)
        self._at = self._resumed_at = self._span.first if self._span else 0  # the next byte's number in the whole
        self._tries = 0  # since there was progress
        self._endpoint = 0

    def wrong_digest(self) -> BadGateway:
        """Return the error for bytes that are not what was asked for, and note it."""
        return self._upstream.wrong_digest(self._registry, self._answer)

    def read(self, size: int) -> bytes:
        """Return at most `size` bytes (the first read may bring more), empty at the end.

        Raises BadGateway where upstream broke off and the rest is not to be had.
        """
        while True:
            try:
                chunk = self._next(size)
            except UPSTREAM_FAILURES as error:
                self._go_on(error)
            else:
                self._at += len(chunk)
                return chunk

    def close(self) -> None:
        """Close the connection to upstream, unless the answer was read to its end and gave it back."""
        self._answer.response.close()

    def _next(self, size: int) -> bytes:
        left = self._span.last + 1 - self._at if self._span is not None and self._span.last is not None else None
        if left == 0:
            return b""
        if self._ready:
            ready, self._ready = self._ready[:left], b""
            return ready
        if self._tries:  # a reset loses what a read has gathered so far: on a bad line, read as little as it brings
            size = min(size, max(self._at - self._resumed_at, SLOW_CHUNK))
        chunk: bytes = self._answer.response.raw.read(min(size, left or size), decode_content=False)
        if left and not chunk:
            raise http.client.IncompleteRead(b"", left)
        self._telemetry.received(self._registry, len(chunk))
        return chunk

    def _go_on(self, error: Exception) -> None:
        """Take the place of an answer that broke off by one that holds the rest of it."""
        before = self._answer.host
        if self._at - self._resumed_at >= PROGRESS:
            self._tries = 0
        if self._tries or isinstance(error, (TimeoutError, urllib3.exceptions.TimeoutError)):
            self._endpoint += 1
        while self._span is not None and self._tries < len(RESUME_PAUSES):
            self.close()
            gevent.sleep(RESUME_PAUSES[self._tries] * self._upstream.idle_timeout)
            self._tries += 1
            try:
                self._answer = self._rest(self._span)
            except MirrorError as failure:
                error = failure
                self._endpoint += 1
            else:
                self._ready, self._resumed_at = self._answer.start, self._at
                self._telemetry.resumed(self._registry)
                log.warning("%s broke off: went on at byte %d with %s", before, self._at, self._answer.host)
                return
        raise BadGateway(f"{before} broke off in mid-answer: {root_cause(error)}") from error

    def _rest(self, span: Span) -> Answer:
        """Return an answer that goes on where the last one broke off."""
        end = "" if span.last is None or span.last + 1 == span.total else span.last
        headers = self._wanted.plain_headers | {"Range": f"bytes={self._at}-{end}"}
        etag = self._answer.response.headers.get("ETag", "")
        if self._wanted.digest is None and etag.startswith('"'):  # a weak one must not stand there
            headers["If-Range"] = etag
        answer = self._upstream.fetch(self._wanted._replace(headers=headers, trail=Trail()), self._endpoint)
        try:
            found = self._checked(answer, span)
            if span.last is None and found.total is not None:
                self._span = Span(span.first, found.total - 1, found.total)
            return skip(answer, self._at - found.first)
        except BaseException:
            answer.response.close()
            raise

    def _checked(self, answer: Answer, span: Span) -> Span:
        """Return what an answer holds if that is the rest, its beginning, or all; raise BadGateway."""
        found = Span.of(answer)
        if found is None or differ(found.total, span.total) or not is_same(self._answer, answer, self._wanted.digest):
            raise BadGateway(f"{answer.host} has something else there now")
        if answer.status == 200:
            if self._at >= MAX_SKIPPED:
                raise BadGateway(f"{answer.host} ignores Range, and would send {self._at} bytes again")
            return found
        end = span.last if span.last is not None else found.total and found.total - 1
        if found.first != self._at or found.last is None or end is None or found.last > end:
            raise BadGateway(f"{answer.host} sends another range than it was asked for")
        return found


def differ(one: int | None, other: int | None) -> bool:
    """Tell whether two numbers, as far as they are known, are two."""
    return None not in (one, other) and one != other


def skip(answer: Answer, count: int) -> Answer:
    """Return the answer without the first `count` bytes of its body; raise BadGateway where they are not to be had."""
    start = answer.start
    with upstream_errors(answer.host):
        while len(start) < count:
            count -= len(start)
            start = answer.response.raw.read(min(count, FAST_CHUNK), decode_content=False)
            if not start:
                raise BadGateway(f"{answer.host} ended too early")
    return answer._replace(start=start[count:])


class Transfer:
    """Stand for the transfer of one blob, from its request to its end; this one has no limit, and is not counted.

    Whoever has a transfer must close it.
    """

    is_slowed = False  # whether spend() may wait

    def begin(self, size: int | None, label: str = "") -> None:
        """Say how many bytes there will be, as far as that is known, and whether the cache has them."""

    def spend(self, count: int) -> None:
        """Account for bytes that are to be sent; wait where those before were too fast."""

    def finish(self) -> None:
        """Say that all bytes were sent."""

    def fail(self) -> None:
        """Say that the rest of the bytes is not to be had."""

    def hand_over(self, count: int) -> None:
        """Say that nginx sends so many bytes."""

    def close(self) -> None:
        """End the transfer."""


class Pace:
    """Choose the `size` of a chunk by the transfer's rate: large ones save CPU, small ones keep a slow client cheap.

    What counts is the rate of the last `WINDOW` bytes: that of fewer would tell of the sockets' buffers. Until so many
    have come, a chunk is as large as all before it, up to `EARLY_CHUNK`, but small from the first slow one on: then the
    client's buffers are full, or bytes come slowly from far away.
    """

    def __init__(self) -> None:
        self.size = SLOW_CHUNK
        self._grows = True
        self._window = 0
        self._since = self._latest = time.monotonic()

    @property
    def is_slow(self) -> bool:
        """Tell whether the transfer was slow when that was looked at last."""
        return self.size == SLOW_CHUNK and not self._grows

    def count(self, count: int) -> None:
        """Account for bytes that came."""
        self._window += count
        now = time.monotonic()
        if self._window >= WINDOW:
            self.size = FAST_CHUNK if self._window > FAST_RATE * (now - self._since) else SLOW_CHUNK
            self._window, self._since, self._grows = 0, now, False
        elif self._grows:
            self._grows = count > FAST_RATE * (now - self._latest)
            self._latest = now
            self.size = min(max(self._window, SLOW_CHUNK), EARLY_CHUNK) if self._grows else SLOW_CHUNK


def verified(chunks: Iterator[bytes], whole: Hash, wrong: Callable[[], BadGateway]) -> Iterator[bytes]:
    """Yield chunks, the last one only if all bytes together are right; else raise what `wrong` returns."""
    held = b""
    for chunk in chunks:
        yield held
        whole.update(chunk)
        held = chunk
    if not whole.is_right:
        raise wrong()
    yield held


@contextmanager
def reset_on_failure(client: socket.socket | None, transfer: Transfer) -> Iterator[None]:
    """Let the client's connection end with a reset where its answer fails, and tell the transfer if that is our fault.

    A plain close would end a body without a length cleanly.
    """
    reset = ConnectionResetError(errno.ECONNRESET, "the answer broke off")
    try:
        yield
    except MirrorError as error:
        log.warning("%s", error)
        transfer.fail()
        reset_on_close(client)
        raise reset from error
    except Exception as error:
        if not isinstance(error, OSError):  # which is the client's, who went
            log.error("an answer failed", exc_info=error)
            transfer.fail()
        reset_on_close(client)
        raise reset from error
    except gevent.GreenletExit:
        reset_on_close(client)
        raise


def reset_on_close(client: socket.socket | None) -> None:
    """Let a connection end with a reset; None: a server without gevent."""
    if client is not None:
        with suppress(OSError):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)


class Body:
    """Pass the bytes of an answer on as they come. Whoever has one must close it.

    If upstream breaks off for good, the client's connection is reset. With a `whole` to be hashed, the last chunk is
    held back until all bytes together are found to be right.
    A chunk is read when the client takes it, and let go as soon as that is sent: gunicorn would hold what is yielded
    until the next one is there. Under another server they are yielded.
    A class and no generator: a generator that was never started cannot close its response.
    """

    def __init__(self, stream: Stream, transfer: Transfer, environ: Mapping[str, Any], whole: Hash | None) -> None:
        self._stream = stream
        self._transfer = transfer
        self._client: socket.socket | None = environ.get("gunicorn.socket")
        self._response = environ.get("gunicorn.response")
        self._whole = whole
        self._watch: ClientWatch | None = None

    def __iter__(self) -> Iterator[bytes]:
        if self._client is not None:
            self._watch = ClientWatch(self._client)
        yield b""  # sends the headers: containerd waits 30 s for them, the first chunk may take longer
        with reset_on_failure(self._client, self._transfer):
            chunks = self._chunks()
            if self._whole is not None:
                chunks = verified(chunks, self._whole, self._stream.wrong_digest)
            if self._response is None:
                yield from chunks
            else:
                for chunk in chunks:
                    self._response.write(chunk)
                    del chunk
            self._transfer.finish()

    def _chunks(self) -> Iterator[bytes]:
        pace = Pace()
        while chunk := self._stream.read(self._wanted(pace)):
            pace.count(len(chunk))
            self._transfer.spend(len(chunk))
            yield chunk
            del chunk

    def _wanted(self, pace: Pace) -> int:
        """Return how many bytes to read, once a slow client takes more: nothing is held while it takes nothing.

        A socket is writable once a third of its buffer is free, in which a larger chunk has room. With a `whole`, that
        would be held back.
        """
        if self._client is None or not pace.is_slow or is_ready(self._client, select.POLLOUT):
            return pace.size
        gevent.socket.wait_write(self._client.fileno())
        return EARLY_CHUNK if self._whole is None else pace.size

    def close(self) -> None:
        """Close the connection to upstream, and end the transfer."""
        if self._watch is not None:
            self._watch.stop()
        try:
            self._stream.close()
        finally:
            self._transfer.close()


class Relayed(Response):
    """Send headers as upstream gave them: werkzeug adds and computes none."""

    default_mimetype = None
    automatically_set_content_length = False


def relay(
    upstream: Upstream, wanted: Wanted, answer: Answer, transfer: Transfer, environ: Mapping[str, Any]
) -> Response:
    """Return the response that passes `answer` on, and in the end closes `transfer`."""
    headers = kept(answer.response.headers, RESPONSE_HEADERS)
    has_body = wanted.method != "HEAD" and answer.status not in (204, 304)
    if has_body:
        length = answer.response.headers.get("Content-Length")
        transfer.begin(int(length) if length is not None else None)
    if has_body and (transfer.is_slowed or not answer.is_complete):
        body = Body(Stream(upstream, wanted, answer), transfer, environ, wanted.hash(answer))
        return Relayed(body, answer.status, headers, direct_passthrough=True)
    transfer.spend(len(answer.start))
    transfer.finish()
    transfer.close()
    return Relayed(answer.start, answer.status, headers)


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
# Cache
# ---------------------------------------------------------------------------------------------------------------------

# Which manifests a tag may stand for. Only a client that takes them all learns what the tag stands for at the registry.
MANIFEST_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
SIGNED = "application/vnd.docker.distribution.manifest.v1+"  # its digest is not that of its bytes
MAX_MANIFEST = 4 << 20  # bytes, as registries take them
SLOW_CHECK = 3.0  # seconds that a client with a kept tag waits for upstream
QUIET_SECONDS = 10  # for which a registry that failed is not asked about kept tags
FOLLOW_SECONDS = 8.0  # in which another worker's download must have begun
POLL_SECONDS = 0.02  # between two looks at what another worker writes
MAX_UNWRITTEN = 1 << 20  # bytes of a download that wait while others are written
MAX_ALONE = 16  # downloads that go on without a client
MAX_REOPENED = 3  # times that a reader looks for another source
SENDFILE = 256 << 10  # bytes that are sent at a time
THROTTLED = 32 << 10  # the same within a client's bandwidth
AHEAD = 4 << 20  # bytes that are asked of a cold disk at a time
TURN = 4 << 20  # bytes after which a transfer that never waits lets others have their turn
FILL_SECONDS = 3  # within which the disk must tell how full it is
DISK_ERRORS = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EUCLEAN)
IMMUTABLE = "max-age=31536000, immutable"
WARN_STALE, WARN_FAILED = '110 - "Response is Stale"', '111 - "Revalidation Failed"'


class Lost(Exception):
    """Say that a source has no more bytes, though there should be; `again`: another source may have them."""

    def __init__(self, again: bool = False) -> None:
        super().__init__("a source of the cache has ended too early")
        self.again = again


class Threads:
    """Run what may wait for the disk outside of the event loop."""

    def __init__(self, count: int) -> None:
        self._count = count

    @cached_property
    def _pool(self) -> ThreadPool:
        """Return the threads, made by the worker that uses them: they cannot be forked.

        All are started at once: where one cannot be started later, gevent has taken its task already.
        """
        pool, sleep = ThreadPool(self._count), monkey.get_original("time", "sleep")
        gevent.wait([pool.spawn(sleep, 0.01) for _ in range(self._count)])
        return pool

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function and return what it returns, or raise what it raises."""
        value, error = cast(tuple[Any, Exception | None], self._pool.spawn(_caught, function, arguments).get())
        if error is not None:
            raise error
        return value


def _caught(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, Exception | None]:
    try:
        return function(*arguments), None
    except Exception as error:  # gevent would print it as well
        return None, error


class Health:
    """Remember, for all workers, whether the cache's disk fails; each change is one line of the log."""

    def __init__(self) -> None:
        self._failing = mmap.mmap(-1, 1)  # made before the workers are forked: they share it

    @property
    def fails(self) -> bool:
        """Tell whether the disk failed when it was last used."""
        return self._failing[0] != 0

    def failed(self, error: Exception) -> None:
        """Note what kept something from being kept, if the disk is to blame."""
        known = isinstance(error, OSError) and error.errno not in (errno.EMFILE, errno.ENFILE)
        if known and not self.fails:
            self._failing[0] = 1
            log.error("the cache fails: %s; what it cannot keep passes through", cast(OSError, error).strerror)
        elif not isinstance(error, (OSError, Full)):
            log.error("the cache failed", exc_info=error)

    def works(self) -> None:
        """Note that something was kept."""
        if self.fails:
            self._failing[0] = 0
            log.warning("the cache works again")


class Source(Protocol):
    """Give the bytes of a blob, from a file that is whole or still grows. Whoever has one must close it."""

    size: int
    label: str
    stored: float

    @property
    def fd(self) -> int:
        """Return the file that is read."""

    @property
    def written(self) -> int:
        """Return how many bytes are there."""

    def wait(self) -> None:
        """Return when there may be more; raise Lost where there never will, and MirrorError where upstream failed."""

    def rest(self, at: int) -> Rest | None:
        """Return the bytes from number `at` on that are on no disk, if this source has them."""

    def close(self) -> None:
        """Let go of the source."""


class Kept:
    """Read a blob that is whole."""

    label = "HIT"

    def __init__(self, blob: Blob) -> None:
        self.blob = blob
        self.size = self.written = blob.size
        self.stored = blob.stored

    @property
    def fd(self) -> int:
        """Return the file that is read."""
        return self.blob.fd

    def wait(self) -> None:
        """Raise Lost: somebody shortened the file."""
        raise Lost

    def rest(self, at: int) -> None:
        """Return nothing."""

    def close(self) -> None:
        """Close the file."""
        self.blob.close()


class Followed:
    """Read along what another worker downloads."""

    label = "JOIN"

    def __init__(self, follower: Follower) -> None:
        self._follower = follower
        self.size = follower.size
        self.stored = time.time()

    @property
    def fd(self) -> int:
        """Return the file that is read."""
        return self._follower.fd

    @property
    def written(self) -> int:
        """Return how many bytes are there; raise BadGateway where they were wrong."""
        try:
            return self._follower.written
        except WrongDigest:
            raise wrong_digest("upstream") from None

    def wait(self) -> None:
        """Return a little later; raise Lost where the other worker gave up."""
        if self._follower.has_ended and self.written < self.size:
            raise Lost(again=True)
        gevent.sleep(POLL_SECONDS)

    def rest(self, at: int) -> None:
        """Return nothing."""

    def close(self) -> None:
        """Close the file."""
        self._follower.close()


class Joined:
    """Read along what this worker downloads."""

    def __init__(self, download: Download, label: str) -> None:
        self._download = download
        self.label = label
        self.size = cast(int, download.size)
        self.stored = time.time()
        self._closed = False

    @property
    def fd(self) -> int:
        """Return the file that is read."""
        return self._download.fd

    @property
    def written(self) -> int:
        """Return how many bytes are there."""
        return self._download.written

    def wait(self) -> None:
        """Return when there may be more; raise as the download ended."""
        self._download.wait()

    def rest(self, at: int) -> Rest | None:
        """Return what the disk did not take; the first one who has read so far gets it."""
        return self._download.take_rest(at)

    def close(self) -> None:
        """Leave the download; a second time does nothing."""
        if not self._closed:
            self._closed = True
            self._download.leave()


class Rest:
    """Bring the bytes from number `at` on that are on no disk: some that are here, then a stream's.

    Whoever has one must close it.
    """

    def __init__(self, at: int, ready: bytes, stream: Stream) -> None:
        self.at = at
        self._ready = ready
        self._stream = stream

    def wrong_digest(self) -> BadGateway:
        """Return the error for bytes that are not what was asked for, and note it."""
        return self._stream.wrong_digest()

    def __iter__(self) -> Iterator[bytes]:
        yield self._ready
        self._ready = b""
        while chunk := self._stream.read(EARLY_CHUNK):
            yield chunk

    def close(self) -> None:
        """Close the connection to upstream."""
        self._stream.close()


class Writer:
    """Have threads hash and write what comes, while more comes. Whoever has one must end it.

    `grown` is called whenever more bytes are on the disk, and where it failed.
    """

    def __init__(self, threads: Threads, partial: Partial, grown: Callable[[], None]) -> None:
        self.failure: Exception | None = None
        self._threads = threads
        self._partial = partial
        self._grown = grown
        self._came: list[bytes] = []
        self._taken: list[bytes] = []  # of which a thread began to write at byte number `_begun`
        self._begun = 0
        self._ended = False
        self._more, self._less = Event(), Event()
        self._greenlet = gevent.spawn(self._run)

    def put(self, chunk: bytes) -> None:
        """Take bytes; return when not too many wait for a thread, which may still write those before."""
        self._came.append(chunk)
        self._more.set()
        while sum(map(len, self._came)) >= MAX_UNWRITTEN and self.failure is None:
            self._less.clear()
            self._less.wait()

    def end(self) -> None:
        """Return when all that came is on the disk, or the disk failed."""
        self._ended = True
        self._more.set()
        self._greenlet.join()

    def unwritten(self) -> bytes:
        """Return, after the end, what the disk did not take."""
        return b"".join(self._taken)[self._partial.written - self._begun :] + b"".join(self._came)

    def _run(self) -> None:
        while self.failure is None and (self._came or not self._ended):
            if not self._came:
                self._more.clear()
                self._more.wait()
                continue
            self._taken, self._came, self._begun = self._came, [], self._partial.written
            self._less.set()  # what comes next is read while this is written
            try:
                self._threads.run(self._partial.write, self._taken)
                self._taken, self._begun = [], self._partial.written
            except Exception as error:
                self.failure = error
            self._grown()
        self._less.set()


class Download:
    """Bring one blob from upstream to the disk, for all clients of this worker that want it.

    Once it is `ready`, its `size` is known; or it has ended, with an `error`, or with an answer that cannot be kept:
    then the first who asks takes that, and passes it on.
    """

    def __init__(self, store: PullThrough, wanted: Wanted) -> None:
        self.wanted = wanted._replace(method="GET", headers=wanted.plain_headers)
        self.digest = cast(str, wanted.digest)
        self.size: int | None = None
        self.error: MirrorError | Lost | None = None
        self.ready = Event()
        self.label = "MISS"  # of the first client
        self.readers = 0
        self._store = store
        self._partial: Partial | None = None
        self._grown = Event()
        self._answer: Answer | None = None
        self._rest: Rest | None = None
        self._stopped = False
        self._ended = False

    @property
    def fd(self) -> int:
        """Return the file that is read."""
        return self._partial.fd if self._partial is not None else -1

    @property
    def written(self) -> int:
        """Return how many bytes are on disk."""
        return self._partial.written if self._partial is not None else 0

    def join(self) -> None:
        """Count a reader, who must leave."""
        self.readers += 1
        self._stopped = False

    def leave(self) -> None:
        """Count a reader that has gone; the last one may end the download, and closes what is left of it."""
        self.readers -= 1
        if not self.readers:
            self._stopped = not self._store.goes_on_alone()
            self._clear()

    def take_answer(self) -> Answer | None:
        """Return the answer that cannot be kept, to one caller."""
        answer, self._answer = self._answer, None
        return answer

    def take_rest(self, at: int) -> Rest | None:
        """Return what the disk did not take, to the first one who has read so far."""
        if self._rest is None or self._rest.at != at:
            return None
        rest, self._rest = self._rest, None
        return rest

    def wait(self) -> None:
        """Return when there may be more bytes; raise Lost or MirrorError where there never will."""
        if self.error is not None:
            raise self.error
        if self._ended:
            raise Lost(again=self.written != self.size)  # it was stopped, or the file was shortened
        self._grown.wait()

    def run(self) -> None:
        """Download; nothing is raised."""
        try:
            self._partial = self._store.writers.run(self._store.cache.claim, self.digest)
            if self._partial is None:  # another worker was first
                self.error = Lost(again=True)
            else:
                self._bring(self._partial)
        except MirrorError as error:
            self.error = error
        except Exception as error:
            self._store.health.failed(error)
            self.error = Lost()
        self._show()
        try:
            if self._partial is not None:
                self._save(self._partial)
        except Exception as error:
            self._store.health.failed(error)
        self._ended = True
        self._store.ended(self)
        self._show()
        self._clear()

    def _bring(self, partial: Partial) -> None:
        """Get all bytes onto the disk, from upstream or from what is there already."""
        if partial.written and partial.is_whole and self._is_right(partial):
            return
        answer = self._ask(partial)
        try:
            stream = self._begun(partial, answer)
        except BaseException:
            answer.response.close()
            raise
        if stream is not None:
            self._fill(partial, stream)

    def _is_right(self, partial: Partial) -> bool:
        try:
            self._store.savers.run(partial.rehash)
        except WrongDigest:
            self._store.writers.run(partial.restart)
            return False
        self.size = partial.size
        return True

    def _ask(self, partial: Partial) -> Answer:
        """Ask upstream for the rest of what is there; where that is not to be had, for all."""
        at, size = partial.written, partial.size
        if at and size is not None:
            headers = {**self.wanted.headers, "Range": f"bytes={at}-"}
            try:
                answer = self._store.upstream.fetch(self.wanted._replace(headers=headers))
            except (*FAILURES, Cooling):
                raise  # what is there is for the next one to go on with
            except MirrorError:
                pass
            else:
                if can_be_kept(answer) and Span.of(answer) == Span(at, size - 1, size):
                    return answer
                answer.response.close()
            self._store.writers.run(partial.restart)
        return self._store.upstream.fetch(self.wanted)

    def _begun(self, partial: Partial, answer: Answer) -> Stream | None:
        """Make room for the blob, and return its bytes; None where they cannot be kept, and are passed on."""
        span, at = Span.of(answer), partial.written
        if span is None or not can_be_kept(answer) or span != Span(at, (span.total or 0) - 1, span.total):
            self._pass_on(answer)
            return None
        try:
            self._store.writers.run(partial.begin, span.total)
        except WrongDigest:
            raise wrong_digest(answer.host) from None
        except (OSError, Full) as error:
            self._store.health.failed(error)
            if at:
                answer.response.close()
                answer = self._store.upstream.fetch(self.wanted)
            self._pass_on(answer)
            return None
        self.size = span.total
        self._show()
        if at:
            self._store.savers.run(partial.rehash)
            log.info("went on at byte %d of %s, which an earlier download left", at, self.digest)
        return Stream(self._store.upstream, self.wanted, answer)

    def _pass_on(self, answer: Answer) -> None:
        self._answer = answer
        self.error = Lost()

    def _fill(self, partial: Partial, stream: Stream) -> None:
        """Read what comes, and have it written."""
        pace, writer = Pace(), Writer(self._store.writers, partial, self._show)
        try:
            while not self._stopped and writer.failure is None and (chunk := stream.read(pace.size)):
                pace.count(len(chunk))
                writer.put(chunk)
        except BaseException:
            stream.close()
            raise
        finally:
            writer.end()
        if writer.failure is None or isinstance(writer.failure, WrongDigest):
            stream.close()
        else:
            self._rest = Rest(partial.written, writer.unwritten(), stream)
        if isinstance(writer.failure, WrongDigest):
            self._store.writers.run(partial.discard)
            raise stream.wrong_digest()
        if writer.failure is not None:
            raise writer.failure

    def _show(self) -> None:
        """Wake all that wait."""
        if self.size is not None or self.error is not None:
            self.ready.set()
        grown, self._grown = self._grown, Event()
        grown.set()

    def _save(self, partial: Partial) -> None:
        """Give the blob its name, or leave the part for another time."""
        if self.error is None and partial.is_whole:
            try:
                self._store.savers.run(partial.finish)
            except (OSError, WrongDigest) as error:
                self._store.health.failed(error)
            else:
                self._store.health.works()
                return
        self._store.writers.run(partial.let_go)

    def _clear(self) -> None:
        """Close what nobody took, once the download has ended and the last reader has left."""
        if self.readers or not self._ended:
            return
        answer, rest = self.take_answer(), self._rest
        if answer is not None:
            answer.response.close()
        if rest is not None:
            rest.close()
        if self._partial is not None:
            self._partial.close()
            self._partial = self._rest = None


def can_be_kept(answer: Answer) -> bool:
    """Tell whether an answer holds the bytes of a blob as they are, and says how many."""
    span = Span.of(answer)
    return span is not None and span.total is not None and "Content-Encoding" not in answer.response.headers


class Manifest(NamedTuple):
    """Hold a manifest for a client; `body` is None for a HEAD. `label` is for X-Cache, `warning` for Warning."""

    record: Record
    body: bytes | None
    label: str
    warning: str | None = None
    headers: Mapping[str, str] = MappingProxyType({})


class PullThrough:
    """Serve from the cache what was pulled once, and fill it; every way in returns None for what passes through.

    Only what the mirror fetches as itself comes here.
    """

    def __init__(self, config: Config, cache: Cache, upstream: Upstream) -> None:
        self._config = config
        self.cache = cache
        self.upstream = upstream
        self.health = Health()
        self.writers = Threads(4)
        self.savers = Threads(2)  # for what takes long
        self._downloads: dict[str, Download] = {}
        self._asked: Once[Manifest] = Once()
        self._checked: Once[Manifest] = Once()
        self._quiet_until: dict[str, float] = {}  # by registry, in time.monotonic()

    def figures(self) -> dict[str, Any]:
        """Return how full the cache is; what a failing disk does not tell, or not in time, is None."""
        taken = free = None
        try:
            with suppress(gevent.Timeout), gevent.Timeout(FILL_SECONDS):
                taken, free = self.writers.run(self.cache.fill)
        except OSError as error:
            self.health.failed(error)
        bounds = {"limit": self._config.cache_size, "reserve": self._config.cache_min_free}
        return {"bytes": taken, "free": free, **bounds, "failing": self.health.fails}

    def tidy(self) -> None:
        """Remove what is too old, and keep within the bounds."""
        try:
            self.savers.run(self.cache.tidy)
        except Exception as error:
            self.health.failed(error)

    # Blobs

    def blob(self, wanted: Wanted) -> Source | Answer | None:
        """Return where a blob is read; an answer is to be passed on, since it cannot be kept.

        Raises MirrorError as upstream failed. Whoever gets a source or an answer must close it.
        """
        digest, until = wanted.digest, time.monotonic() + FOLLOW_SECONDS
        if digest is None or not is_digest(digest):
            return None
        try:
            while time.monotonic() < until:
                found = self._find(digest, wanted)
                if not isinstance(found, Download):
                    return found
                with suppress(Lost):
                    joined = self._join(found, wanted)
                    if not isinstance(joined, Answer) or "Range" not in wanted.headers:
                        return joined
                    joined.response.close()  # it holds all of the blob
                    return None
                gevent.sleep(POLL_SECONDS)  # another worker asks upstream
        except OSError as error:
            self.health.failed(error)
        return None

    def _find(self, digest: str, wanted: Wanted) -> Source | Download:
        blob = self.cache.open(digest)
        if blob is not None:
            return Kept(blob)
        if digest not in self._downloads:
            follower = self.cache.follow(digest)
            if follower is not None:
                return Followed(follower)
            download = self._downloads[digest] = Download(self, wanted)
            gevent.spawn(download.run)
        return self._downloads[digest]

    def _join(self, download: Download, wanted: Wanted) -> Source | Answer | None:
        """Wait until a download has begun; None: it cannot be kept. Raises Lost where it failed, or another has it."""
        if isinstance(download.error, MirrorError) or (download.size is not None and download.error is not None):
            raise Lost(again=True)  # it has failed those who came before
        label, download.label = download.label, "JOIN"
        download.join()
        try:
            download.ready.wait()
            if download.size is not None:
                download.join()
                return Joined(download, label)
            if isinstance(download.error, Lost) and download.error.again:
                raise download.error
            if isinstance(download.error, MirrorError) and download.wanted.target == wanted.target:
                raise download.error
            return download.take_answer()
        finally:
            download.leave()

    def look(self, digest: str) -> Source | None:
        """Return a blob that is here, or on its way to here; None where upstream has to be asked."""
        try:
            blob = self.cache.open(digest) if is_digest(digest) else None
        except OSError as error:
            self.health.failed(error)
            return None
        if blob is not None:
            return Kept(blob)
        download = self._downloads.get(digest)
        if download is None or download.size is None:
            return None
        download.join()
        return Joined(download, "JOIN")

    def goes_on_alone(self) -> bool:
        """Tell whether one more download may go on without a client."""
        alone = sum(not download.readers for download in self._downloads.values())
        return self._config.cache_finish and alone <= MAX_ALONE

    def drop(self, source: Source, error: OSError) -> None:
        """Remove a blob that the disk does not give back: the next client is to get it from upstream."""
        self.health.failed(error)
        if isinstance(source, Kept):
            with suppress(OSError):
                self.writers.run(self.cache.drop, source.blob)

    def ended(self, download: Download) -> None:
        """Forget a download."""
        if self._downloads.get(download.digest) is download:
            del self._downloads[download.digest]

    def accelerated(self, source: Source) -> str | None:
        """Return the path under which nginx finds a kept blob; None where nginx is not to send it."""
        if self._config.accel is None or not isinstance(source, Kept):
            return None
        return self._config.accel + os.path.relpath(source.blob.path, self.cache.directory)

    # Manifests

    def manifest(self, wanted: Wanted) -> Manifest | None:
        """Return a manifest; raise MirrorError as upstream refuses it, or fails while there is no copy."""
        name = Name(wanted.target.registry.name, wanted.target.repository, wanted.resource.partition("/")[2])
        if wanted.digest is not None and not is_digest(wanted.digest):
            return None
        record = self._record(name)
        copy = self._served(record) if record is not None else None
        if copy is None:
            return self._missed(wanted, name)
        if not accepts(wanted.headers.get("Accept"), copy.record.media_type):
            return None
        return copy if wanted.digest is not None else self._tag(wanted, name, copy)

    def _record(self, name: Name) -> Record | None:
        try:
            return self.cache.record(name)
        except OSError as error:
            self.health.failed(error)
            return None

    def _served(self, record: Record) -> Manifest | None:
        """Return a manifest from the disk; None where it has gone, or is not right any more."""
        try:
            blob = self.cache.open(record.digest)
            if blob is None:
                return None
            with closing(blob):
                body = blob.read() if blob.size <= MAX_MANIFEST else b""
            if digest_of(body, record.digest) == record.digest:
                return Manifest(record._replace(size=len(body)), body, "HIT")
            self.cache.remove(record.digest)
        except OSError as error:
            self.health.failed(error)
        return None

    def _tag(self, wanted: Wanted, name: Name, copy: Manifest) -> Manifest | None:
        """Return what a kept tag stands for: as it is while fresh, else as upstream says, or as it was."""
        age = time.time() - copy.record.checked
        if 0 <= age < self._config.tag_ttl:
            return copy
        if age > self._config.stale:
            return self._missed(wanted, name)
        try:
            return self._current(wanted, name, copy)
        except Late:
            return copy._replace(label="STALE", warning=WARN_STALE)
        except (*FAILURES, Cooling):
            return copy._replace(label="STALE", warning=WARN_FAILED)
        except MirrorError as error:
            if not error.is_final:
                return copy._replace(label="STALE", warning=WARN_FAILED)
            self._on_disk(self.cache.forget, name)
            raise

    def _current(self, wanted: Wanted, name: Name, copy: Manifest) -> Manifest | None:
        """Return what a tag stands for now; raise MirrorError."""
        if time.monotonic() < self._quiet_until.get(name.registry, 0):
            raise Cooling(f"{name.registry} failed a moment ago")
        try:
            now = self._checked.get(name, lambda: self._check(wanted, name, copy), SLOW_CHECK)
        except FAILURES:
            self._quiet_until[name.registry] = time.monotonic() + QUIET_SECONDS
            raise
        return now if accepts(wanted.headers.get("Accept"), now.record.media_type) else None

    def _check(self, wanted: Wanted, name: Name, copy: Manifest) -> Manifest:
        """Ask upstream what a tag stands for now, and bring that here if it has moved.

        A HEAD costs nothing of Docker Hub's quota. Where it is refused, a GET tells more: a HEAD has no body that could
        say whose word this is. What is new is noted only with its content: until then the old one may have to do.
        """
        types = dict.fromkeys((*MANIFEST_TYPES, copy.record.media_type))
        wanted = wanted._replace(headers={**kept(wanted.headers, ("Via",)), "Accept": ", ".join(types)})
        now = None
        try:
            now = record_of(self.upstream.fetch(wanted._replace(method="HEAD")))
        except FAILURES:
            raise
        except MirrorError as error:
            log.debug("%s", error)
        if now is not None and now.digest == copy.record.digest:
            found: Manifest | None = copy._replace(record=copy.record._replace(checked=now.checked))
        else:
            found = self._served(now) if now is not None else None
        if found is None:
            return self._fetched(wanted._replace(method="GET"), name)
        self._on_disk(self.cache.note, name, found.record)
        return found

    def _missed(self, wanted: Wanted, name: Name) -> Manifest | None:
        """Return a manifest from upstream, and keep it."""
        accept = wanted.headers.get("Accept", "")
        if wanted.digest is None and not takes_all(accept):
            return None  # the registry may choose another manifest for such a client
        if wanted.method == "HEAD":
            return self._seen(wanted, name)
        return self._asked.get((*name, accept), lambda: self._fetched(wanted, name))

    def _seen(self, wanted: Wanted, name: Name) -> Manifest | None:
        """Return what upstream answers to a HEAD, and remember what the tag stands for."""
        answer = self.upstream.fetch(wanted._replace(headers=wanted.plain_headers))
        record = record_of(answer)
        if record is None:
            return None
        if wanted.digest is None:
            self._on_disk(self.cache.note, name, record)
        return Manifest(record, None, "MISS", headers=kept(answer.response.headers, LIMIT_HEADERS))

    def _fetched(self, wanted: Wanted, name: Name) -> Manifest:
        answer = self.upstream.fetch(wanted._replace(headers=wanted.plain_headers, whole=MAX_MANIFEST))
        body, shown = answer.start, answer.response.headers
        media_type = parse_options_header(kept(shown, ("Content-Type",)).get("Content-Type"))[0]
        if media_type == "text/html":
            raise BadGateway(f"{answer.host} sent a web page in place of a manifest")
        named = wanted.digest or shown.get("Docker-Content-Digest", "")
        record = Record(digest_of(body, named), media_type, len(body), time.time())
        limits = kept(shown, LIMIT_HEADERS)
        if media_type.startswith(SIGNED):
            return Manifest(record._replace(digest=named), body, "BYPASS", headers=limits)
        if "Content-Encoding" in shown:
            named = named or record.digest
            headers = kept(shown, ("Content-Encoding", *LIMIT_HEADERS))
            return Manifest(record._replace(digest=named), body, "BYPASS", headers=headers)
        if is_digest(named) and named != record.digest:
            raise self.upstream.wrong_digest(name.registry, answer)
        if not MEDIA_TYPE.fullmatch(media_type):
            return Manifest(record, body, "BYPASS", headers=limits)
        if self._on_disk(self._keep, name, record, body):
            self.health.works()
        return Manifest(record, body, "MISS", headers=limits)

    def _keep(self, name: Name, record: Record, body: bytes) -> None:
        self.cache.put(record.digest, body)
        self.cache.note(name, record)
        self.cache.note(name._replace(reference=record.digest), record)

    def _on_disk(self, function: Callable[..., None], *arguments: Any) -> bool:
        """Change something on the disk, and tell whether that went well; if not, the pull goes on."""
        try:
            self.writers.run(function, *arguments)
        except Exception as error:
            self.health.failed(error)
            return False
        return True


@lru_cache(maxsize=32)  # clients have few
def accepts(accept: str | None, media_type: str) -> bool:
    """Tell whether a client takes a media type, by its Accept header."""
    return parse_accept_header(accept, MIMEAccept).quality(media_type) > 0 if accept else True


def takes_all(accept: str) -> bool:
    """Tell whether a client names all types of manifests that registries have, as container clients do."""
    named = {word.partition(";")[0].strip().lower() for word in accept.split(",")}
    return named.issuperset(MANIFEST_TYPES)


def record_of(answer: Answer) -> Record | None:
    """Return what the headers of an answer to HEAD say; None where they do not say all."""
    headers = answer.response.headers
    media_type = parse_options_header(headers.get("Content-Type"))[0]
    digest, length = headers.get("Docker-Content-Digest", ""), headers.get("Content-Length", "")
    known = is_digest(digest) and MEDIA_TYPE.fullmatch(media_type) and not media_type.startswith(SIGNED)
    return Record(digest, media_type, int(length), time.time()) if known and length.isdigit() else None


def digest_of(content: bytes, like: str) -> str:
    """Return the digest of content, by the algorithm of another digest, else by sha256."""
    algorithm = like.partition(":")[0] if is_digest(like) else "sha256"
    return f"{algorithm}:{getattr(hashlib, algorithm)(content).hexdigest()}"  # hashlib.new takes far longer


class FileBody:
    """Send bytes of a blob from the disk, as they get there. Whoever has one must close it.

    gunicorn's socket gets them by sendfile(2): gevent's own loops over small reads. Under another server they are read.
    """

    def __init__(
        self,
        store: PullThrough,
        wanted: Wanted,
        source: Source,
        span: Span,
        transfer: Transfer,
        environ: Mapping[str, Any],
    ) -> None:
        self._store = store
        self._wanted = wanted
        self._source = source
        self._at, self._end = span.first, cast(int, span.last) + 1
        self._transfer = transfer
        self._client: socket.socket | None = environ.get("gunicorn.socket")
        self._response = environ.get("gunicorn.response")
        self._piece = THROTTLED if transfer.is_slowed else SENDFILE
        self._is_whole = self._at == 0 and self._end == source.size
        self._reopened = 0
        self._rest: Rest | None = None  # which no disk has
        self._ahead = self._at  # up to which the disk has been asked
        self._turn = 0
        self._watch: ClientWatch | None = None

    def __iter__(self) -> Iterator[bytes]:
        yield b""  # sends the headers
        has_source = True
        with reset_on_failure(self._client, self._transfer):
            while self._at < self._end and has_source:
                try:
                    ready = min(self._source.written, self._end)
                    if ready > self._at:
                        yield from self._send(ready)
                    else:
                        self._wait()
                except Lost as lost:
                    has_source = self._reopen(lost)
            if self._at < self._end:
                yield from self._other_way()
            self._transfer.finish()

    def _send(self, ready: int) -> Iterator[bytes]:
        """Send some of what is there up to byte number `ready`."""
        count = min(ready - self._at, self._piece)
        self._transfer.spend(count)
        self._warm(count)
        if self._client is None or self._response is None or isinstance(self._client, ssl.SSLSocket):
            chunk = os.pread(self._source.fd, count, self._at)
            if not chunk:
                self._source.wait()  # the file was shortened: it says why
                return
            self._at += len(chunk)
            yield chunk
            return
        end = self._at + count
        while self._at < end:
            self._sendfile(self._client, end - self._at)

    def _sendfile(self, client: socket.socket, count: int) -> None:
        try:
            sent = os.sendfile(client.fileno(), self._source.fd, self._at, count)
        except BlockingIOError:
            self._turn = 0
            gevent.socket.wait_write(client.fileno())
            return
        except OSError as error:
            self._blame(error)
        if not sent:
            self._source.wait()  # the file was shortened: it says why
            return
        self._at += sent
        self._response.sent += sent  # type: ignore[union-attr] # for the access line
        self._turn += sent
        if self._turn >= TURN:
            self._turn = 0
            gevent.sleep()

    def _blame(self, error: OSError) -> NoReturn:
        """Raise Lost for an error of the disk, else the error: it is the client's."""
        if error.errno not in DISK_ERRORS:
            raise error
        self._store.drop(self._source, error)
        raise Lost from error

    def _warm(self, count: int) -> None:
        """See that the next bytes are in memory: sendfile would wait for the disk, and all other clients with it."""
        if self._at + count <= self._ahead:
            return
        self._ahead = min(self._at + AHEAD, self._end, self._source.written)
        try:
            os.preadv(self._source.fd, [bytearray(1)], self._ahead - 1, os.RWF_NOWAIT)
        except BlockingIOError:
            try:
                self._store.writers.run(read_through, self._source.fd, self._at, self._ahead)
            except OSError as error:
                self._blame(error)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # of a file system that cannot tell, such as tmpfs
                self._blame(error)

    def _wait(self) -> None:
        """Wait for more bytes, or until the client leaves."""
        if self._watch is None and self._client is not None:
            self._watch = ClientWatch(self._client)
        self._source.wait()

    def _reopen(self, lost: Lost) -> bool:
        """Take another source in place of one that was lost; tell whether there is one."""
        self._reopened += 1
        if not lost.again or self._reopened > MAX_REOPENED:
            return False
        found = self._store.blob(self._wanted)
        if isinstance(found, Answer):
            found.response.close()
            return False
        if found is None or found.size != self._source.size:
            if found is not None:
                found.close()
            return False
        self._source.close()
        self._source = found
        return True

    def _other_way(self) -> Iterator[bytes]:
        """Yield all that is left, which the cache does not have: for a whole blob, hashed with what was sent."""
        self._rest = self._source.rest(self._at) or self._from_upstream()
        chunks = iter(self._rest)
        if self._is_whole:
            whole = Hash(cast(str, self._wanted.digest))
            self._store.savers.run(hash_file, whole, self._source.fd, self._at)
            chunks = verified(chunks, whole, self._rest.wrong_digest)
        for chunk in chunks:
            chunk = chunk[: self._end - self._at]
            self._transfer.spend(len(chunk))
            self._at += len(chunk)
            yield chunk
            if self._at == self._end and not self._is_whole:
                return
        if self._at < self._end:
            raise BadGateway("upstream ended too early")

    def _from_upstream(self) -> Rest:
        """Return the rest from upstream, for this client alone; raise MirrorError."""
        headers = self._wanted.plain_headers | {"Range": f"bytes={self._at}-{self._end - 1}"}
        wanted = self._wanted._replace(method="GET", headers=headers, trail=Trail())
        answer = self._store.upstream.fetch(wanted)
        span = Span.of(answer)
        skipped = self._at - span.first if span is not None and span.total == self._source.size else -1
        if not can_be_kept(answer) or not 0 <= skipped <= MAX_SKIPPED:
            answer.response.close()
            raise BadGateway(f"{answer.host} does not send the rest")
        stream, ready = Stream(self._store.upstream, wanted, answer), b""
        while skipped >= len(ready):
            skipped -= len(ready)
            ready = stream.read(EARLY_CHUNK)
            if not ready:
                stream.close()
                raise BadGateway(f"{answer.host} ended too early")
        return Rest(self._at, ready[skipped:], stream)

    def close(self) -> None:
        """Let go of the source, and end the transfer."""
        if self._watch is not None:
            self._watch.stop()
        try:
            if self._rest is not None:
                self._rest.close()
            self._source.close()
        finally:
            self._transfer.close()


def read_through(fd: int, at: int, end: int) -> None:
    """Read bytes of a file, so that they are in memory; let the disk go on reading."""
    os.posix_fadvise(fd, end, AHEAD, os.POSIX_FADV_WILLNEED)
    while at < end and (count := len(os.pread(fd, min(SENDFILE, end - at), at))):
        at += count


# ---------------------------------------------------------------------------------------------------------------------
# Access
# ---------------------------------------------------------------------------------------------------------------------

READS = "GET, HEAD, OPTIONS"
MAX_MIRRORS = 3  # one after another
WITH_PORT = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::[0-9]+)?|([0-9.]+):[0-9]+")
IMAGE_GLOB = re.compile(r"[a-z0-9*?\[\]!_.-]+(:[0-9]{1,5}(?=/))?(/[a-z0-9*?\[\]!_.-]+)*")
BURST = 1.0  # seconds of its bandwidth that a client which took nothing may take at once
BUSY_SECONDS = "10"  # after which a client that was one too many may try again
MAX_IDLE = 1000  # clients that are remembered though they may use nothing
STORE_SECONDS = 2  # within which Redis must answer
STORE_PAUSE = 30  # seconds for which it is left alone after a failure
OWN_SERVICE = "docker-mirror"
USER_TOKEN_SECONDS = 900
MAX_LOGINS = 20  # that wait for their password to be checked
MAX_CLIENT_LOGINS = 2  # the same, of one client
MAX_GUESSES, GUESS_SECONDS = 10, 60  # wrong passwords of one client, and the time for which they are remembered
MAX_COUNTED = 20_000  # clients whose pulls are counted in this process
PREFLIGHT = {
    "Access-Control-Allow-Methods": READS,
    "Access-Control-Allow-Headers": "Authorization, Accept, Range, If-None-Match, If-Range",
    "Access-Control-Max-Age": "86400",
}
CORS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Expose-Headers": "Accept-Ranges, Content-Length, Content-Range, Docker-Content-Digest, "
    "Docker-Distribution-Api-Version, ETag, Link, RateLimit-Limit, RateLimit-Remaining, Retry-After, Warning, "
    "WWW-Authenticate, X-Cache, Age",
}


def is_api(path: str) -> bool:
    """Tell whether a path belongs to the registry's API."""
    return path == "/v2" or path.startswith("/v2/")


def is_token(path: str) -> bool:
    """Tell whether a path is that of the token endpoint, of the default registry or of a named one."""
    return path == "/token" or path.startswith("/token/")


def below(prefix: str, path: str) -> str | None:
    """Return what follows a prefix in a path, None for a path elsewhere; everything is below an empty prefix."""
    return path.removeprefix(prefix) if f"{path}/".startswith(f"{prefix}/") else None


def takes_body(method: str, path: str) -> bool:
    """Tell whether a request may bring a body, of at most `MAX_FORM` bytes: a login by POST is the only one."""
    return method == "POST" and is_token(path)


def note_request(environ: dict[str, Any]) -> None:
    """Put into the WSGI environment what the access line shows (wsgi.py has its format).

    The query is not among it, nor is the secret path, which may stand in a path more than once, by a mistake.
    """
    address = environ.get("REMOTE_ADDR", "")
    if found := WITH_PORT.fullmatch(address):  # some terminators write the port too
        address = found[1] or found[2]
    address = address.partition("%")[0]  # an IPv6 zone may be any text
    environ["mirror.began"] = time.monotonic()
    environ["mirror.client"] = address if is_address(address) else "-"
    environ["mirror.upstream"] = Trail()
    path = quote(environ.get("PATH_INFO", "").encode("latin-1"), safe="/:@+=,~")
    secret = environ.get("mirror.prefix")
    while secret and secret in path:  # what is left may make another one
        path = path.replace(secret, "")
    environ["mirror.path"] = path[:500] or "/"


def admit_request() -> Response | None:
    """Refuse what no route may see, and answer what none needs to: the preflight of a browser.

    Raises BadRequest, NameInvalid and Unsupported.
    """
    environ = request.environ
    host = environ.get("HTTP_HOST")
    if host is not None and not HOST.fullmatch(host):
        raise BadRequest("the Host header is not valid")
    if not environ.get("QUERY_STRING", "").isascii():  # which Flask would fail at
        raise BadRequest("the query is not valid")
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


class Terminated(ProxyFix):
    """Believe X-Forwarded-* from the TLS terminators only: anybody else may write what he likes into them."""

    def __init__(self, app: Any, hops: int, terminators: tuple[Network, ...]) -> None:
        super().__init__(app, x_for=hops, x_proto=hops, x_host=hops)
        self._terminators = terminators
        self._warned = False

    def __call__(self, environ: Any, start_response: Any) -> Any:
        """Answer a request, with its X-Forwarded-* or without."""
        peer = environ.get("REMOTE_ADDR", "")  # empty: a Unix socket
        if not peer or is_within(peer, self._terminators):
            return super().__call__(environ, start_response)
        if "HTTP_X_FORWARDED_FOR" in environ and not self._warned:
            self._warned = True
            log.warning(
                "X-Forwarded-For of %s is not believed: is it a terminator? MIRROR_TERMINATORS names them", peer
            )
        return self.app(environ, start_response)


class Prefixed:
    """Serve an application below a secret path, and nothing elsewhere: no answer there tells what this is."""

    def __init__(self, app: Any, prefix: str) -> None:
        self.app = app
        self._prefix = prefix

    def __call__(self, environ: Any, start_response: Any) -> Any:
        """Answer a request, by a bare 404 where its path is another one."""
        environ["mirror.prefix"] = self._prefix
        path = below(self._prefix, environ.get("PATH_INFO", ""))
        if path is not None:
            environ.update(SCRIPT_NAME=self._prefix, PATH_INFO=path or "/")
            return self.app(environ, start_response)
        note_request(environ)
        return Response("not found\n", 404, mimetype="text/plain")(environ, start_response)


def is_within(address: str, networks: tuple[Network, ...]) -> bool:
    """Tell whether an address lies in one of these networks; an IPv4 address may be written as an IPv6 one."""
    if not networks or not is_address(address):
        return False
    parsed: Any = ipaddress.ip_address(address.partition("%")[0])
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    return any(parsed in network for network in networks)


def client_of(address: str) -> str:
    """Return whom the limits take for one client: an IPv4 address, or an IPv6 /64, as Docker Hub does."""
    if not is_address(address):
        return address
    parsed = plain_address(address)
    return str(parsed) if parsed.version == 4 else str(ipaddress.ip_network((parsed, 64), strict=False))


class ImageRule(NamedTuple):
    """Hold a rule of images: globs over a full name, such as ``docker.io/library/*``, and over a tag or digest."""

    name: str
    reference: str

    @classmethod
    def parse(cls, text: str, registries: Mapping[str, Registry], default: str) -> ImageRule:
        """Read a rule as docker reads a name: ``nginx`` is ``docker.io/library/nginx``; a registry alone is all of it.

        Raises ConfigError for what no image can be named: such a rule would never do anything.
        """
        name, at, reference = text.partition("@")
        path, slash, last = name.rpartition("/")
        last, colon, tag = last.partition(":")
        if at and colon:
            raise ConfigError(f"{text}: a rule has a tag or a digest, not both")
        name, reference = path + slash + last, reference if at else tag
        if not IMAGE_GLOB.fullmatch(name) or ((at or colon) and not reference):
            raise ConfigError(f"{text}: no image has such a name; it is written as docker.io/library/nginx:1.*")
        return cls(full_name(name, registries, default), reference)

    def meets(self, name: str, reference: str) -> bool:
        """Tell whether the rule is about this, to the letter."""
        return fnmatchcase(name, self.name) and (not self.reference or fnmatchcase(reference, self.reference))

    def covers(self, name: str, reference: str) -> bool:
        """Tell whether the rule is about this, or about a part of what it names.

        A pull of an admitted tag asks for its manifests and blobs by digest, in the same repository.
        """
        return self.meets(name, reference) or (fnmatchcase(name, self.name) and (not reference or ":" in reference))


def full_name(name: str, registries: Mapping[str, Registry], default: str) -> str:
    """Return the full name, or the glob over full names, that a glob over names as docker takes them stands for."""
    first, slash, rest = name.partition("/")
    if first in registries:
        return f"{first}/{complete(registries[first], rest) if rest else '*'}"
    if "*" in first or "?" in first:
        return name if slash or name == "*" or "." in name else f"{default}/{complete(registries[default], name)}"
    if (slash and "." in first) or ":" in first:
        raise ConfigError(f"{name}: {first} is no registry that is served{did_you_mean(first, registries)}")
    return f"{default}/{complete(registries[default], name)}"


def same_endpoints(registries: Mapping[str, Registry]) -> dict[str, list[str]]:
    """Return for each registry those that have an endpoint in common with it, itself too: their images are the same."""
    return {
        name: [other for other in registries if set(registries[other].endpoints) & set(registry.endpoints)]
        for name, registry in registries.items()
    }


class LimitedTransfer(Transfer):
    """Count against the limits of a client, and of all, and let `run` be shown."""

    def __init__(self, gate: Gate, client: str, run: Run) -> None:
        self.is_slowed = gate.slows
        self._gate = gate
        self._client = client
        self._run = run
        self._ended = False

    def begin(self, size: int | None, label: str = "") -> None:
        """Say how many bytes there will be, as far as that is known, and whether the cache has them."""
        self._run.begin(size, label)

    def spend(self, count: int) -> None:
        """Account for bytes that are to be sent; wait until the client's transfers are within its bandwidth."""
        self._gate.spend(self._client, count)
        self._run.add(count)

    def finish(self) -> None:
        """Say that all bytes were sent."""
        self._run.outcome = "whole"

    def fail(self) -> None:
        """Say that the rest of the bytes is not to be had."""
        self._run.outcome = "failed"

    def hand_over(self, count: int) -> None:
        """Say that nginx sends so many bytes: it alone knows how that ends."""
        self._run.outcome, self._run.handed = "handed_over", count

    def close(self) -> None:
        """End the transfer; a second time does nothing."""
        if not self._ended:
            self._ended = True
            self._gate.end_transfer(self._client)
            self._run.end()


class Gate:
    """Decide who may have what, and how much; without settings, everyone may have all."""

    def __init__(self, config: Config, registries: Mapping[str, Registry], telemetry: Telemetry) -> None:
        self._config = config
        self._telemetry = telemetry
        self.slows = config.client_bandwidth is not None
        self._names = same_endpoints(registries)
        self._allowed = self._rules("ALLOW_IMAGES", config.allow_images, registries)
        self._denied = self._rules("DENY_IMAGES", config.deny_images, registries)
        self._agents = tuple(agent.lower() for agent in config.block_agents)
        if config.pull_rate is not None:
            load_limits(config.pull_rate_store)
        self._running: Counter[str] = Counter()  # transfers by client
        self._all_running = 0
        self._spent_until: dict[str, float] = {}  # by client, in time.monotonic(): what it took is used up then

    def _rules(self, setting: str, texts: tuple[str, ...], registries: Mapping[str, Registry]) -> list[ImageRule]:
        try:
            return [ImageRule.parse(text, registries, self._config.default) for text in texts]
        except ConfigError as error:
            raise ConfigError(f"MIRROR_{setting}: {error}") from None

    def blocks(self, agent: str) -> bool:
        """Tell whether a client with this User-Agent is to take the mirror for something else."""
        return any(part in agent.lower() for part in self._agents)

    def admit_client(self, address: str) -> None:
        """Raise Denied for a client that may not pull, by its address."""
        allowed, denied = self._config.allow_clients, self._config.deny_clients
        if (allowed or denied) and not is_address(address):
            raise Denied("this mirror is not for clients whose address the terminator does not tell")
        if (allowed and not is_within(address, allowed)) or is_within(address, denied):
            raise Denied(f"this mirror is not for clients at {address}")

    def admit_image(self, target: Target, reference: str) -> None:
        """Raise Denied for an image that may not be pulled; `reference` is a tag, a digest, or empty for a list."""
        name = f"{target.registry.name}/{target.repository}"
        if self._allowed and not any(rule.covers(name, reference) for rule in self._allowed):
            raise Denied(f"this mirror does not serve {name}, or not by that name")
        others = (f"{other}/{target.repository}" for other in self._names[target.registry.name])
        if self._denied and any(rule.meets(other, reference) for other in others for rule in self._denied):
            raise Denied(f"this mirror does not serve {name}, or not by that name")

    def count_pull(self, address: str) -> None:
        """Count a manifest that a client gets; raise TooManyRequests where it had too many."""
        rate = self._config.pull_rate
        if rate is not None:
            wait = self._pulls.count(client_of(address))
            if wait:
                message = f"this mirror's limit for one client is {rate} manifests"
                raise TooManyRequests(message, {"Retry-After": str(wait)})

    def transfer(self, address: str, wanted: Wanted) -> Transfer:
        """Return a transfer to this client, which must be closed; raise TooManyRequests where too many run."""
        one, every, client = self._config.client_transfers, self._config.transfers, client_of(address)
        if one is not None and self._running[client] >= one:
            raise TooManyRequests(f"this mirror runs {one} transfers for one client", {"Retry-After": BUSY_SECONDS})
        if every is not None and self._all_running >= every:
            raise TooManyRequests(f"this mirror runs {every} transfers at a time", {"Retry-After": BUSY_SECONDS})
        self._running[client] += 1
        self._all_running += 1
        registry, repository, _ = wanted.target
        run = self._telemetry.transfer(registry.name, address, f"{registry.name}/{repository}", str(wanted.digest))
        return LimitedTransfer(self, client, run)

    def end_transfer(self, client: str) -> None:
        """Count a transfer that has ended."""
        self._all_running -= 1
        self._running[client] -= 1
        if not self._running[client]:
            del self._running[client]

    def spend(self, client: str, count: int) -> None:
        """Account for bytes that are to be sent to a client; wait until those before are within its bandwidth."""
        rate, now = self._config.client_bandwidth, time.monotonic()
        if rate is None:
            return
        if len(self._spent_until) > MAX_IDLE:
            self._spent_until = {client: until for client, until in self._spent_until.items() if until > now}
        until = max(self._spent_until.get(client, 0), now - BURST)
        self._spent_until[client] = until + count / rate
        if until > now:
            gevent.sleep(until - now)

    @cached_property
    def _pulls(self) -> PullCounter:
        """Return the counter, made by the worker that uses it: neither its timer nor its connection can be forked."""
        return PullCounter(cast(Rate, self._config.pull_rate), self._config.pull_rate_store)


def load_limits(store: str | None) -> None:
    """Import what only limited pulls need (4 MB, and 6 for Redis), before the workers are forked; raise ConfigError."""
    importlib.import_module("limits.strategies")
    if store is not None:
        try:
            importlib.import_module("redis.retry")
        except ImportError:
            raise ConfigError("MIRROR_PULL_RATE_STORE needs a package that is not here: pip install redis") from None


class PullCounter:
    """Count what clients do within a time that slides on, in this process or in Redis."""

    def __init__(self, rate: Rate, store: str | None) -> None:
        from limits import RateLimitItemPerSecond
        from limits.errors import StorageError
        from limits.storage import storage_from_string
        from limits.strategies import SlidingWindowCounterRateLimiter

        self._storage: Any = storage_from_string(store or "memory://", wrap_exceptions=True, **_store_options(store))
        self._is_local = store is None
        self._limiter = SlidingWindowCounterRateLimiter(self._storage)
        self._item = RateLimitItemPerSecond(rate.amount, rate.seconds, "docker-mirror")
        self._failure = StorageError
        self._failing_until = 0.0  # time.monotonic()

    def count(self, client: str) -> int:
        """Count once; return 0, or after how many seconds the client may come again.

        While Redis fails, nobody is refused, and for a while it is not asked.
        """
        if time.monotonic() < self._failing_until:
            return 0
        if self._is_local and len(self._storage.storage) > MAX_COUNTED:
            self._storage.reset()  # limits looks through all of them again and again
        try:
            if self._limiter.hit(self._item, client):
                return 0
            return max(1, math.ceil(self._limiter.get_window_stats(self._item, client).reset_time - time.time()))
        except self._failure as error:
            cause: Any = getattr(error, "storage_error", error)
            log.warning("pulls are not counted for %d s: %s", STORE_PAUSE, root_cause(cause))
            self._failing_until = time.monotonic() + STORE_PAUSE
            return 0


def _store_options(store: str | None) -> dict[str, Any]:
    if store is None:
        return {}
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    return {
        "socket_timeout": STORE_SECONDS,
        "socket_connect_timeout": STORE_SECONDS,
        "retry": Retry(NoBackoff(), 0),
    }


class Users:
    """Check the logins of the mirror's own users, and the tokens that they were given.

    The key of the tokens comes from the users' file: all workers, all hosts with that file and the next start know it.
    """

    def __init__(self, hashes: Mapping[str, bytes]) -> None:
        self._hashes = hashes
        if hashes:
            importlib.import_module("bcrypt")  # before the workers are forked
        content = json.dumps({user: encoded.decode() for user, encoded in sorted(hashes.items())})
        self._secret = hmac.digest(b"docker-mirror", content.encode(), "sha256")
        self._signer = itsdangerous.URLSafeTimedSerializer(self._secret, "docker-mirror")
        self._slowest = max(hashes.values(), key=lambda encoded: encoded[4:6], default=b"")
        self._known: dict[bytes, float] = {}  # logins that were right, until time.monotonic()
        self._waiting: Counter[str] = Counter()  # by client
        self._failed: dict[str, list[float]] = {}  # by client: when, in time.monotonic()

    def __bool__(self) -> bool:
        """Tell whether there are any: without, everyone may pull."""
        return bool(self._hashes)

    @cached_property
    def _thread(self) -> ThreadPool:
        """Return the one thread in which passwords are checked: bcrypt takes long, and must not take every core."""
        return ThreadPool(1)

    def token(self, user: str, password: str, client: str) -> str:
        """Return a token for a user; raise Unauthorized for a wrong password, TooManyRequests for too many of them."""
        login = hmac.digest(self._secret, json.dumps([user, password]).encode(), "sha256")
        if time.monotonic() > self._known.get(login, 0):
            self._let_guess(client)
            if not self._check(user, password.encode(), client):
                self._failed.setdefault(client, []).append(time.monotonic())
                raise Unauthorized("the user or the password is wrong", Challenge(OWN_SERVICE, {}, "basic"))
            if len(self._known) >= MAX_TOKENS:
                self._known.clear()
            self._known[login] = time.monotonic() + USER_TOKEN_SECONDS
        return str(self._signer.dumps(user))

    def _let_guess(self, client: str) -> None:
        """Raise TooManyRequests for a client that was wrong too often, or asks too much at once."""
        if len(self._failed) > MAX_IDLE:
            self._failed.clear()
        since = time.monotonic() - GUESS_SECONDS
        guesses = self._failed[client] = [at for at in self._failed.get(client, []) if at > since]
        if not guesses:
            del self._failed[client]
        at_once = self._waiting[client] >= MAX_CLIENT_LOGINS or self._waiting.total() >= MAX_LOGINS
        if at_once or len(guesses) >= MAX_GUESSES:
            raise TooManyRequests("too many logins", {"Retry-After": BUSY_SECONDS if at_once else str(GUESS_SECONDS)})

    def _check(self, user: str, password: bytes, client: str) -> bool:
        # An unknown user takes as long as a known one: the time must not tell which there are.
        encoded = self._hashes.get(user, self._slowest)
        self._waiting[client] += 1
        try:
            right = self._thread.apply(bcrypt_matches, (password, encoded))
        finally:
            self._waiting[client] -= 1
            if not self._waiting[client]:
                del self._waiting[client]
        return user in self._hashes and right

    def admit(self, authorization: str | None, challenge: Challenge) -> None:
        """Raise Unauthorized, with the challenge, unless the Authorization holds a token that is still good."""
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() == "bearer":
            try:
                user = self._signer.loads(token, max_age=USER_TOKEN_SECONDS)
            except itsdangerous.BadData:
                user = None
            if user in self._hashes:
                return
            challenge = challenge._replace(parameters={**challenge.parameters, "error": "invalid_token"})
        raise Unauthorized("log in to this mirror", challenge)


def bcrypt_matches(password: bytes, encoded: bytes) -> bool:
    """Tell whether a password has this hash. bcrypt knows no password of more than 72 bytes."""
    import bcrypt

    return len(password) <= 72 and b"\0" not in password and bcrypt.checkpw(password, encoded)


# ---------------------------------------------------------------------------------------------------------------------
# Application
# ---------------------------------------------------------------------------------------------------------------------

NOBODY = "Og=="  # base64 of a colon
STATUS_FILES = {f"/status/{name}": name for name in FILES}  # of its own: the home page may be another one
STATUS_PATHS = ("/status", "/status.json", *STATUS_FILES)
HEALTH = ("/healthz", "/readyz")
WATCHED = (*HEALTH, *STATUS_PATHS, "/metrics")
MAX_FORM = 64 << 10  # bytes of a POST to /token
# Without one of these werkzeug would look for conditions at some cost, and find none.
CONDITIONS = {"HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH", "HTTP_IF_MODIFIED_SINCE", "HTTP_IF_UNMODIFIED_SINCE"}
PAGE_RESULTS, PAGE_TAGS = 20, 10  # that a page shows
MAX_LISTS = 10  # parts of a list of tags, as the registry cuts it
LIST_SECONDS, FACTS_SECONDS = 20, 10  # for which a page waits for the tags, and for what they stand for
AT_ONCE = 5  # tags that are looked at
READY_SECONDS = 10  # for which the answer of /readyz is remembered
DISK_SECONDS = 5  # within which the disk must take a byte
MAX_PAGE = 32 << 20  # bytes of a page of another site, or of a file that it uses
# What Docker Hub's own pages ask its API for; all else below /v2/ is a registry's.
SITE_API = re.compile(r"/v2/(repositories|users|orgs|categories|search)(/.*)?")
PATH_LETTERS = "/:@+=,~!$&'()*;"  # that stand in a path as they are
NOT_KEPT = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}  # it is the owner's alone
SITE_REQUEST_HEADERS = ("Accept", "Accept-Language", "If-None-Match", "If-Modified-Since")
# Not among them: Set-Cookie.
SITE_RESPONSE_HEADERS = (
    "Cache-Control",
    "Content-Encoding",
    "Content-Language",
    "Content-Length",
    "Content-Security-Policy",
    "Content-Type",
    "ETag",
    "Expires",
    "Last-Modified",
    "Referrer-Policy",
    "Retry-After",
    "Vary",
    "X-Content-Type-Options",
    "X-Frame-Options",
)


def create_app(config: Config) -> Flask:
    """Return the WSGI application; raise ConfigError for a wrong registries file."""
    app = Flask("mirror", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_FORM
    app.jinja_options = {"trim_blocks": True, "lstrip_blocks": True}
    app.url_map.merge_slashes = False
    app.url_map.strict_slashes = False
    views = Front(config, load_registries(config))
    app.extensions["docker-mirror"] = views
    app.before_request(views.turn_away)
    app.before_request(admit_request)
    app.before_request(views.admit_client)
    app.before_request(views.admit_viewer)
    app.after_request(views.finish)
    app.register_error_handler(Exception, views.error)
    for rule, view, methods in views.routes():
        app.add_url_rule(rule, rule, view, methods=methods)
    if config.path_prefix:
        app.wsgi_app = Prefixed(app.wsgi_app, config.path_prefix)  # type: ignore[method-assign]
    if config.proxies:
        app.wsgi_app = Terminated(app.wsgi_app, config.proxies, config.terminators)  # type: ignore[method-assign]
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


# What a request is for, by its route; all others are pages. What watches over the mirror is not counted.
KINDS = {
    "/token": "token",
    "/token/<registry>": "token",
    "/v1/_ping": "search",
    "/v1/search": "search",
    "/v2/": "ping",
    "/v2/<path:name>/manifests/<reference>": "manifest",
    "/v2/<path:name>/blobs/<digest>": "blob",
    "/v2/<path:name>/tags/list": "tags",
    "/v2/<path:name>/referrers/<digest>": "referrers",
    **dict.fromkeys(WATCHED, "watch"),
}


class Views:
    """Answer the routes. It holds the state of the application: the registries, and the way upstream."""

    def __init__(self, config: Config, registries: Mapping[str, Registry]) -> None:
        self._config = config
        self.registries = registries
        self._router = Router(registries, config.default)
        self.telemetry = Telemetry((one.name, endpoint) for one in registries.values() for endpoint in one.endpoints)
        self._upstream = Upstream(config, registries, self.telemetry)
        self._gate = Gate(config, registries, self.telemetry)
        self._users = Users(load_users(config))
        self._store = pull_through(config, self._upstream)
        self._is_private = bool(self._users or config.allow_clients or config.deny_clients)

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

    def tidy(self) -> None:
        """Keep the cache within its bounds; it is for a greenlet that does so now and then."""
        if self._store is not None:
            self._store.tidy()

    def tick(self) -> None:
        """Bring what is counted up to date; it is to be called each second."""
        with not_in_the_way():
            if self._store is not None:
                self.telemetry.evicted(self._store.cache.take_evicted())
            self.telemetry.tick()

    def admit_client(self) -> None:
        """Refuse clients that may not pull, whatever they ask for; the checks of health are for everyone."""
        if request.path not in HEALTH:
            self._gate.admit_client(client_address())

    def finish(self, response: Response) -> Response:
        """Finish and count any answer, whose body may still be to come."""
        with not_in_the_way():
            self._count(response)
        return response if "decoy" in g else finish_response(response)

    def _count(self, response: Response) -> None:
        rule = request.url_rule.rule if request.url_rule is not None else ""
        kind, target = KINDS.get(rule, "page"), g.get("target")
        if kind == "watch":
            return
        registry = target.registry.name if target is not None else ""
        self.telemetry.request(registry, kind, response.status_code, time.monotonic() - request.environ["mirror.began"])
        if request.method == "GET" and kind in ("blob", "manifest") and "X-Cache" in response.headers:
            self.telemetry.looked_up(kind, response.headers["X-Cache"])
        if kind != "blob" or response.status_code >= 400:  # else it is a transfer
            self.telemetry.sent(registry, body_size(response))
        is_pull = kind == "manifest" and response.status_code != 401  # after which the client asks again
        if is_pull and target is not None and target.repository and request.view_args is not None:
            image = f"{registry}/{target.repository}"
            self.telemetry.manifest(client_address(), image, request.view_args["reference"], response.status_code)

    def healthz(self) -> Response:
        """Tell that the process is alive, and whether its cache's disk works; upstream is not asked."""
        if self._store is not None and self._store.health.fails:
            return json_response({"status": "degraded", "cache": "its disk is full or fails: the log says more"})
        return json_response({"status": "ok"})

    def ping(self) -> Response:
        """Answer ``/v2/``: 200, or 401 with the challenge from which dockerd learns where tokens are to be had."""
        registry = self._registry_here()
        g.target = Target(registry, "")
        self._admit_user(None)
        if self._config.login and not request.headers.get("Authorization"):
            challenge = self._challenge(registry)
            if challenge is not None:
                raise Unauthorized("a token is needed, even for public images", challenge)
        own = self._own_authorization()
        if own is not None:
            self._upstream.admit(registry, own, trail())
        return json_response({})

    def _challenge(self, registry: Registry) -> Challenge | None:
        """Return the challenge of a registry; where that fails, one with which a client can pull what is kept."""
        try:
            return self._upstream.challenge(registry, trail())
        except FAILURES:
            if self._store is None:
                raise
            return Challenge("", {})

    def catalog(self) -> Response:
        """Refuse the list of all repositories: Docker Hub has none either."""
        raise Unsupported("this mirror has no catalog", {"Allow": "OPTIONS"})

    def manifest(self, name: str, reference: str) -> Response:
        """Pass a manifest on, by tag or digest."""
        wanted = self._wanted(name, f"manifests/{check_reference(reference)}", ManifestUnknown)
        if request.method == "GET":
            self._gate.count_pull(client_address())
        if self._store is not None and wanted.authorization is None:
            with watched(client_socket()):
                found = self._store.manifest(wanted)
            if found is not None:
                return self._show_manifest(wanted, found)
        return self._pass_on(wanted)

    def blob(self, name: str, digest: str) -> Response:
        """Pass a blob on, or send what is kept."""
        wanted = self._wanted(name, f"blobs/{check_digest(digest)}", BlobUnknown)
        if self._store is None or wanted.authorization is not None:
            return self._pass_on(wanted)
        with ExitStack() as failed:
            transfer = self._gate.transfer(client_address(), wanted) if wanted.method == "GET" else Transfer()
            failed.callback(transfer.close)
            with watched(client_socket()):
                found = self._store.blob(wanted) if wanted.method == "GET" else self._store.look(digest)
            if found is None or isinstance(found, Answer):
                response = self._relay(wanted, found, transfer)
            else:
                failed.callback(found.close)
                response = self._show_blob(self._store, wanted, found, transfer)
            failed.pop_all()
            return response

    def _show_blob(self, store: PullThrough, wanted: Wanted, source: Source, transfer: Transfer) -> Response:
        """Return the response that sends a blob from the cache, or the part of it that is asked for."""
        headers = {"Content-Type": "application/octet-stream", "Age": age(source.stored), "X-Cache": source.label}
        response = self._kept_response(wanted, cast(str, wanted.digest), source.size, headers)
        path = store.accelerated(source) if not transfer.is_slowed else None
        if wanted.method == "GET" and path is not None and response.status_code in (200, 206):
            transfer.begin(0, source.label)
            transfer.hand_over(response.content_length or 0)
            response = Relayed(b"", 200, [*response.headers])  # nginx looks after Range itself
            response.headers.update({"X-Accel-Redirect": path, "Content-Length": "0"})
            del response.headers["Accept-Ranges"]  # nginx adds its own
        elif wanted.method == "GET" and response.status_code in (200, 206):
            part = response.content_range
            span = Span(part.start or 0, (part.stop or source.size) - 1, source.size)
            transfer.begin(response.content_length, source.label)
            response.response = FileBody(store, wanted, source, span, transfer, request.environ)
            return response
        source.close()
        transfer.close()
        return response

    def _show_manifest(self, wanted: Wanted, found: Manifest) -> Response:
        """Return the response that sends a manifest of the cache, or one that was just kept."""
        record = found.record
        more = {"Warning": found.warning, "X-Cache": found.label, "Age": age(record.checked)}
        more["Content-Type"] = record.media_type or None
        headers = {**found.headers, **{name: value for name, value in more.items() if value is not None}}
        response = self._kept_response(wanted, record.digest, record.size, headers)
        if wanted.method == "GET" and response.status_code in (200, 206):
            part = response.content_range
            response.response = [(found.body or b"")[part.start : part.stop]]
        return response

    def _kept_response(self, wanted: Wanted, digest: str, size: int, headers: Mapping[str, str]) -> Response:
        """Return a response without its body: 200, 206 or 304; raise RangeInvalid."""
        whole = {"Content-Length": str(size)}
        if digest:  # that of a signed manifest may not be told
            whole |= {"Docker-Content-Digest": digest, "ETag": f'"{digest}"'}
        if wanted.digest is not None:
            whole["Cache-Control"] = f"{'private' if self._is_private else 'public'}, {IMMUTABLE}"
        response = Relayed((), 200, {**headers, **whole, "Accept-Ranges": "bytes"}, direct_passthrough=True)
        if not CONDITIONS.isdisjoint(request.environ):
            whole_environ = {name: value for name, value in request.environ.items() if name != "HTTP_RANGE"}
            response.make_conditional(whole_environ, accept_ranges=True, complete_length=size)
        if response.status_code == 412:
            raise Refused(412, "the precondition fails: this is something else", {}, None)
        if response.status_code == 200 and wanted.method == "GET" and is_one_range(wanted.headers, size):
            try:
                response.make_conditional(request.environ, accept_ranges=True, complete_length=size)
            except RequestedRangeNotSatisfiable:
                raise RangeInvalid("the range lies outside the blob", {"Content-Range": f"bytes */{size}"}) from None
        response.headers.pop("Date", None)  # the server sends one
        return response

    def tags(self, name: str) -> Response:
        """Pass a list of tags on, a page at a time, under the name by which the client asked."""
        answer = self._fetch(self._wanted(name, "tags/list", NotFound, ("n", "last"), whole=MAX_TAGS))
        body = answer.start if name == g.target.repository else renamed(answer.start, name)
        headers = kept(answer.response.headers, TAGS_HEADERS)
        if request.method == "GET":
            headers["Content-Length"] = str(len(body))
        return self._linked(Relayed(body, answer.status, headers), answer)

    def referrers(self, name: str, digest: str) -> Response:
        """Pass the list of what refers to a manifest on."""
        arguments = ("artifactType", "n", "last")
        return self._pass_on(self._wanted(name, f"referrers/{check_digest(digest)}", ManifestUnknown, arguments))

    def token(self, registry: str | None = None) -> Response:
        """Answer a request for a token: ``anonymous`` at once, or the realm's own answer to a login.

        Source: distribution's token specification (GET, and POST as in OAuth2).
        """
        if self._users:
            return self._give_token()
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

    def _give_token(self) -> Response:
        """Give one of the mirror's own users a token, by GET with Basic or by an OAuth2 POST with a password."""
        g.target = Target(self._router.default, "")
        login = request.authorization
        given: Mapping[str, str | None] = login.parameters if login is not None else {}
        if request.method == "POST":
            if request.form.get("grant_type") != "password":
                raise BadRequest("this mirror knows the grant_type password only")
            given = request.form
        return token_response(self._user_token(given), USER_TOKEN_SECONDS)

    def _user_token(self, given: Mapping[str, str | None]) -> str:
        """Return a token for one of the mirror's own users; raise Unauthorized for anybody else."""
        user, password = given.get("username"), given.get("password")
        if not user or password is None:
            raise Unauthorized("log in to this mirror", Challenge(OWN_SERVICE, {}, "basic"))
        return self._users.token(user, password, client_of(client_address()))

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
        self._admit_user(None)
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

    def _wanted(
        self,
        name: str,
        resource: str,
        missing: type[NotFound],
        arguments: tuple[str, ...] = (),
        whole: int = 0,
    ) -> Wanted:
        """Return what this request wants of upstream, `arguments` of its query among it."""
        ns = request.args.get("ns") or None
        g.target = Target(self._router.default, "")
        try:
            target = g.target = self._router.resolve(request.host, ns, name)
        except MirrorError:
            self._admit_user(None)  # a stranger does not learn what is served
            raise
        if ns is not None:
            g.ns = ns
        self._admit_user(pull_scope(target.repository))
        self._gate.admit_image(target, resource.partition("/")[2] if missing is not NotFound else "")
        query = {key: request.args[key] for key in arguments if key in request.args}
        headers = kept(request.headers, REQUEST_HEADERS)
        whole = whole if request.method == "GET" else 0
        if whole or parse_range_header(headers.get("Range")) is None:
            headers.pop("Range", None)  # RFC 9110, 14.2: one that makes no sense is ignored
        own, verify = self._own_authorization(), self._config.verify
        return Wanted(target, request.method, resource, query, headers, own, missing, trail(), whole, verify)

    def _fetch(self, wanted: Wanted) -> Answer:
        with watched(client_socket()):
            return self._upstream.fetch(wanted)

    def _pass_on(self, wanted: Wanted) -> Response:
        is_transfer = wanted.method == "GET" and wanted.missing is BlobUnknown
        transfer = self._gate.transfer(client_address(), wanted) if is_transfer else Transfer()
        return self._relay(wanted, None, transfer)

    def _relay(self, wanted: Wanted, answer: Answer | None, transfer: Transfer) -> Response:
        """Return the response that passes upstream's answer on; it is fetched where there is none yet."""
        with ExitStack() as failed:
            failed.callback(transfer.close)
            if answer is None:
                answer = self._fetch(wanted)
            failed.callback(answer.response.close)
            response = self._linked(relay(self._upstream, wanted, answer, transfer, request.environ), answer)
            if self._store is not None:
                response.headers["X-Cache"] = "BYPASS"
            failed.pop_all()
            return response

    def _linked(self, response: Response, answer: Answer) -> Response:
        """Return the response with the way to its next page, if upstream gave one."""
        path = self._config.path_prefix + request.path
        link = next_page(answer.response.headers.get("Link", ""), path, g.get("ns"))
        if link is not None:
            response.headers["Link"] = link
        return response

    def _registry_here(self) -> Registry:
        """Return the registry whose own address the client may take this Host for."""
        return self._router.by_host(request.host) or self._router.default

    def _admit_user(self, scope: str | None) -> None:
        """Refuse those who are not among the mirror's own users, where it has some."""
        if self._users:
            parameters = {"service": OWN_SERVICE} | ({"scope": scope} if scope else {})
            self._users.admit(request.headers.get("Authorization"), Challenge("", parameters))

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
        """Return the URL by which clients know the mirror, its secret path included."""
        scheme = "https" if request.scheme == "https" else "http"
        return (self._config.public_url or f"{scheme}://{request.host}") + self._config.path_prefix


def pull_through(config: Config, upstream: Upstream) -> PullThrough | None:
    """Return the cache that the settings ask for; raise ConfigError where its folder is none."""
    if config.cache_dir is None:
        return None
    folder = Path(config.cache_dir)
    limits = Limits(config.cache_size, config.cache_min_free, config.cache_max_age)
    store = PullThrough(config, Cache(folder, limits), upstream)
    try:
        folder.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise ConfigError(f"MIRROR_CACHE_DIR: {folder}: {error.strerror}") from None
    except OSError as error:  # the disk may come back
        store.health.failed(error)
    return store


@contextmanager
def not_in_the_way() -> Iterator[None]:
    """Let nothing that goes wrong in counting spoil a pull, or end a worker."""
    try:
        yield
    except Exception as error:
        log.error("something was not counted", exc_info=error)


def body_size(response: Response) -> int:
    """Return the bytes of this request's answer, as far as they are known before they are sent."""
    if request.method == "HEAD" or response.status_code in (204, 304):
        return 0
    if response.content_length is None and response.is_sequence:
        return sum(map(len, response.iter_encoded()))
    return response.content_length or 0


def is_one_range(headers: Mapping[str, str], size: int) -> bool:
    """Tell whether a request asks for one part of so many bytes, and not for all. Source: RFC 9110, 13.1.5 and 14."""
    asked = parse_range_header(headers.get("Range"))
    if asked is None or asked.units != "bytes" or len(asked.ranges) > 1 or headers.get("If-Range", "").startswith("W/"):
        return False
    return -asked.ranges[0][0] < size


def age(since: float) -> str:
    """Return how many seconds ago a time, in time.time(), was."""
    return str(max(0, int(time.time() - since)))


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
        if isinstance(tags, dict) and "name" in tags:
            return json.dumps({**tags, "name": name}, allow_nan=False).encode()
    except (ValueError, RecursionError):
        pass
    return body


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


def client_address() -> str:
    """Return the address of the client, or ``-`` where it is not known: a terminator that does not say it."""
    return str(request.environ["mirror.client"])


def anonymous_token() -> Response:
    """Return the token that stands for no login; the real one stays with the mirror."""
    return token_response(ANONYMOUS, ANONYMOUS_SECONDS)


def token_response(token: str, seconds: int) -> Response:
    """Return a token's JSON, under both names that clients look for. Source: distribution's token specification."""
    issued = datetime.now(UTC).replace(microsecond=0, tzinfo=None).isoformat() + "Z"
    response = json_response({"token": token, "access_token": token, "expires_in": seconds, "issued_at": issued})
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


class Front(Views):
    """Answer people in a browser too, and what watches over the mirror; pages.py and templates/ say how it looks."""

    def __init__(self, config: Config, registries: Mapping[str, Registry]) -> None:
        super().__init__(config, registries)
        self._pages = Pages()
        self._finder = Finder(self._upstream, self._store)
        self._ready: tuple[float, dict[str, str]] = (-math.inf, {})  # when, in time.monotonic(), and what was found
        self._asked: Once[dict[str, str]] = Once()
        self._site: Registry | None = None
        if config.home.kind == "proxy":
            self._site = Registry("the site of MIRROR_HOME", (config.home.url,))
            self._way = Upstream(config, {self._site.name: self._site}, self.telemetry)

    def routes(self) -> list[tuple[str, Callable[..., Response], list[str]]]:
        """Return rule, view and methods of each route."""
        shown: dict[str, dict[str, Callable[..., Response]]] = {
            "usage": {"/": self.home, "/search": self.search_page, "/tags": self.tags_page},
            "nginx": {"/": self.nginx},
            "redirect": {"/": self.lead_on},
            "proxy": {"/": self.visit, "/<path:path>": self.visit},
        }
        found = {"/readyz": self.readyz, "/robots.txt": self.robots, **shown.get(self._config.home.kind, {})}
        if self._config.status:
            found |= {"/status": self.status, "/status.json": self.status_json}
            found |= {path: partial(page_file, name) for path, name in STATUS_FILES.items()}
        if self._config.metrics:
            found["/metrics"] = self.metrics
        if self._config.home.kind == "usage":
            found |= {f"/{name}": partial(page_file, name) for name in FILES}
        return [*super().routes(), *((rule, view, ["GET"]) for rule, view in found.items())]

    def close_idle(self) -> None:
        """Close the connections to upstream that no request uses."""
        super().close_idle()
        if self._site is not None:
            self._way.close_idle()

    # What is not to be seen

    def admit_client(self) -> None:
        """Refuse clients that may not pull; its viewers may see what the owner sees all the same."""
        if not self._is_viewer():
            super().admit_client()

    def _viewers(self) -> tuple[Network, ...]:
        """Return who may see what stands at this path, empty where it is nothing of the owner's."""
        path = request.path.removesuffix("/")
        return self._config.metrics if path == "/metrics" else self._config.status if path in STATUS_PATHS else ()

    def _is_viewer(self) -> bool:
        """Tell whether this client is one of the viewers of what stands at this path."""
        return self._is_among(self._viewers())

    def _is_among(self, viewers: tuple[Network, ...]) -> bool:
        """Tell whether this client is one of these viewers.

        On this host that is by its address or as localhost: a terminator that does not say who asks has another name,
        and so has a foreign page that a browser takes for this host (DNS rebinding).
        """
        client = client_address()
        if not is_within(client, viewers):
            return False
        host = _bare(request.host).strip("[]")
        return not is_within(client, LOOPBACK) or is_address(host) or host == "localhost"

    def admit_viewer(self) -> Response | None:
        """Let only its viewers find what the owner sees, by whatever method; for others it is a path like any other.

        Nor is there a page at a path with one more slash: its links would lead elsewhere.
        """
        path = request.path.removesuffix("/")
        if self._viewers() and not self._is_viewer():
            if self._site is None:
                abort(404)
            return self.visit(path[1:]) if request.method in ("GET", "HEAD") else None
        if request.url_rule is not None and request.path == f"{request.url_rule.rule}/" and not is_of_the_mirror(path):
            abort(404)
        return None

    def turn_away(self) -> Response | None:
        """Show nginx to a blocked agent: its welcome page, and nothing where a registry would be."""
        note_request(request.environ)
        if request.path == "/healthz" or not self._gate.blocks(request.headers.get("User-Agent", "")):
            return None
        return as_nginx(nginx_error(404) if is_of_the_mirror(request.path) else nginx_welcome())

    def error(self, error: Exception) -> Response:
        """Write any error as OCI JSON; where the mirror is not to be seen, as nginx does."""
        response = super().error(error)
        hidden = self._config.home.kind == "nginx" and not is_of_the_mirror(request.path)
        return as_nginx(nginx_error(response.status_code)) if hidden else response

    def nginx(self) -> Response:
        """Show the page of an nginx that has no site yet."""
        welcome = nginx_welcome()
        welcome.make_conditional(request.environ)
        return as_nginx(welcome)

    def robots(self) -> Response:
        """Tell crawlers to leave."""
        return as_nginx(robots()) if self._config.home.kind == "nginx" else robots()

    def lead_on(self) -> Response:
        """Send the browser to another site."""
        return Response(status=302, headers={"Location": self._config.home.url, **NO_INDEX})

    def visit(self, path: str = "") -> Response:
        """Show a page of the site that stands here: of ``/v2/``, only what Docker Hub's own pages ask for."""
        site = cast(Registry, self._site)
        if ".." in path.split("/") or (is_api(request.path) and not SITE_API.fullmatch(request.path)):
            abort(404)
        self._admit_reader()
        query = request.query_string.decode("ascii")
        target = quote(request.path, safe=PATH_LETTERS) + (f"?{query}" if query else "")
        with watched(client_socket()):
            headers = kept(request.headers, SITE_REQUEST_HEADERS)
            answer = self._way.visit(site, request.method, target, headers, trail())
        with ExitStack() as failed:
            failed.callback(answer.response.close)
            headers = kept(answer.response.headers, SITE_RESPONSE_HEADERS) | NO_INDEX
            location = answer.response.headers.get("Location")
            if location is not None:
                headers["Location"] = at_mirror(site.endpoints[0] + target, location, site.endpoints[0])
            failed.pop_all()
        body = () if request.method == "HEAD" else PageBody(answer, client_socket())
        return Relayed(body, answer.status, headers, direct_passthrough=True)

    # Pages

    def home(self) -> Response:
        """Show how to use the mirror, with the commands for an image."""
        self._admit_reader()
        typed = request.args.get("image", "")[:MAX_TYPED]
        here = self._address()
        own = self._own(here)
        example = "nginx" if own.name == DOCKER_IO else "owner/image"
        image, problem = self._image(typed or example, here)
        shown = image or Image(own.name, complete(own, example), "")
        searched = self._index(here)
        return self._show(
            "home",
            typed=typed,
            example=example,
            problem=problem,
            plain_name=shown.path,
            registry=shown.registry,
            own=own.name,
            commands=by_name(here, shown),
            clients=clients(here, shown, own.name == DOCKER_IO),
            searched=searched.name if searched.search else None,
            query="",
            login="users" if self._users else "on" if self._config.login else "off",
            **self._served(here),
        )

    def search_page(self) -> Response:
        """Show what the registry's index finds."""
        self._admit_reader()
        here, query, page = self._address(), request.args.get("q", "").strip()[:100], page_number()
        registry = self._index(here)
        shown: dict[str, Any] = {"searched": registry.name, "query": query, "page": page}
        if not query:
            return self._show("search", **shown)
        g.target = Target(registry, "")
        try:
            if registry.search is None:
                return self._show("search", 404, problem="no_index", **shown)
            arguments = {"q": query, "n": str(PAGE_RESULTS), "page": str(page)}
            results = read_results(self._upstream.search(registry, arguments, trail()).body)
        except (MirrorError, ValueError) as error:
            return self._failed("search", error, **shown)
        prefix = "" if registry == self._own(here) else f"{registry.name}/"
        named = (one._replace(name=prefix + one.name) for one in results.found)
        found = [one for one in named if self._may_pull(here, registry, one.name)]
        return self._show("search", found=found, pages=results.pages, **shown)

    def tags_page(self) -> Response:
        """Show the tags of an image, and of those on this page what they stand for."""
        self._admit_reader()
        typed, wanted = request.args.get("image", ""), request.args.get("filter", "")[:128]
        image, problem = self._image(typed, self._address())
        if image is None:
            return self._show("tags", 404, name=typed[:MAX_TYPED], problem=problem)
        target = g.target = Target(self._router.named(image.registry), image.repository)
        shown: dict[str, Any] = {"name": image.path, "filter": wanted}
        try:
            with watched(client_socket()):
                shown |= self._listed(target, wanted, page_number())
        except MirrorError as error:
            return self._failed("tags", error, **shown)
        return self._show("tags", **shown)

    def _listed(self, target: Target, wanted: str, page: int) -> dict[str, Any]:
        """Return what a page shows of the tags that contain a text; raise MirrorError."""
        every, is_cut = self._finder.tags(target, trail())
        tags = sorted_tags(tag for tag in every if wanted in tag and self._admits(target, tag))
        pages = max(1, math.ceil(len(tags) / PAGE_TAGS))
        page = min(page, pages)
        here = tags[(page - 1) * PAGE_TAGS : page * PAGE_TAGS]
        facts, is_spared = self._finder.facts(target, here, partial(self._gate.count_pull, client_address()))
        rows = [(tag, facts.get(tag)) for tag in here]
        counted = {"count": len(tags), "is_cut": is_cut, "page": page, "pages": pages}
        return {"rows": rows, "is_spared": is_spared, **counted}

    def _show(self, template: str, status: int = 200, **values: Any) -> Response:
        arguments = request.args.to_dict()
        return self._pages.show(
            template,
            status,
            address=self._address(),
            arguments=arguments,
            **{"problem": None, "sees_status": self._is_among(self._config.status), **values},
        )

    def _failed(self, template: str, error: Exception, **values: Any) -> Response:
        """Show why upstream gives nothing, in one plain sentence."""
        log.warning("%s", error)
        is_missing = isinstance(error, (NotFound, Unauthorized, Denied))  # without a login nobody tells which
        is_limit = isinstance(error, TooManyRequests)
        problem, status = ("missing", 404) if is_missing else ("limited", 503) if is_limit else ("unreachable", 502)
        response = self._show(template, status, problem=problem, **values)
        response.headers.update(kept(getattr(error, "headers", {}), ("Retry-After",)))
        return response

    def _image(self, typed: str, here: Address) -> tuple[Image | None, str | None]:
        """Return the image that was typed, or the name of the sentence that says why there is none."""
        named = read_image(typed.replace(f"{here.host}/", "", 1))
        try:
            target = self._router.resolve(here.host, None, named.name)
            if named.tag and not TAG.fullmatch(named.tag):
                return None, "bad_image"
            if named.digest:
                check_digest(named.digest)
            self._gate.admit_image(target, named.digest or named.tag)
        except Denied:
            return None, "denied"
        except MirrorError:
            return None, "bad_image"
        return Image(target.registry.name, target.repository, target.prefix, named.tag, named.digest), None

    def _may_pull(self, here: Address, registry: Registry, name: str) -> bool:
        """Tell whether a name that an index gave is one, and of an image that may be pulled here."""
        try:
            target = self._router.resolve(here.host, None, name)
        except MirrorError:
            return False
        return target.registry == registry and self._admits(target, "")

    def _admits(self, target: Target, tag: str) -> bool:
        """Tell whether an image may be pulled by a tag that the registry named; by any, if there is none."""
        try:
            self._gate.admit_image(target, tag)
        except Denied:
            return False
        return not tag or TAG.fullmatch(tag) is not None

    def _address(self) -> Address:
        return Address(self._public_url())

    def _own(self, here: Address) -> Registry:
        """Return the registry of names that name none, at this address."""
        return self._router.by_host(here.host) or self._router.default

    def _index(self, here: Address) -> Registry:
        return self._router.by_host(here.host) or self._router.searched

    def _served(self, here: Address) -> dict[str, Any]:
        """Return the table of the registries that are served at this address."""
        own, bare = self._own(here), re.sub(r":[0-9]+$", "", here.host)
        is_name = "." in bare and not is_address(bare)
        found = [
            ServedRegistry(
                registry.name,
                f"{here.host}/…" if registry == own else f"{here.host}/{registry.name}/…",
                [*registry.hosts, *([f"{registry.alias}.{here.host}"] if registry.alias and is_name else [])],
            )
            for registry in self._router.served(here.host)
        ]
        return {"registries": found, "by_host": any(one.hosts for one in found)}

    def _admit_reader(self) -> None:
        """Refuse in a browser who is not among the mirror's own users: by Basic, which browsers know."""
        if self._users:
            g.target = Target(self._router.default, "")
            login = request.authorization
            self._user_token(login.parameters if login is not None else {})

    # Readiness

    def readyz(self) -> Response:
        """Tell whether the default registry can be reached and the cache's disk be written to; for a few seconds."""
        found_at, found = self._ready
        if time.monotonic() - found_at > READY_SECONDS:
            found = self._asked.get((), partial(self._look, trail()))
        is_ready = "fails" not in found.values()
        return json_response({"status": "ok" if is_ready else "failing", **found}, 200 if is_ready else 503)

    def _look(self, asked: Trail) -> dict[str, str]:
        found = {"registry": "ok"}
        try:
            self._upstream.reach(self._router.default, asked)
        except MirrorError as error:
            log.warning("not ready: %s", error)
            found["registry"] = "fails"
        if self._store is not None:
            found["cache"] = "ok" if self._can_write(self._store) else "fails"
        self._ready = (time.monotonic(), found)
        return found

    def _can_write(self, store: PullThrough) -> bool:
        with suppress(OSError, gevent.Timeout), gevent.Timeout(DISK_SECONDS):
            store.writers.run(write_a_byte, str(self._config.cache_dir))
            return True
        return False

    # What the owner sees

    def status(self) -> Response:
        """Show what the mirror does."""
        shown = self._pages.status(self._report())
        brand = "./" if self._config.home.kind == "usage" else "status"
        page: dict[str, Any] = {"files": "status/", "brand": brand, "sees_status": False}
        response = self._show("status", shown=shown, has_cache=self._store is not None, **page)
        response.headers.update(NOT_KEPT)
        return response

    def status_json(self) -> Response:
        """Give what the status page shows: the figures, and how the page says them."""
        report = self._report()
        response = json_response({**report, "shown": self._pages.status(report)})
        response.headers.update(NOT_KEPT)
        return response

    def metrics(self) -> Response:
        """Give what Prometheus asks for."""
        from metrics import expose

        report = self._report()
        accept = request.headers.get("Accept", "")
        content, media_type = expose(accept, __version__, report, *self.telemetry.totals())
        return Response(content, headers=NOT_KEPT, content_type=media_type)

    def _report(self) -> Report:
        self.tick()
        cache = self._store.figures() if self._store is not None else None
        return {"version": __version__, **self.telemetry.report(), "cache": cache}


class Finder:
    """Find out which tags there are and what they stand for, at the cost of few pulls.

    A HEAD, which tells the digest, costs nothing at Docker Hub; a manifest is counted there. What a digest stands for
    is remembered, since it never changes. Where the registry tells its limit, manifests are asked for only as long as
    four fifths of it are left: the rest is for pulls.
    """

    def __init__(self, upstream: Upstream, store: PullThrough | None) -> None:
        self._upstream = upstream
        self._store = store
        self._known: dict[tuple[str, str], Facts] = {}  # by registry and digest: what one says is no other's word

    def tags(self, target: Target, asked: Trail) -> tuple[list[str], bool]:
        """Return a repository's tags, and whether there are more; raise MirrorError."""
        tags: list[str] = []
        query = {"n": "1000"}
        with gevent.Timeout(LIST_SECONDS, GatewayTimeout(f"{target.registry.name} is slow")):
            for _ in range(MAX_LISTS):
                answer = self._fetch(target, "GET", "tags/list", NotFound, asked, query, MAX_TAGS)
                tags += tags_in(answer.start)
                link = next_page(answer.response.headers.get("Link", ""), "", None)
                if link is None:
                    return tags, False
                query = dict(parse_qsl(link.partition("?")[2].partition(">")[0]))
        return tags, True

    def facts(self, target: Target, tags: list[str], count: Callable[[], None]) -> tuple[dict[str, Facts], bool]:
        """Return what those of the tags stand for that is found out in time, and whether some were not asked for.

        `count` is called before each manifest; it raises TooManyRequests where that is one too many.
        """
        pool = Pool(AT_ONCE)
        found: dict[str, Facts] = {}
        spared: list[str] = []

        def look(tag: str) -> None:
            try:
                facts = self._facts(target, tag, count)
            except (MirrorError, ValueError) as error:
                log.info("%s:%s is shown without its size: %s", target.repository, tag, error)
                return
            if facts is None:
                spared.append(tag)
            else:
                found[tag] = facts

        try:
            with suppress(gevent.Timeout), gevent.Timeout(FACTS_SECONDS):
                pool.map(look, tags)
        finally:
            pool.kill()
        return found, bool(spared)

    def _facts(self, target: Target, tag: str, count: Callable[[], None]) -> Facts | None:
        head = self._manifest(target, "HEAD", tag)
        key = target.registry.name, head.digest
        if key not in self._known:
            if not has_spare(head.headers):
                return None
            try:
                count()
            except TooManyRequests:
                return None
            facts = self._read(target, head.digest)
            if len(self._known) >= MAX_TOKENS:
                self._known.clear()
            self._known[key] = facts
        return self._known[key]

    def _read(self, target: Target, digest: str) -> Facts:
        """Return what a manifest says, and one that it leads to; raise MirrorError, and ValueError where it is none."""
        parsed = read_manifest(self._manifest(target, "GET", digest).body)
        facts = parsed.facts
        if parsed.child is not None:
            inner = read_manifest(self._manifest(target, "GET", check_digest(parsed.child)).body)
            facts = facts._replace(size=inner.facts.size)
        elif parsed.config is not None:
            platform = read_config(self._blob(target, check_digest(parsed.config)))
            facts = facts._replace(platforms=(platform,) if platform else ())
        return facts

    def _manifest(self, target: Target, method: str, reference: str) -> Looked:
        """Return a manifest, from the cache where it is there; raise MirrorError."""
        headers = {"Accept": ", ".join(MANIFEST_TYPES)}
        wanted = Wanted(target, method, f"manifests/{reference}", {}, headers, None, ManifestUnknown, Trail())
        if self._store is not None and method == "GET" and (found := self._store.manifest(wanted)) is not None:
            return Looked(found.record.digest, found.body or b"", found.headers)
        answer = self._upstream.fetch(wanted._replace(whole=MAX_MANIFEST if method == "GET" else 0))
        shown = answer.response.headers
        digest = check_digest(shown.get("Docker-Content-Digest", reference))
        return Looked(digest, answer.start, kept(shown, LIMIT_HEADERS))

    def _blob(self, target: Target, digest: str) -> bytes:
        return self._fetch(target, "GET", f"blobs/{digest}", BlobUnknown, Trail(), {}, MAX_FOREIGN_BODY).start

    def _fetch(
        self,
        target: Target,
        method: str,
        resource: str,
        missing: type[NotFound],
        asked: Trail,
        query: Mapping[str, str],
        whole: int,
    ) -> Answer:
        return self._upstream.fetch(Wanted(target, method, resource, query, {}, None, missing, asked, whole))


class Looked(NamedTuple):
    """Hold what was found out of a manifest; a HEAD has no body."""

    digest: str
    body: bytes
    headers: Mapping[str, str]


def has_spare(headers: Mapping[str, str]) -> bool:
    """Tell whether a registry's quota is large enough for more than pulls: four fifths are for them alone.

    Source: Docker Hub, ``RateLimit-Limit: 100;w=21600``. A registry that tells no limit has none.
    """
    limit, remaining = (headers.get(f"RateLimit-{word}", "").partition(";")[0] for word in ("Limit", "Remaining"))
    if not re.fullmatch("[0-9]{1,9}", limit) or not re.fullmatch("[0-9]{1,9}", remaining):
        return True
    return int(remaining) * 5 > int(limit) * 4


def tags_in(body: bytes) -> list[str]:
    """Return the tags of a list; raise BadGateway where it is none. Source: OCI distribution spec."""
    try:
        tags = json.loads(body)["tags"] or []
        return [tag for tag in tags if isinstance(tag, str)]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise BadGateway("upstream's list of tags is none") from None


class PageBody:
    """Pass a site's page on as it comes, up to a bound. Whoever has one must close it."""

    def __init__(self, answer: Answer, client: socket.socket | None) -> None:
        self._answer = answer
        self._client = client

    def __iter__(self) -> Iterator[bytes]:
        yield self._answer.start
        left = MAX_PAGE
        with reset_on_failure(self._client, Transfer()), upstream_errors(self._answer.host):
            while chunk := self._answer.response.raw.read(SLOW_CHUNK, decode_content=False):
                left -= len(chunk)
                if left < 0:
                    raise BadGateway(f"{self._answer.host} sends a page that is too long")
                yield chunk

    def close(self) -> None:
        """Close the connection to the site."""
        self._answer.response.close()


def at_mirror(url: str, location: str, base: str) -> str:
    """Return where a redirect of the site leads, seen from the mirror, which stands for `base`; raise BadGateway."""
    target = next_hop(url, location)
    if target == base or target.startswith((f"{base}/", f"{base}?")):
        return f"{request.script_root}/" + target.removeprefix(base).lstrip("/")
    return target


def is_of_the_mirror(path: str) -> bool:
    """Tell whether a path is for clients and for checks of health, not for people."""
    return is_api(path) or is_token(path) or path.startswith("/v1/") or path in HEALTH


def as_nginx(response: Response) -> Response:
    """Let an answer look as if nginx gave it."""
    g.decoy = True
    server = request.environ.get("gunicorn.response")
    if server is not None:
        server.version = "nginx"  # gunicorn lets no application set this header
    return response


def write_a_byte(folder: str) -> None:
    """Write to the disk of a folder and leave nothing there; raise OSError."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"0")


def page_number() -> int:
    """Return the page that is asked for, from 1 on."""
    text = request.args.get("page", "")
    return max(1, int(text)) if re.fullmatch("[0-9]{1,4}", text) else 1
