"""Tokens and challenges: the mirror's own stay here, a client's own pass through, and no log shows either."""

import base64
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import pytest
from lab import Lab
from lab import Reply
from lab import ask
from lab import guard
from lab import refuse
from lab import reply_json
from processes import poll
from serving import Mirror
from upstream import RawUpstream
from upstream import Request
from upstream import reply
from upstream import token_realm
from werkzeug.datastructures import WWWAuthenticate

import mirror
from settings import Config
from settings import Registry
from telemetry import Telemetry

CONTENT = reply_json(200, {"schemaVersion": 2})
BASIC = "Basic " + base64.b64encode(b"alice:wonderland").decode()


@pytest.fixture(scope="module")
def shared_lab() -> Iterator[Lab]:
    with Lab() as lab:
        guard(lab.upstream, lab.manifest, CONTENT)
        lab.ask("/v2/")
        yield lab


@pytest.fixture
def lab(shared_lab: Lab) -> Lab:
    """Return a lab whose mirror knows the challenge and has no token for the repository."""
    shared_lab.reset()
    guard(shared_lab.upstream, shared_lab.manifest, CONTENT)
    return shared_lab


@pytest.fixture
def new_lab() -> Iterator[Lab]:
    with Lab() as lab:
        guard(lab.upstream, lab.manifest, CONTENT)
        yield lab


def challenge_of(reply: Reply) -> dict[str, str | None]:
    found = WWWAuthenticate.from_header(reply.headers["www-authenticate"])
    assert found is not None
    assert found.type == "bearer"
    return dict(found.parameters)


def tokens_fetched(lab: Lab) -> list[Request]:
    return lab.upstream.asked("/realm")


def test_the_challenge_of_the_ping_names_the_mirror_and_keeps_the_service(new_lab: Lab) -> None:
    reply = new_lab.ask("/v2/")
    assert (reply.status, reply.code) == (401, "UNAUTHORIZED")
    assert reply.headers["docker-distribution-api-version"] == "registry/2.0"
    assert challenge_of(reply) == {"realm": f"{new_lab.mirror.url}/token", "service": "hub.test"}
    new_lab.ask("/v2/")
    assert len(new_lab.upstream.asked("/v2/")) == 1, "the challenge is learnt once"


def test_every_value_of_the_challenge_is_quoted(lab: Lab) -> None:
    assert lab.ask("/v2/").headers["www-authenticate"] == (f'Bearer realm="{lab.mirror.url}/token",service="hub.test"')


def test_behind_a_terminator_the_realm_is_its_address(lab: Lab) -> None:
    headers = {"X-Forwarded-Proto": "https", "Host": "mirror.example"}
    assert challenge_of(lab.ask("/v2/", headers))["realm"] == "https://mirror.example/token"
    headers = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "other.example:8443", "Host": "internal"}
    assert challenge_of(lab.ask("/v2/", headers))["realm"] == "https://other.example:8443/token"


def test_a_hostile_forwarded_host_or_scheme_is_not_believed(lab: Lab) -> None:
    assert lab.ask("/v2/", {"X-Forwarded-Host": "evil.example/x"}).status == 400
    assert challenge_of(lab.ask("/v2/", {"X-Forwarded-Proto": "javascript"}))["realm"] == f"{lab.mirror.url}/token"


def test_without_a_terminator_no_forwarded_header_is_believed() -> None:
    with Lab(proxies=0) as lab:
        guard(lab.upstream, lab.manifest, CONTENT)
        headers = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "evil.example"}
        assert challenge_of(lab.ask("/v2/", headers))["realm"] == f"{lab.mirror.url}/token"


def test_the_public_url_is_the_realms_address() -> None:
    with Lab(public_url="https://mirror.example/") as lab:
        guard(lab.upstream, lab.manifest, CONTENT)
        assert challenge_of(lab.ask("/v2/"))["realm"] == "https://mirror.example/token"


