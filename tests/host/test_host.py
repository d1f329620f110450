"""The service on a fresh Debian, in the order of its life; run.sh makes the tree, and runs this."""

import hashlib
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import bcrypt
import pytest
import requests
from clients import Skopeo
from conftest import needs
from hub import PASSWORD
from hub import USER
from hub import Hub
from hub import write_registries
from machine import Ended
from machine import Machine
from processes import free_port
from processes import poll
from pulls import pulled_by_docker
from pulls import succeeds
from terminator import READMES
from terminator import SERVED_AT
from terminator import Terminator
from terminator import TrustingDockerd

MIB = 1 << 20
HOST = "127.0.0.1"
CLONE = "/root/docker-mirror"
SERVICE = "docker-mirror.service"
UNITS = ("docker-mirror.socket", SERVICE)
ENVIRONMENT = "/etc/docker-mirror/docker-mirror.env"
RELEASES = "/opt/docker-mirror"
RELEASES_KEPT = 2
LOCK = "/run/lock/docker-mirror.lock"  # an empty file in memory; who took it away could let two in


class Service:
    """Look at the service of a machine, from inside and from outside."""

    def __init__(self, machine: Machine, port: int) -> None:
        self.machine = machine
        self.port = port
        self.url = f"http://{HOST}:{port}"

    def deploy(self, *arguments: str) -> Ended:
        """Run deploy.sh of the clone."""
        return self.machine.run(f"{CLONE}/deploy.sh", *arguments)

    def install(self) -> Ended:
        """Install what the clone holds."""
        return self.deploy("install", "--wheels", "/root/wheels")

    def show(self, name: str) -> str:
        """Return a property of the unit."""
        return self.machine.succeeds("systemctl", "show", "--value", "--property", name, SERVICE)

    def pid(self) -> str:
        """Return the process number of the main process, within the machine."""
        return self.show("MainPID")

    def workers(self) -> list[str]:
        """Return the process numbers of its workers, of which it has one."""
        assert poll(lambda: bool(self._children()), 10, 0.2)
        return self._children()

    def _children(self) -> list[str]:
        pid = self.pid()
        return self.machine.run("cat", f"/proc/{pid}/task/{pid}/children").stdout.split()

    def release(self) -> str:
        """Return the name of the version that is installed."""
        return os.readlink(self.machine.path(f"{RELEASES}/current"))

    def status(self, path: str = "/healthz") -> int:
        """Return the status of an answer; 0: nobody listens."""
        with requests.Session() as session:
            session.trust_env = False
            try:
                return session.get(f"{self.url}{path}", timeout=60).status_code
            except requests.ConnectionError:
                return 0

    def state(self) -> dict[str, tuple[int, int]]:
        """Return inode and time of change of all that an installation writes."""
        folders = [self.machine.path(name) for name in (RELEASES, "/etc/docker-mirror", "/etc/systemd/system")]
        files = [file for folder in folders for file in folder.rglob("*")]
        return {str(file): (file.lstat().st_ino, file.lstat().st_mtime_ns) for file in files}


class Transfer:
    """Read a blob in parts, and hash it."""

    def __init__(self, response: requests.Response) -> None:
        self._parts = response.iter_content(MIB)
        self._hash = hashlib.sha256()

    def read(self, mebibytes: int) -> None:
        """Read some of it."""
        for _ in range(mebibytes):
            self._hash.update(next(self._parts))

    def digest(self) -> str:
        """Read the rest, and return the digest of all."""
        for part in self._parts:
            self._hash.update(part)
        return f"sha256:{self._hash.hexdigest()}"


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """Boot the tree."""
    needs("root", "systemd-nspawn", "nsenter")
    tree = os.environ.get("HOST_TREE")
    if not tree:
        pytest.skip("needs the tree that tests/host/run.sh makes")
    with Machine(Path(tree)) as running:
        yield running


