"""What errors of huggingface_hub mean."""

import errno

import pytest

from pipeline.errors import ConfigError, MachineError, PipelineError, UnavailableError
from stages.hub.remote import hub_errors


def closed_session() -> Exception:
    """What a thread meets whose session another thread closed."""
    session = None
    try:
        session.request  # pyright: ignore[reportOptionalMemberAccess]  # noqa: B018
    except AttributeError as error:
        return error
    raise AssertionError


def unreachable() -> Exception:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    error = LocalEntryNotFoundError("not in the cache")
    error.__cause__ = HfHubHTTPError.__bases__[0]("no route to the hub")
    return error


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (closed_session(), UnavailableError, "could not be reached"),
        (RuntimeError("Cannot send a request, as the client has been closed."), UnavailableError, "has been closed"),
        (unreachable(), UnavailableError, "no route to the hub"),
        (TimeoutError("too slow"), UnavailableError, "too slow"),
        (ValueError("Invalid metadata in README.md.\n- license must be one of"), ConfigError, "give a --license"),
        (RuntimeError("something else"), MachineError, "something else"),
        (ConfigError("ours"), ConfigError, "ours"),
    ],
)
def test_what_goes_wrong_is_one_line_of_a_known_kind(
    error: Exception, expected: type[PipelineError], words: str
) -> None:
    with pytest.raises(expected) as caught, hub_errors("me/x"):
        raise error
    assert type(caught.value) is expected
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), AttributeError("no such attribute")])
def test_a_full_disk_and_a_fault_of_the_code_are_left_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, hub_errors("me/x"):
        raise error
    assert caught.value is error
    assert caught.value.__cause__ is None
