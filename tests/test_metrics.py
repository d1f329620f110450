"""What /metrics gives is what real clients did; a real Prometheus takes it, and docs/ says what to look at."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import needs
from depot import BROKEN
from depot import Cached
from depot import Depot
from depot import Reading
from depot import cached_lab
from hub import PASSWORD
from hub import USER
from hub import Hub
from images import MB
from lab import DIGEST
from lab import MANIFEST
from lab import Lab
from lab import ask
from lab import reply_json
from processes import Process
from processes import free_port
from processes import poll
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from serving import HOST
from serving import ROOT
from serving import Mirror
from upstream import RawUpstream
from upstream import reply

from metrics import expose
from mirror import KINDS
from telemetry import REASONS
from telemetry import Telemetry

READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
ALERTS, DASHBOARD = ROOT / "docs" / "alerts.yml", ROOT / "docs" / "grafana.json"
OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
REPOSITORY = "library/counted"
CONTENT = os.urandom(3 * MB)
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
ACCEPT = {
    "Accept": f"application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, "
    f"{MANIFEST_TYPE}, application/vnd.docker.distribution.manifest.v2+json"
}

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
Parser = Callable[[str], Iterable[Metric]]


def scrape(mirror: Mirror) -> Samples:
    """Return what a scrape gives, by name and labels."""
    answer = ask(mirror, "/metrics")
    assert answer.status == 200
    return parsed(answer.body)


def parsed(text: bytes, parse: Parser = text_string_to_metric_families) -> Samples:
    """Return what an exposition holds."""
    found: Samples = {}
    for family in parse(text.decode()):
        assert family.documentation
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found
            found[key] = sample.value
    return found


def shown(told: Telemetry, cache: dict[str, Any] | None = None) -> Samples:
    """Return what is shown of what one worker was told."""
    content, _ = expose("", "1.0", {**told.report(), "cache": cache}, *told.totals())
    return parsed(content)


def total(found: Samples, name: str, **labels: str) -> float:
    """Return the sum of all samples with this name, without the prefix, and these labels."""
    wanted = set(labels.items())
    return sum(value for (one, has), value in found.items() if one == f"docker_mirror_{name}" and wanted <= has)


class Change:
    """Tell how much more a mirror shows than it did before."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._before = scrape(mirror)

    def __call__(self, name: str, **labels: str) -> float:
        """Return the difference of `total` now and then."""
        return total(scrape(self._mirror), name, **labels) - total(self._before, name, **labels)


def names_in(found: Samples) -> set[str]:
    return {name for name, _ in found}


def promtool(*arguments: str | Path, content: bytes = b"") -> str:
    """Run promtool, which must find nothing; return what it says."""
    needs("promtool")
    ended = subprocess.run(["promtool", *arguments], input=content, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stderr == b""
    return ended.stdout.decode()


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(connect_timeout=1, first_byte_timeout=3, idle_timeout=1) as running:
        yield running


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cached]:
    folder = tmp_path_factory.mktemp("metrics")
    with cached_lab(folder) as lab:
        yield Cached(lab, folder)


# The form


@pytest.mark.parametrize("kind", ["fresh", "cached", "used"])
def test_the_exposition_is_valid(kind: str, hub: Hub, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"cache_dir": tmp_path} if kind != "fresh" else {}
    with Mirror(registries=hub.registries_file, **settings) as mirror:
        if kind == "used":
            blob = f"/v2/{REPOSITORY}/blobs/{hub.add_blob(REPOSITORY, 1000)}"
            for path in (blob, blob, f"/v2/{REPOSITORY}/manifests/none", "/", "/token"):
                ask(mirror, path)
        text = ask(mirror, "/metrics")
        assert text.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert promtool("check", "metrics", content=text.body) == ""
        found = parsed(text.body)
        other = ask(mirror, "/metrics", {"Accept": OPENMETRICS})
        assert other.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        assert names_in(parsed(other.body, openmetrics.text_string_to_metric_families)) == names_in(found)
    assert all(name.startswith("docker_mirror_") for name in names_in(found))
    assert ("docker_mirror_cache_bytes" in names_in(found)) == (kind != "fresh")