def test_an_anonymous_client_gets_its_token_at_once(lab: Lab) -> None:
    answer = lab.ask("/token?service=hub.test&scope=repository:library/app:pull").json
    assert answer["token"] == answer["access_token"] == "anonymous"
    assert answer["expires_in"] >= 60
    assert abs(datetime.fromisoformat(answer["issued_at"]).timestamp() - time.time()) < 60
    assert lab.upstream.requests == []


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer anonymous"}, {"Authorization": "bearer anonymous"}])
def test_the_mirror_pulls_with_its_own_token_for_an_anonymous_client(lab: Lab, headers: dict[str, str]) -> None:
    reply = lab.ask(lab.path, headers)
    assert (reply.status, reply.json) == (200, {"schemaVersion": 2})
    assert "real-token" not in str(reply)
    assert lab.upstream.requests[-1].headers["authorization"] == "Bearer real-token-1"


def test_a_ping_with_the_anonymous_token_is_admitted(lab: Lab) -> None:
    assert lab.ask("/v2/", {"Authorization": "Bearer anonymous"}).status == 200


def test_the_token_is_asked_for_with_the_registrys_service_and_scope(lab: Lab) -> None:
    lab.ask(lab.path)
    assert (
        tokens_fetched(lab)[0].target == "/realm?service=hub.test&scope=repository%3Alibrary%2F" + lab.name + "%3Apull"
    )
    assert "authorization" not in tokens_fetched(lab)[0].headers


def test_concurrent_first_requests_cause_one_token_fetch(lab: Lab) -> None:
    with ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(lambda _: lab.ask(lab.path), range(60)))
    assert {reply.status for reply in replies} == {200}
    assert len(tokens_fetched(lab)) == 1


def test_an_unknown_challenge_is_learnt_from_the_refused_request(new_lab: Lab) -> None:
    assert new_lab.ask(new_lab.path).status == 200
    assert [request.path for request in new_lab.upstream.requests] == [new_lab.manifest, "/realm", new_lab.manifest]


def test_a_known_challenge_saves_the_refused_request(lab: Lab) -> None:
    assert lab.ask(lab.path).status == 200
    assert [request.path for request in lab.upstream.requests] == ["/realm", lab.manifest]


def test_a_token_is_renewed_before_it_ends(lab: Lab) -> None:
    guard(lab.upstream, lab.manifest, CONTENT, expires_in=1)
    assert lab.ask(lab.path).status == 200
    time.sleep(1)
    lab.upstream.requests.clear()
    assert lab.ask(lab.path).status == 200
    assert [request.path for request in lab.upstream.requests] == ["/realm", lab.manifest]


def test_a_token_that_the_registry_no_longer_takes_is_replaced_once(lab: Lab) -> None:
    assert lab.ask(lab.path).status == 200
    guard(lab.upstream, lab.manifest, CONTENT)  # has given no token yet
    lab.upstream.requests.clear()
    assert lab.ask(lab.path).status == 200
    assert [request.path for request in lab.upstream.requests] == [lab.manifest, "/realm", lab.manifest]


def test_a_refusal_for_want_of_rights_is_not_asked_twice(lab: Lab) -> None:
    lab.ask(lab.path)
    realm = token_realm(lab.upstream.url)
    lab.upstream.answers[lab.manifest] = refuse(realm, "hub.test", error="insufficient_scope")
    lab.upstream.requests.clear()
    reply = lab.ask(lab.path)
    assert (reply.status, reply.code) == (401, "UNAUTHORIZED")
    assert [request.path for request in lab.upstream.requests] == [lab.manifest]
    assert challenge_of(reply) == {
        "realm": f"{lab.mirror.url}/token",
        "service": "hub.test",
        "scope": "repository:library/app:pull",  # as upstream's challenge has it
        "error": "insufficient_scope",
    }


def test_a_registry_that_moves_its_realm_is_followed(new_lab: Lab) -> None:
    new_lab.ask("/v2/")
    new_lab.upstream.answers["/realm"] = reply(500)
    assert new_lab.ask(new_lab.path).status == 502
    guard(new_lab.upstream, new_lab.manifest, CONTENT)
    assert new_lab.ask(new_lab.path).status == 200


def test_a_clients_own_token_goes_to_the_registry_as_it_is(lab: Lab) -> None:
    lab.upstream.answers[lab.manifest] = CONTENT
    assert lab.ask(lab.path, {"Authorization": "Bearer the-clients-own"}).status == 200
    assert [request.headers["authorization"] for request in lab.upstream.requests] == ["Bearer the-clients-own"]


