"""`docker-mirror cache`: what the owner does with the store while the mirror runs, and the way from registry:2."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path
from typing import Any

import click.testing
import pytest
import requests
from conftest import needs
from hub import BLOBS
from hub import Hub
from hub import write_registries
from images import DOCKER_LIST
from images import DOCKER_MANIFEST
from images import OCI_INDEX
from images import OCI_MANIFEST
from images import Content
from images import Image
from images import Repository
from images import digest_of
from lab import Reply
from lab import ask
from parts import Premises
from parts import fill
from processes import Process
from processes import clean_environment
from processes import free_port
from processes import poll
from serving import HOST
from serving import ROOT
from serving import Mirror

import cli
import keeping
from cache import Cache
from cache import Limits
from cache import Name
from cache import Record

ACCEPT = {"Accept": ", ".join((OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST))}
POSTGRESQL, NGINX, REDIS = "bitnami/postgresql", "library/nginx", "library/redis"
NOBODY = 65534
LONG_AGO = 1_700_000_000  # in time.time()
PROXY_CONFIG = """\
version: 0.1
log: {level: error}
storage: {filesystem: {rootdirectory: "@STORAGE@"}}
http: {addr: "@ADDRESS@"}
proxy: {remoteurl: "@REMOTE@"}
"""
Ended = subprocess.CompletedProcess[str]


def settings(folder: Path, **more: object) -> dict[str, str]:
    """Return the settings of a mirror, and of the command, with this cache on a disk that may be nearly full."""
    values = {"cache_dir": folder, "cache_min_free": 0, **more}
    return {f"MIRROR_{name.upper()}": str(value) for name, value in values.items()}


def run(*arguments: object, **environ: str) -> Ended:
    """Run the command as its owner does."""
    return run_with(Path(os.devnull), *arguments, **environ)


def run_with(env_file: Path, *arguments: object, **environ: str) -> Ended:
    """Run the command with another file of settings than this host's."""
    inherited = {name: value for name, value in clean_environment().items() if not name.startswith("MIRROR_")}
    command = [sys.executable, "-m", "cli", "--env-file", str(env_file), "cache", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=inherited | environ, capture_output=True, text=True, timeout=120, check=False
    )


def does(*arguments: object, **environ: str) -> str:
    """Return what the command prints; it must end well."""
    ended = run(*arguments, **environ)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def fails(*arguments: object, **environ: str) -> str:
    """Return what the command prints; it must fail, in words."""
    ended = run(*arguments, **environ)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stdout + ended.stderr


def listed(folder: Path) -> dict[str, Any]:
    """Return what the command lists, by image."""
    return {image["image"]: image for image in json.loads(does("list", "--json", **settings(folder)))}


@contextmanager
def mirror_of(hub: Hub, folder: Path) -> Iterator[Mirror]:
    """Run a mirror of the hub with this cache."""
    with Mirror(registries=hub.registries_file, cache_dir=folder, cache_min_free=0) as running:
        yield running


@contextmanager
def mirror_without_hub(folder: Path) -> Iterator[Mirror]:
    """Run a mirror with this cache whose registry cannot be reached."""
    with tempfile.TemporaryDirectory() as registries:
        table = {"docker.io": {"endpoints": [f"http://{HOST}:{free_port(HOST)}"]}}
        file = write_registries(Path(registries, "registries.toml"), table)
        with Mirror(registries=file, cache_dir=folder, cache_min_free=0) as running:
            yield running


def pull(mirror: Mirror, repository: Repository, *images: Image, tag: str = "latest") -> list[Reply]:
    """Pull images of a repository by a tag as a client does, and see that all is as it was pushed."""
    got = [fetched(mirror, repository.name, "manifests", repository.top(), tag)]
    for image in images or repository.images:
        got.append(fetched(mirror, repository.name, "manifests", image.manifest))
        got += [fetched(mirror, repository.name, "blobs", blob) for blob in (image.config, *image.layers)]
    return got


def fetched(mirror: Mirror, name: str, kind: str, content: Content, reference: str | None = None) -> Reply:
    reply = ask(mirror, f"/v2/{name}/{kind}/{reference or content.digest}", ACCEPT)
    assert reply.status == 200
    assert digest_of(reply.body) == content.digest
    return reply


