"""Files behind URLs as a source reads them: with patience, and with errors that name `source.path`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import fsspec

from imagen_core.far import FarFile, StorageError, call, is_far, open_filesystem, without_secrets
from imagen_core.far.ranges import RangedFile, has_ranges
from pipeline.errors import ConfigError, MachineError, PipelineError, first_line, storage_error

_REMEDY = "check the address, the network and what this user may read, and run the same command again"


def open_file(path: str) -> BinaryIO:
    """A file, local or behind any fsspec URL, as bytes.

    Raises:
        OSError: a local file cannot be opened; FileNotFoundError: there is none, also behind a URL.
        StorageError: also where the file is read: it cannot be reached, or its server refuses.
    """
    if not is_far(path):
        return cast(BinaryIO, cast(Any, fsspec.open(path, "rb")).open())
    filesystem, plain = call(path, "read", lambda: open_filesystem(path))
    return cast(BinaryIO, FarFile(filesystem, plain, path))


def open_ranged(path: str, planned: tuple[int, int] = (0, 0)) -> BinaryIO:
    """The same for a file of which parts are read: of an object store nothing else comes.

    Args:
        planned: first byte and end of a part that will be read from its beginning to its end.
    """
    if not has_ranges(path):
        return open_file(path)
    filesystem, plain = call(path, "read", lambda: open_filesystem(path))
    return cast(BinaryIO, RangedFile(filesystem, plain, path, planned))


@contextmanager
def reaching(path: str) -> Iterator[None]:
    """What the driver of a run reads of a source.

    Args:
        path: `source.path`.

    Raises:
        ConfigError: a URL leads to nothing.
        MachineError: a server refuses; UnavailableError: it cannot be reached.
    """
    try:
        yield
    except PipelineError:
        raise
    except StorageError as error:
        raise type(storage_error(error))(f"source.path: {error}") from error
    except FileNotFoundError as error:
        if not is_far(path):
            raise
        missing = str(error.args[-1] if error.args else path).removesuffix(" does not exist")
        raise ConfigError(f"source.path: {missing} does not exist; check it") from error
    except Exception as error:
        if not is_far(path):
            raise
        words = f"{path} cannot be read: {type(error).__name__}: {first_line(error)}"
        raise MachineError(f"source.path: {without_secrets(words)}; {_REMEDY}") from error
