"""The owner's commands ``docker-mirror cache …``, which look after the pull-through store.

They are clients of the mirror and of its store, no part of the application, and work while the mirror runs: they hold
the same locks as it does. Where root runs them, they act as the owner of the store's folder, so that all they make is
the mirror's to use.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import stat
import sys
import time
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import chdir
from contextlib import closing
from contextlib import contextmanager
from dataclasses import asdict
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from typing import NamedTuple

import click
import requests
import urllib3

from cache import MEDIA_TYPE
from cache import READ
from cache import Blob
from cache import Cache
from cache import Full
from cache import Limits
from cache import Name
from cache import Partial
from cache import Record
from cache import WrongDigest
from cache import chunks
from cache import is_digest
from check import host_platform
from mirror import MANIFEST_TYPES
from mirror import MAX_MANIFEST
from mirror import MirrorError
from mirror import __version__
from mirror import check_name
from mirror import check_reference
from mirror import complete
from mirror import digest_of
from mirror import full_name
from mirror import root_cause
from settings import Config
from settings import ConfigError
from settings import did_you_mean
from settings import load_registries
from settings import parse_url
from settings import read_env_file

MIRROR = "http://127.0.0.1:5000"  # as deploy.sh and the socket unit let it listen
UNDER_WAY = 600  # seconds within which what came or was used may be part of a pull whose manifest is not kept yet
EVERYTHING = "all"  # platforms

# ---------------------------------------------------------------------------------------------------------------------
# Names and words
# ---------------------------------------------------------------------------------------------------------------------


def read_name(text: str, config: Config) -> Name:
    """Return what an image's name means, as docker reads it; raise ConfigError or MirrorError where it is none."""
    path, at, digest = text.partition("@")
    path, slash, last = path.rpartition("/")
    last, _, tag = last.partition(":")
    full = full_name(path + slash + last, load_registries(config), config.default)
    registry, _, repository = full.partition("/")
    return Name(registry, check_name(repository), check_reference(digest if at else tag or "latest"))


def shown(name: Name) -> str:
    """Return the full name of an image."""
    return f"{name.registry}/{name.repository}{'@' if is_digest(name.reference) else ':'}{name.reference}"


def human(size: float) -> str:
    """Return a number of bytes in words: K, M, G and T stand for powers of 1024, as in the settings."""
    for unit in "BKMG":
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f}{unit}"
        size /= 1024
    return f"{size:.1f}T"


def counted(number: int, noun: str) -> str:
    """Return a number of things in words."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def progress(label: str, total: int) -> Any:
    """Return a progress bar of bytes; it stands beside what the command prints."""
    return click.progressbar(length=total, label=label, file=sys.stderr)


def complain(message: str) -> None:
    """Tell of something that is not as it should be, while the command goes on."""
    click.echo(message, err=True)


# ---------------------------------------------------------------------------------------------------------------------
# Manifests
# ---------------------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Hold what a manifest says of a part: its size in bytes and, in an index, its platform, such as linux/arm/v7."""

    digest: str
    size: int
    platform: str = ""


class Manifest(NamedTuple):
    """Hold what a manifest refers to: `children` are the manifests of an index, `blobs` are config and layers."""

    media_type: str
    children: tuple[Part, ...]
    blobs: tuple[Part, ...]
    config: str | None

    @classmethod
    def parse(cls, text: bytes) -> Manifest | None:
        """Read a manifest or an index; None where it is neither (OCI image specification; docker's schema 2)."""
        content = _read_object(text)
        declared = content.get("mediaType")
        if content.get("schemaVersion") != 2 or not isinstance(declared, str | None):
            return None
        media_type = declared or ("application/vnd.oci.image." + ("index" if "manifests" in content else "manifest"))
        if not MEDIA_TYPE.fullmatch(media_type):
            return None
        configs = _parts([content.get("config")])
        config = configs[0].digest if configs else None
        media_type = media_type if declared else f"{media_type}.v1+json"
        return cls(media_type, _parts(content.get("manifests")), configs + _parts(content.get("layers")), config)


