"""Several endpoints: the next one answers when one limits or fails, and a failing one is left alone for a while."""

import socket
import time
from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC
from datetime import datetime
from datetime import timedelta

import pytest
from lab import Reply
from lab import ask
from lab import guard
from lab import refuse
from lab import reply_json
from processes import free_port
from serving import Mirror
from upstream import Answer
from upstream import RawUpstream
from upstream import Request
from upstream import reply
from upstream import token_realm
from werkzeug.http import http_date

import mirror

MANIFEST = "/v2/library/app/manifests/latest"
PATH = "/v2/app/manifests/latest"
FIRST, SECOND = reply_json(200, {"from": "first"}), reply_json(200, {"from": "second"})


class Pair:
    """Run a mirror with two endpoints."""

    def __init__(self, first: RawUpstream, second: RawUpstream, running: Mirror):
        self.first = first
        self.second = second
        self.mirror = running

    def ask(self, path: str = PATH, **headers: str) -> Reply:
        """Ask the mirror."""
        return ask(self.mirror, path, headers)


@pytest.fixture
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with RawUpstream() as first, RawUpstream("127.0.0.9") as second:
        second.answers[MANIFEST] = SECOND
        with mirror_of(tmp_path_factory, first.url, second.url) as running:
            yield Pair(first, second, running)


@contextmanager
def mirror_of(tmp_path_factory: pytest.TempPathFactory, *endpoints: str, more: str = "") -> Iterator[Mirror]:
    file = tmp_path_factory.mktemp("mirror") / "registries.toml"
    urls = ", ".join(f'"{url}"' for url in endpoints)
    file.write_text(f'["docker.io"]\nendpoints = [{urls}]\n{more}\n')
    with Mirror(registries=file, connect_timeout=1, first_byte_timeout=3) as running:
        yield running


def hangs(request: Request, connection: socket.socket) -> None:
    connection.settimeout(20)
    connection.recv(1)


def resets(request: Request, connection: socket.socket) -> None:
    connection.close()


@pytest.mark.parametrize(
    "failure",
    [
        reply(429, b"slow down", {"Content-Type": "text/plain"}),
        reply(429, b"", {"Retry-After": "5"}),
        reply(500, b"<html>"),
        reply(503, b"<html>busy</html>", {"Content-Type": "text/html"}),
        reply(307, b"", {"Location": "http://127.0.0.1:1/"}),
        b"garbage",
        hangs,
        resets,
    ],
    ids=["429", "429-after", "500", "html-503", "dead-storage", "garbage", "hangs", "resets"],
)
def test_the_next_endpoint_answers_and_the_failing_one_is_left_alone(pair: Pair, failure: Answer) -> None:
    pair.first.answers[MANIFEST] = failure
    assert pair.ask().json == {"from": "second"}
    asked = len(pair.first.requests)
    assert pair.ask().json == {"from": "second"}
    assert len(pair.first.requests) == asked, "it cools down"
    assert "is left alone for" in pair.mirror.log()


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_an_endpoint_that_is_down_or_speaks_no_tls_is_passed_over(
    tmp_path_factory: pytest.TempPathFactory, scheme: str
) -> None:
    with RawUpstream() as plain, RawUpstream("127.0.0.9") as second:
        second.answers[MANIFEST] = SECOND
        port = free_port("127.0.0.1") if scheme == "http" else plain.host.partition(":")[2]
        with mirror_of(tmp_path_factory, f"{scheme}://127.0.0.1:{port}", second.url) as running:
            assert ask(running, PATH).json == {"from": "second"}


@pytest.mark.parametrize("status", [404, 401, 403, 400])
def test_a_refusal_is_an_answer(pair: Pair, status: int) -> None:
    pair.first.answers[MANIFEST] = reply_json(status, {"errors": [{"code": "X"}]})
    expected = {401: 403}.get(status, status)
    assert pair.ask().status == expected
    pair.first.answers[MANIFEST] = FIRST
    assert pair.ask().json == {"from": "first"}
    assert pair.second.requests == []


def test_an_endpoint_whose_token_service_limits_is_passed_over(pair: Pair) -> None:
    pair.first.answers[MANIFEST] = refuse(token_realm(pair.first.url), "s")
    pair.first.answers["/realm"] = reply(429)
    assert pair.ask().json == {"from": "second"}