def test_a_process_says_what_it_is(lab: Lab) -> None:
    found = scrape(lab.mirror)
    (about,) = (dict(labels) for name, labels in found if name == "docker_mirror_build_info")
    assert set(about) == {"version", "python"}
    assert total(found, "workers") == 1
    assert 10 * MB < total(found, "memory_bytes") < 1000 * MB
    began = total(found, "process_start_time_seconds")
    assert 0 <= time.time() - began < 3600
    assert total(scrape(lab.mirror), "process_start_time_seconds") == began


UNSEEN = """
import sys, mirror, settings
client = mirror.create_app(settings.Config.from_environ({})).test_client()
stranger = {"REMOTE_ADDR": "203.0.113.7"}
seen = [client.get("/metrics", environ_base=stranger).status_code, "prometheus_client" in sys.modules]
seen += [client.get("/metrics").status_code, "prometheus_client" in sys.modules]
sys.exit(seen != [404, False, 200, True])
"""


def test_only_a_scrape_loads_prometheus_client() -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MIRROR_")}
    command = [sys.executable, "-c", UNSEEN]
    assert subprocess.run(command, cwd=ROOT, env=inherited, check=False, timeout=60).returncode == 0


def test_what_may_be_counted_is_0_from_the_start() -> None:
    with Lab() as fresh:
        found = scrape(fresh.mirror)
    for name in ("sent_bytes_total", "received_bytes_total", "transfers_total", "resumes_total"):
        values = [
            value for (one, labels), value in found.items() if one.endswith(name) and ("registry", "ghcr.io") in labels
        ]
        assert values
        assert set(values) == {0}
    reasons = {dict(labels)["reason"] for name, labels in found if name == "docker_mirror_upstream_failures_total"}
    assert reasons == set(REASONS)


# Histograms


def test_buckets_are_cumulative_and_have_their_sum() -> None:
    told = Telemetry([("r", "https://r.test")])
    for seconds in (0.004, 0.005, 0.02, 7, 100):
        told.request("r", "blob", 200, seconds)
    told.request("r", "token", 200, 1)
    found = shown(told)
    buckets = {
        dict(labels)["le"]: value
        for (name, labels), value in found.items()
        if name == "docker_mirror_first_byte_seconds_bucket" and ("kind", "blob") in labels
    }
    bounds = ["0.005", "0.01", "0.025", "0.05", "0.1", "0.25", "0.5", "1.0", "2.5", "5.0", "10.0", "30.0", "+Inf"]
    assert buckets == dict(zip(bounds, [2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 4, 4, 5], strict=True))
    assert total(found, "first_byte_seconds_count", kind="blob") == 5
    assert total(found, "first_byte_seconds_sum", kind="blob") == pytest.approx(107.029)
    assert total(found, "first_byte_seconds_count", kind="token") == 1


def test_only_a_whole_transfer_has_a_duration() -> None:
    told = Telemetry([("r", "https://r.test")])
    for outcome in ("whole", "failed", "left", "handed_over"):
        run = told.transfer("r", "client", "r/image", DIGEST)
        run.begin(10, "HIT")
        run.outcome = outcome
        run.end()
        assert total(shown(told), "transfers_total", outcome=outcome) == 1
    assert total(shown(told), "transfer_duration_seconds_count", registry="r") == 1


# What clients do


