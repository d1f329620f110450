"""A pull mirror of container registries for a small host.

One ``docker pull nginx`` from end to end:

1. The client asks ``GET /v2/``. The mirror answers 401 with a challenge that names the mirror itself
   (`Views.ping`, `Views.challenge`), built from the one that the registry gave.
2. The client asks ``GET /token``. Without credentials it gets the word ``anonymous`` at once (`Views.token`); with
   credentials the question goes on to the registry's real realm and its answer comes back as it is.
3. The client asks ``HEAD`` and ``GET /v2/library/nginx/manifests/…``, then the blobs. The names are checked and
   completed (`resolve`), the endpoint is asked (`Upstream.fetch`): with the mirror's own token for an anonymous client,
   with the client's own for one that is logged in. Redirects are followed here, never by the client.
4. Status, an allowlist of headers and the bytes go back to the client (`relay`, `Body`).

What always holds:

- No blob is ever held whole, and no byte of a manifest or blob is ever changed.
- A client's Authorization goes to the registry's endpoint and its realm only: never to a redirect, never to a log.
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
from typing import Any
from typing import ClassVar
from typing import NamedTuple
from typing import cast
from urllib.parse import quote
from urllib.parse import urlencode
from urllib.parse import urljoin
from urllib.parse import urlsplit

import certifi
import gevent
import requests
import urllib3
from flask import Flask
from flask import Response
from flask import request
from gevent.event import AsyncResult
from greenlet import greenlet
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from werkzeug.datastructures import Authorization
from werkzeug.datastructures import Headers
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import HTTPException
from werkzeug.http import parse_options_header
from werkzeug.http import quote_header_value
from werkzeug.middleware.proxy_fix import ProxyFix

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

    status: ClassVar[int] = 500
    code: ClassVar[str] = "UNKNOWN"

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


class GatewayTimeout(MirrorError):
    """Say that upstream did not answer in time."""

    status = 504
    code = "UNAVAILABLE"


UPSTREAM_FAILURES = (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)


@contextmanager
def upstream_errors(host: str) -> Iterator[None]:
    """Turn what requests, urllib3 and the socket raise about `host` into BadGateway or GatewayTimeout."""
    try:
        yield
    except UPSTREAM_FAILURES as error:
        reason = root_cause(error)
        log.warning("%s: %s", host, reason)
        if isinstance(error, (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)):
            raise GatewayTimeout(f"{host} did not answer in time") from error
        raise BadGateway(f"{host} cannot be reached or does not speak HTTP: {reason}") from error


def root_cause(error: BaseException) -> str:
    """Return the innermost reason of an error of requests or urllib3.

    The outer ones hold the whole URL, and with it a signed query or a token's scope that no log may hold.
    """
    inner = getattr(error, "reason", None) or next((a for a in reversed(error.args) if isinstance(a, Exception)), None)
    if isinstance(inner, Exception):
        return root_cause(inner)
    return str(error).rpartition(": ")[2] if isinstance(error, urllib3.exceptions.HTTPError) else str(error)


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


class Target(NamedTuple):
    """Name what is asked for: a repository, by its full name, of a registry."""

    registry: Registry
    repository: str


def resolve(registries: Mapping[str, Registry], ns: str | None, name: str) -> Target:
    """Return the registry and repository that a request means.

    `ns` is containerd's query argument, `name` the repository's name in the path. Raises NameInvalid, and Denied for a
    registry that is not served here: the mirror is no open proxy.
    """
    if ns is not None and ns not in registries:
        raise Denied(f"this mirror does not serve that registry; it serves: {', '.join(registries)}")
    return Target(registries[ns or DOCKER_IO.name], complete(check_name(name)))


def complete(name: str) -> str:
    """Return Docker Hub's full name of a repository: ``nginx`` is ``library/nginx``."""
    return name if "/" in name else f"library/{name}"


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

ANONYMOUS = "anonymous"
ANONYMOUS_SECONDS = 3600
DEFAULT_TOKEN_SECONDS = 60  # token spec: "If omitted, this defaults to 60 seconds"
MAX_TOKENS = 1000


