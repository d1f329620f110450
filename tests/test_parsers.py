"""Every parser that meets foreign text: whatever comes is read, or refused by our own errors and by no other kind.

hypothesis makes the texts. Where more can be said of what is read than that it was, a property says it.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import json
import logging
import os
import re
import socket
import tempfile
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import fields
from dataclasses import replace
from datetime import UTC
from datetime import datetime
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl
from urllib.parse import urlencode
from urllib.parse import urlsplit

import hypothesis
import pytest
import requests
import urllib3
from hypothesis import example
from hypothesis import given
from hypothesis import strategies as st
from lab import BLOB
from lab import DIGEST
from lab import Lab
from lab import ask
from lab import refuse
from lab import reply
from requests.utils import parse_header_links
from upstream import Answer
from upstream import RawUpstream
from upstream import sends
from upstream import token_realm
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.http import http_date
from werkzeug.http import parse_range_header
from werkzeug.test import TestResponse

import cli
import mirror
import pages
import settings
from settings import Config
from settings import ConfigError
from settings import Registry

hypothesis.settings.register_profile(
    "parsers", deadline=None, derandomize=os.environ.get("CI") == "true", max_examples=100
)
hypothesis.settings.load_profile("parsers")
HUB = settings.BUILT_IN[0]
BLOB_PATH = f"/v2/app/blobs/{DIGEST}"
MANY_DIGITS = "1" * 5000  # int() takes 4300


def attempt(call: Callable[[], Any], *errors: type[Exception]) -> tuple[Any, str]:
    """Return what a call returns and no text, or None and the text of its refusal, which is one of these errors."""
    try:
        return call(), ""
    except errors as error:
        return None, str(error)


def read(parse: Callable[[str], Any], text: str, *errors: type[Exception]) -> Any:
    return attempt(partial(parse, text), *errors)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Texts
# ---------------------------------------------------------------------------------------------------------------------

ANY = st.characters()
IN_A_HEADER = st.characters(max_codepoint=255, exclude_characters="\r\n")  # no server lets these through
IN_ENVIRON = st.characters(codec="utf-8", exclude_characters="\x00") | st.characters(
    min_codepoint=0xDC80,
    max_codepoint=0xDCFF,  # bytes that are no UTF-8
)
PRINTABLE = st.text(st.characters(min_codepoint=32, max_codepoint=126))


def joined(*fragments: str, letters: st.SearchStrategy[str] = ANY) -> st.SearchStrategy[str]:
    """Make texts of these fragments and any letters: they come nearer to what a parser takes than any letters do."""
    parts = st.sampled_from(fragments) | st.text(letters, max_size=3)
    return st.lists(parts, max_size=12).map("".join) | st.text(letters)


header = partial(joined, letters=IN_A_HEADER)


def raw(*fragments: bytes) -> st.SearchStrategy[bytes]:
    return st.lists(st.sampled_from(fragments) | st.binary(max_size=3), max_size=14).map(b"".join)


NAMES = st.lists(st.sampled_from(("app", "a.b", "x--y", "x__y", "library", "ghcr.io", "1")), min_size=1).map("/".join)
NAME_TEXTS = joined("library", "ghcr.io", "docker.io", "images.test", "a", "b.c", "/", "//", "..", ".", "_", "-", "A")
HOST_PARTS = ("ghcr", "docker", "hub.test", "mirror.example", ".", ":", "5000", "127.0.0.1", "[::1]", "GHCR", "@", "/")
HOSTS = joined(*HOST_PARTS)
URLS = joined(
    "http", "https", "HTTPS", "ftp", ":", "//", "/", "?", "#", "@", "[", "]", "::1", "\\", ":80", ":99999", ":0", "..",
    "a.example", "b.a.example", "127.0.0.1", "alice", "x=y", "/v2/lib/app/manifests/", "latest", " ", "\r\n ", "\t",
)  # fmt: skip
HTTP_URLS = st.builds(
    "{}://{}{}".format,
    st.sampled_from(("http", "https", "HTTPS")),
    st.sampled_from(("a.example", "b.a.example:80", "127.0.0.1", "[::1]", "")),
    URLS,
)
FOLLOWED = HTTP_URLS.map(
    lambda url: read(partial(mirror.next_hop, "http://a.example/v2/x"), url, mirror.BadGateway)
).filter(bool)

KEYS = st.sampled_from(("errors", "code", "message", "detail", "token", "access_token", "expires_in", "name"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
OCI_ERRORS = st.lists(st.fixed_dictionaries({"code": st.text(max_size=5)}, optional={"detail": JSON}), max_size=3)
ODD_JSON = st.sampled_from(("1e999", "NaN", MANY_DIGITS, '"\\ud800"', "[" * 100_000)) | st.integers(0, 5000).map(
    lambda depth: "[" * depth + "]" * depth
)
BODIES = st.binary() | st.one_of(
    (JSON | OCI_ERRORS.map(lambda errors: {"errors": errors})).map(json.dumps),
    ODD_JSON,
    ODD_JSON.map(lambda odd: f'{{"name": "x", "token": {odd}, "errors": [{{"code": "x", "detail": {odd}}}]}}'),
).map(str.encode)


def strictly(text: str | bytes) -> Any:
    """Read JSON as other languages do: Python alone knows NaN and Infinity."""

    def refuse_constant(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse_constant)


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


@given(NAME_TEXTS)
@example("a\n")
@example("a/" * 127 + "a")
@example("a/" * 128)
def test_a_name_is_one_by_the_specs_grammar_or_refused(text: str) -> None:
    grammar = r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(\/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*"
    valid = re.fullmatch(grammar, text) is not None and len(text) <= 255
    assert read(mirror.check_name, text, mirror.NameInvalid) == (text if valid else None)


@given(joined("sha256:", "sha512:", "md5", ":", "0" * 64, "a" * 128, "A", "+", "=", "/", "latest", ".", "-"))
@example("sha256:" + "0" * 64 + "\n")
@example("latest\n")
def test_a_reference_is_safe_in_a_path_or_refused(text: str) -> None:
    digest = read(mirror.check_digest, text, mirror.DigestInvalid)
    reference = read(mirror.check_reference, text, mirror.DigestInvalid, mirror.ManifestInvalid)
    assert digest in (None, text)
    assert reference in (None, text)
    assert reference is None or re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9.:+=_-]*", reference)
    assert digest == (reference if ":" in text else None)


IMAGES = joined("*", "?", "[", "]", "[!", "z-a", "a", "library/", "\\", "-", "&&", "||")


@given(HOSTS, st.none() | NAME_TEXTS | st.sampled_from(("docker.io", "images.test")), NAME_TEXTS | NAMES, IMAGES)
@example("m", "docker.io", "docker.io/docker.io/app", "*")
def test_what_a_request_means_is_served_and_well_named(host: str, ns: str | None, name: str, image: str) -> None:
    mine = Registry("images.test", ("https://images.test",), hosts=("hub.test",), images=(image or "*",))
    router = mirror.Router({registry.name: registry for registry in (*settings.BUILT_IN, mine)}, "docker.io")
    assert router.by_host(host) in (None, *settings.BUILT_IN, mine)
    target, refusal = attempt(lambda: router.resolve(host, ns, name), mirror.NameInvalid, mirror.Denied)
    assert refusal.isprintable()
    if target is not None:
        assert mirror.NAME.fullmatch(target.repository)
        assert target.prefix in ("", f"{target.registry.name}/")
        assert target.repository == mirror.complete(target.registry, name.removeprefix(target.prefix))
        whole = target.prefix + target.repository
        assert len(whole) > mirror.MAX_NAME or router.resolve(host, ns, whole) == target, "it is completed once"


# ---------------------------------------------------------------------------------------------------------------------
# Challenges, tokens and scopes
# ---------------------------------------------------------------------------------------------------------------------

CHALLENGES = header(
    "Bearer ", "Basic ", "bearer", "realm", "service", "scope", "error", "=", ",", " ", '"', "\\", "*", "*0", "''",
    "utf-8", "undefined", "%0d%0a", "%ff", "x", "https://a.example/token", '="y"',
)  # fmt: skip


@given(st.lists(CHALLENGES, max_size=3))
@example(["Bearer realm*=utf-8''%0d%0aX:%20y"])
@example(["Basic realm,service=x"])
def test_a_challenge_is_read_and_written_without_change(headers: list[str]) -> None:
    challenge = mirror.Challenge.parse(headers)
    if challenge is not None:
        assert challenge.scheme in ("bearer", "basic")
        assert challenge.realm != "None"
        assert challenge.parameters.keys() <= set(mirror.CHALLENGE_KEYS)
        assert mirror.Challenge.parse([challenge.at(challenge.realm)]) == challenge


PARAMETERS = st.dictionaries(st.sampled_from(mirror.CHALLENGE_KEYS), PRINTABLE)


@given(st.builds(mirror.Challenge, PRINTABLE, PARAMETERS, st.sampled_from(("bearer", "basic"))))
def test_what_is_written_into_a_challenge_is_read_by_others(challenge: mirror.Challenge) -> None:
    written = challenge.at(challenge.realm)
    assert mirror.PRINTABLE.fullmatch(written)
    found = WWWAuthenticate.from_header(written)
    assert found is not None
    assert (found.type, found.parameters) == (challenge.scheme, {"realm": challenge.realm, **challenge.parameters})


def can_be_split(url: str) -> bool:
    return read(urlsplit, url, ValueError) is not None


ENCODABLE = st.text(st.characters(codec="utf-8"), min_size=1)


@given(URLS.filter(lambda url: "#" not in url and can_be_split(url)), st.dictionaries(ENCODABLE, ENCODABLE, min_size=1))
@example("https://a.example/token?", {"scope": "x"})
def test_arguments_are_added_to_any_query(url: str, arguments: dict[str, str]) -> None:
    longer = mirror.with_query(url, arguments)
    assert longer.startswith(url)
    assert parse_qsl(urlsplit(longer).query)[-len(arguments) :] == list(arguments.items())
    assert urlsplit(longer)[:3] == urlsplit(url)[:3]


@given(PRINTABLE, NAMES)
def test_the_url_of_a_token_names_service_and_scope(service: str, name: str) -> None:
    challenge = mirror.Challenge("https://a.example/token?x=y", {"service": service})
    expected = {"x": "y", "service": service, "scope": mirror.pull_scope(name)}
    found = dict(parse_qsl(urlsplit(challenge.token_url(mirror.pull_scope(name))).query))
    assert found == {key: value for key, value in expected.items() if value}


SCOPES = joined(
    "repository", "repository(plugin)", "registry:catalog:*", ":", " ", "library/app", "pull", ",push", "a.b"
)


@given(SCOPES)
def test_a_scopes_names_are_changed_and_nothing_else(scope: str) -> None:
    seen: list[str] = []

    def change(name: str) -> str:
        seen.append(name)
        return f"<{name}>"

    changed, kinds = mirror.map_scope(scope, change), [one.partition(":")[0] for one in scope.split(" ")]
    assert [one.partition(":")[0] for one in changed.split(" ")] == kinds
    assert len(seen) == sum(kind.startswith("repository") for kind in kinds)
    for one, kind in zip(scope.split(" "), kinds, strict=True):
        if one.count(":") >= 2 or not kind.startswith("repository"):  # else it has no name, or nothing to do
            assert mirror.map_scope(one, str) == one
            assert mirror.map_scope(mirror.map_scope(one, change), lambda name: name[1:-1]) == one


@given(HTTP_URLS | URLS, st.sampled_from(("https://b.a.example", "http://127.0.0.1:80", "https://localhost")))
@example("https://evil.example .a.example/token", "https://b.a.example")
@example("https://evil.example\\.a.example/token", "https://b.a.example")
def test_tokens_are_asked_for_at_no_foreign_host(realm: str, endpoint: str) -> None:
    registry = Registry("x", (endpoint,), realms=("https://listed.example",))
    _, refusal = attempt(lambda: mirror.check_realm(registry, endpoint, realm), mirror.BadGateway)
    assert refusal.isprintable()
    if not refusal:
        scheme, host, _ = mirror.origin(realm)
        assert scheme == "https" or (scheme, endpoint[:5]) == ("http", "http:")
        assert mirror.HOST.fullmatch(urlsplit(realm).netloc)
        assert mirror.same_site(host, str(urlsplit(endpoint).hostname)) or host == "listed.example"


@given(HOSTS, HOSTS)
def test_a_site_is_a_host_or_shares_its_parent(host: str, other: str) -> None:
    assert mirror.same_site(host, host)
    if mirror.same_site(host, other) and host != other:
        parent = other.partition(".")[2]
        assert "." in parent
        assert host == parent or host.endswith(f".{parent}")
        assert not mirror.is_address(other)


@given(HTTP_URLS)
def test_an_origin_is_the_same_in_any_spelling_of_the_scheme(url: str) -> None:
    found = read(mirror.origin, url, ValueError)
    if found is not None:
        scheme, _, rest = url.partition(":")
        assert found == mirror.origin(f"{scheme.swapcase()}:{rest}")
        assert found[0] == scheme.lower()
        assert 0 < found[2] < 65536


TOKENS = st.fixed_dictionaries({"token": st.just("x") | PRINTABLE, "expires_in": JSON}).map(json.dumps).map(str.encode)


@given(BODIES | TOKENS)
def test_a_token_is_read_with_its_lifetime_or_there_is_none(body: bytes) -> None:
    token, _ = attempt(lambda: mirror.Token.parse(body, 10), ValueError, RecursionError)  # who asks takes both for none
    if token is not None:
        assert re.fullmatch(r"[\x21-\x7e]+", token.value)
        assert token.value in json.loads(body).values()
        assert 10 < token.renew_at < 1e9 or 0 < json.loads(body)["expires_in"] < 1


@given(header("Basic", "basic", "Bearer", " ", "\t", mirror.NOBODY, "YTpi") | st.none())
def test_a_basic_login_is_passed_on_as_it_is(authorization: str | None) -> None:
    basic = mirror.basic_login(authorization)
    assert basic in (None, authorization)
    assert basic is None or basic.lower().startswith("basic ")


# ---------------------------------------------------------------------------------------------------------------------
# What upstream says
# ---------------------------------------------------------------------------------------------------------------------

DATES = header(
    "Mon, ", "01", " Jan ", "2024", "99999999999", " 00:00:00", " GMT", " +", "-", "2460", "9" * 20, " ", ":", "PST"
)  # fmt: skip


@given(DATES | st.integers().map(str))
@example("Mon, 01 Jan 99999999999 00:00:00 GMT")
@example("Mon, 01 Jan 2024 00:00:00 +99999999999999999")
@example("Mon, 01 Jan 0001 00:00:00 +2359")
@example(MANY_DIGITS)
def test_a_wait_is_a_number_of_seconds_up_to_six_hours_or_none(text: str) -> None:
    seconds = mirror.retry_after({"Retry-After": text})
    assert seconds is None or 0 <= seconds <= mirror.MAX_RETRY_AFTER


@given(st.integers(-100_000, 100_000))
def test_a_wait_may_be_written_as_a_date(seconds: int) -> None:
    date = http_date(datetime.now(UTC) + timedelta(seconds=seconds))
    expected = min(max(seconds, 0), mirror.MAX_RETRY_AFTER)
    assert mirror.retry_after({"Retry-After": date}) == pytest.approx(expected, abs=2)


@given(st.sampled_from(("http://a.example/v2/x?y", "https://a.example:5000/v2/x")), HTTP_URLS | URLS)
@example("http://a.example/", "http://b\x1b[31m.example/")
@example("http://a.example/", "http://b\x00.example/")
@example("http://a.example/", "https://b.example/x\r\n y")
@example("https://a.example/", "//b.example\\@c.example/")
def test_a_redirect_leads_to_a_plain_web_address_and_from_https_to_https(url: str, location: str) -> None:
    target, refusal = attempt(lambda: mirror.next_hop(url, location), mirror.BadGateway)
    assert refusal.isprintable()
    if target is not None:
        parts = urlsplit(target)
        assert parts.scheme in ("https", urlsplit(url).scheme)
        assert mirror.HOST.fullmatch(parts.netloc)
        assert parts.hostname
        assert parts.username is None
        assert not set("#\r\n\t") & set(target)
        assert parts.netloc == urlsplit(url).netloc or "//" in location
        assert mirror.next_hop(url, target) == target
        trail = mirror.Trail()
        trail.redirect(target)
        assert str(trail).isprintable()


@given(FOLLOWED)
@example("http://a.example?x/v2/lib/app/manifests/latest")
def test_another_registry_is_known_by_its_origin_and_a_good_name(url: str) -> None:
    site = mirror.Site.beyond(HUB, url)
    if site is not None:
        assert mirror.NAME.fullmatch(site.repository)
        assert site.base == f"{urlsplit(url).scheme}://{urlsplit(url).netloc}"
        assert url.startswith(f"{site.base}/v2/{site.repository}/")
        assert site.account is None


ADDRESSES = st.ip_addresses() | st.sampled_from(mirror.INNER_NETWORKS).flatmap(
    lambda network: st.ip_addresses(network=network)
)


@given(ADDRESSES)
def test_a_public_registry_leads_to_no_inner_address_however_it_is_written(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    guard = mirror.Guard(Registry("x", ("https://registry.example",)), ipv4_only=False)
    assert guard.admits("registry.example", str(address))
    admitted = guard.admits("elsewhere.example", str(address))
    plain = mirror.plain_address(str(address))
    assert mirror.plain_address(str(plain)) == plain
    assert not admitted or (plain.is_global and not plain.is_multicast and mirror.inner_network(str(address)) is None)
    if address.version == 4:
        assert mirror.literal_address(str(address)) == str(address)
        for written in (f"::ffff:{address}", f"64:ff9b::{address}", f"::ffff:0:{address}", f"::ffff:{address}%eth0"):
            assert guard.admits("elsewhere.example", written) == admitted
            assert mirror.inner_network(written) == mirror.inner_network(str(address))


@given(
    joined("127", "0x7f", "1", ".", "localhost", "::1", "%eth0", "a", "0", "4294967295", " ") | st.integers().map(str)
)
@example("a\x00b")
@example("\ud800")
def test_an_address_is_known_in_any_spelling(host: str) -> None:
    address = mirror.literal_address(host)
    if address is not None:
        network = mirror.inner_network(address)
        assert network is None or mirror.plain_address(address) in network
        assert mirror.literal_address(address) == address
        assert mirror.literal_address(f"{host.upper()}.") == address


NO_PROXY = joined("10.0.0.0/8", "127.0.0.1", "/33", ",", ".", "*", "a.example", "[::1]", ":80", letters=IN_ENVIRON)


@given(FOLLOWED, NO_PROXY)
@example("HTTPS://a.example/", "x")
def test_the_way_to_a_url_is_known_whatever_no_proxy_says(url: str, no_proxy: str) -> None:
    outbound = mirror.Outbound(Config(https_proxy="http://s:1", all_proxy="socks5://p:1", no_proxy=no_proxy))
    proxy = "http://s:1" if url.lower().startswith("https:") else "socks5h://p:1"
    assert outbound.proxies(HUB, url) in ({}, {"all": proxy})
    assert outbound.proxies(replace(HUB, proxy=settings.DIRECT), url) == {}


@given(BODIES)
@example(b'{"errors": [{"code": "x", "detail": 1e999}]}')
def test_a_registrys_errors_are_read_and_can_be_written_again(body: bytes) -> None:
    errors = mirror.oci_errors(body)
    assert errors is None or errors
    for error in errors or []:
        assert error.keys() == {"code", "message", "detail"}
        assert isinstance(error["code"], str)
    assert strictly(json.dumps(errors)) == errors


@given(
    header("text", "/", "plain", "html", ";", " ", "charset", "*", "*0", "=", "utf-8", '"', "''", "%ff"), st.binary()
)
def test_an_error_for_people_is_printable_and_short(content_type: str, body: bytes) -> None:
    response = requests.Response()
    response.headers["Content-Type"] = content_type
    text = mirror.plain_text(response, body)
    assert text.isprintable()
    assert len(text) <= 202
    assert text == "" or content_type.strip().lower().startswith("text/plain")


TAGS = st.dictionaries(st.just("name") | st.text(max_size=3), JSON).map(lambda tags: json.dumps(tags).encode())


@given(BODIES | TAGS, NAMES)
@example(b'{"name": "x", "tags": [1e999]}', "app")
def test_a_list_of_tags_gets_another_name_and_keeps_the_rest(body: bytes, name: str) -> None:
    changed = mirror.renamed(body, name)
    assert changed == body or strictly(changed) == {**json.loads(body), "name": name}
    assert mirror.renamed(changed, name) == changed


LINKS = header(
    "<", ">", ";", ",", " ", "rel", "REL", "=", '"', "next", "prev", "url", "?", "#", "n=1", "last=b", "/v2/x"
)


@given(LINKS, st.none() | st.sampled_from(("docker.io", "host.test:5000")))
@example("</x?a<b>; rel=next", None)
@example('</x?a=b>; rel=next; url="y?\r\n"', None)
def test_a_next_page_is_one_link_at_the_mirror(text: str, ns: str | None) -> None:
    link = mirror.next_page(text, "/v2/app/tags/list", ns)
    if link is not None:
        assert re.fullmatch(r'</v2/app/tags/list\?[!-;=?-~]+>; rel="next"', link)
        assert ns is None or link.endswith(f'&ns={ns.replace(":", "%3A")}>; rel="next"')
        assert parse_header_links(link)[0]["rel"] == "next"
        assert mirror.next_page(link, "/v2/app/tags/list", None) == link


@given(st.lists(joined(": ", "http://a.example/?signature=secret", "\x1b[31m", "\n"), min_size=4, max_size=4))
def test_the_cause_of_a_failure_is_printable_and_short_and_the_innermost(texts: list[str]) -> None:
    inner = OSError(5, texts[0])
    protocol = urllib3.exceptions.ProtocolError(texts[1], inner)
    retries = urllib3.exceptions.MaxRetryError(urllib3.HTTPConnectionPool("a.example"), texts[2], protocol)
    for error in (inner, protocol, retries, requests.ConnectionError(retries), ValueError(texts[3], retries)):
        assert mirror.root_cause(error) == "".join(letter for letter in str(inner)[:200] if letter.isprintable())
    assert mirror.root_cause(http.client.BadStatusLine(texts[0])) == "this is no HTTP (BadStatusLine)"


# ---------------------------------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(
        ("results", "name", "star_count", "description", "num_pages", "manifests", "digest", "platform", "os",
         "architecture", "variant", "config", "layers", "size", "x")), inner, max_size=5),
    max_leaves=30,
)  # fmt: skip
FOREIGN = JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40)


@given(
    st.text() | joined("docker ", "pull ", "-q ", "--platform ", "ghcr.io/", "a", ":", "@", DIGEST, "https://", "$ ")
)
def test_any_line_is_read_as_one_image_or_none(text: str) -> None:
    named = pages.read_image(text)
    assert "@" not in named.name
    assert not any(part.isspace() for part in "".join(named))


@given(FOREIGN)
@example(b"[" * 100_000)
def test_any_answer_of_an_index_is_read_or_refused(body: bytes) -> None:
    results, _ = attempt(lambda: pages.read_results(body), ValueError)
    if results is not None:
        assert results.pages >= 0
        assert all(one.stars >= 0 and len(one.description) <= pages.MAX_TEXT for one in results.found)
        assert all("\n" not in one.description for one in results.found)


@given(FOREIGN)
@example(b"[" * 100_000)
def test_any_manifest_is_read_or_refused(body: bytes) -> None:
    parsed, _ = attempt(lambda: pages.read_manifest(body), ValueError)
    if parsed is not None:
        assert parsed.facts.size is None or parsed.facts.size >= 0
        assert all(re.fullmatch(r"[\w./-]+", platform) for platform in parsed.facts.platforms)


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------

VARIABLES = tuple(settings.variable(item) for item in fields(Config))
VALUES = joined(
    "on", "off", "OFF", "1", "-", ".", "e9", "nan", "inf", "_", MANY_DIGITS, "http://", "https://", "socks5://",
    "SOCKS5:", "a.example", ":80", ":99999", "alice:x@", "[::1]", "/", "?", "#", "docker.io", "debug", "\n", "\u2028",
    " ", letters=IN_ENVIRON,
)  # fmt: skip
NAMES_OF_VARIABLES = st.sampled_from((*VARIABLES, *map(str.lower, VARIABLES))) | joined(
    "MIRROR_", "LOGIN", "PATH", "\n"
)


@given(st.dictionaries(NAMES_OF_VARIABLES, VALUES, max_size=4))
@example({"MIRROR_LOGIN\n": "x"})
@example({"MIRROR_PROXIES": MANY_DIGITS})
@example({"MIRROR_PROXIES": "0"})
@example({"MIRROR_CACHE_DIR": "/ /"})
def test_any_environment_is_read_or_refused_in_one_line(environ: dict[str, str]) -> None:
    config, refusal = attempt(lambda: Config.from_environ(environ), ConfigError)
    if config is None:
        assert len(refusal.splitlines()) == 1
        assert any(refusal.upper().startswith(" ".join(name.upper().split())) for name in environ)
    else:
        shown = {settings.variable(item): cli.shown(getattr(config, item.name)) for item in fields(Config)}
        assert any("***" in value for value in shown.values()) or Config.from_environ(shown) == config
        assert 0 <= config.proxies <= 10


@given(VALUES | HTTP_URLS)
@example("https://a.example/?")
@example("https://a.example#")
@example("HTTPS://a.example")
def test_a_base_url_can_be_made_longer(text: str) -> None:
    url = read(settings.parse_url, text, ValueError)
    if url is not None:
        assert settings.parse_url(url) == url
        assert url.startswith(("http://", "https://"))
        assert not url.endswith("/")
        assert urlsplit(f"{url}/v2/")[:3] == (*urlsplit(url)[:2], urlsplit(url).path + "/v2/")
        assert mirror.origin(f"{url}/v2/") == mirror.origin(text)
    address = read(settings.parse_address, text, ValueError)
    assert address is None or (address == url and "/" not in address.partition("://")[2])


@given(VALUES)
@example("/s3cret/")
@example("/a/..b/~c/.")
def test_a_secret_path_stands_in_a_url_as_it_is(text: str) -> None:
    path = read(settings.parse_path, text, ValueError)
    if path is not None:
        assert settings.parse_path(path) == path
        assert urlsplit(f"https://a.example{path}/v2/").path == f"{path}/v2/"
        assert mirror.below(path, f"{path}/v2/") == "/v2/"
        assert mirror.below(path, f"{path}x/v2/") is None


@given(VALUES | HTTP_URLS)
@example("SOCKS5://a.example")
def test_a_proxys_url_is_that_of_a_server(text: str) -> None:
    url = read(settings.parse_proxy, text, ValueError)
    if url is not None:
        assert settings.parse_proxy(url) == url
        assert url.startswith(tuple(f"{scheme}://" for scheme in settings.PROXY_SCHEMES))
        assert url.rstrip("/").partition("://")[2] == urlsplit(text).netloc


ODD = joined("/", "?", "#", "@", ":", "[", "]", "%", "1", "\u2100", letters=IN_ENVIRON)


@given(st.sampled_from(("http", "socks5h", "sox")), ODD, ODD, ODD)
@example("http", "", "/", "")
@example("http", "1/", "", "")
@example("http", "x@", "", "")
@example("http", "", "\u2100", "")
def test_a_password_is_shown_nowhere_however_it_is_written(scheme: str, before: str, after: str, host: str) -> None:
    url = f"{scheme}://alice:{before}hunter2{after}@proxy{host}"
    for variable in ("HTTPS_PROXY", "MIRROR_PUBLIC_URL"):
        config, refusal = attempt(partial(Config.from_environ, {variable: url}), ConfigError)
        assert "hunter2" not in refusal
        assert "hunter2" not in repr(config)
        assert config is None or "hunter2" not in cli.shown(config.https_proxy)


@given(joined("1", "-", "_", ".", "e", "nan", "inf", " ", MANY_DIGITS), st.integers(-5, 5), st.integers(-5, 5))
def test_a_number_lies_within_its_bounds(text: str, low: int, high: int) -> None:
    for kind in (int, float):
        number = read(settings.parse_number(low, high, kind), text, ValueError)
        assert number is None or (low <= number <= high and isinstance(number, kind))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="parsers-") as name:
        yield Path(name)


def load(folder: Path, text: str) -> dict[str, Registry]:
    """Return the registries of a file with this text, none where it is refused as it should be."""
    file = folder / "registries.toml"
    file.write_bytes(text.encode(errors="surrogatepass"))
    config = Config(registries=str(file), credentials=str(folder))
    registries, refusal = attempt(lambda: settings.load_registries(config), ConfigError)
    assert len(refusal.splitlines()) <= 1
    assert registries or str(file) in refusal or refusal.startswith("MIRROR_DEFAULT: ")
    return registries or {}


TOML = joined(
    "[", "]", "[[", '"', '"""', "'", "=", "\n", ".", ",", "{", "}", "true", "1", "e9", "inf", "2024-99-99", "25:00:00",
    "ghcr.io", "docker.io", "enabled", "endpoints", '["a"]\n', 'alias = "x"\n', "\\", "\\ud800", "#", "\ud800",
    MANY_DIGITS,
)  # fmt: skip