def test_what_passes_through_is_counted_once(hub: Hub) -> None:
    path = f"/v2/{REPOSITORY}/blobs/{hub.add_blob(REPOSITORY, MB + 1)}"
    with Mirror(registries=hub.registries_file) as mirror:
        assert ask(mirror, path, method="HEAD").status == 200
        found = scrape(mirror)
        assert total(found, "transfers_total") == total(found, "sent_bytes_total") == 0
        assert len(ask(mirror, path).body) == MB + 1
        assert len(ask(mirror, path, {"Range": "bytes=5-104"}).body) == 100
        poll(lambda: total(scrape(mirror), "transfers_total") == 2, 5)
        found = scrape(mirror)
    assert total(found, "requests_total", registry="docker.io", kind="blob", status="200") == 2
    assert total(found, "requests_total", registry="docker.io", kind="blob", status="206") == 1
    assert total(found, "requests_total") == 3
    assert total(found, "sent_bytes_total", registry="docker.io") == MB + 101
    assert total(found, "received_bytes_total", registry="docker.io") == MB + 101
    assert total(found, "transfers_total", registry="docker.io", outcome="whole") == 2
    assert total(found, "transfer_duration_seconds_count", registry="docker.io") == 2
    assert total(found, "first_byte_seconds_count", kind="blob") == 3
    assert total(found, "transfers_running") == 0
    assert total(found, "endpoint_up", registry="docker.io") == 1
    assert total(found, "upstream_failures_total") == 0


def test_what_is_refused_is_sent_too(hub: Hub) -> None:
    with Mirror(registries=hub.registries_file) as mirror:
        login = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        answers = {
            "manifest": ask(mirror, "/v2/private/app/manifests/latest"),
            "blob": ask(mirror, f"/v2/{REPOSITORY}/blobs/{DIGEST}"),
            "ping": ask(mirror, "/v2/"),
            "token": ask(mirror, "/token?scope=repository:private/app:pull", {"Authorization": login}),
        }
        found = scrape(mirror)
    assert {kind: answer.status for kind, answer in answers.items()} == {
        "manifest": 401, "blob": 404, "ping": 401, "token": 200
    }  # fmt: skip
    for kind, answer in answers.items():
        assert total(found, "requests_total", kind=kind, status=str(answer.status)) == 1
    assert total(found, "sent_bytes_total") == sum(len(answer.body) for answer in answers.values())
    assert total(found, "transfers_total") == 0
    assert total(found, "upstream_failures_total") == 0


def test_the_cache_counts_what_it_had(cached: Cached) -> None:
    more = Change(cached.mirror)
    depot = Depot(os.urandom(MB), pause=1000)
    path = cached.serves(depot)
    with Reading(cached.mirror, path) as first, Reading(cached.mirror, path) as second:
        assert (first.headers["x-cache"], second.headers["x-cache"]) == ("MISS", "JOIN")
        assert poll(lambda: more("transfers_running") == 2, 5)
        depot.go.set()
        assert first.read() == second.read() == depot.content
    assert cached.has(depot)
    assert cached.ask(path).headers["x-cache"] == "HIT"
    assert cached.ask(path, method="HEAD").headers["x-cache"] == "HIT"
    assert cached.ask(path, {"Range": "bytes=-5"}).headers["x-cache"] == "HIT"
    assert cached.ask(path, {"If-None-Match": f'"{depot.digest}"'}).status == 304
    poll(lambda: more("transfers_total") == 4, 5)
    assert [more("cache_requests_total", kind="blob", result=result) for result in ("miss", "join", "hit")] == [1, 1, 3]
    assert more("sent_bytes_total") == 3 * MB + 5
    assert more("received_bytes_total") == MB
    assert more("transfers_total", outcome="whole") == more("transfers_total") == 4
    assert more("cache_bytes") >= MB
    found = scrape(cached.mirror)
    assert total(found, "cache_limit_bytes") == 10 << 30
    assert total(found, "cache_disk_reserve_bytes") == 0
    assert total(found, "cache_disk_free_bytes") > MB
    assert total(found, "cache_failing") == 0


def test_an_answer_without_a_body_is_no_bytes(cached: Cached) -> None:
    manifest = json.dumps({"schemaVersion": 2, "layers": []}).encode()
    path = f"/v2/library/{cached.lab.name}/manifests/latest"
    cached.lab.upstream.answers[path] = reply(200, manifest, {"Content-Type": MANIFEST_TYPE})
    more = Change(cached.mirror)
    first = cached.ask(path, ACCEPT)
    assert (first.status, first.headers["x-cache"]) == (200, "MISS")
    assert cached.ask(path, {**ACCEPT, "If-None-Match": first.headers["etag"]}).status == 304
    assert cached.ask(path, ACCEPT, "HEAD").status == 200
    assert more("sent_bytes_total") == len(manifest)


