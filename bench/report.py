"""Medians, quartiles and ratios of what was measured, as a table and as JSON."""

import math
import os
import platform
import statistics
from typing import Any
from typing import NamedTuple

# Values by figure and peer, one for each round, in the rounds' order.
Samples = dict[str, dict[str, list[float]]]
NGINX = ("tuned", "recipe")


class Spread(NamedTuple):
    """Hold a median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Return the spread of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        if math.isnan(self.median):
            return "-"  # a CPU's clock ticks too slowly for what is small
        digits = max(0, 3 - len(str(int(abs(self.median)))))
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def add(samples: Samples, peer: str, figures: dict[str, float]) -> None:
    """Add what one peer reached in one round."""
    for figure, value in figures.items():
        samples.setdefault(figure, {}).setdefault(peer, []).append(value)


def references(peer: str, peers: list[str]) -> list[str]:
    """Return with which peers one is compared: a mirror with each nginx, and another copy's with this one's.

    With the cache, only the first one is compared, with all others.
    """
    if "cached" in peers:
        return peers[1:] if peer == "cached" else []
    if peer in NGINX:
        return []
    return [other for other in peers if other in NGINX or other == peers[0] != peer]


def ratios(values: dict[str, list[float]], peer: str, other: str) -> list[float]:
    """Return the ratio of two peers in each round: what slows a round down slows both."""
    return [mine / theirs if theirs else float("nan") for mine, theirs in zip(values[peer], values[other], strict=True)]


def table(samples: Samples, peers: list[str]) -> str:
    """Return the text of the table: median and quartiles of each figure and ratio, a line for each peer."""
    others = [other for other in peers if any(other in references(peer, peers) for peer in peers)]
    rows = [["", "", "", *(f"/ {other}" for other in others)]]
    for figure, values in samples.items():
        for peer in (peer for peer in peers if peer in values):
            compared = [other for other in references(peer, peers) if other in values]
            shown = [Spread.of(ratios(values, peer, other)) if other in compared else "" for other in others]
            rows.append([figure if peer == peers[0] else "", peer, str(Spread.of(values[peer])), *map(str, shown)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def as_json(samples: Samples, peers: list[str], scale: dict[str, Any]) -> dict[str, Any]:
    """Return all values, and their spreads, with what the host is."""
    compared = [(peer, other) for peer in peers for other in references(peer, peers)]

    def both(values: dict[str, list[float]]) -> list[tuple[str, str]]:
        return [pair for pair in compared if values.keys() >= set(pair)]

    return {
        "host": {"cpus": os.cpu_count(), "machine": platform.machine(), "kernel": platform.release()},
        "python": platform.python_version(),
        "scale": scale,
        "values": samples,
        "spreads": {
            figure: {peer: Spread.of(values[peer])._asdict() for peer in peers if peer in values}
            for figure, values in samples.items()
        },
        "ratios": {
            figure: {
                f"{peer}/{other}": Spread.of(ratios(values, peer, other))._asdict() for peer, other in both(values)
            }
            for figure, values in samples.items()
        },
    }