@pytest.fixture(scope="module")
def service(machine: Machine, hub: Hub) -> Service:
    """Install the service, whose owner has settings already: the tests' hub, an account at it, and another port."""
    port = free_port(HOST)
    table = hub.table() | {"ca_file": "/etc/docker-mirror/ca.pem", "username": USER, "password_file": "credentials_hub"}
    machine.write("/etc/docker-mirror/ca.pem", hub.ca_file.read_text())
    machine.write("/etc/docker-mirror/credentials/hub", f"{PASSWORD}\n")
    machine.path("/etc/docker-mirror/credentials").chmod(0o700)
    write_registries(machine.path("/etc/docker-mirror/registries.toml"), {"docker.io": table})
    machine.write(ENVIRONMENT, "MIRROR_REGISTRIES=registries.toml\n")
    drop_in = f"[Socket]\nListenStream=\nListenStream={HOST}:{port}\n"
    machine.write("/etc/systemd/system/docker-mirror.socket.d/port.conf", drop_in)
    return Service(machine, port)


@pytest.fixture(scope="module")
def installed(service: Service) -> Service:
    """Install it for the first time."""
    ended = service.install()
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return service


@pytest.fixture(scope="module")
def large(hub: Hub) -> str:
    """Return the digest of a blob of 200 MB in the hub."""
    return hub.add_blob("library/nginx", 200 * MIB)


@contextmanager
def transfer(service: Service, digest: str) -> Iterator[Transfer]:
    with requests.Session() as session:
        session.trust_env = False
        url = f"{service.url}/v2/library/nginx/blobs/{digest}"
        with session.get(url, stream=True, timeout=60) as response:
            assert response.status_code == 200
            running = Transfer(response)
            running.read(20)
            yield running


def test_a_fresh_host_gets_what_is_missing_and_wrong_settings_stop_the_installation(service: Service) -> None:
    ended = service.deploy("install", "--dry-run")
    assert "would run: apt-get install --yes --no-install-recommends python3-venv" in ended.stderr
    with written(service, ENVIRONMENT, "MIRROR_PROXIES='x'\n"):
        ended = service.install()
    assert ended.returncode == 1
    assert "Python's venv module is missing; installing: python3-venv" in ended.stderr
    assert "problem  MIRROR_PROXIES: 'x' is not a whole number" in ended.stderr
    assert not service.machine.path(RELEASES).exists()


@contextmanager
def written(service: Service, inside: str, text: str) -> Iterator[Path]:
    """Replace a file of the machine's for a while."""
    file = service.machine.path(inside)
    before = file.read_text()
    file.write_text(text)
    try:
        yield file
    finally:
        file.write_text(before)


def test_a_dry_run_says_what_it_would_do_and_does_nothing(service: Service) -> None:
    before = service.state()
    ended = service.deploy("install", "--dry-run")
    assert ended.returncode == 0, ended.stderr
    assert "would run: systemctl start docker-mirror.socket docker-mirror.service" in ended.stderr
    assert service.state() == before


def test_a_first_installation_that_does_not_come_up_is_taken_away_again(service: Service) -> None:
    with changed(service, wsgi="raise SystemExit('broken on purpose')"):
        ended = service.install()
    assert ended.returncode == 1
    assert "broken on purpose" in ended.stderr
    assert not service.machine.path(RELEASES).exists()
    assert not os.path.lexists(service.machine.path("/usr/local/bin/docker-mirror"))
    assert not any(service.machine.path(f"/etc/systemd/system/{unit}").exists() for unit in UNITS)


def test_what_is_installed_is_active_and_enabled_and_says_what_is_served(installed: Service) -> None:
    for command in ("is-active", "is-enabled"):
        installed.machine.succeeds("systemctl", command, *UNITS)
    assert installed.show("StatusText") == f"Serving 13 registries at {installed.url} with 1 worker"
    assert installed.show("Type") == "notify"
    assert installed.machine.succeeds("systemctl", "is-system-running") == "running"


def test_it_runs_as_nobody_else_and_can_write_to_its_own_folders_only(installed: Service) -> None:
    status = installed.machine.succeeds("cat", f"/proc/{installed.pid()}/status")
    assert not re.search(r"^Uid:\s+0\b", status, re.M)
    assert re.search(r"^CapEff:\s+0+$", status, re.M)
    assert re.search(r"^Seccomp:\s+2$", status, re.M)
    exposure = installed.machine.succeeds("systemd-analyze", "security", "--no-pager", SERVICE)
    found = re.search(r"Overall exposure level .*: ([\d.]+)", exposure)
    assert found
    assert float(found[1]) <= 1.5