class Challenge(NamedTuple):
    """Hold a registry's Bearer challenge: its realm, and all its other parameters."""

    realm: str
    parameters: Mapping[str, str]

    @classmethod
    def parse(cls, headers: list[str]) -> Challenge | None:
        """Return the Bearer challenge among the values of WWW-Authenticate, or None."""
        for header in headers:
            found = WWWAuthenticate.from_header(header)
            if found is not None and found.type == "bearer":
                parameters = {key.lower(): value for key, value in found.parameters.items() if value is not None}
                return cls(parameters.pop("realm", ""), parameters)
        return None

    def at(self, realm: str) -> str:
        """Return the header's value that names another realm. All is quoted: some clients read it by pattern."""
        parameters = {"realm": realm, **self.parameters}
        return "Bearer " + ",".join(
            f"{key}={quote_header_value(v, allow_token=False)}" for key, v in parameters.items()
        )

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


def complete_scope(scope: str) -> str:
    """Return a scope parameter (one scope or several with spaces between) with Docker Hub's full names.

    Raises NameInvalid.
    """
    return " ".join(_complete_one(one) for one in scope.split(" "))


def _complete_one(scope: str) -> str:
    kind, _, rest = scope.partition(":")
    name, _, actions = rest.rpartition(":")
    if not kind.startswith("repository"):
        return scope
    return f"{kind}:{complete(check_name(name))}:{actions}"


def check_realm(registry: Registry, endpoint: str, realm: str) -> None:
    """Raise BadGateway unless tokens may be asked for at `realm`, to which a client's password would go.

    It must be https (unless the endpoint itself is not), on the endpoint's own site, or one of the registry's `realms`.
    """
    try:
        parts, own = urlsplit(realm), urlsplit(endpoint)
        listed = any(origin(realm) == origin(url) for url in registry.realms)
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
    return "." in parent and not _is_address(endpoint_host) and f".{host}".endswith(f".{parent}")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


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
    """Keep the mirror's own tokens, one for each endpoint and scope, shared by all clients."""

    def __init__(self) -> None:
        self._tokens: dict[tuple[str, str], Token] = {}
        self._running: dict[tuple[str, str], AsyncResult[Token]] = {}

    def get(self, key: tuple[str, str], fetch: Callable[[], Token]) -> str:
        """Return the token for `key` (endpoint, scope). However many ask, `fetch` runs once; its error reaches all."""
        token = self._tokens.get(key)
        if token is not None and time.monotonic() < token.renew_at:
            return token.value
        running = self._running.get(key)
        if running is None:
            running = self._running[key] = AsyncResult()
            self._fill(key, running, fetch)
        return cast(Token, running.get()).value

    def _fill(self, key: tuple[str, str], running: AsyncResult[Token], fetch: Callable[[], Token]) -> None:
        try:
            token = fetch()
        except Exception as error:
            running.set_exception(error)
        else:
            running.set(token)
            self._keep(key, token)
        finally:
            if not running.ready():  # this greenlet is being ended: let the others ask anew
                running.set_exception(GatewayTimeout("the token's fetch was ended"))
            del self._running[key]

    def _keep(self, key: tuple[str, str], token: Token) -> None:
        self._tokens.pop(key, None)  # it goes to the end: the first is the oldest
        self._tokens[key] = token
        if len(self._tokens) > MAX_TOKENS:
            del self._tokens[next(iter(self._tokens))]

    def drop(self, key: tuple[str, str], value: str) -> None:
        """Forget the token `value`, which the registry refused; a newer one stays."""
        if key in self._tokens and self._tokens[key].value == value:
            del self._tokens[key]


# ---------------------------------------------------------------------------------------------------------------------
# Upstream
# ---------------------------------------------------------------------------------------------------------------------