def _read_object(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _parts(descriptors: object) -> tuple[Part, ...]:
    """Return what descriptors name, but for layers with addresses of their own, which no registry has."""
    found = descriptors if isinstance(descriptors, list) else []
    objects = [item for item in found if isinstance(item, dict) and not item.get("urls")]
    parts = (
        Part(_text(item, "digest"), _size(item.get("size")), platform_of(item.get("platform"))) for item in objects
    )
    return tuple(part for part in parts if is_digest(part.digest))


def _size(value: object) -> int:
    return max(0, value) if isinstance(value, int) else 0


def _text(item: dict[str, Any], key: str) -> str:
    value = item.get(key)
    return value if isinstance(value, str) and value.isprintable() else ""


def platform_of(item: object) -> str:
    """Return the platform that an index, or an image's config, names; empty where it names none."""
    if not isinstance(item, dict):
        return ""
    words = (_text(item, key) for key in ("os", "architecture", "variant"))
    text = "/".join(word for word in words if word)
    return "" if text.startswith("unknown/") else text.replace("arm64/v8", "arm64")  # attestations have no platform


class Tree(NamedTuple):
    """Hold all that stands behind a manifest, by digest: manifests, None where it is not there, and blobs' sizes."""

    manifests: dict[str, Manifest | None]
    blobs: dict[str, int]

    @property
    def digests(self) -> set[str]:
        """Return all digests."""
        return self.manifests.keys() | self.blobs.keys()

    @classmethod
    def of(cls, digest: str, read: Callable[[str], Manifest | None]) -> Tree:
        """Walk from one manifest through all that `read` returns."""
        manifests: dict[str, Manifest | None] = {}
        blobs: dict[str, int] = {}
        todo = [digest]
        while todo:
            digest = todo.pop()
            if digest not in manifests:
                found = manifests[digest] = read(digest)
                todo += [child.digest for child in found.children] if found else []
                blobs |= {blob.digest: blob.size for blob in found.blobs} if found else {}
        return cls(manifests, blobs)


# ---------------------------------------------------------------------------------------------------------------------
# The store, as its owner
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def acting_as(user: int, group: int) -> Iterator[None]:
    """Act as another user, where root runs the command; where another one does, change nothing."""
    if os.getuid() != 0:
        yield
        return
    before = os.geteuid(), os.getegid()
    _become(user, group)
    try:
        yield
    finally:
        _become(*before)


def _become(user: int, group: int) -> None:
    os.seteuid(0)
    os.setegid(group)
    os.seteuid(user)


ROOT = (0, 0)  # user and group
as_root = acting_as(*ROOT)  # for methods


ENV_FILE = "/etc/docker-mirror/docker-mirror.env"  # the unit's EnvironmentFile=; its folder is WorkingDirectory=
NAMES_A_FILE = ("MIRROR_REGISTRIES", "MIRROR_USERS")


def environment() -> tuple[Path | None, dict[str, str]]:
    """Return the service's file of settings, if one is read, and all variables: the environment's go before its own.

    The file is the one of --env-file, else the usual one. Where it names a file, relative paths start at its folder
    from then on, until the command ends, as they do for the service. Raises ConfigError.
    """
    root = click.get_current_context().find_root()
    if "environment" not in root.meta:
        root.meta["environment"] = _read_environment(root)
    found: tuple[Path | None, dict[str, str]] = root.meta["environment"]
    return found


def _read_environment(root: click.Context) -> tuple[Path | None, dict[str, str]]:
    own = dict(os.environ)
    file = root.obj or (Path(ENV_FILE) if os.access(ENV_FILE, os.R_OK) else None)
    if file is None:
        return None, own
    # The lower case of a proxy's variable goes before the upper one, and may stand in the other of the two places.
    read = {name: text for name, text in read_env_file(file).items() if not {name.lower(), name.upper()} & own.keys()}
    if any(read.get(name) for name in NAMES_A_FILE):
        own |= {name: os.path.abspath(own[name]) for name in NAMES_A_FILE if own.get(name)}
        root.with_resource(chdir(file.absolute().parent))
    return file, {**read, **own}


def is_hidden() -> bool:
    """Tell whether the service's settings are there, but not for this user's eyes."""
    return not os.access(ENV_FILE, os.R_OK) and os.path.exists(ENV_FILE)


def read_settings(folder: str | None) -> Config:
    """Return the settings, with another folder in place of the one that is set; raise ConfigError."""
    named = {} if folder is None else {"MIRROR_CACHE_DIR": folder}
    return Config.from_environ({**environment()[1], **named})


@contextmanager
def opened(config: Config, limits: Limits | None = None) -> Iterator[Cache]:
    """Open the store, and act as its owner meanwhile; raise ClickException where there is none, or it is another's."""
    limits = limits or Limits(config.cache_size, config.cache_min_free, config.cache_max_age)
    if config.cache_dir is None:
        hint = f"; {ENV_FILE} is for root's eyes" if is_hidden() else ""
        raise click.ClickException(f"no cache is set: MIRROR_CACHE_DIR, or --dir, names its folder{hint}")
    fd = _open_folder(config.cache_dir)
    owner = os.fstat(fd)
    if os.geteuid() not in (0, owner.st_uid):
        raise click.ClickException(f"{config.cache_dir} is another user's: run as the service's user or root")
    # The owner may have no way to a folder that systemd keeps from all but the service; root has opened it.
    path = config.cache_dir if owner.st_uid == os.geteuid() else f"/proc/self/fd/{fd}"
    progress("", 0)  # click loads more of itself for it: the owner may have no way to Python's files either
    try:
        with acting_as(owner.st_uid, owner.st_gid):
            yield Cache(Path(path), limits)
    except OSError as error:
        where = str(error.filename or path).replace(path, config.cache_dir)
        hint = ": run as root" if isinstance(error, PermissionError) else ""
        raise click.ClickException(f"{where}: {error.strerror}{hint}") from None
    finally:
        os.close(fd)


def _open_folder(folder: str) -> int:
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        raise click.ClickException(f"no permission to read {folder}: run as the service's user or root") from None
    except OSError as error:
        raise click.ClickException(f"{folder}: {error.strerror}; the mirror makes its cache when it starts") from None


class Library:
    """Know what a store holds, as it was when it was looked at. What reads it is no use of it."""

    def __init__(self, cache: Cache) -> None:
        self.blobs = dict(cache.blobs())  # before the records: what comes in between is no litter
        self.records = dict(cache.records())
        self._cache = cache
        self._manifests: dict[str, Manifest | None] = {}

    def read(self, digest: str) -> bytes:
        """Return a manifest's or a config's bytes; empty where it is not kept, or no such thing."""
        blob = self._cache.open(digest, is_use=False) if digest in self.blobs else None
        if blob is None:
            return b""
        with closing(blob):
            return blob.read() if blob.size <= MAX_MANIFEST else b""

    def manifest(self, digest: str) -> Manifest | None:
        """Return a manifest, if it is kept."""
        if digest not in self._manifests:
            self._manifests[digest] = Manifest.parse(self.read(digest))
        return self._manifests[digest]

    def tree(self, digest: str) -> Tree:
        """Return all that stands behind a manifest."""
        return Tree.of(digest, self.manifest)

    def reached(self, names: Iterable[Name]) -> set[str]:
        """Return the digests of all that stands behind some names."""
        digests = {self.records[name].digest for name in names}
        return set().union(*(self.tree(digest).digests for digest in digests))

    def images(self) -> list[Name]:
        """Return the tags, and the digests that no tag, and no index, of the same repository leads to."""
        repositories: dict[tuple[str, str], list[Name]] = {}
        for name in self.records:
            repositories.setdefault(name[:2], []).append(name)
        return sorted(image for names in repositories.values() for image in self._roots(names))

    def _roots(self, names: list[Name]) -> list[Name]:
        tags = [name for name in names if not is_digest(name.reference)]
        below = self.reached(tags)
        for name in names:
            digest = self.records[name].digest
            below |= self.tree(digest).digests - {digest}
        digests = [name for name in names if is_digest(name.reference)]
        return tags + [name for name in digests if self.records[name].digest not in below]

    def size(self, digests: Iterable[str]) -> int:
        """Return how many bytes of these are kept."""
        return sum(self.blobs[digest].st_size for digest in digests if digest in self.blobs)


# ---------------------------------------------------------------------------------------------------------------------
# List, remove, verify, prune
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Image:
    """Say what is kept of an image: `size` in bytes, of all its `platforms`; `missing` counts the parts that are not.

    `last_use` is in ISO 8601; None where the manifest has gone.
    """

    image: str
    digest: str
    size: int
    platforms: list[str]
    last_use: str | None
    missing: int

    @classmethod
    def of(cls, name: Name, library: Library) -> Image:
        """Look at an image; the platforms of an index that were never pulled are not missing."""
        digest = library.records[name].digest
        tree = library.tree(digest)
        found = [manifest for manifest in tree.manifests.values() if manifest is not None]
        missing = sum(blob not in library.blobs for blob in tree.blobs)
        if not any(manifest.blobs for manifest in found):
            missing += 1
        kept = library.blobs.get(digest)
        used = None if kept is None else datetime.fromtimestamp(int(kept.st_atime)).astimezone().isoformat()
        return cls(shown(name), digest, library.size(tree.digests), platforms_in(tree, library), used, missing)


def platforms_in(tree: Tree, library: Library) -> list[str]:
    """Return the platforms whose manifests are kept."""
    named = {child.digest: child.platform for found in tree.manifests.values() if found for child in found.children}
    kept = {digest: found for digest, found in tree.manifests.items() if found is not None and found.config is not None}
    found = (named.get(digest) or _platform_of_config(kept[digest], library) for digest in kept)
    return sorted({platform for platform in found if platform})


def _platform_of_config(manifest: Manifest, library: Library) -> str:
    return platform_of(_read_object(library.read(manifest.config or "")))


def print_images(images: list[Image]) -> None:
    """Print a table of images."""
    rows = [("IMAGE", "SIZE", "PLATFORMS", "LAST USE"), *map(_row, images)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*cells, row[3]]))


