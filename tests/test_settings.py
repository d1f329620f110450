"""Settings and the registries file: read once, refused in one line that says what to do, and documented as they are."""

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import click.testing
import pytest
import trustme
from processes import clean_environment
from registries import HTPASSWD

import cli
import keeping
from settings import Config
from settings import ConfigError
from settings import Duration
from settings import Registry
from settings import Size
from settings import load_registries
from settings import read_env_file
from settings import variable

ROOT = Path(__file__).resolve().parent.parent


def test_nothing_set_means_the_defaults() -> None:
    config = Config.from_environ({"PATH": "/bin", "MIRROR_REGISTRIES": "", "MIRROR_PROXIES": " "})
    assert config == Config()
    assert (config.proxies, config.login, config.log_level) == (1, True, "info")


def test_each_setting_is_read() -> None:
    environ = {
        "MIRROR_PUBLIC_URL": "https://mirror.example/",
        "MIRROR_PATH_PREFIX": "/s3cret/",
        "MIRROR_PROXIES": "2",
        "MIRROR_LOGIN": "OFF",
        "MIRROR_REGISTRIES": "/etc/registries.toml",
        "MIRROR_CONNECT_TIMEOUT": "1.5",
        "MIRROR_FIRST_BYTE_TIMEOUT": "2",
        "MIRROR_IDLE_TIMEOUT": "3",
        "MIRROR_LOG_LEVEL": "Warning",
        "MIRROR_DEFAULT": "ghcr.io",
        "MIRROR_IPV4_ONLY": "on",
        "HTTPS_PROXY": "http://proxy.example:3128",
        "ALL_PROXY": "socks5h://user:password@127.0.0.1:1080",
        "NO_PROXY": "localhost,10.0.0.0/8",
        "CREDENTIALS_DIRECTORY": "/run/credentials/x",
    }
    expected = Config(
        public_url="https://mirror.example",
        path_prefix="/s3cret",
        proxies=2,
        login=False,
        registries="/etc/registries.toml",
        default="ghcr.io",
        connect_timeout=1.5,
        first_byte_timeout=2,
        idle_timeout=3,
        ipv4_only=True,
        log_level="warning",
        https_proxy="http://proxy.example:3128",
        all_proxy="socks5h://user:password@127.0.0.1:1080",
        no_proxy="localhost,10.0.0.0/8",
        credentials="/run/credentials/x",
    )
    assert Config.from_environ(environ) == expected


def test_rules_of_access_are_read() -> None:
    environ = {
        "MIRROR_ALLOW_CLIENTS": "192.0.2.0/24, 2001:db8::/32,198.51.100.7,::ffff:203.0.113.0/120",
        "MIRROR_BLOCK_AGENTS": " bot , Scan/1 ",
        "MIRROR_PULL_RATE": "100 / 6h",
        "MIRROR_CLIENT_BANDWIDTH": "5m",
    }
    config = Config.from_environ(environ)
    networks = ["192.0.2.0/24", "2001:db8::/32", "198.51.100.7/32", "203.0.113.0/24"]
    assert list(map(str, config.allow_clients)) == networks
    assert config.block_agents == ("bot", "Scan/1")
    assert config.pull_rate is not None
    assert (config.pull_rate.amount, config.pull_rate.seconds, str(config.pull_rate)) == (100, 21600, "100/6h")
    assert config.client_bandwidth == 5 << 20


def test_the_settings_of_the_cache_are_read() -> None:
    environ = {
        "MIRROR_CACHE_DIR": "/var/cache/docker-mirror/",
        "MIRROR_CACHE_SIZE": "20g",
        "MIRROR_CACHE_MIN_FREE": "0",
        "MIRROR_CACHE_MAX_AGE": "90d",
        "MIRROR_CACHE_FINISH": "off",
        "MIRROR_ACCEL": "/protected/",
        "MIRROR_TAG_TTL": "5 m",
        "MIRROR_STALE": "0",
    }
    expected = Config(
        cache_dir="/var/cache/docker-mirror",
        cache_size=Size(20 << 30),
        cache_min_free=Size(0),
        cache_max_age=Duration(90 * 86400),
        cache_finish=False,
        accel="/protected/",
        tag_ttl=Duration(300),
        stale=Duration(0),
    )
    assert Config.from_environ(environ) == expected
    off = {"MIRROR_CACHE_DIR": "/", "MIRROR_CACHE_MAX_AGE": "OFF"}
    assert Config.from_environ(off) == Config(cache_dir="/", cache_max_age=None)