def size_of(repository: Repository, *images: Image) -> int:
    """Return how many bytes a repository's images are; the layers that they share count once."""
    contents = [repository.top()]
    for image in images or repository.images:
        contents += [image.manifest, image.config, *image.layers]
    return sum(len(data) for data in {content.digest: content.data for content in contents}.values())


def files(folder: Path) -> dict[str, Path]:
    """Return the files of a cache's blobs by digest, and see that in the end nothing else is among them."""
    blobs = folder / "blobs/sha256"
    assert poll(lambda: not list(blobs.glob("*/*.*")), 10), list(blobs.glob("*/*.*"))
    return {f"sha256:{path.name}": path for path in blobs.glob("*/*")}


def age_all(folder: Path) -> None:
    """Let all blobs be from long ago."""
    for file in files(folder).values():
        os.utime(file, (LONG_AGO, LONG_AGO))


def spoil(file: Path) -> None:
    """Change one byte of a file."""
    with file.open("r+b") as opened:
        first = opened.read(1)
        opened.seek(0)
        opened.write(bytes([first[0] ^ 1]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return an empty folder for a cache."""
    path = tmp_path / "cache"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def kept(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a cache that a running mirror has filled; a test that changes it takes a copy."""
    path = tmp_path_factory.mktemp("kept")
    with mirror_of(hub, path) as running:
        pull(running, hub.repositories[NGINX], tag="1.27")
        pull(running, hub.repositories[NGINX])
        pull(running, hub.repositories[REDIS])
        pull(running, hub.repositories[POSTGRESQL], hub.repositories[POSTGRESQL].images[1])
        assert files(path)
        yield path


@pytest.fixture
def copied(kept: Path, folder: Path) -> Path:
    """Return a copy of that cache."""
    return Path(shutil.copytree(kept, folder, dirs_exist_ok=True))


# List


def test_what_was_pulled_is_listed_with_its_size_and_platforms(hub: Hub, kept: Path) -> None:
    found = listed(kept)
    tags = [f"docker.io/{NGINX}:1.27", f"docker.io/{NGINX}:latest", f"docker.io/{REDIS}:latest"]
    assert sorted(found) == [f"docker.io/{POSTGRESQL}:latest", *tags]
    nginx, postgresql = hub.repositories[NGINX], hub.repositories[POSTGRESQL]
    assert found[tags[0]]["size"] == size_of(nginx)
    assert found[tags[0]]["platforms"] == ["linux/amd64"]
    assert found[f"docker.io/{POSTGRESQL}:latest"]["size"] == size_of(postgresql, postgresql.images[1])
    assert found[f"docker.io/{POSTGRESQL}:latest"]["platforms"] == ["linux/arm64"]
    assert {image["missing"] for image in found.values()} == {0}


def test_the_list_is_a_table_for_the_eye(kept: Path) -> None:
    lines = does("list", **settings(kept)).splitlines()
    assert lines[0].split() == ["IMAGE", "SIZE", "PLATFORMS", "LAST", "USE"]
    assert lines[1].split()[0] == f"docker.io/{POSTGRESQL}:latest"
    assert len(lines) == 6


def test_the_list_is_no_use_of_what_it_reads(copied: Path) -> None:
    age_all(copied)
    assert {image["last_use"][:4] for image in listed(copied).values()} == {"2023"}
    assert {file.stat().st_atime for file in files(copied).values()} == {LONG_AGO}


def test_an_image_of_which_a_part_has_gone_is_told_as_such(hub: Hub, copied: Path) -> None:
    files(copied)[hub.repositories[REDIS].local().layers[0].digest].unlink()
    assert listed(copied)[f"docker.io/{REDIS}:latest"]["missing"] == 1
    (line,) = [line for line in does("list", **settings(copied)).splitlines() if REDIS in line]
    assert "(partly)" in line


def test_a_manifest_that_no_tag_leads_to_is_listed_by_its_digest(hub: Hub, folder: Path) -> None:
    redis = hub.repositories[REDIS]
    assert does("list", **settings(folder)) == "nothing is kept yet\n"
    with mirror_of(hub, folder) as running:
        fetched(running, REDIS, "manifests", redis.top())
        assert list(listed(folder)) == [f"docker.io/{REDIS}@{redis.top().digest}"]


def test_the_owner_is_told_where_there_is_no_cache(tmp_path: Path) -> None:
    assert "MIRROR_CACHE_DIR, or --dir" in fails("list")
    assert f"{tmp_path}/nowhere: No such file" in fails("list", "--dir", tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert "Not a directory" in fails("verify", "--dir", tmp_path / "file")
    assert "MIRROR_CACHE_SIZE: 'x'" in fails("list", **settings(tmp_path, cache_size="x"))


def test_a_stranger_is_told_who_may_look() -> None:
    needs("root")
    with tempfile.TemporaryDirectory() as folder:
        assert "no permission to read" in as_nobody(folder)
        Path(folder).chmod(0o755)
        assert "another user's: run as the service's user or root" in as_nobody(folder)


def as_nobody(folder: str) -> str:
    """Return what the command says to another user; that one may have no way to this folder of programs."""
    code = f"import cli, os; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY}); cli.main()"
    command = [sys.executable, "-c", code, "cache", "list", "--dir", folder]
    hidden = ("MIRROR_", "COVERAGE_")  # who has no folder to write to cannot note what was covered
    inherited = {name: value for name, value in clean_environment().items() if not name.startswith(hidden)}
    ended = subprocess.run(command, cwd=ROOT, env=inherited, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    return ended.stderr


def test_the_cache_is_the_one_that_the_services_file_names(hub: Hub, copied: Path, tmp_path: Path) -> None:
    """As root, and where all that is kept, and the password of the registry, are for other eyes."""
    needs("root")
    home = tmp_path / "etc"
    (home / "credentials").mkdir(parents=True)
    (home / "credentials").chmod(0o700)
    (home / "credentials/hub").write_text("wonderland\n")
    account = {"username": "a", "password_file": "credentials_hub", "endpoints": [hub.registry_url]}
    write_registries(home / "mine.toml", {"docker.io": account})
    for path in (copied, *copied.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    file = home / "docker-mirror.env"
    file.write_text(f"# settings\nMIRROR_CACHE_DIR='{copied}'\nMIRROR_REGISTRIES=mine.toml\n")
    for command in (("remove", "redis"), ("list",), ("verify",), ("prune",), ("prune", "--dir", copied)):
        ended = run_with(file, *command)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert "MIRROR_CACHE_SIZE is not set here" not in ended.stdout
    assert REDIS not in run_with(file, "list").stdout
    assert NGINX in run_with(file, "list").stdout
    assert "nothing is kept" in run_with(file, "list", MIRROR_CACHE_DIR=str(home)).stdout, "the environment goes before"
    file.write_text("MIRROR_CACHE_DIR")
    assert "line 1 is neither a comment nor NAME=value" in run_with(file, "list").stderr


def test_the_services_mirror_is_warmed_below_its_secret_path(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "docker-mirror.env"
    file.write_text("MIRROR_PATH_PREFIX=/s3cret\n")
    with Mirror(registries=hub.registries_file, path_prefix="/s3cret", cache_dir=folder, cache_min_free=0) as hidden:
        monkeypatch.setattr(keeping, "MIRROR", f"http://{hidden.host}")
        arguments = ["--env-file", str(file), "cache", "warm", "redis", "--platform=linux/amd64"]
        ended = click.testing.CliRunner().invoke(cli.main, arguments)
    assert ended.exit_code == 0, ended.output
    assert files(folder)


# Warm


def test_a_warmed_image_is_pulled_without_the_hub(hub: Hub, folder: Path) -> None:
    with mirror_of(hub, folder) as running:
        said = does("warm", "--mirror", running.url, "--platform", "all", "bitnami/postgresql", "nginx:1.28")
        assert f"docker.io/{POSTGRESQL}:latest is kept\n" in said
        assert f"docker.io/{NGINX}:1.28 is kept\n" in said
    assert listed(folder)[f"docker.io/{POSTGRESQL}:latest"]["platforms"] == ["linux/amd64", "linux/arm64"]
    with mirror_without_hub(folder) as alone:
        pull(alone, hub.repositories[POSTGRESQL])
        pull(alone, hub.repositories[NGINX], tag="1.28")


def test_only_the_wanted_platform_is_pulled(hub: Hub, folder: Path) -> None:
    postgresql = hub.repositories[POSTGRESQL]
    with mirror_of(hub, folder) as running:
        does("warm", "--mirror", running.url, "--platform", "linux/arm64/v8", f"docker.io/{POSTGRESQL}:16")
        assert listed(folder)[f"docker.io/{POSTGRESQL}:16"]["platforms"] == ["linux/arm64"]
        assert sum(file.stat().st_size for file in files(folder).values()) == size_of(postgresql, postgresql.images[1])


def test_another_registry_is_warmed_by_its_name(hub: Hub, folder: Path, tmp_path: Path) -> None:
    file = write_registries(tmp_path / "two.toml", {"hub.test": hub.table()})
    with Mirror(registries=file, cache_dir=folder, cache_min_free=0) as running:
        does("warm", "--mirror", running.url, f"hub.test/{REDIS}:7", MIRROR_REGISTRIES=str(file))
    assert list(listed(folder)) == [f"hub.test/{REDIS}:7"]


def test_what_cannot_be_warmed_is_told_and_the_rest_is_warmed(hub: Hub, folder: Path) -> None:
    with mirror_of(hub, folder) as running:
        said = fails("warm", "--mirror", running.url, "--platform", "linux/s390x", POSTGRESQL, "redis", "no/such")
        assert f"docker.io/{POSTGRESQL}:latest: there is no linux/s390x; there are: linux/amd64, linux/arm64" in said
        assert "docker.io/no/such:latest: " in said
        assert f"docker.io/{REDIS}:latest is kept" in said


def test_a_mirror_that_is_away_or_keeps_nothing_is_told(mirror: Mirror) -> None:
    assert "(--mirror)" in fails("warm", "--mirror", f"http://{HOST}:{free_port(HOST)}", "redis")
    assert "MIRROR_CACHE_DIR is not set there" in fails("warm", "--mirror", mirror.url, "redis")


def test_a_name_that_is_none_is_refused() -> None:
    assert "other.example is no registry that is served" in fails("warm", "other.example/app")
    assert "the repository's name is not valid" in fails("warm", "NGINX")


def test_what_nginx_would_send_is_kept_too(hub: Hub, folder: Path) -> None:
    with Mirror(registries=hub.registries_file, cache_dir=folder, cache_min_free=0, accel="/protected/") as running:
        for _ in range(2):
            assert "is kept" in does("warm", "--mirror", running.url, "redis")
            assert files(folder)


def test_a_spoilt_blob_is_seen_as_it_is_warmed(hub: Hub, copied: Path) -> None:
    layer = hub.repositories[REDIS].local().layers[0].digest
    spoil(files(copied)[layer])
    with mirror_of(hub, copied) as running:
        assert f"{layer} came with other bytes" in fails("warm", "--mirror", running.url, "redis")


# Remove


def test_content_that_another_image_needs_stays(hub: Hub, copied: Path) -> None:
    before = set(files(copied))
    assert does("remove", "nginx:1.27", **settings(copied)) == f"removed docker.io/{NGINX}:1.27: 0 B\n"
    assert set(files(copied)) == before
    said = does("remove", "nginx", **settings(copied))
    assert said == f"removed docker.io/{NGINX}:latest: {size_of(hub.repositories[NGINX]) / 1024:.1f}K\n"
    gone = {content.digest for content in everything(hub.repositories[NGINX])}
    assert set(files(copied)) == before - gone
    assert [name for name in listed(copied) if NGINX in name] == []
    with mirror_of(hub, copied) as running:
        pull(running, hub.repositories[NGINX])


def everything(repository: Repository) -> Iterator[Content]:
    for image in repository.images:
        yield from (repository.top(), image.manifest, image.config, *image.layers)


def test_what_a_tag_leads_to_is_not_removed_by_its_digest(hub: Hub, copied: Path) -> None:
    redis = f"docker.io/{REDIS}@{hub.repositories[REDIS].top().digest}"
    assert f"{redis} is part of another image" in fails("remove", redis, **settings(copied))
    assert f"docker.io/{REDIS}:latest" in listed(copied)


def test_what_a_client_reads_stays_for_prune(hub: Hub, copied: Path) -> None:
    layer = hub.repositories[REDIS].local().layers[0].digest
    blob = Cache(copied, Limits(1 << 40)).open(layer)
    assert blob is not None
    assert "1 blob stayed" in does("remove", "redis", **settings(copied))
    blob.close()
    age_all(copied)
    assert layer in files(copied)
    does("prune", **settings(copied))
    assert layer not in files(copied)


def test_an_image_is_removed_while_the_mirror_runs(hub: Hub, folder: Path) -> None:
    redis = hub.repositories[REDIS]
    with mirror_of(hub, folder) as running:
        pull(running, redis)
        does("remove", f"docker.io/{REDIS}:latest", **settings(folder))
        assert files(folder) == {}
        assert pull(running, redis)[0].headers["x-cache"] == "MISS"
        assert pull(running, redis)[0].headers["x-cache"] == "HIT"


def test_an_unknown_image_is_told_with_those_near_it(copied: Path) -> None:
    said = fails("remove", "ngimx", **settings(copied))
    assert f"docker.io/library/ngimx:latest is not kept; near it: docker.io/{NGINX}:latest" in said
    assert "docker-mirror cache list" in fails("remove", "ghcr.io/some/where", **settings(copied))


# Verify


def test_what_is_wrong_is_dropped_and_comes_anew(hub: Hub, copied: Path) -> None:
    layer = hub.repositories[REDIS].local().layers[0]
    record = copied / "tags/docker.io" / NGINX / "_tags/1.27"
    with mirror_of(hub, copied) as running:
        assert "0 wrong" in does("verify", **settings(copied))
        spoil(files(copied)[layer.digest])
        record.write_text("{")
        said = fails("verify", **settings(copied))
        assert f"{layer.digest} has other bytes than it is named by: removed" in said
        assert f"the record of docker.io/{NGINX}:1.27 is wrong: removed" in said
        assert "2 wrong" in said
        assert layer.digest not in files(copied)
        assert not record.exists()
        assert "0 wrong" in does("verify", **settings(copied))
        pull(running, hub.repositories[REDIS])
        assert layer.digest in files(copied)


def test_what_is_wrong_goes_though_somebody_reads_it(hub: Hub, copied: Path) -> None:
    layer = hub.repositories[REDIS].local().layers[0]
    spoil(files(copied)[layer.digest])
    blob = Cache(copied, Limits(1 << 40)).open(layer.digest)
    assert blob is not None
    fails("verify", **settings(copied))
    assert layer.digest not in files(copied)
    assert len(blob.read()) == len(layer.data)
    blob.close()


def test_to_verify_is_no_use(copied: Path) -> None:
    age_all(copied)
    does("verify", **settings(copied))
    assert {file.stat().st_atime for file in files(copied).values()} == {LONG_AGO}


# Prune


def test_only_what_nothing_refers_to_is_pruned(hub: Hub, copied: Path) -> None:
    cache = Cache(copied, Limits(1 << 40))
    old, young = b"old litter", b"young litter"
    cache.put(digest_of(old), old)
    age_all(copied)
    cache.put(digest_of(young), young)
    before = set(files(copied))
    with mirror_of(hub, copied) as running:
        assert does("prune", **settings(copied)) == "removed 0 records and 10 B\n"
        assert set(files(copied)) == before - {digest_of(old)}
        pull(running, hub.repositories[NGINX])


def test_a_record_goes_whose_content_has_gone(hub: Hub, copied: Path) -> None:
    cache = Cache(copied, Limits(1 << 40))
    name, digest = Name("docker.io", "library/gone", "1"), digest_of(b"gone")
    cache.note(name, Record(digest, OCI_MANIFEST, 4, LONG_AGO))
    assert "docker.io/library/gone:1" in listed(copied)
    assert does("prune", **settings(copied)) == "removed 1 record and 0 B\n"
    assert cache.record(name) is None


def test_an_abandoned_part_is_pruned(copied: Path) -> None:
    part = copied / "blobs/sha256/ab" / f"{'ab' * 32}.part"
    part.parent.mkdir(exist_ok=True)
    part.write_bytes(b"a part")
    os.utime(part, (LONG_AGO, LONG_AGO))
    does("prune", **settings(copied))
    assert not part.exists()


def test_prune_keeps_within_the_bounds_that_are_set(copied: Path) -> None:
    before = set(files(copied))
    said = does("prune", "--dir", copied, MIRROR_CACHE_MIN_FREE="0")
    assert "the bounds are left to the mirror" in said
    assert set(files(copied)) == before
    does("prune", **settings(copied, cache_size="300K"))
    assert sum(file.stat().st_size for file in files(copied).values()) <= 300 << 10


# Import


def test_a_registrys_store_is_imported_and_pulled_without_the_hub(hub: Hub, folder: Path) -> None:
    with mirror_without_hub(folder) as running:
        said = does("import", hub.storage, **settings(folder))
        assert "by hard links" in said
        for repository in hub.repositories.values():
            for tag in repository.tags:
                pull(running, repository, tag=tag)
    found = files(folder)
    assert {os.stat(file).st_nlink for file in found.values()} == {2}
    for digest, file in found.items():
        assert hub.stored(digest).samefile(file)
    postgresql = listed(folder)[f"docker.io/{POSTGRESQL}:16"]
    assert (postgresql["size"], postgresql["missing"]) == (size_of(hub.repositories[POSTGRESQL]), 0)
    assert int((folder / "usage").read_text()) == sum(file.stat().st_size for file in found.values())


def test_a_second_import_brings_nothing_and_changes_nothing(hub: Hub, folder: Path) -> None:
    does("import", hub.storage, **settings(folder))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name not in ("usage", "tidy")}
    said = does("import", hub.storage, **settings(folder))
    assert "0 blobs, 0 B" in said
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name not in ("usage", "tidy")} == before


def test_a_copy_has_no_link_to_the_registrys_files(hub: Hub, folder: Path) -> None:
    assert "hard links" not in does("import", "--copy", hub.storage, **settings(folder))
    assert {file.stat().st_nlink for file in files(folder).values()} == {1}
    for digest, file in files(folder).items():
        assert digest == f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


@pytest.mark.parametrize("option", ["--copy", None])
def test_a_spoilt_blob_of_the_source_is_refused_and_told(
    hub: Hub, folder: Path, tmp_path: Path, option: str | None
) -> None:
    source = Path(shutil.copytree(hub.storage, tmp_path / "source"))
    layer, manifest = hub.repositories[NGINX].local().layers[1].digest, hub.repositories[REDIS].top().digest
    for digest in (layer, manifest):
        spoil(in_store(source, digest))
    said = fails("import", *filter(None, [option]), source, **settings(folder))
    for digest in (layer, manifest):
        assert f"{digest} has other bytes than it is named by: refused" in said
        assert digest not in files(folder)
    found = listed(folder)
    assert found[f"docker.io/{NGINX}:latest"]["missing"] == 1
    assert f"docker.io/{REDIS}:latest" not in found
    assert "0 wrong" in does("verify", **settings(folder))
    with mirror_of(hub, folder) as running:
        for name in (NGINX, REDIS):
            pull(running, hub.repositories[name])
    assert layer in files(folder)


def in_store(store: Path, digest: str) -> Path:
    encoded = digest.removeprefix("sha256:")
    return store / BLOBS / encoded[:2] / encoded / "data"


def test_what_does_not_fit_is_told_and_nothing_goes_for_it(hub: Hub, folder: Path) -> None:
    cache = Cache(folder, Limits(1 << 40))
    cache.put(digest_of(b"mine"), b"mine")
    said = fails("import", hub.storage, **settings(folder, cache_size="1M"))
    assert f"docker.io/{POSTGRESQL}:16 does not fit: it takes 52." in said
    assert digest_of(b"mine") in files(folder)
    found = listed(folder)
    assert f"docker.io/{NGINX}:latest" in found
    assert f"docker.io/{POSTGRESQL}:16" not in found
    assert sum(file.stat().st_size for file in files(folder).values()) <= 1 << 20


def test_what_root_imports_belongs_to_the_services_user(hub: Hub, tmp_path: Path) -> None:
    needs("root")
    source = Path(shutil.copytree(hub.storage, tmp_path / "source"))
    private = tmp_path / "private"  # as systemd makes it for a dynamic user: nobody but root gets through
    private.mkdir(mode=0o700)
    folder = private / "cache"
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    hidden = in_store(source, hub.repositories[REDIS].local().layers[0].digest)
    hidden.chmod(0o600)  # a link would take it from the registry's user
    does("import", source, **settings(folder))
    for command in (("list",), ("remove", "nginx"), ("verify",), ("prune",)):
        does(*command, **settings(folder))
    made = list(folder.rglob("*"))
    assert {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(NOBODY, NOBODY)}
    assert hidden.stat().st_uid == 0
    assert files(folder)[f"sha256:{hidden.parent.name}"].stat().st_nlink == 1
    assert any(file.stat().st_nlink == 2 for file in files(folder).values())


def test_another_disk_gets_copies_and_the_source_stays_as_it_was(hub: Hub) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        assert folder.stat().st_dev != hub.storage.stat().st_dev
        said = fails("import", hub.storage, **settings(folder, cache_size="1M"))
        assert "hard links" not in said
        for digest, file in files(folder).items():
            assert file.stat().st_uid == folder.stat().st_uid
            assert hub.stored(digest).stat().st_uid == hub.storage.stat().st_uid
        assert f"docker.io/{NGINX}:latest" in listed(folder)


def test_a_folder_that_is_no_registrys_store_is_told(folder: Path, hub: Hub) -> None:
    assert "holds no docker/registry/v2/repositories" in fails("import", folder, **settings(folder))
    said = fails("import", "--registry", "docker.oi", hub.storage, **settings(folder))
    assert "did you mean docker.io?" in said


class ProxyingRegistry(Premises):
    """Run a docker-registry that is a pull-through cache of the hub, as those who move over have it."""

    def __init__(self, hub: Hub) -> None:
        super().__init__(hub.authority)
        self._remote = hub.registry_url

    def start(self) -> None:
        """Start it."""
        self.storage = self.folder / "storage"
        address = f"{HOST}:{free_port(HOST)}"
        values = {"storage": self.storage, "address": address, "remote": self._remote}
        config = fill(self.folder / "config", PROXY_CONFIG, **values)
        trusting = clean_environment({"SSL_CERT_FILE": str(self.ca_file)})
        self.url = f"http://{address}"
        process = Process(["docker-registry", "serve", str(config)], self.folder / "log", trusting)
        self._stack.enter_context(process).wait_until(self._answers)

    def _answers(self) -> bool:
        with suppress(requests.ConnectionError):
            return self.session.get(f"{self.url}/v2/", timeout=5).status_code == 200
        return False

    def pull(self, repository: Repository) -> None:
        """Pull all of a repository through it, and wait until it has kept that."""
        self._get(repository, "manifests/latest")
        for image in repository.images:
            self._get(repository, f"manifests/{image.manifest.digest}")
            for blob in (image.config, *image.layers):
                self._get(repository, f"blobs/{blob.digest}")
        wanted = [in_store(self.storage, content.digest) for content in everything(repository)]
        assert poll(lambda: all(map(Path.exists, wanted)), 20)

    def _get(self, repository: Repository, resource: str) -> None:
        self.session.get(f"{self.url}/v2/{repository.name}/{resource}", headers=ACCEPT).raise_for_status()


def test_a_pull_through_registrys_store_is_imported(hub: Hub, folder: Path) -> None:
    redis = hub.repositories[REDIS]
    with ProxyingRegistry(hub) as registry:
        registry.pull(redis)
        does("import", registry.storage, **settings(folder))
    with mirror_without_hub(folder) as running:
        pull(running, redis)
    assert listed(folder)[f"docker.io/{REDIS}:latest"]["missing"] == 0
