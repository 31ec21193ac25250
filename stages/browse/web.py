"""What all pages share: templates, and parts of a page that may fail alone."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined

from imagen_core.far import without_secrets
from pipeline.engine.lines import duration
from pipeline.errors import first_line
from pipeline.units import human_bytes, human_seconds

if TYPE_CHECKING:  # `pipeline report` uses these templates without the packages of the server
    from starlette.requests import Request
    from starlette.responses import Response

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Part(Generic[T]):
    """A part of a page: its content, or the one line that is shown in its place."""

    value: T | None
    error: str | None = None

    def get(self) -> T:
        """The content.

        Raises:
            ValueError: there is none; its text is the line.
        """
        if self.value is None:
            raise ValueError(self.error)
        return self.value


def part(make: Callable[[], T]) -> Part[T]:
    """What `make` returns. Whatever goes wrong (a truncated file, a run that is being compacted) is shown in the place
    of this part, and the rest of the page stays."""
    try:
        return Part(make())
    except Exception as error:  # noqa: BLE001 - all of it is shown
        _log.debug("part of a page", exc_info=True)
        return Part(None, error_line(error))


def error_line(error: BaseException) -> str:
    """One line about an error, for a page."""
    line = without_secrets(first_line(error))
    return line if isinstance(error, OSError | ValueError | RuntimeError) else _with_class(error, line)


def render(request: "Request", template: str, *, status: int = 200, **context: Any) -> "Response":
    """A page from `templates/`; values are escaped. Templates also see `request`, and `places` for the navigation."""
    from starlette.responses import HTMLResponse

    text = templates().get_template(template).render(request=request, places=request.app.state.places, **context)
    return HTMLResponse(text, status)


@cache
def templates() -> Environment:
    """The templates, escaping everything: what data holds is text."""
    loader = PackageLoader("stages.browse", "templates")
    found = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.filters.update(human_bytes=human_bytes, human_seconds=human_seconds, number=_number, pretty_json=_pretty)
    found.filters.update(duration=duration, unix_time=_unix_time)
    return found


def _number(value: float) -> str:
    """1,234 or 1.234e-05."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _unix_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _pretty(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, default=str)


def _with_class(error: BaseException, line: str) -> str:
    name = type(error).__name__
    return line if name.endswith("Error") and " " in line and not isinstance(error, KeyError) else f"{name}: {line}"
