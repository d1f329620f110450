"""The owner's check: it walks a pull as dockerd does, and each fault is told in words, with how to mend it."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from datetime import UTC
from datetime import datetime
from datetime import timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import click.testing
import pytest
import trustme
from conftest import needs
from hub import PASSWORD
from hub import USER
from hub import Hub
from images import DOCKER_MANIFEST
from images import MIB
from lab import refuse
from parts import Premises
from processes import clean_environment
from processes import free_port
from registries import BASIC_PASSWORD
from registries import BASIC_USER
from registries import HTPASSWD
from serving import HOST
from serving import ROOT
from serving import Mirror
from terminator import Terminator
from tls import Documented
from upstream import RawUpstream
from upstream import Request
from upstream import reply
from upstream import reply_json
from upstream import sends

import check
import cli

PLATFORM = "--platform=linux/amd64"
SPOILER = "127.0.0.22"
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
HTML = {"Content-Type": "text/html"}
TLS = "proxy_set_header Host $http_host; proxy_set_header X-Forwarded-Proto https; proxy_buffering off;"


def walk(*arguments: str, stdin: str = "") -> click.testing.Result:
    return click.testing.CliRunner().invoke(cli.main, ["check", *arguments], input=stdin)


def told(ended: click.testing.Result) -> str:
    """Return what a check printed that found a problem."""
    assert ended.exit_code == 1, ended.output
    assert "Traceback" not in ended.output
    return ended.output


class Spoiler(Premises):
    """Run nginx with TLS and rules that spoil something, in front of a mirror or in place of one."""

    def __init__(self, rules: str, authority: trustme.CA | None = None) -> None:
        super().__init__(authority or trustme.CA())
        self._rules = rules

    def start(self) -> None:
        """Start nginx."""
        needs("nginx")
        self._nginx = self.nginx("spoiler", SPOILER, self._rules)
        self._nginx.wait()
        self.url = self._nginx.url

    def walk(self, *arguments: str) -> click.testing.Result:
        """Check what it serves."""
        return walk(self.url, *arguments, PLATFORM, f"--ca={self.ca_file}")


@contextmanager
def spoiled(mirror: Mirror, rules: str) -> Iterator[Spoiler]:
    """Run nginx in front of a mirror, with more rules in its location."""
    with Spoiler(f"location / {{ proxy_pass {mirror.url}; {rules} }}") as running:
        yield running


# What is well


def test_a_pull_is_walked_as_dockerd_does(hub: Hub) -> None:
    with Mirror(registries=hub.registries_file) as own:
        since = own.mark()
        ended = walk(own.url, "bitnami/postgresql", PLATFORM)
        asked = own.wait_for_requests(10, since)
    assert ended.exit_code == 0, ended.output
    names = ["name", "connection", "ping", "token", "HEAD manifest", "manifest", "platform manifest", "config", "range"]
    steps = ended.output.splitlines()[:-1]
    assert [" ".join(line[22:40].split()) for line in steps] == [*names, "layer 1", "layer 2", "layer 3"]
    assert all(line.startswith("ok ") for line in steps)
    assert "digest verified" in steps[-1]
    top, image = hub.repositories["bitnami/postgresql"].top().digest, hub.repositories["bitnami/postgresql"].images[0]
    path = "/v2/bitnami/postgresql"
    assert [(line.method, line.path) for line in asked] == [
        ("GET", "/v2/"),
        ("GET", "/token"),
        ("HEAD", f"{path}/manifests/latest"),
        ("GET", f"{path}/manifests/{top}"),
        ("GET", f"{path}/manifests/{image.manifest.digest}"),
        ("GET", f"{path}/blobs/{image.config.digest}"),
        *(("GET", f"{path}/blobs/{layer.digest}") for layer in (image.layers[2], *image.layers)),
    ]


def test_json_tells_the_same(mirror: Mirror) -> None:
    ended = walk(mirror.url, "hello-world", PLATFORM, "--json")
    content = json.loads(ended.output)
    assert (ended.exit_code, content["ok"], content["platform"]) == (0, True, "linux/amd64")
    assert [step["name"] for step in content["steps"]][:4] == ["name", "connection", "ping", "token"]
    assert all(step["problems"] == [] and step["seconds"] >= 0 for step in content["steps"])
    assert content["steps"][2]["status"] == 401


def test_json_tells_problems_too() -> None:
    ended = walk("http://127.0.0.1:9", "--json")
    content = json.loads(ended.output)
    assert (ended.exit_code, content["ok"]) == (1, False)
    problem = content["steps"][-1]["problems"][0]
    assert problem["sure"]
    assert "nothing answers at port 9" in problem["what"]
    assert problem["mend"]


def test_a_pull_is_walked_through_tls_and_a_terminator(mirror: Mirror) -> None:
    needs("nginx")
    with Terminator(mirror) as terminator:
        ended = walk(terminator.url, "redis:7", PLATFORM, f"--ca={terminator.ca_file}")
    assert ended.exit_code == 0, ended.output
    assert ", HTTP/1.1, certificate valid until" in ended.output


def test_a_pull_below_a_secret_path_and_without_any_token_is_walked(hub: Hub) -> None:
    with Mirror(registries=hub.registries_file, path_prefix="/s3cret", login="off") as hidden:
        ended = walk(hidden.url, "docker.io/nginx:alpine", PLATFORM)
        assert ended.exit_code == 0, ended.output
        assert "no token is needed" in ended.output
        assert "404" in told(walk(f"http://{hidden.host}", "nginx"))


def test_an_image_is_named_by_its_digest_too(mirror: Mirror, hub: Hub) -> None:
    digest = hub.repositories["library/redis"].top().digest
    assert walk(mirror.url, f"redis@{digest}", PLATFORM).exit_code == 0


def test_the_platform_may_be_another_one(mirror: Mirror) -> None:
    assert walk(mirror.url, "hello-world", "--platform=linux/arm64").exit_code == 0
    shown = told(walk(mirror.url, "hello-world", "--platform=linux/s390x"))
    assert "not there for linux/s390x" in shown
    assert "There are: linux/amd64, linux/arm64." in shown


def test_a_terminal_shows_a_bar_for_each_transfer(mirror: Mirror) -> None:
    controller, terminal = pty.openpty()
    command = [sys.executable, "-c", "import cli; cli.main()", "check", mirror.url, "nginx", PLATFORM]
    ended = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=terminal, text=True, timeout=60, check=True
    )
    os.close(terminal)
    assert b"100%" in os.read(controller, 1 << 16)
    os.close(controller)
    assert "100%" not in ended.stdout


def test_neither_a_proxy_nor_a_netrc_is_used(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login alice password wonderland\n")
    environment = clean_environment({"HOME": str(tmp_path), "http_proxy": "http://127.0.0.1:9"})
    command = [sys.executable, "-c", "import cli; cli.main()", "check", mirror.url, "redis", PLATFORM]
    subprocess.run(command, cwd=ROOT, env=environment, timeout=60, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "arguments",
    [
        ("mirror.example",),
        ("http://m", "NGINX"),
        ("http://m", "a", "--platform=x"),
        ("http://m", "a", "--ca=/dev/null/x"),
    ],
)
def test_a_wrong_argument_is_told_and_nobody_is_asked(arguments: tuple[str, ...]) -> None:
    ended = walk(*arguments)
    assert ended.exit_code == 2
    assert "Error: " in ended.output
    in_json = walk(*arguments, "--json")
    assert in_json.exit_code == 2
    assert json.loads(in_json.output)["ok"] is False
    assert json.loads(in_json.output)["error"] in ended.output


def test_an_argument_that_is_missing_is_told_in_json_too() -> None:
    ended = walk("--json")
    assert (ended.exit_code, json.loads(ended.output)) == (2, {"ok": False, "error": "Missing argument 'URL'."})


@pytest.mark.parametrize(
    ("text", "image"),
    [
        ("nginx", ("library/nginx", "latest", None)),
        ("docker.io/nginx:1.28", ("library/nginx", "1.28", None)),
        ("registry.example:5000/me/img", ("me/img", "latest", "registry.example:5000")),
        ("registry.example:5000/img:v1", ("img", "v1", "registry.example:5000")),
        (f"localhost:5000/img@sha256:{'a' * 64}", ("img", f"sha256:{'a' * 64}", "localhost:5000")),
        ("img:5000", ("library/img", "5000", None)),
    ],
)
def test_an_image_is_read_as_docker_reads_it(text: str, image: tuple[str, str, str | None]) -> None:
    assert check.Image.parse(text) == check.Image(*image)


def test_an_image_of_a_registry_with_a_port_is_walked(hub: Hub, tmp_path: Path) -> None:
    file = tmp_path / "registries.toml"
    table = hub.registries_file.read_text()
    file.write_text(table + table.replace('["docker.io"]', '["registry.example:5000"]'))
    with Mirror(registries=file) as other:
        ended = walk(other.url, "registry.example:5000/library/redis", PLATFORM)
        assert ended.exit_code == 0, ended.output
        assert "does not serve that registry" in told(walk(other.url, "registry.example:5001/library/redis"))


# An address behind the public one


@contextmanager
def published(hub: Hub) -> Iterator[tuple[Mirror, Spoiler]]:
    """Run a mirror that names its public address, and the terminator at that address."""
    port = free_port(HOST)
    with (
        Spoiler(f"location / {{ proxy_pass http://{HOST}:{port}; {TLS} }}") as public,
        Mirror(port=port, registries=hub.registries_file, public_url=public.url, path_prefix="/s3cret") as mirror,
    ):
        yield mirror, public


def test_a_public_address_is_noted_and_no_problem(hub: Hub) -> None:
    with published(hub) as (mirror, public):
        ended = walk(mirror.url, "redis", PLATFORM, f"--ca={public.ca_file}")
        assert ended.exit_code == 0, ended.output
        assert f"note: tokens are to be had at {public.url.removeprefix('https://')}" in ended.output
        assert f"{public.url}/s3cret is a mirror too" in ended.output
        steps = json.loads(walk(mirror.url, "redis", PLATFORM, f"--ca={public.ca_file}", "--json").output)["steps"]
        assert [len(step["notes"]) for step in steps[:5]] == [0, 0, 1, 0, 0]
        shown = told(walk(mirror.url, "redis", PLATFORM))
        assert f"{SPOILER}:{public.url.rpartition(':')[2]}: the certificate comes from an authority" in shown


@pytest.mark.parametrize(
    ("public", "words"),
    [
        ("https://nowhere.invalid", "DNS: nowhere.invalid has no address"),
        ("https://127.0.0.1:9", "nothing answers at 127.0.0.1:9: "),
        ("@TOKENS@", "/token is no token endpoint of a mirror"),
    ],
)
def test_a_public_address_that_is_no_mirrors_is_told(hub: Hub, public: str, words: str) -> None:
    with Mirror(registries=hub.registries_file, public_url=public.replace("@TOKENS@", hub.registry_url)) as wrong:
        assert words in told(walk(wrong.url, "redis", PLATFORM, f"--ca={hub.ca_file}"))


# A login


def test_a_mirror_with_users_of_its_own_is_walked_by_one_of_them(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "users").write_text(HTPASSWD)
    with Mirror(registries=hub.registries_file, users=tmp_path / "users") as closed:
        shown = told(walk(closed.url))
        assert "401: log in to this mirror" in shown
        assert "--user NAME" in shown
        user = f"--user={BASIC_USER}"
        ended = walk(closed.url, "redis", PLATFORM, user, stdin=f"{BASIC_PASSWORD}\n")
        assert ended.exit_code == 0, ended.output
        assert f", as {BASIC_USER}" in ended.output
        assert BASIC_PASSWORD not in ended.output
        shown = told(walk(closed.url, "redis", PLATFORM, user, stdin="wonderland\n"))
        assert "401: the user or the password is wrong" in shown
        assert "Are name and password right?" in shown
        assert "no password came on stdin" in walk(closed.url, "redis", user).output


def test_a_password_is_asked_for_at_a_terminal(mirror: Mirror, hub: Hub) -> None:
    controller, terminal = pty.openpty()
    command = [sys.executable, "-c", "import cli; cli.main()", "check", mirror.url, "private/app", PLATFORM]
    with subprocess.Popen(
        [*command, f"--user={USER}"], cwd=ROOT, stdin=terminal, stdout=subprocess.PIPE, stderr=terminal
    ) as process:
        os.close(terminal)
        assert os.read(controller, 100).strip() == b"Password:"
        os.write(controller, f"{PASSWORD}\n".encode())
        assert process.wait(60) == 0
    os.close(controller)


def test_a_login_is_sent_as_docker_sends_it_and_to_the_realm_alone(fake: RawUpstream) -> None:
    assert walk(fake.url, "--user=alice", stdin="wonder:land\n").exit_code == 0
    (asked,) = fake.asked("/token")
    assert asked.headers["authorization"] == "Basic YWxpY2U6d29uZGVyOmxhbmQ="
    assert asked.target.endswith("&account=alice")
    others = [request.headers.get("authorization", "") for request in fake.requests if request.path != "/token"]
    assert [header for header in others if header.startswith("Basic")] == []


def test_a_password_does_not_go_to_a_realm_elsewhere(fake: RawUpstream) -> None:
    with RawUpstream() as other:
        fake.answers["/v2/"] = refuse(f"{other.url}/token", "m", None)
        assert "the password is not sent there" in told(walk(fake.url, "--user=alice", stdin="wonderland\n"))
        assert other.requests == []


# The way to the mirror


@pytest.mark.parametrize("host", ["nowhere.invalid", f"{'a' * 70}.example"])
def test_a_name_that_is_not_known_is_told(host: str) -> None:
    assert f"DNS: {host} has no address" in told(walk(f"https://{host}"))


def test_a_closed_port_is_told() -> None:
    assert "nothing answers at port 9: 127.0.0.1 (Connection refused)" in told(walk("https://127.0.0.1:9"))


def test_an_address_that_does_not_answer_is_told_though_another_does(mirror: Mirror, monkeypatch: Any) -> None:
    """A name with two addresses would need a name server of the tests' own: the list is put in its place."""
    monkeypatch.setattr(check.Walk, "_resolve", lambda walk, step: walk._addresses.extend(["127.0.0.99", "127.0.0.1"]))
    shown = told(walk(mirror.url, "redis", PLATFORM))
    assert "127.0.0.99 does not answer" in shown
    assert "digest verified" in shown


