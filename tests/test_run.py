"""`./deploy.sh run` on a host that has nothing yet, and what `pip install .` gives."""

import http.client
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import closing
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import requests
from conftest import needs
from conftest import unavailable
from hub import Hub
from processes import Process
from processes import clean_environment
from processes import free_port
from processes import poll
from pulls import blobs

import mirror

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
MIB = 1 << 20
BIG = "bitnami/postgresql"  # its largest layer is too large for the buffers on the way
INSTALLING = "installing into"
MODULES = ("mirror", "cache", "settings", "wsgi", "cli", "keeping")
Ended = subprocess.CompletedProcess[str]


def environment(inherited: Mapping[str, str] = os.environ, /, **more: str) -> dict[str, str]:
    """Return the environment of a user who has set nothing up."""
    dropped = ("MIRROR_", "GUNICORN_", "COVERAGE_", "PYTHON", "VIRTUAL_ENV")
    return {name: value for name, value in inherited.items() if not name.startswith(dropped)} | more


def run(*command: str | Path, cwd: Path, seconds: float = 120, **more: str) -> Ended:
    """Run a command to its end; pip may need the proxies of this host."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def installs(ended: Ended) -> Ended:
    """Return what has ended if it went well; where pip reached no package index, that is a missing part."""
    if ended.returncode and re.search(r"connection broken by|Could not fetch URL", ended.stderr):
        unavailable("needs a package index")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the repository as a clone would have it: nothing that git ignores is in it."""
    needs("git", "bash", "python3")
    folder = tmp_path_factory.mktemp("clone")
    listed = run("git", "ls-files", "-coz", "--exclude-standard", cwd=ROOT)
    if listed.returncode:
        unavailable("needs a clone")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Path:
    """Return another folder, which holds a registries file."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(hub.registries_file, folder / "mine.toml")
    return folder


@pytest.fixture(scope="module")
def first_run(fresh: Path, elsewhere: Path) -> Ended:
    """Run it for the first time; gunicorn prints what it would do and ends."""
    return installs(run(fresh / "deploy.sh", "run", "--print-config", cwd=elsewhere))


@pytest.fixture(scope="module")
def installed(fresh: Path, first_run: Ended) -> Path:
    """Return the copy after its first run."""
    assert (fresh / ".venv/bin/gunicorn").is_file()
    return fresh


def settings_of(ended: Ended) -> dict[str, str]:
    """Return gunicorn's settings as --print-config shows them."""
    assert ended.returncode == 0, ended.stderr
    return dict(re.findall(r"^(\w+) += (.*)$", ended.stdout, re.M))


@contextmanager
def serving(installed: Path, folder: Path) -> Iterator[tuple[Process, str]]:
    """Let deploy.sh serve from another folder with a relative path in a setting; yield the process and the URL."""
    address = f"{HOST}:{free_port(HOST)}"
    log = folder / f"log-{address}"
    command = [str(installed / "deploy.sh"), "run", "--bind", address]
    with Process(command, log, environment(clean_environment(), MIRROR_REGISTRIES="mine.toml"), folder) as process:
        process.wait_until(lambda: get(f"http://{address}/healthz").status == 200)
        yield process, f"http://{address}"


class Answer(NamedTuple):
    """Hold what a URL answered; status 0: nobody listens."""

    status: int
    body: bytes


def get(url: str, **headers: str) -> Answer:
    """Ask over a connection that is closed afterwards, as requests does not while its response lives."""
    try:
        with requests.Session() as session:
            session.trust_env = False
            with session.get(url, headers={"Connection": "close", **headers}, timeout=10) as response:
                return Answer(response.status_code, response.content)
    except requests.ConnectionError:
        return Answer(0, b"")


def test_the_first_run_installs_and_would_listen_on_this_host_alone(first_run: Ended) -> None:
    assert INSTALLING in first_run.stderr
    shown = settings_of(first_run)
    assert shown["bind"] == "['127.0.0.1:5000']"
    assert (shown["worker_class"], shown["preload_app"]) == ("<Worker()>", "True")


def test_it_serves_from_another_folder_with_a_relative_registries_file(
    installed: Path, elsewhere: Path, hub: Hub
) -> None:
    manifest = hub.repositories["library/hello-world"].top()
    with serving(installed, elsewhere) as (process, url):
        answer = get(f"{url}/v2/hello-world/manifests/latest", Accept=manifest.media_type)
        assert answer == (200, manifest.data)
        assert poll(lambda: '"GET /v2/hello-world/manifests/latest" 200' in process.log_file.read_text(), 5)
        assert INSTALLING not in process.log_file.read_text(), "that was done by the first run"