def _row(image: Image) -> tuple[str, ...]:
    words = [", ".join(image.platforms), "(partly)" if image.missing else ""]
    used = image.last_use[:16].replace("T", " ") if image.last_use else "-"
    return image.image, human(image.size), " ".join(filter(None, words)) or "-", used


def find_image(text: str, library: Library, config: Config) -> Name:
    """Return the name of a kept image; raise ClickException that names near ones."""
    images = {shown(name): name for name in library.records}
    if text in images:
        return images[text]
    try:
        with acting_as(*ROOT):  # passwords that the registries file names may be for its eyes alone
            wanted = shown(read_name(text, config))
    except (ConfigError, MirrorError) as error:
        raise click.ClickException(str(error)) from None
    if wanted in images:
        return images[wanted]
    near = difflib.get_close_matches(wanted, [shown(name) for name in library.images()], n=3, cutoff=0.7)
    hint = f"near it: {', '.join(near)}" if near else "docker-mirror cache list shows what is"
    raise click.ClickException(f"{wanted} is not kept; {hint}")


def remove_image(cache: Cache, library: Library, name: Name) -> tuple[int, int]:
    """Remove an image's records, and what no other kept image refers to; return the bytes, and how many blobs stay.

    A blob stays that a client reads at this moment. Raises ClickException for a digest that a tag leads to.
    """
    tree = library.tree(library.records[name].digest)
    own = {other for other in library.records if other[:2] == name[:2] and other.reference in tree.manifests} - {name}
    others = library.records.keys() - own - {name}
    in_use = library.reached(other for other in others if other[:2] == name[:2])
    if name.reference in in_use:
        raise click.ClickException(f"{shown(name)} is part of another image: remove that one")
    gone = {other for other in own if other.reference not in in_use} | {name}
    for record in gone:
        cache.forget(record)
    litter = (tree.digests & library.blobs.keys()) - library.reached(library.records.keys() - gone)
    return remove_blobs(cache, library, litter)


