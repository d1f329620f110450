"""The status page, as the server makes it: what it says, in which words, and who gets to see it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from depot import Depot
from depot import Reading
from depot import cached_lab
from images import MIB
from images import digest_of
from lab import DIGEST
from lab import MANIFEST
from lab import Lab
from lab import ask
from lab import reply_json
from page import Page
from page import open_page
from processes import poll
from serving import Mirror
from test_home import HOSTILE
from test_home import looks_like_nginx
from upstream import RawUpstream
from upstream import reply

import telemetry
from pages import Pages
from pages import Status
from pages import bars_path
from pages import line_path
from pages import percent
from pages import round_above
from telemetry import Telemetry

STRANGER = {"X-Forwarded-For": "203.0.113.7"}
FILES = ("page.css", "page.js", "icon.svg")


@pytest.fixture(scope="module")
def quiet() -> Iterator[Lab]:
    with Lab() as running:
        yield running


def shown(mirror: Mirror, language: str = "en") -> Any:
    return ask(mirror, "/status.json", {"Accept-Language": language}).json["shown"]


def say(lang: str = "en", **changes: Any) -> dict[str, Any]:
    """Return what the page shows of an idle mirror's report with these changes."""
    report = {"version": "0.1.0", **Telemetry([("docker.io", "https://hub.test")]).report(), "cache": None}
    return Status({**report, **changes}, Pages().texts[lang]).shown()


def state(**values: Any) -> dict[str, str]:
    """Return the row of an endpoint at the time 1000."""
    one = {"registry": "docker.io", "url": "https://hub.test", "answered": None, **values}
    (row,) = say(at=1000.0, endpoints=[one])["endpoints"]
    return {key: row[key] for key in ("label", "reason", "detail", "why")}


def check_places(page: Page, values: Any) -> int:
    """Check that each place of the page that the script fills has what status.json has for it; return how many."""
    parents = {child: parent for parent in page.root.iter() for child in parent}
    count = 0
    for part in page.root.iterfind(".//*[@data-put]"):
        row, above = values, part
        while (key := parents[above].get("data-rows")) is None and parents[above] is not page.root:
            above = parents[above]
        if key is not None:
            at = list(parents[above]).index(above)
            if at == 0:
                continue  # the pattern
            row = values[key][at - 1]
        for pair in part.get("data-put", "").split():
            name, _, value = pair.partition("=")
            found = part.text or "" if name == "text" else part.get(name)
            assert found == (None if row[value] is None else str(row[value])), pair
            count += 1
    return count


@pytest.mark.parametrize(
    ("language", "sentences"),
    [
        ("en", ["Nothing is being transferred now.", "Nothing has been pulled yet.", "there is no cache"]),
        ("zh", ["当前没有传输。", "还没有拉取记录。", "没有启用缓存"]),
    ],
)
def test_where_there_is_nothing_a_sentence_says_so(quiet: Lab, language: str, sentences: list[str]) -> None:
    page = open_page(quiet.mirror, "/status", language)
    text = " ".join(page.texts(".//main"))
    assert [sentence for sentence in sentences if sentence not in text] == []
    assert "docker.io, ghcr.io, quay.io, gcr.io" in text, "nobody asked them: they are one line"
    assert [row for row in page.rows() if any(row)] == []
    assert not page.has("lookups-name"), "without a cache there is no plot of it"
    assert page.has("rate-name")


def test_page_and_script_show_the_same(tmp_path: Path) -> None:
    content = os.urandom(4 * MIB)
    with cached_lab(tmp_path / "cache", idle_timeout=30) as lab:
        lab.upstream.answers["/v2/"] = reply_json(200, {})
        limits = {"RateLimit-Limit": "100;w=21600", "RateLimit-Remaining": "37;w=21600"}
        lab.upstream.answers[MANIFEST] = reply_json(200, {}, limits)
        depot = Depot(content, pause=2 * MIB)
        path = f"/v2/library/app/blobs/{digest_of(content)}"
        lab.upstream.answers[path] = depot
        assert ask(lab.mirror, MANIFEST).status == 200
        with Reading(lab.mirror, path, STRANGER) as reading:
            reading.read(2 * MIB)
            assert poll(lambda: shown(lab.mirror)["transfers"][0]["percent"] == 50, 10)

            def is_same() -> bool:  # unless a second passes in between
                reply, values = ask(lab.mirror, "/status"), shown(lab.mirror)
                with suppress(AssertionError):
                    return check_places(Page(reply), values) > 50
                return False

            assert poll(is_same, 20)
            text = " ".join(open_page(lab.mirror, "/status").texts(".//main"))
            depot.go.set()
            reading.read()
    for part in (
        "docker.io/library/app", "203.0.113.7", "MISS", "2.1 MB of 4.2 MB", f"sha256:{digest_of(content)[7:19]}",
        "37 of 100 pulls left", "per 6 h", "up answered", "library/app:latest", "of 10.7 GB", "free on the disk",
    ):  # fmt: skip
        assert part in text
    assert "127.0.0.1" in text