USER_AGENT = f"docker-mirror/{__version__}"
REDIRECTS = frozenset((301, 302, 303, 307, 308))
MAX_REDIRECTS = 5
MAX_FOREIGN_BODY = 1 << 20  # of a token answer, an error, a redirect: whatever is read whole
RETRY_AFTER = "60"  # seconds, where upstream limits and does not say how long
KEEP_ON_ERROR = ("Retry-After", "Content-Range", "RateLimit-Limit", "RateLimit-Remaining")
HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")


class Wanted(NamedTuple):
    """Say what a client wants of a repository, and as whom.

    `resource` is the path after the repository's name; `headers` go upstream as they are; `authorization` is the
    client's own, or None where the mirror acts as itself; `missing` is the error that a 404 stands for.
    """

    target: Target
    method: str
    resource: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    authorization: str | None
    missing: type[NotFound]


class Answer(NamedTuple):
    """Hold upstream's response, its body unread, and the hosts that were asked, the answering one last."""

    response: requests.Response
    hosts: tuple[str, ...]

    @property
    def status(self) -> int:
        """Return the HTTP status."""
        return self.response.status_code

    @property
    def redirected(self) -> bool:
        """Tell whether another host than the registry's endpoint may have answered."""
        return len(self.hosts) > 1


class Reply(NamedTuple):
    """Hold an answer that was read whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Adapter(HTTPAdapter):
    """Connect with one TLS context, shared by all connections.

    requests would read the CA bundle anew for each connection: 16 ms of CPU and 750 KB.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        super().__init__(pool_connections=32, pool_maxsize=64)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Give the shared context to every connection pool."""
        super().init_poolmanager(*args, ssl_context=self._context, **kwargs)

    def cert_verify(self, *args: Any) -> None:
        """Leave the connection alone: the shared context verifies."""


def tls_context(ca_file: str | None) -> ssl.SSLContext:
    """Return a context that trusts the bundle of requests, the system's authorities, and those of `ca_file`."""
    context = ssl.create_default_context(cafile=certifi.where())
    context.load_default_certs()
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


def read_bounded(response: requests.Response) -> bytes:
    """Return a body that is to be read whole and give the connection back; raise BadGateway if it is too long.

    It is not decoded: a compressed bomb stays small.
    """
    body: bytes = response.raw.read(MAX_FOREIGN_BODY + 1, decode_content=False)
    if len(body) <= MAX_FOREIGN_BODY:
        return body
    response.close()
    raise BadGateway("upstream's answer is too long")


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

    `missing` is raised for 404; `refused` makes the error for the registry's own 401 or 403. A host that was redirected
    to has no say in who may pull: its 401, 403 and 400 are failures. Source: the table of answers.
    """
    status, host = answer.status, answer.hosts[-1]
    if 200 <= status < 300 or status == 304:
        return
    body = read_bounded(answer.response)
    errors = oci_errors(body)
    headers = kept(answer.response.headers, KEEP_ON_ERROR)
    if status == 404:
        raise missing(f"{host} does not have it", headers, errors)
    if status == 416:
        raise RangeInvalid("the range lies outside the blob", headers, errors)
    if status == 429:
        message = f"{host} limits this mirror{plain_text(answer.response, body)}"
        raise TooManyRequests(message, {"Retry-After": RETRY_AFTER, **headers}, errors)
    if status in (401, 403) and not answer.redirected:
        raise refused(errors)
    if 400 <= status < 500 and not answer.redirected:
        raise BadRequest(f"{host} answered {status}{plain_text(answer.response, body)}", headers, errors)
    raise BadGateway(f"{host} answered {status}")


def kept(headers: Mapping[str, str] | Headers, names: tuple[str, ...]) -> dict[str, str]:
    """Return those of an upstream's headers that are listed and well-formed."""
    found = ((name, headers.get(name)) for name in names)
    return {name: value for name, value in found if value is not None and HEADER_VALUE.fullmatch(value)}


