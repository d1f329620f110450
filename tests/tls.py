"""Run the TLS terminators that docs/tls.md describes, each with the document's own block, in front of a mirror."""

from __future__ import annotations

import re
import ssl
from urllib.parse import urlsplit

import trustme
from parts import fill
from processes import Process
from processes import clean_environment
from processes import free_port
from serving import ROOT
from serving import Mirror
from terminator import SERVED_AT
from terminator import Terminator
from upstream import RawUpstream

DOCUMENT = ROOT / "docs" / "tls.md"
PROGRAMS = {"nginx": "nginx", "caddyfile": "caddy", "haproxy": "haproxy", "apache": "apache2"}
ADDRESSES = {"nginx": "127.0.0.23", "caddyfile": "127.0.0.24", "haproxy": "127.0.0.25", "apache": "127.0.0.26"}
UPSTREAM = SERVED_AT.removeprefix("http://")
NAME = "mirror.example"

# What stands around a block on its users' hosts, and is the distribution's. It compresses what it can.
AROUND = {
    "nginx": """\
daemon off; worker_processes 1; @USER@ pid "@FOLDER@/pid"; error_log stderr; events { worker_connections 1000; }
http {
    access_log off; gzip on; gzip_types *; gzip_proxied any; gzip_min_length 1;
    client_body_temp_path "@FOLDER@/body"; proxy_temp_path "@FOLDER@/proxy"; fastcgi_temp_path "@FOLDER@/fastcgi";
    uwsgi_temp_path "@FOLDER@/uwsgi"; scgi_temp_path "@FOLDER@/scgi";
    @BLOCK@
}
""",
    "caddyfile": """\
{
    admin off
    auto_https disable_redirects
    skip_install_trust
    default_bind @HOST@
    storage file_system "@FOLDER@"
}
@BLOCK@
""",
    "haproxy": """\
global
    maxconn 1000
    tune.ssl.default-dh-param 2048
@BLOCK@
""",
    "apache": """\
ServerRoot "@FOLDER@"
PidFile "@FOLDER@/pid"
ErrorLog "@FOLDER@/error"
Mutex file:@FOLDER@
ServerName localhost
Listen @ADDRESS@
@MODULES@
@USER@
<IfModule filter_module>
    AddOutputFilterByType DEFLATE text/plain application/json application/octet-stream
    AddOutputFilterByType DEFLATE application/vnd.oci.image.manifest.v1+json
</IfModule>
@BLOCK@
""",
}
COMMANDS = {
    "nginx": ["nginx", "-e", "stderr", "-p", "@FOLDER@", "-c", "@CONFIG@"],
    "caddyfile": ["caddy", "run", "--adapter", "caddyfile", "--config", "@CONFIG@"],
    "haproxy": ["haproxy", "-db", "-f", "@CONFIG@"],
    "apache": ["apache2", "-D", "FOREGROUND", "-f", "@CONFIG@"],
}
MODULES = [
    *("mpm_event", "authz_core", "ssl", "http2", "headers", "proxy", "proxy_http"),
    *("filter", "deflate", "env", "socache_shmcb", "reqtimeout"),
]


def block_of(kind: str) -> str:
    """Return the document's block for a terminator."""
    (block,) = re.findall(rf"^```{kind}\n(.*?)^```$", DOCUMENT.read_text(), re.M | re.S)
    return str(block)


def secret_lines() -> dict[str, tuple[str, str]]:
    """Return for each terminator what a secret path puts in place of what."""
    rows = re.findall(r"^\| (\w+) \| `(.+)` \| `(.+)` \|$", DOCUMENT.read_text(), re.M)
    names = {"nginx": "nginx", "Caddy": "caddyfile", "HAProxy": "haproxy", "Apache": "apache"}
    return {names[name]: (old, new) for name, old, new in rows}


class Documented(Terminator):
    """Run a terminator with the document's block, or with what it says of a secret path, in front of a mirror."""

    def __init__(
        self,
        kind: str,
        mirror: Mirror | RawUpstream,
        authority: trustme.CA | None = None,
        changes: tuple[str, str] = ("", ""),
    ) -> None:
        super().__init__(mirror, authority)
        self._kind = kind
        self._changes = changes

    def start(self) -> None:
        """Start the terminator."""
        address = ADDRESSES[self._kind]
        self.host = f"{address}:{free_port(address)}"
        self.url = f"https://{self.host}"
        self._trust = ssl.create_default_context(cafile=str(self.ca_file))
        certificate = self.folder / "certificate.pem"
        self.authority.issue_cert(address, NAME).private_key_and_cert_chain_pem.write_to_path(certificate)
        values = {"folder": self.folder, "address": self.host, "host": address, "user": "", "modules": _modules()}
        if self._kind in ("nginx", "apache"):
            values["user"] = {"nginx": "user root root;", "apache": "User www-data\nGroup www-data"}[self._kind]
        config = fill(self.folder / "config", AROUND[self._kind].replace("@BLOCK@", self._block()), **values)
        words = [
            word.replace("@FOLDER@", str(self.folder)).replace("@CONFIG@", str(config)) for word in self._command()
        ]
        process = self._stack.enter_context(
            Process(words, self.folder / "log", clean_environment({"HOME": str(self.folder)}))
        )
        process.wait_until(self._answers)

    def _command(self) -> list[str]:
        return COMMANDS[self._kind]

    def _block(self) -> str:
        """Return the block with this host's names, paths and ports in place of the document's."""
        block = block_of(self._kind)
        old, new = self._changes
        assert block.count(old) == 1 or not old
        block = block.replace(old, new) if old else block
        assert UPSTREAM in block
        block = block.replace(UPSTREAM, urlsplit(self._mirror.url).netloc)
        block = re.sub(r"^ *listen \[::\]:443 .*\n", "", block, flags=re.M)  # this host may have no IPv6
        block = re.sub(r"/etc/\S*mirror\.example\S*\.pem", str(self.folder / "certificate.pem"), block)
        block = block.replace("*:443>", f"{self.host}>").replace("listen 443 ", f"listen {self.host} ")
        block = block.replace("bind :443 ", f"bind {self.host} ")
        if self._kind == "caddyfile":  # which would get a certificate by itself
            pem = self.folder / "certificate.pem"
            block = block.replace(f"{NAME} {{", f"{self.url} {{\n    tls {pem} {pem}")
        return block

    def _answers(self) -> bool:
        try:
            return self.ask("/").status > 0
        except OSError:
            return False


def _modules() -> str:
    return "\n".join(f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so" for name in MODULES)
