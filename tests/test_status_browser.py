"""The status page as its owner sees it: in a real browser, while the mirror works, fails and is away."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from browser import DESKTOP
from browser import PHONE
from browser import Browser
from depot import Depot
from depot import Reading
from images import MIB
from images import digest_of
from lab import MANIFEST
from lab import Lab
from lab import ask
from lab import reply_json
from processes import poll
from serving import Mirror
from test_home import HOSTILE
from test_status import STRANGER
from test_status import shown
from upstream import RawUpstream
from upstream import Request
from upstream import reply

LIMITS = {"RateLimit-Limit": "100;w=21600", "RateLimit-Remaining": "37;w=21600"}
SIZE = 64 * MIB


class Drip:
    """Serve a blob bit by bit until it is told to send the rest."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.content = os.urandom(16) + bytes(SIZE - 16)

    def __call__(self, request: Request, connection: socket.socket) -> None:
        """Answer one request."""
        connection.sendall(reply(200, b"", {"Content-Length": str(SIZE)}))
        sent = 0
        while sent < SIZE:
            self.go.wait(0.05)
            part = self.content[sent : sent + (MIB if self.go.is_set() else 64 << 10)]
            connection.sendall(part)
            sent += len(part)


@contextmanager
def slow_transfer(lab: Lab) -> Iterator[Drip]:
    """Let a client pull a blob slowly; at the end, all of it comes."""
    drip = Drip()
    path = f"/v2/library/{lab.name}/blobs/{digest_of(drip.content)}"
    lab.upstream.answers[path] = drip
    with Reading(lab.mirror, path, STRANGER) as reading:
        received: list[int] = []
        reader = threading.Thread(target=lambda: received.append(len(reading.read())))
        reader.start()
        try:
            yield drip
        finally:
            drip.go.set()
            reader.join(60)
        assert received == [SIZE]


@pytest.fixture(scope="module")
def other() -> Iterator[RawUpstream]:
    """Run a registry that limits, before one that answers."""
    with RawUpstream() as running:
        running.default = reply(429, HOSTILE.encode(), {"Retry-After": "300", "Content-Type": "text/plain"})
        yield running