class Upstream:
    """Ask the registries, as the mirror itself or as a client, and follow their redirects."""

    def __init__(self, config: Config, registries: Mapping[str, Registry]) -> None:
        self._login = config.login
        self._timeouts = (config.connect_timeout, config.idle_timeout)
        self._first_byte = config.first_byte_timeout
        self._budget = config.connect_timeout + config.first_byte_timeout
        self._adapters = {ca: Adapter(tls_context(ca)) for ca in {r.ca_file for r in registries.values()}}
        self._challenges: dict[str, Challenge | None] = {}  # by endpoint; None: it asks for no token
        self._tokens = TokenStore()

    def fetch(self, wanted: Wanted) -> Answer:
        """Return the answer to pass on: 2xx or 304. Whoever gets it must close its response.

        Raises MirrorError: what upstream refuses or fails at, within connect and first-byte timeout in all.
        """
        endpoint = wanted.target.registry.endpoints[0]
        with self._deadline(endpoint):
            answer = self._ask(endpoint, wanted)
            raise_for_status(answer, wanted.missing, lambda errors: self._refusal(endpoint, wanted, answer, errors))
            return answer

    def challenge(self, registry: Registry) -> Challenge | None:
        """Return the registry's challenge, or None where it asks for no token; ask only if it is not yet known."""
        endpoint = registry.endpoints[0]
        if endpoint not in self._challenges:
            self._ping(registry, endpoint, None)
        return self._challenges.get(endpoint)

    def admit(self, registry: Registry, authorization: str) -> None:
        """Ask ``GET /v2/`` as a client that logs in; raise Unauthorized or Denied where the registry refuses it."""
        status, challenge = self._ping(registry, registry.endpoints[0], authorization)
        if status == 401:
            message = f"{registry.name} does not accept this login"
            raise Unauthorized(message, challenge) if challenge else Denied(message)

    def login(
        self, registry: Registry, query: Mapping[str, Any], form: Mapping[str, Any] | None, basic: str | None
    ) -> Reply:
        """Put a client's own request for a token to the registry's realm; `form` makes it a POST.

        Returns the realm's reply, be it the token or a refusal. Raises MirrorError.
        """
        challenge = self.challenge(registry)
        if challenge is None:
            raise BadRequest(f"{registry.name} asks for no login")
        url = with_query(challenge.realm, query)
        method, body = ("GET", None) if form is None else ("POST", urlencode(form, doseq=True))
        with self._deadline(url):
            response = self._send(registry, method, url, _authorized({}, basic), body)
            reply = Reply(response.status_code, response.headers, read_bounded(response))
        if reply.status < 300 or 400 <= reply.status < 500:
            return reply
        raise BadGateway(f"{host_of(url)} answered {reply.status}")

    def _ping(self, registry: Registry, endpoint: str, authorization: str | None) -> tuple[int, Challenge | None]:
        """Ask ``GET /v2/``; return the status, 2xx or 401, and the challenge, which is learnt."""
        with self._deadline(endpoint):
            answer = self._follow(registry, "GET", f"{endpoint}/v2/", _authorized({}, authorization))
            challenge = self._learn(registry, endpoint, answer)
            if answer.status != 401:
                raise_for_status(answer, NotFound, lambda errors: Denied(f"{registry.name} refuses", errors=errors))
            read_bounded(answer.response)
        if challenge is None and authorization is None:
            self._challenges[endpoint] = None
        return answer.status, challenge

    @contextmanager
    def _deadline(self, url: str) -> Iterator[None]:
        host = host_of(url)
        late = GatewayTimeout(f"{host} did not answer in time")
        with gevent.Timeout(self._budget, late), upstream_errors(host):
            yield

    def _ask(self, endpoint: str, wanted: Wanted) -> Answer:
        registry, repository = wanted.target
        url = with_query(f"{endpoint}/v2/{repository}/{wanted.resource}", wanted.query)
        if wanted.authorization is not None:
            return self._follow(registry, wanted.method, url, _authorized(wanted.headers, wanted.authorization))
        token = self._token(registry, endpoint, repository)
        answer = self._follow(registry, wanted.method, url, _authorized(wanted.headers, token))
        if (
            answer.status != 401
            or answer.redirected
            or not self._refresh(registry, endpoint, repository, answer, token)
        ):
            return answer
        read_bounded(answer.response)
        token = self._token(registry, endpoint, repository)
        return self._follow(registry, wanted.method, url, _authorized(wanted.headers, token))

    def _refresh(self, registry: Registry, endpoint: str, repository: str, answer: Answer, token: str | None) -> bool:
        """Learn from a 401 to the mirror itself; tell whether a new token may help."""
        challenge = self._learn(registry, endpoint, answer)
        if challenge is None or (token and challenge.parameters.get("error") == "insufficient_scope"):
            return False
        if token:
            self._tokens.drop((endpoint, pull_scope(repository)), token.removeprefix("Bearer "))
        return True

    def _learn(self, registry: Registry, endpoint: str, answer: Answer) -> Challenge | None:
        """Return the challenge of an answer, and keep what of it is true of the whole endpoint."""
        if answer.redirected:
            return None
        challenge = Challenge.parse(answer.response.raw.headers.getlist("WWW-Authenticate"))
        if challenge is not None:
            check_realm(registry, endpoint, challenge.realm)
            service = {key: value for key, value in challenge.parameters.items() if key == "service"}
            self._challenges[endpoint] = Challenge(challenge.realm, service)
        return challenge

    def _refusal(
        self, endpoint: str, wanted: Wanted, answer: Answer, errors: list[dict[str, Any]] | None
    ) -> MirrorError:
        registry, repository = wanted.target
        challenge = self._learn(registry, endpoint, answer) or self._challenges.get(endpoint)
        message = f"{registry.name} has no public image {repository}: it does not exist, or asks for a login"
        if wanted.authorization:
            message = f"{registry.name} does not let this login pull {repository}"
        if not self._login or challenge is None or (wanted.authorization and answer.status == 403):
            return Denied(message, errors=errors)
        parameters = {"scope": pull_scope(repository), **challenge.parameters}
        return Unauthorized(message, Challenge(challenge.realm, parameters), errors)

    def _token(self, registry: Registry, endpoint: str, repository: str) -> str | None:
        """Return the Authorization with which the mirror itself pulls, or None where none is asked for so far."""
        challenge = self._challenges.get(endpoint)
        if challenge is None:
            return None
        scope = pull_scope(repository)
        return "Bearer " + self._tokens.get(
            (endpoint, scope), lambda: self._fetch_token(registry, endpoint, challenge, scope)
        )

    def _fetch_token(self, registry: Registry, endpoint: str, challenge: Challenge, scope: str) -> Token:
        host, asked_at = host_of(challenge.realm), time.monotonic()
        try:
            with upstream_errors(host):
                answer = Answer(self._send(registry, "GET", challenge.token_url(scope), {}), (host,))
                raise_for_status(answer, NotFound, lambda errors: self._no_token(challenge, scope, errors))
                return Token.parse(read_bounded(answer.response), asked_at)
        except (ValueError, RecursionError) as error:
            raise BadGateway(f"{host} gave no token: {error}") from error
        except (BadGateway, GatewayTimeout):
            self._challenges.pop(endpoint, None)  # the realm may have moved: learn it anew
            raise

    def _no_token(self, challenge: Challenge, scope: str, errors: list[dict[str, Any]] | None) -> MirrorError:
        message = f"{host_of(challenge.realm)} gives no token for {scope} without a login"
        if not self._login:
            return Denied(message, errors=errors)
        return Unauthorized(message, Challenge(challenge.realm, {**challenge.parameters, "scope": scope}), errors)

    def _follow(self, registry: Registry, method: str, url: str, headers: Mapping[str, str]) -> Answer:
        """Send a request, and follow its redirects. Authorization goes to no other origin than that of `url`."""
        start, hosts = origin(url), [host_of(url)]
        for _ in range(MAX_REDIRECTS + 1):
            response = self._send(registry, method, url, headers)
            location = response.headers.get("Location")
            if response.status_code not in REDIRECTS or location is None:
                return Answer(response, tuple(hosts))
            read_bounded(response)  # gives the connection back for the next request
            url = next_hop(url, location)
            if origin(url) != start:
                headers = {name: value for name, value in headers.items() if name != "Authorization"}
                hosts.append(host_of(url))
        raise BadGateway(f"{hosts[0]} redirects more than {MAX_REDIRECTS} times")

    def _send(
        self, registry: Registry, method: str, url: str, headers: Mapping[str, str], body: str | None = None
    ) -> requests.Response:
        """Send one request; return once the head of the answer is there."""
        prepared = requests.PreparedRequest()
        prepared.method, prepared.url, prepared.body = method, url, body
        prepared.headers = CaseInsensitiveDict({**headers, "User-Agent": USER_AGENT, "Accept-Encoding": "identity"})
        if body is not None:
            prepared.headers["Content-Type"] = "application/x-www-form-urlencoded"
            prepared.headers["Content-Length"] = str(len(body))
        adapter = self._adapters[registry.ca_file]
        host = host_of(url)
        with gevent.Timeout(self._first_byte, GatewayTimeout(f"{host} did not answer in time")), upstream_errors(host):
            try:
                return adapter.send(prepared, stream=True, timeout=self._timeouts)
            except requests.ConnectionError as error:
                if body is not None or not _went_stale(error):
                    raise
                return adapter.send(prepared, stream=True, timeout=self._timeouts)


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
REQUEST_HEADERS = ("Accept", "Range", "If-Range", "If-None-Match", "If-Modified-Since")
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
FIRST_CHUNK, SLOW_CHUNK, FAST_CHUNK = 32 << 10, 16 << 10, 256 << 10  # bytes
WINDOW = 1 << 20  # bytes after which the rate is looked at
FAST_RATE = 4_000_000  # bytes per second
READABLE = 1  # of the event loop's io watchers
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER for 0 seconds


