"""The measurements still run, and what they write can be read. No figure is asserted: see docs/performance.md."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
from conftest import needs
from serving import ROOT

from bench.__main__ import ORDER
from bench.measures import MEASURES
from bench.plot import Point
from bench.plot import curve_plot
from bench.plot import ratio_plot
from bench.report import ALL_RIGHT
from bench.report import GOALS
from bench.report import GROWTH_PLOTS
from bench.report import OURS
from bench.report import Results
from bench.report import filled_in
from bench.report import goals_table
from bench.report import last_points
from bench.report import ratios
from bench.report import table

DOCUMENT = ROOT / "docs" / "performance.md"
SVG = "{http://www.w3.org/2000/svg}"
RATIO_PLOTS = ("rates", "cpu", "memory")


class Written(NamedTuple):
    """Hold what a run printed, and the folder into which it wrote its document."""

    printed: str
    folder: Path

    @property
    def results(self) -> Any:
        """Return its values."""
        return json.loads((self.folder / "performance" / "results.json").read_text())


def run(*arguments: str | Path) -> str:
    """Run the command to its end, and return what it printed. Coverage would slow down what it measures."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Written:
    needs("nginx", "docker-registry", "skopeo", "ss")
    folder = tmp_path_factory.mktemp("docs")
    (folder / "performance.md").write_text(DOCUMENT.read_text())
    return Written(run("--short", "--docs", folder), folder)


def test_all_measures_run_with_all_their_peers(short: Written) -> None:
    found = {
        name: {frozenset(peers) for peers in figures.values()} for name, figures in short.results["samples"].items()
    }
    assert found == {measure.name: {frozenset({OURS, *measure.peers})} for measure in MEASURES}
    assert set(short.results["curves"]) >= {
        f"{kind}: {figure}" for _, _, kind, _, figures in GROWTH_PLOTS for figure in figures
    }


def test_the_tables_are_printed_and_stand_in_the_document(short: Written) -> None:
    text = (short.folder / "performance.md").read_text()
    lines = [line for line in short.printed.splitlines() if line]
    assert lines
    assert [line for line in lines if line not in text] == []


def test_each_plot_that_the_document_shows_is_drawn(short: Written) -> None:
    shown = set(re.findall(r"\]\((performance/\w+(?:-\w+)*\.svg)\)", DOCUMENT.read_text()))
    assert shown == {f"performance/{name}.svg" for name in (*RATIO_PLOTS, *(plot[0] for plot in GROWTH_PLOTS))}
    for name in shown:
        assert ElementTree.parse(short.folder / name).getroot().tag == f"{SVG}svg"


def test_each_goal_is_about_a_figure_that_is_measured(short: Written) -> None:
    results = Results.read(short.folder / "performance" / "results.json")
    figures = results.figures(ORDER) | last_points(results.curves)
    missing = [goal for goal in GOALS if goal.measured(figures.get(goal.figure, {})) is None]
    limits = [goal for goal in GOALS if goal.figure.startswith(ALL_RIGHT)]
    assert missing in ([], limits), "only root can make a control group"


def test_results_can_be_read_again_and_drawn_without_measuring(short: Written, tmp_path: Path) -> None:
    (tmp_path / "performance.md").write_text(DOCUMENT.read_text())
    results = short.folder / "performance" / "results.json"
    assert run("--rounds", "0", "--from", results, "--docs", tmp_path) == short.printed
    assert (tmp_path / "performance.md").read_text() == (short.folder / "performance.md").read_text()


def some_results() -> Results:
    results = Results({})
    for mine, theirs in ((90, 100), (95, 100), (120, 100)):
        results.add("blob", {OURS: {"one blob, MB/s": mine}, "tuned": {"one blob, MB/s": theirs}})
    return results


def test_a_ratio_is_the_median_of_the_ratios_of_all_passes() -> None:
    results = some_results()
    assert str(ratios(results.samples["blob"]["one blob, MB/s"])["tuned"]) == "0.95 (0.93 to 1.07)"
    assert "| 95.0 (92.5 to 107.5) | 100: **0.95** (0.93 to 1.07) |" in re.sub(" +", " ", table(results, ORDER))


def test_a_peer_that_took_nothing_has_no_ratio() -> None:
    assert ratios({OURS: [1.0], "static": [0.0]}) == {}


def test_the_goals_say_whether_they_are_reached() -> None:
    rows = re.sub(" +", " ", goals_table(some_results(), ORDER))
    assert "| one blob of 1 GB: rate / tuned | ≥ 0.95 | 0.95 (0.93 to 1.07) | yes |" in rows
    assert "| memory when idle, one worker, MiB | ≤ 38 | | |" in rows


def test_a_document_without_a_place_for_a_table_is_refused() -> None:
    text = "a\n<!-- bench: x -->\nold\n<!-- bench: end of x -->\nb\n"
    once = filled_in(text, "x", "new")
    assert "old" not in once
    assert filled_in(once, "x", "new") == once
    with pytest.raises(ValueError, match="no place for y"):
        filled_in(text, "y", "new")


def test_plots_hold_their_names_as_text_and_all_their_points() -> None:
    point = Point(0.95, 0.9, 1.0)
    rows = {"one & only, MB/s": {"tuned": point, "recipe": point}, "other": {"tuned": point}}
    drawn = ElementTree.fromstring(ratio_plot("<title>", "ratio", ["tuned", "recipe", "static"], rows))
    texts = [element.text for element in drawn.iter(f"{SVG}text")]
    assert {"<title>", "ratio", "one & only, MB/s", "tuned", "recipe", "1"} <= set(texts)
    assert len(list(drawn.iter(f"{SVG}circle"))) == 1 + 2, "a mark for the legend, and one for each row"
    assert "static" not in texts, "what has no points is not in the legend"
    curve = ElementTree.fromstring(curve_plot("t", "across", "MiB", {"a": [(10, 0.0), (1000, 5.0)]}, log=False))
    assert len(list(curve.iter(f"{SVG}circle"))) == 1 + 2
    assert {"10", "1,000", "across", "MiB", "0", "5"} <= {element.text for element in curve.iter(f"{SVG}text")}