def test_sigterm_ends_it_and_its_workers(installed: Path, elsewhere: Path) -> None:
    with serving(installed, elsewhere) as (process, url):
        (worker,) = children(process.pid)
        assert process.stop(5) == 0
        assert get(f"{url}/healthz").status == 0
        assert poll(lambda: not Path(f"/proc/{worker}").exists(), 5)


def test_a_client_that_only_keeps_its_connection_does_not_hold_the_end_up(installed: Path, elsewhere: Path) -> None:
    with serving(installed, elsewhere) as (process, url), requests.Session() as session:
        session.trust_env = False
        answer = session.get(f"{url}/healthz", timeout=10)
        assert answer.headers["Connection"] == "keep-alive"
        assert process.stop(5) == 0


def test_a_pull_under_way_is_finished_after_sigterm(installed: Path, elsewhere: Path, hub: Hub) -> None:
    layer = max(blobs(hub.repositories[BIG]), key=lambda blob: len(blob.data))
    with serving(installed, elsewhere) as (process, url):
        with closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)) as client:
            client.request("GET", f"/v2/{BIG}/blobs/{layer.digest}")
            response = client.getresponse()
            start = response.read(MIB)
            os.kill(process.pid, signal.SIGTERM)
            assert poll(lambda: get(f"{url}/healthz").status == 0, 5), "no new client is taken"
            assert start + response.read() == layer.data
        assert process.stop(5) == 0


