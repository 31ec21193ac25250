"""Where a run's files lie: a local folder, or an object store such as `s3://` or `gs://`."""

import os
from pathlib import Path

from pipeline.credentials import check_no_credentials
from pipeline.storage.base import Chores, Storage
from pipeline.storage.local import LocalStorage
from pipeline.storage.objects import ObjectStorage

__all__ = ["Chores", "LocalStorage", "ObjectStorage", "Storage", "open_storage"]


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