@pytest.mark.parametrize(
    ("text", "size", "shown"),
    [
        ("1", 1, "1"),
        ("1023", 1023, "1023"),
        ("2048", 2048, "2K"),
        ("1536k", 1536 << 10, "1536K"),
        ("1024K", 1 << 20, "1M"),
        ("10G", 10 << 30, "10G"),
        ("10GB", 10 << 30, "10G"),
        ("3TiB", 3 << 40, "3T"),
        ("4096T", 1 << 52, "4096T"),
    ],
)
def test_a_size_is_read_and_shown_with_its_unit(text: str, size: int, shown: str) -> None:
    found = Config.from_environ({"MIRROR_CACHE_DIR": "/c", "MIRROR_CACHE_SIZE": text}).cache_size
    assert (found, str(found)) == (size, shown)


def test_no_size_is_shown_as_0() -> None:
    assert str(Size(0)) == "0"


@pytest.mark.parametrize(
    ("text", "seconds", "shown"),
    [
        ("90", 90, "90s"),
        ("60s", 60, "1m"),
        ("10m", 600, "10m"),
        ("6H", 21600, "6h"),
        ("48h", 172800, "2d"),
        ("0", 0, "0"),
    ],
)
def test_a_time_is_read_and_shown_with_its_unit(text: str, seconds: int, shown: str) -> None:
    found = Config.from_environ({"MIRROR_CACHE_DIR": "/c", "MIRROR_TAG_TTL": text}).tag_ttl
    assert (found, str(found)) == (seconds, shown)


@pytest.mark.parametrize(
    "name", ["CACHE_SIZE", "CACHE_MIN_FREE", "CACHE_MAX_AGE", "CACHE_FINISH", "ACCEL", "TAG_TTL", "STALE"]
)
def test_a_setting_of_the_cache_without_a_cache_is_refused(name: str) -> None:
    value = {"CACHE_FINISH": "off", "ACCEL": "/x/"}.get(name, "5")
    with pytest.raises(ConfigError) as raised:
        Config.from_environ({f"MIRROR_{name}": value})
    assert str(raised.value) == f"MIRROR_{name}: there is no cache without MIRROR_CACHE_DIR"


def test_terminators_without_a_proxy_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match=r"^MIRROR_TERMINATORS: "):
        Config.from_environ({"MIRROR_PROXIES": "0", "MIRROR_TERMINATORS": "127.0.0.1"})


