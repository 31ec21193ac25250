"""What a source may tell of an image beside captions, in columns that are configured: its writing and its class."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config import Config
from stages.captions import is_valid_text

Annotations = dict[str, Any]
"""Field of `SampleRow` -> value, for the columns that are configured; JSON-able."""

ANNOTATION_COLUMNS = ("transcription_column", "safebox_column", "label_column")
_MAX_INT32 = 2**31 - 1


class AnnotationsConfig(Config):
    """Columns of the writing in an image, and of its class."""

    transcription_column: str | None = None
    """Column of the text written in the image, as it is read there; empty where there is none. null: not known."""
    safebox_column: str | None = None
    """Column of the rectangle around it, which crops in training never cut: left, top, right, bottom in pixels of the
    image as it is shown (turned by its EXIF orientation), as a list or as text such as `10,20,110,60`."""
    label_column: str | None = None
    """Column of the image's class, a number from 0, or a name of class_names; empty or -1: not known."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers, where label_column has names."""

    @property
    def annotation_columns(self) -> dict[str, str]:
        """Column by field of `SampleRow`, of those that are configured."""
        named = {name: getattr(self, name) for name in ANNOTATION_COLUMNS}
        return {name.removesuffix("_column"): column for name, column in named.items() if column is not None}

    @property
    def annotation_settings(self) -> dict[str, object]:
        """What a source's fingerprint says of them."""
        return {**self.annotation_columns, **({"class_names": self.class_names} if self.class_names else {})}

    def annotations(self, record: Mapping[str, Any]) -> Annotations:
        """What a row has of them, not checked yet."""
        found = {field: _plain(record.get(column)) for field, column in self.annotation_columns.items()}
        if found.get("label") in self.class_names:
            found["label"] = str(self.class_names.index(found["label"]))
        return found

    def row_end(self, record: Mapping[str, Any]) -> list[object]:
        """`annotations` as the last item of a source row; nothing where no column is configured."""
        return [self.annotations(record)] if self.annotation_columns else []


def check_annotations(annotations: Annotations) -> tuple[Annotations, str | None, str]:
    """What can be stored of them, and why not: a drop reason and its detail.

    The text is kept as it is, lines and spaces too. A rectangle grows to whole pixels; empty text is none.
    """
    text = annotations.get("transcription")
    if text is not None and not is_valid_text(text):
        return {}, "invalid_transcription", "not UTF-8"
    checked = {field: value for field, value in annotations.items() if value is not None}
    box = checked.pop("safebox", "").strip().strip("[]()")
    if box:
        try:
            left, top, right, bottom = map(float, box.split(","))
            if not (-_MAX_INT32 <= left < right <= _MAX_INT32 and -_MAX_INT32 <= top < bottom <= _MAX_INT32):
                raise ValueError
        except ValueError:
            return {}, "invalid_safebox", f"{box[:80]!r} is not left,top,right,bottom in pixels"
        checked["safebox"] = (math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))
    label = checked.pop("label", "").strip()
    if label:
        try:
            number = float(label)
            if not (number.is_integer() and -1 <= number <= _MAX_INT32):
                raise ValueError
        except ValueError:
            return {}, "invalid_label", f"{label[:80]!r} is neither a number from 0 nor a name of source.class_names"
        if number >= 0:
            checked["label"] = int(number)
    return checked, None, ""


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    return ",".join(map(str, value)) if isinstance(value, Sequence) else str(value)
