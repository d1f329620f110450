"""Walk one ``docker pull`` through a mirror as dockerd does, and say what is wrong on the way and how to mend it.

This is a client: it sees what dockerd sees, and knows nothing of the mirror's inside. Each step tells what came and
what is wrong with it; after one without which no pull goes on, the walk ends.
"""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import json
import platform
import re
import socket
import ssl
import sys
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from contextlib import suppress
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from datetime import UTC
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any
from typing import NamedTuple
from urllib.parse import quote
from urllib.parse import urlencode
from urllib.parse import urljoin
from urllib.parse import urlsplit

import click
import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import NameResolutionError
from urllib3.exceptions import NewConnectionError
from werkzeug.datastructures import WWWAuthenticate

from settings import parse_url

IMAGE = "busybox"  # one layer of 2 MB: large enough to see whether it is held back on the way
INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
ACCEPT = {"Accept": ", ".join((*MANIFESTS, *INDEXES))}
COMPRESSED = {"Accept-Encoding": "gzip"}  # Go's client says so by itself
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 5
MAX_BODY = 4 << 20  # bytes of anything but a blob
CHUNK = 64 << 10
CONNECT_SECONDS = 5
SILENT_SECONDS = 30  # containerd waits as long for an answer to begin; the mirror answers within 25
CLOCK_SECONDS = 60  # by which two clocks may differ: dockerd keeps a token for at least as long
HELD_SECONDS = 1.0  # by which the first byte of a whole blob may come later than that of a part
HELD_SIZE = 1 << 20  # bytes; a smaller blob is too quick to tell
DIGEST = re.compile(r"sha256:[a-f0-9]{64}|sha512:[a-f0-9]{128}")
MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm/v7", "armv6l": "arm/v6", "i686": "386"}
NO_ROUTE = (errno.ENETUNREACH, errno.EADDRNOTAVAIL)

HOST_MEND = (
    "Let the terminator pass Host, X-Forwarded-Proto and X-Forwarded-Host on (docs/tls.md); MIRROR_PROXIES and "
    "MIRROR_TERMINATORS say whether the mirror believes it. Or set MIRROR_PUBLIC_URL."
)
MENDS = {
    400: "If this comes from a storage host, the mirror passed Authorization on to it: S3 and R2 refuse that. After a "
    "redirect to another host it must be left out.",
    401: "Is the image's name right, and is it public? Does the terminator pass the Authorization header on?",
    403: "The mirror or the registry refuses this client or this image: see MIRROR_ALLOW_CLIENTS, MIRROR_DENY_CLIENTS, "
    "MIRROR_ALLOW_IMAGES and MIRROR_DENY_IMAGES.",
    404: "Is the image's name right? Does the URL end with the secret path (MIRROR_PATH_PREFIX), if there is one? "
    "Does the terminator pass all paths on as they are? To a User-Agent that MIRROR_BLOCK_AGENTS names, the mirror is "
    "not there; this one is docker-mirror-check.",
    405: "Let the terminator pass GET and HEAD on.",
    429: "Wait, or give the registry an account of the mirror's own or another endpoint (MIRROR_REGISTRIES).",
    502: "In JSON: the mirror cannot reach the registry; its log says why. In HTML: the terminator cannot reach the "
    "mirror; does it run, at the address that the terminator asks?",
}
DNS_MEND = "Is the name right, and has it an A or AAAA record? Does the name server of this host answer?"
CONNECT_MEND = "Does the web server run, and does the firewall let this port through?"
CERTIFICATE_FAULTS = {  # by OpenSSL's number, x509_vfy.h
    9: ("is not valid yet", "Is the clock of this host right?"),
    10: ("has expired", "Renew it, and see why that did not happen by itself. Is the clock of this host right?"),
    18: ("is signed by itself", "Get one that clients trust, such as Let's Encrypt's, or name its authority: --ca."),
    19: ("comes from an authority that is not trusted here", "Name that authority: --ca. Clients must trust it too."),
    20: (
        "comes from an authority that is not known here",
        "Let the terminator send the whole chain (fullchain.pem). Name a private authority: --ca.",
    ),
    62: ("is for another host", "Get one for this name: a wildcard one for docker.mirror.example and its like."),
    64: ("is for another address", "Name the mirror by its host name, not by its address."),
}


class Problem(NamedTuple):
    """Say what is wrong, and how to mend it; where that is a guess, it is not `sure`."""

    what: str
    mend: str
    sure: bool = True


