"""Manifests through the cache: a tag is fresh for a while, then checked by HEAD, and stale where upstream fails."""

import itertools
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from depot import Cached
from depot import at_once
from depot import breaks_off
from depot import cached_lab
from images import DOCKER_LIST
from images import DOCKER_MANIFEST
from images import OCI_INDEX
from images import OCI_MANIFEST
from images import Content
from lab import Reply
from lab import reply
from lab import reply_json
from processes import poll
from upstream import Answer
from upstream import RawUpstream
from upstream import Request
from upstream import head_of

from cache import Cache
from cache import Limits
from cache import Name

ALL = ", ".join((OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST))
DAY = 86_400
REGISTRIES = 60
HTML = {"Content-Type": "text/html"}
FAILED = '111 - "Revalidation Failed"'
STALE = '110 - "Response is Stale"'
numbers = itertools.count()


def manifest(text: str, media_type: str = OCI_INDEX) -> Content:
    return Content(media_type, json.dumps({"schemaVersion": 2, "mediaType": media_type, "is": text}).encode())


# What one test has pulled is there for all: a test that wants a MISS for content has its own.
OLD, NEW = manifest("old"), manifest("new")


class Tagged:
    """Hold a repository of a registry that no other test asks: one that fails is left alone for a while."""

    def __init__(self, shared: Cached, registry: str = "") -> None:
        number = next(numbers)
        self.cached = shared
        self.registry = registry or f"r{number}.test"
        self.repository = f"team/app{number}"
        self.upstream = shared.lab.upstream
        self._store = Cache(shared.folder, Limits(1 << 30))

    def publish(self, content: Content, tag: str = "latest") -> None:
        """Let a tag stand for a manifest."""
        headers = {"Content-Type": content.media_type, "Docker-Content-Digest": content.digest}
        for reference in (tag, content.digest):
            self.answers(reply(200, content.data, headers), reference)

    def answers(self, answer: Answer, reference: str = "latest") -> None:
        """Let upstream answer so."""
        self.upstream.answers[self.path(reference)] = answer

    def fails(self, answer: Answer) -> None:
        """Let upstream answer so to all that was published."""
        for path in self.upstream.answers:
            if f"/{self.repository}/" in path:
                self.upstream.answers[path] = answer

    def path(self, reference: str) -> str:
        """Return upstream's path of a manifest."""
        return f"/v2/{self.repository}/manifests/{reference}"

    def ask(self, reference: str = "latest", method: str = "GET", accept: str | None = ALL, **headers: str) -> Reply:
        """Ask the mirror."""
        given = headers | ({"Accept": accept} if accept is not None else {})
        return self.cached.ask(f"/v2/{self.registry}/{self.repository}/manifests/{reference}", given, method)

    def pulled(self, content: Content, **more: Any) -> Reply:
        """Ask by tag, and see that this manifest comes."""
        answer = self.ask(**more)
        assert (answer.status, answer.body) == (200, content.data)
        self.is_described(answer, content)
        return answer

    def headed(self, content: Content, **more: Any) -> Reply:
        """Ask by HEAD, and see that this manifest is described."""
        answer = self.ask(method="HEAD", **more)
        assert (answer.status, answer.body) == (200, b"")
        self.is_described(answer, content)
        return answer

    def is_described(self, answer: Reply, content: Content) -> None:
        """See that the headers are a manifest's."""
        assert answer.headers["docker-content-digest"] == content.digest
        assert answer.headers["content-type"] == content.media_type
        assert answer.headers["content-length"] == str(len(content.data))

    def asked(self) -> list[tuple[str, str]]:
        """Return what upstream was asked of this repository, and forget it: method and reference."""
        found = [request for request in self.upstream.requests if f"/{self.repository}/" in request.target]
        self.upstream.requests[:] = [request for request in self.upstream.requests if request not in found]
        return [(request.method, request.path.rpartition("/")[2]) for request in found]

    def ages(self, seconds: float = 100, reference: str = "latest") -> None:
        """Let it be so long ago that upstream was asked about a tag."""
        record = self._store.record(self.name(reference))
        assert record is not None
        self._store.note(self.name(reference), record._replace(checked=time.time() - seconds))

    def name(self, reference: str = "latest") -> Name:
        """Return the name in the store."""
        return Name(self.registry, self.repository, reference)

    def is_noted(self, reference: str = "latest") -> bool:
        """Tell whether the store knows a name."""
        return self._store.record(self.name(reference)) is not None


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cached]:
    folder = tmp_path_factory.mktemp("cache")
    upstream = RawUpstream()
    with RawUpstream("127.0.0.9") as second:
        names = [f'["r{number}.test"]\nendpoints = ["{upstream.url}"]\n' for number in range(REGISTRIES)]
        pair = f'["pair.test"]\nendpoints = ["{upstream.url}", "{second.url}"]\n'
        more = "".join([*names, pair])
        with cached_lab(folder, upstream=upstream, more=more, first_byte_timeout=12) as lab:
            lab.second = second  # type: ignore[attr-defined]
            yield Cached(lab, folder)


