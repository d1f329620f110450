"""What the mirror counts, as Prometheus wants it. The first scrape imports it: without one, it takes no memory."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from itertools import accumulate
from itertools import product
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.metrics_core import InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString

from telemetry import OUTCOMES
from telemetry import REASONS
from telemetry import Histogram
from telemetry import Report

PREFIX = "docker_mirror_"
Labels = tuple[str, ...]

# By the name under which telemetry counts: name, labels, help.
COUNTERS: dict[str, tuple[str, Labels, str]] = {
    "requests": (
        "requests",
        ("registry", "kind", "status"),
        "Requests that were answered, but for those that watch over the mirror.",
    ),
    "sent": (
        "sent_bytes",
        ("registry",),
        "Bytes of bodies sent to clients; what nginx sends itself is not among them.",
    ),
    "received": ("received_bytes", ("registry",), "Bytes of manifests and blobs that came from upstream."),
    "transfers": (
        "transfers",
        ("registry", "outcome"),
        "Answers with a blob that ended: whole, failed (upstream or the mirror broke off), left (the client went), "
        "handed_over (nginx sends it).",
    ),
    "resumes": ("resumes", ("registry",), "Transfers that went on after upstream had broken off."),
    "failures": (
        "upstream_failures",
        ("registry", "endpoint", "reason"),
        "Requests that an endpoint failed: by no connection, no answer in time, a limit, another answer than is "
        "expected, or bytes of another digest.",
    ),
    "cooldowns": ("cooldowns", ("registry", "endpoint"), "Times that an endpoint was left alone after a failure."),
    "cache": ("cache_requests", ("kind", "result"), "What the cache had for the GETs of clients."),
    "evictions": ("cache_evictions", (), "Files that went from the cache to make room."),
    "evicted": ("cache_evicted_bytes", (), "Bytes that went from the cache to make room."),
}
DURATIONS: dict[str, tuple[str, Labels, str]] = {
    "first_byte": ("first_byte_seconds", ("kind",), "Time from a request to the first byte of its answer."),
    "transfer": ("transfer_duration_seconds", ("registry",), "Time from a request for a blob to the last byte."),
}
QUOTA = {
    "limit": ("quota_limit", "Manifests that the registry gives within its window."),
    "remaining": ("quota_remaining", "Manifests that are left, as the registry told it last."),
    "window": ("quota_window_seconds", "Time to which the limit applies; 0 where the registry does not tell it."),
    "at": ("quota_timestamp_seconds", "When the registry told its limit last."),
}
CACHE = {
    "bytes": ("cache_bytes", "Bytes that the cache takes."),
    "limit": ("cache_limit_bytes", "Bytes that the cache may take."),
    "free": ("cache_disk_free_bytes", "Bytes that are free on the cache's disk."),
    "reserve": ("cache_disk_reserve_bytes", "Bytes that the cache leaves free on its disk."),
    "failing": ("cache_failing", "Whether the cache's disk failed when it was last used."),
}
CACHE_KINDS, CACHE_RESULTS = ("blob", "manifest"), ("HIT", "JOIN", "MISS", "STALE", "BYPASS")


def expose(
    accept: str, version: str, report: Report, counts: Counter[Labels], durations: Mapping[Labels, Histogram]
) -> tuple[bytes, str]:
    """Return what a scrape gets, and its media type, by the Accept header."""
    try:
        encode, media_type = choose_encoder(accept)
    except (TypeError, ValueError):  # of "application/openmetrics-text;version=abc"
        encode, media_type = choose_encoder("")
    return encode(Exposition(version, report, counts, durations)), media_type


class Exposition:
    """Give what telemetry counted and reports as families of metrics.

    What may be counted of the registries that are served is there from the start, as 0: else Prometheus would not see
    the first increase.
    """

    def __init__(
        self, version: str, report: Report, counts: Counter[Labels], durations: Mapping[Labels, Histogram]
    ) -> None:
        self._version = version
        self._report = report
        self._endpoints = names([(one["registry"], one["url"]) for one in report["endpoints"]])
        self._counts = {**dict.fromkeys(self._known(), 0), **counts}
        self._durations = durations

    def collect(self) -> Iterator[Metric]:
        """Yield all families."""
        yield from self._process()
        yield from self._counters()
        yield from self._histograms()
        yield from self._upstream()
        yield from self._cache()

    def _known(self) -> Iterator[Labels]:
        """Yield what may be counted, as far as that is known before."""
        registries = list(dict.fromkeys(registry for registry, _ in self._endpoints))
        yield from product(("sent", "received", "resumes"), registries)
        yield from product(("transfers",), registries, OUTCOMES)
        for registry, url in self._endpoints:
            yield "cooldowns", registry, url
            yield from (("failures", registry, url, reason) for reason in REASONS)
        if self._report["cache"] is not None:
            yield from product(("cache",), CACHE_KINDS, CACHE_RESULTS)
            yield from (("evictions",), ("evicted",))

    def _process(self) -> Iterator[Metric]:
        report = self._report
        about = {"version": self._version, "python": platform.python_version()}
        yield InfoMetricFamily(f"{PREFIX}build", "The mirror's version, and Python's.", about)
        # Whole seconds: the difference of two times that change is never quite the same.
        began = int(report["at"] - report["uptime"])
        yield gauge("process_start_time_seconds", "When the mirror was started.", began)
        yield gauge("workers", "Worker processes that serve.", report["workers"])
        yield gauge("memory_bytes", "Memory of all processes, each shared page counted once (PSS).", report["memory"])
        yield gauge("transfers_running", "Transfers of blobs that run.", report["running"])

    def _counters(self) -> Iterator[Metric]:
        for counted, (name, labels, text) in COUNTERS.items():
            family = CounterMetricFamily(PREFIX + name, text, labels=labels)
            for (kind, *values), count in self._counts.items():
                if kind == counted:
                    family.add_metric(self._shown(labels, values), count)
            if family.samples:
                yield family

    def _histograms(self) -> Iterator[Metric]:
        for counted, (name, labels, text) in DURATIONS.items():
            family = HistogramMetricFamily(PREFIX + name, text, labels=labels)
            for (kind, *values), found in self._durations.items():
                if kind == counted:
                    bounds = [*map(floatToGoString, found.bounds), "+Inf"]
                    buckets = list(zip(bounds, accumulate(found.counts), strict=True))
                    family.add_metric(values, buckets, found.total)
            if family.samples:
                yield family

    def _upstream(self) -> Iterator[Metric]:
        labels = ("registry", "endpoint")
        up = GaugeMetricFamily(f"{PREFIX}endpoint_up", "Whether an endpoint answered last.", labels=labels)
        text = "Time for which an endpoint is still left alone."
        cooldown = GaugeMetricFamily(f"{PREFIX}endpoint_cooldown_seconds", text, labels=labels)
        for one in self._report["endpoints"]:
            values = self._shown(labels, [one["registry"], one["url"]])
            if one["state"] != "unknown":
                up.add_metric(values, one["state"] == "up")
            cooldown.add_metric(values, max(0, (one.get("until") or 0) - self._report["at"]))
        yield from (family for family in (up, cooldown) if family.samples)
        for key, (name, text) in QUOTA.items():
            family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
            for quota in self._report["quotas"]:
                family.add_metric(self._shown(labels, [quota["registry"], quota["url"]]), quota[key])
            if family.samples:
                yield family

    def _cache(self) -> Iterator[Metric]:
        figures: Mapping[str, Any] = self._report["cache"] or {}
        for key, (name, text) in CACHE.items():
            if figures.get(key) is not None:  # which a failing disk does not tell
                yield gauge(name, text, figures[key])

    def _shown(self, labels: Labels, values: list[str]) -> list[str]:
        """Return the values of labels as they are shown; `values` has an endpoint by its URL, behind its registry."""
        shown = dict(zip(labels, values, strict=True))
        if "endpoint" in shown:
            shown["endpoint"] = self._endpoints[shown["registry"], shown["endpoint"]]
        if "result" in shown:
            shown["result"] = shown["result"].lower()
        return list(shown.values())


def gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    """Return a gauge without labels."""
    return GaugeMetricFamily(PREFIX + name, text, value)


def names(endpoints: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Return what each endpoint is called: by its host, for a path may be a secret; a second one gets a number."""
    found: dict[tuple[str, str], str] = {}
    counted: Counter[tuple[str, str]] = Counter()
    for registry, url in endpoints:
        host = urlsplit(url).netloc
        counted[registry, host] += 1
        number = counted[registry, host]
        found[registry, url] = host if number == 1 else f"{host} #{number}"
    return found
