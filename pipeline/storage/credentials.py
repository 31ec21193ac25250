"""Keeps credentials out of files, logs and messages."""

import os
import re

from pipeline.errors import ConfigError


def check_no_credentials(url: str, field: str) -> None:
    """Refuses a URL with a user or password: it would be written into files and logs.

    Raises:
        ConfigError: it has one.
    """
    if re.match(r"[^:/]+://[^/@]*@", url):
        raise ConfigError(
            f"{field}: {re.sub(r'//[^/@]*@', '//...@', url)}: holds a user or password; take it out and give it by "
            "the environment (for s3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role)"
        )


def without_secrets(text: str) -> str:
    """The text with the values of variables that are named like secrets blacked out."""
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search("KEY|SECRET|TOKEN|PASSWORD", name):
            text = text.replace(value, f"<{name}>")
    return text
