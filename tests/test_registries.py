"""Many registries: which one a request means, and how names and scopes are mapped there and back."""

import base64
from collections.abc import Iterator

import pytest
from lab import Lab
from lab import guard
from lab import refuse
from lab import reply_json
from lab import send_raw
from upstream import RawUpstream
from upstream import reply
from upstream import token_realm
from werkzeug.datastructures import WWWAuthenticate

import mirror
from settings import BUILT_IN
from settings import Registry

CONTENT = reply_json(200, {"schemaVersion": 2})
BASIC = "Basic " + base64.b64encode(b"alice:wonderland").decode()
OTHER = """
["other.test"]
endpoints = ["{0}"]
realms = ["{0}"]
alias = "other"
hosts = ["registry.mine.test", "registry.port.test:8443"]
"""


@pytest.fixture(scope="module")
def other() -> Iterator[RawUpstream]:
    with RawUpstream("127.0.0.9") as upstream:
        yield upstream


@pytest.fixture(scope="module")
def shared_lab(other: RawUpstream) -> Iterator[Lab]:
    with Lab(more=OTHER.format(other.url)) as lab:
        yield lab


@pytest.fixture
def lab(shared_lab: Lab, other: RawUpstream) -> Lab:
    shared_lab.reset()
    other.requests.clear()
    other.answers.clear()
    return shared_lab


@pytest.fixture
def router() -> mirror.Router:
    mine = Registry("mine.test", ("https://mine.test",), hosts=("hub.mine.test", "127.0.0.1:5001"))
    return mirror.Router({registry.name: registry for registry in (*BUILT_IN, mine)}, "docker.io")


@pytest.mark.parametrize(
    ("host", "ns", "name", "expected"),
    [
        ("mirror.example", None, "nginx", "docker.io library/nginx"),
        ("mirror.example", None, "owner/app", "docker.io owner/app"),
        ("mirror.example", None, "ghcr.io/owner/app", "ghcr.io owner/app"),
        ("mirror.example", None, "docker.io/library/nginx", "docker.io library/nginx"),
        ("mirror.example", None, "docker.io/nginx", "docker.io library/nginx"),
        ("mirror.example", None, "ghcr.io", "docker.io library/ghcr.io"),
        ("mirror.example", None, "quay.io/a/b/c", "quay.io a/b/c"),
        ("mirror.example", "ghcr.io", "owner/app", "ghcr.io owner/app"),
        ("mirror.example", "ghcr.io", "ghcr.io/owner/app", "ghcr.io owner/app"),
        ("mirror.example", "registry.k8s.io", "pause", "registry.k8s.io pause"),
        ("mirror.example", "docker.io", "nginx", "docker.io library/nginx"),
        ("ghcr.mirror.example", None, "owner/app", "ghcr.io owner/app"),
        ("GHCR.mirror.example:8443", None, "owner/app", "ghcr.io owner/app"),
        ("ghcr.mirror.example", "quay.io", "owner/app", "quay.io owner/app"),
        ("k8s-gcr.mirror.example", None, "pause", "k8s.gcr.io pause"),
        ("docker.mirror.example", None, "nginx", "docker.io library/nginx"),
        ("ghcr", None, "owner/app", "docker.io owner/app"),
        ("docker.example.com", None, "ghcr.io/owner/app", "ghcr.io owner/app"),
        ("quay.example.com", None, "docker.io/nginx", "docker.io library/nginx"),
        ("gitlab.example.com", None, "a.b/app", "registry.gitlab.com a.b/app"),
        ("hub.mine.test", None, "a.b/app", "mine.test a.b/app"),
        ("hub.mine.test:443", None, "app", "mine.test app"),
        ("127.0.0.1:5001", None, "app", "mine.test app"),
        ("127.0.0.1:5000", None, "app", "docker.io library/app"),
        ("[::1]:5000", None, "app", "docker.io library/app"),
        ("[::1]", None, "app", "docker.io library/app"),
    ],
)
def test_ns_goes_before_the_host_and_that_before_the_path(
    router: mirror.Router, host: str, ns: str | None, name: str, expected: str
) -> None:
    target = router.resolve(host, ns, name)
    assert f"{target.registry.name} {target.repository}" == expected


