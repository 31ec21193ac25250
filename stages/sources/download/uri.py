"""URLs as people and browsers write them, in the form in which a server is asked (RFC 3987 to RFC 3986)."""

import re
from urllib.parse import quote, urlsplit

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
HAS_LOGIN = "it holds a user or password, which is sent to nobody"
_SAFE = "!#$%&'()*+,-./:;=?@[\\]^_|~"
"""What stays as it is: all that has a meaning in a URL, and `%`, so that what is encoded is not encoded again."""


def to_uri(url: str) -> str:
    """The URL in ASCII: letters beyond it and spaces in UTF-8, percent-encoded; the host's name as IDNA has it.

    What is percent-encoded already stays as it is, and so does the rest. Spaces around the URL are left out.

    Raises:
        ValueError: it is no http or https URL, has control characters or bytes that are not UTF-8, a user or password,
            or a host that cannot be.
    """
    url = url.strip()
    if _CONTROL.search(url):
        raise ValueError("control characters, or bytes that are not UTF-8")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError("only http and https URLs are fetched")
    if not parts.netloc:
        raise ValueError("no host given")
    if "@" in parts.netloc:
        raise ValueError(HAS_LOGIN)
    scheme, _, rest = url.partition("://")
    after = rest[len(parts.netloc) :]
    return f"{scheme}://{_ascii_host(parts.netloc)}{quote(after, safe=_SAFE)}"


def _ascii_host(place: str) -> str:
    """Host and port with the host's name in ASCII; the labels that are ASCII stay as they are.

    Raises:
        ValueError: a label cannot be part of a host's name.
    """
    if place.isascii():
        return place
    import idna

    name, colon, port = place.partition(":")
    labels = idna.uts46_remap(name, std3_rules=False).split(".")
    return ".".join(label if label.isascii() else idna.alabel(label).decode() for label in labels) + colon + port