def test_a_clients_refused_token_is_told_to_the_client_with_its_error(lab: Lab) -> None:
    lab.upstream.answers[lab.manifest] = refuse(token_realm(lab.upstream.url), "hub.test", error="invalid_token")
    reply = lab.ask(lab.path, {"Authorization": "Bearer ended"})
    assert reply.status == 401
    assert reply.json["errors"][0]["message"] == "authentication required"
    assert challenge_of(reply)["error"] == "invalid_token"
    assert challenge_of(reply)["realm"] == f"{lab.mirror.url}/token"
    assert tokens_fetched(lab) == []


def test_a_client_that_may_not_gets_403(lab: Lab) -> None:
    lab.upstream.answers[lab.manifest] = reply_json(403, {"errors": [{"code": "DENIED", "message": "not yours"}]})
    reply = lab.ask(lab.path, {"Authorization": "Bearer the-clients-own"})
    assert (reply.status, reply.code) == (403, "DENIED")
    assert reply.json["errors"][0]["message"] == "not yours"


def test_a_login_is_checked_by_the_registry(lab: Lab) -> None:
    lab.upstream.answers["/v2/"] = refuse(token_realm(lab.upstream.url), "hub.test", None, "invalid_token")
    reply = lab.ask("/v2/", {"Authorization": "Bearer wrong"})
    assert (reply.status, challenge_of(reply)["error"]) == (401, "invalid_token")
    lab.upstream.answers["/v2/"] = reply_json(200, {})
    assert lab.ask("/v2/", {"Authorization": "Bearer right"}).status == 200
    assert lab.upstream.requests[-1].headers["authorization"] == "Bearer right"
    lab.upstream.answers["/v2/"] = reply_json(403, {})
    assert lab.ask("/v2/", {"Authorization": "Bearer right"}).status == 403


def test_a_basic_login_goes_to_the_real_realm_and_its_answer_comes_back_as_it_is(lab: Lab) -> None:
    answer = {"token": "hers", "refresh_token": "r", "expires_in": 60}
    lab.upstream.answers["/realm"] = reply_json(200, answer, {"Set-Cookie": "a=b"})
    query = (
        "account=alice&offline_token=true&scope=repository:app:pull&scope=repository:owner/x:pull,push&service=hub.test"
    )
    reply = lab.ask(f"/token?{query}", {"Authorization": BASIC})
    assert (reply.status, reply.json) == (200, answer)
    assert "set-cookie" not in reply.headers
    seen = tokens_fetched(lab)[0]
    assert seen.headers["authorization"] == BASIC
    assert seen.target == (
        "/realm?account=alice&offline_token=true&scope=repository%3Alibrary%2Fapp%3Apull"
        "&scope=repository%3Aowner%2Fx%3Apull%2Cpush&service=hub.test"
    )


def test_an_oauth2_login_goes_to_the_real_realm_as_a_post(lab: Lab) -> None:
    lab.upstream.answers["/realm"] = reply_json(200, {"access_token": "hers"})
    body = "grant_type=password&service=hub.test&username=alice&password=won%26der&scope=repository%3Aapp%3Apull"
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    assert lab.ask("/token", headers, "POST", body).json == {"access_token": "hers"}
    seen = tokens_fetched(lab)[0]
    assert (seen.method, seen.target) == ("POST", "/realm")
    assert seen.headers["content-type"] == "application/x-www-form-urlencoded"
    assert seen.body.decode() == body.replace("app%3A", "library%2Fapp%3A")


@pytest.mark.parametrize("status", [400, 401, 404, 405, 429])
def test_a_refused_login_comes_back_as_it_is(lab: Lab, status: int) -> None:
    lab.upstream.answers["/realm"] = reply_json(status, {"details": "no"}, {"Retry-After": "7"})
    reply = lab.ask("/token?service=hub.test", {"Authorization": BASIC})
    assert (reply.status, reply.json, reply.headers["retry-after"]) == (status, {"details": "no"}, "7")


