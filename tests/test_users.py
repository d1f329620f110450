"""The mirror's own users: who is not among them gets nothing, and the mirror pulls as itself."""

import base64
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import bcrypt
import pytest
from clients import Podman
from clients import Skopeo
from conftest import needs
from hub import Hub
from lab import DIGEST
from lab import Lab
from lab import Reply
from lab import reply_json
from processes import StartFailed
from pulls import succeeds
from serving import Mirror

from mirror import USER_TOKEN_SECONDS
from mirror import Challenge
from mirror import Unauthorized
from mirror import Users
from mirror import bcrypt_matches
from settings import Config
from settings import ConfigError
from settings import load_users

USER, PASSWORD = "bob", "the builder: can he?"
PATH = "/v2/app/manifests/latest"
SCOPE = "repository:library/app:pull"
CHALLENGE = Challenge("", {})


def htpasswd(folder: Path, **users: str) -> Path:
    """Write a file as `htpasswd -B` does."""
    file = folder / "htpasswd"
    lines = (f"{user}:{bcrypt.hashpw(word.encode(), bcrypt.gensalt(4)).decode()}" for user, word in users.items())
    file.write_text("# who may pull\n\n" + "\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return htpasswd(tmp_path_factory.mktemp("users"), **{USER: PASSWORD, "eve": "x"})


@pytest.fixture(scope="module")
def lab(users: Path) -> Iterator[Lab]:
    with Lab(users=users) as lab:
        lab.upstream.default = reply_json(200, {"right": True})
        yield lab


_clients = itertools.count(1)


def basic(user: str, password: str) -> dict[str, str]:
    """Return the login of a client of its own: wrong ones are counted for each."""
    encoded = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"Basic {encoded}", "X-Forwarded-For": f"192.0.2.{next(_clients) % 250}"}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def token(lab: Lab) -> str:
    answer = lab.ask(f"/token?service=docker-mirror&scope={SCOPE}", basic(USER, PASSWORD))
    assert answer.status == 200
    return str(answer.json["token"])


def unauthorized(answer: Reply) -> bool:
    return (answer.status, answer.code) == (401, "UNAUTHORIZED")


def test_a_user_logs_in_and_pulls(lab: Lab) -> None:
    assert lab.ask("/v2/", bearer(token(lab))).status == 200
    assert lab.ask(PATH, bearer(token(lab))).json == {"right": True}


def test_the_token_of_a_user_does_not_go_upstream(lab: Lab) -> None:
    lab.upstream.requests.clear()
    lab.ask(PATH, bearer(token(lab)))
    assert lab.upstream.requests
    assert all("authorization" not in request.headers for request in lab.upstream.requests)


@pytest.mark.parametrize("path", ["/v2/", PATH, f"/v2/app/blobs/{DIGEST}", "/v2/app/tags/list", "/v1/search?q=x"])
@pytest.mark.parametrize("headers", [{}, basic(USER, PASSWORD), bearer("anonymous"), bearer("x"), bearer("")])
def test_nobody_else_gets_anything(lab: Lab, path: str, headers: dict[str, str]) -> None:
    lab.upstream.requests.clear()
    assert unauthorized(lab.ask(path, headers))
    assert lab.upstream.requests == []


def test_the_challenge_names_the_mirror_and_what_is_asked_for(lab: Lab) -> None:
    realm = f'Bearer realm="{lab.mirror.url}/token",service="docker-mirror"'
    assert lab.ask("/v2/").headers["www-authenticate"] == realm
    assert lab.ask(PATH).headers["www-authenticate"] == f'{realm},scope="{SCOPE}"'
    stale = lab.ask(PATH, bearer("x")).headers["www-authenticate"]
    assert stale == f'{realm},scope="{SCOPE}",error="invalid_token"'


