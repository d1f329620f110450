"""Run a real browser: Debian's chromium without a window, through its own driver, with a new profile."""

import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any
from typing import Self

from processes import clean_environment
from processes import find_program
from processes import poll
from processes import removed_afterwards
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-quic",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SECONDS = 20  # until something must be seen
PHONE, DESKTOP = (390, 844), (1200, 900)


class Browser:
    """Show pages, and remember what was logged and asked for; `languages` is what it asks for."""

    def __init__(self, languages: str = "en"):
        self._languages = languages
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack:
            profile = Path(tempfile.mkdtemp(prefix="chromium-"))
            self._stack.enter_context(removed_afterwards(profile))
            options = webdriver.ChromeOptions()
            options.binary_location = str(find_program("chromium"))
            for flag in (*FLAGS, f"--user-data-dir={profile}", f"--accept-lang={self._languages}"):
                options.add_argument(flag)
            options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
            service = webdriver.ChromeService(str(find_program("chromedriver")), env=clean_environment())
            self.driver = webdriver.Chrome(options, service)
            self._stack.callback(self.driver.quit)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def open(self, url: str, size: tuple[int, int] = DESKTOP) -> None:
        """Show a page on a screen of that size, and forget what was logged before."""
        self.command("Emulation.setDeviceMetricsOverride", **screen(size))
        self._log("browser")
        self._log("performance")
        self.driver.get(url)

    def command(self, name: str, **parameters: Any) -> Any:
        """Send a command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(name, parameters)

    def find(self, selector: str) -> WebElement:
        """Return the first element of a CSS selector."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """Return the text of the first element of a CSS selector, seen or not."""
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page, and return what it returns or what its promise brings."""
        return self.driver.execute_script(script, *arguments)

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Return once something is so."""
        assert poll(ready, SECONDS), self.driver.page_source

    def logged(self) -> list[str]:
        """Return what the console showed since the page was opened, and forget it."""
        return [str(entry["message"]) for entry in self._log("browser")]

    def _log(self, kind: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.driver.get_log(kind)  # type: ignore[no-untyped-call]
        return found

    def asked(self) -> list[str]:
        """Return the URLs that were asked for since the page was opened, and forget them."""
        messages = [json.loads(entry["message"])["message"] for entry in self._log("performance")]
        sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
        return [str(one["request"]["url"]) for one in sent]

    def copied(self) -> str:
        """Return what stands in the clipboard."""
        self.command("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
        return str(self.run("return navigator.clipboard.readText()"))

    def faults(self) -> list[str]:
        """Return what axe-core finds wrong for people who see or hear it otherwise, if it is serious."""
        package = find_spec("axe_core_python")
        assert package is not None
        assert package.submodule_search_locations is not None
        self.run((Path(package.submodule_search_locations[0]) / "axe.min.js").read_text())
        looked = self.run("return axe.run()")
        assert len(looked["passes"]) > 10, "it did not look"
        return [
            f"{fault['id']}: {node['html']}"
            for fault in looked["violations"]
            if fault["impact"] in ("serious", "critical")
            for node in fault["nodes"]
        ]

    def picture(self, file: Path, size: tuple[int, int], height: int | None = None) -> None:
        """Write a picture of the page; all of it where no height is given."""
        whole = height or int(self.run("return document.documentElement.scrollHeight"))
        self.command("Emulation.setDeviceMetricsOverride", **screen((size[0], whole)))
        self.driver.save_screenshot(str(file))


def screen(size: tuple[int, int]) -> dict[str, Any]:
    """Return the parameters of DevTools that make a screen of that size, a phone's if it is narrow."""
    width, height = size
    return {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