class ClientWatch:
    """Notice that the client has gone while the transfer waits for upstream, and break the wait off.

    As gevent.Timeout does, it throws into the waiting greenlet from the event loop.
    """

    def __init__(self, client: socket.socket) -> None:
        self.gone = False
        self._client = client
        self._watcher = gevent.get_hub().loop.io(client.fileno(), READABLE)
        self._watcher.start(self._readable, gevent.getcurrent())

    def _readable(self, transfer: greenlet) -> None:
        self._watcher.stop()  # bytes mean that the client lives, and sends its next request early
        try:
            self.gone = self._client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except OSError:
            self.gone = True
        if self.gone:
            transfer.throw(ConnectionResetError(errno.ECONNRESET, "the client has gone"))

    def stop(self) -> None:
        """Stop watching."""
        self._watcher.stop()
        self._watcher.close()


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
        remaining = self._answer.response.raw.length_remaining
        if remaining is None or remaining > FIRST_CHUNK:
            yield b""  # sends the headers now: containerd waits 30 s for them, a slow line may need as long for a chunk
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
        if self._watch is not None and self._watch.gone:
            return ConnectionResetError(errno.ECONNRESET, "the client has gone")
        log.warning("%s broke off in mid-answer: %s", self._answer.hosts[-1], root_cause(error))
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
    """Return the response that passes `answer` on; `client` is the socket to reset if upstream breaks off.

    Raises BadGateway for a body whose end could not be told from a cut: without a length, and not chunked.
    """
    headers = kept(answer.response.headers, RESPONSE_HEADERS)
    length = headers.get("Content-Length")
    bodiless = method == "HEAD" or answer.status in (204, 304)
    framed = bodiless or length is not None or answer.response.raw.chunked
    if not framed or (length is not None and not re.fullmatch("[0-9]+", length)):
        answer.response.close()
        raise BadGateway(f"{answer.hosts[-1]} does not say how long its answer is")
    if bodiless:
        read_bounded(answer.response)
        return Relayed(b"", answer.status, headers)
    return Relayed(Body(answer, client), answer.status, headers, direct_passthrough=True)