def test_an_authority_that_is_not_known_is_told(mirror: Mirror) -> None:
    with spoiled(mirror, TLS) as spoiler:
        assert "authority that is not known here" in told(walk(spoiler.url, "redis"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"not_before": datetime.now(UTC) + timedelta(days=2)}, "is not valid yet"),
        ({"not_after": datetime.now(UTC) - timedelta(days=2), "not_before": LONG_AGO}, "has expired"),
        ({"host": "other.example"}, "is for another address"),
    ],
)
def test_a_certificate_that_is_not_good_is_told(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(options.pop("host", SPOILER), **options).configure_cert(context)
    with RawUpstream(SPOILER, context) as server:
        assert f"the certificate {words}" in told(walk(server.url, f"--ca={tmp_path}/ca.pem"))


def test_https_to_a_plain_port_is_told(mirror: Mirror) -> None:
    assert "speaks no TLS" in told(walk(mirror.url.replace("http:", "https:")))


# What a terminator spoils


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("proxy_set_header Host $http_host;", "the realm is not https, though the mirror is"),
        ("proxy_set_header X-Forwarded-Proto https;", "the realm is on another host, 127.0.0.1:"),
        (
            "proxy_set_header Host $host; proxy_set_header X-Forwarded-Proto https;",
            f"the realm is on another host, {SPOILER}, ",
        ),
        (f"{TLS} proxy_hide_header Docker-Content-Digest;", "HEAD has no Docker-Content-Digest"),
        (f"{TLS} gzip on; gzip_types *; gzip_proxied any; gzip_min_length 1;", "the answer is compressed (gzip)"),
        (f"{TLS} proxy_hide_header WWW-Authenticate;", "401 without a Bearer challenge"),
        (f"{TLS} if ($request_method = HEAD) {{ return 405; }}", "HEAD is answered by 405, though GET is not"),
        (f"{TLS} proxy_set_header Range '';", "Range is not honoured: 200"),
        (f"{TLS} proxy_hide_header Content-Type;", "HEAD has no Content-Type"),
        (f"{TLS} rewrite ^/v2/$ https://login.example/?next=/ redirect;", "redirected to https://login.example/"),
        (f"{TLS} sub_filter_types *; sub_filter schemaVersion schemaVersioN;", "the bytes are not"),
        ("return 302 https://login.example/?next=/;", "redirected to https://login.example/\n"),
        ("default_type text/html; return 200 '<html>Welcome</html>';", "HTML in place of JSON: a web page"),
        (f"{TLS} if ($uri = /token) {{ return 301 /login; }}", "301: redirected to"),
    ],
)  # fmt: skip
def test_what_a_terminator_spoils_is_told(mirror: Mirror, rules: str, words: str) -> None:
    with spoiled(mirror, rules) as spoiler:
        assert words in told(spoiler.walk("nginx"))


