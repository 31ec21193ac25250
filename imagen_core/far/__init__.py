"""Files on other machines: every call to an object store or a server of files goes through here.

One place for retries, for what an error means, for words and for keeping credentials out of them. The engine, the
sources and the store's readers use it; it knows none of them.
"""

from imagen_core.far.calls import StorageError, call, is_far
from imagen_core.far.files import FarFile, create, download, open_filesystem, read_file
from imagen_core.far.secrets import is_signed, without_logins, without_secrets

__all__ = [
    "FarFile",
    "StorageError",
    "call",
    "create",
    "download",
    "is_far",
    "is_signed",
    "open_filesystem",
    "read_file",
    "without_logins",
    "without_secrets",
]