def test_a_proxy_in_lower_case_goes_before_one_in_capitals() -> None:
    environ = {"HTTPS_PROXY": "http://a", "https_proxy": "http://b", "ALL_PROXY": "http://c", "all_proxy": ""}
    config = Config.from_environ(environ)
    assert (config.https_proxy, config.all_proxy) == ("http://b", "http://c")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("MIRROR_LOGON", "on", "did you mean MIRROR_LOGIN?"),
        ("MIRROR_X", "1", "there are: MIRROR_PUBLIC_URL, "),
        ("MIRROR_PROXIES", "one", "'one' is not a whole number"),
        ("MIRROR_PROXIES", "11", "11 is not between 0 and 10"),
        ("MIRROR_LOGIN", "maybe", "'maybe' is not one of: on, off"),
        ("MIRROR_VERIFY", "1", "'1' is not one of: on, off"),
        ("MIRROR_ALLOW_CLIENTS", "10.0.0.0/8, x", "'x' is no address and no network"),
        ("MIRROR_ALLOW_CLIENTS", "192.0.2.7/24", "write 192.0.2.7 or 192.0.2.0/24"),
        ("MIRROR_DENY_CLIENTS", ",", "names nothing"),
        ("MIRROR_TERMINATORS", "example.com", "is no address and no network"),
        ("MIRROR_PULL_RATE", "100", "'100' is no rate such as 100/6h"),
        ("MIRROR_PULL_RATE", "0/h", "is no rate"),
        ("MIRROR_PULL_RATE", "5/0h", "is no rate"),
        ("MIRROR_PULL_RATE_STORE", "redis://127.0.0.1:6379/0", "counts nothing without MIRROR_PULL_RATE"),
        ("MIRROR_PULL_RATE_STORE", "redis://h/0?password=secret", "must be a URL such as"),
        ("MIRROR_PULL_RATE_STORE", "redis://:secret/w@h", "must be a URL such as"),
        ("MIRROR_TRANSFERS", "0", "0 is not between 1"),
        ("MIRROR_CLIENT_BANDWIDTH", "0", "'0' is no size such as"),
        ("MIRROR_CLIENT_BANDWIDTH", "5X", "'5X' is no size such as"),
        ("MIRROR_CACHE_DIR", "cache", "must be a path from the root"),
        ("MIRROR_CACHE_SIZE", "0", "'0' is no size such as"),
        ("MIRROR_CACHE_SIZE", "-1", "'-1' is no size such as"),
        ("MIRROR_CACHE_SIZE", "1.5G", "'1.5G' is no size such as"),
        ("MIRROR_CACHE_MIN_FREE", "x", "'x' is no size such as"),
        ("MIRROR_CACHE_MAX_AGE", "never", "'never' is no time such as"),
        ("MIRROR_CACHE_FINISH", "1", "'1' is not one of: on, off"),
        ("MIRROR_TAG_TTL", "1w", "'1w' is no time such as"),
        ("MIRROR_STALE", "-5", "'-5' is no time such as"),
        ("MIRROR_ACCEL", "/protected", "must be the path of an internal location"),
        ("MIRROR_ACCEL", "/", "must be the path of an internal location"),
        ("MIRROR_IDLE_TIMEOUT", "nan", "nan is not between"),
        ("MIRROR_IDLE_TIMEOUT", "0", "0 is not between"),
        ("MIRROR_IDLE_TIMEOUT", "1m", "'1m' is not a number"),
        ("MIRROR_LOG_LEVEL", "loud", "not one of: debug, info, warning, error"),
        ("HTTPS_PROXY", "proxy.example:3128", "must be a URL such as socks5h://127.0.0.1:1080"),
        ("ALL_PROXY", "ftp://proxy.example", "schemes: http, https, socks5, socks5h"),
        ("ALL_PROXY", "http://proxy.example:99999", "ort"),
        ("MIRROR_PUBLIC_URL", "mirror.example", "is not a URL such as https://mirror.example"),
        ("MIRROR_PUBLIC_URL", "https://a:b@mirror.example", "leave them out"),
        ("MIRROR_PUBLIC_URL", "https://mirror.example/?x=1", "leave them out"),
        ("MIRROR_PUBLIC_URL", "https://mirror.example/sub", "leave it to MIRROR_PATH_PREFIX"),
        ("MIRROR_PATH_PREFIX", "s3cret", "must be a path such as /s3cret"),
        ("MIRROR_PATH_PREFIX", "/", "must be a path"),
        ("MIRROR_PATH_PREFIX", "/a//b", "must be a path"),
        ("MIRROR_PATH_PREFIX", "/a/../b", "must be a path"),
        ("MIRROR_PATH_PREFIX", "/a%20b", "must be a path"),
        ("MIRROR_PATH_PREFIX", "/v2", "/v2 is a path of the mirror itself"),
        ("MIRROR_PATH_PREFIX", "/s3cret/V2/", "/v2 is a path of the mirror itself"),
        ("MIRROR_PATH_PREFIX", "/token", "/token is a path of the mirror itself"),
        ("MIRROR_PATH_PREFIX", "/healthz/x", "/healthz is a path of the mirror itself"),
        ("MIRROR_PATH_PREFIX", "/v1", "/v1 is a path of the mirror itself"),
        ("MIRROR_PUBLIC_URL", "https://mirror.example:99999", "ort"),
        ("MIRROR_PUBLIC_URL", "https://[::1", "IPv6"),
        ("MIRROR_PUBLIC_URL", "https://mirror example", "is not a URL"),
    ],
)
def test_a_wrong_setting_is_told_with_its_name(name: str, value: str, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Config.from_environ({name: value})
    assert str(raised.value).startswith(name)
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_wrong_address_with_a_password_is_not_shown() -> None:
    with pytest.raises(ConfigError) as raised:
        Config.from_environ({"MIRROR_PUBLIC_URL": "https://alice:wonderland@mirror.example"})
    assert "wonderland" not in str(raised.value)
    with pytest.raises(ConfigError) as raised:
        Config.from_environ({"ALL_PROXY": "sox://alice:wonderland@proxy.example"})
    assert "wonderland" not in str(raised.value)


def load(tmp_path: Path, text: str, **settings: str) -> dict[str, Registry]:
    file = tmp_path / "registries.toml"
    file.write_text(text)
    return load_registries(Config(registries=str(file), **settings))  # type: ignore[arg-type]


def test_a_registry_is_changed_by_its_table(tmp_path: Path) -> None:
    trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
    (tmp_path / "password").write_text("wonderland\nand more\n")
    text = f"""
        ["docker.io"]
        endpoints = ["https://127.0.0.2:5000/", "https://fallback.example/prefix"]
        alias = "hub"
        hosts = ["Hub.example.com", "hub.example.com:8443"]
        realms = ["https://127.0.0.3"]
        username = "alice"
        password_file = "{tmp_path}/password"
        images = ["library/*", "alice/app"]
        proxy = "socks5h://127.0.0.1:1080"
        ca_file = "{tmp_path}/ca.pem"
        search = "https://index.example"
    """
    assert load(tmp_path, text)["docker.io"] == Registry(
        "docker.io",
        ("https://127.0.0.2:5000", "https://fallback.example/prefix"),
        "hub",
        ("hub.example.com", "hub.example.com:8443"),
        ("https://127.0.0.3",),
        "alice",
        "wonderland",
        ("library/*", "alice/app"),
        "socks5h://127.0.0.1:1080",
        f"{tmp_path}/ca.pem",
        "https://index.example",
    )


def test_what_a_table_does_not_name_stays(tmp_path: Path) -> None:
    changed = load(tmp_path, '["docker.io"]\nendpoints = ["https://a.example"]')["docker.io"]
    assert (changed.alias, changed.search) == ("docker", "https://index.docker.io")


def test_a_registry_is_added_and_another_switched_off(tmp_path: Path) -> None:
    text = '["new.example"]\nendpoints = ["https://new.example"]\nalias = "new"\n["quay.io"]\nenabled = false'
    registries = load(tmp_path, text)
    assert registries["new.example"].alias == "new"
    assert "quay.io" not in registries
    assert "ghcr.io" in registries


def test_a_registry_switched_off_and_on_is_on(tmp_path: Path) -> None:
    assert "quay.io" in load(tmp_path, '["quay.io"]\nenabled = true')


def test_a_relative_password_file_is_one_of_systemds_credentials(tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("wonderland")
    text = '["docker.io"]\nusername = "a"\npassword_file = "hub"'
    assert load(tmp_path, text, credentials=str(tmp_path))["docker.io"].password == "wonderland"


def test_a_password_is_in_no_representation(tmp_path: Path) -> None:
    text = '["docker.io"]\nusername = "a"\npassword = "wonderland"'
    assert "wonderland" not in repr(load(tmp_path, text))


def test_without_a_file_the_well_known_registries_are_served() -> None:
    registries = load_registries(Config())
    assert registries["docker.io"].endpoints == ("https://registry-1.docker.io",)
    assert {registry.alias for registry in registries.values()} == {
        *("docker", "ghcr", "quay", "gcr", "k8s", "k8s-gcr", "mcr"),
        *("nvcr", "elastic", "ecr", "lscr", "cloudsmith", "gitlab"),
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('["docker.io"]\nendpoint = ["https://a"]', '["docker.io"] endpoint is no key; did you mean endpoints?'),
        ('["docker.io"]\nrubbish = 1', "rubbish is no key; there are: endpoints, alias"),
        ('["docker.io"]\nendpoints = "https://a"', "endpoints: must be a list of texts"),
        ('["docker.io"]\nendpoints = [1]', "endpoints: must be a list of texts"),
        ('["docker.io"]\nendpoints = []', "endpoints: must hold at least one URL"),
        (
            '["docker.io"]\nendpoints = ["https://a", "https://a/"]',
            "endpoints: must hold at least one URL, and none twice",
        ),
        ('["docker.io"]\nendpoints = ["a"]', "endpoints: 'a' is not a URL"),
        ('["docker.io"]\nrealms = ["ftp://a"]', "realms: 'ftp://a' is not a URL"),
        ('["docker.io"]\nca_file = 1', "ca_file: must be a text"),
        ('["docker.io"]\nca_file = "/nowhere/ca.pem"', "ca_file: /nowhere/ca.pem: No such file"),
        ('["docker.io"]\nca_file = "{file}"', "ca_file: "),
        ('["docker.io"]\nhosts = ["https://a"]', "hosts: must hold host names"),
        ('["docker.io"]\nalias = "a.b"', "alias: 'a.b' is no label"),
        ('["docker.io"]\nalias = "ghcr"', '["ghcr.io"] ghcr means ["docker.io"] already'),
        ('["docker.io"]\nusername = "a"', "password or password_file is missing"),
        ('["docker.io"]\npassword = "a"', "username is missing"),
        (
            '["docker.io"]\nusername = "a"\npassword = "b"\npassword_file = "{file}"',
            "has both password and password_file",
        ),
        ('["docker.io"]\nusername = "a"\npassword_file = "/nowhere"', "password_file: /nowhere: No such file"),
        ('["docker.io"]\nusername = "a"\npassword_file = "/dev/null"', "password_file: /dev/null is empty"),
        ('["docker.io"]\nproxy = "127.0.0.1:1080"', "proxy: must be a URL such as socks5h"),
        ('["docker.io"]\nimages = []', "images: must name at least one image"),
        ('["docker.io"]\nimages = "library/*"', "images: must be a list of texts"),
        ('["docker.io"]\nsearch = "index"', "search: 'index' is not a URL"),
        ('["docker.io"]\nenabled = "no"', "enabled: must be true or false"),
        ('["docker.io"]\nenabled = false', "MIRROR_DEFAULT: docker.io is no registry"),
        ('["new.example"]\nalias = "new"', '["new.example"] endpoints is missing, such as ["https://new.example"]'),
        ('["new/example"]\nalias = "new"', '["new/example"] is no host name'),
        ('"docker.io" = 1', '["docker.io"] must be a table'),
        ("[docker", "registries.toml"),
    ],
)
def test_a_wrong_registries_file_is_told_with_file_table_and_key(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, text.replace("{file}", str(tmp_path / "registries.toml")))
    assert "registries.toml" in str(raised.value) or "MIRROR_DEFAULT" in str(raised.value)
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_a_file_that_cannot_be_read_is_told_with_its_variable(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "registries.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^MIRROR_REGISTRIES: "):
        load_registries(Config(registries=str(file)))


@pytest.mark.parametrize(
    ("name", "value"), [("MIRROR_PROXIES", "x"), ("MIRROR_REGISTRIES", "/nowhere.toml"), ("MIRROR_NOTHING", "1")]
)
def test_a_wrong_setting_stops_the_start_with_one_line(name: str, value: str) -> None:
    command = [sys.executable, "-m", "gunicorn", "-c", "python:wsgi", "-b", "127.0.0.1:0", "wsgi:app"]
    ended = subprocess.run(
        command, cwd=ROOT, env=clean_environment({name: value}), capture_output=True, text=True, timeout=30, check=False
    )
    assert ended.returncode != 0
    lines = (ended.stdout + ended.stderr).strip().splitlines()
    assert len(lines) == 1
    assert name in lines[0]


def test_readme_shows_the_settings_as_they_are() -> None:
    assert "\n".join(cli.settings_table()) in (ROOT / "README.md").read_text()


def test_the_chinese_readme_has_the_same_settings_and_defaults() -> None:
    def cells(lines: list[str]) -> list[list[str]]:
        return [[cell.strip() for cell in line.split("|")[1:3]] for line in lines if line.startswith("| `")]

    chinese = (ROOT / "README.zh-CN.md").read_text().replace("未设置", "unset").splitlines()
    assert cells(chinese) == cells(list(cli.settings_table()))


def test_the_services_file_has_all_settings_as_they_are_and_sets_none() -> None:
    shown = run_cli("settings", "--env").output
    assert shown == (ROOT / "systemd/docker-mirror.env").read_text()
    assert all(line.startswith("#") for line in shown.splitlines() if line)
    lines = [f"#{variable(item)}={cli.shown(item.default)}" for item in fields(Config)]
    assert [line for line in shown.splitlines() if re.match(r"#\w+=", line)] == lines


def test_the_settings_of_the_services_file_can_be_set_to_what_it_shows() -> None:
    text = (ROOT / "systemd/docker-mirror.env").read_text()
    assert Config.from_environ(dict(re.findall(r"^#(\w+)=(.*)$", text, re.M))) == Config()


@pytest.mark.parametrize("name", [variable(item) for item in fields(Config)])
def test_each_setting_of_the_services_file_can_be_set_to_what_it_shows_alone(name: str) -> None:
    text = (ROOT / "systemd/docker-mirror.env").read_text()
    shown = dict(re.findall(r"^#(\w+)=(.*)$", text, re.M))
    assert Config.from_environ({name: shown[name]}) == Config()
    Config.from_environ({"MIRROR_PROXIES": "0", name: shown[name]})


# The service's file, for the owner's commands


def env_file(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "docker-mirror.env"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("A=b", "b"),
        ("A = b c \n", "b c"),
        ("  A=\n", ""),
        ("A=1\nA=2\n", "2"),
        ("# A=1\n;A=2\n  # c\n\n \nA=3\r\n", "3"),
        ("A=b # c", "b # c"),
        ("A=b'c'\"", "b'c'\""),
        ("A=b\\\nc\\d\\\\e", "bcd\\e"),
        ("A='b \\ \" $c '\n", 'b \\ " $c '),
        ("A='b\nc'", "b\nc"),
        ('A="b \\" \\$ \\d \\\\ \\\nc" \n', 'b " $ \\d \\ c'),
        ('A=""', ""),
    ],
)
def test_a_services_file_is_read_as_systemd_reads_it(tmp_path: Path, text: str, value: str) -> None:
    assert read_env_file(env_file(tmp_path, text)) == {"A": value}


