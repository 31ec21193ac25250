"""What an error of a storage driver means. Each driver has classes of its own, and fsspec hides some of them."""

import errno
from collections.abc import Iterator
from typing import Any, Literal

Meaning = Literal["missing", "exists", "no bucket", "refused", "machine", "damaged", "passing"]
"""missing: no such file. exists: it was to be created, and is there. machine: a disk or a limit of this machine, no
fault of the storage. damaged: other bytes came than the storage has a checksum of. passing: another try may do."""

_HALF_ANSWERS = "aiohttp.http_exceptions"
"""Errors about answers that were no whole HTTP; their code of 400 is not one that a server sent."""
_MACHINE = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE))
_LASTING = (
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
    NotImplementedError,
    TypeError,
    ValueError,
)
_PASSING_STATUS = frozenset((408, 409, 423, 425, 429))
_MISSING_STATUS = frozenset((404, 410))
_PASSING_CODES = frozenset(
    (
        "BadDigest",
        "IncompleteBody",
        "InternalError",
        "NoSuchUpload",
        "RequestTimeout",
        "SlowDown",
        "XAmzContentSHA256Mismatch",
    )
)
"""Answers of S3 whose status is not one of those: of a request that was damaged on its way, or came too late."""


def meaning(error: Exception) -> Meaning:
    """What an error of a driver means; what is not known may pass."""
    chain = list(_chain(error))
    if any(type(each).__module__ == _HALF_ANSWERS for each in chain):
        return "passing"
    answers = [answer for answer in map(_answer, chain) if answer != (None, "")]
    status, code = answers[-1] if answers else (None, "")
    if code == "NoSuchBucket":
        return "no bucket"
    if isinstance(error, FileExistsError) or code == "PreconditionFailed" or status == 412:
        return "exists"
    if status in _MISSING_STATUS and code not in _PASSING_CODES:
        return "missing"
    if status is not None or code:
        passes = code in _PASSING_CODES or status in _PASSING_STATUS or ((status or 0) >= 500 and status != 501)
        return "passing" if passes else "refused"
    cause = reason(error)
    if isinstance(cause, FileNotFoundError):
        return "missing"
    if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in _MACHINE):
        return "machine"
    if "ChecksumError" in type(cause).__name__:
        return "damaged"
    lasting = isinstance(cause, _LASTING) or "redential" in type(cause).__name__
    return "refused" if lasting else "passing"


def reason(error: BaseException) -> BaseException:
    """The error that says most: drivers of fsspec raise FileNotFoundError because of whatever they met.

    A name that is not in a table of theirs (KeyError), as of files in memory or in an archive, is no reason.
    """
    while isinstance(error, FileNotFoundError):
        cause = error.__cause__
        if cause is None or isinstance(cause, LookupError):
            break
        error = cause
    return error


def _chain(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _answer(error: BaseException) -> tuple[int | None, str]:
    """HTTP status and code of the server's answer, as the drivers of S3, Google, Azure, HTTP and the
    Hugging Face hub keep them."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = str(response.get("Error", {}).get("Code", ""))
        return status if isinstance(status, int) else _number(code), "" if code.isdigit() else code
    for holder in (error, response):  # that of httpx, which the Hugging Face hub's driver uses, is on the response
        for name in ("status", "status_code", "code"):
            if (status := _number(getattr(holder, name, None))) is not None:
                return status, ""
    return None, ""


def _number(value: object) -> int | None:
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    return int(text) if text.isdigit() and 400 <= int(text) < 600 else None
