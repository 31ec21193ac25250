"""What samples can be filtered by, sorted by and counted by."""

from dataclasses import dataclass
from typing import Literal

from imagen_core.store import Store
from imagen_core.store.read.computed import are_numbers


@dataclass(frozen=True, slots=True)
class Field:
    """A property of samples.

    Attributes:
        key: its name in addresses.
        title: its name on pages.
        column: its column in the table of samples; made of letters, digits and underscores.
        kind: whole numbers and numbers have ranges, and choices have some values that occur often.
    """

    key: str
    title: str
    column: str
    kind: Literal["int", "float", "choice"]

    @property
    def sql_type(self) -> str:
        """Its type in the table of samples."""
        return {"int": "BIGINT", "float": "DOUBLE", "choice": "VARCHAR"}[self.kind]


_KINDS: dict[str, Literal["int", "float", "choice"]] = {
    "int": "int",
    "float": "float",
    "bool": "choice",
    "text": "choice",
}


def text_columns(store: Store) -> dict[str, str]:
    """The sets of captions, that of `samples` first, each with the column of the table that has its captions."""
    return {name: f"text_{i}" if i else "text" for i, name in enumerate(store.caption_sets)}


def fields_of(store: Store) -> list[Field]:
    """The fields of a store's samples, in the order of the page."""
    scores = [name for name, group in store.manifest.arrays.items() if are_numbers(group.spec)]
    columns = store.columns.items()
    return [
        *_lengths(store),
        Field("width", "width, px", "width", "int"),
        Field("height", "height, px", "height", "int"),
        Field("aspect", "width / height", "aspect", "float"),
        Field("bucket", "bucket, width x height px", "bucket", "choice"),
        Field("host", "host of the URL", "host", "choice"),
        Field("label", "label", "label", "choice"),
        Field("copies", "samples of the same file", "copies", "int"),
        Field("duplicate", "found by the search for duplicates", "duplicate", "choice"),
        *(Field(f"array.{name}", name, f"array_{i}", "float") for i, name in enumerate(scores)),
        *(Field(f"column.{name}", name, f"column_{i}", _KINDS[kind]) for i, (name, kind) in enumerate(columns)),
    ]


def _lengths(store: Store) -> list[Field]:
    """Tokens of each encoder, then characters; those of further sets of captions behind those of the first."""
    first, *further = store.caption_sets
    of_first = f", {first}" if further else ""
    found = [
        Field(f"tokens.{name}", f"tokens of {name}{of_first}", f"tokens_{i}", "int")
        for i, name in enumerate(store.encoders)
    ]
    found += [
        Field(f"tokens.{encoder}/{of}", f"tokens of {encoder}, {of}", f"set_tokens_{i}", "int")
        for i, (encoder, of) in enumerate(store.manifest.set_texts)
    ]
    found.append(Field("characters", f"characters of the caption{of_first}", "characters", "int"))
    found += [
        Field(f"characters/{of}", f"characters of the caption, {of}", f"characters_{i}", "int")
        for i, of in enumerate(further, 1)
    ]
    return found