def test_a_language_is_chosen_for_page_and_figures(quiet: Lab) -> None:
    assert open_page(quiet.mirror, "/status?lang=zh").root.get("lang") == "zh-CN"
    assert ask(quiet.mirror, "/status/").status == 404
    assert ask(quiet.mirror, "/status.json?lang=zh").json["shown"]["transfers_note"] == "当前没有传输。"
    assert shown(quiet.mirror, "zh-CN")["transfers_note"] == "当前没有传输。"
    assert ask(quiet.mirror, "/status.json?lang=xx", {"Accept-Language": "zh"}).json["shown"]["rate"] == "0 B/s"


def test_the_page_runs_nothing_but_its_own_file_and_needs_none(quiet: Lab) -> None:
    page = open_page(quiet.mirror, "/status")
    assert [script.attrib for script in page.root.iterfind(".//script")] == [{"src": "status/page.js", "defer": ""}]
    assert "unsafe" not in page.reply.headers["content-security-policy"]
    assert "noindex" in page.reply.headers["x-robots-tag"]
    assert page.reply.headers["cache-control"] == "no-store"
    refresh = page.root.find(".//head/noscript/meta")
    assert refresh is not None
    assert refresh.attrib == {"http-equiv": "refresh", "content": "10"}


@pytest.mark.parametrize("home", ["usage", "nginx", "none", "redirect:https://www.example"])
def test_only_who_may_see_it_gets_the_page_and_its_files_whatever_stands_at_home(home: str) -> None:
    with Mirror(home=home, allow_clients="198.51.100.1") as mirror:
        page = open_page(mirror, "/status")
        assert page.links["English"] == "?lang=en"
        for name in FILES:
            assert ask(mirror, f"/status/{name}").status == 200
        for path in ("/status", "/status.json", *(f"/status/{name}" for name in FILES)):
            for method in ("GET", "OPTIONS", "POST"):
                got, nothing = (ask(mirror, where, STRANGER, method) for where in (path, "/nothing"))
                assert (got.status, got.body) == (nothing.status, nothing.body)
                assert got.status == 403
    with Mirror(home=home) as mirror:
        for path in ("/status", "/status/", "/status.json", *(f"/status/{name}" for name in FILES)):
            for method in ("GET", "OPTIONS", "POST"):
                got, nothing = (ask(mirror, where, STRANGER, method) for where in (path, "/nothing"))
                assert (got.status, got.body) == (404, nothing.body)
                assert home != "nginx" or looks_like_nginx(got, 404)
    with Mirror(home=home, status="off") as mirror:
        assert {ask(mirror, f"/status/{name}").status for name in FILES} == {404}


def test_where_another_site_stands_at_home_strangers_find_its_pages_there() -> None:
    with RawUpstream() as site:
        site.default = reply(200, b"the site's page", {"Content-Type": "text/html"})
        with Mirror(home=f"proxy:{site.url}") as mirror:
            assert open_page(mirror, "/status").links["English"] == "?lang=en"
            for path in ("/status", "/status.json", "/metrics", "/status/page.js"):
                assert ask(mirror, path, STRANGER).body == b"the site's page"
                assert ask(mirror, path, STRANGER, "POST").status == ask(mirror, "/x", STRANGER, "POST").status == 405


def test_a_page_with_a_slash_too_many_is_none() -> None:
    with Mirror() as mirror:
        assert {ask(mirror, path).status for path in ("/status/", "/search/", "/tags/", "/page.css/")} == {404}
        assert {ask(mirror, path).status for path in ("/status", "/search", "/healthz/", "/v2/_catalog/")} == {200, 405}


