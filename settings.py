"""The settings of docker-mirror: environment variables ``MIRROR_*``, and the registries file that one of them names.

Nothing else reads the environment, and nothing is read at import. A wrong setting stops the start with one line.
"""

from __future__ import annotations

import difflib
import re
import ssl
import tomllib
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PREFIX = "MIRROR_"


class ConfigError(Exception):
    """Say in one line which setting is wrong, and how to mend it. It stops the start."""


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
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"[^\x21-\x7e]", text):
        raise ValueError(f"{text!r} is not a URL such as https://mirror.example")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError(f"{text!r} has a user name, a query or a fragment: leave them out")
    parts.port  # noqa: B018 - raises ValueError for a port out of range
    return text.rstrip("/")


def setting(default: Any, parse: Callable[[str], Any], text: str) -> Any:
    """Declare one setting: its default, the parser of its text, and the help that README's table shows."""
    return field(default=default, metadata={"parse": parse, "help": text})


seconds = parse_number(0.1, 3600, float)


@dataclass(frozen=True)
class Config:
    """Hold all settings, each read from the environment variable ``MIRROR_`` + the field's name."""

    public_url: str | None = setting(
        None, parse_url, "Address at which clients reach the mirror. Unset: the Host and scheme of each request."
    )
    proxies: int = setting(
        1,
        parse_number(0, 10),
        "TLS terminators in front of the mirror whose X-Forwarded-For, -Proto and -Host are believed. "
        "0: clients connect directly.",
    )
    login: bool = setting(
        True,
        parse_choice(on=True, off=False),
        "on: a client may log in, and its credentials go on to the registry. "
        "off: no challenge is ever sent, and no password comes here.",
    )
    registries: str | None = setting(None, str, "TOML file that says where the registries are.")
    connect_timeout: float = setting(5, seconds, "Seconds until a connection to upstream must stand.")
    first_byte_timeout: float = setting(20, seconds, "Seconds until upstream must begin to answer.")
    idle_timeout: float = setting(60, seconds, "Seconds that upstream may be silent within an answer.")
    log_level: str = setting(
        "info",
        parse_choice(debug="debug", info="info", warning="warning", error="error"),
        "debug, info, warning or error; the access lines are info.",
    )

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Config:
        """Read the settings; an empty variable counts as unset.

        Raises ConfigError for an unknown ``MIRROR_`` variable or a value that cannot be read.
        """
        known = {variable(f.name): f for f in fields(cls)}
        values = {}
        for name, text in sorted(environ.items()):
            if not name.startswith(PREFIX):
                continue
            if name not in known:
                raise ConfigError(f"{name} is no setting{did_you_mean(name, known)}")
            if text.strip():
                values[known[name].name] = _parse(name, known[name].metadata["parse"], text.strip())
        return cls(**values)


def variable(name: str) -> str:
    """Return the environment variable of a field of `Config`."""
    return PREFIX + name.upper()


def did_you_mean(word: str, known: Mapping[str, object]) -> str:
    """Return the end of a sentence about an unknown word: the nearest known ones, or all of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.8)
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(known)}"


def _parse(name: str, parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


@dataclass(frozen=True)
class Registry:
    """Say where one registry is. The fields but `name` are the keys of its table in the registries file."""

    name: str
    endpoints: tuple[str, ...]
    realms: tuple[str, ...] = ()
    ca_file: str | None = None


DOCKER_IO = Registry("docker.io", ("https://registry-1.docker.io",))


def load_registries(path: str | None) -> dict[str, Registry]:
    """Return the registries by name: the built-in ones, changed by the TOML file `path`.

    Raises ConfigError that names the file, the table and the key.
    """
    registries = {DOCKER_IO.name: DOCKER_IO}
    if path is None:
        return registries
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{variable('registries')}: {path}: {error}") from None
    for name, table in tables.items():
        if name not in registries:
            raise ConfigError(
                f'{path}: ["{name}"] is no registry that this version serves{did_you_mean(name, registries)}'
            )
        if not isinstance(table, dict):
            raise ConfigError(f'{path}: {name} must be a table: write ["{name}"] on a line of its own')
        registries[name] = _read_table(f'{path}: ["{name}"]', registries[name], table)
    return registries


def _read_table(where: str, registry: Registry, table: dict[str, Any]) -> Registry:
    readers: dict[str, Callable[[Any], Any]] = {"endpoints": _read_endpoints, "realms": _read_urls, "ca_file": _read_ca}
    values = {}
    for key, value in table.items():
        if key not in readers:
            raise ConfigError(f"{where} {key} is no key{did_you_mean(key, readers)}")
        try:
            values[key] = readers[key](value)
        except ValueError as error:
            raise ConfigError(f"{where} {key}: {error}") from None
    return Registry(**{**registry.__dict__, **values})


def _read_urls(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError('must be a list of URLs, such as ["https://registry.example"]')
    return tuple(parse_url(item) for item in value)


def _read_endpoints(value: Any) -> tuple[str, ...]:
    urls = _read_urls(value)
    if len(urls) != 1:
        raise ValueError("must hold one URL: this version has no fallback endpoints")
    return urls


def _read_ca(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be the path of a PEM file")
    try:
        ssl.create_default_context(cafile=value)
    except OSError as error:  # ssl.SSLError is one
        raise ValueError(f"{value}: {error.strerror or error}") from None
    return value
