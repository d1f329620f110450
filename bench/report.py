"""What was measured, as a table, as JSON, as plots, and in docs/performance.md."""

import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any
from typing import NamedTuple
from typing import Self

from processes import SEARCH_PATH

from bench.growth import Curves
from bench.plot import Point
from bench.plot import curve_plot
from bench.plot import ratio_plot

# Values by measure, figure and peer, one for each pass, in the order of the passes.
Samples = dict[str, dict[str, dict[str, list[float]]]]
OURS = "mirror"
PEERS = ("tuned", "recipe", "registry", "static", "direct")
PACKAGES = ("gunicorn", "gevent", "flask", "requests", "urllib3")
PROGRAMS = ("nginx", "docker-registry", "skopeo")
RATIO = "mirror / peer"
# File, title, what it grows with, whether the upright axis is logarithmic, and the figures that are shown.
GROWTH_PLOTS = (
    ("transfers-memory", "Memory of running transfers", "transfers", True, ("PSS, MiB",)),
    ("transfers-kernel", "The kernel's buffers of all their connections", "transfers", True, ("kernel TCP, MiB",)),
    ("transfers-cpu", "CPU of running transfers", "transfers", True, ("CPU, % of a core",)),
    ("transfers-rate", "Rate of all transfers together", "transfers", True, ("rate, MB/s",)),
    ("blobs-seconds", "Time", "kept blobs", True, ("start, s", "first eviction, s", "hourly tidying, s")),
    ("blobs-memory", "Memory", "kept blobs", False, ("PSS, MiB",)),
    ("blobs-rate", "Rate of hits of 1 KB", "kept blobs", False, ("hits of 1 KB, requests/s",)),
)
MORE_IS_BETTER = re.compile(r", \S+/s$")
PER_REQUEST = re.compile(r", CPU ")


class Spread(NamedTuple):
    """Hold a median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Self:
        """Return the spread of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        # Three digits, or two behind the zeros of what is small.
        size = math.floor(math.log10(abs(self.median))) if self.median else 0
        digits = max(0, 2 - size) if size >= 0 else 1 - size
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f} to {self.high:,.{digits}f})"


@dataclass
class Results:
    """Hold all that was measured, and where."""

    scale: dict[str, Any]
    rounds: int = 0
    samples: Samples = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=lambda: host())

    @classmethod
    def read(cls, file: Path) -> Self:
        """Return what as_json() wrote."""
        found = json.loads(file.read_text())
        return cls(**{name: found[name] for name in ("scale", "rounds", "samples", "curves", "host")})

    def add(self, measure: str, figures: dict[str, dict[str, float]]) -> None:
        """Add what the peers reached in one pass: figures by peer."""
        for peer, values in figures.items():
            for figure, value in values.items():
                self.samples.setdefault(measure, {}).setdefault(figure, {}).setdefault(peer, []).append(value)

    def figures(self, order: list[str]) -> dict[str, dict[str, list[float]]]:
        """Return the values by figure and peer, in the order of the measures."""
        return {
            figure: values
            for measure in sorted(self.samples, key=order.index)
            for figure, values in self.samples[measure].items()
        }

    def as_json(self, order: list[str]) -> dict[str, Any]:
        """Return all values, their spreads, and the mirror's ratios to each peer."""
        figures = self.figures(order)
        spreads = {
            figure: {peer: Spread.of(values)._asdict() for peer, values in peers.items()}
            for figure, peers in figures.items()
        }
        compared = {
            figure: {peer: spread._asdict() for peer, spread in ratios(peers).items()}
            for figure, peers in figures.items()
        }
        return asdict(self) | {"spreads": spreads, "ratios": compared}


class Goal(NamedTuple):
    """Bound a figure, or its ratio to a peer's, from below (`least`) or from above."""

    text: str
    figure: str
    peer: str
    bound: float
    least: bool = False

    def row(self, figures: dict[str, dict[str, list[float]]]) -> list[str]:
        """Return goal, bound, what was measured, and whether that is enough."""
        bound = f"{'≥' if self.least else '≤'} {self.bound:g}"
        found = self.measured(figures.get(self.figure, {}))
        if found is None:
            return [self.text, bound, "", ""]
        reached = found.median >= self.bound if self.least else found.median <= self.bound
        return [self.text, bound, str(found), "yes" if reached else "**no**"]

    def measured(self, peers: dict[str, list[float]]) -> Spread | None:
        """Return what was measured of it, if anything was."""
        if self.peer:
            return ratios(peers).get(self.peer)
        return Spread.of(peers[OURS]) if OURS in peers else None


