"""What a source may tell of an image in configured columns: several sets of captions, the text in it, its class, its
hash."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from imagen_core.store import ORIGINAL_CAPTIONS, ColumnType, is_legal_name
from pipeline.config import Config
from pipeline.errors import ConfigError
from stages.captions import is_valid_text
from stages.sources.records.cells import is_nothing, text_of, value_at
from stages.sources.records.kept import Kept, as_kept, check_names, kept_values
from stages.sources.records.types import Columns, Content, check_column

Annotations = dict[str, Any]
"""Field of `SampleRow` -> value, for the configured columns; JSON-able."""

_HASHES = ("sha256", "md5")
_TEXTS = ("transcription", *_HASHES)
_COLUMNS = ("transcription_column", "safebox_column", "label_column", *(f"{name}_column" for name in _HASHES))
_CONTENT: dict[str, Content] = {
    "caption_column": "texts",
    "file_column": "text",
    "image_column": "image",
    "key_column": "key",
    "label_column": "label",
    "md5_column": "text",
    "sha256_column": "text",
    "safebox_column": "box",
    "transcription_column": "text",
    "url_column": "text",
}
_MAX_INT32 = 2**31 - 1


class CaptionColumn(Config):
    """A set of captions, in a column of the table."""

    column: str = Field(min_length=1)
    """Column of the caption, or of a list of captions, or a path into nested columns such as `sentences.raw`."""
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """How often training takes a caption of this set: this, divided by the sum of all weights. It is the default of
    trainings and changes nothing that is stored."""
    name: str | None = None
    """Names the set in the store; null: as the column."""

    @property
    def called(self) -> str:
        """The set's name."""
        return self.column if self.name is None else self.name