class Stop(Exception):
    """End the walk: without this, no pull goes on."""

    def __init__(self, what: str, mend: str) -> None:
        super().__init__(what)
        self.problem = Problem(what, mend)


@dataclass
class Step:
    """Hold one step of a pull: the status of its last answer, what it tells, and what is wrong.

    A note says what the owner should know though nothing is wrong.
    """

    name: str
    status: int | None = None
    told: str = ""
    seconds: float = 0
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


IMAGE_NAME = re.compile(
    r"(?:([a-z0-9][a-z0-9.-]*:[0-9]{1,5})/)?([a-z0-9][a-z0-9._/-]*)(:[A-Za-z0-9_][A-Za-z0-9_.-]*)?(@[a-z0-9]+:[a-f0-9]+)?"
)


class Image(NamedTuple):
    """Name an image as a client of the mirror asks for it.

    A path may name a registry, but for one with a port: that is asked for as containerd asks, by ``ns``.
    """

    repository: str
    reference: str
    ns: str | None = None

    @classmethod
    def parse(cls, text: str) -> Image:
        """Read a name as docker does; raise ValueError where it is none."""
        found = IMAGE_NAME.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no image such as nginx, nginx:1.28 or ghcr.io/owner/image")
        ns, name, reference = found[1], found[2].removeprefix("docker.io/"), (found[4] or found[3] or ":latest")[1:]
        return cls(name if "/" in name or ns else f"library/{name}", reference, ns)

    @property
    def query(self) -> str:
        """Return the end of each URL of the image."""
        return f"?ns={quote(self.ns)}" if self.ns else ""


def host_platform() -> str:
    """Return the platform of this host, such as linux/arm/v7."""
    return f"linux/{MACHINES.get(platform.machine(), platform.machine())}"


def parse_platform(text: str | None) -> tuple[str, ...]:
    """Return os, architecture and, if told, variant; without a text, this host's; raise ValueError where it is none."""
    if text is None:
        text = host_platform()
    if not re.fullmatch(r"[a-z0-9]+/[a-z0-9_]+(/[a-z0-9]+)?", text):
        raise ValueError(f"{text!r} is no platform such as linux/arm64")
    return tuple(text.split("/"))


class Adapter(HTTPAdapter):
    """Verify TLS as Go does, by the authorities of the system; requests would go by a list of its own."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Give the context to every connection."""
        super().init_poolmanager(*args, ssl_context=self._context, **kwargs)

    def cert_verify(self, *args: Any) -> None:
        """Leave the connection alone: the context verifies."""


class Login(NamedTuple):
    """Hold the user and the password that a client sends to the realm."""

    user: str
    password: str


Progress = Callable[[int], object]  # is told of each count of bytes


@contextmanager
def no_progress(length: int) -> Iterator[Progress]:
    """Show nothing of a transfer."""
    yield lambda count: None


@contextmanager
def progress_bar(length: int) -> Iterator[Progress]:
    """Show a transfer of so many bytes by a bar on stderr."""
    with click.progressbar(length=length, file=sys.stderr) as bar:
        yield bar.update