ALL_RIGHT = "clients within a limit: got all bytes right, %"
GOALS = (
    Goal("one blob of 1 GB: rate / tuned", "one blob, MB/s", "tuned", 0.95, least=True),
    Goal("16 blobs of 100 MB at once: rate / tuned", "blobs at once, MB/s", "tuned", 0.95, least=True),
    Goal("the same: rate / recipe", "blobs at once, MB/s", "recipe", 2.4, least=True),
    Goal("one blob of 1 GB: CPU per GB / tuned", "one blob, CPU s/GB", "tuned", 1.1),
    Goal("16 at once: CPU per GB / tuned", "blobs at once, CPU s/GB", "tuned", 1.1),
    Goal("16 at once: CPU per GB / recipe", "blobs at once, CPU s/GB", "recipe", 0.37),
    Goal("kept blob: rate / static", "kept blob, MB/s", "static", 0.98, least=True),
    Goal("16 kept blobs at once: rate / static", "kept blobs at once, MB/s", "static", 0.87, least=True),
    Goal("blob not yet kept: rate / registry", "new blob, MB/s", "registry", 2.6, least=True),
    Goal("kept manifest: requests per second / static", "kept manifest, requests/s", "static", 0.15, least=True),
    Goal("blob of 1 KB passed through: requests per second / recipe", "1 KB blobs, requests/s", "recipe", 1.5, True),
    Goal("memory when idle, one worker, MiB", "idle PSS, MiB", "", 38),
    Goal("memory for each slow client, passed through, KiB", "slow clients, PSS each, KiB", "", 115),
    Goal("memory for each slow client, kept, KiB", "kept: slow clients, PSS each, KiB", "", 18),
    Goal("300 slow clients within 128 MiB: have all bytes, %", f"{ALL_RIGHT}, mirror, 128 MiB", "", 100, least=True),
    Goal("1,000 slow clients within 512 MiB: have all bytes, %", f"{ALL_RIGHT}, mirror, 512 MiB", "", 100, least=True),
    Goal("connections to a far hub for a first image / direct", "far: first image, new connections", "direct", 1),
    Goal("new connections for a second image", "far: second image, new connections", "", 0),
)


def host() -> dict[str, Any]:
    """Say on what it was measured, and with which versions."""
    models = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpus": os.cpu_count(),
        "cpu": models[0] if models else platform.machine(),
        "memory": f"{memory / 2**30:.0f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
        **{program: version(program) for program in PROGRAMS},
    }


def version(program: str) -> str:
    """Return what a program says of its version; nothing where it is not there."""
    if shutil.which(program, path=SEARCH_PATH) is None:
        return ""
    option = "-v" if program == "nginx" else "--version"
    shown = subprocess.run([program, option], env={"PATH": SEARCH_PATH}, capture_output=True, text=True, check=True)
    found = re.search(r"\d[\w.+-]*", shown.stdout + shown.stderr)
    return found.group() if found else ""


def ratios(peers: dict[str, list[float]]) -> dict[str, Spread]:
    """Return the mirror's ratio to each peer, computed in each pass: what slows a pass down slows all."""
    ours = peers.get(OURS, [])
    return {
        peer: Spread.of([mine / theirs for mine, theirs in zip(ours, values, strict=True)])
        for peer, values in peers.items()
        if peer != OURS and all(values) and len(values) == len(ours)
    }


def table(results: Results, order: list[str]) -> str:
    """Return the table of all figures: the mirror's median and quartiles, and each peer's median with the ratio."""
    figures = results.figures(order)
    others = peers_of(figures)
    rows = [["", OURS, *others]]
    for figure, peers in figures.items():
        compared = ratios(peers)
        rows.append([figure, str(Spread.of(peers[OURS])), *(_cell(peers, compared, peer) for peer in others)])
    return markdown(rows)


def peers_of(figures: dict[str, dict[str, list[float]]]) -> list[str]:
    """Return the names of all peers, those of the project first, in their usual order."""
    names = dict.fromkeys(peer for peers in figures.values() for peer in peers if peer != OURS)
    return sorted(names, key=lambda peer: PEERS.index(peer) if peer in PEERS else len(PEERS))


def _cell(peers: dict[str, list[float]], compared: dict[str, Spread], peer: str) -> str:
    if peer not in peers:
        return ""
    median, _, _ = str(Spread.of(peers[peer])).partition(" ")
    return f"{median}: **{compared[peer]}**".replace(" (", "** (").removesuffix("**") if peer in compared else median