@pytest.mark.parametrize(
    "line",
    [
        *("secret", "export A=secret", "A B=secret", "1A=secret", "=secret", "A='secret", 'A="secret', "A='secret'x"),
        *('A="secret" # c', "A='secret' 'b'", "# secret\\\nB=1", "A=secret\\", "A=secret\0"),
    ],
)
def test_what_a_services_file_leaves_unclear_is_refused_by_its_line(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match=r"docker-mirror\.env: line 3 is neither a comment nor NAME=value") as raised:
        read_env_file(env_file(tmp_path, f"A=1\n\n{line}"))
    assert "secret" not in str(raised.value)


def test_a_services_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "docker-mirror.env").write_bytes(b"A=\xff")
    with pytest.raises(ConfigError, match="is no text"):
        read_env_file(tmp_path / "docker-mirror.env")


def test_the_services_own_file_is_read(tmp_path: Path) -> None:
    text = (ROOT / "systemd/docker-mirror.env").read_text()
    assert read_env_file(env_file(tmp_path, text)) == {}
    assert (
        Config.from_environ(read_env_file(env_file(tmp_path, re.sub(r"^#(\w+=)", r"\1", text, flags=re.M)))) == Config()
    )


def service(tmp_path: Path) -> Path:
    """Write all that a service's folder has, with relative paths; return its file of settings."""
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials/hub").write_text("wonderland\n")
    (tmp_path / "credentials/htpasswd").write_text(HTPASSWD)
    trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
    (tmp_path / "mine.toml").write_text(
        '["docker.io"]\nendpoints = ["https://hub.example"]\nca_file = "ca.pem"\n'
        'username = "a"\npassword_file = "credentials_hub"\n'
    )
    return env_file(
        tmp_path,
        "MIRROR_REGISTRIES=mine.toml\nMIRROR_USERS=credentials_htpasswd\nMIRROR_TAG_TTL=1m\nMIRROR_PROXIES=2\n",
    )


