"""Calls to storage: what is tried again, what is not, and the words of what ends them."""

import errno
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp.http_exceptions import BadStatusLine, ContentLengthError
from botocore.exceptions import ClientError, FlexibleChecksumError, NoCredentialsError
from s3fs.errors import translate_boto_error

from imagen_core.far import StorageError, call, create
from imagen_core.far.meaning import meaning

PLACE = "s3://bucket/run/a"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagen_core.far.calls.LONGEST_PAUSE_S", 0.001)


@pytest.fixture
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagen_core.far.calls.PATIENCE_S", 0.05)


def s3_error(status: int, code: str = "", **more: str) -> Exception:
    """What s3fs raises for an answer of the server."""
    answer: Any = {"Error": {"Code": code or str(status), "Message": "said"} | more}
    return translate_boto_error(ClientError(answer | {"ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject"))


def http_error(status: int) -> Exception:
    """What fsspec raises for a URL that a server answers with an error."""
    asked: Any = None
    error = FileNotFoundError("http://h/a")
    error.__cause__ = aiohttp.ClientResponseError(asked, (), status=status)
    return error


def hub_error(status: int) -> Exception:
    """What the driver of the Hugging Face hub raises."""
    error = OSError(f"{status} Client Error")
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


MEANINGS: list[tuple[Callable[[], Exception], str]] = [
    (lambda: s3_error(403), "refused"),
    (lambda: s3_error(403, "AccessDenied"), "refused"),
    (lambda: s3_error(400, "ExpiredToken"), "refused"),
    (lambda: s3_error(400, "AuthorizationHeaderMalformed"), "refused"),
    (lambda: s3_error(301, "PermanentRedirect"), "refused"),
    (lambda: s3_error(404, "NoSuchKey"), "missing"),
    (lambda: s3_error(404), "missing"),
    (lambda: s3_error(404, "NoSuchBucket"), "no bucket"),
    (lambda: s3_error(404, "NoSuchUpload"), "passing"),
    (lambda: s3_error(412, "PreconditionFailed", Condition="If-None-Match"), "exists"),
    (lambda: s3_error(412, "PreconditionFailed"), "exists"),
    (lambda: s3_error(409, "ConditionalRequestConflict"), "passing"),
    (lambda: s3_error(400, "RequestTimeout"), "passing"),
    (lambda: s3_error(400, "BadDigest"), "passing"),
    (lambda: s3_error(429), "passing"),
    (lambda: s3_error(500, "InternalError"), "passing"),
    (lambda: s3_error(503, "SlowDown"), "passing"),
    (lambda: s3_error(501, "NotImplemented"), "refused"),
    (lambda: http_error(404), "missing"),
    (lambda: http_error(410), "missing"),
    (lambda: http_error(403), "refused"),
    (lambda: http_error(502), "passing"),
    (lambda: hub_error(404), "missing"),
    (lambda: hub_error(401), "refused"),
    (lambda: hub_error(503), "passing"),
    (lambda: caused(FileNotFoundError("u"), aiohttp.ClientConnectionError("no route")), "passing"),
    (lambda: caused(aiohttp.ClientPayloadError("half"), ContentLengthError("400 of 800 bytes")), "passing"),
    (lambda: caused(http_error(400), BadStatusLine("no HTTP")), "passing"),
    (lambda: FlexibleChecksumError(error_msg="other"), "damaged"),
    (TimeoutError, "passing"),
    (ConnectionResetError, "passing"),
    (NoCredentialsError, "refused"),
    (lambda: PermissionError("no"), "refused"),
    (lambda: ImportError("no s3fs"), "refused"),
    (lambda: FileNotFoundError("a"), "missing"),
    (lambda: caused(FileNotFoundError("a"), KeyError("a")), "missing"),
    (lambda: OSError(errno.ENOSPC, "full"), "machine"),
    (MemoryError, "machine"),
]


@pytest.mark.parametrize(("make", "expected"), MEANINGS)
def test_the_answer_of_the_server_decides_what_an_error_means(make: Callable[[], Exception], expected: str) -> None:
    assert meaning(make()) == expected


class Failing:
    """Raises the errors one after the other, then returns."""

    def __init__(self, *errors: Exception):
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def test_what_may_pass_is_tried_again_and_what_does_not_is_not() -> None:
    passing = Failing(s3_error(503), TimeoutError(), aiohttp.ClientPayloadError("half"))
    assert call(PLACE, "read", passing) == "done"
    assert passing.calls == 4
    refused = Failing(s3_error(403, "AccessDenied"))
    words = rf"{PLACE}: cannot be read: PermissionError: said; check that the address is right, and that the .*creden"
    with pytest.raises(StorageError, match=words) as caught:
        call(PLACE, "read", refused)
    assert (refused.calls, caught.value.passes) == (1, False)


def test_what_ends_a_call_before_a_try_is_told_as_it_is() -> None:
    function, asked = Failing(s3_error(503), s3_error(503)), []

    def before() -> None:
        asked.append(function.calls)
        if function.calls == 2:
            raise TimeoutError("no longer this run's")  # by itself it would pass

    with pytest.raises(TimeoutError, match="no longer this run's"):
        call(PLACE, "written", function, before)
    assert asked == [0, 1, 2]


@pytest.mark.usefixtures("little_patience")
def test_patience_ends_with_an_error_that_says_that_it_may_pass_and_how_often_was_tried() -> None:
    down = Failing(*(s3_error(503, "SlowDown") for _ in range(10_000)))
    with pytest.raises(
        StorageError, match=r"OSError: .*said, also after \d+ tries in 0\.05 s; check the add"
    ) as caught:
        call(PLACE, "listed", down)
    assert caught.value.passes
    assert f"after {down.calls} tries" in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.passes) == (str(caught.value), True)