@pytest.mark.parametrize("status", [302, 500, 503])
def test_a_realm_that_fails_a_login_is_502(lab: Lab, status: int) -> None:
    lab.upstream.answers["/realm"] = reply(status, b"<html>", {"Location": "http://127.0.0.1:1/"})
    reply_ = lab.ask("/token?service=hub.test", {"Authorization": BASIC})
    assert (reply_.status, reply_.code) == (502, "UNAVAILABLE")


def test_a_login_where_none_is_asked_for_is_refused(new_lab: Lab) -> None:
    new_lab.upstream.answers["/v2/"] = reply_json(200, {})
    assert (new_lab.ask("/token", {"Authorization": BASIC}).status) == 400


def test_a_scope_with_a_bad_name_goes_no_further(lab: Lab) -> None:
    reply = lab.ask("/token?scope=repository:../x:pull", {"Authorization": BASIC})
    assert (reply.status, reply.code) == (400, "NAME_INVALID")
    assert lab.upstream.requests == []


def test_a_form_that_is_too_large_is_refused(lab: Lab) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    reply = lab.ask("/token", headers, "POST", "grant_type=password&password=" + "x" * 70_000)
    assert (reply.status, reply.code) == (413, "BAD_REQUEST")


@pytest.mark.parametrize("authorization", ["Basic", "Basic Og==", "Digest x=y", "Bearer x", ""])
def test_what_is_no_login_is_none(lab: Lab, authorization: str) -> None:
    assert lab.ask("/token", {"Authorization": authorization}).json["token"] == "anonymous"
    assert lab.upstream.requests == []


@pytest.mark.parametrize("authorization", ["Basic !!!", "basic " + base64.b64encode(b"al\xefce:x").decode()])
def test_a_login_that_cannot_be_read_is_for_the_realm_to_refuse(lab: Lab, authorization: str) -> None:
    lab.upstream.answers["/realm"] = reply_json(401, {"details": "no"})
    assert lab.ask("/token?service=s", {"Authorization": authorization}).status == 401
    assert tokens_fetched(lab)[0].headers["authorization"] == authorization


@pytest.mark.parametrize("body", ["grant_type=authorization_code&code=x", '{"password": "x"}', ""])
def test_a_posted_login_that_is_not_understood_is_for_the_realm_to_refuse(lab: Lab, body: str) -> None:
    lab.upstream.answers["/realm"] = reply_json(400, {"details": "no"})
    assert lab.ask("/token", method="POST", body=body).status == 400


def test_a_login_whose_answer_is_cut_is_502(lab: Lab) -> None:
    lab.upstream.answers["/realm"] = reply(200, b'{"token": "cu', {"Content-Length": "100"})
    assert lab.ask("/token", {"Authorization": BASIC}).status == 502


def test_a_realms_web_page_is_not_shown(lab: Lab) -> None:
    lab.upstream.answers["/realm"] = reply(401, b"<html>", {"Content-Type": "text/html; charset=utf-8"})
    answer = lab.ask("/token", {"Authorization": BASIC})
    assert (answer.status, answer.code) == (401, "UNSUPPORTED")


@pytest.mark.parametrize("status", [400, 403, 404, 405, 410, 401])
def test_a_realm_that_moved_without_a_word_is_learnt_anew(lab: Lab, status: int) -> None:
    lab.upstream.answers["/realm"] = reply(status)
    assert lab.ask(lab.path).status in (401, 502)
    guard(lab.upstream, lab.manifest, CONTENT)
    assert lab.ask(lab.path).status == 200


@pytest.mark.parametrize("value", ['"a\x01b"', "a\x01b", '"\u00e9"'])
def test_a_challenge_with_odd_letters_breaks_no_answer(value: str) -> None:
    with Lab() as lab:
        challenge = f'Bearer realm="{token_realm(lab.upstream.url)}",service={value},error="x\x01y",odd=1'
        lab.upstream.answers["/v2/"] = reply(401, b"", {"WWW-Authenticate": challenge})
        answer = lab.ask("/v2/")
        assert (answer.status, answer.code) == (401, "UNAUTHORIZED")
        assert challenge_of(answer) == {"realm": f"{lab.mirror.url}/token"}