@given(TOML)
@example(f"a = {MANY_DIGITS}")
@example("a = " + "[" * 5000)
@example('["a\\nb"]\n')
@example('["a"]\n"x\\ny" = 1')
def test_any_registries_file_is_read_or_refused_in_one_line(folder: Path, text: str) -> None:
    load(folder, text)


def toml(value: Any) -> str:
    """Write a value as TOML."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{toml(key)} = {toml(one)}' for key, one in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return value.isoformat() if isinstance(value, datetime) else json.dumps(value, ensure_ascii=False)


TOML_TEXT = st.text(st.characters(codec="utf-8"), max_size=5)
NUMBERS = st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
TOML_VALUES = st.recursive(
    st.booleans() | NUMBERS | st.datetimes() | TOML_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TOML_TEXT, inner, max_size=2),
    max_leaves=4,
)
SOME_URLS = st.sampled_from(
    ("https://a.example", "http://[fe80::1%25lo]:1", "http://10.0.0.1/x", "https://a/?", "ftp://a")
)
SOME_TEXTS = st.sampled_from(
    ("a.example", "secret", "hub.test:5000", "library/*", "[z-a]", "direct", "@", "socks5://p")
)
LIKELY = SOME_URLS | SOME_TEXTS | TOML_TEXT
LISTS = st.lists(LIKELY, max_size=2)
ANY_TABLE = st.fixed_dictionaries({}, optional=dict.fromkeys(settings.READERS, LIKELY | LISTS | TOML_VALUES))
GOOD_TABLE = st.fixed_dictionaries(
    {"endpoints": st.lists(SOME_URLS, min_size=1, max_size=2)},
    optional={"alias": LIKELY, "hosts": LISTS, "images": LISTS, "proxy": LIKELY, "realms": st.lists(SOME_URLS)},
)
ACCOUNT = st.fixed_dictionaries({"username": LIKELY}, optional={"password": LIKELY, "password_file": st.just("secret")})
TABLES = st.dictionaries(
    st.sampled_from(("docker.io", "ghcr.io", "mine.test:5000", "m-.x")) | TOML_TEXT,
    ANY_TABLE | GOOD_TABLE | ACCOUNT | TOML_VALUES,
    max_size=3,
)


@given(TABLES, st.binary(max_size=5), HOSTS, NAMES)
def test_what_is_read_of_a_registries_file_can_be_served(
    folder: Path, tables: dict[str, Any], secret: bytes, host: str, name: str
) -> None:
    (folder / "secret").write_bytes(secret)
    lines = [f"{toml(name)} = {toml(value)}" for name, value in tables.items() if not isinstance(value, dict)]
    for key, table in tables.items():
        if isinstance(table, dict):
            lines += [f"[{toml(key)}]", *(f"{toml(inner)} = {toml(value)}" for inner, value in table.items())]
    registries = load(folder, "\n".join(lines))
    for registry in registries.values():
        assert registry.endpoints
        for number in range(len(registry.endpoints)):
            site = mirror.Site.endpoint(registry, number, name)
            assert mirror.origin(f"{site.base}/v2/{name}/tags/list")
            assert site.account is None or (number == 0 and mirror.PRINTABLE.fullmatch(site.account))
        mirror.Guard(registry, ipv4_only=False).admits("elsewhere.example", "10.0.0.1")
    if HUB.name in registries:
        router = mirror.Router(registries, HUB.name)
        attempt(lambda: router.resolve(host, None, name), mirror.Denied)


# ---------------------------------------------------------------------------------------------------------------------
# Whole requests, in this process
# ---------------------------------------------------------------------------------------------------------------------

DEFAULT = ""
NOT_FOUND = reply(404)
CONTENT = reply(200, b"content", {"Content-Type": "text/plain"})


class Inside(logging.Handler):
    """Run the application in this process before an upstream, and look at all that it says and logs."""

    def __init__(self, folder: Path, upstream: RawUpstream) -> None:
        super().__init__()
        self.upstream = upstream
        file = folder / "inside.toml"
        tables = [f'["{registry.name}"]\nenabled = false\n' for registry in settings.BUILT_IN[1:]]
        mine = f'endpoints = ["{upstream.url}"]\n'
        tables += [f'["docker.io"]\n{mine}search = "{upstream.url}"\n', f'["mine.test"]\n{mine}alias = "ghcr"\n']
        file.write_text("".join(tables))
        config = Config(registries=str(file), connect_timeout=1, first_byte_timeout=2, idle_timeout=1)
        self._app = mirror.create_app(config)
        self._records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Note a record of the log."""
        self._records.append(record)

    def ask(
        self,
        path: str,
        answers: Mapping[str, Answer],
        environ: Mapping[str, str] | None = None,
        method: str = "GET",
        body: bytes = b"",
    ) -> TestResponse | None:
        """Return the answer, once it is seen to be a proper one; None where the connection breaks.

        `answers` are those of upstream, by path or the `DEFAULT` one; the mirror has learnt nothing of it before.
        """
        self._forget()
        self.upstream.answers.update(answers)
        self.upstream.default = answers.get(DEFAULT, NOT_FOUND)
        client = self._app.test_client()
        try:
            response = client.open(path, method=method, input_stream=io.BytesIO(body), environ_overrides=environ)
            response.get_data()
        except ConnectionResetError:
            response = None
        for record in self._records:
            assert record.getMessage().isprintable()
            assert record.exc_info is None
        if response is not None:
            check(response, response.get_data() if method != "HEAD" else None)
        return response

    def _forget(self) -> None:
        views = self._app.extensions["docker-mirror"]
        views.close_idle()
        state = views._upstream
        for known in (state._challenges, state._open_until, state._tokens._tokens, self._records):
            known.clear()
        self.upstream.requests.clear()
        self.upstream.answers.clear()