def test_the_owner_sees_the_services_settings(tmp_path: Path) -> None:
    before = Path.cwd()
    file = service(tmp_path)
    shown = run_cli("settings", env_file=file, MIRROR_PROXIES="3")
    assert shown.exit_code == 0, shown.output
    assert shown.output.startswith(f"# {file}, and the environment\n")
    assert "MIRROR_USERS=credentials_htpasswd\n" in shown.output
    assert "MIRROR_PROXIES=3\n" in shown.output, "the environment goes before"
    assert "# docker.io: https://hub.example\n" in shown.output
    assert "wonderland" not in shown.output
    assert Path.cwd() == before


def test_a_path_of_the_environment_starts_where_the_owner_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = service(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("own.toml").write_text('["docker.io"]\nendpoints = ["https://own.example"]\n')
    shown = run_cli("settings", env_file=file, MIRROR_REGISTRIES="own.toml")
    assert "# docker.io: https://own.example\n" in shown.output


def test_a_missing_credential_is_told_by_its_name(tmp_path: Path) -> None:
    file = service(tmp_path)
    (tmp_path / "credentials/hub").unlink()
    shown = run_cli("settings", env_file=file)
    assert shown.exit_code == 1
    assert "password_file: credentials_hub: No such file" in shown.output


def test_the_usual_file_is_read_by_who_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "ENV_FILE", str(service(tmp_path)))
    assert "MIRROR_PROXIES=2\n" in run_cli("settings", env_file=None).output
    monkeypatch.setattr(keeping, "ENV_FILE", str(tmp_path / "none"))
    assert "MIRROR_PROXIES=1\n" in run_cli("settings", env_file=None).output