@pytest.mark.parametrize(("address", "is_told"), [("", True), ("proxy_set_header X-Forwarded-For 203.0.113.7;", False)])
def test_a_terminator_that_does_not_say_who_asks_is_noted(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch, address: str, is_told: bool
) -> None:
    monkeypatch.setattr(check, "is_loopback", lambda _: False)  # as from another host
    with spoiled(mirror, TLS + address) as spoiler:
        ended = spoiler.walk("nginx")
    assert ended.exit_code == 0, ended.output
    assert ("the terminator sends no X-Forwarded-For" in ended.output) == is_told


def test_a_terminator_that_does_not_reach_the_mirror_is_told() -> None:
    with Spoiler("location / { proxy_pass http://127.0.0.1:9; }") as spoiler:
        shown = told(spoiler.walk())
    assert "502, and HTML in place of JSON" in shown
    assert "the terminator cannot reach the mirror" in shown


def test_a_page_in_place_of_a_token_is_told(mirror: Mirror) -> None:
    with spoiled(mirror, f"{TLS} if ($uri = /token) {{ return 200 '<html>'; }}") as spoiler:
        assert "something else in place of JSON" in told(spoiler.walk("nginx"))


# What is no good mirror


FOLLOWING = """\
location / {
    proxy_pass @REGISTRY@; proxy_ssl_verify off;
    proxy_intercept_errors on; error_page 307 = @storage; recursive_error_pages on;
}
location @storage { set $there $upstream_http_location; proxy_pass $there; proxy_ssl_verify off; }
"""