def test_a_fallback_endpoint_has_its_own_challenge_and_token(pair: Pair) -> None:
    pair.first.answers[MANIFEST] = reply(500)
    guard(pair.second, MANIFEST, SECOND)
    assert pair.ask().json == {"from": "second"}
    assert len(pair.second.asked("/realm")) == 1
    assert pair.first.asked("/realm") == []


def test_a_503s_retry_after_is_kept_to(pair: Pair) -> None:
    pair.first.answers[MANIFEST] = reply(503, b"", {"Retry-After": "200"})
    assert pair.ask().json == {"from": "second"}
    assert "is left alone for 200 s" in pair.mirror.log()


@pytest.mark.parametrize("status", [400, 403, 429])
def test_a_storage_hosts_refusal_of_one_object_puts_nothing_to_sleep(pair: Pair, status: int) -> None:
    with RawUpstream("127.0.0.11") as storage:
        storage.answers["/data"] = reply(status, b"", {"Retry-After": "3600"})
        pair.first.answers[MANIFEST] = reply(307, b"", {"Location": f"{storage.url}/data"})
        assert pair.ask().json == {"from": "second"}
        pair.first.answers[MANIFEST] = FIRST
        assert pair.ask().json == {"from": "first"}


def test_those_who_ask_while_one_tries_again_wait_for_what_it_learns(pair: Pair) -> None:
    pair.first.answers[MANIFEST] = pair.second.answers[MANIFEST] = reply(503, b"", {"Retry-After": "1"})
    assert pair.ask().status == 502
    pair.first.answers[MANIFEST] = pair.second.answers[MANIFEST] = FIRST
    time.sleep(1.1)
    with ThreadPoolExecutor(6) as pool:
        assert [answer.status for answer in pool.map(lambda _: pair.ask(), range(6))] == [200] * 6


def test_the_mirrors_own_account_reaches_no_fallback(tmp_path_factory: pytest.TempPathFactory) -> None:
    with RawUpstream() as first, RawUpstream("127.0.0.9") as second:
        first.answers[MANIFEST] = reply(500)
        guard(second, MANIFEST, SECOND)
        account = 'username = "alice"\npassword = "wonderland"'
        with mirror_of(tmp_path_factory, first.url, second.url, more=account) as running:
            assert ask(running, PATH).json == {"from": "second"}
        sent = [request.headers.get("authorization") for request in second.requests]
        assert sent == [None, None, "Bearer real-token-1"]


def test_a_fallback_endpoint_may_have_a_path(tmp_path_factory: pytest.TempPathFactory) -> None:
    with RawUpstream() as first, RawUpstream("127.0.0.9") as second:
        first.answers[MANIFEST] = reply(500)
        second.answers["/some/path" + MANIFEST] = SECOND
        with mirror_of(tmp_path_factory, first.url, f"{second.url}/some/path") as running:
            assert ask(running, PATH).json == {"from": "second"}


def test_a_clients_own_credentials_go_to_the_first_endpoint_only(pair: Pair) -> None:
    pair.first.answers[MANIFEST] = reply(500)
    assert pair.ask(Authorization="Bearer the-clients-own").status == 502
    assert pair.second.requests == []
    pair.ask()
    pair.ask(Authorization="Bearer the-clients-own")
    assert "the-clients-own" in pair.first.requests[-1].headers["authorization"], "cooling or not"
    assert not any("authorization" in request.headers for request in pair.second.requests)


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        (reply(429, b"", {"Retry-After": "77"}), reply(500), 429),
        (reply(500), reply(429, b"", {"Retry-After": "77"}), 429),
        (reply(500), reply(503), 502),
        (hangs, reply(500), 504),
    ],
)
def test_when_all_fail_the_most_telling_answer_is_given(pair: Pair, first: Answer, second: Answer, status: int) -> None:
    pair.first.answers[MANIFEST], pair.second.answers[MANIFEST] = first, second
    answer = pair.ask()
    assert answer.status == status
    if status == 429:
        assert answer.headers["retry-after"] == "77"


@pytest.mark.parametrize("failure", [reply(429), reply(503), hangs], ids=["429", "503", "hangs"])
def test_the_ping_goes_on_without_the_first_endpoint(pair: Pair, failure: Answer) -> None:
    pair.first.answers["/v2/"] = failure
    for _ in range(2):
        answer = pair.ask("/v2/")
        assert (answer.status, answer.headers["www-authenticate"]) == (401, f'Bearer realm="{pair.mirror.url}/token"')
    assert len(pair.first.requests) == 1, "it cools down"
    assert pair.ask("/token").status == 200
    assert pair.ask("/token", Authorization="Basic YTpi").status == 502
    assert pair.ask().json == {"from": "second"}


