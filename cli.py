"""The owner's command ``docker-mirror``: a client of the mirror, no part of the application."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

import keeping
from check import IMAGE
from check import Login
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
@click.option(
    "--env-file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, readable=True, path_type=Path),
    help=f"The service's settings; variables of the environment go before them. {keeping.ENV_FILE} if left out, and if "
    "it can be read. Relative paths in it start at its folder.",
)
@click.pass_context
def main(context: click.Context, env_file: Path | None) -> None:
    """Look after a docker-mirror."""
    context.obj = env_file


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
        file, environ = keeping.environment()
        config = Config.from_environ(environ)
        registries = load_registries(config)
        load_users(config)
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    if file:
        click.echo(f"# {file}, and the environment")
    elif keeping.is_hidden():
        click.echo(f"{keeping.ENV_FILE} is not yours to read: these are not the service's settings", err=True)
    for item in fields(Config):
        click.echo(f"{variable(item)}={shown(getattr(config, item.name))}")
    for registry in registries.values():
        click.echo(f"# {registry.name}: {' '.join(registry.endpoints)}")


class InJson(click.Command):
    """Tell of a wrong argument in JSON too, where that is what the command prints."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments."""
        with self._told(ctx, "--json" in args):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Do what is asked."""
        with self._told(ctx, ctx.params["in_json"]):
            return super().invoke(ctx)

    @contextmanager
    def _told(self, ctx: click.Context, in_json: bool) -> Iterator[None]:
        try:
            yield
        except click.UsageError as error:
            if not in_json:
                raise
            click.echo(json.dumps({"ok": False, "error": error.format_message()}, indent=2))
            raise click.exceptions.Exit(error.exit_code) from None


@main.command(cls=InJson)
@click.argument("url")
@click.argument("image", default=IMAGE)
@click.option("--platform", metavar="OS/ARCH", help="Platform of the image; this host's if left out.")
@click.option("--ca", type=click.Path(exists=True, dir_okay=False), help="Authorities to trust besides the system's.")
@click.option("--user", metavar="NAME", help="Log in, as docker does; the password is asked for, or read from stdin.")
@click.option("--json", "in_json", is_flag=True, help="Print one JSON object.")
def check(url: str, image: str, platform: str | None, ca: str | None, user: str | None, in_json: bool) -> None:
    """Pull IMAGE (busybox if left out) through the mirror at URL as dockerd does; say what is wrong and how to mend it.

    Nothing is kept. No proxy is used. The exit status is 1 where something is wrong, and 2 for a wrong argument.
    """
    login = Login(user, read_password()) if user is not None else None
    sys.exit(0 if run(url, image, platform, ca, in_json, login) else 1)


def read_password() -> str:
    """Return a password: from a terminal by a prompt, else the first line of stdin; raise UsageError for none."""
    if sys.stdin.isatty():
        return str(click.prompt("Password", hide_input=True, err=True))
    password = sys.stdin.readline().rstrip("\r\n")
    if not password:
        raise click.UsageError("no password came on stdin")
    return password


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
    yield "# Relative paths start at /etc/docker-mirror. What is named here must be readable for everyone, but for"
    yield "# users and passwords: MIRROR_USERS=credentials_NAME is the file credentials/NAME there, which only root can"
    yield "# read, and so is password_file. The service may write to /var/cache/docker-mirror only."
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