@pytest.fixture(scope="module")
def lab(other: RawUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Run a mirror with two workers and a cache, which has pulled this and that."""
    with RawUpstream() as second:
        second.answers["/v2/owner/app/manifests/latest"] = reply_json(200, {})
        more = f'["quay.io"]\nendpoints = ["{other.url}", "{second.url}"]'
        folder = tmp_path_factory.mktemp("cache")
        with Lab(more=more, options=("--workers", "2"), cache_dir=folder, cache_min_free=0, idle_timeout=30) as running:
            running.reset()
            for name in ("app", running.name):
                running.upstream.answers[f"/v2/library/{name}/manifests/latest"] = reply_json(200, {}, LIMITS)
            kept = Depot(os.urandom(MIB))
            running.upstream.answers[f"/v2/library/app/blobs/{kept.digest}"] = kept
            for path in (MANIFEST, "/v2/quay.io/owner/app/manifests/latest"):
                assert ask(running.mirror, path).status == 200
            for _ in range(3):
                assert ask(running.mirror, f"/v2/app/blobs/{kept.digest}", STRANGER).status == 200
            assert poll(lambda: shown(running.mirror)["workers"] == "2", 20)
            yield running


def rows(browser: Browser, key: str) -> list[str]:
    """Return the text of each row of a list or table, as it is seen."""
    script = (
        "return [...document.querySelector(arguments[0]).children].filter(row => !row.hidden).map(row => row.innerText)"
    )
    return [" ".join(text.split()) for text in browser.run(script, f"[data-rows={key}]")]


def percent_done(browser: Browser) -> float:
    """Return how far the first transfer's bar is, in percent."""
    return float(browser.run("return document.querySelector('[data-rows=transfers] li:nth-child(2) progress').value"))


def test_a_slow_transfer_is_seen_to_run_and_end(browser: Browser, lab: Lab) -> None:
    browser.open(f"{lab.mirror.url}/status")
    assert rows(browser, "transfers") == []
    browser.run("window.same = true")
    with slow_transfer(lab) as drip:
        browser.wait_for(lambda: len(rows(browser, "transfers")) == 1)
        browser.wait_for(lambda: percent_done(browser) > 0)
        before = percent_done(browser)
        browser.wait_for(lambda: percent_done(browser) > before)
        (row,) = rows(browser, "transfers")
        for part in (f"docker.io/library/{lab.name}", "203.0.113.7", "MISS", "B/s", " MB of 67 MB", " left"):
            assert part in row
        assert browser.find("progress[aria-label*='MB of 67 MB']").is_displayed()
        assert "kB/s" in browser.text("[data-put='text=rate']") or "MB/s" in browser.text("[data-put='text=rate']")
        assert "transferred now" not in browser.find("main").text
        drip.go.set()
        browser.wait_for(lambda: rows(browser, "transfers") == [])
    browser.wait_for(lambda: "Nothing is being transferred now." in browser.find("main").text)
    browser.wait_for(lambda: any(lab.name in row and "67 MB" in row for row in rows(browser, "pulls")))
    assert browser.run("return window.same"), "the page was not loaded again"
    assert browser.logged() == []


def test_what_two_workers_did_is_one_page(browser: Browser, lab: Lab) -> None:
    browser.open(f"{lab.mirror.url}/status")
    assert browser.find(".facts").text.split("\n")[7] == "2"
    limited, up = (row for row in rows(browser, "endpoints") if row.startswith("quay.io"))
    assert "cooling down (rate limit) for 4 min" in limited
    assert limited.endswith(f"limits this mirror: {HOSTILE}"), "it is shown as the text that it is"
    assert "up answered" in up
    assert any("up answered" in row for row in rows(browser, "endpoints") if row.startswith("docker.io"))
    assert "Not asked yet: ghcr.io, gcr.io" in browser.find("main").text
    (quota,) = rows(browser, "quotas")
    assert quota.startswith("docker.io 37 of 100 pulls left per 6 h · as of")
    assert browser.run("return document.querySelector('[data-rows=quotas] li:nth-child(2) progress').value") == 37
    pulls = [row for row in rows(browser, "pulls") if row.startswith("docker.io/library/app ")]
    assert any("203.0.113.7 3.1 MB 67 %" in row for row in pulls), pulls


def test_the_plots_show_what_the_cache_had_and_how_much_passed(browser: Browser, lab: Lab) -> None:
    def drawn(name: str) -> float:
        """Return how high a line or the bars stand, as parts of the plot."""
        script = "const box = document.querySelector(arguments[0]).getBBox(); return box.height / 100"
        return float(browser.run(script, f".plot path.{name}"))

    assert poll(lambda: max(ask(lab.mirror, "/status.json").json["hour"]["sent"][:-1]) > 0, 20), "a step is over"
    browser.open(f"{lab.mirror.url}/status")
    assert [drawn(name) > 0.1 for name in ("sent", "received", "hits", "misses")] == [True] * 4
    assert "hits" in browser.text("#lookups-summary")
    assert "were sent to clients" in browser.text("#rate-summary")
    assert browser.text(".key.hits b") == str(sum(ask(lab.mirror, "/status.json").json["hour"]["hits"]))
    assert browser.find("[data-put='value=fill_percent aria-label=fill_name']").is_displayed()


@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_the_page_is_quiet_sound_and_fits_its_screen(
    browser: Browser, chinese: Browser, lab: Lab, size: tuple[int, int]
) -> None:
    with slow_transfer(lab):
        assert poll(lambda: bool(shown(lab.mirror)["transfers"]), 20)
        for one, scheme in ((browser, "light"), (chinese, "dark")):
            one.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            one.open(f"{lab.mirror.url}/status", size)
            seen: list[str] = []
            one.wait_for(lambda one=one, seen=seen: bool(seen.extend(one.asked())) or seen[-1].endswith(".json"))  # type: ignore[misc]
            assert [url for url in seen if not url.startswith(lab.mirror.url + "/")] == []
            assert one.logged() == []
            assert len(rows(one, "transfers")) == 1
            assert one.run("return document.documentElement.scrollWidth <= window.innerWidth")
            assert one.faults() == []
    assert chinese.text("h1") == "运行状态"
    assert "暂停使用" in " ".join(rows(chinese, "endpoints"))
    chinese.find("nav a[lang=en]").click()
    chinese.wait_for(lambda: chinese.text("h1") == "Status")
    time.sleep(2.5)
    assert "cooling down" in " ".join(rows(chinese, "endpoints")), "what is asked for later is in that language too"


def test_without_javascript_the_page_shows_all_and_loads_itself_again(browser: Browser, lab: Lab) -> None:
    browser.command("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(f"{lab.mirror.url}/status")
        assert "37 of 100 pulls left" in browser.find("main").text
        assert "loaded again every 10 seconds" in browser.find("main").text
        assert "Nothing is being transferred now." in browser.find("main").text
        with slow_transfer(lab):
            browser.wait_for(lambda: f'aria-label="docker.io/library/{lab.name}' in browser.driver.page_source)
            browser.wait_for(lambda: "of 67 MB" in browser.driver.page_source)
    finally:
        browser.command("Emulation.setScriptExecutionDisabled", value=False)


def test_a_mirror_that_is_away_is_said_to_be_until_it_is_back(browser: Browser) -> None:
    with Mirror() as mirror:
        browser.open(f"{mirror.url}/status")
        assert not browser.find("#silent").is_displayed()
        mirror.stop()
        browser.wait_for(lambda: "does not answer" in browser.find("#silent").text)
        with Mirror(port=mirror.port):
            browser.wait_for(lambda: not browser.find("#silent").is_displayed())


def test_a_page_that_nobody_looks_at_asks_for_nothing(browser: Browser, lab: Lab) -> None:
    browser.open(f"{lab.mirror.url}/status")
    browser.run("Object.defineProperty(document, 'hidden', {get: () => window.away, configurable: true})")
    browser.run("window.away = true")
    time.sleep(2.5)
    browser.asked()
    time.sleep(4.5)
    assert browser.asked() == []
    browser.run("window.away = false; document.dispatchEvent(new Event('visibilitychange'))")
    browser.wait_for(lambda: any(url.endswith("/status.json") for url in browser.asked()))


def test_nothing_hostile_runs(browser: Browser, lab: Lab) -> None:
    for path in (f"/v2/{HOSTILE.replace(' ', '')}/manifests/latest", f"/v2/app/manifests/{HOSTILE.replace(' ', '')}"):
        assert ask(lab.mirror, path, {"User-Agent": HOSTILE, "X-Forwarded-For": HOSTILE}).status in (400, 404)
    browser.open(f"{lab.mirror.url}/status")
    browser.run(
        """
        const hostile = new Proxy({}, {get: () => arguments[0]});
        fill(page, hostile);
        for (const list of page.querySelectorAll('[data-rows]')) fillRows(list, [hostile, hostile]);
        """,
        HOSTILE,
    )
    assert HOSTILE in browser.find("[data-rows=transfers]").text
    assert browser.run("return [typeof window.hit, document.scripts.length]") == ["undefined", 1]
    assert browser.run("return document.querySelectorAll('main img, main script').length") == 0