class Walk:
    """Take the steps of a pull, one after the other.

    `wanted` is the platform, `ca` a file of authorities trusted besides the system's, `progress` shows a transfer,
    `login` goes to the realm and nowhere else.
    """

    def __init__(
        self,
        url: str,
        image: Image,
        wanted: tuple[str, ...],
        ca: str | None = None,
        progress: Callable[[int], Any] = no_progress,
        login: Login | None = None,
    ) -> None:
        self._url, self._parts = url, urlsplit(url)
        self._image, self._wanted, self._progress, self._login = image, wanted, progress, login
        self._context = ssl.create_default_context()
        if ca is not None:
            self._context.load_verify_locations(ca)
        self._session = requests.Session()
        self._session.trust_env = False  # neither a proxy nor a password of ~/.netrc
        self._session.headers.update({"User-Agent": "docker-mirror-check", "Accept-Encoding": "identity"})
        self._session.mount("https://", Adapter(self._context))
        self._port = self._parts.port or (443 if self._parts.scheme == "https" else 80)
        self._addresses: list[str] = []
        self._token: str | None = None
        self._is_trusted = True  # the realm: else no password goes there
        self._noted: set[str] = set()
        self._part_seconds: dict[str, float] = {}  # by digest: until the first byte of a part of the blob came
        self._todo: deque[tuple[str, Callable[[Step], None]]] = deque()

    def steps(self) -> Iterator[Step]:
        """Yield each step as it has ended."""
        self._todo.extend([("name", self._resolve), ("connection", self._connect)])
        self._todo.extend([("TLS", self._secure)] if self._parts.scheme == "https" else [])
        self._todo.extend([("ping", self._ping), ("HEAD manifest", self._head)])
        while self._todo:
            name, take = self._todo.popleft()
            step, started = Step(name), time.monotonic()
            try:
                with sensible():
                    take(step)
            except Stop as stop:
                self._todo.clear()
                step.problems.append(stop.problem)
            step.seconds = round(time.monotonic() - started, 3)
            yield step
        self._session.close()

    def _note(self, step: Step, what: str, mend: str, sure: bool = True) -> None:
        """Add a problem to a step, unless an earlier one has it already."""
        if what not in self._noted:
            self._noted.add(what)
            step.problems.append(Problem(what, mend, sure))

    # The way to the mirror

    def _resolve(self, step: Step) -> None:
        host = self._parts.hostname or ""
        try:
            found = socket.getaddrinfo(host, self._port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise Stop(
                f"DNS: {host} has no address: {getattr(error, 'strerror', None) or error}",
                DNS_MEND,
            ) from None
        self._addresses = list(dict.fromkeys(str(address[4][0]) for address in found))
        step.told = " ".join(self._addresses)

    def _connect(self, step: Step) -> None:
        reached, failed = [], {}
        for address in self._addresses:
            try:
                socket.create_connection((address, self._port), CONNECT_SECONDS).close()
            except OSError as error:
                if error.errno not in NO_ROUTE:  # this host may have no IPv6
                    failed[address] = error.strerror or str(error)
            else:
                reached.append(address)
        if not reached:
            told = ", ".join(f"{address} ({why})" for address, why in failed.items()) or "there is no route to it"
            raise Stop(
                f"nothing answers at port {self._port}: {told}",
                CONNECT_MEND,
            )
        for address, why in failed.items():
            self._note(
                step,
                f"{address} does not answer at port {self._port}: {why}",
                "Clients that try it first have to wait: let the web server listen there too, or take it out of DNS.",
            )
        self._addresses = reached
        step.told = " ".join(reached)

    def _secure(self, step: Step) -> None:
        context = self._context
        context.set_alpn_protocols(["h2", "http/1.1"])
        try:
            with (
                socket.create_connection((self._addresses[0], self._port), CONNECT_SECONDS) as connection,
                context.wrap_socket(connection, server_hostname=self._parts.hostname) as secured,
            ):
                until = (secured.getpeercert() or {}).get("notAfter", "")
                speaks = "HTTP/2" if secured.selected_alpn_protocol() == "h2" else "HTTP/1.1"
                step.told = f"{secured.version()}, {speaks}, certificate valid until {until}"
        except OSError as error:  # ssl.SSLError is one
            raise tls_fault(error) from None

    # The token

    def _ping(self, step: Step) -> None:
        response = self._ask(step, "GET", f"{self._url}/v2/")
        if response.status_code in REDIRECTS:
            raise Stop(
                f"/v2/ is redirected to {place(response)}",
                "Clients look for the registry at /v2/ itself: give them the address to which this leads, or let the "
                "terminator pass this path on as it is.",
            )
        if is_html(response) and response.status_code in (200, 401):
            raise Stop(
                "/v2/ is HTML in place of JSON: a web page and no registry answers",
                "Is the URL the mirror's? Let the terminator pass all paths on to the mirror (docs/tls.md), without a "
                "login page or a guard against robots before it.",
            )
        if response.status_code not in (200, 401):
            raise refusal(response)
        self._see_as_whom(step)
        if response.status_code == 401:
            return self._challenged(step, response)
        step.told = "no token is needed"
        return None

    def _see_as_whom(self, step: Step) -> None:
        """Note a mirror that takes this client for the host itself, as it would everybody, and shows its status."""
        if all(map(is_loopback, self._addresses)):
            return
        with suppress(requests.RequestException), self._send("GET", f"{self._url}/status.json", {}) as response:
            if response.status_code == 200 and not is_html(response):
                step.notes.append(
                    "this client may see /status: MIRROR_STATUS names it, or the terminator sends no X-Forwarded-For, "
                    "and then everybody may, and all clients are one for the limits (docs/tls.md)"
                )

    def _challenged(self, step: Step, response: requests.Response) -> None:
        realm, service = challenge(response)
        if not re.match(r"https?://[^/]", realm):
            raise Stop(
                "401 without a Bearer challenge that names a realm",
                "Does the terminator ask for a login of its own, or take WWW-Authenticate out? It must do neither.",
            )
        step.told = f"tokens are to be had at {realm.partition('?')[0]}"
        self._todo.appendleft(("token", partial(self._get_token, realm, service)))
        self._judge(step, realm)

    def _judge(self, step: Step, realm: str) -> None:
        """Note what is wrong with a realm: clients send their logins there."""
        parts, https = urlsplit(realm), self._parts.scheme == "https"
        port = parts.port or (self._port if parts.scheme != self._parts.scheme else 443 if https else 80)
        is_elsewhere = (parts.hostname, port) != (self._parts.hostname, self._port)
        if is_elsewhere and not https and parts.scheme == "https":  # by MIRROR_PUBLIC_URL, and asked behind its back
            step.notes.append(
                f"tokens are to be had at {parts.netloc}: whoever pulls from {self._url} must reach it too"
            )
            return self._todo.appendleft(("realm", partial(self._look_at_realm, realm)))
        if https and parts.scheme == "http":
            self._distrust(step, f"the realm is not https, though the mirror is: {realm}", HOST_MEND)
        if is_elsewhere:
            self._distrust(
                step, f"the realm is on another host, {parts.netloc}, which clients may not reach", HOST_MEND
            )
        elif not parts.path.startswith(f"{self._parts.path}/"):
            self._distrust(
                step,
                f"the realm is not below the mirror's path: {realm}",
                "Set MIRROR_PATH_PREFIX to that path, and let the terminator pass it on.",
            )
        return None

    def _distrust(self, step: Step, what: str, mend: str) -> None:
        """Note what is wrong with a realm, and keep the password from it."""
        self._is_trusted = False
        self._note(step, what, mend)

    def _look_at_realm(self, realm: str, step: Step) -> None:
        """See whether a realm at another address is a mirror's own: its ``/v2/`` leads to this very realm."""
        base = realm.partition("?")[0].rpartition("/token")[0]
        response = self._ask(step, "GET", f"{base}/v2/") if base else None
        if response is not None and response.status_code == 401 and challenge(response)[0] == realm:
            step.told = f"{base} is a mirror too"
        else:
            self._distrust(
                step, f"{realm.partition('?')[0]} is no token endpoint of a mirror", "Is MIRROR_PUBLIC_URL right?"
            )

    def _get_token(self, realm: str, service: Any, step: Step) -> None:
        if self._login and not self._is_trusted:
            raise Stop("the password is not sent there", "Mend what is said of the realm first: docker would send it.")
        query = {"service": service, "scope": f"repository:{self._image.repository}:pull"}
        if self._login:
            query["account"] = self._login.user
        joint = "&" if "?" in realm else "?"
        url = realm + joint + urlencode({key: value for key, value in query.items() if value})
        response = self._ask(step, "GET", url, basic(self._login) if self._login else None)
        if response.status_code == 401:
            mend = "Are name and password right?" if self._login else "This mirror is for its own users: --user NAME."
            raise Stop(f"401: {said(response)}", mend)
        if response.status_code != 200:
            raise refusal(response)
        content = as_json(response)
        token = content.get("token") or content.get("access_token")
        if not isinstance(token, str):
            raise Stop("the answer holds no token", "Does another program than the mirror answer at this path?")
        self._token = token
        self._see_clock(step, "the token's issued_at", str(content.get("issued_at") or ""), datetime.fromisoformat)
        step.told = f"valid for {content.get('expires_in', 60)} s" + (f", as {self._login.user}" if self._login else "")

    # The image

    def _head(self, step: Step) -> None:
        reference = self._image.reference
        response = self._fetch(step, "HEAD", f"manifests/{reference}", ACCEPT)
        given = response.headers
        if is_html(response):
            raise Stop("HTML in place of a manifest", "Let the terminator pass all paths on to the mirror.")
        for name in ("Docker-Content-Digest", "Content-Length", "Content-Type"):
            if name not in given:
                self._note(
                    step,
                    f"HEAD has no {name}, without which dockerd cannot pull",
                    "Let the terminator neither compress nor drop headers, and pass HEAD on as HEAD.",
                )
        if "Content-Type" in given and given["Content-Type"].partition(";")[0] not in (*MANIFESTS, *INDEXES):
            self._note(
                step,
                f"Content-Type is no manifest's: {readable(given['Content-Type'])}",
                "Let the terminator pass Content-Type on as it is.",
            )
        digest = given.get("Docker-Content-Digest") or reference
        if "Docker-Content-Digest" in given and not DIGEST.fullmatch(digest):
            raise Stop(f"Docker-Content-Digest is no digest: {readable(digest)}", MENDS[404])
        left = given.get("ratelimit-remaining", "").partition(";")[0]
        step.told = digest + (f", {left} pulls left" if left.isdigit() else "")
        self._todo.append(("manifest", partial(self._manifest, digest, given.get("Content-Length"))))

    def _manifest(self, reference: str, length: str | None, step: Step) -> None:
        response = self._fetch(step, "GET", f"manifests/{quote(reference, safe=':')}", ACCEPT | COMPRESSED)
        if is_html(response):
            raise Stop("HTML in place of a manifest", "Let the terminator pass all paths on to the mirror.")
        body = read(response)
        if ":" in reference and not matches(body, reference):
            raise Stop(f"the bytes are not those of {reference}", "Something on the way changes them: let it not.")
        if length is not None and length != str(len(body)):
            self._note(step, f"{length} bytes are told, {len(body)} come", "Let the terminator not compress.")
        content = as_json(response, body)
        try:
            self._plan(content)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
            raise Stop(
                "this is no manifest that dockerd knows", "Does another program than the mirror answer?"
            ) from None
        step.told = f"{len(body)} bytes, {content.get('mediaType') or response.headers.get('Content-Type', '')}"

    def _plan(self, content: Mapping[str, Any]) -> None:
        """Plan what a manifest leads to: the one of the platform, or config and layers."""
        if "manifests" in content:
            digest, size = self._choose(content["manifests"])
            return self._todo.append(("platform manifest", partial(self._manifest, digest, str(size))))
        blobs = [described(blob) for blob in content["layers"] if not blob.get("urls")]
        self._todo.append(("config", partial(self._blob, *described(content["config"]))))
        if blobs:
            self._todo.append(("range", partial(self._part, *max(blobs, key=lambda blob: blob[1]))))
        for number, blob in enumerate(dict.fromkeys(blobs), 1):
            self._todo.append((f"layer {number}", partial(self._blob, *blob)))
        return None

    def _choose(self, manifests: list[Mapping[str, Any]]) -> tuple[str, int]:
        there = []
        for manifest in manifests:
            found = manifest.get("platform", {})
            names = tuple(str(found.get(key)) for key in ("os", "architecture", "variant") if found.get(key))
            if names[: len(self._wanted)] == self._wanted:
                return described(manifest)
            there.append("/".join(names))
        raise Stop(
            f"the image is not there for {'/'.join(self._wanted)}",
            f"Name another platform: --platform. There are: {', '.join(sorted(set(there) - {'unknown/unknown'}))}.",
        )

    def _part(self, digest: str, size: int, step: Step) -> None:
        """Ask for the end of a blob, as a client does whose transfer was cut."""
        wanted = f"bytes {size - 1}-{size - 1}/{size}"
        started = time.monotonic()
        response = self._fetch(step, "GET", f"blobs/{digest}", COMPRESSED | {"Range": f"bytes={size - 1}-"})
        given = response.headers.get("Content-Range")
        if response.status_code != 206 or given != wanted:
            response.close()
            return self._note(
                step,
                f"Range is not honoured: {response.status_code} with Content-Range {given!r} in place of {wanted!r}",
                "A transfer that was cut cannot go on: let the terminator pass Range and Content-Range on, and keep no "
                "copies of its own.",
            )
        for _ in received(response):
            self._part_seconds.setdefault(digest, time.monotonic() - started)
        step.told = f"the last byte of {size}"
        return None

    def _blob(self, digest: str, size: int, step: Step) -> None:
        started = first = time.monotonic()
        response = self._fetch(step, "GET", f"blobs/{digest}", COMPRESSED)
        sent, count = hashlib.new(digest.partition(":")[0]), 0
        with self._progress(size) as advance:
            for chunk in received(response):
                first = first if count else time.monotonic()
                sent.update(chunk)
                count += len(chunk)
                advance(len(chunk))
        whole = time.monotonic() - started
        if f"{digest.partition(':')[0]}:{sent.hexdigest()}" != digest:
            html = " It is HTML: a web page." if is_html(response) else ""
            raise Stop(
                f"{count} bytes came, and they are not those of {digest} ({size} bytes).{html}",
                "Something on the way changes or shortens them: let the terminator pass them on as they are.",
            )
        rate = f" at {count / max(whole, 1e-6) / 1e6:.1f} MB/s" if count >= HELD_SIZE else ""
        step.told = f"{count} bytes{rate}, digest verified"
        self._judge_pace(step, digest, size, first - started, whole)

    def _judge_pace(self, step: Step, digest: str, size: int, first: float, whole: float) -> None:
        """Note a blob that was held back: its first byte came late, a part's did not, and the rest came at once."""
        late = first - self._part_seconds.get(digest, first)
        if size >= HELD_SIZE and late > HELD_SECONDS and whole - first < first / 4:
            self._note(
                step,
                f"the first byte of {size} came after {first:.1f} s, and all others {whole - first:.1f} s later: "
                "the terminator buffers whole blobs",
                "Switch its buffering off (docs/tls.md). Clients give up after 30 s without a byte.",
                sure=False,
            )

    # Questions and answers

    def _fetch(self, step: Step, method: str, resource: str, headers: Mapping[str, str]) -> requests.Response:
        """Ask for a part of the image. Where the mirror redirects, go there as clients do, and note it."""
        url = f"{self._url}/v2/{self._image.repository}/{resource}{self._image.query}"
        response = self._ask(step, method, url, headers)
        for _ in range(MAX_REDIRECTS):
            if response.status_code not in REDIRECTS:
                break
            self._note(
                step,
                f"the mirror sends the client on to {place(response)}, which it may not reach",
                "A mirror follows redirects itself. Is this one, or a registry, or a terminator that redirects?",
            )
            response = self._ask(step, method, urljoin(response.url, response.headers.get("Location", "")), headers)
        if response.status_code in (200, 206):
            return response
        if method == "HEAD":  # dockerd asks again, to read why
            again = self._ask(step, "GET", response.url, headers)
            if again.status_code == 200:
                raise Stop(f"HEAD is answered by {response.status_code}, though GET is not", MENDS[405])
            response = again
        raise refusal(response)

    def _ask(self, step: Step, method: str, url: str, headers: Mapping[str, str] | None = None) -> requests.Response:
        """Ask, with the token if it is the mirror that is asked."""
        asked = urlsplit(url)
        is_mirror = (asked.scheme, asked.netloc) == (self._parts.scheme, self._parts.netloc)
        own = {"Authorization": f"Bearer {self._token}"} if self._token and is_mirror else {}
        with broken():
            response = self._send(method, url, {**own, **(headers or {})})
        step.status = response.status_code
        self._see_clock(step, "the Date header", response.headers.get("Date", ""), parsedate_to_datetime)
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            self._note(
                step,
                f"the answer is compressed ({readable(encoding)})",
                "Switch the terminator's compression off: digests and lengths are those of the plain bytes, and layers "
                "are compressed already.",
            )
        return response

    def _send(self, method: str, url: str, headers: Mapping[str, str]) -> requests.Response:
        timeout = (CONNECT_SECONDS, SILENT_SECONDS)
        send = partial(
            self._session.request, method, url, headers=headers, stream=True, allow_redirects=False, timeout=timeout
        )
        try:
            return send()
        except requests.ConnectionError as error:
            if isinstance(error, requests.Timeout):
                raise
            return send()  # a kept connection may have ended meanwhile

    def _see_clock(self, step: Step, name: str, text: str, parse: Callable[[str], datetime]) -> None:
        """Note a time that is not now."""
        try:
            told = parse(text)
            off = (told if told.tzinfo else told.replace(tzinfo=UTC)).timestamp() - time.time()
        except (ValueError, OverflowError):  # of a year with more digits than datetime takes
            return
        if abs(off) > CLOCK_SECONDS:
            self._note(
                step,
                f"clock: by {name}, the mirror's is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} this host's",
                "Tokens and certificates have an end: let both hosts take the time from a time server (timedatectl).",
            )


@contextmanager
def sensible() -> Iterator[None]:
    """Turn what a URL, a number or a name raises that is none into the end of the walk."""
    try:
        yield
    except (ValueError, OverflowError) as error:
        raise Stop(
            f"the answer makes no sense: {readable(str(error))}", "Does another program than the mirror answer?"
        ) from None


@contextmanager
def broken() -> Iterator[None]:
    """Turn what requests raises into the end of the walk."""
    try:
        yield
    except requests.RequestException as error:
        raise fault(error) from None


def fault(error: requests.RequestException) -> Stop:
    """Return what is wrong where no answer came, or not all of it."""
    causes = list(chain(error))
    place = urlsplit(getattr(error.request, "url", None) or "").netloc or "the mirror"
    inner = causes[-1]
    if isinstance(inner, ssl.SSLCertVerificationError):
        stop = tls_fault(inner)
        return Stop(f"{place}: {stop.problem.what}", stop.problem.mend)
    if any(isinstance(cause, NameResolutionError) for cause in causes):
        return Stop(f"DNS: {place} has no address", DNS_MEND)
    if isinstance(error, requests.ConnectTimeout):
        return Stop(f"{place} does not answer within {CONNECT_SECONDS} s", CONNECT_MEND)
    if any(isinstance(cause, NewConnectionError) for cause in causes):
        return Stop(f"nothing answers at {place}: {root_cause(error)}", CONNECT_MEND)
    if isinstance(error, requests.Timeout):
        return Stop(
            f"the mirror was silent for {SILENT_SECONDS} s",
            "dockerd would wait for ever. The mirror's log says whom it asked; is the way to the registry open?",
        )
    return Stop(
        f"the connection broke off: {root_cause(error)}",
        "The log of the mirror and of the terminator say why; are the terminator's time limits long enough?",
    )


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error of requests and the reasons in it, the innermost one last."""
    yield error
    inner = getattr(error, "reason", None) or next((a for a in reversed(error.args) if isinstance(a, Exception)), None)
    if isinstance(inner, Exception):
        yield from chain(inner)


def root_cause(error: BaseException) -> str:
    """Return the innermost reason of an error of requests; the outer ones hold the whole URL."""
    return readable(str(list(chain(error))[-1]).rpartition(": ")[2])


def tls_fault(error: OSError) -> Stop:
    """Return what is wrong with TLS."""
    if isinstance(error, ssl.SSLCertVerificationError):
        what, mend = CERTIFICATE_FAULTS.get(error.verify_code, (f"is refused: {error.verify_message}", "Renew it."))
        return Stop(f"the certificate {what}", mend)
    if isinstance(error, ssl.SSLError) and error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
        return Stop("what answers speaks no TLS", "Does this port speak plain HTTP? Then the URL begins with http://.")
    return Stop(
        f"TLS fails: {getattr(error, 'reason', None) or error.strerror or error}",
        "Does the web server have a certificate for this name?",
    )


def challenge(response: requests.Response) -> tuple[str, Any]:
    """Return realm and service of a Bearer challenge; an empty realm where there is none."""
    found = WWWAuthenticate.from_header(response.headers.get("WWW-Authenticate"))
    if found is None or found.type != "bearer":
        return "", None
    return str(found.parameters.get("realm") or ""), found.parameters.get("service")


def basic(login: Login) -> dict[str, str]:
    """Return the header by which docker sends a login to the realm."""
    return {"Authorization": f"Basic {b64encode(':'.join(login).encode()).decode()}"}


def refusal(response: requests.Response) -> Stop:
    """Return the end of the walk that an answer without the wanted content is."""
    status = response.status_code
    mend = MENDS.get(502 if status >= 500 else status, "The log of the mirror and of the terminator say more.")
    if status == 429:
        wait = response.headers.get("Retry-After")
        mend = (f"Retry-After says: {readable(wait)}. " if wait else "No Retry-After says for how long. ") + mend
    if status in REDIRECTS:
        return Stop(f"{status}: redirected to {place(response)}", "Let the terminator pass this path on as it is.")
    if is_html(response):
        return Stop(f"{status}, and HTML in place of JSON: the mirror does not write that", mend)
    return Stop(f"{status}: {said(response)}", mend)


def said(response: requests.Response) -> str:
    """Return what an error says of itself."""
    try:
        body = read(response)
    except Stop:
        return "and the answer breaks off"
    try:
        return readable(str(json.loads(body)["errors"][0]["message"]))
    except (ValueError, LookupError, TypeError):
        return readable(body[:1000].decode(errors="replace")) or "without a word"


def received(response: requests.Response) -> Iterator[bytes]:
    """Yield a body as it comes."""
    with broken(), response:
        yield from response.iter_content(CHUNK)


def read(response: requests.Response) -> bytes:
    """Return a body that is no blob's."""
    body = b""
    for chunk in received(response):
        body += chunk
        if len(body) > MAX_BODY:
            raise Stop(f"the answer is longer than {MAX_BODY} bytes", "Does another program than the mirror answer?")
    return body


def as_json(response: requests.Response, body: bytes | None = None) -> dict[str, Any]:
    """Return a body that must be a JSON object."""
    try:
        content = json.loads(read(response) if body is None else body)
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict):
        return content
    kind = "HTML" if is_html(response) else "something else"
    raise Stop(
        f"{kind} in place of JSON", "Let the terminator pass all paths on to the mirror, /token too (docs/tls.md)."
    )


