"""Text caches of other trainers: which file has the embedding of a sample, and what of it is the text."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np

from pipeline.config import Config


class Unusable(Exception):
    """Why a sample gets no embedding from its cache file: the reason of a drop, and its detail."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class CachedText:
    """What a cache has of a caption."""

    array: np.ndarray
    """(tokens, dim), or (dim,) of a pooled vector; axes of length 1 in front of them are allowed."""
    mask: np.ndarray | None = None
    """What is text is not 0: one number per token. None: all is."""


class CacheConfig(Config):
    """A text cache: one file per image or per caption. A new kind needs `kind`, `files` and `read`."""

    kind: Any
    folder: str | None
    """The folder of the cache, local or any fsspec URL. null: its files lie next to the images."""
    pads: Literal["cut", "keep"] = "cut"
    """cut: only the tokens that the cache's mask marks as text are stored. keep: also the rows of its padding, for
    networks that read them."""

    @abstractmethod
    def files(self, image: str, captions: Sequence[str]) -> Sequence[str]:
        """Where the embedding of a sample may be, relative to the folder; the first that exists is taken.

        Args:
            image: the image's path, relative to the folder of the source.
            captions: of the sample, as they are in the source.
        """

    @abstractmethod
    def read(self, data: bytes, captions: Sequence[str]) -> CachedText:
        """What the bytes of such a file hold.

        Args:
            captions: of the sample, cleaned.
        Raises:
            Unusable: they hold no embedding of it.
        """

    def embedding(self, data: bytes, captions: Sequence[str]) -> np.ndarray:
        """The embedding in a file, (tokens, dim) or (dim,); raises as `read`."""
        found = self.read(data, captions)
        return cut_to_text(found.array, found.mask, keep_pads=self.pads == "keep")

    def describe(self) -> dict[str, object]:
        """How the arrays are found, for the fingerprint of the embeddings; no paths."""
        return {"kind": self.kind, **self.model_dump(mode="json", exclude={"folder"}, exclude_defaults=True)}


def cut_to_text(array: np.ndarray, mask: np.ndarray | None, *, keep_pads: bool) -> np.ndarray:
    """The rows of (..., tokens, dim) that a mask marks as text; axes of length 1 in front are left out.

    Args:
        mask: one number per token, or per token that there was before the padding was left out.
    Raises:
        Unusable: the mask is of another length, marks nothing, or has holes.
    """
    while array.ndim > 2 and len(array) == 1:
        array = array[0]
    if mask is None or array.ndim != 2 or keep_pads:
        return array
    marked = mask.reshape(-1) != 0
    (places,) = np.nonzero(marked)
    if not len(places):
        raise Unusable("missing_embedding", "its mask marks no token as text")
    if places[-1] - places[0] + 1 != len(places):
        raise Unusable("mask_with_holes", f"{len(places)} tokens of text between {places[0]} and {places[-1]}")
    if len(marked) == len(array):
        return array[places[0] : places[-1] + 1]
    if len(places) == len(array):  # its padding was left out already
        return array
    raise Unusable("unreadable_embedding", f"{len(array)} tokens with a mask of {len(marked)}")


def beside(image: str, folder: str | None, suffix: str) -> str:
    """`a/b.png` -> `a/bSUFFIX`; in a folder of its own, which has no subfolders, `bSUFFIX`."""
    path = PurePosixPath(image)
    name = f"{path.stem}{suffix}"
    return name if folder is not None else (path.parent / name).as_posix()
