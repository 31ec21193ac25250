"""Calls to storage: tried again while what failed may pass, and then an error with words."""

import logging
from collections.abc import Callable
from typing import TypeVar

from imagen_core.far.meaning import meaning, reason
from imagen_core.far.secrets import without_secrets

log = logging.getLogger(__name__)

R = TypeVar("R")

PATIENCE_S = 300.0
"""So long a call is tried again: most outages are shorter."""
LONGEST_PAUSE_S = 20.0
_QUIET_TRIES = 5
_LOCAL = ("file", "local", "memory")


class StorageError(Exception):
    """A call to storage failed for good; the message names the file and what to do.

    It is no OSError: a library that reads a file calls every OSError damage of that file.

    Attributes:
        passes: the same call may succeed later, without anybody mending anything.
    """

    def __init__(self, message: str, *, passes: bool = False) -> None:  # the default is for pickle
        super().__init__(message)
        self.passes = passes


class IncompleteError(Exception):
    """Fewer bytes came than there are. Another try may bring them all."""


def is_far(url: str) -> bool:
    """Whether it is a URL of another machine."""
    protocol, separator, _ = url.partition("://")
    return bool(separator) and protocol not in _LOCAL


def call(place: str, done: str, function: Callable[[], R]) -> R:
    """The result of a call to storage, which is repeated with growing pauses while its error may pass.

    Args:
        place: the URL that it is about, for messages.
        done: what it does, for messages: `read`, `written`, `listed`, `deleted`.
    Raises:
        FileNotFoundError: there is no such file.
        FileExistsError: it was to be created, and exists: maybe by an earlier try whose answer was lost.
        StorageError: the storage refuses, or could not be reached for five minutes.
        OSError, MemoryError: this machine has no room.
    """
    from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential_jitter

    tries = 0

    def warn(state: RetryCallState) -> None:
        nonlocal tries
        tries = state.attempt_number
        if tries == _QUIET_TRIES and state.outcome is not None:
            error = state.outcome.exception()
            what = _words(error) if error else ""
            log.warning("%s: not %s: %s; trying again for %g s", without_secrets(place), done, what, PATIENCE_S)

    retrying = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, Exception) and _passes(error)),
        stop=stop_after_delay(PATIENCE_S),
        wait=wait_exponential_jitter(initial=0.1, max=LONGEST_PAUSE_S, jitter=min(1.0, LONGEST_PAUSE_S)),
        before_sleep=warn,
        reraise=True,
    )
    try:
        return retrying(function)
    except StorageError:
        raise
    except Exception as error:
        raise _translated(error, without_secrets(place), done, tries) from error


def _passes(error: Exception) -> bool:
    return not isinstance(error, StorageError) and meaning(error) == "passing"


def _translated(error: Exception, place: str, done: str, tries: int) -> Exception:
    found = meaning(error)
    if found == "machine":
        return error
    if found == "exists":
        return FileExistsError(f"{place} exists")
    if found == "missing" and done != "written":
        return FileNotFoundError(f"{place} does not exist")
    if found == "no bucket":
        bucket = "/".join(place.split("/")[:3])
        return StorageError(
            f"{place}: cannot be {done}: the bucket {bucket} does not exist; check its name, or create it"
        )
    if found in ("refused", "missing"):
        return StorageError(
            f"{place}: cannot be {done}: {_words(error)}; check that the address is right, and that the environment's "
            "credentials allow this"
        )
    return StorageError(
        f"{place}: cannot be {done}: {_words(error)}, also after {tries + 1} tries in {PATIENCE_S:g} s; check the "
        "address and the network, and run the same command again when it can be reached",
        passes=True,
    )


def _words(error: BaseException) -> str:
    """Class and first line of the error that says most, without credentials."""
    cause = reason(error)
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {without_secrets(lines[0])}" if lines else type(cause).__name__