@pytest.fixture
def tagged(shared: Cached) -> Tagged:
    return Tagged(shared)


# Fresh


@pytest.mark.parametrize("kind", [OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST])
def test_a_fresh_tag_is_served_without_asking(tagged: Tagged, kind: str) -> None:
    content = manifest("fresh", kind)
    tagged.publish(content)
    assert tagged.pulled(content).headers["x-cache"] == "MISS"
    assert tagged.asked() == [("GET", "latest")]
    tagged.fails(breaks_off)
    for answer in (tagged.pulled(content), tagged.headed(content), tagged.pulled(content, reference=content.digest)):
        assert answer.headers["x-cache"] == "HIT"
        assert answer.headers["etag"] == f'"{content.digest}"'
        assert int(answer.headers["age"]) >= 0
        assert "warning" not in answer.headers
    assert tagged.asked() == []


def test_only_what_a_digest_names_is_immutable(tagged: Tagged) -> None:
    tagged.publish(OLD)
    for _ in range(2):
        assert "cache-control" not in tagged.pulled(OLD).headers
        by_digest = tagged.pulled(OLD, reference=OLD.digest)
        assert by_digest.headers["cache-control"] == "public, max-age=31536000, immutable"


def test_a_client_that_has_the_manifest_gets_304(tagged: Tagged) -> None:
    tagged.publish(OLD)
    tagged.pulled(OLD)
    answer = tagged.ask(**{"If-None-Match": f'"{OLD.digest}"'})
    assert (answer.status, answer.body) == (304, b"")


def test_dockerd_and_containerd_ask_for_the_tag_by_head_then_for_the_digest(tagged: Tagged) -> None:
    content = manifest("by HEAD")
    tagged.publish(content)
    assert tagged.headed(content).headers["x-cache"] == "MISS"
    assert tagged.pulled(content, reference=content.digest).headers["x-cache"] == "MISS"
    assert tagged.asked() == [("HEAD", "latest"), ("GET", content.digest)]
    tagged.fails(breaks_off)
    assert tagged.headed(content).headers["x-cache"] == "HIT"
    assert tagged.pulled(content, reference=content.digest).headers["x-cache"] == "HIT"
    assert tagged.pulled(content).headers["x-cache"] == "HIT"
    assert tagged.asked() == []


def test_the_registrys_limits_are_told_where_it_was_asked(tagged: Tagged) -> None:
    content = manifest("limited")
    headers = {"Content-Type": OCI_INDEX, "Docker-Content-Digest": content.digest, "RateLimit-Remaining": "99;w=21600"}
    tagged.answers(reply(200, content.data, headers))
    assert tagged.headed(content).headers["ratelimit-remaining"] == "99;w=21600"
    assert tagged.pulled(content).headers["ratelimit-remaining"] == "99;w=21600"
    assert "ratelimit-remaining" not in tagged.pulled(content).headers