def test_authorization_that_is_passed_on_to_the_storage_host_is_told(hub: Hub) -> None:
    with Spoiler(FOLLOWING.replace("@REGISTRY@", hub.registry_url), hub.authority) as naive:
        shown = told(naive.walk("redis"))
    assert f"the realm is on another host, {hub.tokens.url.removeprefix('https://')}" in shown
    assert "400, and HTML" in shown
    assert "the mirror passed Authorization on to it" in shown


def test_a_mirror_that_redirects_its_clients_is_told_and_followed_without_authorization(hub: Hub) -> None:
    with Spoiler(f"location / {{ proxy_pass {hub.registry_url}; proxy_ssl_verify off; }}", hub.authority) as naive:
        shown = told(naive.walk("redis"))
    assert shown.count(f"the mirror sends the client on to {hub.cdn_url}") == 3, "config, and two layers"
    assert "digest verified" in shown


def test_a_limit_is_told_with_the_time_to_wait(hub: Hub) -> None:
    with Mirror(registries=hub.registries_file, pull_rate="1/h") as limited:
        shown = told(walk(limited.url, "hello-world", PLATFORM))
    assert "429: this mirror's limit for one client is 1/h manifests" in shown
    assert "Retry-After says: " in shown


def test_an_image_that_is_not_there_is_told_in_the_mirrors_words(mirror: Mirror, hub: Hub) -> None:
    assert "404: " in told(walk(mirror.url, "nothing/here"))
    assert "401: " in told(walk(mirror.url, "private/app"))
    with Mirror(registries=hub.registries_file, deny_images="docker.io/library/nginx") as strict:
        assert "this mirror does not serve docker.io/library/nginx" in told(walk(strict.url, "nginx"))