@pytest.mark.parametrize(("ns", "name"), [("evil.example", "app"), (None, "evil.example/app"), ("", "app")])
@pytest.mark.parametrize("host", ["mirror.example", "docker.example.com"])
def test_what_is_not_served_is_denied_with_what_is(router: mirror.Router, host: str, ns: str | None, name: str) -> None:
    with pytest.raises(mirror.Denied, match=r"it serves: docker.io, ghcr.io, quay.io, ") as raised:
        router.resolve(host, ns, name)
    assert "evil" not in str(raised.value)


def test_another_default_takes_the_bare_names() -> None:
    router = mirror.Router({registry.name: registry for registry in BUILT_IN}, "registry.gitlab.com")
    assert router.resolve("m.example", None, "a.b/app")[:2] == (router.default, "a.b/app")
    assert router.resolve("m.example", None, "app").repository == "app"
    assert router.resolve("m.example", None, "docker.io/app").repository == "library/app"


@pytest.mark.parametrize(
    ("name", "served"),
    [
        ("library/nginx", True),
        ("nginx", True),
        ("redis", True),
        ("mysql", False),
        ("alice/app", True),
        ("alice/other", False),
        ("alice/app/x", False),
    ],
)
def test_images_narrow_a_registry(name: str, served: bool) -> None:
    registry = Registry("docker.io", ("https://hub",), images=("library/n*", "redis", "alice/app"))
    router = mirror.Router({"docker.io": registry}, "docker.io")
    if served:
        assert router.resolve("m.example", None, name).registry == registry
    else:
        with pytest.raises(mirror.Denied):
            router.resolve("m.example", None, name)


@pytest.mark.parametrize(
    ("path", "host"),
    [
        ("/v2/other.test/owner/app/manifests/latest", "mirror.example"),
        ("/v2/owner/app/manifests/latest?ns=other.test", "mirror.example"),
        ("/v2/owner/app/manifests/latest", "other.mirror.example"),
        ("/v2/owner/app/manifests/latest", "registry.mine.test"),
        ("/v2/owner/app/manifests/latest", "registry.port.test:8443"),
    ],
)
def test_each_way_to_name_a_registry_leads_to_it(lab: Lab, other: RawUpstream, path: str, host: str) -> None:
    other.answers["/v2/owner/app/manifests/latest"] = CONTENT
    answer = lab.ask(path, {"Host": host})
    assert answer.status == 200
    assert [request.target for request in other.requests] == ["/v2/owner/app/manifests/latest"]
    assert lab.upstream.requests == []
    assert answer.headers.get("oci-namespace") == ("other.test" if "ns=" in path else None)


def test_the_namespace_is_answered_with_an_error_too(lab: Lab) -> None:
    answer = lab.ask("/v2/nothing/manifests/latest?ns=docker.io", {"Host": "mirror.example"})
    assert (answer.status, answer.headers["oci-namespace"]) == (404, "docker.io")


def test_an_unknown_registry_is_403_and_nobody_is_asked(lab: Lab, other: RawUpstream) -> None:
    for path in ("/v2/evil.example/app/manifests/latest", "/v2/app/manifests/latest?ns=evil.example"):
        answer = lab.ask(path)
        assert (answer.status, answer.code) == (403, "DENIED")
        assert "docker.io, ghcr.io" in answer.json["errors"][0]["message"]
        assert b"evil" not in answer.body
    assert lab.upstream.requests == other.requests == []


@pytest.mark.parametrize("argument", ["hubhost", "host", "url", "upstream", "registry"])
def test_no_argument_forwards_to_any_host(lab: Lab, argument: str) -> None:
    with RawUpstream("127.0.0.11") as evil:
        lab.upstream.answers[lab.manifest] = CONTENT
        assert lab.ask(f"{lab.path}?{argument}={evil.host}").status == 200
        assert evil.requests == []


