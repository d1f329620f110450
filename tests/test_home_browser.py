"""The pages as a person sees them: in a real browser, in both languages, on a phone and on a desk."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from browser import DESKTOP
from browser import PHONE
from browser import Browser
from hub import Hub
from hub import write_registries
from serving import Mirror
from test_home import HOSTILE
from test_home import found
from upstream import RawUpstream
from upstream import reply
from upstream import reply_json

PAGES = ("/", "/?image=ghcr.io/owner/app:1", "/?image=NO", "/search", "/search?q=nginx", "/tags?image=nginx")


@pytest.fixture(scope="module")
def index() -> Iterator[RawUpstream]:
    with RawUpstream() as running:
        running.answers["/v1/search"] = found("nginx", "bitnami/postgresql", description="A server.", pages=2)
        yield running


@pytest.fixture(scope="module")
def mirror(hub: Hub, index: RawUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mirror]:
    file = tmp_path_factory.mktemp("home") / "registries.toml"
    with Mirror(registries=write_registries(file, {"docker.io": {**hub.table(), "search": index.url}})) as running:
        yield running


def type_into(browser: Browser, selector: str, text: str) -> None:
    browser.find(selector).clear()
    browser.find(selector).send_keys(text)


def test_each_browser_is_spoken_to_in_its_language_and_can_change_it(
    browser: Browser, chinese: Browser, mirror: Mirror
) -> None:
    browser.open(mirror.url)
    assert browser.text("h1") == "Container registry mirror"
    chinese.open(mirror.url)
    assert chinese.text("h1") == "容器镜像加速"
    browser.find("nav a[lang=zh]").click()
    browser.wait_for(lambda: browser.text("h1") == "容器镜像加速")
    browser.find("nav a[lang=en]").click()
    browser.wait_for(lambda: browser.text("h1") == "Container registry mirror")


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_each_page_is_quiet_sound_and_fits_its_screen(
    browser: Browser, chinese: Browser, mirror: Mirror, path: str, size: tuple[int, int]
) -> None:
    for one, scheme in ((browser, "light"), (chinese, "dark")):
        one.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        one.open(mirror.url + path, size)
        assert one.logged() == []
        asked = one.asked()
        assert asked
        assert [url for url in asked if not url.startswith(mirror.url + "/")] == []
        assert one.run("return document.documentElement.scrollWidth <= window.innerWidth")
        for closed in one.driver.find_elements("css selector", "details:not([open])"):
            one.run("arguments[0].removeAttribute('name'); arguments[0].open = true", closed)
        assert one.run("return document.documentElement.scrollWidth <= window.innerWidth")
        assert one.faults() == []


def test_the_commands_appear_while_one_types(browser: Browser, mirror: Mirror) -> None:
    browser.open(mirror.url)
    browser.find("#client-podman summary").click()
    type_into(browser, "#image", "docker pull ghcr.io/owner/app:1")
    browser.wait_for(lambda: browser.text("#pull") == f"docker pull {mirror.host}/ghcr.io/owner/app:1")
    assert 'location = "ghcr.io"' in browser.text("#podman-file")
    assert browser.find("#podman-file").is_displayed(), "what was opened stays open"
    assert "ghcr.io%2Fowner%2Fapp%3A1" in browser.driver.current_url
    type_into(browser, "#image", "NO")
    browser.wait_for(lambda: "no name of an image" in browser.text("#commands"))
    browser.find("nav a[lang=zh]").click()
    browser.wait_for(lambda: "这不是镜像名" in browser.text("#commands"))
    assert browser.logged() == []


def test_without_javascript_a_form_does_the_same(browser: Browser, mirror: Mirror) -> None:
    browser.command("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(mirror.url)
        type_into(browser, "#image", "redis:7")
        browser.find("#image-form button").click()
        browser.wait_for(lambda: f"docker pull {mirror.host}/redis:7" in browser.driver.page_source)
        assert not browser.find("button.copy").is_displayed()
        browser.find("#client-k3s summary").click()
        assert browser.find("#k3s-file").is_displayed()
    finally:
        browser.command("Emulation.setScriptExecutionDisabled", value=False)


def test_a_snippet_is_copied(browser: Browser, mirror: Mirror) -> None:
    browser.open(mirror.url)
    for key in ("pull", "dockerd-file"):
        button = browser.find(f"button[data-copy={key}]")
        button.click()
        browser.wait_for(lambda button=button: button.text == "Copied")  # type: ignore[misc]
        assert browser.copied() == browser.text(f"#{key}") + "\n"
        browser.wait_for(lambda button=button: button.text == "Copy")  # type: ignore[misc]


def test_a_snippet_is_copied_where_the_browser_has_no_clipboard(browser: Browser, mirror: Mirror) -> None:
    browser.open(mirror.url)
    browser.run("Object.defineProperty(navigator, 'clipboard', {get: () => undefined, configurable: true})")
    browser.find("button[data-copy=retag]").click()
    browser.wait_for(lambda: browser.find("button[data-copy=retag]").text == "Copied")
    browser.run("delete navigator.clipboard")
    assert browser.copied() == browser.text("#retag") + "\n"


def test_from_a_word_to_a_tag_and_its_command(browser: Browser, mirror: Mirror) -> None:
    browser.open(mirror.url)
    type_into(browser, "#q", "postgres\n")
    browser.wait_for(lambda: "Results for" in browser.text("main"))
    browser.find("a[href*='bitnami']").click()
    browser.wait_for(lambda: browser.text("h1") == "Tags of bitnami/postgresql")
    assert "linux/arm64" in browser.text("tbody")
    browser.find("tbody tr:last-child a").click()
    browser.wait_for(lambda: browser.text("h1") == "Container registry mirror")
    assert browser.text("#pull") == f"docker pull {mirror.host}/bitnami/postgresql:16"
    assert browser.logged() == []


@pytest.mark.parametrize(
    "path", ["/?image={}", "/?lang={}&image=a", "/search?q={}", "/tags?image={}", "/tags?image=nginx&filter={}"]
)
def test_nothing_hostile_runs(browser: Browser, mirror: Mirror, index: RawUpstream, path: str) -> None:
    before = index.answers["/v1/search"]
    index.answers["/v1/search"] = found("nginx", HOSTILE, description=HOSTILE)
    try:
        browser.open(mirror.url + path.format(quote(HOSTILE)))
    finally:
        index.answers["/v1/search"] = before
    assert browser.run("return [typeof window.hit, document.scripts.length]") == ["undefined", 1]
    assert [line for line in browser.logged() if "Failed to load" not in line] == []


def test_typing_what_is_hostile_runs_nothing(browser: Browser, mirror: Mirror) -> None:
    browser.open(mirror.url)
    type_into(browser, "#image", HOSTILE)
    browser.wait_for(lambda: "no name of an image" in browser.text("#commands"))
    assert browser.run("return [typeof window.hit, document.scripts.length]") == ["undefined", 1]
    assert browser.logged() == []


def test_an_inline_script_would_not_run_either(browser: Browser, mirror: Mirror) -> None:
    browser.open(mirror.url)
    browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hit=1\">')")
    browser.run("const s = document.createElement('script'); s.text = 'window.hit=1'; document.body.append(s)")
    browser.wait_for(lambda: any("Content Security Policy" in line for line in browser.logged()))
    assert browser.run("return typeof window.hit") == "undefined"


def test_another_site_stands_here_with_its_redirects(browser: Browser, tmp_path: Path) -> None:
    html = {"Content-Type": "text/html"}
    with RawUpstream("127.0.0.12") as site, Mirror(home=f"proxy:{site.url}") as mirror:
        site.answers["/"] = reply(302, b"", {"Location": f"{site.url}/_/nginx"})
        site.answers["/_/nginx"] = reply(200, b"<!DOCTYPE html><title>x</title><h1>Theirs</h1>", html)
        site.answers["/v2/repositories/library/nginx"] = reply_json(200, {"pull_count": 7})
        browser.open(mirror.url)
        assert (browser.text("h1"), browser.driver.current_url) == ("Theirs", f"{mirror.url}/_/nginx")
        count = "return fetch('/v2/repositories/library/nginx').then(r => r.json()).then(j => j.pull_count)"
        assert browser.run(count) == 7
        assert {request.headers["host"] for request in site.requests} == {site.host}