def remove_blobs(cache: Cache, library: Library, digests: set[str]) -> tuple[int, int]:
    """Remove blobs; return how many bytes went, and how many blobs stay since they are being read."""
    went = {digest for digest in digests if cache.remove(digest)}
    stay = sum(cache.has(digest) for digest in digests - went)
    return library.size(went), stay


def verify_blobs(cache: Cache) -> int:
    """Hash all blobs, and drop those that are wrong; return how many were."""
    blobs, wrong = list(cache.blobs()), 0
    with progress("verifying", sum(found.st_size for _, found in blobs)) as bar:
        for digest, _ in blobs:
            reason = _wrong_with(cache, digest, bar.update)
            if reason:
                wrong += 1
                complain(f"{digest} {reason}: removed")
    return wrong


def _wrong_with(cache: Cache, digest: str, note: Callable[[int], object]) -> str | None:
    """Drop a blob that is wrong, and return what is wrong with it."""
    blob = cache.open(digest, is_use=False) if is_digest(digest) else None
    if blob is None:
        return None
    with closing(blob):
        reason = _wrong_bytes(blob, digest, note)
        if reason:
            cache.drop(blob)
        return reason


def _wrong_bytes(blob: Blob, digest: str, note: Callable[[int], object]) -> str | None:
    try:
        return None if has_digest(blob.fd, digest, note) else "has other bytes than it is named by"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def has_digest(fd: int, digest: str, note: Callable[[int], object]) -> bool:
    """Tell whether an open file has the digest; `note` is given the number of bytes that were read each time."""
    algorithm, _, expected = digest.partition(":")
    found = hashlib.new(algorithm)
    for chunk in chunks(fd):
        found.update(chunk)
        note(len(chunk))
    return found.hexdigest() == expected


def verify_records(cache: Cache) -> int:
    """Remove records that are none, or name a digest other than their own; return how many."""
    wrong = 0
    for name in list(cache.names()):
        record = cache.record(name)
        if record is None or (is_digest(name.reference) and record.digest != name.reference):
            wrong += 1
            cache.forget(name)
            complain(f"the record of {shown(name)} is wrong: removed")
    return wrong


def prune_store(cache: Cache) -> tuple[int, int]:
    """Remove the records whose content has gone, and what no other one refers to; return how many, and the bytes.

    What is part of a pull that is under way stays.
    """
    library, begin = Library(cache), time.time() - UNDER_WAY
    gone = [name for name, record in library.records.items() if record.checked < begin and not cache.has(record.digest)]
    for name in gone:
        cache.forget(name)
    idle = {digest for digest, found in library.blobs.items() if max(found.st_atime, found.st_mtime) < begin}
    freed, _ = remove_blobs(cache, library, idle - library.reached(library.records.keys() - set(gone)))
    return len(gone), freed


# ---------------------------------------------------------------------------------------------------------------------
# Warm
# ---------------------------------------------------------------------------------------------------------------------

TIMEOUT = (10, 300)  # seconds: to connect, and for each read


class Failed(Exception):
    """Say in words why an image or a blob could not be pulled."""


