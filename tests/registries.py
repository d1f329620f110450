"""Run two more registries of real parts beside the hub: an open one that redirects, and one that asks for Basic.

The open one is as registry.k8s.io: nginx in front, without auth, sends every request for a manifest or a blob on to
another registry, where the repository has a longer name. That other registry is a docker-registry, which may ask for a
token of the hub's token service.

    with Hub() as hub, OpenRegistry(hub) as open_one, BasicRegistry(hub) as basic:
        tables = {"docker.io": hub.table(), "k8s.test": open_one.table(), "basic.test": basic.table() | basic.account()}
        write_registries(file, tables)
"""

import dataclasses

from hub import TOKEN_AUTH
from hub import Hub
from images import basic_repositories
from images import open_repositories
from parts import NginxRequest
from parts import Premises
from parts import RegistryRequest

OPEN_HOST = "127.0.0.5"
TARGET_HOST = "127.0.0.6"
BASIC_HOST = "127.0.0.7"
TARGET_PREFIX = "artifacts/images/"
BASIC_USER = "hatter"
BASIC_PASSWORD = "riddle-of-the-raven"
# docker-registry takes bcrypt only. Any other cost would do; the lowest is the quickest.
HTPASSWD = f"{BASIC_USER}:$2b$04$56GYsjNOHvabMgiVReVBteaxRElJQwCwHb7S7vbiOWOiiITepVw6q\n"

REDIRECT_RULES = """\
location = /v2/ { default_type application/json; return 200 '{}'; }
location ~ ^/v2/(?<rest>.+)$ { return 307 @TARGET@/v2/@PREFIX@$rest$is_args$args; }
"""

BASIC_AUTH = """\
auth:
  htpasswd: {realm: "The Mad Tea Party", path: "@USERS@"}
"""


class OpenRegistry(Premises):
    """Run the registry without auth, and the one to which it redirects; `guarded`: the latter asks for a token."""

    def __init__(self, hub: Hub, *, guarded: bool = False) -> None:
        super().__init__(hub.authority)
        self._tokens = hub.tokens
        self._guarded = guarded

    def start(self) -> None:
        """Start both and push the images."""
        values = {"ca": self.ca_file, **self._tokens.config}
        more = TOKEN_AUTH if self._guarded else ""
        self._target = self.docker_registry("target", TARGET_HOST, self.folder / "storage", more, **values)
        self._front = self.nginx("front", OPEN_HOST, REDIRECT_RULES, target=self._target.url, prefix=TARGET_PREFIX)
        self.repositories = {repository.name: repository for repository in open_repositories()}
        for part in (self._target, self._front):
            part.wait()
        for repository in self.repositories.values():
            name = TARGET_PREFIX + repository.name
            headers = self._tokens.push_authorization(name) if self._guarded else {}
            self._target.push(dataclasses.replace(repository, name=name), headers)
        self.forget()

    def table(self) -> dict[str, object]:
        """Return its table of the registries file; the target's realm has to be listed."""
        realms = [self._tokens.url] if self._guarded else []
        return {"endpoints": [self._front.url], "realms": realms, "ca_file": str(self.ca_file)}

    def requests(self) -> list[NginxRequest]:
        """Return what the open registry was asked since the last forget()."""
        return self._front.requests()

    def target_requests(self) -> list[RegistryRequest]:
        """Return what the registry to which it redirects was asked since the last forget()."""
        return self._target.requests()

    def forget(self) -> None:
        """Clear both records; call it while no request is under way."""
        self._front.forget()
        self._target.forget()


class BasicRegistry(Premises):
    """Run the registry that asks for Basic; nothing of it may be pulled without its one user's password."""

    def __init__(self, hub: Hub) -> None:
        super().__init__(hub.authority)

    def start(self) -> None:
        """Start it and push the images."""
        users = self.folder / "htpasswd"
        users.write_text(HTPASSWD)
        self._registry = self.docker_registry("basic", BASIC_HOST, self.folder / "storage", BASIC_AUTH, users=users)
        self.url = self._registry.url
        self.repositories = {repository.name: repository for repository in basic_repositories()}
        self._registry.wait()
        self.session.auth = (BASIC_USER, BASIC_PASSWORD)
        for repository in self.repositories.values():
            self._registry.push(repository, {})
        self.forget()

    def table(self) -> dict[str, object]:
        """Return its table of the registries file, without an account: the client has to log in."""
        return {"endpoints": [self.url], "ca_file": str(self.ca_file)}

    def account(self) -> dict[str, object]:
        """Return the keys that give the mirror an account of its own."""
        return {"username": BASIC_USER, "password": BASIC_PASSWORD}

    def account_in_a_file(self) -> dict[str, object]:
        """Return the keys that do so without a password in the registries file."""
        file = self.folder / "password"
        file.write_text(f"{BASIC_PASSWORD}\n")
        return {"username": BASIC_USER, "password_file": str(file)}

    def requests(self) -> list[RegistryRequest]:
        """Return what it was asked since the last forget()."""
        return self._registry.requests()

    def forget(self) -> None:
        """Clear the record; call it while no request is under way."""
        self._registry.forget()