def test_sixteen_tags_of_one_repository(tagged: Tagged) -> None:
    contents = {f"1.{number}": manifest(str(number)) for number in range(16)}
    for tag, content in contents.items():
        tagged.publish(content, tag)
    for label in ("MISS", "HIT"):
        answers = at_once(*[lambda tag=tag: tagged.ask(tag) for tag in contents])
        assert sorted(answer.body for answer in answers) == sorted(content.data for content in contents.values())
        assert {answer.headers["x-cache"] for answer in answers} == {label}
    assert sorted(tagged.asked()) == sorted(("GET", tag) for tag in contents)


# Checked


def test_an_old_tag_is_checked_by_head_and_served_from_disk(tagged: Tagged) -> None:
    tagged.publish(OLD)
    tagged.pulled(OLD)
    for method in ("GET", "HEAD"):
        tagged.ages()
        tagged.asked()
        answer = tagged.ask(method=method, accept=OCI_INDEX)
        assert (answer.status, answer.headers["x-cache"]) == (200, "HIT")
        (check,) = (request for request in tagged.upstream.requests if f"/{tagged.repository}/" in request.target)
        assert (check.method, check.path) == ("HEAD", tagged.path("latest"))
        assert set(ALL.split(", ")) == set(check.headers["accept"].split(", "))
    tagged.asked()
    tagged.pulled(OLD)
    assert tagged.asked() == [], "it is fresh again"


def test_a_tag_that_moved_is_fetched(tagged: Tagged) -> None:
    tagged.publish(OLD)
    tagged.pulled(OLD)
    tagged.publish(content := manifest("moved"))
    tagged.pulled(OLD)
    tagged.ages()
    tagged.asked()
    assert tagged.pulled(content).headers["x-cache"] == "MISS"
    assert tagged.asked() == [("HEAD", "latest"), ("GET", "latest")]
    assert tagged.pulled(content).headers["x-cache"] == "HIT"
    assert tagged.pulled(OLD, reference=OLD.digest).headers["x-cache"] == "HIT"
    tagged.publish(OLD)
    tagged.ages()
    tagged.asked()
    assert tagged.pulled(OLD).headers["x-cache"] == "HIT", "it moved back, to what is here"
    assert tagged.asked() == [("HEAD", "latest")]


def test_a_head_tells_of_a_tag_that_moved(tagged: Tagged) -> None:
    tagged.publish(OLD)
    tagged.pulled(OLD)
    tagged.publish(content := manifest("moved for a HEAD"))
    tagged.ages()
    tagged.asked()
    assert tagged.headed(content).headers["x-cache"] == "MISS"
    tagged.pulled(content, reference=content.digest)
    assert tagged.pulled(content).headers["x-cache"] == "HIT"
    assert tagged.asked() == [("HEAD", "latest"), ("GET", "latest")]


def test_checks_at_the_same_time_are_one(tagged: Tagged) -> None:
    tagged.publish(OLD)
    tagged.pulled(OLD)
    tagged.ages()
    tagged.asked()
    go = threading.Event()
    answer = reply(200, OLD.data, {"Content-Type": OCI_INDEX, "Docker-Content-Digest": OLD.digest})
    tagged.answers(waits(go, head_of(answer)))
    threading.Timer(0.5, go.set).start()
    replies = at_once(*[tagged.ask] * 10)
    assert [(reply.status, reply.headers["x-cache"]) for reply in replies] == [(200, "HIT")] * 10
    assert tagged.asked() == [("HEAD", "latest")]


def waits(go: threading.Event, answer: bytes) -> Any:
    def late(request: Request, connection: Any) -> None:
        go.wait(20)
        connection.sendall(head_of(answer) if request.method == "HEAD" else answer)

    return late


