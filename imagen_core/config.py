"""Base of the library's configuration models."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Config(BaseModel):
    """Frozen, without unknown keys; the docstring under a field is its description in the JSON schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


def default_field(default: Any, **constraints: Any) -> Any:
    """A field that is recorded only where it differs from its default: records from before it existed agree."""
    return Field(default=default, exclude_if=lambda value: value == default, **constraints)


def in_one_line(error: Exception) -> str:
    """A validation error's first finding, with its place and value; of another error its first line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place, words = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        if first["type"] not in ("value_error", "missing"):
            words += f" (got {repr(first['input'])[:80]})"
        return f"{place}: {words}" if place else words
    if isinstance(error, KeyError):
        return f"{error.args[0]!r} is missing"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
