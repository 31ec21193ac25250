"""The storage behind a path or URL."""

import os
from pathlib import Path

from pipeline.storage.base import Storage
from pipeline.storage.credentials import check_no_credentials
from pipeline.storage.local import LocalStorage
from pipeline.storage.objects import ObjectStorage


def open_storage(place: str | os.PathLike[str]) -> Storage:
    """The storage behind a path or URL.

    Raises:
        ConfigError: the URL holds a user or password, or its protocol is unknown or needs a package.
    """
    text = os.fspath(place)
    if "://" not in text:
        return LocalStorage(Path(text))
    check_no_credentials(text, "--out")
    protocol, _, rest = text.partition("://")
    if protocol in ("file", "local"):
        return LocalStorage(Path(rest))
    return ObjectStorage(text)
