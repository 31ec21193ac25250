"""One repository of the Hugging Face hub, and what its errors mean."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, MachineError, PipelineError, UnavailableError, first_line
from stages.hub.package import RepositoryType

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoFile

_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
_PASSING = frozenset((408, 409, 412, 423, 425, 429))
_NAME = re.compile(r"(?:(?P<kind>datasets|models)/)?(?P<name>[\w.-]+/[\w.-]+)", re.ASCII)


def parse_repository(text: str) -> tuple[str, RepositoryType | None]:
    """USER/NAME, and the kind of repository if `datasets/` or `models/` is in front of it.

    Raises:
        ConfigError: it is nothing of the kind.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    found = _NAME.fullmatch(text.removeprefix("hf://"))
    try:
        if found is None:
            raise HFValidationError("it is not of the form USER/NAME")
        validate_repo_id(found["name"])
    except HFValidationError as error:
        raise ConfigError(
            f"REPO {text}: {first_line(error)}; give USER/NAME, or datasets/USER/NAME or models/USER/NAME"
        ) from error
    kinds: dict[str | None, RepositoryType] = {"datasets": "dataset", "models": "model"}
    return found["name"], kinds.get(found["kind"])


@dataclass(frozen=True, slots=True)
class Remote:
    """A repository at a revision; `revision` is a branch, tag or commit."""

    api: "HfApi"
    repo: str
    repo_type: RepositoryType
    revision: str

    @property
    def name(self) -> str:
        """As in addresses of the hub: `datasets/USER/NAME`, or `USER/NAME` of a model."""
        return f"datasets/{self.repo}" if self.repo_type == "dataset" else self.repo

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{self.name}"

    def files(self) -> "dict[str, RepoFile]":
        """All files by name."""
        from huggingface_hub.hf_api import RepoFile

        tree = self.api.list_repo_tree(self.repo, recursive=True, revision=self.revision, repo_type=self.repo_type)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def connect() -> "HfApi":
    """The hub that HF_ENDPOINT names, with the token that HF_TOKEN or a login gives."""
    import sys

    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi(library_name="imagen-precompute")


@contextmanager
def hub_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turns what huggingface_hub raises into errors of one line; none of them repeats a token.

    Raises:
        ConfigError: there is no such repository, revision or file, or the hub finds the request wrong.
        MachineError: the token is missing, or may not do it; or the hub is switched off by HF_HUB_OFFLINE.
        UnavailableError: the hub could not be reached; the same command again goes on.
    """
    from huggingface_hub import errors

    http_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # of httpx or httpx2, by its version
    try:
        yield
    except PipelineError:
        raise
    except errors.OfflineModeIsEnabled as error:
        raise MachineError(f"{repo}: HF_HUB_OFFLINE is set; unset it, and run the same again") from error
    except (http_error, OSError, RuntimeError, ValueError, AttributeError) as error:
        explained = _explained(error, repo, revision, http_error)
        if explained is None:
            raise
        raise explained from error


def _explained(error: Exception, repo: str, revision: str | None, http_error: type[Exception]) -> PipelineError | None:
    """The error to show; None for one of the disk, which the command line explains, or a fault of the code."""
    from huggingface_hub import errors

    chain = list(_chain(error))
    answer = next((each for each in chain if isinstance(each, errors.HfHubHTTPError)), None)
    if answer is not None:
        return _answered(answer, repo, revision)
    unreached = (http_error, ConnectionError, TimeoutError, errors.LocalEntryNotFoundError)
    if any(isinstance(each, unreached) or _is_closed_session(each) for each in chain):
        return UnavailableError(f"{repo}: the hub could not be reached ({first_line(chain[-1])}); run the same again")
    if isinstance(error, OSError | AttributeError):
        return None
    if isinstance(error, ValueError):
        text = " ".join(str(error).split())
        remedy = "give a --license that the hub knows" if "license" in text else "mend that, and run the same again"
        return ConfigError(f"{repo}: the hub does not take it: {text}; {remedy}")
    return MachineError(f"{repo}: {first_line(error)}; run the same again, and with --debug for more")


def _is_closed_session(error: BaseException) -> bool:
    """Whether another thread closed the session of huggingface_hub, as it does when a connection fails."""
    if isinstance(error, AttributeError):
        return error.obj is None and error.name in ("request", "stream")
    return isinstance(error, RuntimeError) and "client has been closed" in str(error)


def _answered(error: "HfHubHTTPError", repo: str, revision: str | None) -> PipelineError:
    from huggingface_hub import errors, get_token

    status = error.response.status_code
    said = " ".join((error.server_message or "").split())
    if token := get_token():
        said = said.replace(token, "<token>")
    said = f" ({said})" if said else ""
    if isinstance(error, errors.GatedRepoError):
        return MachineError(f"{repo}: needs its owner's consent{said}; ask for it on its page, then {_LOGIN}")
    if status == 401:
        why = "the hub wants a token" if token is None else "the hub does not accept the token"
        return MachineError(f"{repo}: {why}{said}, or there is no such repository; check the name, and {_LOGIN}")
    if status in (402, 403):
        return MachineError(f"{repo}: the hub refuses{said}; {_LOGIN} of somebody who may do that")
    if isinstance(error, errors.RevisionNotFoundError):
        return ConfigError(f"--revision {revision}: {repo} has none of this name; give a branch, tag or commit")
    if status == 404:
        return ConfigError(
            f"{repo}: there is no such repository, or this token may not see it; check the name, or {_LOGIN}"
        )
    if status in _PASSING or status >= 500:
        return UnavailableError(f"{repo}: the hub answers {status}{said}; run the same again later")
    return ConfigError(f"{repo}: the hub does not take it, {status}{said}; mend that, and run the same again")


def _chain(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__