def check(response: TestResponse, body: bytes | None) -> None:
    """See that an answer is one of ours, or upstream's own, in good form."""
    assert response.status_code != 500
    for name, value in response.headers:
        assert mirror.HEADER_VALUE.fullmatch(value)
        assert name != "WWW-Authenticate" or mirror.PRINTABLE.fullmatch(value)
    if body is None or response.status_code in (204, 304):
        return
    if response.status_code >= 400 and not response.request.path.startswith("/token"):
        assert response.headers["Content-Type"] == "application/json"
        assert all(isinstance(error["code"], str) for error in strictly(body)["errors"])
    assert int(response.headers.get("Content-Length", len(body))) == len(body)


@pytest.fixture(scope="module")
def inside(folder: Path) -> Iterator[Inside]:
    with RawUpstream() as upstream:
        running = Inside(folder, upstream)
        mirror.log.addHandler(running)
        yield running
        mirror.log.removeHandler(running)


AUTHORIZATIONS = CHALLENGES | header("Basic ", "YTpi", "bearer anonymous", " ")
CLIENT_HEADERS = {
    "RANGE": header("bytes", "=", "-", ",", "0-", "5-2", "-1", "lines", " ", MANY_DIGITS),
    "IF_RANGE": header('"', "W/", "x") | DATES,
    "IF_NONE_MATCH": header('"', "W/", "*", ","),
    "IF_MODIFIED_SINCE": DATES,
    "VIA": header("1.1 ", mirror.VIA, ", "),
    "AUTHORIZATION": AUTHORIZATIONS,
    "ACCEPT": header("*/*", ",", ";q=", "application/json"),
    "HOST": st.sampled_from(("mirror.example", "GHCR.mirror.example:443", "[::1]")) | header(*HOST_PARTS),
    "X_FORWARDED_FOR": header("203.0.113.7", ",", ":", "unknown"),
    "X_FORWARDED_HOST": st.just("a.example") | header("a.example", ",", ":", "[::1]", "/"),
    "X_FORWARDED_PROTO": header("https", "http", ",", "javascript"),
    "CONNECTION": header("upgrade", ",", "close"),
    "UPGRADE": header("websocket"),
}