def next_page(link: str, path: str) -> str | None:
    """Return an upstream's Link header with its target at the mirror, ``path``; None where it has no next page."""
    found = re.fullmatch(r'\s*<([^<>]*)>\s*;\s*rel="?next"?\s*', link)
    if found is None:
        return None
    query = found[1].partition("?")[2].partition("#")[0]
    return f'<{path}?{query}>; rel="next"'


# ---------------------------------------------------------------------------------------------------------------------
# Access
# ---------------------------------------------------------------------------------------------------------------------

READS = "GET, HEAD, OPTIONS"
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


def note_request(environ: dict[str, Any]) -> None:
    """Put into the WSGI environment what the access line shows (wsgi.py has its format); the query is not among it."""
    address = environ.get("REMOTE_ADDR", "")
    if not _is_address(address):  # what X-Forwarded-For holds is anybody's word
        address = environ.get("werkzeug.proxy_fix.orig", {}).get("REMOTE_ADDR") or "-"
    environ["mirror.client"] = address
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
    if "%2f" in environ.get("RAW_URI", "").partition("?")[0].lower():
        raise NameInvalid("a slash in the path must not be encoded")
    if request.method == "OPTIONS" and (is_api(request.path) or request.path == "/token"):
        return Response(status=204, headers=PREFLIGHT)
    if is_api(request.path) and request.method not in READS.split(", "):
        raise Unsupported("this is a mirror for pulls: push to the registry itself", {"Allow": READS})
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Application
# ---------------------------------------------------------------------------------------------------------------------

