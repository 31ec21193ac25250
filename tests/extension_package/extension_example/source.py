"""A source of single-coloured images."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from PIL import Image

from pipeline.config import Config
from pipeline.stage import Shard
from stages.sources.base import Emit, InputPart, Original, Row, Source

CAPTIONS = ("red", "a green image", "an image that is blue all over")
COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


class SolidConfig(Config):
    """Images of one color each: red, green, blue, red ..."""

    kind: Literal["solid"] = "solid"
    num_samples: int = 6
    """Number of images."""

    def build(self) -> "SolidSource":
        return SolidSource(self)


class SolidSource(Source):
    """A row is [key, number, is_duplicate]."""

    def __init__(self, config: SolidConfig):
        self.config = config

    def check(self) -> None:
        """Nothing can be missing."""

    def parts(self) -> Iterator[InputPart]:
        yield InputPart("solid", rows=self.config.num_samples)

    def rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, Row]]:
        for part in parts:
            for number in range(part.first, part.first + (part.rows or 0)):
                yield part, [f"solid-{number}", number, False]

    def fetch(self, shard: Shard, wanted: frozenset[str] | None, scratch: Path, emit: Emit) -> None:
        for row, (key, number, _) in enumerate(shard.rows):
            if wanted is None or key in wanted:
                file = io.BytesIO()
                Image.new("RGB", (32, 32), COLORS[number % 3]).save(file, "PNG")
                emit(Original(row, key, None, (CAPTIONS[number % 3],), file.getvalue()))
