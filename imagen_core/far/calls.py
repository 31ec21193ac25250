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
_TRIES_OF_DAMAGED = 3
"""Bytes that were changed on their way come whole the next time; those that were changed in the storage never do."""
_LOCAL = ("file", "local", "memory")


class StorageError(Exception):
    """A call to storage failed for good; the message names the file and what to do.

    It is no OSError: a library that reads a file calls every OSError damage of that file.

    Attributes:
        passes: the same call may succeed later, without anybody mending anything.
        damaged: the file is there, but its bytes do not fit their checksum.
    """

    def __init__(self, message: str, *, passes: bool = False, damaged: bool = False) -> None:  # defaults for pickle
        super().__init__(message)
        self.passes, self.damaged = passes, damaged


class IncompleteError(Exception):
    """Fewer bytes came than there are. Another try may bring them all."""


def is_far(url: str) -> bool:
    """Whether it is a URL of another machine."""
    protocol, separator, _ = url.partition("://")
    return bool(separator) and protocol not in _LOCAL


def call(place: str, done: str, function: Callable[[], R], before: Callable[[], None] = lambda: None) -> R:
    """The result of a call to storage, which is repeated with growing pauses while its error may pass.

    Args:
        place: the URL that it is about, for messages.
        done: what it does, for messages: `read`, `written`, `listed`, `deleted`.
        before: called before each try; what it raises ends the call, as it is.
    Raises:
        FileNotFoundError: there is no such file.
        FileExistsError: it was to be created, and exists: maybe by an earlier try whose answer was lost.
        StorageError: the storage refuses, or could not be reached for five minutes.
        OSError, MemoryError: this machine has no room.
    """
    from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential_jitter

    tries = damaged = 0
    ended: Exception | None = None

    def ask(_: RetryCallState) -> None:
        nonlocal ended
        try:
            before()
        except Exception as error:
            ended = error
            raise

    def may_pass(error: BaseException) -> bool:
        nonlocal damaged
        if not isinstance(error, Exception) or isinstance(error, StorageError):
            return False
        found = meaning(error)
        damaged += found == "damaged"
        return found == "passing" or (found == "damaged" and damaged < _TRIES_OF_DAMAGED)

    def warn(state: RetryCallState) -> None:
        nonlocal tries
        tries = state.attempt_number
        if tries == _QUIET_TRIES and state.outcome is not None:
            error = state.outcome.exception()
            what = _words(error) if error else ""
            log.warning("%s: not %s: %s; trying again for %g s", without_secrets(place), done, what, PATIENCE_S)

    retrying = Retrying(
        retry=retry_if_exception(may_pass),
        stop=stop_after_delay(PATIENCE_S),
        wait=wait_exponential_jitter(initial=0.1, max=LONGEST_PAUSE_S, jitter=min(1.0, LONGEST_PAUSE_S)),
        before=ask,
        before_sleep=warn,
        reraise=True,
    )
    try:
        return retrying(function)
    except StorageError:
        raise
    except Exception as error:
        if error is ended:
            raise
        raise _translated(error, without_secrets(place), done, tries) from error


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
    if found == "damaged":
        return StorageError(
            f"{place}: cannot be {done}: its bytes do not fit their checksum, also after {tries + 1} tries "
            f"({_words(error)}); restore it from a copy",
            damaged=True,
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