@pytest.mark.parametrize(
    "headers",
    [
        {},
        basic(USER, "wrong"),
        basic("nobody", PASSWORD),
        basic(USER, ""),
        basic("", ""),
        basic(USER, "\0" * 9),
        basic(USER, "x" * 100),
        basic("eve", PASSWORD),
        {"Authorization": "Basic ?"},
        {"Authorization": "Basic"},
    ],
)
def test_a_wrong_login_gets_no_token(lab: Lab, headers: dict[str, str]) -> None:
    answer = lab.ask("/token?service=docker-mirror", headers)
    assert unauthorized(answer)
    assert answer.headers["www-authenticate"] == 'Basic realm="docker-mirror"'


def post(lab: Lab, **form: str) -> Reply:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    return lab.ask("/token", headers, "POST", urlencode(form))


def test_a_login_by_oauth2_gives_a_token_too(lab: Lab) -> None:
    answer = post(lab, grant_type="password", username=USER, password=PASSWORD, service="docker-mirror", scope=SCOPE)
    assert lab.ask(PATH, bearer(answer.json["access_token"])).status == 200
    assert unauthorized(post(lab, grant_type="password", username=USER, password="wrong"))
    assert post(lab, grant_type="refresh_token", refresh_token="x").status == 400, "containerd goes on with GET"


def test_the_log_names_no_password(lab: Lab) -> None:
    since = lab.mirror.mark()
    lab.ask("/token", basic(USER, "sesame"))
    post(lab, grant_type="password", username=USER, password="sesame")
    lab.mirror.wait_for_requests(2, since)
    assert "sesame" not in lab.mirror.log(since)


def test_upstreams_refusal_asks_nobody_for_a_login(lab: Lab) -> None:
    refusal = reply_json(401, {}, {"WWW-Authenticate": f'Bearer realm="{lab.upstream.url}/realm"'})
    lab.upstream.answers |= {
        "/v2/library/closed/manifests/latest": refusal,
        "/realm": reply_json(200, {"token": "of-the-mirror"}),
    }
    assert lab.ask("/v2/closed/manifests/latest", bearer(token(lab))).status == 403


def test_a_stranger_does_not_learn_what_is_served(lab: Lab) -> None:
    for path in ("/v2/evil.example/x/manifests/a", "/v2/NO/manifests/a", "/token/nosuch"):
        assert unauthorized(lab.ask(path))


def test_who_guesses_has_to_wait_and_nobody_else(lab: Lab) -> None:
    guess = basic(USER, "wrong")
    assert {lab.ask("/token", guess).status for _ in range(10)} == {401}
    answer = lab.ask("/token", guess)
    assert (answer.status, answer.headers["retry-after"]) == (429, "60")
    assert lab.ask("/token", basic(USER, PASSWORD)).status == 200


def test_tokens_outlive_the_mirror_and_are_good_on_another_host(lab: Lab, users: Path) -> None:
    with Lab(users=users) as other:
        assert other.ask("/v2/", bearer(token(lab))).status == 200


def test_tokens_end_with_the_file(lab: Lab, tmp_path: Path) -> None:
    with Lab(users=htpasswd(tmp_path, **{USER: PASSWORD})) as other:
        assert unauthorized(other.ask("/v2/", bearer(token(lab))))


def test_tokens_are_known_to_all_workers(users: Path) -> None:
    with Mirror("--workers", "2", users=users) as mirror:
        lab = Lab()
        lab.mirror = mirror
        given = token(lab)
        assert {lab.ask("/v2/", bearer(given)).status for _ in range(20)} == {200}


