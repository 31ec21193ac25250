"""Keeps credentials out of files, logs and messages."""

import os
import re

from pipeline.errors import ConfigError

_URL = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]*)://")
_SHOWN_URL = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]+):/{1,2}")
"""In messages: a path library makes one `/` of two."""
_END = re.compile(r"[\s\"'<>]|::(?=[A-Za-z][A-Za-z0-9+.-]*(?:://|::|$))")
"""What ends a URL in a text: a space, a quote, or the next URL of a chain, which fsspec writes with `::`."""
_WITHOUT_PORTS = frozenset(("s3", "s3a", "s3n", "gs", "gcs", "hf", "oss", "oci", "memory", "file", "local"))
_NAME_BEFORE_HOST = frozenset(("abfs", "abfss", "wasb", "wasbs", "az", "adl"))
"""Protocols whose URLs are CONTAINER@ACCOUNT."""
_ARCHIVES = frozenset(("zip", "tar", "libarchive"))
"""Protocols whose URLs are names within the file that the next URL of the chain is."""
_CODE = frozenset(("github", "git"))
"""Protocols whose URLs are OWNER:REPOSITORY@REVISION or FOLDER:NAME@REVISION."""
_SIGNED = re.compile(
    r"([?&;#](?:[\w.%-]*(?:signature|credential|token|secret|password|passwd|authorization|api[-_]?key"
    r"|access[-_]?key(?:[-_]?id)?)|sig|pwd|auth|jwt|key-pair-id)=)(?!\.\.\.)[^&;#\s\"'<>]+",
    re.IGNORECASE,
)
"""Parameters of signed URLs: S3, CloudFront, Google (`X-...-Signature`), Azure (`sig`), and tokens of all kinds."""


def check_no_credentials(text: str, field: str) -> None:
    """Refuses a text with a URL, or a chain of them, that holds credentials: it would be written into files and logs.

    Raises:
        ConfigError: a URL in it has a user or password, or is signed.
    """
    plain = _without_logins(text)
    if plain != text:
        raise ConfigError(
            f"{field}: {without_secrets(plain)}: holds a user or password; remove it and set it in the environment "
            "(for s3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role; for the head of a Ray "
            "cluster: RAY_AUTH_TOKEN_PATH or RAY_JOB_HEADERS)"
        )
    if _SIGNED.search(text):
        raise ConfigError(
            f"{field}: {without_secrets(text)}: holds a signature or a token; give the URL without it, with "
            "credentials in the environment, or a copy of the file"
        )


def without_secrets(text: str) -> str:
    """The text without users, passwords, signatures and tokens in URLs, and without the values of environment
    variables that are named like secrets."""
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search("KEY|SECRET|TOKEN|PASSWORD", name):
            text = text.replace(value, f"<{name}>")
    return _SIGNED.sub(r"\1...", _without_logins(text, _SHOWN_URL)) if ":/" in text else text


def _without_logins(text: str, start: re.Pattern[str] = _URL) -> str:
    """The text with `...` in place of each user and password."""
    kept, last = [], 0
    for url in start.finditer(text):
        if url.start() < last:
            continue
        end = _END.search(text, url.end())
        login = _login(url["protocol"].lower(), text[url.end() : end.start() if end else len(text)])
        if login and login != "...":
            kept += text[last : url.end()], "..."
            last = url.end() + len(login)
    return "".join(kept) + text[last:]


def _login(protocol: str, rest: str) -> str:
    """User and password in a URL, of which `rest` is what follows `://`; empty for none.

    Up to the last @ of the authority (RFC 3986): a password may contain an @ itself. A `:` that no port follows begins
    a password too, so the authority goes on to the last @ of all, whatever the password has: `/`, `?` or `#`.
    """
    if protocol in _ARCHIVES:
        return ""
    authority = re.match(r"[^/?#]*", rest)
    assert authority is not None
    login, at, _ = authority[0].rpartition("@")
    if at:
        is_name = protocol in _CODE or (protocol in _NAME_BEFORE_HOST and ":" not in login)
        return "" if is_name else login
    _, colon, port = authority[0].rpartition(":")
    if not colon or port.endswith("]") or (port.isdigit() and protocol not in _WITHOUT_PORTS):
        return ""
    return rest.rpartition("@")[0]