def test_what_nginx_sends_is_handed_over(hub: Hub, tmp_path: Path) -> None:
    path = f"/v2/{REPOSITORY}/blobs/{hub.add_blob(REPOSITORY, 2001)}"
    with Mirror(registries=hub.registries_file, cache_dir=tmp_path, accel="/protected/") as mirror:
        assert len(ask(mirror, path).body) == 2001
        assert poll(lambda: ask(mirror, path, method="HEAD").headers["x-cache"] == "HIT", 10)
        assert ask(mirror, path).headers["x-accel-redirect"]
        found = scrape(mirror)
    assert total(found, "transfers_total", outcome="handed_over") == 1
    assert total(found, "sent_bytes_total") == 2001
    assert total(found, "transfer_duration_seconds_count") == 1


def test_a_client_that_leaves_is_no_failure(lab: Lab) -> None:
    lab.reset()
    depot = Depot(CONTENT, pause=2 * MB)
    path = f"/v2/library/app/blobs/{depot.digest}"
    lab.upstream.answers[path] = depot
    more = Change(lab.mirror)
    with Reading(lab.mirror, path) as reading:
        assert len(reading.read(1000)) == 1000
        assert more("transfers_running") == 1
    assert poll(lambda: more("transfers_running") == 0, 10)
    depot.go.set()
    assert more("transfers_total", outcome="left") == more("transfers_total") == 1


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_transfer_that_upstream_breaks_for_good_has_failed(lab: Lab, cached: Cached, is_kept: bool) -> None:
    here = cached.lab if is_kept else lab
    here.reset()
    depot = Depot(os.urandom(MB), cut=300_000)
    path = f"/v2/library/app/blobs/{depot.digest}"
    here.upstream.answers[path] = depot
    more = Change(here.mirror)
    with Reading(here.mirror, path) as reading:
        here.upstream.answers[path] = reply(500)
        with pytest.raises(BROKEN):
            reading.read()
    assert poll(lambda: more("transfers_running") == 0, 10)
    assert more("transfers_total", outcome="failed") == more("transfers_total") == 1
    assert more("upstream_failures_total", reason="answer") > 0


def test_a_transfer_that_goes_on_is_a_resume(lab: Lab) -> None:
    lab.reset()
    depot = Depot(CONTENT, cut=2 * MB)
    path = f"/v2/library/app/blobs/{depot.digest}"
    lab.upstream.answers[path] = depot
    more = Change(lab.mirror)
    assert ask(lab.mirror, path).body == CONTENT
    assert more("resumes_total", registry="docker.io") == 1
    assert more("received_bytes_total") == len(CONTENT)
    assert poll(lambda: more("transfers_total", outcome="whole") == 1, 5)


# Upstream


def test_a_limiting_endpoint_cools_down_and_the_quota_is_told(tmp_path: Path) -> None:
    with RawUpstream() as first, RawUpstream() as second:
        first.default = reply(429, b"", {"Retry-After": "120"})
        limits = {"RateLimit-Limit": "100;w=21600", "RateLimit-Remaining": "76;w=21600"}
        second.answers[MANIFEST] = reply_json(200, {}, limits)
        file = tmp_path / "registries.toml"
        file.write_text(f'["docker.io"]\nendpoints = ["{first.url}/s3cret", "{second.url}"]\n')
        with Mirror(registries=file) as mirror:
            for _ in range(2):
                assert ask(mirror, MANIFEST).status == 200
            found = scrape(mirror)
    one, other = ({"registry": "docker.io", "endpoint": upstream.host} for upstream in (first, second))
    assert (
        total(found, "upstream_failures_total", reason="limited", **one) == total(found, "upstream_failures_total") == 1
    )
    assert total(found, "cooldowns_total", **one) == total(found, "cooldowns_total") == 1
    assert (total(found, "endpoint_up", **one), total(found, "endpoint_up", **other)) == (0, 1)
    assert 100 < total(found, "endpoint_cooldown_seconds", **one) <= 120
    assert total(found, "endpoint_cooldown_seconds", **other) == 0
    assert (total(found, "quota_limit", **other), total(found, "quota_remaining", **other)) == (100, 76)
    assert total(found, "quota_window_seconds", **other) == 21600
    assert 0 <= time.time() - total(found, "quota_timestamp_seconds", **other) < 60
    assert not any("s3cret" in value for _, labels in found for _, value in labels)