def test_first_pulls_at_the_same_time_are_one(tagged: Tagged) -> None:
    go = threading.Event()
    headers = {"Content-Type": OCI_INDEX, "Docker-Content-Digest": OLD.digest}
    tagged.answers(waits(go, reply(200, OLD.data, headers)))
    threading.Timer(0.5, go.set).start()
    replies = at_once(*[tagged.ask] * 10)
    assert [reply.body for reply in replies] == [OLD.data] * 10
    assert tagged.asked() == [("GET", "latest")]


def test_a_registry_that_does_not_name_digests_is_asked_by_get(tagged: Tagged) -> None:
    tagged.answers(reply(200, OLD.data, {"Content-Type": OCI_INDEX}))
    assert tagged.pulled(OLD).headers["x-cache"] == "MISS"
    assert tagged.pulled(OLD).headers["x-cache"] == "HIT"
    tagged.ages()
    tagged.answers(reply(200, NEW.data, {"Content-Type": OCI_INDEX}))
    assert tagged.pulled(NEW).headers["x-cache"] == "MISS"


# Stale


@pytest.mark.parametrize(
    "failure",
    [
        reply_json(429, {"errors": [{"code": "TOOMANYREQUESTS", "message": "pull rate limit"}]}),
        reply(429, b"slow down", {"Content-Type": "text/plain", "Retry-After": "60"}),
        reply(500, b""),
        reply(503, b"<html>busy", HTML),
        breaks_off,
        reply(403, b"<html>blocked", HTML),
        reply(404, b"<html>not here", HTML),
        reply(401, b"<html>who are you", HTML),
        reply(200, b"<html>log in to this hotel", HTML),
    ],
    ids=["429", "429 text", "500", "503", "down", "403 html", "404 html", "401 html", "200 html"],
)
def test_what_is_kept_is_served_when_upstream_fails(tagged: Tagged, failure: Answer) -> None:
    tagged.publish(OLD)
    tagged.pulled(OLD)
    tagged.ages(5 * DAY)
    tagged.fails(failure)
    for answer in (tagged.pulled(OLD), tagged.headed(OLD), tagged.pulled(OLD)):
        assert (answer.headers["x-cache"], answer.headers["warning"]) == ("STALE", FAILED)
        assert 5 * DAY <= int(answer.headers["age"]) < 6 * DAY


def test_an_upstream_that_fails_is_left_alone_for_a_while(tagged: Tagged) -> None:
    for tag in ("latest", "other"):
        tagged.publish(OLD, tag)
        tagged.pulled(OLD, reference=tag)
        tagged.ages(reference=tag)
    tagged.asked()
    tagged.fails(reply(503, b""))
    tagged.pulled(OLD)
    asked = tagged.asked()
    for tag in ("latest", "other"):
        assert tagged.pulled(OLD, reference=tag).headers["x-cache"] == "STALE"
    assert (asked, tagged.asked()) == ([("HEAD", "latest")], [])


def test_a_slow_check_does_not_keep_the_client_waiting_and_its_result_counts(tagged: Tagged) -> None:
    tagged.publish(OLD)
    tagged.pulled(OLD)
    tagged.publish(NEW)
    tagged.pulled(NEW, reference=NEW.digest)
    tagged.ages()
    tagged.asked()
    go = threading.Event()
    headers = {"Content-Type": OCI_INDEX, "Docker-Content-Digest": NEW.digest}
    tagged.answers(waits(go, reply(200, NEW.data, headers)))
    answer = tagged.pulled(OLD)
    assert (answer.headers["x-cache"], answer.headers["warning"]) == ("STALE", STALE)
    go.set()
    assert poll(lambda: tagged.ask().headers["x-cache"] == "HIT", 5)
    tagged.pulled(NEW)
    assert tagged.asked() == [("HEAD", "latest")]


