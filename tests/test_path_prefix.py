"""A mirror under a secret path: all is served below it, and elsewhere nothing tells that a mirror is here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from clients import Dockerd
from clients import Skopeo
from conftest import needs
from hub import PASSWORD
from hub import USER
from hub import Hub
from lab import DIGEST
from lab import Lab
from lab import reply_json
from lab import send_raw
from processes import poll
from pulls import pulled_by_containerd
from serving import Mirror

SECRET = "/s3cret"
NAMES = b"registry", b"Docker", b"docker", b"mirror", b"errors", b"s3cret"  # what would tell


@pytest.fixture(scope="module")
def shared_lab() -> Iterator[Lab]:
    with Lab(path_prefix=SECRET) as lab:
        yield lab


@pytest.fixture
def lab(shared_lab: Lab) -> Lab:
    shared_lab.reset()
    return shared_lab


@pytest.fixture(scope="module")
def hidden(hub: Hub) -> Iterator[Mirror]:
    with Mirror(registries=hub.registries_file, path_prefix=SECRET) as running:
        yield running


# Below the path


def test_all_is_served_below_the_path(lab: Lab) -> None:
    lab.upstream.answers[lab.manifest] = reply_json(200, {"schemaVersion": 2})
    assert lab.ask(f"{SECRET}/healthz").json == {"status": "ok"}
    assert lab.ask(f"{SECRET}/v2/").headers["docker-distribution-api-version"] == "registry/2.0"
    assert lab.ask(f"{SECRET}/v2").status == 200
    assert lab.ask(f"{SECRET}/token").json["token"] == "anonymous"
    assert lab.ask(f"{SECRET}{lab.path}").json == {"schemaVersion": 2}
    assert [request.target for request in lab.upstream.requests] == ["/v2/", lab.manifest]


def test_what_is_not_served_below_the_path_is_an_oci_error_as_ever(lab: Lab) -> None:
    assert lab.ask(f"{SECRET}/v3/").code == "NOT_FOUND"
    assert lab.ask(f"{SECRET}/v2/APP/manifests/latest").code == "NAME_INVALID"
    assert b"<title>" in lab.ask(SECRET).body, "the home page"
    assert lab.ask(f"{SECRET}//v2/").code == "NAME_INVALID"


def test_the_link_to_the_next_page_holds_the_path(lab: Lab) -> None:
    link = {"Link": '</v2/library/app/tags/list?last=b&n=2>; rel="next"'}
    lab.upstream.answers["/v2/library/app/tags/list"] = reply_json(200, {"name": "library/app", "tags": []}, link)
    reply = lab.ask(f"{SECRET}/v2/app/tags/list?n=2")
    assert reply.headers["link"] == f'<{SECRET}/v2/app/tags/list?last=b&n=2>; rel="next"'


def test_a_login_posts_its_form_below_the_path(hidden: Mirror, hub: Hub) -> None:
    form = {"grant_type": "password", "service": "hub.test", "username": USER, "password": PASSWORD}
    scope = {"scope": "repository:private/app:pull"}
    answer = hub.session.post(f"{hidden.url}/token", form | scope, headers={"Expect": "100-continue"})
    token = answer.json()["access_token"]
    path = f"{hidden.url}/v2/private/app/manifests/latest"
    assert hub.session.get(path, headers={"Authorization": f"Bearer {token}"}).status_code == 200


@pytest.mark.parametrize("public", ["", "https://mirror.example"])
def test_the_challenge_names_the_path(hub: Hub, public: str) -> None:
    with Mirror(registries=hub.registries_file, path_prefix=SECRET, public_url=public) as running:
        challenge = hub.session.get(f"{running.url}/v2/").headers["WWW-Authenticate"]
        assert f'realm="{public or f"http://{running.host}"}{SECRET}/token"' in challenge


# Elsewhere


ELSEWHERE = [
    "/", "/v2/", "/v2", "/healthz", "/token", "/v1/_ping", f"/v2/app/blobs/{DIGEST}", "/v2/APP/manifests/x", "//",
    "/S3cret/v2/", "/s3cre/v2/", "/s3crets/v2/", "/s3cretv2/", f"/{SECRET}/v2/", f"/x{SECRET}/v2/", "/v2/s3cret/",
    "/./s3cret/v2/", "/%2fs3cret/v2/",
]  # fmt: skip


@pytest.mark.parametrize("path", ELSEWHERE)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_elsewhere_nothing_is_found_and_nothing_tells_what_is_here(lab: Lab, method: str, path: str) -> None:
    head = f"{method} {path} HTTP/1.1\r\nHost: m\r\nConnection: close\r\nUser-Agent: docker/28\r\n"
    raw = send_raw(lab.mirror, f"{head}Authorization: Bearer anonymous\r\n\r\n".encode())
    assert raw.startswith(b"HTTP/1.1 404 NOT FOUND\r\n")
    assert raw.endswith(b"\r\n\r\nnot found\n")
    assert [name for name in NAMES if name in raw] == []
    assert lab.upstream.requests == []


@pytest.mark.parametrize(
    "request_line", ["GET /v2/?x HTTP/9.9", "G\x00T /v2/ HTTP/1.1", f"GET /{'v' * 9000} HTTP/1.1", "<X> / HTTP/1.1"]
)
def test_what_is_no_http_is_refused_without_telling_what_is_here(lab: Lab, request_line: str) -> None:
    raw = send_raw(lab.mirror, f"{request_line}\r\nHost: m\r\nConnection: close\r\n\r\n".encode())
    assert raw.startswith(b"HTTP/1.1 4")
    assert raw.endswith(b"\r\n\r\n")
    assert [name for name in NAMES if name in raw] == []


def test_no_body_is_asked_for_elsewhere(lab: Lab) -> None:
    head = "POST /token HTTP/1.1\r\nHost: m\r\nExpect: 100-continue\r\nContent-Length: 3\r\nConnection: close\r\n\r\n"
    assert send_raw(lab.mirror, head.encode()).startswith(b"HTTP/1.1 404")


@pytest.mark.parametrize(
    "path",
    [
        *(f"{SECRET}/v2/app/nothing", "/v2/", f"/{SECRET}/v2/", f"{SECRET}x/v2/", f"{SECRET}{SECRET}/v2/"),
        *(f"/v2{SECRET}/redis", f"{SECRET}/v2/app{SECRET}/nothing", f"{SECRET}{SECRET}{SECRET}"),
    ],
)
def test_the_log_is_without_the_path(lab: Lab, path: str) -> None:
    since = lab.mirror.mark()
    lab.ask(path, {"X-Forwarded-For": "203.0.113.7"})
    assert poll(lambda: ("GET", path.replace(SECRET, "") or "/", 404) in lab.mirror.access_log(since), 5)
    log = lab.mirror.log(since)
    assert "203.0.113.7 " in log
    assert "s3cret" not in log


def test_the_log_is_without_the_path_whatever_is_asked(lab: Lab) -> None:
    since = lab.mirror.mark()
    for path in (f"/s3c{SECRET}ret/v2/", f"/{'v' * 495}{SECRET}/end"):
        lab.ask(path)
    assert poll(lambda: len(lab.mirror.access_log(since)) == 2, 5)
    assert SECRET not in lab.mirror.log(since)
    assert "/s3c " not in lab.mirror.log(since)


def test_the_log_is_without_the_path_for_debug_too() -> None:
    with Lab(path_prefix=SECRET, log_level="debug") as lab:
        lab.ask(f"{SECRET}/v2/")
        lab.ask("/v2/")
        lab.ask(f"{SECRET}/v2/app/manifests/latest")
        assert poll(lambda: "/manifests/latest" in lab.mirror.log(), 5)
        assert "s3cret" not in lab.mirror.log()


# Real clients


@pytest.fixture(scope="module")
def secret_dockerd(hub: Hub) -> Iterator[Dockerd]:
    needs("root", "dockerd", "docker", "containerd", "ctr")
    with Dockerd("http://127.0.0.1:9") as running:
        yield running


@pytest.mark.parametrize("end", ["", "/v2"], ids=["as-it-is", "with-override-path"])
def test_containerd_pulls_below_the_path(secret_dockerd: Dockerd, hidden: Mirror, hub: Hub, end: str) -> None:
    """README shows both forms: containerd itself adds /v2 to a path, k3s does not."""
    secret_dockerd.forget_images()
    since = hidden.mark()
    url = f"{hidden.url}{end}" + ('"]\noverride_path = true\n[host."http://127.0.0.1:9' if end else "")
    pulled_by_containerd(secret_dockerd, hub.repositories["library/redis"], mirror_url=url)
    assert ("HEAD", "/v2/library/redis/manifests/latest", 200) in hidden.access_log(since)


def test_skopeo_reads_a_mirrors_path_as_a_part_of_the_images_name(hidden: Mirror) -> None:
    """README says that this client cannot have a secret path: it asks /v2/s3cret/…, and the ping fails before."""
    needs("skopeo")
    since = hidden.mark()
    with Skopeo(hidden.url) as skopeo:
        assert skopeo.skopeo("inspect", "--tls-verify=false", f"docker://{hidden.host}{SECRET}/redis").returncode != 0
    assert poll(lambda: ("GET", "/v2/", 404) in hidden.access_log(since), 5)