def test_a_client_that_is_refused_is_told_with_all_settings_that_refuse(hub: Hub) -> None:
    with Mirror(registries=hub.registries_file, deny_clients="127.0.0.1") as wary:
        shown = told(walk(wary.url))
    assert "403: " in shown
    for name in ("ALLOW_CLIENTS", "DENY_CLIENTS", "ALLOW_IMAGES", "DENY_IMAGES"):
        assert f"MIRROR_{name}" in shown


def test_a_user_agent_that_is_blocked_is_told_of(hub: Hub) -> None:
    with Mirror(registries=hub.registries_file, block_agents="docker-mirror-check") as wary:
        shown = told(walk(wary.url))
    assert " 404  ping" in shown
    assert "MIRROR_BLOCK_AGENTS" in shown


def test_a_registry_that_cannot_be_reached_is_told() -> None:
    with Mirror(env={"HTTPS_PROXY": "http://127.0.0.1:9"}) as cut_off:
        assert "502: " in told(walk(cut_off.url))


# A mirror that does as the test likes

DATA = os.urandom(2 * MIB)
LAYER = f"sha256:{hashlib.sha256(DATA).hexdigest()}"
CONFIG = b"{}"
IMAGE = {
    "schemaVersion": 2,
    "mediaType": DOCKER_MANIFEST,
    "config": {"digest": f"sha256:{hashlib.sha256(CONFIG).hexdigest()}", "size": len(CONFIG)},
    "layers": [{"digest": LAYER, "size": len(DATA)}],
}
MANIFEST = json.dumps(IMAGE).encode()
DIGEST = f"sha256:{hashlib.sha256(MANIFEST).hexdigest()}"
PATH = "/v2/library/busybox"
TYPE = {"Content-Type": DOCKER_MANIFEST, "Docker-Content-Digest": DIGEST}