def chosen(index: Manifest, platforms: tuple[str, ...]) -> list[Part]:
    """Return the manifests of an index that are for these platforms; raise Failed where one of them has none."""
    if EVERYTHING in platforms:
        return list(index.children)
    found = []
    for wanted in platforms:
        fit = [child for child in index.children if f"{child.platform}/".startswith(f"{wanted}/")]
        if not fit:
            there = ", ".join(sorted({child.platform for child in index.children if child.platform})) or "none"
            raise Failed(f"there is no {wanted}; there are: {there}")
        found += fit
    return found


class Client:
    """Pull through a mirror as any client does, and see whether it keeps what it sends."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._session = requests.Session()
        self._session.trust_env = False  # neither a proxy on the way to this host's own mirror, nor ~/.netrc
        self._session.headers.update({"Accept-Encoding": "identity", "User-Agent": f"docker-mirror/{__version__}"})

    def image(self, name: Name, platforms: tuple[str, ...]) -> list[Part]:
        """Pull the manifests of an image, and return its blobs; raise Failed."""
        manifest = self._manifest(name)
        blobs = list(manifest.blobs)
        for child in chosen(manifest, platforms) if manifest.children else []:
            blobs += self.image(name._replace(reference=child.digest), platforms)
        return blobs

    def _manifest(self, name: Name) -> Manifest:
        with self._answer(name, f"manifests/{name.reference}", {"Accept": ", ".join(MANIFEST_TYPES)}) as answer:
            body = answer.raw.read(MAX_MANIFEST + 1, decode_content=False)
            named = name.reference if is_digest(name.reference) else answer.headers.get("Docker-Content-Digest", "")
        if is_digest(named) and digest_of(body, named) != named:
            raise Failed(f"the manifest has other bytes than {named} names")
        manifest = Manifest.parse(body)
        if manifest is None:
            raise Failed("its manifest is of a kind that is not kept")
        return manifest

    def blob(self, name: Name, part: Part, note: Callable[[int], object]) -> None:
        """Pull a blob; raise Failed where not all its bytes come, or wrong ones."""
        algorithm, _, expected = part.digest.partition(":")
        found = hashlib.new(algorithm)
        with self._answer(name, f"blobs/{part.digest}") as answer:
            if "X-Accel-Redirect" in answer.headers:  # it is kept, and would be sent by nginx
                note(part.size)
                return
            for chunk in answer.raw.stream(READ, decode_content=False):
                found.update(chunk)
                note(len(chunk))
        if found.hexdigest() != expected:
            raise Failed(f"{part.digest} came with other bytes than it is named by")

    @contextmanager
    def _answer(self, name: Name, resource: str, headers: dict[str, str] | None = None) -> Iterator[requests.Response]:
        """Yield the mirror's answer; what fails meanwhile is raised as Failed."""
        url, ns = f"{self._url}/v2/{name.repository}/{resource}", {"ns": name.registry}
        try:
            with self._session.get(url, params=ns, headers=headers, stream=True, timeout=TIMEOUT) as answer:
                self._check(answer)
                yield answer
        except requests.ConnectionError as error:
            raise Failed(f"no answer from the mirror at {self._url} (--mirror): {root_cause(error)}") from None
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise Failed(f"the mirror breaks off: {root_cause(error)}; its log says why") from None

    def _check(self, answer: requests.Response) -> None:
        if answer.status_code != 200:
            raise Failed(f"{_message(answer)} (status {answer.status_code})")
        if "X-Cache" not in answer.headers:
            raise Failed(f"the mirror at {self._url} keeps nothing: MIRROR_CACHE_DIR is not set there")
        if answer.headers["X-Cache"] == "BYPASS":
            raise Failed("the mirror passes it on and cannot keep it: its log says why")


def _message(answer: requests.Response) -> str:
    """Return what an answer in OCI's JSON of errors says."""
    errors = _read_object(answer.raw.read(64 << 10, decode_content=False)).get("errors")
    first = errors[0] if isinstance(errors, list) and errors and isinstance(errors[0], dict) else {}
    return _text(first, "message") or _text(first, "code").lower() or "the mirror refuses it"


def warm_images(client: Client, names: list[Name], platforms: tuple[str, ...]) -> bool:
    """Pull images, and tell of each that fails; return whether all went well."""
    blobs: dict[str, tuple[Name, Part]] = {}
    failed: set[Name] = set()
    for name in names:
        with _noted(failed, name):
            blobs.update((part.digest, (name, part)) for part in client.image(name, platforms))
    with progress("pulling", sum(part.size for _, part in blobs.values())) as bar:
        for name, part in blobs.values():
            with _noted(failed, name):
                client.blob(name, part, bar.update)
    for name in names:
        if name not in failed:
            click.echo(f"{shown(name)} is kept")
    return not failed


@contextmanager
def _noted(failed: set[Name], name: Name) -> Iterator[None]:
    try:
        yield
    except Failed as error:
        failed.add(name)
        complain(f"{shown(name)}: {error}")


# ---------------------------------------------------------------------------------------------------------------------
# Import
# ---------------------------------------------------------------------------------------------------------------------