def children(pid: int) -> list[int]:
    """Return the process numbers of a process's children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_sigusr2_lets_another_process_take_over_and_this_one_end_after_its_transfers(
    installed: Path, elsewhere: Path, hub: Hub
) -> None:
    layer = max(blobs(hub.repositories[BIG]), key=lambda blob: len(blob.data))
    with serving(installed, elsewhere) as (process, url):
        (worker,) = children(process.pid)
        with closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)) as client:
            client.request("GET", f"/v2/{BIG}/blobs/{layer.digest}")
            response = client.getresponse()
            start = response.read(MIB)
            os.kill(process.pid, signal.SIGUSR2)
            assert poll(lambda: "Handling signal: term" in process.log_file.read_text(), 20)
            (successor,) = (pid for pid in children(process.pid) if pid != worker)
            try:
                assert process.running()
                assert get(f"{url}/healthz").status == 200
                assert start + response.read() == layer.data
                assert poll(lambda: not process.running(), 10)
                assert get(f"{url}/healthz").status == 200
            finally:
                os.kill(successor, signal.SIGTERM)
            assert poll(lambda: get(f"{url}/healthz").status == 0, 10)


def test_a_worker_ends_with_its_master_however_that_ends(installed: Path, elsewhere: Path) -> None:
    with serving(installed, elsewhere) as (process, url):
        (worker,) = children(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        assert poll(lambda: not Path(f"/proc/{worker}").exists(), 5)
        assert get(f"{url}/healthz").status == 0


@pytest.mark.parametrize("option", ["--bind=127.0.0.1:5999", "--bind 127.0.0.1:5999", "-b 127.0.0.1:5999"])
def test_an_address_of_the_users_own_replaces_the_default(installed: Path, elsewhere: Path, option: str) -> None:
    shown = settings_of(run(installed / "deploy.sh", "run", *option.split(), "--print-config", cwd=elsewhere))
    assert shown["bind"] == "['127.0.0.1:5999']"


def test_an_address_may_stand_in_gunicorns_own_variable(installed: Path, elsewhere: Path) -> None:
    arguments = "--workers=2 --bind=127.0.0.1:5999"
    ended = run(installed / "deploy.sh", "run", "--print-config", cwd=elsewhere, GUNICORN_CMD_ARGS=arguments)
    shown = settings_of(ended)
    assert (shown["bind"], shown["workers"]) == ("['127.0.0.1:5999']", "2")


def test_another_option_leaves_the_default_address(installed: Path, elsewhere: Path) -> None:
    ended = run(installed / "deploy.sh", "run", "--backlog", "64", "--workers", "2", "--print-config", cwd=elsewhere)
    shown = settings_of(ended)
    assert (shown["backlog"], shown["workers"]) == ("64", "2")
    assert shown["bind"] == "['127.0.0.1:5000']"


def test_an_option_that_gunicorn_does_not_know_is_refused_by_name(installed: Path, elsewhere: Path) -> None:
    ended = run(installed / "deploy.sh", "run", "--no-such-option", cwd=elsewhere, seconds=30)
    assert ended.returncode == 2
    assert "--no-such-option" in ended.stderr


def test_a_wrong_setting_stops_the_start_with_a_line_that_says_why(installed: Path, elsewhere: Path) -> None:
    ended = run(installed / "deploy.sh", "run", cwd=elsewhere, seconds=30, MIRROR_LOGN="off")
    assert ended.returncode != 0
    assert "MIRROR_LOGN is no setting; did you mean MIRROR_LOGIN?" in ended.stderr


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_a_dry_run_needs_no_root_and_changes_nothing(installed: Path, elsewhere: Path, command: str) -> None:
    """It ends as the installation would: badly where a part of the host is missing, such as systemd."""
    ended = run(installed / "deploy.sh", command, "--dry-run", cwd=elsewhere)
    assert ended.returncode == ("\nproblem " in ended.stderr), ended.stderr
    assert ended.returncode == ("it would be refused" in ended.stderr)
    told = "would run: systemctl" if command == "install" else "nothing to change"
    assert told in ended.stderr


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_an_option_that_is_none_is_refused(installed: Path, elsewhere: Path, command: str) -> None:
    ended = run(installed / "deploy.sh", command, "--dry-run", "--dryrun", cwd=elsewhere)
    assert (ended.returncode, ended.stderr) == (1, "deploy.sh: unknown option: --dryrun\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("install --purge", "--purge is an option of uninstall"),
        ("uninstall --wheels=.", "--wheels is an option of install"),
        ("install --wheels=", "--wheels needs a folder"),
        ("install --wheels none", "--wheels needs a folder"),
    ],
)
def test_an_option_that_means_nothing_here_is_refused(installed: Path, elsewhere: Path, words: str, told: str) -> None:
    ended = run(installed / "deploy.sh", *words.split(), "--dry-run", cwd=elsewhere)
    assert (ended.returncode, ended.stderr) == (1, f"deploy.sh: {told}\n")


def test_a_dry_run_of_a_check_installs_nothing(tmp_path: Path) -> None:
    shutil.copy(ROOT / "deploy.sh", tmp_path)
    ended = run(tmp_path / "deploy.sh", "check", "--dry-run", "http://127.0.0.1:9", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "check http://127.0.0.1:9" in ended.stderr
    assert not (tmp_path / ".venv").exists()


def test_a_url_is_checked_by_the_owners_command(installed: Path, elsewhere: Path) -> None:
    ended = run(installed / "deploy.sh", "check", "http://127.0.0.1:9", cwd=elsewhere)
    assert ended.returncode == 1, ended.stderr
    assert "nothing answers at port 9" in ended.stdout


def test_pip_installs_all_modules_and_the_command_into_a_fresh_venv(
    installed: Path, elsewhere: Path, tmp_path: Path
) -> None:
    """What they depend on was installed by the first run, and takes long: the venv gets it, but no modules, by a path.

    A path file that is reached by another one is not read, and so the first run's link to the copy is not there.
    """
    python = tmp_path / "bin/python"
    assert run("python3", "-m", "venv", "--without-pip", tmp_path, cwd=elsewhere).returncode == 0
    (dependencies,) = installed.glob(".venv/lib/python*/site-packages")
    (packages,) = tmp_path.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{dependencies}\n")
    assert run(python, "-c", "import mirror", cwd=elsewhere).returncode != 0
    pip = ("install", "--quiet", "--no-deps", installed)
    installs(run(installed / ".venv/bin/pip", "--python", python, *pip, cwd=elsewhere))
    for module in MODULES:
        found = run(python, "-c", f"import {module}; print({module}.__file__)", cwd=elsewhere)
        assert Path(found.stdout.strip()).is_relative_to(packages), found.stderr
    version = run(tmp_path / "bin/docker-mirror", "--version", cwd=elsewhere)
    assert version.stdout == f"docker-mirror, version {mirror.__version__}\n"
    gunicorn = ("-m", "gunicorn", "--config", "python:wsgi", "--check-config", "wsgi:app")
    checked = run(python, *gunicorn, cwd=elsewhere)
    assert checked.returncode == 0, checked.stderr
