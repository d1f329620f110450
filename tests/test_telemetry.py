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

import telemetry
from telemetry import SLOT
from telemetry import Board
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
    board.write(b"one")
    board.write(b"x" * SLOT)  # too long
    child = os.fork()
    if not child:  # another process: it sees what the first one wrote, and gets another slot
        board._own = None
        is_right = board.take() == b"" and list(board.others()) == [(b"one", True)]
        board.write(b"two")
        os._exit(0 if is_right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert list(board.others()) == [(b"two", False)]


def test_the_hour_forgets_what_is_older(monkeypatch: pytest.MonkeyPatch) -> None:
    told, now = Telemetry(), 1_000_000.0
    monkeypatch.setattr(telemetry, "time", SimpleNamespace(time=lambda: now, monotonic=time.monotonic))
    told.received("r", 5)
    assert told.report()["hour"]["received"][-1] == 5
    now += 3590
    told.received("r", 7)
    found = told.report()["hour"]["received"]
    assert (found[0], found[-1], len(found)) == (5, 7, 360)
    now += 10
    told.received("r", 1)
    assert told.report()["hour"]["received"][0] == 0
