"""A source of single-coloured images."""

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from PIL import Image

from pipeline.config import Config
from pipeline.stage import Shard
from stages.sources.base import PAYLOAD, Emit, InputPart, Original, Source, SourceRow

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
    """The payload of a row is the number of its image."""

    layout = ("key", "captions", PAYLOAD)

    def __init__(self, config: SolidConfig):
        self.config = config

    def check(self) -> None:
        """Nothing can be missing."""

    def parts(self) -> Iterator[InputPart]:
        yield InputPart("solid", rows=self.config.num_samples)

    def rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, SourceRow]]:
        for part in parts:
            for number in range(part.first, part.first + (part.rows or 0)):
                yield part, SourceRow(f"solid-{number}", captions=[CAPTIONS[number % 3]], payload=(number,))

    def fetch(self, shard: Shard, rows: Sequence[SourceRow], scratch: Path, emit: Emit) -> None:
        for row in rows:
            file = io.BytesIO()
            Image.new("RGB", (32, 32), COLORS[row.payload[0] % 3]).save(file, "PNG")
            emit(Original.of(row, file.getvalue()))