class Root(NamedTuple):
    """Hold what a name of the source stands for, and since when, in time.time()."""

    name: Name
    digest: str
    told: float


class Source:
    """Read a distribution registry's filesystem store, with root's rights where root runs the command.

    A registry that proxies drops what is old, and leaves links that lead nowhere. `wrong` are manifests with other
    bytes than they are named by. Source: distribution, registry/storage/paths.go.
    """

    @as_root
    def __init__(self, folder: Path) -> None:
        self._top = folder / "docker/registry/v2"
        self._manifests: dict[str, Manifest | None] = {}
        self.wrong: set[str] = set()
        if not (self._top / "repositories").is_dir():
            raise click.ClickException(f"{folder} holds no docker/registry/v2/repositories: name the rootdirectory")

    @as_root
    def roots(self, naming: Callable[[str, str], Name | None]) -> list[Root]:
        """Return tags and digests; `naming` makes names of repositories and references, None of what can be none."""
        top, found = self._top / "repositories", []
        for folder, folders, _ in os.walk(top, onerror=_raise):
            if "_manifests" in folders:
                for reference, digest, told in _links(Path(folder, "_manifests")):
                    named = naming(os.path.relpath(folder, top), reference)
                    if named is not None and is_digest(digest):
                        found.append(Root(named, digest, told))
            folders[:] = [below for below in folders if not below.startswith("_")]
        return found

    @as_root
    def open(self, digest: str) -> int | None:
        """Open a blob's file; None where it is not there."""
        try:
            return os.open(self._path(digest), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError):
            return None

    @as_root
    def size(self, digest: str) -> int | None:
        """Return a blob's size in bytes; None where it is not there."""
        try:
            return self._path(digest).stat(follow_symlinks=False).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def manifest(self, digest: str) -> Manifest | None:
        """Return a manifest, if it is there and right."""
        if digest not in self._manifests:
            self._manifests[digest] = self._read(digest)
        return self._manifests[digest]

    def _read(self, digest: str) -> Manifest | None:
        fd = self.open(digest)
        if fd is None:
            return None
        with os.fdopen(fd, "rb") as file:
            text = file.read(MAX_MANIFEST + 1)
        if digest_of(text, digest) != digest:
            self.wrong.add(digest)
            return None
        return Manifest.parse(text)

    def _path(self, digest: str) -> Path:
        algorithm, _, encoded = digest.partition(":")
        return self._top / "blobs" / algorithm / encoded[:2] / encoded / "data"


def _raise(error: OSError) -> None:
    raise error


def _links(folder: Path) -> Iterator[tuple[str, str, float]]:
    """Yield reference, digest and time of each link below a repository's _manifests."""
    for link in (*folder.glob("tags/*/current/link"), *folder.glob("revisions/*/*/link")):
        digest = link.read_text(errors="replace").strip()
        reference = link.parent.parent.name if link.parent.name == "current" else digest
        yield reference, digest, link.stat().st_mtime