def test_it_answers_inside_and_outside(installed: Service) -> None:
    assert installed.status("/v2/") == 401
    asked = f"import urllib.request as r; print(r.urlopen('{installed.url}/healthz').status)"
    assert installed.machine.succeeds("python3", "-c", asked) == "200"


def test_a_client_pulls_through_it(installed: Service, hub: Hub, tmp_path: Path) -> None:
    """The private image shows that the password comes from its credential, which only root can read on the disk."""
    with Skopeo(installed.url) as skopeo:
        for name in ("nginx", "private/app"):
            source = f"docker://{HOST}:{installed.port}/{name}"
            succeeds(skopeo.skopeo("copy", source, f"dir:{tmp_path / name.replace('/', '-')}"))
    for name, repository in (("nginx", "library/nginx"), ("private-app", "private/app")):
        manifest = (tmp_path / name / "manifest.json").read_bytes()
        assert manifest == hub.repositories[repository].local().manifest.data


def test_the_owner_is_told_what_the_host_lacks(installed: Service, hub: Hub) -> None:
    """Other registries may be out of reach of this machine."""
    shown = installed.deploy("check").stdout
    assert "ok       systemd 252\n" in shown
    assert f"ok       docker.io: {hub.registry_url.removeprefix('https://')}\n" in shown
    assert f"ok       the settings: {ENVIRONMENT}\n" in shown


def test_a_file_that_the_service_cannot_read_is_a_problem(installed: Service) -> None:
    """Root can, and so it is the service's view that counts."""
    file = installed.machine.path("/etc/docker-mirror/registries.toml")
    file.chmod(0o600)
    ended = installed.deploy("check")
    file.chmod(0o644)
    assert ended.returncode == 1
    assert "problem  MIRROR_REGISTRIES: registries.toml: [Errno 13] Permission denied" in ended.stdout
    assert "must be readable for everyone" in ended.stdout


def test_the_owners_command_is_found(installed: Service) -> None:
    assert "docker-mirror, version" in installed.machine.succeeds("/usr/local/bin/docker-mirror", "--version")


def test_a_second_installation_at_the_same_time_is_refused(installed: Service) -> None:
    with ThreadPoolExecutor() as pool:
        held = pool.submit(installed.machine.run, "flock", LOCK, "sleep", "3")
        time.sleep(1)
        ended = installed.install()
        held.result()
    assert ended.returncode == 1
    assert "another install or uninstall is running" in ended.stderr


def test_a_second_installation_changes_nothing_and_says_so(installed: Service) -> None:
    before, pid = installed.state(), installed.pid()
    ended = installed.install()
    assert ended.returncode == 0, ended.stderr
    assert f"docker-mirror {installed.release()} is installed and serves: nothing to change" in ended.stderr
    assert (installed.state(), installed.pid()) == (before, pid)


def test_the_owners_settings_are_kept(installed: Service) -> None:
    assert installed.machine.path(ENVIRONMENT).read_text() == "MIRROR_REGISTRIES=registries.toml\n"
    assert installed.machine.path("/etc/docker-mirror/registries.toml.example").is_file()


def test_a_restart_lets_a_transfer_end_and_keeps_new_clients_waiting(installed: Service, large: str) -> None:
    before = installed.pid()
    with transfer(installed, large) as running, ThreadPoolExecutor() as pool:
        restart = pool.submit(installed.machine.succeeds, "systemctl", "restart", SERVICE)
        assert poll(lambda: installed.show("ActiveState") == "deactivating", 10, 0.2)
        time.sleep(2)  # the worker looks each second whether it has to end
        client = pool.submit(installed.status)
        running.read(80)
        time.sleep(3)
        assert not restart.done()
        assert not client.done()
        assert running.digest() == large
        restart.result(60)
        assert client.result(60) == 200
    assert installed.pid() != before