def growth_table(curves: Curves) -> str:
    """Return the tables of what grows, one for each kind of number that it grows with."""
    tables = []
    for kind in dict.fromkeys(figure.partition(":")[0] for figure in curves):
        found = {figure: series for figure, series in curves.items() if figure.startswith(f"{kind}:")}
        numbers = sorted({at for series in found.values() for points in series.values() for at, _ in points})
        rows = [[kind, "", *(f"{number:,.0f}" for number in numbers)]]
        for figure, series in found.items():
            for whose, points in series.items():
                values = dict(points)
                shown = [str(Spread.of([values[n]])).partition(" ")[0] if n in values else "" for n in numbers]
                rows.append([figure.partition(": ")[2], whose, *shown])
        tables.append(markdown(rows))
    return "\n\n".join(tables)


def goals_table(results: Results, order: list[str]) -> str:
    """Return the table of the goals."""
    figures = results.figures(order) | last_points(results.curves)
    return markdown([["goal", "", "measured", "reached"], *(goal.row(figures) for goal in GOALS)])


def last_points(curves: Curves) -> dict[str, dict[str, list[float]]]:
    """Return the last values of what grows, as figures of ours whose names say whose they are."""
    return {
        f"{figure}, {whose}": {OURS: [points[-1][1]]}
        for figure, series in curves.items()
        for whose, points in series.items()
    }


def host_line(results: Results) -> str:
    """Return in a sentence where all was measured."""
    host = results.host
    versions = ", ".join(f"{name} {host[name]}" for name in (*PACKAGES, *PROGRAMS) if name in host)
    return (
        f"Measured on {host['date']} in {results.rounds} rounds: {host['cpus']} CPUs ({host['cpu']}), "
        f"{host['memory']} of memory, Linux {host['kernel']}, Python {host['python']}, {versions}."
    )


def markdown(rows: list[list[str]]) -> str:
    """Return a table with columns of the same width, which can be read as it stands too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]
    return "\n".join([lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]])


def plots(results: Results, order: list[str]) -> dict[str, str]:
    """Return the plots by the names of their files."""
    figures = results.figures(order)
    rates = {figure: peers for figure, peers in figures.items() if MORE_IS_BETTER.search(figure)}
    costs = {figure: peers for figure, peers in figures.items() if PER_REQUEST.search(figure)}
    others = {figure: peers for figure, peers in figures.items() if figure not in rates | costs}
    drawn = {}
    for name, title, chosen in (
        ("rates", "Rates: the further right, the faster the mirror", rates),
        ("cpu", "CPU time: the further left, the less the mirror takes", costs),
        ("memory", "Memory and time: the further left, the less", others),
    ):
        rows = {figure: {peer: _point(spread) for peer, spread in ratios(chosen[figure]).items()} for figure in chosen}
        if any(rows.values()):
            found = {figure: points for figure, points in rows.items() if points}
            drawn[name] = ratio_plot(title, f"{RATIO}, median and quartiles", peers_of(figures), found)
    return drawn | growth_plots(results.curves)


def growth_plots(curves: Curves) -> dict[str, str]:
    """Return the plots of what grows."""
    drawn = {}
    for name, title, kind, log, figures in GROWTH_PLOTS:
        if all(f"{kind}: {figure}" in curves for figure in figures):
            found = {figure: curves[f"{kind}: {figure}"] for figure in figures}
            drawn[name] = curve_plot(title, f"number of {kind}", _unit(figures[0]), _series(found), log=log)
    return drawn


def _series(found: Curves) -> dict[str, list[tuple[float, float]]]:
    """Return the curves of one figure by whose they are, or those of several by what they show."""
    if len(found) == 1:
        return next(iter(found.values()))
    return {figure.rpartition(",")[0]: next(iter(series.values())) for figure, series in found.items()}


def _unit(figure: str) -> str:
    return figure.rpartition(", ")[2]


def _point(spread: Spread) -> Point:
    return Point(*spread)


def document(results: Results, order: list[str], folder: Path) -> None:
    """Write tables into performance.md in this folder, between their marks, and plots and values beside it."""
    beside = folder / "performance"
    beside.mkdir(exist_ok=True)
    (beside / "results.json").write_text(json.dumps(results.as_json(order), indent=1) + "\n")
    for name, text in plots(results, order).items():
        (beside / f"{name}.svg").write_text(text)
    file = folder / "performance.md"
    text = file.read_text()
    for mark, content in (
        ("host", host_line(results)),
        ("goals", goals_table(results, order)),
        ("table", table(results, order)),
        ("growth", growth_table(results.curves)),
    ):
        text = filled_in(text, mark, content)
    file.write_text(text)


def filled_in(text: str, mark: str, content: str) -> str:
    """Return a text with this content between the two comments that hold the mark; raise ValueError without them."""
    begin, end = f"<!-- bench: {mark} -->\n", f"<!-- bench: end of {mark} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the document has no place for {mark}")
    return f"{before}{begin}\n{content}\n\n{end}{after}"