def blob(whole: Callable[..., None] | bytes, part: Mapping[str, str] | None = None) -> Callable[[Request, Any], None]:
    """Return an answer that sends the end of the layer where it is asked for it, else does as it is told."""
    size = len(DATA)
    right = reply(206, DATA[-1:], part or {"Content-Range": f"bytes {size - 1}-{size - 1}/{size}"})

    def answer(request: Request, connection: Any) -> None:
        if "range" in request.headers:
            connection.sendall(right)
        elif isinstance(whole, bytes):
            connection.sendall(whole)
        else:
            whole(request, connection)

    return answer


@pytest.fixture
def fake() -> Iterator[RawUpstream]:
    """Run a mirror of one image in which nothing is wrong, until the test changes an answer."""
    with RawUpstream() as server:
        server.answers |= {
            "/v2/": refuse(f"{server.url}/token", "m", None),
            "/token": reply_json(200, {"token": "anonymous"}),
            f"{PATH}/manifests/latest": reply(200, MANIFEST, TYPE),
            f"{PATH}/manifests/{DIGEST}": reply(200, MANIFEST, TYPE),
            f"{PATH}/blobs/{IMAGE['config']['digest']}": reply(200, CONFIG),  # type: ignore[index]
            f"{PATH}/blobs/{LAYER}": blob(reply(200, DATA)),
        }
        yield server


def test_without_a_fault_nothing_is_told_and_the_default_image_is_busybox(fake: RawUpstream) -> None:
    ended = walk(fake.url)
    assert ended.exit_code == 0, ended.output
    assert ended.output.endswith(f"all is well: busybox comes through {fake.url}\n")
    assert {request.headers.get("authorization") for request in fake.requests[2:]} == {"Bearer anonymous"}
    (asked,) = fake.asked("/token")
    assert asked.target == "/token?service=m&scope=repository%3Alibrary%2Fbusybox%3Apull"


def test_a_blob_that_is_held_back_is_told_as_a_guess(fake: RawUpstream) -> None:
    def hold(request: Request, connection: Any) -> None:
        time.sleep(1.5)
        connection.sendall(reply(200, DATA))

    fake.answers[f"{PATH}/blobs/{LAYER}"] = blob(hold)
    shown = told(walk(fake.url))
    assert "perhaps: the first byte of 2097152 came after 1." in shown
    assert "\nmaybe " in shown


def test_a_blob_that_is_slow_to_begin_in_part_as_in_whole_is_not_held_back(fake: RawUpstream) -> None:
    answer = blob(reply(200, DATA))

    def slow(request: Request, connection: Any) -> None:
        time.sleep(1.5)
        answer(request, connection)

    fake.answers[f"{PATH}/blobs/{LAYER}"] = slow
    assert walk(fake.url).exit_code == 0


