"""What the documents say of the tests is true."""

import re

from serving import ROOT

SECURITY = ROOT / "docs" / "security.md"
TEST = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def names_in(file: str) -> set[str]:
    path = ROOT / "tests" / file
    return set(re.findall(r"^def (test_\w+)\(", path.read_text(), re.M)) if path.exists() else set()


def test_each_test_that_the_security_document_names_exists() -> None:
    named = TEST.findall(SECURITY.read_text())
    assert named
    assert sorted({f"{file}::{name}" for file, name in named if name not in names_in(file)}) == []


def test_each_guard_of_the_security_document_has_its_test() -> None:
    rows = [line for line in SECURITY.read_text().splitlines() if re.match(r"\| (?!threat |limit )", line)]
    assert rows
    assert [row for row in rows if not TEST.fullmatch(row.rstrip(" |").rpartition(" ")[2])] == []


def test_both_readmes_lead_to_the_documents() -> None:
    for readme in ("README.md", "README.zh-CN.md"):
        for document in ("security", "performance"):
            assert f"](docs/{document}.md)" in (ROOT / readme).read_text()