def test_those_who_wait_for_a_token_do_not_share_the_first_ones_patience(new_lab: Lab) -> None:
    """The first client leaves while the token is fetched; the second one gets it."""

    def slowly(request: Request, connection: socket.socket) -> None:
        time.sleep(1.5)
        connection.sendall(reply_json(200, {"token": "late"}))

    new_lab.ask("/v2/")
    new_lab.upstream.answers["/realm"] = slowly
    new_lab.upstream.answers[new_lab.manifest] = CONTENT
    with ThreadPoolExecutor(1) as pool, socket.create_connection(("127.0.0.1", new_lab.mirror.port)) as first:
        first.sendall(f"GET {new_lab.path} HTTP/1.1\r\nHost: m\r\n\r\n".encode())
        assert poll(lambda: bool(tokens_fetched(new_lab)), 10)
        second = pool.submit(new_lab.ask, new_lab.path)
        time.sleep(0.5)
        first.close()
        assert second.result().status == 200
    assert len(tokens_fetched(new_lab)) == 1


def test_a_ping_that_was_answered_by_mistake_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = mirror.Upstream(Config(), {"x": Registry("x", ("http://127.0.0.1:1",))}, Telemetry())
    site = mirror.Site.endpoint(Registry("x", ("http://127.0.0.1:1",)), 0)
    upstream._open_until[site.key] = time.monotonic() + mirror.OPEN_SECONDS
    assert upstream.challenge(site.registry, mirror.Trail()) is None
    upstream._open_until[site.key] = time.monotonic() - 1
    with pytest.raises(mirror.BadGateway):
        upstream.challenge(site.registry, mirror.Trail())


def test_with_login_off_no_challenge_is_ever_sent_and_no_credential_goes_on() -> None:
    with Lab(login="off") as lab:
        guard(lab.upstream, lab.manifest, CONTENT)
        assert lab.ask("/v2/").status == 200
        assert lab.upstream.requests == []
        assert lab.ask(lab.path, {"Authorization": "Bearer the-clients-own"}).status == 200
        assert lab.ask("/v2/", {"Authorization": "Bearer the-clients-own"}).status == 200
        assert (lab.ask("/token", {"Authorization": BASIC}).code) == "DENIED"
        lab.upstream.answers[lab.manifest] = refuse(token_realm(lab.upstream.url), "s", error="insufficient_scope")
        reply = lab.ask(lab.path)
        assert (reply.status, "www-authenticate" in reply.headers) == (403, False)
        sent = " ".join(request.headers.get("authorization", "") for request in lab.upstream.requests)
        assert "own" not in sent
        assert "Basic" not in sent


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(("login", "expected"), [("on", 401), ("off", 403)])
def test_a_realm_that_gives_everyone_no_token_asks_for_a_login(status: int, login: str, expected: int) -> None:
    with Lab(login=login) as lab:
        guard(lab.upstream, lab.manifest, CONTENT)
        lab.upstream.answers["/realm"] = reply_json(status, {"details": "no"})
        reply = lab.ask(lab.path)
        assert reply.status == expected
        assert lab.manifest.split("/")[3] in str(reply.json["errors"][0]["message"])


def test_a_registry_without_tokens_is_pinged_once_and_needs_no_login() -> None:
    with Lab() as lab:
        lab.reset()
        assert lab.ask("/v2/").status == 200
        assert lab.ask("/v2/").status == 200
        assert len(lab.upstream.requests) == 1


def test_a_registry_that_asks_for_basic_asks_the_client_for_it() -> None:
    with Lab() as lab:
        basic = reply_json(401, {}, {"WWW-Authenticate": 'Basic realm="the registry"'})
        lab.upstream.answers.update({"/v2/": basic, lab.manifest: basic})
        for path in ("/v2/", lab.path):
            answer = lab.ask(path)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, 'Basic realm="the registry"')
        assert lab.ask("/token", {"Authorization": BASIC}).status == 400, "it gives no tokens"
        lab.upstream.answers[lab.manifest] = CONTENT
        assert lab.ask(lab.path, {"Authorization": BASIC}).status == 200
        assert lab.upstream.requests[-1].headers["authorization"] == BASIC