def test_a_reload_lets_another_process_serve_at_once_while_a_transfer_ends(installed: Service, large: str) -> None:
    before = installed.pid()
    with transfer(installed, large) as running:
        installed.machine.succeeds("systemctl", "reload", SERVICE)
        assert poll(lambda: installed.pid() != before, 30, 0.2)
        assert poll(lambda: listeners_of_the_main_process(installed) == 1, 10, 0.2)  # it closes a copy a little later
        running.read(80)
        assert installed.status() == 200
        assert is_running(installed, before)
        assert running.digest() == large
    assert poll(lambda: not is_running(installed, before), 30, 0.2)
    assert installed.show("ActiveState") == "active"


def listeners_of_the_main_process(service: Service) -> int:
    """Return how many descriptors it has of the address. Source: proc(5), where state 0A is LISTEN."""
    pid = service.pid()
    sockets = [line.split() for line in service.machine.succeeds("cat", f"/proc/{pid}/net/tcp").splitlines()]
    (inode,) = (words[9] for words in sockets if words[1].endswith(f":{service.port:04X}") and words[3] == "0A")
    return service.machine.succeeds("sh", "-c", f"readlink /proc/{pid}/fd/*").count(f"socket:[{inode}]")


def is_running(service: Service, pid: str) -> bool:
    return service.machine.run("test", "-d", f"/proc/{pid}").returncode == 0


def test_a_stop_after_a_reload_waits_for_the_transfers_of_both_processes(installed: Service, large: str) -> None:
    time.sleep(
        2
    )  # gunicorn looks each second whether the process before has ended, and takes no other reload till then
    before = installed.pid()
    with transfer(installed, large) as old, ThreadPoolExecutor() as pool:
        installed.machine.succeeds("systemctl", "reload", SERVICE)
        assert poll(lambda: installed.pid() != before, 30, 0.2)
        with transfer(installed, large) as new:
            restart = pool.submit(installed.machine.succeeds, "systemctl", "restart", SERVICE)
            assert poll(lambda: installed.show("ActiveState") == "deactivating", 10, 0.2)
            assert new.digest() == large
            time.sleep(3)
            assert not restart.done()
        assert old.digest() == large
        restart.result(60)


def test_a_reload_with_a_wrong_registries_file_fails_and_changes_nothing(installed: Service) -> None:
    before = installed.pid()
    with written(installed, "/etc/docker-mirror/registries.toml", "[broken"):
        assert installed.machine.run("systemctl", "reload", SERVICE).returncode != 0
    assert (installed.pid(), installed.status()) == (before, 200)
    assert "registries.toml" in installed.machine.succeeds("journalctl", "--unit", SERVICE, "--lines", "20")


def test_the_mirrors_own_users_stand_in_a_file_that_only_root_can_read(installed: Service) -> None:
    file = installed.machine.path("/etc/docker-mirror/credentials/htpasswd")
    file.write_text(f"bob:{bcrypt.hashpw(b'wonderland', bcrypt.gensalt(4)).decode()}\n")
    file.chmod(0o600)
    with written(installed, ENVIRONMENT, "MIRROR_REGISTRIES=registries.toml\nMIRROR_USERS=credentials_htpasswd\n"):
        installed.machine.succeeds("systemctl", "restart", SERVICE)
        assert installed.deploy("check").stdout.count(f"ok       the settings: {ENVIRONMENT}\n") == 1
    with requests.Session() as session:
        session.trust_env = False
        statuses = [
            session.get(f"{installed.url}/token", auth=("bob", word)).status_code for word in ("wonderland", "x")
        ]
    assert statuses == [200, 401]
    file.unlink()
    installed.machine.succeeds("systemctl", "restart", SERVICE)


def test_a_service_that_cannot_start_gives_its_address_up_and_can_be_started_again(installed: Service) -> None:
    with written(installed, ENVIRONMENT, "MIRROR_PROXIES=x\n"):
        installed.machine.run("systemctl", "restart", SERVICE)
        assert poll(lambda: installed.machine.run("systemctl", "is-failed", UNITS[0]).returncode == 0, 120, 1)
        assert installed.status() == 0
    installed.machine.succeeds("systemctl", "reset-failed", *UNITS)
    installed.machine.succeeds("systemctl", "start", SERVICE)
    assert installed.status() == 200