@pytest.mark.parametrize("line", ["GET http://{0}{1}", "GET http://x@{0}{1}", "GET //{0}{1}", "CONNECT {0}"])
def test_a_request_that_names_a_host_in_its_line_reaches_no_other_host(lab: Lab, line: str) -> None:
    with RawUpstream("127.0.0.11") as evil:
        raw = send_raw(
            lab.mirror, f"{line.format(evil.host, lab.path)} HTTP/1.1\r\nHost: m\r\nConnection: close\r\n\r\n".encode()
        )
        assert raw.split()[1] in (b"400", b"404")
        assert evil.requests == []


def parameters(header: str) -> dict[str, str | None]:
    found = WWWAuthenticate.from_header(header)
    assert found is not None
    return dict(found.parameters)


@pytest.mark.parametrize(
    ("path", "host", "realm", "scope"),
    [
        ("/v2/other.test/owner/app/manifests/x", "m.example", "/token", "repository:other.test/owner/app:pull"),
        ("/v2/owner/app/manifests/x", "other.m.example", "/token/other.test", "repository:owner/app:pull"),
        ("/v2/owner/app/manifests/x?ns=other.test", "m.example", "/token/other.test", "repository:owner/app:pull"),
    ],
)
def test_the_challenge_names_the_repository_as_the_client_does(
    lab: Lab, other: RawUpstream, path: str, host: str, realm: str, scope: str
) -> None:
    their_scope = "repository:owner/app:pull"
    other.answers["/realm"] = reply_json(200, {"token": "t"})
    other.answers["/v2/owner/app/manifests/x"] = refuse(token_realm(other.url), "o", their_scope, "insufficient_scope")
    answer = lab.ask(path, {"Host": host})
    assert answer.status == 401
    assert parameters(answer.headers["www-authenticate"]) == {
        "realm": f"http://{host}{realm}",
        "service": "o",
        "scope": scope,
        "error": "insufficient_scope",
    }


def test_the_ping_at_a_registrys_own_host_gives_its_challenge(lab: Lab, other: RawUpstream) -> None:
    other.answers["/v2/"] = refuse(token_realm(other.url), "others-service", None)
    with Lab(more=OTHER.format(other.url)) as new:
        answer = new.ask("/v2/", {"Host": "other.mirror.example"})
        assert parameters(answer.headers["www-authenticate"]) == {
            "realm": "http://other.mirror.example/token/other.test",
            "service": "others-service",
        }


@pytest.mark.parametrize(
    ("path", "host"),
    [
        ("/token?service=hub&scope=repository:other.test/owner/app:pull", "m.example"),
        ("/token/other.test?service=hub&scope=repository:owner/app:pull", "m.example"),
        ("/token/other.test?service=hub&scope=repository:other.test/owner/app:pull", "m.example"),
        ("/token?service=hub&scope=repository:owner/app:pull", "other.m.example"),
    ],
)
def test_a_login_goes_to_the_realm_of_the_registry_that_is_meant(
    lab: Lab, other: RawUpstream, path: str, host: str
) -> None:
    other.answers["/v2/"] = refuse(token_realm(other.url), "others-service", None)
    other.answers["/realm"] = reply_json(200, {"token": "hers"})
    other.answers["/v2/owner/new/manifests/latest"] = refuse(token_realm(other.url), "others-service")
    lab.ask("/v2/other.test/owner/new/manifests/latest")  # the challenge may be known as none from another test
    other.requests.clear()
    assert lab.ask(path, {"Host": host, "Authorization": BASIC}).json == {"token": "hers"}
    asked = other.asked("/realm")[-1]
    assert asked.headers["authorization"] == BASIC
    assert asked.target.replace("scope=repository%3Aowner%2Fapp%3Apull", "S") in (
        "/realm?service=others-service&S",
        "/realm?S&service=others-service",
    )
    assert lab.upstream.requests == []


def test_one_token_for_two_registries_is_refused(lab: Lab) -> None:
    scopes = "scope=repository:other.test/a/b:pull&scope=repository:nginx:pull"
    assert lab.ask(f"/token?{scopes}", {"Authorization": BASIC}).status == 400