MAX_FORM = 64 << 10  # bytes of a POST to /token


def create_app(config: Config) -> Flask:
    """Return the WSGI application; raise ConfigError for a wrong registries file."""
    app = Flask("mirror", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_FORM
    app.url_map.merge_slashes = False
    app.url_map.strict_slashes = False
    views = Views(config, load_registries(config.registries))
    app.before_request(admit_request)
    app.after_request(finish_response)
    app.register_error_handler(Exception, views.error)
    for rule, view, methods in views.routes():
        app.add_url_rule(rule, view.__name__, view, methods=methods)
    if config.proxies:
        hops = config.proxies
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=hops, x_proto=hops, x_host=hops)  # type: ignore[method-assign]
    return app


def finish_response(response: Response) -> Response:
    """Add the headers that every answer of the API has."""
    if is_api(request.path):
        response.headers["Docker-Distribution-Api-Version"] = "registry/2.0"
    if is_api(request.path) or request.path == "/token":
        response.headers.update(CORS)
    return response


class Views:
    """Answer the routes. It holds the state of the application: the registries, and the way upstream."""

    def __init__(self, config: Config, registries: Mapping[str, Registry]) -> None:
        self._config = config
        self._registries = registries
        self._docker_io = registries[DOCKER_IO.name]
        self._upstream = Upstream(config, registries)

    def routes(self) -> list[tuple[str, Callable[..., Response], list[str]]]:
        """Return rule, view and methods of each route."""
        return [
            ("/healthz", self.healthz, ["GET"]),
            ("/token", self.token, ["GET", "POST"]),
            ("/v2/", self.ping, ["GET"]),
            ("/v2/_catalog", self.catalog, ["GET"]),
            ("/v2/<path:name>/manifests/<reference>", self.manifest, ["GET"]),
            ("/v2/<path:name>/blobs/<digest>", self.blob, ["GET"]),
            ("/v2/<path:name>/tags/list", self.tags, ["GET"]),
            ("/v2/<path:name>/referrers/<digest>", self.referrers, ["GET"]),
        ]

    def healthz(self) -> Response:
        """Tell that the process is alive; upstream is not asked."""
        return json_response({"status": "ok"})

    def ping(self) -> Response:
        """Answer ``/v2/``: 200, or 401 with the challenge from which dockerd learns where tokens are to be had."""
        authorization = request.headers.get("Authorization")
        if self._config.login and authorization is None:
            challenge = self._upstream.challenge(self._docker_io)
            if challenge is not None:
                raise Unauthorized("a token is needed, even for public images", challenge)
        own = self._own_authorization()
        if own is not None:
            self._upstream.admit(self._docker_io, own)
        return json_response({})

    def catalog(self) -> Response:
        """Refuse the list of all repositories: Docker Hub has none either."""
        raise Unsupported("this mirror has no catalog", {"Allow": "OPTIONS"})

    def manifest(self, name: str, reference: str) -> Response:
        """Pass a manifest on, by tag or digest."""
        return self._pass(name, f"manifests/{check_reference(reference)}", ManifestUnknown)

    def blob(self, name: str, digest: str) -> Response:
        """Pass a blob on."""
        return self._pass(name, f"blobs/{check_digest(digest)}", BlobUnknown)

    def tags(self, name: str) -> Response:
        """Pass a list of tags on, a page at a time."""
        return self._pass(name, "tags/list", NotFound, ("n", "last"))

    def referrers(self, name: str, digest: str) -> Response:
        """Pass the list of what refers to a manifest on."""
        return self._pass(name, f"referrers/{check_digest(digest)}", ManifestUnknown, ("artifactType", "n", "last"))

    def token(self) -> Response:
        """Answer a request for a token: ``anonymous`` at once, or the realm's own answer to a login.

        Source: distribution's token specification (GET, and POST as in OAuth2).
        """
        query = _completed(request.args.to_dict(flat=False))
        form = _completed(request.form.to_dict(flat=False)) if request.method == "POST" else None
        basic = basic_login(request.headers.get("Authorization"))
        if basic is None and not (form and {"password", "refresh_token"} & form.keys()):
            return anonymous_token()
        if not self._config.login:
            raise Denied("this mirror takes no login: pull without one")
        reply = self._upstream.login(self._docker_io, query, form, basic)
        headers = kept(reply.headers, ("Content-Type", "Retry-After"))
        return Relayed(reply.body, reply.status, {**headers, "Cache-Control": "no-store"})

    def error(self, error: Exception) -> Response:
        """Write any error as OCI JSON; of a bug of ours, only the log tells more."""
        if isinstance(error, HTTPException):
            return http_error(error)
        if not isinstance(error, MirrorError):
            log.error("%s %s failed", request.method, request.environ.get("mirror.path"), exc_info=error)
            error = MirrorError()
        response = json_response({"errors": error.errors}, error.status)
        response.headers.update(error.headers)
        if isinstance(error, Unauthorized):
            response.headers["WWW-Authenticate"] = error.challenge.at(f"{self._public_url()}/token")
        return response

    def _pass(self, name: str, resource: str, missing: type[NotFound], arguments: tuple[str, ...] = ()) -> Response:
        target = resolve(self._registries, request.args.get("ns"), name)
        query = {key: request.args[key] for key in arguments if key in request.args}
        headers = kept(request.headers, REQUEST_HEADERS)
        environ = request.environ
        environ["mirror.upstream"] = host_of(target.registry.endpoints[0])
        answer = self._upstream.fetch(
            Wanted(target, request.method, resource, query, headers, self._own_authorization(), missing)
        )
        environ["mirror.upstream"] = ">".join(answer.hosts)
        link = next_page(answer.response.headers.get("Link", ""), request.path)
        response = relay(answer, request.method, environ.get("gunicorn.socket"))
        if link is not None:
            response.headers["Link"] = link
        return response

    def _own_authorization(self) -> str | None:
        """Return the client's own Authorization, or None where the mirror acts as itself."""
        value = request.headers.get("Authorization")
        if value is None or not self._config.login or value.lower() == f"bearer {ANONYMOUS}":
            return None
        return value

    def _public_url(self) -> str:
        if self._config.public_url is not None:
            return self._config.public_url
        scheme = "https" if request.scheme == "https" else "http"
        return f"{scheme}://{request.host}"


def _completed(arguments: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the arguments of a token request with Docker Hub's full names in each scope."""
    return {key: [complete_scope(v) for v in values] if key == "scope" else values for key, values in arguments.items()}


def basic_login(authorization: str | None) -> str | None:
    """Return a header of Basic credentials, or None where it names no user."""
    found = Authorization.from_header(authorization)
    return authorization if found is not None and found.type == "basic" and found.username else None


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