class Import:
    """Take images from a registry's store into the cache, as far as they fit; nothing that is kept goes for them.

    `copies`: no hard links. The counts are of what came; `unfit` are images, `refused` digests.
    """

    def __init__(self, cache: Cache, source: Source, copies: bool) -> None:
        self._cache = cache
        self._source = source
        self._links = not copies
        self.images = self.blobs = self.bytes = self.linked = 0
        self.unfit: list[str] = []
        self.refused: set[str] = set()

    def run(self, roots: list[Root]) -> None:
        """Take all images, those first that were told of last."""
        trees = {root: Tree.of(root.digest, self._source.manifest) for root in _tops(roots, self._source)}
        wanted = set().union(*(self._missing(tree).items() for tree in trees.values()))
        with progress("importing", sum(size for _, size in wanted)) as bar:
            for root, tree in trees.items():
                self._image(root, tree, bar.update)
        self.refused |= self._source.wrong

    def _missing(self, tree: Tree) -> dict[str, int]:
        """Return the sizes of what the source has and the cache has not: blobs, and then manifests."""
        digests = [digest for digest in (*tree.blobs, *tree.manifests) if not self._cache.has(digest)]
        sizes = ((digest, self._source.size(digest)) for digest in digests)
        return {digest: size for digest, size in sizes if size is not None}

    def _image(self, root: Root, tree: Tree, note: Callable[[int], object]) -> None:
        missing = self._missing(tree)
        if tree.manifests[root.digest] is None:
            if root.digest in missing and root.digest not in self._source.wrong:
                complain(f"{shown(root.name)}: its manifest is of a kind that is not kept")
            return
        need, room = sum(missing.values()), self._cache.room()
        try:
            if need > (room[0] if self._links else min(room)):
                raise Full
            for digest, size in missing.items():
                self._take(digest, size, note)
        except Full:
            left = human(max(0, min(room)))
            self.unfit.append(f"{shown(root.name)} does not fit: it takes {human(need)}, and {left} are left")
            return
        self._note(root, tree)
        self.images += 1

    def _take(self, digest: str, size: int, note: Callable[[int], object]) -> None:
        fd = self._source.open(digest) if digest not in self._source.wrong else None
        if fd is None:
            return
        try:
            linked = self._links and _will_be_ours(fd) and self._link(fd, digest, note)
            if not linked and not self._copy(fd, digest, size, note):
                return
        except WrongDigest:
            self.refused.add(digest)
            return
        finally:
            os.close(fd)
        self.blobs += 1
        self.bytes += size
        self.linked += linked

    def _link(self, fd: int, digest: str, note: Callable[[int], object]) -> bool:
        """Take a file as it is; tell whether that could be. Whoever waits for the blob does not wait for its hash."""
        if not has_digest(fd, digest, note):
            raise WrongDigest
        with claimed(self._cache, digest) as partial:
            try:
                if partial is not None:
                    with given(fd):
                        partial.adopt(fd)
            except OSError as error:
                if partial is not None:
                    partial.let_go()
                if error.errno == errno.ENOSPC:
                    raise
                self._links = False  # it is another disk, or one without hard links
        return self._links

    def _copy(self, fd: int, digest: str, size: int, note: Callable[[int], object]) -> bool:
        """Copy a file; tell whether that was to be done: the mirror may bring it at this moment."""
        with claimed(self._cache, digest) as partial:
            if partial is None:
                return False
            try:
                partial.restart()
                partial.begin(size)
                for chunk in chunks(fd):
                    partial.write([chunk])
                    note(len(chunk))
                partial.finish()
            except BaseException:
                partial.discard()
                raise
            return True

    def _note(self, root: Root, tree: Tree) -> None:
        """Keep records of an image, unless newer ones are kept: the tag is as old as what the source was told."""
        for digest, manifest in tree.manifests.items():
            if manifest is not None and self._cache.has(digest):
                record = Record(digest, manifest.media_type, self._source.size(digest) or 0, root.told)
                self._note_newer(root.name._replace(reference=digest), record)
                if digest == root.digest:
                    self._note_newer(root.name, record)

    def _note_newer(self, name: Name, record: Record) -> None:
        kept = self._cache.record(name)
        if kept is None or kept.checked < record.checked:
            self._cache.note(name, record)


def _tops(roots: list[Root], source: Source) -> list[Root]:
    """Return the roots, the newest first, without the digests that another root of the repository leads to."""
    below: dict[tuple[str, str], set[str]] = {}
    for root in roots:
        digests = Tree.of(root.digest, source.manifest).digests
        is_tag = not is_digest(root.name.reference)
        below.setdefault(root.name[:2], set()).update(digests if is_tag else digests - {root.digest})
    tops = [root for root in roots if root.name.reference not in below[root.name[:2]]]
    return sorted(tops, key=lambda root: (is_digest(root.name.reference), -root.told))


@contextmanager
def claimed(cache: Cache, digest: str) -> Iterator[Partial | None]:
    """Claim a blob, and close it at the end; None where somebody else writes it, or has done so."""
    partial = cache.claim(digest)
    try:
        yield partial
    finally:
        if partial is not None:
            partial.close()


def _will_be_ours(fd: int) -> bool:
    """Tell whether a file is the store's owner's, or may become so: its old owner must be able to read it still."""
    found = os.fstat(fd)
    return found.st_uid == os.geteuid() or (os.getuid() == 0 and bool(found.st_mode & stat.S_IROTH))


@contextmanager
def given(fd: int) -> Iterator[None]:
    """Give a file to the store's owner, who notes its uses; give it back where what is done with it fails."""
    before = os.fstat(fd)
    _give(fd, os.geteuid(), os.getegid())
    try:
        yield
    except BaseException:
        _give(fd, before.st_uid, before.st_gid)
        raise


def _give(fd: int, user: int, group: int) -> None:
    if os.fstat(fd).st_uid != user:
        with acting_as(*ROOT):
            os.fchown(fd, user, group)


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def absolute(context: click.Context, parameter: click.Parameter, path: str | None) -> str | None:
    """Return a path from the root: later, relative ones may start elsewhere."""
    return None if path is None else os.path.abspath(path)


folder_option = click.option(
    "--dir", "folder", metavar="DIR", callback=absolute, help="The cache's folder, in place of MIRROR_CACHE_DIR."
)


@contextmanager
def told() -> Iterator[None]:
    """Tell the owner in one line what is wrong with a setting or a name."""
    try:
        yield
    except (ConfigError, MirrorError) as error:
        raise click.ClickException(str(error)) from None


@click.group("cache")
def commands() -> None:
    """Look after the cache, also while the mirror runs."""