def test_a_worker_that_is_killed_is_replaced(installed: Service) -> None:
    pid, (worker,) = installed.pid(), installed.workers()
    installed.machine.succeeds("sh", "-c", f"kill -KILL {worker}")
    assert poll(lambda: installed.workers() != [worker], 10, 0.2)
    assert installed.status() == 200
    assert installed.pid() == pid


def test_a_master_that_is_killed_is_replaced_and_nobody_is_refused(installed: Service) -> None:
    pid, (worker,) = installed.pid(), installed.workers()
    installed.machine.succeeds("sh", "-c", f"kill -KILL {pid}")
    assert poll(lambda: not is_running(installed, worker), 10)
    assert installed.status() == 200
    assert installed.pid() not in ("0", pid)


@contextmanager
def changed(service: Service, **files: str) -> Iterator[None]:
    """Add lines to files of the clone, named without their ends."""
    names = {"wsgi": "wsgi.py", "unit": "systemd/docker-mirror.service"}
    paths = {service.machine.path(f"{CLONE}/{names[key]}"): text for key, text in files.items()}
    before = {path: path.read_bytes() for path in paths}
    try:
        for path, text in paths.items():
            path.write_text(f"{path.read_text()}\n{text}\n")
        yield
    finally:
        for path, content in before.items():
            path.write_bytes(content)


def test_an_upgrade_lets_a_transfer_end_and_refuses_nobody(installed: Service, large: str) -> None:
    old, pid = installed.release(), installed.pid()
    with transfer(installed, large) as running, ThreadPoolExecutor() as pool, changed(installed, wsgi="# newer"):
        upgrade = pool.submit(installed.install)
        while not upgrade.done():
            assert installed.status() == 200
            time.sleep(0.1)
        assert upgrade.result().returncode == 0, upgrade.result().stderr
        assert installed.release() != old
        assert installed.pid() != pid
        assert running.digest() == large
    assert {old, installed.release()} <= set(os.listdir(installed.machine.path(RELEASES)))


def test_an_upgrade_takes_in_what_the_owner_has_changed_since_the_start(installed: Service) -> None:
    """The setting is written as systemd takes it, and the address is one that systemd has not read yet."""
    port = free_port(HOST)
    drop_in = "/etc/systemd/system/docker-mirror.socket.d/port.conf"
    other = f"[Socket]\nListenStream =\nListenStream = {HOST}:{port} \n"
    settings = "MIRROR_REGISTRIES=registries.toml\n  MIRROR_PATH_PREFIX = '/s3cret' \n"
    with written(installed, ENVIRONMENT, settings), written(installed, drop_in, other):
        with changed(installed, wsgi="# with other settings"):
            ended = installed.install()
        assert ended.returncode == 0, ended.stderr
        there = Service(installed.machine, port)
        assert (there.status("/s3cret/healthz"), there.status()) == (200, 404)
        assert installed.status() == 0
    ended = installed.install()
    assert ended.returncode == 0, ended.stderr
    assert installed.status() == 200


ANSWERS_500 = """
def failing(environ, start_response):
    print("broken on purpose", flush=True)
    start_response("500 Internal Server Error", [])
    return []


app.wsgi_app = failing
"""


@pytest.mark.parametrize(
    "files",
    [
        {"wsgi": "raise SystemExit('broken on purpose')"},
        {"wsgi": "raise SystemExit('broken on purpose')", "unit": "# another unit"},
        {"wsgi": "def post_worker_init(worker):\n    raise SystemExit('broken on purpose')"},
        {"wsgi": ANSWERS_500},
        {"wsgi": ANSWERS_500, "unit": "# another unit"},
    ],
    ids=["at once", "with another unit", "in the worker", "answers wrongly", "answers wrongly with another unit"],
)
def test_an_upgrade_to_a_broken_version_goes_back(installed: Service, files: dict[str, str]) -> None:
    before = installed.release()
    unit = installed.machine.path(f"/etc/systemd/system/{SERVICE}")
    text = unit.read_text()
    with changed(installed, **files):
        ended = installed.install()
    assert ended.returncode == 1
    assert "broken on purpose" in ended.stderr
    assert f"did not come up: {before} serves" in ended.stderr
    assert len([name for name in os.listdir(installed.machine.path(RELEASES)) if name != "current"]) == RELEASES_KEPT
    assert installed.release() == before
    assert before in installed.machine.succeeds("sh", "-c", f"tr '\\0' '\\n' </proc/{installed.pid()}/cmdline")
    assert installed.status() == 200
    assert unit.read_text() == text
    assert poll(lambda: len(installed.workers()) == 1, 10, 0.2), "the other version's process has ended"