@given(st.fixed_dictionaries({}, optional=CLIENT_HEADERS), st.sampled_from(("GET", "HEAD")))
def test_any_headers_of_a_client_are_taken_refused_or_left_out(
    inside: Inside, headers: dict[str, str], method: str
) -> None:
    environ = {f"HTTP_{name}": value for name, value in headers.items()}
    response = inside.ask(BLOB_PATH, {DEFAULT: CONTENT}, environ, method)
    assert response is not None
    assert response.status_code in (200, 400, 502)
    allowed = {name.lower() for name in (*mirror.REQUEST_HEADERS, "Authorization", "Host")}
    for request in inside.upstream.requests:
        assert request.headers.keys() <= allowed | {"user-agent", "accept-encoding"}
        assert request.headers["via"].endswith(f"1.1 {mirror.VIA}")
        assert "range" not in request.headers or parse_range_header(request.headers["range"]) is not None
        assert request.headers.get("authorization") in (None, headers.get("AUTHORIZATION", "").strip())


WORDS = (
    "library",
    "app",
    "ghcr.io",
    "mine.test",
    "manifests",
    "%2f",
    "_catalog",
    "v2",
    "tags",
    "latest",
    DIGEST,
    "A",
    "",
)
RESOURCES = st.sampled_from(("manifests/latest", "tags/list", f"blobs/{DIGEST}", f"referrers/{DIGEST}"))
PATHS = st.builds("v2/{}/{}".format, NAMES, RESOURCES) | st.builds(
    "{}/{}/{}".format,
    st.sampled_from(("v2", "token", "v1", "")),
    st.lists(st.sampled_from(WORDS)).map("/".join),
    RESOURCES | header("/"),
)
ARGUMENTS = st.sampled_from(
    ("ns=docker.io", "ns=mine.test", "n=1", "last=%0d%0a", "last=%ff", "artifactType=a+b", "q=%00")
)
QUERIES = st.lists(ARGUMENTS).map("&".join) | header(
    "ns", "=", "&", "docker.io", "n", "%0d%0a", "%ff", "+", ";", "\x80"
)