@pytest.mark.parametrize("buffers", [True, False])
def test_a_real_terminator_that_buffers_whole_blobs_is_told_and_another_is_not(
    fake: RawUpstream, buffers: bool
) -> None:
    def drip(request: Request, connection: Any) -> None:
        connection.sendall(reply(200, DATA[:MIB], {"Content-Length": str(len(DATA))}))
        time.sleep(1.5)
        connection.sendall(DATA[MIB:])

    needs("caddy")
    fake.answers |= {"/v2/": reply_json(200, {}), f"{PATH}/blobs/{LAYER}": blob(drip)}
    transport = "transport http {"
    changes = (transport, f"buffer_responses\n        {transport}") if buffers else ("", "")
    with Documented("caddyfile", fake, changes=changes) as caddy:
        ended = walk(caddy.url, f"--ca={caddy.ca_file}")
    assert ("the terminator buffers whole blobs" in ended.output) is buffers
    assert ended.exit_code == buffers


@pytest.mark.parametrize("name", ["Content-Type", "Docker-Content-Digest"])
def test_a_header_that_head_lacks_is_told(fake: RawUpstream, name: str) -> None:
    headers = {key: value for key, value in TYPE.items() if key != name}
    fake.answers[f"{PATH}/manifests/latest"] = reply(200, MANIFEST, headers)
    assert f"HEAD has no {name}" in told(walk(fake.url))


def test_a_length_that_head_lacks_or_tells_wrong_is_told(fake: RawUpstream) -> None:
    path = f"{PATH}/manifests/latest"
    fake.answers[path] = sends(reply(200, b"", TYPE | {"X-Unframed": "", "Connection": "close"}))
    assert "HEAD has no Content-Length" in told(walk(fake.url))
    fake.answers[path] = sends(reply(200, b"", TYPE | {"Content-Length": "7"}))
    assert f"7 bytes are told, {len(MANIFEST)} come" in told(walk(fake.url))


@pytest.mark.parametrize("seconds", [-300, 300])
def test_a_clock_that_is_wrong_is_told_once(fake: RawUpstream, seconds: int) -> None:
    then = datetime.now(UTC) + timedelta(seconds=seconds)
    answer = refuse(f"{fake.url}/token", "m", None)
    fake.answers["/v2/"] = answer.replace(b"\r\n", f"\r\nDate: {format_datetime(then, usegmt=True)}\r\n".encode(), 1)
    shown = told(walk(fake.url))
    assert "clock: by the Date header, the mirror's is " in shown
    assert ("behind this host's" if seconds < 0 else "ahead of this host's") in shown


@pytest.mark.parametrize("date", ["Mon, 01 Jan 99999999999 00:00:00 GMT", "Mon, 01 Jan 10000 00:00:00 GMT", "x"])
def test_a_date_that_is_none_is_no_clock(fake: RawUpstream, date: str) -> None:
    answer = refuse(f"{fake.url}/token", "m", None)
    fake.answers["/v2/"] = answer.replace(b"\r\n", f"\r\nDate: {date}\r\n".encode(), 1)
    assert walk(fake.url).exit_code == 0


def test_a_size_that_is_no_number_is_no_manifests(fake: RawUpstream) -> None:
    body = MANIFEST.replace(str(len(DATA)).encode(), b"1e999")
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    answer = reply(200, body, TYPE | {"Docker-Content-Digest": digest})
    fake.answers |= {f"{PATH}/manifests/{name}": answer for name in ("latest", digest)}
    assert "this is no manifest that dockerd knows" in told(walk(fake.url))


def test_a_token_that_was_issued_at_another_time_is_told(fake: RawUpstream) -> None:
    fake.answers["/token"] = reply_json(200, {"token": "anonymous", "issued_at": "2020-01-01T00:00:00Z"})
    assert "clock: by the token's issued_at, the mirror's is " in told(walk(fake.url))


