"""Real clients pull from all registries of the lab through one mirror, under the names that each of them can use."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from clients import Dockerd
from clients import Podman
from clients import Result
from clients import Skopeo
from conftest import needs
from hub import PASSWORD
from hub import USER
from hub import Hub
from hub import write_registries
from images import Repository
from lab import ask
from processes import free_port
from pulls import assert_denied
from pulls import pulled_by_containerd
from pulls import pulled_by_docker
from pulls import pulled_by_podman
from pulls import refusal
from pulls import succeeds
from registries import BASIC_PASSWORD
from registries import BASIC_USER
from registries import TARGET_PREFIX
from registries import BasicRegistry
from registries import OpenRegistry
from serving import HOST
from serving import Mirror
from upstream import RawUpstream
from upstream import reply_json

OPEN, GUARDED, BASIC, UNLISTED = "registry.k8s.io", "pkg.test", "basic.test", "unlisted.test"
SERVED = [
    (OPEN, "pause"),
    (OPEN, "coredns/coredns"),
    (GUARDED, "pause"),
    (BASIC, "team/app"),
    ("docker.io", "library/hello-world"),
]
FOUND = [{"name": "nginx", "description": "Official build of Nginx.", "star_count": 20000, "is_official": True}]


@pytest.fixture(scope="module")
def index() -> Iterator[RawUpstream]:
    """Run the index that `docker search` asks."""
    with RawUpstream() as running:
        running.answers["/v1/search"] = reply_json(200, {"num_results": 1, "query": "nginx", "results": FOUND})
        yield running


@pytest.fixture(scope="module")
def many(
    hub: Hub,
    open_registry: OpenRegistry,
    guarded_registry: OpenRegistry,
    basic_registry: BasicRegistry,
    index: RawUpstream,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Mirror]:
    """Run a mirror of all registries of the lab; one is built in under its name, two are new."""
    tables = {
        "docker.io": {**hub.table(), "search": index.url},
        OPEN: open_registry.table(),
        GUARDED: {**guarded_registry.table(), "alias": "pkg", "hosts": ["packages.example"]},
        BASIC: {**basic_registry.table(), **basic_registry.account_in_a_file(), "images": ["team/app"]},
        UNLISTED: {**guarded_registry.table(), "realms": []},
        "ghcr.io": hub.table(),
    }
    with Mirror(registries=write_registries(tmp_path_factory.mktemp("many") / "registries.toml", tables)) as running:
        yield running


@pytest.fixture(scope="module")
def basic_mirror(basic_registry: BasicRegistry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mirror]:
    """Run a mirror whose own address means the registry that asks for Basic; it has no account there."""
    port = free_port(HOST)
    tables = {BASIC: {**basic_registry.table(), "hosts": [f"{HOST}:{port}"]}}
    file = write_registries(tmp_path_factory.mktemp("basic") / "registries.toml", tables)
    with Mirror(port=port, registries=file) as running:
        yield running


@pytest.fixture(scope="module")
def many_podman(many: Mirror) -> Iterator[Podman]:
    """Give podman with the mirror as a mirror of all registries, by a location with a path."""
    needs("root", "podman")
    with Podman(many.url, OPEN, GUARDED, BASIC) as client:
        yield client


@pytest.fixture
def many_skopeo(many: Mirror) -> Iterator[Skopeo]:
    """Give skopeo with the mirror as a mirror of one more registry."""
    needs("skopeo")
    with Skopeo(many.url, OPEN) as client:
        yield client


@pytest.fixture(autouse=True)
def _fresh_records(
    hub: Hub, open_registry: OpenRegistry, guarded_registry: OpenRegistry, basic_registry: BasicRegistry
) -> None:
    for part in (hub, open_registry, guarded_registry, basic_registry):
        part.forget()


@pytest.fixture
def held(
    hub: Hub, open_registry: OpenRegistry, guarded_registry: OpenRegistry, basic_registry: BasicRegistry
) -> dict[str, dict[str, Repository]]:
    """Give what each registry holds."""
    return {
        OPEN: open_registry.repositories,
        GUARDED: guarded_registry.repositories,
        BASIC: basic_registry.repositories,
        "docker.io": hub.repositories,
    }


# dockerd


@pytest.mark.parametrize(("registry", "name"), SERVED)
def test_dockerd_pulls_by_the_registry_in_the_path(
    docker: Dockerd, many: Mirror, held: dict[str, dict[str, Repository]], registry: str, name: str
) -> None:
    pulled_by_docker(docker, f"{many.host}/{registry}/{name}", held[registry][name])


def test_dockerd_pulls_a_short_name_of_docker_hub_by_the_registry_in_the_path(
    docker: Dockerd, hub: Hub, many: Mirror
) -> None:
    pulled_by_docker(docker, f"{many.host}/docker.io/redis", hub.repositories["library/redis"])


def test_a_manifest_that_redirects_to_a_guarded_registry_is_fetched_with_a_token_for_its_name_there(
    docker: Dockerd, hub: Hub, many: Mirror, guarded_registry: OpenRegistry
) -> None:
    repository = guarded_registry.repositories["coredns/coredns"]
    pulled_by_docker(docker, f"{many.host}/{GUARDED}/coredns/coredns", repository)
    (asked,) = hub.tokens.requests
    assert asked.query["scope"] == [f"repository:{TARGET_PREFIX}coredns/coredns:pull"]
    assert asked.authorization is None
    assert {request.authorized for request in guarded_registry.requests()} == {False}
    served = [request.path for request in guarded_registry.target_requests() if request.status == 200]
    assert len(served) == len(set(served)) == 1 + 1 + len(repository.local().layers) + 1  # HEAD and GET of the manifest


def test_a_redirects_target_with_a_foreign_realm_is_given_no_token(
    hub: Hub, many: Mirror, guarded_registry: OpenRegistry
) -> None:
    answer = ask(many, f"/v2/{UNLISTED}/pause/manifests/latest")
    assert (answer.status, answer.code) == (502, "UNAVAILABLE")
    assert guarded_registry.target_requests()
    assert not hub.tokens.requests


def test_dockerd_logs_in_and_pulls_a_private_image_by_the_registry_in_the_path(
    docker: Dockerd, hub: Hub, many: Mirror
) -> None:
    name = f"{many.host}/docker.io/private/app"
    assert_denied(docker.docker("pull", name))
    succeeds(docker.docker("login", many.host, "--username", USER, "--password-stdin", config="path", stdin=PASSWORD))
    pulled_by_docker(docker, name, hub.repositories["private/app"], "path")
    assert PASSWORD not in many.log()


def test_dockerd_with_a_login_pulls_a_private_image_of_another_registry_by_the_path(
    docker: Dockerd, hub: Hub, many: Mirror
) -> None:
    config = docker.config_with_login("path-login", many.host, USER, PASSWORD)
    pulled_by_docker(docker, f"{many.host}/ghcr.io/private/app", hub.repositories["private/app"], config)
    assert {scope for request in hub.tokens.requests for scope in request.query["scope"]} == {
        "repository:private/app:pull"
    }


@pytest.mark.parametrize(("registry", "name"), [(OPEN, "pause"), (GUARDED, "pause"), (BASIC, "team/app")])
def test_a_login_at_the_mirror_does_not_hinder_a_pull_from_a_registry_that_gives_no_tokens(
    docker: Dockerd,
    many_podman: Podman,
    hub: Hub,
    many: Mirror,
    open_registry: OpenRegistry,
    held: dict[str, dict[str, Repository]],
    registry: str,
    name: str,
) -> None:
    config = docker.config_with_login("other-login", many.host, USER, PASSWORD)
    pulled_by_docker(docker, f"{many.host}/{registry}/{name}", held[registry][name], config)
    login = ("login", "--username", USER, "--password-stdin", many.host)
    succeeds(many_podman.podman(*login, stdin=PASSWORD))
    try:
        pulled_by_podman(many_podman, f"{many.host}/{registry}/{name}", held[registry][name])
    finally:
        succeeds(many_podman.podman("logout", many.host))
    assert not [request for request in open_registry.requests() if request.authorized]


def test_dockerd_searches_docker_hub_through_the_mirror(docker: Dockerd, many: Mirror, index: RawUpstream) -> None:
    shown = succeeds(docker.docker("search", "--limit", "7", f"{many.host}/nginx"))
    assert "Official build of Nginx." in shown
    (asked,) = index.asked("/v1/search")
    assert asked.target == "/v1/search?q=nginx&n=7"
    assert "authorization" not in asked.headers


# The registry that asks for Basic


@pytest.mark.parametrize("name", ["team/app", f"{BASIC}/team/app"])
def test_dockerd_logs_in_at_a_registry_that_asks_for_basic(
    docker: Dockerd, basic_registry: BasicRegistry, basic_mirror: Mirror, name: str
) -> None:
    host = basic_mirror.host
    login = ("login", host, "--username", BASIC_USER, "--password-stdin")
    succeeds(docker.docker(*login, config="basic", stdin=BASIC_PASSWORD))
    pulled_by_docker(docker, f"{host}/{name}", basic_registry.repositories["team/app"], "basic")
    succeeds(docker.docker("logout", host, config="basic"))
    docker.forget_images()
    assert "no basic auth credentials" in refusal(docker.docker("pull", f"{host}/{name}", config="basic"))
    assert BASIC_PASSWORD not in basic_mirror.log()
    assert "Basic " not in basic_mirror.log()


def test_dockerd_cannot_log_in_at_a_registry_that_asks_for_basic_with_a_wrong_password(
    docker: Dockerd, basic_mirror: Mirror
) -> None:
    login = ("login", basic_mirror.host, "--username", BASIC_USER, "--password-stdin")
    message = refusal(docker.docker(*login, config="wrong-basic", stdin="why-is-a-raven"))
    assert "unauthorized" in message or "401" in message
    assert "why-is-a-raven" not in basic_mirror.log()


def test_skopeo_with_a_login_copies_from_a_registry_that_asks_for_basic(
    skopeo: Skopeo, basic_registry: BasicRegistry, basic_mirror: Mirror, tmp_path: Path
) -> None:
    source = ("copy", "--src-tls-verify=false", f"docker://{basic_mirror.host}/team/tool", f"dir:{tmp_path}")
    assert_denied(skopeo.skopeo(*source))
    succeeds(skopeo.skopeo(*source, "--src-creds", f"{BASIC_USER}:{BASIC_PASSWORD}"))
    assert (tmp_path / "manifest.json").read_bytes() == basic_registry.repositories["team/tool"].top().data


def test_the_mirrors_own_account_never_leaves_the_mirror(many: Mirror) -> None:
    for path in (f"/v2/{BASIC}/team/app/manifests/latest", f"/v2/{BASIC}/no/such/manifests/latest", "/v2/"):
        answer = ask(many, path)
        assert BASIC_PASSWORD not in str(answer)
        assert "basic" not in answer.headers.get("www-authenticate", "").lower()
    assert BASIC_PASSWORD not in many.log()


def test_of_the_mirrors_account_only_the_listed_images_are_served(docker: Dockerd, many: Mirror) -> None:
    message = refusal(docker.docker("pull", f"{many.host}/{BASIC}/team/tool"))
    assert "does not serve that image" in message


# containerd


@pytest.mark.parametrize(("registry", "name"), SERVED)
def test_containerd_pulls_from_several_registries_through_hosts_files(
    docker: Dockerd, many: Mirror, held: dict[str, dict[str, Repository]], registry: str, name: str
) -> None:
    mark = many.mark()
    pulled_by_containerd(docker, held[registry][name], registry=registry, mirror_url=many.url)
    asked = [line for line in many.access_log(mark) if line.path != "/healthz"]  # that line may be late
    assert asked[0] == ("HEAD", f"/v2/{name}/manifests/latest", 200)


def test_ns_names_the_registry_and_the_answer_says_so(many: Mirror, open_registry: OpenRegistry) -> None:
    for path in ("manifests/latest", "manifests/nosuch", "tags/list"):
        assert ask(many, f"/v2/pause/{path}?ns={OPEN}").headers["oci-namespace"] == OPEN
    assert "oci-namespace" not in ask(many, f"/v2/{OPEN}/pause/manifests/latest").headers
    assert {request.path.count("ns=") for request in open_registry.requests()} == {0}


# podman and skopeo


@pytest.mark.parametrize("through", ["mirror", "path"])
@pytest.mark.parametrize(("registry", "name"), SERVED[:-1])
def test_podman_pulls_by_a_location_with_a_path(
    many_podman: Podman,
    many: Mirror,
    held: dict[str, dict[str, Repository]],
    registry: str,
    name: str,
    through: str,
) -> None:
    prefix = f"{many.host}/" if through == "path" else ""
    pulled_by_podman(many_podman, f"{prefix}{registry}/{name}", held[registry][name])


def test_skopeo_lists_the_tags_under_the_name_that_it_asked_for(
    many_skopeo: Skopeo, many: Mirror, held: dict[str, dict[str, Repository]]
) -> None:
    for registry, name in SERVED:
        shown = json.loads(succeeds(many_skopeo.skopeo("list-tags", f"docker://{many.host}/{registry}/{name}")))
        assert shown["Repository"] == f"{many.host}/{registry}/{name}"
        assert sorted(shown["Tags"]) == sorted(held[registry][name].tags)


@pytest.mark.parametrize(("registry", "name"), SERVED)
def test_a_list_of_tags_bears_the_clients_name_of_the_repository(many: Mirror, registry: str, name: str) -> None:
    answer = ask(many, f"/v2/{registry}/{name}/tags/list")
    assert answer.json["name"] == f"{registry}/{name}"


# Names of hosts, which no client of the lab can look up


@pytest.mark.parametrize(
    ("host", "registry", "name"),
    [
        ("k8s.mirror.example", OPEN, "pause"),
        ("pkg.mirror.example:8443", GUARDED, "pause"),
        ("packages.example", GUARDED, "coredns/coredns"),
        ("docker.mirror.example", "docker.io", "redis"),
    ],
)
def test_a_host_name_means_a_registry(
    many: Mirror, held: dict[str, dict[str, Repository]], host: str, registry: str, name: str
) -> None:
    repository = held[registry][f"library/{name}" if registry == "docker.io" else name]
    for path in (name, f"{registry}/{name}"):
        response = requests.get(
            f"{many.url}/v2/{path}/manifests/latest",
            headers={"Host": host, "Accept": repository.top().media_type},
            timeout=10,
        )
        assert response.content == repository.top().data


def test_the_challenge_at_a_registrys_host_leads_to_that_registrys_token_service(many: Mirror) -> None:
    assert ask(many, "/v2/", {"Host": "k8s.mirror.example"}).status == 200
    answer = ask(many, "/v2/", {"Host": "docker.mirror.example"})
    assert answer.status == 401
    assert answer.headers["www-authenticate"].startswith('Bearer realm="http://docker.mirror.example/token')


# What is not served


@pytest.mark.parametrize("path", ["/v2/app/manifests/latest?ns=evil.example", "/v2/evil.example/app/manifests/latest"])
def test_an_unknown_registry_is_refused_with_the_names_of_those_that_are_served(many: Mirror, path: str) -> None:
    answer = ask(many, path)
    assert (answer.status, answer.code) == (403, "DENIED")
    message = answer.json["errors"][0]["message"]
    for name in ("docker.io", OPEN, GUARDED, BASIC, "ghcr.io"):
        assert name in message


def test_dockerd_and_podman_show_why_an_unknown_registry_is_refused(
    docker: Dockerd, many_podman: Podman, many: Mirror
) -> None:
    name = f"{many.host}/evil.example/app"
    results: list[Result] = [docker.docker("pull", name), many_podman.podman("pull", name)]
    for result in results:
        assert GUARDED in refusal(result)
