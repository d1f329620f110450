"""Run the real clients: dockerd, the containerd below it, podman and skopeo, each with files of its own.

None of them can reach Docker Hub from here. Clients that get no answer from the mirror fall back to it, which must
neither succeed, hiding that the mirror failed, nor wait for a DNS server that is not there: a closed port as their
proxy makes the fallback fail at once. Go's HTTP clients never use a proxy for loopback addresses.
"""

import base64
import json
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from processes import Process
from processes import clean_environment
from processes import find_program
from processes import removed_afterwards

NOWHERE = "http://127.0.0.1:9"
HUB_AUTH = "https://index.docker.io/v1/"
Result = subprocess.CompletedProcess[str]

CONTAINERD_CONFIG = """\
version = 2
root = "@FOLDER@/containerd/root"
state = "@FOLDER@/containerd/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = "@FOLDER@/containerd.sock"
"""

HOSTS_TOML = """\
server = "https://@SERVER@"
[host."@URL@"]
capabilities = ["pull", "resolve"]
"""

PREFIXED_CONF = """\

[[registry]]
location = "@REGISTRY@"
[[registry.mirror]]
location = "@HOST@/@REGISTRY@"
insecure = true
"""

REGISTRIES_CONF = """\
unqualified-search-registries = ["docker.io"]
short-name-mode = "disabled"

[[registry]]
location = "docker.io"
[[registry.mirror]]
location = "@HOST@"
insecure = true

[[registry]]
location = "@HOST@"
insecure = true
"""


class Client:
    """Keep one client's files in a temporary directory, which is its HOME too, and run its commands."""

    def __init__(self, mirror_url: str):
        self.mirror_url = mirror_url
        self.mirror_host = mirror_url.removeprefix("http://")
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack:
            folder = Path(tempfile.mkdtemp(prefix=f"{type(self).__name__.lower()}-"))
            self.folder = self._stack.enter_context(removed_afterwards(folder))
            self.start()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def start(self) -> None:
        """Write the client's files and start what it needs."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """Return the environment in which the client runs."""
        return clean_environment({"HOME": str(self.folder), "HTTP_PROXY": NOWHERE, "HTTPS_PROXY": NOWHERE})

    def run(self, *command: str | Path, stdin: str = "", seconds: float = 60) -> Result:
        """Run one command to its end and return its status and output."""
        words = [str(word) for word in command]
        words[0] = find_program(words[0]) or words[0]
        return subprocess.run(
            words, input=stdin, capture_output=True, text=True, timeout=seconds, env=self.environment(), check=False
        )

    def write(self, name: str, text: str) -> Path:
        """Write a file below the client's folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path