def test_two_endpoints_at_one_host_are_two() -> None:
    told = Telemetry([("r", "https://h.test/a"), ("r", "https://h.test/b"), ("s", "https://h.test/a")])
    told.failed("r", "https://h.test/b", "timeout", "")
    found = shown(told)
    assert total(found, "upstream_failures_total", registry="r", endpoint="h.test #2", reason="timeout") == 1
    assert total(found, "upstream_failures_total") == 1


# Bounds


def test_clients_cannot_make_labels(lab: Lab) -> None:
    lab.reset()
    with Lab(block_agents="badbot") as fresh:
        fresh.upstream.default = reply_json(418, {"errors": []})

        def send(number: int) -> None:
            odd = f"x{number}"
            for path in (
                f"/v2/{odd}.io/app/manifests/latest",
                f"/v2/library/{odd}/manifests/{odd}",
                f"/v2/app/manifests/latest?ns={odd}.io",
                f"/v2/library/app/blobs/sha256:{number:064x}",
                f"/{odd}",
                f"/token/{odd}",
                f"/token?service={odd}",
            ):
                ask(fresh.mirror, path, {"Host": f"{odd}.example"})
                ask(fresh.mirror, path, method=f"X{number}")
            ask(fresh.mirror, MANIFEST, {"User-Agent": f"badbot {odd}"})

        def labels() -> set[Any]:
            found = scrape(fresh.mirror)
            assert {value for _, has in found for label, value in has if label == "kind"} <= {*KINDS.values(), "page"}
            return set(found)

        for number in (1, 2):
            send(number)
        before = labels()
        for number in range(3, 9):
            send(number)
        assert labels() == before


def test_odd_statuses_of_upstream_are_counted_by_class() -> None:
    told = Telemetry([("r", "https://r.test")])
    for status in (200, 299, 298, 404, 418, 477, 499, 599):
        told.request("r", "manifest", status, 0.1)
    statuses = {dict(labels)["status"] for name, labels in shown(told) if name == "docker_mirror_requests_total"}
    assert statuses == {"200", "2xx", "404", "418", "4xx", "499", "5xx"}


# What must not break it


def test_a_cache_whose_disk_fails_says_so() -> None:
    told = Telemetry([("r", "https://r.test")])
    found = shown(told, {"bytes": None, "free": None, "limit": 5, "reserve": 1, "failing": True})
    assert (total(found, "cache_failing"), total(found, "cache_limit_bytes")) == (1, 5)
    assert "docker_mirror_cache_bytes" not in names_in(found)


def test_a_disk_that_hangs_does_not_hold_a_scrape_up(cached: Cached) -> None:
    assert "docker_mirror_cache_bytes" in names_in(scrape(cached.mirror))
    with (cached.folder / "usage").open("rb") as usage:
        fcntl.flock(usage, fcntl.LOCK_EX)  # the count waits for it as it would for the disk
        began = time.monotonic()
        found = scrape(cached.mirror)
        assert time.monotonic() - began < 9  # Prometheus waits 10 seconds
    assert "docker_mirror_cache_bytes" not in names_in(found)
    assert total(found, "cache_limit_bytes") == 10 << 30
    assert "docker_mirror_cache_bytes" in names_in(scrape(cached.mirror))


