"""Errors of the store."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

ADVICE = "check the store with `pipeline verify STORE`, then run the pipeline command that made it again"

RESTORE = (
    "restore it from a copy, or move it away and run the pipeline command that made the store again: it makes only "
    "this file again"
)


class StoreError(ValueError):
    """The store on disk does not match its manifest, or is not a store."""


class ManifestError(StoreError):
    """manifest.json or the log of removals does not match its own checksums, or is nothing of the kind.

    `file` is the file, relative to the store.
    """

    def __init__(self, message: str, file: str = "manifest.json") -> None:
        super().__init__(message)
        self.file = file


def unreadable(file: str, kind: str, error: Exception) -> StoreError:
    """The error for a file that pyarrow, h5py or safetensors cannot read."""
    return StoreError(f"{file}: not readable as {kind} ({error}); {ADVICE}")


@contextmanager
def reading(file: str, kind: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turns `errors`, which a library raises about a bad file, into a StoreError that names the file.

    Raises:
        OSError: too many files are open, which says nothing about the file.
    """
    try:
        yield
    except StoreError:
        raise
    except errors as error:
        if (number := _too_many_files(error)) is not None:
            raise OSError(number, os.strerror(number), file) from error
        raise unreadable(file, kind, error) from error


def _too_many_files(error: Exception) -> int | None:
    """EMFILE or ENFILE, if that is what an error is; some libraries say so only in its text."""
    known = {errno.EMFILE, errno.ENFILE}
    if isinstance(error, OSError) and error.errno in known:
        return error.errno
    return next((number for number in sorted(known) if os.strerror(number) in str(error)), None)