def test_below_a_secret_path_all_its_parts_are_there_too() -> None:
    with Mirror(path_prefix="/s3cret") as mirror:
        page = Page(ask(mirror, "/s3cret/status"))
        for link in page.root.iterfind(".//link"):
            assert ask(mirror, f"/s3cret/{link.get('href')}").status == 200
        assert ask(mirror, "/s3cret/status.json").json["workers"] == 1
        assert ask(mirror, "/status").status == 404


def test_the_home_page_leads_there_who_may_see_it(quiet: Lab) -> None:
    assert open_page(quiet.mirror, "/").links["Status"] == "status"
    assert open_page(quiet.mirror, "/?lang=zh").links["运行状态"] == "status?lang=zh"
    assert "Status" not in Page(ask(quiet.mirror, "/", STRANGER)).links
    with Mirror(status="off") as mirror:
        assert "Status" not in open_page(mirror, "/").links


def test_nothing_that_upstream_or_a_client_says_becomes_a_part_of_the_page() -> None:
    with RawUpstream() as upstream:
        upstream.default = reply(429, HOSTILE.encode(), {"Content-Type": "text/plain"})
        with Lab(upstream) as lab:
            headers = {"User-Agent": HOSTILE, "X-Forwarded-For": HOSTILE}
            assert lab.ask(MANIFEST, headers).status == 429
            lab.ask(f"/v2/{HOSTILE.replace(' ', '')}/manifests/latest", headers)
            page = open_page(lab.mirror, "/status")
            assert len(list(page.root.iterfind(".//script"))) == 1
            assert page.root.findall(".//img[@onerror]") == []
            (row,) = [row[2] for row in page.rows() if row[0] == "docker.io"]
            assert row.endswith(f"limits this mirror: {HOSTILE}"), "it is shown as the text that it is"
            assert lab.ask("/status", {"Host": HOSTILE}).status == 400


def test_what_an_endpoint_does_is_said_with_its_cause() -> None:
    assert state(state="up", answered=820) == {
        "label": "up", "reason": "", "detail": "answered 3 min ago", "why": ""
    }  # fmt: skip
    failed = {"failed": 940.0, "since": 300.0, "reason": "limited", "why": "429"}
    assert state(state="cooling", until=1113.5, **failed) == {
        "label": "cooling down",
        "reason": "(rate limit)",
        "detail": "for 1 min 53 s more; failing for 11 min 40 s, last failure 1 min ago",
        "why": "429",
    }
    found = state(state="failing", until=None, **{**failed, "reason": "some other"})
    assert (found["label"], found["reason"]) == ("failing", "some other")
    assert found["detail"] == "for 11 min 40 s, last failure 1 min ago"


def test_registries_that_nobody_asked_are_one_line() -> None:
    asked = {"registry": "docker.io", "url": "https://a", "state": "up", "answered": 1.0}
    others = [
        {"registry": name, "url": "https://b", "state": "unknown"} for name in ("docker.io", "quay.io", "ghcr.io")
    ]
    found = say(endpoints=[asked, *others])
    assert [(row["registry"], row["label"]) for row in found["endpoints"]] == [
        ("docker.io", "up"),
        ("docker.io", "not asked yet"),
    ]
    assert found["endpoints_note"] == "Not asked yet: quay.io, ghcr.io."


def test_a_transfer_of_unknown_size_has_no_percentage() -> None:
    run = {"image": "i", "digest": DIGEST, "client": "c", "cache": "", "size": None, "sent": 0, "rate": 0.0}
    found = say(running=1, transfers=[run])["transfers"][0]
    assert (found["percent"], found["done"], found["left"]) == (None, "waiting for the registry", "")
    found = say(running=1, transfers=[{**run, "size": 5_000_000, "sent": 1_250_000, "rate": 62_500.0}])["transfers"][0]
    assert (found["percent"], found["done"], found["rate"]) == (25, "1.2 MB of 5.0 MB", "62 kB/s")
    assert found["left"] == "1 min left"


def test_of_many_transfers_the_oldest_are_shown_and_the_others_counted() -> None:
    run = {"image": "i", "digest": DIGEST, "client": "c", "cache": "", "size": 1, "sent": 0, "rate": 0.0}
    found = say(running=1234, transfers=[run] * 200)
    assert (len(found["transfers"]), found["transfers_note"], found["running"]) == (50, "And 1,184 more.", "1,234")