def test_who_may_not_read_the_usual_file_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "ENV_FILE", str(service(tmp_path)))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    shown = run_cli("settings", env_file=None)
    assert (shown.exit_code, "MIRROR_PROXIES=1\n" in shown.stdout) == (0, True)
    assert "is not yours to read" in shown.stderr
    assert "is for root's eyes" in run_cli("cache", "list", env_file=None).output


def test_a_file_of_settings_that_is_named_and_not_there_is_told(tmp_path: Path) -> None:
    assert run_cli("settings", env_file=tmp_path / "none").exit_code == 2
    shown = run_cli("settings", env_file=env_file(tmp_path, "MIRROR_LOGON=on"))
    assert (shown.exit_code, "did you mean MIRROR_LOGIN?" in shown.output) == (1, True)


def test_the_example_of_a_registries_file_can_be_read(tmp_path: Path) -> None:
    text = (ROOT / "systemd/registries.toml.example").read_text()
    settings = re.sub(r"^#(\[|\w+ = )", r"\1", text, flags=re.M)
    file, authorities, credential = (tmp_path / name for name in ("registries.toml", "ca.pem", "credentials_hub"))
    trustme.CA().cert_pem.write_to_path(authorities)
    credential.write_text("secret")
    file.write_text(settings.replace("/etc/ssl/private-ca.pem", str(authorities)))
    registries = load_registries(Config(registries=str(file), credentials=str(tmp_path)))
    assert registries["docker.io"].password == "secret"
    assert registries["registry.example"].alias == "team"
    assert "quay.io" not in registries
    assert tomllib.loads(text) == {}