def test_a_token_ends_after_a_quarter_of_an_hour(users: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known, now = Users(load_users(Config(users=str(users)))), time.time()
    given = f"Bearer {known.token(USER, PASSWORD, '192.0.2.1')}"
    known.admit(given, CHALLENGE)
    monkeypatch.setattr(time, "time", lambda: now + USER_TOKEN_SECONDS + 2)
    with pytest.raises(Unauthorized):
        known.admit(given, CHALLENGE)


def test_a_password_of_more_than_72_bytes_is_never_right() -> None:
    encoded = bcrypt.hashpw(b"x" * 72, bcrypt.gensalt(4))
    assert bcrypt_matches(b"x" * 72, encoded)
    assert not bcrypt_matches(b"x" * 73, encoded)


def test_other_requests_go_on_while_many_passwords_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "htpasswd"
    file.write_text(f"slow:{bcrypt.hashpw(b'x', bcrypt.gensalt(11)).decode()}\n")
    with Lab(users=file) as lab:
        found: list[int] = []
        threads = [
            threading.Thread(target=lambda word=word: found.append(lab.ask("/token", basic("slow", word)).status))
            for word in map(str, range(40))
        ]
        one = basic("slow", "wrong")
        for _ in range(5):
            threads.append(threading.Thread(target=lambda: found.append(lab.ask("/token", one).status)))
        for thread in threads:
            thread.start()
        assert lab.ask("/healthz").status == 200
        assert len(found) < 45, "they are still being checked, one at a time"
        for thread in threads:
            thread.join()
        assert set(found) == {401, 429}, "no more than 20 wait"


# The file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names nobody"),
        ("# nobody\n", "names nobody"),
        ("bob:secret\n", "line 1 is not USER:HASH with bcrypt"),
        ("bob:{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g=\n", "line 1 is not"),
        ("bob:$apr1$abc$def\n", "htpasswd -B"),
        (":$2y$05$" + "a" * 53, "line 1 is not"),
        ("bob:$2y$31$" + "a" * 53, "line 1 is not"),
        ("bob:$2y$05$" + "a" * 53, "line 1 is not"),
        ("bob:$2y$05$" + "." * 53 + "\nbob:$2y$05$" + "." * 53, "line 2 names a user a second time"),
    ],
)
def test_a_file_that_does_not_do_stops_the_start(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "htpasswd"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"MIRROR_USERS: .*{message}"):
        load_users(Config.from_environ({"MIRROR_USERS": str(file)}))
    with pytest.raises(StartFailed, match=message), Mirror(users=file):
        pass


def test_a_file_that_is_not_there_stops_the_start() -> None:
    with pytest.raises(ConfigError, match=r"MIRROR_USERS: /no/where: No such file"):
        load_users(Config.from_environ({"MIRROR_USERS": "/no/where"}))


def test_a_relative_path_is_one_of_systemds_credentials(users: Path) -> None:
    environ = {"MIRROR_USERS": users.name, "CREDENTIALS_DIRECTORY": str(users.parent)}
    assert set(load_users(Config.from_environ(environ))) == {USER, "eve"}


def test_two_kinds_of_logins_contradict_each_other(users: Path) -> None:
    with pytest.raises(ConfigError, match=r"^MIRROR_USERS: "):
        Config.from_environ({"MIRROR_USERS": str(users), "MIRROR_LOGIN": "on"})
    assert Config.from_environ({"MIRROR_USERS": str(users)}).login is False
    assert Config.from_environ({"MIRROR_USERS": str(users), "MIRROR_LOGIN": "off"}).login is False


# Real clients


@pytest.fixture(scope="module")
def closed(hub: Hub, users: Path) -> Iterator[Mirror]:
    with Mirror(registries=hub.registries_file, users=users) as mirror:
        yield mirror


def test_skopeo_copies_an_image_as_a_user_only(closed: Mirror, tmp_path: Path) -> None:
    needs("skopeo")
    with Skopeo(closed.url) as skopeo:
        image = f"docker://{closed.host}/library/hello-world:latest"
        copy = ("skopeo", "copy", "--src-tls-verify=false", image, f"dir:{tmp_path}/image")
        assert "unauthorized" in skopeo.run(*copy).stderr.lower()
        succeeds(skopeo.run(*copy[:2], "--src-creds", f"{USER}:{PASSWORD}", *copy[2:]))


def test_podman_logs_in_and_pulls(closed: Mirror) -> None:
    needs("root", "podman")
    with Podman(closed.url) as podman:
        login = ("podman", "login", "--tls-verify=false", "--username", USER, "--password-stdin", closed.host)
        assert podman.run(*login, stdin="wrong").returncode != 0
        succeeds(podman.run(*login, stdin=PASSWORD))
