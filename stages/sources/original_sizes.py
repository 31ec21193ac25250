"""Width and height of some originals of a source, as far as they are at hand before a run."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from imagen_core.far.calls import is_far
from pipeline.stage import Shard
from pipeline.storage.scratch import temporary_folder
from stages.images import MAX_PIXELS, ImageRejected, decode_rgb
from stages.sources.base import InputPart, Original, Source
from stages.sources.records.parquet import to_records
from stages.sources.tables import HEAD_ROWS, columns, cursor_at
from stages.sources.tabular.table_rows import TableSource, kept_of

_COLUMNS = (("width", "height"), ("original_width", "original_height"), ("image_width", "image_height"))
"""What columns of widths and heights are called, in any case."""
_MOST_FILES, _MOST_ROWS, _MOST_IMAGES = 8, 8192, 64
_MOST_PX = 1e9
"""A larger width or height is none."""

Size = tuple[int, int]
"""Width and height in pixels."""


def original_sizes(source: Source, shards: Sequence[Shard]) -> tuple[list[Size], str]:
    """Some sizes, and where they are from: columns of a table such as `width` and `height`, else images that lie on
    this machine. Nothing is downloaded. Values that are no sizes, and images that cannot be decoded, are left out.

    Args:
        shards: some of the source's, evenly spread over it.
    """
    if isinstance(source, TableSource):
        found = list(_of_tables(source))
        if found:
            return found, f"the columns of width and height of {len(found):,} rows"
    if not source.has_images_at_hand or is_far(getattr(source, "path", "")):
        return [], ""
    found = list(_of_images(source, shards))
    return found, f"{len(found)} images of the input"


def _of_tables(source: TableSource) -> Iterator[Size]:
    parts = list(source.parts())
    parts = parts[:: -(-len(parts) // _MOST_FILES)] if parts else []
    for part in parts:
        yield from _of_table(source, part, _MOST_ROWS // len(parts))


def _of_table(source: TableSource, part: InputPart, num_rows: int) -> Iterator[Size]:
    path, row_filter = f"{source.folder}/{part.path}", source.row_filter
    present = {name.lower(): name for name in columns(path, ("width", "height"), HEAD_ROWS)}
    named = next((pair for pair in _COLUMNS if all(name in present for name in pair)), None)
    if named is None:
        return
    wanted = [present[name] for name in named]
    more = () if row_filter is None else row_filter.columns
    for chunk in cursor_at(path, [*wanted, *more], part.first, row_filter).take(num_rows):
        kept, _ = kept_of(chunk, row_filter)
        yield from (size for record in to_records(kept) if (size := _size(record, wanted)) is not None)


def _size(record: Mapping[str, Any], names: Sequence[str]) -> Size | None:
    try:
        width, height = (float(record[name]) for name in names)
    except (KeyError, TypeError, ValueError):
        return None
    return (int(width), int(height)) if min(width, height) >= 1 and max(width, height) < _MOST_PX else None


def _of_images(source: Source, shards: Sequence[Shard]) -> Iterator[Size]:
    originals: list[Original] = []
    with temporary_folder() as scratch:
        for shard in shards:
            rows = source.rows_of(shard)
            each = -(-_MOST_IMAGES // len(shards))
            stride = max(1, len(rows) // each)
            usable = [row for row in islice(rows, 0, None, stride) if row.drop is None][:each]
            source.fetch(shard, usable, scratch, originals.append)
            for original in originals:
                if original.data is None:
                    continue
                try:
                    pixels = decode_rgb(original.data, max_pixels=MAX_PIXELS, orientation=original.orientation).pixels
                except ImageRejected:
                    continue
                yield pixels.shape[1], pixels.shape[0]
            originals.clear()
