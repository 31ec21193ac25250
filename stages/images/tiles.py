"""Tiles of an image: what needs several bytes per pixel is done tile by tile, so that it needs them for one only."""

from collections.abc import Iterator

_TILE_PIXELS = 2**20

Tile = tuple[slice, slice]
"""Rows and columns."""


def tiles(height: int, width: int) -> Iterator[Tile]:
    """Tiles of at most 2**20 pixels that cover an image once: full rows if one fits, from top to bottom."""
    columns = max(1, min(width, _TILE_PIXELS))
    rows = max(1, _TILE_PIXELS // columns)
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            yield slice(top, min(height, top + rows)), slice(left, min(width, left + columns))


def box(tile: Tile) -> tuple[int, int, int, int]:
    """The tile as Pillow names it: left, top, right, bottom."""
    rows, columns = tile
    return columns.start, rows.start, columns.stop, rows.stop
