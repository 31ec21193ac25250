"""Precomputed embeddings, which come with the data."""

import hashlib
from typing import Literal

import numpy as np
from pydantic import Field

from pipeline.config import Config
from pipeline.errors import ConfigError
from stages.sources.arrays.npy import parse
from stages.sources.files import Damaged
from stages.sources.records.far import open_file

KIND = "given"


class PrecomputedEmbeddingsConfig(Config):
    """Uses the arrays that come with the source, instead of running a model."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Names the store's group."""
    kind: Literal["given"] = KIND
    array: str
    """Name of the array in `source.arrays`."""
    model: str
    """The model that made the embeddings, as far as you know, such as `openai/clip-vit-large-patch14`. It is recorded
    in the fingerprint, which trainers compare, and never loaded."""
    revision: str | None = None
    """Commit or version of the model; recorded likewise."""
    dim: int = Field(ge=1)
    """Width of the embeddings; other widths are refused."""
    null: str | None = None
    """Captions only: a .npy of the encoding of the empty caption, (dim,) or (tokens, dim); without it, the store has
    none."""

    def null_embedding(self) -> np.ndarray | None:
        """The encoding of the empty caption, float32 (tokens, dim).

        Raises:
            ConfigError: it cannot be read, or is of another shape.
        """
        if self.null is None:
            return None
        where = f"encoders.{self.name}.null: {self.null}"
        try:
            with open_file(self.null) as file:
                return as_tokens(parse(file.read(), where), self.dim, where)
        except (OSError, ValueError, ImportError, Damaged) as error:
            raise ConfigError(f"{where} cannot be read: {error}; give a .npy file") from error

    def fingerprint(self, array: dict[str, object]) -> dict[str, object]:
        """Everything known about the embeddings; `array` says how they were found."""
        null = self.null_embedding()
        digest = None if null is None else hashlib.sha256(null.tobytes()).hexdigest()
        return {
            "kind": self.kind,
            "model": self.model,
            "revision": self.revision,
            "array": {"name": self.array, **array},
            "null_sha256": digest,
        }


def as_tokens(array: np.ndarray, dim: int, where: str) -> np.ndarray:
    """An array that came with a sample as float32 (tokens, dim); one vector is one token.

    Raises:
        ConfigError: it has another width.
    """
    tokens = array[None] if array.ndim == 1 else array
    if tokens.ndim != 2 or tokens.shape[1] != dim:
        raise ConfigError(f"{where}: shape {array.shape}, which is not ({dim},) or (tokens, {dim}); check the dim")
    with np.errstate(over="ignore"):  # values out of float32's range become infinite, and are dropped as such
        return tokens.astype(np.float32)


def without_padding(tokens: np.ndarray) -> np.ndarray:
    """(tokens, dim) without the rows of zeros at the end."""
    (used,) = np.nonzero(tokens.any(axis=1))
    return tokens[: used[-1] + 1 if len(used) else 0]