def test_a_realm_on_a_foreign_host_is_told_nothing() -> None:
    with RawUpstream("127.0.0.9") as foreign, Lab() as lab:
        lab.upstream.answers[lab.manifest] = refuse(token_realm(foreign.url), "s")
        lab.upstream.answers["/v2/"] = refuse(token_realm(foreign.url), "s", None)
        assert lab.ask(lab.path).status == 502
        assert lab.ask("/token", {"Authorization": BASIC}).status == 502
        assert "127.0.0.9" in lab.ask("/v2/").json["errors"][0]["message"]
        assert foreign.requests == []


def test_a_realms_redirect_is_not_followed(lab: Lab) -> None:
    with RawUpstream("127.0.0.9") as foreign:
        lab.upstream.answers["/realm"] = reply(307, b"", {"Location": f"{foreign.url}/realm"})
        assert lab.ask("/token", {"Authorization": BASIC}).status == 502
        assert lab.ask(lab.path).status == 502
        assert foreign.requests == []


def test_a_foreign_realm_that_is_listed_is_used() -> None:
    with RawUpstream("127.0.0.9") as foreign, Lab(realms=(foreign.url,)) as lab:
        foreign.answers["/realm"] = reply_json(200, {"token": "t"})
        lab.upstream.answers["/v2/"] = refuse(token_realm(foreign.url), "s", None)
        lab.upstream.answers[lab.manifest] = CONTENT
        lab.ask("/v2/")
        assert lab.ask(lab.path).status == 200
        assert len(foreign.requests) == 1


BAD_TOKENS: list[bytes] = [
    reply(200, b"<html>"), reply(200, b""), reply_json(200, []), reply_json(200, {}), reply_json(200, {"token": 1}),
    reply_json(200, {"token": "a\r\nX: y"}), reply(200, b"[" * 100_000), reply(200, b"x" * (2 << 20)),
    reply(204), reply(307, b"", {"Location": "/elsewhere"}), reply(404), reply(500),
]  # fmt: skip


@pytest.mark.parametrize("answer", BAD_TOKENS, ids=lambda answer: repr(answer[9:40]))
def test_a_realm_that_gives_no_token_is_a_clean_refusal(lab: Lab, answer: bytes) -> None:
    lab.upstream.answers["/realm"] = answer
    reply_ = lab.ask(lab.path)
    assert (reply_.status, reply_.code) == (502, "UNAVAILABLE")


def test_a_realm_that_limits_is_429(lab: Lab) -> None:
    lab.upstream.answers["/realm"] = reply(429, b"slow down", {"Content-Type": "text/plain", "Retry-After": "30"})
    reply_ = lab.ask(lab.path)
    assert (reply_.status, reply_.code, reply_.headers["retry-after"]) == (429, "TOOMANYREQUESTS", "30")
    assert "slow down" in reply_.json["errors"][0]["message"]


def test_no_log_line_holds_a_credential() -> None:
    secrets = ("real-token", "the-clients-own", "wonderland", BASIC.split()[1], "r3fresh", "an0ther")
    with Lab(log_level="debug") as lab:
        guard(lab.upstream, lab.manifest, CONTENT)
        lab.ask(lab.path)
        lab.ask(lab.path, {"Authorization": "Bearer the-clients-own"})
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        lab.ask("/token?password=wonderland", {"Authorization": BASIC})
        lab.ask("/token", form, "POST", "grant_type=refresh_token&refresh_token=r3fresh")
        lab.upstream.answers["/realm"] = reply(500, b"an0ther")
        lab.ask("/token?password=wonderland", {"Authorization": BASIC})
        log = lab.mirror.log()
        assert '"GET /token" 200' in log
        assert [secret for secret in secrets if secret in log] == []


def test_two_workers_serve_one_client() -> None:
    with Lab() as lab, Mirror("--workers", "2", registries=_registries_file(lab)) as two:
        guard(lab.upstream, lab.manifest, CONTENT)
        assert {ask(two, lab.path).status for _ in range(10)} == {200}


def _registries_file(lab: Lab) -> Any:
    return lab.mirror._settings["MIRROR_REGISTRIES"]


