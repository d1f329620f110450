"""What people see in a browser: the pages' words and files, what they show to be copied, and nginx's own pages.

It is told what to show, and asks nobody. The pages are templates/, in two languages; a page holds no script, no style
and no address of another host, so that its Content-Security-Policy can forbid them all.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from functools import cached_property
from http import HTTPStatus
from http.client import responses
from pathlib import Path
from typing import Any
from typing import NamedTuple
from urllib.parse import urlencode
from urllib.parse import urlsplit

from flask import Response
from flask import render_template
from flask import request
from markupsafe import Markup

FOLDER = Path(__file__).resolve().parent / "templates"
LANGUAGES = {"en": "English", "zh": "中文"}
FILES = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
FILE_SECONDS = 3600  # for which a browser need not ask for them again
# connect-src: page.js asks the home page again while an image is typed, and for what the status page shows.
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
NO_INDEX = {"X-Robots-Tag": "noindex, nofollow"}
HEADERS = {
    **NO_INDEX,
    "Cache-Control": "no-cache",
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept-Language",
    "X-Content-Type-Options": "nosniff",
}
ROBOTS = "User-agent: *\nDisallow: /\n"
NGINX_HEADERS = {"Last-Modified": "Tue, 04 Feb 2025 12:03:46 GMT", "ETag": '"67a201f2-267"', "Accept-Ranges": "bytes"}
MAX_TYPED = 500  # characters that are looked at
MAX_TEXT = 300  # characters that are shown of what an index says
MAX_ROWS = 50  # running transfers that the status page shows
PLOT_WIDTH, PLOT_HEIGHT = 360, 100  # of a plot, in its own units
BARS = 60  # of a plot that counts
UNITS = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))  # the names of their texts
ARGUMENT_OPTIONS = ("--platform", "--arch", "--os", "--variant", "--creds", "--authfile", "--cert-dir")

# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


class Named(NamedTuple):
    """Hold an image's name as it was typed, such as ``ghcr.io/owner/app``; tag and digest are empty if not typed."""

    name: str
    tag: str
    digest: str


def read_image(text: str) -> Named:
    """Return the image that a name, a line such as ``docker pull nginx:1`` or an address of Docker Hub's site means.

    What it returns may still be no valid name.
    """
    name = _word(text[:MAX_TYPED])
    name = re.sub(r"^(docker://|https?://)", "", name)
    name = re.sub(r"^hub\.docker\.com/(_/|r/)", "", name).rstrip("/")
    name, _, digest = name.partition("@")
    path, slash, last = name.rpartition("/")
    last, _, tag = last.partition(":")
    return Named(path + slash + last, tag, digest)


def _word(text: str) -> str:
    """Return the word of a command line that names the image: the first one after ``pull``, but for options."""
    words = text.split()
    if "pull" in words:
        words = words[words.index("pull") + 1 :]
    skipped = False
    for word in words:
        if not skipped and not word.startswith("-"):
            return word
        skipped = word in ARGUMENT_OPTIONS
    return ""


class Image(NamedTuple):
    """Hold an image: `repository` is its complete name, `prefix` is what stands before that in the mirror's paths."""

    registry: str
    repository: str
    prefix: str
    tag: str = ""
    digest: str = ""

    @property
    def short(self) -> str:
        """Return the repository as people write it: without Docker Hub's ``library/``."""
        return self.repository.removeprefix("library/") if self.is_hub else self.repository

    @property
    def is_hub(self) -> bool:
        """Tell whether this is an image of Docker Hub, whose name need not be written."""
        return self.registry == "docker.io"

    @property
    def reference(self) -> str:
        """Return what stands after the name: a digest counts more than a tag."""
        return f"@{self.digest}" if self.digest else f":{self.tag}" if self.tag else ""

    @property
    def plain(self) -> str:
        """Return the name that docker knows it by: ``nginx:1``."""
        return (self.short if self.is_hub else f"{self.registry}/{self.short}") + self.reference

    @property
    def full(self) -> str:
        """Return the name that leaves nothing out: ``docker.io/library/nginx:latest``."""
        return f"{self.registry}/{self.repository}{self.reference or ':latest'}"

    @property
    def path(self) -> str:
        """Return the name without a reference, after the mirror's own host."""
        return self.prefix + self.short