@pytest.mark.parametrize(
    ("path", "answer", "words"),
    [
        ("/token", reply_json(200, {}), "the answer holds no token"),
        ("/token", reply(200, b"<html>", HTML), "HTML in place of JSON"),
        ("/token", reply(429, b"slow down"), "429: slow down"),
        ("/v2/", reply(401, b""), "401 without a Bearer challenge"),
        ("/v2/", reply(401, b"", {"WWW-Authenticate": 'Basic realm="x"'}), "401 without a Bearer challenge"),
        ("/v2/", reply(500, b"\x1b[31mred"), "500: [31mred"),
        (f"{PATH}/manifests/latest", reply(200, b"<html>", HTML), "HTML in place of a manifest"),
        (f"{PATH}/manifests/{DIGEST}", reply(200, b"<html>", HTML), "HTML in place of a manifest"),
        (f"{PATH}/manifests/{DIGEST}", reply(200, MANIFEST + b" ", TYPE), f"the bytes are not those of {DIGEST}"),
        (f"{PATH}/blobs/{LAYER}", blob(reply(200, DATA[:-1] + b"x")), "they are not those of"),
        (f"{PATH}/blobs/{LAYER}", blob(reply(200, DATA[:-1])), "2097151 bytes came"),
        (f"{PATH}/blobs/{LAYER}", blob(reply(200, b"<html>", HTML)), "It is HTML: a web page."),
        (f"{PATH}/blobs/{LAYER}", blob(reply(200, b"x", {"Content-Length": "2097152"})), "the connection broke off"),
        (f"{PATH}/blobs/{LAYER}", blob(reply(200, DATA), {"Content-Range": "bytes 0-0/1"}), "not honoured: 206"),
        (f"{PATH}/blobs/{LAYER}", reply(200, DATA), "Range is not honoured: 200 with Content-Range None"),
        (f"{PATH}/blobs/{LAYER}", reply_json(400, {"errors": []}), "the mirror passed Authorization on"),
    ],
)  # fmt: skip
def test_what_a_mirror_does_wrong_is_told(fake: RawUpstream, path: str, answer: Any, words: str) -> None:
    fake.answers[path] = answer
    assert words in told(walk(fake.url))


STEERS = "\x1b[31m"


@pytest.mark.parametrize(
    ("path", "answer", "words"),
    [
        ("/v2/", refuse("http://[::1", "m", None), "the answer makes no sense"),
        ("/v2/", refuse("http://a:99999/", "m", None), "the answer makes no sense"),
        ("/v2/", refuse(f"http://{STEERS}/", "m", None), ""),
        ("/v2/", reply(307, b"", {"Location": "http://[::1"}), "the answer makes no sense"),
        ("/v2/", reply(403, b'{"errors": [{"message": "\\u001b[31m"}]}'), "403: [31m"),
        ("/token", reply(200, b"[" * 100_000), "something else in place of JSON"),
        ("/token", reply(200, b"x" * 5_000_000), "the answer is longer than"),
        ("/token", reply_json(200, {"token": "a", "expires_in": STEERS, "issued_at": "0001-01-01T00:00:00"}), "clock"),
        (f"{PATH}/manifests/latest", reply(200, b"", TYPE | {"Docker-Content-Digest": STEERS}), "is no digest: [31m"),
        (f"{PATH}/blobs/{LAYER}", reply(307, b"", {"Location": "file:///etc/passwd"}), "the connection broke off"),
        (f"{PATH}/blobs/{LAYER}", reply(307, b"", {"Location": f"{PATH}/blobs/{LAYER}"}), "307: redirected to "),
    ],
)  # fmt: skip
def test_no_answer_breaks_the_check_or_steers_the_terminal(
    fake: RawUpstream, path: str, answer: bytes, words: str
) -> None:
    fake.answers[path] = answer
    shown = told(walk(fake.url))
    assert words in shown
    assert "\x1b" not in shown


def test_a_manifest_that_dockerd_does_not_know_is_told(fake: RawUpstream) -> None:
    body = b'{"schemaVersion": 1, "fsLayers": []}'
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    headers = {"Content-Type": "application/json", "Docker-Content-Digest": digest}
    fake.answers |= {f"{PATH}/manifests/{name}": reply(200, body, headers) for name in ("latest", digest)}
    shown = told(walk(fake.url))
    assert "Content-Type is no manifest's: application/json" in shown
    assert "this is no manifest that dockerd knows" in shown


def test_a_mirror_that_says_nothing_is_told(fake: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "SILENT_SECONDS", 0.5)
    fake.answers["/v2/"] = lambda request, connection: time.sleep(2)
    assert "the mirror was silent for 0.5 s" in told(walk(fake.url))


def test_a_realm_outside_the_secret_path_is_told(fake: RawUpstream) -> None:
    fake.answers["/s3cret/v2/"] = fake.answers["/v2/"]
    assert "the realm is not below the mirror's path" in told(walk(f"{fake.url}/s3cret"))
