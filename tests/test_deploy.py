"""deploy.sh: help, refusals, and what it says where a part of the host is missing."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def deploy(*arguments: str, script: Path = ROOT / "deploy.sh", **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(script), *arguments],
        env={**os.environ, **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_the_commands(arguments: list[str]) -> None:
    shown = deploy(*arguments)
    assert shown.returncode == 0
    assert "run [GUNICORN OPTIONS]" in shown.stdout
    assert "test [PYTEST OPTIONS]" in shown.stdout


@pytest.mark.parametrize("argument", ["--unknown", "install-it", "-x"])
def test_an_unknown_command_or_option_is_refused_by_name(argument: str) -> None:
    shown = deploy(argument)
    assert shown.returncode == 2
    assert f"unknown command or option: {argument}" in shown.stderr


@pytest.fixture
def bare_host(tmp_path: Path) -> Path:
    """Return a folder with a copy of the script and, on its PATH, only the tools that every host has."""
    shutil.copy(ROOT / "deploy.sh", tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "cat", "dirname", "env"):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    stand_in(tools / "id", "echo 1000")
    return tmp_path


def stand_in(path: Path, text: str) -> None:
    """Write a program that stands for what another host has: no second machine is at hand here."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def run_bare(host: Path) -> subprocess.CompletedProcess[str]:
    return deploy("run", script=host / "deploy.sh", PATH=str(host / "bin"))


def test_without_python_an_ordinary_user_is_told_the_one_command(bare_host: Path) -> None:
    shown = run_bare(bare_host)
    assert shown.returncode == 1
    assert "sudo apt-get install --yes --no-install-recommends python3 python3-venv" in shown.stderr


def test_without_venv_an_ordinary_user_is_told_the_one_command(bare_host: Path) -> None:
    stand_in(bare_host / "bin/python3", 'case "$2" in *ensurepip*) exit 1 ;; esac')
    shown = run_bare(bare_host)
    assert shown.returncode == 1
    assert "run this once: sudo apt-get install --yes --no-install-recommends python3-venv" in shown.stderr


def test_an_old_python_is_told_by_its_version(bare_host: Path) -> None:
    stand_in(bare_host / "bin/python3", 'case "$1" in --version) echo Python 3.9.2 ;; *) exit 1 ;; esac')
    shown = run_bare(bare_host)
    assert (shown.returncode, shown.stderr) == (1, "deploy.sh: Python 3.11 or newer is needed, this is Python 3.9.2\n")


def test_root_without_apt_is_told_what_to_install(bare_host: Path) -> None:
    stand_in(bare_host / "bin/id", "echo 0")
    shown = run_bare(bare_host)
    assert shown.returncode == 1
    assert "this host has no apt-get" in shown.stderr


def test_root_gets_the_missing_venv_installed(bare_host: Path) -> None:
    stand_in(bare_host / "bin/id", "echo 0")
    stand_in(bare_host / "bin/apt-get", f'echo "$@" >>{bare_host}/asked')
    stand_in(bare_host / "bin/python3", 'case "$2" in *ensurepip*) exit 1 ;; esac')
    shown = run_bare(bare_host)
    assert "install --yes --no-install-recommends python3-venv" in (bare_host / "asked").read_text()
    assert "it still has no venv module" in shown.stderr, "the stand-in installs nothing"