def test_what_is_too_old_is_not_served(tagged: Tagged) -> None:
    tagged.publish(OLD)
    tagged.pulled(OLD)
    tagged.ages(31 * DAY)
    tagged.fails(reply(503, b""))
    assert (tagged.ask().status, tagged.ask(method="HEAD").status) == (502, 502)
    tagged.pulled(OLD, reference=OLD.digest)


@pytest.mark.parametrize(("status", "code", "shown"), [(404, "MANIFEST_UNKNOWN", 404), (401, "DENIED", 403)])
def test_the_registrys_own_word_is_believed(tagged: Tagged, status: int, code: str, shown: int) -> None:
    tagged.publish(OLD)
    tagged.pulled(OLD)
    tagged.ages()
    tagged.answers(reply_json(status, {"errors": [{"code": code, "message": "no more"}]}))
    for _ in range(2):
        answer = tagged.ask()
        assert (answer.status, answer.code, answer.json["errors"][0]["message"]) == (shown, code, "no more")
        assert tagged.ask(method="HEAD").status == shown
    assert not tagged.is_noted()
    tagged.publish(content := manifest(f"back after {status}"))
    assert tagged.pulled(content).headers["x-cache"] == "MISS"


def test_a_fallbacks_404_is_not_believed_while_the_first_endpoint_limits(shared: Cached) -> None:
    tagged = Tagged(shared, "pair.test")
    second: RawUpstream = shared.lab.second  # type: ignore[attr-defined]
    tagged.publish(OLD)
    tagged.pulled(OLD)
    tagged.ages()
    second.answers[tagged.path("latest")] = reply_json(404, {"errors": [{"code": "MANIFEST_UNKNOWN", "message": "no"}]})
    tagged.fails(reply(429, b"", {"Retry-After": "1"}))
    answer = tagged.pulled(OLD)
    assert (answer.headers["x-cache"], answer.headers["warning"]) == ("STALE", FAILED)
    assert second.asked(tagged.path("latest"))
    assert tagged.is_noted()


# Who gets what


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_client_that_does_not_take_the_kept_type_is_passed_through(tagged: Tagged, method: str) -> None:
    tagged.publish(OLD)
    tagged.pulled(OLD)
    single = manifest("single", DOCKER_MANIFEST)
    tagged.publish(single)
    answer = tagged.ask(method=method, accept=DOCKER_MANIFEST)
    tagged.is_described(answer, single)
    assert answer.headers["x-cache"] == "BYPASS"
    assert tagged.pulled(OLD).headers["x-cache"] == "HIT"