# ---------------------------------------------------------------------------------------------------------------------
# Snippets
# ---------------------------------------------------------------------------------------------------------------------


class Address(NamedTuple):
    """Hold the URL at which clients reach the mirror."""

    url: str

    @property
    def host(self) -> str:
        """Return host and port, as they stand in an image's name."""
        return urlsplit(self.url).netloc

    @property
    def path(self) -> str:
        """Return the secret path, which stands in no image's name."""
        return urlsplit(self.url).path

    @property
    def is_plain(self) -> bool:
        """Tell whether it is reached by http, which clients take only where they are told so."""
        return self.url.startswith("http://")


class Snippet(NamedTuple):
    """Hold what is to be copied: the text of `file`, or commands where there is none. `key` is unique on the page."""

    key: str
    text: str
    file: str = ""


class ServedRegistry(NamedTuple):
    """Hold how a registry is named at the mirror: by a path, and by hosts of its own."""

    name: str
    path: str
    hosts: list[str]


def by_name(address: Address, image: Image) -> list[Snippet]:
    """Return what pulls an image through the mirror with no client set up, and gives it its own name.

    That is nothing where the mirror is below a secret path.
    """
    if address.path:
        return []
    here = f"{address.host}/{image.path}{image.reference}"
    found = [Snippet("pull", f"docker pull {here}")]
    if image.tag or not image.digest:  # a digest is no name that could be given
        name = image._replace(digest="").plain
        found.append(Snippet("retag", f"docker tag {here} {name}\ndocker rmi {here}"))
    return found


def clients(address: Address, image: Image, is_hub_mirror: bool) -> dict[str, list[Snippet]]:
    """Return the snippets of each client; dockerd knows mirrors of Docker Hub only."""
    found = {
        "dockerd": _dockerd(address, image) if is_hub_mirror else [],
        "containerd": _containerd(address, image),
        "k3s": _k3s(address, image),
        "podman": _podman(address, image) if not address.path else [],
        "buildkit": _buildkit(address, image) if not address.path else [],
    }
    return {name: snippets for name, snippets in found.items() if snippets}


def _dockerd(address: Address, image: Image) -> list[Snippet]:
    settings = {"registry-mirrors": [address.url]}
    if address.is_plain:
        settings["insecure-registries"] = [address.host]
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in settings.items())
    pulled = image.plain if image.is_hub else "nginx"
    return [
        Snippet("dockerd-file", f"{{\n{lines}\n}}", "/etc/docker/daemon.json"),
        Snippet("dockerd-run", f"sudo systemctl reload docker\ndocker pull {pulled}"),
    ]


def _containerd(address: Address, image: Image) -> list[Snippet]:
    folder = "/etc/containerd/certs.d"
    hosts = f'[host."{address.url}"]\n  capabilities = ["pull", "resolve"]'
    sections = {"containerd 2": "io.containerd.cri.v1.images", "containerd 1": "io.containerd.grpc.v1.cri"}
    config = "\n\n".join(
        f'# {version}\n[plugins."{plugin}".registry]\n  config_path = "{folder}"'
        for version, plugin in sections.items()
    )
    return [
        Snippet("containerd-file", hosts, f"{folder}/{image.registry}/hosts.toml"),
        Snippet("containerd-run", f"sudo ctr images pull --hosts-dir {folder} {image.full}"),
        Snippet("containerd-config", config, "/etc/containerd/config.toml"),
    ]


def _k3s(address: Address, image: Image) -> list[Snippet]:
    url = f"{address.url}/v2" if address.path else address.url  # k3s overrides the path where there is one
    text = f'mirrors:\n  "{image.registry}":\n    endpoint:\n      - "{url}"'
    return [
        Snippet("k3s-file", text, "/etc/rancher/k3s/registries.yaml"),
        Snippet("k3s-run", f"sudo systemctl restart k3s\nsudo k3s crictl pull {image.full}"),
    ]


def _podman(address: Address, image: Image) -> list[Snippet]:
    insecure = "\ninsecure = true" if address.is_plain else ""
    text = (
        f'[[registry]]\nlocation = "{image.registry}"\n\n'
        f'[[registry.mirror]]\nlocation = "{address.host}/{image.registry}"{insecure}'
    )
    return [
        Snippet("podman-file", text, "/etc/containers/registries.conf.d/mirror.conf"),
        Snippet("podman-run", f"podman pull {image.full}"),
    ]