def test_an_uninstallation_takes_the_service_away_and_keeps_what_is_the_owners(installed: Service) -> None:
    machine = installed.machine
    assert installed.deploy("uninstall", "--dry-run").returncode == 0
    assert installed.status() == 200
    ended = installed.deploy("uninstall")
    assert ended.returncode == 0, ended.stderr
    assert "kept; to remove it: rm -rf /etc/docker-mirror\n" in ended.stderr
    assert "kept; to remove it: rm -rf /var/cache/docker-mirror\n" in ended.stderr
    assert installed.status() == 0
    assert left(machine) == {
        "/etc/docker-mirror",
        "/etc/systemd/system/docker-mirror.socket.d",
        "/var/cache/docker-mirror",
        "/var/cache/private/docker-mirror",
    }
    assert machine.path(ENVIRONMENT).is_file()
    assert "nothing to change" in installed.deploy("uninstall").stderr


def test_a_purge_takes_all_away(installed: Service) -> None:
    assert installed.deploy("uninstall", "--purge").returncode == 0
    assert left(installed.machine) == set()
    assert installed.machine.succeeds("systemctl", "--failed", "--quiet", "--no-legend") == ""


def test_the_readmes_words_lead_to_a_pull_through_https(installed: Service, hub: Hub) -> None:
    """Followed to the letter; the owner's one setting makes the tests' hub Docker Hub, and packages come from a folder.

    The web server and the client are on other addresses of this machine.
    """
    machine = installed.machine
    machine.write("/etc/pip.conf", "[global]\nno-index = true\nfind-links = /root/wheels\n")
    section = READMES[0].read_text().partition("\n## As a service\n")[2].partition("\n## ")[0]
    (commands,) = re.findall(r"^```sh\n(.*?)^```$", section, re.M | re.S)
    shown = ""
    for command in commands.splitlines():
        ended = machine.run("sh", "-c", f"cd {CLONE} && {command}")
        assert ended.returncode == 0, ended.stdout + ended.stderr
        shown = ended.stdout
    assert 'Status: "Serving 13 registries at http://127.0.0.1:5000 with 1 worker"' in shown
    machine.write("/etc/docker-mirror/ca.pem", hub.ca_file.read_text())
    table = hub.table() | {"ca_file": "/etc/docker-mirror/ca.pem"}
    write_registries(machine.path("/etc/docker-mirror/registries.toml"), {"docker.io": table})
    with machine.path(ENVIRONMENT).open("a") as settings:
        settings.write("MIRROR_REGISTRIES=registries.toml\nMIRROR_CACHE_DIR=/var/cache/docker-mirror\n")
    machine.succeeds("systemctl", "restart", "docker-mirror")
    needs("dockerd", "docker", "containerd", "ctr")
    with Terminator(Address(SERVED_AT)) as terminator, TrustingDockerd(terminator) as docker:
        pulled_by_docker(docker, "nginx", hub.repositories["library/nginx"])
        assert ("HEAD", "/v2/library/nginx/manifests/latest", 200) in terminator.asked()
    listed = f"{RELEASES}/current/bin/docker-mirror cache list --dir /var/cache/docker-mirror"
    assert "docker.io/library/nginx:latest" in machine.succeeds("sh", "-c", listed)
    assert installed.deploy("uninstall", "--purge").returncode == 0


class Address(NamedTuple):
    """Say where a mirror is."""

    url: str


def left(machine: Machine) -> set[str]:
    """Return all that bears the service's name, but for the clone."""
    prune = ("-path", "/proc", "-o", "-path", "/sys", "-o", "-path", "/root")
    found = machine.succeeds(
        "find", "/", "(", *prune, ")", "-prune", "-o", "-name", "*docker-mirror*", "-prune", "-print"
    )
    return set(found.split()) - {LOCK}