def test_a_login_that_another_registry_does_not_know_does_not_hinder_a_pull(lab: Lab, other: RawUpstream) -> None:
    other.answers["/v2/"] = refuse(token_realm(other.url), "others-service", None)
    other.answers["/realm"] = reply_json(401, {"details": "unknown user"})
    other.answers["/v2/owner/new/manifests/latest"] = refuse(token_realm(other.url), "others-service")
    lab.ask("/v2/other.test/owner/new/manifests/latest")
    login = {"Authorization": BASIC}
    assert lab.ask("/token?scope=repository:other.test/owner/app:pull", login).json["token"] == "anonymous"
    assert lab.ask("/token/other.test?scope=repository:owner/app:pull", login).status == 401, "it is meant for that one"
    assert lab.ask("/token", {**login, "Host": "other.mirror.example"}).status == 401


def test_an_anonymous_token_is_given_for_any_scope_so_that_the_pull_can_say_what_is_wrong(lab: Lab) -> None:
    assert lab.ask("/token?scope=repository:evil.example/app:pull").json["token"] == "anonymous"
    assert lab.ask("/v2/evil.example/app/manifests/latest").code == "DENIED"


def test_a_token_of_a_registry_that_is_not_served_is_refused(lab: Lab) -> None:
    assert lab.ask("/token/evil.example").status == 403


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v2/other.test/owner/app/tags/list", "other.test/owner/app"),
        ("/v2/owner/app/tags/list?ns=other.test", "owner/app"),
        ("/v2/other.test/owner/app/tags/list?ns=other.test", "other.test/owner/app"),
    ],
)
def test_a_list_of_tags_has_the_clients_name(lab: Lab, other: RawUpstream, path: str, name: str) -> None:
    link = {"Link": '</v2/owner/app/tags/list?last=b>; rel="next"'}
    other.answers["/v2/owner/app/tags/list"] = reply_json(200, {"name": "owner/app", "tags": ["a", "b"]}, link)
    answer = lab.ask(path)
    assert answer.json == {"name": name, "tags": ["a", "b"]}
    assert answer.headers["content-length"] == str(len(answer.body))
    same = "&ns=other.test" if "ns=" in path else ""
    assert answer.headers["link"] == f'<{path.partition("?")[0]}?last=b{same}>; rel="next"'


def test_a_short_names_list_of_tags_has_the_short_name(lab: Lab) -> None:
    lab.upstream.answers[f"/v2/library/{lab.name}/tags/list"] = reply_json(200, {"name": f"library/{lab.name}"})
    assert lab.ask(f"/v2/{lab.name}/tags/list").json == {"name": lab.name}


def test_a_list_of_tags_that_is_cut_is_no_list(lab: Lab) -> None:
    big = b'{"name": "x", "tags": [' + b'"a",' * 20_000
    lab.upstream.answers[f"/v2/library/{lab.name}/tags/list"] = reply(200, big, {"Content-Length": "1000000"})
    assert lab.ask(f"/v2/{lab.name}/tags/list").status == 502


def test_a_list_of_tags_that_is_too_long_is_502(lab: Lab) -> None:
    lab.upstream.answers[f"/v2/library/{lab.name}/tags/list"] = reply(200, b" " * (mirror.MAX_TAGS + 1))
    assert lab.ask(f"/v2/{lab.name}/tags/list").status == 502


@pytest.mark.parametrize("body", [b"[]", b"no json", b'{"tags": []}', b"[" * 100_000])
def test_a_list_of_tags_that_is_none_is_left_alone(lab: Lab, body: bytes) -> None:
    lab.upstream.answers[f"/v2/library/{lab.name}/tags/list"] = reply(200, body)
    assert lab.ask(f"/v2/{lab.name}/tags/list").body == body


def test_the_account_is_for_the_realm_only() -> None:
    account = 'username = "alice"\npassword = "wonderland"'
    with Lab(more=account) as lab:
        guard(lab.upstream, lab.manifest, CONTENT)
        assert lab.ask(lab.path).status == 200
        assert [request.headers["authorization"] for request in lab.upstream.asked("/realm")] == [BASIC]
        assert lab.upstream.requests[-1].headers["authorization"] == "Bearer real-token-1"
        assert "wonderland" not in lab.mirror.log()


