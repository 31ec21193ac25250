"""Base of the library's configuration models."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Config(BaseModel):
    """Frozen, without unknown keys; the docstring under a field is its description in the JSON schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


def default_field(default: Any, **constraints: Any) -> Any:
    """A field that is recorded only where it differs from its default: records from before it existed agree."""
    return Field(default=default, exclude_if=lambda value: value == default, **constraints)