class AnnotationsConfig(Config):
    """Columns of several sets of captions, of the text in an image, of its class, of the hash that its file has, and
    others; and which rows there are by their columns."""

    takes_caption_sets: ClassVar[bool] = False
    """Whether the captions are in columns of a table that are read again for a set that is added later."""

    captions: tuple[CaptionColumn, ...] = ()
    """Several sets of captions with weights, instead of caption_column, such as
    `[{column: long, weight: 0.8}, {column: short, weight: 0.2}]`. Each sample has a caption of the first. Further sets
    can be added later, and only what belongs to them is made then."""
    transcription_column: str | None = None
    """Column of the text written in the image, as one reads it there; empty where there is none. null: not known."""
    safebox_column: str | None = None
    """Column of the rectangle around it, which crops in training always keep: left, top, right, bottom in pixels of
    the image as it is shown (turned by its EXIF orientation), as a list or as text such as `10,20,110,60`."""
    label_column: str | None = None
    """Column of the image's class, a number from 0, or one of class_names; empty or -1: not known."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers, where label_column has names."""
    sha256_column: str | None = None
    """Column of the SHA-256 that the bytes of the image's file must have, as hexadecimal text or as bytes; other bytes
    are the drop `hash_mismatch`. NULL or empty: not compared."""
    md5_column: str | None = None
    """The same of MD5."""
    where: str | None = None
    """Which rows to take, as an SQL condition on the columns such as `punsafe < 0.1 and aesthetic >= 5.5`. Others are
    counted as `filtered`. null: all."""
    keep_columns: dict[str, ColumnType | None] = Field(default_factory=dict)
    """Columns that the store keeps, such as `[aesthetic, punsafe]`, for `sample.columns` and the `where` of a
    training. Their types are those of the table; or, in text and JSON, what the first rows hold: bool, float or text.
    A mapping such as `{aesthetic: float, id: int}` gives them. A value of another type is the drop
    `unsupported_type`."""

    @model_validator(mode="before")
    @classmethod
    def _first_set_is_caption_column(cls, data: Any) -> Any:
        captions: Any = data.get("captions") if isinstance(data, Mapping) else None
        if not isinstance(captions, Sequence) or not captions:
            return data
        first: Any = captions[0]
        column = first.get("column") if isinstance(first, Mapping) else getattr(first, "column", None)
        given = data.get("caption_column", column)
        if given != column:
            raise ValueError(
                f"captions: its first set is of the column {column!r}, but caption_column is {given!r}; leave "
                "caption_column out"
            )
        return {**data, "caption_column": column}

    @model_validator(mode="after")
    def _check_captions(self) -> Self:
        if self.captions and not self.takes_caption_sets:
            raise ValueError(
                f"captions: sets of captions are for source.kind=urls, parquet and huggingface, not "
                f"{getattr(self, 'kind', 'this one')}; leave it out, or convert the captions to a table"
            )
        names = [captions.called for captions in self.captions]
        for place, name in enumerate(names):
            if not is_legal_name(name):
                raise ValueError(
                    f"captions.{place}: a set cannot be named {name!r}; give it a name of letters, digits, '.', '_' "
                    "and '-', a letter or digit first"
                )
            if name in names[:place] or (place and name == ORIGINAL_CAPTIONS):
                taken = "is there twice" if name in names[:place] else "names the captions of a store without sets"
                raise ValueError(f"captions.{place}: {name!r} {taken}; give the set another name")
        if self.captions and not any(captions.weight for captions in self.captions):
            raise ValueError("captions: all weights are 0, so no caption would be taken; give one a weight above 0")
        return self

    @field_validator("keep_columns", mode="before")
    @classmethod
    def _columns_as_mapping(cls, columns: object) -> object:
        return as_kept(columns)

    @field_validator("keep_columns")
    @classmethod
    def _check_kept(cls, columns: dict[str, ColumnType | None]) -> dict[str, ColumnType | None]:
        check_names(columns)
        return columns

    @property
    def further_captions(self) -> tuple[CaptionColumn, ...]:
        """The sets of captions but the first, which is that of caption_column."""
        return self.captions[1:]

    @property
    def further_columns(self) -> list[str]:
        """The columns of these."""
        return list(dict.fromkeys(captions.column for captions in self.further_captions))

    @property
    def row_settings(self) -> dict[str, Any]:
        """All settings that the rows and the cells of further columns may depend on."""
        settings = self.model_dump(mode="json", exclude={"captions"})
        return {**settings, **({"captions": self.further_columns} if self.further_captions else {})}

    @property
    def annotation_columns(self) -> dict[str, str]:
        """The configured columns, by field of `SampleRow`."""
        named = {name: getattr(self, name) for name in _COLUMNS}
        return {name.removesuffix("_column"): column for name, column in named.items() if column is not None}

    @property
    def annotation_names(self) -> list[str]:
        """All columns that are read for annotations, kept ones included."""
        return list(dict.fromkeys([*self.annotation_columns.values(), *self.keep_columns]))

    @property
    def annotation_settings(self) -> dict[str, object]:
        """The annotations' part of a source's fingerprint."""
        others = {"class_names": self.class_names, "keep_columns": self.keep_columns, "where": self.where}
        return {**self.annotation_columns, **{name: value for name, value in others.items() if value}}

    def annotations(self, record: Mapping[str, Any]) -> Annotations:
        """The annotations in a record of a table, not checked yet.

        Raises:
            BadCell: the transcription is no text, a kept column of another type, or the line could not be parsed.
        """
        found = {
            field: text_of(record, column) if field in _TEXTS else _plain(value_at(record, column))
            for field, column in self.annotation_columns.items()
        }
        if found.get("label") in self.class_names:
            found["label"] = str(self.class_names.index(found["label"]))
        return {**found, "columns": kept_values(record, self.keep_columns)} if self.keep_columns else found

    @property
    def annotation_layout(self) -> tuple[str, ...]:
        """The part of `Source.layout` for annotations that the rows have; empty if no column is configured."""
        return ("annotations",) if self.annotation_names else ()

    def check_columns(self, fields: Iterable[str], present: Columns, where: str) -> None:
        """Checks that the columns which `fields` and those for annotations name exist, and that their types fit.

        Raises:
            ConfigError: one is not among the columns `present` of the table `where`, or has another type.
        """
        for field in (*fields, *_COLUMNS):
            column = getattr(self, field)
            if column is not None:
                or_else = "; null if there are no captions" if field == "caption_column" else ""
                if field == "caption_column" and self.captions:
                    continue
                check_column(field, column, _CONTENT[field], present, where, or_else=or_else)
        for place, captions in enumerate(self.captions):
            check_column(f"captions.{place}.column", captions.column, "texts", present, where)
        for column in self.keep_columns:
            check_column("keep_columns", column, "kept", present, where)

    def with_types(self, types: Callable[[Kept], Mapping[str, ColumnType]]) -> Self:
        """With a type for each kept column.

        Args:
            types: finds those of the source.
        Raises:
            ConfigError: a column without a given type has no value from which it could be known.
        """
        if not self.keep_columns:
            return self
        found = types(self.keep_columns)
        kinds = {name: kind or found.get(name) for name, kind in self.keep_columns.items()}
        unknown = next((name for name, kind in kinds.items() if kind is None), None)
        if unknown is not None:
            raise ConfigError(
                f"source.keep_columns: no value of {unknown!r} is in the first rows, which would tell its type; check "
                f"the name, or give the type: {{{unknown}: float}} (or bool, int, text)"
            )
        return self.model_copy(update={"keep_columns": kinds})


def check_hashes(annotations: Annotations, data: bytes | None) -> tuple[Annotations, str | None]:
    """The annotations without the hashes in them, and why the file of the image is not the one that they are of."""
    others = {field: value for field, value in annotations.items() if field not in _HASHES}
    if data is None:
        return others, None
    for name in _HASHES:
        expected = annotations.get(name)
        if not expected or not expected.strip():
            continue
        found = hashlib.new(name, data, usedforsecurity=False)
        raw = expected.encode("utf-8", "surrogateescape")
        wanted = raw.hex() if len(raw) == found.digest_size else expected.strip().lower()
        if wanted != found.hexdigest():
            return others, f"{name} {found.hexdigest()}, but {wanted[:128]!r} was expected"
    return others, None


def has_label(annotations: Annotations) -> bool:
    """Whether the class of a row is known."""
    label = annotations.get("label")
    return label is not None and str(label).strip() not in ("", "-1", "-1.0")


def check_annotations(annotations: Annotations) -> tuple[Annotations, str | None, str]:
    """The annotations as the store has them; or the reason and the detail of the drop if they are not valid.

    The text is kept as it is, including line ends and spaces. A rectangle grows to integer pixels; an empty rectangle
    or label is not known.
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
    if is_nothing(value):
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, str):
        return value
    return ",".join(map(str, value)) if isinstance(value, Sequence) else str(value)