@given(PATHS, QUERIES, st.sampled_from(("GET", "HEAD", "OPTIONS", "POST")))
def test_any_path_and_query_of_a_client_are_well_formed_upstream(
    inside: Inside, path: str, query: str, method: str
) -> None:
    environ = {"PATH_INFO": f"/{path}", "RAW_URI": f"/{path}?{query}", "QUERY_STRING": query}
    assert inside.ask("/", {DEFAULT: CONTENT}, environ, method)
    name = mirror.NAME.pattern
    asked = rf"/v2/({name}/(manifests|blobs|referrers)/[A-Za-z0-9.:+=_-]+|{name}/tags/list|)|/v1/search"
    for request in inside.upstream.requests:
        assert re.fullmatch(asked, request.path)
        assert {key for key, _ in parse_qsl(request.target.partition("?")[2])} <= {"n", "last", "artifactType", "q"}


FORMS = raw(
    b"grant_type=", b"password", b"&", b"scope=", b"repository:", b":pull", b"app", b"%ff", b"%0d", b"=", b"--x\r\n",
    b'Content-Disposition: form-data; name="scope"\r\n\r\n',
)  # fmt: skip
TYPES = st.sampled_from(("application/x-www-form-urlencoded", "multipart/form-data; boundary=x")) | header(
    "application/x-www-form-urlencoded", "multipart/form-data", ";", " boundary=", "x", "charset=", "*0", "\xe4", '"'
)


