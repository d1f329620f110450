"""The owner's command ``docker-mirror``: a client of the mirror, no part of the application."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import fields

import click

import keeping
from check import IMAGE
from check import run
from mirror import __version__
from settings import Config
from settings import ConfigError
from settings import Rate
from settings import load_registries
from settings import load_users
from settings import variable


@click.group()
@click.version_option(__version__, prog_name="docker-mirror")
def main() -> None:
    """Look after a docker-mirror."""


main.add_command(keeping.commands)


@main.command()
@click.option("--markdown", is_flag=True, help="Print the table of README: each setting and its default.")
@click.option("--env", is_flag=True, help="Print systemd/docker-mirror.env: each setting and its default, commented.")
def settings(markdown: bool, env: bool) -> None:
    """Print all settings as they are in force here, and check them and the registries file."""
    if markdown or env:
        click.echo("\n".join(settings_table() if markdown else settings_file()))
        return
    try:
        config = Config.from_environ(os.environ)
        registries = load_registries(config)
        load_users(config)
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    for item in fields(Config):
        click.echo(f"{variable(item)}={shown(getattr(config, item.name))}")
    for registry in registries.values():
        click.echo(f"# {registry.name}: {' '.join(registry.endpoints)}")


@main.command()
@click.argument("url")
@click.argument("image", default=IMAGE)
@click.option("--platform", metavar="OS/ARCH", help="Platform of the image; this host's if left out.")
@click.option("--ca", type=click.Path(exists=True, dir_okay=False), help="Authorities to trust besides the system's.")
@click.option("--json", "in_json", is_flag=True, help="Print one JSON object.")
def check(url: str, image: str, platform: str | None, ca: str | None, in_json: bool) -> None:
    """Pull IMAGE (busybox if left out) through the mirror at URL as dockerd does; say what is wrong and how to mend it.

    Nothing is kept. No login and no proxy is used. The exit status is 1 where something is wrong.
    """
    sys.exit(0 if run(url, image, platform, ca, in_json) else 1)


def settings_table() -> Iterator[str]:
    """Yield the lines of README's table of settings."""
    yield "| variable | default | meaning |"
    yield "|---|---|---|"
    for item in fields(Config):
        default = shown(item.default)
        yield f"| `{variable(item)}` | {f'`{default}`' if default else 'unset'} | {item.metadata['help']} |"


def settings_file() -> Iterator[str]:
    """Yield the lines of the file of settings that the service reads, each with its default and commented."""
    yield "# Settings of docker-mirror. Take the # before a variable away to set it, and then run:"
    yield "#     systemctl restart docker-mirror"
    yield "# Relative paths start at /etc/docker-mirror. The service may write to /var/cache/docker-mirror only."
    for item in fields(Config):
        yield ""
        yield from textwrap.wrap(item.metadata["help"], 110, initial_indent="# ", subsequent_indent="# ")
        yield f"#{variable(item)}={shown(item.default)}"


def shown(value: object) -> str:
    """Return a value as its variable would be written, but for a password: empty for unset, on and off for a switch."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple) and not isinstance(value, Rate):
        return ",".join(map(str, value))
    return "" if value is None else re.sub(r"//[^/]*@", "//***@", str(value))


if __name__ == "__main__":
    main(prog_name="docker-mirror")