def is_html(response: requests.Response) -> bool:
    """Tell whether an answer is a web page."""
    return response.headers.get("Content-Type", "").lower().startswith("text/html")


def is_loopback(address: str) -> bool:
    """Tell whether an address is this host's own, which no other host reaches."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def described(descriptor: Mapping[str, Any]) -> tuple[str, int]:
    """Return digest and size of a part of an image; raise LookupError, TypeError or ValueError where it has none."""
    digest, size = descriptor["digest"], int(descriptor["size"])
    if not DIGEST.fullmatch(digest) or size < 1:
        raise ValueError("this is no descriptor")
    return str(digest), size


def matches(body: bytes, digest: str) -> bool:
    """Tell whether a digest is that of these bytes."""
    algorithm, _, encoded = digest.partition(":")
    return bool(DIGEST.fullmatch(digest)) and hashlib.new(algorithm, body).hexdigest() == encoded


def place(response: requests.Response) -> str:
    """Return where a redirect leads, without its query: that may be signed."""
    return readable(urljoin(response.url, response.headers.get("Location", "")).partition("?")[0])


def readable(text: str) -> str:
    """Return the beginning of a foreign text, fit for a terminal."""
    return printable(text[:200]).strip()


def printable(text: str) -> str:
    """Return a text with a space for each character that would steer a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def run(url: str, image: str, wanted: str | None, ca: str | None, in_json: bool, login: Login | None = None) -> bool:
    """Walk a pull and print its steps; return whether all is well. Raise click.UsageError for a wrong argument."""
    progress = progress_bar if sys.stderr.isatty() and not in_json else no_progress
    try:
        mirror, chosen = parse_url(url), parse_platform(wanted)
        walk = Walk(mirror, Image.parse(image), chosen, ca, progress, login)
    except (ValueError, OSError) as error:  # OSError: of the file of authorities
        raise click.UsageError(str(error)) from None
    steps = []
    for step in walk.steps():
        steps.append(step)
        if not in_json:
            click.echo("\n".join(map(printable, lines(step))))
    count = sum(len(step.problems) for step in steps)
    if in_json:
        click.echo(json.dumps(report(mirror, image, chosen, steps), indent=2))
    else:
        click.echo(f"{count} problem{'s' * (count != 1)}" if count else f"all is well: {image} comes through {mirror}")
    return not count


def report(url: str, image: str, wanted: tuple[str, ...], steps: list[Step]) -> dict[str, Any]:
    """Return all that is printed, as JSON."""
    taken = [asdict(step) | {"problems": [problem._asdict() for problem in step.problems]} for step in steps]
    ok = not any(step.problems for step in steps)
    return {"url": url, "image": image, "platform": "/".join(wanted), "ok": ok, "steps": taken}


def lines(step: Step) -> Iterator[str]:
    """Yield the lines of a step: verdict, seconds, status, name, what it tells; then its notes and problems."""
    verdict = "ok" if not step.problems else "WRONG" if any(problem.sure for problem in step.problems) else "maybe"
    yield f"{verdict:5} {step.seconds:8.3f} s  {step.status or '':3}  {step.name:17}  {step.told}".rstrip()
    for note in step.notes:
        yield f"      note: {note}"
    for problem in step.problems:
        yield f"      {'' if problem.sure else 'perhaps: '}{problem.what}"
        yield f"      -> {problem.mend}"
