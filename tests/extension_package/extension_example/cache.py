"""A text cache of NAME.npy next to NAME.png, padded with rows of -1."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Literal

from pipeline.errors import ConfigError
from stages.sources.arrays.npy import parse
from stages.sources.caches.base import CacheConfig, CachedText, Unusable
from stages.sources.files import Damaged


class PlainNpyConfig(CacheConfig):
    """Arrays of (tokens, dim) in .npy files."""

    kind: Literal["plain_npy"] = "plain_npy"
    folder: str | None = None
    """The folder of the .npy files."""

    def files(self, image: str, captions: Sequence[str]) -> Sequence[str]:
        return [PurePosixPath(image).with_suffix(".npy").as_posix()]

    def read(self, data: bytes, captions: Sequence[str]) -> CachedText:
        try:
            array = parse(data, "the file")
        except (ConfigError, Damaged) as error:
            raise Unusable("unreadable_embedding", str(error)) from error
        return CachedText(array, (array != -1).any(axis=1))