def test_the_account_answers_a_basic_challenge_and_no_client_is_asked() -> None:
    account = 'username = "alice"\npassword = "wonderland"'
    with Lab(more=account) as lab:

        def check(request: object, connection: object) -> None:
            authorized = request.headers.get("authorization") == BASIC  # type: ignore[attr-defined]
            refusal = reply_json(401, {}, {"WWW-Authenticate": 'Basic realm="x"'})
            connection.sendall(CONTENT if authorized else refusal)  # type: ignore[attr-defined]

        lab.upstream.answers.update({"/v2/": check, lab.manifest: check})
        assert lab.ask("/v2/").status == 200
        assert lab.ask(lab.path).status == 200
        lab.upstream.requests.clear()
        assert lab.ask(lab.path).status == 200
        assert len(lab.upstream.requests) == 1, "the challenge is known"


def test_two_registries_at_one_endpoint_share_no_account(other: RawUpstream) -> None:
    more = f"""
        ["mine.test"]
        endpoints = ["{other.url}"]
        realms = ["{other.url}"]
        username = "alice"
        password = "wonderland"
        ["theirs.test"]
        endpoints = ["{other.url}"]
        realms = ["{other.url}"]
    """
    other.requests.clear()
    guard(other, "/v2/owner/app/manifests/latest", CONTENT)
    with Lab(more=more) as lab:
        assert lab.ask("/v2/mine.test/owner/app/manifests/latest").status == 200
        assert other.asked("/realm")[-1].headers["authorization"] == BASIC
        assert lab.ask("/v2/theirs.test/owner/app/manifests/latest").status == 200
        assert "authorization" not in other.asked("/realm")[-1].headers


def test_a_redirect_to_another_registry_is_answered_with_that_ones_own_token(lab: Lab, other: RawUpstream) -> None:
    with RawUpstream("127.0.0.11") as second, Lab(realms=(second.url,)) as new:
        path = "/v2/project/app/manifests/latest"
        guard(second, path, CONTENT)
        new.upstream.answers[new.manifest] = reply(307, b"", {"Location": second.url + path})
        assert new.ask(new.path, {"Authorization": "Bearer the-clients-own"}).status == 200
        asked = [(request.path, request.headers.get("authorization")) for request in second.requests]
        assert asked == [(path, None), ("/realm", None), (path, "Bearer real-token-1")]
        second.requests.clear()
        assert new.ask(new.path).status == 200
        assert [request.path for request in second.requests] == [path], "its challenge and token are known"


def test_a_redirected_registrys_refusal_asks_nobody_to_log_in() -> None:
    with RawUpstream("127.0.0.11") as second, Lab(realms=(second.url,)) as lab:
        path = "/v2/project/app/manifests/latest"
        second.answers["/realm"] = reply_json(200, {"token": "t"})
        second.answers[path] = refuse(token_realm(second.url), "s", error="insufficient_scope")
        lab.upstream.answers[lab.manifest] = reply(307, b"", {"Location": second.url + path})
        answer = lab.ask(lab.path)
        assert (answer.status, "www-authenticate" in answer.headers) == (403, False)


def test_docker_search_is_answered_by_the_index() -> None:
    with RawUpstream("127.0.0.11") as index, Lab(more=f'search = "{index.url}"') as lab:
        index.answers["/v1/search"] = reply_json(200, {"results": [{"name": "nginx"}]}, {"Set-Cookie": "a=b"})
        assert lab.ask("/v1/_ping").json == {"standalone": False}
        answer = lab.ask("/v1/search?q=nginx%26x&n=25&evil=1", {"Authorization": BASIC})
        assert answer.json == {"results": [{"name": "nginx"}]}
        assert "set-cookie" not in answer.headers
        assert index.requests[0].target == "/v1/search?q=nginx%26x&n=25"
        assert "authorization" not in index.requests[0].headers
        index.answers["/v1/search"] = refuse(token_realm(index.url), "s")
        assert lab.ask("/v1/search?q=x").status in (403, 502)
        index.answers["/v1/search"] = reply(503, b"<html>")
        assert lab.ask("/v1/search?q=x").status == 502
        assert lab.ask("/v1/search?q=x", {"Host": "ghcr.mirror.example"}).status == 404
