"""Settings and the registries file: read once, refused in one line that says what to do, and documented as they are."""

import os
import re
import subprocess
import sys
from pathlib import Path

import click.testing
import pytest
import trustme
from processes import clean_environment

import cli
from settings import Config
from settings import ConfigError
from settings import Registry
from settings import load_registries

ROOT = Path(__file__).resolve().parent.parent


def test_nothing_set_means_the_defaults() -> None:
    config = Config.from_environ({"PATH": "/bin", "MIRROR_REGISTRIES": "", "MIRROR_PROXIES": " "})
    assert config == Config()
    assert (config.proxies, config.login, config.log_level) == (1, True, "info")


def test_each_setting_is_read() -> None:
    environ = {
        "MIRROR_PUBLIC_URL": "https://mirror.example/",
        "MIRROR_PROXIES": "2",
        "MIRROR_LOGIN": "OFF",
        "MIRROR_REGISTRIES": "/etc/registries.toml",
        "MIRROR_CONNECT_TIMEOUT": "1.5",
        "MIRROR_FIRST_BYTE_TIMEOUT": "2",
        "MIRROR_IDLE_TIMEOUT": "3",
        "MIRROR_LOG_LEVEL": "Warning",
    }
    expected = Config("https://mirror.example", 2, False, "/etc/registries.toml", 1.5, 2, 3, "warning")
    assert Config.from_environ(environ) == expected


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("MIRROR_LOGON", "on", "did you mean MIRROR_LOGIN?"),
        ("MIRROR_X", "1", "there are: MIRROR_PUBLIC_URL, "),
        ("MIRROR_PROXIES", "one", "'one' is not a whole number"),
        ("MIRROR_PROXIES", "11", "11 is not between 0 and 10"),
        ("MIRROR_LOGIN", "maybe", "'maybe' is not one of: on, off"),
        ("MIRROR_IDLE_TIMEOUT", "nan", "nan is not between"),
        ("MIRROR_IDLE_TIMEOUT", "0", "0 is not between"),
        ("MIRROR_IDLE_TIMEOUT", "1m", "'1m' is not a number"),
        ("MIRROR_LOG_LEVEL", "loud", "not one of: debug, info, warning, error"),
        ("MIRROR_PUBLIC_URL", "mirror.example", "is not a URL such as https://mirror.example"),
        ("MIRROR_PUBLIC_URL", "https://a:b@mirror.example", "leave them out"),
        ("MIRROR_PUBLIC_URL", "https://mirror.example/?x=1", "leave them out"),
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


def test_a_registry_is_read_from_its_file(tmp_path: Path) -> None:
    trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
    file = tmp_path / "registries.toml"
    file.write_text(
        f'["docker.io"]\nendpoints = ["https://127.0.0.2:5000/"]\nrealms = ["https://127.0.0.3"]\n'
        f'ca_file = "{tmp_path}/ca.pem"\n'
    )
    expected = Registry("docker.io", ("https://127.0.0.2:5000",), ("https://127.0.0.3",), f"{tmp_path}/ca.pem")
    assert load_registries(str(file)) == {"docker.io": expected}


def test_without_a_file_docker_hub_is_served() -> None:
    assert load_registries(None)["docker.io"].endpoints == ("https://registry-1.docker.io",)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('["docker.io"]\nendpoint = ["https://a"]', '["docker.io"] endpoint is no key; did you mean endpoints?'),
        ('["docker.io"]\nrubbish = 1', "rubbish is no key; there are: endpoints, realms, ca_file"),
        ('["docker.io"]\nendpoints = "https://a"', "endpoints: must be a list of URLs"),
        ('["docker.io"]\nendpoints = [1]', "endpoints: must be a list of URLs"),
        ('["docker.io"]\nendpoints = []', "endpoints: must hold one URL"),
        ('["docker.io"]\nendpoints = ["https://a", "https://b"]', "endpoints: must hold one URL"),
        ('["docker.io"]\nendpoints = ["a"]', "endpoints: 'a' is not a URL"),
        ('["docker.io"]\nrealms = ["ftp://a"]', "realms: 'ftp://a' is not a URL"),
        ('["docker.io"]\nca_file = 1', "ca_file: must be the path"),
        ('["docker.io"]\nca_file = "/nowhere/ca.pem"', "ca_file: /nowhere/ca.pem: No such file"),
        ('["docker.io"]\nca_file = "{file}"', "ca_file: "),
        ('["ghcr.io"]\nendpoints = ["https://ghcr.io"]', '["ghcr.io"] is no registry that this version serves'),
        ('"docker.io" = 1', "docker.io must be a table"),
        ("[docker", "registries.toml"),
    ],
)
def test_a_wrong_registries_file_is_told_with_file_table_and_key(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "registries.toml"
    file.write_text(text.replace("{file}", str(file)))
    with pytest.raises(ConfigError) as raised:
        load_registries(str(file))
    assert str(file) in str(raised.value)
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_a_file_that_cannot_be_read_is_told_with_its_variable(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "registries.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^MIRROR_REGISTRIES: "):
        load_registries(str(file))


@pytest.mark.parametrize(
    ("name", "value"), [("MIRROR_PROXIES", "x"), ("MIRROR_REGISTRIES", "/nowhere.toml"), ("MIRROR_NOTHING", "1")]
)
def test_a_wrong_setting_stops_the_start_with_one_line(name: str, value: str) -> None:
    command = [sys.executable, "-m", "gunicorn", "-c", "python:wsgi", "-k", "gevent", "-b", "127.0.0.1:0", "wsgi:app"]
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
        return [[cell.strip() for cell in line.split("|")[1:3]] for line in lines if line.startswith("| `MIRROR_")]

    chinese = (ROOT / "README.zh-CN.md").read_text().replace("未设置", "unset").splitlines()
    assert cells(chinese) == cells(list(cli.settings_table()))


def test_the_owner_sees_the_settings_in_force(tmp_path: Path) -> None:
    file = tmp_path / "registries.toml"
    file.write_text('["docker.io"]\nendpoints = ["https://hub.example"]\n')
    shown = run_cli("settings", MIRROR_REGISTRIES=str(file), MIRROR_LOGIN="off")
    assert shown.exit_code == 0
    assert "MIRROR_LOGIN=off\n" in shown.output
    assert "MIRROR_PUBLIC_URL=\n" in shown.output
    assert "# docker.io: https://hub.example\n" in shown.output


def test_the_owner_is_told_of_a_wrong_setting() -> None:
    shown = run_cli("settings", MIRROR_PROXIES="x")
    assert (shown.exit_code, shown.output) == (1, "Error: MIRROR_PROXIES: 'x' is not a whole number\n")


def test_the_owners_command_prints_readmes_table() -> None:
    assert run_cli("settings", "--markdown").output == "\n".join(cli.settings_table()) + "\n"


def run_cli(*arguments: str, **environ: str) -> click.testing.Result:
    others: dict[str, str | None] = {name: None for name in os.environ if name.startswith("MIRROR_")}
    return click.testing.CliRunner().invoke(cli.main, arguments, env={**others, **environ})


def test_the_versions_agree() -> None:
    version = run_cli("--version").output.split()[-1]
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