def test_damaged_bytes_are_asked_for_again_and_are_damage_if_they_stay() -> None:
    on_the_way = Failing(FlexibleChecksumError(error_msg="other"))
    assert call(PLACE, "read", on_the_way) == "done"
    stored = Failing(*(FlexibleChecksumError(error_msg="other") for _ in range(10)))
    words = (
        rf"{PLACE}: cannot be read: its bytes do not fit their checksum, also after 3 tries .*; restore it from a copy"
    )
    with pytest.raises(StorageError, match=words) as caught:
        call(PLACE, "read", stored)
    assert (stored.calls, caught.value.damaged, caught.value.passes) == (3, True, False)


def test_a_missing_bucket_is_told_from_a_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match=rf"{PLACE} does not exist"):
        call(PLACE, "read", Failing(s3_error(404, "NoSuchKey")))
    for done in ("read", "written", "listed"):
        with pytest.raises(StorageError, match=rf"cannot be {done}: the bucket s3://bucket does not exist; check its"):
            call(PLACE, done, Failing(s3_error(404, "NoSuchBucket")))
    with pytest.raises(StorageError, match="cannot be written: FileNotFoundError"):
        call(PLACE, "written", Failing(FileNotFoundError("no such container")))


def test_a_full_disk_of_this_machine_is_no_fault_of_the_storage() -> None:
    full = Failing(OSError(errno.ENOSPC, "no space"))
    with pytest.raises(OSError, match="no space") as caught:
        call(PLACE, "read", full)
    assert (caught.value.errno, full.calls) == (errno.ENOSPC, 1)


def test_no_credential_is_in_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-word")
    error = PermissionError("signed with hidden-word at https://me:password@host/a?X-Amz-Signature=abc")
    with pytest.raises(StorageError) as caught:
        call("s3://me:password@bucket/a", "read", Failing(error))
    assert "s3://...@bucket/a: cannot be read: PermissionError: signed with <AWS_SECRET_ACCESS_KEY>" in str(
        caught.value
    )
    assert not any(word in str(caught.value) for word in ("hidden-word", "password", "abc"))


class Bucket:
    """A file system whose first writes are carried out and answered with an error."""

    def __init__(self, late: int):
        self.late, self.files = late, dict[str, bytes]()

    def pipe_file(self, path: str, data: bytes, mode: str) -> None:
        assert mode == "create"
        if path in self.files:
            raise s3_error(412, "PreconditionFailed")
        self.files[path] = data
        if self.late:
            self.late -= 1
            raise s3_error(500, "InternalError")

    def cat_file(self, path: str) -> bytes:
        return self.files[path]


def test_a_write_that_got_through_and_was_answered_with_an_error_is_read_back() -> None:
    bucket = Bucket(late=1)
    assert create(bucket, "a", PLACE, b"mine")
    assert not create(bucket, "a", PLACE, b"another's")
    assert bucket.files == {"a": b"mine"}