@given(SCOPES, QUERIES, TYPES, FORMS, st.just("Basic YTpi") | AUTHORIZATIONS, st.binary())
def test_any_request_for_a_token_is_answered(
    inside: Inside, scope: str, query: str, content_type: str, form: bytes, authorization: str, answer: bytes
) -> None:
    environ = {
        "QUERY_STRING": f"{query}&{urlencode({'scope': scope.encode(errors='replace')})}",
        "CONTENT_TYPE": content_type,
        "CONTENT_LENGTH": str(len(form)),
        "HTTP_AUTHORIZATION": authorization,
    }
    answers = {"/v2/": refuse(token_realm(inside.upstream.url), "s"), "/realm": reply(200, answer)}
    for method in ("GET", "POST"):
        response = inside.ask("/token", answers, environ, method, form)
        assert response is not None
        assert response.status_code in (200, 400, 403, 413)
        assert response.status_code != 200 or response.get_data() == answer or "anonymous" in response.text
        for request in inside.upstream.asked("/realm"):
            told = request.body.decode() if method == "POST" else request.target.partition("?")[2]
            assert [value for key, value in parse_qsl(told, keep_blank_values=True) if key == "service"] == ["s"]


@given(
    st.fixed_dictionaries(
        {"PATH_INFO": header("/v2/", " ", '"', "\r\n")}, optional={"REMOTE_ADDR": CLIENT_HEADERS["HOST"]}
    )
)
def test_an_access_line_shows_an_address_and_a_path_without_gaps(environ: dict[str, Any]) -> None:
    mirror.note_request(environ)
    assert environ["mirror.client"] == "-" or mirror.is_address(environ["mirror.client"])
    assert re.fullmatch(r"[!#-~]{0,500}", environ["mirror.path"])