class Dockerd(Client):
    """Run a private dockerd, with the mirror in its `registry-mirrors`, on a private containerd.

    Left alone, dockerd would share a containerd that the machine may already run. `settings` end its daemon.json.
    """

    def __init__(self, mirror_url: str, settings: Mapping[str, object] | None = None):
        super().__init__(mirror_url)
        self._settings = settings or {}

    def start(self) -> None:
        """Start containerd, then dockerd on it."""
        self.docker_socket = self.folder / "docker.sock"
        self.containerd_socket = self.folder / "containerd.sock"
        self._start_containerd()
        self._start_dockerd()

    def _start_containerd(self) -> None:
        config = self.write("containerd.toml", CONTAINERD_CONFIG.replace("@FOLDER@", str(self.folder)))
        command = ["containerd", "--config", str(config)]
        containerd = self._stack.enter_context(Process(command, self.folder / "containerd.log", self.environment()))
        containerd.wait_until(lambda: self.ctr("version").returncode == 0)

    def _start_dockerd(self) -> None:
        settings = {
            "registry-mirrors": [self.mirror_url],
            "hosts": [f"unix://{self.docker_socket}"],
            "containerd": str(self.containerd_socket),
            "data-root": str(self.folder / "data"),
            "exec-root": str(self.folder / "exec"),
            "pidfile": str(self.folder / "docker.pid"),
            "storage-driver": "vfs",
            "iptables": False,
            "ip6tables": False,
            "bridge": "none",
            **self._settings,
        }
        command = ["dockerd", "--config-file", str(self.write("daemon.json", json.dumps(settings)))]
        dockerd = self._stack.enter_context(Process(command, self.log_file, self.environment()))
        dockerd.wait_until(lambda: self.docker_socket.exists() and self.docker("version").returncode == 0)

    @property
    def log_file(self) -> Path:
        """Return the file to which dockerd writes its log."""
        return self.folder / "dockerd.log"

    def docker(self, *arguments: str, config: str = "docker-config", stdin: str = "") -> Result:
        """Run `docker` on this daemon; each config is a DOCKER_CONFIG of its own, and so a user's logins."""
        # Debian's client, where there is one, speaks the same API version as Debian's daemon.
        program = "/usr/bin/docker" if Path("/usr/bin/docker").exists() else "docker"
        host = f"unix://{self.docker_socket}"
        return self.run(program, "--config", self.folder / config, "--host", host, *arguments, stdin=stdin)

    def config_with_login(self, name: str, registry: str, user: str, password: str) -> str:
        """Write a DOCKER_CONFIG that holds a login and return its name for docker()."""
        auth = base64.b64encode(f"{user}:{password}".encode()).decode()
        self.write(f"{name}/config.json", json.dumps({"auths": {registry: {"auth": auth}}}))
        return name

    def forget_images(self) -> None:
        """Remove all that was pulled, so that the next pull asks for everything.

        dockerd puts manifests into containerd's content store and leaves them there when it removes an image.
        """
        self.docker("image", "prune", "--all", "--force")
        if manifests := self.ctr("content", "ls", "--quiet", namespace="moby").stdout.split():
            self.ctr("content", "rm", *manifests, namespace="moby")
        if images := self.ctr("images", "ls", "--quiet").stdout.split():
            self.ctr("images", "rm", "--sync", *images)

    def ctr(self, *arguments: str, namespace: str = "tests") -> Result:
        """Run `ctr` on this daemon's containerd; dockerd's own things are in the namespace `moby`."""
        return self.run("ctr", "--address", self.containerd_socket, "--namespace", namespace, *arguments)

    def ctr_pull(self, image: str, *options: str, mirror_url: str = "") -> Result:
        """Pull a full image name with containerd, through the mirror, or another one, as a host of its registry."""
        registry = image.partition("/")[0]
        hosts_toml = HOSTS_TOML.replace("@SERVER@", "registry-1.docker.io" if registry == "docker.io" else registry)
        self.write(f"hosts/{registry}/hosts.toml", hosts_toml.replace("@URL@", mirror_url or self.mirror_url))
        hosts = str(self.folder / "hosts")
        return self.ctr("images", "pull", "--hosts-dir", hosts, "--snapshotter", "native", *options, image)


class ContainersTool(Client):
    """Run a client of the containers/image family, with the mirror as a mirror of docker.io and as a plain registry.

    Of the other registries it is a mirror too, with their names in its paths.
    """

    def __init__(self, mirror_url: str, *registries: str):
        super().__init__(mirror_url)
        self._registries = registries

    def start(self) -> None:
        """Write the files that these clients look for."""
        blocks = [REGISTRIES_CONF, *(PREFIXED_CONF.replace("@REGISTRY@", name) for name in self._registries)]
        registries = "".join(blocks).replace("@HOST@", self.mirror_host)
        self.registries_conf = self.write(".config/containers/registries.conf", registries)
        self.write(".config/containers/policy.json", json.dumps({"default": [{"type": "insecureAcceptAnything"}]}))
        self.write("auth.json", "{}")

    def environment(self) -> dict[str, str]:
        """Return the environment in which the client runs."""
        return super().environment() | {
            # Older skopeo does not know this variable and looks for the file below HOME.
            "CONTAINERS_REGISTRIES_CONF": str(self.registries_conf),
            "REGISTRY_AUTH_FILE": str(self.folder / "auth.json"),
            "XDG_RUNTIME_DIR": str(self.folder / "run"),
        }


class Podman(ContainersTool):
    """Run podman with storage of its own."""

    def podman(self, *arguments: str, stdin: str = "") -> Result:
        """Run one podman command."""
        folders = [f"--{name}={self.folder / name}" for name in ("root", "runroot", "tmpdir")]
        drivers = ["--storage-driver=vfs", "--cgroup-manager=cgroupfs", "--events-backend=none"]
        return self.run("podman", *folders, *drivers, *arguments, stdin=stdin)


class Skopeo(ContainersTool):
    """Run skopeo, which keeps no images of its own."""

    def skopeo(self, *arguments: str, stdin: str = "") -> Result:
        """Run one skopeo command."""
        return self.run("skopeo", *arguments, stdin=stdin)