@pytest.mark.parametrize(
    ("realm", "endpoint", "good"),
    [
        ("https://auth.docker.io/token", "https://registry-1.docker.io", True),
        ("https://ghcr.io/token", "https://ghcr.io", True),
        ("https://gitlab.com/jwt/auth", "https://registry.gitlab.com", True),
        ("https://docker-auth.elastic.co/auth", "https://docker.elastic.co", True),
        ("https://listed.example/x", "https://registry.example.org", True),
        ("https://listed.example:444/x", "https://registry.example.org", False),
        ("http://auth.docker.io/token", "https://registry-1.docker.io", False),
        ("https://evil.io/token", "https://ghcr.io", False),
        ("https://evil-docker.io/token", "https://registry-1.docker.io", False),
        ("https://10.0.0.2/token", "https://10.0.0.1", False),
        ("http://10.0.0.1:81/token", "http://10.0.0.1", True),
        ("ftp://10.0.0.1/token", "http://10.0.0.1", False),
        ("https://a:b:c/", "https://ghcr.io", False),
        ("", "https://ghcr.io", False),
        ("/token", "https://ghcr.io", False),
    ],
)
def test_a_realm_is_https_and_on_the_endpoints_site_or_listed(realm: str, endpoint: str, good: bool) -> None:
    registry = Registry("x", (endpoint,), realms=("https://listed.example",))
    if good:
        mirror.check_realm(registry, endpoint, realm)
    else:
        with pytest.raises(mirror.BadGateway):
            mirror.check_realm(registry, endpoint, realm)


def test_a_realm_with_a_query_keeps_it() -> None:
    challenge = mirror.Challenge("https://nvcr.io/proxy_auth?a=b", {})
    assert challenge.token_url("s") == "https://nvcr.io/proxy_auth?a=b&scope=s"


@pytest.mark.parametrize(
    ("headers", "realm"),
    [
        (['Bearer realm="https://a/b",service="c d"'], "https://a/b"),
        (["BEARER Realm=x"], "x"),
        (['Basic realm="no"', 'Bearer realm="yes"'], "yes"),
        (['Bearer service="s"'], ""),
        (["Basic realm=x"], "x"),
        (["Digest realm=x"], None),
        (["Bearer"], ""),
        ([""], None),
        ([], None),
    ],
)
def test_the_challenge_is_found_by_its_scheme_bearer_first(headers: list[str], realm: str | None) -> None:
    found = mirror.Challenge.parse(headers)
    assert (found.realm if found else None) == realm


@pytest.mark.parametrize(
    ("scope", "changed"),
    [
        ("repository:nginx:pull", "repository:NGINX:pull"),
        ("repository:a/b:pull,push", "repository:A/B:pull,push"),
        ("repository(plugin):x:pull", "repository(plugin):X:pull"),
        ("registry:catalog:*", "registry:catalog:*"),
        ("repository:a:pull repository:b/c:pull", "repository:A:pull repository:B/C:pull"),
        ("", ""),
        ("anything", "anything"),
    ],
)
def test_the_names_in_scopes_are_changed_and_nothing_else(scope: str, changed: str) -> None:
    assert mirror.map_scope(scope, str.upper) == changed


def test_the_store_forgets_the_oldest_of_too_many_tokens() -> None:
    store = mirror.TokenStore()
    live = time.monotonic() + 100
    fetched: list[str] = []

    def fetch(name: str) -> mirror.Token:
        fetched.append(name)
        return mirror.Token(name, live)

    for number in range(mirror.MAX_TOKENS + 1):
        store.get(("e", str(number)), lambda name=str(number): fetch(name))  # type: ignore[misc]
    store.get(("e", str(mirror.MAX_TOKENS)), lambda: fetch("not needed"))
    store.get(("e", "0"), lambda: fetch("again"))
    assert fetched[-2:] == [str(mirror.MAX_TOKENS), "again"]


@pytest.mark.parametrize(("lifetime", "seconds"), [(300, 270), (None, 54), ("300", 54), (-1, 54), (1e12, 54), (0, 54)])
def test_a_tokens_lifetime_is_read_with_care(lifetime: object, seconds: float) -> None:
    token = mirror.Token.parse(json.dumps({"token": "t", "expires_in": lifetime}).encode(), 1000.0)
    assert token == mirror.Token("t", 1000.0 + seconds)