def test_the_owner_sees_the_settings_in_force(tmp_path: Path) -> None:
    file = tmp_path / "registries.toml"
    file.write_text('["docker.io"]\nendpoints = ["https://hub.example"]\n')
    shown = run_cli("settings", MIRROR_REGISTRIES=str(file), MIRROR_LOGIN="off")
    assert shown.exit_code == 0
    assert "MIRROR_LOGIN=off\n" in shown.output
    assert "MIRROR_PUBLIC_URL=\n" in shown.output
    assert "# docker.io: https://hub.example\n" in shown.output


def test_no_password_is_shown() -> None:
    proxy = "http://alice:wonderland@proxy.example:3128"
    assert "wonderland" not in run_cli("settings", HTTPS_PROXY=proxy).output
    store = "redis://:wonder@land@h"
    assert "land" not in run_cli("settings", MIRROR_PULL_RATE_STORE=store, MIRROR_PULL_RATE="1/h").output
    assert "wonderland" not in repr(Config.from_environ({"HTTPS_PROXY": proxy}))


def test_the_owner_is_told_of_a_wrong_setting() -> None:
    shown = run_cli("settings", MIRROR_PROXIES="x")
    assert (shown.exit_code, shown.output) == (1, "Error: MIRROR_PROXIES: 'x' is not a whole number\n")


def test_the_owners_command_prints_readmes_table() -> None:
    assert run_cli("settings", "--markdown").output == "\n".join(cli.settings_table()) + "\n"


def run_cli(*arguments: str, env_file: Path | None = Path(os.devnull), **environ: str) -> click.testing.Result:
    others: dict[str, str | None] = {name: None for name in os.environ if name.startswith("MIRROR_")}
    options = [] if env_file is None else ["--env-file", str(env_file)]
    return click.testing.CliRunner().invoke(cli.main, [*options, *arguments], env={**others, **environ})


def test_the_versions_agree() -> None:
    version = run_cli("--version").output.split()[-1]
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