def test_counters_go_on_while_workers_die(lab: Lab) -> None:
    lab.reset()
    lab.upstream.answers[MANIFEST] = reply_json(200, {})
    with Mirror("--workers", "2", registries=lab.registries) as mirror:
        assert poll(lambda: total(scrape(mirror), "workers") == 2, 20)
        last = 0.0
        for round_ in range(3):
            for _ in range(10):
                assert ask(mirror, MANIFEST).status == 200
            time.sleep(2)  # until both have told
            os.kill(mirror.pids()[1 + round_ % 2], signal.SIGKILL)
            end = time.monotonic() + 3
            while time.monotonic() < end:
                with contextlib.suppress(ConnectionError):  # of the worker that was killed
                    now = total(scrape(mirror), "requests_total", kind="manifest")
                    assert now >= last
                    last = now
            assert poll(lambda: total(scrape(mirror), "workers") == 2, 20)
        assert last == 30


# Prometheus and Grafana


def test_the_rules_are_valid_and_find_what_they_are_for() -> None:
    assert "SUCCESS" in promtool("check", "rules", ALERTS)
    assert "SUCCESS" in promtool("test", "rules", ROOT / "tests" / "alerts.yml")


def test_each_rule_has_its_test() -> None:
    rules = set(re.findall(r"- alert: (\w+)", ALERTS.read_text()))
    assert rules
    tested = (ROOT / "tests" / "alerts.yml").read_text()
    assert {name for name in rules if not re.search(rf"alertname: {name}\n +exp_alerts:", tested)} == set()


def block_of(readme: Path) -> str:
    """Return the configuration of Prometheus that a README tells its reader to paste."""
    blocks = re.findall(r"^```yaml\n(.*?)^```$", readme.read_text(), re.M | re.S)
    (block,) = [block for block in blocks if "scrape_configs:" in block]
    return str(block)


def test_both_readmes_show_the_same_configuration() -> None:
    assert block_of(READMES[0]) == block_of(READMES[1])
    for readme in READMES:
        for file in (ALERTS, DASHBOARD):
            assert f"](docs/{file.name})" in readme.read_text()


def expressions(part: Any) -> Iterator[str]:
    """Yield all queries of a dashboard."""
    if isinstance(part, dict):
        yield from ([part["expr"]] if "expr" in part else [])
        yield from (found for value in part.values() for found in expressions(value))
    elif isinstance(part, list):
        yield from (found for value in part for found in expressions(value))


def filled(query: str) -> str:
    """Return a query of the dashboard as Grafana asks it, with all values chosen."""
    values = {"$__rate_interval": "5s", "$__range": "1m", "$registry": ".*", "$instance": ".+", "$job": ".+"}
    for name, value in values.items():
        query = query.replace(name, value)
    assert "$" not in query
    return query


def named(text: str) -> set[str]:
    return set(re.findall(r"\bdocker_mirror_\w+", text))


class Prometheus:
    """Ask a running Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url

    def _ask(self, path: str) -> requests.Response:
        with requests.Session() as session:
            session.trust_env = False
            return session.get(self.url + path, timeout=10)

    def get(self, path: str, **query: str) -> Any:
        """Return the data of an answer, which must be a success."""
        answer = self._ask(f"/api/v1/{path}?{urllib.parse.urlencode(query)}")
        assert answer.status_code == 200, f"{query}: {answer.text}"
        return answer.json()["data"]

    def query(self, query: str) -> list[Any]:
        """Return what a query gives now."""
        return list(self.get("query", query=query)["result"])

    def is_ready(self) -> bool:
        """Tell whether it is up."""
        try:
            return self._ask("/-/ready").status_code == 200
        except requests.ConnectionError:
            return False


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cached]:
    """Run a mirror that is used in all ways: each metric is there."""
    folder = tmp_path_factory.mktemp("used")
    with cached_lab(folder) as lab:
        here = Cached(lab, folder)
        use(here)
        yield here


def use(here: Cached) -> None:
    """Pull a blob that is new, and a manifest that tells the quota."""
    path = here.serves(Depot(os.urandom(MB)))
    assert len(here.ask(path).body) == len(here.ask(path).body) == MB
    limits = {"RateLimit-Limit": "100;w=21600", "RateLimit-Remaining": "76;w=21600"}
    here.lab.upstream.answers[MANIFEST] = reply_json(200, {}, limits)
    assert here.ask(MANIFEST, ACCEPT).status == 200
    assert here.ask(f"{MANIFEST}-not").status == 404


@pytest.fixture
def prometheus(used: Cached, tmp_path: Path) -> Iterator[Prometheus]:
    """Run Prometheus with the README's configuration; it asks often."""
    needs("prometheus")
    config = block_of(READMES[0]).replace("127.0.0.1:5000", used.mirror.host)
    config = re.sub(r"rule_files: \[.*\]", f"rule_files: [{ALERTS}]", config)
    assert used.mirror.host in config
    assert str(ALERTS) in config
    file, port = tmp_path / "prometheus.yml", free_port(HOST)
    file.write_text("global: {scrape_interval: 500ms, evaluation_interval: 500ms}\n" + config)
    assert "SUCCESS" in promtool("check", "config", file)
    command = ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={tmp_path}/data"]
    command += [f"--web.listen-address={HOST}:{port}"]
    with Process(command, tmp_path / "log") as process:
        running = Prometheus(f"http://{HOST}:{port}")
        process.wait_until(running.is_ready)
        yield running


