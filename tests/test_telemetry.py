"""What the mirror counts, as /status.json gives it: each figure is held against what real servers and clients did."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import time
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from depot import Depot
from depot import cached_lab
from images import digest_of
from lab import DIGEST
from lab import MANIFEST
from lab import Lab
from lab import ask
from lab import reply_json
from processes import poll
from serving import HOST
from serving import Mirror
from upstream import RawUpstream
from upstream import reply

import mirror
import telemetry
from settings import Config
from settings import Registry
from telemetry import FRAME
from telemetry import Board
from telemetry import Run
from telemetry import Telemetry

MIB = 1 << 20
CLIENT = {"X-Forwarded-For": "203.0.113.7"}
CONTENT = os.urandom(3 * MIB)
CONTENT_PATH = f"/v2/library/app/blobs/{digest_of(CONTENT)}"


def status(mirror: Mirror) -> Any:
    """Return what the status page shows."""
    return ask(mirror, "/status.json").json


def wait_for(mirror: Mirror, is_so: Callable[[Any], Any]) -> Any:
    """Return the first status of which something is so: another worker tells it a second later."""
    found: list[Any] = []

    def look() -> bool:
        found[:] = [status(mirror)]
        return bool(is_so(found[0]))

    assert poll(look, 20), json.dumps({**found[0], "hour": ""}, indent=1)
    return found[0]


@contextlib.contextmanager
def taking(mirror: Mirror, path: str, count: int) -> Iterator[http.client.HTTPResponse]:
    """Ask for a blob, and yield the answer once so many bytes of it are read."""
    connection = http.client.HTTPConnection(HOST, mirror.port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=CLIENT)
        response = connection.getresponse()
        assert response.status == 200
        assert len(response.read(count)) == count
        yield response


def endpoint(found: Any, registry: str = "docker.io", number: int = 0) -> Any:
    return [one for one in found["endpoints"] if one["registry"] == registry][number]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(connect_timeout=1, first_byte_timeout=3, idle_timeout=2) as running:
        yield running


def test_a_running_transfer_is_shown_until_it_ends(lab: Lab) -> None:
    lab.reset()
    depot = Depot(CONTENT, pause=2 * MIB)
    lab.upstream.answers[CONTENT_PATH] = depot
    with taking(lab.mirror, CONTENT_PATH, 2 * MIB) as response:
        found = wait_for(lab.mirror, lambda found: found["transfers"] and found["transfers"][0]["sent"] >= 2 * MIB)
        (shown,) = found["transfers"]
        assert found["running"] == 1
        assert shown["image"] == "docker.io/library/app"
        assert shown["digest"] == digest_of(CONTENT)
        assert shown["client"] == "203.0.113.7"
        assert shown["size"] == len(CONTENT)
        assert shown["sent"] == 2 * MIB
        depot.go.set()
        assert len(response.read()) == MIB
    found = wait_for(lab.mirror, lambda found: not found["running"])
    assert found["transfers"] == []
    pull = found["pulls"][0]
    assert (pull["image"], pull["client"], pull["blobs"], pull["bytes"]) == (
        "docker.io/library/app", "203.0.113.7", 1, len(CONTENT)
    )  # fmt: skip
    assert sum(found["hour"]["sent"]) >= len(CONTENT)
    assert sum(found["hour"]["received"]) >= len(CONTENT)


def test_a_pull_by_tag_is_one_line_with_its_blobs(lab: Lab) -> None:
    lab.reset()
    client = {"X-Forwarded-For": "203.0.113.9"}
    small = b"x" * 100
    lab.upstream.answers[MANIFEST] = reply_json(200, {})
    lab.upstream.answers[f"/v2/library/app/manifests/{DIGEST}"] = reply_json(200, {})
    lab.upstream.answers[f"/v2/library/app/blobs/{digest_of(small)}"] = reply(200, small)
    for path in (MANIFEST, f"/v2/library/app/manifests/{DIGEST}", f"/v2/library/app/blobs/{digest_of(small)}"):
        assert ask(lab.mirror, path, client).status == 200
    (pull,) = [pull for pull in status(lab.mirror)["pulls"] if pull["client"] == "203.0.113.9"]
    assert (pull["reference"], pull["blobs"], pull["bytes"], pull["status"]) == ("latest", 1, 100, 200)


def test_quota_is_shown_as_the_registry_told_it_last(lab: Lab) -> None:
    lab.reset()
    for left in (80, 76):
        limits = {"RateLimit-Limit": "100;w=21600", "RateLimit-Remaining": f"{left};w=21600"}
        lab.upstream.answers[MANIFEST] = reply_json(200, {}, limits)
        assert ask(lab.mirror, MANIFEST).status == 200
    (quota,) = status(lab.mirror)["quotas"]
    assert (quota["registry"], quota["limit"], quota["remaining"], quota["window"]) == ("docker.io", 100, 76, 21600)


def test_nonsense_about_a_quota_is_ignored() -> None:
    told = Telemetry()
    for text in ("", "x", "-1;w=5", "1" * 30, "5;w="):
        told.quota("r", "u", text, "7")
        told.quota("r", "u", "7", text)
    assert told.report()["quotas"] == []


def test_an_endpoint_is_unknown_then_up_then_failing_then_up(lab: Lab) -> None:
    with Lab() as fresh:
        assert endpoint(status(fresh.mirror))["state"] == "unknown"
        fresh.upstream.answers[MANIFEST] = reply_json(404, {"errors": [{"code": "MANIFEST_UNKNOWN"}]})
        assert ask(fresh.mirror, MANIFEST).status == 404
        assert endpoint(status(fresh.mirror))["state"] == "up"
        fresh.upstream.answers[MANIFEST] = reply(503)
        assert ask(fresh.mirror, MANIFEST).status == 502
        found = endpoint(status(fresh.mirror))
        assert (found["state"], found["reason"]) == ("failing", "answer")
        assert "503" in found["why"]
        fresh.upstream.answers[MANIFEST] = reply_json(200, {})
        assert ask(fresh.mirror, MANIFEST).status == 200
        assert endpoint(status(fresh.mirror))["state"] == "up"


def test_a_limiting_endpoint_cools_down_and_says_until_when(tmp_path: Path) -> None:
    with RawUpstream() as first, RawUpstream() as second:
        first.default = reply(429, b"", {"Retry-After": "120"})
        second.answers[MANIFEST] = reply_json(200, {})
        file = tmp_path / "registries.toml"
        file.write_text(f'["docker.io"]\nendpoints = ["{first.url}", "{second.url}"]\n')
        with Mirror(registries=file) as mirror:
            assert ask(mirror, MANIFEST).status == 200
            found = status(mirror)
    cooling, up = endpoint(found), endpoint(found, number=1)
    assert (cooling["state"], cooling["reason"], up["state"]) == ("cooling", "limited", "up")
    assert 100 < cooling["until"] - found["at"] <= 120


def test_all_workers_are_one_report_and_a_killed_one_leaves_its_counts(lab: Lab) -> None:
    lab.reset()
    lab.upstream.answers[MANIFEST] = reply_json(200, {})
    with Mirror("--workers", "2", registries=lab.registries) as mirror:
        assert wait_for(mirror, lambda found: found["workers"] == 2)["memory"] > 10 * MIB
        lab.upstream.answers[CONTENT_PATH] = Depot(CONTENT, pause=2 * MIB)
        clients = contextlib.ExitStack()
        with clients:
            for _ in range(8):
                clients.enter_context(taking(mirror, CONTENT_PATH, 1000))
            assert len(wait_for(mirror, lambda found: found["running"] == 8)["transfers"]) == 8
        wait_for(mirror, lambda found: not found["running"])
        for _ in range(20):
            assert ask(mirror, MANIFEST).status == 200
        poll(lambda: False, 2)  # until both have told
        before = sum(status(mirror)["hour"]["sent"])
        assert before >= 8 * 1000 + 20 * 2
        os.kill(mirror.pids()[1], signal.SIGKILL)
        found = wait_for(mirror, lambda found: found["workers"] == 2 and len(mirror.pids()) == 3)
        assert sum(found["hour"]["sent"]) == before


@pytest.mark.parametrize("path", ["/status", "/status.json", "/metrics"])
def test_only_those_who_may_see_it_learn_that_it_is_there(lab: Lab, path: str) -> None:
    assert ask(lab.mirror, path).status == 200
    assert ask(lab.mirror, path, CLIENT).status == 404
    with Mirror(status="203.0.113.0/24", metrics="203.0.113.0/24", allow_clients="198.51.100.1") as mirror:
        assert ask(mirror, path, CLIENT).status == 200
        assert ask(mirror, path).status == 403  # as at any path
    with Mirror(status="off", metrics="off") as mirror:
        assert ask(mirror, path).status == 404


def test_a_slot_of_the_board_is_read_whole_or_not_at_all() -> None:
    board = Board()
    board.write(b"nobody has a slot yet")
    assert board.take() == b""
    board.write(b"zero")
    board.write(b"one")
    child = os.fork()
    if not child:  # another process: it sees what the first one wrote, and gets another slot
        board._own = None
        is_right = board.take() == b"" and list(board.others()) == [(b"one", True)]
        board.write(b"two")
        os._exit(0 if is_right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert list(board.others()) == [(b"two", False)]


def test_of_a_page_that_was_torn_the_one_before_is_read() -> None:
    board, reader = Board(), Board()
    reader._fd = os.dup(board._fd)  # which the locks are not: only what is read counts here
    board.take()
    board.write(b"one")
    board.write(b"two")
    os.pwrite(board._fd, b"x", board._place(0, board._number % 2) + FRAME.size)
    assert [content for content, _ in reader.others()] == [b"one"]


def test_the_hour_forgets_what_is_older(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000_000.0
    monkeypatch.setattr(telemetry, "time", SimpleNamespace(time=lambda: now, monotonic=time.monotonic))
    told = Telemetry()
    told.received("r", 5)
    assert told.report()["hour"]["received"][-1] == 5
    now += 3590
    told.received("r", 7)
    found = told.report()["hour"]["received"]
    assert (found[0], found[-1], len(found)) == (5, 7, 360)
    now += 10
    told.received("r", 1)
    assert told.report()["hour"]["received"][0] == 0
    now -= 100_000
    told.received("r", 3)
    assert sum(told.report()["hour"]["received"]) == 3, "a clock that is set back leaves no future behind"


class Clock:
    """Stand in for telemetry's clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000_000.0
        monkeypatch.setattr(telemetry, "time", SimpleNamespace(time=lambda: self.now, monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def whole(run: Run, size: int) -> None:
    """Let a transfer run to its end."""
    run.begin(size, "")
    run.add(size)
    run.outcome = "whole"
    run.end()
    run.end()  # does nothing


def test_blobs_that_take_long_belong_to_the_pull_that_began_them(clock: Clock) -> None:
    told = Telemetry()
    told.manifest("c", "app", "latest", 200)
    runs = [told.transfer("r", "c", "app", digest) for digest in "abc"]
    for run in runs:
        clock.now += 700
        whole(run, 10)
    (pull,) = told.report()["pulls"]
    assert (pull["reference"], pull["blobs"], pull["bytes"], pull["ended"]) == ("latest", 3, 30, clock.now)


def test_another_tag_is_another_pull(clock: Clock) -> None:
    told = Telemetry()
    for tag in ("1", "2"):
        clock.now += 5
        told.manifest("c", "app", tag, 200)
        whole(told.transfer("r", "c", "app", "a"), 10)
    assert [(pull["reference"], pull["blobs"]) for pull in told.report()["pulls"]] == [("2", 1), ("1", 1)]


def test_the_same_tag_again_is_another_pull(clock: Clock) -> None:
    told = Telemetry()
    for _ in range(2):
        clock.now += 5
        told.manifest("c", "app", "latest", 200)
        whole(told.transfer("r", "c", "app", "a"), 10)
    assert [(pull["reference"], pull["blobs"]) for pull in told.report()["pulls"]] == [("latest", 1), ("latest", 1)]


def test_slow_blobs_of_a_worker_that_does_not_know_the_tag_stay_with_their_pull(clock: Clock) -> None:
    one, other = Telemetry(), Telemetry()
    one.manifest("c", "app", "latest", 200)
    for _ in range(2):
        clock.now += telemetry.PART_GAP + 1
        whole(other.transfer("r", "c", "app", "a"), 10)
    merged = telemetry._merged_pulls([one.report()["pulls"], other.report()["pulls"]])
    assert [(pull["reference"], pull["blobs"]) for pull in merged] == [("latest", 2)]


def test_the_parts_that_two_workers_know_of_two_pulls_are_put_together(clock: Clock) -> None:
    one, other = Telemetry(), Telemetry()
    for tag in ("1", "2"):
        one.manifest("c", "app", tag, 200)
        clock.now += 1
        whole(other.transfer("r", "c", "app", "a"), 10)
        other.manifest("c", "app", DIGEST, 404)
        clock.now += 100
    merged = telemetry._merged_pulls([one.report()["pulls"], other.report()["pulls"]])
    assert [(pull["reference"], pull["blobs"], pull["status"]) for pull in merged] == [("2", 1, 200), ("1", 1, 200)]


def test_no_more_pulls_are_remembered_than_are_shown(clock: Clock) -> None:
    told = Telemetry()
    for number in range(200):
        told.manifest(f"c{number}", "app", "1", 200)
    assert len(told.report()["pulls"]) == 50


def test_a_rate_is_right_however_often_it_is_asked_for(clock: Clock) -> None:
    told = Telemetry()
    run = told.transfer("r", "c", "app", "a")
    run.begin(None, "")
    rates = []
    for _ in range(100):
        clock.now += 0.09
        run.add(90_000)
        rates.append(told.report()["rate"])
    assert set(rates[:5]) == {0}
    assert all(rate == pytest.approx(1_000_000) for rate in rates[6:])


def test_what_is_too_long_for_the_board_goes_there_without_its_rows() -> None:
    told, other = Telemetry(), Telemetry()
    told.share()
    assert told._board is not None
    told.join()
    for number in range(50):
        told.manifest("c" * 20_000, f"app{number}", "1", 200)
    told.received("r", 5)
    told.tick()
    other._board = Board()
    other._board._fd = os.dup(told._board._fd)
    assert other.report()["hour"]["received"][-1] == 5
    assert other.report()["pulls"] == []


def test_a_registry_that_limits_is_not_up_because_it_answers_a_ping(tmp_path: Path) -> None:
    with RawUpstream() as first, RawUpstream() as second:
        limited = reply(429, b"", {"Retry-After": "120"})
        for server in (first, second):
            server.answers["/v2/"] = reply_json(200, {})
        first.answers[MANIFEST] = limited
        second.answers[MANIFEST] = reply_json(200, {})
        file = tmp_path / "registries.toml"
        file.write_text(
            f'["docker.io"]\nendpoints = ["{first.url}", "{second.url}"]\n["ghcr.io"]\nendpoints = ["{first.url}"]\n'
        )
        first.answers["/v2/owner/app/manifests/latest"] = limited
        with Mirror(registries=file, default="docker.io") as mirror:
            assert ask(mirror, MANIFEST).status == 200
            assert ask(mirror, "/v2/ghcr.io/owner/app/manifests/latest").status == 429
            assert ask(mirror, "/readyz").status == 200
            assert ask(mirror, "/v2/?ns=ghcr.io").status == 200
            found = status(mirror)
            assert [endpoint(found, name)["state"] for name in ("docker.io", "ghcr.io")] == ["cooling", "failing"]
            first.answers["/v2/owner/app/manifests/latest"] = reply_json(200, {})
            assert ask(mirror, "/v2/ghcr.io/owner/app/manifests/latest").status == 200
            assert endpoint(status(mirror), "ghcr.io")["state"] == "up"


def test_a_blob_with_another_digest_is_a_failure_of_its_endpoint() -> None:
    with Lab(verify="on") as lab:
        lab.upstream.answers[CONTENT_PATH] = Depot(CONTENT, wrong=5)
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            ask(lab.mirror, CONTENT_PATH)
        found = endpoint(status(lab.mirror))
    assert (found["state"], found["reason"]) == ("failing", "digest")


def test_a_worker_that_ends_in_order_loses_no_count(lab: Lab) -> None:
    lab.reset()
    lab.upstream.answers[MANIFEST] = reply_json(200, {})
    with Mirror("--workers", "2", registries=lab.registries) as mirror:
        wait_for(mirror, lambda found: found["workers"] == 2)
        before = sum(wait_for(mirror, lambda found: True)["hour"]["sent"])
        for _ in range(20):
            assert ask(mirror, MANIFEST).status == 200
        old = set(mirror.pids()[1:])
        os.kill(mirror.pid, signal.SIGHUP)
        assert poll(lambda: len(mirror.pids()) == 3 and not old & set(mirror.pids()), 20)
        found = wait_for(mirror, lambda found: found["workers"] == 2)
        assert sum(found["hour"]["sent"]) - before == 20 * len(b"{}")


def test_what_passes_the_cache_by_is_no_miss(tmp_path: Path) -> None:
    with cached_lab(tmp_path) as lab:
        lab.upstream.answers[f"/v2/library/app/referrers/{DIGEST}"] = reply_json(200, {})
        assert ask(lab.mirror, f"/v2/app/referrers/{DIGEST}").headers["x-cache"] == "BYPASS"
        assert sum(status(lab.mirror)["hour"]["misses"]) == 0
        lab.upstream.answers[CONTENT_PATH] = Depot(CONTENT)
        for _ in range(3):
            ask(lab.mirror, CONTENT_PATH)
        found = status(lab.mirror)
    assert (sum(found["hour"]["misses"]), sum(found["hour"]["hits"])) == (1, 2)


def test_what_nginx_sends_is_in_the_line_of_its_pull(tmp_path: Path) -> None:
    with cached_lab(tmp_path, accel="/protected/") as lab:
        lab.upstream.answers[CONTENT_PATH] = Depot(CONTENT)
        assert ask(lab.mirror, CONTENT_PATH).body == CONTENT
        assert poll(lambda: "x-accel-redirect" in ask(lab.mirror, CONTENT_PATH, CLIENT).headers, 10)
        (pull,) = [one for one in status(lab.mirror)["pulls"] if one["client"] == "203.0.113.7" and one["kept"]]
    assert pull["kept"] >= len(CONTENT)


@pytest.mark.parametrize("path", ["/status", "/status.json", "/metrics"])
def test_nobody_keeps_a_copy(lab: Lab, path: str) -> None:
    headers = ask(lab.mirror, path).headers
    assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")


@pytest.mark.parametrize("path", ["/status", "/status.json", "/metrics"])
def test_from_this_host_it_is_seen_by_this_hosts_names_only(lab: Lab, path: str) -> None:
    for host, expected in {"evil.example": 404, "mirror.example:443": 404, "localhost": 200, "[::1]:5000": 200}.items():
        assert ask(lab.mirror, path, {"Host": host}).status == expected
    with Mirror(status="203.0.113.0/24", metrics="203.0.113.0/24") as mirror:
        assert ask(mirror, path, {**CLIENT, "Host": "mirror.example"}).status == 200


def test_where_another_site_stands_at_home_a_client_that_is_denied_sees_nothing_of_it() -> None:
    with RawUpstream() as site:
        site.default = reply(200, b"the site's page", {"Content-Type": "text/html"})
        for shown in ("off", "127.0.0.1"):
            with Mirror(home=f"proxy:{site.url}", status=shown, metrics=shown, deny_clients="203.0.113.7") as mirror:
                for path in ("/x", "/status", "/status.json", "/status/page.css", "/metrics"):
                    assert ask(mirror, path, CLIENT).status == 403


def test_what_goes_wrong_in_counting_spoils_no_pull(monkeypatch: pytest.MonkeyPatch) -> None:
    with RawUpstream() as upstream:
        upstream.answers[MANIFEST] = reply_json(200, {})
        registry = Registry("docker.io", (upstream.url,))
        monkeypatch.setattr(mirror, "load_registries", lambda config: {"docker.io": registry})
        app = mirror.create_app(Config())
        counting = app.extensions["docker-mirror"].telemetry
        for name in ("request", "tick"):
            monkeypatch.setattr(counting, name, lambda *_: 1 / 0)
        app.extensions["docker-mirror"].tick()
        assert app.test_client().get(MANIFEST).status_code == 200