def _buildkit(address: Address, image: Image) -> list[Snippet]:
    text = f'[registry."{image.registry}"]\n  mirrors = ["{address.host}"]'
    if address.is_plain:
        text += f'\n\n[registry."{address.host}"]\n  http = true'
    file = "/etc/buildkit/buildkitd.toml"
    return [
        Snippet("buildkit-file", text, file),
        Snippet("buildkit-run", f"docker buildx create --use --buildkitd-config {file}"),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Search and tags
# ---------------------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """Hold one result of an index."""

    name: str
    description: str
    stars: int
    is_official: bool


class Results(NamedTuple):
    """Hold one page of an index's results, and how many pages there are."""

    found: list[Found]
    pages: int


def read_results(body: bytes) -> Results:
    """Read an index's answer to a search; raise ValueError where it is none. Source: Docker's /v1/search."""
    answer = _object(body)
    results = answer.get("results")
    if not isinstance(results, list):
        raise ValueError("no results in the answer")
    found = [_found(one) for one in results if isinstance(one, dict) and isinstance(one.get("name"), str)]
    return Results(found, _count(answer.get("num_pages")))


def _found(one: Mapping[str, Any]) -> Found:
    text = str(one.get("description") or "")[:MAX_TEXT]
    description = "".join(character for character in text if character.isprintable())
    return Found(one["name"], description, _count(one.get("star_count")), one.get("is_official") is True)


def _count(value: object) -> int:
    return value if isinstance(value, int) and 0 <= value < 1 << 53 else 0


def _object(body: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except RecursionError as error:
        raise ValueError("too deep") from error
    if not isinstance(answer, dict):
        raise ValueError("no object")
    return answer


class Facts(NamedTuple):
    """Hold what a tag stands for: its platforms, and the compressed size of one of them, in bytes; None: not known."""

    platforms: tuple[str, ...]
    size: int | None


class Parsed(NamedTuple):
    """Hold what a manifest says, and the digest of what says the rest: one platform's manifest, or its config."""

    facts: Facts
    child: str | None
    config: str | None


def read_manifest(body: bytes) -> Parsed:
    """Read a manifest or an index; raise ValueError where it is neither. Source: OCI image spec."""
    manifest = _object(body)
    try:
        if isinstance(manifest.get("manifests"), list):
            return _read_index(manifest["manifests"])
        parts = [manifest["config"], *manifest["layers"]]
        size = sum(_count(part["size"]) for part in parts)
        return Parsed(Facts((), size), None, str(manifest["config"]["digest"]))
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError("no manifest") from error


def _read_index(entries: list[Any]) -> Parsed:
    named = [(read_platform(entry.get("platform") or {}), str(entry["digest"])) for entry in entries[:100]]
    runnable = {platform: digest for platform, digest in named if platform and "unknown" not in platform}
    child = runnable.get("linux/amd64") or next(iter(runnable.values()), None)
    return Parsed(Facts(tuple(sorted(runnable)), None), child, None)


def read_platform(entry: Mapping[str, Any]) -> str:
    """Return a platform as clients write it: ``linux/arm/v7``; empty where it is not told, or is no such word."""
    words = [entry.get(key) for key in ("os", "architecture", "variant")]
    platform = "/".join(str(word) for word in words if word)
    return platform if words[0] and words[1] and re.fullmatch(r"[\w./-]{3,60}", platform) else ""


def read_config(body: bytes) -> str:
    """Return the platform that an image's config names; raise ValueError where it is none."""
    return read_platform(_object(body))


def sorted_tags(tags: Iterable[str]) -> list[str]:
    """Return tags as people look for them: ``latest``, the versions from the newest on, the words, the digests."""
    return sorted(tags, key=_tag_key)


def _tag_key(tag: str) -> tuple[Any, ...]:
    numbers = tuple(-int(number) for number in re.findall(r"[0-9]{1,9}", tag))
    is_version = re.match(r"v?[0-9]", tag) is not None
    kind = 0 if tag == "latest" else 3 if tag.startswith(("sha256-", "sha512-")) else 1 if is_version else 2
    return kind, numbers if kind == 1 else (), tag


def shown_size(count: int) -> str:
    """Return a number of bytes for people, in powers of 1000, as registries' sites show it."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if size >= 10 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


# ---------------------------------------------------------------------------------------------------------------------
# Status
# ---------------------------------------------------------------------------------------------------------------------


class Status:
    """Say in one language what a report holds, for the status page.

    What it returns are texts, percentages (None: not known), SVG paths, and lists of rows of these, each by its name.
    The template and page.js put them in place: nothing is formatted twice. A text that does not apply is empty.
    """

    def __init__(self, report: Mapping[str, Any], texts: Mapping[str, str]) -> None:
        self._report = report
        self._texts = texts
        self._now: float = report["at"]

    def shown(self) -> dict[str, Any]:
        """Return all that the page shows."""
        report = self._report
        return {
            "running": f"{report['running']:,}",
            "rate": self._rate(report["rate"]),
            "uptime": self._span(report["uptime"]),
            "workers": str(report["workers"]),
            "memory": shown_size(report["memory"]) if report["memory"] else self._say("unknown"),
            "version": report["version"],
            "transfers": [self._transfer(run) for run in report["transfers"][:MAX_ROWS]],
            "transfers_note": self._transfers_note(),
            **self._throughput(),
            **(self._lookups() if report["cache"] is not None else {}),
            **self._endpoints(),
            "quotas": [self._quota(quota) for quota in report["quotas"]],
            **self._cache(),
            "pulls": [self._pull(pull) for pull in report["pulls"]],
            "pulls_note": "" if report["pulls"] else self._say("no_pulls"),
        }

    def _transfer(self, run: Mapping[str, Any]) -> dict[str, Any]:
        sent, size = run["sent"], run["size"]
        is_timed = size is not None and run["rate"] > 0
        done = self._part(sent, size) if size is not None else shown_size(sent) if sent else self._say("waiting")
        return {
            "image": run["image"],
            "digest": short_digest(run["digest"]),
            "client": run["client"],
            "label": run["cache"],
            "done": done,
            "name": f"{run['image']}: {done}",
            "percent": percent(sent, size),
            "rate": self._rate(run["rate"]),
            "left": self._say("time_left", time=self._time((size - sent) / run["rate"])) if is_timed else "",
        }

    def _transfers_note(self) -> str:
        more = self._report["running"] - min(len(self._report["transfers"]), MAX_ROWS)
        if more > 0:
            return self._say("more_transfers", count=more)
        return "" if self._report["running"] else self._say("no_transfers")

    def _throughput(self) -> dict[str, str]:
        """Return the plot of what was sent and received, without the step that has only begun."""
        hour = self._report["hour"]
        sent, received = ([count / hour["step"] for count in hour[name][:-1]] for name in ("sent", "received"))
        top = round_above(max(1000, *sent, *received))
        words = {
            "sent": shown_size(sum(hour["sent"])),
            "received": shown_size(sum(hour["received"])),
            "sent_peak": self._rate(max(sent)),
            "received_peak": self._rate(max(received)),
        }
        return {
            "rate_top": self._rate(top),
            "rate_middle": self._rate(top / 2),
            "sent_line": line_path(sent, top),
            "received_line": line_path(received, top),
            "sent": words["sent"],
            "received": words["received"],
            "rate_summary": self._say("rate_summary", **words),
        }

    def _lookups(self) -> dict[str, str]:
        """Return the plot of hits and misses, which stand upon the hits."""
        hour = self._report["hour"]
        width = len(hour["hits"]) // BARS
        hits, misses = (
            [sum(hour[name][at : at + width]) for at in range(0, width * BARS, width)] for name in ("hits", "misses")
        )
        both = [hit + miss for hit, miss in zip(hits, misses, strict=True)]
        top = round_above(max(10, *both))
        found, every = sum(hits), sum(both)
        share = f"{100 * found / every:.0f} %" if every else "0 %"
        return {
            "lookups_top": f"{top:,.0f}",
            "lookups_middle": f"{top / 2:,.0f}",
            "hits_bars": bars_path([0] * BARS, hits, top),
            "misses_bars": bars_path(hits, both, top),
            "hits": f"{found:,}",
            "misses": f"{every - found:,}",
            "lookups_summary": self._say("lookups_summary", hits=found, misses=every - found, share=share),
        }

    def _endpoints(self) -> dict[str, Any]:
        """Return a row for each endpoint, but for registries that nobody asked."""
        states = self._report["endpoints"]
        asked = {one["registry"] for one in states if one["state"] != "unknown"}
        others = dict.fromkeys(one["registry"] for one in states if one["registry"] not in asked)
        return {
            "endpoints": [self._endpoint(one) for one in states if one["registry"] in asked],
            "endpoints_note": self._say("not_asked", names=", ".join(others)) if others else "",
        }

    def _endpoint(self, one: Mapping[str, Any]) -> dict[str, str]:
        state, words = one["state"], {}
        if state == "up":
            words["ago"] = self._ago(one["answered"])
        elif state != "unknown":
            words |= {"ago": self._ago(one["failed"]), "since": self._span(self._now - one["since"])}
        if state == "cooling":
            words["time"] = self._span(one["until"] - self._now)
        reason = one.get("reason", "")
        return {
            "registry": one["registry"],
            "url": one["url"].removeprefix("https://"),
            "state": f"state {state}",
            "label": self._say(f"state_{state}"),
            "detail": self._say(f"detail_{state}", **words),
            "reason": self._texts.get(f"reason_{reason}", reason),
            "why": one.get("why", ""),
        }

    def _quota(self, quota: Mapping[str, Any]) -> dict[str, Any]:
        window = self._say("quota_window", time=self._span(quota["window"])) if quota["window"] else ""
        left = self._say("quota_left", left=quota["remaining"], limit=quota["limit"])
        return {
            "registry": quota["registry"],
            "left": left,
            "name": f"{quota['registry']}: {left}",
            "percent": percent(quota["remaining"], quota["limit"]) or 0,
            "detail": " · ".join(filter(None, (window, self._say("quota_told", ago=self._ago(quota["at"]))))),
        }

    def _cache(self) -> dict[str, Any]:
        cache = self._report["cache"]
        if cache is None:
            return {"cache_note": self._say("no_cache")}
        taken, free = cache["bytes"], cache["free"]
        fill = self._part(taken, cache["limit"]) if taken is not None else self._say("unknown")
        return {
            "fill": fill,
            "fill_name": f"{self._say('cache_title')}: {fill}",
            "fill_percent": percent(taken or 0, cache["limit"]) or 0,
            "free": self._say("disk_free", size=shown_size(free)) if free is not None else "",
            "cache_note": self._say("disk_fails") if cache["failing"] else "",
        }

    def _pull(self, pull: Mapping[str, Any]) -> dict[str, str]:
        reference, status = pull["reference"], pull["status"]
        mark = f"@{short_digest(reference)}" if ":" in reference else f":{reference}" if reference else ""
        size = shown_size(pull["bytes"]) if pull["blobs"] else self._say("manifest_only")
        return {
            "image": pull["image"] + mark,
            "client": pull["client"],
            "size": size if status < 400 else f"{status} {responses.get(status, '')}",
            "kept": f"{percent(pull['kept'], pull['bytes']):.0f} %" if pull["bytes"] else "",
            "ago": self._ago(pull["ended"]),
        }

    # Words

    def _say(self, key: str, **words: Any) -> str:
        return self._texts[key].format(**words)

    def _part(self, part: int, whole: int) -> str:
        return self._say("part", part=shown_size(part), whole=shown_size(whole))

    def _rate(self, rate: float) -> str:
        return f"{shown_size(round(rate))}/s"

    def _ago(self, at: float) -> str:
        return self._say("ago", time=self._time(self._now - at)) if self._now - at >= 1 else self._say("now")

    def _time(self, seconds: float, units: int = 1) -> str:
        """Return a duration in the largest unit that it has, and in so many in all."""
        left = max(0, int(seconds))
        words: list[str] = []
        for name, size in UNITS:
            count, left = divmod(left, size)
            if count or words or size == 1:
                words.append(self._say(name, count=count) if count or not words else "")
        return " ".join(filter(None, words[:units]))

    def _span(self, seconds: float) -> str:
        return self._time(seconds, 2)


def percent(part: int, whole: int | None) -> float | None:
    """Return how much of the whole a part is; None where that is not known."""
    return round(min(100.0, 100 * part / whole), 1) if whole else None


def short_digest(digest: str) -> str:
    """Return as much of a digest as people compare."""
    algorithm, _, encoded = digest.partition(":")
    return f"{algorithm}:{encoded[:12]}"


def round_above(value: float) -> float:
    """Return the round number at or next above a value: 1, 2 or 5, and zeros."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 2, 5, 10) if power * step >= value)


def line_path(values: list[float], top: float) -> str:
    """Return the SVG path of a line from the left to the right edge of a plot; its ends are on the ground, beyond."""
    heights = [_height(value, top) for value in values]
    last = len(heights) - 1
    bends = (at for at in range(last + 1) if at in (0, last) or not heights[at - 1] == heights[at] == heights[at + 1])
    points = "".join(f"L{at * PLOT_WIDTH / last:.1f} {heights[at]:g}" for at in bends)
    return f"M-9 {PLOT_HEIGHT}V{heights[0]:g}{points}H{PLOT_WIDTH + 9}V{PLOT_HEIGHT}"


def bars_path(lower: Sequence[float], upper: Sequence[float], top: float) -> str:
    """Return the SVG path of bars from one height to another, side by side; those of no height are left out."""
    wide = PLOT_WIDTH / len(upper)
    return "".join(
        f"M{at * wide + 0.5:g} {_height(low, top):g}V{_height(high, top):g}h{wide - 1:g}V{_height(low, top):g}z"
        for at, (low, high) in enumerate(zip(lower, upper, strict=True))
        if high > low
    )


def _height(value: float, top: float) -> float:
    return round(PLOT_HEIGHT * (1 - value / top), 1)


# ---------------------------------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------------------------------


class Pages:
    """Make the pages; the words of a language are read when somebody wants them."""

    @cached_property
    def texts(self) -> dict[str, dict[str, str]]:
        """Return the words of each language by their names."""
        return {lang: tomllib.loads((FOLDER / f"{lang}.toml").read_text(encoding="utf-8")) for lang in LANGUAGES}

    def status(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the status page shows of a report, in the language that the browser asks for."""
        return Status(report, self.texts[asked_language()]).shown()

    def show(self, template: str, status: int = 200, **values: Any) -> Response:
        """Return a page in the language that the browser asks for."""
        chosen, lang = request.args.get("lang"), asked_language()
        texts = self.texts[lang]

        def say(key: str, **words: Any) -> Markup:
            return Markup(texts[key]).format(**words)  # noqa: S704 - our own words; what is put in is escaped

        def link(path: str, **arguments: Any) -> str:
            kept = {"lang": chosen} if chosen in LANGUAGES else {}
            query = urlencode({**{key: value for key, value in arguments.items() if value}, **kept})
            return f"{path}?{query}" if query else path

        names = {"lang": lang, "chosen": chosen in LANGUAGES, "languages": LANGUAGES}
        body = render_template(f"{template}.html", say=say, link=link, size=shown_size, **names, **values)
        return Response(body, status, headers=HEADERS, mimetype="text/html")


def asked_language() -> str:
    """Return the language that was chosen on a page, or the one that the browser asks for."""
    chosen = request.args.get("lang", "")
    return chosen if chosen in LANGUAGES else str(request.accept_languages.best_match(LANGUAGES, "en"))


def page_file(name: str) -> Response:
    """Return a file that the pages use."""
    body = (FOLDER / name).read_bytes()
    headers = {"Cache-Control": f"max-age={FILE_SECONDS}", "X-Content-Type-Options": "nosniff", **NO_INDEX}
    response = Response(body, headers=headers, mimetype=FILES[name])
    response.add_etag()
    response.make_conditional(request.environ)
    return response


def robots() -> Response:
    """Return what tells crawlers to leave."""
    return Response(ROBOTS, mimetype="text/plain")


def nginx_welcome() -> Response:
    """Return the page of an nginx that has no site yet."""
    body = (FOLDER / "nginx.html").read_bytes()
    return Response(body, headers=NGINX_HEADERS, content_type="text/html")


def nginx_error(status: int) -> Response:
    """Return nginx's page of an error."""
    title = f"{status} {'Not Allowed' if status == 405 else HTTPStatus(status).phrase}"
    body = (
        f"<html>\r\n<head><title>{title}</title></head>\r\n<body>\r\n<center><h1>{title}</h1></center>\r\n"
        "<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n"
    )
    return Response(body, status, content_type="text/html")