OK = b"HTTP/1.1 200 OK\r\n"
STATUS_LINES = st.integers(100, 599).map(lambda status: b"HTTP/1.1 %d X\r\n" % status) | st.sampled_from(
    (OK, OK, b"HTTP/1.0 206\r\n", b"HTTP/1.1 307 X\r\n", b"HTTP/1.1 401 X\r\n")
)
FIELDS = (
    b"Content-Type", b"Content-Length", b"Transfer-Encoding", b"Content-Encoding", b"Set-Cookie", b"WWW-Authenticate",
    b"Location", b"Link", b"Retry-After", b"ETag", b"Connection", b"Warning",
)  # fmt: skip
FIELD_VALUES = st.one_of(
    st.sampled_from((b"0", b"7", b"chunked", b"Chunked", b"gzip" + b",gzip" * 9, b"-1", b"7, 7", b"\x00", b"a\x0bb")),
    raw(b"multipart/x;", b"boundary", b"*", b"*0", b"=", b"''", b"undefined", b";", b"\r\n ", b"\r", b"\xff", b"\0"),
    raw(b"Bearer ", b"realm", b"=", b'"', b"http://127.0.0.1:1", b"//", b"/x", b"[", b"@", b"\x1b", b"1" * 5000),
    raw(b"a=b;", b"expires=", b"max-age", b"=", b"Mon, 01 Jan 99999999999 00:00:00 GMT", b"domain", b"version"),
)
HEADER_LINES = st.tuples(st.sampled_from(FIELDS), FIELD_VALUES).map(b"%s: %s\r\n".__mod__)
CHUNKS = raw(b"content", b"7\r\n", b"\r\n", b"0\r\n\r\n", b"-1\r\n", b"f" * 20, b"0x7\r\n", b";x", b"1" * 5000)
WHOLE = st.tuples(STATUS_LINES, HEADER_LINES, BODIES).map(
    lambda parts: b"%s%sContent-Length: %d\r\n\r\n%s" % (*parts[:2], len(parts[2]), parts[2])
)
ODD_ANSWERS = st.tuples(STATUS_LINES, st.lists(HEADER_LINES, max_size=4).map(b"".join), CHUNKS | BODIES).map(
    b"%s%s\r\n%s".__mod__
)
ANSWERS = (
    WHOLE
    | ODD_ANSWERS
    | raw(b"HTTP/1.1 ", b"HTTP/", b"1.1", b" ", b"200", b"\r\n", b"\n", b":", b"X: y\r\n", b"\r\n\r\n", b"\x16\x03\x01")
)


