"""Quotes values from the user for files in other languages: shell, crontab, systemd, YAML, Python, JSON.

All filters expect text without control characters.
"""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

_ONE_LINE = 1_000_000  # characters


def guarded_command(words: Sequence[str]) -> str:
    """A shell command for files that are read before the shell is: `$` stands where it begins nothing but for a shell.

    Kubernetes expands `$(NAME)` and `$$` in the arguments of containers, which KubeRay makes of an entrypoint; dstack
    `${{ name }}` and `$$` in commands.
    """
    return shlex.join(words).replace("$", "'\\$'")  # shlex puts every $ between single quotes


def container_argument(word: str) -> str:
    """An argument of a container, where Kubernetes takes `$$` for `$` and expands `$(NAME)` (Container v1 core)."""
    return word.replace("$", "$$")


def crontab(command: str) -> str:
    """A shell command on a line of a crontab, where an unescaped % ends it (crontab(5))."""
    return command.replace("%", "\\%")


def systemd_value(text: str) -> str:
    """The value of a systemd setting, where % begins a specifier (systemd.unit(5))."""
    return text.replace("%", "%%")


def systemd_command(words: Sequence[str]) -> str:
    """Arguments for an `Exec` setting that begins with `:`, so that $ has no special meaning (systemd.service(5))."""
    escaped = (systemd_value(word).replace("\\", "\\\\").replace('"', '\\"') for word in words)
    return " ".join(f'"{word}"' for word in escaped)


def yaml_value(text: str) -> str:
    """A text on one line of YAML."""
    return yaml.safe_dump(text, default_style='"', width=_ONE_LINE, allow_unicode=True).rstrip("\n")


def yaml_block(text: str, indent: int) -> str:
    """A text as a YAML block scalar where possible; `indent` is the indentation of its key."""
    block = yaml.safe_dump(text, default_style="|", width=_ONE_LINE, allow_unicode=True)
    return block.rstrip("\n").replace("\n", "\n" + " " * indent)


FILTERS: Mapping[str, Callable[..., Any]] = {
    "sh": shlex.quote,
    "command": shlex.join,
    "guarded_command": guarded_command,
    "container_argument": container_argument,
    "crontab": crontab,
    "systemd_value": systemd_value,
    "systemd_command": systemd_command,
    "yaml": yaml_value,
    "block": yaml_block,
    "python": repr,
    "json": json.dumps,
}