@commands.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@folder_option
@told()
def list_(as_json: bool, folder: str | None) -> None:
    """List the images that are kept, with their sizes in all platforms, and when they were last pulled."""
    config = read_settings(folder)
    with opened(config) as cache:
        library = Library(cache)
        images = [Image.of(name, library) for name in library.images()]
    if as_json:
        click.echo(json.dumps([asdict(image) for image in images], indent=2))
    elif not images:
        click.echo("nothing is kept yet")
    else:
        print_images(images)
        total = human(library.size(library.blobs))
        click.echo(f"{counted(len(images), 'image')}; all blobs together take {total} of {config.cache_size}")


@commands.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE…")
@click.option("--platform", "platforms", multiple=True, help="Such as linux/arm64, or all; several may be given.")
@click.option(
    "--mirror", "url", help=f"Where the mirror is: {MIRROR}, and MIRROR_PATH_PREFIX if it is set, if left out."
)
@told()
def warm(images: tuple[str, ...], platforms: tuple[str, ...], url: str | None) -> None:
    """Pull images through the running mirror, so that it keeps them. Without --platform: what this host would pull."""
    config = read_settings(None)
    names = [read_name(image, config) for image in images]
    wanted = tuple(platform.replace("arm64/v8", "arm64") for platform in platforms) or (host_platform(),)
    try:
        client = Client(parse_url(url or MIRROR + config.path_prefix))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--mirror") from None
    if not warm_images(client, names, wanted):
        raise click.exceptions.Exit(1)


@commands.command()
@click.argument("image")
@folder_option
@told()
def remove(image: str, folder: str | None) -> None:
    """Remove an image, and all content that no other one needs."""
    config = read_settings(folder)
    with opened(config) as cache:
        library = Library(cache)
        name = find_image(image, library, config)
        freed, stay = remove_image(cache, library, name)
    click.echo(f"removed {shown(name)}: {human(freed)}")
    if stay:
        click.echo(
            f"{counted(stay, 'blob')} stayed, for clients that read now: docker-mirror cache prune takes the rest"
        )


@commands.command()
@folder_option
@told()
def verify(folder: str | None) -> None:
    """Hash all that is kept anew, and drop what is wrong; the exit status is 1 then."""
    with opened(read_settings(folder)) as cache:
        wrong = verify_blobs(cache) + verify_records(cache)
        blobs = sum(1 for _ in cache.blobs())
    click.echo(f"{counted(blobs, 'blob')} right, {wrong} wrong")
    if wrong:
        raise click.exceptions.Exit(1)


@commands.command()
@folder_option
@told()
def prune(folder: str | None) -> None:
    """Remove what no kept name leads to, and what is abandoned, and keep within the bounds."""
    usual = os.path.normpath(environment()[1].get("MIRROR_CACHE_DIR", ""))
    is_bounded = "MIRROR_CACHE_SIZE" in os.environ or folder in (None, usual)
    with opened(read_settings(folder), None if is_bounded else Limits(sys.maxsize)) as cache:
        records, freed = prune_store(cache)
        tidied = cache.tidy()
    click.echo(f"removed {counted(records, 'record')} and {human(freed)}")
    if not is_bounded:
        click.echo("MIRROR_CACHE_SIZE is not set here: the bounds are left to the mirror")
    elif not tidied:
        click.echo("the mirror looks after the bounds at this moment")


@commands.command("import")
@click.argument("source", metavar="DIR", callback=absolute)
@click.option("--registry", default="docker.io", show_default=True, help="The registry whose images are there.")
@click.option("--copy", "copies", is_flag=True, help="Copy, and make no hard links: for a registry that goes on.")
@folder_option
@told()
def import_(source: str, registry: str, copies: bool, folder: str | None) -> None:
    """Take in the filesystem store of a distribution registry (registry:2): DIR is its rootdirectory."""
    config = read_settings(folder)
    name = namer(registry, config)
    with opened(config) as cache:
        found = Source(Path(source))
        work = Import(cache, found, copies)
        work.run(found.roots(name))
    for line in (*(f"{digest} has other bytes than it is named by: refused" for digest in work.refused), *work.unfit):
        complain(line)
    linked = f", {work.linked} of them by hard links" if work.linked else ""
    click.echo(f"imported {counted(work.images, 'name')}: {counted(work.blobs, 'blob')}, {human(work.bytes)}{linked}")
    if work.refused or work.unfit:
        raise click.exceptions.Exit(1)


def namer(registry: str, config: Config) -> Callable[[str, str], Name | None]:
    """Return what makes names of a registry, by its own names of repositories; None of what is no name."""
    registries = load_registries(config)
    if registry not in registries:
        raise ConfigError(f"--registry: {registry} is no registry that is served{did_you_mean(registry, registries)}")

    def name(repository: str, reference: str) -> Name | None:
        try:
            check_reference(reference)
            return Name(registry, check_name(complete(registries[registry], repository)), reference)
        except MirrorError:
            return None

    return name