@pytest.mark.parametrize(
    ("pull", "row"),
    [
        ({"blobs": 2, "bytes": 2000, "kept": 500}, ("i:latest", "2.0 kB", "25 %")),
        ({"blobs": 0, "bytes": 0, "kept": 0}, ("i:latest", "manifest only", "")),
        ({"blobs": 0, "bytes": 0, "kept": 0, "status": 404}, ("i:latest", "404 Not Found", "")),
        ({"blobs": 0, "bytes": 0, "kept": 0, "status": 499}, ("i:latest", "499", "")),
        ({"blobs": 1, "bytes": 1, "kept": 0, "reference": ""}, ("i", "1 B", "0 %")),
        ({"blobs": 1, "bytes": 1, "kept": 1, "reference": DIGEST}, ("i@sha256:0123456789ab", "1 B", "100 %")),
    ],
)
def test_a_pull_is_one_row(pull: dict[str, Any], row: tuple[str, str, str]) -> None:
    one = {"image": "i", "client": "c", "reference": "latest", "status": 200, "began": 0.0, "ended": 0.0, **pull}
    found = say(pulls=[one], at=7200.0)["pulls"][0]
    assert (found["image"], found["size"].strip(), found["kept"]) == row
    assert found["ago"] == "2 h ago"


@pytest.mark.parametrize(
    ("seconds", "en", "zh"),
    [
        (0, "0 s", "0 秒"),
        (59.9, "59 s", "59 秒"),
        (61, "1 min 1 s", "1 分钟 1 秒"),
        (3605, "1 h", "1 小时"),
        (90061, "1 d 1 h", "1 天 1 小时"),
    ],
)
def test_a_time_is_said_in_its_two_largest_units(seconds: float, en: str, zh: str) -> None:
    assert (say("en", uptime=seconds)["uptime"], say("zh", uptime=seconds)["uptime"]) == (en, zh)


def test_a_failing_disk_is_said() -> None:
    cache = {"bytes": None, "limit": 10 << 30, "free": None, "failing": True}
    found = say(cache=cache)
    assert (found["fill"], found["fill_percent"], found["free"]) == ("not known", 0, "")
    assert "full or fails" in found["cache_note"]


def test_the_plots_have_round_scales_and_a_text() -> None:
    sent, received, hits, misses = ([0] * 360 for _ in range(4))
    sent[100], received[100], sent[359] = 30_000_000, 1_000_000, 10**12
    hits[0], hits[359], misses[359] = 20, 30, 10
    hour = {"step": 10, "sent": sent, "received": received, "hits": hits, "misses": misses}
    found = say(hour=hour, cache={"bytes": 0, "limit": 1, "free": 0, "failing": False})
    assert (found["rate_top"], found["rate_middle"]) == ("5.0 MB/s", "2.5 MB/s")
    assert "30 MB were sent" not in found["rate_summary"], "the sum has the step that has begun too"
    assert "3.0 MB/s at most" in found["rate_summary"]
    assert "L100.6 40L" in found["sent_line"]
    assert (found["lookups_top"], found["hits"], found["misses"]) == ("50", "50", "10")
    assert "83 % hits" in found["lookups_summary"]
    assert found["hits_bars"].startswith("M0.5 100V60h5V100z")
    assert found["misses_bars"] == "M354.5 40V20h5V40z"


def test_the_parts_of_plots() -> None:
    assert line_path([0.0] * 360, 1000) == "M-9 100V100L0.0 100L360.0 100H369V100"
    assert bars_path([0, 0], [0, 5], 10) == "M180.5 100V50h179V100z"
    assert [round_above(value) for value in (1, 1.1, 3, 10, 5001)] == [1, 2, 5, 10, 10000]
    assert (percent(1, 3), percent(5, 4), percent(1, 0), percent(1, None)) == (33.3, 100, None, None)


def test_an_endpoint_fails_since_the_first_failure_after_its_last_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(telemetry, "time", SimpleNamespace(time=lambda: now, monotonic=lambda: now))
    told = Telemetry([("r", "u")])
    for now, happens in enumerate("ffaff", 1000):
        if happens == "f":
            told.failed("r", "u", "timeout", "")
        else:
            told.answered("r", "u", now)
    (found,) = told.report()["endpoints"]
    assert (found["since"], found["failed"]) == (1003, 1004)
