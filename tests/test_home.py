"""The pages, as the server makes them: what they say, and what they never let through."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import bcrypt
import pytest
from hub import Hub
from hub import write_registries
from images import OCI_INDEX
from images import OCI_MANIFEST
from lab import DIGEST
from lab import Lab
from lab import Reply
from lab import ask
from lab import send_raw
from page import Page
from page import open_page
from processes import StartFailed
from processes import poll
from serving import ROOT
from serving import Mirror
from upstream import RawUpstream
from upstream import Request
from upstream import reply
from upstream import reply_json

from pages import Named
from pages import read_image
from pages import shown_size
from pages import sorted_tags
from settings import ConfigError
from settings import Home
from settings import parse_home

HOSTILE = "\"'><script>window.hit=1</script><img src=x onerror=window.hit=1>"
SEARCH = "/v1/search"
TAGS = "/v2/library/app/tags/list"


@pytest.fixture(scope="module")
def index() -> Iterator[RawUpstream]:
    with RawUpstream() as running:
        yield running


@pytest.fixture(scope="module")
def shared_lab(index: RawUpstream) -> Iterator[Lab]:
    denied = "me/secret,app:denied*"
    with Lab(more=f'search = "{index.url}"', deny_images=denied, public_url="https://mirror.example") as lab:
        yield lab


@pytest.fixture
def lab(shared_lab: Lab, index: RawUpstream) -> Lab:
    shared_lab.reset()
    index.answers.clear()
    index.requests.clear()
    return shared_lab


@pytest.fixture(scope="module")
def served(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mirror]:
    """Run a mirror of the hub that nobody else uses."""
    file = write_registries(tmp_path_factory.mktemp("home") / "registries.toml", {"docker.io": hub.table()})
    with Mirror(registries=file) as running:
        yield running


# Home


def test_the_page_speaks_the_browsers_language_or_the_one_that_is_chosen(lab: Lab) -> None:
    cases = {
        "en": "en",
        "zh-CN,zh;q=0.9,en;q=0.5": "zh-CN",
        "zh-TW": "zh-CN",
        "de": "en",
        "": "en",
        "en;q=0.1, zh": "zh-CN",
    }
    for asked, shown in cases.items():
        assert open_page(lab.mirror, "/", asked).root.get("lang") == shown
    assert open_page(lab.mirror, "/?lang=zh", "en").root.get("lang") == "zh-CN"
    assert open_page(lab.mirror, "/?lang=xx", "zh").root.get("lang") == "zh-CN"
    assert "Accept-Language" in open_page(lab.mirror).reply.headers["vary"]


def test_a_chosen_language_stays_chosen(lab: Lab) -> None:
    page = open_page(lab.mirror, "/?lang=zh&image=nginx:1")
    assert page.links["English"] == "?lang=en&image=nginx%3A1"
    assert page.links["nginx 的所有标签"] == "tags?image=nginx&lang=zh"
    assert [field.get("value") for field in page.root.iterfind(".//input[@name='lang']")] == ["zh", "zh"]


def test_both_languages_say_the_same_things() -> None:
    texts = [tomllib.loads((ROOT / f"templates/{lang}.toml").read_text()) for lang in ("en", "zh")]
    assert list(texts[0]) == list(texts[1])
    for key, text in texts[0].items():
        names = [
            sorted(part.partition("}")[0].partition(":")[0] for part in words[key].split("{")[1:]) for words in texts
        ]
        assert names[0] == names[1], text


def test_no_page_is_indexed_or_runs_anything_but_its_own_file(lab: Lab) -> None:
    for path in ("/", "/search", "/tags?image=app"):
        page = open_page(lab.mirror, path)
        headers = page.reply.headers
        assert "noindex" in headers["x-robots-tag"]
        assert headers["content-security-policy"].startswith("default-src 'none'; style-src 'self'; script-src 'self';")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert [meta.get("content") for meta in page.root.iterfind(".//meta[@name='robots']")] == ["noindex, nofollow"]
        assert [script.attrib for script in page.root.iterfind(".//script")] == [{"src": "page.js", "defer": ""}]
        assert page.texts(".//style") == []
    assert lab.ask("/robots.txt").body == b"User-agent: *\nDisallow: /\n"


@pytest.mark.parametrize(
    ("name", "kind"), [("page.css", "text/css"), ("page.js", "text/javascript"), ("icon.svg", "image/svg+xml")]
)
def test_the_files_of_a_page_come_from_the_mirror_and_are_kept_for_a_while(lab: Lab, name: str, kind: str) -> None:
    got = lab.ask(f"/{name}")
    assert got.headers["content-type"].startswith(kind)
    assert got.headers["cache-control"].startswith("max-age=")
    assert b"//" not in got.body.replace(b"http://www.w3.org/2000/svg", b"").replace(b"// ", b"")
    assert lab.ask(f"/{name}", {"If-None-Match": got.headers["etag"]}).status == 304


def test_the_mirrors_own_address_stands_in_every_snippet(lab: Lab) -> None:
    page = open_page(lab.mirror, "/?image=ghcr.io/owner/app:1")
    assert page.text("pull") == "docker pull mirror.example/ghcr.io/owner/app:1"
    assert page.text("retag").splitlines() == [
        "docker tag mirror.example/ghcr.io/owner/app:1 ghcr.io/owner/app:1",
        "docker rmi mirror.example/ghcr.io/owner/app:1",
    ]
    assert json.loads(page.text("dockerd-file")) == {"registry-mirrors": ["https://mirror.example"]}
    assert page.text("containerd-file-file") == "/etc/containerd/certs.d/ghcr.io/hosts.toml"
    hosts = tomllib.loads(page.text("containerd-file"))
    assert hosts == {"host": {"https://mirror.example": {"capabilities": ["pull", "resolve"]}}}
    assert tomllib.loads(page.text("podman-file")) == {
        "registry": [{"location": "ghcr.io", "mirror": [{"location": "mirror.example/ghcr.io"}]}]
    }
    assert tomllib.loads(page.text("buildkit-file")) == {"registry": {"ghcr.io": {"mirrors": ["mirror.example"]}}}
    assert page.text("k3s-file").split() == ["mirrors:", '"ghcr.io":', "endpoint:", "-", '"https://mirror.example"']
    assert page.text("containerd-run").endswith(" ghcr.io/owner/app:1")


def test_by_plain_http_each_snippet_says_so_and_the_page_warns() -> None:
    with Lab() as lab:
        page = open_page(lab.mirror)
        settings = {"registry-mirrors": [lab.mirror.url], "insecure-registries": [lab.mirror.host]}
        assert json.loads(page.text("dockerd-file")) == settings
        mirrors = tomllib.loads(page.text("podman-file"))["registry"][0]["mirror"]
        assert mirrors == [{"location": f"{lab.mirror.host}/docker.io", "insecure": True}]
        assert tomllib.loads(page.text("buildkit-file"))["registry"][lab.mirror.host] == {"http": True}
        assert "plain HTTP" in " ".join(page.texts(".//div[@class='note']"))
        behind_tls = {"X-Forwarded-Proto": "https", "Host": "m.example"}
        page = Page(lab.ask("/", behind_tls))
        assert json.loads(page.text("dockerd-file")) == {"registry-mirrors": ["https://m.example"]}
        assert page.texts(".//div[@class='note']") == []


@pytest.mark.parametrize(
    ("typed", "command"),
    [
        ("", "nginx"),
        ("redis", "redis"),
        ("library/redis:7", "redis:7"),
        ("docker.io/me/app", "docker.io/me/app"),
        ("docker pull --platform linux/arm64 quay.io/a/b:c", "quay.io/a/b:c"),
        ("$ sudo docker image pull -q nginx:1 ", "nginx:1"),
        ("mirror.example/ghcr.io/a/b", "ghcr.io/a/b"),
        (f"app@{DIGEST}", f"app@{DIGEST}"),
    ],
)
def test_what_is_typed_becomes_a_command(lab: Lab, typed: str, command: str) -> None:
    page = open_page(lab.mirror, f"/?image={quote(typed)}")
    assert page.text("pull") == f"docker pull mirror.example/{command}"
    assert page.value("image") == typed
    assert page.problem == ""


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("docker://ghcr.io/a/b:1", ("ghcr.io/a/b", "1", "")),
        ("https://hub.docker.com/_/nginx", ("nginx", "", "")),
        ("https://hub.docker.com/r/me/app/", ("me/app", "", "")),
        (f"a/b:1@{DIGEST}", ("a/b", "1", DIGEST)),
        ("localhost:5000/app", ("localhost:5000/app", "", "")),
        ("docker pull --platform=linux/amd64 -a app", ("app", "", "")),
        ("podman pull --creds a:b --quiet app", ("app", "", "")),
        ("docker pull", ("", "", "")),
        ("  ", ("", "", "")),
    ],
)
def test_a_line_is_read_as_docker_reads_it(typed: str, named: tuple[str, str, str]) -> None:
    assert read_image(typed) == Named(*named)


@pytest.mark.parametrize(
    "typed", ["NGINX", "a//b", "nginx:sha256:x", "nginx@sha256:1", "-", "docker pull", "ä", "a" * 500, HOSTILE]
)
def test_what_is_no_image_is_told_in_one_sentence(lab: Lab, typed: str) -> None:
    page = open_page(lab.mirror, f"/?image={quote(typed)}")
    assert page.problem.startswith("This is no name of an image")
    assert not page.has("pull")


@pytest.mark.parametrize("typed", ["unknown.example/a", "me/secret", "app:denied-1"])
def test_what_is_not_served_is_told_in_one_sentence(lab: Lab, typed: str) -> None:
    assert open_page(lab.mirror, f"/?image={typed}").problem.startswith("This mirror does not serve that image")


def test_the_registries_are_named_as_the_mirror_knows_them(lab: Lab) -> None:
    rows = {row[0]: row[1:] for row in open_page(lab.mirror).rows()}
    assert rows["docker.io"] == ["mirror.example/…", "docker.mirror.example"]
    assert rows["registry.k8s.io"] == ["mirror.example/registry.k8s.io/…", "k8s.mirror.example"]
    assert len(rows) == 13


def test_below_a_secret_path_only_what_can_have_one_is_shown() -> None:
    """No image's name can hold the path; k3s wants the API's path behind it."""
    with Lab(public_url="https://mirror.example", path_prefix="/s3cret") as lab:
        page = ask(lab.mirror, "/s3cret/?image=nginx").body.decode()
    assert "https://mirror.example/s3cret&#34;]" in page
    assert "https://mirror.example/s3cret/v2" in page
    assert "mirror.example/s3cret/nginx" not in page
    assert "mirror.example/nginx" not in page
    assert "registries.conf" not in page


def test_a_host_of_one_registry_shows_that_registry_alone() -> None:
    with Lab(more='hosts = ["hub.example"]') as lab:
        page = Page(lab.ask("/", {"Host": "hub.example"}))
        assert [row[0] for row in page.rows()] == ["docker.io"]
        page = Page(lab.ask("/?image=owner/app", {"Host": "ghcr.mirror.example"}))
        assert page.text("pull") == "docker pull ghcr.mirror.example/owner/app"
        assert not page.has("dockerd-file"), "dockerd knows mirrors of Docker Hub only"


def test_where_the_default_is_no_docker_hub_dockerd_has_no_mirror() -> None:
    with Lab(default="quay.io") as lab:
        page = open_page(lab.mirror)
        assert page.text("pull") == f"docker pull {lab.mirror.host}/owner/image"
        assert not page.has("dockerd-file")
        page = open_page(lab.mirror, "/?image=docker.io/nginx")
        assert page.text("pull") == f"docker pull {lab.mirror.host}/docker.io/nginx"


@pytest.mark.parametrize(("login", "words"), [("on", "Public images need no login"), ("off", "None is needed")])
def test_whether_a_login_is_possible_is_said(login: str, words: str) -> None:
    with Lab(login=login) as lab:
        assert any(words in text for text in open_page(lab.mirror).texts(".//section/p"))


def test_the_mirrors_own_users_log_in_to_see_the_pages(tmp_path: Path) -> None:
    file = tmp_path / "htpasswd"
    file.write_text(f"bob:{bcrypt.hashpw(b'builder', bcrypt.gensalt(4)).decode()}\n")
    login = {"Authorization": "Basic " + base64.b64encode(b"bob:builder").decode()}
    wrong = {"Authorization": "Basic " + base64.b64encode(b"bob:x").decode()}
    with Lab(users=file) as lab:
        for path in ("/", "/search?q=x", "/tags?image=app"):
            for headers in ({}, wrong):
                refused = lab.ask(path, headers)
                assert (refused.status, refused.headers["www-authenticate"]) == (401, 'Basic realm="docker-mirror"')
        assert lab.upstream.requests == []
        page = Page(lab.ask("/", login))
        assert any("as a user of this mirror" in text for text in page.texts(".//section/p"))
        lab.upstream.answers[TAGS] = reply_json(200, {"tags": ["1"]})
        assert [row[0] for row in Page(lab.ask("/tags?image=app", login)).rows()] == ["1"]
        assert all("authorization" not in request.headers for request in lab.upstream.requests)


def test_a_client_that_may_not_pull_sees_no_page() -> None:
    with Lab(allow_clients="192.0.2.0/24") as lab:
        for path in ("/", "/search?q=x", "/tags?image=app", "/robots.txt"):
            assert lab.ask(path, {"X-Forwarded-For": "198.51.100.1"}).status == 403
        assert lab.ask("/", {"X-Forwarded-For": "192.0.2.1"}).status == 200


@pytest.mark.parametrize("host", ['"><script>x</script>', "a b", "<b>", "a'b", "é"])
def test_a_hostile_host_header_is_refused(lab: Lab, host: str) -> None:
    got = send_raw(lab.mirror, f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert got.startswith(b"HTTP/1.1 400")
    assert host.encode() not in got.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize(
    "path", ["/?image={}", "/?lang={}&image=a", "/search?q={}", "/tags?image={}", "/tags?image=app&filter={}", "/?{}=1"]
)
def test_nothing_of_a_request_becomes_a_part_of_the_page(lab: Lab, path: str) -> None:
    lab.upstream.answers[TAGS] = reply_json(200, {"tags": ["1"]})
    page = open_page(lab.mirror, path.format(quote(HOSTILE)))
    assert len(page.texts(".//script")) == 1
    assert [image.get("src") for image in page.root.iterfind(".//img")] == ["icon.svg"]


# Search


def found(*names: str, pages: object = 1, description: object = "") -> bytes:
    results = [{"name": name, "description": description, "star_count": 7, "is_official": True} for name in names]
    return reply_json(200, {"num_pages": pages, "results": results})


def test_names_are_found_in_pages(lab: Lab, index: RawUpstream) -> None:
    index.answers[SEARCH] = found("nginx", "me/nginx", pages=3, description="A <b>server</b>.")
    page = open_page(lab.mirror, "/search?q=nginx%20x&page=2")
    assert index.requests[0].target == "/v1/search?q=nginx+x&n=20&page=2"
    assert page.links["me/nginx"] == "tags?image=me%2Fnginx"
    assert "A <b>server</b>." in page.texts(".//li/p")
    assert (page.links["Previous"], page.links["Next"]) == ("?q=nginx+x&page=1", "?q=nginx+x&page=3")
    assert page.value("q") == "nginx x"


def test_what_may_not_be_pulled_or_is_no_name_is_not_found(lab: Lab, index: RawUpstream) -> None:
    index.answers[SEARCH] = found("me/secret", "NO/NAME", "<script>", "ghcr.io/me/app", "a/b", "unknown.example/a")
    assert open_page(lab.mirror, "/search?q=x").texts(".//li/p/a") == ["a/b"]


def test_without_a_word_nobody_is_asked(lab: Lab, index: RawUpstream) -> None:
    assert open_page(lab.mirror, "/search?q=%20").problem == ""
    assert index.requests == []


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (reply(429, b"slow down", {"Content-Type": "text/plain", "Retry-After": "9"}), 503, "limits this mirror"),
        (reply(503, b"<html>"), 502, "does not answer"),
        (reply(200, b"<html>"), 502, "does not answer"),
        (reply_json(200, ["x"]), 502, "does not answer"),
        (reply_json(200, {"results": 1}), 502, "does not answer"),
        (reply(200, b'{"results":' + b"[" * 100_000), 502, "does not answer"),
        (reply(200, b"x", {"Content-Length": "9"}), 502, "does not answer"),
    ],
)
def test_an_index_that_fails_is_one_plain_sentence(
    lab: Lab, index: RawUpstream, answer: bytes, status: int, words: str
) -> None:
    index.answers[SEARCH] = answer
    page = open_page(lab.mirror, "/search?q=x")
    assert page.reply.status == status
    assert words in page.problem
    assert page.reply.headers.get("retry-after") == ("9" if status == 503 else None)


@pytest.mark.parametrize("odd", [{"name": 1}, "x", None, {"name": "a", "star_count": "many", "description": ["x"]}])
def test_odd_results_are_left_out_or_shown_plainly(lab: Lab, index: RawUpstream, odd: object) -> None:
    index.answers[SEARCH] = reply_json(200, {"num_pages": -1, "results": [odd, {"name": "good"}]})
    assert "good" in open_page(lab.mirror, "/search?q=x").texts(".//li/p/a")


def test_a_registry_without_an_index_says_so() -> None:
    with Lab() as lab:
        page = Page(lab.ask("/search?q=x", {"Host": "ghcr.mirror.example"}))
        assert (page.reply.status, page.problem) == (404, "This registry has no index to search.")
        assert not Page(lab.ask("/", {"Host": "ghcr.mirror.example"})).has("search-title")


# Tags


def test_the_tags_of_a_real_registry_with_size_and_platforms(served: Mirror, hub: Hub) -> None:
    image = hub.repositories["bitnami/postgresql"]
    size = shown_size(sum(blob.size for blob in sizes(image.images[0].manifest.data)))
    rows = open_page(served, "/tags?image=bitnami/postgresql").rows()
    assert rows == [["latest", size, "linux/amd64 linux/arm64"], ["16", size, "linux/amd64 linux/arm64"]]
    rows = open_page(served, "/tags?image=nginx").rows()
    assert [row[0] for row in rows] == ["latest", "1.28", "1.27", "alpine"]
    assert {row[2] for row in rows} == {"linux/amd64"}


class Part:
    """Hold the size of a part of an image."""

    def __init__(self, size: int):
        self.size = size


def sizes(manifest: bytes) -> list[Part]:
    content = json.loads(manifest)
    return [Part(part["size"]) for part in (content["config"], *content["layers"])]


def manifest_of(lab: Lab, tag: str, name: str = "app", **headers: str) -> str:
    """Let the upstream have an image of two platforms under a tag; return the digest."""
    base = f"/v2/library/{name}/manifests/"
    layers = [{"digest": DIGEST, "size": 2_000_000}]
    inner = json.dumps({"config": {"digest": DIGEST, "size": 7}, "layers": layers}).encode()
    platforms = [("amd64", "linux"), ("arm64", "linux"), ("unknown", "unknown")]
    entries = [
        {"digest": digest(inner), "platform": {"architecture": architecture, "os": system}}
        for architecture, system in platforms
    ]
    outer = json.dumps({"tag": tag, "manifests": entries}).encode()
    for content, kind in ((inner, OCI_MANIFEST), (outer, OCI_INDEX)):
        more = {"Docker-Content-Digest": digest(content), "Content-Type": kind, **headers}
        lab.upstream.answers[base + digest(content)] = reply(200, content, more)
    lab.upstream.answers[base + tag] = lab.upstream.answers[base + digest(outer)]
    return digest(outer)


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def asked(lab: Lab, method: str) -> int:
    return len(
        [request for request in lab.upstream.requests if request.method == method and "/manifests/" in request.path]
    )


def test_only_the_tags_on_the_page_are_looked_at_and_each_digest_once(lab: Lab) -> None:
    tags = [f"1.{number}" for number in range(25)]
    for tag in tags:
        manifest_of(lab, tag)
    lab.upstream.answers[TAGS] = reply_json(200, {"tags": tags})
    page = open_page(lab.mirror, "/tags?image=app&page=2")
    assert page.rows() == [[f"1.{number}", "2.0 MB", "linux/amd64 linux/arm64"] for number in range(14, 4, -1)]
    assert (page.links["Previous"], page.links["Next"]) == ("?image=app&page=1", "?image=app&page=3")
    assert page.links["1.9"] == "./?image=app%3A1.9"
    assert (asked(lab, "HEAD"), asked(lab, "GET")) == (10, 20)
    open_page(lab.mirror, "/tags?image=app&page=2")
    assert (asked(lab, "HEAD"), asked(lab, "GET")) == (20, 20), "a digest is known for ever"


@pytest.mark.parametrize(
    ("remaining", "manifests"), [("79;w=21600", 0), ("80;w=21600", 0), ("81;w=21600", 2), ("x", 2)]
)
def test_of_a_registrys_quota_four_fifths_are_for_pulls(lab: Lab, remaining: str, manifests: int) -> None:
    tag = f"of-{remaining[:2]}"
    manifest_of(lab, tag, **{"RateLimit-Limit": "100;w=21600", "RateLimit-Remaining": remaining})
    lab.upstream.answers[TAGS] = reply_json(200, {"tags": [tag]})
    page = open_page(lab.mirror, "/tags?image=app")
    assert asked(lab, "GET") == manifests
    assert page.rows() == [[tag, "2.0 MB", "linux/amd64 linux/arm64"] if manifests else [tag, "not known", "not known"]]
    assert any("limit of pulls" in text for text in page.texts(".//p")) is not bool(manifests)


def test_what_a_page_asks_for_counts_as_pulls_of_the_client() -> None:
    with Lab(pull_rate="3/h") as lab:
        tags = [f"1.{number}" for number in range(8)]
        for tag in tags:
            manifest_of(lab, tag)
        lab.upstream.answers |= {TAGS: reply_json(200, {"tags": tags}), "/v2/": reply_json(200, {})}
        assert sorted({row[1] for row in open_page(lab.mirror, "/tags?image=app").rows()}) == ["2.0 MB", "not known"]
        assert lab.ask("/v2/app/manifests/1.1").status == 429


def test_the_cache_keeps_what_a_page_asked_for(tmp_path: Path) -> None:
    with Lab(cache_dir=tmp_path / "cache") as lab:
        name = manifest_of(lab, "1")
        lab.upstream.answers |= {TAGS: reply_json(200, {"tags": ["1"]}), "/v2/": reply_json(200, {})}
        assert open_page(lab.mirror, "/tags?image=app").rows() == [["1", "2.0 MB", "linux/amd64 linux/arm64"]]
        assert lab.ask(f"/v2/app/manifests/{name}").headers["x-cache"] == "HIT"


def test_the_tags_are_filtered_and_those_that_may_not_be_pulled_are_left_out(lab: Lab) -> None:
    lab.upstream.answers[TAGS] = reply_json(
        200, {"tags": ["1", "denied-1", "no tag", "<b>", 7, "2-alpine", "3-alpine"]}
    )
    assert [row[0] for row in open_page(lab.mirror, "/tags?image=app").rows()] == ["3-alpine", "2-alpine", "1"]
    assert [row[0] for row in open_page(lab.mirror, "/tags?image=app&filter=2-").rows()] == ["2-alpine"]
    page = open_page(lab.mirror, f"/tags?image=app&filter={quote(HOSTILE)}")
    assert page.texts(".//main/p")[-1] == "There are no such tags."


def test_a_list_in_parts_is_read_whole_and_to_a_bound(lab: Lab) -> None:
    def part(request: Request, connection: object) -> bytes:
        number = int(re.findall("last=([0-9]+)", request.target)[0]) if "last=" in request.target else 0
        link = {"Link": f'</v2/library/app/tags/list?last={number + 1}&n=2>; rel="next"'}
        return reply_json(200, {"tags": [f"1.{number}"]}, link if number < ends else {})

    lab.upstream.answers[TAGS] = lambda request, connection: connection.sendall(part(request, connection))
    ends = 3
    assert len(open_page(lab.mirror, "/tags?image=app").rows()) == 4
    ends = 99
    assert "the first 10 tags" in open_page(lab.mirror, "/tags?image=app").texts(".//p")


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (reply_json(404, {"errors": [{"code": "NAME_UNKNOWN"}]}), 404, "no such public image"),
        (reply_json(403, {"errors": [{"code": "DENIED"}]}), 404, "no such public image"),
        (reply(429, b""), 503, "limits this mirror"),
        (reply(500, b""), 502, "does not answer"),
        (reply(200, b"[]"), 502, "does not answer"),
        (reply_json(200, {"tags": 1}), 502, "does not answer"),
    ],
)
def test_a_registry_that_fails_is_one_plain_sentence(lab: Lab, answer: bytes, status: int, words: str) -> None:
    lab.upstream.answers[TAGS] = answer
    page = open_page(lab.mirror, "/tags?image=app")
    assert page.reply.status == status
    assert words in page.problem


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[]",
        b'{"manifests": [1]}',
        b'{"manifests": [{"digest": "../x"}]}',
        b'{"config": {}, "layers": []}',
        b"[" * 9999,
    ],
)
def test_a_manifest_that_is_none_leaves_its_row_empty(lab: Lab, manifest: bytes) -> None:
    lab.upstream.answers[TAGS] = reply_json(200, {"tags": ["odd"]})
    headers = {"Docker-Content-Digest": digest(manifest), "Content-Type": OCI_MANIFEST}
    for reference in ("odd", digest(manifest)):
        lab.upstream.answers[f"/v2/library/app/manifests/{reference}"] = reply(200, manifest, headers)
    ((tag, size, _),) = open_page(lab.mirror, "/tags?image=app").rows()
    assert (tag, size) == ("odd", "not known")


def test_tags_stand_as_people_look_for_them() -> None:
    tags = ["alpine", "1.9", "sha256-ab.sig", "v2", "1.10-a", "latest", "1.10"]
    assert sorted_tags(tags) == ["latest", "v2", "1.10", "1.10-a", "1.9", "alpine", "sha256-ab.sig"]


def test_sizes_are_for_people() -> None:
    shown = {0: "0 B", 999: "999 B", 1500: "1.5 kB", 72_000_000: "72 MB", 999_600: "1.0 MB", 1_234_000_000: "1.2 GB"}
    assert {size: shown_size(size) for size in shown} == shown


# What stands at /


@pytest.mark.parametrize(
    "text", ["", "x", "usage:", "nginx:x", "redirect", "redirect:", "proxy:ftp://a", "proxy:https://u:p@a"]
)
def test_another_home_stops_the_start(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be|URL"):
        parse_home(text)


def test_a_home_is_written_as_it_is_read() -> None:
    for text in ("usage", "nginx", "none", "redirect:https://a.example/x", "proxy:http://127.0.0.1:80"):
        assert str(parse_home(text)) == text
    assert parse_home(" Proxy: https://a.example/ ") == Home("proxy", "https://a.example")
    with pytest.raises(StartFailed, match="MIRROR_HOME: must be one of"), Mirror(home="x"):
        pass
    assert issubclass(ConfigError, Exception)


def looks_like_nginx(got: Reply, status: int) -> bool:
    """Tell whether an answer shows nothing but nginx."""
    ours = [name for name in got.headers if name.startswith(("access-", "docker-", "x-", "content-sec"))]
    title = b"Welcome to nginx!" if status == 200 else b"<hr><center>nginx</center>"
    return (got.status, got.headers["server"], ours) == (status, "nginx", []) and title in got.body


def test_as_nginx_only_the_api_is_another() -> None:
    with Lab(home="nginx") as lab:
        lab.upstream.answers["/v2/"] = reply_json(200, {})
        assert looks_like_nginx(lab.ask("/"), 200)
        assert lab.ask("/").headers["content-length"] == "615"
        for path in ("/nothing", "/search", "/page.css", "/v3/"):
            assert looks_like_nginx(lab.ask(path), 404)
        assert looks_like_nginx(lab.ask("/", method="POST"), 405)
        assert looks_like_nginx(lab.ask("/", {"Host": "<b>"}), 400)
        assert looks_like_nginx(lab.ask("//x"), 400)
        assert lab.ask("/v2/").json == {}
        assert lab.ask("/v2/nothing").code == "NOT_FOUND"
        assert lab.ask("/healthz").json == {"status": "ok"}
        assert b"Disallow" in lab.ask("/robots.txt").body
        again = lab.ask("/", {"If-None-Match": lab.ask("/").headers["etag"]})
        assert (again.status, again.headers["server"]) == (304, "nginx")


def test_with_no_home_there_is_nothing() -> None:
    with Lab(home="none") as lab:
        for path in ("/", "/search", "/tags", "/page.css"):
            assert (lab.ask(path).status, lab.ask(path).code) == (404, "NOT_FOUND")
        assert b"Disallow" in lab.ask("/robots.txt").body


def test_a_browser_is_sent_elsewhere() -> None:
    with Lab(home="redirect:https://a.example/x") as lab:
        got = lab.ask("/")
        assert (got.status, got.headers["location"]) == (302, "https://a.example/x")
        assert "noindex" in got.headers["x-robots-tag"]


@pytest.fixture(scope="module")
def site() -> Iterator[RawUpstream]:
    with RawUpstream("127.0.0.12") as running:
        yield running


@pytest.fixture(scope="module")
def shared_front(site: RawUpstream) -> Iterator[Lab]:
    with Lab(home=f"proxy:{site.url}") as lab:
        yield lab


@pytest.fixture
def front(shared_front: Lab, site: RawUpstream) -> Lab:
    shared_front.reset()
    site.answers.clear()
    site.requests.clear()
    return shared_front


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/_/nginx",
        "/r/me/app?x=1",
        "/v2/repositories/library/nginx/tags/?page=2",
        "/v2/search/repositories/",
        "/v2/orgs/x",
        "/v2/users/x",
        "/v2/categories",
        "/static/a%20b.js",
        "/api/x",
    ],
)
def test_another_site_stands_here_with_its_api(front: Lab, site: RawUpstream, path: str) -> None:
    site.default = reply(200, b"<p>theirs</p>", {"Content-Type": "text/html", "Set-Cookie": "a=b", "X-Odd": "1"})
    secret = {"Cookie": "c=d", "Authorization": "Basic QTpC", "X-Odd": "1", "Accept-Language": "zh"}
    got = front.ask(path, secret)
    assert (got.status, got.body, got.headers["content-type"]) == (200, b"<p>theirs</p>", "text/html")
    assert "noindex" in got.headers["x-robots-tag"]
    assert not {"set-cookie", "x-odd"} & set(got.headers)
    (request,) = site.requests
    assert request.target == path
    assert request.headers["accept-language"] == "zh"
    assert not {"cookie", "authorization", "x-odd"} & set(request.headers)
    assert front.upstream.requests == []


@pytest.mark.parametrize("name", ["search/app", "users/app", "orgs/app", "repositories/app", "categories/app"])
def test_an_owner_of_that_name_can_still_be_pulled_from(front: Lab, site: RawUpstream, name: str) -> None:
    front.upstream.answers[f"/v2/{name}/manifests/latest"] = reply_json(200, {"right": True})
    assert front.ask(f"/v2/{name}/manifests/latest").json == {"right": True}
    assert site.requests == []


@pytest.mark.parametrize("path", ["/v2/nothing", "/v2/repositoriesx/a", "/a/../b", "/v2/%2e%2e/users"])
def test_nothing_else_goes_to_the_site(front: Lab, site: RawUpstream, path: str) -> None:
    assert front.ask(path).status == 404
    assert site.requests == []


def test_a_site_is_only_read(front: Lab, site: RawUpstream) -> None:
    for method in ("POST", "PUT", "DELETE"):
        assert front.ask("/r/x", method=method).status == 405
    assert site.requests == []
    site.default = reply(200, b"x" * 10)
    got = front.ask("/r/x", method="HEAD")
    assert (got.status, got.body, site.requests[0].method) == (200, b"", "HEAD")


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("/_/nginx", "/_/nginx"),
        ("{site}/r/x?y", "/r/x?y"),
        ("{site}", "/"),
        ("https://other.example/x", "https://other.example/x"),
        ("http://127.0.0.12/x", "http://127.0.0.12/x"),
    ],
)
def test_a_redirect_is_the_browsers_to_follow(front: Lab, site: RawUpstream, location: str, shown: str) -> None:
    site.default = reply(302, b"", {"Location": location.format(site=site.url)})
    got = front.ask("/r/y")
    assert (got.status, got.headers["location"]) == (302, shown.format(site=site.url))
    assert len(site.requests) == 1


@pytest.mark.parametrize("location", ["http://a:99999999/", "javascript:x", "//u:p@a/", "http://[::1"])
def test_a_redirect_that_is_none_is_not_passed_on(front: Lab, site: RawUpstream, location: str) -> None:
    site.default = reply(302, b"", {"Location": location})
    assert (front.ask("/r/y").status, front.ask("/r/y").code) == (502, "UNAVAILABLE")


def test_a_site_that_fails_is_no_page_of_ours(front: Lab, site: RawUpstream) -> None:
    site.default = reply(500, b"<html>")
    assert (front.ask("/").status, front.ask("/").code) == (502, "UNAVAILABLE")
    site.default = reply(404, b"theirs")
    assert (front.ask("/x").status, front.ask("/x").body) == (404, b"theirs")
    site.default = b"HTTP/1.1 200 OK\r\n\r\nno length"
    assert front.ask("/").status == 502


def test_a_page_without_end_is_cut(front: Lab, site: RawUpstream) -> None:
    def answer(request: Request, connection: object) -> None:
        send = connection.sendall  # type: ignore[attr-defined]
        send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(40):
            send(b"100000\r\n" + b"x" * (1 << 20) + b"\r\n")

    site.answers["/"] = answer
    received = send_raw(front.mirror, b"GET / HTTP/1.1\r\nHost: m\r\nConnection: close\r\n\r\n")
    assert len(received) < 34 << 20
    assert not received.endswith(b"0\r\n\r\n")


# Readiness


def test_ready_is_who_reaches_the_default_registry_and_its_disk(tmp_path: Path) -> None:
    with Lab(cache_dir=tmp_path / "cache", allow_clients="192.0.2.1") as lab:
        lab.upstream.answers["/v2/"] = reply_json(200, {})
        assert lab.ask("/readyz").json == {"status": "ok", "registry": "ok", "cache": "ok"}
        for _ in range(5):
            lab.ask("/readyz")
        assert len(lab.upstream.asked("/v2/")) == 1, "it is remembered for some seconds"


def test_a_registry_that_asks_for_a_token_is_reached() -> None:
    with Lab() as lab:
        lab.upstream.answers["/v2/"] = reply(401, b"", {"WWW-Authenticate": f'Bearer realm="{lab.upstream.url}/realm"'})
        assert (lab.ask("/readyz").status, lab.ask("/readyz").json) == (200, {"status": "ok", "registry": "ok"})


def test_not_ready_is_said_with_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with Lab(cache_dir=folder) as lab:
        lab.upstream.answers["/v2/"] = reply(503, b"")
        assert poll((folder / "evict").exists, 5), "the worker has tidied at its start"
        shutil.rmtree(folder)
        folder.touch()
        got = lab.ask("/readyz")
        assert (got.status, got.json) == (503, {"status": "failing", "registry": "fails", "cache": "fails"})
        assert "not ready" in lab.mirror.log()
        lab.upstream.answers["/v2/"] = reply_json(200, {})
        folder.unlink()
        folder.mkdir()
        assert poll(lambda: lab.ask("/readyz").status == 200, 30, 0.5)


def test_one_endpoint_that_answers_is_enough() -> None:
    with RawUpstream("127.0.0.13") as dead, Lab() as lab:
        dead.default = reply(500, b"")
        file = lab.mirror.log_file.parent / "two.toml"
        write_registries(file, {"docker.io": {"endpoints": [dead.url, lab.upstream.url]}})
        lab.upstream.answers["/v2/"] = reply_json(200, {})
        with Mirror(registries=file) as mirror:
            assert ask(mirror, "/readyz").json == {"status": "ok", "registry": "ok"}


# Packaging


MAKE_A_PAGE = """
import mirror, settings
page = mirror.create_app(settings.Config()).test_client().get("/?lang=zh")
print(mirror.__file__, page.status_code, page.get_data(as_text=True).count("</html>"))
"""


def test_an_installed_mirror_has_its_pages(tmp_path: Path) -> None:
    source, wheels, installed = (tmp_path / name for name in ("source", "wheels", "installed"))
    source.mkdir()
    for path in (
        *ROOT.glob("*.py"),
        *(ROOT / name for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")),
    ):
        shutil.copy(path, source)
    shutil.copytree(ROOT / "templates", source / "templates")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source)
    pip("install", "--no-deps", "--target", installed, *wheels.iterdir())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MIRROR_")}
    command = [sys.executable, "-c", MAKE_A_PAGE]
    shown = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": str(installed)},
        cwd=tmp_path,
        check=True,
    )
    assert shown.stdout.split() == [str(installed / "mirror.py"), "200", "1"]


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
