"""Read a page as a person does: by what stands where. A page that is no valid HTML cannot be read."""

from typing import Any
from xml.etree.ElementTree import Element

import html5lib
from lab import Reply
from lab import ask
from serving import Mirror


class Page:
    """Hold a page's parsed HTML, and the answer that brought it."""

    def __init__(self, reply: Reply):
        self.reply = reply
        assert reply.headers["content-type"] == "text/html; charset=utf-8", reply.body
        parser: Any = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
        self.root: Element = parser.parse(reply.body.decode())

    def texts(self, path: str) -> list[str]:
        """Return the text of each element at an ElementTree path, with single spaces."""
        return [" ".join("".join(found.itertext()).split()) for found in self.root.iterfind(path)]

    def text(self, key: str) -> str:
        """Return the text of the element with that id, to the letter."""
        return "".join(self._by_id(key).itertext())

    def has(self, key: str) -> bool:
        """Tell whether there is an element with that id."""
        return self.root.find(f".//*[@id='{key}']") is not None

    def value(self, key: str) -> str:
        """Return what stands in the field with that id."""
        return self._by_id(key).get("value", "")

    @property
    def problem(self) -> str:
        """Return the sentence that says what is wrong, empty where nothing is."""
        return " ".join(self.texts(".//p[@class='problem']"))

    @property
    def links(self) -> dict[str, str]:
        """Return where each link leads, by its text."""
        return {" ".join("".join(a.itertext()).split()): a.get("href", "") for a in self.root.iterfind(".//a")}

    def rows(self) -> list[list[str]]:
        """Return the texts of the cells of each row of the only table."""
        return [
            [" ".join("".join(cell.itertext()).split()) for cell in row] for row in self.root.iterfind(".//tbody/tr")
        ]

    def _by_id(self, key: str) -> Element:
        found = self.root.find(f".//*[@id='{key}']")
        assert found is not None, key
        return found


def open_page(mirror: Mirror, path: str = "/", language: str = "en", **headers: str) -> Page:
    """Return a page of the mirror, for a browser with that Accept-Language."""
    return Page(ask(mirror, path, {"Accept-Language": language, **headers}))