@given(ANSWERS, st.sampled_from((BLOB_PATH, "/v2/app/manifests/latest", "/v2/app/tags/list", "/v2/", "/v1/search")))
@example(OK + b"Content-Length: %s\r\n\r\nx" % MANY_DIGITS.encode(), BLOB_PATH)
@example(OK + b"Content-Type: multipart/x; boundary*=\x00''x\r\n\r\n", BLOB_PATH)
@example(OK + b"Content-Type: multipart/x; boundary*=a; boundary*0=b\r\n\r\n", BLOB_PATH)
@example(b"HTTP/1.1 307 X\r\nLocation: http://a\x1b[31m/\r\nContent-Length: 0\r\n\r\n", BLOB_PATH)
@example(b'HTTP/1.1 404 X\r\nContent-Length: 44\r\n\r\n{"errors": [{"code": "x", "detail": 1e999}]}', BLOB_PATH)
def test_any_answer_of_upstream_is_passed_on_refused_or_broken_off(inside: Inside, answer: bytes, path: str) -> None:
    response = inside.ask(path, {path.replace("/app/", "/library/app/"): sends(answer), "/realm": sends(answer)})
    if response is not None and response.status_code not in (401, 403, 429, 502):
        line = re.match(rb"HTTP/1\.[01] ([1-9][0-9]{2})\b", answer)
        assert line is not None
        status = int(line[1])
        assert response.status_code == status or status in mirror.REDIRECTS or path == "/v2/"


@given(
    st.integers(101, 599) | st.integers(600, 999),  # 100 is no answer yet
    BODIES,
    header("text/plain", ";", "charset", "*=", "application/json"),
)
def test_any_status_of_upstream_has_its_answer(inside: Inside, status: int, body: bytes, content_type: str) -> None:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    response = inside.ask(BLOB_PATH, {BLOB: head.encode("latin-1") + body})
    assert response is not None
    told = 200 <= status < 300 or status == 304 or 400 <= status < 500
    assert response.status_code == ({401: 403}.get(status, status) if told else 502)
    assert response.get_data() == body or status in (204, 304) or not 200 <= status < 300


@given(BODIES | TOKENS)
def test_any_answer_of_a_realm_is_a_token_or_none(inside: Inside, body: bytes) -> None:
    response = inside.ask(BLOB_PATH, {BLOB: refuse(token_realm(inside.upstream.url), "s"), "/realm": reply(200, body)})
    assert response is not None
    assert response.status_code in (401, 502)


# ---------------------------------------------------------------------------------------------------------------------
# Whole requests, through gunicorn
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(connect_timeout=1, first_byte_timeout=1.5, idle_timeout=1) as running:
        yield running
        assert not re.search("Traceback|ERROR", running.mirror.log())


few = hypothesis.settings(max_examples=30)
REQUESTS = raw(
    b"GET ", b"HEAD ", b"POST ", b"/v2/", b"/token", b"/v2/app/manifests/latest", b" HTTP/1.1\r\n", b"Host: m\r\n",
    b"Host: ", b"Range: bytes=0-\r\n", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"?ns=", b"\x00",
    b"Authorization: Basic YTpi\r\n", b"X-Forwarded-Host: ", b"Expect: 100-continue\r\n", b"\r\n", b"\r\n\r\n", b"\xff",
)  # fmt: skip


@few
@given(REQUESTS)
@example(b"GET /v2/ HTTP/1.1\r\nHost: \xe4\r\n\r\n")
@example(b"GET /v2/\xff HTTP/1.1\r\nHost: m\r\nX-Forwarded-Host: \xff\r\n\r\n")
@example(b"GET /token?\x80 HTTP/1.1\r\nHost: m\r\nAuthorization: Basic YTpi\r\n\r\n")
def test_any_bytes_of_a_client_get_an_answer_or_none(lab: Lab, text: bytes) -> None:
    with socket.create_connection(("127.0.0.1", lab.mirror.port), timeout=30) as connection:
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                received += part
    assert not received or re.match(rb"HTTP/1\.[01] ([1-4][0-9]{2}|501) ", received)


@few
@given(ANSWERS)
@example(OK + b"Content-Type: multipart/x; boundary*=a; boundary*0=b\r\n\r\n")
def test_any_bytes_of_upstream_are_an_answer_or_a_broken_connection(lab: Lab, answer: bytes) -> None:
    lab.reset()
    lab.upstream.answers[BLOB] = sends(answer)
    since = lab.mirror.mark()
    try:
        got = ask(lab.mirror, BLOB_PATH)
    except (http.client.HTTPException, ConnectionResetError):
        return
    finally:
        lab.mirror.wait_for_requests(1, since)
        assert "Traceback" not in lab.mirror.log(since)
    assert got.status != 500
    assert got.status < 400 or isinstance(got.code, str)