def test_a_real_prometheus_scrapes_it_and_answers_the_dashboard(prometheus: Prometheus, used: Cached) -> None:
    def is_up() -> bool:
        return [one["value"][1] for one in prometheus.query('up{job="docker-mirror"}')] == ["1"]

    assert poll(is_up, 20, 0.2)
    queries = [filled(query) for query in expressions(json.loads(DASHBOARD.read_text()))]
    assert len(queries) > 20
    received = next(
        query for query in queries if re.fullmatch(r"sum\(rate\(docker_mirror_received_bytes_total.*", query)
    )

    def is_seen() -> bool:
        use(used)
        return any(float(one["value"][1]) > 0 for one in prometheus.query(received))

    assert poll(is_seen, 30, 0.2)
    found = {query: prometheus.query(query) for query in queries}
    empty = [query for query, result in found.items() if not result and not re.search(r"> 0\b", query)]
    assert empty == []
    (left,) = (result for query, result in found.items() if query.startswith("min(docker_mirror_quota_remaining"))
    assert float(left[0]["value"][1]) == pytest.approx(0.76)
    groups = prometheus.get("rules")["groups"]
    assert {
        rule["name"]: rule["health"] for group in groups for rule in group["rules"] if rule["health"] == "err"
    } == {}
    assert prometheus.get("alerts")["alerts"] == []


def test_all_that_the_dashboard_and_the_rules_name_is_there(used: Cached) -> None:
    there = names_in(scrape(used.mirror))
    for file in (DASHBOARD, ALERTS):
        assert named(file.read_text())
        assert named(file.read_text()) - there == set()


def test_all_that_is_there_is_on_the_dashboard(used: Cached) -> None:
    families = {family.name for family in text_string_to_metric_families(ask(used.mirror, "/metrics").body.decode())}
    on_it = " ".join(named(DASHBOARD.read_text()))
    assert {name for name in families if name not in on_it} - {
        "docker_mirror_quota_window_seconds",
        "docker_mirror_quota_timestamp_seconds",
    } == set()


def test_each_panel_of_the_dashboard_has_a_title_and_the_chosen_source() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    assert all(panel["title"] and panel["fieldConfig"]["defaults"]["unit"] for panel in panels)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    variables = [variable["name"] for variable in dashboard["templating"]["list"]]
    assert variables == ["datasource", "job", "instance", "registry"]
    cells = [(x, y) for panel in dashboard["panels"] for x, y in cells_of(panel["gridPos"])]
    assert len(cells) == len(set(cells))


def cells_of(position: dict[str, int]) -> Iterator[tuple[int, int]]:
    assert position["x"] + position["w"] <= 24
    for x in range(position["x"], position["x"] + position["w"]):
        for y in range(position["y"], position["y"] + position["h"]):
            yield x, y
