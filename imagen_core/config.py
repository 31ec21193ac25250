"""Base of the library's configuration models."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Frozen, without unknown keys; the docstring under a field is its description in the JSON schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)
