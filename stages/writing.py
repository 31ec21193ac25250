"""What a source may tell of the writing in a picture: its text and its place, in columns that are configured."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config import Config
from stages.captions import is_valid_text

Written = dict[str, Any]
"""Field of `SampleRow` -> value, for the columns that are configured; JSON-able."""

WRITING_COLUMNS = ("transcription_column", "safebox_column")
_MAX_PX = 2**31 - 1


class WritingConfig(Config):
    """Columns of the writing in a picture."""

    transcription_column: str | None = None
    """Column of the text written in the picture, as it is read there; empty where there is none. null: not known."""
    safebox_column: str | None = None
    """Column of the rectangle around it, which crops in training never cut: left, top, right, bottom in pixels of the
    picture as it is shown (turned by its EXIF orientation), as a list or as text such as `10,20,110,60`."""

    @property
    def writing_columns(self) -> dict[str, str]:
        """Column by field of `SampleRow`, of those that are configured."""
        named = {name: getattr(self, name) for name in WRITING_COLUMNS}
        return {name.removesuffix("_column"): column for name, column in named.items() if column is not None}

    def written(self, record: Mapping[str, Any]) -> Written:
        """What a row has of them, not checked yet."""
        return {field: _plain(record.get(column)) for field, column in self.writing_columns.items()}

    def row_end(self, record: Mapping[str, Any]) -> list[object]:
        """`written` as the last item of a source row; nothing where no column is configured."""
        return [self.written(record)] if self.writing_columns else []


def check_written(written: Written) -> tuple[Written, str | None, str]:
    """What can be stored of `written`, and why not: a drop reason and its detail.

    The text is kept as it is, lines and spaces too. A rectangle grows to whole pixels; empty text is none.
    """
    text = written.get("transcription")
    if text is not None and not is_valid_text(text):
        return {}, "invalid_transcription", "not UTF-8"
    written = {field: value for field, value in written.items() if value is not None}
    box = written.pop("safebox", "").strip().strip("[]()")
    if box:
        try:
            left, top, right, bottom = map(float, box.split(","))
            if not (-_MAX_PX <= left < right <= _MAX_PX and -_MAX_PX <= top < bottom <= _MAX_PX):
                raise ValueError
        except ValueError:
            return {}, "invalid_safebox", f"{box[:80]!r} is not left,top,right,bottom in pixels"
        written["safebox"] = (math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))
    return written, None, ""


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    return ",".join(map(str, value)) if isinstance(value, Sequence) else str(value)