@pytest.mark.parametrize("accept", [DOCKER_MANIFEST, "*/*", None, "application/vnd.oci.*", "rubbish"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_client_with_a_short_list_fills_nothing(tagged: Tagged, accept: str | None, method: str) -> None:
    single = manifest("single", DOCKER_MANIFEST)
    tagged.publish(single)
    answer = tagged.ask(method=method, accept=accept)
    tagged.is_described(answer, single)
    assert answer.headers["x-cache"] == "BYPASS"
    assert not tagged.is_noted()
    tagged.publish(OLD)
    tagged.pulled(OLD)


def test_a_client_with_a_short_list_fills_by_digest(tagged: Tagged) -> None:
    single = manifest("single", DOCKER_MANIFEST)
    tagged.publish(single)
    for label in ("MISS", "HIT"):
        answer = tagged.pulled(single, reference=single.digest, accept=DOCKER_MANIFEST)
        assert answer.headers["x-cache"] == label
    assert not tagged.is_noted()


def test_a_logged_in_client_neither_gets_nor_fills(tagged: Tagged) -> None:
    tagged.publish(OLD)
    own = {"Authorization": "Bearer its-own"}
    assert tagged.pulled(OLD, **own).headers["x-cache"] == "BYPASS"
    assert not tagged.is_noted()
    tagged.pulled(OLD)
    tagged.publish(NEW)
    assert tagged.pulled(NEW, **own).headers["x-cache"] == "BYPASS"
    assert tagged.pulled(OLD).headers["x-cache"] == "HIT"


# What is not right


def test_a_kept_manifest_that_is_not_right_any_more_is_fetched_anew(tagged: Tagged) -> None:
    for number in range(3):
        content = manifest(f"damaged {number} {tagged.repository}")
        tagged.publish(content)
        tagged.pulled(content, reference=content.digest)
        file = tagged.cached.file(content.digest)
        file.write_bytes([b"", content.data[:-1] + b"!", content.data + b" "][number])
        assert tagged.pulled(content, reference=content.digest).headers["x-cache"] == "MISS"
        assert file.read_bytes() == content.data
        assert tagged.pulled(content, reference=content.digest).headers["x-cache"] == "HIT"


def test_what_was_deleted_is_fetched_anew(tagged: Tagged) -> None:
    content = manifest(f"deleted {tagged.repository}")
    tagged.publish(content)
    tagged.pulled(content)
    file = tagged.cached.file(content.digest)
    file.unlink()
    assert tagged.pulled(content).headers["x-cache"] == "MISS"
    file.unlink()
    assert tagged.headed(content).headers["x-cache"] == "MISS"
    assert tagged.pulled(content, reference=content.digest).headers["x-cache"] == "MISS"


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"digest": "x"}', "nan", "size"])
def test_a_record_that_is_rubbish_does_no_harm(tagged: Tagged, text: bytes | str) -> None:
    tagged.publish(OLD)
    tagged.pulled(OLD)
    record = tagged.cached.folder / "tags" / tagged.registry / tagged.repository / "_tags/latest"
    known = json.loads(record.read_text())
    wrong = {"nan": {"checked": float("nan")}, "size": {"size": 3}}
    record.write_bytes(text if isinstance(text, bytes) else json.dumps(known | wrong[text]).encode())
    tagged.headed(OLD)
    tagged.pulled(OLD)
    assert tagged.cached.ask("/healthz").json == {"status": "ok"}


def test_wrong_bytes_are_not_passed_on_under_a_digest_and_not_kept(tagged: Tagged) -> None:
    content = manifest(f"wrong {tagged.repository}")
    headers = {"Content-Type": OCI_INDEX, "Docker-Content-Digest": content.digest}
    for reference in ("latest", content.digest):
        tagged.answers(reply(200, NEW.data, headers), reference)
        assert tagged.ask(reference).status == 502
        assert not tagged.cached.file(content.digest).exists()
    tagged.publish(content)
    tagged.pulled(content)


@pytest.mark.parametrize("media_type", ["text", "", "a/b/c", "application/json; charset=utf-8", "x/\x7f"])
def test_a_strange_media_type_does_no_harm(tagged: Tagged, media_type: str) -> None:
    tagged.answers(reply(200, OLD.data, {"Content-Type": media_type, "Docker-Content-Digest": OLD.digest}))
    for method in ("GET", "HEAD", "GET"):
        answer = tagged.ask(method=method)
        assert (answer.status, answer.headers["docker-content-digest"]) == (200, OLD.digest)
        assert answer.headers.get("content-type", "").partition(";")[0] in (media_type.partition(";")[0], "")


def test_an_encoded_manifest_is_not_kept(tagged: Tagged) -> None:
    tagged.answers(reply(200, OLD.data, {"Content-Type": OCI_INDEX, "Content-Encoding": "x-odd"}))
    for _ in range(2):
        answer = tagged.ask()
        assert (answer.status, answer.body, answer.headers["content-encoding"]) == (200, OLD.data, "x-odd")
        assert answer.headers["x-cache"] == "BYPASS"


def test_all_is_well(shared: Cached) -> None:
    assert shared.ask("/healthz").json == {"status": "ok"}
    assert "Traceback" not in shared.mirror.log()
    assert "the cache fails" not in shared.mirror.log()