def test_when_all_cool_down_the_client_is_told_when_to_come_again(pair: Pair) -> None:
    pair.first.answers[MANIFEST] = pair.second.answers[MANIFEST] = reply(500)
    pair.ask()
    seen = len(pair.first.requests) + len(pair.second.requests)
    answer = pair.ask()
    assert (answer.status, answer.code) == (503, "UNAVAILABLE")
    assert 1 <= int(answer.headers["retry-after"]) <= 30
    assert len(pair.first.requests) + len(pair.second.requests) == seen


def test_after_its_pause_an_endpoint_is_used_again(pair: Pair) -> None:
    pair.first.answers[MANIFEST] = reply(429, b"", {"Retry-After": "1"})
    assert pair.ask().json == {"from": "second"}
    pair.first.answers[MANIFEST] = FIRST
    time.sleep(1.1)
    assert pair.ask().json == {"from": "first"}
    assert "answers again" in pair.mirror.log()


def test_all_endpoints_hang_and_the_answer_still_comes_in_time(pair: Pair) -> None:
    pair.first.answers[MANIFEST] = pair.second.answers[MANIFEST] = hangs
    started = time.monotonic()
    assert pair.ask().status == 504
    assert time.monotonic() - started < 20, "of 4 s, were this machine not a busy one"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that lets seconds pass."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


E, F = ("x", "http://e", ""), ("x", "http://f", "")


def test_a_pause_doubles_from_half_a_minute_to_ten(clock: Callable[[float], None]) -> None:
    cooldowns = mirror.Cooldowns()
    pauses = []
    for _ in range(7):
        assert cooldowns.take(E, 25)
        cooldowns.failed(E, time.monotonic(), None)
        pauses.append(cooldowns.wait([E]))
        assert not cooldowns.take(E, 25)
        clock(pauses[-1])
    assert pauses == [30, 60, 120, 240, 480, 600, 600]
    cooldowns.succeeded(E, time.monotonic())
    cooldowns.failed(E, time.monotonic(), None)
    assert cooldowns.wait([E]) == 30


def test_after_a_pause_one_request_tries_and_the_others_wait(clock: Callable[[float], None]) -> None:
    cooldowns = mirror.Cooldowns()
    cooldowns.failed(E, time.monotonic(), None)
    clock(30)
    assert [cooldowns.take(E, 25) for _ in range(3)] == [True, False, False]
    assert cooldowns.tried([E, F])
    clock(25)
    assert cooldowns.take(E, 25), "the one that tried was never heard of again"
    cooldowns.give_up(E)
    assert cooldowns.take(E, 25), "its client left"


def test_many_requests_that_meet_one_failure_count_once(clock: Callable[[float], None]) -> None:
    cooldowns = mirror.Cooldowns()
    began = time.monotonic()
    for _ in range(10):
        clock(1)
        cooldowns.failed(E, began, None)
    assert cooldowns.wait([E]) == 21, "30 seconds from the first"


def test_an_older_requests_success_does_not_end_a_pause(clock: Callable[[float], None]) -> None:
    cooldowns = mirror.Cooldowns()
    began = time.monotonic()
    clock(1)
    cooldowns.failed(E, time.monotonic(), 600)
    cooldowns.succeeded(E, began)
    assert cooldowns.cooling(E)


def test_retry_after_is_kept_to_and_doubles_nothing(clock: Callable[[float], None]) -> None:
    cooldowns = mirror.Cooldowns()
    cooldowns.failed(E, time.monotonic(), 90)
    cooldowns.failed(F, time.monotonic(), 0)
    assert (cooldowns.wait([E]), cooldowns.wait([E, F])) == (90, 1)
    clock(90)
    cooldowns.failed(E, time.monotonic(), None)
    assert cooldowns.wait([E]) == 30


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 5), ("0", 0), ("999999", 21600), ("x", None), ("", None), ("-5", None), ("1e3", None), ("9" * 50, None)],
)
def test_retry_after_is_read_with_care(text: str, seconds: float | None) -> None:
    assert mirror.retry_after({"Retry-After": text}) == seconds


def test_retry_after_may_be_a_date() -> None:
    soon = mirror.retry_after({"Retry-After": http_date(datetime.now(UTC) + timedelta(seconds=100))})
    assert soon is not None
    assert 90 < soon <= 100
    assert mirror.retry_after({"Retry-After": "Sat, 01 Jan 2000 00:00:00 GMT"}) == 0
