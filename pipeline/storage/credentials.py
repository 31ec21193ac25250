"""Keeps credentials out of files, logs and messages."""

import os
import re

from pipeline.errors import ConfigError

_LOGIN = re.compile(r"([^:/]+://)[^/?#]*@")
"""Everything up to the last @ of the authority (RFC 3986): a password may contain an @ itself."""


def check_no_credentials(url: str, field: str) -> None:
    """Refuses a URL with a user or password: it would be written into files and logs.

    Raises:
        ConfigError: it has one.
    """
    if login := _LOGIN.match(url):
        raise ConfigError(
            f"{field}: {login[1]}...@{url[login.end() :]}: holds a user or password; remove it and set it in the "
            "environment (for s3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role)"
        )


def without_secrets(text: str) -> str:
    """The text without the values of environment variables that are named like secrets."""
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search("KEY|SECRET|TOKEN|PASSWORD", name):
            text = text.replace(value, f"<{name}>")
    return text
