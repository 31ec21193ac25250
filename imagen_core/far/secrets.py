"""Keeps credentials out of messages, logs and files."""

import os
import re

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


def without_secrets(text: str) -> str:
    """The text without users, passwords, signatures and tokens in URLs, and without the values of environment
    variables that are named like secrets."""
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search("KEY|SECRET|TOKEN|PASSWORD", name):
            text = text.replace(value, f"<{name}>")
    return _SIGNED.sub(r"\1...", without_logins(text, _SHOWN_URL)) if ":/" in text else text


def is_signed(text: str) -> bool:
    """Whether a URL in the text holds a signature or a token."""
    return _SIGNED.search(text) is not None


def without_logins(text: str, start: re.Pattern[str] = _URL) -> str:
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
